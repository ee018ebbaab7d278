//! How the packets of a new flow get to the backend: up the stack or forwarded by the program, with the source address of
//! the client or of the node.

use crate::abi::{DropReason, ct_flags};

/// The facts about a new flow that decide its [`Delivery`], known after the route lookup for its translated packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// The hook is at egress.
    pub at_egress: bool,
    /// The route has a next hop. Otherwise the backend's address is one of this node, or the kernel does not forward.
    pub has_next_hop: bool,
    /// The next hop is behind another device than that of the hook. Not used without a next hop.
    pub changes_device: bool,
    /// The backend runs on this node.
    pub backend_is_local: bool,
    /// The client is a pod of this node.
    pub client_is_local: bool,
}

/// The way that packets take from client to backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delivery {
    /// [`ct_flags`] of the original direction.
    pub flags: u16,
    /// The source address becomes one of this node, so that replies come back to it.
    pub snat: bool,
}

/// Decides how the packets of a new flow travel.
///
/// They go up the stack if the replies pass this node anyway: at ingress, if they leave by another device than the
/// client's and one end is local. `arrived_by_bridge` is evaluated only then: a packet that arrived by a bridge is
/// received again at that bridge ([`ct_flags::RECEIVE_AGAIN`]).
///
/// Otherwise the program forwards them. The client's address stays only if a socket of this machine sent them, and the
/// device that they leave by does not change.
///
/// # Errors
/// Returns [`DropReason::NoRoute`] at egress if there is no next hop.
#[inline(always)]
pub fn decide(facts: Facts, arrived_by_bridge: impl FnOnce() -> bool) -> Result<Delivery, DropReason> {
    let Facts {
        at_egress,
        has_next_hop,
        changes_device,
        backend_is_local,
        client_is_local,
    } = facts;
    if !has_next_hop && at_egress {
        return Err(DropReason::NoRoute);
    }
    let up_the_stack = !has_next_hop || !at_egress && changes_device && (backend_is_local || client_is_local);
    let flags = match up_the_stack {
        true if arrived_by_bridge() => ct_flags::RECEIVE_AGAIN,
        true => 0,
        false if at_egress => ct_flags::EGRESS | ct_flags::FORWARD,
        false => ct_flags::FORWARD,
    };
    Ok(Delivery {
        flags,
        snat: !up_the_stack && (changes_device || !at_egress),
    })
}

/// Returns the [`ct_flags`] of the opposite direction of a flow.
///
/// - Replies to packets that go up the stack at ingress come through the stack too: they are translated at egress.
/// - Replies to packets that were forwarded at ingress, with a source address of this node, arrive at this node and are
///   forwarded.
/// - Packets of a socket of this node are translated at egress, and the replies at ingress, before the stack.
#[inline(always)]
#[must_use]
pub const fn opposite(flags: u16) -> u16 {
    let opposite = match flags & (ct_flags::EGRESS | ct_flags::FORWARD) {
        0 if flags & ct_flags::REPLY == 0 => ct_flags::EGRESS,
        0 => ct_flags::EGRESS | ct_flags::FORWARD,
        ct_flags::FORWARD => ct_flags::FORWARD,
        // EGRESS, with FORWARD (packets of a socket) or without it (replies).
        _ => 0,
    };
    opposite | (flags & ct_flags::REPLY) ^ ct_flags::REPLY
}

/// Returns whether packets with these [`ct_flags`] have their time to live decremented: those that are forwarded at
/// ingress, and those that are received again. This ends every loop, whatever backends Services have.
#[inline(always)]
#[must_use]
pub const fn decrements_ttl(flags: u16) -> bool {
    flags & (ct_flags::FORWARD | ct_flags::RECEIVE_AGAIN) != 0 && flags & ct_flags::EGRESS == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use ct_flags::{EGRESS, FORWARD, RECEIVE_AGAIN, REPLY};

    /// A flow from an outside client to a backend on another node, at ingress, by another device.
    const OUTSIDE: Facts = Facts {
        at_egress: false,
        has_next_hop: true,
        changes_device: true,
        backend_is_local: false,
        client_is_local: false,
    };
    /// A flow of a socket of this node, at egress.
    const SOCKET: Facts = Facts {
        at_egress: true,
        changes_device: false,
        ..OUTSIDE
    };

    #[test]
    fn table_of_deliveries() {
        let local_backend = Facts {
            backend_is_local: true,
            ..OUTSIDE
        };
        let local_client = Facts {
            client_is_local: true,
            ..OUTSIDE
        };
        let host_network = Facts {
            has_next_hop: false,
            backend_is_local: true,
            ..OUTSIDE
        };
        let same_device = |facts| Facts {
            changes_device: false,
            ..facts
        };
        let changed_device = |facts| Facts {
            changes_device: true,
            ..facts
        };
        for (facts, flags, snat) in [
            (OUTSIDE, FORWARD, true),
            (same_device(OUTSIDE), FORWARD, true),
            (local_backend, 0, false),
            // Client and backend are behind one device: replies would not pass this node.
            (same_device(local_backend), FORWARD, true),
            (local_client, 0, false),
            (same_device(local_client), FORWARD, true),
            (host_network, 0, false),
            (same_device(host_network), 0, false),
            (SOCKET, EGRESS | FORWARD, false),
            (changed_device(SOCKET), EGRESS | FORWARD, true),
            (
                Facts {
                    backend_is_local: true,
                    ..changed_device(SOCKET)
                },
                EGRESS | FORWARD,
                true,
            ),
        ] {
            for bridge in [false, true] {
                let flags = if bridge && flags & FORWARD == 0 {
                    RECEIVE_AGAIN
                } else {
                    flags
                };
                assert_eq!(
                    decide(facts, || bridge),
                    Ok(Delivery { flags, snat }),
                    "{facts:?} bridge {bridge}"
                );
            }
        }
        let no_route = Facts {
            has_next_hop: false,
            ..SOCKET
        };
        assert_eq!(decide(no_route, || false), Err(DropReason::NoRoute));
    }

    #[test]
    fn the_bridge_is_looked_up_only_on_the_way_up_the_stack() {
        let decided = decide(OUTSIDE, || panic!("not needed"));
        assert_eq!(decided.map(|delivery| delivery.snat), Ok(true));
    }

    #[test]
    fn every_direction_has_an_opposite() {
        for (there, back) in [
            (0, REPLY | EGRESS),
            (FORWARD, REPLY | FORWARD),
            (EGRESS | FORWARD, REPLY),
        ] {
            assert_eq!(opposite(there), back, "{there}");
            assert_eq!(opposite(back), there, "{back}");
        }
        // Replies leave by the bridge.
        assert_eq!(opposite(RECEIVE_AGAIN), REPLY | EGRESS);
    }

    #[test]
    fn packets_that_could_loop_lose_time_to_live() {
        for (flags, decrements) in [
            (0, false),
            (RECEIVE_AGAIN, true),
            (FORWARD, true),
            (REPLY | FORWARD, true),
            (EGRESS | FORWARD, false),
            (REPLY | EGRESS, false),
            (REPLY, false),
        ] {
            assert_eq!(decrements_ttl(flags), decrements, "{flags}");
        }
    }
}
