//! Flows of the packet path: idle timeouts, phases, and the action for a packet of an existing flow.

use super::idle::SECOND;
use super::packet::{Packet, tcp_flags};
use super::translation::Tuple;
use crate::abi::{CtEntry, CtKey, DropReason, ct_flags, ct_state, ip_protocol};

/// Idle timeouts of flows, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// TCP, after the client has acknowledged the server's SYN.
    pub established: u64,
    /// TCP, closed in one direction.
    pub half_closed: u64,
    /// TCP, closed in both directions.
    pub closed: u64,
    /// TCP, reset in either direction.
    pub reset: u64,
    /// TCP, before it is established.
    pub new: u64,
    /// UDP with a reply, and every protocol that is neither TCP nor UDP.
    pub datagrams: u64,
    /// UDP without a reply.
    pub new_datagrams: u64,
}

impl Timeouts {
    /// The defaults: those of kube-proxy if it sets them, otherwise close to those of the kernel's conntrack.
    pub const DEFAULT: Self = Self {
        established: 24 * 3600 * SECOND,
        half_closed: 3600 * SECOND,
        closed: 120 * SECOND,
        reset: 10 * SECOND,
        new: 60 * SECOND,
        datagrams: 120 * SECOND,
        new_datagrams: 30 * SECOND,
    };

    /// Returns the shortest timeout. A flow that was used within this time is not expired, whatever its phase.
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

    /// Returns the timeout of a flow in a phase.
    #[must_use]
    pub const fn of(&self, proto: u8, phase: Phase) -> u64 {
        match (proto, phase) {
            (ip_protocol::TCP, Phase::New) => self.new,
            (ip_protocol::TCP, Phase::Established) => self.established,
            (ip_protocol::TCP, Phase::HalfClosed) => self.half_closed,
            (ip_protocol::TCP, Phase::Closed) => self.closed,
            (ip_protocol::TCP, Phase::Reset) => self.reset,
            (_, Phase::New) => self.new_datagrams,
            (_, Phase::Established | Phase::HalfClosed | Phase::Closed | Phase::Reset) => self.datagrams,
        }
    }
}

/// Progress of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// No reply was seen; or, for TCP, the client has not acknowledged one.
    New,
    /// The flow is in CT.
    Established,
    /// One side has closed its direction.
    HalfClosed,
    /// Both sides have closed their direction.
    Closed,
    /// One side has reset the connection.
    Reset,
}

impl Phase {
    /// Returns the phase of a flow with these [`ct_state`]s of its two directions, in either order; zero for a direction
    /// that is not known. `established`: the flow is in CT.
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

    /// Returns whether the flow has ended, so that a SYN between the same ports starts another connection.
    #[inline(always)]
    #[must_use]
    pub const fn is_end(self) -> bool {
        match self {
            Self::Closed | Self::Reset => true,
            Self::New | Self::Established | Self::HalfClosed => false,
        }
    }
}

/// Returns the key of the opposite direction: the reverse of the translated tuple.
#[must_use]
pub fn reverse_key(entry: &CtEntry, proto: u8) -> CtKey {
    let translated = Tuple {
        src: entry.src.into(),
        dst: entry.dst.into(),
        src_port: entry.src_port,
        dst_port: entry.dst_port,
    };
    let key = translated.reversed();
    CtKey {
        src: key.src.into(),
        dst: key.dst.into(),
        src_port: key.src_port,
        dst_port: key.dst_port,
        proto,
        pad: [0; 3],
    }
}

/// A packet that matches an entry of CT or CT_NEW.
#[derive(Debug, Clone, Copy)]
pub struct Match<'a> {
    /// The packet.
    pub packet: &'a Packet,
    /// [`ct_flags`] of the entry.
    pub flags: u16,
    /// The entry is in CT_NEW.
    pub is_unreplied: bool,
}

impl Match<'_> {
    /// Returns whether the packet travels from the backend to the client.
    #[inline(always)]
    #[must_use]
    pub const fn is_reply(&self) -> bool {
        self.flags & ct_flags::REPLY != 0
    }
}

/// The state of a flow, looked up only if the decision needs it.
pub trait FlowState {
    /// Returns whether the backend may still be selected for the set that serves the flow.
    ///
    /// # Errors
    /// Returns a reason if the entry or the maps are inconsistent.
    fn backend_is_usable(&self) -> Result<bool, DropReason>;
    /// Returns whether the backend reference is current: the backend is in an EndpointSlice, possibly draining.
    fn backend_is_current(&self) -> bool;
    /// Returns the [`ct_state`] of the packet's direction.
    fn state(&self) -> u8;
    /// Returns the [`ct_state`] of the opposite direction, or zero if that has no entry.
    fn reverse_state(&self) -> u8;
}

/// The action for a packet of an existing flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Record the packet in its direction, and translate it.
    Refresh,
    /// Record the packet and insert the opposite direction again if it is missing, then translate the packet. The client
    /// repeats its SYN, and CT_NEW may have evicted the direction of the replies.
    Reclaim,
    /// Move both directions to CT, and translate the packet.
    Establish,
    /// The flow is over: delete both directions. The packet starts another flow.
    Restart,
    /// The backend is gone: mark the flow as reset, so that it is collected soon, and reject the packet.
    Reset,
}

/// Returns whether a packet that matches an entry is translated at this hook. The other hook handles it otherwise.
///
/// # Errors
/// Returns [`DropReason::Vlan`] for a packet with a VLAN tag.
#[inline(always)]
pub const fn is_translated_here(flags: u16, at_egress: bool, has_vlan: bool) -> Result<bool, DropReason> {
    if (flags & ct_flags::EGRESS != 0) != at_egress {
        return Ok(false);
    }
    if has_vlan {
        return Err(DropReason::Vlan);
    }
    Ok(true)
}

/// Decides what happens to a packet of an existing flow.
///
/// # Errors
/// Returns the errors of [`FlowState::backend_is_usable`].
#[inline(always)]
pub fn next(found: Match<'_>, flow: &impl FlowState) -> Result<Action, DropReason> {
    if !found.is_reply() {
        match validity(found.packet, flow)? {
            Validity::Valid => {}
            Validity::Over => return Ok(Action::Restart),
            Validity::BackendGone => return Ok(Action::Reset),
        }
    }
    Ok(if found.is_unreplied && is_established(found, flow) {
        Action::Establish
    } else if found.is_unreplied && !found.is_reply() && found.packet.is_initial_syn() {
        Action::Reclaim
    } else {
        Action::Refresh
    })
}

/// Validity of a flow for a packet of the client that matches its tuple.
enum Validity {
    Valid,
    /// The tuple is free for another flow.
    Over,
    /// The packet belongs to the flow, but the backend no longer exists.
    BackendGone,
}

/// A datagram stays with its backend as long as a new flow could select it: UDP has no connection that would end. A
/// segment stays as long as the backend exists, so that draining backends keep their connections. A SYN starts another
/// connection once both sides have closed the last one.
#[inline(always)]
fn validity(packet: &Packet, flow: &impl FlowState) -> Result<Validity, DropReason> {
    let is_valid = if !packet.is_tcp() {
        flow.backend_is_usable()?
    } else if packet.is_initial_syn() {
        flow.backend_is_current() && !Phase::of(true, [flow.state(), flow.reverse_state()]).is_end()
    } else if flow.backend_is_current() {
        true
    } else {
        return Ok(Validity::BackendGone);
    };
    Ok(if is_valid { Validity::Valid } else { Validity::Over })
}

/// Returns whether an unreplied flow becomes established: with the reply to a datagram, and with the segment by which the
/// client acknowledges the server's SYN. Before that, the source address may be forged.
#[inline(always)]
fn is_established(found: Match<'_>, flow: &impl FlowState) -> bool {
    if !found.packet.is_tcp() {
        return found.is_reply();
    }
    !found.is_reply() && found.packet.flags & (tcp_flags::SYN | tcp_flags::RST) == 0 && flow.reverse_state() != 0
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
    fn each_direction_leads_to_the_other() {
        let addr = |last| Addr::from_v4([192, 0, 2, last]);
        let key = |src, src_port, dst, dst_port| CtKey {
            src: addr(src),
            dst: addr(dst),
            src_port,
            dst_port,
            proto: 6,
            pad: [0; 3],
        };
        let translated_to = |key: CtKey| CtEntry {
            src: key.src,
            dst: key.dst,
            src_port: key.src_port,
            dst_port: key.dst_port,
            ..CtEntry::default()
        };
        // Client 1 sends to frontend 2; node 3 forwards to backend 4.
        let (request, forwarded) = (key(1, 1000, 2, 80), key(3, 61_000, 4, 8080));
        let (reply, returned) = (key(4, 8080, 3, 61_000), key(2, 80, 1, 1000));
        assert_eq!(reverse_key(&translated_to(forwarded), 6), reply);
        assert_eq!(reverse_key(&translated_to(returned), 6), request);
    }

    /// A flow with fixed lookups; panics on one that the decision must not make.
    #[derive(Clone, Copy)]
    struct Fake {
        usable: Option<bool>,
        current: Option<bool>,
        states: Option<[u8; 2]>,
    }

    impl FlowState for Fake {
        fn backend_is_usable(&self) -> Result<bool, DropReason> {
            self.usable.ok_or(DropReason::BadKind)
        }

        fn backend_is_current(&self) -> bool {
            self.current.unwrap()
        }

        fn state(&self) -> u8 {
            self.states.unwrap()[0]
        }

        fn reverse_state(&self) -> u8 {
            self.states.unwrap()[1]
        }
    }

    fn packet(proto: u8, flags: u8) -> Packet {
        Packet {
            src: Addr::from_v4([192, 0, 2, 1]).into(),
            dst: Addr::from_v4([192, 0, 2, 2]).into(),
            src_port: 1000,
            dst_port: 80,
            proto,
            flags,
            ttl: 64,
            tos: 0,
            transport_len: 20,
        }
    }

    #[test]
    fn table_of_tcp_actions() {
        use tcp_flags as f;
        let (syn, syn_ack, ack) = (f::SYN, f::SYN | f::ACK, f::ACK);
        let (fin, rst) = (f::FIN | f::ACK, f::RST);
        const REPLY: u16 = ct_flags::REPLY;
        // Direction, in CT_NEW, segment, backend is current, states of this and of the opposite direction.
        for (flags, is_unreplied, segment, current, states, expected) in [
            (0, true, syn, true, [SYN, NONE], Action::Reclaim),
            (0, true, syn, true, [SYN, SYN], Action::Reclaim),
            (0, true, syn, true, [RST, NONE], Action::Restart),
            (0, true, syn, false, [SYN, NONE], Action::Restart),
            (0, true, ack, true, [SYN, NONE], Action::Refresh),
            (0, true, ack, true, [SYN, SYN], Action::Establish),
            (0, true, fin, true, [SYN, SYN], Action::Establish),
            (0, true, rst, true, [SYN, SYN], Action::Refresh),
            (0, true, ack, false, [SYN, SYN], Action::Reset),
            (0, false, ack, true, [SYN, SYN], Action::Refresh),
            (0, false, ack, false, [SYN, SYN], Action::Reset),
            (0, false, syn, true, [SYN, SYN], Action::Refresh),
            (0, false, syn, true, [FIN, SYN], Action::Refresh),
            (0, false, syn, true, [FIN, FIN], Action::Restart),
            (0, false, syn, true, [SYN, RST], Action::Restart),
            (0, false, syn, false, [SYN, SYN], Action::Restart),
            // A reply is translated whether the backend is still usable or not.
            (REPLY, true, syn_ack, false, [NONE, SYN], Action::Refresh),
            (REPLY, true, ack, false, [SYN, SYN], Action::Refresh),
            (REPLY, true, rst, false, [NONE, SYN], Action::Refresh),
            (REPLY, false, fin, false, [SYN, FIN], Action::Refresh),
        ] {
            let flow = Fake {
                usable: None,
                current: Some(current),
                states: Some(states),
            };
            let packet = packet(ip_protocol::TCP, segment);
            let found = Match {
                packet: &packet,
                flags,
                is_unreplied,
            };
            assert_eq!(
                next(found, &flow),
                Ok(expected),
                "flags {flags} unreplied {is_unreplied} segment {segment} current {current} {states:?}"
            );
        }
    }

    #[test]
    fn table_of_datagram_actions() {
        let packet = packet(ip_protocol::UDP, 0);
        for (flags, is_unreplied, usable, expected) in [
            (0, true, Some(true), Ok(Action::Refresh)),
            (0, false, Some(true), Ok(Action::Refresh)),
            (0, true, Some(false), Ok(Action::Restart)),
            (0, false, Some(false), Ok(Action::Restart)),
            (0, false, None, Err(DropReason::BadKind)),
            (ct_flags::REPLY, true, None, Ok(Action::Establish)),
            (ct_flags::REPLY, false, None, Ok(Action::Refresh)),
        ] {
            let flow = Fake {
                usable,
                current: None,
                states: None,
            };
            let found = Match {
                packet: &packet,
                flags,
                is_unreplied,
            };
            assert_eq!(
                next(found, &flow),
                expected,
                "flags {flags} unreplied {is_unreplied} {usable:?}"
            );
        }
    }

    #[test]
    fn each_direction_is_translated_at_its_hook() {
        for (flags, at_egress) in [
            (0, false),
            (ct_flags::EGRESS, true),
            (ct_flags::REPLY | ct_flags::EGRESS, true),
        ] {
            assert_eq!(is_translated_here(flags, at_egress, false), Ok(true));
            assert_eq!(is_translated_here(flags, at_egress, true), Err(DropReason::Vlan));
            assert_eq!(is_translated_here(flags, !at_egress, true), Ok(false));
        }
    }
}
