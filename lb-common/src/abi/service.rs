//! SERVICES, BACKEND_SLOTS, BACKENDS and NAMES.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::layout::layout;
use super::{Addr, BackendRef, ServiceIndex, Set};

/// One of a service port's three sets: a range of slots. An aligned 8-byte word: programs read it by one volatile load
/// and split it afterwards, and the agent publishes a new set by one store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct SetWord {
    /// First slot in BACKEND_SLOTS.
    pub base: u32,
    /// Number of slots. Zero if the set is empty; `flags` then has the reason.
    pub len: u16,
    /// See [`set_flags`].
    pub flags: u16,
}

layout!(SetWord: size 8, align 8 { base: 0, len: 4, flags: 6 });

impl SetWord {
    /// The word of no set.
    pub const NONE: Self = Self {
        base: 0,
        len: 0,
        flags: 0,
    };

    /// Returns the set word in the word that one 8-byte load gives.
    #[inline(always)]
    #[must_use]
    pub const fn from_word(word: u64) -> Self {
        zerocopy::transmute!(word)
    }

    /// Returns the word that one 8-byte store takes.
    #[inline(always)]
    #[must_use]
    pub const fn to_word(self) -> u64 {
        zerocopy::transmute!(self)
    }
}

/// Bits of [`SetWord::flags`].
pub mod set_flags {
    /// An empty set means DROP (policy Local and no endpoint on this node) instead of REJECT.
    pub const EMPTY_DROPS: u16 = 1;
}

/// Value of SERVICES: one Service port in one family. Index zero is never used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct Service {
    /// Serves cluster IPs: `internalTrafficPolicy` applied.
    pub internal: SetWord,
    /// Serves node ports, external and load-balancer addresses from outside: `externalTrafficPolicy` applied.
    pub external: SetWord,
    /// Serves node ports, external and load-balancer addresses from inside the cluster: all usable endpoints.
    pub cluster: SetWord,
    /// See [`service_flags`].
    pub flags: u32,
    /// `sessionAffinityConfig.clientIP.timeoutSeconds`; zero without affinity.
    pub affinity_timeout: u32,
    /// Odd while the index is in use, even while it is not; incremented at each change between the two. NAMES stores the
    /// same number.
    pub generation: u32,
    /// Zero.
    pub pad: u32,
    /// Zero: room for fields of later builds.
    pub reserved: [u64; 3],
}

layout!(Service: size 64, align 8 {
    internal: 0,
    external: 8,
    cluster: 16,
    flags: 24,
    affinity_timeout: 28,
    generation: 32,
    pad: 36,
    reserved: 40,
});

impl Service {
    /// Returns the set words, in the order of [`Set::ALL`].
    #[must_use]
    pub const fn set_words(&self) -> [SetWord; 3] {
        [self.internal, self.external, self.cluster]
    }

    /// Returns the set word of a set.
    #[must_use]
    pub const fn set_word(&self, set: Set) -> SetWord {
        match set {
            Set::Internal => self.internal,
            Set::External => self.external,
            Set::Cluster => self.cluster,
        }
    }

    /// Returns a reference to the set word of a set.
    #[must_use]
    pub const fn set_word_mut(&mut self, set: Set) -> &mut SetWord {
        match set {
            Set::Internal => &mut self.internal,
            Set::External => &mut self.external,
            Set::Cluster => &mut self.cluster,
        }
    }
}

// `set_words` and `Set::ALL` are in the same order.
const _: () = assert!(matches!(Set::ALL, [Set::Internal, Set::External, Set::Cluster]));

/// Bits of [`Service::flags`].
pub mod service_flags {
    /// `sessionAffinity: ClientIP`.
    pub const AFFINITY: u32 = 1;
    /// `loadBalancerSourceRanges` are set: only the packet path, which knows the source, decides at a load-balancer
    /// address.
    pub const SOURCE_RANGES: u32 = 2;
}

/// Value of BACKEND_SLOTS: one member of one set, with everything that a connection needs, so that the data plane reads
/// one cache line. It never changes while a set that contains it is published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct BackendSlot {
    /// Address of the backend.
    pub addr: Addr,
    /// Port of the backend, host byte order.
    pub port: u16,
    /// See [`backend_flags`].
    pub flags: u16,
    /// The backend.
    pub backend: BackendRef,
    /// The service port of the set. Zero if a build of layout 3 wrote the slot.
    pub service: ServiceIndex,
}

layout!(BackendSlot: size 32, align 8 { addr: 0, port: 16, flags: 18, backend: 20, service: 28 });

/// Bits of [`BackendSlot::flags`] and [`Backend::flags`].
pub mod backend_flags {
    /// Member of the internal set (BACKENDS only).
    pub const INTERNAL: u16 = 1;
    /// Member of the external set (BACKENDS only).
    pub const EXTERNAL: u16 = 2;
    /// Member of the cluster set (BACKENDS only).
    pub const CLUSTER: u16 = 4;
    /// Member of any set.
    pub const SETS: u16 = INTERNAL | EXTERNAL | CLUSTER;
    /// The backend runs on this node.
    pub const LOCAL: u16 = 8;
}

/// Value of BACKENDS: a backend that affinity, sockets and flows refer to by a [`BackendRef`]. Index zero is never used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct Backend {
    /// Address of the backend.
    pub addr: Addr,
    /// Port of the backend, host byte order.
    pub port: u16,
    /// Sets that contain the backend: see [`backend_flags`]. If none does, the backend is draining (terminating, still
    /// serving), and connections to it continue.
    pub flags: u16,
    /// Its service port.
    pub service: ServiceIndex,
    /// Odd while the entry is in use, even after the backend was withdrawn; stored last when the entry is filled, and
    /// first when the backend is withdrawn.
    pub generation: u32,
    /// [`crate::logic::generation::seal`] of address, port, service and generation: reveals a write from outside.
    pub seal: u32,
}

layout!(Backend: size 32, align 8 { addr: 0, port: 16, flags: 18, service: 20, generation: 24, seal: 28 });

/// Value of NAMES: the service port of a service index. For people, and for adoption at a restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Name {
    /// Namespace, padded with zero bytes.
    pub namespace: [u8; 64],
    /// Name of the Service, padded with zero bytes.
    pub name: [u8; 64],
    /// Name of the port, padded with zero bytes; empty if the only port has no name.
    pub port_name: [u8; 64],
    /// [`Service::generation`] of the index.
    pub generation: u32,
    /// `spec.ports[].port`, host byte order.
    pub port: u16,
    /// IANA protocol number.
    pub proto: u8,
    /// 4 or 6.
    pub family: u8,
}

layout!(Name: size 200, align 4 {
    namespace: 0,
    name: 64,
    port_name: 128,
    generation: 192,
    port: 196,
    proto: 198,
    family: 199,
});
