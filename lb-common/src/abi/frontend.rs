//! FRONTENDS: from a destination to a service.

use core::mem::offset_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Addr;

/// Key of FRONTENDS: a destination that clients connect to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FrontendKey {
    /// Destination address. Zero (of the family: `::ffff:0.0.0.0` or `::`) for node ports.
    pub addr: Addr,
    /// Destination port, host byte order. Zero together with `proto` zero marks a service address.
    pub port: u16,
    /// IANA protocol number: 6, 17 or 132.
    pub proto: u8,
    /// Zero.
    pub pad: u8,
}

const _: () = {
    assert!(size_of::<FrontendKey>() == 20 && align_of::<FrontendKey>() == 4);
    assert!(offset_of!(FrontendKey, port) == 16);
    assert!(offset_of!(FrontendKey, proto) == 18);
};

impl FrontendKey {
    /// The key of a port of an address.
    #[inline(always)]
    #[must_use]
    pub const fn new(addr: Addr, port: u16, proto: u8) -> Self {
        Self {
            addr,
            port,
            proto,
            pad: 0,
        }
    }

    /// The key that marks `addr` as a service address: looked up after a miss, so that a port that the address does not
    /// have is rejected instead of leaving by the default route.
    #[inline(always)]
    #[must_use]
    pub const fn address_mark(addr: Addr) -> Self {
        Self::new(addr, 0, 0)
    }
}

/// Value of FRONTENDS, an aligned 8-byte word: read by one load, changed in place by one store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct Frontend {
    /// Index into SERVICES, STATS and NAMES. Zero for marks.
    pub service: u32,
    /// A [`FrontendKind`].
    pub kind: u8,
    /// Zero.
    pub pad: [u8; 3],
}

const _: () = {
    assert!(size_of::<Frontend>() == 8 && align_of::<Frontend>() == 8);
    assert!(offset_of!(Frontend, kind) == 4);
};

impl Frontend {
    /// The mark of a service address.
    #[inline(always)]
    #[must_use]
    pub const fn mark(kind: FrontendKind) -> Self {
        Self::new(0, kind)
    }

    /// Whether it marks a service address, and leads nowhere.
    #[inline(always)]
    #[must_use]
    pub const fn is_mark(self) -> bool {
        match FrontendKind::from_u8(self.kind) {
            Some(kind) => kind.is_mark(),
            None => false,
        }
    }

    /// A frontend of a service.
    #[inline(always)]
    #[must_use]
    pub const fn new(service: u32, kind: FrontendKind) -> Self {
        Self {
            service,
            kind: kind as u8,
            pad: [0; 3],
        }
    }

    /// From the word that one 8-byte load gives.
    #[inline(always)]
    #[must_use]
    pub const fn from_word(word: u64) -> Self {
        let b = word.to_ne_bytes();
        Self {
            service: u32::from_ne_bytes([b[0], b[1], b[2], b[3]]),
            kind: b[4],
            pad: [b[5], b[6], b[7]],
        }
    }

    /// The word that one 8-byte store takes.
    #[inline(always)]
    #[must_use]
    pub const fn to_word(self) -> u64 {
        let s = self.service.to_ne_bytes();
        u64::from_ne_bytes([s[0], s[1], s[2], s[3], self.kind, self.pad[0], self.pad[1], self.pad[2]])
    }
}

/// What a frontend is: which of the service's sets serves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum FrontendKind {
    /// Not a frontend, but the mark of a service address; see [`FrontendKey::address_mark`].
    Address = 1,
    /// `spec.clusterIPs`.
    ClusterIp = 2,
    /// `spec.ports[].nodePort`.
    NodePort = 3,
    /// `spec.externalIPs`.
    ExternalIp = 4,
    /// `status.loadBalancer.ingress[].ip`.
    LoadBalancer = 5,
    /// As [`Self::Address`], of an external or load-balancer address that is no cluster IP: for packets only, and never of
    /// an address of a node.
    ExternalAddress = 6,
}

impl FrontendKind {
    /// The kind with a number, if there is one.
    #[inline(always)]
    #[must_use]
    pub const fn from_u8(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Address),
            2 => Some(Self::ClusterIp),
            3 => Some(Self::NodePort),
            4 => Some(Self::ExternalIp),
            5 => Some(Self::LoadBalancer),
            6 => Some(Self::ExternalAddress),
            _ => None,
        }
    }

    /// Not a frontend, but the mark of a service address.
    #[inline(always)]
    #[must_use]
    pub const fn is_mark(self) -> bool {
        matches!(self, Self::Address | Self::ExternalAddress)
    }

    /// The name that tables and JSON show.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Address => "Address",
            Self::ClusterIp => "ClusterIP",
            Self::NodePort => "NodePort",
            Self::ExternalIp => "ExternalIP",
            Self::LoadBalancer => "LoadBalancer",
            Self::ExternalAddress => "ExternalAddress",
        }
    }
}

/// The "packet" that `lb_frontend_swap` takes: store `value` at `key`, by one 8-byte store, if the key is there.
///
/// The map API cannot do this: `bpf_map_update_elem` of an existing hash key links a new element and unlinks the old
/// one, and a lookup in between returns NULL (`htab_map_update_elem` in `kernel/bpf/hashtab.c`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FrontendSwap {
    /// Which entry.
    pub key: FrontendKey,
    /// Zero.
    pub pad: u32,
    /// [`Frontend::to_word`] of the new value.
    pub value: u64,
}

const _: () = {
    assert!(size_of::<FrontendSwap>() == 32);
    assert!(offset_of!(FrontendSwap, value) == 24);
};
