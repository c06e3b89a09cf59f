//! What happens to processes, in the order in which it happened.

use std::collections::VecDeque;

use super::cost::now;
use crate::{
    kernel::{Event, EventKind, LifecycleEvents},
    process::Registry,
};

/// What happens to processes: read, put in order, and taken up as far as the samples have come.
pub struct Control {
    /// Where the events come from.
    pub lifecycle: LifecycleEvents,
    /// The processes as they are after what was taken up.
    pub registry: Registry,
    /// Events read and not yet taken up, by time.
    events: VecDeque<Event>,
    /// Everything that happened before this (nanoseconds) has been read into `events`.
    pub read_until: u64,
    /// Processes whose address space is another than before.
    pub changed: Vec<u32>,
    /// Processes that have ended.
    pub ended: Vec<u32>,
    /// Processes that came to have a selected name.
    pub selected_late: Vec<u32>,
    /// Names that are selected.
    names: Vec<String>,
}

impl Control {
    /// Nothing taken up yet; `names` are selected.
    pub fn new(lifecycle: LifecycleEvents, names: Vec<String>) -> Control {
        Control {
            lifecycle,
            registry: Registry::default(),
            events: VecDeque::new(),
            read_until: 0,
            changed: Vec::new(),
            ended: Vec::new(),
            selected_late: Vec::new(),
            names,
        }
    }

    /// Takes up everything that happened up to `time`.
    pub fn advance(&mut self, time: u64) {
        if time >= self.read_until {
            // The time first: what is not read now happened later.
            self.read_until = now();
            let mut fresh = Vec::new();
            self.lifecycle.read(&mut fresh);
            self.events.extend(fresh);
        }
        while let Some(event) = self.events.pop_front_if(|event| event.time <= time) {
            self.apply(event);
        }
    }

    fn apply(&mut self, event: Event) {
        let pid = event.pid;
        match &event.kind {
            EventKind::Exec { name } | EventKind::Rename { name, .. }
                if self.names.contains(name) =>
            {
                self.selected_late.push(pid);
            }
            EventKind::Exit => self.ended.push(pid),
            _ => {}
        }
        if self.registry.apply(event) {
            self.changed.push(pid);
        }
    }
}
