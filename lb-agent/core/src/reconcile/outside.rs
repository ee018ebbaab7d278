//! The parts of the maps for packets from outside, with maps in memory: marks of external addresses, source ranges, and
//! networks inside the cluster.

use std::net::IpAddr;

use lb_common::abi::{FrontendKey, FrontendKind, ServiceIndex, cluster_flags, service_flags};

use super::*;
use crate::maps::Dump;
use crate::maps::faulty::{Fault, FaultyMaps};
use crate::maps::prefix::Prefix;
use crate::testing::*;

const CLUSTER_IP: &str = "10.96.0.1";
const BALANCER: &str = "192.0.2.1";

fn addr(text: &str) -> Addr {
    text.parse::<IpAddr>().unwrap().into()
}

fn addrs(texts: &[&str]) -> BTreeSet<Addr> {
    texts.iter().map(|text| addr(text)).collect()
}

fn web(ranges: &[&str]) -> Cluster {
    Cluster::of([
        balanced("web", CLUSTER_IP, BALANCER, ranges).into(),
        slice("web", &["10.0.0.1"]).into(),
    ])
}

/// Returns whether a packet from an address to the load-balancer address is served, by the maps.
fn admits(dump: &Dump, client: &str) -> bool {
    let Some(frontend) = dump.frontends.get(&key(BALANCER, 80)) else {
        return false;
    };
    let restricted = dump.services[frontend.service.to_usize()].flags & service_flags::SOURCE_RANGES != 0;
    let mut ranges = dump.source_ranges.keys();
    !restricted || ranges.any(|range| range.admits(frontend.service, addr(client)))
}

fn ranges(dump: &Dump) -> Vec<String> {
    dump.source_ranges
        .keys()
        .map(|range| range.network().unwrap().to_string())
        .collect()
}

fn mark(dump: &Dump, ip: &str) -> Option<FrontendKind> {
    let found = dump.frontends.get(&FrontendKey::address_mark(addr(ip)))?;
    FrontendKind::from_u8(found.kind)
}

/// Returns CLUSTER_CIDRS as text: `i` for `INSIDE`, `h` for `HERE`, `-` for neither.
fn inside(dump: &Dump) -> Vec<String> {
    let entries = dump.cluster_cidrs.iter().map(|(cidr, flags)| {
        let flags = match *flags {
            0 => "-",
            cluster_flags::INSIDE => "i",
            cluster_flags::HERE => "h",
            _ => "ih",
        };
        format!("{} {flags}", cidr.network().unwrap())
    });
    entries.collect()
}

#[test]
fn an_admitted_client_is_served_at_every_step_of_a_change() {
    // The client is allowed in all states except the last.
    let lists: [&[&str]; 6] = [
        &[],
        &["10.0.0.0/8"],
        &["10.1.2.3/32", "172.16.0.0/12"],
        &["10.0.0.0/8", "192.168.0.0/16", "2001:db8::/32"],
        &["0.0.0.0/0", "172.16.0.0/12"],
        &["172.16.0.0/12"],
    ];
    let client = "10.1.2.3";
    let mut moments = 0;
    for before in &lists[..5] {
        for after in &lists {
            for at in 0.. {
                let mut told = web(before);
                let mut lb = start(FaultyMaps::new(maps(), 0, Fault::None));
                apply(&mut lb, &mut told);
                assert!(admits(&lb.maps().inner.contents, client));
                lb.maps_mut().arm(at, Fault::Die);
                told.become_like(&web(after));
                lb.apply(told.batch());
                // A grace period was requested, but a dead agent does not notice that it passes.
                lb.settle().ok();
                let is_dead = lb.maps().is_dead();
                let contents = &lb.maps().inner.contents;
                if after != &lists[5] {
                    assert!(
                        admits(contents, client),
                        "{before:?} to {after:?}: refused after {at} writes"
                    );
                }
                moments += 1;
                if !is_dead {
                    assert_eq!(admits(contents, client), after != &lists[5], "{before:?} to {after:?}");
                    assert_clean(&lb);
                    break;
                }
            }
        }
    }
    assert!(moments > 60, "{moments}");
}

#[test]
fn a_removed_range_is_refused_after_a_grace_period() {
    let mut told = web(&["10.0.0.0/8", "172.16.0.0/12"]);
    let mut lb = start(maps());
    apply(&mut lb, &mut told);
    told.become_like(&web(&["10.0.0.0/8"]));
    lb.apply(told.batch());
    assert_eq!(ranges(&lb.maps().contents), ["10.0.0.0/8", "172.16.0.0/12"]);
    lb.reclaim();
    assert_eq!(ranges(&lb.maps().contents).len(), 2, "no period has passed");
    lb.maps_mut().pass_grace();
    lb.reclaim();
    assert_eq!(ranges(&lb.maps().contents), ["10.0.0.0/8"]);
    assert_clean(&lb);
}

#[test]
fn a_range_that_returns_before_its_removal_stays() {
    let mut told = web(&["10.0.0.0/8", "172.16.0.0/12"]);
    let mut lb = start(maps());
    apply(&mut lb, &mut told);
    for list in [
        &["172.16.0.0/12"][..],
        &["10.0.0.0/8", "172.16.0.0/12"],
        &["10.0.0.0/8"],
    ] {
        told.become_like(&web(list));
        lb.apply(told.batch());
    }
    // The first grace period does not cover the second removal.
    let newest = lb.maps().grace_requested();
    lb.maps_mut().pass_grace_until(newest - 1);
    lb.reclaim();
    assert_eq!(ranges(&lb.maps().contents), ["10.0.0.0/8", "172.16.0.0/12"]);
    lb.settle().unwrap();
    assert_eq!(ranges(&lb.maps().contents), ["10.0.0.0/8"]);
    assert_clean(&lb);
}

#[test]
fn a_reused_index_has_no_former_ranges() {
    let mut told = web(&["10.0.0.0/8"]);
    let mut lb = start(maps());
    apply(&mut lb, &mut told);
    let index = lb.maps().contents.frontends[&key(BALANCER, 80)].service;
    told.remove_service("web");
    apply(&mut lb, &mut told);
    assert_eq!(ranges(&lb.maps().contents), [""; 0]);
    told.set(service("other", "10.96.0.2"));
    apply(&mut lb, &mut told);
    assert_eq!(lb.maps().contents.frontends[&key("10.96.0.2", 80)].service, index);
}

#[test]
fn ranges_of_a_dead_agent_are_removed_before_their_index_is_used() {
    for index in [1, 5, 16, u32::MAX].map(ServiceIndex::new) {
        let mut maps = maps();
        let stale = Prefix::of(index, "10.0.0.0/8".parse().unwrap());
        maps.contents.source_ranges.insert(stale, 0);
        let mut lb = start(maps);
        let mut told = web(&["172.16.0.0/12"]);
        // Before the source is complete, and after it.
        lb.apply(told.incomplete());
        assert!(!admits(&lb.maps().contents, "10.1.2.3"), "{index}");
        assert!(admits(&lb.maps().contents, "172.16.0.1"), "{index}");
        lb.apply(told.batch());
        lb.settle().unwrap();
        assert_clean(&lb);
        assert_eq!(ranges(&lb.maps().contents), ["172.16.0.0/12"], "{index}");
    }
}

#[test]
fn a_range_that_does_not_fit_refuses_only_its_clients() {
    let mut told = web(&["10.0.0.0/8", "172.16.0.0/12"]);
    let mut lb = start(maps().with_source_ranges(1));
    lb.apply(told.batch());
    let contents = &lb.maps().contents;
    assert_eq!(
        (admits(contents, "10.1.2.3"), admits(contents, "172.16.0.1")),
        (true, false)
    );
    assert_eq!(
        served(lb.maps(), CLUSTER_IP, 80),
        Some(vec!["10.0.0.1:8080".to_owned()])
    );
    let problem = &lb.problems()[0];
    assert!(
        problem.to_string().contains("SOURCE_RANGES is full (1 entries"),
        "{problem}"
    );
    assert_eq!(problem.service, Some(ObjectKey::new("default", "web")));
    // A change for which there is no room removes no range.
    told.become_like(&web(&["192.168.0.0/16"]));
    lb.apply(told.batch());
    lb.settle().unwrap();
    assert!(admits(&lb.maps().contents, "10.1.2.3"));
    told.become_like(&web(&["10.0.0.0/8"]));
    apply(&mut lb, &mut told);
    assert_eq!(lb.problems(), []);
}

#[test]
fn an_invalid_range_admits_no_client_and_is_a_problem() {
    for (written, restricted, admitted) in [
        (&["10.0.0.0/33"][..], true, &[][..]),
        (&["10.0.0.0/8", "somewhere"], true, &["10.0.0.0/8"]),
        (&["2001:db8::/129"], false, &[]),
        // Notations of both families: two networks in one string, and a v4-mapped address without a length.
        (&["192.168.99.0/24, fd00:99::/64"], true, &[]),
        (&["::ffff:192.168.99.0"], true, &[]),
    ] {
        let mut told = web(written);
        let mut lb = start(maps());
        lb.apply(told.batch());
        assert_eq!(ranges(&lb.maps().contents), admitted, "{written:?}");
        assert_eq!(admits(&lb.maps().contents, "192.0.2.99"), !restricted, "{written:?}");
        let problems = lb.problems();
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert_eq!(problems[0].service, Some(ObjectKey::new("default", "web")));
        assert!(problems[0].message.contains("loadBalancerSourceRanges"), "{problems:?}");
        assert_clean(&lb);
        told.become_like(&web(&[]));
        lb.apply(told.batch());
        assert_eq!(lb.problems(), []);
    }
}

#[test]
fn ranges_of_the_other_family_and_a_range_of_all_are_no_restriction() {
    for written in [&["2001:db8::/32"][..], &["10.0.0.0/8", "0.0.0.0/0"], &["::/0"]] {
        let mut lb = start(maps());
        apply(&mut lb, &mut web(written));
        assert!(admits(&lb.maps().contents, "192.0.2.99"), "{written:?}");
        assert_eq!(ranges(&lb.maps().contents), [""; 0], "{written:?}");
    }
}

#[test]
fn external_addresses_are_marked_except_those_of_nodes() {
    let mut told = web(&[]);
    let mut lb = start(maps());
    apply(&mut lb, &mut told);
    assert_eq!(mark(&lb.maps().contents, CLUSTER_IP), Some(FrontendKind::Address));
    assert_eq!(mark(&lb.maps().contents, BALANCER), Some(FrontendKind::ExternalAddress));
    // The address is added to a device of this node, and removed.
    lb.set_addresses(addrs(&["192.168.0.1", BALANCER]));
    assert_eq!(mark(&lb.maps().contents, BALANCER), None);
    assert!(lb.maps().contents.frontends.contains_key(&key(BALANCER, 80)));
    assert_clean(&lb);
    lb.set_addresses(addrs(&["192.168.0.1"]));
    lb.settle().unwrap();
    assert_eq!(mark(&lb.maps().contents, BALANCER), Some(FrontendKind::ExternalAddress));
    // The address belongs to one Node, or to two.
    for nodes in [&["n2"][..], &["n2", "n3"], &["n3"], &[]] {
        for name in ["n2", "n3"] {
            let other = node(name, &["192.168.0.9", BALANCER], &[]);
            if nodes.contains(&name) {
                told.set(other);
            } else {
                told.remove(other);
            }
        }
        apply(&mut lb, &mut told);
        let expected = nodes.is_empty().then_some(FrontendKind::ExternalAddress);
        assert_eq!(mark(&lb.maps().contents, BALANCER), expected, "{nodes:?}");
    }
    told.remove_service("web");
    apply(&mut lb, &mut told);
    assert_eq!(mark(&lb.maps().contents, BALANCER), None);
}

#[test]
fn an_address_that_is_a_cluster_ip_too_is_marked_as_one_in_place() {
    // The other Service is younger, and has another port there.
    let other = service("other", BALANCER).created(9).ports([port("", 81)]);
    let mut told = web(&[]);
    let mut lb = start(maps());
    apply(&mut lb, &mut told);
    told.set(other.clone());
    apply(&mut lb, &mut told);
    assert_eq!(mark(&lb.maps().contents, BALANCER), Some(FrontendKind::Address));
    // As any cluster IP, it is marked even if a node has the address.
    lb.set_addresses(addrs(&[BALANCER]));
    assert_eq!(mark(&lb.maps().contents, BALANCER), Some(FrontendKind::Address));
    lb.set_addresses(BTreeSet::new());
    told.remove(other);
    apply(&mut lb, &mut told);
    assert_eq!(mark(&lb.maps().contents, BALANCER), Some(FrontendKind::ExternalAddress));
}

#[test]
fn a_former_mark_of_this_nodes_address_is_removed_before_the_first_batch() {
    let mut lb = start(maps());
    apply(&mut lb, &mut web(&[]));
    let mut next = start(lb.maps().clone());
    next.set_addresses(addrs(&[BALANCER]));
    assert_eq!(mark(&next.maps().contents, BALANCER), None);
    assert_eq!(mark(&next.maps().contents, CLUSTER_IP), Some(FrontendKind::Address));
    next.apply(Cluster::default().incomplete());
    assert_eq!(mark(&next.maps().contents, CLUSTER_IP), Some(FrontendKind::Address));
    // The owner of another address is not known yet, so its mark stays.
    let mut slow = start(lb.maps().clone());
    slow.apply(Cluster::default().incomplete());
    assert_eq!(
        mark(&slow.maps().contents, BALANCER),
        Some(FrontendKind::ExternalAddress)
    );
}

#[test]
fn networks_inside_the_cluster_follow_nodes_and_addresses() {
    let mut told = Cluster::of([
        node(NODE, &["192.168.0.1"], &["10.10.1.0/24"]).into(),
        node("n2", &["192.168.0.2"], &["10.10.2.0/24"]).into(),
    ]);
    let mut lb = start(maps());
    lb.set_addresses(addrs(&["192.168.0.1", "10.10.1.1", "127.0.0.1", "fd00::1", "::1"]));
    apply(&mut lb, &mut told);
    let all = [
        "10.10.1.0/24 ih",
        "10.10.1.1/32 ih",
        "192.168.0.1/32 i",
        "fd00::1/128 i",
    ];
    assert_eq!(inside(&lb.maps().contents), all);
    told.set(node("n2", &["192.168.0.2"], &["10.10.3.0/24"]));
    told.set(node(NODE, &["192.168.0.1"], &[]));
    apply(&mut lb, &mut told);
    let all = ["10.10.1.1/32 i", "192.168.0.1/32 i", "fd00::1/128 i"];
    assert_eq!(inside(&lb.maps().contents), all);
    // A new agent has no Node yet: present entries stay until the source is complete.
    let mut next = start(lb.maps().clone());
    let before = next.maps().written();
    next.set_addresses(addrs(&["192.168.0.1"]));
    next.apply(Cluster::default().incomplete());
    assert_eq!(next.maps().written(), before);
    assert_eq!(inside(&next.maps().contents), all);
    apply(&mut next, &mut Cluster::default());
    assert_eq!(inside(&next.maps().contents), ["192.168.0.1/32 i"]);
}

#[test]
fn configured_networks_leave_the_flag_of_this_nodes_pods() {
    let nodes = || {
        Cluster::of([
            node(NODE, &[], &["10.10.1.0/24"]).into(),
            node("n2", &[], &["10.10.2.0/24"]).into(),
        ])
    };
    for (given, expected) in [
        (&["10.10.0.0/16"][..], &["10.10.0.0/16 i", "10.10.1.0/24 ih"][..]),
        (
            &["10.10.1.128/25", "fd00::/8"],
            &["10.10.1.0/24 ih", "10.10.1.128/25 ih", "fd00::/8 i"],
        ),
        // All of IPv6 is inside, but that does not make IPv4 inside.
        (&["::/0"], &["::/0 i", "0.0.0.0/0 -", "10.10.1.0/24 ih"]),
        (&[], &["10.10.1.0/24 ih"]),
    ] {
        let networks: Vec<IpNet> = given.iter().map(|net| net.parse().unwrap()).collect();
        let mut lb = start(maps()).with_inside(&networks);
        apply(&mut lb, &mut nodes());
        assert_eq!(inside(&lb.maps().contents), expected, "{given:?}");
        let written = lb.maps().written();
        lb.apply(nodes().batch());
        assert_eq!(lb.maps().written(), written, "{given:?}: unchanged objects");
    }
}

#[test]
fn only_this_node_among_a_thousand_costs_anything() {
    let mut told = Cluster::default();
    for n in 0..1000_u16 {
        let [a, b] = n.to_be_bytes();
        told.set(node(
            &format!("n{n}"),
            &[&format!("172.16.{a}.{b}")],
            &[&format!("10.{a}.{b}.0/24")],
        ));
    }
    let mut lb = start(maps().unchecked());
    apply(&mut lb, &mut told);
    let own = inside(&lb.maps().contents);
    let before = lb.maps().written();
    told.set(node("new", &["172.16.9.9"], &["10.9.9.0/24", "fd00:9::/64"]));
    lb.apply(told.batch());
    assert_eq!(lb.maps().written(), before);
    told.set(node(NODE, &["172.16.0.1"], &["10.9.9.0/24", "fd00:9::/64"]));
    lb.apply(told.batch());
    assert_eq!((own.len(), inside(&lb.maps().contents).len()), (1, 2));
    // Two new entries, and the key of the removed one.
    assert_eq!(lb.maps().written() - before, 2 * (4 + 16 + 4) + (4 + 16));
}
