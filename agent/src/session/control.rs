//! The events of processes (fork, exec, exit, new mappings), applied in the order in which they happened.

use std::collections::VecDeque;

use agent_ebpf::sample::Outcome;

use super::repair::Repair;
use crate::{
    clock::now,
    kernel::{Event, EventKind, LifecycleEvents, Sample},
    process::{MappingReader, Registry},
};

/// Events ordered by time. Each CPU has its own buffer, and the buffers are read one after the other. Of
/// the events that happen after the first buffer was read, some are in this read and some are not, so all
/// of them wait for the next read.
#[derive(Debug, Default)]
struct Events {
    queue: VecDeque<Event>,
    /// All events up to this time (nanoseconds) are in the queue.
    until: u64,
}

impl Events {
    /// Adds the events of a read that began at `until`.
    fn add(&mut self, read: impl IntoIterator<Item = Event>, until: u64) {
        self.queue.extend(read);
        // The queue and the new events are each nearly sorted already, so sorting is cheap.
        self.queue.make_contiguous().sort_by_key(|event| event.time);
        self.until = until;
    }

    /// Takes the next event up to `time`, unless an event that was not read yet may precede it.
    fn next(&mut self, time: u64) -> Option<Event> {
        let time = time.min(self.until);
        self.queue.pop_front_if(|event| event.time <= time)
    }
}

/// Reads the events of processes, orders them, and applies them up to the time of the sample that is being
/// processed.
pub struct Control {
    /// The source of the events.
    pub lifecycle: LifecycleEvents,
    /// The processes, after the events that were applied so far.
    pub registry: Registry,
    /// Events that were read and are not applied yet.
    events: Events,
    /// Processes whose address space has changed.
    pub changed: Vec<u32>,
    /// Processes that have ended.
    pub ended: Vec<u32>,
    /// Processes that got a selected name after the recording had begun.
    pub selected_late: Vec<u32>,
    /// Processes whose events may have been missed.
    pub repair: Repair,
    /// The names of the processes to sample.
    names: Vec<String>,
}

impl Control {
    /// Starts without any event applied. `names` are the names of the processes to sample.
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

    /// The time (nanoseconds) up to which all events have been read.
    pub fn read_until(&self) -> u64 {
        self.events.until
    }

    /// Applies the events up to `time`, as far as it is certain that none of them is missing.
    pub fn advance(&mut self, time: u64) {
        if time >= self.events.until {
            // The time is taken before the buffers are read, so every event that this read misses is later
            // than `until`.
            let until = now();
            let mut fresh = Vec::new();
            self.lifecycle.read(&mut fresh);
            self.events.add(fresh, until);
        }
        while let Some(event) = self.events.next(time) {
            self.apply(event);
        }
    }

    /// Notes a sample that shows that an event was missed.
    pub fn sampled(&mut self, sample: &Sample<'_>) {
        let header = &sample.header;
        // A process that is exiting has no address space any more (`mm` is 0), and is no evidence.
        let lives_again = header.mm != 0 && self.registry.has_ended(header.pid);
        if lives_again || sample.outcome == Outcome::UnknownMapping {
            self.repair.missed(header.pid, header.time);
        }
    }

    /// The numbers of known and ended processes, waiting events, processes to be read again, and processes
    /// whose misses are counted.
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

    /// Stops following a CPU that has gone offline. The events that are left in its buffer are kept.
    pub fn leave_cpu(&mut self, cpu: u32) {
        let until = now();
        let mut rest = Vec::new();
        self.lifecycle.leave(cpu, &mut rest);
        self.events.add(rest, until);
    }

    /// Handles what no event reports: ends processes whose last thread has ended, and reads again some of
    /// the processes whose events were missed.
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

    /// Ends the processes that no longer exist although no event has reported their end, and asks the
    /// kernel for losses that it has not reported yet.
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

    /// The first CPU's buffer is read, then something happens on both CPUs, then the second CPU's buffer is
    /// read: neither event is applied before both have been read.
    #[test]
    fn the_edge_of_a_read() {
        let mut events = Events::default();
        // The read begins at time 10. Of the later events only the second CPU's event at 12 is in it.
        events.add([at(3), at(9), at(4), at(12)], 10);
        assert_eq!(taken(&mut events, u64::MAX), [3, 4, 9]);
        // The first CPU's event at 11 comes with the next read.
        events.add([at(11), at(15), at(13)], 14);
        assert_eq!(taken(&mut events, 11), [11]);
        assert_eq!(taken(&mut events, u64::MAX), [12, 13]);
        events.add([], 20);
        assert_eq!(taken(&mut events, 20), [15]);
    }

    /// Events with equal times keep the order of their buffer.
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
