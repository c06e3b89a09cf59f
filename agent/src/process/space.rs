//! The executable mappings of a process.

use std::{cell::Cell, ffi::OsStr, ops::Deref, os::unix::ffi::OsStrExt as _, path::PathBuf};

use crate::kernel::MappedObject;

/// Maximum number of mappings that are kept of a process: twice as many as the kernel is given
/// ([`agent_ebpf::limits::MAX_MAPPINGS`]), because the kernel does not report what is unmapped.
/// If there are more, the process is read again.
pub const MAX_KEPT_MAPPINGS: usize = 2 * agent_ebpf::limits::MAX_MAPPINGS;

/// The number of a mapped file in one version, or of the vDSO. A number is never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectId(pub u32);

/// Where the code of a mapping comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// An ELF image.
    Object(ObjectId),
    /// Memory of the process alone (just-in-time compiled code), or a file that is not an ELF file.
    Private,
    /// A file that could not be opened: the process had ended, too many files are open, or the
    /// file system does not answer.
    Lost,
}

/// An executable mapping, and where its code comes from once that was looked up. The answer
/// never changes: a file that is overwritten later has another version, and is mapped anew.
#[derive(Clone, Debug)]
pub struct ExecutableMapping {
    object: MappedObject,
    /// `None` until it has been looked up.
    pub backing: Cell<Option<Backing>>,
}

/// The number of mappings of a process whose paths are kept in full.
const MAX_LONG_NAMES: usize = 1024;

/// Bytes that are kept of the ends of all further paths, so that the paths of a process take
/// some megabytes at most.
const MAX_NAME: usize = 256;

impl ExecutableMapping {
    /// Makes a mapping of a process that has `others` mappings already.
    fn new(mut object: MappedObject, others: usize) -> ExecutableMapping {
        let name = object.name.as_os_str().as_bytes();
        if others >= MAX_LONG_NAMES && name.len() > MAX_NAME {
            let end = OsStr::from_bytes(&name[name.len() - MAX_NAME..]);
            object.name = PathBuf::from(end.to_owned());
        }
        ExecutableMapping {
            object,
            backing: Cell::new(None),
        }
    }
}

impl Deref for ExecutableMapping {
    type Target = MappedObject;

    fn deref(&self) -> &MappedObject {
        &self.object
    }
}

/// The executable mappings of a process. A parent and its children share one value until one of
/// them changes its mappings.
#[derive(Clone, Debug, Default)]
pub struct AddressSpace {
    /// Ordered by address, not overlapping.
    mappings: Vec<ExecutableMapping>,
}

impl AddressSpace {
    /// An address space with these mappings; those beyond [`MAX_KEPT_MAPPINGS`] are left out.
    pub fn new(mut mappings: Vec<MappedObject>) -> AddressSpace {
        mappings.sort_by_key(|mapping| mapping.start);
        mappings.truncate(MAX_KEPT_MAPPINGS);
        AddressSpace {
            mappings: mappings
                .into_iter()
                .enumerate()
                .map(|(others, mapping)| ExecutableMapping::new(mapping, others))
                .collect(),
        }
    }

    /// The mapping that contains `avma`.
    pub fn find(&self, avma: u64) -> Option<&ExecutableMapping> {
        let after = self.mappings.partition_point(|m| m.start <= avma);
        let mapping = &self.mappings[after.checked_sub(1)?];
        (avma < mapping.end).then_some(mapping)
    }

    /// All mappings, ordered by address.
    pub fn mappings(&self) -> &[ExecutableMapping] {
        &self.mappings
    }

    /// Whether both have the same code at the same addresses. Paths are not compared, because
    /// the kernel's events and `/proc` may give one file two names.
    pub fn is_like(&self, other: &AddressSpace) -> bool {
        let place = |m: &ExecutableMapping| (m.start, m.end, m.offset, m.file);
        let (own, others) = (self.mappings.iter(), other.mappings.iter());
        own.map(place).eq(others.map(place))
    }

    /// Whether exactly this mapping is known, with the file's current version. If the file was looked
    /// up before, it may have been overwritten before it was mapped again, so the answer is then false.
    pub fn is_up_to_date(&self, object: &MappedObject) -> bool {
        self.find(object.start).is_some_and(|known| {
            known.object == *object && (known.file.is_none() || known.backing.get().is_none())
        })
    }

    /// Adds a mapping, which replaces what it covers. The kernel does not report unmapped
    /// memory, so an old mapping is only forgotten when something else is mapped there. Returns
    /// false if there is no room for another mapping.
    pub fn add(&mut self, added: MappedObject) -> bool {
        let first = self.mappings.partition_point(|m| m.end <= added.start);
        let last = self.mappings.partition_point(|m| m.start < added.end);
        let covered = &self.mappings[first..last.max(first)];
        let left = covered.first().filter(|m| m.start < added.start).cloned();
        let right = covered.last().filter(|m| m.end > added.end).cloned();
        let left = left.map(|mut left| {
            left.object.end = added.start;
            left
        });
        let right = right.map(|mut right| {
            right.object.offset += added.end - right.start;
            right.object.start = added.end;
            right
        });
        let new = left
            .into_iter()
            .chain([ExecutableMapping::new(added, self.mappings.len())])
            .chain(right);
        let new: Vec<ExecutableMapping> = new.collect();
        let removed = last.saturating_sub(first);
        if self.mappings.len() - removed + new.len() > MAX_KEPT_MAPPINGS {
            return false;
        }
        self.mappings.splice(first..first + removed, new);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::kernel::FileKey;

    fn mapping(start: u64, end: u64, offset: u64) -> MappedObject {
        MappedObject {
            start,
            end,
            offset,
            file: None,
            name: PathBuf::from(format!("{start:x}")),
        }
    }

    fn bounds(space: &AddressSpace) -> Vec<(u64, u64, u64)> {
        let mappings = space.mappings().iter();
        mappings.map(|m| (m.start, m.end, m.offset)).collect()
    }

    /// A new mapping replaces what it covers, and leaves the rest unchanged.
    #[test]
    fn overlapping_mappings() {
        let mut space =
            AddressSpace::new(vec![mapping(0x1000, 0x9000, 0), mapping(0xa000, 0xb000, 0)]);
        assert!(space.add(mapping(0x3000, 0x5000, 7)));
        assert_eq!(
            bounds(&space),
            [
                (0x1000, 0x3000, 0),
                (0x3000, 0x5000, 7),
                (0x5000, 0x9000, 0x4000),
                (0xa000, 0xb000, 0)
            ]
        );
        assert_eq!(space.find(0x4fff).unwrap().offset, 7);
        assert!(space.find(0x9000).is_none());
        assert!(space.find(0).is_none());
        assert!(space.add(mapping(0x2000, 0xa800, 1)));
        let expected = [
            (0x1000, 0x2000, 0),
            (0x2000, 0xa800, 1),
            (0xa800, 0xb000, 0x800),
        ];
        assert_eq!(bounds(&space), expected);
        assert!(space.add(mapping(0x10000, 0x11000, 0)));
    }

    /// A file that is mapped again is up to date only if it has not been looked up yet. Anonymous memory always is.
    #[test]
    fn mapped_again() {
        let anonymous = mapping(0x1000, 0x2000, 0);
        let file = MappedObject {
            file: Some(FileKey {
                major: 8,
                minor: 1,
                inode: 7,
            }),
            ..mapping(0x3000, 0x4000, 0)
        };
        let mut space = AddressSpace::new(vec![anonymous.clone(), file.clone()]);
        assert!(space.is_up_to_date(&anonymous) && space.is_up_to_date(&file));
        for known in space.mappings() {
            known.backing.set(Some(Backing::Private));
        }
        assert!(space.is_up_to_date(&anonymous) && !space.is_up_to_date(&file));
        assert!(space.add(file.clone()));
        assert!(space.is_up_to_date(&file));
    }

    /// The number of kept mappings is bounded, however many mappings a process makes.
    #[test]
    fn bounded() {
        let mut space = AddressSpace::default();
        let all = MAX_KEPT_MAPPINGS as u64;
        for at in 0..all {
            assert!(space.add(mapping(at * 0x2000, at * 0x2000 + 0x1000, 0)));
        }
        assert!(!space.add(mapping(all * 0x2000, all * 0x2000 + 1, 0)));
        assert!(
            space.add(mapping(0, 0x1000, 9)),
            "what it replaces makes room"
        );
        assert_eq!(space.mappings().len(), MAX_KEPT_MAPPINGS);
    }
}
