//! Processes and executable mappings as they come and go: the kernel's own records of forks,
//! execs, exits and mappings (`perf_event_open(2)`: `PERF_RECORD_MMAP2`, `COMM`, `FORK`, `EXIT`),
//! with one buffer per CPU. They are written before the new code runs, so no polling is needed.

use std::path::PathBuf;

use perf_event::{Builder, ReadFormat, SampleFlag, Sampler, events::Software};
use perf_event_data::Record;

use super::{Error, is_online};

/// Size of a CPU's buffer, bytes: a thousand mappings. The kernel reports records that do not fit as lost.
const BUFFER_BYTES: usize = 128 * 1024;

/// Size of a record's header (`struct perf_event_header`), bytes.
const HEADER_BYTES: usize = 8;

/// Size of the largest record, bytes: a mapping of a file with the longest possible path.
const MAX_RECORD: usize = 4096 + 256;

/// `PERF_RECORD_MISC_COMM_EXEC`: the name changed because of an exec.
const MISC_COMM_EXEC: u16 = 1 << 13;

/// `PROT_EXEC`.
const EXECUTABLE: u32 = 4;

/// Identity of a mapped file, as the kernel reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileKey {
    /// Device, major number.
    pub major: u32,
    /// Device, minor number.
    pub minor: u32,
    /// Inode.
    pub inode: u64,
}

/// An executable mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MappedObject {
    /// First address (avma).
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// Offset of `start` in the file, bytes.
    pub offset: u64,
    /// The file; `None` for anonymous memory.
    pub file: Option<FileKey>,
    /// Path as the process sees it, or a label of the kernel's (`[vdso]`, `//anon`).
    pub name: PathBuf,
}

/// The kind of an event.
#[derive(Clone, Debug)]
pub enum EventKind {
    /// A process was forked.
    Fork {
        /// The parent's pid.
        parent: u32,
    },
    /// The process now runs another program, of this name.
    Exec {
        /// The new name of the process.
        name: String,
    },
    /// A thread changed its name.
    Rename {
        /// The thread.
        tid: u32,
        /// Its new name.
        name: String,
    },
    /// The process started another thread.
    Thread,
    /// The process's first thread ended. The process lives on if it has others.
    Exit,
    /// Another thread of the process ended.
    ThreadExit,
    /// Executable memory was mapped.
    Map(MappedObject),
}

/// An event of a process.
#[derive(Clone, Debug)]
pub struct Event {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub time: u64,
    /// The process.
    pub pid: u32,
    /// What happened.
    pub kind: EventKind,
}

/// A CPU's buffer.
struct Buffer {
    cpu: u32,
    sampler: Sampler,
    /// The number of records that did not fit, as reported by records.
    lost: u64,
    /// The number of lost records when the kernel was last asked.
    asked: u64,
}

impl Buffer {
    /// The number of records that did not fit. The kernel reports losses with the next record, which never
    /// comes if nothing more happens on this CPU. Since Linux 6.0 it can also be asked (`PERF_FORMAT_LOST`).
    fn lost(&mut self) -> u64 {
        let asked = self.sampler.read_full().ok().and_then(|data| data.lost());
        asked.unwrap_or(0).max(self.lost)
    }
}

/// The open buffers.
pub struct LifecycleEvents {
    buffers: Vec<Buffer>,
    /// The number of records lost in buffers that have been closed.
    lost_before: u64,
    /// Whether events may have been missed since the last call of [`Self::take_gap`].
    gap: bool,
}

impl LifecycleEvents {
    /// Opens a buffer on each CPU. From here on nothing is missed.
    ///
    /// # Errors
    /// The kernel refuses: missing privileges, or too little memory that may be locked.
    pub fn open(cpus: &[u32]) -> Result<LifecycleEvents, Error> {
        let mut events = LifecycleEvents {
            buffers: Vec::new(),
            lost_before: 0,
            gap: false,
        };
        for &cpu in cpus {
            match events.follow(cpu) {
                // The CPU has gone offline since it was listed.
                Err(_) if !is_online(cpu) => {}
                followed => followed?,
            }
        }
        // The caller reads all existing processes after this, so nothing was missed.
        events.gap = false;
        Ok(events)
    }

    /// Opens the buffer of a CPU that has come online. Earlier events on that CPU were missed.
    ///
    /// # Errors
    /// As for [`Self::open`].
    pub fn follow(&mut self, cpu: u32) -> Result<(), Error> {
        let sampler = open(cpu).map_err(|source| Error::Lifecycle { cpu, source })?;
        self.buffers.push(Buffer {
            cpu,
            sampler,
            lost: 0,
            asked: 0,
        });
        self.gap = true;
        Ok(())
    }

    /// Closes the buffer of a CPU that has gone offline, because the kernel never writes to
    /// that buffer again. The events that are still in it are appended to `events`.
    pub fn leave(&mut self, cpu: u32, events: &mut Vec<Event>) {
        self.read(events);
        self.buffers.retain_mut(|buffer| {
            let stays = buffer.cpu != cpu;
            if !stays {
                self.lost_before += buffer.lost();
            }
            stays
        });
    }

    /// Appends all events since the last call, grouped by CPU.
    pub fn read(&mut self, events: &mut Vec<Event>) {
        for Buffer { sampler, lost, .. } in &mut self.buffers {
            let mut read = 0;
            // No more than a full buffer is read, because a process may cause events as fast as they are read.
            while read < BUFFER_BYTES
                && let Some(record) = sampler.next_record()
            {
                let misc = record.misc();
                let bytes = record.to_contiguous();
                read += bytes.len() + HEADER_BYTES;
                // With `sample_id_all`, and the time as the only requested field, the time is
                // the last word of each record.
                let time = bytes
                    .last_chunk()
                    .map_or(0, |word| u64::from_le_bytes(*word));
                match record.parse_record() {
                    Ok(Record::Lost(record)) => {
                        *lost += record.lost;
                        self.gap = true;
                    }
                    Ok(record) => events.extend(event(time, misc, record)),
                    Err(_) => {
                        *lost += 1;
                        self.gap = true;
                    }
                }
            }
            // A buffer that was almost full may have lost records. The kernel reports them only
            // with the next record, which may come much later.
            self.gap |= read + MAX_RECORD > BUFFER_BYTES;
        }
    }

    /// The number of records that did not fit into a buffer, so far.
    pub fn lost(&mut self) -> u64 {
        let open: u64 = self.buffers.iter_mut().map(Buffer::lost).sum();
        self.lost_before + open
    }

    /// Asks the kernel for losses that no record has reported yet, if it supports that. This interrupts each CPU.
    pub fn ask_for_losses(&mut self) {
        for buffer in &mut self.buffers {
            let lost = buffer.lost();
            self.gap |= lost > buffer.asked;
            buffer.asked = lost;
        }
    }

    /// Whether events may have been missed since the last call.
    pub fn take_gap(&mut self) -> bool {
        std::mem::take(&mut self.gap)
    }
}

fn open(cpu: u32) -> std::io::Result<Sampler> {
    let counting_losses = open_with(cpu, ReadFormat::LOST);
    // Kernels before 6.0 do not support this format.
    counting_losses.or_else(|_| open_with(cpu, ReadFormat::empty()))
}

fn open_with(cpu: u32, read_format: ReadFormat) -> std::io::Result<Sampler> {
    Builder::new(Software::DUMMY)
        .read_format(read_format)
        .any_pid()
        .one_cpu(cpu as usize)
        .mmap(true)
        .mmap2(true)
        .comm(true)
        .comm_exec(true)
        .task(true)
        .sample_id_all(true)
        .sample(SampleFlag::TIME)
        .clockid(Some(perf_event::Clock::MONOTONIC))
        .enabled(true)
        .build()?
        .sampled(BUFFER_BYTES)
}

fn event(time: u64, misc: u16, record: Record<'_>) -> Option<Event> {
    let (pid, kind) = match record {
        Record::Fork(fork) if fork.pid != fork.ppid => {
            (fork.pid, EventKind::Fork { parent: fork.ppid })
        }
        Record::Fork(fork) => (fork.pid, EventKind::Thread),
        Record::Exit(exit) if exit.pid == exit.tid => (exit.pid, EventKind::Exit),
        Record::Exit(exit) => (exit.pid, EventKind::ThreadExit),
        Record::Comm(comm) => {
            let name = String::from_utf8_lossy(&comm.comm).into_owned();
            let tid = comm.tid;
            let kind = if misc & MISC_COMM_EXEC != 0 {
                EventKind::Exec { name }
            } else {
                EventKind::Rename { tid, name }
            };
            (comm.pid, kind)
        }
        Record::Mmap2(map) if map.prot & EXECUTABLE != 0 => {
            let file = FileKey {
                major: map.maj().unwrap_or(0),
                minor: map.min().unwrap_or(0),
                inode: map.ino().unwrap_or(0),
            };
            let object = MappedObject {
                start: map.addr,
                end: map.addr.saturating_add(map.len),
                offset: map.pgoff,
                file: (file.inode != 0).then_some(file),
                name: map.filename_os().into(),
            };
            (map.pid, EventKind::Map(object))
        }
        _ => return None,
    };
    Some(Event { time, pid, kind })
}
