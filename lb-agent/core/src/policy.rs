//! Which endpoints serve a Service port: one pure function, [`categorize`], with the semantics of upstream's
//! `CategorizeEndpoints` (`pkg/proxy/topology.go` in Kubernetes).

mod members;

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

pub use self::members::Members;
use crate::model::{EndpointSlice, Node, Protocol, TrafficPolicy};

/// A backend: an endpoint's address and the port that belongs to the Service port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member {
    /// Address.
    pub addr: IpAddr,
    /// Port, host byte order.
    pub port: u16,
    /// Whether the endpoint is on this node.
    pub local: bool,
}

/// The port of a Service for which endpoints are chosen.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// Name of the Service port: endpoints belong to it by name.
    pub port_name: &'a str,
    /// Protocol of the Service port.
    pub protocol: Protocol,
    /// The family of the frontends: only endpoints of the same family serve them.
    pub ipv6: bool,
    /// The node with the clients that the endpoints are chosen for.
    pub node: LocalNode<'a>,
}

/// The properties of a node that the choice of endpoints for it depends on.
#[derive(Debug, Clone, Copy)]
pub struct LocalNode<'a> {
    /// Name of the Node.
    pub node: &'a str,
    /// Zone of the Node, if it is known.
    pub zone: Option<&'a str>,
}

impl<'a> LocalNode<'a> {
    /// Returns the properties of the node with a name. `object`: its Node object, if the source has one.
    #[must_use]
    pub fn new(node: &'a str, object: Option<&'a Node>) -> Self {
        Self {
            node,
            zone: object.and_then(|object| object.zone.as_deref()),
        }
    }
}

/// Categorized endpoints. Members are sorted by address and port, without duplicates.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Endpoints {
    /// For policy Cluster: all ready endpoints (with hints, those for this node or its zone). If none is ready, those
    /// that terminate but still serve.
    pub cluster: Members,
    /// For policy Local: the ready endpoints of this node. If none is ready, those that terminate but still serve.
    pub local: Members,
    /// Whether any endpoint is usable, on this node or another: an empty local set then means DROP, not REJECT.
    pub any: bool,
    /// Endpoints in neither set that still serve: established connections to them go on.
    pub draining: Members,
}

impl Endpoints {
    /// Returns the set for a traffic policy, and whether an empty set means DROP.
    #[must_use]
    pub fn for_policy(&self, policy: TrafficPolicy) -> (&Members, bool) {
        match policy {
            TrafficPolicy::Cluster => (&self.cluster, false),
            TrafficPolicy::Local => (&self.local, self.any && self.local.is_empty()),
        }
    }
}

/// How usable an endpoint is, in the order of preference: if slices disagree on one address, the greater counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    /// Neither ready nor serving.
    Unusable,
    /// Serving, but neither ready nor terminating: not for new connections.
    Serving,
    /// Serving and terminating: for new connections if no endpoint is ready.
    Terminating,
    /// Ready.
    Ready,
}

/// One endpoint, merged from all slices that contain it.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    rank: Rank,
    local: bool,
    node: Hint,
    zone: Hint,
}

/// The hint of one kind that an endpoint has, in the order of precedence: if slices disagree, the greater counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Hint {
    /// No hint of this kind.
    Absent,
    /// For clients of other nodes or zones.
    Others,
    /// For clients of this node or zone.
    Ours,
}

impl Hint {
    fn of(hints: &[Arc<str>], ours: Option<&str>) -> Self {
        if hints.is_empty() {
            Self::Absent
        } else if hints.iter().any(|hint| Some(&**hint) == ours) {
            Self::Ours
        } else {
            Self::Others
        }
    }
}

/// The kind of hints that is followed.
#[derive(Debug, Clone, Copy)]
enum Topology {
    None,
    SameZone,
    SameNode,
}

impl Topology {
    /// Returns the kind of hints to follow. Hints of a kind are followed if each ready endpoint has one, and at least
    /// one is for clients of this node or zone. Hints for nodes come before hints for zones.
    fn of<'a>(candidates: impl Iterator<Item = &'a Candidate> + Clone) -> Self {
        let ready = candidates.filter(|candidate| candidate.rank == Rank::Ready);
        let followed = |hint: fn(&Candidate) -> Hint| {
            let mut hints = ready.clone().map(hint);
            hints.clone().all(|hint| hint != Hint::Absent) && hints.any(|hint| hint == Hint::Ours)
        };
        if followed(|candidate| candidate.node) {
            Self::SameNode
        } else if followed(|candidate| candidate.zone) {
            Self::SameZone
        } else {
            Self::None
        }
    }

    fn allows(self, candidate: &Candidate) -> bool {
        match self {
            Self::None => true,
            Self::SameZone => candidate.zone == Hint::Ours,
            Self::SameNode => candidate.node == Hint::Ours,
        }
    }
}

/// Categorizes the endpoints of all slices of one Service for one of its ports.
///
/// - An endpoint in several slices counts once, with the best of its conditions and the hints of that entry. It is local
///   if any slice has it on this node.
/// - Ready endpoints are used. If there is none, those that terminate and still serve are used. This holds for the whole
///   cluster and for this node separately.
/// - Hints narrow the ready endpoints of the whole cluster if every one has a hint and some are for this node, or else
///   for its zone (KEP-2433, KEP-3015). They do not affect policy Local, nor the case that only terminating endpoints are
///   left.
#[must_use]
pub fn categorize<'a>(slices: impl IntoIterator<Item = &'a EndpointSlice>, wanted: Wanted<'_>) -> Endpoints {
    let LocalNode { node, zone } = wanted.node;
    let mut found: BTreeMap<(IpAddr, u16), Candidate> = BTreeMap::new();
    for slice in slices {
        if slice.ipv6 != wanted.ipv6 {
            continue;
        }
        let ports = slice
            .ports
            .iter()
            .filter(|p| *p.name == *wanted.port_name && p.protocol == wanted.protocol);
        for port in ports.filter_map(|p| p.port) {
            for endpoint in slice.endpoints.iter() {
                let rank = match (endpoint.ready, endpoint.serving, endpoint.terminating) {
                    (true, _, _) => Rank::Ready,
                    (false, true, true) => Rank::Terminating,
                    (false, true, false) => Rank::Serving,
                    (false, false, _) => Rank::Unusable,
                };
                let location = &endpoint.location;
                let mut new = Candidate {
                    rank,
                    local: location.node.as_deref() == Some(node),
                    node: Hint::of(&location.for_nodes, Some(node)),
                    zone: Hint::of(&location.for_zones, zone),
                };
                found
                    .entry((endpoint.address, port))
                    .and_modify(|known| {
                        new.local |= known.local;
                        known.local = new.local;
                        match new.rank.cmp(&known.rank) {
                            Ordering::Less => {}
                            Ordering::Greater => *known = new,
                            Ordering::Equal => {
                                known.node = known.node.max(new.node);
                                known.zone = known.zone.max(new.zone);
                            }
                        }
                    })
                    .or_insert(new);
            }
        }
    }
    let best = |only_local: bool| {
        let ranks = found
            .values()
            .filter(|candidate| !only_local || candidate.local)
            .map(|candidate| candidate.rank);
        ranks.max().filter(|rank| *rank >= Rank::Terminating)
    };
    let (best_anywhere, best_here) = (best(false), best(true));
    let topology = Topology::of(found.values());
    let members = |keep: &dyn Fn(&Candidate) -> bool| -> Members {
        let kept = found.iter().filter(|(_, candidate)| keep(candidate));
        let member = |(&(addr, port), candidate): (&(IpAddr, u16), &Candidate)| Member {
            addr,
            port,
            local: candidate.local,
        };
        kept.map(member).collect()
    };
    let in_cluster = |candidate: &Candidate| {
        Some(candidate.rank) == best_anywhere && (candidate.rank != Rank::Ready || topology.allows(candidate))
    };
    let in_local = |candidate: &Candidate| candidate.local && Some(candidate.rank) == best_here;
    Endpoints {
        cluster: members(&in_cluster),
        local: members(&in_local),
        any: best_anywhere.is_some(),
        draining: members(&|candidate| {
            candidate.rank > Rank::Unusable && !in_cluster(candidate) && !in_local(candidate)
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Endpoint, EndpointLocation, EndpointPort, ObjectKey};
    use proptest::prelude::*;

    const READY: (bool, bool, bool) = (true, true, false);
    const DRAINING: (bool, bool, bool) = (false, true, true);
    const GONE: (bool, bool, bool) = (false, false, true);
    const WARMING: (bool, bool, bool) = (false, false, false);

    fn endpoint(last: u8, (ready, serving, terminating): (bool, bool, bool), node: &str) -> Endpoint {
        Endpoint {
            address: IpAddr::from([10, 10, 0, last]),
            ready,
            serving,
            terminating,
            location: Arc::new(EndpointLocation::on(node)),
        }
    }

    fn slice(ports: &[(&str, Protocol, u16)], endpoints: Vec<Endpoint>) -> EndpointSlice {
        EndpointSlice {
            key: ObjectKey::new("default", "s"),
            service: "s".into(),
            ipv6: false,
            endpoints: endpoints.into(),
            ports: ports
                .iter()
                .map(|(name, protocol, port)| EndpointPort {
                    name: (*name).into(),
                    protocol: *protocol,
                    port: Some(*port),
                })
                .collect(),
        }
    }

    const WANTED: Wanted<'static> = Wanted {
        port_name: "http",
        protocol: Protocol::Tcp,
        ipv6: false,
        node: LocalNode {
            node: "here",
            zone: None,
        },
    };

    fn last(members: &Members) -> Vec<u8> {
        members
            .iter()
            .map(|m| match m.addr {
                IpAddr::V4(ip) => ip.octets()[3],
                IpAddr::V6(_) => 0,
            })
            .collect()
    }

    /// Conditions of endpoint 1 (here), 2 (here) and 3 (there); cluster set, local set, any, draining.
    type Case = (
        [(bool, bool, bool); 3],
        &'static [u8],
        &'static [u8],
        bool,
        &'static [u8],
    );

    #[test]
    fn table_of_conditions_and_locality() {
        let cases: &[Case] = &[
            ([READY, READY, READY], &[1, 2, 3], &[1, 2], true, &[]),
            ([READY, DRAINING, READY], &[1, 3], &[1], true, &[2]),
            ([DRAINING, DRAINING, READY], &[3], &[1, 2], true, &[]),
            ([DRAINING, GONE, DRAINING], &[1, 3], &[1], true, &[]),
            ([GONE, GONE, DRAINING], &[3], &[], true, &[]),
            ([GONE, WARMING, READY], &[3], &[], true, &[]),
            ([WARMING, WARMING, WARMING], &[], &[], false, &[]),
            ([GONE, GONE, GONE], &[], &[], false, &[]),
            ([READY, WARMING, GONE], &[1], &[1], true, &[]),
            ([READY, (false, true, false), GONE], &[1], &[1], true, &[2]),
            ([(true, true, true), GONE, GONE], &[1], &[1], true, &[]),
        ];
        for (conditions, cluster, local, any, draining) in cases {
            let nodes = ["here", "here", "there"];
            let endpoints = (0..3).map(|i| endpoint(i as u8 + 1, conditions[i], nodes[i])).collect();
            let slice = slice(&[("http", Protocol::Tcp, 8080)], endpoints);
            let found = categorize([&slice], WANTED);
            assert_eq!(last(&found.cluster), *cluster, "cluster of {conditions:?}");
            assert_eq!(last(&found.local), *local, "local of {conditions:?}");
            assert_eq!(found.any, *any, "any of {conditions:?}");
            assert_eq!(last(&found.draining), *draining, "draining of {conditions:?}");
        }
    }

    #[test]
    fn an_empty_set_is_dropped_only_where_others_could_serve() {
        let one = slice(&[("http", Protocol::Tcp, 80)], vec![endpoint(1, READY, "there")]);
        let found = categorize([&one], WANTED);
        assert!(found.for_policy(TrafficPolicy::Local).1);
        assert!(!found.for_policy(TrafficPolicy::Cluster).1);
        let none = categorize([], WANTED);
        assert!(!none.for_policy(TrafficPolicy::Local).1);
    }

    #[test]
    fn ports_belong_by_name_and_protocol_and_may_differ_per_slice() {
        let slices = [
            slice(
                &[("http", Protocol::Tcp, 8080), ("admin", Protocol::Tcp, 1)],
                vec![endpoint(1, READY, "here")],
            ),
            slice(&[("http", Protocol::Tcp, 9090)], vec![endpoint(2, READY, "here")]),
            slice(
                &[("http", Protocol::Udp, 7), ("", Protocol::Tcp, 8)],
                vec![endpoint(3, READY, "here")],
            ),
        ];
        let found = categorize(&slices, WANTED);
        let pairs: Vec<_> = last(&found.cluster)
            .into_iter()
            .zip(found.cluster.iter().map(|m| m.port))
            .collect();
        assert_eq!(pairs, [(1, 8080), (2, 9090)]);
    }

    #[test]
    fn duplicates_count_once_with_their_best_condition() {
        let slices = [
            slice(
                &[("http", Protocol::Tcp, 80)],
                vec![endpoint(1, GONE, "there"), endpoint(1, READY, "there")],
            ),
            slice(&[("http", Protocol::Tcp, 80)], vec![endpoint(1, DRAINING, "here")]),
        ];
        let found = categorize(&slices, WANTED);
        assert_eq!(last(&found.cluster), [1]);
        assert_eq!(last(&found.local), [1]);
        assert!(found.cluster.iter().all(|member| member.local));
    }

    #[test]
    fn the_other_family_is_not_mixed_in() {
        let mut six = slice(&[("http", Protocol::Tcp, 80)], vec![endpoint(1, READY, "here")]);
        six.ipv6 = true;
        assert_eq!(categorize([&six], WANTED), Endpoints::default());
    }

    const IN_ZONE: Wanted<'static> = Wanted {
        port_name: "",
        protocol: Protocol::Tcp,
        ipv6: false,
        node: LocalNode {
            node: "n1",
            zone: Some("a"),
        },
    };

    #[test]
    fn table_of_hints() {
        // Endpoints as in `testing::endpoint`; the node is n1 in zone a. Cluster set, local set, draining.
        type Case = (
            &'static str,
            &'static [&'static str],
            &'static [u8],
            &'static [u8],
            &'static [u8],
        );
        let cases: &[Case] = &[
            (
                "zone hints",
                &["10.0.0.1 @n1 zone:a", "10.0.0.2 @n2 zone:b"],
                &[1],
                &[1],
                &[2],
            ),
            (
                "zone hints for others only",
                &["10.0.0.1 @n1 zone:b", "10.0.0.2 @n2 zone:b"],
                &[1, 2],
                &[1],
                &[],
            ),
            (
                "one without a hint",
                &["10.0.0.1 @n2 zone:a", "10.0.0.2 @n2"],
                &[1, 2],
                &[],
                &[],
            ),
            (
                "one that is not ready without a hint",
                &["10.0.0.1 @n2 zone:a", "10.0.0.2 @n2 zone:b", "10.0.0.3 @n2 unready"],
                &[1],
                &[],
                &[2],
            ),
            (
                "several zones",
                &["10.0.0.1 @n2 zone:b zone:a", "10.0.0.2 @n2 zone:b"],
                &[1],
                &[],
                &[2],
            ),
            (
                "node hints go before zone hints",
                &[
                    "10.0.0.1 @n1 zone:a node:n1",
                    "10.0.0.2 @n2 zone:a node:n2",
                    "10.0.0.3 @n3 zone:b node:n3",
                ],
                &[1],
                &[1],
                &[2, 3],
            ),
            (
                "no node hint for this node: its zone",
                &["10.0.0.2 @n2 zone:a node:n2", "10.0.0.3 @n3 zone:b node:n3"],
                &[2],
                &[],
                &[3],
            ),
            (
                "no hint for this node nor its zone: all",
                &["10.0.0.2 @n2 zone:b node:n2", "10.0.0.3 @n3 zone:c node:n3"],
                &[2, 3],
                &[],
                &[],
            ),
            (
                "node hints that are not complete: zone hints",
                &[
                    "10.0.0.1 @n1 zone:a node:n1",
                    "10.0.0.2 @n2 zone:a",
                    "10.0.0.3 @n3 zone:b",
                ],
                &[1, 2],
                &[1],
                &[3],
            ),
            (
                "the hinted one terminates, another is ready",
                &["10.0.0.1 @n1 terminating zone:a", "10.0.0.2 @n2 zone:b"],
                &[2],
                &[1],
                &[],
            ),
            (
                "only terminating ones are left: hints do not matter",
                &["10.0.0.1 @n1 terminating zone:b", "10.0.0.2 @n2 terminating zone:a"],
                &[1, 2],
                &[1],
                &[],
            ),
            (
                "policy Local does not look at hints",
                &["10.0.0.1 @n1 zone:b", "10.0.0.2 @n2 zone:a"],
                &[2],
                &[1],
                &[],
            ),
            (
                "in two slices, with one hint each",
                &["10.0.0.1 @n2 zone:b", "10.0.0.1 @n2 zone:a", "10.0.0.2 @n2 zone:b"],
                &[1],
                &[],
                &[2],
            ),
        ];
        for (name, endpoints, cluster, local, draining) in cases {
            let found = categorize([&crate::testing::slice("web", endpoints)], IN_ZONE);
            assert_eq!(last(&found.cluster), *cluster, "cluster set: {name}");
            assert_eq!(last(&found.local), *local, "local set: {name}");
            assert_eq!(last(&found.draining), *draining, "draining: {name}");
        }
    }

    #[test]
    fn a_node_without_a_zone_follows_no_zone_hints() {
        let slice = crate::testing::slice("web", &["10.0.0.1 zone:a", "10.0.0.2 zone:b"]);
        let node = LocalNode {
            zone: None,
            ..IN_ZONE.node
        };
        let found = categorize([&slice], Wanted { node, ..IN_ZONE });
        assert_eq!(last(&found.cluster), [1, 2]);
    }

    /// The conditions, nodes and hints that the endpoints of this test can have.
    const CONDITIONS: [&str; 5] = ["", "unready", "serving", "terminating", "gone"];
    const PLACES: [&str; 3] = ["", "@n1", "@n2"];
    const ZONES: [&str; 4] = ["", "zone:a", "zone:b", "zone:a zone:b"];
    const NODES: [&str; 4] = ["", "node:n1", "node:n2", "node:n1 node:n2"];

    /// A second statement of the rules, each in a sentence, on the words that an endpoint was made of.
    fn expected(endpoints: &[String]) -> (Vec<u8>, Vec<u8>) {
        let has = |text: &String, word: &str| text.split_whitespace().any(|w| w == word);
        let hinted = |text: &String, kind: &str| text.contains(kind);
        let is_ready = |text: &&String| !CONDITIONS[1..].iter().any(|word| has(text, word));
        let ready: Vec<_> = endpoints.iter().filter(is_ready).collect();
        let follow = |kind: &str, ours: &str| {
            ready.iter().all(|text| hinted(text, kind)) && ready.iter().any(|text| has(text, ours))
        };
        let mut cluster = ready.clone();
        if follow("node:", "node:n1") {
            cluster.retain(|text| has(text, "node:n1"));
        } else if follow("zone:", "zone:a") {
            cluster.retain(|text| has(text, "zone:a"));
        }
        let terminating: Vec<_> = endpoints.iter().filter(|text| has(text, "terminating")).collect();
        if ready.is_empty() {
            cluster.clone_from(&terminating);
        }
        let on_n1 = |texts: &[&String]| -> Vec<u8> { numbers(texts.iter().filter(|text| has(text, "@n1"))) };
        let mut local = on_n1(&ready);
        if local.is_empty() {
            local = on_n1(&terminating);
        }
        (numbers(cluster.iter()), local)
    }

    /// The last byte of the address that a text begins with.
    fn numbers<'a>(texts: impl Iterator<Item = &'a &'a String>) -> Vec<u8> {
        let address = |text: &&String| text.split_whitespace().next()?.rsplit('.').next()?.parse().ok();
        texts.filter_map(address).collect()
    }

    #[test]
    fn every_cell_of_two_endpoints() {
        let mut all = Vec::new();
        for condition in CONDITIONS {
            for place in PLACES {
                for zone in ZONES {
                    for node in NODES {
                        all.push(format!("{condition} {place} {zone} {node}"));
                    }
                }
            }
        }
        assert_eq!(all.len(), 240);
        for first in &all {
            for second in &all {
                let endpoints = [format!("10.0.0.1 {first}"), format!("10.0.0.2 {second}")];
                let texts = [&*endpoints[0], &*endpoints[1]];
                let found = categorize([&crate::testing::slice("web", &texts)], IN_ZONE);
                let (cluster, local) = expected(&endpoints);
                assert_eq!(last(&found.cluster), cluster, "cluster set of {endpoints:?}");
                assert_eq!(last(&found.local), local, "local set of {endpoints:?}");
                let usable = !cluster.is_empty();
                assert_eq!(found.any, usable, "any of {endpoints:?}");
                let (members, drops) = found.for_policy(TrafficPolicy::Local);
                assert_eq!(drops, members.is_empty() && usable, "{endpoints:?}");
            }
        }
    }

    proptest! {
        /// The order of slices and endpoints makes no difference, sets are sorted, and local is never wider than it
        /// may be.
        #[test]
        fn order_makes_no_difference(conditions in prop::collection::vec((1_u8..6, any::<(bool, bool, bool)>(), any::<bool>()), 0..12), split in 0_usize..12) {
            let mut endpoints: Vec<_> = conditions.iter().map(|(n, c, here)| endpoint(*n, *c, if *here { "here" } else { "there" })).collect();
            let ports = [("http", Protocol::Tcp, 80)];
            let one = categorize([&slice(&ports, endpoints.clone())], WANTED);
            endpoints.reverse();
            let rest = endpoints.split_off(split.min(endpoints.len()));
            let two = categorize(&[slice(&ports, rest), slice(&ports, endpoints)], WANTED);
            prop_assert_eq!(&one, &two);
            prop_assert!(one.cluster.iter().is_sorted() && one.local.iter().is_sorted());
            prop_assert!(one.local.iter().all(|m| m.local));
            prop_assert_eq!(one.any, !one.cluster.is_empty());
            prop_assert!(one.draining.iter().all(|m| one.cluster.iter().chain(one.local.iter()).all(|other| other != m)));
        }
    }
}
