//! The handling of the signals that end a recording.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize},
};

/// The signals that have arrived. The first signal ends the recording, the next one ends naming early, and
/// a further one ends the agent.
pub struct Signals {
    /// The number of the last signal; 0 if none has arrived, or it has been handled.
    pub last: Arc<AtomicUsize>,
    /// Whether the next signal has its default action, which ends the agent.
    pub by_default: Arc<AtomicBool>,
}

impl Signals {
    /// Catches SIGINT, SIGTERM and SIGHUP.
    ///
    /// # Errors
    /// A handler cannot be installed.
    pub fn register() -> std::io::Result<Signals> {
        let signals = Signals {
            last: Arc::default(),
            by_default: Arc::default(),
        };
        for number in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            let by_default = Arc::clone(&signals.by_default);
            signal_hook::flag::register_conditional_default(number, by_default)?;
            let last = Arc::clone(&signals.last);
            signal_hook::flag::register_usize(number, last, number as usize)?;
        }
        Ok(signals)
    }
}
