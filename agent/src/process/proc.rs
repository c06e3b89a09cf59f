//! Reads from `/proc` what a process is and has mapped right now. A process that has ended is
//! not an error: the answer is then empty.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use procfs::{
    FromBufRead as _,
    process::{MMapPath, MemoryMap, MemoryMaps, Process},
};
use rustix::process::{Pid, test_kill_process};

use super::space::MAX_KEPT_MAPPINGS;
use crate::kernel::{FileKey, MappedObject};

/// The pids of all processes.
pub fn pids() -> Vec<u32> {
    let Ok(processes) = procfs::process::all_processes() else {
        return Vec::new();
    };
    let pids = processes.flatten().map(|process| process.pid);
    pids.filter_map(|pid| u32::try_from(pid).ok()).collect()
}

/// The link to the initial pid namespace: `PROC_PID_INIT_INO`, include/linux/proc_ns.h.
const INITIAL_PID_NAMESPACE: &str = "pid:[4026531836]";

/// Maximum number of threads of a process that are checked to find a living one. All threads but the
/// first disappear from `/proc` when they end, so the first one that is checked is nearly always alive.
const MAX_THREADS: usize = 1024;

/// Whether this process sees the processes of the whole machine. `None` without `/proc`.
pub fn in_initial_pid_namespace() -> Option<bool> {
    let namespace = std::fs::read_link("/proc/self/ns/pid").ok()?;
    Some(namespace == Path::new(INITIAL_PID_NAMESPACE))
}

/// Whether there is a process with this pid, including one that has ended and has not been waited for.
pub fn exists(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    pid.is_some_and(|pid| test_kill_process(pid) != Err(rustix::io::Errno::SRCH))
}

/// A thread of a process that has not ended: the first one, or another if the first has ended
/// before the others. `None` if the process has ended.
pub fn living_thread(pid: u32) -> Option<u32> {
    if lives(pid, pid) {
        return Some(pid);
    }
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let threads = threads.flatten().take(MAX_THREADS);
    let mut numbers = threads.filter_map(|thread| thread.file_name().to_str()?.parse().ok());
    numbers.find(|&tid| tid != pid && lives(pid, tid))
}

/// Whether a thread has not ended: it runs, waits or is stopped.
fn lives(pid: u32, tid: u32) -> bool {
    let stat = std::fs::read(format!("/proc/{pid}/task/{tid}/stat")).unwrap_or_default();
    // The state follows the name, which is in parentheses and may contain any byte.
    let name_end = stat.iter().rposition(|&byte| byte == b')');
    let state = name_end.and_then(|end| stat.get(end + 2));
    state.is_some_and(|state| !b"ZXx".contains(state))
}

/// Whether a process has more than one thread now.
pub fn has_threads(pid: u32) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    // The directory has a link for `.`, for `..`, and for the directory of each thread.
    std::fs::metadata(format!("/proc/{pid}/task")).is_ok_and(|task| task.nlink() > 3)
}

/// The process that a thread belongs to. The pid of a process is the id of its first thread.
pub fn process_of_thread(tid: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{tid}/status")).ok()?;
    let process = status.lines().find_map(|line| line.strip_prefix("Tgid:"))?;
    process.trim().parse().ok()
}

/// Name of a process (of its first thread).
pub fn process_name(pid: u32) -> Option<String> {
    let name = std::fs::read(format!("/proc/{pid}/comm")).ok()?;
    Some(String::from_utf8_lossy(&name).trim_end().to_owned())
}

/// The parent of a process.
pub fn parent_of(pid: u32) -> Option<u32> {
    let process = Process::new(i32::try_from(pid).ok()?).ok()?;
    u32::try_from(process.stat().ok()?.ppid).ok()
}

/// The pid of a process in its own pid namespace, as the process itself sees it.
pub fn own_pid(pid: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let pids = status
        .lines()
        .find_map(|line| line.strip_prefix("NSpid:"))?;
    pids.split_whitespace().last()?.parse().ok()
}

/// Path of a process's executable, as the process sees it.
pub fn process_exe(pid: u32) -> Option<PathBuf> {
    let of_first = std::fs::read_link(format!("/proc/{pid}/exe"));
    of_first.ok().or_else(|| {
        let thread = living_thread(pid).filter(|thread| *thread != pid)?;
        std::fs::read_link(format!("/proc/{pid}/task/{thread}/exe")).ok()
    })
}

/// Whether a file belongs to root or to a user that a process runs as. Any other user may have
/// made the file to mislead the agent about the process. `false` if the process has ended.
pub fn is_trusted_by(pid: u32, file: &File) -> bool {
    let Ok(owner) = file.metadata().map(|metadata| metadata.uid()) else {
        return false;
    };
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    let mut ids = ids.unwrap_or_default().split_ascii_whitespace().peekable();
    ids.peek().is_some() && (owner == 0 || ids.any(|id| id.parse() == Ok(owner)))
}

/// Maximum number of bytes that are read of a process's list of mappings: as many mappings as
/// the kernel allows, with long paths.
const MAX_MAPS_BYTES: u64 = 64 << 20;

/// The executable mappings of a process, ordered by address, at most [`MAX_KEPT_MAPPINGS`];
/// none if the process has ended.
///
/// # Errors
/// The list of a living process could not be read.
pub fn mapped_objects(pid: u32) -> io::Result<Vec<MappedObject>> {
    let of_first = executable_mappings(pid, pid)?;
    if !of_first.is_empty() {
        return Ok(of_first);
    }
    // The first thread has no mappings if it has ended before the others.
    match living_thread(pid) {
        Some(thread) if thread != pid => executable_mappings(pid, thread),
        _ => Ok(Vec::new()),
    }
}

fn executable_mappings(pid: u32, tid: u32) -> io::Result<Vec<MappedObject>> {
    let lines = File::open(format!("/proc/{pid}/task/{tid}/maps"))
        .and_then(|file| executable_lines(BufReader::new(file.take(MAX_MAPS_BYTES))));
    let lines = match lines {
        Ok(lines) => lines,
        Err(error) => {
            return match error.raw_os_error() {
                Some(libc::ENOENT | libc::ESRCH) => Ok(Vec::new()),
                _ => Err(error),
            };
        }
    };
    // A path may contain any bytes. Replacing invalid ones does no harm, because the file is
    // identified by its inode.
    let lines = String::from_utf8_lossy(&lines);
    let maps = MemoryMaps::from_buf_read(lines.as_bytes()).map_err(io::Error::other)?;
    Ok(maps.into_iter().map(object).collect())
}

/// The lines of executable mappings: a process may have many others.
fn executable_lines(mut maps: impl BufRead) -> io::Result<Vec<u8>> {
    let (mut lines, mut count, mut start) = (Vec::new(), 0, 0);
    while count < MAX_KEPT_MAPPINGS && maps.read_until(b'\n', &mut lines)? > 0 {
        let permissions = lines[start..].split(|byte| *byte == b' ').nth(1);
        match permissions.is_some_and(|permissions| permissions.contains(&b'x')) {
            true => (count, start) = (count + 1, lines.len()),
            false => lines.truncate(start),
        }
    }
    // A line that was cut at the limit would look like a different mapping.
    let whole = lines.iter().rposition(|byte| *byte == b'\n');
    lines.truncate(whole.map_or(0, |last| last + 1));
    Ok(lines)
}

fn object(map: MemoryMap) -> MappedObject {
    let file = FileKey {
        major: u32::try_from(map.dev.0).unwrap_or(0),
        minor: u32::try_from(map.dev.1).unwrap_or(0),
        inode: map.inode,
    };
    let name = match map.pathname {
        MMapPath::Path(path) => path,
        MMapPath::Vdso => "[vdso]".into(),
        MMapPath::Vsyscall => "[vsyscall]".into(),
        _ => "//anon".into(),
    };
    MappedObject {
        start: map.address.0,
        end: map.address.1,
        offset: map.offset,
        file: (map.inode != 0).then_some(file),
        name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The mappings of this process include its executable and the vDSO, and are ordered.
    #[test]
    fn own_mappings() {
        let pid = std::process::id();
        let objects = mapped_objects(pid).unwrap();
        let exe = process_exe(pid).unwrap();
        assert!(objects.iter().any(|o| o.name == exe && o.file.is_some()));
        assert!(objects.iter().any(|o| o.name.as_os_str() == "[vdso]"));
        assert!(objects.is_sorted_by_key(|o| o.start));
        assert!(pids().contains(&pid));
    }

    /// This process is alive and its thread belongs to it. A child that has ended is not alive,
    /// and exists until it is waited for.
    #[test]
    fn living_and_ended() {
        let pid = std::process::id();
        assert_eq!(living_thread(pid), Some(pid));
        let (tid, threaded) = std::thread::spawn(move || {
            // SAFETY: a query without side effects.
            let tid = unsafe { libc::gettid() };
            (process_of_thread(tid.cast_unsigned()), has_threads(pid))
        })
        .join()
        .unwrap();
        assert_eq!(tid, Some(pid));
        assert!(threaded);
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let ended = child.id();
        // The child has ended, and still exists because it has not been waited for.
        while living_thread(ended).is_some() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert!(exists(ended));
        child.wait().unwrap();
        assert!(!exists(ended));
        assert!(exists(pid));
    }

    /// A process that does not exist has no mappings and no name.
    #[test]
    fn no_such_process() {
        assert!(mapped_objects(u32::MAX).unwrap().is_empty());
        assert_eq!(process_name(u32::MAX), None);
    }

    /// Files of root and of the process's own user are trusted, if the process is alive.
    #[test]
    fn trusted_files() {
        let own = std::process::id();
        let file = tempfile::tempfile().unwrap();
        assert!(is_trusted_by(own, &file) && !is_trusted_by(u32::MAX, &file));
        // Only root can change the owner of a file.
        if rustix::fs::fchown(&file, Some(rustix::fs::Uid::from_raw(65_534)), None).is_ok() {
            assert!(!is_trusted_by(own, &file));
        }
    }
}
