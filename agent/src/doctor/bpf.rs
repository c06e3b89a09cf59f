//! Probes by system call. Each one requests the actual object from the kernel, and releases it at once.

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_MAP_TYPE_RINGBUF: u32 = 27;
const BPF_PROG_TYPE_PERF_EVENT: u32 = 7;
const HELPER_LOOP: u32 = 181;
const PERF_TYPE_SOFTWARE: u32 = 1;
const PERF_COUNT_SW_CPU_CLOCK: u64 = 0;
const PERF_FLAG_FD_CLOEXEC: libc::c_long = 8;
/// Size of the verifier's log, bytes: enough for two instructions.
const LOG_BYTES: usize = 4096;

/// The first members of `union bpf_attr` for `BPF_MAP_CREATE`.
#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

/// The first members of `union bpf_attr` for `BPF_PROG_LOAD`.
#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
}

/// `struct perf_event_attr` in its first version (`PERF_ATTR_SIZE_VER0`).
#[repr(C)]
struct PerfEventAttr {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    bp_type: u32,
    bp_addr: u64,
}

const _: () = assert!(size_of::<PerfEventAttr>() == 64);

/// Converts the result of a system call that returns a descriptor. Dropping the result closes the descriptor.
fn descriptor(result: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(result) {
        // SAFETY: the kernel has just opened this descriptor, and nothing else owns it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Calls `bpf(2)` with a command that returns a descriptor.
fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads `size_of::<T>()` bytes of a live value. The callers keep what
    // its members point to alive until this returns.
    descriptor(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    })
}

/// Creates the smallest possible ring buffer (Linux 5.8).
pub fn ring_buffer() -> io::Result<()> {
    // SAFETY: a query without side effects.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    let map = MapCreate {
        map_type: BPF_MAP_TYPE_RINGBUF,
        key_size: 0,
        value_size: 0,
        max_entries: u32::try_from(page).unwrap_or(4096),
    };
    bpf(BPF_MAP_CREATE, &map).map(drop)
}

/// Whether programs of the sampling type may call `bpf_loop` (Linux 5.17).
///
/// Loads two instructions, `call bpf_loop` and `exit`, without the arguments that the helper needs. The
/// verifier rejects them in any case, but a kernel that has the helper complains about the arguments.
///
/// # Errors
/// The kernel does not let this process load programs, so the answer is unknown.
pub fn has_bpf_loop() -> io::Result<bool> {
    let instructions: [u64; 2] = [0x85 | u64::from(HELPER_LOOP) << 32, 0x95];
    let mut log = vec![0u8; LOG_BYTES];
    let load = ProgLoad {
        prog_type: BPF_PROG_TYPE_PERF_EVENT,
        insn_cnt: instructions.len() as u32,
        insns: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        log_level: 1,
        log_size: LOG_BYTES as u32,
        log_buf: log.as_mut_ptr() as u64,
    };
    match bpf(BPF_PROG_LOAD, &load) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EACCES)) => {
            let log = String::from_utf8_lossy(&log);
            // The wording differs between kernels: "invalid func unknown#181", "unknown func
            // …", and since 6.10 "program of this type cannot use helper …".
            let unknown = ["invalid func", "unknown func", "cannot use helper"];
            Ok(!unknown.iter().any(|words| log.contains(words)))
        }
        Err(error) => Err(error),
    }
}

/// Opens the sampling clock on one CPU for all processes, as recording does, and starts it.
pub fn cpu_clock() -> io::Result<()> {
    let attributes = PerfEventAttr {
        kind: PERF_TYPE_SOFTWARE,
        size: size_of::<PerfEventAttr>() as u32,
        config: PERF_COUNT_SW_CPU_CLOCK,
        sample_period: 1_000_000_000,
        sample_type: 0,
        read_format: 0,
        flags: 0,
        wakeup_events: 0,
        bp_type: 0,
        bp_addr: 0,
    };
    // The current CPU is certainly online.
    // SAFETY: takes no arguments.
    let cpu = unsafe { libc::sched_getcpu() }.max(0);
    let (all_processes, no_group): (libc::c_long, libc::c_long) = (-1, -1);
    // SAFETY: the kernel reads `size` bytes of a live value.
    let clock = descriptor(unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const attributes,
            all_processes,
            libc::c_long::from(cpu),
            no_group,
            PERF_FLAG_FD_CLOEXEC,
        )
    })?;
    debug_assert!(clock.as_raw_fd() >= 0);
    Ok(())
}
