use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use ipnet::IpNet;
use lb_common::abi::{Affinity, BackendRef, CtEntry, CtKey, FrontendKey, FrontendKind, ServiceIndex, service_flags};
use lb_common::logic::{affinity, selection};
use proptest::prelude::*;

use super::super::tests::{NODE_ADDRESS, any_maps, eligible, numbers, to, with_node_port};
use super::*;
use crate::maps::Maps as _;
use crate::maps::prefix::Prefix;
use crate::testing::{Builder as _, Cluster, apply, balanced, maps, node, slice, start};

const SECOND: u64 = 1_000_000_000;
const OUTSIDE: &str = "203.0.113.7";
const HERE: &str = "10.10.1.9";
const INSIDE: &str = "10.10.2.9";

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A load balancer of policy Local for some sources, with an endpoint here and one elsewhere; Nodes n1 (this one) and n2.
fn snapshot(local: bool, endpoints: &[&str]) -> Snapshot {
    let web = balanced("web", "10.96.0.10", "192.0.2.1", &["203.0.113.0/24", "10.10.0.0/16"]);
    let mut web = with_node_port(if local { web.local() } else { web }, 30001);
    web.external_ips = Box::new([ip("198.51.100.1")]);
    let inside = "10.10.0.0/16".parse().unwrap();
    let mut lb = start(maps()).with_inside(&[inside]);
    let mut cluster = Cluster::of([
        web.into(),
        slice("web", endpoints).into(),
        node("n1", &[NODE_ADDRESS], &["10.10.1.0/24"]).into(),
        node("n2", &["192.168.77.2"], &["10.10.2.0/24"]).into(),
    ]);
    apply(&mut lb, &mut cluster);
    assert_eq!(lb.write_node_addrs(&[ip(NODE_ADDRESS).into()].into()).unwrap(), 0);
    Snapshot {
        dump: lb.maps().dump().unwrap(),
        now: 100 * SECOND,
        ..Snapshot::default()
    }
}

const BOTH: [&str; 2] = ["10.10.1.2 @n1", "10.10.2.2 @n2"];

#[test]
fn the_whole_answer_for_people() {
    let maps = snapshot(true, &BOTH);
    let answer = explain(&maps, ip(OUTSIDE), to("192.0.2.1:80"));
    let expected = "\
to         192.0.2.1:80/TCP
frontend   LoadBalancer of default/web:80 (service 1)
source     outside of the cluster; loadBalancerSourceRanges have it
policy     external set, members: 1 (clients outside: externalTrafficPolicy applies)
candidate  yes 10.10.1.2:8080 (backend 1, this node): one of 1 in the external set
candidate  no  10.10.2.2:8080 (backend 2, other node): not in the external set: externalTrafficPolicy is Local, and it is on another node
note       this is the first packet of a flow; those that follow go where it went
packet     goes to 10.10.1.2:8080";
    assert_eq!(answer.to_string(), expected);
}

#[test]
fn who_is_inside_has_policy_cluster() {
    let maps = snapshot(true, &BOTH);
    for destination in ["192.0.2.1:80", "198.51.100.1:80", "192.168.77.1:30001"] {
        for (from, expected, [inside, here]) in [
            (OUTSIDE, &["10.10.1.2:8080"][..], [false, false]),
            (INSIDE, &["10.10.1.2:8080", "10.10.2.2:8080"], [true, false]),
            (HERE, &["10.10.1.2:8080", "10.10.2.2:8080"], [true, true]),
        ] {
            let answer = explain(&maps, ip(from), to(destination));
            assert_eq!(eligible(&answer), expected, "{from} to {destination}");
            let source = answer.source.unwrap();
            assert_eq!([source.inside, source.here], [inside, here], "{from}");
        }
    }
    // Cluster IPs have the internal set, wherever the client is.
    assert_eq!(
        eligible(&explain(&maps, ip(OUTSIDE), to("10.96.0.10:80"))),
        ["10.10.1.2:8080"]
    );
}

#[test]
fn source_ranges_are_for_the_load_balancers_address() {
    let maps = snapshot(false, &BOTH);
    let stranger = ip("198.18.0.1");
    let answer = explain(&maps, stranger, to("192.0.2.1:80"));
    assert_eq!(answer.source.as_ref().and_then(|source| source.admitted), Some(false));
    assert!(
        matches!(
            answer.outcome,
            Outcome::Dropped {
                reason: "source_not_allowed",
                ..
            }
        ),
        "{answer}"
    );
    for destination in ["198.51.100.1:80", "192.168.77.1:30001", "10.96.0.10:80"] {
        let answer = explain(&maps, stranger, to(destination));
        assert_eq!(eligible(&answer).len(), 2, "{destination}");
        assert_eq!(answer.source.unwrap().admitted, None, "{destination}");
    }
}

#[test]
fn what_is_not_served_is_answered_or_dropped_or_left_alone() {
    let udp = |text: &str| Destination {
        proto: ip_protocol::UDP,
        ..to(text)
    };
    let empty = snapshot(false, &[]);
    let elsewhere = snapshot(true, &BOTH[1..]);
    for (maps, to, expected) in [
        (
            &empty,
            to("192.0.2.1:80"),
            "is answered with a TCP reset: the service has no usable",
        ),
        (
            &empty,
            to("192.0.2.1:81"),
            "is answered with a TCP reset: the service address has no such port",
        ),
        (
            &empty,
            udp("192.0.2.1:80"),
            "is answered with ICMP port unreachable: the service address",
        ),
        (
            &empty,
            to("10.96.0.10:81"),
            "is answered with a TCP reset: the service address has no such port",
        ),
        (
            &elsewhere,
            to("192.168.77.1:30001"),
            "is dropped: the traffic policy is Local",
        ),
        (&empty, to("192.168.77.1:22"), "goes to the destination as it is"),
        (&empty, to("192.168.77.2:30001"), "goes to the destination as it is"),
        (&empty, to("127.0.0.1:30001"), "goes to the destination as it is"),
    ] {
        let answer = explain(maps, ip(OUTSIDE), to);
        assert!(answer.outcome.to_string().starts_with(expected), "{answer}");
    }
}

#[test]
fn affinity_is_by_the_clients_address() {
    let mut maps = snapshot(false, &BOTH);
    maps.dump.services[1].flags |= service_flags::AFFINITY;
    maps.dump.services[1].affinity_timeout = 60;
    let key = AffinityKey::of_addr(ip(OUTSIDE).into(), ServiceIndex::new(1));
    let entry = Affinity {
        backend: BackendRef {
            id: 2,
            generation: maps.dump.backends[2].generation,
        },
        used: 90 * SECOND,
    };
    maps.affinity.insert(key, entry);
    let answer = explain(&maps, ip(OUTSIDE), to("192.0.2.1:80"));
    assert_eq!(eligible(&answer), ["10.10.2.2:8080"]);
    assert!(answer.to_string().contains("50 s remain"), "{answer}");
    assert_eq!(
        eligible(&explain(&maps, ip("203.0.113.8"), to("192.0.2.1:80"))).len(),
        2
    );
}

#[test]
fn flows_that_are_there_are_told() {
    let mut maps = snapshot(false, &BOTH);
    let key = CtKey {
        src: ip(OUTSIDE).into(),
        dst: ip("192.0.2.1").into(),
        src_port: 4000,
        dst_port: 80,
        proto: 6,
        pad: [0; 3],
    };
    let entry = CtEntry {
        dst: ip("10.10.2.2").into(),
        dst_port: 8080,
        seen: 93 * SECOND,
        ..CtEntry::default()
    };
    maps.flows = vec![(key, entry)];
    let notes = |from, destination| explain(&maps, ip(from), to(destination)).notes.join("\n");
    let flow = "a flow from port 4000 goes to 10.10.2.2:8080, its last packet came 7 s ago";
    assert!(notes(OUTSIDE, "192.0.2.1:80").contains(flow));
    assert!(!notes(OUTSIDE, "198.51.100.1:80").contains(flow));
    assert!(!notes(INSIDE, "192.0.2.1:80").contains(flow));
}

/// What the programs do with the first packet of a flow, by a random number: one step after another, on the same
/// `lb_common::logic`. `None`: it goes on as it is.
fn translated(maps: &Snapshot, from: IpAddr, to: Destination, random: u32) -> Result<Option<SocketAddr>, DropReason> {
    let view = View { maps, on_node: false };
    let Some(frontend) = frontend::of_packet(&view, to)? else {
        return Ok(None);
    };
    let service = maps.dump.service(frontend.service);
    let service = service.ok_or(DropReason::BadServiceIndex)?;
    let addr = from.into();
    if frontend.kind == FrontendKind::LoadBalancer as u8
        && service.flags & service_flags::SOURCE_RANGES != 0
        && !maps
            .dump
            .source_ranges
            .keys()
            .any(|range| range.admits(frontend.service, addr))
    {
        return Err(DropReason::SourceNotAllowed);
    }
    // Longest first.
    let around: BTreeMap<_, _> = maps
        .dump
        .cluster_cidrs
        .iter()
        .map(|(cidr, flags)| (cidr.len, (cidr, flags)))
        .collect();
    let longest = around.values().rev().find(|(cidr, _)| cidr.contains(addr));
    let inside = longest.is_some_and(|(_, flags)| *flags & cluster_flags::INSIDE != 0);
    let set = selection::set_for_packet(frontend, inside)?;
    let key = AffinityKey::of_addr(addr, frontend.service);
    if service.flags & service_flags::AFFINITY != 0
        && let Some(entry) = maps.affinity.get(&key)
        && affinity::holds(entry.used, maps.now, service.affinity_timeout)
        && let Some(backend) = maps.dump.backends.get(entry.backend.id as usize)
        && backend.serves(entry.backend, frontend.service, set)
    {
        return Ok(Some(backend.addr.socket(backend.port)));
    }
    let slot = selection::slot(service.set_word(set), random)?;
    let slot = maps.dump.slots.get(slot as usize).ok_or(DropReason::BadSlot)?;
    Ok(Some(slot.addr.socket(slot.port)))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_explained_is_what_the_programs_do(mut maps in any_maps(), admitted in 0..5_u32, seen in 0..13_u32) {
        let networks = [("10.10.0.0/16", cluster_flags::INSIDE), ("10.10.1.0/24", cluster_flags::INSIDE | cluster_flags::HERE)];
        for (net, flags) in networks {
            maps.dump.cluster_cidrs.insert(Prefix::from(net.parse::<IpNet>().unwrap()), flags);
        }
        let admitted = Prefix::of(ServiceIndex::new(admitted), "203.0.113.0/24".parse().unwrap());
        maps.dump.source_ranges.insert(admitted, 0);
        if let Some(backend) = maps.dump.backends.get(seen as usize) {
            let key = AffinityKey::of_addr(ip(OUTSIDE).into(), backend.service);
            maps.affinity.insert(key, Affinity { backend: BackendRef { id: seen, generation: backend.generation }, used: 95 * SECOND });
        }
        let destinations: BTreeSet<FrontendKey> = maps.dump.frontends.keys().copied().collect();
        let more = ["192.168.77.1:30001", "192.168.77.2:30001", "192.0.2.1:81", "127.0.0.1:30001", "198.18.0.1:80"];
        let destinations = destinations.iter().map(|key| Destination { addr: key.addr.into(), port: key.port, proto: key.proto });
        let destinations: Vec<_> = destinations.chain(more.map(to)).filter(|to| to.proto != 0).collect();
        for from in [OUTSIDE, INSIDE, HERE, "198.18.0.1"] {
            for dest in &destinations {
                let done: Result<BTreeSet<_>, _> = numbers().map(|n| translated(&maps, ip(from), *dest, n)).collect();
                let answer = explain(&maps, ip(from), *dest);
                let said = match &answer.outcome {
                    Outcome::Untouched { .. } => Ok([None].into()),
                    Outcome::Connects { backends } => Ok(backends.iter().copied().map(Some).collect()),
                    Outcome::Rejected { reason, .. } | Outcome::Dropped { reason, .. } | Outcome::Refused { reason, .. } => {
                        Err(*reason)
                    }
                };
                prop_assert_eq!(done.map_err(DropReason::label), said, "{}\n{}", from, answer);
            }
        }
    }
}
