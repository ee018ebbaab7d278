//! EVENTS: what happens, one record each.

use core::mem::offset_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Addr;

/// One event. Written only while the agent asks for it in CONFIG.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct Event {
    /// Nanoseconds of CLOCK_MONOTONIC.
    pub time: u64,
    /// Socket cookie.
    pub cookie: u64,
    /// `bpf_get_netns_cookie` of the socket.
    pub netns: u64,
    /// The destination that the process asked for.
    pub addr: Addr,
    /// Its port, host byte order.
    pub port: u16,
    /// IANA protocol number.
    pub proto: u8,
    /// Zero.
    pub pad: u8,
    /// Index into SERVICES; zero where none was found.
    pub service: u32,
    /// A [`super::DropReason`].
    pub reason: u32,
    /// Process id (thread group) in the initial namespace.
    pub pid: u32,
}

const _: () = {
    assert!(size_of::<Event>() == 56 && align_of::<Event>() == 8);
    assert!(offset_of!(Event, addr) == 24);
    assert!(offset_of!(Event, port) == 40);
    assert!(offset_of!(Event, service) == 44);
    assert!(offset_of!(Event, pid) == 52);
};
