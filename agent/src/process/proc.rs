//! `/proc`: what a process is and has mapped right now. A process that has gone is no error: it
//! simply has nothing.

use std::path::PathBuf;

use procfs::process::{MMPermissions, MMapPath, MemoryMap, Process};

use crate::kernel::{FileKey, MappedObject};

/// Every process there is.
pub fn pids() -> Vec<u32> {
    let Ok(processes) = procfs::process::all_processes() else {
        return Vec::new();
    };
    let pids = processes.flatten().map(|process| process.pid);
    pids.filter_map(|pid| u32::try_from(pid).ok()).collect()
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
    std::fs::read_link(format!("/proc/{pid}/exe")).ok()
}

/// The executable mappings of a process, in order of address.
pub fn mapped_objects(pid: u32) -> Vec<MappedObject> {
    let Ok(pid) = i32::try_from(pid) else {
        return Vec::new();
    };
    let Ok(maps) = Process::new(pid).and_then(|process| process.maps()) else {
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

    /// A process that does not exist has nothing.
    #[test]
    fn no_such_process() {
        assert!(mapped_objects(u32::MAX).is_empty());
        assert_eq!(process_name(u32::MAX), None);
    }
}
