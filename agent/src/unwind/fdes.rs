//! Finds the frame description entry (FDE) to which an address belongs.

use crate::object::Section;
use gimli::{BaseAddresses, CieOrFde, EhFrame, EndianSlice, LittleEndian, UnwindSection};

/// The FDEs of a file, sorted by their start. An address can only belong to the last one that is not above
/// it, which is also how the run-time unwinder (libgcc, `unwind-dw2-fde-dip.c`) decides.
#[derive(Debug)]
pub(super) enum Fdes<'data> {
    /// From the search table that the linker wrote.
    Header {
        /// svma of `.eh_frame_hdr`, to which the table's numbers are relative.
        base: u64,
        /// For each FDE, the start of its function and its own address, both `sdata4`.
        table: &'data [[u8; 8]],
        /// svma of `.eh_frame`.
        eh_frame: u64,
    },
    /// From a scan of `.eh_frame`, if there is no usable search table: start (svma) and offset in the
    /// section, sorted.
    Scanned(Vec<(u64, usize)>),
}

/// Start of `.eh_frame_hdr` as every linker writes it (GNU ld, gold, lld, mold): version 1, a pc-relative
/// pointer to `.eh_frame`, a count, and a table of `datarel | sdata4`. With any other header `.eh_frame` is
/// scanned.
const HEADER: [u8; 4] = [1, 0x1b, 0x03, 0x3b];

/// Most entries that are scanned, some ten times as many as a browser has. A file with more was crafted to
/// exhaust memory.
const MAX_SCANNED: usize = 1 << 23;

impl<'data> Fdes<'data> {
    pub(super) fn new(
        eh_frame: Section<'data>,
        hdr: Option<Section<'data>>,
        bases: &BaseAddresses,
    ) -> Fdes<'data> {
        if let Some(fdes) = hdr.and_then(|hdr| Self::from_header(eh_frame, hdr)) {
            return fdes;
        }
        Self::scan(eh_frame, bases)
    }

    /// Uses the search table. `None` unless it is in the known form, complete, sorted and not empty.
    fn from_header(eh_frame: Section<'data>, hdr: Section<'data>) -> Option<Fdes<'data>> {
        let (header, rest) = hdr.data.split_at_checked(12)?;
        if header[..4] != HEADER {
            return None;
        }
        let count = u32::from_le_bytes(*header.last_chunk()?);
        let (table, _) = rest.as_chunks::<8>();
        let table = table.get(..usize::try_from(count).ok()?)?;
        let fdes = Fdes::Header {
            base: hdr.svma,
            table,
            eh_frame: eh_frame.svma,
        };
        let sorted = table
            .is_sorted_by_key(|entry| relative(hdr.svma, [entry[0], entry[1], entry[2], entry[3]]));
        (count > 0 && sorted).then_some(fdes)
    }

    /// Scans the entries up to the section's end, its terminator, or the first broken one, at most
    /// [`MAX_SCANNED`].
    fn scan(eh_frame: Section<'data>, bases: &BaseAddresses) -> Fdes<'data> {
        let section = EhFrame::new(eh_frame.data, LittleEndian);
        let mut found = Vec::new();
        let mut cies = Cies::default();
        let mut entries = section.entries(bases);
        for _ in 0..MAX_SCANNED {
            let Ok(Some(entry)) = entries.next() else {
                break;
            };
            let CieOrFde::Fde(partial) = entry else {
                continue;
            };
            let fde = partial.parse(|section, bases, offset| cies.get(section, bases, offset));
            if let Ok(fde) = fde
                && fde.len() > 0
            {
                found.push((fde.initial_address(), fde.offset()));
            }
        }
        // Of several entries for one address the first in the section is kept, as linkers do.
        found.sort_unstable();
        found.dedup_by_key(|entry| entry.0);
        Fdes::Scanned(found)
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Fdes::Header { table, .. } => table.len(),
            Fdes::Scanned(entries) => entries.len(),
        }
    }

    /// The svma at which entry `index` starts; `u64::MAX` for an index after the last entry.
    pub(super) fn start(&self, index: usize) -> u64 {
        match self {
            Fdes::Header { base, table, .. } => table.get(index).map_or(u64::MAX, |entry| {
                relative(*base, [entry[0], entry[1], entry[2], entry[3]])
            }),
            Fdes::Scanned(entries) => entries.get(index).map_or(u64::MAX, |entry| entry.0),
        }
    }

    /// Offset of entry `index` in `.eh_frame`; `None` if it has none.
    pub(super) fn offset(&self, index: usize) -> Option<usize> {
        match self {
            Fdes::Header {
                base,
                table,
                eh_frame,
            } => {
                let entry = table.get(index)?;
                let svma = relative(*base, [entry[4], entry[5], entry[6], entry[7]]);
                usize::try_from(svma.checked_sub(*eh_frame)?).ok()
            }
            Fdes::Scanned(entries) => Some(entries.get(index)?.1),
        }
    }

    /// The last entry that starts at or below `svma`.
    pub(super) fn last_not_above(&self, svma: u64) -> Option<usize> {
        let above = match self {
            Fdes::Header { base, table, .. } => table.partition_point(|entry| {
                relative(*base, [entry[0], entry[1], entry[2], entry[3]]) <= svma
            }),
            Fdes::Scanned(entries) => entries.partition_point(|entry| entry.0 <= svma),
        };
        above.checked_sub(1)
    }
}

fn relative(base: u64, bytes: [u8; 4]) -> u64 {
    base.wrapping_add_signed(i64::from(i32::from_le_bytes(bytes)))
}

pub(super) type Reader<'data> = EndianSlice<'data, LittleEndian>;
pub(super) type Cie<'data> = gimli::CommonInformationEntry<Reader<'data>>;
type CieOffset = gimli::EhFrameOffset<usize>;

/// A cache of the CIEs that were read. The last one used is usually found first, because neighboring FDEs
/// share theirs. Most files have two to ten CIEs.
#[derive(Default)]
pub(super) struct Cies<'data> {
    known: Vec<(CieOffset, Cie<'data>)>,
}

/// Most CIEs in the cache. After the linker has merged them, a file has only a handful.
const MAX_KNOWN_CIES: usize = 64;

impl<'data> Cies<'data> {
    pub(super) fn get(
        &mut self,
        section: &EhFrame<Reader<'data>>,
        bases: &BaseAddresses,
        offset: CieOffset,
    ) -> gimli::Result<Cie<'data>> {
        if let Some(position) = self.known.iter().position(|(known, _)| *known == offset) {
            let cie = self.known[position].1.clone();
            // The next function very likely uses the same one.
            self.known.swap(0, position);
            return Ok(cie);
        }
        let cie = section.cie_from_offset(bases, offset)?;
        if self.known.len() == MAX_KNOWN_CIES {
            self.known.pop();
        }
        self.known.push((offset, cie.clone()));
        Ok(cie)
    }
}
