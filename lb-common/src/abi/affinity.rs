//! AFFINITY: which backend a client had last.

use core::mem::offset_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Addr;

/// What [`AffinityKey::client`] is.
pub mod client_kind {
    /// The address that packets come from.
    pub const ADDRESS: u32 = 0;
    /// A network namespace: a socket's source address is not known when it connects. Its cookie stands in the last
    /// eight bytes, in the machine's byte order.
    pub const NETNS: u32 = 1;
}

/// Key of AFFINITY: a client of a service port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AffinityKey {
    /// Who.
    pub client: Addr,
    /// Index into SERVICES.
    pub service: u32,
    /// What `client` is: see [`client_kind`].
    pub kind: u32,
}

const _: () = {
    assert!(size_of::<AffinityKey>() == 24 && align_of::<AffinityKey>() == 4);
    assert!(offset_of!(AffinityKey, service) == 16);
    assert!(offset_of!(AffinityKey, kind) == 20);
};

impl AffinityKey {
    /// A network namespace, by its cookie, as client of a service.
    #[must_use]
    pub fn of_netns(cookie: u64, service: u32) -> Self {
        let mut client = Addr::UNSPECIFIED;
        client.bytes[8..].copy_from_slice(&cookie.to_ne_bytes());
        Self {
            client,
            service,
            kind: client_kind::NETNS,
        }
    }

    /// The cookie of the network namespace that the client is, if it is one.
    #[must_use]
    pub fn netns(&self) -> Option<u64> {
        let [.., a, b, c, d, e, f, g, h] = self.client.bytes;
        (self.kind == client_kind::NETNS).then_some(u64::from_ne_bytes([a, b, c, d, e, f, g, h]))
    }
}

/// Value of AFFINITY. `backend` and `generation` are one aligned 8-byte word: read by one load, changed in place by one
/// compare-and-exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct Affinity {
    /// Index into BACKENDS.
    pub backend: u32,
    /// Generation of that entry.
    pub generation: u32,
    /// When it was last used: nanoseconds of CLOCK_MONOTONIC, at most a second old.
    pub used: u64,
}

const _: () = {
    assert!(size_of::<Affinity>() == 16 && align_of::<Affinity>() == 8);
    assert!(offset_of!(Affinity, used) == 8);
};

impl Affinity {
    /// The word that one 8-byte load of a map's value gives, taken apart: backend and generation.
    #[inline(always)]
    #[must_use]
    pub const fn from_word(word: u64) -> (u32, u32) {
        let b = word.to_ne_bytes();
        (
            u32::from_ne_bytes([b[0], b[1], b[2], b[3]]),
            u32::from_ne_bytes([b[4], b[5], b[6], b[7]]),
        )
    }

    /// The word of a backend and its generation.
    #[inline(always)]
    #[must_use]
    pub const fn to_word(backend: u32, generation: u32) -> u64 {
        let (b, g) = (backend.to_ne_bytes(), generation.to_ne_bytes());
        u64::from_ne_bytes([b[0], b[1], b[2], b[3], g[0], g[1], g[2], g[3]])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_told_by_its_cookie() {
        let key = AffinityKey::of_netns(0x1234_5678_9abc, 7);
        assert_eq!((key.netns(), key.service), (Some(0x1234_5678_9abc), 7));
        let address = AffinityKey {
            kind: client_kind::ADDRESS,
            ..key
        };
        assert_eq!(address.netns(), None);
    }
}
