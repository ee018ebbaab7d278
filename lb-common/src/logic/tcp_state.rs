//! TCP state of a flow, from the flags of its segments. The idle timeouts that follow from it are in [`super::ct`].

use super::packet::tcp_flags;
use crate::abi::ct_state;

/// Returns the state of one direction after a segment with these flags.
///
/// A reset is valid only until the next segment in its direction, since a host that resets a connection sends nothing
/// afterwards. A SYN starts another connection.
#[inline(always)]
#[must_use]
pub const fn after(state: u8, flags: u8) -> u8 {
    if flags & tcp_flags::RST != 0 {
        return state | ct_state::RST;
    }
    if flags & tcp_flags::SYN != 0 {
        return ct_state::SYN;
    }
    let alive = state & !ct_state::RST;
    if flags & tcp_flags::FIN != 0 {
        alive | ct_state::FIN
    } else {
        alive
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use crate::logic::ct::Phase;

    const ACK: u8 = tcp_flags::ACK;
    const FIN: u8 = tcp_flags::FIN | ACK;

    fn run(segments: &[(bool, u8)]) -> (u8, u8) {
        let mut states = (0, 0);
        for (from_client, flags) in segments {
            let state = if *from_client { &mut states.0 } else { &mut states.1 };
            *state = after(*state, *flags);
        }
        states
    }

    fn is_over(one: u8, other: u8) -> bool {
        Phase::of(true, [one, other]).is_end()
    }

    #[test]
    fn connection_ends_when_both_sides_have_closed() {
        let mut segments = std::vec![(true, tcp_flags::SYN), (false, tcp_flags::SYN | ACK), (true, ACK)];
        for (segment, over) in [
            ((true, ACK), false),
            ((false, FIN), false),
            ((true, ACK), false),
            ((true, FIN), true),
            ((false, ACK), true),
        ] {
            segments.push(segment);
            let (one, other) = run(&segments);
            assert_eq!(is_over(one, other), over, "{segments:?}");
        }
        segments.push((true, tcp_flags::SYN));
        let (one, other) = run(&segments);
        assert!(!is_over(one, other));
    }

    #[test]
    fn spurious_rst_is_cleared_by_next_segment() {
        let reset = run(&[(true, ACK), (false, ACK), (true, tcp_flags::RST)]);
        assert!(is_over(reset.0, reset.1));
        let continued = run(&[(true, ACK), (false, ACK), (true, tcp_flags::RST), (true, ACK)]);
        assert!(!is_over(continued.0, continued.1));
        // A segment of the opposite direction proves nothing: its sender may not have received the RST yet.
        let other = run(&[(true, ACK), (true, tcp_flags::RST), (false, ACK)]);
        assert!(is_over(other.0, other.1));
    }
}
