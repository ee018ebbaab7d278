//! The life of a socket record: numbers and comparisons; the atomic operations are the caller's.

use super::ip128::Ip128;

/// In place of the cookie in a slot that the agent is about to free: no socket has it, and no socket finds the slot free,
/// so nobody writes there who does not do so already. Readers pass it over.
pub const LEAVING: u64 = u64::MAX;

/// Whether a record with this sequence may be read: a writer has finished it.
#[inline(always)]
#[must_use]
pub const fn is_complete(sequence: u32) -> bool {
    sequence != 0 && sequence & 1 == 0
}

/// The sequence to store before the fields of a record are changed.
#[inline(always)]
#[must_use]
pub const fn opened(sequence: u32) -> u32 {
    sequence | 1
}

/// The sequence to store after the fields are complete: even, not zero, and another one than before.
#[inline(always)]
#[must_use]
pub const fn closed(sequence: u32) -> u32 {
    match opened(sequence).wrapping_add(1) {
        0 => 2,
        n => n,
    }
}

/// The slot of a socket in SOCKETS. `mask` is the number of slots less one, a power of two less one.
#[inline(always)]
#[must_use]
pub const fn slot(cookie: u64, mask: u32) -> u32 {
    cookie as u32 & mask
}

/// Whether the peer that a process sees is the backend that it was given, so that it is to see what it asked for
/// instead.
#[inline(always)]
#[must_use]
pub const fn is_backend(peer: (Ip128, u16), backend: (Ip128, u16)) -> bool {
    peer.1 == backend.1 && peer.0.same(backend.0)
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
        assert!(is_backend(backend, backend));
        assert!(!is_backend((backend.0, 80), backend));
        assert!(!is_backend((Ip128::from_v4(0x0301_0a0a), 8080), backend));
    }

    #[test]
    fn neighbouring_cookies_have_neighbouring_slots() {
        assert_eq!(slot(0x1_0000_0001, 0xff), 1);
        assert_eq!(slot(0x1ff, 0xff), 0xff);
    }
}
