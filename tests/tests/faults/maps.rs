//! Faults at the operations of the real maps, in this process.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use anyhow::{Context as _, Result, bail, ensure};
use lb_agent::loader::PinPath;
use lb_common::abi::FrontendKey;
use lb_core::maps::faulty::Fault;
use lb_core::model::{Change, Object, ObjectId};
use lb_core::reconcile::Usage;
use lb_stress::objects::{service, service_object, slice, slice_object};
use lb_stress::{InProcessAgent, NODE};
use lb_tests::{Cluster, scaled_count};

use crate::reader::{Always, Reader};

const WEB: (Ipv4Addr, u8) = (Ipv4Addr::new(10, 96, 0, 1), 1);
const PASSING: (Ipv4Addr, u8) = (Ipv4Addr::new(10, 96, 0, 2), 2);
const TCP: u8 = 6;

/// Returns the objects of one of two states. Going from either to the other makes a change of every kind: endpoints,
/// settings and policies change, one frontend moves to another Service and one to a new port of its Service, and
/// Services are added and removed.
fn state(second: bool) -> BTreeMap<ObjectId, Object> {
    let addresses = |owner: u8, numbers: &[u8]| -> Vec<_> {
        numbers
            .iter()
            .map(|number| Ipv4Addr::new(10, owner, 0, *number))
            .collect()
    };
    let mut objects = Vec::new();
    // Always present, at port 80.
    let mut web = service("web", WEB.0, &[("", 80)], 0);
    web.affinity_timeout = second.then_some(30);
    objects.push(service_object(web));
    let numbers: &[u8] = if second { &[2, 3, 4] } else { &[1, 2] };
    objects.push(slice_object(slice("web", &[""], NODE, &addresses(WEB.1, numbers))));
    // Port 80 moves between these two Services, and port 81 between two ports of the first.
    let first: &[_] = if second {
        &[("new", 81)]
    } else {
        &[("shared", 80), ("old", 81)]
    };
    let other: &[_] = if second {
        &[("shared", 80), ("own", 82)]
    } else {
        &[("own", 82)]
    };
    for (name, ports, number) in [("left", first, 1), ("right", other, 2)] {
        objects.push(service_object(service(name, PASSING.0, ports, 0)));
        let names = ["shared", "old", "new", "own"];
        objects.push(slice_object(slice(
            name,
            &names,
            NODE,
            &addresses(PASSING.1, &[number]),
        )));
    }
    // One of these two Services exists in each state.
    let (name, number) = if second { ("after", 4) } else { ("before", 3) };
    let address = Ipv4Addr::new(10, 96, 0, number);
    objects.push(service_object(service(name, address, &[("", 80)], 0)));
    objects.push(slice_object(slice(name, &[""], NODE, &addresses(number, &[1, 2]))));
    objects.into_iter().map(|object| (object.id(), object)).collect()
}

fn always() -> Vec<Always> {
    let ports = [(WEB, 80), (PASSING, 80), (PASSING, 81), (PASSING, 82)];
    ports
        .map(|((address, owner), port)| Always {
            key: FrontendKey::new(address.into(), port, TCP),
            owner,
        })
        .into()
}

/// Returns the changes from one state to another, as a source reports them.
fn changes(from: &BTreeMap<ObjectId, Object>, to: &BTreeMap<ObjectId, Object>) -> Vec<Change> {
    let set = to.iter().filter(|(id, object)| from.get(*id) != Some(*object));
    let gone = from.keys().filter(|id| !to.contains_key(*id));
    set.map(|(_, object)| Change::Set(object.clone()))
        .chain(gone.cloned().map(Change::Remove))
        .collect()
}

fn all(state: &BTreeMap<ObjectId, Object>) -> Vec<Change> {
    changes(&BTreeMap::new(), state)
}

/// Applies a change with a fault at operation number `at`, then recovers. Returns false if the change has fewer
/// operations.
fn trial(agent: &mut InProcessAgent, second: bool, at: u64, fault: Fault) -> Result<bool> {
    let (from, to) = (state(!second), state(second));
    let maps = agent.reconciler()?.maps_mut();
    let before = maps.operations();
    maps.arm(at, fault);
    agent.apply(changes(&from, &to))?;
    // The fault may hit an operation that clears removed entries.
    let settled = agent.reconciler()?.settle();
    let reached = agent.reconciler()?.maps().operations() - before > at;
    ensure!(fault == Fault::Fail || settled.is_ok(), "{settled:?}");
    if fault == Fault::Fail {
        let reconciler = agent.reconciler()?;
        reconciler.maps_mut().arm(0, Fault::None);
        reconciler.reclaim();
    } else {
        agent.restart()?;
        agent.apply(all(&to))?;
    }
    agent.check()?;
    Ok(reached)
}

#[test]
fn map_faults_are_repaired_and_never_visible_to_readers() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let mut agent = InProcessAgent::new(&PinPath::new(cluster.pin_path(NODE)))?;
    let mut second = false;
    agent.apply(all(&state(second)))?;
    agent.check()?;
    let reader = Reader::start(agent.open()?, always());
    // Map usage of each state: it must be the same each time, so nothing leaks.
    let mut usages: [Option<Usage>; 2] = [None; 2];
    // On a slow machine only every n-th operation is tried, at a different offset for each fault.
    let stride = 100 / scaled_count(100);
    let mut tried = [0; 2];
    // To the second state and back. An operation that cannot be torn is killed before it runs with either fault, so
    // that case is tried in both directions.
    for (first, faults) in [[Fault::Fail; 2], [Fault::Die, Fault::Tear]].into_iter().enumerate() {
        let mut at = first as u64 % stride;
        loop {
            let mut reached = false;
            for fault in faults {
                second = !second;
                let what = || format!("{fault:?} at operation {at}, to the second state: {second}");
                reached |= trial(&mut agent, second, at, fault).with_context(what)?;
                let usage = agent.reconciler()?.usage().0;
                let expected = *usages[usize::from(second)].get_or_insert(usage);
                ensure!(usage == expected, "{}: {usage:?} in use, not {expected:?}", what());
                if reader.has_ended() {
                    let seen = reader.stop().with_context(what)?;
                    bail!("the reader has ended without a reason: {seen:?}");
                }
            }
            if !reached {
                break;
            }
            tried[first] += 1;
            at += stride;
        }
    }
    let seen = reader.stop()?;
    println!("{tried:?} operations in two directions; {seen:?}");
    ensure!(
        tried.iter().all(|tried| tried * stride >= 30),
        "too few operations: {tried:?}"
    );
    ensure!(seen.chains > 0, "the reader has checked no chain");
    Ok(())
}
