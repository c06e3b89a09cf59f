//! Asks the machine. No opinions here.

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

/// Answers of the machine. Errors are kept as text: they are only told.
#[derive(Clone, Debug)]
pub struct Facts {
    /// As `uname -r` prints it.
    pub kernel_release: String,
    /// The kernel's type information can be read.
    pub btf: Result<(), String>,
    /// Effective capabilities of this process.
    pub capabilities: u64,
    /// The sampling clock was opened.
    pub cpu_clock: Result<(), String>,
    /// `kernel.perf_event_paranoid`.
    pub perf_event_paranoid: Option<i64>,
    /// A ring buffer was made.
    pub ring_buffer: Result<(), String>,
    /// The kernel has `bpf_loop`; an error when that cannot be told.
    pub bpf_loop: Result<bool, String>,
    /// The programs of this build were loaded; instructions that the verifier followed.
    pub programs: Result<Option<u32>, String>,
    /// Sends to PostgreSQL servers can be followed.
    pub senders: Result<Senders, String>,
    /// Events of processes and mappings were opened on every CPU.
    pub process_events: Result<(), String>,
    /// `/proc/kallsyms` shows addresses.
    pub kallsyms: Result<bool, String>,
    /// `kernel.kptr_restrict`.
    pub kptr_restrict: Option<i64>,
    /// Where tracefs is mounted.
    pub tracefs: Option<PathBuf>,
    /// Soft limit of locked memory, bytes; `None` is no limit.
    pub memlock: Option<u64>,
    /// This process sees the machine's own pids.
    pub initial_pid_namespace: Option<bool>,
    /// The chosen word of `/sys/kernel/security/lockdown`.
    pub lockdown: Option<String>,
}

/// How sends to PostgreSQL servers can be followed.
#[derive(Clone, Debug, Default)]
pub struct Senders {
    /// Where in the kernel they are seen.
    pub place: String,
    /// Members of kernel structs that are missing for all of it.
    pub missing_fields: Vec<String>,
}

impl Facts {
    /// Asks everything.
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

/// [`Facts::programs`], [`Facts::process_events`], [`Facts::senders`].
type Loaded = (
    Result<Option<u32>, String>,
    Result<(), String>,
    Result<Senders, String>,
);

/// Loads what recording loads, without starting its clock.
fn load() -> Loaded {
    /// Never used: the clock is not started.
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

/// An error and its causes on one line. Many say their cause themselves, and a verifier says much:
/// the first line of each, once.
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

/// Whether any of the first symbols has an address that is not zero (per-CPU symbols start at zero).
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
