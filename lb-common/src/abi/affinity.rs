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
