//! What the agent and its namer child say to each other: a length, then JSON; open files beside it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;

use indexmap::IndexSet;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};

use crate::symbolize::NamedFunction;

/// Largest message: names of all frames that a recording can have, at 500 bytes each.
pub(super) const MAX_MESSAGE: usize = 128 << 20;

/// Files that go with a request at most: the module's, and its container's debug directory.
pub(super) const MAX_FILES: usize = 2;

/// What a module is.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Kind {
    /// An ELF file, which goes with the request.
    File,
    /// The kernel.
    Kernel,
    /// Just-in-time compiled code; its perf map goes with the request if it was opened.
    Jit {
        /// The process.
        pid: u32,
        /// Where its map is.
        perf_map: PathBuf,
    },
}

/// The look-up of a module's addresses.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Request {
    pub name: String,
    pub kind: Kind,
    pub build_id: Option<Vec<u8>>,
    /// Whether to close the file cannot wait for a server.
    pub file_is_local: bool,
    /// Whether the first file is the module's.
    pub has_file: bool,
    /// Whether the last file is its container's debug directory.
    pub has_debug_dir: bool,
    pub debug_dirs: Vec<PathBuf>,
    pub debug_info: bool,
    pub kallsyms: PathBuf,
    pub addresses: Vec<u64>,
}

/// What the child answers, in this order.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Answer {
    /// One function start per address.
    Starts(Vec<Option<u64>>),
    /// It will read a file of so many bytes, which takes its time.
    Reading(u64),
    /// The end of the request.
    Names(Packed),
}

/// Names by address, each text once.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Packed {
    texts: Vec<String>,
    /// Address, and per function name, system name, file (indices into `texts`) and line.
    names: Vec<(u64, Vec<[u32; 4]>)>,
    pub notes: Vec<String>,
}

impl Packed {
    pub fn new(by_address: &BTreeMap<u64, Vec<NamedFunction>>, notes: Vec<String>) -> Packed {
        let mut texts: IndexSet<&str> = IndexSet::new();
        let mut text = |text| texts.insert_full(text).0 as u32;
        let names = by_address.iter().map(|(address, functions)| {
            let functions = functions.iter().map(|function| {
                let [name, system, file] =
                    [&function.name, &function.system_name, &function.file].map(|t| text(t));
                [name, system, file, function.line]
            });
            (*address, functions.collect())
        });
        let names = names.collect();
        Packed {
            names,
            texts: texts.into_iter().map(str::to_owned).collect(),
            notes,
        }
    }

    /// `None`: an index that points nowhere.
    pub fn unpack(&self) -> Option<BTreeMap<u64, Vec<NamedFunction>>> {
        let text = |index: u32| Some(self.texts.get(index as usize)?.clone());
        let function = |[name, system_name, file, line]: &[u32; 4]| {
            Some(NamedFunction {
                name: text(*name)?,
                system_name: text(*system_name)?,
                file: text(*file)?,
                line: *line,
            })
        };
        let one = |(address, functions): &(u64, Vec<[u32; 4]>)| {
            let functions: Option<Vec<_>> = functions.iter().map(function).collect();
            Some((*address, functions?))
        };
        self.names.iter().map(one).collect()
    }
}

/// A message's bytes with their length before them.
pub(super) fn framed(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message)?;
    let length = bytes.len() - 4;
    if length > MAX_MESSAGE {
        return Err(io::Error::other("its names do not fit into memory"));
    }
    bytes[..4].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(bytes)
}

/// A message's length, if it is within the bound.
pub(super) fn length(header: [u8; 4]) -> io::Result<usize> {
    match u32::from_le_bytes(header) as usize {
        length if length <= MAX_MESSAGE => Ok(length),
        _ => Err(io::Error::other("the answer is too long")),
    }
}

/// Sends bytes, the files with the first of them. Returns how many bytes were taken.
pub(super) fn send(
    socket: impl AsFd,
    bytes: &[u8],
    files: &[BorrowedFd<'_>],
) -> rustix::io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(files));
    }
    // Without a signal where the other side has gone.
    let flags = SendFlags::NOSIGNAL;
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)
}

/// Receives the first bytes of a message, and the files that come with them. 0 bytes: the other side has gone.
pub(super) fn receive(socket: impl AsFd, bytes: &mut [u8]) -> io::Result<(usize, Vec<File>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buffers = [IoSliceMut::new(bytes)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(socket, &mut buffers, &mut control, flags)?;
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::other("files were lost on the way"));
    }
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            files.extend(received.map(File::from));
        }
    }
    Ok((received.bytes, files))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};

    /// What is packed is unpacked; an index that points nowhere is refused.
    #[test]
    fn names_round_trip() {
        let function = |name: &str| NamedFunction {
            name: name.to_owned(),
            system_name: name.to_owned(),
            file: String::new(),
            line: 7,
        };
        let names = BTreeMap::from([
            (1, vec![function("a"), function("b")]),
            (u64::MAX, vec![function("a")]),
        ]);
        let mut packed = Packed::new(&names, vec!["note".to_owned()]);
        assert_eq!(packed.texts, ["a", "", "b"]);
        assert_eq!(packed.unpack(), Some(names));
        packed.names[0].1[0][0] = 99;
        assert_eq!(packed.unpack(), None);
    }

    /// Open files go along, and lengths beyond the bound are refused.
    #[test]
    fn files_go_along() {
        let (here, there) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"content").unwrap();
        assert_eq!(send(&here, b"abcd", &[file.as_fd()]).unwrap(), 4);
        let mut bytes = [0; 4];
        let (count, mut files) = receive(&there, &mut bytes).unwrap();
        assert_eq!((count, &bytes, files.len()), (4, b"abcd", 1));
        let mut text = String::new();
        files[0].rewind().unwrap();
        files[0].read_to_string(&mut text).unwrap();
        assert_eq!(text, "content");
        drop(here);
        assert_eq!(receive(&there, &mut bytes).unwrap().0, 0);
        assert!(length([0xff; 4]).is_err());
    }
}
