//! The agent's side of naming: one child process at a time, which is asked for one module after the other
//! and killed when it fails.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, StatxFlags, statx};
use rustix::io::Errno;

use super::Spawner;
use super::child::stored_bytes;
use super::wire::{self, Answer, Kind, Request};
use crate::profile::{Module, Source};
use crate::symbolize::{Named, Options, bytes_of, memory_file};

/// Time for any module: a hundred times what a small one takes, so that none fails merely because the
/// machine is busy.
const BASE: Duration = Duration::from_secs(10);

/// Time for a module once the failed modules of its account have taken [`PATIENCE`], or those of all
/// accounts [`PATIENCE_WITH_ALL`].
const SHORT_BASE: Duration = Duration::from_secs(2);

/// Total time that the failed modules of one account may take before its other modules are given less time.
const PATIENCE: Duration = Duration::from_secs(20);

/// Total time that the failed modules of all accounts may take before all others are given less time.
const PATIENCE_WITH_ALL: Duration = Duration::from_secs(120);

/// Total time that the failed modules of one account may take before its other modules are left unnamed.
const MAX_WASTED: Duration = Duration::from_secs(60);

/// Bytes of a file for which a module is given another second. An idle CPU reads symbols and debug
/// information at ten times that speed.
const BYTES_A_SECOND: u64 = 16 << 20;

/// Maximum time for one module. The debug information of a browser takes about a minute on a slow machine.
const MAX_MODULE: Duration = Duration::from_secs(120);

/// Maximum time for all modules. After that the recording is written with the names found so far.
const MAX_NAMING: Duration = Duration::from_secs(600);

/// How long the agent waits for a killed child to end. Only a child that is blocked in the kernel (on a
/// dead network file system) takes longer.
const KILL_WAIT: Duration = Duration::from_secs(1);

/// Maximum number of children that are left blocked in the kernel. Each keeps its memory.
const MAX_ABANDONED: usize = 16;

/// Maximum number of children that the files of one account may leave blocked in the kernel.
const MAX_ABANDONED_OF_ACCOUNT: usize = 2;

/// Interval at which `go_on` is called.
const TICK: Duration = Duration::from_millis(100);

/// Why a module has no names.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("reading them took longer than {} s", .0.as_secs())]
    TimedOut(Duration),
    #[error("the process that read them {0}")]
    Ended(String),
    #[error("{0}")]
    Io(#[from] io::Error),
    /// `go_on` returned false.
    #[error("naming was ended early")]
    Interrupted,
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Failure {
        Failure::Io(errno.into())
    }
}

/// The account that a module's failure is charged to: the party that may have caused it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Account {
    /// The owner of a local file, by user id. A module that is not a file counts as root's (0).
    User(u32),
    /// The device of a file that is not local, whose server may report any owner.
    Device(u32, u32),
    /// The directory of debug files in another mount namespace, by device and inode: the container may have
    /// put any file there.
    DebugDir(u32, u32, u64),
}

impl Account {
    fn of(module: &Module) -> Account {
        // Only what the kernel knows without asking a server is read, so this cannot block.
        let facts = |file: &File| {
            let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
            statx(file, c"", flags, StatxFlags::UID | StatxFlags::INO).ok()
        };
        if let Some(found) = module.debug_dir.as_deref().and_then(facts) {
            return Account::DebugDir(found.stx_dev_major, found.stx_dev_minor, found.stx_ino);
        }
        let file = match &module.source {
            Source::File(file) => Some(file),
            Source::Jit { file, .. } => file.as_ref(),
            Source::Copy(copy) => return Account::Device(copy.device().0, copy.device().1),
            Source::Vdso(_) | Source::Kernel | Source::Unknown => None,
        };
        let found = file.and_then(|file| Some((file, facts(file)?)));
        match found {
            Some((file, found)) if file.is_local() => Account::User(found.stx_uid),
            Some((_, found)) => Account::Device(found.stx_dev_major, found.stx_dev_minor),
            None => Account::User(0),
        }
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Account::User(uid) => write!(f, "the user {uid}"),
            Account::Device(major, minor) => write!(f, "the device {major}:{minor}"),
            Account::DebugDir(major, minor, inode) => {
                write!(
                    f,
                    "the container with the debug files {major}:{minor}:{inode}"
                )
            }
        }
    }
}

/// The cost of an account's failed modules.
#[derive(Debug, Default)]
struct Charge {
    wasted: Duration,
    /// Children that were left blocked in the kernel.
    abandoned: usize,
    /// Modules that were left unnamed because the cost was too high.
    left_out: usize,
}

impl Charge {
    fn is_too_much(&self) -> bool {
        self.wasted >= MAX_WASTED || self.abandoned >= MAX_ABANDONED_OF_ACCOUNT
    }
}

struct NamerChild {
    process: Child,
    socket: UnixStream,
}

/// How a child ended.
enum Ended {
    ByItself(ExitStatus),
    Killed,
    /// It is blocked in the kernel.
    Never,
}

/// Names modules in a child process with limits, so that no file can hang or kill the agent.
pub struct Namer<'a> {
    spawner: &'a Spawner,
    options: Options<'a>,
    /// Called at least every 100 ms while the child works. If it returns false, naming ends.
    go_on: &'a mut dyn FnMut() -> bool,
    child: Option<NamerChild>,
    charges: HashMap<Account, Charge>,
    /// Total time that failed modules have taken.
    wasted: Duration,
    /// Children that were left blocked in the kernel.
    abandoned: usize,
    ends: Instant,
    /// The reason why no more modules are named.
    over: Option<String>,
    left_out: usize,
}

impl<'a> Namer<'a> {
    /// Makes a namer. Its child is started for the first module. The `function_starts` of the options are
    /// not used; the child has its own (see [`serve_names`](super::serve_names)). `go_on` is called at
    /// least ten times a second while the child works. When it returns false, the modules that have no
    /// names yet get none.
    pub fn new(
        spawner: &'a Spawner,
        options: Options<'a>,
        go_on: &'a mut dyn FnMut() -> bool,
    ) -> Namer<'a> {
        Namer {
            spawner,
            options,
            go_on,
            child: None,
            charges: HashMap::new(),
            wasted: Duration::ZERO,
            abandoned: 0,
            ends: Instant::now() + MAX_NAMING,
            over: None,
            left_out: 0,
        }
    }

    /// Notes for the reader about modules that were left unnamed.
    pub(super) fn notes(&self) -> impl Iterator<Item = String> {
        let charged = self
            .charges
            .iter()
            .filter(|(_, charge)| charge.left_out > 0);
        let charged = charged.map(|(account, charge)| {
            let reason = format!("reading symbols of files of {account} failed too often");
            (reason, charge.left_out)
        });
        let over = self.over.iter().cloned();
        let all = charged.chain(over.map(|reason| (reason, self.left_out)));
        all.map(|(reason, files)| {
            format!("{reason}: functions of {files} files are named by module and address only")
        })
    }

    pub(super) fn name(&mut self, module: &Module, addresses: &[u64]) -> Named {
        if matches!(module.source, Source::Unknown) {
            return Named::default();
        }
        if self.over.is_none() {
            if Instant::now() >= self.ends {
                let limit = MAX_NAMING.as_secs();
                self.over = Some(format!("naming took longer than {limit} s"));
            } else if !(self.go_on)() {
                self.over = Some("naming was ended early".to_owned());
            }
        }
        if self.over.is_some() {
            self.left_out += 1;
            return Named::default();
        }
        let account = Account::of(module);
        let charge = self.charges.entry(account).or_default();
        if charge.is_too_much() {
            charge.left_out += 1;
            return Named::default();
        }
        let is_patient = charge.wasted < PATIENCE && self.wasted < PATIENCE_WITH_ALL;
        let base = if is_patient { BASE } else { SHORT_BASE };
        let start = Instant::now();
        let mut named = Named::default();
        let Err(failure) = self.ask(module, addresses, base, &mut named) else {
            return named;
        };
        // The child's exit status tells more about the failure than the closed socket does.
        let ended = self.end_child();
        let is_abandoned = matches!(ended, Ended::Never);
        self.wasted += start.elapsed();
        self.abandoned += usize::from(is_abandoned);
        let charge = self.charges.entry(account).or_default();
        charge.wasted += start.elapsed();
        // Only after a timeout is this module's file the one that blocks the child. Otherwise the child may
        // be blocked on the file of an earlier module, which it closes when it exits.
        charge.abandoned += usize::from(is_abandoned && matches!(failure, Failure::TimedOut(_)));
        if matches!(failure, Failure::Interrupted) {
            self.over = Some("naming was ended early".to_owned());
            self.left_out += 1;
            return named;
        }
        let failure = match (failure, ended) {
            (Failure::TimedOut(limit), _) => Failure::TimedOut(limit),
            (_, Ended::ByItself(status)) => Failure::Ended(told(status)),
            (failure, _) => failure,
        };
        named.notes.push(format!("symbols not read: {failure}"));
        let hung = self.abandoned;
        if hung >= MAX_ABANDONED {
            self.over = Some(format!(
                "{hung} processes that read symbols are blocked in the kernel"
            ));
        }
        named
    }

    fn ask(
        &mut self,
        module: &Module,
        addresses: &[u64],
        base: Duration,
        named: &mut Named,
    ) -> Result<(), Failure> {
        self.start_child()?;
        let start = Instant::now();
        let mut limit = base;
        match &module.source {
            Source::File(file) => limit = longer(limit, stored_bytes(file)),
            Source::Copy(copy) => limit = longer(limit, copy.bytes().len() as u64),
            _ => {}
        }
        let go_on = &mut *self.go_on;
        let ends = self.ends;
        let Some(child) = &self.child else {
            return Err(Failure::Ended("is not there".to_owned()));
        };
        let mut wait = |socket: &UnixStream, flags: PollFlags, limit: Duration| {
            loop {
                if !go_on() {
                    return Err(Failure::Interrupted);
                }
                if start.elapsed() >= limit || Instant::now() >= ends {
                    return Err(Failure::TimedOut(limit));
                }
                let mut polled = [PollFd::new(socket, flags)];
                let tick = Timespec {
                    tv_sec: 0,
                    tv_nsec: i64::from(TICK.subsec_nanos()),
                };
                match poll(&mut polled, Some(&tick)) {
                    Ok(0) | Err(Errno::INTR) => {}
                    Ok(_) => return Ok(()),
                    Err(errno) => return Err(errno.into()),
                }
            }
        };
        let socket = &child.socket;
        send_request(&self.options, module, addresses, &mut |bytes, files| {
            wait(socket, PollFlags::OUT, limit)?;
            Ok(wire::send(socket, bytes, files))
        })?;
        loop {
            let body = receive_answer(socket, || wait(socket, PollFlags::IN, limit))?;
            let answer = serde_json::from_slice(&body).map_err(io::Error::from)?;
            match answer {
                Answer::Starts(starts) => named.starts = starts,
                Answer::Reading(bytes) => limit = longer(limit, bytes),
                Answer::Names(packed) => {
                    let names = packed.unpack();
                    named.by_address = names.ok_or_else(|| io::Error::other("a broken answer"))?;
                    named.notes = packed.notes;
                    return Ok(());
                }
            }
        }
    }

    fn start_child(&mut self) -> io::Result<()> {
        // If the child ended between two modules, no module is to blame.
        if let Some(child) = &mut self.child
            && child.process.try_wait()?.is_some()
        {
            self.child = None;
        }
        if self.child.is_some() {
            return Ok(());
        }
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        self.child = Some(NamerChild {
            process: self.spawner.namer(theirs.into())?,
            socket: ours,
        });
        Ok(())
    }

    /// Ends the child: waits a moment if it is exiting, else kills it, and abandons it if it is blocked in
    /// the kernel.
    fn end_child(&mut self) -> Ended {
        let Some(mut child) = self.child.take() else {
            return Ended::Killed;
        };
        // A child that has closed its socket is about to exit.
        let mut by_itself = None;
        for _ in 0..10 {
            by_itself = child.process.try_wait().ok().flatten();
            if by_itself.is_some() || !closed(&child.socket) {
                break;
            }
            thread::sleep(Duration::from_millis(10));
        }
        if let Some(status) = by_itself {
            return Ended::ByItself(status);
        }
        let _ = child.process.kill();
        let killed = Instant::now();
        while killed.elapsed() < KILL_WAIT {
            if let Ok(Some(_)) = child.process.try_wait() {
                return Ended::Killed;
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ended::Never
    }
}

impl Drop for Namer<'_> {
    fn drop(&mut self) {
        self.end_child();
    }
}

fn longer(limit: Duration, bytes: u64) -> Duration {
    (limit + Duration::from_secs(bytes / BYTES_A_SECOND)).min(MAX_MODULE)
}

fn closed(socket: &UnixStream) -> bool {
    let mut polled = [PollFd::new(socket, PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut polled, Some(&now)).is_ok()
        && polled[0]
            .revents()
            .intersects(PollFlags::HUP | PollFlags::ERR)
}

fn told(status: ExitStatus) -> String {
    match status.signal() {
        Some(libc::SIGXCPU) => "used up its CPU time".to_owned(),
        Some(libc::SIGABRT) => "ran out of memory".to_owned(),
        Some(signal) => format!("was ended by signal {signal}"),
        None => "gave up".to_owned(),
    }
}

type Sender<'a> = dyn FnMut(&[u8], &[std::os::fd::BorrowedFd<'_>]) -> Result<rustix::io::Result<usize>, Failure>
    + 'a;

fn send_request(
    options: &Options<'_>,
    module: &Module,
    addresses: &[u64],
    send: &mut Sender<'_>,
) -> Result<(), Failure> {
    let opened = match &module.source {
        Source::File(file) => Some(file),
        Source::Jit { file, .. } => file.as_ref(),
        _ => None,
    };
    let file_is_local = opened.is_none_or(|file| file.is_local());
    let opened = opened.map(|file| &***file);
    let file;
    let (kind, file) = match &module.source {
        Source::File(_) => (Kind::File, opened),
        Source::Copy(_) | Source::Vdso(_) => {
            file = memory_file(bytes_of(&module.source))?;
            (Kind::File, Some(&file))
        }
        Source::Jit { pid, perf_map, .. } => {
            let kind = Kind::Jit {
                pid: *pid,
                perf_map: perf_map.clone(),
            };
            (kind, opened)
        }
        Source::Kernel | Source::Unknown => (Kind::Kernel, None),
    };
    let debug_dir = module.debug_dir.as_deref();
    let request = Request {
        name: module.name.clone(),
        kind,
        build_id: module.build_id.clone(),
        has_file: file.is_some(),
        file_is_local,
        has_debug_dir: debug_dir.is_some(),
        debug_dirs: options.debug_dirs.clone(),
        debug_info: options.debug_info,
        kallsyms: options.kallsyms.clone(),
        addresses: addresses.to_vec(),
    };
    let bytes = wire::framed(&request)?;
    let files: Vec<_> = file
        .into_iter()
        .chain(debug_dir)
        .map(|f| f.as_fd())
        .collect();
    let mut sent = 0;
    while sent < bytes.len() {
        let files: &[_] = if sent == 0 { &files } else { &[] };
        // The length is sent alone, because the child receives it and the files in one call.
        let end = if sent < 4 { 4 } else { bytes.len() };
        match send(&bytes[sent..end], files)? {
            Ok(count) => sent += count,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

fn receive_answer(
    socket: &UnixStream,
    mut wait: impl FnMut() -> Result<(), Failure>,
) -> Result<Vec<u8>, Failure> {
    let mut header = [0; 4];
    receive_exact(socket, &mut header, &mut wait)?;
    let length = wire::length(header)?;
    let mut body = Vec::new();
    while body.len() < length {
        // The buffer grows as the data arrives, so that a false length does not cost memory.
        let start = body.len();
        body.resize(length.min(start + (1 << 20)), 0);
        receive_exact(socket, &mut body[start..], &mut wait)?;
    }
    Ok(body)
}

fn receive_exact(
    mut socket: &UnixStream,
    bytes: &mut [u8],
    wait: &mut impl FnMut() -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut received = 0;
    while received < bytes.len() {
        wait()?;
        match io::Read::read(&mut socket, &mut bytes[received..]) {
            Ok(0) => return Err(Failure::Ended("gave up".to_owned())),
            Ok(count) => received += count,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
