//! Sequence numbers and comparisons of socket records. The caller performs the atomic operations.

use super::ip128::Ip128;

/// The cookie of a slot that the agent is about to free. No socket has this cookie, and the slot is not free for any, so no
/// program starts to write there. Readers skip the slot.
pub const LEAVING: u64 = u64::MAX;

/// Returns whether a record with this sequence may be read: its writer has finished.
#[inline(always)]
#[must_use]
pub const fn is_complete(sequence: u32) -> bool {
    sequence != 0 && sequence & 1 == 0
}

/// Returns the sequence to store before the fields of a record are changed.
#[inline(always)]
#[must_use]
pub const fn opened(sequence: u32) -> u32 {
    sequence | 1
}

/// Returns the sequence to store after the fields are complete: even, not zero, and different from the one before.
#[inline(always)]
#[must_use]
pub const fn closed(sequence: u32) -> u32 {
    match opened(sequence).wrapping_add(1) {
        0 => 2,
        n => n,
    }
}

/// Returns the slot of a socket in SOCKETS. `mask`: the number of slots, a power of two, minus one.
#[inline(always)]
#[must_use]
pub const fn slot(cookie: u64, mask: u32) -> u32 {
    cookie as u32 & mask
}

/// Returns whether two addresses with ports are equal: the peer of a socket and its backend, so that the process has to get the
/// requested destination instead, or a destination and the requested one.
#[inline(always)]
#[must_use]
pub const fn is_same(one: (Ip128, u16), other: (Ip128, u16)) -> bool {
    one.1 == other.1 && one.0.same(other.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_complete_only_between_closed_and_opened() {
        let mut sequence = 0;
        assert!(!is_complete(sequence));
        for _ in 0..3 {
            let before = sequence;
            sequence = opened(sequence);
            assert!(!is_complete(sequence));
            sequence = closed(sequence);
            assert!(is_complete(sequence));
            assert_ne!(sequence, before);
        }
        assert!(is_complete(closed(u32::MAX)));
    }

    #[test]
    fn only_the_backend_is_translated() {
        let backend = (Ip128::from_v4(0x0201_0a0a), 8080);
        assert!(is_same(backend, backend));
        assert!(!is_same((backend.0, 80), backend));
        assert!(!is_same((Ip128::from_v4(0x0301_0a0a), 8080), backend));
    }

    #[test]
    fn neighbouring_cookies_have_neighbouring_slots() {
        assert_eq!(slot(0x1_0000_0001, 0xff), 1);
        assert_eq!(slot(0x1ff, 0xff), 0xff);
    }
}
