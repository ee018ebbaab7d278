//! Explains the first packet of a flow from outside, received by a device of this node, by the decisions of the packet
//! path.

use std::net::IpAddr;

use lb_common::abi::{Addr, AffinityKey, DropReason, RejectWith, cluster_flags, ct_flags, ip_protocol};
use lb_common::logic::decide::{self, Arrival};
use lb_common::logic::delivery::{self, Facts};
use lb_common::logic::frontend::{self, Destination};

use super::{
    Candidate, Explanation, FrontendMatch, Outcome, ServedBy, Snapshot, Source, Unfiltered, View, age, choose,
    ports_of, why_no_frontend,
};

/// The explained packet: the first one of a flow, at the ingress of a device. The device that leads to the backend is
/// taken to be another one, since the routes are not among the maps.
const FIRST_PACKET: Arrival = Arrival {
    at_egress: false,
    has_socket: false,
    has_vlan: false,
    can_start_flow: true,
};

/// Returns the outcome of a packet that is refused with a drop reason.
pub(super) fn refused(reason: DropReason, protocol: &str) -> Outcome {
    let (label, why) = (reason.label(), reason.text());
    match reason.reject_with() {
        RejectWith::Refused => Outcome::Rejected {
            answer: if protocol == "TCP" {
                "a TCP reset"
            } else {
                "ICMP port unreachable"
            },
            reason: label,
            why,
        },
        RejectWith::Pass | RejectWith::Drop | RejectWith::TooBig | RejectWith::TimeExceeded => {
            Outcome::Dropped { reason: label, why }
        }
    }
}

/// Explains a packet from an address to a destination that is received by a device with programs.
pub fn explain(maps: &Snapshot, from: IpAddr, to: Destination) -> Explanation {
    // Only the decision for sockets uses this.
    let view = View { maps, on_node: false };
    let mut explanation = Explanation::untouched(to, "");
    let mut source = source(maps, from);
    explanation.source = Some(source.clone());
    explanation.notes = flows(maps, from.into(), to);
    let frontend = match decide::packet_frontend(&view, FIRST_PACKET, to) {
        Ok(Some(frontend)) => frontend,
        Ok(None) => {
            let unfiltered = frontend::of_packet(&Unfiltered(&view), to);
            explanation.outcome = Outcome::untouched(why_no_frontend(&view, to, unfiltered));
            return explanation;
        }
        Err(reason) => {
            explanation.outcome = refused(reason, explanation.protocol);
            explanation.notes.push(ports_of(maps, to));
            return explanation;
        }
    };
    explanation.frontend = Some(FrontendMatch::new(maps, frontend));
    let admission = decide::admit_packet(&view, frontend, Addr::from(from).into(), FIRST_PACKET.at_egress);
    let ranges = match &admission {
        Ok(admission) => frontend::has_source_ranges(frontend, admission.service.flags),
        Err(reason) => *reason == DropReason::SourceNotAllowed,
    };
    source.admitted = ranges.then_some(admission.is_ok());
    explanation.source = Some(source);
    let admission = match admission {
        Ok(admission) => admission,
        Err(reason) => {
            explanation.outcome = refused(reason, explanation.protocol);
            return explanation;
        }
    };
    let client = AffinityKey::of_addr(from.into(), frontend.service);
    let served_by = ServedBy::service(&maps.dump, frontend.service, admission);
    choose(maps, client, &served_by, &mut explanation);
    let snat = |candidate: &Candidate| {
        let facts = Facts {
            at_egress: FIRST_PACKET.at_egress,
            has_next_hop: true,
            changes_device: true,
            backend_is_local: candidate.local,
            client_is_local: admission.client_is_local,
        };
        delivery::decide(facts, || false).is_ok_and(|delivery| delivery.snat)
    };
    if explanation
        .candidates
        .iter()
        .any(|candidate| candidate.eligible && snat(candidate))
    {
        let why = "a backend on another node sees an address of this node in place of the client's, so that its answers \
                   come back here";
        explanation.notes.push(why.into());
    }
    if to.proto == ip_protocol::TCP {
        explanation
            .notes
            .push("this is the first packet of a flow; those that follow go where it went".into());
    }
    explanation
}

/// Returns the facts of CLUSTER_CIDRS about an address.
fn source(maps: &Snapshot, from: IpAddr) -> Source {
    let longest = maps.dump.cluster_cidr(from.into());
    let flags = longest.map_or(0, |(_, flags)| flags);
    Source {
        address: from,
        inside: flags & cluster_flags::INSIDE != 0,
        here: flags & cluster_flags::HERE != 0,
        network: longest
            .filter(|_| flags != 0)
            .and_then(|(cidr, _)| cidr.network())
            .map(|network| network.to_string()),
        admitted: None,
    }
}

/// Returns a note for each flow that the client already has to the destination, from any of its ports. Such flows stay
/// with their backends.
fn flows(maps: &Snapshot, from: Addr, to: Destination) -> Vec<String> {
    let to_addr = Addr::from(to.addr);
    let flows = maps.flows.iter().filter(|(key, entry)| {
        entry.flags & ct_flags::REPLY == 0
            && (key.src, key.dst, key.dst_port, key.proto) == (from, to_addr, to.port, to.proto)
    });
    let notes = flows.map(|(key, entry)| {
        let idle = age(entry.seen, maps.now).as_secs();
        let backend = entry.dst.socket(entry.dst_port);
        format!(
            "a flow from port {} goes to {backend}, its last packet came {idle} s ago",
            key.src_port
        )
    });
    notes.collect()
}

#[cfg(test)]
mod tests;
