//! Services and endpoints as a source hands them over, made in memory: shared between objects is what a source shares.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use lb_agent::intern;
use lb_agent::model::{
    Change, Endpoint, EndpointPort, EndpointSlice, Object, ObjectKey, Place, Protocol, Service, ServicePort,
    ServiceType, TrafficPolicy,
};

/// Services per namespace.
const NAMESPACE: u32 = 100;
/// Nodes that endpoints are spread over.
const NODES: u32 = 50;

/// Name of the node that the agent is on.
pub(crate) const NODE: &str = "node-0";

fn key(service: u32, suffix: &str) -> ObjectKey {
    let namespace = format!("namespace-{}", service / NAMESPACE);
    ObjectKey::new(&namespace, &format!("service-{service}{suffix}"))
}

/// An address that counts up from a network.
fn address(network: [u8; 4], number: u32) -> IpAddr {
    Ipv4Addr::from_bits(Ipv4Addr::from(network).to_bits() + number).into()
}

/// A Service with one port.
pub(crate) fn service(number: u32) -> Change {
    Change::Set(Object::Service(Arc::new(Service {
        key: key(number, ""),
        created: Some(1_700_000_000 + i64::from(number)),
        service_type: ServiceType::ClusterIp,
        cluster_ips: Box::new([address([10, 96, 0, 1], number)]),
        ports: Box::new([ServicePort {
            name: intern::text("http"),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: None,
        }]),
        affinity_timeout: None,
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        publish_not_ready: false,
        other_proxy: false,
        headless_label: false,
    })))
}

/// The one slice of a Service; with `moved`, its first endpoint has another address.
pub(crate) fn slice(number: u32, endpoints: u32, moved: Option<u32>) -> Change {
    let endpoint = |i: u32| {
        let address = match moved.filter(|_| i == 0) {
            Some(moved) => address([11, 0, 0, 0], moved),
            None => address([12, 0, 0, 0], number * endpoints + i),
        };
        Endpoint {
            address,
            ready: true,
            serving: true,
            terminating: false,
            place: intern::place(Place::on(&format!("node-{}", (number + i) % NODES))),
        }
    };
    Change::Set(Object::EndpointSlice(Arc::new(EndpointSlice {
        key: key(number, "-x7k2p"),
        service: format!("service-{number}").into(),
        ipv6: false,
        endpoints: (0..endpoints).map(endpoint).collect(),
        ports: Box::new([EndpointPort {
            name: intern::text("http"),
            protocol: Protocol::Tcp,
            port: Some(8080),
        }]),
    })))
}
