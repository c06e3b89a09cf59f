//! Names of databases and roles, and other short texts, each stored once.

use std::{collections::HashSet, sync::Arc};

use agent_ebpf::postgres::status;

use super::status::{BackendStatus, USER, half};
use crate::{query::Kind, recent::Recent};

/// The number of names of databases, and of roles, that one half of [`Recent`] keeps.
const MAX_NAMES: usize = 1 << 13;

/// The maximum number of distinct short texts that are shared (kinds of processes, application names,
/// clients).
const MAX_TEXTS: usize = 1 << 14;

/// Identifies a database or a role: the number of its server, and its OID there.
type Number = (u32, u32);

/// The names that were seen.
#[derive(Debug)]
pub struct Names {
    databases: Recent<Number, Arc<str>>,
    users: Recent<Number, Arc<str>>,
    texts: HashSet<Arc<str>>,
}

impl Names {
    /// An empty store.
    pub fn new() -> Names {
        Names {
            databases: Recent::new(MAX_NAMES),
            users: Recent::new(MAX_NAMES),
            texts: HashSet::new(),
        }
    }

    /// The names of a process's database and role. They are taken from its title, or else looked up by OID
    /// among the names in other backends' titles (a parallel worker's title has no names).
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

    /// A shared copy of a text, because many samples contain the same text.
    pub fn shared(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return Arc::clone(known);
        }
        let shared: Arc<str> = Arc::from(text);
        if self.texts.len() >= MAX_TEXTS {
            // Copies that are in use stay valid. Later samples with the same text get a new copy.
            self.texts.clear();
        }
        self.texts.insert(Arc::clone(&shared));
        shared
    }
}

/// Stores the name of an OID, or looks it up if `name` is empty.
fn explained(names: &mut Recent<Number, Arc<str>>, number: Number, name: Arc<str>) -> Arc<str> {
    if name.is_empty() {
        return names.get(&number).unwrap_or(name);
    }
    if number.1 != 0 && names.get(&number).as_ref() != Some(&name) {
        names.insert(number, Arc::clone(&name));
    }
    name
}
