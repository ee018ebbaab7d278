//! The reconciler with maps in memory: their content after each change, and the states that must never occur in
//! between.

use std::sync::Arc;

use super::random::{any_act, run};
use super::*;
use lb_common::abi::{Frontend, FrontendKey, FrontendKind, Service, ServiceIndex, SetWord, SizedMap};
use lb_common::logic::generation;
use proptest::prelude::*;

use crate::maps::fake::FakeMaps;
use crate::maps::faulty::{Fault, FaultyMaps};

use crate::model::{EndpointSlice, Node, Object, ProblemKind};
use crate::testing::*;
use crate::verify::verify;

/// Successive states of the cluster; each but the first is a change.
type Story = Vec<Cluster>;

/// The stories in which faults are injected at every operation.
fn stories() -> Vec<(&'static str, Story)> {
    let story = |steps: &[&dyn Fn(&mut Cluster)]| -> Story {
        let mut cluster = Cluster::default();
        let states = steps.iter().map(|step| {
            step(&mut cluster);
            cluster.clone()
        });
        states.collect()
    };
    let web = |ip: &str| service("web", ip);
    vec![
        (
            "endpoints come and go",
            story(&[
                &|c| {
                    c.set(web("10.96.0.1"));
                    c.set(slice("web", &["10.0.0.1", "10.0.0.2"]));
                },
                &|c| c.set(slice("web", &["10.0.0.2", "10.0.0.3", "10.0.0.4 @n1"])),
                &|c| c.set(slice("web", &["10.0.0.2 terminating", "10.0.0.3 gone", "10.0.0.4 @n1"])),
                &|c| c.set(slice("web", &[])),
                &|c| c.set(slice("web", &["10.0.0.2"])),
            ]),
        ),
        (
            "a policy changes, affinity comes and goes",
            story(&[
                &|c| {
                    c.set(web("10.96.0.1"));
                    c.set(slice("web", &["10.0.0.1 @n1", "10.0.0.2 @n2"]));
                },
                &|c| c.set(web("10.96.0.1").local().affinity(30)),
                &|c| c.set(slice("web", &["10.0.0.2 @n2"])),
                &|c| c.set(web("10.96.0.1")),
            ]),
        ),
        (
            "ports are added, renamed, renumbered and removed",
            story(&[
                &|c| {
                    c.set(web("10.96.0.1").ports([port("a", 80), port("b", 81)]));
                    let ports = [("a", 8080), ("b", 8081), ("c", 8082)];
                    c.set(named_slice("web-0", "web", &ports, &["10.0.0.1", "10.0.0.2"]));
                },
                &|c| c.set(web("10.96.0.1").ports([port("a", 80), port("c", 81)])),
                &|c| c.set(web("10.96.0.1").ports([port("a", 90), port("c", 80)])),
                &|c| c.set(web("10.96.0.1").ports([port("c", 81)])),
            ]),
        ),
        (
            "a service goes and comes back, and its address moves",
            story(&[
                &|c| {
                    c.set(web("10.96.0.1"));
                    c.set(slice("web", &["10.0.0.1"]));
                },
                &|c| c.remove_service("web"),
                &|c| c.set(web("10.96.0.1")),
                &|c| c.set(web("10.96.0.2")),
            ]),
        ),
        (
            "two claim one address",
            story(&[
                &|c| {
                    c.set(web("10.96.0.1").created(2));
                    c.set(slice("web", &["10.0.0.1"]));
                },
                &|c| {
                    c.set(service("older", "10.96.0.1").created(1));
                    c.set(slice("older", &["10.0.1.1", "10.0.1.2"]));
                },
                &|c| c.set(service("older", "10.96.0.2").created(1)),
                &|c| c.set(service("older", "10.96.0.1").created(1)),
                &|c| c.remove_service("older"),
            ]),
        ),
        (
            "a load balancer's sources change, and Nodes come and go",
            story(&[
                &|c| {
                    c.set(balanced(
                        "web",
                        "10.96.0.1",
                        "192.0.2.1",
                        &["10.0.0.0/8", "172.16.0.0/12"],
                    ));
                    c.set(slice("web", &["10.0.0.1"]));
                    c.set(node(NODE, &["192.168.0.1"], &["10.10.1.0/24"]));
                },
                &|c| {
                    c.set(balanced(
                        "web",
                        "10.96.0.1",
                        "192.0.2.1",
                        &["10.0.0.0/8", "10.1.0.0/16"],
                    ));
                    c.set(node("n2", &["192.0.2.1"], &["10.10.2.0/24"]));
                },
                &|c| {
                    c.set(balanced("web", "10.96.0.1", "192.0.2.1", &[]));
                    c.set(node("n2", &["192.168.0.2"], &["10.10.3.0/24"]));
                },
                &|c| c.set(balanced("web", "10.96.0.1", "192.0.2.2", &["10.0.0.0/8"])),
                &|c| c.remove_service("web"),
                &|c| c.set(service("new", "10.96.0.2")),
            ]),
        ),
    ]
}

/// Plays a story, and calls `between` after every state.
fn play<M: Maps>(lb: &mut Reconciler<M>, story: &[Cluster], mut between: impl FnMut(&mut Reconciler<M>)) {
    let mut told = Cluster::default();
    for state in story {
        told.become_like(state);
        lb.apply(told.batch());
        between(lb);
    }
}

#[test]
fn every_story_ends_as_desired() {
    for (name, story) in stories() {
        let mut lb = start(maps());
        play(&mut lb, &story, |lb| {
            lb.settle().unwrap();
            assert_clean(lb);
        });
        println!("{name}: {} bytes", lb.maps().written());
        let mut hasty = start(maps());
        play(&mut hasty, &story, |_| ());
        hasty.settle().unwrap();
        assert_clean(&hasty);
    }
}

/// Returns the number of operations of a story.
fn operations(story: &Story, settle: bool) -> u64 {
    let mut lb = start(FaultyMaps::new(maps(), u64::MAX, Fault::None));
    play(&mut lb, story, |lb| {
        if settle {
            lb.settle().unwrap();
        }
    });
    lb.maps().operations()
}

#[test]
fn next_agent_completes_a_change_that_died_at_any_operation() {
    for (name, story) in stories() {
        for (settle, fault) in [true, false]
            .into_iter()
            .flat_map(|s| [(s, Fault::Die), (s, Fault::Tear)])
        {
            for at in 0..operations(&story, settle) {
                let mut lb = start(FaultyMaps::new(maps(), at, fault));
                // The next agent starts with the objects of the time of death, or with newer ones.
                let mut then = None;
                let mut states = story.iter();
                play(&mut lb, &story, |lb| {
                    let state = states.next().unwrap();
                    if settle {
                        lb.settle().unwrap();
                    }
                    if lb.maps().is_dead() && then.is_none() {
                        then = Some(state.clone());
                    }
                });
                let left = lb.maps().inner.clone();
                for now in then.iter().chain(story.last()) {
                    let mut next = start(left.clone());
                    apply(&mut next, &mut now.undelivered());
                    let before = next.maps().written();
                    next.apply(now.undelivered().batch());
                    assert_eq!(next.maps().written(), before, "{name}, died at {at}");
                }
            }
        }
    }
}

#[test]
fn next_attempt_completes_a_change_that_failed_at_any_operation() {
    for (name, story) in stories() {
        for settle in [true, false] {
            for at in 0..operations(&story, settle) {
                let maps = FaultyMaps::new(maps(), at, Fault::Fail);
                let Ok(mut lb) = Reconciler::adopt(maps, NODE) else {
                    continue;
                };
                play(&mut lb, &story, |lb| {
                    if settle {
                        lb.settle().ok();
                    }
                });
                lb.apply(Batch {
                    complete: true,
                    ..Batch::default()
                });
                lb.settle().unwrap();
                assert_clean(&lb);
                assert_eq!(lb.problems().len(), 0, "{name}, failed at {at}: {:?}", lb.problems());
            }
        }
    }
}

/// Returns service indexes and backend ids, by the identity of their service port or backend.
fn identities(lb: &Reconciler<FakeMaps>) -> BTreeMap<String, u32> {
    let dump = lb.maps().dump().unwrap();
    let names = dump
        .names
        .iter()
        .map(|(index, name)| (crate::names::port_id(name).unwrap().to_string(), index.get()));
    let live = (0..)
        .zip(&dump.backends)
        .filter(|(_, b)| generation::is_live(b.generation));
    names
        .chain(live.map(|(id, b)| (format!("{}:{} of {}", b.addr, b.port, b.service), id)))
        .collect()
}

fn web() -> Cluster {
    Cluster::of([
        service("web", "10.96.0.1").into(),
        slice("web", &["10.0.0.1", "10.0.0.2"]).into(),
        service("db", "10.96.0.2").into(),
        slice("db", &["10.0.1.1", "10.0.1.2"]).into(),
    ])
}

/// Starts an agent that serves [`web`].
fn serving() -> (Reconciler<FakeMaps>, Cluster) {
    let (mut lb, mut cluster) = (start(maps()), web());
    apply(&mut lb, &mut cluster);
    (lb, cluster)
}

/// Starts the next agent, with the same maps.
fn restart(lb: &Reconciler<FakeMaps>) -> Reconciler<FakeMaps> {
    start(lb.maps().clone())
}

const WEB: [&str; 2] = ["10.0.0.1:8080", "10.0.0.2:8080"];

#[track_caller]
fn assert_served(lb: &Reconciler<FakeMaps>, ip: &str, port: u16, want: &[&str]) {
    let is = served(lb.maps(), ip, port);
    assert_eq!(
        is.as_deref(),
        Some(&want.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>()[..])
    );
}

#[test]
fn a_service_is_served() {
    let (lb, _) = serving();
    assert_served(&lb, "10.96.0.1", 80, &WEB);
    assert_served(&lb, "10.96.0.2", 80, &["10.0.1.1:8080", "10.0.1.2:8080"]);
    assert_eq!(served(lb.maps(), "10.96.0.1", 81), None);
    let mark = FrontendKey::address_mark(key("10.96.0.1", 80).addr);
    assert_eq!(
        lb.maps().contents.frontends[&mark],
        Frontend::mark(FrontendKind::Address)
    );
    let (usage, _) = lb.usage();
    let want = Usage {
        services: 2,
        frontends: 4,
        backends: 4,
        backend_slots: 4,
    };
    assert_eq!(usage, want);
}

#[test]
fn unchanged_objects_write_nothing_even_after_a_restart() {
    let (mut lb, cluster) = serving();
    let before = lb.maps().written();
    lb.apply(cluster.undelivered().batch());
    assert_eq!(lb.maps().written(), before);
    let mut next = restart(&lb);
    apply(&mut next, &mut cluster.undelivered());
    assert_eq!(next.maps().written(), before);
    assert_eq!(identities(&next), identities(&lb));
    assert_eq!(next.usage(), lb.usage());
}

#[test]
fn index_and_ids_survive_changes_and_a_restart() {
    let (mut lb, mut cluster) = serving();
    let before = identities(&lb);
    cluster.set(slice("web", &["10.0.0.3", "10.0.0.2", "10.0.0.4"]));
    cluster.set(service("web", "10.96.0.9").affinity(9).ports([port("", 81)]));
    cluster.set(service("aaa", "10.96.0.3"));
    apply(&mut lb, &mut cluster);
    let mut lb = restart(&lb);
    apply(&mut lb, &mut cluster.undelivered());
    let after = identities(&lb);
    for (what, id) in before.iter().filter(|(what, _)| !what.starts_with("10.0.0.1:")) {
        assert_eq!(after.get(what), Some(id), "{what}");
    }
    assert_served(
        &lb,
        "10.96.0.9",
        81,
        &["10.0.0.2:8080", "10.0.0.3:8080", "10.0.0.4:8080"],
    );
    assert_eq!(served(lb.maps(), "10.96.0.1", 80), None);
}

#[test]
fn pinned_entries_stay_until_the_source_is_complete() {
    let (lb, _) = serving();
    let pinned = lb.maps().contents.clone();
    let mut next = restart(&lb);
    let mut told = Cluster::default();
    let still = |next: &Reconciler<FakeMaps>| {
        assert_served(next, "10.96.0.1", 80, &WEB);
        assert_served(next, "10.96.0.2", 80, &["10.0.1.1:8080", "10.0.1.2:8080"]);
    };
    // The source has delivered nothing.
    next.apply(told.incomplete());
    next.settle().unwrap();
    assert_eq!(next.maps().contents, pinned);
    // A Service without its slices, and slices without their Service.
    told.set(service("web", "10.96.0.1"));
    told.set(slice("db", &["10.0.1.7"]));
    next.apply(told.incomplete());
    next.settle().unwrap();
    assert_eq!(next.maps().contents, pinned);
    // A Service that claims the address of one that the source may still deliver.
    told.set(service("new", "10.96.0.2").created(3));
    told.set(slice("new", &["10.0.2.1"]));
    next.apply(told.incomplete());
    next.settle().unwrap();
    still(&next);
    // Endpoints are applied as soon as the source delivers any.
    told.set(slice("web", &["10.0.0.2"]));
    next.apply(told.incomplete());
    next.settle().unwrap();
    assert_served(&next, "10.96.0.1", 80, &["10.0.0.2:8080"]);
    assert!(!next.is_complete());
    // The source is complete: objects that it did not deliver are removed.
    apply(&mut next, &mut told);
    assert!(next.is_complete());
    assert_served(&next, "10.96.0.2", 80, &["10.0.2.1:8080"]);
    // The source has a problem again: the delivered objects stay.
    told.remove_service("new");
    next.apply(told.incomplete());
    next.settle().unwrap();
    assert_clean(&next);
    assert_eq!(served(next.maps(), "10.96.0.2", 80), None);
}

#[test]
fn a_delivered_and_deleted_service_is_removed_at_once() {
    let (lb, cluster) = serving();
    let mut next = restart(&lb);
    let mut told = cluster.undelivered();
    next.apply(told.incomplete());
    told.remove_service("web");
    next.apply(told.incomplete());
    next.settle().unwrap();
    assert_eq!(served(next.maps(), "10.96.0.1", 80), None);
    let mut bare = restart(&lb);
    let mut told = Cluster::of([service("web", "10.96.0.1").into()]);
    bare.apply(told.incomplete());
    told.remove_service("web");
    bare.apply(told.incomplete());
    bare.settle().unwrap();
    assert_eq!(served(bare.maps(), "10.96.0.1", 80), None);
    assert_served(&bare, "10.96.0.2", 80, &["10.0.1.1:8080", "10.0.1.2:8080"]);
}

/// A frontend was deleted from outside: a change of endpoints inserts it again, and frees what the former set had.
#[test]
fn a_missing_frontend_does_not_keep_former_sets() {
    let (mut lb, mut cluster) = serving();
    let usage = lb.usage();
    lb.maps_mut().contents.frontends.remove(&key("10.96.0.1", 80));
    cluster.set(slice("web", &["10.0.0.7", "10.0.0.8"]));
    apply(&mut lb, &mut cluster);
    assert_served(&lb, "10.96.0.1", 80, &["10.0.0.7:8080", "10.0.0.8:8080"]);
    assert_eq!((lb.usage(), lb.problems()), (usage, vec![]));
}

/// Returns maps as a build of layout 3 wrote them: without the service in slots and the set in frontends.
fn as_of_layout_3(mut maps: FakeMaps) -> FakeMaps {
    for word in maps.contents.services.iter().flat_map(Service::set_words) {
        let set = maps.contents.slots[word.base as usize..].iter_mut();
        set.take(word.len.into())
            .for_each(|slot| slot.service = ServiceIndex::NONE);
    }
    for frontend in maps.contents.frontends.values_mut() {
        frontend.set = SetWord::NONE;
    }
    maps
}

#[test]
fn slots_of_layout_3_get_their_service_even_if_an_agent_dies_meanwhile() {
    let (lb, cluster) = serving();
    let former = as_of_layout_3(lb.maps().clone());
    let is_complete_at = |at| {
        let torn = start(FaultyMaps::new(former.clone(), at, Fault::Tear));
        let mut next = start(torn.maps().inner.clone());
        next.apply(cluster.undelivered().batch());
        next.settle().unwrap();
        assert_eq!(next.maps().contents, lb.maps().contents, "died at {at}");
        !torn.maps().is_dead()
    };
    let tried = (0..).take_while(|at| !is_complete_at(*at)).count();
    assert!(tried >= 2, "{tried} operations");
}

#[test]
fn a_frontend_passes_between_services_in_place() {
    let (mut lb, mut cluster) = serving();
    cluster.set(service("web", "10.96.0.2"));
    cluster.set(service("db", "10.96.0.1"));
    let before = lb.maps().written();
    apply(&mut lb, &mut cluster);
    assert_eq!(lb.maps().written() - before, 32, "two stores of two words");
    assert_served(&lb, "10.96.0.2", 80, &WEB);
}

#[test]
fn the_older_claim_gets_a_frontend_until_it_is_removed() {
    let (mut lb, mut cluster) = serving();
    cluster.set(service("old", "10.96.0.1").created(1));
    cluster.set(slice("old", &["10.0.9.9"]));
    apply(&mut lb, &mut cluster);
    assert_served(&lb, "10.96.0.1", 80, &["10.0.9.9:8080"]);
    assert_eq!(lb.problems().len(), 1);
    assert!(
        lb.problems()[0].to_string().contains("default/web"),
        "{:?}",
        lb.problems()
    );
    let written = lb.maps().written();
    let mut next = restart(&lb);
    apply(&mut next, &mut cluster.undelivered());
    assert_eq!(next.maps().written(), written);
    cluster.remove_service("old");
    apply(&mut lb, &mut cluster);
    assert_served(&lb, "10.96.0.1", 80, &WEB);
    assert!(lb.problems().is_empty());
}

#[test]
fn a_service_that_comes_back_before_the_grace_period_ends_gets_another_index() {
    let (mut lb, mut cluster) = serving();
    let index = lb.maps().contents.frontends[&key("10.96.0.1", 80)].service;
    cluster.remove_service("web");
    lb.apply(cluster.batch());
    assert_eq!(served(lb.maps(), "10.96.0.1", 80), None);
    assert_eq!(lb.maps().contents.names.len(), 2, "cleared only after the grace period");
    cluster.set(service("web", "10.96.0.1"));
    lb.apply(cluster.batch());
    assert_ne!(lb.maps().contents.frontends[&key("10.96.0.1", 80)].service, index);
    // The agent dies here: two entries of NAMES have one identity.
    let mut next = restart(&lb);
    apply(&mut next, &mut cluster.undelivered());
    assert_eq!(next.usage().0.services, 2);
    lb.settle().unwrap();
    assert_clean(&lb);
    assert_eq!(lb.usage().0.services, 2);
}

#[test]
fn slots_and_ids_are_reused_only_after_a_grace_period() {
    let (mut lb, mut cluster) = serving();
    // Without a grace period in between, each change takes new slots and ids...
    for round in 0..6 {
        cluster.set(slice("web", &[&format!("10.0.2.{round}"), "10.0.0.2"]));
        lb.apply(cluster.batch());
        assert_clean(&lb);
    }
    let (usage, _) = lb.usage();
    assert_eq!((usage.backends, usage.backend_slots), (4 + 6, 4 + 12));
    // ...and one grace period frees all of them.
    lb.maps_mut().pass_grace();
    lb.reclaim();
    let (usage, _) = lb.usage();
    assert_eq!((usage.backends, usage.backend_slots), (4, 4));
}

#[test]
fn a_backend_id_that_is_reused_before_its_former_port_is_cleared_stays_in_use() {
    let mut lb = start(FaultyMaps::new(maps(), u64::MAX, Fault::None));
    let mut cluster = web();
    apply(&mut lb, &mut cluster);
    let is_live = |lb: &Reconciler<FaultyMaps<FakeMaps>>, id: usize| {
        let dump = lb.maps().dump().unwrap();
        generation::is_live(dump.backends[id].generation)
    };
    let used = lb.usage().0.backends as usize;
    let live = |lb: &Reconciler<_>| (1..=used).filter(|id| is_live(lb, *id)).collect::<Vec<_>>();

    // Of two backends, only the first is withdrawn.
    cluster.remove_service("web");
    lb.apply(cluster.batch());
    lb.maps_mut().inner.pass_grace();
    // After the write of SERVICES and the first withdrawal.
    lb.maps_mut().arm(2, Fault::Fail);
    lb.reclaim();
    assert_eq!(live(&lb).len(), used - 1);
    let withdrawn = (1..=used).find(|id| !is_live(&lb, *id)).unwrap();

    // The next attempt fails too, and then a new Service gets the id.
    lb.maps_mut().inner.pass_grace();
    lb.maps_mut().arm(0, Fault::Fail);
    cluster.set(service("new", "10.96.0.3"));
    cluster.set(slice("new", &["10.0.2.1"]));
    lb.apply(cluster.batch());
    assert_eq!(live(&lb).len(), used);
    assert!(is_live(&lb, withdrawn));

    lb.settle().unwrap();
    assert_clean(&lb);
    assert_eq!((live(&lb).len(), lb.usage().0.backends as usize), (used - 1, used - 1));
}

#[test]
fn the_content_of_the_maps_shows_their_use() {
    let mut lb = start(maps());
    let endpoints = [
        "10.0.0.1 @n1",
        "10.0.0.2",
        "10.0.0.3",
        "10.0.0.4",
        "10.0.0.5 terminating",
    ];
    let mut cluster = Cluster::of([
        service("web", "10.96.0.1").local().into(),
        slice("web", &endpoints).into(),
    ]);
    apply(&mut lb, &mut cluster);
    let want = Usage {
        services: 1,
        frontends: 2,
        backends: 5,
        // Four in the cluster set, and one that the internal and the external set share.
        backend_slots: 5,
    };
    assert_eq!(Usage::of(&lb.maps().dump().unwrap()), want);
    for (name, story) in stories() {
        let mut lb = start(FakeMaps::new(ROOM));
        for mut cluster in story {
            apply(&mut lb, &mut cluster);
            assert_eq!(Usage::of(&lb.maps().dump().unwrap()), lb.usage().0, "{name}");
        }
    }
}

/// Returns whether the maps have room for a demand.
fn has_room(demand: Usage, capacities: Capacities) -> bool {
    // Service index 0 and backend 0 are not used.
    demand.services < capacities[SizedMap::Services]
        && demand.backends < capacities[SizedMap::Backends]
        && demand.frontends <= capacities[SizedMap::Frontends]
        && demand.backend_slots <= capacities[SizedMap::BackendSlots]
}

#[test]
fn the_demand_of_a_batch_is_what_its_write_uses() {
    for (name, story) in stories() {
        let mut lb = start(FakeMaps::new(ROOM));
        for mut cluster in story {
            lb.receive(cluster.batch());
            let demand = lb.demand();
            lb.write();
            let (usage, _) = lb.usage();
            // Frontends that are deleted count until then, and are not in use afterwards.
            assert!(usage.frontends <= demand.frontends, "{name}: {usage:?} of {demand:?}");
            let frontends = usage.frontends;
            assert_eq!(usage, Usage { frontends, ..demand }, "{name}");
            lb.settle().unwrap();
        }
    }
}

/// Maps that have room for nothing grow by the demand of each batch, and no Service waits for room.
#[test]
fn maps_that_grow_before_a_write_refuse_nothing() {
    let tiny = Capacities::uniform(2);
    for (name, story) in stories() {
        let mut lb = start(FakeMaps::new(tiny));
        for mut cluster in story {
            lb.receive(cluster.batch());
            let demand = lb.demand();
            let (_, present) = lb.usage();
            if !has_room(demand, present) {
                let to = demand.entries().map(|map, used| (used + 1).max(present[map]));
                lb.replace_maps(|maps| -> Result<(), MapError> {
                    maps.resize(to);
                    Ok(())
                })
                .unwrap();
            }
            lb.write();
            assert_eq!(lb.problems(), cluster_problems(&lb), "{name}");
            lb.settle().unwrap();
            lb.maps().assert_sound();
            assert_eq!(verify(lb.desired(), &lb.maps().dump().unwrap()), [], "{name}");
            // As few entries as are possible, and back.
            let (needed, present) = (lb.needed(), lb.maps().capacities());
            for to in [needed.map(|map, needed| needed.max(2).min(present[map])), present] {
                lb.replace_maps(|maps| -> Result<(), MapError> {
                    maps.resize(to);
                    Ok(())
                })
                .unwrap();
                assert_eq!(verify(lb.desired(), &lb.maps().dump().unwrap()), [], "{name}");
            }
        }
    }
}

/// Returns the problems that are not of the maps.
fn cluster_problems(lb: &Reconciler<FakeMaps>) -> Vec<Problem> {
    let mut problems = lb.problems();
    problems.retain(|problem| !problem.message.contains("not up to date"));
    problems
}

/// Fills one map after another. A problem names the Service that did not fit, others are not affected, and it is
/// written when there is room.
#[test]
fn a_full_map_is_a_problem_and_retried() {
    let tight = |map, entries| start(FakeMaps::new(ROOM.with(map, entries)));
    let cases: [(_, &str); 4] = [
        (
            tight(SizedMap::Services, 3),
            "SERVICES is full (3 entries): raise --max-services",
        ),
        (
            tight(SizedMap::Frontends, 4),
            "FRONTENDS is full (4 entries): raise --max-frontends",
        ),
        (
            tight(SizedMap::Backends, 6),
            "BACKENDS is full (6 entries): raise --max-backends",
        ),
        (
            tight(SizedMap::BackendSlots, 4),
            "BACKEND_SLOTS is full (4 entries): raise --max-backend-slots",
        ),
    ];
    for (mut lb, message) in cases {
        let mut cluster = web();
        apply(&mut lb, &mut cluster);
        cluster.set(service("new", "10.96.0.3"));
        cluster.set(slice("new", &["10.0.3.1", "10.0.3.2"]));
        lb.apply(cluster.batch());
        lb.settle().unwrap();
        let problems = lb.problems();
        assert!(
            !problems.is_empty() && problems.iter().all(|p| p.message.contains(message)),
            "{problems:?}"
        );
        assert_served(&lb, "10.96.0.1", 80, &WEB);
        assert_eq!(served(lb.maps(), "10.96.0.3", 80), None);
        // Other Services can change meanwhile, and nothing is written for the one that does not fit.
        let written = lb.maps().written();
        lb.apply(Batch::default());
        lb.settle().unwrap();
        assert_eq!(lb.maps().written(), written, "{message}");
        cluster.remove_service("web");
        lb.apply(cluster.batch());
        lb.settle().unwrap();
        assert_clean(&lb);
        assert_eq!(lb.problems(), []);
        assert_served(&lb, "10.96.0.3", 80, &["10.0.3.1:8080", "10.0.3.2:8080"]);
        // The batch removes entries and so makes room for its own additions.
        cluster.remove_service("new");
        cluster.set(service("web", "10.96.0.1"));
        lb.apply(cluster.batch());
        lb.settle().unwrap();
        assert_clean(&lb);
        assert_eq!(lb.problems(), []);
        assert_served(&lb, "10.96.0.1", 80, &WEB);
    }
}

#[test]
fn the_oldest_services_are_served_if_there_is_no_room_for_all() {
    let tight = [
        (SizedMap::Services, 3),
        (SizedMap::Frontends, 4),
        (SizedMap::Backends, 3),
        (SizedMap::BackendSlots, 2),
    ];
    for (map, entries) in tight {
        let mut lb = start(FakeMaps::new(ROOM.with(map, entries)));
        let mut cluster = Cluster::default();
        // The order of their names and addresses is not that of their age.
        for (i, (name, created)) in [("a", Some(30)), ("b", None), ("c", Some(10)), ("d", Some(20))]
            .into_iter()
            .enumerate()
        {
            let service = service(name, &format!("10.96.0.{i}"));
            cluster.set(crate::model::Service { created, ..service });
            cluster.set(slice(name, &[&format!("10.0.{i}.1")]));
        }
        lb.apply(cluster.batch());
        lb.settle().unwrap();
        let is_served = |i: usize| served(lb.maps(), &format!("10.96.0.{i}"), 80).is_some();
        assert_eq!([0, 1, 2, 3].map(is_served), [false, false, true, true], "{map:?}");
        assert!(lb.problems().iter().all(|problem| problem.kind == ProblemKind::Map));
        // The next one follows as soon as there is room.
        cluster.remove_service("c");
        lb.apply(cluster.batch());
        lb.settle().unwrap();
        let is_served = |i: usize| served(lb.maps(), &format!("10.96.0.{i}"), 80).is_some();
        assert_eq!([0, 1, 2, 3].map(is_served), [true, false, false, true], "{map:?}");
    }
}

#[test]
fn problems_of_frontends_and_marks_name_service_port_address_and_protocol() {
    let mut lb = start(FakeMaps::new(ROOM.with(SizedMap::Frontends, 2)));
    let mut cluster = web();
    cluster.set(service("new", "10.96.0.3"));
    cluster.set(service("new6", "fd00::3"));
    lb.apply(cluster.batch());
    lb.settle().unwrap();
    let places: Vec<_> = lb.problems().into_iter().map(|problem| problem.place).collect();
    for place in [
        "Service default/new TCP IPv4, frontend 10.96.0.3:80/TCP",
        "Service default/new TCP IPv4, address mark of 10.96.0.3",
        "Service default/new6 TCP IPv6, frontend [fd00::3]:80/TCP",
        "Service default/new6 TCP IPv6, address mark of fd00::3",
    ] {
        assert!(places.iter().any(|is| is == place), "{place}: {places:?}");
    }
}

#[test]
fn a_full_frontends_map_has_room_for_what_the_same_batch_deletes() {
    let capacities = ROOM.with(SizedMap::Frontends, 4);
    let (mut lb, mut cluster) = (start(FakeMaps::new(capacities)), web());
    apply(&mut lb, &mut cluster);
    cluster.set(service("web", "10.96.0.7"));
    lb.apply(cluster.batch());
    assert_clean(&lb);
    assert_eq!(lb.problems(), []);
    assert_served(&lb, "10.96.0.7", 80, &WEB);
}

#[test]
fn free_slot_ranges_join() {
    let capacities = ROOM.with(SizedMap::BackendSlots, 16);
    let (mut lb, mut cluster) = (start(FakeMaps::new(capacities)), Cluster::default());
    for i in 0..8 {
        cluster.set(service(&format!("s{i}"), &format!("10.96.0.{i}")));
        cluster.set(slice(
            &format!("s{i}"),
            &[&format!("10.0.{i}.1"), &format!("10.0.{i}.2")],
        ));
    }
    apply(&mut lb, &mut cluster);
    // Every other range of two is free: no room for four.
    for i in [0, 2, 4, 6] {
        cluster.remove_service(&format!("s{i}"));
    }
    cluster.set(service("big", "10.96.1.1"));
    cluster.set(slice("big", &["10.1.0.1", "10.1.0.2", "10.1.0.3"]));
    lb.apply(cluster.batch());
    lb.settle().unwrap();
    assert!(
        lb.problems()[0].message.contains("BACKEND_SLOTS is full"),
        "{:?}",
        lb.problems()
    );
    cluster.remove_service("s1");
    apply(&mut lb, &mut cluster);
    assert_eq!(lb.problems(), []);
    assert_eq!(served(lb.maps(), "10.96.1.1", 80).map(|s| s.len()), Some(3));
}

#[test]
fn endpoints_that_drain_keep_their_backend() {
    let (mut lb, mut cluster) = serving();
    let before = identities(&lb);
    cluster.set(slice("web", &["10.0.0.1 terminating", "10.0.0.2"]));
    apply(&mut lb, &mut cluster);
    assert_served(&lb, "10.96.0.1", 80, &["10.0.0.2:8080"]);
    assert_eq!(identities(&lb), before);
    // All endpoints terminate: then they serve.
    cluster.set(slice("web", &["10.0.0.1 terminating", "10.0.0.2 terminating"]));
    apply(&mut lb, &mut cluster);
    assert_served(&lb, "10.96.0.1", 80, &WEB);
    cluster.set(slice("web", &["10.0.0.1 gone", "10.0.0.2 terminating"]));
    apply(&mut lb, &mut cluster);
    assert_served(&lb, "10.96.0.1", 80, &["10.0.0.2:8080"]);
    assert_eq!(identities(&lb).len(), before.len() - 1);
}

#[test]
fn a_local_policy_without_an_endpoint_here_drops_and_without_any_rejects() {
    let (mut lb, mut cluster) = serving();
    let flags = |lb: &Reconciler<FakeMaps>| {
        let index = lb.maps().contents.frontends[&key("10.96.0.1", 80)].service;
        let service = lb.maps().contents.services[index.to_usize()];
        service.set_words().map(|word| (word.len, word.flags))
    };
    cluster.set(service("web", "10.96.0.1").local());
    apply(&mut lb, &mut cluster);
    assert_eq!(flags(&lb), [(0, 1), (0, 1), (2, 0)]);
    cluster.set(slice("web", &["10.0.0.1 @n1", "10.0.0.2 @n2"]));
    apply(&mut lb, &mut cluster);
    assert_eq!(flags(&lb), [(1, 0), (1, 0), (2, 0)]);
    cluster.set(slice("web", &[]));
    apply(&mut lb, &mut cluster);
    assert_eq!(flags(&lb), [(0, 0), (0, 0), (0, 0)]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn any_run_ends_as_desired(acts in prop::collection::vec(any_act(), 1..60)) {
        run(ROOM, acts);
    }

    #[test]
    fn any_run_in_tight_maps_ends_as_desired_or_names_what_is_full(
        acts in prop::collection::vec(any_act(), 1..60),
        (services, frontends, backends, backend_slots) in (3..7_u32, 4..10_u32, 5..20_u32, 8..24_u32),
    ) {
        let room = ROOM
            .with(SizedMap::Services, services)
            .with(SizedMap::Frontends, frontends)
            .with(SizedMap::Backends, backends)
            .with(SizedMap::BackendSlots, backend_slots);
        run(room, acts);
    }
}

#[test]
fn one_endpoint_of_a_hundred_thousand_costs_what_changed() {
    let room = ROOM
        .with(SizedMap::Services, 10_002)
        .with(SizedMap::Frontends, 20_000)
        .with(SizedMap::Backends, 100_100)
        .with(SizedMap::BackendSlots, 200_000);
    let endpoints = |i: u32, tenth: &str| -> EndpointSlice {
        let address = |j: u32| std::net::Ipv4Addr::from(0x0a00_0000 + i * 10 + j).to_string();
        let mut texts: Vec<_> = (0..9).map(address).collect();
        texts.push(tenth.replace("SAME", &address(9)));
        slice(&format!("s{i}"), &texts.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let mut cluster = Cluster::default();
    for i in 0..10_000 {
        let ip = std::net::Ipv4Addr::from(0x0a60_0000 + i).to_string();
        // Two thirds of the Services have sets that differ.
        cluster.set(if i % 3 == 0 {
            service(&format!("s{i}"), &ip)
        } else {
            service(&format!("s{i}"), &ip).local()
        });
        cluster.set(endpoints(i, "SAME"));
    }
    let mut lb = start(FakeMaps::new(room).unchecked());
    apply(&mut lb, &mut cluster);
    assert_eq!(lb.usage().0.backends, 100_000);
    for i in [3000, 3001] {
        for (change, length) in [
            ("SAME terminating", 9),
            ("SAME unready", 0), // It was in no set.
            ("SAME", 10),
            ("SAME unready", 9),
            ("SAME", 10),
            ("10.200.0.1", 10),
            ("10.200.0.2", 10),
            ("SAME", 10),
        ] {
            let batch = Batch::of(vec![crate::model::Change::Set(endpoints(i, change).into())]);
            let before = lb.maps().written();
            lb.apply(batch.clone());
            lb.settle().unwrap();
            let written = lb.maps().written() - before;
            assert!(written > 0 && written <= 32 * length + 256, "{change}: {written} bytes");
            lb.apply(batch);
            assert_eq!(lb.maps().written() - before, written);
        }
    }
    assert_clean(&lb);
    let before = lb.maps().written();
    lb.apply(cluster.undelivered().batch());
    assert_eq!(lb.maps().written(), before, "unchanged objects");
    let mut next = restart(&lb);
    next.apply(cluster.undelivered().batch());
    assert_eq!(next.maps().written(), before, "unchanged objects after a restart");
}

#[test]
fn a_failed_write_is_repeated_without_a_change() {
    let (mut lb, mut cluster) = (start(FaultyMaps::new(maps(), 0, Fault::None)), web());
    lb.apply(cluster.batch());
    cluster.set(slice("web", &["10.0.0.1"]));
    lb.maps_mut().arm(0, Fault::Fail);
    lb.apply(cluster.batch());
    assert!(
        lb.problems()[0].message.contains("fails on purpose"),
        "{:?}",
        lb.problems()
    );
    lb.reclaim();
    assert_eq!(lb.problems(), []);
    assert_clean(&lb);
}

/// The frontend was inserted from outside, so its insertion fails until it is removed there.
#[test]
fn a_failed_insertion_requests_no_grace_period_and_its_filter_bit_is_cleared_in_the_end() {
    let foreign = key("10.96.7.1", 80);
    let failing = || {
        let (mut lb, mut cluster) = (start(maps().corrupted()), web());
        apply(&mut lb, &mut cluster);
        let value = lb.maps().contents.frontends[&key("10.96.0.1", 80)];
        lb.maps_mut().contents.frontends.insert(foreign, value);
        cluster.set(service("new", "10.96.7.1").ports([port("", 80)]));
        // The mark of the address would use the bit too.
        lb.maps_mut()
            .contents
            .frontends
            .insert(FrontendKey::address_mark(foreign.addr), value);
        lb.apply(cluster.batch());
        let requested = lb.maps().grace_requested();
        for _ in 0..3 {
            lb.maps_mut().pass_grace();
            lb.reclaim();
            assert_eq!((lb.problems().len(), lb.maps().grace_requested()), (2, requested));
        }
        let present = &mut lb.maps_mut().contents.frontends;
        present.retain(|key, _| key.addr != foreign.addr);
        (lb, cluster)
    };
    let (mut lb, _) = failing();
    lb.reclaim();
    assert_clean(&lb);
    assert_eq!(
        (lb.problems(), served(lb.maps(), "10.96.7.1", 80)),
        (vec![], Some(vec![]))
    );

    let (mut lb, mut cluster) = failing();
    cluster.remove_service("new");
    apply(&mut lb, &mut cluster);
    assert_eq!(lb.problems(), []);
    assert!(!lb.maps().contents.filter.contains(&foreign.addr.into()));
}

/// The first write of the service port that the frontend passes to fails.
#[test]
fn a_frontend_that_passes_to_a_new_service_port_never_misses() {
    let failed_at = |at: u64| {
        let (mut lb, mut cluster) = (start(FaultyMaps::new(maps(), 0, Fault::None)), Cluster::default());
        cluster.set(service("web", "10.96.0.1").ports([port("a", 80)]));
        cluster.set(named_slice("web-0", "web", &[("a", 8080), ("b", 8081)], &["10.0.0.1"]));
        apply(&mut lb, &mut cluster);
        let before = lb.maps().inner.contents.frontends.clone();
        cluster.set(service("web", "10.96.0.1").ports([port("b", 80)]));
        let operations = lb.maps().operations();
        lb.maps_mut().arm(at, Fault::Fail);
        lb.apply(cluster.batch());
        let keys = |frontends: &BTreeMap<_, Frontend>| frontends.keys().copied().collect::<Vec<_>>();
        let after = &lb.maps().inner.contents.frontends;
        assert_eq!(keys(after), keys(&before), "failed at {at}");
        let failed = lb.maps().operations() - operations > at;
        lb.maps_mut().arm(0, Fault::None);
        lb.reclaim();
        lb.settle().unwrap();
        assert_clean(&lb);
        assert_eq!(
            served(&lb.maps().inner, "10.96.0.1", 80),
            Some(vec!["10.0.0.1:8081".to_owned()])
        );
        assert_eq!(lb.problems(), []);
        failed
    };
    let tried = (0..).take_while(|at| failed_at(*at)).count();
    assert!(tried >= 5, "{tried} operations");
}

/// A set was written from outside, and its correction fails. Frontends stay, and the slots that the set leads to are
/// not used for another set.
#[test]
fn a_corrupted_service_keeps_its_frontends_if_its_correction_fails() {
    let (lb, cluster) = serving();
    let index = lb.maps().contents.frontends[&key("10.96.0.1", 80)].service.to_usize();
    let corruptions: [fn(&mut Service); 4] = [
        |service| service.internal.base += 1,
        |service| service.cluster.len = 60,
        |service| service.generation += 1,
        |service| (service.internal.base, service.external.base) = (40, 41),
    ];
    for corrupt in corruptions {
        let mut left = lb.maps().clone().corrupted();
        corrupt(&mut left.contents.services[index]);
        for at in 0..12 {
            let mut next = start(FaultyMaps::new(left.clone(), u64::MAX, Fault::None));
            next.maps_mut().arm(at, Fault::Fail);
            next.apply(cluster.undelivered().batch());
            let frontends = &next.maps().inner.contents.frontends;
            assert_eq!(*frontends, left.contents.frontends);
            next.settle().ok();
            next.reclaim();
            next.settle().unwrap();
            assert_clean(&next);
            assert_eq!((next.problems(), next.usage()), (vec![], lb.usage()));
        }
    }
}

#[test]
fn orphans_stay_until_every_set_is_known() {
    let (lb, cluster) = serving();
    let mut left = lb.maps().clone().corrupted();
    let index = left.contents.frontends[&key("10.96.0.1", 80)].service.to_usize();
    // Its backend has no owner now, so the content of its set is unknown, and the first correction fails.
    let id = left.contents.slots[left.contents.services[index].internal.base as usize].backend;
    left.contents.backends[id.id as usize].service = ServiceIndex::new(14);
    let mut next = start(FaultyMaps::new(left, u64::MAX, Fault::None));
    next.maps_mut().arm(0, Fault::Fail);
    next.apply(cluster.undelivered().batch());
    let is_live = |lb: &Reconciler<FaultyMaps<FakeMaps>>| {
        generation::is_live(lb.maps().inner.contents.backends[id.id as usize].generation)
    };
    assert!(is_live(&next), "a set leads to it");
    next.reclaim();
    assert!(!is_live(&next));
    next.settle().unwrap();
    assert_clean(&next);
}

#[test]
fn a_node_that_changes_its_zone_follows_other_hints() {
    let node = |zone: Option<&str>| {
        Object::Node(Arc::new(Node {
            name: NODE.into(),
            addresses: Vec::new(),
            pod_cidrs: Vec::new(),
            zone: zone.map(Into::into),
            leaving: false,
        }))
    };
    let hinted = ["10.0.0.1 @n2 zone:a", "10.0.0.2 @n3 zone:b"];
    let mut cluster = Cluster::of([
        service("web", "10.96.0.1").into(),
        slice("web", &hinted).into(),
        service("other", "10.96.0.2").into(),
        slice("other", &["10.0.0.3", "10.0.0.4"]).into(),
        node(Some("a")),
    ]);
    let mut lb = start(maps());
    apply(&mut lb, &mut cluster);
    let web = |lb: &Reconciler<FakeMaps>| served(lb.maps(), "10.96.0.1", 80).unwrap();
    assert_eq!(web(&lb), ["10.0.0.1:8080"]);
    cluster.set(node(Some("b")));
    apply(&mut lb, &mut cluster);
    assert_eq!(web(&lb), ["10.0.0.2:8080"]);
    for zone in [Some("c"), None] {
        cluster.set(node(zone));
        apply(&mut lb, &mut cluster);
        assert_eq!(web(&lb), ["10.0.0.1:8080", "10.0.0.2:8080"]);
    }
    cluster.set(node(Some("a")));
    apply(&mut lb, &mut cluster);
    assert_eq!(web(&lb), ["10.0.0.1:8080"]);
    let before = lb.maps().written();
    let mut same = cluster.batch();
    same.changes.push(crate::model::Change::Set(node(Some("a"))));
    lb.apply(same);
    assert_eq!(lb.maps().written(), before, "the same zone once more");
    cluster.remove(node(None));
    apply(&mut lb, &mut cluster);
    assert_eq!(web(&lb).len(), 2, "no Node, no zone");
}

#[test]
fn health_checks_count_ready_endpoints_of_this_node() {
    let mut balanced = service("web", "10.96.0.1");
    balanced.health_check_node_port = Some(32000);
    let mut cluster = Cluster::of([balanced.clone().into()]);
    let mut lb = start(maps());
    let check = |lb: &Reconciler<FakeMaps>| {
        let checks: Vec<_> = lb
            .health_checks()
            .iter()
            .map(|(key, check)| (key.to_string(), *check))
            .collect();
        checks
    };
    let expected = |local_endpoints| {
        let check = HealthCheck {
            port: 32000,
            local_endpoints,
        };
        vec![("default/web".to_owned(), check)]
    };
    apply(&mut lb, &mut cluster);
    assert_eq!(check(&lb), expected(0));
    let endpoints = [
        "10.0.0.1 @n1",
        "10.0.0.2 @n1 terminating",
        "10.0.0.3 @n1 unready",
        "10.0.0.4 @n2",
    ];
    cluster.set(slice("web", &endpoints));
    // An endpoint of the same pod for another port.
    cluster.set(named_slice(
        "web-1",
        "web",
        &[("", 8081)],
        &["10.0.0.1 @n1", "10.0.0.5 @n1"],
    ));
    apply(&mut lb, &mut cluster);
    assert_eq!(check(&lb), expected(2));
    assert!(lb.new_health_checks().is_some());
    cluster.set(slice("other", &["10.0.0.9 @n1"]));
    apply(&mut lb, &mut cluster);
    assert!(lb.new_health_checks().is_none(), "of another Service");
    cluster.set(service("web", "10.96.0.1"));
    apply(&mut lb, &mut cluster);
    assert!(check(&lb).is_empty(), "no longer a load balancer of policy Local");
    cluster.set(balanced.clone());
    apply(&mut lb, &mut cluster);
    balanced.other_proxy = true;
    cluster.set(balanced);
    apply(&mut lb, &mut cluster);
    assert!(check(&lb).is_empty(), "another proxy answers");
}
