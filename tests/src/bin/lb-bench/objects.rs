//! Services and endpoints as a source hands them over, made in memory. Nothing is shared between objects, as if each
//! had been parsed.

use std::net::Ipv4Addr;
use std::sync::Arc;

use lb_agent::model::{
    Change, Endpoint, EndpointPort, EndpointSlice, Object, ObjectKey, Protocol, Service, ServicePort, ServiceType,
    TrafficPolicy,
};

/// Services per namespace.
const NAMESPACE: u32 = 100;
/// Nodes that endpoints are spread over.
const NODES: u32 = 50;

/// Name of the node that the agent is on.
pub(crate) const NODE: &str = "node-0";

/// The port of every Service.
pub(crate) const SERVICE_PORT: u16 = 80;
/// The port of every endpoint.
pub(crate) const BACKEND_PORT: u16 = 8080;

fn key(service: u32, suffix: &str) -> ObjectKey {
    let namespace = format!("namespace-{}", service / NAMESPACE);
    ObjectKey::new(&namespace, &format!("service-{service}{suffix}"))
}

/// `namespace/name` of a Service.
pub(crate) fn name(service: u32) -> String {
    format!("namespace-{}/service-{service}", service / NAMESPACE)
}

/// The cluster IP of a Service.
pub(crate) fn vip(service: u32) -> Ipv4Addr {
    above([10, 96, 0, 1], service)
}

/// The address of an endpoint, by its number among all: those of one Service follow each other.
pub(crate) fn backend(number: u32) -> Ipv4Addr {
    above([12, 0, 0, 0], number)
}

/// An address that counts up from a network.
fn above(network: [u8; 4], number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::from(network).to_bits() + number)
}

/// A Service with one port.
pub(crate) fn service(number: u32) -> Change {
    Change::Set(Object::Service(Arc::new(Service {
        key: key(number, ""),
        created: Some(1_700_000_000 + i64::from(number)),
        service_type: ServiceType::ClusterIp,
        cluster_ips: vec![vip(number).into()],
        ports: vec![ServicePort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: SERVICE_PORT,
            node_port: None,
        }],
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
            Some(moved) => above([11, 0, 0, 0], moved).into(),
            None => backend(number * endpoints + i).into(),
        };
        Endpoint {
            address,
            ready: true,
            serving: true,
            terminating: false,
            node: Some(format!("node-{}", (number + i) % NODES).into()),
        }
    };
    Change::Set(Object::EndpointSlice(Arc::new(EndpointSlice {
        key: key(number, "-x7k2p"),
        service: format!("service-{number}").into(),
        ipv6: false,
        endpoints: (0..endpoints).map(endpoint).collect(),
        ports: vec![EndpointPort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: Some(BACKEND_PORT),
        }],
    })))
}
