//! SERVICES, BACKEND_SLOTS, BACKENDS and NAMES.

use core::mem::offset_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Addr;

/// One of a service's three backend sets: where its slots stand. An aligned 8-byte word, read by one volatile load and
/// then split, replaced by one store: that store is the publication of a new set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct SetWord {
    /// First slot in BACKEND_SLOTS.
    pub base: u32,
    /// Number of slots. Zero: the set is empty, and `flags` says what that means.
    pub len: u16,
    /// See [`set_flags`].
    pub flags: u16,
}

const _: () = {
    assert!(size_of::<SetWord>() == 8 && align_of::<SetWord>() == 8);
    assert!(offset_of!(SetWord, len) == 4);
    assert!(offset_of!(SetWord, flags) == 6);
};

impl SetWord {
    /// From the word that one 8-byte load gives.
    #[inline(always)]
    #[must_use]
    pub const fn from_word(word: u64) -> Self {
        let b = word.to_ne_bytes();
        Self {
            base: u32::from_ne_bytes([b[0], b[1], b[2], b[3]]),
            len: u16::from_ne_bytes([b[4], b[5]]),
            flags: u16::from_ne_bytes([b[6], b[7]]),
        }
    }

    /// The word that one 8-byte store takes.
    #[inline(always)]
    #[must_use]
    pub const fn to_word(self) -> u64 {
        let base = self.base.to_ne_bytes();
        let len = self.len.to_ne_bytes();
        let flags = self.flags.to_ne_bytes();
        u64::from_ne_bytes([base[0], base[1], base[2], base[3], len[0], len[1], flags[0], flags[1]])
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
    /// Serves the same from inside the cluster: all usable endpoints.
    pub cluster: SetWord,
    /// See [`service_flags`].
    pub flags: u32,
    /// `sessionAffinityConfig.clientIP.timeoutSeconds`; zero without affinity.
    pub affinity_timeout: u32,
    /// Odd while the index is in use, even while it is not; one more at each change between the two. NAMES holds the
    /// same.
    pub generation: u32,
    /// Zero.
    pub pad: u32,
}

const _: () = {
    assert!(size_of::<Service>() == 40 && align_of::<Service>() == 8);
    assert!(offset_of!(Service, external) == 8);
    assert!(offset_of!(Service, cluster) == 16);
    assert!(offset_of!(Service, flags) == 24);
    assert!(offset_of!(Service, generation) == 32);
};

/// Bits of [`Service::flags`].
pub mod service_flags {
    /// `sessionAffinity: ClientIP`.
    pub const AFFINITY: u32 = 1;
    /// `loadBalancerSourceRanges` are set: at a load-balancer address only the packet path, which knows the source, may
    /// decide.
    pub const SOURCE_RANGES: u32 = 2;
}

/// Value of BACKEND_SLOTS: one member of one set, with all that a connection needs, so that the data plane reads one
/// cache line. Never changed while a set that it belongs to is published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct BackendSlot {
    /// Address of the backend.
    pub addr: Addr,
    /// Port of the backend, host byte order.
    pub port: u16,
    /// See [`backend_flags`].
    pub flags: u16,
    /// Index into BACKENDS.
    pub backend: u32,
    /// [`Backend::generation`] of the backend that is meant.
    pub generation: u32,
    /// Zero.
    pub pad: u32,
}

const _: () = {
    assert!(size_of::<BackendSlot>() == 32 && align_of::<BackendSlot>() == 8);
    assert!(offset_of!(BackendSlot, port) == 16);
    assert!(offset_of!(BackendSlot, backend) == 20);
    assert!(offset_of!(BackendSlot, generation) == 24);
};

/// Bits of [`BackendSlot::flags`] and [`Backend::flags`].
pub mod backend_flags {
    /// Member of the internal set (BACKENDS only).
    pub const INTERNAL: u16 = 1;
    /// Member of the external set (BACKENDS only).
    pub const EXTERNAL: u16 = 2;
    /// Member of the whole-cluster set (BACKENDS only).
    pub const CLUSTER: u16 = 4;
    /// Member of any set.
    pub const SETS: u16 = INTERNAL | EXTERNAL | CLUSTER;
    /// Runs on this node.
    pub const LOCAL: u16 = 8;
}

/// Value of BACKENDS: what affinity, sockets and flows refer to, by index and generation. Index zero is never used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct Backend {
    /// Address of the backend.
    pub addr: Addr,
    /// Port of the backend, host byte order.
    pub port: u16,
    /// Which sets it is a member of: see [`backend_flags`]. None: it drains (terminating, still serving); connections
    /// to it live on.
    pub flags: u16,
    /// Index into SERVICES that it belongs to.
    pub service: u32,
    /// Odd while the entry is in use, even after it was withdrawn; stored last when the entry is filled, first when it
    /// is withdrawn.
    pub generation: u32,
    /// [`crate::logic::generation::seal`] of address, port, service and generation: tells a write from outside.
    pub seal: u32,
}

const _: () = {
    assert!(size_of::<Backend>() == 32 && align_of::<Backend>() == 8);
    assert!(offset_of!(Backend, port) == 16);
    assert!(offset_of!(Backend, service) == 20);
    assert!(offset_of!(Backend, generation) == 24);
    assert!(offset_of!(Backend, seal) == 28);
};

/// Value of NAMES: whose a service index is. For people, and for adoption at restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Name {
    /// Namespace, padded with zero bytes.
    pub namespace: [u8; 64],
    /// Name of the Service, padded with zero bytes.
    pub name: [u8; 64],
    /// Name of the port, padded with zero bytes; empty where the only port has none.
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

const _: () = {
    assert!(size_of::<Name>() == 200);
    assert!(offset_of!(Name, generation) == 192);
};
