//! Queries the machine, without interpreting the answers.

use std::{
    fs,
    io::{self, BufRead as _, BufReader},
    path::PathBuf,
};

use super::bpf;
use crate::{
    kernel::{Kernel, LifecycleEvents, Options},
    process::in_initial_pid_namespace,
};

/// The answers of the machine. Errors are kept as text, because they are only printed.
#[derive(Clone, Debug)]
pub struct Facts {
    /// As `uname -r` prints it.
    pub kernel_release: String,
    /// Whether the kernel's type information can be read.
    pub btf: Result<(), String>,
    /// Effective capabilities of this process.
    pub capabilities: u64,
    /// Whether the sampling clock could be opened.
    pub cpu_clock: Result<(), String>,
    /// `kernel.perf_event_paranoid`.
    pub perf_event_paranoid: Option<i64>,
    /// Whether a ring buffer could be created.
    pub ring_buffer: Result<(), String>,
    /// Whether the kernel has `bpf_loop`; an error if that could not be determined.
    pub bpf_loop: Result<bool, String>,
    /// Whether the programs of this build could be loaded, and the number of instructions that
    /// the verifier processed, if known.
    pub programs: Result<Option<u32>, String>,
    /// Whether sends to PostgreSQL servers can be observed, and how.
    pub senders: Result<Senders, String>,
    /// Whether events of processes and mappings could be opened on every CPU.
    pub process_events: Result<(), String>,
    /// Whether `/proc/kallsyms` shows addresses.
    pub kallsyms: Result<bool, String>,
    /// `kernel.kptr_restrict`.
    pub kptr_restrict: Option<i64>,
    /// Where tracefs is mounted; `None` if it is not.
    pub tracefs: Option<PathBuf>,
    /// Soft limit on locked memory, bytes; `None` if there is no limit.
    pub memlock: Option<u64>,
    /// Whether this process is in the initial pid namespace and sees the pids of the whole
    /// machine; `None` if unknown.
    pub initial_pid_namespace: Option<bool>,
    /// The selected mode in `/sys/kernel/security/lockdown`; `None` if the file does not exist.
    pub lockdown: Option<String>,
}

/// How sends to PostgreSQL servers can be observed.
#[derive(Clone, Debug, Default)]
pub struct Senders {
    /// Where in the kernel they are observed.
    pub place: String,
    /// Missing members of kernel structs, without which a part of the attribution is unavailable.
    pub missing_fields: Vec<String>,
}

impl Facts {
    /// Queries everything.
    pub fn gather() -> Facts {
        let (programs, process_events, senders) = load();
        Facts {
            kernel_release: line("/proc/sys/kernel/osrelease").unwrap_or_default(),
            btf: told(fs::File::open("/sys/kernel/btf/vmlinux").map(drop)),
            capabilities: capabilities().unwrap_or(0),
            cpu_clock: told(bpf::cpu_clock()),
            perf_event_paranoid: number("/proc/sys/kernel/perf_event_paranoid"),
            ring_buffer: told(bpf::ring_buffer()),
            bpf_loop: told(bpf::has_bpf_loop()),
            programs,
            process_events,
            senders,
            kallsyms: told(kallsyms_shows_addresses()),
            kptr_restrict: number("/proc/sys/kernel/kptr_restrict"),
            tracefs: tracefs(),
            memlock: memlock(),
            initial_pid_namespace: in_initial_pid_namespace(),
            lockdown: lockdown(),
        }
    }
}

/// The values of [`Facts::programs`], [`Facts::process_events`] and [`Facts::senders`].
type Loaded = (
    Result<Option<u32>, String>,
    Result<(), String>,
    Result<Senders, String>,
);

/// Loads everything that recording loads, without starting the sampling clock.
fn load() -> Loaded {
    /// Determines only the size of the ring buffer, because the clock is not started.
    const PERIOD_NS: u64 = 1_000_000_000;
    let kernel = Kernel::load(&Options {
        period_ns: PERIOD_NS,
        filter: false,
        callers_per_second: 1,
        senders: None,
    });
    match kernel {
        Ok(mut kernel) => {
            let events = LifecycleEvents::open(kernel.cpus());
            let senders = told(kernel.follow_senders());
            (
                Ok(kernel.verified_instructions()),
                told(events.map(drop)),
                senders.map(|()| Senders {
                    place: kernel
                        .senders()
                        .map_or_else(String::new, |way| way.to_string()),
                    missing_fields: kernel.missing_fields().to_vec(),
                }),
            )
        }
        Err(error) => {
            let not_tried = "not tried, because the programs did not load";
            (
                Err(whole(&error)),
                Err(not_tried.to_owned()),
                Err(not_tried.to_owned()),
            )
        }
    }
}

fn told<T, E: std::error::Error>(result: Result<T, E>) -> Result<T, String> {
    result.map_err(|error| whole(&error))
}

/// An error and its causes on one line. Only the first line of each is used, because the log of
/// a verifier is long, and a cause that an error already states is not repeated.
fn whole(error: &dyn std::error::Error) -> String {
    let mut text = first_line(error);
    let mut cause = error.source();
    while let Some(error) = cause {
        let line = first_line(error);
        if !text.contains(&line) {
            text = format!("{text}: {line}");
        }
        cause = error.source();
    }
    text
}

fn first_line(error: &dyn std::error::Error) -> String {
    error.to_string().lines().next().unwrap_or("").to_owned()
}

fn line(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

fn number(path: &str) -> Option<i64> {
    line(path)?.parse().ok()
}

fn capabilities() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(mask.trim(), 16).ok()
}

/// Whether any of the first symbols has an address other than zero (per-CPU symbols start at zero).
fn kallsyms_shows_addresses() -> io::Result<bool> {
    const LOOKED_AT: usize = 1000;
    let lines = BufReader::new(fs::File::open("/proc/kallsyms")?).lines();
    for line in lines.take(LOOKED_AT) {
        let line = line?;
        let address = line.split(' ').next().unwrap_or("");
        if address.bytes().any(|digit| digit != b'0') {
            return Ok(true);
        }
    }
    Ok(false)
}

fn tracefs() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (place, kind) = (words.next()?, words.next()?);
        (kind == "tracefs").then(|| PathBuf::from(place))
    })
}

fn memlock() -> Option<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the struct is valid and is only written to.
    let asked = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) };
    (asked == 0 && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}

fn lockdown() -> Option<String> {
    let text = line("/sys/kernel/security/lockdown")?;
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}
