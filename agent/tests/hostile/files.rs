//! Hostile files that the agent reads for names and for unwind tables.

use std::{
    ffi::CString,
    fs::{self, File},
    io::{Seek as _, SeekFrom, Write as _},
    os::unix::{ffi::OsStrExt as _, fs::symlink},
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    common::run,
    elf::{self, Elf, SH_OFFSET, SH_SIZE, ZLIB, ZSTD},
    stage::{Case, Removed, Stage, Started},
};

/// The size of a sparse file that is larger than any disk here.
const HUGE: u64 = 20 << 30;

/// What a path may lead to.
#[derive(Clone, Copy)]
enum Trap {
    Fifo,
    Device(&'static str),
    /// A sparse file of 20 GiB that begins as an ELF file.
    Sparse,
    Directory,
    Loop,
    /// The debug information of another program.
    Foreign,
}

impl Trap {
    fn lay(self, stage: &Stage, path: &Path) {
        match self {
            Trap::Fifo => {
                let path = CString::new(path.as_os_str().as_bytes()).expect("no NUL");
                // SAFETY: the pointer is to a string that ends in NUL and outlives the call.
                assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o644) }, 0, "mkfifo");
            }
            Trap::Device(device) => symlink(device, path).expect("a link"),
            Trap::Sparse => {
                fs::copy(foreign(stage), path).expect("a copy");
                let file = File::options()
                    .write(true)
                    .open(path)
                    .expect("a file of ours");
                file.set_len(HUGE).expect("a sparse file");
            }
            Trap::Directory => fs::create_dir(path).expect("a directory"),
            Trap::Loop => {
                let other = path.with_extension("loop");
                symlink(path, &other).expect("a link");
                symlink(&other, path).expect("a link");
            }
            Trap::Foreign => {
                fs::copy(foreign(stage), path).expect("a copy");
            }
        }
    }
}

/// The hostile program with other names for its functions.
fn foreign(stage: &Stage) -> PathBuf {
    let path = stage.workshop.path().join("foreign.debug");
    if !path.exists() {
        let names = [
            "-g",
            "-pthread",
            "-Dwork=wrong_name",
            "-Dfor_ever=wrong_caller",
        ];
        stage.workshop.cc("hostile.c", "foreign.debug", &names);
    }
    path
}

/// Runs a copy of a program that was changed by `change` before.
fn changed(stage: &Stage, name: &'static str, program: &Path, change: impl Fn(&Path)) -> Started {
    let program = stage.copy(program, name);
    change(&program);
    Started {
        wrong: vec!["wrong_name"],
        ..Started::of(stage.run(&program, &["gently"]))
    }
}

fn debug_link(name: &'static str, trap: Trap, path: fn(&Path, &str) -> String) -> Case {
    Case::new(name, move |stage, name| {
        let file = stage.workshop.path().join(format!("{name}.debug"));
        let _ = fs::remove_file(&file);
        let _ = fs::remove_dir(&file);
        let _ = fs::remove_file(file.with_extension("loop"));
        trap.lay(stage, &file);
        changed(stage, name, &stage.stripped, |program| {
            let link = elf::debug_link(&path(stage.workshop.path(), name), 0xdead_beef);
            elf::add_section(program, ".gnu_debuglink", &link);
        })
    })
    .refused()
}

/// Cases in which `.gnu_debuglink` names each of the traps.
pub fn debug_links() -> Vec<Case> {
    let absolute = |directory: &Path, name: &str| format!("{}/{name}.debug", directory.display());
    let relative = |_: &Path, name: &str| format!("{name}.debug");
    // Enough steps up to reach the root directory from anywhere.
    let outside = |directory: &Path, name: &str| {
        format!("{}{}/{name}.debug", "../".repeat(20), directory.display())
    };
    vec![
        debug_link("link_fifo", Trap::Fifo, absolute),
        debug_link("link_fifo_near", Trap::Fifo, relative),
        debug_link("link_zero", Trap::Device("/dev/zero"), relative),
        debug_link("link_terminal", Trap::Device("/dev/tty"), relative),
        debug_link("link_sparse", Trap::Sparse, relative),
        debug_link("link_directory", Trap::Directory, relative),
        debug_link("link_loop", Trap::Loop, relative),
        debug_link("link_outside", Trap::Foreign, outside),
        debug_link("link_checksum", Trap::Foreign, relative),
    ]
}

fn alternate(name: &'static str, trap: Trap) -> Case {
    Case::new(name, move |stage, name| {
        let file = stage.workshop.path().join(format!("{name}.debug"));
        let _ = fs::remove_file(&file);
        let _ = fs::remove_file(file.with_extension("loop"));
        trap.lay(stage, &file);
        changed(stage, name, &stage.hostile, |program| {
            let link = elf::alternate_link(file.to_str().expect("a path of ours"));
            elf::add_section(program, ".gnu_debugaltlink", &link);
        })
    })
    .named()
    .refused()
}

fn bomb(name: &'static str, algorithm: u32, claimed: u64, packed: fn() -> Vec<u8>) -> Case {
    Case::new(name, move |stage, name| {
        changed(stage, name, &stage.hostile, |program| {
            let mut file = Elf::read(program);
            for section in [".debug_info", ".debug_str", ".debug_line"] {
                file.set_compressed(section, algorithm, claimed, &packed());
            }
            file.write();
        })
    })
    .refused()
}

/// Cases with alternate links (written by `dwz`) to traps, and with compressed sections that unpack to more
/// than the memory there is.
pub fn alternates_and_bombs() -> Vec<Case> {
    vec![
        alternate("alt_fifo", Trap::Fifo),
        alternate("alt_zero", Trap::Device("/dev/zero")),
        alternate("alt_sparse", Trap::Sparse),
        alternate("alt_loop", Trap::Loop),
        bomb("bomb_zlib", ZLIB, 4 << 30, || elf::zlib_zeros(256)),
        bomb("bomb_zstd", ZSTD, 4 << 30, || elf::zstd_zeros(1 << 15)),
        bomb("bomb_claim", ZLIB, 4 << 30, || elf::zlib_zeros(1)),
    ]
}

fn broken(name: &'static str, change: impl Fn(&mut Elf<'_>) + Copy + 'static) -> Case {
    Case::new(name, move |stage, name| {
        changed(stage, name, &stage.hostile, |program| {
            let mut file = Elf::read(program);
            change(&mut file);
            file.write();
        })
    })
}

fn renamed(name: &'static str, new: fn() -> String) -> Case {
    Case::new(name, move |stage, name| {
        changed(stage, name, &stage.hostile, |program| {
            // Without debug information, which contains the name as well.
            elf::objcopy(program, &["--strip-debug"]);
            let list = program.with_extension("names");
            fs::write(&list, format!("work {}\n", new())).expect("a file of ours");
            elf::objcopy(program, &["--redefine-syms", list.to_str().expect("UTF-8")]);
        })
    })
}

/// Cases with executables whose tables are damaged. All of them run.
pub fn executables() -> Vec<Case> {
    vec![
        broken("elf_cut", |file| {
            let headers = file.word(0x28) as usize;
            file.bytes.truncate(headers + 200);
        }),
        broken("elf_headers", |file| {
            // If the header's number of sections is zero, the size field of the first section is the
            // number.
            let headers = file.word(0x28) as usize;
            file.bytes[0x3c..0x3e].copy_from_slice(&[0, 0]);
            file.set(headers + SH_SIZE, 1 << 40);
        }),
        broken("elf_million", |file| {
            file.set_content(".eh_frame", &elf::many_entries(1_000_000));
        }),
        broken("elf_circle", |file| {
            file.set_content(".eh_frame", &elf::circular_entries(1_000_000));
        }),
        broken("elf_offsets", |file| {
            for section in [".eh_frame", ".symtab", ".debug_abbrev"] {
                let header = file.section(section);
                file.set(header + SH_OFFSET, u64::MAX - 8);
                file.set(header + SH_SIZE, u64::MAX - 8);
            }
        }),
        broken("elf_strings", |file| {
            file.set_content(".strtab", &vec![b'A'; 64 << 20]);
        }),
        Case::new("elf_sparse", |stage, name| {
            changed(stage, name, &stage.hostile, |program| {
                let file = File::options()
                    .write(true)
                    .open(program)
                    .expect("a file of ours");
                file.set_len(HUGE).expect("a sparse file");
            })
        }),
        renamed("elf_long_name", || "long".repeat(1 << 18)),
        renamed("elf_escapes", || "\u{1b}[2J\u{1b}]0;mine\u{7}".to_owned()),
    ]
}

/// A case with a perf map that is written after the process has started.
fn perf_map(name: &'static str, write: impl Fn(&Stage, &Path, u64) + 'static) -> Case {
    Case::new(name, move |stage, name| {
        let program = stage.copy(&stage.hostile, name);
        let running = stage.run(&program, &["code"]);
        let stdout = running.stdout();
        let code = stdout.split_whitespace().nth(1);
        let code = code.and_then(|code| u64::from_str_radix(code, 16).ok());
        let path = PathBuf::from(format!("/tmp/perf-{}.map", running.pid()));
        let started = Started {
            files: vec![Removed(path.clone())],
            ..Started::of(running)
        };
        write(stage, &path, code.expect("the address of the code"));
        started
    })
}

/// Cases with perf maps that cannot be read, and with links in the debug directory of a container.
pub fn maps_and_directories() -> Vec<Case> {
    vec![
        perf_map("map_fifo", |stage, path, _| Trap::Fifo.lay(stage, path)).refused(),
        perf_map("map_link", |stage, path, _| {
            Trap::Device("/dev/zero").lay(stage, path);
        })
        .refused(),
        perf_map("map_gigabyte", |_, path, code| {
            let mut file = File::create_new(path).expect("a perf map");
            let lines = format!("{code:x} 100 in_a_gigabyte\n").repeat(1 << 18);
            file.write_all(lines.as_bytes()).expect("a perf map");
            file.seek(SeekFrom::Start(1 << 30)).expect("a perf map");
            file.write_all(lines.as_bytes()).expect("a perf map");
        })
        .refused(),
        perf_map("map_long_names", |_, path, code| {
            let mut file = File::create_new(path).expect("a perf map");
            for letter in 'a'..='z' {
                let name = letter.to_string().repeat(1 << 20);
                writeln!(file, "{code:x} 100 {name}").expect("a perf map");
            }
        }),
        Case::new("map_growing", |stage, name| {
            let program = stage.copy(&stage.hostile, name);
            let running = stage.run(&program, &["grow"]);
            let path = PathBuf::from(format!("/tmp/perf-{}.map", running.pid()));
            Started {
                files: vec![Removed(path)],
                ..Started::of(running)
            }
        }),
        // In that root the file does not exist, so there is nothing to refuse.
        Case::new("root_links", root_with_links),
    ]
}

/// A process with its own root and mounts, in which the debug file for its build id is a link. The path of
/// the link does not exist in that root and is a FIFO outside of it.
fn root_with_links(stage: &Stage, name: &'static str) -> Started {
    let root = stage.workshop.path().join("root");
    let _ = fs::remove_dir_all(&root);
    let debug = root.join("usr/lib/debug/.build-id/01");
    fs::create_dir_all(&debug).expect("directories");
    let id = format!("-Wl,--build-id=0x01{}", "23".repeat(19));
    let flags = ["-s", "-static", "-pthread", "-Wno-error", &id];
    let program = stage.workshop.cc("hostile.c", name, &flags);
    fs::rename(&program, root.join(name)).expect("a program");
    let fifo = stage.workshop.path().join("root_links.debug");
    let _ = fs::remove_file(&fifo);
    Trap::Fifo.lay(stage, &fifo);
    symlink(&fifo, debug.join(format!("{}.debug", "23".repeat(19)))).expect("a link");
    let mut command = Command::new("unshare");
    command.args(["--mount", "--root"]).arg(&root);
    command.arg(format!("/{name}")).arg("gently");
    Started::of(stage.begin(command))
}

/// Builds the library, with some functions renamed: `functions` has pairs `old=new`. The functions stay at
/// the same addresses.
pub fn library(stage: &Stage, name: &str, functions: &str) -> PathBuf {
    let defines: Vec<String> = functions
        .split(' ')
        .map(|renamed| format!("-D{renamed}"))
        .collect();
    let mut flags = vec!["-shared", "-fPIC"];
    flags.extend(
        defines
            .iter()
            .map(String::as_str)
            .filter(|flag| flag.len() > 2),
    );
    stage.workshop.cc("plugin.c", name, &flags)
}

/// Overwrites an existing file as `cp` does: the same inode, other content.
pub fn copy_over(from: &Path, to: &Path) {
    let mut command = Command::new("cp");
    command.arg("--no-preserve=all").arg(from).arg(to);
    run(command);
}
