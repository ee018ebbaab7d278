//! CT and CT_NEW: flows of packets that lb translates.

use core::mem::offset_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Addr;

/// Key of CT and CT_NEW: one direction of a flow, as its packets come to the hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CtKey {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Source port, host byte order.
    pub src_port: u16,
    /// Destination port, host byte order.
    pub dst_port: u16,
    /// IANA protocol number.
    pub proto: u8,
    /// Zero.
    pub pad: [u8; 3],
}

const _: () = {
    assert!(size_of::<CtKey>() == 40 && align_of::<CtKey>() == 4);
    assert!(offset_of!(CtKey, dst) == 16);
    assert!(offset_of!(CtKey, src_port) == 32);
    assert!(offset_of!(CtKey, proto) == 36);
};

/// Value of CT and CT_NEW: what becomes of the packets of one direction of a flow.
///
/// The key of the other direction is the reverse of what this one's packets become, and so each finds the other.
/// CT_NEW has flows whose two ends have not heard of each other yet, and forgets the one that was used the longest time ago
/// where it is full. The first answer to a datagram, or the segment by which a TCP client tells that it has the server's,
/// moves both directions to CT, where only time, or the end of the flow, ends them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct CtEntry {
    /// The source address that a packet gets.
    pub src: Addr,
    /// The destination address that it gets.
    pub dst: Addr,
    /// The source port that it gets, host byte order.
    pub src_port: u16,
    /// The destination port that it gets, host byte order.
    pub dst_port: u16,
    /// Index into BACKENDS.
    pub backend: u32,
    /// Generation of that entry.
    pub generation: u32,
    /// Index into SERVICES.
    pub service: u32,
    /// When a packet last came, nanoseconds of CLOCK_MONOTONIC; may be a second old.
    pub seen: u64,
    /// See [`ct_flags`].
    pub flags: u16,
    /// What came in this direction so far: see [`ct_state`].
    pub state: u8,
    /// The set that serves the flow: a [`crate::logic::connect::Set`] as its discriminant.
    pub set: u8,
    /// Zero.
    pub pad: u32,
}

const _: () = {
    assert!(size_of::<CtEntry>() == 64 && align_of::<CtEntry>() == 8);
    assert!(offset_of!(CtEntry, src_port) == 32);
    assert!(offset_of!(CtEntry, backend) == 36);
    assert!(offset_of!(CtEntry, service) == 44);
    assert!(offset_of!(CtEntry, seen) == 48);
    assert!(offset_of!(CtEntry, flags) == 56);
    assert!(offset_of!(CtEntry, state) == 58);
};

/// Bits of [`CtEntry::flags`].
pub mod ct_flags {
    /// From the backend to the client.
    pub const REPLY: u16 = 1;
    /// Translated at egress; else at ingress.
    pub const EGRESS: u16 = 2;
    /// Sent on from the hook by a look-up of the route, not by the stack: its source is an address of this node.
    pub const FORWARD: u16 = 4;
    /// Of packets from the client that go up the stack: received once more at the bridge that they came by, so that the
    /// stack's conntrack, which rules for bridges may have shown them before (`br_netfilter`), knows only what they have
    /// become.
    pub const AGAIN: u16 = 8;
}

/// Bits of [`CtEntry::state`]: flags of TCP segments that came in that direction. No more than hints: a segment from
/// elsewhere can set one, which shortens the time that the flow may be idle, and the next segment of the flow clears
/// what it shows to be wrong.
pub mod ct_state {
    /// SYN.
    pub const SYN: u8 = 1;
    /// FIN.
    pub const FIN: u8 = 2;
    /// RST.
    pub const RST: u8 = 4;
}

/// Value of DEVICES, by interface index: what a packet that lb sends out there gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct Device {
    /// IPv4 source address, v4-mapped; all zero where there is none.
    pub v4: Addr,
    /// IPv6 source address; all zero where there is none.
    pub v6: Addr,
    /// See [`device_flags`].
    pub flags: u32,
    /// Zero.
    pub pad: u32,
}

const _: () = {
    assert!(size_of::<Device>() == 40 && align_of::<Device>() == 8);
    assert!(offset_of!(Device, flags) == 32);
};

/// Bits of [`Device::flags`].
pub mod device_flags {
    /// The clsact qdisc is the agent's, which removes it in the end; no concern of programs. Of earlier builds there may be
    /// a 1 as well, which said something else.
    pub const OWN_QDISC: u32 = 2;
    /// It is a bridge.
    pub const BRIDGE: u32 = 4;
}

/// The part of a key of SOURCE_RANGES after its prefix length: whom a load-balancer address serves. The prefix covers
/// the service as a whole, and as much of the address as the range says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SourceRange {
    /// Index into SERVICES.
    pub service: u32,
    /// Address of a client.
    pub addr: Addr,
}

const _: () = assert!(size_of::<SourceRange>() == 20 && align_of::<SourceRange>() == 4);

/// Bits of the values of CLUSTER_CIDRS.
pub mod cluster_flags {
    /// Inside the cluster: external addresses have the semantics of policy Cluster.
    pub const INSIDE: u32 = 1;
    /// Pods of this node: answers to them come by this node.
    pub const HERE: u32 = 2;
}
