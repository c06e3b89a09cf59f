//! The capabilities that recording uses (numbers: include/uapi/linux/capability.h).

/// A capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Its bit.
    pub bit: u32,
    /// Its name.
    pub name: &'static str,
    /// What recording needs it for.
    pub purpose: &'static str,
    /// Whether recording cannot work without it.
    pub required: bool,
    /// Whether `CAP_SYS_ADMIN` includes it.
    pub in_sys_admin: bool,
}

/// `CAP_SYS_ADMIN`, which the kernel accepts in place of BPF, PERFMON and CHECKPOINT_RESTORE.
pub const SYS_ADMIN: u32 = 21;

/// All capabilities, in the order in which they are printed.
pub const ALL: [Capability; 6] = [
    Capability {
        bit: 39,
        name: "CAP_BPF",
        purpose: "load the programs and their maps",
        required: true,
        in_sys_admin: true,
    },
    Capability {
        bit: 38,
        name: "CAP_PERFMON",
        purpose: "sample every process, read stacks in the kernel",
        required: true,
        in_sys_admin: true,
    },
    Capability {
        bit: 19,
        name: "CAP_SYS_PTRACE",
        purpose: "see the mappings and files of other users' processes",
        required: false,
        in_sys_admin: false,
    },
    Capability {
        bit: 2,
        name: "CAP_DAC_READ_SEARCH",
        purpose: "read unwind tables and symbols of files that only others can read",
        required: false,
        in_sys_admin: false,
    },
    Capability {
        bit: 34,
        name: "CAP_SYSLOG",
        purpose: "names of kernel functions",
        required: false,
        in_sys_admin: false,
    },
    Capability {
        bit: 40,
        name: "CAP_CHECKPOINT_RESTORE",
        purpose: "files that were deleted or replaced while they run",
        required: false,
        in_sys_admin: true,
    },
];

impl Capability {
    /// Whether a set of effective capabilities includes this one.
    pub fn is_in(self, effective: u64) -> bool {
        effective >> self.bit & 1 == 1 || (self.in_sys_admin && effective >> SYS_ADMIN & 1 == 1)
    }
}
