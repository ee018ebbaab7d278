//! The desired content of the maps: service ports, backend sets and frontends, derived from Services and endpoints.
//! Pure.

use std::cmp::Ordering;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use lb_common::abi::{Addr, Frontend, FrontendKey, FrontendKind, ServiceIndex, Set, service_flags};

use crate::by_key::{ByKey, Keyed};
use crate::index::{Index, NodesBefore};
use crate::maps::prefix::{self, Prefix};
use crate::model::{
    Change, EndpointSlice, ObjectKey, Problem, ProblemKind, Protocol, Service, ServicePort, ServiceType,
};
use crate::nodes::{Nodes, TouchedNodes};
use crate::policy::{self, LocalNode, Member, Wanted};

/// The identity of a service index: one port of a Service in one family. It stays if the port number or the address
/// changes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortId {
    /// The Service.
    pub service: ObjectKey,
    /// Name of the port; empty if the only port has none.
    pub port_name: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// Family of the frontends.
    pub ipv6: bool,
}

impl fmt::Display for PortId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.ipv6 { "IPv6" } else { "IPv4" };
        match &*self.port_name {
            "" => write!(f, "{} {} {family}", self.service, self.protocol),
            name => write!(f, "{} port {name} {} {family}", self.service, self.protocol),
        }
    }
}

/// The three sets of a service port, in the order of [`lb_common::abi::Service`].
pub const SETS: [Set; 3] = [Set::Internal, Set::External, Set::Cluster];

/// One backend set.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DesiredSet {
    /// Members, sorted.
    pub members: Arc<[Member]>,
    /// Whether an empty set means DROP instead of REJECT.
    pub empty_drops: bool,
}

/// The desired content of the maps for one service port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DesiredPort {
    /// `spec.ports[].port`, host byte order.
    pub port: u16,
    /// `metadata.creationTimestamp` in seconds since 1970. Of two Services that claim a frontend, the older gets it.
    pub created: Option<i64>,
    /// [`lb_common::abi::service_flags`].
    pub flags: u32,
    /// In seconds; zero without affinity.
    pub affinity_timeout: u32,
    /// In the order of [`SETS`].
    pub sets: [DesiredSet; 3],
    /// Draining backends: in no set, but established connections to them go on.
    pub draining: Arc<[Member]>,
    /// Destinations that lead here, and the marks of their addresses; sorted.
    pub frontends: Box<[(FrontendKey, FrontendKind)]>,
    /// Clients that load-balancer addresses serve if [`Self::flags`] has `SOURCE_RANGES`: [`prefix::normal`] networks,
    /// sorted.
    pub source_ranges: Box<[IpNet]>,
}

impl DesiredPort {
    /// Returns whether there is any backend, in a set or draining.
    #[must_use]
    pub fn has_backends(&self) -> bool {
        !self.draining.is_empty() || self.sets.iter().any(|set| !set.members.is_empty())
    }
}

/// Returns whether lb serves a Service. It serves no ExternalName, no headless Service, and none of another proxy.
fn is_served(service: &Service) -> bool {
    !service.other_proxy && !service.headless_label && service.service_type != ServiceType::ExternalName
}

/// The answer to a load balancer on the `healthCheckNodePort` of a Service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HealthCheck {
    /// `spec.healthCheckNodePort`, host byte order.
    pub port: u16,
    /// Endpoints on this node that are ready, each address counted once.
    pub local_endpoints: usize,
}

/// Returns the health check of a Service, if it has one.
#[must_use]
pub fn health_check<'a>(
    service: &Service,
    slices: impl Iterator<Item = &'a EndpointSlice>,
    node: &str,
) -> Option<HealthCheck> {
    let port = service.health_check_node_port.filter(|_| is_served(service))?;
    let endpoints = slices.flat_map(|slice| &slice.endpoints);
    let local = endpoints.filter(|endpoint| endpoint.ready && endpoint.location.node.as_deref() == Some(node));
    let addresses: BTreeSet<IpAddr> = local.map(|endpoint| endpoint.address).collect();
    Some(HealthCheck {
        port,
        local_endpoints: addresses.len(),
    })
}

/// Returns the service ports of a Service; none if lb does not serve it.
#[must_use]
pub fn ports<'a>(
    service: &Service,
    slices: &(impl Iterator<Item = &'a EndpointSlice> + Clone),
    local_node: LocalNode<'_>,
) -> Vec<(PortId, DesiredPort)> {
    if !is_served(service) {
        return Vec::new();
    }
    // Without `..`, so that the compiler names this place for a new field. `is_served`, `frontends`, `SourceRanges` and
    // `health_check` read the fields that are ignored here.
    let Service {
        key,
        created,
        service_type: _,
        cluster_ips,
        external_ips: _,
        load_balancer_ips: _,
        source_ranges: _,
        ports,
        affinity_timeout,
        internal_policy,
        external_policy,
        other_proxy: _,
        headless_label: _,
        health_check_node_port: _,
    } = service;
    let mut all = Vec::new();
    for ipv6 in [false, true] {
        if !cluster_ips.iter().any(|ip| ip.is_ipv6() == ipv6) {
            continue;
        }
        let source_ranges = SourceRanges::of(service, ipv6);
        for port in ports {
            // The data plane has no hooks yet for SCTP.
            if port.protocol == Protocol::Sctp {
                continue;
            }
            let wanted = Wanted {
                port_name: &port.name,
                protocol: port.protocol,
                ipv6,
                node: local_node,
            };
            let endpoints = policy::categorize(slices.clone(), wanted);
            let set = |policy| {
                let (members, empty_drops) = endpoints.for_policy(policy);
                DesiredSet {
                    members: Arc::clone(members),
                    empty_drops,
                }
            };
            let mut sets = [
                set(*internal_policy),
                set(*external_policy),
                set(crate::model::TrafficPolicy::Cluster),
            ];
            share(&mut sets);
            let id = PortId {
                service: key.clone(),
                port_name: Arc::clone(&port.name),
                protocol: port.protocol,
                ipv6,
            };
            let desired = DesiredPort {
                port: port.port,
                created: *created,
                flags: flags(*affinity_timeout, &source_ranges),
                affinity_timeout: affinity_timeout.unwrap_or(0),
                sets,
                draining: Arc::clone(&endpoints.draining),
                frontends: frontends(service, port, ipv6, &source_ranges),
                source_ranges: source_ranges.admitted(),
            };
            all.push((id, desired));
        }
    }
    all
}

/// The clients that the load-balancer addresses of a Service serve in one family.
#[derive(Debug, Clone, PartialEq, Eq)]
enum SourceRanges {
    Everybody,
    Only(Box<[IpNet]>),
}

impl SourceRanges {
    /// Reads `spec.loadBalancerSourceRanges`. As in kube-proxy, ranges of the other family are no restriction, and
    /// neither is a range that covers all addresses. But an invalid range restricts, and admits no client: in the
    /// family that its notation suggests, or in both if it suggests none.
    fn of(service: &Service, ipv6: bool) -> Self {
        let mut restricted = false;
        let mut admitted = BTreeSet::new();
        for text in &service.source_ranges {
            match text.parse().map(prefix::normal) {
                Ok(net) if net.addr().is_ipv6() != ipv6 => continue,
                Ok(net) if net.prefix_len() == 0 => return Self::Everybody,
                Ok(net) => drop(admitted.insert(net)),
                Err(_) if text.contains(if ipv6 { '.' } else { ':' }) => continue,
                Err(_) => {}
            }
            restricted = true;
        }
        if restricted {
            Self::Only(admitted.into_iter().collect())
        } else {
            Self::Everybody
        }
    }

    fn admitted(&self) -> Box<[IpNet]> {
        match self {
            Self::Everybody => Box::default(),
            Self::Only(networks) => networks.clone(),
        }
    }
}

/// Returns the invalid entries of `spec.loadBalancerSourceRanges` of a Service.
#[must_use]
pub fn wrong_source_ranges(service: &Service) -> Vec<Arc<str>> {
    let ranges = service.source_ranges.iter().filter(|_| is_served(service));
    ranges.filter(|text| text.parse::<IpNet>().is_err()).cloned().collect()
}

/// Returns the [`service_flags`] of a Service in one family.
fn flags(affinity_timeout: Option<u32>, source_ranges: &SourceRanges) -> u32 {
    let affinity = affinity_timeout.map_or(0, |_| service_flags::AFFINITY);
    affinity
        | match source_ranges {
            SourceRanges::Everybody => 0,
            SourceRanges::Only(_) => service_flags::SOURCE_RANGES,
        }
}

/// Returns the destinations that lead to a port of a Service in one family, sorted by key and without duplicates.
///
/// An address that several fields name has one kind: cluster IP before external before load balancer. But with
/// `loadBalancerSourceRanges`, which are access control, it is a load-balancer address whatever else names it, so that the
/// ranges hold there. Of marks, that of a cluster IP comes first.
fn frontends(
    service: &Service,
    port: &ServicePort,
    ipv6: bool,
    source_ranges: &SourceRanges,
) -> Box<[(FrontendKey, FrontendKind)]> {
    let key = |addr, number| FrontendKey::new(addr, number, port.protocol as u8);
    let of_family = |ips: &[IpAddr], kind| -> Vec<_> {
        let ips = ips.iter().filter(|ip| ip.is_ipv6() == ipv6);
        ips.map(|ip| (key(Addr::from(*ip), port.port), kind)).collect()
    };
    let mut all = of_family(&service.cluster_ips, FrontendKind::ClusterIp);
    all.extend(of_family(&service.external_ips, FrontendKind::ExternalIp));
    all.extend(of_family(&service.load_balancer_ips, FrontendKind::LoadBalancer));
    let marks = all.iter().map(|(key, kind)| {
        let mark = match kind {
            FrontendKind::ClusterIp => FrontendKind::Address,
            FrontendKind::NodePort
            | FrontendKind::ExternalIp
            | FrontendKind::LoadBalancer
            | FrontendKind::Address
            | FrontendKind::ExternalAddress => FrontendKind::ExternalAddress,
        };
        (FrontendKey::address_mark(key.addr), mark)
    });
    all.extend(marks.collect::<Vec<_>>());
    let unspecified = if ipv6 {
        IpAddr::from(Ipv6Addr::UNSPECIFIED)
    } else {
        IpAddr::from(Ipv4Addr::UNSPECIFIED)
    };
    let node_port = port.node_port.map(|number| key(Addr::from(unspecified), number));
    all.extend(node_port.map(|key| (key, FrontendKind::NodePort)));
    let is_restricted = matches!(source_ranges, SourceRanges::Only(_));
    let yields = |kind| !(is_restricted && kind == FrontendKind::LoadBalancer);
    all.sort_unstable_by_key(|(key, kind)| (*key, yields(*kind), *kind));
    all.dedup_by_key(|(key, _)| *key);
    all.into()
}

/// Makes sets with the same members share their memory here, and so their slots in the map.
fn share(sets: &mut [DesiredSet; 3]) {
    for i in 1..sets.len() {
        if let Some(same) = sets[..i].iter().find(|set| set.members == sets[i].members) {
            sets[i].members = Arc::clone(&same.members);
        }
    }
}

/// The claim of a service port to a frontend. Claims are ordered by precedence: the older first, one without a time
/// stamp last, then by namespace, name and port. An address that is a cluster IP of any Service is marked as one.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Claim {
    /// Seconds since 1970.
    created: i64,
    id: Arc<PortId>,
    kind: FrontendKind,
}

impl Ord for Claim {
    fn cmp(&self, other: &Self) -> Ordering {
        let rank = |claim: &Self| (claim.kind == FrontendKind::ExternalAddress, claim.created);
        let by_age = rank(self).cmp(&rank(other));
        by_age.then_with(|| (&self.id, self.kind).cmp(&(&other.id, other.kind)))
    }
}

impl PartialOrd for Claim {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Service ports, frontends and networks that a change of [`Desired`] touched.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Touched {
    /// Service ports that are new, different or removed.
    pub ports: BTreeSet<Arc<PortId>>,
    /// Frontends with changed claims.
    pub frontends: BTreeSet<FrontendKey>,
    /// Keys of CLUSTER_CIDRS that are new, different or removed.
    pub cidrs: BTreeSet<Prefix<Addr>>,
}

impl Touched {
    /// Adds the addresses and networks that a change of [`Nodes`] touched.
    pub(crate) fn nodes(&mut self, changed: TouchedNodes) {
        let TouchedNodes { addresses, cidrs } = changed;
        self.frontends
            .extend(addresses.into_iter().map(FrontendKey::address_mark));
        self.cidrs.extend(cidrs);
    }
}

/// The inputs of the maps of a node that are not objects.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Site {
    /// Name of the Node.
    pub node: String,
    /// Networks inside the cluster, in addition to the addresses and the pods of this node.
    pub inside: Vec<IpNet>,
    /// Addresses of this node's devices.
    pub addresses: BTreeSet<Addr>,
}

/// The ports of one Service, at least one.
#[derive(Debug)]
struct ServicePorts {
    first: (Arc<PortId>, DesiredPort),
    more: Box<[(Arc<PortId>, DesiredPort)]>,
}

impl Keyed for ServicePorts {
    fn key(&self) -> &ObjectKey {
        &self.first.0.service
    }
}

impl ServicePorts {
    fn all(&self) -> impl Iterator<Item = &(Arc<PortId>, DesiredPort)> {
        std::iter::once(&self.first).chain(&self.more)
    }
}

/// All service ports, and their claims to frontends.
#[derive(Debug, Default)]
pub struct Desired {
    services: HashSet<ByKey<Box<ServicePorts>>>,
    /// The claim that gets each frontend.
    claims: BTreeMap<FrontendKey, Claim>,
    /// The other claims to each frontend, in the order of precedence. Most frontends have one claim and no list here.
    others: BTreeMap<FrontendKey, Vec<Claim>>,
    /// Frontends (no marks) with more than one claim.
    contested: BTreeSet<FrontendKey>,
    nodes: Nodes,
}

impl Desired {
    /// Creates the desired state without objects. `inside`: networks that are inside the cluster.
    #[must_use]
    pub(crate) fn new(inside: &[IpNet]) -> Self {
        Self {
            nodes: Nodes::new(inside),
            ..Self::default()
        }
    }

    /// Computes the desired state of a set of objects.
    #[must_use]
    pub fn of(objects: impl IntoIterator<Item = Change>, site: Site) -> Self {
        let Site {
            node,
            inside,
            addresses,
        } = site;
        let mut index = Index::default();
        let mut new = Self::new(&inside);
        let mut touched = Touched::default();
        new.set_addresses(addresses, &mut touched);
        let objects = index.apply(objects);
        new.update_nodes(&objects.nodes, &index, &node, &mut touched);
        let local_node = index.local_node(&node);
        for key in objects.services {
            if let Some(service) = index.service(&key) {
                let ports = ports(service, &index.slices(&key), local_node);
                new.update(&key, ports, &mut touched);
            }
        }
        new
    }

    /// Replaces the addresses of this node's devices.
    pub fn set_addresses(&mut self, own: BTreeSet<Addr>, touched: &mut Touched) {
        let mut changed = TouchedNodes::default();
        self.nodes.set_own(own, &mut changed);
        touched.nodes(changed);
    }

    /// Applies changes of Nodes. `before`: the Nodes that changed, as they were before the change.
    pub(crate) fn update_nodes(&mut self, before: &NodesBefore, index: &Index, own: &str, touched: &mut Touched) {
        let mut changed = TouchedNodes::default();
        for (name, before) in before {
            self.nodes
                .update(before.as_deref(), index.node(name), **name == *own, &mut changed);
        }
        touched.nodes(changed);
    }

    /// Returns the addresses and networks of nodes.
    #[must_use]
    pub fn nodes(&self) -> &Nodes {
        &self.nodes
    }

    /// Rebuilds the tree of claims in as few tree nodes as possible: a tree that grew in ascending order is half empty.
    pub(crate) fn compact(&mut self) {
        self.claims = std::mem::take(&mut self.claims).into_iter().collect();
    }

    /// Replaces the ports of a Service, and adds the ports and frontends that differ to `touched`.
    pub fn update(&mut self, service: &ObjectKey, ports: Vec<(PortId, DesiredPort)>, touched: &mut Touched) {
        let mut before = Vec::new();
        if let Some(ByKey(known)) = self.services.take(service) {
            before.push(known.first);
            before.extend(known.more);
        }
        let mut now = Vec::with_capacity(ports.len());
        for (id, new) in ports {
            let (id, old) = match before.iter().position(|(known, _)| **known == id) {
                Some(known) => {
                    let (id, old) = before.swap_remove(known);
                    (id, Some(old))
                }
                None => (Arc::new(id), None),
            };
            if old.as_ref() != Some(&new) {
                let same = |old: &DesiredPort| old.frontends == new.frontends && old.created == new.created;
                if !old.as_ref().is_some_and(same) {
                    if let Some(old) = &old {
                        self.unclaim(&id, &old.frontends, touched);
                    }
                    self.claim(&id, &new, touched);
                }
                touched.ports.insert(Arc::clone(&id));
            }
            now.push((id, new));
        }
        for (id, old) in before {
            self.unclaim(&id, &old.frontends, touched);
            touched.ports.insert(id);
        }
        let mut now = now.into_iter();
        if let Some(first) = now.next() {
            let more = now.collect();
            self.services.insert(ByKey(Box::new(ServicePorts { first, more })));
        }
    }

    fn claim(&mut self, id: &Arc<PortId>, port: &DesiredPort, touched: &mut Touched) {
        for (key, kind) in &port.frontends {
            let claim = Claim {
                created: port.created.unwrap_or(i64::MAX),
                id: Arc::clone(id),
                kind: *kind,
            };
            match self.claims.entry(*key) {
                Entry::Vacant(nobody) => {
                    nobody.insert(claim);
                }
                Entry::Occupied(mut holder) => {
                    let later = if claim < *holder.get() {
                        holder.insert(claim)
                    } else {
                        claim
                    };
                    let others = self.others.entry(*key).or_default();
                    others.insert(others.partition_point(|other| *other < later), later);
                    if !kind.is_mark() {
                        self.contested.insert(*key);
                    }
                }
            }
            touched.frontends.insert(*key);
        }
    }

    fn unclaim(&mut self, id: &Arc<PortId>, frontends: &[(FrontendKey, FrontendKind)], touched: &mut Touched) {
        for (key, kind) in frontends {
            let is_it = |claim: &Claim| claim.id == *id && claim.kind == *kind;
            let mut others = self.others.remove(key).unwrap_or_default();
            if self.claims.get(key).is_some_and(is_it) {
                self.claims.remove(key);
                if !others.is_empty() {
                    self.claims.insert(*key, others.remove(0));
                }
            } else {
                others.retain(|claim| !is_it(claim));
            }
            if others.is_empty() {
                self.contested.remove(key);
            } else {
                self.others.insert(*key, others);
            }
            touched.frontends.insert(*key);
        }
    }

    /// Returns a service port.
    #[must_use]
    pub fn port(&self, id: &PortId) -> Option<&DesiredPort> {
        self.entry(id).map(|(_, port)| port)
    }

    fn entry(&self, id: &PortId) -> Option<&(Arc<PortId>, DesiredPort)> {
        let mut all = self.services.get(&id.service)?.0.all();
        all.find(|(known, _)| **known == *id)
    }

    /// Returns the shared form of an identity, if the service port is known.
    #[must_use]
    pub fn shared_id(&self, id: &PortId) -> Option<&Arc<PortId>> {
        self.entry(id).map(|(id, _)| id)
    }

    /// Returns all service ports.
    pub fn ports(&self) -> impl Iterator<Item = (&Arc<PortId>, &DesiredPort)> {
        let all = self.services.iter().flat_map(|service| service.0.all());
        all.map(|(id, port)| (id, port))
    }

    /// Returns all frontends that have a claim.
    pub fn frontends(&self) -> impl Iterator<Item = FrontendKey> {
        self.claims.keys().copied()
    }

    /// Returns the value of a frontend, by the first claim of a service port that has an index by `index_of`. An address of
    /// a node is not marked as external: its other ports belong to that node.
    pub fn frontend(&self, key: &FrontendKey, index_of: impl Fn(&PortId) -> Option<ServiceIndex>) -> Option<Frontend> {
        self.claims(key).find_map(|claim| {
            let index = index_of(&claim.id)?;
            match claim.kind {
                FrontendKind::ExternalAddress if self.nodes.have(key.addr) => None,
                kind if kind.is_mark() => Some(Frontend::mark(kind)),
                kind => Some(Frontend::new(index, kind)),
            }
        })
    }

    /// Returns the claims to a frontend, in the order of precedence.
    fn claims(&self, key: &FrontendKey) -> impl Iterator<Item = &Claim> {
        self.claims
            .get(key)
            .into_iter()
            .chain(self.others.get(key).into_iter().flatten())
    }

    /// Returns the Service that gets a frontend.
    #[must_use]
    pub fn owner(&self, key: &FrontendKey) -> Option<&ObjectKey> {
        self.claims.get(key).map(|claim| &claim.id.service)
    }

    /// Returns a problem for each claim that loses to an older one.
    #[must_use]
    pub fn conflicts(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        for key in &self.contested {
            let mut claims = self.claims(key);
            let Some(winner) = claims.next() else { continue };
            problems.extend(claims.map(|loser| {
                let (addr, port, older) = (key.addr, key.port, &winner.id.service);
                let message = format!("{addr}:{port} is served for the older Service {older}");
                Problem::new(format!("Service {}", loser.id), message)
                    .of(&loser.id.service)
                    .kind(ProblemKind::Conflict)
            }));
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> PortId {
        PortId {
            service: ObjectKey::new("default", name),
            port_name: "".into(),
            protocol: Protocol::Tcp,
            ipv6: false,
        }
    }

    fn key(port: u16) -> FrontendKey {
        FrontendKey::new(IpAddr::from([10, 96, 0, 1]).into(), port, 6)
    }

    fn port(created: Option<i64>, frontends: &[u16]) -> DesiredPort {
        let mark = (FrontendKey::address_mark(key(0).addr), FrontendKind::Address);
        DesiredPort {
            port: 80,
            created,
            flags: 0,
            affinity_timeout: 0,
            sets: Default::default(),
            draining: Arc::default(),
            source_ranges: Box::default(),
            frontends: [mark]
                .into_iter()
                .chain(frontends.iter().map(|p| (key(*p), FrontendKind::ClusterIp)))
                .collect(),
        }
    }

    fn update(desired: &mut Desired, name: &str, ports: Vec<(PortId, DesiredPort)>) -> Touched {
        let mut touched = Touched::default();
        desired.update(&ObjectKey::new("default", name), ports, &mut touched);
        touched
    }

    fn winner(desired: &Desired, port: u16) -> Option<u32> {
        let index = |id: &PortId| Some(ServiceIndex::new(id.service.name.as_bytes()[0].into()));
        desired.frontend(&key(port), index).map(|f| f.service.get())
    }

    #[test]
    fn the_older_claim_wins_and_the_other_is_a_problem() {
        let mut desired = Desired::default();
        update(&mut desired, "b", vec![(id("b"), port(Some(10), &[80]))]);
        update(&mut desired, "a", vec![(id("a"), port(None, &[80]))]);
        assert_eq!(winner(&desired, 80), Some(u32::from(b'b')));
        assert_eq!(desired.conflicts().len(), 1);
        assert!(
            desired.conflicts()[0]
                .to_string()
                .contains("Service default/a TCP IPv4: 10.96.0.1:80")
        );
        update(&mut desired, "c", vec![(id("c"), port(Some(5), &[80]))]);
        assert_eq!(winner(&desired, 80), Some(u32::from(b'c')));
        let gone = update(&mut desired, "c", Vec::new());
        assert_eq!(gone.frontends.len(), 2, "frontend and mark");
        assert_eq!(winner(&desired, 80), Some(u32::from(b'b')));
        update(&mut desired, "b", Vec::new());
        assert!(desired.conflicts().is_empty());
        assert_eq!(winner(&desired, 80), Some(u32::from(b'a')));
        update(&mut desired, "a", Vec::new());
        assert_eq!(winner(&desired, 80), None);
        assert_eq!(desired.frontends().count(), 0);
    }

    #[test]
    fn a_claimant_without_an_index_is_passed_over() {
        let mut desired = Desired::default();
        update(&mut desired, "a", vec![(id("a"), port(Some(1), &[80]))]);
        update(&mut desired, "b", vec![(id("b"), port(Some(2), &[80]))]);
        let index = ServiceIndex::new(7);
        let only_b = |id: &PortId| (&*id.service.name == "b").then_some(index);
        assert_eq!(
            desired.frontend(&key(80), only_b),
            Some(Frontend::new(index, FrontendKind::ClusterIp))
        );
    }

    #[test]
    fn an_unchanged_update_touches_nothing() {
        let mut desired = Desired::default();
        update(&mut desired, "a", vec![(id("a"), port(Some(1), &[80]))]);
        assert_eq!(
            update(&mut desired, "a", vec![(id("a"), port(Some(1), &[80]))]),
            Touched::default()
        );
        let mut other = port(Some(1), &[80]);
        other.affinity_timeout = 5;
        let touched = update(&mut desired, "a", vec![(id("a"), other)]);
        assert_eq!((touched.ports.len(), touched.frontends.len()), (1, 0));
        let touched = update(&mut desired, "a", vec![(id("a"), port(Some(1), &[81]))]);
        assert_eq!(touched.frontends.len(), 3, "80, 81 and the mark");
    }

    #[test]
    fn source_ranges_hold_at_an_address_that_other_fields_name_too() {
        let local_node = LocalNode { node: "n1", zone: None };
        let kind_at = |ip: [u8; 4], service: &Service| {
            let ports = ports(service, &std::iter::empty(), local_node);
            let key = FrontendKey::new(IpAddr::from(ip).into(), 80, Protocol::Tcp as u8);
            let mut frontends = ports[0].1.frontends.iter();
            frontends.find(|(known, _)| *known == key).map(|(_, kind)| *kind)
        };
        let (cluster, public, external) = ([10, 96, 0, 1], [203, 0, 113, 9], [203, 0, 113, 10]);
        let mut service = Service {
            service_type: ServiceType::LoadBalancer,
            cluster_ips: Box::new([cluster.into()]),
            external_ips: Box::new([public.into(), external.into()]),
            load_balancer_ips: Box::new([cluster.into(), public.into()]),
            ports: Box::new([ServicePort::tcp("", 80)]),
            source_ranges: Box::new(["192.0.2.0/24".into()]),
            ..Service::new(ObjectKey::new("default", "web"))
        };
        assert_eq!(kind_at(public, &service), Some(FrontendKind::LoadBalancer));
        assert_eq!(kind_at(cluster, &service), Some(FrontendKind::LoadBalancer));
        assert_eq!(kind_at(external, &service), Some(FrontendKind::ExternalIp));
        let mark = FrontendKey::address_mark(IpAddr::from(cluster).into());
        let all = ports(&service, &std::iter::empty(), local_node);
        assert!(all[0].1.frontends.contains(&(mark, FrontendKind::Address)));

        service.source_ranges = Box::default();
        assert_eq!(kind_at(cluster, &service), Some(FrontendKind::ClusterIp));
        assert_eq!(kind_at(public, &service), Some(FrontendKind::ExternalIp));
    }

    #[test]
    fn sets_with_the_same_members_share_them() {
        let member = |n| Member {
            addr: IpAddr::from([10, 0, 0, n]),
            port: 1,
            local: false,
        };
        let set = |n| DesiredSet {
            members: Arc::from([member(n)]),
            empty_drops: false,
        };
        let mut sets = [set(1), set(2), set(1)];
        share(&mut sets);
        assert!(Arc::ptr_eq(&sets[0].members, &sets[2].members));
        assert!(!Arc::ptr_eq(&sets[0].members, &sets[1].members));
    }
}
