//! Names of databases and roles, and other short texts, each kept once.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use agent_ebpf::postgres::status;

use super::status::{Said, USER, half};
use crate::query::Kind;

/// Names of databases and roles kept at most.
const MAX_NAMES: usize = 1 << 14;

/// Distinct short texts kept at most (kinds of processes, application names, clients).
const MAX_TEXTS: usize = 1 << 14;

/// A database or a role: server, and number in it.
type Number = (u32, u32);

/// Every name that was seen.
#[derive(Debug, Default)]
pub struct Names {
    databases: HashMap<Number, Arc<str>>,
    users: HashMap<Number, Arc<str>>,
    texts: HashSet<Arc<str>>,
}

impl Names {
    /// Names of database and role: from the title where they are in it, else by their numbers, which other
    /// backends' titles explained (a parallel worker's title has no names).
    pub fn of(&mut self, said: &Said<'_>) -> (Arc<str>, Arc<str>) {
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
        if self.texts.len() < MAX_TEXTS {
            self.texts.insert(Arc::clone(&shared));
        }
        shared
    }
}

/// Keeps or looks up the name of a number.
fn explained(names: &mut HashMap<Number, Arc<str>>, number: Number, name: Arc<str>) -> Arc<str> {
    if name.is_empty() {
        return names.get(&number).cloned().unwrap_or(name);
    }
    if number.1 != 0 && names.len() < MAX_NAMES {
        names.insert(number, Arc::clone(&name));
    }
    name
}
