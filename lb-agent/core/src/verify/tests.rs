//! Corruption of one field at a time: `verify` names the field, and the next agent corrects it.

use lb_common::abi::Set;

use super::*;
use crate::maps::Maps as _;
use crate::maps::fake::FakeMaps;
use crate::reconcile::Reconciler;
use crate::testing::*;

/// Several Services: two that have the same backends, one with different sets, one without endpoints, one that drains,
/// one with source ranges; and two Nodes.
fn cluster() -> Cluster {
    Cluster::of([
        service("a", "10.96.0.1").into(),
        slice("a", &["10.0.0.1", "10.0.0.2"]).into(),
        service("b", "10.96.0.2").affinity(30).into(),
        slice("b", &["10.0.0.1", "10.0.0.2"]).into(),
        service("c", "10.96.0.3")
            .local()
            .ports([port("x", 80), port("y", 81)])
            .into(),
        named_slice(
            "c-0",
            "c",
            &[("x", 80), ("y", 81)],
            &["10.0.0.3 @n1", "10.0.0.4 @n2", "10.0.0.5"],
        )
        .into(),
        service("d", "10.96.0.4").local().into(),
        service("e", "10.96.0.1").ports([port("", 90)]).into(),
        slice("e", &["10.0.0.6", "10.0.0.7 terminating", "10.0.0.8 terminating @n1"]).into(),
        service("f", "10.96.0.6").into(),
        slice("f", &["10.0.0.9"]).into(),
        service("g", "10.96.0.7").into(),
        slice("g", &["10.0.0.9"]).into(),
        balanced(
            "h",
            "10.96.0.8",
            "192.0.2.8",
            &["10.0.0.0/8", "198.51.100.0/24", "203.0.113.7/32"],
        )
        .into(),
        slice("h", &["10.0.0.10"]).into(),
        node("n1", &["192.168.0.1"], &["10.10.1.0/24", "fd00:10:1::/64"]).into(),
        node("n2", &["192.168.0.2"], &["10.10.2.0/24"]).into(),
    ])
}

fn serving() -> Reconciler<FakeMaps> {
    let mut lb = start(maps());
    apply(&mut lb, &mut cluster());
    lb
}

/// The name of a field, and a change of it.
type Corruption = (String, Box<dyn Fn(&mut Dump)>);

/// Adds changes of one field, to each of `values` except its present one.
fn vary<T: PartialEq + Copy + 'static>(
    all: &mut Vec<Corruption>,
    dump: &Dump,
    field: &str,
    at: impl Fn(&mut Dump) -> &mut T + Clone + 'static,
    values: &[T],
) {
    let is = *at(&mut dump.clone());
    for value in values.iter().copied().filter(|value| *value != is) {
        let at = at.clone();
        all.push((field.to_owned(), Box::new(move |dump| *at(dump) = value)));
    }
}

const OTHER: Addr = Addr::from_v4([10, 9, 9, 9]);

fn frontend(dump: &mut Dump, key: FrontendKey) -> &mut Frontend {
    dump.frontends.get_mut(&key).unwrap()
}

fn name(dump: &mut Dump, index: ServiceIndex) -> &mut Name {
    dump.names.get_mut(&index).unwrap()
}

fn of_frontends(dump: &Dump) -> Vec<Corruption> {
    let mut all = Vec::new();
    for key in dump.frontends.keys().copied() {
        let place = match key.port {
            0 => format!("FRONTENDS[{} (address mark)]", key.addr),
            port => format!("FRONTENDS[{}:{port}, protocol 6]", key.addr),
        };
        let field = |name: &str| format!("{place}.{name}");
        let services = [0, 1, 2, 3, 4, 5, 6, 7, 8, 15, 16, u32::MAX].map(ServiceIndex::new);
        vary(
            &mut all,
            dump,
            &field("service"),
            move |d| &mut frontend(d, key).service,
            &services,
        );
        vary(
            &mut all,
            dump,
            &field("kind"),
            move |d| &mut frontend(d, key).kind,
            &[0, 1, 2, 3, 4, 5, 6, 255],
        );
        for byte in 0..3 {
            vary(
                &mut all,
                dump,
                &field("pad"),
                move |d| &mut frontend(d, key).pad[byte],
                &[1],
            );
        }
        let slots = [0, 1, 2, 3, 5, 60, u32::MAX];
        vary(
            &mut all,
            dump,
            &field("set.base"),
            move |d| &mut frontend(d, key).set.base,
            &slots,
        );
        let lens = [0, 1, 2, 3, 60, u16::MAX];
        vary(
            &mut all,
            dump,
            &field("set.len"),
            move |d| &mut frontend(d, key).set.len,
            &lens,
        );
        vary(
            &mut all,
            dump,
            &field("set.flags"),
            move |d| &mut frontend(d, key).set.flags,
            &[1, 2],
        );
        let mut moved = |change: fn(&mut FrontendKey)| {
            let mut new = key;
            change(&mut new);
            let set = move |d: &mut Dump| {
                let value = d.frontends.remove(&key).unwrap();
                d.frontends.insert(new, value);
            };
            all.push((place.clone(), Box::new(set)));
        };
        moved(|key| key.addr = OTHER);
        moved(|key| key.port += 1000);
        moved(|key| key.proto = 17);
        moved(|key| key.pad = 1);
        all.push((
            place.clone(),
            Box::new(move |d| d.frontends.retain(|other, _| *other != key)),
        ));
    }
    all
}

fn of_services(dump: &Dump) -> Vec<Corruption> {
    let mut all = Vec::new();
    let words: Vec<SetWord> = dump.services.iter().flat_map(Service::set_words).collect();
    let bases: BTreeSet<u32> = words
        .iter()
        .flat_map(|w| [w.base, w.base + 1])
        .chain([100, 127, 128, u32::MAX])
        .collect();
    for index in dump.names.keys().map(|index| index.to_usize()) {
        let field = |name: &str| format!("SERVICES[{index}].{name}");
        for (set, name) in [
            (Set::Internal, "internal"),
            (Set::External, "external"),
            (Set::Cluster, "cluster"),
        ] {
            let at = |part: &str| field(&format!("{name}.{part}"));
            // If another range has all slots of the set too, the changed word is valid.
            let is = dump.services[index].set_word(set);
            let slots = |base: u32| dump.slots.get(base as usize..)?.get(..usize::from(is.len));
            let bases: Vec<_> = bases
                .iter()
                .copied()
                .filter(|base| is.len == 0 || slots(*base) != slots(is.base))
                .collect();
            vary(
                &mut all,
                dump,
                &at("base"),
                move |d| &mut d.services[index].set_word_mut(set).base,
                &bases,
            );
            vary(
                &mut all,
                dump,
                &at("len"),
                move |d| &mut d.services[index].set_word_mut(set).len,
                &[0, 1, 2, 3, 4, 60, 128, u16::MAX],
            );
            vary(
                &mut all,
                dump,
                &at("flags"),
                move |d| &mut d.services[index].set_word_mut(set).flags,
                &[0, 1, 2],
            );
        }
        vary(
            &mut all,
            dump,
            &field("flags"),
            move |d| &mut d.services[index].flags,
            &[0, 1, 2],
        );
        vary(
            &mut all,
            dump,
            &field("affinity_timeout"),
            move |d| &mut d.services[index].affinity_timeout,
            &[0, 1, 30],
        );
        vary(
            &mut all,
            dump,
            &field("generation"),
            move |d| &mut d.services[index].generation,
            &[0, 1, 2, 3, u32::MAX],
        );
        vary(&mut all, dump, &field("pad"), move |d| &mut d.services[index].pad, &[1]);
    }
    all
}

fn of_slots(dump: &Dump) -> Vec<Corruption> {
    let mut all = Vec::new();
    let words = dump.services.iter().flat_map(Service::set_words);
    let reachable: BTreeSet<usize> = words
        .flat_map(|w| w.base as usize..w.base as usize + usize::from(w.len))
        .collect();
    let ids: Vec<u32> = (0..20).chain([63, 64, u32::MAX]).collect();
    for slot in reachable {
        let field = |name: &str| format!("BACKEND_SLOTS[{slot}].{name}");
        let addrs: Vec<_> = (1..9)
            .map(|last| Addr::from_v4([10, 0, 0, last]))
            .chain([OTHER, Addr::UNSPECIFIED])
            .collect();
        vary(&mut all, dump, &field("addr"), move |d| &mut d.slots[slot].addr, &addrs);
        vary(
            &mut all,
            dump,
            &field("port"),
            move |d| &mut d.slots[slot].port,
            &[0, 80, 81, 8080, u16::MAX],
        );
        vary(
            &mut all,
            dump,
            &field("flags"),
            move |d| &mut d.slots[slot].flags,
            &[0, 1, 8, 9],
        );
        vary(
            &mut all,
            dump,
            &field("backend.id"),
            move |d| &mut d.slots[slot].backend.id,
            &ids,
        );
        vary(
            &mut all,
            dump,
            &field("backend.generation"),
            move |d| &mut d.slots[slot].backend.generation,
            &[0, 1, 2, 3],
        );
        // Zero is in the slots that a build of layout 3 wrote.
        let services = [1, 2, 3, 4, 9, 16, u32::MAX].map(ServiceIndex::new);
        vary(
            &mut all,
            dump,
            &field("service"),
            move |d| &mut d.slots[slot].service,
            &services,
        );
    }
    all
}

fn of_backends(dump: &Dump) -> Vec<Corruption> {
    let mut all = Vec::new();
    for id in (0..dump.backends.len()).filter(|id| generation::is_live(dump.backends[*id].generation)) {
        let field = |name: &str| format!("BACKENDS[{id}].{name}");
        let addrs: Vec<_> = (1..9)
            .map(|last| Addr::from_v4([10, 0, 0, last]))
            .chain([OTHER, Addr::UNSPECIFIED])
            .collect();
        vary(
            &mut all,
            dump,
            &field("addr"),
            move |d| &mut d.backends[id].addr,
            &addrs,
        );
        vary(
            &mut all,
            dump,
            &field("port"),
            move |d| &mut d.backends[id].port,
            &[0, 80, 81, 8080, u16::MAX],
        );
        vary(
            &mut all,
            dump,
            &field("flags"),
            move |d| &mut d.backends[id].flags,
            &[0, 1, 7, 8, 15, u16::MAX],
        );
        vary(
            &mut all,
            dump,
            &field("service"),
            move |d| &mut d.backends[id].service,
            &[0, 1, 2, 3, 4, 9, u32::MAX].map(ServiceIndex::new),
        );
        vary(
            &mut all,
            dump,
            &field("generation"),
            move |d| &mut d.backends[id].generation,
            &[0, 1, 2, 3, u32::MAX],
        );
        let seals = [0, 1, dump.backends[1].seal, dump.backends[2].seal];
        let seal = dump.backends[id].seal;
        for value in seals.into_iter().filter(|value| *value != seal) {
            let set = move |d: &mut Dump| d.backends[id].seal = value;
            all.push((format!("BACKENDS[{id}].generation or .seal"), Box::new(set)));
        }
    }
    all
}

fn of_names(dump: &Dump) -> Vec<Corruption> {
    let mut all = Vec::new();
    let letters = [0, b'a', b'b', b'c', b'x', b'y', 0xff];
    for index in dump.names.keys().copied() {
        let place = format!("NAMES[{index}]");
        for at in [0, 1, 40, 63] {
            vary(
                &mut all,
                dump,
                &place,
                move |d| &mut name(d, index).namespace[at],
                &letters,
            );
            vary(&mut all, dump, &place, move |d| &mut name(d, index).name[at], &letters);
            vary(
                &mut all,
                dump,
                &place,
                move |d| &mut name(d, index).port_name[at],
                &letters,
            );
        }
        vary(
            &mut all,
            dump,
            &place,
            move |d| &mut name(d, index).proto,
            &[0, 6, 17, 132],
        );
        vary(&mut all, dump, &place, move |d| &mut name(d, index).family, &[0, 4, 6]);
        vary(
            &mut all,
            dump,
            &format!("{place}.port"),
            move |d| &mut name(d, index).port,
            &[0, 80, 81],
        );
        vary(
            &mut all,
            dump,
            &format!("{place}.generation"),
            move |d| &mut name(d, index).generation,
            &[0, 1, 2, 3],
        );
        for new in [0, 12, 15, 16, u32::MAX] {
            let moved = move |d: &mut Dump| {
                let name = d.names.remove(&index).unwrap();
                d.names.insert(ServiceIndex::new(new), name);
            };
            let place = if (1..16).contains(&new) {
                "SERVICES".to_owned()
            } else {
                format!("NAMES[{new}]")
            };
            all.push((place, Box::new(moved)));
        }
        all.push((
            "NAMES".into(),
            Box::new(move |d| d.names.retain(|other, _| *other != index)),
        ));
    }
    all
}

fn of_filter(dump: &Dump) -> Vec<Corruption> {
    let corruption = |bit: FilterBit| -> Corruption {
        let clear = move |dump: &mut Dump| {
            dump.filter.remove(&bit);
        };
        (format!("FILTER[{}]", bit.word()), Box::new(clear))
    };
    dump.filter.iter().copied().map(corruption).collect()
}

fn of_tries(dump: &Dump) -> Vec<Corruption> {
    let mut all = Vec::new();
    for key in dump.source_ranges.keys().copied() {
        let place = format!(
            "SOURCE_RANGES[service {}, {}]",
            key.data.service,
            key.network().unwrap()
        );
        vary(
            &mut all,
            dump,
            &place,
            move |d| d.source_ranges.get_mut(&key).unwrap(),
            &[1, u32::MAX],
        );
        let lens = [key.len - 1, key.len + 1, 20, 161].map(|len| Prefix { len, ..key });
        let other = SourceRange {
            addr: OTHER,
            ..key.data
        };
        let services = [0, 1, 8, 11, 15, 16, u32::MAX].map(ServiceIndex::new);
        let services = services.map(|service| SourceRange { service, ..key.data });
        let datas = [other].into_iter().chain(services).map(|data| Prefix { data, ..key });
        for new in lens.into_iter().chain(datas) {
            let set = move |d: &mut Dump| {
                let value = d.source_ranges.remove(&key).unwrap();
                d.source_ranges.insert(new, value);
            };
            all.push((place.clone(), Box::new(set)));
        }
        all.push((
            place,
            Box::new(move |d: &mut Dump| d.source_ranges.retain(|other, _| *other != key)),
        ));
    }
    for key in dump.cluster_cidrs.keys().copied() {
        let place = format!("CLUSTER_CIDRS[{}]", key.network().unwrap());
        vary(
            &mut all,
            dump,
            &place,
            move |d| d.cluster_cidrs.get_mut(&key).unwrap(),
            &[0, 1, 2, 3, 7, u32::MAX],
        );
        for len in [key.len - 1, key.len + 1, 0, 200] {
            let set = move |d: &mut Dump| {
                let value = d.cluster_cidrs.remove(&key).unwrap();
                d.cluster_cidrs.insert(Prefix { len, ..key }, value);
            };
            all.push((place.clone(), Box::new(set)));
        }
        all.push((
            place,
            Box::new(move |d: &mut Dump| d.cluster_cidrs.retain(|other, _| *other != key)),
        ));
    }
    all
}

/// One field is changed from outside: `verify` names it, and the next agent corrects it.
fn named_and_put_right(corruptions: fn(&Dump) -> Vec<Corruption>) {
    let lb = serving();
    let all = corruptions(&lb.maps().contents);
    assert!(!all.is_empty());
    for (number, (field, corrupt)) in all.into_iter().enumerate() {
        let mut maps = lb.maps().clone().corrupted();
        corrupt(&mut maps.contents);
        let drifts = verify(lb.desired(), &maps.contents);
        assert!(
            drifts.iter().any(|drift| drift.field.contains(&field)),
            "{number}: {field} is not in {drifts:#?}"
        );

        let mut next = start(maps.clone());
        next.apply(cluster().batch());
        next.settle().unwrap();
        let drifts = verify(next.desired(), &next.maps().contents);
        assert_eq!(drifts, [], "{number}: {field} is not put right");
        assert_eq!(next.problems(), [], "{number}: {field}");
        next.maps().assert_sound();
        assert_eq!(next.usage(), lb.usage(), "{number}: {field}: something leaked");
        let written = next.maps().written();
        let mut third = start(next.maps().clone());
        third.apply(cluster().batch());
        third.settle().unwrap();
        assert_eq!(third.maps().written(), written, "{number}: {field}: the same again");

        // A batch of an incomplete source does not change this.
        let mut slow = start(maps);
        let mut told = Cluster::default();
        slow.apply(told.incomplete());
        told.become_like(&cluster());
        slow.apply(told.batch());
        slow.settle().unwrap();
        assert_eq!(
            verify(slow.desired(), &slow.maps().contents),
            [],
            "{number}: {field} is not put right slowly"
        );
    }
}

#[test]
fn a_corrupted_frontend_is_named_and_put_right() {
    named_and_put_right(of_frontends);
}

#[test]
fn a_corrupted_service_is_named_and_put_right() {
    named_and_put_right(of_services);
}

#[test]
fn a_corrupted_slot_is_named_and_put_right() {
    named_and_put_right(of_slots);
}

#[test]
fn a_corrupted_backend_is_named_and_put_right() {
    named_and_put_right(of_backends);
}

#[test]
fn a_corrupted_name_is_named_and_put_right() {
    named_and_put_right(of_names);
}

#[test]
fn a_cleared_bit_of_the_filter_is_named_and_put_right() {
    named_and_put_right(of_filter);
}

#[test]
fn a_corrupted_network_is_named_and_put_right() {
    named_and_put_right(of_tries);
}

#[test]
fn a_good_state_has_no_drift_and_an_empty_one_all() {
    let lb = serving();
    assert_eq!(verify(lb.desired(), &lb.maps().contents), []);
    let drifts = verify(lb.desired(), &maps().contents);
    assert_eq!(drifts.iter().filter(|d| d.field == "NAMES").count(), 9);
}
