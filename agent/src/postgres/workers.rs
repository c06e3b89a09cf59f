//! Attributes the samples at which a parallel worker reported no statement. This happens after the
//! recording, when all samples have been seen.

use std::{collections::HashMap, sync::Arc};

use super::counts::Counts;
use crate::profile::{Attribution, Backend, Phase, ProcessIndex, Window};

/// The value of `pg_stat_activity.backend_type` for a process that helps another backend with its
/// statement.
pub const PARALLEL_WORKER: &str = "parallel worker";

/// Completes the samples of parallel workers. A worker works for one statement all its life, but reports
/// that statement only after it has started up and before it shuts down. Its other samples get the
/// attribution of those that report it.
pub fn complete(window: &mut Window, counts: &mut Counts) {
    let is_worker = |backend: &Backend| &*backend.kind == PARALLEL_WORKER;
    let mut told: HashMap<ProcessIndex, Attribution> = HashMap::new();
    for (row, _) in window.rows() {
        let attribution = window.attribution(row);
        let backend = attribution.and_then(|attribution| attribution.backend.as_ref());
        if let (Some(attribution), Some(backend)) = (attribution, backend)
            && is_worker(backend)
            && backend.query.is_some()
        {
            told.entry(row.process)
                .or_insert_with(|| attribution.clone());
        }
    }
    window.reattribute(|row, attribution, samples| {
        let silent = attribution.backend.as_ref()?;
        if !is_worker(silent) || silent.query.is_some() {
            return None;
        }
        let told = told.get(&row.process)?;
        let backend = told.backend.as_ref()?;
        counts.add_query(Phase::Executing, &backend.caller, samples);
        counts.starting = counts.starting.saturating_sub(samples);
        let backend = Backend {
            state: silent.state,
            wait: silent.wait,
            phase: Phase::Executing,
            ..Backend::clone(backend)
        };
        Some(Attribution {
            trace: told.trace,
            backend: Some(Arc::new(backend)),
        })
    });
}

#[cfg(test)]
mod tests {
    use agent_ebpf::sample::{Outcome, TraceContext};

    use super::*;
    use crate::profile::{Caller, QueryIndex, RawSample, Unknown, WaitEvent};

    fn worker(query: Option<QueryIndex>, state: &'static str, caller: Caller) -> Attribution {
        Attribution {
            trace: TraceContext::default(),
            backend: Some(Arc::new(Backend {
                kind: Arc::from(PARALLEL_WORKER),
                port: 5432,
                query,
                phase: query.map_or(Phase::NoStatement, |_| Phase::Executing),
                state,
                wait: WaitEvent::default(),
                database: Arc::from(""),
                user: Arc::from(""),
                application: Arc::from(""),
                client: Arc::from(""),
                caller,
            })),
        }
    }

    /// The samples of a worker's startup get its statement and its caller. A worker that never reported a
    /// statement stays unknown.
    #[test]
    fn workers() {
        let mut window = Window::new();
        let mut count = |process, attribution| {
            window.add(&RawSample {
                process: ProcessIndex(process),
                tid: process,
                thread_name: *b"postgres\0\0\0\0\0\0\0\0",
                outcome: Outcome::Complete,
                kernel: &[],
                user: &[],
                attribution: Some(attribution),
                starts_execution: false,
            });
        };
        let lost = Caller::Unknown(Unknown::Budget);
        count(1, worker(None, "", Caller::None));
        count(1, worker(None, "", Caller::None));
        count(1, worker(Some(QueryIndex(3)), "active", lost.clone()));
        count(2, worker(None, "", Caller::None));
        let mut counts = Counts::default();
        complete(&mut window, &mut counts);
        let found: Vec<_> = window
            .rows()
            .map(|(row, tally)| {
                let backend = window.attribution(row).and_then(|a| a.backend.clone());
                let backend = backend.expect("a worker's");
                (row.process.0, backend.query, backend.state, tally.samples)
            })
            .collect();
        let expected = [
            (1, Some(QueryIndex(3)), "", 2),
            (1, Some(QueryIndex(3)), "active", 1),
            (2, None, "", 1),
        ];
        assert_eq!(found, expected);
        assert_eq!(counts.with_query, 2);
        assert_eq!(counts.unknown[&Unknown::Budget], 2);
    }
}
