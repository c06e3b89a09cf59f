//! The thread that compiles tables, and the queue before it.

use std::{sync::mpsc, thread};

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
            for job in in_order(todo) {
                if finished.send((job.id, compile(&job.image))).is_err() {
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

/// The jobs that have come: what is wanted before what may be, and the shortest first, so that most programs do
/// not wait for the tables of the few large ones.
fn in_order(jobs: mpsc::Receiver<Job>) -> impl Iterator<Item = Job> {
    let mut waiting: Vec<Job> = Vec::new();
    std::iter::from_fn(move || {
        if waiting.is_empty() {
            waiting.push(jobs.recv().ok()?);
        }
        waiting.extend(jobs.try_iter());
        let order = |job: &Job| (job.urgency, job.image.bytes().len());
        let (next, _) = waiting
            .iter()
            .enumerate()
            .min_by_key(|(_, job)| order(job))?;
        let job = waiting.swap_remove(next);
        waiting.retain(|other| other.id != job.id);
        Some(job)
    })
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
        drop(jobs);
        let order: Vec<u32> = in_order(todo).map(|job| job.id.0).collect();
        assert_eq!(order, [2, 1, 3]);
    }
}
