//! The ways of linking a program, and the code that binds functions while it runs.

use std::{fs, path::Path};

use flamestorm::object::Object;

use crate::common::{Recording, Workshop, can_record};

const MILLISECONDS: f64 = 2000.0;
const CHAIN: [&str; 5] = ["main", "first", "second", "third", "burn"];

fn check(name: &str, flags: &[&str]) {
    if !can_record() {
        return;
    }
    let workshop = Workshop::new();
    let program = workshop.cc("chain.c", name, flags);
    let recording = Recording::of(&program, &[&MILLISECONDS.to_string()]);
    recording.assert_sound(MILLISECONDS);
    recording
        .profile
        .assert_share(0.95, "the true stack", |stack| {
            stack.has_chain(&CHAIN) && stack.starts_at_process_start()
        });
}

/// The compiler's default: position independent, dynamically linked.
#[test]
fn dynamic() {
    check("chain", &[]);
}

/// A program without an interpreter, at fixed addresses.
#[test]
fn fully_static() {
    check("chain_static", &["-static"]);
}

/// A program that relocates itself.
#[test]
fn static_pie() {
    check("chain_static_pi", &["-static-pie"]);
}

/// A dynamically linked program at fixed addresses, whose symbols' addresses are not relative to zero.
#[test]
fn non_pie() {
    check("chain_non_pie", &["-no-pie"]);
}

/// The unwind section can be found through the section headers only.
#[test]
fn without_eh_frame_hdr() {
    check("chain_no_hdr", &["-Wl,--no-eh-frame-hdr"]);
}

/// A stripped program has no names, but each of its functions is identified by its start.
#[test]
fn stripped() {
    if !can_record() {
        return;
    }
    let workshop = Workshop::new();
    // The same code with symbols gives the start of each function.
    let symbols = Workshop::symbols(&workshop.cc("chain.c", "twin", &[]));
    let program = workshop.cc("chain.c", "chain_stripped", &["-s"]);
    let recording = Recording::of(&program, &[&MILLISECONDS.to_string()]);
    recording.assert_sound(MILLISECONDS);
    let names = CHAIN.map(|function| format!("chain_stripped+{:#x}", symbols[function]));
    let names = names.each_ref().map(String::as_str);
    let start = format!("chain_stripped+{:#x}", symbols["_start"]);
    recording
        .profile
        .assert_share(0.95, "the true stack", |stack| {
            stack.has_chain(&names) && stack.frames[0] == start
        });
    assert!(recording.summary.number("/frames_module_only") > 0.0);
}

/// The functions of a stripped program in a container are named by the debug files of that container.
#[test]
fn debug_files_of_a_container() {
    if !can_record() {
        return;
    }
    let workshop = Workshop::new();
    let program = workshop.cc("chain.c", "contained", &["-static", "-Wl,--build-id"]);
    let bytes = fs::read(&program).expect("the program");
    let object = Object::parse(&bytes).expect("an ELF file");
    let id = object.build_id.expect("a build id").iter();
    let id: String = id.map(|byte| format!("{byte:02x}")).collect();
    let (first, rest) = id.split_at(2);
    let root = workshop.path().to_str().expect("a path of ours");
    let debug = format!("{root}/usr/lib/debug/.build-id/{first}/{rest}.debug");
    // A root directory and a mount namespace of its own are enough to count as a container here.
    let script = format!(
        "mkdir -p $(dirname {debug}) && objcopy --only-keep-debug {root}/contained {debug} && \
         strip {root}/contained && exec unshare --mount chroot {root} /contained {MILLISECONDS}"
    );
    let recording = Recording::of(Path::new("/bin/sh"), &["-c", &script]);
    assert_eq!(recording.finished.code(), 0, "{:#?}", recording.finished);
    let contained = recording.profile.of("contained");
    contained.assert_share(0.95, "the true stack", |stack| {
        stack.has_chain(&CHAIN) && stack.starts_at_process_start()
    });
}

fn plt(kind: &str) -> Recording {
    let workshop = Workshop::new();
    let library = workshop.cc("plt_library.c", "libplt.so", &["-shared", "-fPIC"]);
    let library = library.to_str().expect("a path of ours");
    let program = workshop.cc("plt.c", "plt", &["-Wl,-z,lazy", "-Wl,-z,norelro", library]);
    let recording = Recording::of(&program, &[&MILLISECONDS.to_string(), kind]);
    recording.assert_sound(MILLISECONDS);
    recording
}

/// Calls into a shared library: samples in the PLT entry, at the function's first instruction and at its
/// last all have the caller.
#[test]
fn calls_through_the_plt() {
    if !can_record() {
        return;
    }
    let recording = plt("calls");
    let calling = recording.profile.filtered(|stack| stack.has("call_all"));
    calling.assert_share(0.99, "the true stack", |stack| {
        stack.has_chain(&["main", "call_all"]) && stack.starts_at_process_start()
    });
    assert!(
        recording.profile.count(|stack| stack
            .user()
            .last()
            .is_some_and(|leaf| leaf.starts_with("entry_")))
            > 0,
        "{}",
        recording.profile
    );
}

/// Lazy binding: the resolver pushes two words, aligns the stack and saves every vector register.
#[test]
fn lazy_binding() {
    if !can_record() {
        return;
    }
    let profile = plt("binding").profile;
    profile.assert_share(0.99, "from the start", |stack| {
        stack.starts_at_process_start()
    });
    let calling = profile.filtered(|stack| stack.has("call_all"));
    calling.assert_share(1.0, "the caller", |stack| {
        stack.has_chain(&["main", "call_all"])
    });
    // The library's functions do nothing, so nearly all samples are in the resolver. It has a name only
    // where debug symbols of the dynamic linker are installed.
    calling.assert_share(0.5, "in the dynamic linker", |stack| {
        stack
            .user()
            .any(|frame| frame.contains("ld-linux") || frame.starts_with("_dl_"))
    });
    assert!(
        calling.total() * 2 > profile.total(),
        "most of the time is spent binding:\n{profile}"
    );
}
