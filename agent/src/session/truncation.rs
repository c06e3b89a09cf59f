//! Protection against mapped files that are truncated. Reading a page that no longer exists raises SIGBUS,
//! which would end the agent. The handler replaces the page by zeros; every reader treats zeros as a
//! damaged file.

use std::{io, ptr};

const PAGE: usize = 4096;

/// Installs the handler for the whole process.
///
/// # Errors
/// The handler cannot be installed.
pub fn survive() -> io::Result<()> {
    // SAFETY: all zeros is a valid `sigaction`; the handler makes one system call and touches nothing.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = put_zeros as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        if libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

extern "C" fn put_zeros(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes valid information. The page at the address cannot be read, so nothing is
    // lost by replacing it.
    unsafe {
        let page = (*info).si_addr() as usize & !(PAGE - 1);
        let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let mapped = libc::mmap(page as *mut _, PAGE, libc::PROT_READ, flags, -1, 0);
        if (*info).si_code != BUS_ADRERR || mapped == libc::MAP_FAILED {
            // Either this is not a truncated file, or the page could not be replaced. The instruction runs
            // again after the handler returns, and the default action of the signal then ends the process.
            libc::signal(libc::SIGBUS, libc::SIG_DFL);
        }
    }
}

/// `si_code` of an access to a nonexistent physical address (include/uapi/asm-generic/siginfo.h).
const BUS_ADRERR: libc::c_int = 2;

#[cfg(test)]
mod tests {
    use super::*;

    /// The truncated part of a file reads as zeros.
    #[test]
    fn truncated_file() {
        survive().unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(3 * PAGE as u64).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 3 * PAGE], 0).unwrap();
        // SAFETY: this test is about what happens when the file changes.
        let map = unsafe { memmap2::Mmap::map(&file).unwrap() };
        assert_eq!(map[2 * PAGE], 7);
        file.set_len(PAGE as u64).unwrap();
        assert_eq!(map[0], 7);
        assert_eq!(map[PAGE + 5], 0);
        assert_eq!(map[2 * PAGE], 0);
    }
}
