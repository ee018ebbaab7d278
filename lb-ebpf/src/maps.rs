//! The maps of the registry `lb_common::abi::maps`, as statics. Their sizes are defaults: the loader sets them from the
//! agent's flags.

use aya_ebpf::Global;
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf};
use aya_ebpf::macros::btf_map;
use lb_common::abi::*;
use lb_common::map_table;

use crate::volatile::read_once;

/// Type of the static of a map.
macro_rules! btf_map_type {
    (Array<$key:ty, $value:ty>, $name:ident) => { Array<$value, { entries!($name) }, { flags!($name) }> };
    (PerCpuArray<$key:ty, $value:ty>, $name:ident) => { PerCpuArray<$value, { entries!($name) }, { flags!($name) }> };
    (Hash<$key:ty, $value:ty>, $name:ident) => { HashMap<$key, $value, { entries!($name) }, { flags!($name) }> };
    (LruHash<$key:ty, $value:ty>, $name:ident) => { LruHashMap<$key, $value, { entries!($name) }, { flags!($name) }> };
    (LpmTrie<$key:ty, $value:ty>, $name:ident) => { LpmTrie<$key, $value, { entries!($name) }, { flags!($name) }> };
    (RingBuf<$key:ty, $value:ty>, $name:ident) => { RingBuf<$value, { entries!($name) }, { flags!($name) }> };
}

/// Default number of entries of a map.
macro_rules! entries {
    ($name:ident) => {
        map_spec::$name.default_capacity() as usize
    };
}

/// Flags of a map.
macro_rules! flags {
    ($name:ident) => {
        map_spec::$name.flags as usize
    };
}

/// Defines the statics of the maps.
macro_rules! statics {
    ($(
        $(#[$doc:meta])*
        $name:ident: $kind:ident<$key:ty, $value:ty>, $flags:ident, $role:ident $(from $smallest:literal)?,
            $(sized $sized:ident $sizes:tt)? $(sized_as $like:ident)? $(fixed $fixed:expr)?;
    )*) => {
        $(
            $(#[$doc])*
            #[btf_map]
            pub(crate) static $name: btf_map_type!($kind<$key, $value>, $name) = <btf_map_type!($kind<$key, $value>, $name)>::new();
        )*
    };
}

map_table!(statics);

/// Type of the static of a map that is being replaced. The loader sets its number of entries if there is a move.
macro_rules! old_map_type {
    (Array<$value:ty>, $name:ident) => { Array<$value, 1, { flags!($name) }> };
    (PerCpuArray<$value:ty>, $name:ident) => { PerCpuArray<$value, 1, { flags!($name) }> };
    (Hash<$key:ty, $value:ty>, $name:ident) => { HashMap<$key, $value, 1, { flags!($name) }> };
    (LruHash<$key:ty, $value:ty>, $name:ident) => { LruHashMap<$key, $value, 1, { flags!($name) }> };
}

/// Defines the statics of the maps that are being replaced during a move; see [`lb_common::abi::moving`]. Without a move they
/// are not pinned, and no program uses them.
macro_rules! old_statics {
    ($($(#[$doc:meta])* $old:ident of $name:ident: $kind:ident<$($type:ty),+>;)*) => {
        $(
            $(#[$doc])*
            #[btf_map]
            pub(crate) static $old: old_map_type!($kind<$($type),+>, $name) = <old_map_type!($kind<$($type),+>, $name)>::new();
        )*
    };
}

old_statics! {
    /// Socket records before the move, by `cookie & SOCKETS_OLD_MASK`.
    SOCKETS_OLD of SOCKETS: Array<SocketRecord>;
    /// Records of sockets that found their slot in SOCKETS_OLD taken.
    SOCKETS_MORE_OLD of SOCKETS_MORE: Hash<u64, SocketRecord>;
    /// Destinations of unconnected UDP sockets before the move.
    UDP_FLOWS_OLD of UDP_FLOWS: Hash<u64, UdpDests>;
    /// Affinities before the move.
    AFFINITY_OLD of AFFINITY: LruHash<AffinityKey, Affinity>;
    /// Established flows before the move.
    CT_OLD of CT: Hash<CtKey, CtEntry>;
    /// Unreplied flows before the move.
    CT_NEW_OLD of CT_NEW: LruHash<CtKey, CtEntry>;
    /// Counters before the move.
    STATS_OLD of STATS: PerCpuArray<ServiceStats>;
}

/// The phase of the move. Without a move it is not pinned, and no program uses it.
#[btf_map]
pub(crate) static MOVE: Array<Move, 1, { map_flags::MMAPABLE as usize }> = Array::new();

/// The maps that are being replaced: see [`moving`]. Set by the loader before the programs are loaded.
#[unsafe(no_mangle)]
static MOVING: Global<u32> = Global::new(0);

/// Number of slots in SOCKETS_OLD, minus one. Set by the loader.
#[unsafe(no_mangle)]
static SOCKETS_OLD_MASK: Global<u32> = Global::new(0);

/// Number of slots in SOCKETS, minus one. Set by the loader before the programs are loaded.
#[unsafe(no_mangle)]
static SOCKETS_MASK: Global<u32> = Global::new(map_spec::SOCKETS.default_capacity() - 1);

/// `bpf_get_netns_cookie` of the node's network namespace. Set by the loader.
#[unsafe(no_mangle)]
static NODE_NETNS: Global<u64> = Global::new(0);

/// Not zero if only sockets of the node's network namespace are served. Set by the loader.
#[unsafe(no_mangle)]
static NODE_ONLY: Global<u32> = Global::new(0);

/// Not zero if the processor makes stores visible in program order. Set by the loader.
#[unsafe(no_mangle)]
static STORES_IN_ORDER: Global<u32> = Global::new(0);

/// Returns the cookie of the node's network namespace.
#[inline(always)]
pub(crate) fn node_netns() -> u64 {
    NODE_NETNS.load()
}

/// Returns whether only sockets of the node's network namespace are served.
#[inline(always)]
pub(crate) fn node_only() -> bool {
    NODE_ONLY.load() != 0
}

/// Returns whether the processor makes stores visible in program order. The verifier knows the answer, and removes the branch
/// that is not taken.
#[inline(always)]
pub(crate) fn stores_in_order() -> bool {
    STORES_IN_ORDER.load() != 0
}

/// Returns the number of slots in SOCKETS, minus one.
#[inline(always)]
pub(crate) fn sockets_mask() -> u32 {
    SOCKETS_MASK.load()
}

/// Returns the number of slots in SOCKETS_OLD, minus one.
#[inline(always)]
pub(crate) fn sockets_old_mask() -> u32 {
    SOCKETS_OLD_MASK.load()
}

/// Returns whether the maps with a bit of [`moving`] are being replaced. The verifier knows the answer, and removes the branch
/// that is not taken. Without the feature `moving`, the compiler does.
#[inline(always)]
pub(crate) fn is_moving(maps: u32) -> bool {
    cfg!(feature = "moving") && MOVING.load() & maps != 0
}

/// Returns whether insertions go to the new maps during a move.
#[inline(always)]
pub(crate) fn inserts_into_new() -> bool {
    MOVE.get_ptr(0).is_some_and(|state| {
        // SAFETY: the pointer is to a value of the map, and the field is aligned; the agent may store to it at any time.
        let phase = unsafe { read_once!((*state).phase) };
        phase != MovePhase::Prepare as u32
    })
}
