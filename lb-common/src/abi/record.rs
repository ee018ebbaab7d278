//! SOCKETS and SOCKETS_MORE: connected sockets.

use core::mem::offset_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Addr;

/// A socket that was connected to a service.
///
/// In SOCKETS the record of a socket stands at slot `cookie & mask`, claimed by compare-and-exchange of `cookie` from
/// zero. It counts while `cookie` is not zero and `sequence` is even and not zero; a writer makes `sequence` odd
/// before and even after it (see [`crate::logic::record`]). A socket whose slot is taken has its record in
/// SOCKETS_MORE, and `spilled` of the slot counts those.
///
/// The key of an MPTCP socket is the kernel's address of it: `connect()` is seen with the cookie of the first subflow,
/// everything later with another, but both can tell the address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct SocketRecord {
    /// `bpf_get_socket_cookie` (see above for MPTCP); zero while the slot is free.
    pub cookie: u64,
    /// See above.
    pub sequence: u32,
    /// SOCKETS only: how many records of this slot are in SOCKETS_MORE.
    pub spilled: u32,
    /// `bpf_get_netns_cookie` of the socket.
    pub netns: u64,
    /// `bpf_ktime_get_coarse_ns` at connect: nanoseconds of CLOCK_MONOTONIC.
    pub time: u64,
    /// The destination that the process asked for.
    pub original_addr: Addr,
    /// The backend that it got.
    pub backend_addr: Addr,
    /// Port of `original_addr`, host byte order.
    pub original_port: u16,
    /// Port of `backend_addr`, host byte order.
    pub backend_port: u16,
    /// Index into BACKENDS.
    pub backend: u32,
    /// Generation of that entry.
    pub generation: u32,
    /// Index into SERVICES.
    pub service: u32,
    /// The cookie that sock_diag lists the socket with: `cookie`, or that of the first subflow of an MPTCP socket.
    pub socket: u64,
    /// IANA protocol number: 6 or 17.
    pub proto: u8,
    /// Zero.
    pub pad: [u8; 7],
}

const _: () = {
    assert!(size_of::<SocketRecord>() == 96 && align_of::<SocketRecord>() == 8);
    assert!(offset_of!(SocketRecord, sequence) == 8);
    assert!(offset_of!(SocketRecord, spilled) == 12);
    assert!(offset_of!(SocketRecord, netns) == 16);
    assert!(offset_of!(SocketRecord, time) == 24);
    assert!(offset_of!(SocketRecord, original_addr) == 32);
    assert!(offset_of!(SocketRecord, backend_addr) == 48);
    assert!(offset_of!(SocketRecord, original_port) == 64);
    assert!(offset_of!(SocketRecord, backend) == 68);
    assert!(offset_of!(SocketRecord, service) == 76);
    assert!(offset_of!(SocketRecord, socket) == 80);
    assert!(offset_of!(SocketRecord, proto) == 88);
};
