//! Adoption of dumps of the maps, correct and corrupted ones.

use super::*;
use crate::maps::Maps as _;
use crate::names::{pad, text};
use crate::testing::*;

/// Adopts maps that serve `web` (index 2, since it comes after `db`) and `db`, after a change of their content.
fn adopted(change: impl FnOnce(&mut Dump)) -> (Actual, Orphans) {
    let mut lb = start(maps());
    let objects = [
        service("db", "10.96.0.2").into(),
        slice("db", &["10.0.1.1"]).into(),
        service("web", "10.96.0.1").local().into(),
        slice("web", &["10.0.0.1 @n1", "10.0.0.2", "10.0.0.3 terminating"]).into(),
    ];
    apply(&mut lb, &mut Cluster::of(objects));
    let mut dump = lb.maps().dump().unwrap();
    change(&mut dump);
    Actual::adopt(&dump, ROOM)
}

fn web(actual: &Actual) -> &ActualPort {
    &actual.ports[&id("web", "")]
}

#[test]
fn consistent_maps_are_adopted_unchanged() {
    let (actual, orphans) = adopted(|_| ());
    assert_eq!(orphans, Orphans::default());
    assert_eq!(actual.ports.len(), 2);
    let web = web(&actual);
    assert_eq!((web.index.get(), web.backends.iter().count()), (2, 3));
    let lengths = [0, 1, 2].map(|i| web.sets[i].as_ref().map(Members::len));
    assert_eq!(lengths, [Some(1), Some(1), Some(2)]);
    assert_eq!(
        web.set_ranges()[0],
        web.set_ranges()[1],
        "sets with the same members share their slots"
    );
    assert_eq!(
        (actual.indexes.used(), actual.ids.used(), actual.slots.used()),
        (2, 4, 4)
    );
    let references = [0, 1, 2, 3].map(|index| actual.references.keys(ServiceIndex::new(index)).count());
    assert_eq!(references, [0, 1, 1, 0]);
}

#[test]
fn records_are_small() {
    // Of each, a large cluster has tens or hundreds of thousands.
    assert_eq!((size_of::<ActualPort>(), size_of::<ActualBackend>()), (144, 8));
}

#[test]
fn a_change_of_the_set_in_a_frontend_leaves_its_references_and_its_filter_bit() {
    let (mut actual, _) = adopted(|_| ());
    let (index, key) = (ServiceIndex::new(2), key("10.96.0.1", 80));
    let value = actual.frontends.entries()[&key];
    let keys = |actual: &Actual| actual.references.keys(index).collect::<Vec<_>>();
    for set in [SetWord::NONE, value.set] {
        actual.set_frontend(key, Some(Frontend { set, ..value }));
        assert_eq!(keys(&actual), [key]);
    }
    let other = Frontend {
        service: ServiceIndex::new(1),
        ..value
    };
    actual.set_frontend(key, Some(other));
    assert_eq!(
        (keys(&actual).len(), actual.references.keys(other.service).count()),
        (0, 2)
    );
    let addresses: Vec<_> = actual.frontends.entries().keys().copied().collect();
    for key in addresses {
        assert!(!actual.filter.is_unused(key.addr.into()));
        actual.set_frontend(key, None);
    }
    assert!(!actual.references.lead_to(index) && !actual.references.lead_to(other.service));
    assert!(actual.filter.is_unused(key.addr.into()));
}

#[test]
fn entries_without_an_owner_are_orphans() {
    // Without a name, the index, its backends and its slots are removed as those of a deleted Service.
    let (actual, orphans) = adopted(|dump| {
        dump.names.remove(&ServiceIndex::new(2));
    });
    assert_eq!(orphans, Orphans::default());
    assert_eq!(
        (actual.indexes.used(), actual.ids.used(), actual.slots.used()),
        (2, 4, 4)
    );
    assert!(!actual.ports.contains_key(&id("web", "")));
    let (stray, port) = actual
        .ports
        .iter()
        .find(|(id, _)| id.service.namespace.is_empty())
        .unwrap();
    assert_eq!(
        (&*stray.service.name, port.index.get(), port.backends.iter().count()),
        ("(stray index 2)", 2, 3)
    );

    // A backend of an index without an owner.
    let (actual, orphans) = adopted(|dump| {
        let backend = dump.backends[1];
        let service = ServiceIndex::new(9);
        let seal = generation::seal(backend.addr, backend.port, service, 1);
        dump.backends[40] = Backend {
            service,
            seal,
            generation: 1,
            ..backend
        };
    });
    assert_eq!(orphans.backends, [40].into());
    assert_eq!(actual.ids.used(), 5, "never given out again before it is withdrawn");

    // A name beyond the end.
    let beyond = ServiceIndex::new(ROOM[SizedMap::Services]);
    let (_, orphans) = adopted(|dump| {
        let name = dump.names[&ServiceIndex::new(1)];
        dump.names.insert(beyond, name);
    });
    assert_eq!(orphans.names, [beyond].into());
}

#[test]
fn a_wrong_set_is_unknown_and_its_slots_are_not_reused() {
    let cases: [fn(&mut Dump); 5] = [
        |dump| dump.slots[dump.services[2].cluster.base as usize].service = ServiceIndex::new(1),
        |dump| {
            dump.slots[dump.services[2].cluster.base as usize + 1]
                .backend
                .generation = 3;
        },
        |dump| dump.services[2].cluster.base += 1,
        |dump| dump.services[2].cluster.base = u32::MAX,
        |dump| dump.services[2].cluster.len = u16::MAX,
    ];
    for (number, change) in cases.into_iter().enumerate() {
        let mut word = SetWord::default();
        let (mut actual, orphans) = adopted(|dump| {
            change(dump);
            word = dump.services[2].cluster;
        });
        let web = web(&actual);
        assert_eq!((web.set_ranges()[2], web.sets[2].is_none()), (None, true), "{number}");
        assert!(web.sets[0].is_some(), "{number}");
        let led_to = word.base..word.base.saturating_add(word.len.into());
        while let Some(range) = actual.slots.alloc(1) {
            assert!(!led_to.contains(&range.base), "{number}: slot {}", range.base);
        }
        assert!(orphans.slots.iter().all(|slot| led_to.contains(&slot.base)), "{number}");
    }
}

#[test]
fn of_two_with_one_name_the_one_that_frontends_lead_to_stays() {
    let (lower, higher) = (ServiceIndex::new(1), ServiceIndex::new(2));
    let (actual, _) = adopted(|dump| {
        let name = dump.names[&higher];
        dump.names.insert(lower, name);
    });
    assert_eq!(web(&actual).index, lower, "both are led to: the lower");
    let (actual, _) = adopted(|dump| {
        let name = dump.names[&higher];
        dump.names.insert(lower, name);
        dump.frontends.retain(|_, value| value.service != lower);
    });
    assert_eq!(web(&actual).index, higher);
}

#[test]
fn an_index_that_was_cleared_but_still_has_its_name_gets_a_new_generation() {
    let (actual, _) = adopted(|dump| {
        dump.services[2] = Service {
            generation: 2,
            ..Service::default()
        };
    });
    assert!(!web(&actual).is_written());
    assert_eq!(actual.service_generations[2], 2);
}

#[test]
fn a_field_is_padded_and_cut_at_a_character() {
    assert_eq!(pad::<4>("ab"), *b"ab\0\0");
    assert_eq!(pad::<4>("abcdef"), *b"abcd");
    assert_eq!(pad::<4>("ab\u{20ac}"), *b"ab\0\0");
    assert_eq!(
        (text(b"ab\0\0"), text(b"abcd"), text(b"\xff")),
        (Some("ab"), Some("abcd"), None)
    );
}

#[test]
fn a_name_gives_the_identity_back() {
    for (ipv6, protocol) in [(false, Protocol::Tcp), (true, Protocol::Udp), (false, Protocol::Sctp)] {
        let id = PortId {
            ipv6,
            protocol,
            ..id("web", "http")
        };
        assert_eq!(port_id(&name_of(&id, 80, 1)), Some(id));
    }
    let good = name_of(&id("web", ""), 80, 1);
    assert_eq!(port_id(&Name { proto: 1, ..good }), None);
    assert_eq!(port_id(&Name { family: 5, ..good }), None);
    assert_eq!(port_id(&Name { name: [0; 64], ..good }), None);
    assert_eq!(
        port_id(&Name {
            namespace: [0xff; 64],
            ..good
        }),
        None
    );
    assert_eq!(
        port_id(&name_of(&orphan_id(ServiceIndex::new(7)), 0, 1)),
        None,
        "no entry can claim to be a stray"
    );
}
