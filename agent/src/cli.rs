//! The command line, in two steps: as parsed, then resolved and checked.

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
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Record CPU stacks and write flame graphs and profiles
    #[command(after_help = RECORD_EXAMPLES)]
    Record(Record),
    /// Print the table and draw the pictures of a recording again
    Report(Report),
    /// Print the CPU time of PostgreSQL by query, and who asked
    Queries(Queries),
    /// Tell what grew and what shrank between two recordings
    #[command(after_help = DIFF_EXAMPLES)]
    Diff(Diff),
    /// Tell what this machine offers, and how to mend what is missing
    Doctor(Doctor),
    /// Read symbols for a recording, on a socket at standard input: the agent starts this itself
    #[command(name = naming::NAMER_ARGUMENT, hide = true)]
    NameFunctions,
}

const RECORD_EXAMPLES: &str = "\
Examples:
  flamestorm record                              the whole machine until Ctrl-C
  flamestorm record --duration 30s --comm postgres
  flamestorm record --output build.svg -- make   a command, from its first instruction
  flamestorm record --duration 5s --output - | head

After the recording functions are named; Ctrl-C ends that early and writes what there is. Until it is done the
recording without names is where the .pb.gz will be.

Needs root, or the capabilities that `flamestorm doctor` names.";

const DIFF_EXAMPLES: &str = "\
Examples:
  flamestorm diff before.pb.gz after.pb.gz --output difference.svg
  flamestorm diff before.pb.gz after.pb.gz --filter service=checkout --view app --sort total

Two .pb.gz are normalised by their lengths: the unit is CPU seconds per second. Two .folded, which know no
length, are normalised by their sums.";

/// `flamestorm record`
#[derive(Debug, Args)]
pub struct Record {
    /// Only this process and the children it will have (may be repeated)
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(u32).range(1..))]
    pub pid: Vec<u32>,
    /// Only processes or threads of this name (may be repeated)
    #[arg(long, value_name = "NAME")]
    pub comm: Vec<String>,
    /// Samples per second and CPU
    #[arg(long, short = 'F', value_name = "HZ", default_value_t = 99,
          value_parser = clap::value_parser!(u32).range(1..=MAX_FREQUENCY))]
    pub frequency: u32,
    /// How long, for example 10s or 2m; without it until Ctrl-C, or until COMMAND ends
    #[arg(long, short, value_name = "TIME", value_parser = duration)]
    pub duration: Option<Duration>,
    /// File to write, by extension: .svg, .folded, .pb.gz; - is folded stacks on standard output
    /// (may be repeated) [default: flamestorm.svg and flamestorm.pb.gz]
    #[arg(long, short, value_name = "FILE")]
    pub output: Vec<PathBuf>,
    /// How to tell what was found. Where standard output carries json, or stacks (--output -), what COMMAND writes to
    /// its standard output goes to standard error
    #[arg(long, value_name = "FORM", default_value = "text")]
    pub summary: SummaryForm,
    /// How stacks are shown.
    #[command(flatten)]
    pub show: Show,
    /// Texts of queries: without their literals, or as they are
    #[arg(long, value_name = "TEXT", default_value = "normalized")]
    pub query_text: QueryText,
    /// Stacks that each CPU may take in one second where programs send to PostgreSQL; beyond it chance
    /// chooses, and the other callers are not known. 0: callers are not looked for, and sends cost
    /// nothing more than without a recording
    #[arg(long, value_name = "NUMBER", default_value_t = session::CALLER_STACKS_PER_SECOND,
          value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub caller_stacks: u32,
    /// Where sends to PostgreSQL are seen, instead of the cheapest place that the kernel has: for tests
    #[arg(long, value_name = "PLACE", hide = true)]
    pub callers_at: Option<CallersAt>,
    /// Command to start and record
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// See [`Senders`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CallersAt {
    /// Tracepoints of sockets.
    Tracepoints,
    /// Functions of the kernel.
    Functions,
    /// Every system call.
    SystemCalls,
}

/// Most samples per second and CPU: beyond it the sampling itself is what is measured.
const MAX_FREQUENCY: i64 = 10_000;

/// The forms of a summary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SummaryForm {
    /// A table for people.
    Text,
    /// One JSON object on standard output, everything else on standard error.
    Json,
}

/// How stacks are shown; a .pb.gz always keeps everything.
#[derive(Clone, Copy, Debug, Args)]
pub struct Show {
    /// What of PostgreSQL's work is shown: its callers' stacks up to the query, its own from the query on,
    /// or both as one
    #[arg(long, value_name = "VIEW", default_value = "stitched")]
    pub view: ViewName,
    /// Frames of asynchronous Rust: without the runtime's plumbing, or as they are
    #[arg(long, value_name = "FRAMES", default_value = "folded")]
    pub frames: Frames,
}

impl Show {
    /// What pictures and tables show of a profile.
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
    /// Programs, and what their queries cost, without the inside of the database.
    App,
    /// The database's processes by query.
    Database,
    /// The caller's stack, then the query, then the database's.
    Stitched,
}

/// How frames of asynchronous Rust are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Frames {
    /// Only functions that somebody wrote to do something.
    Folded,
    /// Every frame.
    Raw,
}

/// `flamestorm queries`
#[derive(Debug, Args)]
pub struct Queries {
    /// A recording (.pb.gz)
    pub file: PathBuf,
    /// Only samples with this label, for example database=shop, query=products, service=, trace= (may be repeated)
    #[arg(long, value_name = "KEY=VALUE")]
    pub filter: Vec<Filter>,
    /// A JSON array with an object for each query
    #[arg(long)]
    pub json: bool,
}

/// What is kept of a query's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum QueryText {
    /// Without literals and comments: they may be private.
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
    /// File to write, by extension: .svg, .folded, .pb.gz; - is folded stacks on standard output
    /// (may be repeated)
    #[arg(long, short, value_name = "FILE")]
    pub output: Vec<PathBuf>,
    /// How stacks are shown.
    #[command(flatten)]
    pub show: Show,
    /// How to tell what was found
    #[arg(long, value_name = "FORM", default_value = "text")]
    pub summary: SummaryForm,
}

/// `flamestorm diff`
#[derive(Debug, Args)]
pub struct Diff {
    /// The recording before (.pb.gz or .folded)
    pub before: PathBuf,
    /// The recording after, of the same kind
    pub after: PathBuf,
    /// Only samples with this label, as for `report`; one of the recordings may have none of them (may be
    /// repeated)
    #[arg(long, value_name = "KEY=VALUE")]
    pub filter: Vec<Filter>,
    /// File to write, by extension: .svg, .folded (`stack before after`); - is folded stacks on standard
    /// output (may be repeated)
    #[arg(long, short, value_name = "FILE")]
    pub output: Vec<PathBuf>,
    /// How stacks are shown.
    #[command(flatten)]
    pub show: Show,
    /// What the table is sorted by: change in the function itself, or with all that it calls
    #[arg(long, value_name = "FIGURE", default_value = "self")]
    pub sort: Sort,
    /// One JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

/// What a table of changes is sorted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Sort {
    /// The function itself.
    #[value(name = "self")]
    Own,
    /// With all that it calls.
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
    /// One JSON object instead of lines
    #[arg(long)]
    pub json: bool,
}

fn duration(text: &str) -> Result<Duration, String> {
    // A bare number is seconds, as everywhere.
    if let Ok(seconds) = text.parse::<f64>()
        && let Ok(duration) = Duration::try_from_secs_f64(seconds)
        && !duration.is_zero()
    {
        return Ok(duration);
    }
    match humantime::parse_duration(text) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        Ok(_) => Err("must be longer than nothing".to_owned()),
        Err(error) => Err(format!("{error} (for example 10s, 2m, 500ms)")),
    }
}

impl Record {
    /// What to record.
    ///
    /// # Errors
    /// Targets that exclude each other, or a name that no process can have.
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

    /// The files to write.
    pub fn outputs(&self) -> Vec<PathBuf> {
        if self.output.is_empty() {
            return vec!["flamestorm.svg".into(), "flamestorm.pb.gz".into()];
        }
        self.output.clone()
    }
}

/// A name as the kernel keeps it: cut at 15 bytes, as `ps` and `pgrep` show it.
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

    /// Nonsense is refused by name.
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

    /// Names are cut as the kernel cuts them.
    #[test]
    fn names() {
        assert_eq!(comm("postgres").unwrap(), "postgres");
        assert_eq!(comm("a-very-long-process-name").unwrap(), "a-very-long-pro");
        assert!(comm("").is_err());
    }
}
