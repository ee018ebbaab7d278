//! The registry of maps: everything about a map that the programs, the agent, the command line and the documents have to
//! agree on.
//!
//! The statics of `lb-ebpf`, the loader's checks, the capacities, the `--max-*` flags, `status` and the metrics are
//! generated from [`map_table`]; a test compares the table of docs/architecture.md with it.

use super::layout::{AbiType, TypeLayout};
use super::{
    Addr, Affinity, AffinityKey, Backend, BackendSlot, Config, CtEntry, CtKey, Device, DropReason, Event, FILTER_WORDS,
    Frontend, FrontendKey, Name, ProblemRecord, Service, ServiceStats, SocketRecord, SourceRange, State, UdpDests,
};

/// Version of the layout of all maps together; part of the pin path. A change of any row below, or of a type that it
/// names, needs a new version. A map that is added does not, nor does a field in the place of padding or of a reserved field.
///
/// The feature `made-up-layout` stands for a later build, in the test of rollbacks only.
pub const VERSION: u32 = if cfg!(feature = "made-up-layout") { 5 } else { 4 };

/// Flags of `BPF_MAP_CREATE` (`linux/bpf.h`).
pub mod map_flags {
    /// No flags: the entries are allocated when the map is created.
    pub const NONE: u32 = 0;
    /// `BPF_F_NO_PREALLOC`: an entry is allocated when it is inserted.
    pub const NO_PREALLOC: u32 = 1;
    /// `BPF_F_MMAPABLE`: user space can map the values into its memory.
    pub const MMAPABLE: u32 = 1 << 10;
}

/// Passes the rows of the registry to a macro.
///
/// A row has the name of the map (at most 15 bytes, as the kernel stores it), its kind, the types of key and value, its
/// flags, what a start of another layout does with its content ([`MapRole`]), `from N` if values of `N` bytes of an earlier layout can be
/// read (see [`MapSpec::smallest_value`]), and its number of entries:
/// - `sized S { .. }` defines [`SizedMap`] `S`: the smallest number of entries that the agent gives the map, and a flag of
///   `lb-agent run` for the largest, with default (`bound`), range and help text;
/// - `sized_as S` has the number of entries of `S`;
/// - `fixed N` always has `N` entries (bytes for a ring buffer).
///
/// The types are those of [`crate::abi`], which the scope of the caller has to contain.
#[macro_export]
macro_rules! map_table {
    ($callback:ident) => {
        $callback! {
            /// Service ports by service index.
            SERVICES: Array<u32, Service>, MMAPABLE, served from 40, sized Services {
                flag: "max-services",
                initial: 512,
                bound: 262144,
                range: 2..=1 << 24,
                help: "Service ports (per family)",
            };
            /// Services at each destination, and address marks.
            FRONTENDS: Hash<FrontendKey, Frontend>, NONE, served from 8, sized Frontends {
                flag: "max-frontends",
                initial: 2048,
                bound: 1048576,
                range: 1..=1 << 26,
                help: "Frontends (address, port and protocol of a service port), plus one per service address",
            };
            /// Backends by id.
            BACKENDS: Array<u32, Backend>, MMAPABLE, served, sized Backends {
                flag: "max-backends",
                initial: 2048,
                bound: 2097152,
                range: 2..=1 << 26,
                help: "Backends of all service ports",
            };
            /// Members of sets, by slot.
            BACKEND_SLOTS: Array<u32, BackendSlot>, MMAPABLE, served, sized BackendSlots {
                flag: "max-backend-slots",
                initial: 4096,
                bound: 4194304,
                range: 1..=1 << 26,
                help: "Slots of all sets: each set takes one per endpoint",
            };
            /// Socket records by `cookie & mask`.
            SOCKETS: Array<u32, SocketRecord>, MMAPABLE, remembered from 96, sized Sockets {
                flag: "max-sockets",
                initial: 16384,
                bound: 524288,
                range: 1..=1 << 24,
                help: "Socket records in the direct-mapped array; rounded up to a power of two",
            };
            /// Records of sockets that found their slot in SOCKETS taken, by cookie.
            SOCKETS_MORE: Hash<u64, SocketRecord>, NO_PREALLOC, remembered from 96, sized SocketsMore {
                flag: "max-sockets-more",
                initial: 65536,
                bound: 1048576,
                range: 1..=1 << 24,
                help: "Socket records that do not fit into the array",
            };
            /// Destinations of unconnected UDP sockets, by cookie.
            UDP_FLOWS: Hash<u64, UdpDests>, NO_PREALLOC, remembered, sized UdpFlows {
                flag: "max-udp-flows",
                initial: 32768,
                bound: 524288,
                range: 1..=1 << 24,
                help: "Unconnected UDP sockets that send to services",
            };
            /// Last backend of each client of a service port with session affinity.
            AFFINITY: LruHash<AffinityKey, Affinity>, NONE, remembered, sized Affinity {
                flag: "max-affinity",
                initial: 16384,
                bound: 1048576,
                range: 1..=1 << 24,
                help: "Clients of services with session affinity; the least recently used are evicted when the map is full",
            };
            /// Established flows, one entry per direction.
            CT: Hash<CtKey, CtEntry>, NONE, remembered from 64, sized Conntrack {
                flag: "max-conntrack",
                initial: 65536,
                bound: 4194304,
                range: 2..=1 << 26,
                help: "Conntrack entries of established flows, two per flow; when the map is full, no further flow is established",
            };
            /// Unreplied flows, one entry per direction.
            CT_NEW: LruHash<CtKey, CtEntry>, NONE, remembered from 64, sized ConntrackNew {
                flag: "max-conntrack-new",
                initial: 65536,
                bound: 2097152,
                range: 2..=1 << 26,
                help: "Conntrack entries of unreplied flows, two per flow; the least recently used are evicted when the map is full",
            };
            /// Names of service ports by service index.
            NAMES: Hash<u32, Name>, NO_PREALLOC, served, sized_as Services;
            /// Counters by service index.
            STATS: PerCpuArray<u32, ServiceStats>, NONE, served from 16, sized_as Services;
            /// Counters by number of the [`crate::abi::DropReason`].
            DROPS: PerCpuArray<u32, u64>, NONE, served, fixed DropReason::CAPACITY;
            /// Bits of the networks with addresses that FRONTENDS or NODE_ADDRS has: see [`crate::abi::FilterBit`].
            FILTER: Array<u32, u64>, MMAPABLE, renewed, fixed FILTER_WORDS;
            /// Addresses of this node that serve node ports; the value is zero.
            NODE_ADDRS: Hash<Addr, u32>, NONE, served, fixed 1024;
            /// Networks that may use the load-balancer addresses of a service; the value is zero.
            SOURCE_RANGES: LpmTrie<SourceRange, u32>, NO_PREALLOC, served, fixed 16384;
            /// Networks inside the cluster, with [`crate::abi::cluster_flags`].
            CLUSTER_CIDRS: LpmTrie<Addr, u32>, NO_PREALLOC, served, fixed 32768;
            /// Network devices by interface index.
            DEVICES: Hash<u32, Device>, NO_PREALLOC, served from 40, fixed 4096;
            /// Trace events. The size is in bytes: a power of two and a multiple of the page size.
            EVENTS: RingBuf<(), Event>, NONE, renewed, fixed 1 << 18;
            /// Settings that the programs read while they run.
            CONFIG: Array<u32, Config>, MMAPABLE, served from 8, fixed 1;
            /// The agent, as the command line shows it.
            STATE: Array<u32, State>, MMAPABLE, served from 352, fixed 1;
            /// Problems that `status` shows, by number.
            NOTICES: Hash<u32, ProblemRecord>, NO_PREALLOC, renewed, fixed 64;
        }
    };
}

/// Kind of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapKind {
    /// `BPF_MAP_TYPE_ARRAY`.
    Array,
    /// `BPF_MAP_TYPE_PERCPU_ARRAY`.
    PerCpuArray,
    /// `BPF_MAP_TYPE_HASH`.
    Hash,
    /// `BPF_MAP_TYPE_LRU_HASH`.
    LruHash,
    /// `BPF_MAP_TYPE_LPM_TRIE`. The key type is the part after the prefix length.
    LpmTrie,
    /// `BPF_MAP_TYPE_RINGBUF`. The value type is that of its records.
    RingBuf,
}

impl MapKind {
    /// All kinds.
    pub const ALL: [Self; 6] = [
        Self::Array,
        Self::PerCpuArray,
        Self::Hash,
        Self::LruHash,
        Self::LpmTrie,
        Self::RingBuf,
    ];

    /// Returns the name with an article, for people.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Array => "an array",
            Self::PerCpuArray => "a per-CPU array",
            Self::Hash => "a hash",
            Self::LruHash => "an LRU hash",
            Self::LpmTrie => "an LPM trie",
            Self::RingBuf => "a ring buffer",
        }
    }
}

/// What depends on the content of a map, when a start takes over the maps of another layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapRole {
    /// Packets and calls would be served wrongly if the map were empty, and other maps refer to it.
    Served,
    /// Programs remember connections, flows or clients in it. Maps with a common bit of [`crate::abi::moving`] belong together.
    Remembered,
    /// Nothing: the agent makes its content again.
    Renewed,
}

/// Number of entries of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capacity {
    /// Chosen by the agent, up to a flag of `lb-agent run`.
    Sized(SizedMap),
    /// Always the same number.
    Fixed(u32),
}

/// A map, as the registry describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapSpec {
    /// Name in the object, under the pin path and in `bpftool`.
    pub name: &'static str,
    /// Kind of the map.
    pub kind: MapKind,
    /// Type of the keys.
    pub key: &'static TypeLayout,
    /// Type of the values.
    pub value: &'static TypeLayout,
    /// See [`map_flags`].
    pub flags: u32,
    /// What depends on the content.
    pub role: MapRole,
    /// See [`Self::smallest_value`]; `None` if every layout has values of this size.
    smallest_value: Option<u32>,
    /// Number of entries.
    pub capacity: Capacity,
}

impl MapSpec {
    /// Returns the size of a key in bytes, as the kernel reports it.
    #[must_use]
    pub const fn key_size(&self) -> u32 {
        match self.kind {
            MapKind::Array | MapKind::PerCpuArray | MapKind::Hash | MapKind::LruHash => self.key.size as u32,
            // A key begins with the length of its prefix.
            MapKind::LpmTrie => 4 + self.key.size as u32,
            MapKind::RingBuf => 0,
        }
    }

    /// Returns the size of a value in bytes, as the kernel reports it.
    #[must_use]
    pub const fn value_size(&self) -> u32 {
        match self.kind {
            MapKind::Array | MapKind::PerCpuArray | MapKind::Hash | MapKind::LruHash | MapKind::LpmTrie => {
                self.value.size as u32
            }
            MapKind::RingBuf => 0,
        }
    }

    /// Returns the smallest size of values that this build can read, in bytes: that of layout 3. The rest of a value is zero then.
    #[must_use]
    pub const fn smallest_value(&self) -> u32 {
        match self.smallest_value {
            Some(bytes) => bytes,
            None => self.value_size(),
        }
    }

    /// Returns whether programs insert whole values. During a move they insert into the old map too, so its values must not be longer
    /// than their own.
    #[must_use]
    pub const fn is_inserted_by_programs(&self) -> bool {
        matches!(self.role, MapRole::Remembered) && matches!(self.kind, MapKind::Hash | MapKind::LruHash)
    }

    /// Returns the number of entries that the map has before the agent chooses another one.
    #[must_use]
    pub const fn default_capacity(&self) -> u32 {
        match self.capacity {
            Capacity::Sized(map) => map.default_capacity(),
            Capacity::Fixed(entries) => entries,
        }
    }
}

/// The role that a word of a row stands for.
macro_rules! role {
    (served) => {
        MapRole::Served
    };
    (remembered) => {
        MapRole::Remembered
    };
    (renewed) => {
        MapRole::Renewed
    };
}

/// A number that a row may lack.
macro_rules! optional {
    [] => {
        None
    };
    [$number:literal] => {
        Some($number)
    };
}

/// Expands the rows of the registry to constants and to [`SizedMap`].
macro_rules! registry {
    ($(
        $(#[$doc:meta])*
        $name:ident: $kind:ident<$key:ty, $value:ty>, $flags:ident, $role:ident $(from $smallest:literal)?,
            $(sized $sized:ident {
                flag: $flag:literal,
                initial: $initial:literal,
                bound: $bound:literal,
                range: $min:literal..=$max:expr,
                help: $help:literal $(,)?
            })?
            $(sized_as $like:ident)?
            $(fixed $fixed:expr)?;
    )*) => {
        /// Names of the maps, as they are in the object, under the pin path and in `bpftool`.
        pub mod map_name {
            $($(#[$doc])* pub const $name: &str = stringify!($name);)*
            $(const _: () = assert!($name.len() <= 15, "the kernel stores 15 bytes of a name");)*
        }

        /// The maps as constants.
        pub mod map_spec {
            use super::*;

            $($(#[$doc])* pub const $name: MapSpec = MapSpec {
                name: stringify!($name),
                kind: MapKind::$kind,
                key: <$key as AbiType>::LAYOUT,
                value: <$value as AbiType>::LAYOUT,
                flags: map_flags::$flags,
                role: role!($role),
                smallest_value: optional![$($smallest)?],
                capacity: {
                    $(Capacity::Sized(SizedMap::$sized))?
                    $(Capacity::Sized(SizedMap::$like))?
                    $(Capacity::Fixed($fixed))?
                },
            };)*
        }

        /// All maps.
        pub const MAPS: &[MapSpec] = &[$(map_spec::$name),*];

        /// A map with a number of entries that the agent chooses, and that a flag of `lb-agent run` bounds.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum SizedMap {
            $($(
                #[doc = concat!("The number of entries of ", stringify!($name), ", bounded by `--", $flag, "`.")]
                $sized,
            )?)*
        }

        impl SizedMap {
            /// All such maps, in the order of `lb-agent run --help`.
            pub const ALL: &[Self] = &[$($(Self::$sized,)?)*];

            /// Number of such maps.
            pub const COUNT: usize = Self::ALL.len();

            /// Returns the name of the map.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $($(Self::$sized => { let _ = $flag; map_name::$name })?)* }
            }

            /// Returns the role of the map.
            #[must_use]
            pub const fn role(self) -> MapRole {
                match self { $($(Self::$sized => role!($role),)?)* }
            }

            /// Returns whether programs insert into the map, so that its content follows the clients. The agent fills the others, which
            /// follow the source.
            #[must_use]
            pub const fn is_filled_by_programs(self) -> bool {
                matches!(self.role(), MapRole::Remembered)
            }

            /// Returns the flag of `lb-agent run`, without dashes.
            #[must_use]
            pub const fn flag(self) -> &'static str {
                match self { $($(Self::$sized => $flag,)?)* }
            }

            /// Returns the smallest number of entries that the agent gives the map, unless the flag is smaller.
            #[must_use]
            pub const fn default_capacity(self) -> u32 {
                match self { $($(Self::$sized => $initial,)?)* }
            }

            /// Returns the largest number of entries without the flag.
            #[must_use]
            pub const fn default_bound(self) -> u32 {
                match self { $($(Self::$sized => $bound,)?)* }
            }

            /// Returns the smallest and the largest number of entries that the flag accepts.
            #[must_use]
            pub const fn range(self) -> (u32, u32) {
                match self { $($(Self::$sized => ($min, $max),)?)* }
            }

            /// Returns the help text of the flag.
            #[must_use]
            pub const fn help(self) -> &'static str {
                match self { $($(Self::$sized => $help,)?)* }
            }
        }
    };
}

map_table!(registry);
