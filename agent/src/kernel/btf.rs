//! Offsets of kernel fields, from the kernel's own type information.
//!
//! Format: Linux, Documentation/bpf/btf.rst. Only what is needed is kept: a walk over the types that
//! finds structs by name and members by name (anonymous members are looked into).

use std::fs;

use super::Error;

/// Where the running kernel tells its types (`CONFIG_DEBUG_INFO_BTF`).
pub const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

const MAGIC: u16 = 0xeb9f;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
/// Anonymous structs nested deeper than this do not exist in the kernel; hostile input ends here.
const MAX_NESTING: u32 = 8;

/// Offsets of the fields that the kernel programs read, in bytes if not said otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offsets {
    /// `task_struct.tgid`
    pub task_tgid: u32,
    /// `task_struct.flags`
    pub task_flags: u32,
    /// `task_struct.mm`
    pub task_mm: u32,
    /// `task_struct.in_execve`, in bits: it is a bit field. `None` in a kernel that has none.
    pub task_in_execve_bit: Option<u32>,
    /// `task_struct.signal`
    pub task_signal: u32,
    /// `signal_struct.live`
    pub signal_live: u32,
}

impl Offsets {
    /// Offsets in the running kernel.
    ///
    /// # Errors
    /// The file cannot be read, is not BTF, or lacks one of the fields.
    pub fn of_running_kernel() -> Result<Offsets, Error> {
        let bytes = fs::read(VMLINUX).map_err(|source| Error::ReadBtf { source })?;
        Offsets::parse(&bytes)
    }

    fn parse(bytes: &[u8]) -> Result<Offsets, Error> {
        let types = Types::parse(bytes).ok_or(Error::MalformedBtf)?;
        let task = types.find_struct("task_struct")?;
        let signal = types.find_struct("signal_struct")?;
        Ok(Offsets {
            task_tgid: types.member(task, "task_struct", "tgid")?,
            task_flags: types.member(task, "task_struct", "flags")?,
            task_mm: types.member(task, "task_struct", "mm")?,
            task_in_execve_bit: types.member_bits(task, b"in_execve", MAX_NESTING),
            task_signal: types.member(task, "task_struct", "signal")?,
            signal_live: types.member(signal, "signal_struct", "live")?,
        })
    }
}

struct Types<'a> {
    strings: &'a [u8],
    /// Start of each type's record in `bytes`; type ids start at 1.
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

    fn find_struct(&self, name: &'static str) -> Result<usize, Error> {
        let found = self.starts.iter().find(|&&start| {
            let start = start as usize;
            word(self.bytes, start + 4).map(kind) == Some(KIND_STRUCT)
                && word(self.bytes, start).map(|offset| self.name(offset)) == Some(name.as_bytes())
        });
        let found = found.ok_or(Error::MissingKernelField {
            of: name,
            field: "",
        })?;
        Ok(*found as usize)
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
            // With the kind flag the upper byte is the size of a bit field.
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

/// Bytes that follow a type's twelve, by kind (include/uapi/linux/btf.h).
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

    /// The running kernel's offsets are sane, where it tells them.
    #[test]
    fn running_kernel() {
        if !Path::new(VMLINUX).exists() {
            eprintln!("skipped: {VMLINUX} does not exist");
            return;
        }
        let offsets = Offsets::of_running_kernel().unwrap();
        let fields = [
            offsets.task_tgid,
            offsets.task_flags,
            offsets.task_mm,
            offsets.task_signal,
        ];
        assert!(fields.iter().all(|o| *o > 0 && *o < 16_384 && o % 4 == 0));
        assert!(offsets.signal_live < 4096);
        // Every kernel up to now has it, and the tests of execve rely on it.
        let bit = offsets.task_in_execve_bit.unwrap();
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
