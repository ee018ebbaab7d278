//! The desired content of the maps for each port of one Service, derived from the Service and its endpoints.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use lb_common::abi::{Addr, FrontendKey, FrontendKind, Set, service_flags};

use super::PerSet;
use crate::maps::prefix;
use crate::model::{EndpointSlice, Protocol, Service, ServicePort, ServiceType, TrafficPolicy};
use crate::names::PortId;
use crate::policy::{self, LocalNode, Members, Wanted};

/// The three sets of a service port, in the order of [`lb_common::abi::Service::set_words`].
pub const SETS: [Set; 3] = [Set::Internal, Set::External, Set::Cluster];

/// One backend set.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DesiredSet {
    /// Members, sorted.
    pub members: Members,
    /// Whether an empty set means DROP instead of REJECT.
    pub empty_drops: bool,
}

/// The desired content of the maps for one service port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DesiredPort {
    /// `spec.ports[].port`, host byte order.
    pub port: u16,
    /// `metadata.creationTimestamp` in seconds since 1970, or the largest number without one. Of two Services that claim a
    /// frontend, the older gets it. A time outside of the range is the nearest in it.
    pub created: u32,
    /// [`lb_common::abi::service_flags`].
    pub flags: u32,
    /// In seconds; zero without affinity.
    pub affinity_timeout: u32,
    /// In the order of [`SETS`].
    pub sets: PerSet<DesiredSet>,
    /// Draining backends: in no set, but established connections to them go on.
    pub draining: Members,
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
    let endpoints = slices.flat_map(|slice| slice.endpoints.iter());
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
        for port in ports.iter() {
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
                    members: members.clone(),
                    empty_drops,
                }
            };
            let mut sets = [
                set(*internal_policy),
                set(*external_policy),
                set(TrafficPolicy::Cluster),
            ];
            share_members(&mut sets);
            let id = PortId {
                service: key.clone(),
                port_name: Arc::clone(&port.name),
                protocol: port.protocol,
                ipv6,
            };
            let desired = DesiredPort {
                port: port.port,
                created: created.map_or(u32::MAX, age_rank),
                flags: flags(*affinity_timeout, &source_ranges),
                affinity_timeout: affinity_timeout.unwrap_or(0),
                sets: sets.into(),
                draining: endpoints.draining.clone(),
                frontends: frontends(service, port, ipv6, &source_ranges),
                source_ranges: source_ranges.admitted(),
            };
            all.push((id, desired));
        }
    }
    all
}

/// Returns seconds since 1970 as [`DesiredPort::created`].
fn age_rank(seconds: i64) -> u32 {
    u32::try_from(seconds.max(0)).unwrap_or(u32::MAX)
}

/// The clients that the load-balancer addresses of a Service serve in one family.
#[derive(Debug, Clone, PartialEq, Eq)]
enum SourceRanges {
    /// Every client.
    All,
    /// Clients in these networks.
    Only(Box<[IpNet]>),
}

impl SourceRanges {
    /// Reads `spec.loadBalancerSourceRanges`. As in kube-proxy, ranges of the other family are no restriction, and
    /// neither is a range that covers all addresses. But an invalid range restricts, and admits no client: in the
    /// family that its notation suggests, or in both if it suggests none or both.
    fn of(service: &Service, ipv6: bool) -> Self {
        let mut restricted = false;
        let mut admitted = BTreeSet::new();
        for text in &service.source_ranges {
            match text.parse().map(prefix::normal) {
                Ok(net) if net.addr().is_ipv6() != ipv6 => continue,
                Ok(net) if net.prefix_len() == 0 => return Self::All,
                Ok(net) => drop(admitted.insert(net)),
                Err(_) if suggests_family(text, !ipv6) && !suggests_family(text, ipv6) => continue,
                Err(_) => {}
            }
            restricted = true;
        }
        if restricted {
            Self::Only(admitted.into_iter().collect())
        } else {
            Self::All
        }
    }

    fn admitted(&self) -> Box<[IpNet]> {
        match self {
            Self::All => Box::default(),
            Self::Only(networks) => networks.clone(),
        }
    }
}

/// Returns whether a text has the separator of addresses of a family.
fn suggests_family(text: &str, ipv6: bool) -> bool {
    text.contains(if ipv6 { ':' } else { '.' })
}

/// Returns the invalid entries of `spec.loadBalancerSourceRanges` of a Service.
#[must_use]
pub fn invalid_source_ranges(service: &Service) -> Vec<Arc<str>> {
    let ranges = service.source_ranges.iter().filter(|_| is_served(service));
    ranges.filter(|text| text.parse::<IpNet>().is_err()).cloned().collect()
}

/// Returns the [`service_flags`] of a Service in one family.
fn flags(affinity_timeout: Option<u32>, source_ranges: &SourceRanges) -> u32 {
    let affinity = affinity_timeout.map_or(0, |_| service_flags::AFFINITY);
    affinity
        | match source_ranges {
            SourceRanges::All => 0,
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

/// Makes sets with the same members share their memory here, and so their slots in BACKEND_SLOTS.
fn share_members(sets: &mut [DesiredSet; 3]) {
    for i in 1..sets.len() {
        if let Some(same) = sets[..i].iter().find(|set| set.members == sets[i].members) {
            sets[i].members = same.members.clone();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ObjectKey;
    use crate::policy::Member;

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
            ports: Arc::new([ServicePort::tcp("", 80)]),
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
            members: [member(n)].into_iter().collect(),
            empty_drops: false,
        };
        let mut sets = [set(1), set(2), set(1)];
        share_members(&mut sets);
        assert!(sets[0].members.is_shared_with(&sets[2].members));
        assert!(!sets[0].members.is_shared_with(&sets[1].members));
    }
}
