//! The namer child: reads debug information that other users wrote, under resource limits, and answers with
//! names.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{AtFlags, StatxFlags, statx};
use rustix::process::{
    Resource, Rlimit, Signal, getrlimit, set_parent_process_death_signal, setrlimit,
};

use super::wire::{self, Answer, Kind, Packed, Request};
use crate::file::OpenFile;
use crate::profile::{Module, Source};
use crate::symbolize::{FunctionStarts, Options, Stage, name_module};

/// Limit on private memory (heap, unpacked sections), bytes. Compressed debug information may unpack to 4
/// GiB (`guard::MAX_UNPACKED`), and its reader needs about half as much again.
const MAX_MEMORY: u64 = 6 << 30;

/// Lower bound of the limit on private memory, bytes, for machines with little memory. The debug
/// information of a large C++ program needs this much.
const MIN_MEMORY: u64 = 512 << 20;

/// Limit on address space, bytes. Files are mapped: a debug file of up to 8 GiB and its alternate file,
/// besides the private memory.
const MAX_ADDRESS_SPACE: u64 = 32 << 30;

/// Limit on CPU time for one module, seconds. The debug information of a browser takes about half a minute.
const MAX_CPU_SECONDS: u64 = 120;

/// Answers requests on standard input, which is a socket, until the agent closes it.
///
/// # Errors
/// The limits cannot be set, a request is malformed, or the connection to the agent fails.
pub fn serve_names(function_starts: &dyn FunctionStarts) -> io::Result<()> {
    limit()?;
    let socket = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    let mut socket = UnixStream::from(socket);
    loop {
        let mut header = [0; 4];
        let (count, files) = wire::receive(&socket, &mut header)?;
        if count == 0 {
            return Ok(());
        }
        socket.read_exact(&mut header[count..])?;
        let mut body = vec![0; wire::length(header)?];
        socket.read_exact(&mut body)?;
        let request: Request = serde_json::from_slice(&body)?;
        drop(body);
        limit_cpu()?;
        answer(&mut socket, request, files, function_starts)?;
    }
}

/// Sets limits on what a hostile file can make this process do.
fn limit() -> io::Result<()> {
    // The agent has set this already, but an exec clears it if the program has file capabilities
    // (prctl(2), `PR_SET_PDEATHSIG`).
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // When memory is short, the kernel kills this process first. A failure to set this has no other effect.
    let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
    let half = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| {
            let total = text
                .lines()
                .find_map(|line| line.strip_prefix("MemTotal:"))?;
            let kib: u64 = total.split_ascii_whitespace().next()?.parse().ok()?;
            Some(kib * 512)
        });
    let memory = half.map_or(MIN_MEMORY, |half| half.clamp(MIN_MEMORY, MAX_MEMORY));
    for (resource, limit) in [
        (Resource::Core, 0),
        // It writes no files.
        (Resource::Fsize, 0),
        (Resource::Data, memory),
        (Resource::As, MAX_ADDRESS_SPACE),
    ] {
        let lower = getrlimit(resource)
            .maximum
            .map_or(limit, |max| max.min(limit));
        let limit = Rlimit {
            current: Some(lower),
            maximum: Some(lower),
        };
        setrlimit(resource, limit)?;
    }
    Ok(())
}

/// Raises the limit on CPU time by that of one module. At the limit the kernel kills the process.
fn limit_cpu() -> io::Result<()> {
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let maximum = getrlimit(Resource::Cpu).maximum;
    let limit = used.tv_sec.unsigned_abs() + MAX_CPU_SECONDS;
    let limit = Rlimit {
        current: Some(maximum.map_or(limit, |max| max.min(limit))),
        maximum,
    };
    Ok(setrlimit(Resource::Cpu, limit)?)
}

fn answer(
    socket: &mut UnixStream,
    request: Request,
    files: Vec<File>,
    function_starts: &dyn FunctionStarts,
) -> io::Result<()> {
    let options = Options {
        function_starts,
        debug_dirs: request.debug_dirs,
        debug_info: request.debug_info,
        kallsyms: request.kallsyms,
    };
    let mut files = files.into_iter();
    let file = request.has_file.then(|| files.next()).flatten();
    let file = file.map(|file| Arc::new(OpenFile::known(file, request.file_is_local)));
    let debug_dir = request.has_debug_dir.then(|| files.next()).flatten();
    let debug_dir = debug_dir.map(Arc::new);
    let source = match (request.kind, file) {
        (Kind::File, Some(file)) => Source::File(file),
        (Kind::File, None) => return Err(io::ErrorKind::InvalidInput.into()),
        (Kind::Kernel, _) => Source::Kernel,
        (Kind::Jit { pid, perf_map }, file) => Source::Jit {
            pid,
            perf_map,
            file,
        },
    };
    let module = Module {
        name: request.name,
        build_id: request.build_id,
        source,
        is_local: request.file_is_local,
        debug_dir,
        version: None,
        snapshot: None,
    };
    let mut sent = Ok(());
    let named = name_module(&module, &request.addresses, &options, &mut |stage| {
        let message = match stage {
            Stage::Starts(starts) => Answer::Starts(starts.to_vec()),
            Stage::Reading(file) => Answer::Reading(stored_bytes(file)),
        };
        if sent.is_ok() {
            sent = tell(socket, &message);
        }
    });
    sent?;
    let packed = Packed::new(&named.by_address, named.notes);
    tell(socket, &Answer::Names(packed)).or_else(|error| match error.kind() {
        io::ErrorKind::Other => {
            let notes = vec![format!("names not read: {error}")];
            let packed = Packed::new(&Default::default(), notes);
            tell(socket, &Answer::Names(packed))
        }
        _ => Err(error),
    })
}

fn tell(socket: &mut UnixStream, answer: &Answer) -> io::Result<()> {
    socket.write_all(&wire::framed(answer)?)
}

/// The number of bytes that a file occupies on its disk, as the kernel knows it without asking a server.
/// Holes do not count, because they take no time to read.
pub(super) fn stored_bytes(file: &File) -> u64 {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let found = statx(file, c"", flags, StatxFlags::SIZE | StatxFlags::BLOCKS);
    found.map_or(0, |found| {
        found.stx_size.min(found.stx_blocks.saturating_mul(512))
    })
}

/// The subcommand with which the agent starts itself as a namer.
pub const NAMER_ARGUMENT: &str = "name-functions";

/// The program of the namer: this program, even if its file has been renamed or removed.
pub(super) fn program() -> PathBuf {
    PathBuf::from("/proc/self/exe")
}
