//! Exported symbols that identify a PostgreSQL server, or a program that publishes trace contexts.

use super::exported;

/// Symbols that identify a server, in the order of [`agent_ebpf::postgres::ServerVariables`].
const SERVER_SYMBOLS: [&str; 5] = [
    "MyBEEntry",
    "MyProcPort",
    "my_wait_event_info",
    "debug_query_string",
    "MyBgworkerEntry",
];

/// The thread-local variable that OTEP 4947 defines.
const TRACE_SYMBOL: &str = "otel_thread_ctx_v1";

/// The exported symbols of an object that the agent uses.
#[derive(Clone, Copy, Debug, Default)]
pub struct Exports {
    /// Addresses (svma) of a PostgreSQL server's variables, in the order of [`agent_ebpf::postgres::ServerVariables`].
    pub server: Option<[Option<u64>; 5]>,
    /// See [`agent_ebpf::table::Space::trace_offset`]; 0 if there is none.
    pub trace_offset: i32,
}

impl Exports {
    /// Reads the symbols from the bytes of an ELF file.
    pub fn read(image: &[u8]) -> Exports {
        let [trace] = exported(image, [TRACE_SYMBOL]);
        let symbols = exported(image, SERVER_SYMBOLS);
        Exports {
            // Unsupported versions of PostgreSQL do not export both of these.
            server: (symbols[0].is_some() && symbols[1].is_some()).then_some(symbols),
            trace_offset: trace
                .and_then(|offset| i32::try_from(offset.cast_signed()).ok())
                .filter(|offset| *offset < 0)
                .unwrap_or(0),
        }
    }
}
