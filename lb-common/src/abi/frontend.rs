//! FRONTENDS: the service port of each destination.

use core::mem::offset_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::enums::abi_enum;
use super::layout::layout;
use super::{Addr, ServiceIndex, SetWord};

/// Key of FRONTENDS: a destination that clients connect to, or an address mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FrontendKey {
    /// Destination address. Zero (of the family: `::ffff:0.0.0.0` or `::`) for node ports.
    pub addr: Addr,
    /// Destination port, host byte order. Zero together with `proto` in an address mark.
    pub port: u16,
    /// IANA protocol number: 6, 17 or 132. Zero in an address mark.
    pub proto: u8,
    /// Zero.
    pub pad: u8,
}

layout!(FrontendKey: size 20, align 4 { addr: 0, port: 16, proto: 18, pad: 19 });

/// A [`FrontendKey`] as programs build it: the compiler would write the address of a [`FrontendKey`] byte by byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FrontendKeyWords {
    /// Address, each word in the byte order of memory.
    addr: [u64; 2],
    /// Port in host byte order, protocol, and five zero bytes, in memory order; the key has one of the zero bytes.
    port_proto: u64,
}

/// A [`FrontendKey`] followed by zero bytes, up to the size of [`FrontendKeyWords`].
#[derive(FromBytes, Immutable)]
#[repr(C)]
struct PaddedFrontendKey {
    key: FrontendKey,
    _zero: u32,
}

const _: () = {
    assert!(size_of::<FrontendKeyWords>() == size_of::<PaddedFrontendKey>());
    assert!(offset_of!(FrontendKeyWords, addr) == offset_of!(PaddedFrontendKey, key.addr));
    assert!(offset_of!(FrontendKeyWords, port_proto) == offset_of!(PaddedFrontendKey, key.port));
    assert!(offset_of!(PaddedFrontendKey, key.proto) == offset_of!(PaddedFrontendKey, key.port) + 2);
};

impl FrontendKeyWords {
    /// Returns the key of an address, a port in host byte order, and an IANA protocol number.
    #[inline(always)]
    #[must_use]
    pub const fn new(addr: [u64; 2], port: u16, proto: u8) -> Self {
        let [p, q] = port.to_ne_bytes();
        Self {
            addr,
            port_proto: u64::from_ne_bytes([p, q, proto, 0, 0, 0, 0, 0]),
        }
    }

    /// Returns the key that has these bytes.
    #[inline(always)]
    #[must_use]
    pub const fn as_key(&self) -> &FrontendKey {
        let padded: &PaddedFrontendKey = zerocopy::transmute_ref!(self);
        &padded.key
    }
}

impl FrontendKey {
    /// Returns the key of a port of an address.
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

    /// Returns the key of the address mark of `addr`. Programs look it up after a miss, so that a port that the address
    /// does not have is rejected instead of leaving by the default route.
    #[inline(always)]
    #[must_use]
    pub const fn address_mark(addr: Addr) -> Self {
        Self::new(addr, 0, 0)
    }
}

/// Value of FRONTENDS, two aligned 8-byte words: programs read each by one load, and the agent changes each in place by one
/// store. Programs may read a new word beside an old one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct Frontend {
    /// The service port. Zero in an address mark.
    pub service: ServiceIndex,
    /// Number of the [`FrontendKind`].
    pub kind: u8,
    /// Zero.
    pub pad: [u8; 3],
    /// The set that serves sockets, if programs need nothing else of the entry of SERVICES: see
    /// [`crate::logic::selection::set_in_frontend`]. Else zero. Its slots are valid if they have the same service
    /// index as the frontend.
    pub set: SetWord,
}

layout!(Frontend: size 16, align 8 { service: 0, kind: 4, pad: 5, set: 8 });

impl Frontend {
    /// Returns the value of an address mark.
    #[inline(always)]
    #[must_use]
    pub const fn mark(kind: FrontendKind) -> Self {
        Self::new(ServiceIndex::NONE, kind)
    }

    /// Returns whether this is an address mark, which leads to no service.
    #[inline(always)]
    #[must_use]
    pub const fn is_mark(self) -> bool {
        match FrontendKind::from_u8(self.kind) {
            Some(kind) => kind.is_mark(),
            None => false,
        }
    }

    /// Returns a frontend of a service index.
    #[inline(always)]
    #[must_use]
    pub const fn new(service: ServiceIndex, kind: FrontendKind) -> Self {
        Self {
            service,
            kind: kind as u8,
            pad: [0; 3],
            set: SetWord::NONE,
        }
    }

    /// Returns the value in two words, each of which one 8-byte load gives.
    #[inline(always)]
    #[must_use]
    pub const fn from_words(words: [u64; 2]) -> Self {
        zerocopy::transmute!(words)
    }

    /// Returns the two words, each of which one 8-byte store takes.
    #[inline(always)]
    #[must_use]
    pub const fn to_words(self) -> [u64; 2] {
        zerocopy::transmute!(self)
    }
}

abi_enum! {
    /// The field of a Service that a frontend comes from. It decides which of the service port's sets serves it.
    pub enum FrontendKind: u8, from_u8 {
        /// No frontend, but an address mark; see [`FrontendKey::address_mark`].
        Address = 1, "Address";
        /// `spec.clusterIPs`.
        ClusterIp = 2, "ClusterIP";
        /// `spec.ports[].nodePort`.
        NodePort = 3, "NodePort";
        /// `spec.externalIPs`.
        ExternalIp = 4, "ExternalIP";
        /// `status.loadBalancer.ingress[].ip`.
        LoadBalancer = 5, "LoadBalancer";
        /// An address mark of an external or load-balancer address that is no cluster IP: for packets only, and never of
        /// an address of a node.
        ExternalAddress = 6, "ExternalAddress";
    }
}

impl FrontendKind {
    /// Returns whether this is the kind of an address mark, not of a frontend.
    #[inline(always)]
    #[must_use]
    pub const fn is_mark(self) -> bool {
        match self {
            Self::Address | Self::ExternalAddress => true,
            Self::ClusterIp | Self::NodePort | Self::ExternalIp | Self::LoadBalancer => false,
        }
    }
}

/// The "packet" of the agent call `lb_frontend_swap`: stores `value` under `key` by two 8-byte stores, if the key exists.
///
/// The map API cannot do this: `bpf_map_update_elem` of an existing hash key links a new element and unlinks the old
/// one, and a lookup in between returns NULL (`htab_map_update_elem` in `kernel/bpf/hashtab.c`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FrontendSwap {
    /// Key of the entry.
    pub key: FrontendKey,
    /// Zero.
    pub pad: u32,
    /// [`Frontend::to_words`] of the new value.
    pub value: [u64; 2],
}

layout!(FrontendSwap: size 40, align 8 { key: 0, pad: 20, value: 24 });
