//! Interprets the answers of the machine. A pure function.

use super::{
    Finding, State,
    capability::{self, Capability},
    facts::Facts,
};

/// The first kernel with `bpf_loop`.
const NEEDED_KERNEL: (u32, u32) = (5, 17);
/// The first kernel that does not count BPF maps against the limit on locked memory.
const MEMLOCK_FREE_KERNEL: (u32, u32) = (5, 11);

/// The findings, with the most basic requirements of recording first.
pub fn judge(facts: &Facts) -> Vec<Finding> {
    let mut findings = vec![kernel(facts), btf(facts)];
    findings.extend(capability::ALL.map(|one| capability(facts, one)));
    findings.extend([
        cpu_clock(facts),
        ring_buffer(facts),
        bpf_loop(facts),
        programs(facts),
        process_events(facts),
        senders(facts),
        pid_namespace(facts),
        lockdown(facts),
        kallsyms(facts),
        memlock(facts),
        tracefs(facts),
    ]);
    findings
}

fn finding(name: &str, state: State, found: impl Into<String>, mend: Option<&str>) -> Finding {
    Finding {
        name: name.to_owned(),
        state,
        found: found.into(),
        mend: mend.map(str::to_owned),
    }
}

fn ok(name: &str, found: impl Into<String>) -> Finding {
    finding(name, State::Ok, found, None)
}

fn limited(name: &str, found: impl Into<String>, mend: &str) -> Finding {
    finding(name, State::Limited, found, Some(mend))
}

fn missing(name: &str, found: impl Into<String>, mend: &str) -> Finding {
    finding(name, State::Missing, found, Some(mend))
}

/// The first two numbers of a kernel release such as `6.1.0-56-cloud-amd64` or `6.12-rc3`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn kernel(facts: &Facts) -> Finding {
    let release = &facts.kernel_release;
    match version(release) {
        Some(version) if version >= NEEDED_KERNEL => ok("kernel", release.as_str()),
        Some(_) => missing(
            "kernel",
            format!("{release}; the programs need Linux 5.17"),
            "boot a newer kernel (Debian 12 has 6.1)",
        ),
        None => limited(
            "kernel",
            format!("the version {release:?} cannot be parsed"),
            "see the lines below, which test the kernel itself",
        ),
    }
}

fn btf(facts: &Facts) -> Finding {
    match &facts.btf {
        Ok(()) => ok("BTF", "/sys/kernel/btf/vmlinux"),
        Err(error) => missing(
            "BTF",
            format!("/sys/kernel/btf/vmlinux: {error}"),
            "use a kernel built with CONFIG_DEBUG_INFO_BTF=y (those of all distributions are); in a container, mount /sys",
        ),
    }
}

fn capability(facts: &Facts, one: Capability) -> Finding {
    if one.is_in(facts.capabilities) {
        return ok(one.name, one.purpose);
    }
    let mend = format!(
        "run as root, or with {} (in a container: --cap-add {})",
        one.name,
        one.name.trim_start_matches("CAP_")
    );
    let state = if one.required {
        State::Missing
    } else {
        State::Limited
    };
    finding(
        one.name,
        state,
        format!("needed to {}", purpose(one)),
        Some(&mend),
    )
}

/// The purpose of a capability, as the end of "needed to …".
fn purpose(one: Capability) -> String {
    match one.purpose.split(' ').next() {
        Some("names" | "files") => format!("have {}", one.purpose),
        _ => one.purpose.to_owned(),
    }
}

fn senders(facts: &Facts) -> Finding {
    const NAME: &str = "database callers";
    match &facts.senders {
        Ok(senders) if senders.missing_fields.is_empty() => {
            ok(NAME, format!("seen at the {}", senders.place))
        }
        Ok(senders) => limited(
            NAME,
            format!("this kernel has no {}", senders.missing_fields.join(", ")),
            "recording works; some callers of PostgreSQL servers will be unknown",
        ),
        Err(error) => limited(
            NAME,
            error.clone(),
            "recording works; the callers of PostgreSQL servers will be unknown (they need CONFIG_FTRACE_SYSCALLS=y)",
        ),
    }
}

fn cpu_clock(facts: &Facts) -> Finding {
    let paranoid = facts
        .perf_event_paranoid
        .map_or("unknown".to_owned(), |level| level.to_string());
    match &facts.cpu_clock {
        Ok(()) => ok(
            "perf_event",
            format!("cpu-clock opened (perf_event_paranoid = {paranoid})"),
        ),
        Err(error) => missing(
            "perf_event",
            format!("cpu-clock: {error} (perf_event_paranoid = {paranoid})"),
            "run as root or with CAP_PERFMON; in a container, allow perf_event_open in the seccomp profile",
        ),
    }
}

fn ring_buffer(facts: &Facts) -> Finding {
    match &facts.ring_buffer {
        Ok(()) => ok("ring buffer", "created"),
        Err(error) => missing(
            "ring buffer",
            format!("bpf(2): {error}"),
            "run as root or with CAP_BPF on Linux 5.8 or later; in a container, allow bpf in the seccomp profile",
        ),
    }
}

fn bpf_loop(facts: &Facts) -> Finding {
    match &facts.bpf_loop {
        Ok(true) => ok("bpf_loop", "the kernel has it"),
        Ok(false) => missing(
            "bpf_loop",
            "the kernel does not have it",
            "boot Linux 5.17 or later",
        ),
        Err(error) => missing(
            "bpf_loop",
            format!("unknown, because loading a program failed: {error}"),
            "run as root or with CAP_BPF and CAP_PERFMON",
        ),
    }
}

fn programs(facts: &Facts) -> Finding {
    match &facts.programs {
        Ok(Some(instructions)) => ok(
            "programs",
            format!("loaded, {instructions} instructions verified"),
        ),
        Ok(None) => ok("programs", "loaded"),
        Err(error) => missing(
            "programs",
            error.as_str(),
            "fix the lines above first; if they are all ok, please report this line with the kernel's version",
        ),
    }
}

fn process_events(facts: &Facts) -> Finding {
    match &facts.process_events {
        Ok(()) => ok("process events", "opened on every CPU"),
        Err(error) => missing(
            "process events",
            error.as_str(),
            "run as root or with CAP_PERFMON and CAP_IPC_LOCK, or raise kernel.perf_event_mlock_kb",
        ),
    }
}

fn pid_namespace(facts: &Facts) -> Finding {
    match facts.initial_pid_namespace {
        Some(true) => ok("pid namespace", "the host's"),
        Some(false) => missing(
            "pid namespace",
            "a container's: the host's other processes cannot be seen",
            "share the host's pid namespace (docker --pid=host, Kubernetes hostPID: true)",
        ),
        None => limited(
            "pid namespace",
            "/proc/self/ns/pid cannot be read",
            "mount /proc",
        ),
    }
}

fn lockdown(facts: &Facts) -> Finding {
    match facts.lockdown.as_deref() {
        None => ok("lockdown", "not in use"),
        Some("confidentiality") => missing(
            "lockdown",
            "confidentiality: BPF programs may not read memory",
            "boot with lockdown=integrity or without lockdown=",
        ),
        Some(mode) => ok("lockdown", mode),
    }
}

fn kallsyms(facts: &Facts) -> Finding {
    let restrict = facts
        .kptr_restrict
        .map_or("unknown".to_owned(), |level| level.to_string());
    match &facts.kallsyms {
        Ok(true) => ok("kernel symbols", "/proc/kallsyms shows addresses"),
        Ok(false) => limited(
            "kernel symbols",
            format!(
                "/proc/kallsyms hides addresses (kptr_restrict = {restrict}): kernel frames have no names"
            ),
            "run as root or with CAP_SYSLOG, and sysctl kernel.kptr_restrict=1 if it is 2",
        ),
        Err(error) => limited(
            "kernel symbols",
            format!("/proc/kallsyms: {error}: kernel frames have no names"),
            "use a kernel built with CONFIG_KALLSYMS=y",
        ),
    }
}

fn memlock(facts: &Facts) -> Finding {
    let counted = version(&facts.kernel_release).is_none_or(|v| v < MEMLOCK_FREE_KERNEL);
    match facts.memlock {
        Some(bytes) if counted => limited(
            "locked memory",
            format!("{bytes} bytes, and this kernel counts BPF maps against it"),
            "ulimit -l unlimited",
        ),
        Some(bytes) => ok(
            "locked memory",
            format!("{bytes} bytes; this kernel does not count BPF maps"),
        ),
        None => ok("locked memory", "unlimited"),
    }
}

fn tracefs(facts: &Facts) -> Finding {
    match &facts.tracefs {
        Some(place) => ok("tracefs", place.display().to_string()),
        None => ok("tracefs", "not mounted; recording does not need it"),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::facts::Senders, *};

    fn good() -> Facts {
        Facts {
            kernel_release: "6.1.0-56-cloud-amd64".to_owned(),
            btf: Ok(()),
            capabilities: u64::MAX,
            cpu_clock: Ok(()),
            perf_event_paranoid: Some(2),
            ring_buffer: Ok(()),
            bpf_loop: Ok(true),
            programs: Ok(Some(1000)),
            process_events: Ok(()),
            senders: Ok(Senders {
                place: "tracepoints".to_owned(),
                ..Senders::default()
            }),
            kallsyms: Ok(true),
            kptr_restrict: Some(1),
            tracefs: None,
            memlock: Some(8 << 20),
            initial_pid_namespace: Some(true),
            lockdown: Some("none".to_owned()),
        }
    }

    fn state(facts: &Facts, name: &str) -> State {
        let findings = judge(facts);
        let line = findings.iter().find(|line| line.name == name).unwrap();
        assert_eq!(line.mend.is_some(), line.state != State::Ok, "{line:?}");
        line.state
    }

    /// On a machine that has everything, all findings are ok.
    #[test]
    fn everything_is_there() {
        for line in judge(&good()) {
            assert_eq!(line.state, State::Ok, "{line:?}");
        }
    }

    /// Releases of distributions and release candidates are understood, and compared as numbers.
    #[test]
    fn kernel_versions() {
        assert_eq!(version("6.12.117+deb12-cloud-amd64"), Some((6, 12)));
        assert_eq!(version("5.9-rc1"), Some((5, 9)));
        assert_eq!(version("strange"), None);
        let at = |release: &str| {
            let facts = Facts {
                kernel_release: release.to_owned(),
                ..good()
            };
            state(&facts, "kernel")
        };
        assert_eq!(at("5.17.0"), State::Ok);
        assert_eq!(at("5.9.0"), State::Missing);
        assert_eq!(at("5.16.20"), State::Missing);
        assert_eq!(at("10.0"), State::Ok);
    }

    /// CAP_SYS_ADMIN includes the capabilities that were split from it, and no others.
    #[test]
    fn sys_admin() {
        let facts = Facts {
            capabilities: 1 << capability::SYS_ADMIN,
            ..good()
        };
        assert_eq!(state(&facts, "CAP_BPF"), State::Ok);
        assert_eq!(state(&facts, "CAP_PERFMON"), State::Ok);
        assert_eq!(state(&facts, "CAP_CHECKPOINT_RESTORE"), State::Ok);
        assert_eq!(state(&facts, "CAP_SYS_PTRACE"), State::Limited);
        assert_eq!(state(&facts, "CAP_SYSLOG"), State::Limited);
    }

    /// Everything that recording cannot do without is reported as missing when it is, with a fix.
    #[test]
    fn what_recording_cannot_do_without() {
        let no = || Err("Operation not permitted".to_owned());
        let cases: [(&str, Facts); 9] = [
            (
                "BTF",
                Facts {
                    btf: no(),
                    ..good()
                },
            ),
            (
                "perf_event",
                Facts {
                    cpu_clock: no(),
                    ..good()
                },
            ),
            (
                "ring buffer",
                Facts {
                    ring_buffer: no(),
                    ..good()
                },
            ),
            (
                "bpf_loop",
                Facts {
                    bpf_loop: Ok(false),
                    ..good()
                },
            ),
            (
                "programs",
                Facts {
                    programs: Err(String::new()),
                    ..good()
                },
            ),
            (
                "process events",
                Facts {
                    process_events: no(),
                    senders: Err("no".to_owned()),
                    ..good()
                },
            ),
            (
                "pid namespace",
                Facts {
                    initial_pid_namespace: Some(false),
                    ..good()
                },
            ),
            (
                "lockdown",
                Facts {
                    lockdown: Some("confidentiality".to_owned()),
                    ..good()
                },
            ),
            (
                "CAP_BPF",
                Facts {
                    capabilities: 0,
                    ..good()
                },
            ),
        ];
        for (name, facts) in cases {
            assert_eq!(state(&facts, name), State::Missing, "{name}");
            assert!(!super::super::Diagnosis::of(judge(&facts)).can_record);
        }
    }

    /// What only reduces the information in a recording does not prevent recording.
    #[test]
    fn what_recording_can_do_without() {
        let facts = Facts {
            kallsyms: Ok(false),
            ..good()
        };
        assert_eq!(state(&facts, "kernel symbols"), State::Limited);
        assert!(super::super::Diagnosis::of(judge(&facts)).can_record);
    }

    /// The limit on locked memory matters only for old kernels.
    #[test]
    fn locked_memory() {
        assert_eq!(state(&good(), "locked memory"), State::Ok);
        let facts = Facts {
            kernel_release: "5.10.0-30-amd64".to_owned(),
            ..good()
        };
        assert_eq!(state(&facts, "locked memory"), State::Limited);
    }
}
