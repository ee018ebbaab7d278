//! The maps of the registry `lb_common::abi::maps`, as statics. Their sizes are defaults: the loader sets them from the
//! agent's flags.

use aya_ebpf::Global;
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf};
use aya_ebpf::macros::btf_map;
use lb_common::abi::*;
use lb_common::map_table;

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
        $name:ident: $kind:ident<$key:ty, $value:ty>, $flags:ident,
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

/// Number of slots in SOCKETS, minus one. Set by the loader before the programs are loaded.
#[unsafe(no_mangle)]
static SOCKETS_MASK: Global<u32> = Global::new(map_spec::SOCKETS.default_capacity() - 1);

/// `bpf_get_netns_cookie` of the node's network namespace. Set by the loader.
#[unsafe(no_mangle)]
static NODE_NETNS: Global<u64> = Global::new(0);

/// Not zero if only sockets of the node's network namespace are served. Set by the loader.
#[unsafe(no_mangle)]
static NODE_ONLY: Global<u32> = Global::new(0);

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

/// Returns the number of slots in SOCKETS, minus one.
#[inline(always)]
pub(crate) fn sockets_mask() -> u32 {
    SOCKETS_MASK.load()
}
