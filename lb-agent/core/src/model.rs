//! The fields of Kubernetes API objects that lb uses.
//!
//! `source` parses and validates objects into these types, and `index` relates them to each other. Everything in them
//! has been validated: ports, if present, are in 1..=65535, addresses are valid, and names are not empty and at most 63
//! bytes long (253 for nodes and slices).

mod endpoints;

use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use ipnet::IpNet;
use lb_common::abi::ip_protocol;

pub use self::endpoints::Endpoints;
use crate::intern;

/// Namespace and name of an object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// `metadata.namespace`; `default` if a manifest has none; empty for cluster-scoped kinds.
    pub namespace: Arc<str>,
    /// `metadata.name`.
    pub name: Arc<str>,
}

impl ObjectKey {
    /// Creates a key from borrowed parts.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: intern::text(namespace),
            name: name.into(),
        }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            f.write_str(&self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

/// Transport protocol of a Service port. The discriminants are IANA protocol numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Protocol {
    /// Transmission Control Protocol.
    Tcp = ip_protocol::TCP,
    /// User Datagram Protocol.
    Udp = ip_protocol::UDP,
    /// Stream Control Transmission Protocol.
    Sctp = ip_protocol::SCTP,
}

impl Protocol {
    /// Returns the protocol of an IANA number.
    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            ip_protocol::TCP => Some(Self::Tcp),
            ip_protocol::UDP => Some(Self::Udp),
            ip_protocol::SCTP => Some(Self::Sctp),
            _ => None,
        }
    }

    /// Returns the name that manifests use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }

    /// Returns the name of an IANA number; a question mark if Services cannot have that protocol.
    pub fn name_of(number: u8) -> &'static str {
        Self::from_number(number).map_or("?", Self::name)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// `spec.type` of a Service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServiceType {
    /// Reachable in the cluster only.
    ClusterIp,
    /// Also on a port of every node.
    NodePort,
    /// Also on addresses of a load balancer.
    LoadBalancer,
    /// A DNS alias, which proxies ignore.
    ExternalName,
}

/// `internalTrafficPolicy` and `externalTrafficPolicy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TrafficPolicy {
    /// Every usable endpoint of the cluster.
    #[default]
    Cluster,
    /// Endpoints of this node only.
    Local,
}

/// One entry of `spec.ports` of a Service.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ServicePort {
    /// `name`; empty if the only port has none.
    pub name: Arc<str>,
    /// `protocol`, TCP by default.
    pub protocol: Protocol,
    /// `port`, host byte order.
    pub port: u16,
    /// `nodePort`, host byte order, of types NodePort and LoadBalancer.
    pub node_port: Option<u16>,
}

impl ServicePort {
    /// Creates a TCP port without a node port.
    #[must_use]
    pub fn tcp(name: &str, port: u16) -> Self {
        Self {
            name: intern::text(name),
            protocol: Protocol::Tcp,
            port,
            node_port: None,
        }
    }

    /// Returns the one copy of these ports that all Services of the process share. Ports with a node port have no copy, since no
    /// other Service has that node port.
    #[must_use]
    pub fn shared(ports: Vec<Self>) -> Arc<[Self]> {
        static PORTS: LazyLock<Mutex<intern::Table<[ServicePort]>>> = LazyLock::new(Mutex::default);
        if ports.iter().any(|port| port.node_port.is_some()) {
            return ports.into();
        }
        PORTS.lock().unwrap_or_else(PoisonError::into_inner).share(ports)
    }
}

/// A Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Namespace and name.
    pub key: ObjectKey,
    /// `metadata.creationTimestamp` in seconds since 1970. Of two Services that claim one address, the older gets it.
    pub created: Option<i64>,
    /// `spec.type`.
    pub service_type: ServiceType,
    /// `spec.clusterIPs` (or `clusterIP`); empty if the Service is headless.
    pub cluster_ips: Box<[IpAddr]>,
    /// `spec.externalIPs`.
    pub external_ips: Box<[IpAddr]>,
    /// `status.loadBalancer.ingress[].ip` of type LoadBalancer, without those that have `ipMode: Proxy`.
    pub load_balancer_ips: Box<[IpAddr]>,
    /// `spec.loadBalancerSourceRanges` of type LoadBalancer, as written except for surrounding blanks. They may be
    /// invalid.
    pub source_ranges: Box<[Arc<str>]>,
    /// `spec.ports`, in the order of the object, shared with other Services. Names are distinct, and so are (protocol, port) pairs.
    pub ports: Arc<[ServicePort]>,
    /// `spec.sessionAffinity: ClientIP` with its timeout in seconds (1..=86400).
    pub affinity_timeout: Option<u32>,
    /// `spec.internalTrafficPolicy`.
    pub internal_policy: TrafficPolicy,
    /// `spec.externalTrafficPolicy`.
    pub external_policy: TrafficPolicy,
    /// Whether label `service.kubernetes.io/service-proxy-name` is present: another proxy serves the Service.
    pub other_proxy: bool,
    /// Whether label `service.kubernetes.io/headless` is present.
    pub headless_label: bool,
    /// `spec.healthCheckNodePort`, host byte order, of type LoadBalancer with `externalTrafficPolicy: Local`.
    pub health_check_node_port: Option<u16>,
}

impl Service {
    /// Creates a Service of type ClusterIP with the API's defaults, without addresses and ports.
    #[must_use]
    pub fn new(key: ObjectKey) -> Self {
        Self {
            key,
            created: None,
            service_type: ServiceType::ClusterIp,
            cluster_ips: Box::default(),
            external_ips: Box::default(),
            load_balancer_ips: Box::default(),
            source_ranges: Box::default(),
            ports: Arc::default(),
            affinity_timeout: None,
            internal_policy: TrafficPolicy::Cluster,
            external_policy: TrafficPolicy::Cluster,
            other_proxy: false,
            headless_label: false,
            health_check_node_port: None,
        }
    }
}

/// One entry of `endpoints` of an EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// The first of `addresses`; proxies ignore the others.
    pub address: IpAddr,
    /// `conditions.ready`; unset means true.
    pub ready: bool,
    /// `conditions.serving`; unset means the value of `ready`.
    pub serving: bool,
    /// `conditions.terminating`; unset means false.
    pub terminating: bool,
    /// Node and topology hints. Shared: there are far fewer locations than endpoints.
    pub location: Arc<EndpointLocation>,
}

impl Endpoint {
    /// Creates an endpoint that is ready.
    #[must_use]
    pub fn ready(address: IpAddr, location: Arc<EndpointLocation>) -> Self {
        Self {
            address,
            ready: true,
            serving: true,
            terminating: false,
            location,
        }
    }
}

/// The node of an endpoint, and its topology hints: zones and nodes with clients that should use it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct EndpointLocation {
    /// `nodeName`.
    pub node: Option<Box<str>>,
    /// `hints.forZones`, sorted: zones with clients that should use it.
    pub for_zones: Box<[Arc<str>]>,
    /// `hints.forNodes`, sorted: nodes with clients that should use it.
    pub for_nodes: Box<[Arc<str>]>,
}

impl EndpointLocation {
    /// Creates the location of an endpoint on a node, without hints.
    #[must_use]
    pub fn on(node: &str) -> Self {
        Self {
            node: Some(node.into()),
            ..Self::default()
        }
    }

    /// Returns the one copy of this location that all endpoints of the process share.
    #[must_use]
    pub fn shared(self) -> Arc<Self> {
        static LOCATIONS: LazyLock<Mutex<intern::Table<EndpointLocation>>> = LazyLock::new(Mutex::default);
        LOCATIONS.lock().unwrap_or_else(PoisonError::into_inner).share(self)
    }
}

/// One entry of `ports` of an EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct EndpointPort {
    /// `name`: the name of the Service port that it belongs to.
    pub name: Arc<str>,
    /// `protocol`, TCP by default.
    pub protocol: Protocol,
    /// `port`, host byte order; `None` (all ports) is never used by a proxy.
    pub port: Option<u16>,
}

impl EndpointPort {
    /// Creates a TCP port.
    #[must_use]
    pub fn tcp(name: &str, port: u16) -> Self {
        Self {
            name: intern::text(name),
            protocol: Protocol::Tcp,
            port: Some(port),
        }
    }

    /// Returns the one copy of these ports that all EndpointSlices of the process share.
    #[must_use]
    pub fn shared(ports: Vec<Self>) -> Arc<[Self]> {
        static PORTS: LazyLock<Mutex<intern::Table<[EndpointPort]>>> = LazyLock::new(Mutex::default);
        PORTS.lock().unwrap_or_else(PoisonError::into_inner).share(ports)
    }
}

/// An EndpointSlice of address type IPv4 or IPv6 (FQDN slices are ignored by `source`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Namespace and name.
    pub key: ObjectKey,
    /// Label `kubernetes.io/service-name`: the Service of the same namespace that it belongs to.
    pub service: Arc<str>,
    /// Whether `addressType` is IPv6.
    pub ipv6: bool,
    /// `endpoints`, in the order of the object.
    pub endpoints: Endpoints,
    /// `ports`, shared with other slices.
    pub ports: Arc<[EndpointPort]>,
}

impl EndpointSlice {
    /// Returns the key of the Service that the slice belongs to.
    #[must_use]
    pub fn service_key(&self) -> ObjectKey {
        ObjectKey {
            namespace: Arc::clone(&self.key.namespace),
            name: Arc::clone(&self.service),
        }
    }
}

/// A Node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// `metadata.name`.
    pub name: Arc<str>,
    /// `status.addresses` of types InternalIP and ExternalIP.
    pub addresses: Vec<IpAddr>,
    /// `spec.podCIDRs` (or `podCIDR`).
    pub pod_cidrs: Vec<IpNet>,
    /// Label `topology.kubernetes.io/zone`.
    pub zone: Option<Arc<str>>,
    /// Whether the Node is being deleted, or the cluster autoscaler is about to delete it (taint
    /// `ToBeDeletedByClusterAutoscaler`).
    pub leaving: bool,
}

/// An object of one of the kinds that lb reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Object {
    /// `v1` Service.
    Service(Arc<Service>),
    /// `discovery.k8s.io/v1` EndpointSlice.
    EndpointSlice(Arc<EndpointSlice>),
    /// `v1` Node.
    Node(Arc<Node>),
}

/// Identity of an object: kind, and namespace and name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId {
    /// Kind of the object.
    pub kind: Kind,
    /// Namespace (empty for Node) and name.
    pub key: ObjectKey,
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}", self.kind, self.key)
    }
}

/// The kinds of objects that lb reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `v1` Service.
    Service,
    /// `discovery.k8s.io/v1` EndpointSlice.
    EndpointSlice,
    /// `v1` Node.
    Node,
}

impl Object {
    /// Returns the object's identity.
    #[must_use]
    pub fn id(&self) -> ObjectId {
        match self {
            Self::Service(o) => ObjectId {
                kind: Kind::Service,
                key: o.key.clone(),
            },
            Self::EndpointSlice(o) => ObjectId {
                kind: Kind::EndpointSlice,
                key: o.key.clone(),
            },
            Self::Node(o) => ObjectId {
                kind: Kind::Node,
                key: ObjectKey::new("", &o.name),
            },
        }
    }
}

/// One change of one object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The object is new or has changed.
    Set(Object),
    /// The object was removed.
    Remove(ObjectId),
}

/// Category of a problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum ProblemKind {
    /// The source, or an object in it, could not be read or is invalid.
    #[default]
    Source,
    /// Two Services claim the same address and port.
    Conflict,
    /// A write to the maps failed.
    Map,
    /// Addresses or settings of the node.
    Node,
    /// Sockets of removed backends.
    Sockets,
    /// A `healthCheckNodePort` is not served.
    HealthCheck,
    /// One of the agent's own servers does not listen.
    Server,
}

impl ProblemKind {
    /// All kinds of problems.
    pub const ALL: [Self; 7] = [
        Self::Source,
        Self::Conflict,
        Self::Map,
        Self::Node,
        Self::Sockets,
        Self::HealthCheck,
        Self::Server,
    ];

    /// Returns the label of the metric `lb_problems`.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Conflict => "conflict",
            Self::Map => "map",
            Self::Node => "node",
            Self::Sockets => "sockets",
            Self::HealthCheck => "health_check",
            Self::Server => "server",
        }
    }
}

/// A problem, reported to the operator by the log, `status` and a metric.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Location: a file with the document's number and line, or an API object.
    pub place: String,
    /// The field, and what is wrong with it.
    pub message: String,
    /// The Service that gets an Event, if the problem belongs to one.
    pub service: Option<ObjectKey>,
    /// Category, by which a metric counts problems.
    pub kind: ProblemKind,
}

impl Problem {
    /// Creates a problem of the source that belongs to no Service.
    #[must_use]
    pub fn new(place: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            place: place.into(),
            message: message.into(),
            service: None,
            kind: ProblemKind::default(),
        }
    }

    /// Sets the category.
    #[must_use]
    pub fn kind(mut self, kind: ProblemKind) -> Self {
        self.kind = kind;
        self
    }

    /// Sets the Service that gets an Event.
    #[must_use]
    pub fn of(mut self, service: &ObjectKey) -> Self {
        self.service = Some(service.clone());
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.message)
    }
}

/// The changes that a source delivers at once. They are applied as a whole.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Changes since the last batch; at most one per object.
    pub changes: Vec<Change>,
    /// Whether the source has delivered all of its objects at least once. Until then nothing that is pinned from an
    /// earlier run is removed.
    pub complete: bool,
    /// All present problems, not only new ones.
    pub problems: Vec<Problem>,
    /// Arrival time of the first change; unset if that has no meaning (a first list, a manifest).
    pub received: Option<Instant>,
    /// Times of the events that led to the changes, by the annotation
    /// `endpoints.kubernetes.io/last-change-trigger-time` of EndpointSlices: one for each slice that has it.
    pub triggers: Vec<SystemTime>,
}

impl Batch {
    /// Creates a complete batch without problems.
    #[must_use]
    pub fn of(changes: Vec<Change>) -> Self {
        Self {
            changes,
            complete: true,
            ..Self::default()
        }
    }
}
