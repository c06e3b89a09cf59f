//! Threads for work that may block: opening files that other processes chose, reading `/proc`
//! and the memory of other processes.
//!
//! The session's loop must keep reading the ring buffer, so it never does such work itself. It hands
//! each piece to a thread of this pool and waits for a short time only. Nearly all work is done by
//! then, which keeps the loop simple: it continues with the answer in hand. Work that takes longer
//! is overdue: the loop continues without the answer, and the thread counts against limits until its
//! work is done. A thread that waits for a file system that never answers cannot be ended from here,
//! so new work for the same user or the same device is refused while too many threads are overdue.

use std::{
    fmt, fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use crate::{cost::Priority, kernel::MappedObject, process::mapped_objects};

/// How long the loop waits for one answer. The ring buffer has room for an eighth of a second
/// in which every sample carries the largest stack copy ([`agent_ebpf::limits::ring_bytes`]),
/// and normally for much longer. Opening a large file on a slow machine may take as long.
const LONGEST_WAIT: Duration = Duration::from_millis(250);

/// How long the loop waits for one answer while nothing is sampled.
const LONGEST_UNHURRIED_WAIT: Duration = Duration::from_secs(2);

/// Total time that the loop may spend waiting if it has not waited recently.
const FULL_PATIENCE: Duration = Duration::from_millis(500);

/// Reciprocal of the rate at which patience is regained: a third of the time that passes. The
/// loop therefore waits for at most a third of its time.
const REGAINED_PART: u32 = 3;

/// Maximum number of overdue threads.
const MAX_OVERDUE: usize = 32;

/// Maximum number of overdue threads that the processes of one user may cause.
const MAX_OVERDUE_OF_USER: usize = 4;

/// Once work has been overdue for this long, its device is considered dead. A slow disk answers sooner.
const DEVICE_PATIENCE: Duration = Duration::from_secs(1);

/// Maximum number of idle threads that are kept for later work.
const MAX_IDLE: usize = 2;

/// A device's major and minor number.
pub type Device = (u32, u32);

/// The process, and perhaps the file, that a piece of work touches.
#[derive(Clone, Debug)]
pub struct Subject {
    /// The process.
    pub pid: u32,
    /// For work on a file: its path as the process sees it, and its device.
    pub file: Option<(PathBuf, Device)>,
}

impl Subject {
    /// Work on a process alone.
    pub fn process(pid: u32) -> Subject {
        Subject { pid, file: None }
    }

    fn device(&self) -> Option<Device> {
        self.file.as_ref().map(|(_, device)| *device)
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.file {
            Some((path, _)) => write!(f, "{} (of pid {})", path.display(), self.pid),
            None => write!(f, "the memory of pid {}", self.pid),
        }
    }
}

/// The result of a piece of work.
#[derive(Debug)]
pub enum Answer<T> {
    /// The work was done in time.
    Done(T),
    /// The work is overdue. Its answer may arrive here later.
    Overdue(Receiver<T>),
    /// The work was not begun, because too much work is overdue or no thread could be started, or it panicked.
    Refused,
}

impl<T> Answer<T> {
    /// The answer, if it came in time.
    pub fn done(self) -> Option<T> {
        match self {
            Answer::Done(answer) => Some(answer),
            Answer::Overdue(_) | Answer::Refused => None,
        }
    }
}

/// Counts of work that gave no answer in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolCounts {
    /// Pieces of work that took longer than the loop waited.
    pub overdue: u64,
    /// Pieces of work that were refused.
    pub refused: u64,
    /// Pieces of work that panicked.
    pub panicked: u64,
}

type Job = Box<dyn FnOnce() + Send>;

/// A thread, represented by the channel to it. The thread ends when this is dropped and its current job is done.
struct Worker {
    jobs: mpsc::Sender<Job>,
}

/// A thread whose work is overdue.
struct Overdue {
    worker: Worker,
    subject: Subject,
    user: Option<u32>,
    since: Instant,
    is_done: Arc<AtomicBool>,
}

/// The pool of threads.
pub struct WorkerPool {
    idle: Vec<Worker>,
    overdue: Vec<Overdue>,
    /// How long the loop may still wait in total.
    patience: Duration,
    /// When `patience` was last updated.
    updated: Instant,
    counts: PoolCounts,
    /// Pieces of work that panicked, including those that were overdue by then.
    panicked: Arc<AtomicU64>,
}

impl WorkerPool {
    /// Makes a pool without threads. They are started when they are needed.
    pub fn new() -> WorkerPool {
        WorkerPool {
            idle: Vec::new(),
            overdue: Vec::new(),
            patience: FULL_PATIENCE,
            updated: Instant::now(),
            counts: PoolCounts::default(),
            panicked: Arc::default(),
        }
    }

    /// Lets the loop wait for `time` in total, once. For use before and after sampling, when
    /// waiting loses no samples.
    pub fn be_patient(&mut self, time: Duration) {
        self.patience = self.patience.max(time);
        self.updated = Instant::now();
    }

    /// Ends the effect of [`WorkerPool::be_patient`], because sampling begins.
    pub fn be_quick(&mut self) {
        self.patience = FULL_PATIENCE;
        self.updated = Instant::now();
    }

    /// Counts of work that gave no answer in time, so far.
    pub fn counts(&self) -> PoolCounts {
        PoolCounts {
            panicked: self.panicked.load(Ordering::Relaxed),
            ..self.counts
        }
    }

    /// The number of threads whose work is overdue.
    pub fn overdue(&self) -> usize {
        self.overdue.len()
    }

    /// The subjects of overdue work that is still not done.
    pub fn unanswered(&self) -> impl Iterator<Item = &Subject> {
        let waiting = |overdue: &&Overdue| !overdue.is_done.load(Ordering::Acquire);
        let waiting = self.overdue.iter().filter(waiting);
        waiting.map(|overdue| &overdue.subject)
    }

    /// Does `work` in a thread, and waits a short time for its answer.
    pub fn call<T: Send + 'static>(
        &mut self,
        subject: Subject,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Answer<T> {
        self.take_back();
        let user = match self.admit(&subject) {
            Some(user) => user,
            None => {
                self.counts.refused += 1;
                return Answer::Refused;
            }
        };
        let Some(worker) = self.idle.pop().or_else(Worker::start) else {
            self.counts.refused += 1;
            return Answer::Refused;
        };
        let (sender, receiver) = mpsc::channel();
        let is_done = Arc::new(AtomicBool::new(false));
        let done = Arc::clone(&is_done);
        let panicked = Arc::clone(&self.panicked);
        let job = Box::new(move || {
            match catch_unwind(AssertUnwindSafe(work)) {
                // Sending fails if the receiver was dropped, and then the answer is not needed.
                Ok(answer) => drop(sender.send(answer)),
                Err(_) => {
                    panicked.fetch_add(1, Ordering::Relaxed);
                    drop(sender);
                }
            }
            done.store(true, Ordering::Release);
        });
        if worker.jobs.send(job).is_err() {
            self.counts.refused += 1;
            return Answer::Refused;
        }
        let begun = Instant::now();
        let answer = receiver.recv_timeout(self.longest_wait());
        self.patience = self.patience.saturating_sub(begun.elapsed());
        match answer {
            Ok(answer) => {
                self.keep(worker);
                Answer::Done(answer)
            }
            Err(RecvTimeoutError::Disconnected) => {
                self.keep(worker);
                Answer::Refused
            }
            Err(RecvTimeoutError::Timeout) => {
                self.counts.overdue += 1;
                self.overdue.push(Overdue {
                    worker,
                    user: user.or_else(|| user_of(subject.pid)),
                    subject,
                    since: begun,
                    is_done,
                });
                Answer::Overdue(receiver)
            }
        }
    }

    /// Whether work on `subject` may begin: `None` if not, otherwise the user of its process if
    /// that had to be looked up.
    fn admit(&self, subject: &Subject) -> Option<Option<u32>> {
        if self.overdue.is_empty() {
            return Some(None);
        }
        if self.overdue.len() >= MAX_OVERDUE {
            return None;
        }
        let is_dead = |overdue: &&Overdue| {
            subject.file.is_some()
                && overdue.subject.device() == subject.device()
                && overdue.since.elapsed() > DEVICE_PATIENCE
        };
        if self.overdue.iter().any(|overdue| is_dead(&overdue)) {
            return None;
        }
        let user = user_of(subject.pid);
        let of_user = self.overdue.iter().filter(|overdue| overdue.user == user);
        (of_user.count() < MAX_OVERDUE_OF_USER).then_some(user)
    }

    /// The executable mappings of a process; `None` if they could not be read, or not in time.
    pub fn mapped_objects(&mut self, pid: u32) -> Option<Vec<MappedObject>> {
        let answer = self.call(Subject::process(pid), move || mapped_objects(pid));
        answer.done()?.ok()
    }

    /// Updates `patience`, and returns how long the loop waits for the next answer.
    fn longest_wait(&mut self) -> Duration {
        let regained = self.updated.elapsed() / REGAINED_PART;
        self.updated = Instant::now();
        if self.patience < FULL_PATIENCE {
            self.patience = (self.patience + regained).min(FULL_PATIENCE);
        }
        let longest = match self.patience > FULL_PATIENCE {
            true => LONGEST_UNHURRIED_WAIT,
            false => LONGEST_WAIT,
        };
        self.patience.min(longest)
    }

    /// Makes threads available again whose overdue work is done.
    fn take_back(&mut self) {
        if self.overdue.is_empty() {
            return;
        }
        let (done, overdue) = std::mem::take(&mut self.overdue)
            .into_iter()
            .partition(|overdue| overdue.is_done.load(Ordering::Acquire));
        self.overdue = overdue;
        let done: Vec<Overdue> = done;
        for overdue in done {
            self.keep(overdue.worker);
        }
    }

    fn keep(&mut self, worker: Worker) {
        if self.idle.len() < MAX_IDLE {
            self.idle.push(worker);
        }
    }
}

impl Worker {
    /// Starts a thread; `None` if the system refuses.
    fn start() -> Option<Worker> {
        let (jobs, todo) = mpsc::channel::<Job>();
        thread::Builder::new()
            .name("flamestorm-io".to_owned())
            .spawn(move || {
                Priority::Reader.apply();
                for job in todo {
                    job();
                }
            })
            .ok()?;
        Some(Worker { jobs })
    }
}

/// The real user id of a process. It is read from `status`, because the owner of `/proc/PID` is
/// root if the process may not be dumped.
fn user_of(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let users = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    users.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: fn() -> Subject = || Subject::process(std::process::id());

    /// An answer in time is returned. A panic only loses its own answer, and later work is still done.
    #[test]
    fn answers() {
        let mut pool = WorkerPool::new();
        assert_eq!(pool.call(OWN(), || 7).done(), Some(7));
        let panicked: Answer<()> = pool.call(OWN(), || panic!("as a hostile file makes it"));
        assert!(panicked.done().is_none());
        // Printing the panic's message may take longer than the loop waits.
        let deadline = Instant::now() + Duration::from_secs(60);
        while pool.counts().panicked == 0 && Instant::now() < deadline {
            thread::yield_now();
        }
        assert_eq!(pool.counts().panicked, 1);
        pool.be_patient(Duration::from_secs(60));
        assert_eq!(pool.call(OWN(), || 8).done(), Some(8));
    }

    /// Work that never ends causes refusals for its own user only. Its answer can still be
    /// received late, and its thread is used again.
    #[test]
    fn overdue() {
        let mut pool = WorkerPool::new();
        let (release, held) = mpsc::channel::<()>();
        let held = Arc::new(std::sync::Mutex::new(held));
        let mut late = Vec::new();
        for _ in 0..MAX_OVERDUE_OF_USER {
            pool.patience = Duration::from_millis(1);
            let held = Arc::clone(&held);
            let answer = pool.call(OWN(), move || held.lock().expect("a lock").recv().is_ok());
            let Answer::Overdue(receiver) = answer else {
                panic!("{answer:?}");
            };
            late.push(receiver);
        }
        assert!(matches!(pool.call(OWN(), || ()), Answer::Refused));
        pool.be_patient(Duration::from_secs(5));
        // Pretend that the overdue work belongs to another user.
        pool.overdue
            .iter_mut()
            .for_each(|o| o.user = Some(u32::MAX));
        assert!(pool.call(OWN(), || ()).done().is_some());
        for _ in &late {
            release.send(()).expect("the work waits");
        }
        for receiver in late {
            assert_eq!(receiver.recv_timeout(Duration::from_secs(60)), Ok(true));
        }
        let deadline = Instant::now() + Duration::from_secs(60);
        while pool.overdue() > 0 && Instant::now() < deadline {
            pool.take_back();
            thread::yield_now();
        }
        assert_eq!(pool.overdue(), 0);
        assert_eq!(pool.counts().refused, 1);
    }

    /// However much work is overdue, the loop spends only a part of its time waiting.
    #[test]
    fn patience() {
        let mut pool = WorkerPool::new();
        pool.patience = Duration::ZERO;
        pool.updated = Instant::now();
        assert!(pool.longest_wait() <= LONGEST_WAIT);
        pool.patience = Duration::ZERO;
        pool.updated = Instant::now()
            .checked_sub(Duration::from_secs(60))
            .expect("the machine runs for a minute");
        assert_eq!(pool.longest_wait(), LONGEST_WAIT);
        assert_eq!(pool.patience, FULL_PATIENCE);
        pool.be_patient(Duration::from_secs(3));
        assert_eq!(pool.longest_wait(), LONGEST_UNHURRIED_WAIT);
        assert!(pool.patience > FULL_PATIENCE);
    }
}
