//! Random runs of the writer against maps in memory, which check what a program could see after every write.

use std::net::IpAddr;

use lb_common::abi::FilterBit;
use proptest::prelude::*;

use super::*;
use crate::maps::fake::FakeMaps;
use crate::maps::faulty::{Fault, FaultyMaps};
use crate::model::{EndpointSlice, ServiceType};
use crate::testing::*;

/// An event of a random run.
#[derive(Debug, Clone)]
pub enum Act {
    /// A Service is added or replaced.
    Service(crate::model::Service),
    /// An EndpointSlice is added or replaced.
    Slice(EndpointSlice),
    /// The Service of this number is removed.
    RemoveService(usize),
    /// The EndpointSlice of this number is removed.
    RemoveSlice(usize),
    /// A Node is added or replaced.
    Node(Node),
    /// The Node of this number is removed.
    RemoveNode(usize),
    /// The addresses of this node's devices are replaced.
    Addresses(BTreeSet<Addr>),
    /// The source delivers the changes, complete or not.
    Tell(bool),
    /// A grace period passes for all requests except this many of the newest.
    Grace(u64),
    /// The agent frees entries after their grace period.
    Reclaim,
    /// The agent waits for all grace periods.
    Settle,
    /// The agent is killed between two operations.
    Restart,
    /// The operation after this many has a fault.
    Fault(u64, Fault),
}

const SERVICES: [&str; 4] = ["a", "b", "c", "d"];
const NODES: [&str; 3] = [NODE, "n2", "n3"];

/// Addresses that Services, Nodes and devices may have.
const SHARED: [&str; 4] = ["10.96.0.0", "192.0.2.1", "192.0.2.2", "192.168.0.1"];

/// Returns a strategy for events of random runs.
pub fn any_act() -> impl Strategy<Value = Act> {
    let a_service = (
        0..4_usize,
        0..4_u8,
        any::<bool>(),
        prop::option::of(1..3_i64),
        prop::option::of(1..3_u32),
        0..4_u8,
        a_balancer(),
    );
    let a_service = a_service.prop_map(|(name, ip, local, created, affinity, ports, balancer)| {
        let mut new = service(SERVICES[name], &format!("10.96.0.{ip}"));
        (new.created, new.affinity_timeout) = (created, affinity);
        if local {
            new = new.local();
        }
        if let Some((ip, ranges)) = balancer {
            new.service_type = ServiceType::LoadBalancer;
            new.load_balancer_ips = Box::new([ip.parse().expect("an address")]);
            new.source_ranges = ranges.into_iter().map(Into::into).collect();
        }
        Act::Service(match ports {
            0 => new.ports([port("x", 80), port("y", 81)]),
            1 => new.ports([port("y", 80)]),
            2 => new.ports([port("x", 81)]),
            _ => new.ports([port("x", 80)]),
        })
    });
    let conditions = [
        "",
        "",
        "@n1",
        "@n1",
        "unready",
        "serving",
        "terminating @n1",
        "terminating",
        "gone",
    ];
    let endpoints = prop::collection::vec((0..6_u8, prop::sample::select(conditions.to_vec())), 0..6);
    let a_slice = (0..4_usize, 0..2_u8, 0..3_u16, endpoints).prop_map(|(owner, number, target, endpoints)| {
        let texts: Vec<_> = endpoints
            .iter()
            .map(|(ip, conditions)| format!("10.0.0.{ip} {conditions}"))
            .collect();
        let texts: Vec<_> = texts.iter().map(String::as_str).collect();
        let ports = [("x", 8080 + target), ("y", 8080)];
        let name = format!("{}-{number}", SERVICES[owner]);
        Act::Slice(named_slice(&name, SERVICES[owner], &ports, &texts))
    });
    let networks = ["10.0.0.0/24", "10.0.1.0/24", "192.168.0.0/24", "fd00::/64"];
    let a_node = (0..3_usize, some_of(&SHARED), some_of(&networks));
    let a_node = a_node.prop_map(|(name, addresses, networks)| Act::Node(node(NODES[name], &addresses, &networks)));
    let addresses = some_of(&SHARED).prop_map(|addresses| {
        let ips = addresses.iter().map(|text| text.parse::<IpAddr>().expect("an address"));
        Act::Addresses(ips.map(Addr::from).collect())
    });
    let fault = prop::sample::select(vec![Fault::Die, Fault::Tear, Fault::Fail]);
    prop_oneof![
        4 => a_service,
        6 => a_slice,
        1 => (0..4_usize).prop_map(Act::RemoveService),
        1 => (0..4_usize).prop_map(Act::RemoveSlice),
        2 => a_node,
        1 => (0..3_usize).prop_map(Act::RemoveNode),
        1 => addresses,
        6 => prop::bool::weighted(0.7).prop_map(Act::Tell),
        2 => (0..4_u64).prop_map(Act::Grace),
        2 => Just(Act::Reclaim),
        1 => Just(Act::Settle),
        1 => Just(Act::Restart),
        1 => (0..40_u64, fault).prop_map(|(at, fault)| Act::Fault(at, fault)),
    ]
}

/// Up to three of some texts.
fn some_of(texts: &[&'static str]) -> impl Strategy<Value = Vec<&'static str>> + use<> {
    prop::sample::subsequence(texts.to_vec(), 0..=3)
}

/// An address of a load balancer, and its source ranges.
fn a_balancer() -> impl Strategy<Value = Option<(&'static str, Vec<&'static str>)>> {
    let ranges = [
        "10.0.0.0/8",
        "10.1.0.0/16",
        "172.16.0.0/12",
        "10.1.0.0/33",
        "fd00::/8",
        "0.0.0.0/0",
    ];
    prop::option::of((prop::sample::select(SHARED.to_vec()), some_of(&ranges)))
}

/// Plays a random run with maps of these sizes. At the end the source is complete, and the maps are as desired, or a
/// problem names a full map.
pub fn run(capacities: Capacities, acts: Vec<Act>) {
    let quiet = |maps| FaultyMaps::new(maps, 0, Fault::None);
    let mut lb = start(quiet(FakeMaps::new(capacities)));
    let mut cluster = Cluster::default();
    let mut addresses = BTreeSet::new();
    // Before the first apply of an agent nothing is desired. A failed write is repeated at an apply or a reclaim.
    let settled = |lb: &mut Reconciler<FaultyMaps<FakeMaps>>, addresses: &BTreeSet<Addr>| {
        lb.maps_mut().arm(0, Fault::None);
        lb.write_node_addrs(addresses).unwrap();
        lb.reclaim();
        lb.settle().unwrap();
        let dump = lb.maps().dump().unwrap();
        let addresses: BTreeSet<FilterBit> = dump.addresses().map(Into::into).collect();
        assert_eq!(
            dump.filter, addresses,
            "FILTER has the bits of all addresses, and no others"
        );
        if lb.is_complete() && lb.writer.failures().is_served() {
            assert_clean(lb);
        }
    };
    for act in acts.into_iter().chain([Act::Tell(true), Act::Settle]) {
        match act {
            Act::Service(new) => cluster.set(new),
            Act::Slice(new) => cluster.set(new),
            Act::RemoveService(name) => cluster.remove_service(SERVICES[name]),
            Act::RemoveSlice(name) => cluster.remove(slice(SERVICES[name], &[])),
            Act::Node(new) => cluster.set(new),
            Act::RemoveNode(name) => cluster.remove(node(NODES[name], &[], &[])),
            Act::Addresses(own) => {
                addresses = own;
                lb.set_addresses(addresses.clone());
                // The caller repeats this if it fails.
                lb.write_node_addrs(&addresses).ok();
            }
            Act::Tell(true) => lb.apply(cluster.batch()),
            Act::Tell(false) => lb.apply(cluster.incomplete()),
            Act::Grace(newest) => {
                let maps = &mut lb.maps_mut().inner;
                maps.pass_grace_until(maps.grace_requested().saturating_sub(newest));
            }
            Act::Reclaim => lb.reclaim(),
            Act::Settle if lb.maps().is_dead() => {}
            Act::Settle => settled(&mut lb, &addresses),
            Act::Restart => {
                lb = start(quiet(lb.maps().inner.clone()));
                lb.set_addresses(addresses.clone());
                cluster = cluster.undelivered();
            }
            Act::Fault(at, fault) => lb.maps_mut().arm(at, fault),
        }
        if lb.maps().is_dead() {
            lb = start(quiet(lb.maps().inner.clone()));
            lb.set_addresses(addresses.clone());
            cluster = cluster.undelivered();
        }
    }
    lb.apply(cluster.batch());
    settled(&mut lb, &addresses);
    assert!(lb.is_complete());
    let failures = lb.writer.failures();
    assert!(failures.cidrs.is_empty(), "{:?}", lb.problems());
    let failed = failures.ports.values().chain(failures.frontends.values());
    failed.for_each(|why| assert!(why.contains("is full"), "{why}"));
    assert!(capacities != ROOM || failures.is_served(), "{:?}", lb.problems());
    let written = lb.maps().written();
    lb.apply(cluster.undelivered().batch());
    assert_eq!(lb.maps().written(), written, "unchanged objects");
    let mut next = start(lb.maps().inner.clone());
    next.set_addresses(addresses);
    next.apply(cluster.undelivered().batch());
    if capacities == ROOM {
        assert_eq!(next.maps().written(), written, "unchanged objects after a restart");
        assert_clean(&next);
        assert_eq!(next.usage(), lb.usage());
    }
}
