//! Generations of services and backends: indexes are reused, so a reference needs more than an index.

use crate::abi::{Addr, Backend, ServiceIndex};

/// Returns whether an entry with this generation is in use.
#[inline(always)]
#[must_use]
pub const fn is_live(generation: u32) -> bool {
    generation & 1 == 1
}

/// Returns the generation of an entry when it is taken into use: the next odd number.
#[inline(always)]
#[must_use]
pub const fn taken(generation: u32) -> u32 {
    if is_live(generation) {
        generation.wrapping_add(2)
    } else {
        generation.wrapping_add(1)
    }
}

/// Returns the generation of an entry when it is withdrawn: the next even number, which no entry in use has.
#[inline(always)]
#[must_use]
pub const fn withdrawn(generation: u32) -> u32 {
    if is_live(generation) {
        generation.wrapping_add(1)
    } else {
        generation
    }
}

/// Returns whether a reference with a generation is current: the entry is in use and has the same generation.
#[inline(always)]
#[must_use]
pub const fn is_current(entry: u32, reference: u32) -> bool {
    is_live(entry) && entry == reference
}

/// Returns the seal of a backend: FNV-1a, 32 bits, over the fields that do not change while it is in use.
#[must_use]
pub fn seal(addr: Addr, port: u16, service: ServiceIndex, generation: u32) -> u32 {
    let mut hash = 0x811c_9dc5_u32;
    let mut mix = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
        }
    };
    mix(&addr.bytes);
    mix(&port.to_le_bytes());
    mix(&service.get().to_le_bytes());
    mix(&generation.to_le_bytes());
    hash
}

/// Returns whether the seal of a backend matches its fields.
#[must_use]
pub fn is_sealed(b: &Backend) -> bool {
    b.seal == seal(b.addr, b.port, b.service, b.generation)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_withdrawn_entry_is_never_current_again() {
        let mut generation = 0;
        for _ in 0..4 {
            let live = taken(generation);
            assert!(is_live(live) && is_current(live, live));
            let gone = withdrawn(live);
            assert!(!is_live(gone) && !is_current(gone, live) && !is_current(gone, gone));
            assert_ne!(taken(gone), live);
            generation = gone;
        }
    }

    #[test]
    fn wraps_without_losing_its_meaning() {
        assert!(is_live(taken(u32::MAX)));
        assert!(!is_live(withdrawn(u32::MAX)));
        assert_eq!(withdrawn(2), 2);
    }

    #[test]
    fn a_seal_covers_every_field() {
        let a = Addr::from_v4([10, 0, 0, 1]);
        let seal = |addr, port, service, generation| seal(addr, port, ServiceIndex::new(service), generation);
        let base = seal(a, 80, 1, 1);
        assert_ne!(base, seal(Addr::from_v4([10, 0, 0, 2]), 80, 1, 1));
        assert_ne!(base, seal(a, 81, 1, 1));
        assert_ne!(base, seal(a, 80, 2, 1));
        assert_ne!(base, seal(a, 80, 1, 3));
    }
}
