//! The command line: parsed by clap, then checked and converted.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};

use flamestorm::{
    diff::SortBy,
    kernel::Senders,
    naming,
    profile::ResolvedProfile,
    report::{self, Filter, View},
    session,
};

/// Complete CPU stacks of everything on this machine, without frame pointers.
#[derive(Debug, Parser)]
#[command(name = "flamestorm", version, arg_required_else_help = true)]
pub struct Cli {
    /// The subcommand.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Record CPU stacks and write flame graphs and profiles
    #[command(after_help = RECORD_EXAMPLES)]
    Record(Record),
    /// Print the summary of a recording again, and draw its pictures
    Report(Report),
    /// Print the CPU time of PostgreSQL by query and caller
    Queries(Queries),
    /// Show what grew and what shrank between two recordings
    #[command(after_help = DIFF_EXAMPLES)]
    Diff(Diff),
    /// Check what this machine offers for recording, and how to fix what is missing
    Doctor(Doctor),
    /// Look up symbols for a recording, over a socket on standard input: the agent starts this itself
    #[command(name = naming::NAMER_ARGUMENT, hide = true)]
    NameFunctions,
}

const RECORD_EXAMPLES: &str = "\
Examples:
  flamestorm record                              the whole machine until Ctrl-C
  flamestorm record --duration 30s --comm postgres
  flamestorm record --output build.svg -- make   a command, from its first instruction
  flamestorm record --duration 5s --output - | head

Functions are named after the recording has ended. Ctrl-C ends that early and writes what there is. Until it is done,
the recording without names is at the path of the .pb.gz.

Needs root, or the capabilities that `flamestorm doctor` names.";

const DIFF_EXAMPLES: &str = "\
Examples:
  flamestorm diff before.pb.gz after.pb.gz --output difference.svg
  flamestorm diff before.pb.gz after.pb.gz --filter service=checkout --view app --sort total

Two .pb.gz files are normalised by their durations: the unit is CPU seconds per second. Two .folded files, which
record no duration, are normalised by their totals.";

/// `flamestorm record`
#[derive(Debug, Args)]
pub struct Record {
    /// Record only this process and its future children (may be repeated)
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(u32).range(1..))]
    pub pid: Vec<u32>,
    /// Record only processes or threads with this name (may be repeated)
    #[arg(long, value_name = "NAME")]
    pub comm: Vec<String>,
    /// Samples per second and CPU
    #[arg(long, short = 'F', value_name = "HZ", default_value_t = 99,
          value_parser = clap::value_parser!(u32).range(1..=MAX_FREQUENCY))]
    pub frequency: u32,
    /// How long to record, for example 10s or 2m; by default until Ctrl-C, or until COMMAND ends
    #[arg(long, short, value_name = "TIME", value_parser = duration)]
    pub duration: Option<Duration>,
    /// File to write; its extension (.svg, .folded, .pb.gz) selects the format, and - means folded
    /// stacks on standard output (may be repeated) [default: flamestorm.svg and flamestorm.pb.gz]
    #[arg(long, short, value_name = "FILE")]
    pub output: Vec<PathBuf>,
    /// Format of the summary. When standard output carries JSON, or stacks (--output -), the
    /// standard output of COMMAND is redirected to standard error
    #[arg(long, value_name = "FORM", default_value = "text")]
    pub summary: SummaryForm,
    /// How stacks are shown.
    #[command(flatten)]
    pub show: Show,
    /// Whether the texts of queries are kept without their literals, or in full
    #[arg(long, value_name = "TEXT", default_value = "normalized")]
    pub query_text: QueryText,
    /// Number of stacks that each CPU may take per second where programs send to PostgreSQL.
    /// When there are more sends, a random choice of them is taken, and the other callers are
    /// unknown. 0: callers are not looked for, and recording does not slow down sends
    #[arg(long, value_name = "NUMBER", default_value_t = session::CALLER_STACKS_PER_SECOND,
          value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub caller_stacks: u32,
    /// Where in the kernel sends to PostgreSQL are observed, instead of the cheapest place available: for tests
    #[arg(long, value_name = "PLACE", hide = true)]
    pub callers_at: Option<CallersAt>,
    /// Command to start and record
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// Where sends are observed, see [`Senders`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CallersAt {
    /// Tracepoints of sockets.
    Tracepoints,
    /// Kprobes at functions of the kernel.
    Functions,
    /// The entry of every system call.
    SystemCalls,
}

/// Maximum number of samples per second and CPU. At higher rates the recording mostly measures its own sampling.
const MAX_FREQUENCY: i64 = 10_000;

/// The formats of a summary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SummaryForm {
    /// A table as text.
    Text,
    /// One JSON object on standard output, everything else on standard error.
    Json,
}

/// Which part of the stacks is shown, and how. A .pb.gz always keeps all of it.
#[derive(Clone, Copy, Debug, Args)]
pub struct Show {
    /// Which part of PostgreSQL's work is shown: its callers' stacks down to the query, its own
    /// stacks from the query on, or both joined
    #[arg(long, value_name = "VIEW", default_value = "stitched")]
    pub view: ViewName,
    /// Frames of asynchronous Rust: without the runtime's polling code, or all of them
    #[arg(long, value_name = "FRAMES", default_value = "folded")]
    pub frames: Frames,
}

impl Show {
    /// The part of a profile that pictures and tables show.
    pub fn of(self, profile: &ResolvedProfile) -> ResolvedProfile {
        let view = match self.view {
            ViewName::App => View::App,
            ViewName::Database => View::Database,
            ViewName::Stitched => View::Stitched,
        };
        let shown = view.of(profile);
        match self.frames {
            Frames::Folded => report::fold_frames(&shown),
            Frames::Raw => shown,
        }
    }
}

/// The views of a profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ViewName {
    /// Programs with the cost of their queries, without the frames inside the database.
    App,
    /// The database's processes, by query.
    Database,
    /// The caller's stack, then the query, then the database's stack.
    Stitched,
}

/// How frames of asynchronous Rust are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Frames {
    /// Without the runtime's polling code.
    Folded,
    /// Every frame.
    Raw,
}

/// `flamestorm queries`
#[derive(Debug, Args)]
pub struct Queries {
    /// A recording (.pb.gz)
    pub file: PathBuf,
    /// Only samples with this label, for example database=shop or query=products; `service=`
    /// and `trace=` work as well (may be repeated)
    #[arg(long, value_name = "KEY=VALUE")]
    pub filter: Vec<Filter>,
    /// Print a JSON array with one object per query
    #[arg(long)]
    pub json: bool,
}

/// How much of a query's text is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum QueryText {
    /// Without literals and comments, which may be private.
    Normalized,
    /// As the client sent it.
    Full,
}

/// `flamestorm report`
#[derive(Debug, Args)]
pub struct Report {
    /// A recording (.pb.gz)
    pub file: PathBuf,
    /// Only samples with this label, for example comm=postgres; `function=` and `module=` match
    /// stacks (may be repeated)
    #[arg(long, value_name = "KEY=VALUE")]
    pub filter: Vec<Filter>,
    /// File to write; its extension (.svg, .folded, .pb.gz) selects the format, and - means
    /// folded stacks on standard output (may be repeated)
    #[arg(long, short, value_name = "FILE")]
    pub output: Vec<PathBuf>,
    /// How stacks are shown.
    #[command(flatten)]
    pub show: Show,
    /// Format of the summary
    #[arg(long, value_name = "FORM", default_value = "text")]
    pub summary: SummaryForm,
}

/// `flamestorm diff`
#[derive(Debug, Args)]
pub struct Diff {
    /// The earlier recording (.pb.gz or .folded)
    pub before: PathBuf,
    /// The later recording, in the same format
    pub after: PathBuf,
    /// Only samples with this label, as for `report`; one of the recordings may have no such
    /// samples (may be repeated)
    #[arg(long, value_name = "KEY=VALUE")]
    pub filter: Vec<Filter>,
    /// File to write; its extension selects the format: .svg, or .folded (`stack before
    /// after`); - means folded stacks on standard output (may be repeated)
    #[arg(long, short, value_name = "FILE")]
    pub output: Vec<PathBuf>,
    /// How stacks are shown.
    #[command(flatten)]
    pub show: Show,
    /// Sort the table by the change in the function itself, or including everything it calls
    #[arg(long, value_name = "FIGURE", default_value = "self")]
    pub sort: Sort,
    /// Print one JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

/// What a table of changes is sorted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Sort {
    /// The change in the function itself.
    #[value(name = "self")]
    Own,
    /// The change including everything that the function calls.
    Total,
}

impl From<Sort> for SortBy {
    fn from(sort: Sort) -> SortBy {
        match sort {
            Sort::Own => SortBy::Own,
            Sort::Total => SortBy::Total,
        }
    }
}

/// `flamestorm doctor`
#[derive(Debug, Args)]
pub struct Doctor {
    /// Print one JSON object instead of lines
    #[arg(long)]
    pub json: bool,
}

fn duration(text: &str) -> Result<Duration, String> {
    // A bare number is a number of seconds.
    if let Ok(seconds) = text.parse::<f64>()
        && let Ok(duration) = Duration::try_from_secs_f64(seconds)
        && !duration.is_zero()
    {
        return Ok(duration);
    }
    match humantime::parse_duration(text) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        Ok(_) => Err("must be longer than zero".to_owned()),
        Err(error) => Err(format!("{error} (for example 10s, 2m, 500ms)")),
    }
}

impl Record {
    /// Checks the arguments and makes the session's configuration from them. `started` is when
    /// the agent was started, nanoseconds of `CLOCK_MONOTONIC`.
    ///
    /// # Errors
    /// The targets exclude each other, there are too many names, or a name is empty.
    pub fn config(&self, started: u64) -> Result<session::Config, String> {
        let targets = !self.pid.is_empty() || !self.comm.is_empty();
        if targets && !self.command.is_empty() {
            return Err("give --pid and --comm, or a COMMAND, not both".to_owned());
        }
        if self.comm.len() > session::MAX_NAMES {
            return Err(format!("at most {} names can be given", session::MAX_NAMES));
        }
        let names = self.comm.iter().map(|name| comm(name));
        Ok(session::Config {
            process_group: None,
            pids: self.pid.clone(),
            names: names.collect::<Result<_, _>>()?,
            frequency: self.frequency,
            duration: self.duration,
            command: self.command.clone(),
            callers_per_second: self.caller_stacks,
            senders: self.callers_at.map(|place| match place {
                CallersAt::Tracepoints => Senders::Tracepoints,
                CallersAt::Functions => Senders::Functions,
                CallersAt::SystemCalls => Senders::SystemCalls,
            }),
            full_query_text: self.query_text == QueryText::Full,
            started,
        })
    }

    /// The files to write: those given, or else the defaults.
    pub fn outputs(&self) -> Vec<PathBuf> {
        if self.output.is_empty() {
            return vec!["flamestorm.svg".into(), "flamestorm.pb.gz".into()];
        }
        self.output.clone()
    }
}

/// A name as the kernel stores it: truncated to 15 bytes, as `ps` and `pgrep` show it.
fn comm(name: &str) -> Result<String, String> {
    if name.is_empty() {
        return Err("--comm: the name is empty".to_owned());
    }
    let mut end = name.len().min(15);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    Ok(name[..end].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(["flamestorm"].iter().chain(words))
    }

    /// The definition is consistent, and the documented calls parse.
    #[test]
    fn documented_calls() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
        assert!(parse(&["record", "--pid", "1", "--pid", "2", "--duration", "10s"]).is_ok());
        assert!(parse(&["record", "--output", "-", "--", "ls", "-l"]).is_ok());
        assert!(parse(&["report", "a.pb.gz", "--filter", "comm=postgres"]).is_ok());
        assert!(parse(&["diff", "a.pb.gz", "b.pb.gz", "--sort", "total"]).is_ok());
        assert!(parse(&["doctor", "--json"]).is_ok());
    }

    /// Invalid arguments are rejected.
    #[test]
    fn refused() {
        for words in [
            &["record", "--pid", "0"][..],
            &["record", "--pid", "x"],
            &["record", "--frequency", "0"],
            &["record", "--frequency", "1000000"],
            &["record", "--duration", "0"],
            &["record", "--duration", "-1s"],
            &["record", "ls"],
            &["diff", "a.pb.gz"],
            &["report"],
            &["report", "a.pb.gz", "--filter", "comm"],
        ] {
            assert!(parse(words).is_err(), "{words:?}");
        }
    }

    /// Times are numbers of seconds, or have units.
    #[test]
    fn durations() {
        assert_eq!(duration("10"), Ok(Duration::from_secs(10)));
        assert_eq!(duration("0.5"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert!(duration("1e300").is_err());
    }

    /// Names are truncated as the kernel truncates them.
    #[test]
    fn names() {
        assert_eq!(comm("postgres").unwrap(), "postgres");
        assert_eq!(comm("a-very-long-process-name").unwrap(), "a-very-long-pro");
        assert!(comm("").is_err());
    }
}
