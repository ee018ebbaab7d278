//! UDP_FLOWS: destinations of unconnected UDP sockets.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::layout::layout;
use super::{Addr, BackendRef, ServiceIndex};

/// Number of destinations that one unconnected socket is remembered with.
pub const DESTS_PER_SOCKET: usize = 4;

/// The kernel's spin lock in a map value. The kernel finds it in the BTF of the map by this name (`btf_find_spin_lock` in
/// `kernel/bpf/btf.c`). It reads as zero from user space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct bpf_spin_lock {
    /// Used by the kernel only.
    pub val: u32,
}

layout!(bpf_spin_lock: size 4, align 4 { val: 0 });

/// One destination that an unconnected socket sends to, and the backend that serves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct UdpDest {
    /// Address that the process sends to. All zero if the entry is free.
    pub vip: Addr,
    /// Address of the backend.
    pub backend_addr: Addr,
    /// Port of `vip`, host byte order; zero if the entry is free.
    pub vip_port: u16,
    /// Port of `backend_addr`, host byte order.
    pub backend_port: u16,
    /// The backend.
    pub backend: BackendRef,
    /// The service port.
    pub service: ServiceIndex,
    /// Time of the oldest datagram without a reply, or of the last one: nanoseconds of CLOCK_MONOTONIC. See
    /// [`crate::logic::udp_dest`].
    pub asked: u64,
    /// Number of datagrams sent that have no reply yet.
    pub unanswered: u32,
    /// Zero.
    pub pad: u32,
}

layout!(UdpDest: size 64, align 8 {
    vip: 0,
    backend_addr: 16,
    vip_port: 32,
    backend_port: 34,
    backend: 36,
    service: 44,
    asked: 48,
    unanswered: 56,
    pad: 60,
});

/// Value of UDP_FLOWS, by socket cookie: the destinations of one unconnected UDP socket. Programs read and write it while
/// they hold its lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct UdpDests {
    /// Lock of the whole value: several threads may use one socket.
    pub lock: bpf_spin_lock,
    /// Zero.
    pub pad: u32,
    /// `bpf_get_netns_cookie` of the socket.
    pub netns: u64,
    /// The destinations, in no order.
    pub dests: [UdpDest; DESTS_PER_SOCKET],
}

layout!(UdpDests: size 272, align 8 { lock: 0, pad: 4, netns: 8, dests: 16 });
