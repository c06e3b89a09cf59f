//! The thread that compiles tables, and the queue before it.

use std::{sync::mpsc, thread, time::Instant};

use super::{
    cost::go_first,
    objects::{Image, ObjectId},
};
use crate::{
    object::Object,
    unwind::{self, Table},
};

/// An object's table, or why there is none.
pub type Compiled = (ObjectId, Result<Table, unwind::Error>);

/// How urgent a table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Urgency {
    /// A process that uses the object was seen at work.
    Wanted,
    /// It may be needed.
    Likely,
}

/// A table to compile.
struct Job {
    urgency: Urgency,
    id: ObjectId,
    image: Image,
}

/// Compiles tables beside everything else. Its thread ends with this value.
pub struct Compiler {
    jobs: mpsc::Sender<Job>,
    done: mpsc::Receiver<Compiled>,
}

impl Compiler {
    /// Starts the thread.
    pub fn new() -> Compiler {
        let (jobs, todo) = mpsc::channel();
        let (finished, done) = mpsc::channel();
        thread::spawn(move || {
            go_first();
            let mut queue = Queue::new(todo);
            while let Some(Job { id, image, urgency }) = queue.next() {
                let start = Instant::now();
                let table = compile(&image);
                let (bytes, took) = (image.bytes().len(), start.elapsed());
                log::debug!(
                    "object {}: {bytes} bytes, {urgency:?}, table made in {took:?}",
                    id.0
                );
                queue.forget(id);
                if finished.send((id, table)).is_err() {
                    break;
                }
            }
        });
        Compiler { jobs, done }
    }

    /// Asks for the table of an object. Asking again makes it more urgent. False: the thread has ended.
    pub fn ask(&self, id: ObjectId, image: &Image, urgency: Urgency) -> bool {
        let image = image.clone();
        self.jobs.send(Job { urgency, id, image }).is_ok()
    }

    /// A table that is finished; one that was asked for twice may come twice.
    pub fn finished(&self) -> Option<Compiled> {
        self.done.try_recv().ok()
    }
}

/// The jobs that have come.
struct Queue {
    todo: mpsc::Receiver<Job>,
    waiting: Vec<Job>,
}

impl Queue {
    fn new(todo: mpsc::Receiver<Job>) -> Queue {
        Queue {
            todo,
            waiting: Vec::new(),
        }
    }

    /// The next: what is wanted before what may be, and the shortest first, so that most programs do not wait
    /// for the tables of the few large ones. `None` when nobody asks any more.
    fn next(&mut self) -> Option<Job> {
        if self.waiting.is_empty() {
            self.waiting.push(self.todo.recv().ok()?);
        }
        self.waiting.extend(self.todo.try_iter());
        let order = |job: &Job| (job.urgency, job.image.bytes().len());
        let jobs = self.waiting.iter().enumerate();
        let (next, _) = jobs.min_by_key(|(_, job)| order(job))?;
        Some(self.waiting.swap_remove(next))
    }

    /// The object's table is there: whoever asked for it meanwhile gets the same.
    fn forget(&mut self, id: ObjectId) {
        self.waiting.extend(self.todo.try_iter());
        self.waiting.retain(|other| other.id != id);
    }
}

fn compile(image: &Image) -> Result<Table, unwind::Error> {
    let table = match Object::parse(image.bytes()) {
        Ok(object) => unwind::compile(&object),
        Err(_) => Err(unwind::Error::NoUnwindInformation),
    };
    image.forget_pages();
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a process at work waits for goes first, then the small; what was asked for twice is done once.
    #[test]
    fn order() {
        let (jobs, todo) = mpsc::channel();
        let job = |id, bytes: usize, urgency| Job {
            id: ObjectId(id),
            image: Image::Vdso(vec![0; bytes].into()),
            urgency,
        };
        for job in [
            job(1, 10, Urgency::Likely),
            job(2, 30, Urgency::Likely),
            job(3, 20, Urgency::Likely),
            job(2, 30, Urgency::Wanted),
        ] {
            jobs.send(job).unwrap();
        }
        let mut queue = Queue::new(todo);
        let mut order = Vec::new();
        for again in [2, 9, 9] {
            let next = queue.next().unwrap().id;
            // It is asked for once more while it is compiled.
            jobs.send(job(again, 5, Urgency::Wanted)).unwrap();
            queue.forget(next);
            order.push(next.0);
        }
        drop(jobs);
        order.extend(std::iter::from_fn(|| queue.next()).map(|job| job.id.0));
        assert_eq!(order, [2, 1, 9, 3]);
    }
}
