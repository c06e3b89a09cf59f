//! Hostile processes: what the agent observes of them, and what it asks of them.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use crate::{
    common::free_port,
    files::{copy_over, library},
    fuse::{Fuse, Unanswered},
    stage::{Case, Stage, Started},
};

fn process(name: &'static str, args: &'static [&'static str]) -> Case {
    Case::new(name, move |stage, name| {
        let program = stage.copy(&stage.hostile, name);
        Started::of(stage.run(&program, args))
    })
}

/// Cases with memory and files whose owner decides how long a read takes.
pub fn memory() -> Vec<Case> {
    vec![
        Case::new("fuse_exe", |stage, name| {
            on_fuse(stage, name, Unanswered::Everything)
        })
        .refused(),
        // Its server answers reads but not FLUSH, so closing the file, exiting or executing another program
        // waits forever. The agent reads the file once, and looks names up in its copy.
        Case::new("fuse_flush", |stage, name| {
            on_fuse(stage, name, Unanswered::Closing)
        })
        .named(),
        Case::new("env_hangs", |stage, name| {
            // Nothing is refused: since 4.17 Linux itself does not read a file for /proc/PID/environ.
            memory_on_fuse(stage, name, "environment", "environment")
        })
        .named(),
        // The agent reads only the beginning, which would contain a service name. Nothing is refused.
        process("env_huge", &["environment"]).named(),
        // The context of an OpenTelemetry SDK is recognized by this name.
        Case::new("context_hangs", |stage, name| {
            memory_on_fuse(stage, name, "context", "memfd:OTEL_CTX")
        })
        .named()
        .refused(),
        process("context_lies", &["context"]),
    ]
}

/// A program on a file system whose server stops answering.
pub fn on_fuse(stage: &Stage, name: &'static str, unanswered: Unanswered) -> Started {
    let content = fs::read(&stage.hostile).expect("a program of ours");
    let (fuse, file) = mount(stage, name, name, content, unanswered);
    Started {
        fuse: Some(fuse),
        ..Started::of(stage.run(&file, &["gently"]))
    }
}

/// Mounts a file system of one file, whose server stops answering.
fn mount(
    stage: &Stage,
    case: &str,
    file: &'static str,
    content: Vec<u8>,
    unanswered: Unanswered,
) -> (Fuse, PathBuf) {
    let directory = stage.workshop.path().join(format!("{case}.mounted"));
    let _ = fs::remove_dir(&directory);
    let fuse = Fuse::mount(&directory, file, content, unanswered)
        .unwrap_or_else(|error| panic!("a FUSE file system cannot be mounted: {error}"));
    (fuse, directory.join(file))
}

/// A process with a mapping of a file on such a file system, of which no page has been read.
fn memory_on_fuse(stage: &Stage, name: &'static str, mode: &str, file: &'static str) -> Started {
    let (fuse, file) = mount(
        stage,
        name,
        file,
        vec![b'A'; 1 << 16],
        Unanswered::Everything,
    );
    let program = stage.copy(&stage.hostile, name);
    Started {
        fuse: Some(fuse),
        ..Started::of(stage.run(&program, &[mode, file.to_str().expect("UTF-8")]))
    }
}

/// Cases with processes that use what the kernel permits.
pub fn processes() -> Vec<Case> {
    vec![
        // The kernel permits a process 65,530 mappings.
        Case::new("many_mappings", |stage, name| {
            let program = stage.copy(&stage.hostile, name);
            Started {
                running: [(); 2]
                    .map(|()| stage.run(&program, &["mappings", "50000"]))
                    .into(),
                ..Started::default()
            }
        })
        .refused(),
        process("again", &["again"]).unseen(),
        process("forks", &["forks"]).unseen(),
        process("renames", &["rename"]).unseen(),
        process("names", &["named", "\u{1b}[31m;\n\r\t a"]).unseen(),
        process("leader_ended", &["leader"]).named(),
        process("deep", &["deep"]),
        process("liar", &["liar"]),
        process("deleted", &["deleted"]).named(),
        Case::new("overwritten", |stage, name| {
            let before = library(stage, "before.so", "");
            let after = library(stage, "after.so", "plugin_inner=plugin_after");
            let started = with_library(stage, name, &before);
            copy_over(&after, &stage.workshop.path().join("overwritten.so"));
            started
        }),
        Case::new("truncated", |stage, name| {
            let plugin = library(stage, "plugin.so", "");
            let mut started = with_library(stage, name, &plugin);
            let file = stage.workshop.path().join("truncated.so");
            started.then = Some(Box::new(move || {
                std::thread::sleep(std::time::Duration::from_millis(300));
                let file = File::options()
                    .write(true)
                    .open(file)
                    .expect("a file of ours");
                file.set_len(100).expect("a shorter file");
            }));
            started
        }),
    ]
}

/// A process that runs code of a library of its own.
fn with_library(stage: &Stage, name: &'static str, library: &Path) -> Started {
    let program = stage.copy(&stage.hostile, name);
    let own = stage.workshop.path().join(format!("{name}.so"));
    let _ = fs::remove_file(&own);
    fs::copy(library, &own).expect("a library");
    Started::of(stage.run(&program, &["library", own.to_str().expect("UTF-8")]))
}

/// A case with 300 processes that look like postmasters of PostgreSQL, and claim a port on which none of
/// them listens.
pub fn servers() -> Vec<Case> {
    let case = Case::new("fake_server", |stage, name| {
        let flags = ["-DFAKE_SERVER", "-rdynamic", "-pthread"];
        let program = stage.workshop.cc("hostile.c", name, &flags);
        let directory = stage.workshop.path().join("servers");
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir(&directory).expect("a directory");
        let port = free_port().to_string();
        let args = ["servers", directory.to_str().expect("UTF-8"), "300", &port];
        Started::of(stage.run(&program, &args))
    });
    vec![case]
}
