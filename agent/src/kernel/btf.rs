//! Offsets of kernel fields, from the kernel's own type information.
//!
//! Format: Linux, Documentation/bpf/btf.rst. Only what is needed is decoded: structs are found
//! by name, and their members by name, also those inside anonymous members.

use std::{collections::HashMap, fs};

use agent_ebpf::limits::ABSENT_FIELD;

use super::Error;

/// The file with the running kernel's type information (`CONFIG_DEBUG_INFO_BTF`).
pub const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

const MAGIC: u16 = 0xeb9f;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
/// Maximum nesting of anonymous members. The kernel's are not nested deeper; the limit stops hostile input.
const MAX_NESTING: u32 = 8;

/// A kernel struct and one of its members.
type Member = (&'static str, &'static str);

/// The global of the kernel programs that holds an offset, and the members whose offsets add up to it.
type Field = (&'static str, &'static [Member]);

/// Fields without which nothing can be recorded.
const REQUIRED: &[Field] = &[
    ("TASK_TGID", &[("task_struct", "tgid")]),
    ("TASK_FLAGS", &[("task_struct", "flags")]),
    ("TASK_MM", &[("task_struct", "mm")]),
    ("TASK_SIGNAL", &[("task_struct", "signal")]),
    ("SIGNAL_LIVE", &[("signal_struct", "live")]),
];

/// Fields without which a part of the attribution of database work is unavailable.
const OPTIONAL: &[Field] = &[
    ("TASK_START_TIME", &[("task_struct", "start_time")]),
    ("TASK_FILES", &[("task_struct", "files")]),
    (
        "TASK_FSBASE",
        &[("task_struct", "thread"), ("thread_struct", "fsbase")],
    ),
    ("FILES_FDT", &[("files_struct", "fdt")]),
    ("FDTABLE_MAX_FDS", &[("fdtable", "max_fds")]),
    ("FDTABLE_FD", &[("fdtable", "fd")]),
    ("FILE_INODE", &[("file", "f_inode")]),
    ("FILE_PRIVATE_DATA", &[("file", "private_data")]),
    ("INODE_MODE", &[("inode", "i_mode")]),
    ("SOCKET_SK", &[("socket", "sk")]),
    ("SOCK_FAMILY", &[("sock_common", "skc_family")]),
    ("SOCK_NUM", &[("sock_common", "skc_num")]),
    ("SOCK_DPORT", &[("sock_common", "skc_dport")]),
    ("SOCK_RCV_SADDR", &[("sock_common", "skc_rcv_saddr")]),
    ("SOCK_DADDR", &[("sock_common", "skc_daddr")]),
    ("SOCK_V6_RCV_SADDR", &[("sock_common", "skc_v6_rcv_saddr")]),
    ("SOCK_V6_DADDR", &[("sock_common", "skc_v6_daddr")]),
    ("SOCK_NET", &[("sock_common", "skc_net")]),
    ("NET_NS_INUM", &[("net", "ns"), ("ns_common", "inum")]),
    ("UNIX_SOCK_PEER", &[("unix_sock", "peer")]),
    ("UNIX_SOCK_ADDR", &[("unix_sock", "addr")]),
    ("UNIX_ADDRESS_LENGTH", &[("unix_address", "len")]),
    ("UNIX_ADDRESS_NAME", &[("unix_address", "name")]),
    ("SIGNAL_PIDS", &[("signal_struct", "pids")]),
    ("PID_LEVEL", &[("pid", "level")]),
    ("PID_NUMBERS", &[("pid", "numbers")]),
    ("MM_ARG_START", &[("mm_struct", "arg_start")]),
];

/// The name of a helper in `enum bpf_func_id` (include/uapi/linux/bpf.h), which lists the
/// helpers that the kernel has.
const TAI_CLOCK: &[u8] = b"\0BPF_FUNC_ktime_get_tai_ns\0";

/// Byte offsets of the fields that the kernel programs read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offsets {
    /// Each global that holds an offset, and the offset in bytes; [`ABSENT_FIELD`] if the
    /// kernel lacks an optional field.
    pub globals: Vec<(&'static str, u32)>,
    /// The offset of `task_struct.in_execve` in bits, because it is a bit field. `None` if the
    /// kernel does not have it.
    pub task_in_execve_bit: Option<u32>,
    /// Whether the kernel has the helper `bpf_ktime_get_tai_ns` (Linux 6.1).
    pub has_tai_clock: bool,
    /// The optional fields that this kernel lacks, as `struct.member`.
    pub missing: Vec<String>,
}

impl Offsets {
    /// Reads the offsets in the running kernel.
    ///
    /// # Errors
    /// The file cannot be read, is not BTF, or lacks a field without which nothing can be recorded.
    pub fn of_running_kernel() -> Result<Offsets, Error> {
        let bytes = fs::read(VMLINUX).map_err(|source| Error::ReadBtf { source })?;
        Offsets::parse(&bytes)
    }

    fn parse(bytes: &[u8]) -> Result<Offsets, Error> {
        let types = Types::parse(bytes).ok_or(Error::MalformedBtf)?;
        let structs = types.structs(REQUIRED.iter().chain(OPTIONAL));
        let offset = |members: &[Member]| -> Result<u32, Error> {
            let mut sum = 0u32;
            for &(of, field) in members {
                let start = structs
                    .get(of)
                    .ok_or(Error::MissingKernelField { of, field })?;
                sum = sum.saturating_add(types.member(*start, of, field)?);
            }
            Ok(sum)
        };
        let mut globals = Vec::new();
        for (global, members) in REQUIRED {
            globals.push((*global, offset(members)?));
        }
        let mut missing = Vec::new();
        for (global, members) in OPTIONAL {
            let found = offset(members).unwrap_or_else(|_| {
                missing.extend(members.iter().map(|(of, field)| format!("{of}.{field}")));
                ABSENT_FIELD
            });
            globals.push((*global, found));
        }
        let task = structs.get("task_struct").copied();
        Ok(Offsets {
            globals,
            task_in_execve_bit: task
                .and_then(|task| types.member_bits(task, b"in_execve", MAX_NESTING)),
            has_tai_clock: memchr::memmem::find(types.strings, TAI_CLOCK).is_some(),
            missing,
        })
    }
}

struct Types<'a> {
    strings: &'a [u8],
    /// Start of each type's record in `bytes`, in order of the type ids, which start at 1.
    starts: Vec<u32>,
    bytes: &'a [u8],
}

impl<'a> Types<'a> {
    fn parse(file: &'a [u8]) -> Option<Types<'a>> {
        if file.get(..2)? != MAGIC.to_le_bytes() {
            return None;
        }
        let header = word(file, 4)? as usize;
        let section = |at: usize| -> Option<&'a [u8]> {
            let start = header.checked_add(word(file, at)? as usize)?;
            file.get(start..start.checked_add(word(file, at + 4)? as usize)?)
        };
        let (bytes, strings) = (section(8)?, section(16)?);
        let mut starts = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            starts.push(u32::try_from(at).ok()?);
            let info = word(bytes, at + 4)?;
            at += 12 + trailer(kind(info), (info & 0xffff) as usize)?;
        }
        Some(Types {
            strings,
            starts,
            bytes,
        })
    }

    fn name(&self, offset: u32) -> &'a [u8] {
        let rest = self.strings.get(offset as usize..).unwrap_or_default();
        rest.split(|byte| *byte == 0).next().unwrap_or_default()
    }

    /// Starts of the records of the structs that have these fields. All are found in one pass.
    fn structs<'f>(&self, fields: impl Iterator<Item = &'f Field>) -> HashMap<&'static str, usize> {
        let wanted: HashMap<&[u8], &'static str> = fields
            .flat_map(|(_, members)| members.iter())
            .map(|(of, _)| (of.as_bytes(), *of))
            .collect();
        let mut found = HashMap::new();
        for &start in &self.starts {
            let start = start as usize;
            if word(self.bytes, start + 4).map(kind) == Some(KIND_STRUCT)
                && let Some(name) = word(self.bytes, start).map(|offset| self.name(offset))
                && let Some(name) = wanted.get(name)
            {
                found.entry(*name).or_insert(start);
            }
        }
        found
    }

    /// Byte offset of a member.
    fn member(&self, start: usize, of: &'static str, field: &'static str) -> Result<u32, Error> {
        self.member_bits(start, field.as_bytes(), MAX_NESTING)
            .map(|bits| bits / 8)
            .ok_or(Error::MissingKernelField { of, field })
    }

    fn member_bits(&self, start: usize, field: &[u8], nesting: u32) -> Option<u32> {
        let info = word(self.bytes, start + 4)?;
        if !matches!(kind(info), KIND_STRUCT | KIND_UNION) || nesting == 0 {
            return None;
        }
        for index in 0..(info & 0xffff) as usize {
            let at = start + 12 + index * 12;
            let name = self.name(word(self.bytes, at)?);
            // If the kind flag is set, the upper byte is the size of a bit field.
            let mask = if info >> 31 == 1 { 0xff_ffff } else { u32::MAX };
            let bits = word(self.bytes, at + 8)? & mask;
            if name == field {
                return Some(bits);
            }
            if name.is_empty() {
                let id = word(self.bytes, at + 4)? as usize;
                let inner = *self.starts.get(id.checked_sub(1)?)? as usize;
                if let Some(inside) = self.member_bits(inner, field, nesting - 1) {
                    return bits.checked_add(inside);
                }
            }
        }
        None
    }
}

fn kind(info: u32) -> u32 {
    info >> 24 & 0x1f
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

/// The number of bytes that follow the twelve which all types have, by kind (include/uapi/linux/btf.h).
fn trailer(kind: u32, entries: usize) -> Option<usize> {
    Some(match kind {
        1 | 14 | 17 => 4,          // INT, VAR, DECL_TAG
        3 => 12,                   // ARRAY
        4 | 5 => 12 * entries,     // STRUCT, UNION
        6 => 8 * entries,          // ENUM
        13 => 8 * entries,         // FUNC_PROTO
        15 => 12 * entries,        // DATASEC
        19 => 12 * entries,        // ENUM64
        2 | 7..=12 | 16 | 18 => 0, // PTR, FWD … FUNC, FLOAT, TYPE_TAG
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// The running kernel's offsets are plausible, if it has type information.
    #[test]
    fn running_kernel() {
        if !Path::new(VMLINUX).exists() {
            eprintln!("skipped: {VMLINUX} does not exist");
            return;
        }
        let offsets = Offsets::of_running_kernel().unwrap();
        assert_eq!(offsets.globals.len(), REQUIRED.len() + OPTIONAL.len());
        assert_eq!(offsets.missing, Vec::<String>::new());
        assert!(offsets.globals.iter().all(|(_, offset)| *offset < 16_384));
        let of = |name| offsets.globals.iter().find(|(global, _)| *global == name);
        assert!(of("TASK_TGID").is_some_and(|(_, offset)| *offset > 0 && offset % 4 == 0));
        // Every kernel up to now has this field, and the tests of execve rely on it.
        let bit = offsets.task_in_execve_bit.unwrap();
        // The helper exists since Linux 6.1, and these tests run on nothing older.
        assert!(offsets.has_tai_clock);
        assert!(bit / 8 > 0 && bit / 8 < 16_384);
    }

    /// Truncated and overwritten type information is an error, never a panic.
    #[test]
    fn hostile() {
        let Ok(good) = fs::read(VMLINUX) else { return };
        for cut in [0, 1, 8, 23, 24, 100, good.len() / 2] {
            assert!(Offsets::parse(&good[..cut]).is_err(), "cut at {cut}");
        }
        let mut bad = good[..4096.min(good.len())].to_vec();
        for at in 0..bad.len() {
            bad[at] ^= 0xff;
            let _ = Offsets::parse(&bad);
        }
    }
}
