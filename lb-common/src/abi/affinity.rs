//! AFFINITY: the last backend of each client of a service port with session affinity.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::enums::abi_enum;
use super::layout::{layout, mirror};
use super::{Addr, BackendRef, ServiceIndex};

abi_enum! {
    /// Kind of the client in [`AffinityKey::client`].
    pub enum ClientKind: u32, from_u32 {
        /// The source address of packets.
        Address = 0, "address";
        /// A network namespace, since the source address of a socket is not known when it connects. The cookie of the
        /// namespace is in the last eight bytes, in the byte order of the machine.
        Netns = 1, "netns";
    }
}

/// Key of AFFINITY: a client of a service port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AffinityKey {
    /// The client: an address, or the cookie of a network namespace.
    pub client: Addr,
    /// The service port.
    pub service: ServiceIndex,
    /// Number of the [`ClientKind`].
    pub kind: u32,
}

layout!(AffinityKey: size 24, align 4 { client: 0, service: 16, kind: 20 });

/// An [`AffinityKey`] as programs build it: the compiler would write the address of an [`AffinityKey`] byte by byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AffinityKeyWords {
    /// The client, each word in the byte order of memory.
    pub client: [u64; 2],
    /// The service port.
    pub service: ServiceIndex,
    /// Number of the [`ClientKind`].
    pub kind: u32,
}

mirror!(AffinityKeyWords of AffinityKey { client: client, service: service, kind: kind });

impl AffinityKeyWords {
    /// Returns the key that has these bytes.
    #[inline(always)]
    #[must_use]
    pub const fn as_key(&self) -> &AffinityKey {
        zerocopy::transmute_ref!(self)
    }
}

impl AffinityKey {
    /// Returns the key of a network namespace, by its cookie, as a client of a service index.
    #[must_use]
    pub fn of_netns(cookie: u64, service: ServiceIndex) -> Self {
        let mut client = Addr::UNSPECIFIED;
        client.bytes[8..].copy_from_slice(&cookie.to_ne_bytes());
        Self {
            client,
            service,
            kind: ClientKind::Netns as u32,
        }
    }

    /// Returns the key of a source address as a client of a service index.
    #[must_use]
    pub const fn of_addr(client: Addr, service: ServiceIndex) -> Self {
        Self {
            client,
            service,
            kind: ClientKind::Address as u32,
        }
    }

    /// Returns the cookie of the client's network namespace, if the client is one.
    #[must_use]
    pub fn netns(&self) -> Option<u64> {
        let [.., a, b, c, d, e, f, g, h] = self.client.bytes;
        match ClientKind::from_u32(self.kind) {
            Some(ClientKind::Netns) => Some(u64::from_ne_bytes([a, b, c, d, e, f, g, h])),
            Some(ClientKind::Address) | None => None,
        }
    }
}

/// Value of AFFINITY. `backend` is one aligned 8-byte word: programs read it by one load and change it in place by one
/// compare-and-exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct Affinity {
    /// The last backend of the client.
    pub backend: BackendRef,
    /// Time of the last use, in nanoseconds of CLOCK_MONOTONIC. It is refreshed at most once a second.
    pub used: u64,
}

layout!(Affinity: size 16, align 8 { backend: 0, used: 8 });

impl Affinity {
    /// Returns the backend in the word that one 8-byte load of a value gives.
    #[inline(always)]
    #[must_use]
    pub const fn from_word(word: u64) -> BackendRef {
        zerocopy::transmute!(word)
    }

    /// Returns the first word of a value that has this backend.
    #[inline(always)]
    #[must_use]
    pub const fn to_word(backend: BackendRef) -> u64 {
        zerocopy::transmute!(backend)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_netns_client_is_identified_by_its_cookie() {
        let service = ServiceIndex::new(7);
        let key = AffinityKey::of_netns(0x1234_5678_9abc, service);
        assert_eq!((key.netns(), key.service), (Some(0x1234_5678_9abc), service));
        let address = AffinityKey::of_addr(key.client, service);
        assert_eq!(address.netns(), None);
    }
}
