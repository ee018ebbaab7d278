//! EVENTS: trace events.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::enums::abi_enum;
use super::layout::layout;
use super::{Addr, ServiceIndex};

/// One record of the ring buffer EVENTS. A program writes it only while CONFIG requests its kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct Event {
    /// Nanoseconds of CLOCK_MONOTONIC.
    pub time: u64,
    /// Socket cookie; zero for packets.
    pub cookie: u64,
    /// `bpf_get_netns_cookie` of the socket; zero for packets.
    pub netns: u64,
    /// Source address of a packet; all zero for sockets.
    pub client: Addr,
    /// Requested destination.
    pub addr: Addr,
    /// Selected backend; all zero if there is none.
    pub backend_addr: Addr,
    /// Port of `addr`, host byte order.
    pub port: u16,
    /// Port of `backend_addr`, host byte order.
    pub backend_port: u16,
    /// IANA protocol number.
    pub proto: u8,
    /// Number of the [`EventKind`].
    pub kind: u8,
    /// Port of `client`, host byte order.
    pub client_port: u16,
    /// The service port; zero if no frontend was found.
    pub service: ServiceIndex,
    /// Number of the [`super::DropReason`]; meaningful for refusals ([`EventKind::is_refusal`]) only.
    pub reason: u32,
    /// Process id (thread group) in the initial PID namespace; zero for packets.
    pub pid: u32,
    /// Zero.
    pub pad: u32,
}

layout!(Event: size 96, align 8 {
    time: 0,
    cookie: 8,
    netns: 16,
    client: 24,
    addr: 40,
    backend_addr: 56,
    port: 72,
    backend_port: 74,
    proto: 76,
    kind: 77,
    client_port: 78,
    service: 80,
    reason: 84,
    pid: 88,
    pad: 92,
});

abi_enum! {
    /// The kind of operation that a trace event reports.
    pub enum EventKind: u8, from_u8 {
        /// A socket was connected to a backend.
        Connected = 1, "connected";
        /// An unconnected socket sent a datagram to a backend.
        Sent = 2, "sent";
        /// A system call was refused.
        Refused = 3, "refused";
        /// A socket was destroyed, because its backend was removed.
        Destroyed = 4, "destroyed";
        /// A packet began a flow to a backend.
        Translated = 5, "translated";
        /// A packet was dropped, or answered with a reset or an ICMP error.
        Rejected = 6, "rejected";
    }
}

impl EventKind {
    /// The bits of all kinds in [`super::Config::events`].
    pub const ALL_BITS: u32 = {
        let mut bits = 0;
        let mut i = 0;
        while i < Self::ALL.len() {
            bits |= Self::ALL[i].bit();
            i += 1;
        }
        bits
    };

    /// Returns whether [`Event::reason`] is the reason of a refusal.
    #[must_use]
    pub const fn is_refusal(self) -> bool {
        match self {
            Self::Refused | Self::Rejected => true,
            Self::Connected | Self::Sent | Self::Destroyed | Self::Translated => false,
        }
    }

    /// Returns whether the event is of a packet, not of a socket.
    #[must_use]
    pub const fn is_of_packet(self) -> bool {
        match self {
            Self::Translated | Self::Rejected => true,
            Self::Connected | Self::Sent | Self::Refused | Self::Destroyed => false,
        }
    }

    /// Returns the bit of the kind in [`super::Config::events`].
    #[inline(always)]
    #[must_use]
    pub const fn bit(self) -> u32 {
        1 << self as u8
    }
}
