//! A move: pinned maps are replaced by maps of another size or layout while programs use both.
//!
//! MOVE exists only during a move, but a build of another layout may have to complete that move. So [`Move`], [`MovePhase`] and
//! [`FIRST_DROP`] follow the rules of [`super::PinnedMap`] and its module. Requests are never stored, so each build has its own.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::enums::abi_enum;
use super::layout::layout;
use super::{AffinityKey, CtKey, ServiceIndex, ServiceStats};

/// Name of the map with the phase of a move. It is pinned next to the new maps, so that the next start can read the phase.
pub const MOVE_MAP: &str = "MOVE";

/// Ending of the names of the maps that are being replaced, in the object: `CT` is the new map, `CT_OLD` the present one.
pub const OLD_SUFFIX: &str = "_OLD";

/// The only value of MOVE.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct Move {
    /// Number of the [`MovePhase`]. Programs read it before every insertion. The same in every layout.
    pub phase: u32,
    /// Counters below this one have been added to the new map: service indexes, then the reasons from [`FIRST_DROP`] on. The same
    /// in every layout.
    pub counted: u32,
}

layout!(Move: size 8, align 8 { phase: 0, counted: 4 });

/// Number of the first drop reason in [`Move::counted`], in every layout: there are fewer service indexes.
pub const FIRST_DROP: u32 = 0xffff_0000;

abi_enum! {
    /// Phase of a move.
    pub enum MovePhase: u32, from_u32 {
        /// The new maps are filled, and programs that use both maps are attached. All programs insert into the old maps.
        Prepare = 0, "prepare";
        /// Every attached program uses both maps and inserts into the new ones. The agent copies the entries of the old
        /// maps.
        Copy = 1, "copy";
        /// The new maps have all entries. Their pins replace those of the old maps.
        Rename = 2, "rename";
    }
}

/// Bits of the read-only global [`super::MOVING_GLOBAL`]: the maps that are being replaced and that programs insert into.
/// Maps with a common bit are replaced together.
pub mod moving {
    use super::super::SizedMap;

    /// SOCKETS and SOCKETS_MORE.
    pub const SOCKETS: u32 = 1;
    /// UDP_FLOWS.
    pub const UDP_FLOWS: u32 = 2;
    /// AFFINITY.
    pub const AFFINITY: u32 = 4;
    /// CT and CT_NEW.
    pub const CT: u32 = 8;
    /// STATS.
    pub const STATS: u32 = 16;

    /// Returns the bit of the maps that a flag sizes; zero if programs only read them.
    #[must_use]
    pub const fn bit(map: SizedMap) -> u32 {
        match map {
            SizedMap::Services => STATS,
            SizedMap::Frontends | SizedMap::Backends | SizedMap::BackendSlots => 0,
            SizedMap::Conntrack | SizedMap::ConntrackNew => CT,
            SizedMap::Sockets | SizedMap::SocketsMore => SOCKETS,
            SizedMap::UdpFlows => UDP_FLOWS,
            SizedMap::Affinity => AFFINITY,
        }
    }
}

abi_enum! {
    /// Kind of the entry that the agent call `lb_move` copies from an old map to the new one.
    pub enum MoveItem: u32, from_u32 {
        /// An entry of CT, by its `CtKey`.
        Ct = 1, "ct";
        /// An entry of CT_NEW, by its `CtKey`.
        CtNew = 2, "ct_new";
        /// An entry of AFFINITY, by its `AffinityKey`.
        Affinity = 3, "affinity";
        /// The record of a socket, by its cookie.
        Socket = 4, "socket";
        /// The record of an MPTCP socket, by its key in SOCKETS_MORE.
        MptcpSocket = 5, "mptcp_socket";
        /// The destinations of an unconnected UDP socket, by its cookie.
        UdpDests = 6, "udp_dests";
        /// Destinations that programs stored in the old entry of a socket while it was being copied, by its cookie.
        LateUdpDests = 7, "late_udp_dests";
        /// The sum of the old counters of a service index: the index, `connections` and `refused`, eight bytes each.
        Counters = 8, "counters";
        /// The sum of an old counter of DROPS: the number of the reason, and the sum, eight bytes each.
        Drops = 9, "drops";
    }
}

/// The "packet" of the agent call `lb_move`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MoveRequest {
    /// Number of the [`MoveItem`].
    pub item: u32,
    /// Zero.
    pub pad: u32,
    /// Key of the entry as in memory, followed by zero bytes, or the three numbers of [`MoveItem::Counters`].
    pub key: [u64; 5],
}

layout!(MoveRequest: size 48, align 8 { item: 0, pad: 4, key: 8 });

impl MoveRequest {
    /// Returns the request to copy an entry of CT or CT_NEW.
    #[must_use]
    pub const fn flow(item: MoveItem, key: CtKey) -> Self {
        Self::new(item, zerocopy::transmute!(key))
    }

    /// Returns the request to copy an entry of AFFINITY.
    #[must_use]
    pub const fn affinity(key: AffinityKey) -> Self {
        let [a, b, c]: [u64; 3] = zerocopy::transmute!(key);
        Self::new(MoveItem::Affinity, [a, b, c, 0, 0])
    }

    /// Returns the request to copy the record or the destinations of a socket.
    #[must_use]
    pub const fn socket(item: MoveItem, key: u64) -> Self {
        Self::new(item, [key, 0, 0, 0, 0])
    }

    /// Returns the request to add the old counters of a service index.
    #[must_use]
    pub const fn counters(service: ServiceIndex, old: ServiceStats) -> Self {
        Self::new(
            MoveItem::Counters,
            [service.get() as u64, old.connections, old.refused, 0, 0],
        )
    }

    /// Returns the request to add the old counter of a drop reason, by its number.
    #[must_use]
    pub const fn drops(reason: u32, old: u64) -> Self {
        Self::new(MoveItem::Drops, [reason as u64, old, 0, 0, 0])
    }

    const fn new(item: MoveItem, key: [u64; 5]) -> Self {
        Self {
            item: item as u32,
            pad: 0,
            key,
        }
    }

    /// Returns the key of an entry of CT or CT_NEW.
    #[inline(always)]
    #[must_use]
    pub const fn ct_key(&self) -> &CtKey {
        zerocopy::transmute_ref!(&self.key)
    }

    /// Returns the key of an entry of AFFINITY.
    #[inline(always)]
    #[must_use]
    pub const fn affinity_key(&self) -> AffinityKey {
        let [a, b, c, ..] = self.key;
        zerocopy::transmute!([a, b, c])
    }
}
