//! Random runs of the writer against maps in memory, which check what a program could see after every write.

use proptest::prelude::*;

use super::*;
use crate::maps::fake::FakeMaps;
use crate::maps::faulty::{Fault, FaultyMaps};
use crate::model::EndpointSlice;
use crate::testing::*;

/// What happens in a random run.
#[derive(Debug, Clone)]
pub(crate) enum Act {
    Service(crate::model::Service),
    Slice(EndpointSlice),
    RemoveService(usize),
    RemoveSlice(usize),
    /// The source tells what changed; that this is all, or not.
    Tell(bool),
    /// A grace period passes, but not for the newest so many requests.
    Grace(u64),
    Reclaim,
    Settle,
    /// The agent is killed between two operations.
    Restart,
    /// The operation after so many meets with a fault.
    Fault(u64, Fault),
}

const SERVICES: [&str; 4] = ["a", "b", "c", "d"];

pub(crate) fn any_act() -> impl Strategy<Value = Act> {
    let a_service = (
        0..4_usize,
        0..4_u8,
        any::<bool>(),
        prop::option::of(1..3_i64),
        prop::option::of(1..3_u32),
        0..4_u8,
    );
    let a_service = a_service.prop_map(|(name, ip, local, created, affinity, ports)| {
        let mut new = service(SERVICES[name], &format!("10.96.0.{ip}"));
        (new.created, new.affinity_timeout) = (created, affinity);
        if local {
            new = new.local();
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
    let fault = prop::sample::select(vec![Fault::Die, Fault::Tear, Fault::Fail]);
    prop_oneof![
        4 => a_service,
        6 => a_slice,
        1 => (0..4_usize).prop_map(Act::RemoveService),
        1 => (0..4_usize).prop_map(Act::RemoveSlice),
        6 => prop::bool::weighted(0.7).prop_map(Act::Tell),
        2 => (0..4_u64).prop_map(Act::Grace),
        2 => Just(Act::Reclaim),
        1 => Just(Act::Settle),
        1 => Just(Act::Restart),
        1 => (0..40_u64, fault).prop_map(|(at, fault)| Act::Fault(at, fault)),
    ]
}

/// Plays a random run with maps of these sizes; at the end everything is told, and all is as desired, or a full map is
/// named.
pub(crate) fn run(capacities: Capacities, acts: Vec<Act>) {
    let quiet = |maps| FaultyMaps::new(maps, 0, Fault::None);
    let mut lb = start(quiet(FakeMaps::new(capacities)));
    let mut cluster = Cluster::default();
    // Before the first apply of an agent nothing is desired, and a failure is tried again at an apply or a reclaim.
    let settled = |lb: &mut Reconciler<FaultyMaps<FakeMaps>>| {
        lb.maps_mut().arm(0, Fault::None);
        lb.reclaim();
        lb.settle().unwrap();
        if lb.is_complete() && lb.failed_ports.is_empty() && lb.failed_frontends.is_empty() {
            assert_clean(lb);
        }
    };
    for act in acts.into_iter().chain([Act::Tell(true), Act::Settle]) {
        match act {
            Act::Service(new) => cluster.set(new),
            Act::Slice(new) => cluster.set(new),
            Act::RemoveService(name) => cluster.remove_service(SERVICES[name]),
            Act::RemoveSlice(name) => cluster.remove(slice(SERVICES[name], &[])),
            Act::Tell(true) => lb.apply(cluster.batch()),
            Act::Tell(false) => lb.apply(cluster.incomplete()),
            Act::Grace(newest) => {
                let maps = &mut lb.maps_mut().inner;
                maps.pass_grace_until(maps.grace_requested().saturating_sub(newest));
            }
            Act::Reclaim => lb.reclaim(),
            Act::Settle if lb.maps().is_dead() => {}
            Act::Settle => settled(&mut lb),
            Act::Restart => {
                lb = start(quiet(lb.maps().inner.clone()));
                cluster = cluster.again();
            }
            Act::Fault(at, fault) => lb.maps_mut().arm(at, fault),
        }
        if lb.maps().is_dead() {
            lb = start(quiet(lb.maps().inner.clone()));
            cluster = cluster.again();
        }
    }
    lb.apply(cluster.batch());
    settled(&mut lb);
    assert!(lb.is_complete());
    let failed = lb.failed_ports.values().chain(lb.failed_frontends.values());
    failed.for_each(|why| assert!(why.contains("is full"), "{why}"));
    assert!(
        capacities != ROOM || lb.failed_ports.is_empty() && lb.failed_frontends.is_empty(),
        "{:?}",
        lb.problems()
    );
    let written = lb.maps().written();
    lb.apply(cluster.again().batch());
    assert_eq!(lb.maps().written(), written, "the same again");
    let mut next = start(lb.maps().inner.clone());
    next.apply(cluster.again().batch());
    if capacities == ROOM {
        assert_eq!(next.maps().written(), written, "the same again after a restart");
        assert_clean(&next);
        assert_eq!(next.usage(), lb.usage());
    }
}
