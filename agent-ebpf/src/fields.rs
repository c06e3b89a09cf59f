//! Reads fields of kernel objects. The agent takes their offsets from the running kernel's BTF and sets
//! them before it loads the programs. A field that the kernel lacks has the offset [`ABSENT_FIELD`].

use core::ffi::c_void;

use agent_ebpf::limits::ABSENT_FIELD;
use aya_ebpf::{Global, helpers::bpf_probe_read_kernel};

/// An address in kernel memory.
pub type Pointer = *const c_void;

/// Reads a field of a kernel object. `None` if this kernel lacks the field, or if the address cannot be read.
///
/// # Safety
/// If `base + offset` is a valid address, it must be that of a `T`. A bad address only makes the read fail.
#[inline(always)]
pub unsafe fn field<T>(base: Pointer, offset: u32) -> Option<T> {
    if offset == ABSENT_FIELD {
        return None;
    }
    let address = base.cast::<u8>().wrapping_add(offset as usize).cast::<T>();
    // SAFETY: the helper checks the address.
    unsafe { bpf_probe_read_kernel(address) }.ok()
}

/// Offset of `tgid` in `struct task_struct`. This and all other offsets are in bytes.
#[unsafe(no_mangle)]
pub static TASK_TGID: Global<u32> = Global::new(0);

/// Offset of `flags` in `struct task_struct`.
#[unsafe(no_mangle)]
pub static TASK_FLAGS: Global<u32> = Global::new(0);

/// Offset of `mm` in `struct task_struct`.
#[unsafe(no_mangle)]
pub static TASK_MM: Global<u32> = Global::new(0);

/// Offset of the byte of `struct task_struct` that holds the bit field `in_execve`.
#[unsafe(no_mangle)]
pub static TASK_IN_EXECVE: Global<u32> = Global::new(0);

/// Mask of the bit `in_execve` in that byte; 0 if the kernel has no such field.
#[unsafe(no_mangle)]
pub static TASK_IN_EXECVE_MASK: Global<u8> = Global::new(0);

/// Offset of `signal` in `struct task_struct`.
#[unsafe(no_mangle)]
pub static TASK_SIGNAL: Global<u32> = Global::new(0);

/// Offset of `live` in `struct signal_struct`.
#[unsafe(no_mangle)]
pub static SIGNAL_LIVE: Global<u32> = Global::new(0);

/// Offset of `start_time` in `struct task_struct`.
#[unsafe(no_mangle)]
pub static TASK_START_TIME: Global<u32> = Global::new(0);

/// Offset of `files` in `struct task_struct`.
#[unsafe(no_mangle)]
pub static TASK_FILES: Global<u32> = Global::new(0);

/// Offset of `thread.fsbase` in `struct task_struct`.
#[unsafe(no_mangle)]
pub static TASK_FSBASE: Global<u32> = Global::new(0);

/// Offset of `fdt` in `struct files_struct`.
#[unsafe(no_mangle)]
pub static FILES_FDT: Global<u32> = Global::new(0);

/// Offset of `max_fds` in `struct fdtable`.
#[unsafe(no_mangle)]
pub static FDTABLE_MAX_FDS: Global<u32> = Global::new(0);

/// Offset of `fd` in `struct fdtable`.
#[unsafe(no_mangle)]
pub static FDTABLE_FD: Global<u32> = Global::new(0);

/// Offset of `f_inode` in `struct file`.
#[unsafe(no_mangle)]
pub static FILE_INODE: Global<u32> = Global::new(0);

/// Offset of `private_data` in `struct file`.
#[unsafe(no_mangle)]
pub static FILE_PRIVATE_DATA: Global<u32> = Global::new(0);

/// Offset of `i_mode` in `struct inode`.
#[unsafe(no_mangle)]
pub static INODE_MODE: Global<u32> = Global::new(0);

/// Offset of `sk` in `struct socket`.
#[unsafe(no_mangle)]
pub static SOCKET_SK: Global<u32> = Global::new(0);

/// Offset of `skc_family` in `struct sock_common`.
#[unsafe(no_mangle)]
pub static SOCK_FAMILY: Global<u32> = Global::new(0);

/// Offset of `skc_num` in `struct sock_common`.
#[unsafe(no_mangle)]
pub static SOCK_NUM: Global<u32> = Global::new(0);

/// Offset of `skc_dport` in `struct sock_common`.
#[unsafe(no_mangle)]
pub static SOCK_DPORT: Global<u32> = Global::new(0);

/// Offset of `skc_rcv_saddr` in `struct sock_common`.
#[unsafe(no_mangle)]
pub static SOCK_RCV_SADDR: Global<u32> = Global::new(0);

/// Offset of `skc_daddr` in `struct sock_common`.
#[unsafe(no_mangle)]
pub static SOCK_DADDR: Global<u32> = Global::new(0);

/// Offset of `skc_v6_rcv_saddr` in `struct sock_common`.
#[unsafe(no_mangle)]
pub static SOCK_V6_RCV_SADDR: Global<u32> = Global::new(0);

/// Offset of `skc_v6_daddr` in `struct sock_common`.
#[unsafe(no_mangle)]
pub static SOCK_V6_DADDR: Global<u32> = Global::new(0);

/// Offset of `skc_net` in `struct sock_common`.
#[unsafe(no_mangle)]
pub static SOCK_NET: Global<u32> = Global::new(0);

/// Offset of `ns.inum` in `struct net`.
#[unsafe(no_mangle)]
pub static NET_NS_INUM: Global<u32> = Global::new(0);

/// Offset of `peer` in `struct unix_sock`.
#[unsafe(no_mangle)]
pub static UNIX_SOCK_PEER: Global<u32> = Global::new(0);

/// Offset of `addr` in `struct unix_sock`.
#[unsafe(no_mangle)]
pub static UNIX_SOCK_ADDR: Global<u32> = Global::new(0);

/// Offset of `len` in `struct unix_address`.
#[unsafe(no_mangle)]
pub static UNIX_ADDRESS_LENGTH: Global<u32> = Global::new(0);

/// Offset of `name` in `struct unix_address`.
#[unsafe(no_mangle)]
pub static UNIX_ADDRESS_NAME: Global<u32> = Global::new(0);

/// Offset of `pids` in `struct signal_struct`.
#[unsafe(no_mangle)]
pub static SIGNAL_PIDS: Global<u32> = Global::new(0);

/// Offset of `level` in `struct pid`.
#[unsafe(no_mangle)]
pub static PID_LEVEL: Global<u32> = Global::new(0);

/// Offset of `numbers` in `struct pid`.
#[unsafe(no_mangle)]
pub static PID_NUMBERS: Global<u32> = Global::new(0);

/// Offset of `arg_start` in `struct mm_struct`.
#[unsafe(no_mangle)]
pub static MM_ARG_START: Global<u32> = Global::new(0);
