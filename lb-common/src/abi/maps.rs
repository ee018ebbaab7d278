//! The registry of maps: everything about a map that the programs, the agent, the command line and the documents have to
//! agree on.
//!
//! The statics of `lb-ebpf`, the loader's checks, the capacities, the `--max-*` flags, `status` and the metrics are
//! generated from [`map_table`]; a test compares the table of docs/architecture.md with it.

use super::layout::{AbiType, TypeLayout};
use super::{
    Addr, Affinity, AffinityKey, Backend, BackendSlot, Config, CtEntry, CtKey, Device, DropReason, Event, Frontend,
    FrontendKey, Name, ProblemRecord, Service, ServiceStats, SocketRecord, SourceRange, State, UdpDests,
};

/// Version of the layout of all maps together; part of the pin path. A change of any row below, or of a type that it
/// names, needs a new version.
pub const VERSION: u32 = 3;

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
/// flags, and its number of entries:
/// - `sized S { .. }` defines [`SizedMap`] `S`: a flag of `lb-agent run` with default, range and help text;
/// - `sized_as S` has the number of entries of `S`;
/// - `fixed N` always has `N` entries (bytes for a ring buffer).
///
/// The types are those of [`crate::abi`], which the scope of the caller has to contain.
#[macro_export]
macro_rules! map_table {
    ($callback:ident) => {
        $callback! {
            /// Service ports by service index.
            SERVICES: Array<u32, Service>, MMAPABLE, sized Services {
                flag: "max-services",
                default: 4096,
                range: 2..=1 << 24,
                help: "Service ports (per family)",
            };
            /// Services at each destination, and address marks.
            FRONTENDS: Hash<FrontendKey, Frontend>, NONE, sized Frontends {
                flag: "max-frontends",
                default: 16384,
                range: 1..=1 << 26,
                help: "Frontends (address, port and protocol of a service port), plus one per service address",
            };
            /// Backends by id.
            BACKENDS: Array<u32, Backend>, MMAPABLE, sized Backends {
                flag: "max-backends",
                default: 32768,
                range: 2..=1 << 26,
                help: "Backends of all service ports",
            };
            /// Members of sets, by slot.
            BACKEND_SLOTS: Array<u32, BackendSlot>, MMAPABLE, sized BackendSlots {
                flag: "max-backend-slots",
                default: 65536,
                range: 1..=1 << 26,
                help: "Slots of all sets: each set takes one per endpoint",
            };
            /// Socket records by `cookie & mask`.
            SOCKETS: Array<u32, SocketRecord>, MMAPABLE, sized Sockets {
                flag: "max-sockets",
                default: 16384,
                range: 1..=1 << 24,
                help: "Socket records in the direct-mapped array; rounded up to a power of two",
            };
            /// Records of sockets that found their slot in SOCKETS taken, by cookie.
            SOCKETS_MORE: Hash<u64, SocketRecord>, NO_PREALLOC, sized SocketsMore {
                flag: "max-sockets-more",
                default: 65536,
                range: 1..=1 << 24,
                help: "Socket records that do not fit into the array",
            };
            /// Destinations of unconnected UDP sockets, by cookie.
            UDP_FLOWS: Hash<u64, UdpDests>, NO_PREALLOC, sized UdpFlows {
                flag: "max-udp-flows",
                default: 65536,
                range: 1..=1 << 24,
                help: "Unconnected UDP sockets that send to services",
            };
            /// Last backend of each client of a service port with session affinity.
            AFFINITY: LruHash<AffinityKey, Affinity>, NONE, sized Affinity {
                flag: "max-affinity",
                default: 16384,
                range: 1..=1 << 24,
                help: "Clients of services with session affinity; the least recently used are evicted when the map is full",
            };
            /// Established flows, one entry per direction.
            CT: Hash<CtKey, CtEntry>, NONE, sized Conntrack {
                flag: "max-conntrack",
                default: 131072,
                range: 2..=1 << 26,
                help: "Conntrack entries of established flows, two per flow; when the map is full, no further flow is established",
            };
            /// Unreplied flows, one entry per direction.
            CT_NEW: LruHash<CtKey, CtEntry>, NONE, sized ConntrackNew {
                flag: "max-conntrack-new",
                default: 65536,
                range: 2..=1 << 26,
                help: "Conntrack entries of unreplied flows, two per flow; the least recently used are evicted when the map is full",
            };
            /// Names of service ports by service index.
            NAMES: Hash<u32, Name>, NO_PREALLOC, sized_as Services;
            /// Counters by service index.
            STATS: PerCpuArray<u32, ServiceStats>, NONE, sized_as Services;
            /// Counters by number of the [`crate::abi::DropReason`].
            DROPS: PerCpuArray<u32, u64>, NONE, fixed DropReason::COUNT;
            /// Addresses of this node that serve node ports; the value is zero.
            NODE_ADDRS: Hash<Addr, u32>, NONE, fixed 1024;
            /// Networks that may use the load-balancer addresses of a service; the value is zero.
            SOURCE_RANGES: LpmTrie<SourceRange, u32>, NO_PREALLOC, fixed 16384;
            /// Networks inside the cluster, with [`crate::abi::cluster_flags`].
            CLUSTER_CIDRS: LpmTrie<Addr, u32>, NO_PREALLOC, fixed 32768;
            /// Network devices by interface index.
            DEVICES: Hash<u32, Device>, NO_PREALLOC, fixed 4096;
            /// Trace events. The size is in bytes: a power of two and a multiple of the page size.
            EVENTS: RingBuf<(), Event>, NONE, fixed 1 << 18;
            /// Settings that the programs read while they run.
            CONFIG: Array<u32, Config>, MMAPABLE, fixed 1;
            /// The agent, as the command line shows it.
            STATE: Array<u32, State>, MMAPABLE, fixed 1;
            /// Problems that `status` shows, by number.
            NOTICES: Hash<u32, ProblemRecord>, NO_PREALLOC, fixed 64;
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

/// Number of entries of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capacity {
    /// Set by a flag of `lb-agent run`.
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

    /// Returns the number of entries that the map has without flags of the command line.
    #[must_use]
    pub const fn default_capacity(&self) -> u32 {
        match self.capacity {
            Capacity::Sized(map) => map.default_capacity(),
            Capacity::Fixed(entries) => entries,
        }
    }
}

/// Expands the rows of the registry to constants and to [`SizedMap`].
macro_rules! registry {
    ($(
        $(#[$doc:meta])*
        $name:ident: $kind:ident<$key:ty, $value:ty>, $flags:ident,
            $(sized $sized:ident {
                flag: $flag:literal,
                default: $default:literal,
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
                capacity: {
                    $(Capacity::Sized(SizedMap::$sized))?
                    $(Capacity::Sized(SizedMap::$like))?
                    $(Capacity::Fixed($fixed))?
                },
            };)*
        }

        /// All maps.
        pub const MAPS: &[MapSpec] = &[$(map_spec::$name),*];

        /// A map with a number of entries that a flag of `lb-agent run` sets.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum SizedMap {
            $($(
                #[doc = concat!("The number of entries of ", stringify!($name), ", set by `--", $flag, "`.")]
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

            /// Returns the flag of `lb-agent run`, without dashes.
            #[must_use]
            pub const fn flag(self) -> &'static str {
                match self { $($(Self::$sized => $flag,)?)* }
            }

            /// Returns the number of entries without the flag.
            #[must_use]
            pub const fn default_capacity(self) -> u32 {
                match self { $($(Self::$sized => $default,)?)* }
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
