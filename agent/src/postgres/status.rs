//! Decodes the record that the kernel program sends with a backend's sample, see [`agent_ebpf::postgres`].

use std::borrow::Cow;

use agent_ebpf::{
    postgres::{
        BackendHeader, CallerSearch, HAS_CONNECTION, HAS_LEADER, HAS_STATUS, TEXT_OF_DEBUG, status,
    },
    sample::TraceContext,
};

use super::workers::PARALLEL_WORKER;
use crate::{
    profile::Phase,
    query::{self, Client, Kind, Title},
};

/// Offset of `Oid st_userid` in the status.
pub const USER: usize = status::DATABASE + 4;

/// What a process of a server reported at a sample.
pub struct BackendStatus<'a> {
    /// The record, as the kernel program wrote it.
    pub header: &'a BackendHeader,
    /// Whether the record contains the status; false if it could not be read.
    pub has_status: bool,
    /// The parsed title of the process.
    pub title: Title,
    /// As in `pg_stat_activity.state`; empty if it is not known.
    pub state: &'static str,
    /// The text of its statement; empty if there is none.
    pub text: &'a [u8],
    /// The trace context in `application_name`.
    in_name: Option<query::Traceparent>,
}

impl<'a> BackendStatus<'a> {
    /// Decodes a record. `version` is the server's major version, if it is known.
    pub fn new(
        header: &'a BackendHeader,
        text: &'a [u8],
        version: Option<u32>,
    ) -> BackendStatus<'a> {
        let has_status = header.flags & HAS_STATUS != 0;
        let application = until_nul(&header.application);
        BackendStatus {
            header,
            has_status,
            title: query::title(&header.title),
            state: match has_status {
                true => state(half(&header.status, status::STATE), version),
                false => "",
            },
            text: match has_status || header.flags & TEXT_OF_DEBUG != 0 {
                true => text,
                false => &[],
            },
            in_name: query::traceparent_in_name(application),
        }
    }

    /// The query id that the server computed; 0 if it computed none.
    pub fn query_id(&self) -> i64 {
        match self.has_status {
            true => word(&self.header.status, status::QUERY_ID).cast_signed(),
            false => 0,
        }
    }

    /// Whether the process was executing a statement.
    pub fn phase(&self, has_query: bool) -> Phase {
        match (has_query, self.state) {
            (false, _) => Phase::NoStatement,
            (_, "idle" | "idle in transaction" | "idle in transaction (aborted)") => Phase::Between,
            _ => Phase::Executing,
        }
    }

    fn has(&self, flags: u32) -> bool {
        self.header.flags & flags != 0
    }

    /// Whether the process runs statements for clients.
    pub fn runs_for_clients(&self) -> bool {
        let by_title = matches!(
            self.title.kind,
            Kind::Client { .. } | Kind::ParallelWorker { .. }
        );
        by_title || self.has(HAS_CONNECTION | HAS_LEADER)
    }

    /// The kind of the process, as in `pg_stat_activity.backend_type`.
    pub fn kind(&self) -> &str {
        match &self.title.kind {
            Kind::Client { .. } => "client backend",
            Kind::ParallelWorker { .. } => PARALLEL_WORKER,
            Kind::Unknown if self.has(HAS_LEADER) => PARALLEL_WORKER,
            Kind::Autovacuum { .. } => "autovacuum worker",
            Kind::Background { name } => name.as_str(),
            Kind::Postmaster => "postmaster",
            Kind::Unknown if self.has(HAS_CONNECTION) => "client backend",
            Kind::Unknown => "unknown",
        }
    }

    /// Whether the process helps another backend with its statement.
    pub fn is_parallel_worker(&self) -> bool {
        self.kind() == PARALLEL_WORKER
    }

    /// `application_name`; empty if it contains a trace context, because that differs with each request.
    pub fn application(&self) -> Cow<'a, str> {
        match self.in_name {
            Some(_) => Cow::Borrowed(""),
            None => String::from_utf8_lossy(until_nul(&self.header.application)),
        }
    }

    /// The trace that the statement belongs to: that of the thread that sent it, otherwise the one in its
    /// text, otherwise the one in `application_name`.
    pub fn trace(&self) -> TraceContext {
        if self.header.search == CallerSearch::Found as u32
            && self.header.send.trace != TraceContext::default()
        {
            return self.header.send.trace;
        }
        let said = query::traceparent(self.text).or(self.in_name);
        said.map_or_else(TraceContext::default, |said| TraceContext {
            trace: said.trace_id,
            span: said.span_id,
        })
    }

    /// The client's address from the title, otherwise from the socket; `local` for a Unix socket.
    pub fn client(&self) -> String {
        let connection = &self.header.connection;
        match &self.title.kind {
            Kind::Client {
                client: Client::Local,
                ..
            } => "local".to_owned(),
            Kind::Client {
                client: Client::Tcp { host, .. },
                ..
            } => host.clone(),
            _ if !self.has(HAS_CONNECTION) => String::new(),
            _ if connection.client_port == 0 => "local".to_owned(),
            _ => address(connection.client).to_canonical().to_string(),
        }
    }

    /// Whether the client has another address than the server: it is on another host, or in another
    /// container.
    pub fn is_remote(&self, client: &str) -> bool {
        let connection = &self.header.connection;
        client != "local"
            && connection.client_port != 0
            && connection.network_namespace == 0
            && connection.client != connection.server
    }
}

fn address(words: [u64; 2]) -> std::net::IpAddr {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&words[0].to_le_bytes());
    bytes[8..].copy_from_slice(&words[1].to_le_bytes());
    std::net::IpAddr::from(bytes)
}

/// The name of a `BackendState` (src/include/utils/backend_status.h). Version 18 inserted `starting` as
/// number 1.
fn state(number: u32, version: Option<u32>) -> &'static str {
    let before_18 = version.is_none_or(|version| version < 18);
    match if before_18 && number > 0 {
        number + 1
    } else {
        number
    } {
        1 => "starting",
        2 => "idle",
        3 => "active",
        4 => "idle in transaction",
        5 => "fastpath function call",
        6 => "idle in transaction (aborted)",
        7 => "disabled",
        _ => "",
    }
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// Reads eight bytes of the status as a number.
pub fn word(status: &[u8], at: usize) -> u64 {
    let bytes = status[at..at + 8].try_into();
    u64::from_le_bytes(bytes.expect("eight bytes"))
}

/// Reads four bytes of the status as a number.
pub fn half(status: &[u8], at: usize) -> u32 {
    let bytes = status[at..at + 4].try_into();
    u32::from_le_bytes(bytes.expect("four bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same state has different numbers before and since version 18.
    #[test]
    fn states() {
        assert_eq!(state(2, Some(17)), "active");
        assert_eq!(state(3, Some(18)), "active");
        assert_eq!(state(1, None), "idle");
        assert_eq!(state(6, Some(14)), "disabled");
        assert_eq!(state(0, Some(14)), "");
        assert_eq!(state(99, Some(18)), "");
    }

    /// An IPv4 address that is mapped into IPv6 is shown as IPv4.
    #[test]
    fn addresses() {
        let mapped = 0xffff_0000 | u64::from(u32::from_le_bytes([10, 1, 2, 3])) << 32;
        assert_eq!(address([0, mapped]).to_canonical().to_string(), "10.1.2.3");
        assert_eq!(address([0, 1 << 56]).to_string(), "::1");
    }
}
