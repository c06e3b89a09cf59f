//! A file is identified by its content, not by its inode: programs that are overwritten in place while they
//! are recorded.

use std::path::Path;

use crate::common::{Profile, Recording, Workshop, can_record};

/// Runs one version of a program for 600 ms, overwrites its file in place, and runs the other version for
/// 900 ms. `padding` bytes are appended to the first version.
fn overwritten(padding: u64) -> Option<(Recording, Workshop)> {
    if !can_record() {
        return None;
    }
    let workshop = Workshop::new();
    let version = |name: &str| workshop.cc("version.c", name, &[&format!("-DFUNCTION={name}")]);
    let (before, after) = (version("before"), version("after"));
    let file = std::fs::File::options().write(true).open(&before);
    let file = file.expect("the first version");
    let size = file.metadata().expect("its size").len();
    file.set_len(size + padding).expect("padding");
    let program = workshop.path().join("program");
    let script = "set -e; cp \"$1\" \"$3\"; \"$3\" 600; cp \"$2\" \"$3\"; \"$3\" 900";
    let args = ["-c", script, "sh"].into_iter().map(str::to_owned);
    let paths = [&before, &after, &program].map(|path| path.display().to_string());
    let args: Vec<String> = args.chain(paths).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let recording = Recording::of(Path::new("/bin/sh"), &args);
    assert_eq!(recording.finished.code(), 0, "{:#?}", recording.finished);
    Some((recording, workshop))
}

/// The number of samples in the functions of the two versions, which run for about 0.6 and 0.9 seconds.
fn shares(profile: &Profile) -> (f64, f64) {
    let of = |name: &str| profile.count(|stack| stack.has(name)) as f64;
    (of("before"), of("after"))
}

/// Asserts that a version has as many samples as its CPU time gives. A program starts and ends between two
/// ticks, which adds or removes a sample, and its start and its end are sampled as well. While the host of
/// a virtual machine takes a CPU away there is no tick, but the program's CPU time goes on; such ticks are
/// counted as missed, for all CPUs together.
#[track_caller]
fn assert_worth(recording: &Recording, samples: f64, milliseconds: f64) {
    let expected = recording.expected(milliseconds);
    let chance = 0.1 * expected + 3.0;
    let missed = recording.summary.number("/missed_ticks");
    assert!(
        samples < expected + chance
            && samples > expected - chance - missed
            && samples > expected / 2.0,
        "{samples} samples of {expected}\n{}{}",
        recording.profile,
        recording.summary
    );
}

/// The samples of each version have the name of its own function. The name in the first version is read
/// from the copy that the agent makes of a file that was modified recently.
#[test]
fn a_young_file_keeps_its_names() {
    let Some((recording, _workshop)) = overwritten(0) else {
        return;
    };
    let profile = recording.profile.of("program");
    profile.assert_named();
    let (before, after) = shares(&profile);
    assert_worth(&recording, before, 600.0);
    assert_worth(&recording, after, 900.0);
    profile.assert_share(0.95, "the stack of one of the two versions", |stack| {
        stack.has_chain(&["main", "before", "burn"]) || stack.has_chain(&["main", "after", "burn"])
    });
}

/// A file that is too large to be copied loses the names of its first version, which a note says. Its
/// functions are not named after those of the second version.
#[test]
fn a_large_file_loses_its_names_and_says_so() {
    let Some((recording, _workshop)) = overwritten(40 << 20) else {
        return;
    };
    let profile = recording.profile.of("program");
    let (before, after) = shares(&profile);
    assert_eq!(before, 0.0, "{profile}");
    assert_worth(&recording, after, 900.0);
    let unnamed = profile.count(|stack| stack.user().any(|frame| frame.starts_with("program+0x")));
    assert_worth(&recording, unnamed as f64, 600.0);
    let notes = recording.summary.0["notes"].to_string();
    assert!(
        notes.contains("was overwritten while it was recorded"),
        "{notes}"
    );
}
