//! CT and CT_NEW: conntrack entries of the flows that lb translates.

use core::mem::offset_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::layout::{layout, mirror};
use super::{Addr, BackendRef, ServiceIndex};

/// Key of CT and CT_NEW: the tuple of one direction of a flow, as its packets arrive at the hook.
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

layout!(CtKey: size 40, align 4 { src: 0, dst: 16, src_port: 32, dst_port: 34, proto: 36, pad: 37 });

/// A [`CtKey`] as programs build it: the compiler would write the addresses of a [`CtKey`] byte by byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CtKeyWords {
    /// Source address, each word in the byte order of memory.
    pub src: [u64; 2],
    /// Destination address, each word in the byte order of memory.
    pub dst: [u64; 2],
    /// Source port, host byte order.
    pub src_port: u16,
    /// Destination port, host byte order.
    pub dst_port: u16,
    /// IANA protocol number in the first byte in memory, then zero bytes.
    pub proto_pad: u32,
}

mirror!(CtKeyWords of CtKey {
    src: src,
    dst: dst,
    src_port: src_port,
    dst_port: dst_port,
    proto_pad: proto + pad,
});

impl CtKeyWords {
    /// Returns the key that has these bytes.
    #[inline(always)]
    #[must_use]
    pub const fn as_key(&self) -> &CtKey {
        zerocopy::transmute_ref!(self)
    }
}

/// Value of CT and CT_NEW: the translation of the packets of one direction of a flow.
///
/// The key of the other direction is the reverse of the translated tuple, so each direction leads to the other. CT_NEW
/// has the unreplied flows and evicts the least recently used ones when it is full. The first reply to a datagram, or
/// the segment by which a TCP client acknowledges the server's SYN, moves both directions to CT, which is never evicted:
/// there only idle time or the end of the flow removes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct CtEntry {
    /// Source address after translation.
    pub src: Addr,
    /// Destination address after translation.
    pub dst: Addr,
    /// Source port after translation, host byte order.
    pub src_port: u16,
    /// Destination port after translation, host byte order.
    pub dst_port: u16,
    /// The backend.
    pub backend: BackendRef,
    /// The service port.
    pub service: ServiceIndex,
    /// Time of the last packet, in nanoseconds of CLOCK_MONOTONIC. It is refreshed at most once a second.
    pub seen: u64,
    /// See [`ct_flags`].
    pub flags: u16,
    /// TCP flags that were seen in this direction: see [`ct_state`].
    pub state: u8,
    /// Number of the [`super::Set`] that serves the flow.
    pub set: u8,
    /// Zero.
    pub pad: u32,
    /// Zero: room for fields of later builds.
    pub reserved: [u64; 8],
}

layout!(CtEntry: size 128, align 8 {
    src: 0,
    dst: 16,
    src_port: 32,
    dst_port: 34,
    backend: 36,
    service: 44,
    seen: 48,
    flags: 56,
    state: 58,
    set: 59,
    pad: 60,
    reserved: 64,
});

impl CtEntry {
    /// Size in bytes of the part that is in use. It has one cache line, and every packet reads it.
    pub const USED: usize = offset_of!(Self, reserved);
}

/// A [`CtEntry`] as programs build it: the compiler would write the addresses of a [`CtEntry`] byte by byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CtEntryWords {
    /// Source address after translation, each word in the byte order of memory.
    pub src: [u64; 2],
    /// Destination address after translation, each word in the byte order of memory.
    pub dst: [u64; 2],
    /// Source port after translation, host byte order.
    pub src_port: u16,
    /// Destination port after translation, host byte order.
    pub dst_port: u16,
    /// The backend.
    pub backend: BackendRef,
    /// The service port.
    pub service: ServiceIndex,
    /// Time of the last packet, in nanoseconds of CLOCK_MONOTONIC.
    pub seen: u64,
    /// See [`ct_flags`].
    pub flags: u16,
    /// See [`ct_state`].
    pub state: u8,
    /// Number of the [`super::Set`] that serves the flow.
    pub set: u8,
    /// Zero.
    pub pad: u32,
    /// Zero: room for fields of later builds.
    pub reserved: [u64; 8],
}

mirror!(CtEntryWords of CtEntry {
    src: src,
    dst: dst,
    src_port: src_port,
    dst_port: dst_port,
    backend: backend,
    service: service,
    seen: seen,
    flags: flags,
    state: state,
    set: set,
    pad: pad,
    reserved: reserved,
});

impl CtEntryWords {
    /// Returns the entry that has these bytes.
    #[inline(always)]
    #[must_use]
    pub const fn as_entry(&self) -> &CtEntry {
        zerocopy::transmute_ref!(self)
    }
}

/// Bits of [`CtEntry::flags`].
pub mod ct_flags {
    /// The direction from the backend to the client.
    pub const REPLY: u16 = 1;
    /// Packets are translated at egress. Otherwise they are translated at ingress.
    pub const EGRESS: u16 = 2;
    /// Packets are forwarded from the hook after a route lookup, not by the stack: their source is an address of this
    /// node.
    pub const FORWARD: u16 = 4;
    /// Packets from the client that go up the stack are received again at the bridge that they arrived by. Rules for
    /// bridges may have passed the original packet to the stack's conntrack (`br_netfilter`); after this, the stack's
    /// conntrack has the translated tuple only.
    pub const RECEIVE_AGAIN: u16 = 8;
}

/// Bits of [`CtEntry::state`]: TCP flags that were seen in that direction. They are hints only: a forged segment can set
/// one, which shortens the idle timeout of the flow, and the next genuine segment clears a bit that it contradicts.
pub mod ct_state {
    /// SYN.
    pub const SYN: u8 = 1;
    /// FIN.
    pub const FIN: u8 = 2;
    /// RST.
    pub const RST: u8 = 4;
}
