use proptest::prelude::*;

use super::*;
use crate::maps::Maps as _;
use crate::model::Service as Object;
use crate::testing::{Builder as _, Cluster, apply, endpoint, maps, port, service, slice, start};

const POD: ConnectingSocket = ConnectingSocket {
    netns: 7,
    on_node: false,
    node_only: false,
};
const NODE: ConnectingSocket = ConnectingSocket {
    netns: 1,
    on_node: true,
    node_only: false,
};
/// The address of node n1.
pub(super) const NODE_ADDRESS: &str = "192.168.77.1";
const SECOND: u64 = 1_000_000_000;

pub(super) fn to(text: &str) -> Destination {
    let to: SocketAddr = text.parse().unwrap();
    Destination {
        addr: Addr::from(to.ip()).into(),
        port: to.port(),
        proto: 6,
    }
}

/// What a cluster's maps say, on node n1, whose address is 192.168.77.1.
fn snapshot<const N: usize>(objects: [crate::model::Object; N]) -> Snapshot {
    let mut lb = start(maps());
    apply(&mut lb, &mut Cluster::of(objects));
    let own = [NODE_ADDRESS.parse::<IpAddr>().unwrap().into()].into();
    assert_eq!(lb.write_node_addrs(&own).unwrap(), 0);
    Snapshot {
        dump: lb.maps().dump().unwrap(),
        affinity: BTreeMap::new(),
        flows: Vec::new(),
        now: 100 * SECOND,
        ..Snapshot::default()
    }
}

pub(super) fn with_node_port(mut service: Object, node_port: u16) -> Object {
    let mut port = port("", 80);
    port.node_port = Some(node_port);
    service.ports = [port].into();
    service
}

/// Two endpoints, one of them here, and one that drains.
fn web() -> [crate::model::Object; 2] {
    let endpoints = ["10.10.1.2 @n1", "10.10.2.2 @n2", "10.10.2.3 @n2 terminating"];
    [
        with_node_port(service("web", "10.96.0.10").local(), 30001).into(),
        slice("web", &endpoints).into(),
    ]
}

pub(super) fn eligible(answer: &Explanation) -> Vec<String> {
    let eligible = answer.candidates.iter().filter(|candidate| candidate.eligible);
    eligible.map(|candidate| candidate.address.to_string()).collect()
}

#[test]
fn the_whole_answer_for_people() {
    let maps = snapshot(web());
    let text = explain(&maps, POD, to("10.96.0.10:80")).to_string();
    assert_eq!(
        text,
        "\
to         10.96.0.10:80/TCP
frontend   ClusterIP of default/web:80 (service 1)
policy     internal set, members: 1 (cluster IPs: internalTrafficPolicy applies)
candidate  yes 10.10.1.2:8080 (backend 1, this node): one of 1 in the internal set
candidate  no  10.10.2.2:8080 (backend 2, other node): not in the internal set: internalTrafficPolicy is Local, and it \
is on another node
candidate  no  10.10.2.3:8080 (backend 3, other node): drains: it serves what it has, and gets nothing new
connect()  goes to 10.10.1.2:8080"
    );
}

#[test]
fn node_ports_have_the_cluster_set_on_this_nodes_addresses_and_loopback() {
    let maps = snapshot(web());
    let both = ["10.10.1.2:8080", "10.10.2.2:8080"];
    for (socket, dest) in [
        (POD, "192.168.77.1:30001"),
        (NODE, "192.168.77.1:30001"),
        (NODE, "127.0.0.1:30001"),
        (NODE, "0.0.0.0:30001"),
    ] {
        let answer = explain(&maps, socket, to(dest));
        assert_eq!(eligible(&answer), both, "{dest}");
        assert_eq!(answer.set.unwrap().name, "cluster");
        assert_eq!(answer.frontend.unwrap().kind, "NodePort");
    }
    for (socket, dest, why) in [
        (POD, "127.0.0.1:30001", "another network namespace"),
        (NODE, "127.0.0.1:30002", "30002/TCP is no node port"),
        (POD, "192.168.77.1:80", "is an address of this node"),
        (POD, "192.168.77.2:30001", "is no address of this node"),
    ] {
        let answer = explain(&maps, socket, to(dest));
        let Outcome::Untouched { why: is } = answer.outcome else {
            panic!("{dest}: {answer:?}");
        };
        assert!(is.contains(why), "{dest}: {is}");
    }
}

#[test]
fn refusals_have_their_error_number() {
    let elsewhere = slice("local", &["10.10.2.2 @n2"]);
    let maps = snapshot([
        service("empty", "10.96.0.11").into(),
        service("local", "10.96.0.12").local().into(),
        elsewhere.into(),
    ]);
    for (dest, errno, reason) in [
        ("10.96.0.11:80", "ECONNREFUSED", "no_endpoint"),
        ("10.96.0.12:80", "EHOSTUNREACH", "no_local_endpoint"),
        ("10.96.0.12:81", "ECONNREFUSED", "no_such_port"),
    ] {
        let answer = explain(&maps, POD, to(dest));
        let Outcome::Refused {
            errno: is, reason: why, ..
        } = &answer.outcome
        else {
            panic!("{dest}: {answer:?}");
        };
        assert_eq!((*is, *why), (errno, reason), "{dest}");
    }
    let answer = explain(&maps, POD, to("10.96.0.12:81"));
    assert_eq!(answer.notes, ["10.96.0.12 has 80/TCP (default/local:80)"]);
}

#[test]
fn who_is_not_served_is_told_so() {
    let maps = snapshot(web());
    let node_only = |socket| ConnectingSocket {
        node_only: true,
        ..socket
    };
    let answer = explain(&maps, node_only(POD), to("10.96.0.10:80"));
    assert!(answer.to_string().contains("--socket-lb node"), "{answer}");
    assert_eq!(
        eligible(&explain(&maps, node_only(NODE), to("10.96.0.10:80"))),
        ["10.10.1.2:8080"]
    );
}

#[test]
fn the_outcome_of_several_packets_is_in_the_plural() {
    let maps = snapshot(web());
    let node_only = ConnectingSocket { node_only: true, ..POD };
    let text = |from: [u8; 4], dest: &str| {
        let answer = explain(&maps, node_only, to(dest)).with_packets(&maps, Some(from.into()), to(dest));
        answer.to_string()
    };
    let packets = |text: &str| text.lines().last().unwrap().to_owned();
    let goes = packets(&text([10, 10, 1, 2], "10.96.0.10:80"));
    assert_eq!(goes, "packets    from 10.10.1.2: go to 10.10.1.2:8080");
    let untouched = packets(&text([10, 10, 1, 2], "203.0.113.9:80"));
    assert!(
        untouched.starts_with("packets    from 10.10.1.2: go to the destination as it is: "),
        "{untouched}"
    );
    let answered = packets(&text([10, 10, 1, 2], "10.96.0.10:81"));
    assert!(
        answered.starts_with("packets    from 10.10.1.2: are answered with a TCP reset: "),
        "{answered}"
    );
    let dropped = Outcome::Dropped { reason: "x", why: "y" };
    let mut answer = explain(&maps, node_only, to("10.96.0.10:80"));
    answer.packets = Some(PacketsOutcome {
        from: [10, 10, 1, 2].into(),
        outcome: dropped,
    });
    assert!(
        answer
            .to_string()
            .ends_with("from 10.10.1.2: are dropped: y (counted as x)"),
        "{answer}"
    );
}

#[test]
fn no_claim_is_made_about_services_that_may_not_be_written() {
    let mut maps = snapshot(web());
    let missing = to("10.96.5.99:80");
    let is = |maps: &Snapshot, text: &str| {
        let answer = explain(maps, POD, missing).to_string();
        assert!(answer.contains(text), "{answer}");
        let packet = explain_packet(maps, [203, 0, 113, 7].into(), missing).to_string();
        assert!(packet.contains(text), "{packet}");
        answer.contains("no Service has")
    };
    assert!(is(&maps, "no Service has 10.96.5.99:80/TCP"));
    maps.places = ["Service default/web TCP IPv4", "eth0"].into_iter().collect();
    assert!(
        is(&maps, "no Service has 10.96.5.99:80/TCP"),
        "that service port is written"
    );
    maps.places = ["Service default/s1 TCP IPv4", "Service default/s2 TCP IPv4"]
        .into_iter()
        .collect();
    let expected = "no frontend is written for 10.96.5.99:80/TCP: `status` lists 2 service ports that are not written";
    assert!(!is(&maps, expected));
    maps.places = ["Service default/web TCP IPv4, frontend 10.96.5.99:80/TCP"]
        .into_iter()
        .collect();
    assert!(!is(
        &maps,
        "`status` has a problem of \"Service default/web TCP IPv4, frontend 10.96.5.99:80/TCP\""
    ));
    maps.places = Places::default();
    maps.unlisted_problems = 28;
    assert!(!is(&maps, "28 more problems are only in the log of the agent"));
    // An address that is marked, but has not all of its ports.
    let answer = explain(&maps, POD, to("10.96.0.10:81")).to_string();
    assert!(
        answer.contains("10.96.0.10 has 80/TCP (default/web:80) in the maps, but there may be more: "),
        "{answer}"
    );
    // Node ports.
    let maps_with_problems = maps.clone();
    maps.unlisted_problems = 0;
    maps.places = ["Service default/x TCP IPv4, frontend 0.0.0.0:30002/TCP"]
        .into_iter()
        .collect();
    for dest in ["192.168.77.1:30002", "127.0.0.1:30002"] {
        let answer = explain(&maps, NODE, to(dest)).to_string();
        assert!(answer.contains("frontend 0.0.0.0:30002/TCP"), "{answer}");
    }
    let maps = maps_with_problems;
    let answer = explain(&maps, NODE, to("192.168.77.1:30002")).to_string();
    assert!(!answer.contains("is no node port"), "{answer}");
}

#[test]
fn an_address_that_filter_lacks_is_an_inconsistency_of_the_maps() {
    let complete = snapshot(web());
    let outside = [203, 0, 113, 7].into();
    for (cleared, dest, expected) in [
        (
            "10.96.0.10",
            "10.96.0.10:80",
            "FRONTENDS has a frontend for 10.96.0.10:80/TCP, but",
        ),
        (
            "10.96.0.10",
            "10.96.0.10:81",
            "FRONTENDS has the address mark of 10.96.0.10, but",
        ),
        (
            NODE_ADDRESS,
            "192.168.77.1:30001",
            "FRONTENDS has a frontend for 192.168.77.1:30001/TCP, but",
        ),
        (
            NODE_ADDRESS,
            "192.168.77.1:22",
            "192.168.77.1 is an address of this node, and 22/TCP is no node port",
        ),
        ("203.0.113.9", "203.0.113.9:80", "no Service has 203.0.113.9:80/TCP"),
    ] {
        let mut maps = complete.clone();
        let addr: IpAddr = cleared.parse().unwrap();
        maps.dump.filter.remove(&FilterBit::from(Addr::from(addr)));
        // A problem in `status` is not the cause.
        maps.unlisted_problems = u32::from(expected.starts_with("FRONTENDS"));
        for answer in [explain(&maps, POD, to(dest)), explain_packet(&maps, outside, to(dest))] {
            let Outcome::Untouched { why } = &answer.outcome else {
                panic!("{dest}: {answer}");
            };
            assert!(why.starts_with(expected), "{dest}: {why}");
            assert_eq!(
                why.contains("in FILTER is not set"),
                expected.starts_with("FRONTENDS"),
                "{dest}: {why}"
            );
        }
        let complete = explain(&complete, POD, to(dest)).to_string();
        assert!(!complete.contains("FILTER"), "{complete}");
    }
}

#[test]
fn source_ranges_are_left_to_packets() {
    let mut web = service("web", "10.96.0.10");
    web.service_type = crate::model::ServiceType::LoadBalancer;
    web.load_balancer_ips = Box::new(["192.0.2.1".parse().unwrap()]);
    let open = snapshot([web.clone().into(), slice("web", &["10.10.1.2"]).into()]);
    let closed = {
        let mut closed = open.clone();
        closed.dump.services[1].flags |= service_flags::SOURCE_RANGES;
        publish_sets(&mut closed.dump);
        closed
    };
    assert_eq!(eligible(&explain(&open, POD, to("192.0.2.1:80"))), ["10.10.1.2:8080"]);
    let answer = explain(&closed, POD, to("192.0.2.1:80"));
    assert!(answer.to_string().contains("loadBalancerSourceRanges"), "{answer}");
    assert_eq!(
        eligible(&explain(&closed, POD, to("10.96.0.10:80"))),
        ["10.10.1.2:8080"]
    );
}

#[test]
fn affinity_decides_while_it_holds() {
    let endpoints = ["10.10.1.2", "10.10.1.3"].map(|text| endpoint(text).address.to_string());
    let endpoints: Vec<&str> = endpoints.iter().map(String::as_str).collect();
    let mut maps = snapshot([
        service("web", "10.96.0.10").affinity(60).into(),
        slice("web", &endpoints).into(),
    ]);
    let dest = to("10.96.0.10:80");
    let answer = explain(&maps, POD, dest);
    assert_eq!(eligible(&answer).len(), 2);
    assert!(!answer.affinity.unwrap().holds, "new");

    let key = AffinityKey::of_netns(POD.netns, ServiceIndex::new(1));
    let entry = |id, generation, used| Affinity {
        backend: BackendRef { id, generation },
        used: used * SECOND,
    };
    maps.affinity.insert(key, entry(2, 1, 90));
    let answer = explain(&maps, POD, dest);
    assert_eq!(eligible(&answer), ["10.10.1.3:8080"]);
    let line = "affinity   timeout 60 s: 10.10.1.3:8080, last used 10 s ago; used within the timeout, and the backend \
                is usable; 50 s remain";
    assert!(answer.to_string().contains(line), "{answer}");
    assert_eq!(eligible(&explain(&maps, NODE, dest)).len(), 2, "another client");

    maps.affinity.insert(key, entry(2, 1, 40));
    assert_eq!(eligible(&explain(&maps, POD, dest)).len(), 2, "too old");
    maps.affinity.insert(key, entry(2, 3, 90));
    let answer = explain(&maps, POD, dest);
    assert_eq!(eligible(&answer).len(), 2, "another generation");
    assert!(answer.to_string().contains("a backend that is gone"), "{answer}");
}

#[test]
fn broken_maps_give_what_the_programs_give() {
    let mut maps = snapshot(web());
    maps.dump.services[1].internal.base = u32::MAX;
    set_of(&mut maps, "10.96.0.10:80", SetWord::NONE);
    let answer = explain(&maps, POD, to("10.96.0.10:80"));
    assert!(answer.to_string().contains("bad_slot"), "{answer}");
    maps.dump.services.truncate(1);
    let answer = explain(&maps, POD, to("10.96.0.10:80"));
    assert!(answer.to_string().contains("bad_service_index"), "{answer}");
}

/// Stores the sets in FRONTENDS that the agent publishes for these entries of SERVICES.
fn publish_sets(dump: &mut Dump) {
    for frontend in dump.frontends.values_mut() {
        if let Some(service) = dump.services.get(frontend.service.to_usize()) {
            frontend.set = selection::set_in_frontend(*frontend, service);
        }
    }
}

/// Returns the key of the frontend at an address and TCP port.
fn key(at: &str) -> FrontendKey {
    let Destination { addr, port, proto } = to(at);
    FrontendKey::new(addr.into(), port, proto)
}

/// Returns the frontend at an address and TCP port.
fn frontend_mut<'a>(maps: &'a mut Snapshot, at: &str) -> &'a mut Frontend {
    maps.dump.frontends.get_mut(&key(at)).unwrap()
}

/// Stores the set of a frontend.
fn set_of(maps: &mut Snapshot, at: &str, set: SetWord) {
    frontend_mut(maps, at).set = set;
}

#[test]
fn connect_uses_the_set_of_the_frontend_if_its_slots_are_of_the_service() {
    let other = service("other", "10.96.0.20");
    let [web, endpoints] = web();
    let maps = snapshot([web, endpoints, other.into(), slice("other", &["10.10.9.9 @n2"]).into()]);
    let service = |at: &str| maps.dump.services[maps.dump.frontends[&key(at)].service.to_usize()];
    let Service { internal, cluster, .. } = service("10.96.0.10:80");
    let of_other = service("10.96.0.20:80").internal;
    assert_eq!([internal.len, cluster.len, of_other.len], [1, 2, 1]);
    let set = |base, len| SetWord {
        base,
        len,
        ..SetWord::NONE
    };
    let end = maps.dump.slots.len() as u32;
    let (here, both) = (&["10.10.1.2:8080"][..], &["10.10.1.2:8080", "10.10.2.2:8080"][..]);
    let by_services = "by the one in SERVICES it goes to 10.10.1.2:8080";
    for (name, set, expected, note) in [
        ("the set in SERVICES", internal, here, None),
        ("no set", SetWord::NONE, here, None),
        ("another set of the service", cluster, both, Some(by_services)),
        ("the set of another service", of_other, here, None),
        ("slots that no set has", set(end - 1, 1), here, None),
        ("slots beyond the end", set(end, 3), here, None),
    ] {
        let mut maps = maps.clone();
        set_of(&mut maps, "10.96.0.10:80", set);
        let answer = explain(&maps, POD, to("10.96.0.10:80"));
        assert_eq!(eligible(&answer), expected, "{name}");
        let notes = answer.notes.join("\n");
        match note {
            Some(note) => assert!(notes.contains(note), "{name}: {answer}"),
            None => assert_eq!(notes, "", "{name}"),
        }
        // Packets use SERVICES only.
        let packet = explain_packet(&maps, [203, 0, 113, 7].into(), to("10.96.0.10:80"));
        assert_eq!(eligible(&packet), here, "{name}");
    }
}

#[test]
fn the_note_on_two_sets_has_the_outcome_by_services() {
    let maps = snapshot(web());
    let at = "10.96.0.10:80";
    let text = |maps: &Snapshot, proto| explain(maps, POD, Destination { proto, ..to(at) }).to_string();
    let mut emptied = maps.clone();
    emptied.dump.services[1].internal.len = 0;
    let expected = "\
to         10.96.0.10:80/TCP
frontend   ClusterIP of default/web:80 (service 1)
policy     internal set, members: 1 (cluster IPs: internalTrafficPolicy applies)
candidate  yes 10.10.1.2:8080 (backend 1, this node): one of 1 in the internal set
candidate  no  10.10.2.2:8080 (backend 2, other node): not in the internal set: internalTrafficPolicy is Local, and it \
is on another node
candidate  no  10.10.2.3:8080 (backend 3, other node): drains: it serves what it has, and gets nothing new
note       connect() uses the set in FRONTENDS; by the one in SERVICES it fails with ECONNREFUSED: the service has no \
usable endpoint (counted as no_endpoint); the two differ for a moment during a change, else `lb-agent verify` names \
the field
connect()  goes to 10.10.1.2:8080";
    assert_eq!(text(&emptied, ip_protocol::TCP), expected);

    // Affinity is in SERVICES only.
    let mut with_affinity = maps.clone();
    with_affinity.dump.services[1].flags |= service_flags::AFFINITY;
    assert!(
        !text(&with_affinity, ip_protocol::TCP).contains("affinity "),
        "the set in FRONTENDS has none"
    );

    // A kind that this build does not know.
    let mut unknown = maps.clone();
    frontend_mut(&mut unknown, at).kind = 99;
    let answer = text(&unknown, ip_protocol::TCP);
    assert!(
        answer.contains("policy     unknown set, members: 1 (the kind of the frontend is unknown"),
        "{answer}"
    );
    assert!(answer.contains("counted as bad_kind"), "{answer}");
    assert!(answer.ends_with("goes to 10.10.1.2:8080"), "{answer}");

    // SERVICES is not even read.
    let mut without_service = maps.clone();
    without_service.dump.services.truncate(1);
    let answer = text(&without_service, ip_protocol::TCP);
    assert!(answer.contains("counted as bad_service_index"), "{answer}");
    assert!(answer.ends_with("goes to 10.10.1.2:8080"), "{answer}");

    // A slot of another service among those of the set.
    let mut mixed = maps.clone();
    let cluster = mixed.dump.services[1].cluster;
    set_of(&mut mixed, at, cluster);
    mixed.dump.slots[cluster.base as usize].service = ServiceIndex::new(7);
    let answer = text(&mixed, ip_protocol::TCP);
    assert!(
        answer.contains("1 of the 2 slots of the set in FRONTENDS are not of this Service"),
        "{answer}"
    );
    assert!(answer.ends_with("goes to 10.10.2.2:8080"), "{answer}");
}

/// What the programs do with a new TCP connection, by a random number: the steps of `lb-ebpf/src/{sock_addr,backend}.rs`
/// one after another, on the same `lb_common::logic`. `None`: the destination stays.
fn connected(
    maps: &Snapshot,
    socket: ConnectingSocket,
    to: Destination,
    random: u32,
) -> Result<Option<SocketAddr>, DropReason> {
    let view = View {
        maps,
        on_node: socket.on_node,
    };
    if socket.node_only && !socket.on_node {
        return Ok(None);
    }
    let Some(frontend) = frontend::of_socket(&view, to)? else {
        return Ok(None);
    };
    if let Ok(slot) = selection::slot(frontend.set, random)
        && let Some(slot) = maps.dump.slots.get(slot as usize)
        && slot.service == frontend.service
    {
        return Ok(Some(slot.addr.socket(slot.port)));
    }
    let set = selection::set_for_socket(frontend)?;
    let service = maps.dump.service(frontend.service).ok_or(DropReason::BadServiceIndex)?;
    if frontend::has_source_ranges(frontend, service.flags) {
        return Ok(None);
    }
    let again = |entry: &Affinity| {
        let backend = maps.dump.backends.get(entry.backend.id as usize)?;
        backend
            .serves(entry.backend, frontend.service, set)
            .then(|| backend.addr.socket(backend.port))
    };
    let key = AffinityKey::of_netns(socket.netns, frontend.service);
    if service.flags & service_flags::AFFINITY != 0
        && let Some(entry) = maps.affinity.get(&key)
        && affinity::holds(entry.used, maps.now, service.affinity_timeout)
        && let Some(backend) = again(entry)
    {
        return Ok(Some(backend));
    }
    let word = match set {
        Set::Internal => service.internal,
        Set::External => service.external,
        Set::Cluster => service.cluster,
    };
    let slot = selection::slot(word, random)?;
    let slot = maps.dump.slots.get(slot as usize).ok_or(DropReason::BadSlot)?;
    Ok(Some(slot.addr.socket(slot.port)))
}

/// Random numbers that take every member of a small set.
pub(super) fn numbers() -> impl Iterator<Item = u32> {
    (0..64).map(|n| n << 26)
}

/// One Service of which all is left to chance: it is the `n`th.
fn any_service(n: u8) -> impl Strategy<Value = [crate::model::Object; 2]> {
    let condition = prop::sample::select(vec![None, Some(""), Some(" terminating"), Some(" unready")]);
    let endpoints = prop::collection::vec(condition, 4);
    let affinity = prop::option::of(1..100_u32);
    (endpoints, affinity, any::<bool>()).prop_map(move |(conditions, affinity, local)| {
        let mut web = service(&format!("s{n}"), &format!("10.96.0.{n}"));
        web.service_type = crate::model::ServiceType::LoadBalancer;
        web.external_ips = Box::new([[198, 51, 100, n].into()]);
        web.load_balancer_ips = Box::new([[192, 0, 2, n].into()]);
        web.affinity_timeout = affinity;
        let web = with_node_port(if local { web.local() } else { web }, 30000 + u16::from(n));
        let endpoints = conditions
            .into_iter()
            .enumerate()
            .filter_map(|(i, condition)| Some(format!("10.10.{n}.{i} @n{}{}", 1 + i % 2, condition?)));
        let endpoints: Vec<_> = endpoints.collect();
        let endpoints: Vec<_> = endpoints.iter().map(String::as_str).collect();
        [web.into(), slice(&format!("s{n}"), &endpoints).into()]
    })
}

/// What three Services make of the maps, then clients that were seen, and changes that an update is in the middle of.
pub(super) fn any_maps() -> impl Strategy<Value = Snapshot> {
    let services = (any_service(1), any_service(2), any_service(3));
    // A network namespace, a backend, whether it is the one that was meant, and when.
    let client = (
        prop::sample::select(vec![1, 7]),
        0..13_u32,
        prop::bool::weighted(0.8),
        0..100_u64,
    );
    let clients = prop::collection::vec(client, 0..6);
    let flags = prop::sample::select(vec![0, backend_flags::LOCAL, backend_flags::SETS]);
    let backends = prop::collection::vec((0..13_usize, flags, prop::bool::weighted(0.2)), 0..4);
    let (ranges, emptied) = (prop::option::of(1..4_usize), prop::option::of(1..4_usize));
    // Whether FRONTENDS follows these changes, and frontends with a set of any service.
    let sets = prop::collection::vec((any::<prop::sample::Index>(), 1..4_usize, 0..3_usize), 0..4);
    let changes = (clients, backends, ranges, emptied, any::<bool>(), sets);
    (services, changes).prop_map(|(([a, b], [c, d], [e, f]), changes)| {
        let (clients, backends, ranges, emptied, is_published, sets) = changes;
        let mut maps = snapshot([a, b, c, d, e, f]);
        for (id, flags, withdrawn) in backends {
            if let Some(backend) = maps.dump.backends.get_mut(id) {
                backend.flags = flags;
                backend.generation += u32::from(withdrawn);
            }
        }
        for (netns, id, is_meant, used) in clients {
            if let Some(backend) = maps.dump.backends.get(id as usize) {
                let entry = Affinity {
                    backend: BackendRef {
                        id,
                        generation: backend.generation + if is_meant { 0 } else { 2 },
                    },
                    used: used * SECOND,
                };
                maps.affinity
                    .insert(AffinityKey::of_netns(netns, backend.service), entry);
            }
        }
        if let Some(index) = ranges {
            maps.dump.services[index].flags |= service_flags::SOURCE_RANGES;
        }
        if let Some(index) = emptied {
            let service = &mut maps.dump.services[index];
            (service.internal.len, service.cluster.len) = (0, 0);
        }
        if is_published {
            publish_sets(&mut maps.dump);
        }
        let keys: Vec<_> = maps.dump.frontends.keys().copied().collect();
        for (key, service, set) in sets {
            let set = maps.dump.services[service].set_words()[set];
            maps.dump
                .frontends
                .entry(*key.get(&keys))
                .and_modify(|frontend| frontend.set = set);
        }
        maps
    })
}

fn all_destinations() -> Vec<Destination> {
    let of_services = (1..4).flat_map(|n| {
        [
            format!("10.96.0.{n}:80"),
            format!("10.96.0.{n}:81"),
            format!("198.51.100.{n}:80"),
            format!("192.0.2.{n}:80"),
            format!("192.168.77.1:3000{n}"),
            format!("192.168.77.2:3000{n}"),
            format!("127.0.0.1:3000{n}"),
            format!("0.0.0.0:3000{n}"),
            format!("[::1]:3000{n}"),
        ]
    });
    of_services.map(|text| to(&text)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_explained_is_what_the_programs_do(maps in any_maps()) {
        let node_only = ConnectingSocket { node_only: true, ..POD };
        for socket in [POD, NODE, node_only] {
            for dest in all_destinations() {
                let done: Result<BTreeSet<_>, _> = numbers().map(|n| connected(&maps, socket, dest, n)).collect();
                let answer = explain(&maps, socket, dest);
                let said = match &answer.outcome {
                    Outcome::Untouched { .. } => Ok([None].into()),
                    Outcome::Connects { backends } => Ok(backends.iter().copied().map(Some).collect()),
                    Outcome::Refused { reason, .. }
                    | Outcome::Rejected { reason, .. }
                    | Outcome::Dropped { reason, .. } => Err(*reason),
                };
                prop_assert_eq!(done.map_err(DropReason::label), said, "{:?}\n{}", socket, answer);
            }
        }
    }
}
