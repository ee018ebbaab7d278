//! What becomes of a packet that comes to this node, the first of a flow. The steps are those of `lb-ebpf`.

use std::net::IpAddr;

use lb_common::abi::{
    Addr, AffinityKey, DropReason, FrontendKind, client_kind, cluster_flags, ct_flags, ip_protocol, service_flags,
};
use lb_common::logic::connect;
use lb_common::logic::route::{self, Destination};
use lb_common::logic::translation::{self, RejectWith};

use super::{Chosen, Explanation, Found, Outcome, Snapshot, Source, View, age, choose, ports_of, why_no_frontend};

/// What a client is told, or not.
pub(super) fn refused(reason: DropReason, protocol: &str) -> Outcome {
    let (label, why) = (reason.label(), reason.text());
    match translation::reject_with(reason) {
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

/// What becomes of a packet from an address to a destination, where it comes in by a device that programs are attached
/// to.
pub(crate) fn explain(maps: &Snapshot, from: IpAddr, to: Destination) -> Explanation {
    // Only sockets ask whether they are on the node.
    let view = View { maps, on_node: false };
    let mut answer = Explanation::untouched(to, "");
    let mut source = source(maps, from);
    answer.source = Some(source.clone());
    answer.notes = flows(maps, from.into(), to);
    let frontend = match route::packet_frontend(&view, to) {
        Ok(Some(frontend)) => frontend,
        Ok(None) => {
            answer.outcome = Outcome::untouched(why_no_frontend(&view, to));
            return answer;
        }
        Err(reason) => {
            answer.outcome = refused(reason, answer.protocol);
            answer.notes.push(ports_of(maps, to));
            return answer;
        }
    };
    answer.frontend = Some(Found::new(maps, frontend));
    let Some(service) = maps.dump.services.get(frontend.service as usize) else {
        answer.outcome = refused(DropReason::BadServiceIndex, answer.protocol);
        return answer;
    };
    if frontend.kind == FrontendKind::LoadBalancer as u8 && service.flags & service_flags::SOURCE_RANGES != 0 {
        let mut ranges = maps.dump.source_ranges.keys();
        let admitted = ranges.any(|range| range.admits(frontend.service, from.into()));
        source.admitted = Some(admitted);
        answer.source = Some(source.clone());
        if !admitted {
            answer.outcome = refused(DropReason::SourceNotAllowed, answer.protocol);
            return answer;
        }
    }
    let set = match connect::set_for_packet(frontend, source.inside) {
        Ok(set) => set,
        Err(reason) => {
            answer.outcome = refused(reason, answer.protocol);
            return answer;
        }
    };
    let client = AffinityKey {
        client: from.into(),
        service: frontend.service,
        kind: client_kind::ADDRESS,
    };
    choose(maps, client, Chosen::new(frontend.service, set, service), &mut answer);
    let elsewhere = answer
        .candidates
        .iter()
        .any(|candidate| candidate.eligible && !candidate.local);
    if elsewhere && !source.here {
        let why = "a backend on another node sees an address of this node in place of the client's, so that its answers \
                   come back here";
        answer.notes.push(why.into());
    }
    if to.proto == ip_protocol::TCP {
        answer
            .notes
            .push("this is the first packet of a flow; those that follow go where it went".into());
    }
    answer
}

/// What CLUSTER_CIDRS says of an address.
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

/// Flows that the client has to the destination, by whichever of its ports: those stay with their backends.
fn flows(maps: &Snapshot, from: Addr, to: Destination) -> Vec<String> {
    let to_addr = Addr::from(to.addr);
    let its = maps.flows.iter().filter(|(key, entry)| {
        entry.flags & ct_flags::REPLY == 0
            && (key.src, key.dst, key.dst_port, key.proto) == (from, to_addr, to.port, to.proto)
    });
    let notes = its.map(|(key, entry)| {
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
