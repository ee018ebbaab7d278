//! The desired content of the maps: the service ports of all Services, and which of them gets each frontend. Pure.

mod per_set;
mod ports;

use std::cmp::Ordering;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use ipnet::IpNet;
use lb_common::abi::{Addr, Frontend, FrontendKey, FrontendKind, Service, ServiceIndex};
use lb_common::logic::selection::set_in_frontend;

use crate::by_key::{ByKey, Keyed};
use crate::index::{Index, NodesBefore};
use crate::maps::prefix::Prefix;
use crate::model::{Change, ObjectKey, Problem, ProblemKind};
use crate::names::PortId;
use crate::nodes::{Nodes, TouchedNodes};
use crate::places;
use crate::policy::LocalNode;

pub use per_set::PerSet;
pub use ports::{DesiredPort, DesiredSet, HealthCheck, SETS, health_check, invalid_source_ranges, ports};

/// The claim of a service port to a frontend. Claims are ordered by precedence: the older first, one without a time
/// stamp last, then by namespace, name and port. An address that is a cluster IP of any Service is marked as one.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Claim {
    /// See [`DesiredPort::created`].
    created: u32,
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
    /// Adds the keys of later changes.
    pub(crate) fn extend(&mut self, later: Self) {
        let Self {
            mut ports,
            mut frontends,
            mut cidrs,
        } = later;
        self.ports.append(&mut ports);
        self.frontends.append(&mut frontends);
        self.cidrs.append(&mut cidrs);
    }

    /// Rebuilds the sets in as few tree nodes as possible, which are not scattered between those that outlast them.
    pub(crate) fn compact(&mut self) {
        self.ports = std::mem::take(&mut self.ports).into_iter().collect();
        self.frontends = std::mem::take(&mut self.frontends).into_iter().collect();
    }

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
    /// In the order of their identities.
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
        let local_node = LocalNode::new(&node, index.node(&node));
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
        let mut before = BTreeMap::new();
        if let Some(ByKey(known)) = self.services.take(service) {
            before.extend([known.first]);
            before.extend(known.more);
        }
        let mut now = Vec::with_capacity(ports.len());
        for (id, new) in ports {
            let (id, old) = match before.remove_entry(&id) {
                Some((id, old)) => (id, Some(old)),
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
            let mut more: Box<[_]> = now.collect();
            more.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
            self.services.insert(ByKey(Box::new(ServicePorts { first, more })));
        }
    }

    fn claim(&mut self, id: &Arc<PortId>, port: &DesiredPort, touched: &mut Touched) {
        for (key, kind) in &port.frontends {
            let claim = Claim {
                created: port.created,
                id: Arc::clone(id),
                kind: *kind,
            };
            match self.claims.entry(*key) {
                Entry::Vacant(vacant) => {
                    vacant.insert(claim);
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
        let ServicePorts { first, more } = &*self.services.get(&id.service)?.0;
        if *first.0 == *id {
            return Some(first);
        }
        let at = more.binary_search_by(|(known, _)| (**known).cmp(id)).ok()?;
        more.get(at)
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

    /// Returns the value of a frontend, by the first claim of a service port that has an entry of SERVICES, with its index, by
    /// `service_of`. An address of a node is not marked as external: its other ports belong to that node.
    pub fn frontend(
        &self,
        key: &FrontendKey,
        service_of: impl Fn(&PortId) -> Option<(ServiceIndex, Service)>,
    ) -> Option<Frontend> {
        self.claims(key).find_map(|claim| {
            let (index, service) = service_of(&claim.id)?;
            match claim.kind {
                FrontendKind::ExternalAddress if self.nodes.has_address(key.addr) => None,
                kind if kind.is_mark() => Some(Frontend::mark(kind)),
                kind => Some(with_set_of(Frontend::new(index, kind), &service)),
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

    /// Returns the service port that gets a frontend, or the first of those that mark an address.
    #[must_use]
    pub fn owner(&self, key: &FrontendKey) -> Option<&Arc<PortId>> {
        self.claims.get(key).map(|claim| &claim.id)
    }

    /// Returns the rank of a service port if a map has no room for all: the creation time of its Service in seconds since 1970. The
    /// oldest is served first, and one without a time last.
    #[must_use]
    pub fn age_rank(&self, id: &PortId) -> u32 {
        self.port(id).map_or(u32::MAX, |port| port.created)
    }

    /// Returns the rank of a frontend or address mark: that of its service port.
    #[must_use]
    pub fn frontend_age_rank(&self, key: &FrontendKey) -> u32 {
        self.owner(key).map_or(u32::MAX, |id| self.age_rank(id))
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
                Problem::new(places::of_port(&loser.id), message)
                    .of(&loser.id.service)
                    .kind(ProblemKind::Conflict)
            }));
        }
        problems
    }
}

/// Returns the frontend with the set that it has if it leads to this service.
pub(crate) fn with_set_of(frontend: Frontend, service: &Service) -> Frontend {
    Frontend {
        set: set_in_frontend(frontend, service),
        ..frontend
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::model::Protocol;
    use crate::policy::Members;

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

    fn port(created: Option<u32>, frontends: &[u16]) -> DesiredPort {
        let mark = (FrontendKey::address_mark(key(0).addr), FrontendKind::Address);
        DesiredPort {
            port: 80,
            created: created.unwrap_or(u32::MAX),
            flags: 0,
            affinity_timeout: 0,
            sets: Default::default(),
            draining: Members::default(),
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
        let index = |id: &PortId| ServiceIndex::new(id.service.name.as_bytes()[0].into());
        let service = |id: &PortId| Some((index(id), Service::default()));
        desired.frontend(&key(port), service).map(|f| f.service.get())
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
        let only_b = |id: &PortId| (&*id.service.name == "b").then_some((index, Service::default()));
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
}
