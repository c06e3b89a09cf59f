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
enum Urgency {
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

/// What the thread is told.
enum Message {
    Make(Job),
    /// The object's table is wanted. When it is being made, or was made and not yet taken up, there is nothing
    /// to do.
    Hurry(ObjectId),
}

/// Compiles tables beside everything else. Its thread ends with this value.
pub struct Compiler {
    messages: mpsc::Sender<Message>,
    done: mpsc::Receiver<Compiled>,
}

impl Compiler {
    /// Starts the thread.
    pub fn new() -> Compiler {
        let (messages, todo) = mpsc::channel();
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
                if finished.send((id, table)).is_err() {
                    break;
                }
            }
        });
        Compiler { messages, done }
    }

    /// Asks for the table of an object, which may be needed. False: the thread has ended.
    pub fn ask(&self, id: ObjectId, image: &Image) -> bool {
        let image = image.clone();
        let urgency = Urgency::Likely;
        let job = Job { urgency, id, image };
        self.messages.send(Message::Make(job)).is_ok()
    }

    /// A table that was asked for is wanted at once.
    pub fn hurry(&self, id: ObjectId) {
        // Without the thread there are no tables: the samples are unwound in user space.
        let _ = self.messages.send(Message::Hurry(id));
    }

    /// A table that is finished.
    pub fn finished(&self) -> Option<Compiled> {
        self.done.try_recv().ok()
    }
}

/// The jobs that have come.
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

    /// The next: what is wanted before what may be, and the shortest first, so that most programs do not wait
    /// for the tables of the few large ones. `None` when nobody asks any more.
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

    /// What a process at work waits for goes first, then the small; what is wanted while it is made, or when it
    /// is there, is not made once more.
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
