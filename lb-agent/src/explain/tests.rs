use super::*;
use crate::maps::Maps as _;
use crate::model::Service as Object;
use crate::testing::{Builder as _, Cluster, apply, endpoint, maps, port, service, slice, start};

const POD: Asker = Asker {
    netns: 7,
    on_node: false,
    node_only: false,
};
const NODE: Asker = Asker {
    netns: 1,
    on_node: true,
    node_only: false,
};
const SECOND: u64 = 1_000_000_000;

fn to(text: &str) -> Destination {
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
    Snapshot {
        dump: lb.maps().dump().unwrap(),
        node_addrs: ["192.168.77.1".parse::<IpAddr>().unwrap().into()].into(),
        affinity: BTreeMap::new(),
        now: 100 * SECOND,
    }
}

fn with_node_port(mut service: Object, node_port: u16) -> Object {
    let mut port = port("", 80);
    port.node_port = Some(node_port);
    service.ports = Box::new([port]);
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

fn eligible(answer: &Explanation) -> Vec<String> {
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
fn node_ports_have_the_whole_cluster_on_this_nodes_addresses_and_loopback() {
    let maps = snapshot(web());
    let both = ["10.10.1.2:8080", "10.10.2.2:8080"];
    for (asker, dest) in [
        (POD, "192.168.77.1:30001"),
        (NODE, "192.168.77.1:30001"),
        (NODE, "127.0.0.1:30001"),
        (NODE, "0.0.0.0:30001"),
    ] {
        let answer = explain(&maps, asker, to(dest));
        assert_eq!(eligible(&answer), both, "{dest}");
        assert_eq!(answer.set.unwrap().name, "cluster");
        assert_eq!(answer.frontend.unwrap().kind, "NodePort");
    }
    for (asker, dest, why) in [
        (POD, "127.0.0.1:30001", "another network namespace"),
        (NODE, "127.0.0.1:30002", "30002/TCP is no node port"),
        (POD, "192.168.77.1:80", "is an address of this node"),
        (POD, "192.168.77.2:30001", "is no address of this node"),
    ] {
        let answer = explain(&maps, asker, to(dest));
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
        assert_eq!((is.as_str(), *why), (errno, reason), "{dest}");
    }
    let answer = explain(&maps, POD, to("10.96.0.12:81"));
    assert_eq!(answer.notes, ["10.96.0.12 has 80/TCP (default/local:80)"]);
}

#[test]
fn who_is_not_served_is_told_so() {
    let maps = snapshot(web());
    let node_only = |asker| Asker {
        node_only: true,
        ..asker
    };
    let answer = explain(&maps, node_only(POD), to("10.96.0.10:80"));
    assert!(answer.to_string().contains("--socket-lb node"), "{answer}");
    assert_eq!(
        eligible(&explain(&maps, node_only(NODE), to("10.96.0.10:80"))),
        ["10.10.1.2:8080"]
    );
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

    let key = AffinityKey::of_netns(POD.netns, 1);
    let entry = |backend, generation, used| Affinity {
        backend,
        generation,
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
    let answer = explain(&maps, POD, to("10.96.0.10:80"));
    assert!(answer.to_string().contains("bad_slot"), "{answer}");
    maps.dump.services.truncate(1);
    let answer = explain(&maps, POD, to("10.96.0.10:80"));
    assert!(answer.to_string().contains("bad_service_index"), "{answer}");
}
