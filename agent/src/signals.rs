//! The signals that end a recording.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize},
};

/// Signals that end a recording: the first ends the recording, the next ends naming early, one more ends the agent.
pub struct Signals {
    /// The last signal; 0 when there was none, or when it was seen to.
    pub last: Arc<AtomicUsize>,
    /// Whether the next signal ends the agent as usual.
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
