//! Names of databases and roles, and other short texts, each kept once.

use std::{collections::HashSet, sync::Arc};

use agent_ebpf::postgres::status;

use super::status::{BackendStatus, USER, half};
use crate::{query::Kind, recent::Recent};

/// Names of databases, and of roles, that one half of [`Recent`] keeps.
const MAX_NAMES: usize = 1 << 13;

/// Distinct short texts that are shared at most (kinds of processes, application names, clients).
const MAX_TEXTS: usize = 1 << 14;

/// A database or a role: server, and number in it.
type Number = (u32, u32);

/// Every name that was seen.
#[derive(Debug)]
pub struct Names {
    databases: Recent<Number, Arc<str>>,
    users: Recent<Number, Arc<str>>,
    texts: HashSet<Arc<str>>,
}

impl Names {
    /// None yet.
    pub fn new() -> Names {
        Names {
            databases: Recent::new(MAX_NAMES),
            users: Recent::new(MAX_NAMES),
            texts: HashSet::new(),
        }
    }

    /// Names of database and role: from the title where they are in it, else by their numbers, which other
    /// backends' titles explained (a parallel worker's title has no names).
    pub fn of(&mut self, said: &BackendStatus<'_>) -> (Arc<str>, Arc<str>) {
        let (database, user) = match &said.title.kind {
            Kind::Client { database, user, .. } => (Some(database.as_str()), Some(user.as_str())),
            Kind::Autovacuum { database } => (database.as_deref(), None),
            _ => (None, None),
        };
        let database = self.shared(database.unwrap_or_default());
        let user = self.shared(user.unwrap_or_default());
        if !said.has_status {
            return (database, user);
        }
        let number = |at| (said.header.server, half(&said.header.status, at));
        (
            explained(&mut self.databases, number(status::DATABASE), database),
            explained(&mut self.users, number(USER), user),
        )
    }

    /// A text that many samples have.
    pub fn shared(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return Arc::clone(known);
        }
        let shared: Arc<str> = Arc::from(text);
        if self.texts.len() >= MAX_TEXTS {
            // Those in use go on; they are only shared anew.
            self.texts.clear();
        }
        self.texts.insert(Arc::clone(&shared));
        shared
    }
}

/// Keeps or looks up the name of a number.
fn explained(names: &mut Recent<Number, Arc<str>>, number: Number, name: Arc<str>) -> Arc<str> {
    if name.is_empty() {
        return names.get(&number).unwrap_or(name);
    }
    if number.1 != 0 && names.get(&number).as_ref() != Some(&name) {
        names.insert(number, Arc::clone(&name));
    }
    name
}
