//! SOCKETS and SOCKETS_MORE: records of connected sockets.

use core::mem::offset_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::layout::layout;
use super::{Addr, BackendRef, ServiceIndex};

/// A socket that is connected to a service.
///
/// In SOCKETS the record of a socket is at slot `cookie & mask`. The socket claims the slot by a compare-and-exchange of
/// `cookie` from zero. The record is valid while `cookie` is not zero and `sequence` is even and not zero; a writer makes
/// `sequence` odd before it writes and even afterwards (see [`crate::logic::record`]). If the slot is taken, the
/// record of the socket is in SOCKETS_MORE, and `spilled` of the slot counts those records.
///
/// The key of an MPTCP socket is its address in the kernel: `connect()` runs with the cookie of the first subflow, and
/// all later hooks with another cookie, but both can obtain that address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct SocketRecord {
    /// `bpf_get_socket_cookie`, or the kernel's address of an MPTCP socket; zero while the slot is free.
    pub cookie: u64,
    /// Even and not zero if the record is complete, odd while it is being written.
    pub sequence: u32,
    /// SOCKETS only: number of records of this slot that are in SOCKETS_MORE.
    pub spilled: u32,
    /// `bpf_get_netns_cookie` of the socket.
    pub netns: u64,
    /// `bpf_ktime_get_coarse_ns` at connect: nanoseconds of CLOCK_MONOTONIC.
    pub time: u64,
    /// Destination that the process requested.
    pub original_addr: Addr,
    /// Address of the backend that was selected.
    pub backend_addr: Addr,
    /// Port of `original_addr`, host byte order.
    pub original_port: u16,
    /// Port of `backend_addr`, host byte order.
    pub backend_port: u16,
    /// The backend.
    pub backend: BackendRef,
    /// The service port.
    pub service: ServiceIndex,
    /// Cookie that sock_diag lists the socket with: `cookie`, or that of the first subflow of an MPTCP socket.
    pub socket: u64,
    /// IANA protocol number: 6 or 17.
    pub proto: u8,
    /// Zero.
    pub pad: [u8; 7],
    /// Zero: room for fields of later builds.
    pub reserved: [u64; 4],
}

layout!(SocketRecord: size 128, align 8 {
    cookie: 0,
    sequence: 8,
    spilled: 12,
    netns: 16,
    time: 24,
    original_addr: 32,
    backend_addr: 48,
    original_port: 64,
    backend_port: 66,
    backend: 68,
    service: 76,
    socket: 80,
    proto: 88,
    pad: 89,
    reserved: 96,
});

impl SocketRecord {
    /// Size in bytes of the part that is in use.
    pub const USED: usize = offset_of!(Self, reserved);
}
