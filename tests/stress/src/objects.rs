//! Services and EndpointSlices as objects of the agent's source.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use lb_core::model::{
    Endpoint, EndpointLocation, EndpointPort, EndpointSlice, Kind, Object, ObjectId, ObjectKey, Service, ServicePort,
};

/// The port of every backend.
pub const BACKEND_PORT: u16 = 8080;

/// Returns the Service `default/NAME` of type ClusterIP, with named TCP ports.
#[must_use]
pub fn service(name: &str, address: Ipv4Addr, ports: &[(&str, u16)], created: i64) -> Service {
    Service {
        created: Some(created),
        cluster_ips: Box::new([IpAddr::V4(address)]),
        ports: ports.iter().map(|(name, port)| ServicePort::tcp(name, *port)).collect(),
        ..Service::new(ObjectKey::new("default", name))
    }
}

/// Returns the only EndpointSlice of a Service, for all its ports. Every endpoint is ready and on `node`.
#[must_use]
pub fn slice(service: &str, ports: &[&str], node: &str, addresses: &[Ipv4Addr]) -> EndpointSlice {
    let endpoint = |address: &Ipv4Addr| Endpoint::ready((*address).into(), EndpointLocation::on(node).shared());
    EndpointSlice {
        key: slice_key(service),
        service: service.into(),
        ipv6: false,
        endpoints: addresses.iter().map(endpoint).collect(),
        ports: ports.iter().map(|name| EndpointPort::tcp(name, BACKEND_PORT)).collect(),
    }
}

fn slice_key(service: &str) -> ObjectKey {
    ObjectKey::new("default", &format!("{service}-slice"))
}

/// Returns the ids of a Service and its EndpointSlice, for their removal.
#[must_use]
pub fn ids(service: &str) -> [ObjectId; 2] {
    [
        (Kind::Service, ObjectKey::new("default", service)),
        (Kind::EndpointSlice, slice_key(service)),
    ]
    .map(|(kind, key)| ObjectId { kind, key })
}

/// Wraps a Service as an object of the source.
#[must_use]
pub fn service_object(service: Service) -> Object {
    Object::Service(Arc::new(service))
}

/// Wraps an EndpointSlice as an object of the source.
#[must_use]
pub fn slice_object(slice: EndpointSlice) -> Object {
    Object::EndpointSlice(Arc::new(slice))
}
