//! The thread that compiles tables, and its queue.
//!
//! Reading a file may block forever, and a file can be made so that compiling it is slow. A table that
//! takes too long is given up. A thread that does not react to that is abandoned and replaced. The number
//! of abandoned threads is bounded.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::{
    cost::Priority,
    mapped::Image,
    object::Object,
    process::ObjectId,
    unwind::{self, Table},
};

/// How long compiling a table may take. That of Debian's Chromium, with 4 million rows, takes about half a
/// second.
const BUDGET: Duration = Duration::from_secs(10);

/// How long the thread may take to react after that. A thread that does not react is blocked on a file.
const GRACE: Duration = Duration::from_secs(1);

/// Maximum number of abandoned threads that have not ended. When it is reached, no tables are compiled, and
/// samples are unwound in user space.
const MAX_ABANDONED: usize = 8;

/// An object and its table, or the reason why it has none.
pub type Compiled = (ObjectId, Result<Table, unwind::Error>);

/// How urgent a table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Urgency {
    /// A process that uses the object was sampled.
    Wanted,
    /// The table may be needed later.
    Likely,
}

/// A table to compile.
#[derive(Clone)]
struct Job {
    urgency: Urgency,
    id: ObjectId,
    image: Image,
}

/// A message to the thread.
enum Message {
    Make(Job),
    /// Makes the object's table urgent. This has no effect if the table is being compiled or is finished.
    Hurry(ObjectId),
}

/// The job that a thread is working on.
#[derive(Clone)]
struct Current {
    id: ObjectId,
    since: Instant,
    /// Set to make the compiler give up the table.
    give_up: Arc<AtomicBool>,
}

/// The job that a thread is working on, shared by the thread and [`Compiler`].
type CurrentJob = Arc<Mutex<Option<Current>>>;

/// A compiler thread and the channels to and from it. The thread ends when this is dropped, unless it is
/// blocked on a file.
struct Thread {
    messages: mpsc::Sender<Message>,
    done: mpsc::Receiver<Compiled>,
    current: CurrentJob,
    handle: JoinHandle<()>,
}

/// Compiles tables in a thread of its own.
pub struct Compiler {
    thread: Option<Thread>,
    /// Jobs that are not finished. If the thread is replaced, the new one is given all of them.
    asked: HashMap<ObjectId, Job>,
    /// Tables that were given up and are not reported yet.
    given_up: Vec<(ObjectId, unwind::Error)>,
    /// Abandoned threads that had not ended when they were last checked.
    abandoned: Vec<JoinHandle<()>>,
}

impl Compiler {
    /// Starts the thread.
    pub fn new() -> Compiler {
        Compiler {
            thread: Thread::start(),
            asked: HashMap::new(),
            given_up: Vec::new(),
            abandoned: Vec::new(),
        }
    }

    /// The number of abandoned threads that have not ended.
    pub fn abandoned(&self) -> usize {
        let stuck = |thread: &&JoinHandle<()>| !thread.is_finished();
        self.abandoned.iter().filter(stuck).count()
    }

    /// Requests the table of an object. Returns false if nothing can be compiled now.
    pub fn ask(&mut self, id: ObjectId, image: &Image) -> bool {
        let job = Job {
            urgency: Urgency::Likely,
            id,
            image: image.clone(),
        };
        let Some(thread) = &self.thread else {
            return false;
        };
        self.asked.insert(id, job.clone());
        let _ = thread.messages.send(Message::Make(job));
        true
    }

    /// Makes a requested table urgent.
    pub fn hurry(&mut self, id: ObjectId) {
        if let (Some(thread), Some(job)) = (&self.thread, self.asked.get_mut(&id))
            && job.urgency != Urgency::Wanted
        {
            job.urgency = Urgency::Wanted;
            let _ = thread.messages.send(Message::Hurry(id));
        }
    }

    /// The next table that is finished or was given up, if any.
    pub fn finished(&mut self) -> Option<Compiled> {
        self.watch();
        if let Some((id, error)) = self.given_up.pop() {
            return Some((id, Err(error)));
        }
        let compiled = self.thread.as_ref()?.done.try_recv().ok()?;
        self.asked.remove(&compiled.0);
        Some(compiled)
    }

    /// Gives up a table that takes too long, and replaces the thread if it does not react.
    fn watch(&mut self) {
        let Some(thread) = &self.thread else {
            self.abandoned.retain(|thread| !thread.is_finished());
            if self.abandoned.len() < MAX_ABANDONED {
                self.thread = Thread::start();
            }
            return;
        };
        let current = match thread.current.lock() {
            Ok(current) => current.clone(),
            Err(poisoned) => poisoned.into_inner().clone(),
        };
        let Some(current) = current.filter(|current| current.since.elapsed() > BUDGET) else {
            return;
        };
        current.give_up.store(true, Ordering::Relaxed);
        if current.since.elapsed() < BUDGET + GRACE {
            return;
        }
        self.asked.remove(&current.id);
        self.given_up.push((current.id, unwind::Error::TooSlow));
        let stuck = self.thread.take().map(|thread| thread.handle);
        self.abandoned.retain(|thread| !thread.is_finished());
        self.abandoned.extend(stuck);
        if self.abandoned.len() < MAX_ABANDONED {
            self.thread = Thread::start();
        }
        if self.thread.is_none() {
            let waiting = self
                .asked
                .drain()
                .map(|(id, _)| (id, unwind::Error::Unavailable));
            self.given_up.extend(waiting);
        }
        if let Some(thread) = &self.thread {
            for job in self.asked.values() {
                let _ = thread.messages.send(Message::Make(job.clone()));
            }
        }
    }
}

impl Thread {
    /// Starts a thread; `None` if the system refuses to.
    fn start() -> Option<Thread> {
        let (messages, todo) = mpsc::channel();
        let (finished, done) = mpsc::channel();
        let current = CurrentJob::default();
        let seen = Arc::clone(&current);
        let handle = thread::Builder::new()
            .name("flamestorm-cfi".to_owned())
            .spawn(move || {
                Priority::Compiler.apply();
                let mut queue = Queue::new(todo);
                while let Some(job) = queue.next() {
                    let compiled = (job.id, run(&job, &seen));
                    if finished.send(compiled).is_err() {
                        break;
                    }
                }
            })
            .ok()?;
        Some(Thread {
            messages,
            done,
            current,
            handle,
        })
    }
}

/// Compiles a table, and shows [`Compiler`] what is being compiled and since when.
fn run(job: &Job, seen: &CurrentJob) -> Result<Table, unwind::Error> {
    let start = Instant::now();
    let give_up = Arc::new(AtomicBool::new(false));
    let show = |current| {
        if let Ok(mut seen) = seen.lock() {
            *seen = current;
        }
    };
    show(Some(Current {
        id: job.id,
        since: start,
        give_up: Arc::clone(&give_up),
    }));
    // If a file makes the compiler panic, only that file's table is missing.
    let table = catch_unwind(AssertUnwindSafe(|| compile(&job.image, &give_up)));
    show(None);
    log::debug!(
        "object {}: {:?}, table made in {:?}",
        job.id.0,
        job.urgency,
        start.elapsed()
    );
    table.unwrap_or(Err(unwind::Error::Panicked))
}

/// The jobs that wait to be compiled.
struct Queue {
    todo: mpsc::Receiver<Message>,
    waiting: Vec<Job>,
}

impl Queue {
    fn new(todo: mpsc::Receiver<Message>) -> Queue {
        Queue {
            todo,
            waiting: Vec::new(),
        }
    }

    /// Waits for the next job: urgent ones first, then those of the smallest files, so that most programs
    /// do not wait for the tables of a few large ones. Returns `None` when no more requests can arrive.
    fn next(&mut self) -> Option<Job> {
        while self.waiting.is_empty() {
            let message = self.todo.recv().ok()?;
            self.take(message);
        }
        while let Ok(message) = self.todo.try_recv() {
            self.take(message);
        }
        let order = |job: &Job| (job.urgency, job.image.bytes().len());
        let jobs = self.waiting.iter().enumerate();
        let (next, _) = jobs.min_by_key(|(_, job)| order(job))?;
        Some(self.waiting.swap_remove(next))
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Make(job) => self.waiting.push(job),
            Message::Hurry(id) => {
                for job in self.waiting.iter_mut().filter(|job| job.id == id) {
                    job.urgency = Urgency::Wanted;
                }
            }
        }
    }
}

fn compile(image: &Image, give_up: &AtomicBool) -> Result<Table, unwind::Error> {
    let table = match Object::parse(image.bytes()) {
        Ok(object) => unwind::compile(&object, &|| !give_up.load(Ordering::Relaxed)),
        Err(_) => Err(unwind::Error::NoUnwindInformation),
    };
    image.forget_pages();
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    /// While too many threads are blocked on files, requests are refused, and waiting ones are reported as
    /// unavailable, so that they are retried. When the threads have ended, another thread compiles.
    #[test]
    fn abandoned_threads_that_end() {
        let mut compiler = Compiler::new();
        let (ends, waits) = mpsc::channel::<()>();
        let waits = Arc::new(Mutex::new(waits));
        let hang = || {
            let waits = Arc::clone(&waits);
            thread::spawn(move || {
                let _ = waits.lock().unwrap().recv();
            })
        };
        compiler.abandoned = (0..MAX_ABANDONED - 1).map(|_| hang()).collect();
        // The current thread is the last one that is allowed. It is given a job that began long ago.
        let (messages, _todo) = mpsc::channel();
        let (_finished, done) = mpsc::channel();
        let current = Current {
            id: ObjectId(1),
            since: Instant::now()
                .checked_sub(BUDGET + GRACE + Duration::from_secs(1))
                .unwrap(),
            give_up: Arc::default(),
        };
        compiler.thread = Some(Thread {
            messages,
            done,
            current: Arc::new(Mutex::new(Some(current))),
            handle: hang(),
        });
        let image = Image::Vdso(vec![0; 8].into());
        assert!(compiler.ask(ObjectId(1), &image) && compiler.ask(ObjectId(2), &image));
        let mut given_up = [compiler.finished().unwrap(), compiler.finished().unwrap()]
            .map(|(id, table)| (id.0, table.unwrap_err()));
        given_up.sort_by_key(|(id, _)| *id);
        assert_eq!(
            given_up,
            [(1, unwind::Error::TooSlow), (2, unwind::Error::Unavailable)]
        );
        assert_eq!(compiler.abandoned(), MAX_ABANDONED);
        assert!(compiler.finished().is_none() && !compiler.ask(ObjectId(2), &image));

        drop(ends);
        while compiler.abandoned() > 0 {
            thread::yield_now();
        }
        assert!(compiler.finished().is_none());
        assert!(compiler.ask(ObjectId(2), &image));
        let compiled = loop {
            match compiler.finished() {
                Some(compiled) => break compiled,
                None => thread::yield_now(),
            }
        };
        assert_eq!(compiled.0, ObjectId(2));
    }

    /// Tables of sampled processes come first, then those of small files. A table that becomes urgent while
    /// it is being compiled or after it is finished is not compiled again.
    #[test]
    fn order() {
        let (messages, todo) = mpsc::channel();
        let make = |id, bytes: usize| {
            let job = Job {
                id: ObjectId(id),
                image: Image::Vdso(vec![0; bytes].into()),
                urgency: Urgency::Likely,
            };
            messages.send(Message::Make(job)).unwrap();
        };
        let hurry = |id| messages.send(Message::Hurry(ObjectId(id))).unwrap();
        make(1, 10);
        make(2, 30);
        make(3, 20);
        hurry(2);
        let mut queue = Queue::new(todo);
        let mut next = || queue.next().unwrap().id.0;
        assert_eq!(next(), 2);
        hurry(2);
        hurry(3);
        make(9, 5);
        assert_eq!([next(), next(), next()], [3, 9, 1]);
        drop(messages);
        assert!(queue.next().is_none());
    }
}
