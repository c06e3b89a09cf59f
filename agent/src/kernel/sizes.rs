//! The number of entries in the maps of the kernel programs.

use std::{
    collections::BTreeMap,
    ffi::c_long,
    os::fd::{AsFd as _, AsRawFd as _},
};

use aya::maps::{Map, MapData};

use super::Kernel;

/// The command `BPF_MAP_GET_NEXT_KEY` of `bpf(2)`.
const GET_NEXT_KEY: c_long = 4;

/// The part of `union bpf_attr` that the command reads.
#[repr(C)]
struct NextKey {
    map_fd: u32,
    padding: u32,
    key: u64,
    next_key: u64,
}

impl Kernel {
    /// The number of entries of every hash map, by the map's name in lower case.
    pub fn entries(&self) -> BTreeMap<String, u64> {
        let mut entries = BTreeMap::new();
        entries.insert("processes".to_owned(), self.spaces().len() as u64);
        entries.insert("targets".to_owned(), self.selected().len() as u64);
        for (name, map) in self.ebpf.maps() {
            if let Map::LruHashMap(map) | Map::HashMap(map) = map {
                entries.insert(name.to_lowercase(), count(map));
            }
        }
        entries
    }
}

/// The number of entries of a map of any type. The iteration may start again when kernel
/// programs change the map meanwhile, so it ends at twice the map's capacity.
fn count(map: &MapData) -> u64 {
    let Ok(info) = map.info() else {
        return 0;
    };
    let bytes = info.key_size() as usize;
    let (mut key, mut next) = (vec![0u8; bytes], vec![0u8; bytes]);
    let mut found = 0;
    while found < 2 * u64::from(info.max_entries()) {
        let attributes = NextKey {
            map_fd: map.fd().as_fd().as_raw_fd().cast_unsigned(),
            padding: 0,
            // With a null key the kernel returns the map's first key.
            key: if found == 0 { 0 } else { key.as_ptr() as u64 },
            next_key: next.as_mut_ptr() as u64,
        };
        // SAFETY: the kernel reads the attributes and one key, and writes one key; both buffers have its size.
        let failed = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                GET_NEXT_KEY,
                &raw const attributes,
                size_of::<NextKey>(),
            )
        };
        if failed != 0 {
            break;
        }
        found += 1;
        std::mem::swap(&mut key, &mut next);
    }
    found
}
