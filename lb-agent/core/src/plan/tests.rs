//! The steps for typical changes, as text.

use super::*;
use crate::desired;
use crate::maps::{Capacities, Maps as _};
use crate::model::{EndpointSlice, Service as Object};
use crate::testing::*;
use lb_common::abi::SizedMap;

/// Formats a step, short enough for a table.
fn show(step: &Step) -> String {
    let word = |w: SetWord| match (w.len, w.flags & set_flags::EMPTY_DROPS) {
        (0, 0) => "none".to_owned(),
        (0, _) => "none, drop".to_owned(),
        (len, _) => format!("{}..{}", w.base, w.base + u32::from(len)),
    };
    match step {
        Step::Name(name) => format!("name port {} generation {}", name.port, name.generation),
        Step::Fill(b, new) => format!("fill {} {}:{} flags {}", new.id, b.addr, b.port, b.flags),
        Step::Flags((addr, port), flags) => format!("flags {addr}:{port} {flags}"),
        Step::Slots(range, slots) => {
            let ids: Vec<_> = slots.iter().map(|slot| slot.backend.id.to_string()).collect();
            format!("slots {} = {}", range.base, ids.join(" "))
        }
        Step::AddSourceRange(net) => format!("admit {net}"),
        Step::RemoveSourceRanges(networks) => {
            let networks: Vec<_> = networks.iter().map(ToString::to_string).collect();
            format!("dismiss {}", networks.join(" "))
        }
        Step::Service(s, _) => format!(
            "service {} | {} | {} affinity {} generation {}",
            word(s.internal),
            word(s.external),
            word(s.cluster),
            s.affinity_timeout,
            s.generation
        ),
        Step::Settings(s) => format!("settings affinity {} generation {}", s.affinity_timeout, s.generation),
        Step::Publish(set, w, ..) => format!("publish {set:?} {}", word(*w)),
        Step::Frontends => "frontends".to_owned(),
        Step::Hide => "hide".to_owned(),
        Step::Withdraw((addr, port)) => format!("withdraw {addr}:{port}"),
    }
}

/// Returns the steps from one state of `default/web` to another.
fn steps(before: Option<(Object, EndpointSlice)>, now: (Object, EndpointSlice)) -> Vec<String> {
    let mut lb = start(maps());
    if let Some((service, slice)) = before {
        apply(&mut lb, &mut Cluster::of([service.into(), slice.into()]));
    }
    let (mut actual, orphans) = Actual::adopt(&lb.maps().dump().unwrap(), ROOM);
    assert_eq!(orphans, crate::actual::Orphans::default());
    let (service, slice) = now;
    let ports = desired::ports(&service, &[&slice].into_iter(), LOCAL_NODE);
    let (id, want) = ports.first().unwrap();
    let plan = service_port(id, want, &mut actual).unwrap();
    plan.steps.iter().map(show).collect()
}

fn web() -> Object {
    service("web", "10.96.0.1")
}

fn on(endpoints: &[&str]) -> EndpointSlice {
    slice("web", endpoints)
}

/// A service with two backends.
fn two() -> Option<(Object, EndpointSlice)> {
    Some((web(), on(&["10.0.0.1", "10.0.0.2"])))
}

#[test]
fn from_nothing() {
    let new = steps(None, (web().affinity(9), on(&["10.0.0.1", "10.0.0.2 @n1"])));
    assert_eq!(
        new,
        [
            "name port 80 generation 1",
            "fill 1 10.0.0.1:8080 flags 7",
            "fill 2 10.0.0.2:8080 flags 15",
            "slots 0 = 1 2",
            "service 0..2 | 0..2 | 0..2 affinity 9 generation 1",
        ]
    );
    assert_eq!(
        steps(None, (web(), on(&[]))),
        [
            "name port 80 generation 1",
            "service none | none | none affinity 0 generation 1"
        ]
    );
    assert_eq!(
        steps(None, (web().local(), on(&["10.0.0.1 @n1", "10.0.0.2"]))),
        [
            "name port 80 generation 1",
            "fill 1 10.0.0.1:8080 flags 15",
            "fill 2 10.0.0.2:8080 flags 4",
            "slots 0 = 1",
            "slots 1 = 1 2",
            "service 0..1 | 0..1 | 1..3 affinity 0 generation 1",
        ]
    );
}

#[test]
fn a_change_has_only_the_steps_that_it_needs() {
    let table: [(&str, (Object, EndpointSlice), &[&str]); 10] = [
        ("nothing", (web(), on(&["10.0.0.2", "10.0.0.1"])), &[]),
        (
            "one more",
            (web(), on(&["10.0.0.1", "10.0.0.2", "10.0.0.3"])),
            &[
                "fill 3 10.0.0.3:8080 flags 7",
                "slots 2 = 1 2 3",
                "publish Internal 2..5",
                "publish External 2..5",
                "publish Cluster 2..5",
                "frontends",
            ],
        ),
        (
            "one replaced",
            (web(), on(&["10.0.0.1", "10.0.0.3"])),
            &[
                "fill 3 10.0.0.3:8080 flags 7",
                "slots 2 = 1 3",
                "publish Internal 2..4",
                "publish External 2..4",
                "publish Cluster 2..4",
                "frontends",
                "withdraw 10.0.0.2:8080",
            ],
        ),
        (
            "one drains",
            (web(), on(&["10.0.0.1", "10.0.0.2 terminating"])),
            &[
                "flags 10.0.0.2:8080 0",
                "slots 2 = 1",
                "publish Internal 2..3",
                "publish External 2..3",
                "publish Cluster 2..3",
                "frontends",
            ],
        ),
        (
            "none is left",
            (web(), on(&[])),
            &[
                "publish Internal none",
                "publish External none",
                "publish Cluster none",
                "frontends",
                "withdraw 10.0.0.1:8080",
                "withdraw 10.0.0.2:8080",
            ],
        ),
        (
            "affinity",
            (web().affinity(5), on(&["10.0.0.1", "10.0.0.2"])),
            &["hide", "settings affinity 5 generation 1", "frontends"],
        ),
        (
            "another port number",
            (web().ports([port("", 81)]), on(&["10.0.0.1", "10.0.0.2"])),
            &["name port 81 generation 1"],
        ),
        (
            "policy Local, none here",
            (web().local(), on(&["10.0.0.1", "10.0.0.2"])),
            &[
                "flags 10.0.0.1:8080 4",
                "flags 10.0.0.2:8080 4",
                "publish Internal none, drop",
                "publish External none, drop",
                "frontends",
            ],
        ),
        (
            "one turns out to be here",
            (web(), on(&["10.0.0.1 @n1", "10.0.0.2"])),
            &[
                "flags 10.0.0.1:8080 15",
                "slots 2 = 1 2",
                "publish Internal 2..4",
                "publish External 2..4",
                "publish Cluster 2..4",
                "frontends",
            ],
        ),
        (
            "another target port",
            (web(), named_slice("web-0", "web", &[("", 9090)], &["10.0.0.1"])),
            &[
                "fill 3 10.0.0.1:9090 flags 7",
                "slots 2 = 3",
                "publish Internal 2..3",
                "publish External 2..3",
                "publish Cluster 2..3",
                "frontends",
                "withdraw 10.0.0.1:8080",
                "withdraw 10.0.0.2:8080",
            ],
        ),
    ];
    for (what, now, want) in table {
        assert_eq!(steps(two(), now), want, "{what}");
    }
}

#[test]
fn a_plan_without_room_allocates_nothing() {
    let full = |map, entries| {
        let capacities = ROOM.with(map, entries);
        let (mut actual, _) = Actual::adopt(&maps_of(capacities), capacities);
        let ports = desired::ports(
            &web(),
            &[&on(&["10.0.0.1", "10.0.0.2", "10.0.0.3"])].into_iter(),
            LOCAL_NODE,
        );
        let error = service_port(&ports[0].0, &ports[0].1, &mut actual)
            .unwrap_err()
            .to_string();
        assert_eq!(
            (actual.indexes.used(), actual.ids.used(), actual.slots.used()),
            (0, 0, 0)
        );
        error
    };
    assert!(full(SizedMap::Services, 1).contains("SERVICES is full (1 entries): raise --max-services"));
    assert!(full(SizedMap::Backends, 3).contains("BACKENDS is full (3 entries): raise --max-backends"));
    assert!(full(SizedMap::BackendSlots, 2).contains("BACKEND_SLOTS is full (2 entries): raise --max-backend-slots"));
}

fn maps_of(capacities: Capacities) -> crate::maps::Dump {
    crate::maps::fake::FakeMaps::new(capacities).contents
}

#[test]
fn a_set_is_as_long_as_a_set_word_can_say() {
    let members = |n: u32| -> Members {
        let member = |i: u32| Member {
            addr: IpAddr::from((0x0a00_0000 + i).to_be_bytes()),
            port: 1,
            local: false,
        };
        (0..n).map(member).collect()
    };
    let room = ROOM
        .with(SizedMap::Backends, 70_001)
        .with(SizedMap::BackendSlots, 1 << 17);
    let (id, mut want) = desired::ports(&web(), &[&on(&[])].into_iter(), LOCAL_NODE).remove(0);
    for (n, fits) in [(65_535, true), (65_536, false)] {
        let (mut actual, _) = Actual::adopt(&maps_of(room), room);
        want.sets = [0, 1, 2]
            .map(|_| desired::DesiredSet {
                members: members(n),
                empty_drops: false,
            })
            .into();
        let plan = service_port(&id, &want, &mut actual);
        assert_eq!(plan.is_ok(), fits, "{n}");
        if let Err(error) = plan {
            assert!(
                error.to_string().contains("65536 endpoints in one set, 65535 at most"),
                "{error}"
            );
        }
    }
}

#[test]
fn another_cluster_ip_is_a_matter_of_frontends_only() {
    assert!(steps(two(), (service("web", "10.96.0.2"), on(&["10.0.0.1", "10.0.0.2"]))).is_empty());
}

#[test]
fn source_ranges_are_written_before_the_flag_that_restricts() {
    let endpoints = ["10.0.0.1"];
    let open = || Some((balanced("web", "10.96.0.1", "192.0.2.1", &[]), on(&endpoints)));
    let closed = || {
        Some((
            balanced("web", "10.96.0.1", "192.0.2.1", &["10.0.0.0/8", "172.16.0.0/12"]),
            on(&endpoints),
        ))
    };
    let new = steps(None, closed().unwrap());
    assert_eq!(new[3..5], ["admit 10.0.0.0/8", "admit 172.16.0.0/12"]);
    assert!(new[5].starts_with("service "), "{new:?}");
    assert_eq!(
        steps(open(), closed().unwrap()),
        [
            "admit 10.0.0.0/8",
            "admit 172.16.0.0/12",
            "hide",
            "settings affinity 0 generation 1",
            "frontends"
        ]
    );
    assert_eq!(
        steps(
            closed(),
            (
                balanced("web", "10.96.0.1", "192.0.2.1", &["10.0.0.0/8", "192.0.2.0/24"]),
                on(&endpoints)
            )
        ),
        ["admit 192.0.2.0/24", "dismiss 172.16.0.0/12"]
    );
    assert_eq!(
        steps(closed(), open().unwrap()),
        [
            "settings affinity 0 generation 1",
            "dismiss 10.0.0.0/8 172.16.0.0/12",
            "frontends"
        ]
    );
    assert_eq!(steps(closed(), closed().unwrap()), [""; 0]);
}
