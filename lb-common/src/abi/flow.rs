//! UDP_FLOWS: unconnected UDP sockets.

use core::mem::offset_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Addr;

/// How many destinations one unconnected socket is remembered with.
pub const FLOWS_PER_SOCKET: usize = 4;

/// The kernel's lock in a map value, known to it by this name (`btf_find_spin_lock` in `kernel/bpf/btf.c`). Reads as
/// zero from user space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct bpf_spin_lock {
    /// The kernel's.
    pub val: u32,
}

/// One destination that an unconnected socket sends to, and the backend that it stays with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct UdpFlow {
    /// The frontend that the process names. All zero where the entry is free.
    pub vip: Addr,
    /// The backend that it got.
    pub backend_addr: Addr,
    /// Port of `vip`, host byte order; zero where the entry is free.
    pub vip_port: u16,
    /// Port of `backend_addr`, host byte order.
    pub backend_port: u16,
    /// Index into BACKENDS.
    pub backend: u32,
    /// Generation of that entry.
    pub generation: u32,
    /// Index into SERVICES.
    pub service: u32,
    /// When the process last sent to it, nanoseconds of CLOCK_MONOTONIC.
    pub asked: u64,
    /// Datagrams sent that have no answer yet.
    pub unanswered: u32,
    /// Zero.
    pub pad: u32,
}

const _: () = {
    assert!(size_of::<UdpFlow>() == 64 && align_of::<UdpFlow>() == 8);
    assert!(offset_of!(UdpFlow, vip_port) == 32);
    assert!(offset_of!(UdpFlow, backend) == 36);
    assert!(offset_of!(UdpFlow, asked) == 48);
    assert!(offset_of!(UdpFlow, unanswered) == 56);
};

/// Value of UDP_FLOWS: the destinations of one unconnected UDP socket. Read and written under its lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct UdpFlows {
    /// Two threads may use one socket.
    pub lock: bpf_spin_lock,
    /// Zero.
    pub pad: u32,
    /// `bpf_get_netns_cookie` of the socket.
    pub netns: u64,
    /// See [`UdpFlow`].
    pub flows: [UdpFlow; FLOWS_PER_SOCKET],
}

const _: () = {
    assert!(size_of::<UdpFlows>() == 272 && align_of::<UdpFlows>() == 8);
    assert!(offset_of!(UdpFlows, netns) == 8);
    assert!(offset_of!(UdpFlows, flows) == 16);
};
