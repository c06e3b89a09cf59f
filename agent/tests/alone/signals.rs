//! Stacks through signal frames.

use flamestorm::object::{Object, Section};

use crate::common::{Recording, Workshop, can_record};

const MILLISECONDS: f64 = 2000.0;

/// The address of the code in libc that returns from a signal handler (`mov $15, %rax; syscall`), as stated
/// in the file.
fn trampoline() -> u64 {
    const CODE: [u8; 9] = [0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05];
    let libc = std::fs::read("/lib/x86_64-linux-gnu/libc.so.6").expect("libc");
    let object = Object::parse(&libc).expect("an ELF file");
    let code = |section: &Section<'_>| {
        let mut words = section.data.windows(CODE.len());
        Some(section.svma + words.position(|word| word == CODE)? as u64)
    };
    object.code.iter().find_map(code).expect("the trampoline")
}

fn check(stack: &str, whole: f64) {
    let workshop = Workshop::new();
    let program = workshop.cc("signal.c", "signal", &[]);
    let recording = Recording::of(&program, &[&MILLISECONDS.to_string(), stack]);
    assert_eq!(recording.finished.code(), 0, "{:#?}", recording.finished);
    assert!(
        recording.summary.complete_share() >= whole,
        "{}\n{}",
        recording.summary,
        recording.profile
    );
    recording.profile.assert_named();
    assert_eq!(recording.summary.lost(), 0.0);
    let profile = &recording.profile;
    let handled = profile.filtered(|stack| stack.has("on_alarm"));
    assert!(
        handled.total() * 3 > profile.total(),
        "the handler has at most a third of the samples, {} of {}:\n{profile}",
        handled.total(),
        profile.total()
    );
    handled.assert_share(whole, "from the handler to the start", |stack| {
        stack.has_in_order(&["main", "interrupted", "on_alarm"]) && stack.starts_at_process_start()
    });
    // The kernel called the handler, not the interrupted function, so the frame between the two is the
    // return trampoline.
    handled.assert_share(1.0, "the trampoline is a frame", |stack| {
        !stack.has_chain(&["inner", "on_alarm"]) && !stack.has_chain(&["outer", "on_alarm"])
    });
    // The trampoline has its own name although no instruction called it: libc's `__restore_rt`, or without
    // symbols its own start. It is not named after the function that ends just before it.
    let in_libc = format!("libc.so.6+{:#x}", trampoline() - 1);
    handled.assert_share(whole, "the trampoline's name", |stack| {
        let user: Vec<&str> = stack.user().collect();
        let handler = user.iter().position(|frame| *frame == "on_alarm");
        handler.and_then(|at| user.get(at - 1)).is_some_and(|name| {
            // libc's unwind entry begins a byte before the code, so that a lookup of the return address
            // minus one finds it.
            *name == "__restore_rt" || *name == in_libc
        })
    });
    // A signal mostly interrupts the two functions that are called all the time, at any of their
    // instructions. Each of them has its caller.
    let inner = handled.filtered(|stack| stack.has("inner"));
    assert!(inner.total() > 0, "{handled}");
    inner.assert_share(whole, "callers of the interrupted function", |stack| {
        stack.has_chain(&["main", "interrupted", "outer", "inner"])
    });
}

/// A handler on the normal stack: the interrupted frames are above it on the same stack, behind the signal
/// frame.
#[test]
fn handler_on_the_normal_stack() {
    if can_record() {
        check("normal", 0.99);
    }
}

/// A handler on an alternate stack: the interrupted frames are on another stack, possibly at lower
/// addresses. While the kernel does not know the process yet, the stack copy that is sent to the agent
/// contains the alternate stack only, so those samples would be `copy_too_short`; the program warms up for
/// longer than that takes.
#[test]
fn handler_on_an_alternate_stack() {
    if can_record() {
        check("alternate", 0.99);
    }
}
