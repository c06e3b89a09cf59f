//! Counts how well the samples of PostgreSQL's processes could be attributed.

use std::collections::HashMap;

use crate::profile::{Caller, DroppedCallers, Phase, Unknown};

/// How well samples of client backends and their workers could be attributed.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Samples of a server's processes.
    pub samples: u64,
    /// Of `samples`, those of processes that run statements for clients.
    pub for_clients: u64,
    /// Of `for_clients`, those of parallel workers that had no statement yet, or no longer had one.
    pub starting: u64,
    /// Of `for_clients`, those with the query.
    pub with_query: u64,
    /// Of `with_query`, those between two statements.
    pub between: u64,
    /// Of `with_query`, those with the caller's stack.
    pub with_caller: u64,
    /// Of `with_query`, those with a part of the caller's stack.
    pub with_partial_caller: u64,
    /// Of `with_query`, the others, by the reason why the caller is not known.
    pub unknown: HashMap<Unknown, u64>,
}

impl Counts {
    /// Counts samples with a query.
    pub fn add_query(&mut self, phase: Phase, caller: &Caller, samples: u64) {
        self.with_query += samples;
        if phase == Phase::Between {
            self.between += samples;
        }
        match caller {
            Caller::Known { .. } => self.with_caller += samples,
            Caller::Partial { .. } => self.with_partial_caller += samples,
            Caller::Process { reason, .. } | Caller::Unknown(reason) => {
                *self.unknown.entry(*reason).or_default() += samples;
            }
            Caller::None => {}
        }
    }

    /// Corrects the counts for samples whose callers' stacks were dropped to make room.
    pub fn drop_callers(&mut self, dropped: DroppedCallers) {
        let DroppedCallers { known, partial } = dropped;
        self.with_caller = self.with_caller.saturating_sub(known);
        self.with_partial_caller = self.with_partial_caller.saturating_sub(partial);
        *self.unknown.entry(Unknown::Lost).or_default() += known + partial;
    }
}

#[cfg(test)]
mod tests {
    use agent_ebpf::sample::Outcome;

    use super::*;
    use crate::profile::{ProcessIndex, StackId};

    /// Every sample with a query counts once: its caller is known, partial, or not known.
    #[test]
    fn partial_callers_count_apart() {
        let (process, stack) = (ProcessIndex(0), StackId::EMPTY);
        let mut counts = Counts::default();
        counts.add_query(Phase::Executing, &Caller::Known { process, stack }, 1);
        let outcome = Outcome::GuessedEnd;
        let partial = Caller::Partial {
            process,
            stack,
            outcome,
        };
        counts.add_query(Phase::Executing, &partial, 2);
        counts.add_query(Phase::Executing, &Caller::Unknown(Unknown::NoSend), 4);
        assert_eq!((counts.with_caller, counts.with_partial_caller), (1, 2));
        assert_eq!(counts.unknown[&Unknown::NoSend], 4);
        assert_eq!(counts.with_query, 7);
    }
}
