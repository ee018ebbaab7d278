//! When a flow of packets is over: how long it may be idle.

use super::idle::SECOND;
use super::translation::Tuple;
use crate::abi::{CtEntry, CtKey, ct_state, ip_protocol};

/// How long a flow may be idle, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// TCP, from the segment on by which the client says that it has the server's answer.
    pub established: u64,
    /// TCP, closed in one direction.
    pub half_closed: u64,
    /// TCP, closed in both.
    pub closed: u64,
    /// TCP, reset in either.
    pub reset: u64,
    /// TCP before that.
    pub new: u64,
    /// UDP, answered; and whatever is neither.
    pub datagrams: u64,
    /// UDP without an answer.
    pub new_datagrams: u64,
}

impl Timeouts {
    /// Where nobody says otherwise: those of kube-proxy where it sets them, else such as the kernel's own connection
    /// tracking has.
    pub const DEFAULT: Self = Self {
        established: 24 * 3600 * SECOND,
        half_closed: 3600 * SECOND,
        closed: 120 * SECOND,
        reset: 10 * SECOND,
        new: 60 * SECOND,
        datagrams: 120 * SECOND,
        new_datagrams: 30 * SECOND,
    };

    /// The shortest one: what was seen since is not over, whatever else is known.
    #[must_use]
    pub fn shortest(&self) -> u64 {
        let Self {
            established,
            half_closed,
            closed,
            reset,
            new,
            datagrams,
            new_datagrams,
        } = *self;
        let streams = established.min(half_closed).min(closed).min(reset).min(new);
        streams.min(datagrams).min(new_datagrams)
    }

    /// Of a flow in a phase.
    #[must_use]
    pub const fn of(&self, proto: u8, phase: Phase) -> u64 {
        match (proto, phase) {
            (ip_protocol::TCP, Phase::New) => self.new,
            (ip_protocol::TCP, Phase::Established) => self.established,
            (ip_protocol::TCP, Phase::HalfClosed) => self.half_closed,
            (ip_protocol::TCP, Phase::Closed) => self.closed,
            (ip_protocol::TCP, Phase::Reset) => self.reset,
            (_, Phase::New) => self.new_datagrams,
            _ => self.datagrams,
        }
    }
}

/// How far a flow has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Nobody has answered; or, of TCP, the client has not heard of it.
    New,
    /// It stands in CT.
    Established,
    /// One side has said that it sends nothing more.
    HalfClosed,
    /// Both have.
    Closed,
    /// One has broken it off.
    Reset,
}

impl Phase {
    /// By what came in each direction ([`ct_state`]); a direction that is not known has zero. `established`: the flow
    /// stands in CT.
    #[inline(always)]
    #[must_use]
    pub const fn of(established: bool, states: [u8; 2]) -> Self {
        let [one, other] = states;
        if (one | other) & ct_state::RST != 0 {
            Self::Reset
        } else if !established {
            Self::New
        } else if one & other & ct_state::FIN != 0 {
            Self::Closed
        } else if (one | other) & ct_state::FIN != 0 {
            Self::HalfClosed
        } else {
            Self::Established
        }
    }

    /// Whether both sides are done, so that a SYN between the same ports is another connection.
    #[inline(always)]
    #[must_use]
    pub const fn is_end(self) -> bool {
        matches!(self, Self::Closed | Self::Reset)
    }
}

/// The key of the other direction: the reverse of what packets of this one become.
#[must_use]
pub fn reverse_key(entry: &CtEntry, proto: u8) -> CtKey {
    let becomes = Tuple {
        src: entry.src.into(),
        dst: entry.dst.into(),
        src_port: entry.src_port,
        dst_port: entry.dst_port,
    };
    let key = becomes.reversed();
    CtKey {
        src: key.src.into(),
        dst: key.dst.into(),
        src_port: key.src_port,
        dst_port: key.dst_port,
        proto,
        pad: [0; 3],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::Addr;

    const NONE: u8 = 0;
    const SYN: u8 = ct_state::SYN;
    const FIN: u8 = ct_state::SYN | ct_state::FIN;
    const RST: u8 = ct_state::SYN | ct_state::RST;

    #[test]
    fn table_of_phases() {
        for (established, states, expected) in [
            (false, [SYN, NONE], Phase::New),
            (false, [NONE, NONE], Phase::New),
            (false, [FIN, NONE], Phase::New),
            (false, [RST, NONE], Phase::Reset),
            (true, [SYN, SYN], Phase::Established),
            (true, [NONE, NONE], Phase::Established),
            (true, [FIN, SYN], Phase::HalfClosed),
            (true, [FIN, FIN], Phase::Closed),
            (true, [RST, SYN], Phase::Reset),
            (true, [RST | FIN, FIN], Phase::Reset),
        ] {
            let [one, other] = states;
            assert_eq!(
                Phase::of(established, [one, other]),
                expected,
                "{established} {states:?}"
            );
            assert_eq!(
                Phase::of(established, [other, one]),
                expected,
                "{established} {states:?} reversed"
            );
        }
    }

    #[test]
    fn table_of_timeouts() {
        let seconds = |proto, phase| Timeouts::DEFAULT.of(proto, phase) / SECOND;
        for (phase, tcp, udp) in [
            (Phase::New, 60, 30),
            (Phase::Established, 86_400, 120),
            (Phase::HalfClosed, 3600, 120),
            (Phase::Closed, 120, 120),
            (Phase::Reset, 10, 120),
        ] {
            assert_eq!(seconds(ip_protocol::TCP, phase), tcp, "{phase:?}");
            assert_eq!(seconds(ip_protocol::UDP, phase), udp, "{phase:?}");
            for proto in [ip_protocol::TCP, ip_protocol::UDP, ip_protocol::SCTP] {
                assert!(Timeouts::DEFAULT.shortest() <= Timeouts::DEFAULT.of(proto, phase));
            }
        }
        assert_eq!(Timeouts::DEFAULT.shortest(), 10 * SECOND);
    }

    #[test]
    fn each_direction_finds_the_other() {
        let addr = |last| Addr::from_v4([192, 0, 2, last]);
        let key = |src, src_port, dst, dst_port| CtKey {
            src: addr(src),
            dst: addr(dst),
            src_port,
            dst_port,
            proto: 6,
            pad: [0; 3],
        };
        let becomes = |key: CtKey| CtEntry {
            src: key.src,
            dst: key.dst,
            src_port: key.src_port,
            dst_port: key.dst_port,
            ..CtEntry::default()
        };
        // The client 1 asks the frontend 2; the node 3 sends that to the backend 4.
        let (asked, sent) = (key(1, 1000, 2, 80), key(3, 61_000, 4, 8080));
        let (answered, returned) = (key(4, 8080, 3, 61_000), key(2, 80, 1, 1000));
        assert_eq!(reverse_key(&becomes(sent), 6), answered);
        assert_eq!(reverse_key(&becomes(returned), 6), asked);
    }
}
