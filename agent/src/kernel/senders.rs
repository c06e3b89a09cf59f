//! Where sends to PostgreSQL servers are observed: always in the sender's thread, and before
//! the server can receive them. The rest differs from kernel to kernel.

use std::fmt;

use aya::{
    Ebpf,
    programs::{KProbe, ProgramError, RawTracePoint},
};

use super::{Error, program_mut, refused};

/// The ways to observe sends, the cheapest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Senders {
    /// At two tracepoints of sockets, since Linux 6.16.
    Tracepoints,
    /// At the entry of two functions of the kernel, if it has kprobes.
    Functions,
    /// At the entry of every system call of the machine.
    SystemCalls,
}

/// The programs of a way, and the hook that each is attached to.
type Hooks = [(&'static str, &'static str)];

const TRACEPOINTS: &Hooks = &[
    ("flamestorm_tcp", "tcp_sendmsg_locked"),
    ("flamestorm_unix", "sk_data_ready"),
];
const FUNCTIONS: &Hooks = &[
    ("flamestorm_tcp_call", "tcp_sendmsg"),
    ("flamestorm_unix_call", "unix_stream_sendmsg"),
];
const SYSTEM_CALLS: &Hooks = &[("flamestorm_send", "sys_enter")];

impl Senders {
    const ALL: [Senders; 3] = [
        Senders::Tracepoints,
        Senders::Functions,
        Senders::SystemCalls,
    ];

    fn hooks(self) -> &'static Hooks {
        match self {
            Senders::Tracepoints => TRACEPOINTS,
            Senders::Functions => FUNCTIONS,
            Senders::SystemCalls => SYSTEM_CALLS,
        }
    }

    /// Attaches the first way that this kernel supports, or the one that is wanted.
    ///
    /// # Errors
    /// None could be attached; the error is that of the last one tried.
    pub(super) fn follow(ebpf: &mut Ebpf, wanted: Option<Senders>) -> Result<Senders, Error> {
        let mut last = None;
        for way in Senders::ALL {
            if wanted.is_some_and(|wanted| wanted != way) {
                continue;
            }
            match way.attach(ebpf) {
                Ok(()) => return Ok(way),
                Err(error) => {
                    log::debug!("cannot observe sends at {way}: {error}");
                    last = Some(error);
                }
            }
        }
        Err(last.expect("at least one way is tried"))
    }

    /// Attaches all programs of a way, or none.
    fn attach(self, ebpf: &mut Ebpf) -> Result<(), Error> {
        let (attach, detach): (Attach, Detach) = match self {
            Senders::Functions => (at_function, from_function),
            Senders::Tracepoints | Senders::SystemCalls => (at_tracepoint, from_tracepoint),
        };
        let hooks = self.hooks();
        let attached = hooks.iter().try_for_each(|&(program, hook)| {
            attach(ebpf, program, hook).map_err(|source| refused(program, source))
        });
        if attached.is_err() {
            for (program, _) in hooks {
                // This fails for a program that was not loaded, which needs no detaching.
                let _ = detach(ebpf, program);
            }
        }
        attached
    }
}

impl fmt::Display for Senders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hooks: Vec<_> = self.hooks().iter().map(|(_, hook)| *hook).collect();
        let kind = match self {
            Senders::Functions => "functions",
            Senders::Tracepoints => "tracepoints",
            Senders::SystemCalls => "tracepoint",
        };
        write!(f, "{kind} {}", hooks.join(", "))
    }
}

type Attach = fn(&mut Ebpf, &'static str, &str) -> Result<(), ProgramError>;
type Detach = fn(&mut Ebpf, &'static str) -> Result<(), ProgramError>;

fn at_tracepoint(ebpf: &mut Ebpf, program: &'static str, hook: &str) -> Result<(), ProgramError> {
    let program: &mut RawTracePoint = program_mut(ebpf, program).try_into()?;
    program.load()?;
    program.attach(hook)?;
    Ok(())
}

fn at_function(ebpf: &mut Ebpf, program: &'static str, hook: &str) -> Result<(), ProgramError> {
    let program: &mut KProbe = program_mut(ebpf, program).try_into()?;
    program.load()?;
    program.attach(hook, 0)?;
    Ok(())
}

fn from_tracepoint(ebpf: &mut Ebpf, program: &'static str) -> Result<(), ProgramError> {
    let program: &mut RawTracePoint = program_mut(ebpf, program).try_into()?;
    program.unload()
}

fn from_function(ebpf: &mut Ebpf, program: &'static str) -> Result<(), ProgramError> {
    let program: &mut KProbe = program_mut(ebpf, program).try_into()?;
    program.unload()
}
