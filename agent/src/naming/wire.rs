//! The messages between the agent and its namer child: a length, then JSON. Open files are sent beside
//! them.

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

/// Largest message, bytes: the names of all frames that a recording can have, at 500 bytes each.
pub(super) const MAX_MESSAGE: usize = 128 << 20;

/// Maximum number of files that are sent with a request: the module's file, and its container's directory
/// of debug files.
pub(super) const MAX_FILES: usize = 2;

/// The kind of a module.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Kind {
    /// An ELF file, which is sent with the request.
    File,
    /// The kernel.
    Kernel,
    /// Just-in-time compiled code. Its perf map is sent with the request if it was opened earlier.
    Jit {
        /// The process.
        pid: u32,
        /// Path of its perf map.
        perf_map: PathBuf,
    },
}

/// A request to look up the addresses of a module.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Request {
    pub name: String,
    pub kind: Kind,
    pub build_id: Option<Vec<u8>>,
    /// Whether closing the file cannot block on a server.
    pub file_is_local: bool,
    /// Whether the module's file is sent; it is the first one.
    pub has_file: bool,
    /// Whether the container's directory of debug files is sent; it is the last one.
    pub has_debug_dir: bool,
    pub debug_dirs: Vec<PathBuf>,
    pub debug_info: bool,
    pub kallsyms: PathBuf,
    pub addresses: Vec<u64>,
}

/// The child's answers to a request, in this order.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Answer {
    /// One function start per address.
    Starts(Vec<Option<u64>>),
    /// It is going to read a file with this many bytes, which may take long.
    Reading(u64),
    /// The names. This answer is the last one.
    Names(Packed),
}

/// Names by address, with each text stored once.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Packed {
    texts: Vec<String>,
    /// The address, and for each function its name, system name, file (indices into `texts`) and line.
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

    /// The names by address; `None` if an index is out of range.
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

/// The bytes of a message, preceded by their length.
pub(super) fn framed(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message)?;
    let length = bytes.len() - 4;
    if length > MAX_MESSAGE {
        return Err(io::Error::other("they do not fit into one message"));
    }
    bytes[..4].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(bytes)
}

/// Decodes the length of a message. Fails if it exceeds [`MAX_MESSAGE`].
pub(super) fn length(header: [u8; 4]) -> io::Result<usize> {
    match u32::from_le_bytes(header) as usize {
        length if length <= MAX_MESSAGE => Ok(length),
        _ => Err(io::Error::other("the message is too long")),
    }
}

/// Sends bytes, and the files along with the first byte. Returns the number of bytes that were sent.
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
    // If the peer has closed the socket, this gives an error instead of SIGPIPE.
    let flags = SendFlags::NOSIGNAL;
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)
}

/// Receives the first bytes of a message, and the files that are sent with them. Returns 0 bytes if the
/// peer has closed the socket.
pub(super) fn receive(socket: impl AsFd, bytes: &mut [u8]) -> io::Result<(usize, Vec<File>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buffers = [IoSliceMut::new(bytes)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(socket, &mut buffers, &mut control, flags)?;
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::other(
            "the files sent with the message were truncated",
        ));
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

    /// Names survive packing and unpacking; an index that is out of range is refused.
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

    /// Open files are sent along with the bytes, and lengths beyond the bound are refused.
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
