//! Keys and entries of CT and CT_NEW, as programs build them.

use super::delivery;
use super::ip128::Ip128;
use super::translation::Tuple;
use crate::abi::{BackendRef, CtEntryWords, CtKeyWords, ServiceIndex, Set};

impl CtKeyWords {
    /// Returns the key of the packets that have a tuple and an IANA protocol number.
    #[inline(always)]
    #[must_use]
    pub const fn new(tuple: &Tuple, proto: u8) -> Self {
        Self {
            src: tuple.src.0,
            dst: tuple.dst.0,
            src_port: tuple.src_port,
            dst_port: tuple.dst_port,
            proto_pad: u32::from_ne_bytes([proto, 0, 0, 0]),
        }
    }

    /// Returns the tuple of the packets.
    #[inline(always)]
    #[must_use]
    pub const fn tuple(&self) -> Tuple {
        Tuple {
            src: Ip128(self.src),
            dst: Ip128(self.dst),
            src_port: self.src_port,
            dst_port: self.dst_port,
        }
    }

    /// Returns the IANA protocol number.
    #[inline(always)]
    #[must_use]
    pub const fn proto(&self) -> u8 {
        self.proto_pad.to_ne_bytes()[0]
    }
}

impl CtEntryWords {
    /// Makes this the entry of a new flow; `now` is in nanoseconds of CLOCK_MONOTONIC.
    ///
    /// `reserved` stays: it is zero in every entry that a program builds, and zeroing it again would call a function that writes byte
    /// by byte.
    #[inline(always)]
    pub const fn begin(&mut self, translated: &Tuple, backend: BackendRef, service: ServiceIndex, set: Set, now: u64) {
        self.set_translated(translated);
        self.backend = backend;
        self.service = service;
        self.seen = now;
        self.flags = 0;
        self.state = 0;
        self.set = set as u8;
        self.pad = 0;
    }

    /// Replaces the translated tuple.
    #[inline(always)]
    const fn set_translated(&mut self, tuple: &Tuple) {
        self.src = tuple.src.0;
        self.dst = tuple.dst.0;
        self.src_port = tuple.src_port;
        self.dst_port = tuple.dst_port;
    }

    /// Returns the translated tuple.
    #[inline(always)]
    #[must_use]
    pub const fn translated(&self) -> Tuple {
        Tuple {
            src: Ip128(self.src),
            dst: Ip128(self.dst),
            src_port: self.src_port,
            dst_port: self.dst_port,
        }
    }

    /// Replaces the source address of the translated tuple.
    #[inline(always)]
    pub const fn set_source(&mut self, addr: Ip128) {
        self.src = addr.0;
    }

    /// Returns the set that serves the flow; `None` if the number is no set.
    #[inline(always)]
    #[must_use]
    pub const fn set(&self) -> Option<Set> {
        Set::from_u8(self.set)
    }

    /// Returns whether any of these `ct_flags` is set.
    #[inline(always)]
    #[must_use]
    pub const fn has(&self, flags: u16) -> bool {
        self.flags & flags != 0
    }

    /// Returns whether packets have their time to live decremented.
    #[inline(always)]
    #[must_use]
    pub const fn decrements_ttl(&self) -> bool {
        delivery::decrements_ttl(self.flags)
    }

    /// Returns the key of the other direction; `key` is that of this direction.
    #[inline(always)]
    #[must_use]
    pub const fn reverse_key(&self, key: &CtKeyWords) -> CtKeyWords {
        CtKeyWords::new(&self.translated().reversed(), key.proto())
    }

    /// Makes this the new entry for the direction opposite to that of `entry` and its `key`. `reserved` stays, as in
    /// [`Self::begin`].
    #[inline(always)]
    pub const fn begin_opposite(&mut self, entry: &Self, key: &CtKeyWords) {
        self.set_translated(&key.tuple().reversed());
        self.backend = entry.backend;
        self.service = entry.service;
        self.seen = entry.seen;
        self.flags = delivery::opposite(entry.flags);
        self.state = 0;
        self.set = entry.set;
        self.pad = 0;
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::FromZeros as _;

    use super::*;
    use crate::abi::{Addr, CtEntry, ct_flags};
    use crate::logic::ct::reverse_key;

    #[test]
    fn words_and_bytes_lead_to_the_same_other_direction() {
        let addr = |last| Ip128::from(Addr::from_v4([192, 0, 2, last]));
        let tuple = |src, src_port, dst, dst_port| Tuple {
            src: addr(src),
            dst: addr(dst),
            src_port,
            dst_port,
        };
        let backend = BackendRef { id: 5, generation: 7 };
        let owner = ServiceIndex::new(9);
        let key = CtKeyWords::new(&tuple(1, 1000, 2, 80), 6);
        let mut entry = CtEntryWords::new_zeroed();
        entry.begin(&tuple(3, 61_000, 4, 8080), backend, owner, Set::External, 11);
        assert_eq!(
            (key.as_key().proto, key.as_key().src_port, key.as_key().pad),
            (6, 1000, [0; 3])
        );
        assert_eq!(key.as_key().dst, Addr::from_v4([192, 0, 2, 2]));
        let CtEntry {
            backend: stored,
            service,
            seen,
            set,
            ..
        } = *entry.as_entry();
        assert_eq!((stored, service, seen, set), (backend, owner, 11, Set::External as u8));
        let other_key = entry.reverse_key(&key);
        assert_eq!(*other_key.as_key(), reverse_key(entry.as_entry(), 6));
        let mut other = CtEntryWords::new_zeroed();
        other.begin_opposite(&entry, &key);
        assert_eq!(*other.reverse_key(&other_key).as_key(), *key.as_key());
        assert!(other.has(ct_flags::REPLY) && !entry.has(ct_flags::REPLY));
    }
}
