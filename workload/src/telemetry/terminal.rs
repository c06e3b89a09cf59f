//! Log lines for people, on standard error: as tracing writes them, and the trace at the end.

use std::fmt;

use opentelemetry::Context;
use opentelemetry::trace::TraceContextExt;
use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::{Format, FormatEvent, FormatFields, Full, Writer};
use tracing_subscriber::fmt::{FmtContext, format};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

/// What lines begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lines {
    /// The time.
    Timed,
    /// The name of the service, if it is one: they stand among a parent's, which tell the time.
    Untimed,
}

/// As wide as the longest name of a service, and a blank.
const NAME_WIDTH: usize = 18;

/// The crates under an exporter. What they say about an export would be exported, and so on.
const TRANSPORT: [&str; 7] = [
    "h2",
    "hyper",
    "hyper_util",
    "opentelemetry",
    "rustls",
    "tonic",
    "tower",
];

/// What is told: `RUST_LOG`, else `default`.
pub(super) fn filter(default: &str) -> EnvFilter {
    EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default))
}

/// The same without what the exporters' own crates say.
pub(super) fn filter_for_export(default: &str) -> EnvFilter {
    TRANSPORT.iter().fold(filter(default), |filter, target| {
        let directive = format!("{target}=off");
        filter.add_directive(directive.parse().expect("`target=off` is a directive"))
    })
}

/// The layer that writes the lines, those of `service` if it is one.
pub(super) fn layer<S>(lines: Lines, service: Option<&'static str>, default: &str) -> impl Layer<S>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let format = format().with_target(false).with_ansi(ansi);
    tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(ansi)
        .map_event_format(move |_| WithTrace {
            lines,
            service,
            format,
        })
        .with_filter(filter(default))
}

/// Lines alone: for commands that are no service.
pub fn start(lines: Lines, default: &str) {
    // An error means that there is a subscriber already, which then goes on.
    let _ = tracing_subscriber::registry()
        .with(layer(lines, None, default))
        .try_init();
}

/// A line as tracing formats it, and the id of the trace that it belongs to.
struct WithTrace {
    lines: Lines,
    service: Option<&'static str>,
    format: Format<Full>,
}

impl<S, N> FormatEvent<S, N> for WithTrace
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut line = String::new();
        let into = Writer::new(&mut line);
        match self.lines {
            Lines::Timed => self.format.format_event(context, into, event)?,
            Lines::Untimed => {
                let format = self.format.clone().without_time();
                format.format_event(context, into, event)?;
            }
        }
        if let (Lines::Untimed, Some(service)) = (self.lines, self.service) {
            write!(writer, "{service:<NAME_WIDTH$}")?;
        }
        write!(writer, "{}", line.trim_end_matches('\n'))?;
        let current = Context::current();
        let span = current.span();
        if span.span_context().is_valid() {
            write!(writer, " trace_id={}", span.span_context().trace_id())?;
        }
        writeln!(writer)
    }
}
