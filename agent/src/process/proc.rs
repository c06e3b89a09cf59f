//! `/proc`: what a process is and has mapped right now. A process that has gone is no error: it
//! simply has nothing.

use std::{
    fs::File,
    io::BufReader,
    path::{Path, PathBuf},
};

use procfs::{
    FromBufRead as _,
    process::{MMPermissions, MMapPath, MemoryMap, MemoryMaps, Process},
};
use rustix::process::{Pid, test_kill_process};

use crate::kernel::{FileKey, MappedObject};

/// Every process there is.
pub fn pids() -> Vec<u32> {
    let Ok(processes) = procfs::process::all_processes() else {
        return Vec::new();
    };
    let pids = processes.flatten().map(|process| process.pid);
    pids.filter_map(|pid| u32::try_from(pid).ok()).collect()
}

/// The initial pid namespace: `PROC_PID_INIT_INO`, include/linux/proc_ns.h.
const INITIAL_PID_NAMESPACE: &str = "pid:[4026531836]";

/// Threads of a process that are looked at to find a living one. All but the first go from `/proc` as they end, so
/// the first that is looked at is nearly always alive.
const MAX_THREADS: usize = 1024;

/// Whether this process sees the processes of the whole machine. `None` without `/proc`.
pub fn in_initial_pid_namespace() -> Option<bool> {
    let namespace = std::fs::read_link("/proc/self/ns/pid").ok()?;
    Some(namespace == Path::new(INITIAL_PID_NAMESPACE))
}

/// Whether there is a process of this pid, be it one that has ended and was not waited for.
pub fn exists(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    pid.is_some_and(|pid| test_kill_process(pid) != Err(rustix::io::Errno::SRCH))
}

/// A thread of a process that has not ended: its first one, or another when that has ended before the others.
/// `None`: the process has ended.
pub fn living_thread(pid: u32) -> Option<u32> {
    if lives(pid, pid) {
        return Some(pid);
    }
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let threads = threads.flatten().take(MAX_THREADS);
    let mut numbers = threads.filter_map(|thread| thread.file_name().to_str()?.parse().ok());
    numbers.find(|&tid| tid != pid && lives(pid, tid))
}

/// Whether a thread runs, waits or is stopped.
fn lives(pid: u32, tid: u32) -> bool {
    let stat = std::fs::read(format!("/proc/{pid}/task/{tid}/stat")).unwrap_or_default();
    // The state follows the name, which may hold anything, in parentheses.
    let name_end = stat.iter().rposition(|&byte| byte == b')');
    let state = name_end.and_then(|end| stat.get(end + 2));
    state.is_some_and(|state| !b"ZXx".contains(state))
}

/// Whether a process has more than one thread now.
pub fn has_threads(pid: u32) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    // The directory's links: `.`, `..` and a directory for each thread.
    std::fs::metadata(format!("/proc/{pid}/task")).is_ok_and(|task| task.nlink() > 3)
}

/// The process to which a thread belongs. A process's own pid is its first thread's id.
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

/// The process that started a process.
pub fn parent_of(pid: u32) -> Option<u32> {
    let process = Process::new(i32::try_from(pid).ok()?).ok()?;
    u32::try_from(process.stat().ok()?.ppid).ok()
}

/// The pid of a process as it sees it itself, in its own pid namespace.
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

/// The executable mappings of a process, in order of address.
pub fn mapped_objects(pid: u32) -> Vec<MappedObject> {
    let of_first = executable_mappings(pid, pid);
    if !of_first.is_empty() {
        return of_first;
    }
    // The first thread has none when it has ended before the others.
    match living_thread(pid) {
        Some(thread) if thread != pid => executable_mappings(pid, thread),
        _ => Vec::new(),
    }
}

fn executable_mappings(pid: u32, tid: u32) -> Vec<MappedObject> {
    let Ok(file) = File::open(format!("/proc/{pid}/task/{tid}/maps")) else {
        return Vec::new();
    };
    let Ok(maps) = MemoryMaps::from_buf_read(BufReader::new(file)) else {
        return Vec::new();
    };
    let executable = |map: &MemoryMap| map.perms.contains(MMPermissions::EXECUTE);
    maps.into_iter().filter(executable).map(object).collect()
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

    /// This process has its own executable and the vDSO mapped, in order.
    #[test]
    fn own_mappings() {
        let pid = std::process::id();
        let objects = mapped_objects(pid);
        let exe = process_exe(pid).unwrap();
        assert!(objects.iter().any(|o| o.name == exe && o.file.is_some()));
        assert!(objects.iter().any(|o| o.name.as_os_str() == "[vdso]"));
        assert!(objects.is_sorted_by_key(|o| o.start));
        assert!(pids().contains(&pid));
    }

    /// This process lives, its threads are its own, and a process that has ended lives no more.
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
        // Not waited for: it exists, and has ended.
        while living_thread(ended).is_some() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert!(exists(ended));
        child.wait().unwrap();
        assert!(!exists(ended));
        assert!(exists(pid));
    }

    /// A process that does not exist has nothing.
    #[test]
    fn no_such_process() {
        assert!(mapped_objects(u32::MAX).is_empty());
        assert_eq!(process_name(u32::MAX), None);
    }
}
