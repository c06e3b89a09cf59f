//! The shares in a profile are the shares of CPU time.

use crate::common::{Recording, Workshop, can_record};

/// Two processes on one CPU, which use CPU time 3 : 1 by their own CPU clocks, are 3 : 1 in the profile.
#[test]
fn three_to_one() {
    if !can_record() {
        return;
    }
    let workshop = Workshop::new();
    let program = workshop.cc("shares.c", "shares", &[]);
    let recording = Recording::alone(&program, &["6000"]);
    let three = recording.printed("share_three_us");
    let one = recording.printed("share_one_us");
    let truth = three / (three + one);
    assert_eq!(recording.summary.lost(), 0.0);
    let profile = &recording.profile;
    let sampled_three = profile.of("share_three").total() as f64;
    let sampled_one = profile.of("share_one").total() as f64;
    let sampled = sampled_three / (sampled_three + sampled_one);
    // Three standard deviations of a share of so many independent samples, plus the difference between the
    // two clocks: time in which the host takes the virtual CPU away between two ticks is in a process's own
    // clock and in no sample.
    let deviation = (truth * (1.0 - truth) / (sampled_three + sampled_one)).sqrt();
    assert!(
        (sampled - truth).abs() <= 3.0 * deviation + 0.03,
        "the truth is {truth:.4}, the profile says {sampled:.4}: {sampled_three} and {sampled_one}"
    );
    // Each process has its own stacks.
    profile
        .of("share_three")
        .assert_share(0.95, "the true stack", |stack| {
            stack.has_chain(&["main", "three", "burn_share"]) && stack.starts_at_process_start()
        });
    profile
        .of("share_one")
        .assert_share(0.95, "the true stack", |stack| {
            stack.has_chain(&["main", "one", "burn_share"]) && stack.starts_at_process_start()
        });
}
