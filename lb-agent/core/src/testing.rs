//! Builders of Services and EndpointSlices, and a cluster of them that returns changes as batches, for tests.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use lb_common::abi::{FrontendKey, SizedMap};

use crate::maps::fake::FakeMaps;
use crate::maps::{Capacities, Maps};
use crate::model::{
    Batch, Change, Endpoint, EndpointPort, EndpointSlice, Node, Object, ObjectId, ObjectKey, Protocol, Service,
    ServicePort, ServiceType, TrafficPolicy,
};
use crate::names::PortId;
use crate::policy::LocalNode;
use crate::reconcile::Reconciler;
use crate::verify::verify;

/// The node that the agent under test runs on.
pub const NODE: &str = "n1";

/// The node that the agent under test runs on, as the choice of endpoints takes it.
pub const LOCAL_NODE: LocalNode<'static> = LocalNode { node: NODE, zone: None };

/// Sizes of maps that suffice for most tests.
pub const ROOM: Capacities = Capacities::uniform(64)
    .with(SizedMap::Services, 16)
    .with(SizedMap::Frontends, 32)
    .with(SizedMap::BackendSlots, 128);

/// Service `default/NAME` at `ip`, with one port 80 without a name until [`Builder::ports`] sets others.
pub fn service(name: &str, ip: &str) -> Service {
    Service {
        cluster_ips: Box::new([ip.parse().unwrap()]),
        ports: Arc::new([ServicePort::tcp("", 80)]),
        ..Service::new(ObjectKey::new("default", name))
    }
}

/// Creates a TCP port of a Service.
pub fn port(name: &str, port: u16) -> ServicePort {
    ServicePort::tcp(name, port)
}

/// Short forms for the fields that tests vary.
pub trait Builder {
    /// Sets `metadata.creationTimestamp`, in seconds since 1970.
    fn created(self, at: i64) -> Self;
    /// Sets the ports.
    fn ports<const N: usize>(self, ports: [ServicePort; N]) -> Self;
    /// Sets session affinity, with its timeout in seconds.
    fn affinity(self, seconds: u32) -> Self;
    /// Sets policy Local, for traffic of both kinds.
    fn local(self) -> Self;
}

impl Builder for Service {
    fn created(mut self, at: i64) -> Self {
        self.created = Some(at);
        self
    }

    fn ports<const N: usize>(mut self, ports: [ServicePort; N]) -> Self {
        self.ports = ports.into();
        self
    }

    fn affinity(mut self, seconds: u32) -> Self {
        self.affinity_timeout = Some(seconds);
        self
    }

    /// Policy Local, for both kinds of traffic.
    fn local(mut self) -> Self {
        self.internal_policy = TrafficPolicy::Local;
        self.external_policy = TrafficPolicy::Local;
        self
    }
}

/// Creates an endpoint from words: its address, then any of `@NODE`, `unready`, `serving` (not ready), `terminating`
/// (serving), `gone` (terminating, not serving), `zone:ZONE` and `node:NODE` (hints).
pub fn endpoint(text: &str) -> Endpoint {
    let mut words = text.split_whitespace();
    let mut endpoint = Endpoint::ready(words.next().unwrap().parse().unwrap(), Arc::default());
    for word in words {
        let (ready, serving, terminating) = match word {
            "unready" => (false, false, false),
            "serving" => (false, true, false),
            "terminating" => (false, true, true),
            "gone" => (false, false, true),
            place => {
                let location = Arc::make_mut(&mut endpoint.location);
                let with = |hints: &[Arc<str>], hint: &str| hints.iter().cloned().chain([hint.into()]).collect();
                if let Some(node) = place.strip_prefix('@') {
                    location.node = Some(node.into());
                } else if let Some(zone) = place.strip_prefix("zone:") {
                    location.for_zones = with(&location.for_zones, zone);
                } else {
                    location.for_nodes = with(&location.for_nodes, place.strip_prefix("node:").unwrap());
                }
                continue;
            }
        };
        (endpoint.ready, endpoint.serving, endpoint.terminating) = (ready, serving, terminating);
    }
    endpoint
}

/// The slice `default/SERVICE-0` for the port without a name, target port 8080.
pub fn slice(service: &str, endpoints: &[&str]) -> EndpointSlice {
    named_slice(&format!("{service}-0"), service, &[("", 8080)], endpoints)
}

/// A slice with a name of its own, for named ports.
pub fn named_slice(name: &str, service: &str, ports: &[(&str, u16)], endpoints: &[&str]) -> EndpointSlice {
    EndpointSlice {
        key: ObjectKey::new("default", name),
        service: service.into(),
        ipv6: false,
        endpoints: endpoints.iter().map(|text| endpoint(text)).collect(),
        ports: ports
            .iter()
            .map(|(name, port)| EndpointPort::tcp(name, *port))
            .collect(),
    }
}

impl From<Service> for Object {
    fn from(service: Service) -> Self {
        Self::Service(Arc::new(service))
    }
}

impl From<EndpointSlice> for Object {
    fn from(slice: EndpointSlice) -> Self {
        Self::EndpointSlice(Arc::new(slice))
    }
}

impl From<Node> for Object {
    fn from(node: Node) -> Self {
        Self::Node(Arc::new(node))
    }
}

/// Creates a Service of type LoadBalancer with one port 80, restricted to `ranges` if there are any.
pub fn balanced(name: &str, ip: &str, balancer: &str, source_ranges: &[&str]) -> Service {
    Service {
        service_type: ServiceType::LoadBalancer,
        load_balancer_ips: Box::new([balancer.parse().unwrap()]),
        source_ranges: source_ranges.iter().map(|text| (*text).into()).collect(),
        ..service(name, ip)
    }
}

/// A Node.
pub fn node(name: &str, addresses: &[&str], pod_cidrs: &[&str]) -> Node {
    Node {
        name: name.into(),
        addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
        pod_cidrs: pod_cidrs.iter().map(|net| net.parse().unwrap()).collect(),
        zone: None,
        leaving: false,
    }
}

/// Identity of the IPv4 TCP port `name` of `default/SERVICE`.
pub fn id(service: &str, name: &str) -> PortId {
    PortId {
        service: ObjectKey::new("default", service),
        port_name: name.into(),
        protocol: Protocol::Tcp,
        ipv6: false,
    }
}

/// The key of a TCP frontend.
pub fn key(ip: &str, port: u16) -> FrontendKey {
    FrontendKey::new(ip.parse::<IpAddr>().unwrap().into(), port, 6)
}

/// All objects of a cluster, and those that the last batch contained.
#[derive(Debug, Clone, Default)]
pub struct Cluster {
    objects: BTreeMap<ObjectId, Object>,
    told: BTreeMap<ObjectId, Object>,
}

impl Cluster {
    /// Creates a cluster of these objects, none of which was delivered.
    pub fn of<const N: usize>(objects: [Object; N]) -> Self {
        let mut new = Self::default();
        objects.into_iter().for_each(|object| new.set(object));
        new
    }

    /// Adds or replaces an object.
    pub fn set(&mut self, object: impl Into<Object>) {
        let object = object.into();
        self.objects.insert(object.id(), object);
    }

    /// Removes an object.
    pub fn remove(&mut self, object: impl Into<Object>) {
        self.objects.remove(&object.into().id());
    }

    /// Removes `default/NAME`, not its slices.
    pub fn remove_service(&mut self, name: &str) {
        self.remove(service(name, "10.96.0.1"));
    }

    /// Returns the changes since the last call, from a complete source.
    pub fn batch(&mut self) -> Batch {
        let mut changes = Vec::new();
        for (id, object) in &self.objects {
            if self.told.get(id) != Some(object) {
                changes.push(Change::Set(object.clone()));
            }
        }
        let gone = self.told.keys().filter(|id| !self.objects.contains_key(*id));
        changes.extend(gone.cloned().map(Change::Remove));
        self.told = self.objects.clone();
        Batch::of(changes)
    }

    /// Returns the changes since the last call, from an incomplete source.
    pub fn incomplete(&mut self) -> Batch {
        Batch {
            complete: false,
            ..self.batch()
        }
    }

    /// Replaces the objects by those of another cluster.
    pub fn become_like(&mut self, other: &Self) {
        self.objects.clone_from(&other.objects);
    }

    /// Returns the cluster as after a restart, with nothing delivered.
    pub fn undelivered(&self) -> Self {
        Self {
            objects: self.objects.clone(),
            told: BTreeMap::new(),
        }
    }
}

/// Empty maps of [`ROOM`].
pub fn maps() -> FakeMaps {
    FakeMaps::new(ROOM)
}

/// An agent that starts with these maps.
pub fn start<M: Maps>(maps: M) -> Reconciler<M> {
    Reconciler::adopt(maps, NODE).unwrap()
}

/// Asserts that the maps agree with the desired state.
#[track_caller]
pub fn assert_clean<M: Maps>(lb: &Reconciler<M>) {
    let drifts = verify(lb.desired(), &lb.maps().dump().unwrap());
    assert!(drifts.is_empty(), "{drifts:#?}\nproblems: {:#?}", lb.problems());
}

/// Applies the changes, settles, and asserts that the maps agree with the desired state.
#[track_caller]
pub fn apply<M: Maps>(lb: &mut Reconciler<M>, cluster: &mut Cluster) {
    lb.apply(cluster.batch());
    lb.settle().unwrap();
    assert_clean(lb);
}

/// Returns the addresses that a connection to a cluster IP may get, by the maps; `None` if the destination is not a
/// frontend.
pub fn served(maps: &impl Maps, ip: &str, port: u16) -> Option<Vec<String>> {
    let dump = maps.dump().unwrap();
    let frontend = dump.frontends.get(&key(ip, port)).filter(|f| !f.is_mark())?;
    let word = dump.services[frontend.service.to_usize()].internal;
    let slots = &dump.slots[word.base as usize..][..usize::from(word.len)];
    Some(
        slots
            .iter()
            .map(|slot| format!("{}:{}", slot.addr, slot.port))
            .collect(),
    )
}
