//! What happens to processes, in the order in which it happened.

use std::collections::VecDeque;

use agent_ebpf::sample::Outcome;

use super::repair::Repair;
use crate::{
    clock::now,
    kernel::{Event, EventKind, LifecycleEvents, Sample},
    process::{MappingReader, Registry},
};

/// Events by time. Each CPU has its buffer, and they are read one after the other: of what happened after the first
/// was read, some is there and some is not, so it waits until the next time.
#[derive(Debug, Default)]
struct Events {
    queue: VecDeque<Event>,
    /// Everything that happened up to this time (nanoseconds) is in the queue.
    until: u64,
}

impl Events {
    /// Adds what was read, when the reading began at `until`.
    fn add(&mut self, read: impl IntoIterator<Item = Event>, until: u64) {
        self.queue.extend(read);
        // What waited and what came, each mostly in order: this is cheap.
        self.queue.make_contiguous().sort_by_key(|event| event.time);
        self.until = until;
    }

    /// The next event up to `time`, if nothing that was not read can come before it.
    fn next(&mut self, time: u64) -> Option<Event> {
        let time = time.min(self.until);
        self.queue.pop_front_if(|event| event.time <= time)
    }
}

/// What happens to processes: read, put in order, and taken up as far as the samples have come.
pub struct Control {
    /// Where the events come from.
    pub lifecycle: LifecycleEvents,
    /// The processes as they are after what was taken up.
    pub registry: Registry,
    /// Events read and not yet taken up.
    events: Events,
    /// Processes whose address space is another than before.
    pub changed: Vec<u32>,
    /// Processes that have ended.
    pub ended: Vec<u32>,
    /// Processes that came to have a selected name.
    pub selected_late: Vec<u32>,
    /// Processes of which something may have been missed.
    pub repair: Repair,
    /// Names that are selected.
    names: Vec<String>,
}

impl Control {
    /// Nothing taken up yet; `names` are selected.
    pub fn new(lifecycle: LifecycleEvents, names: Vec<String>) -> Control {
        Control {
            lifecycle,
            registry: Registry::default(),
            events: Events::default(),
            changed: Vec::new(),
            ended: Vec::new(),
            selected_late: Vec::new(),
            repair: Repair::default(),
            names,
        }
    }

    /// Everything that happened up to this time (nanoseconds) has been read.
    pub fn read_until(&self) -> u64 {
        self.events.until
    }

    /// Takes up everything that happened up to `time`, and is sure to be all.
    pub fn advance(&mut self, time: u64) {
        if time >= self.events.until {
            // The time first: what is not read now happened later.
            let until = now();
            let mut fresh = Vec::new();
            self.lifecycle.read(&mut fresh);
            self.events.add(fresh, until);
        }
        while let Some(event) = self.events.next(time) {
            self.apply(event);
        }
    }

    /// Notes that a sample shows something to have been missed.
    pub fn sampled(&mut self, sample: &Sample<'_>) {
        let header = &sample.header;
        // One that is on its way out has no memory any more.
        let lives_again = header.mm != 0 && self.registry.has_ended(header.pid);
        if lives_again || sample.outcome == Outcome::UnknownMapping {
            self.repair.missed(header.pid, header.time);
        }
    }

    /// Events that wait, and processes that wait for being read again or are watched for it.
    pub fn sizes(&self) -> [(&'static str, u64); 5] {
        let (known, ended) = self.registry.sizes();
        let (queued, watched) = self.repair.sizes();
        [
            ("known_processes", known as u64),
            ("ended_processes", ended as u64),
            ("events", self.events.queue.len() as u64),
            ("repairs", queued as u64),
            ("missed", watched as u64),
        ]
    }

    /// A CPU has gone offline: what it has still told is kept.
    pub fn leave_cpu(&mut self, cpu: u32) {
        let until = now();
        let mut rest = Vec::new();
        self.lifecycle.leave(cpu, &mut rest);
        self.events.add(rest, until);
    }

    /// Does once in a while what no event asks for: ends what has ended, and reads again a few of the processes of
    /// which events were missed.
    pub fn settle(&mut self, read: MappingReader<'_>) {
        for pid in self.registry.incomplete() {
            self.repair.incomplete(pid, self.events.until);
        }
        self.ended.extend(self.registry.end_leaderless());
        if self.lifecycle.take_gap() {
            self.repair.everything(&self.registry);
        }
        for pid in self.repair.due() {
            let changed = self.registry.read_again(pid, read);
            self.repair.done(pid, changed, now());
            if changed {
                self.changed.push(pid);
            }
        }
    }

    /// Ends the processes that are gone though nothing told so, and looks for losses that nothing told of.
    pub fn end_missing(&mut self) {
        self.lifecycle.ask_for_losses();
        self.ended.extend(self.registry.end_missing());
        self.repair.forget_ended(&self.registry);
    }

    fn apply(&mut self, event: Event) {
        let pid = event.pid;
        match &event.kind {
            EventKind::Exec { name } | EventKind::Rename { name, .. }
                if self.names.contains(name) =>
            {
                self.selected_late.push(pid);
            }
            _ => {}
        }
        let lived = self.registry.living(pid).is_some();
        if self.registry.apply(event) {
            self.changed.push(pid);
        }
        if lived && self.registry.has_ended(pid) {
            self.ended.push(pid);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(time: u64) -> Event {
        Event {
            time,
            pid: 1,
            kind: EventKind::Thread,
        }
    }

    fn taken(events: &mut Events, time: u64) -> Vec<u64> {
        std::iter::from_fn(|| events.next(time))
            .map(|event| event.time)
            .collect()
    }

    /// The first CPU's buffer is read, then something happens on both CPUs, then the second's is read: neither is
    /// taken up before the other is there.
    #[test]
    fn the_edge_of_a_read() {
        let mut events = Events::default();
        // Read from time 10 on: of what came later only the second CPU's 12 is there.
        events.add([at(3), at(9), at(4), at(12)], 10);
        assert_eq!(taken(&mut events, u64::MAX), [3, 4, 9]);
        // The first CPU's 11 comes with the next read.
        events.add([at(11), at(15), at(13)], 14);
        assert_eq!(taken(&mut events, 11), [11]);
        assert_eq!(taken(&mut events, u64::MAX), [12, 13]);
        events.add([], 20);
        assert_eq!(taken(&mut events, 20), [15]);
    }

    /// Events of one time keep the order of their buffer.
    #[test]
    fn events_of_one_time() {
        let mut events = Events::default();
        let of_pid = |pid| Event { pid, ..at(5) };
        events.add([of_pid(1), of_pid(2)], 4);
        assert!(taken(&mut events, 9).is_empty());
        events.add([of_pid(3)], 5);
        let pids: Vec<u32> = std::iter::from_fn(|| events.next(9))
            .map(|event| event.pid)
            .collect();
        assert_eq!(pids, [1, 2, 3]);
    }
}
