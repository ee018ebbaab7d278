//! EVENTS: what happens, one record each.

use core::mem::offset_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Addr;

/// One event. Written only while somebody asks for its kind in CONFIG.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct Event {
    /// Nanoseconds of CLOCK_MONOTONIC.
    pub time: u64,
    /// Socket cookie; zero for packets.
    pub cookie: u64,
    /// `bpf_get_netns_cookie` of the socket; zero for packets.
    pub netns: u64,
    /// Where a packet came from; all zero for sockets.
    pub client: Addr,
    /// The destination that was asked for.
    pub addr: Addr,
    /// The backend that it got; all zero where it got none.
    pub backend_addr: Addr,
    /// Port of `addr`, host byte order.
    pub port: u16,
    /// Port of `backend_addr`, host byte order.
    pub backend_port: u16,
    /// IANA protocol number.
    pub proto: u8,
    /// An [`EventKind`].
    pub kind: u8,
    /// Port of `client`, host byte order.
    pub client_port: u16,
    /// Index into SERVICES; zero where none was found.
    pub service: u32,
    /// A [`super::DropReason`]; of meaning for [`EventKind::Refused`] and [`EventKind::Rejected`] only.
    pub reason: u32,
    /// Process id (thread group) in the initial namespace; zero for packets.
    pub pid: u32,
    /// Zero.
    pub pad2: u32,
}

const _: () = {
    assert!(size_of::<Event>() == 96 && align_of::<Event>() == 8);
    assert!(offset_of!(Event, addr) == 40);
    assert!(offset_of!(Event, port) == 72);
    assert!(offset_of!(Event, proto) == 76);
    assert!(offset_of!(Event, service) == 80);
    assert!(offset_of!(Event, pid) == 88);
};

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum EventKind {
    /// A socket was connected to a backend.
    Connected = 1,
    /// An unconnected socket sent a datagram to a backend.
    Sent = 2,
    /// A call was refused.
    Refused = 3,
    /// A socket was destroyed, because its backend was removed.
    Destroyed = 4,
    /// A packet began a flow to a backend.
    Translated = 5,
    /// A packet was answered with a refusal, or dropped.
    Rejected = 6,
}

impl EventKind {
    /// The kind with a number, if there is one.
    #[must_use]
    pub const fn from_u8(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Connected),
            2 => Some(Self::Sent),
            3 => Some(Self::Refused),
            4 => Some(Self::Destroyed),
            5 => Some(Self::Translated),
            6 => Some(Self::Rejected),
            _ => None,
        }
    }

    /// Its bit in [`super::Config::events`].
    #[inline(always)]
    #[must_use]
    pub const fn bit(self) -> u32 {
        1 << self as u8
    }

    /// The name that tables and JSON show.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Connected => "connected",
            Self::Sent => "sent",
            Self::Refused => "refused",
            Self::Destroyed => "destroyed",
            Self::Translated => "translated",
            Self::Rejected => "rejected",
        }
    }
}
