//! The writer against maps in memory: what the maps say in the end, and what may never be on the way.

use std::collections::BTreeMap;

use super::*;
use crate::maps::fake::FakeMaps;
use crate::maps::faulty::{Fault, FaultyMaps};
use crate::model::EndpointSlice;
use crate::testing::*;

/// A state of the cluster after another; each but the first is a change.
type Story = Vec<Cluster>;

/// The stories that every fault is tried on.
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
    ]
}

/// Plays a story; after every state `between` may do something.
fn play<M: Maps>(lb: &mut Reconciler<M>, story: &[Cluster], mut between: impl FnMut(&mut Reconciler<M>)) {
    let mut told = Cluster::default();
    for state in story {
        told.become_like(state);
        lb.apply(told.batch());
        between(lb);
    }
}

#[test]
fn every_story_ends_well() {
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

/// How many operations a story has.
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
fn after_death_at_any_operation_the_next_agent_puts_all_right() {
    for (name, story) in stories() {
        for (settle, fault) in [true, false]
            .into_iter()
            .flat_map(|s| [(s, Fault::Die), (s, Fault::Tear)])
        {
            for at in 0..operations(&story, settle) {
                let mut lb = start(FaultyMaps::new(maps(), at, fault));
                // The objects as they are when the next agent starts: as they were at the time of death, or newer.
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
                    apply(&mut next, &mut now.again());
                    let before = next.maps().written();
                    next.apply(now.again().batch());
                    assert_eq!(next.maps().written(), before, "{name}, died at {at}");
                }
            }
        }
    }
}

#[test]
fn after_a_failure_of_any_operation_the_next_try_puts_all_right() {
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
