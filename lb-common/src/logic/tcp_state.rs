//! What the segments of a TCP connection say of it. The other half of connection tracking, how long a flow may be idle, is
//! in [`super::ct`].

use super::packet::tcp_flags;
use crate::abi::ct_state;

/// The state of one direction after a segment with these flags.
///
/// A reset is believed only until the next segment comes that way: whoever resets a connection says nothing more. A SYN
/// begins anew.
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
    fn a_connection_is_over_when_both_have_said_so() {
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
    fn a_reset_that_nobody_meant_is_forgotten() {
        let reset = run(&[(true, ACK), (false, ACK), (true, tcp_flags::RST)]);
        assert!(is_over(reset.0, reset.1));
        let goes_on = run(&[(true, ACK), (false, ACK), (true, tcp_flags::RST), (true, ACK)]);
        assert!(!is_over(goes_on.0, goes_on.1));
        // What the other side says proves nothing: it may not have heard of it.
        let other = run(&[(true, ACK), (true, tcp_flags::RST), (false, ACK)]);
        assert!(is_over(other.0, other.1));
    }
}
