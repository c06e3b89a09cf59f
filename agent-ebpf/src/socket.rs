//! Finds the connection to which a socket, or a file descriptor of the current process, belongs.

use agent_ebpf::postgres::Connection;

use crate::{
    fields::{
        FDTABLE_FD, FDTABLE_MAX_FDS, FILE_INODE, FILE_PRIVATE_DATA, FILES_FDT, INODE_MODE,
        NET_NS_INUM, Pointer, SOCK_DADDR, SOCK_DPORT, SOCK_FAMILY, SOCK_NET, SOCK_NUM,
        SOCK_RCV_SADDR, SOCK_V6_DADDR, SOCK_V6_RCV_SADDR, SOCKET_SK, TASK_FILES,
        UNIX_ADDRESS_LENGTH, UNIX_ADDRESS_NAME, UNIX_SOCK_ADDR, UNIX_SOCK_PEER, field,
    },
    maps::{CONNECTIONS, SERVER_PORTS},
    state::SendRing,
    task,
};

const AF_UNIX: u16 = 1;

const AF_INET: u16 = 2;

const AF_INET6: u16 = 10;

/// File type bits of an inode's mode, and the type of a socket (include/uapi/linux/stat.h).
const S_IFMT: u16 = 0o170_000;

const S_IFSOCK: u16 = 0o140_000;

/// The `struct sock` of a file descriptor of the current process. `None` if it is not a socket.
#[inline(always)]
pub fn of_descriptor(descriptor: u32) -> Option<Pointer> {
    // SAFETY: every base is a kernel object of the type that the offset belongs to; a bad address makes the
    // read fail.
    unsafe {
        let files: Pointer = field(task::current(), TASK_FILES.load())?;
        let table: Pointer = field(files, FILES_FDT.load())?;
        let size: u32 = field(table, FDTABLE_MAX_FDS.load())?;
        if descriptor >= size {
            return None;
        }
        let files: *const Pointer = field(table, FDTABLE_FD.load())?;
        let file: Pointer = field(files.wrapping_add(descriptor as usize).cast(), 0)?;
        let inode: Pointer = field(file, FILE_INODE.load())?;
        let mode: u16 = field(inode, INODE_MODE.load())?;
        if mode & S_IFMT != S_IFSOCK {
            return None;
        }
        let socket: Pointer = field(file, FILE_PRIVATE_DATA.load())?;
        field(socket, SOCKET_SK.load())
    }
}

/// A message on a connection to a PostgreSQL server, by its direction. The second field is the connection's
/// entry in [`CONNECTIONS`] if it was looked up already.
pub enum Message {
    /// From the client to the server.
    Request(Connection, Option<*mut SendRing>),
    /// From the server to the client.
    Answer(Connection, Option<*mut SendRing>),
}

/// Classifies what the current process sends on a socket of any family. `None` if neither end is a server's.
#[inline(always)]
pub fn sent(sock: Pointer) -> Option<Message> {
    // SAFETY: `sock` is a `struct sock`.
    unsafe {
        match field(sock, SOCK_FAMILY.load())? {
            AF_UNIX => unix(field(sock, UNIX_SOCK_PEER.load())?),
            family => tcp(sock, family),
        }
    }
}

/// As [`sent`], for a socket that is known to be TCP's.
#[inline(always)]
pub fn sent_by_tcp(sock: Pointer) -> Option<Message> {
    // SAFETY: `sock` is a `struct sock`.
    tcp(sock, unsafe { field(sock, SOCK_FAMILY.load())? })
}

/// As [`sent`], for a Unix socket that is given as a `struct socket`.
#[inline(always)]
pub fn sent_by_unix(socket: Pointer) -> Option<Message> {
    // SAFETY: `socket` is a `struct socket` of a Unix socket.
    unsafe {
        let sock: Pointer = field(socket, SOCKET_SK.load())?;
        unix(field(sock, UNIX_SOCK_PEER.load())?)
    }
}

/// Classifies what was just put into the receive queue of a Unix socket, whose reader is not woken yet.
/// `None` for sockets of other families.
#[inline(always)]
pub fn received_by_unix(sock: Pointer) -> Option<Message> {
    // SAFETY: `sock` is a `struct sock`.
    match unsafe { field(sock, SOCK_FAMILY.load())? } {
        AF_UNIX => unix(sock),
        _ => None,
    }
}

/// Classifies what the Unix socket `to` receives or is about to receive. The path of a connection that is
/// in [`CONNECTIONS`] is not checked again, because each read of kernel memory costs about as much as a
/// lookup in the map. If the memory of a closed server socket was reused for another socket, sends to that
/// one are noted until the entry is evicted. This is harmless, since no backend searches for them.
#[inline(always)]
fn unix(to: Pointer) -> Option<Message> {
    // SAFETY: `to` and its peer are Unix sockets, or the reads fail.
    unsafe {
        let address: Pointer = field(to, UNIX_SOCK_ADDR.load())?;
        // Clients seldom bind their socket, so a socket with an address is most likely the server's.
        let is_named = !address.is_null();
        if is_named {
            let connection = of_unix(to);
            if let Some(ring) = CONNECTIONS.get_ptr_mut(connection) {
                return Some(Message::Request(connection, Some(ring)));
            }
        }
        let from: Pointer = field(to, UNIX_SOCK_PEER.load())?;
        // A listening socket, which is woken by a new client, has no peer.
        if from.is_null() {
            return None;
        }
        if is_named && is_server_path(address)? {
            return Some(Message::Request(of_unix(to), None));
        }
        let connection = of_unix(from);
        if let Some(ring) = CONNECTIONS.get_ptr_mut(connection) {
            return Some(Message::Answer(connection, Some(ring)));
        }
        is_server_path(field(from, UNIX_SOCK_ADDR.load())?)?
            .then_some(Message::Answer(connection, None))
    }
}

/// Classifies what a TCP socket sends, by its two ports.
#[inline(always)]
fn tcp(sock: Pointer, family: u16) -> Option<Message> {
    // SAFETY: `sock` is a `struct sock`.
    unsafe {
        let remote = u16::from_be(field(sock, SOCK_DPORT.load())?);
        if is_server_port(remote)? {
            return from_client(sock, family, remote)
                .map(|connection| Message::Request(connection, None));
        }
        let local: u16 = field(sock, SOCK_NUM.load())?;
        if is_server_port(local)? {
            return from_server(sock, family, local)
                .map(|connection| Message::Answer(connection, None));
        }
        None
    }
}

#[inline(always)]
fn is_server_port(port: u16) -> Option<bool> {
    let word = *SERVER_PORTS.get(u32::from(port) / 64)?;
    Some(word >> (port % 64) & 1 != 0)
}

/// The name of a TCP connection, read from the client's socket.
///
/// # Safety
/// If `sock` is a valid address, it must be that of a `struct sock`; a bad address only makes reads fail.
#[inline(always)]
unsafe fn from_client(sock: Pointer, family: u16, server_port: u16) -> Option<Connection> {
    // SAFETY: guaranteed by the caller.
    unsafe {
        let (local, remote) = addresses(sock, family)?;
        Some(Connection {
            client: local,
            server: remote,
            client_port: field(sock, SOCK_NUM.load())?,
            server_port,
            network_namespace: namespace_of_loopback(sock, local)?,
        })
    }
}

/// The name of a TCP connection, read from the server's socket. Equal to that from the client's.
///
/// # Safety
/// If `sock` is a valid address, it must be that of a `struct sock`; a bad address only makes reads fail.
#[inline(always)]
unsafe fn from_server(sock: Pointer, family: u16, server_port: u16) -> Option<Connection> {
    // SAFETY: guaranteed by the caller.
    unsafe {
        let (local, remote) = addresses(sock, family)?;
        Some(Connection {
            client: remote,
            server: local,
            client_port: u16::from_be(field(sock, SOCK_DPORT.load())?),
            server_port,
            network_namespace: namespace_of_loopback(sock, remote)?,
        })
    }
}

/// The connection of a server's socket.
#[inline(always)]
pub fn of_server(sock: Pointer) -> Option<Connection> {
    // SAFETY: `sock` is a `struct sock`.
    unsafe {
        match field(sock, SOCK_FAMILY.load())? {
            AF_UNIX => Some(of_unix(sock)),
            family => from_server(sock, family, field(sock, SOCK_NUM.load())?),
        }
    }
}

/// The connection of a server's Unix socket.
#[inline(always)]
fn of_unix(server: Pointer) -> Connection {
    // If the compiler knew that these are zeros, it would clear them by a loop over bytes.
    let zero = core::hint::black_box(0);
    Connection {
        client: [server as u64, zero],
        server: [zero, zero],
        client_port: 0,
        server_port: 0,
        network_namespace: 0,
    }
}

/// The local and the remote address of an IPv4 or IPv6 socket.
///
/// # Safety
/// If `sock` is a valid address, it must be that of a `struct sock`; a bad address only makes reads fail.
#[inline(always)]
unsafe fn addresses(sock: Pointer, family: u16) -> Option<([u64; 2], [u64; 2])> {
    // SAFETY: guaranteed by the caller.
    unsafe {
        match family {
            AF_INET => Some((
                mapped(field(sock, SOCK_RCV_SADDR.load())?),
                mapped(field(sock, SOCK_DADDR.load())?),
            )),
            AF_INET6 => Some((
                field(sock, SOCK_V6_RCV_SADDR.load())?,
                field(sock, SOCK_V6_DADDR.load())?,
            )),
            _ => None,
        }
    }
}

/// The IPv4-mapped IPv6 address `::ffff:a.b.c.d`, from an IPv4 address in network byte order.
const fn mapped(address: u32) -> [u64; 2] {
    [0, 0xffff_0000 | (address as u64) << 32]
}

/// The inode number of the network namespace if `address` is a loopback address, else 0. Every namespace
/// has the same loopback addresses.
///
/// # Safety
/// If `sock` is a valid address, it must be that of a `struct sock`; a bad address only makes reads fail.
#[inline(always)]
unsafe fn namespace_of_loopback(sock: Pointer, address: [u64; 2]) -> Option<u32> {
    const V6: [u64; 2] = [0, 1 << 56];
    let v4 = address[0] == 0 && address[1] & 0xff_ffff_ffff == 0x7f_ffff_0000;
    if !v4 && address != V6 {
        return Some(0);
    }
    // SAFETY: guaranteed by the caller.
    unsafe {
        let net: Pointer = field(sock, SOCK_NET.load())?;
        field(net, NET_NS_INUM.load())
    }
}

/// Whether the address of a Unix socket ends in `.s.PGSQL.` and a port, which is where PostgreSQL listens
/// (src/include/libpq/pqcomm.h, `UNIXSOCK_PATH`). An accepted socket has the address of its listener.
///
/// # Safety
/// If `address` is valid, it must be that of a `struct unix_address`; a bad one only makes reads fail.
#[inline(always)]
unsafe fn is_server_path(address: Pointer) -> Option<bool> {
    const NAME: u64 = u64::from_le_bytes(*b".s.PGSQL");
    // SAFETY: guaranteed by the caller.
    let tail: [u64; 2] = unsafe {
        let length: u32 = field(address, UNIX_ADDRESS_LENGTH.load())?;
        // The last 16 bytes of the address end in the name, a dot, one to five digits and a NUL.
        let end = UNIX_ADDRESS_NAME.load().wrapping_add(length);
        field(address, end.wrapping_sub(16))?
    };
    let mut found = false;
    let mut at = 1;
    while at <= 5 {
        found |= tail[0] >> (8 * at) | tail[1] << (64 - 8 * at) == NAME;
        at += 1;
    }
    Some(found)
}
