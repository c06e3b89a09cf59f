//! Names of addresses in small programs that the tests compile: everything that is known of a function must
//! be in its name and lines, and nothing that is wrong.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent_ebpf::sample::Outcome;
use flamestorm::file::OpenFile;
use flamestorm::naming::resolve;
use flamestorm::profile::{
    Frame, Module, ModuleId, Process, ProcessIndex, RawSample, RecordingMeta, ResolvedProfile,
    Source, Window,
};
use flamestorm::symbolize::{FunctionStarts, NoFunctionStarts, Options, find_in_perf_map};

const LIBRARY: &str = r#"
__attribute__((noinline)) int exported(int x) { return x * 3 + 1; }
__attribute__((noinline)) static int hidden(int x) { return exported(x) + 2; }
static inline __attribute__((always_inline)) int innermost(int x) {
    return exported(x ^ 5) + 1; /* innermost */
}
static inline __attribute__((always_inline)) int middle(int x) {
    return innermost(x) * 2; /* middle */
}
__attribute__((noinline)) int outer(int x) {
    return middle(x) + hidden(x); /* outer */
}
"#;

fn run(command: &mut Command) -> Vec<u8> {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

/// A compiled program, with the symbols that `nm` prints before it is stripped.
struct Fixture {
    dir: tempfile::TempDir,
    path: PathBuf,
    /// Name → (svma, size in bytes).
    symbols: BTreeMap<String, (u64, u64)>,
}

impl Fixture {
    fn c(source: &str, flags: &[&str]) -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let input = dir.path().join("lib.c");
        let path = dir.path().join("libfixture.so");
        fs::write(&input, source).unwrap();
        run(Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-g", "-Wl,--build-id"])
            .args(flags)
            .arg(&input)
            .arg("-o")
            .arg(&path));
        Fixture::open(dir, path)
    }

    fn rust(source: &str) -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let input = dir.path().join("fixture.rs");
        let path = dir.path().join("fixture");
        fs::write(&input, source).unwrap();
        run(Command::new("rustc")
            .args(["--edition", "2024", "-C", "opt-level=2", "-g"])
            .arg(&input)
            .arg("-o")
            .arg(&path));
        Fixture::open(dir, path)
    }

    fn open(dir: tempfile::TempDir, path: PathBuf) -> Fixture {
        let nm = run(Command::new("nm").args(["-S", "--defined-only"]).arg(&path));
        let symbols = String::from_utf8(nm)
            .unwrap()
            .lines()
            .filter_map(|line| {
                let fields: Vec<_> = line.split_whitespace().collect();
                let number = |field: &str| u64::from_str_radix(field, 16).ok();
                match fields[..] {
                    [start, size, _, name] => Some((name.into(), (number(start)?, number(size)?))),
                    [start, _, name] => Some((name.into(), (number(start)?, 0))),
                    _ => None,
                }
            })
            .collect();
        Fixture { dir, path, symbols }
    }

    fn strip(&self) {
        run(Command::new("strip").arg(&self.path));
    }

    /// Copies the debug information into a separate file.
    fn split_debug(&self, name: &Path) {
        run(Command::new("objcopy")
            .arg("--only-keep-debug")
            .arg(&self.path)
            .arg(name));
    }

    fn build_id(&self) -> Vec<u8> {
        let notes = run(Command::new("readelf").arg("-n").arg(&self.path));
        let notes = String::from_utf8(notes).unwrap();
        let (_, hex) = notes.split_once("Build ID: ").unwrap();
        let hex: Vec<_> = hex.trim().lines().next().unwrap().bytes().collect();
        hex.chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect()
    }

    fn start(&self, name: &str) -> u64 {
        self.symbols[name].0
    }

    /// The start of the function whose mangled name contains `part`.
    fn start_of(&self, part: &str) -> u64 {
        let mut found = self.symbols.iter().filter(|(name, _)| name.contains(part));
        found.next().unwrap_or_else(|| panic!("no {part}")).1.0
    }

    fn module(&self) -> Module {
        Module {
            name: "/usr/lib/libfixture.so".to_owned(),
            build_id: None,
            source: Source::File(Arc::new(OpenFile::new(File::open(&self.path).unwrap()))),
            is_local: true,
            debug_dir: None,
            version: None,
            snapshot: None,
        }
    }
}

/// Function starts as the unwind tables would give them, taken from `nm` before the file was stripped.
impl FunctionStarts for Fixture {
    fn function_starts(&self, _: &Module, addresses: &[u64]) -> Vec<Option<u64>> {
        let start = |address: &u64| {
            let mut functions = self.symbols.values();
            let covering = functions.find(|(start, size)| (*start..start + size).contains(address));
            Some(covering?.0)
        };
        addresses.iter().map(start).collect()
    }
}

fn options<'a>(starts: &'a dyn FunctionStarts) -> Options<'a> {
    Options {
        function_starts: starts,
        debug_dirs: Vec::new(),
        ..Options::default()
    }
}

/// A window with one sample for each address.
fn window(module: Module, frames: &[(u64, bool)]) -> Window {
    let mut window = Window::new();
    let module = window.add_module(module).unwrap();
    let process = window.add_process(Process {
        pid: 7,
        name: "fixture".to_owned(),
        exe: String::new(),
        service: String::new(),
    });
    for (address, exact) in frames {
        let user = Frame {
            module,
            address: *address,
            exact: *exact,
        };
        window.add(&sample(process.unwrap(), &[user]));
    }
    window
}

fn sample(process: ProcessIndex, user: &[Frame]) -> RawSample<'_> {
    RawSample {
        process,
        tid: 7,
        thread_name: *b"fixture\0\0\0\0\0\0\0\0\0",
        outcome: Outcome::Complete,
        kernel: &[],
        user,
        attribution: None,
        starts_execution: false,
    }
}

fn resolved_window(window: Window, options: &Options<'_>) -> ResolvedProfile {
    resolve(window, options, RecordingMeta::default(), |_| {})
}

/// Resolves one sample for each address. Each address is that of an interrupted instruction.
fn resolved(module: Module, addresses: &[u64], options: &Options<'_>) -> ResolvedProfile {
    let frames: Vec<_> = addresses.iter().map(|address| (*address, true)).collect();
    resolved_window(window(module, &frames), options)
}

/// The frames of every sample as `name file:line`, innermost first.
fn told(profile: &ResolvedProfile) -> Vec<Vec<String>> {
    let frame = |frame: flamestorm::profile::FrameRef<'_>| {
        let file = Path::new(&*frame.function.file).file_name();
        match file {
            Some(file) => format!("{} {}:{}", frame.function.name, file.display(), frame.line),
            None => frame.function.name.to_string(),
        }
    };
    let samples = profile.samples.iter();
    samples
        .map(|sample| profile.frames(sample).map(frame).collect())
        .collect()
}

/// The number of the line that contains the marker.
fn line(source: &str, marker: &str) -> usize {
    1 + source
        .lines()
        .position(|line| line.contains(marker))
        .unwrap()
}

/// Inlined functions are frames of their own, each with its line in its own source.
#[test]
fn inlined_functions_and_lines() {
    let fixture = Fixture::c(LIBRARY, &[]);
    let (start, size) = fixture.symbols["outer"];
    let addresses: Vec<_> = (start..start + size).collect();
    let profile = resolved(fixture.module(), &addresses, &options(&fixture));
    let stacks = told(&profile);
    let inlined = [
        format!("innermost lib.c:{}", line(LIBRARY, "/* innermost */")),
        format!("middle lib.c:{}", line(LIBRARY, "/* middle */")),
        format!("outer lib.c:{}", line(LIBRARY, "/* outer */")),
    ];
    assert!(stacks.iter().any(|stack| *stack == inlined), "{stacks:#?}");
    let mut roots = stacks.iter().map(|stack| stack.last().unwrap());
    assert!(roots.all(|root| root.starts_with("outer ")));
}

/// A return address is looked up at the call before it. Here the call is the last instruction of a function
/// that never returns, and the return address itself is already in the next function.
#[test]
fn a_return_address_is_looked_up_at_its_call() {
    let source = "#include <stdlib.h>\n\
        __attribute__((noinline)) void leaves(void) { abort(); }\n\
        __attribute__((noinline)) int next(int x) { return x + 1; }\n";
    let fixture = Fixture::c(source, &["-falign-functions=1"]);
    let (start, size) = fixture.symbols["leaves"];
    let end = start + size;
    let window = window(fixture.module(), &[(end, false), (end - 1, true)]);
    let profile = resolved_window(window, &options(&fixture));
    for stack in told(&profile) {
        assert!(stack[0].starts_with("leaves "), "{stack:?}");
    }
    assert_eq!(profile.locations[0].address, end);
}

/// In a stripped library an exported function has its name. A static function is named after its module and
/// its own start, not after the symbol before it.
#[test]
fn a_stripped_static_function_is_not_named_after_its_neighbour() {
    let fixture = Fixture::c(LIBRARY, &[]);
    fixture.strip();
    let hidden = fixture.start("hidden");
    let addresses = [fixture.start("exported") + 1, hidden, hidden + 3];
    let profile = resolved(fixture.module(), &addresses, &options(&fixture));
    let by_start = vec![format!("libfixture.so+{hidden:#x}")];
    let exported = vec!["exported".to_owned()];
    assert_eq!(told(&profile), [exported, by_start.clone(), by_start]);
    let profile = resolved(fixture.module(), &[hidden + 3], &options(&NoFunctionStarts));
    assert_eq!(
        told(&profile),
        [[format!("libfixture.so+{:#x}", hidden + 3)]]
    );
}

/// A symbol without a size ends where the unwind tables have the start of the next function.
#[test]
fn a_symbol_without_a_size_ends_at_the_next_function() {
    let source = "__asm__(\".text\\n.globl sizeless\\nsizeless:\\n nop\\n nop\\n nop\\n\");\n\
        __attribute__((noinline)) static int secret(int x) { return x * 7; }\n\
        int user(int x) { return secret(x) + secret(x + 1); }\n";
    let fixture = Fixture::c(source, &["-g0", "-fno-toplevel-reorder"]);
    let (sizeless, secret) = (fixture.start("sizeless"), fixture.start("secret"));
    assert!(sizeless < secret);
    run(Command::new("strip")
        .args(["-N", "secret"])
        .arg(&fixture.path));
    let addresses = [sizeless + 1, secret + 1];
    let profile = resolved(fixture.module(), &addresses, &options(&fixture));
    let by_start = format!("libfixture.so+{secret:#x}");
    assert_eq!(told(&profile), [["sizeless".to_owned()], [by_start]]);
}

/// The cold part of a function that the compiler split has the function's name.
#[test]
fn the_cold_part_of_a_function() {
    let source = "extern void slow(int) __attribute__((cold));\n\
        void slow(int x) { (void)x; __asm__(\"\"); }\n\
        int split(int *v, int n) {\n\
          int sum = 0;\n\
          for (int i = 0; i < n; i++) {\n\
            if (__builtin_expect(v[i] < 0, 0)) { slow(v[i]); slow(n); sum -= 3; }\n\
            sum += v[i];\n\
          }\n\
          return sum; }\n";
    let fixture = Fixture::c(source, &["-O2"]);
    let (hot, cold) = (fixture.start("split"), fixture.start("split.cold"));
    let profile = resolved(fixture.module(), &[hot, cold], &options(&fixture));
    for stack in told(&profile) {
        assert!(stack[0].starts_with("split lib.c:"), "{stack:?}");
    }
}

/// Names and lines are read from the file that a debug link names, from the one that the build id names,
/// and from neither if it does not belong to the program.
#[test]
fn separate_debug_files() {
    let fixture = Fixture::c(LIBRARY, &[]);
    let hidden = fixture.start("hidden");
    let build_id = fixture.build_id();
    let linked = fixture.dir.path().join("libfixture.debug");
    fixture.split_debug(&linked);
    fixture.strip();
    let look = |build_id: Option<&[u8]>| {
        let mut options = options(&fixture);
        options.debug_dirs = vec![fixture.dir.path().to_owned()];
        let mut module = fixture.module();
        module.build_id = build_id.map(<[u8]>::to_vec);
        resolved(module, &[hidden, fixture.start("exported")], &options)
    };
    let named = format!("hidden lib.c:{}", line(LIBRARY, "static int hidden"));

    let hex: String = build_id.iter().map(|byte| format!("{byte:02x}")).collect();
    let by_id = fixture.dir.path().join(".build-id").join(&hex[..2]);
    fs::create_dir_all(&by_id).unwrap();
    let by_id = by_id.join(format!("{}.debug", &hex[2..]));
    fs::rename(&linked, &by_id).unwrap();
    let profile = look(Some(&build_id));
    assert_eq!(told(&profile)[0], std::slice::from_ref(&named));
    assert_eq!(&*profile.mappings[0].build_id, hex);

    // Debug files of a container, which are not in the machine's own directories.
    let mut module = fixture.module();
    module.build_id = Some(build_id.clone());
    module.debug_dir = Some(Arc::new(File::open(fixture.dir.path()).unwrap()));
    let profile = resolved(module, &[hidden], &options(&fixture));
    assert_eq!(told(&profile)[0], std::slice::from_ref(&named));

    fs::rename(&by_id, &linked).unwrap();
    let mut link = std::ffi::OsString::from("--add-gnu-debuglink=");
    link.push(&linked);
    run(Command::new("objcopy").arg(link).arg(&fixture.path));
    assert_eq!(told(&look(None))[0], [named]);

    let mut stale = fs::read(&linked).unwrap();
    stale.extend(b"changed");
    fs::write(&linked, stale).unwrap();
    let profile = look(None);
    let by_start = format!("libfixture.so+{hidden:#x}");
    assert_eq!(told(&profile), [[by_start], ["exported".to_owned()]]);
    let notes = &profile.runtime.notes;
    assert!(notes[0].contains("checksum"), "{notes:?}");
}

/// Symbols are read from the open file after its name has been removed.
#[test]
fn a_deleted_file_still_has_its_symbols() {
    let fixture = Fixture::c(LIBRARY, &[]);
    let module = fixture.module();
    fs::remove_file(&fixture.path).unwrap();
    let profile = resolved(module, &[fixture.start("hidden")], &options(&fixture));
    assert!(told(&profile)[0][0].starts_with("hidden lib.c:"));
}

/// Rust names are demangled, without their hash, and the mangled symbol is kept beside them.
#[test]
fn rust_names() {
    let source = "mod shop { #[inline(never)] pub fn search(words: &[u64]) -> u64 {\n\
        words.iter().map(|word| std::hint::black_box(word * 3)).sum()\n} }\n\
        fn main() { std::process::exit(shop::search(&[1, 2, 3]) as i32); }\n";
    let fixture = Fixture::rust(source);
    let start = fixture.start_of("4shop6search");
    let profile = resolved(fixture.module(), &[start], &options(&fixture));
    let stack = told(&profile).remove(0);
    let root = stack.last().unwrap();
    assert!(
        root.starts_with("fixture::shop::search fixture.rs:"),
        "{stack:?}"
    );
    let root = profile.frames(&profile.samples[0]).last().unwrap();
    assert!(
        root.function.system_name.starts_with('_'),
        "{:?}",
        root.function
    );
}

/// The vDSO has no file; its symbols are read from its image in memory.
#[test]
fn the_vdso() {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let Some(line) = maps.lines().find(|line| line.ends_with("[vdso]")) else {
        eprintln!("skipped: this machine has no vDSO");
        return;
    };
    let range = line.split_whitespace().next().unwrap();
    let (start, end) = range.split_once('-').unwrap();
    let number = |text| u64::from_str_radix(text, 16).unwrap();
    let mut image = vec![0; (number(end) - number(start)) as usize];
    let memory = File::open("/proc/self/mem").unwrap();
    std::os::unix::fs::FileExt::read_exact_at(&memory, &mut image, number(start)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vdso");
    fs::write(&path, &image).unwrap();
    let symbols = run(Command::new("nm").arg("-D").arg(&path));
    let symbols = String::from_utf8(symbols).unwrap();
    let mut symbols = symbols.lines();
    let symbol = symbols.find(|l| l.contains("clock_gettime")).unwrap();
    let address = number(symbol.split_whitespace().next().unwrap());
    let module = Module {
        name: "[vdso]".to_owned(),
        build_id: None,
        source: Source::Vdso(Arc::from(image)),
        is_local: true,
        debug_dir: None,
        version: None,
        snapshot: None,
    };
    let profile = resolved(module, &[address + 1], &options(&NoFunctionStarts));
    let name = &told(&profile)[0][0];
    assert!(name.contains("clock_gettime"), "{name}");
}

/// Kernel addresses are named by kallsyms, but not after a symbol far below them. If kallsyms hides
/// addresses, every frame still has a name.
#[test]
fn the_kernel() {
    let dir = tempfile::tempdir().unwrap();
    let kallsyms = dir.path().join("kallsyms");
    let base = 0xffff_ffff_8100_0000_u64;
    let (local, module_start) = (base + 0x100, base + 0x3000_0000);
    let text = format!(
        "{base:x} T do_syscall_64\n{local:x} t local\n{module_start:x} t nf_hook\t[nf_tables]\n"
    );
    fs::write(&kallsyms, text).unwrap();
    let kernel = || Module {
        name: "[kernel]".to_owned(),
        build_id: None,
        source: Source::Kernel,
        is_local: true,
        debug_dir: None,
        version: None,
        snapshot: None,
    };
    let mut options = options(&NoFunctionStarts);
    options.kallsyms = kallsyms.clone();
    let far = base + 0x1000_0000;
    let addresses = [base + 0x10, local + 0x10, far, module_start + 8];
    let profile = resolved(kernel(), &addresses, &options);
    let names: Vec<_> = told(&profile).into_iter().flatten().collect();
    let far = format!("[kernel]+{far:#x}");
    assert_eq!(names, ["do_syscall_64", "local", &far, "nf_hook"]);
    assert!(profile.mappings[0].is_kernel);

    fs::write(&kallsyms, "0000000000000000 T do_syscall_64\n").unwrap();
    let profile = resolved(kernel(), &addresses[..1], &options);
    assert_eq!(told(&profile), [[format!("[kernel]+{:#x}", addresses[0])]]);
    assert!(profile.runtime.notes[0].contains("kptr_restrict"));
}

/// JIT code is named by its perf map; addresses in no mapping are named by their number.
#[test]
fn jit_and_no_mapping() {
    let dir = tempfile::tempdir().unwrap();
    let perf_map = dir.path().join("perf-7.map");
    let text = "7f0000001000 40 py::search:/srv/shop.py\n7f00";
    fs::write(&perf_map, text).unwrap();
    let jit = Module {
        name: "[jit]".to_owned(),
        build_id: None,
        source: Source::Jit {
            pid: 7,
            perf_map,
            file: None,
        },
        is_local: true,
        debug_dir: None,
        version: None,
        snapshot: None,
    };
    let options = options(&NoFunctionStarts);
    let profile = resolved(jit, &[0x7f00_0000_1010, 0x7f00_0000_2000], &options);
    let expected = [["py::search:/srv/shop.py"], ["[jit]+0x7f0000002000"]];
    assert_eq!(told(&profile), expected);
    let profile = resolved(Module::unknown(), &[0xdead], &options);
    assert_eq!(told(&profile), [["[no mapping]+0xdead"]]);
    let profile = resolved_window(window(Module::unknown(), &[(0, false)]), &options);
    assert_eq!(told(&profile), [["[no mapping]+0x0"]]);
}

/// A frame whose module the window does not know is kept, and samples that did not fit into the stack table
/// are in the profile under a name that says so.
#[test]
fn what_the_window_does_not_know() {
    let frame = Frame {
        module: ModuleId(9),
        address: 0x10,
        exact: true,
    };
    for (mut window, name) in [
        (Window::new(), "[no mapping]+0x10"),
        (Window::with_max_nodes(0), "[stack table full]"),
    ] {
        window.add(&sample(ProcessIndex(3), &[frame]));
        let profile = resolved_window(window, &options(&NoFunctionStarts));
        assert_eq!(told(&profile), [[name]]);
        assert_eq!(profile.total_count(), 1);
    }
}

/// Damages a few bytes, more often in the headers, where damage has the most effect.
fn damaged(good: &[u8], random: &mut impl FnMut(usize) -> usize) -> Vec<u8> {
    let mut bad = good.to_vec();
    for _ in 0..1 + random(24) {
        let at = match random(4) {
            0 => random(64),
            1 => bad.len() - 1 - random(2048.min(bad.len())),
            _ => random(bad.len()),
        };
        bad[at] = [0, 1, 0x7f, 0xff, random(256) as u8][random(5)];
    }
    if random(8) == 0 {
        bad.truncate(random(bad.len()));
    }
    bad
}

/// A reader of unwind tables that panics, or returns too few answers, costs names but not the profile.
#[test]
fn function_starts_that_break() {
    struct Short;
    impl FunctionStarts for Short {
        fn function_starts(&self, _: &Module, _: &[u64]) -> Vec<Option<u64>> {
            Vec::new()
        }
    }
    struct Panics;
    impl FunctionStarts for Panics {
        fn function_starts(&self, _: &Module, _: &[u64]) -> Vec<Option<u64>> {
            panic!("a broken file may cause this");
        }
    }
    let fixture = Fixture::c(LIBRARY, &[]);
    fixture.strip();
    let address = fixture.start("hidden") + 3;
    for starts in [&Short as &dyn FunctionStarts, &Panics] {
        let profile = resolved(fixture.module(), &[address], &options(starts));
        assert_eq!(told(&profile), [[format!("libfixture.so+{address:#x}")]]);
    }
}

/// Pseudo-random numbers, the same in every run.
fn random_numbers() -> impl FnMut(usize) -> usize {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    move |below| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below.max(1) as u64) as usize
    }
}

/// The end of a test with damaged input: after `seconds`, or `FLAMESTORM_FUZZ_SECONDS` if that is set.
fn fuzz_end(seconds: u64) -> Instant {
    let longer = std::env::var("FLAMESTORM_FUZZ_SECONDS");
    let seconds = longer.map_or(seconds, |value| value.parse().unwrap());
    Instant::now() + Duration::from_secs(seconds)
}

/// Damaged perf maps cause no crash, and no name for an address that its line does not cover.
#[test]
fn hostile_perf_maps() {
    let good = (0..40)
        .map(|i| format!("{:x} {:x} f{i}\n", 0x1000 + i * 0x40, 8 + i))
        .collect::<String>();
    let addresses: Vec<u64> = (0x1000..0x1a00).step_by(4).chain([u64::MAX]).collect();
    let mut random = random_numbers();
    let end = fuzz_end(1);
    while Instant::now() < end {
        let bad = damaged(good.as_bytes(), &mut random);
        let names = find_in_perf_map(bad.as_slice(), &addresses).unwrap();
        let text = String::from_utf8_lossy(&bad);
        for (address, name) in addresses.iter().zip(names) {
            let Some(name) = name else { continue };
            let mut lines = text.split('\n').map(|line| line.trim_end_matches('\r'));
            let covered = lines.any(|line| {
                let mut fields = line.split_ascii_whitespace();
                let mut number = || u64::from_str_radix(fields.next()?, 16).ok();
                let (Some(start), Some(size)) = (number(), number()) else {
                    return false;
                };
                let inside = address
                    .checked_sub(start)
                    .is_some_and(|offset| offset < size);
                inside && line.ends_with(&*name)
            });
            assert!(covered, "{address:#x} is called {name:?} in {text:?}");
        }
    }
}

/// With damaged libraries the agent continues and every frame has a name. The files are the same in every
/// run; `FLAMESTORM_FUZZ_SECONDS` makes the test longer than its two seconds.
#[test]
fn hostile_libraries() {
    let fixture = Fixture::c(LIBRARY, &["-gz=zlib"]);
    let good = fs::read(&fixture.path).unwrap();
    let (hidden, outer) = (fixture.start("hidden"), fixture.start("outer"));
    let addresses = [hidden, outer + 4, u64::MAX, 0];
    let mut random = random_numbers();
    let end = fuzz_end(2);
    let path = fixture.dir.path().join("hostile.so");
    let mut rounds = 0;
    while Instant::now() < end {
        fs::write(&path, damaged(&good, &mut random)).unwrap();
        let mut module = fixture.module();
        module.source = Source::File(Arc::new(OpenFile::new(File::open(&path).unwrap())));
        let profile = resolved(module, &addresses, &options(&fixture));
        for stack in told(&profile) {
            assert!(!stack.is_empty() && stack.iter().all(|name| !name.is_empty()));
        }
        rounds += 1;
    }
    assert!(rounds > 10, "{rounds} rounds only");
}

/// Whatever file a debug link names, the program's own symbols and function starts name its functions
/// without delay, and one note says why the link was not followed.
#[test]
fn hostile_debug_links() {
    let fixture = Fixture::c(LIBRARY, &["-Wl,--build-id=none"]);
    let hidden = fixture.start("hidden");
    let linked = fixture.dir.path().join("libfixture.debug");
    fixture.split_debug(&linked);
    fixture.strip();
    let link = format!("--add-gnu-debuglink={}", linked.display());
    run(Command::new("objcopy").arg(link).arg(&fixture.path));
    let addresses = [hidden, fixture.start("exported")];
    let look = || resolved(fixture.module(), &addresses, &options(&fixture));
    // The intact debug file beside the program is used.
    let told_by_link = told(&look());
    assert!(told_by_link[0][0].starts_with("hidden lib.c:"));

    let good = fs::read(&linked).unwrap();
    let cases: [(&str, &dyn Fn()); 7] = [
        ("not a regular file", &|| {
            run(Command::new("mkfifo").arg(&linked));
        }),
        ("not a regular file", &|| {
            std::os::unix::fs::symlink("/dev/zero", &linked).unwrap();
        }),
        ("not a regular file", &|| {
            std::os::unix::fs::symlink("/dev/tty", &linked).unwrap();
        }),
        ("not a regular file", &|| fs::create_dir(&linked).unwrap()),
        ("larger than", &|| {
            File::create(&linked).unwrap().set_len(20 << 30).unwrap();
        }),
        ("is refused", &|| {
            File::create(&linked).unwrap().set_len(1 << 30).unwrap();
        }),
        ("checksum", &|| {
            fs::write(&linked, [&good[..], b"changed"].concat()).unwrap();
        }),
    ];
    let by_start = format!("libfixture.so+{hidden:#x}");
    for (reason, make) in cases {
        match linked.is_dir() {
            true => fs::remove_dir(&linked).unwrap(),
            false => fs::remove_file(&linked).unwrap(),
        }
        make();
        let start = Instant::now();
        let profile = look();
        assert!(start.elapsed() < Duration::from_secs(20), "{reason}");
        assert_eq!(told(&profile), [[by_start.as_str()], ["exported"]]);
        let notes = &profile.runtime.notes;
        assert_eq!(notes.len(), 1, "{notes:?}");
        assert!(notes[0].contains(reason), "{notes:?}");
    }
    // A missing debug file is normal, and gives no note.
    fs::remove_file(&linked).unwrap();
    assert_eq!(look().runtime.notes, Vec::<String>::new());
}

/// A debug link that is a path is not followed, wherever it leads.
#[test]
fn a_debug_link_that_is_a_path() {
    let fixture = Fixture::c(LIBRARY, &["-Wl,--build-id=none"]);
    let hidden = fixture.start("hidden");
    fixture.strip();
    let fifo = fixture.dir.path().join("fifo");
    run(Command::new("mkfifo").arg(&fifo));
    let mut link = format!("{}\0", fifo.display()).into_bytes();
    link.resize(link.len().next_multiple_of(4) + 4, 0);
    let content = fixture.dir.path().join("link");
    fs::write(&content, link).unwrap();
    let section = format!(".gnu_debuglink={}", content.display());
    let mut objcopy = Command::new("objcopy");
    run(objcopy.args(["--add-section", &section]).arg(&fixture.path));
    let profile = resolved(fixture.module(), &[hidden], &options(&fixture));
    assert_eq!(told(&profile), [[format!("libfixture.so+{hidden:#x}")]]);
    assert!(profile.runtime.notes[0].contains("is a path"));
}
