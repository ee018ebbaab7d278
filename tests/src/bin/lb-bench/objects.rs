//! Services and endpoints: as a source hands them over, made in memory (shared between objects is what a source shares),
//! and the same as manifests.

use std::fmt::Write as _;
use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
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
        cluster_ips: Box::new([vip(number).into()]),
        external_ips: Box::default(),
        load_balancer_ips: Box::default(),
        source_ranges: Box::default(),
        ports: Box::new([ServicePort {
            name: intern::text("http"),
            protocol: Protocol::Tcp,
            port: SERVICE_PORT,
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
            Some(moved) => above([11, 0, 0, 0], moved).into(),
            None => backend(number * endpoints + i).into(),
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
            port: Some(BACKEND_PORT),
        }]),
    })))
}

/// Writes all as manifests into a folder, a file per namespace; the bytes that it wrote.
pub(crate) fn write_manifests(folder: &Path, services: u32, endpoints: u32) -> Result<u64> {
    let mut bytes = 0;
    for first in (0..services).step_by(NAMESPACE as usize) {
        let numbers = first..services.min(first + NAMESPACE);
        let text: String = numbers.map(|number| manifest(number, endpoints)).collect();
        let path = folder.join(format!("namespace-{}.yaml", first / NAMESPACE));
        fs::write(&path, &text).with_context(|| format!("writing {}", path.display()))?;
        bytes += text.len() as u64;
    }
    Ok(bytes)
}

/// A Service and its slice as YAML.
fn manifest(number: u32, endpoints: u32) -> String {
    let namespace = number / NAMESPACE;
    let cluster_ip = vip(number);
    let mut text = format!(
        "\
apiVersion: v1
kind: Service
metadata:
  name: service-{number}
  namespace: namespace-{namespace}
  creationTimestamp: \"2024-01-01T00:00:00Z\"
spec:
  clusterIP: {cluster_ip}
  selector:
    app: service-{number}
  ports:
  - name: http
    port: 80
    targetPort: http
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: service-{number}-x7k2p
  namespace: namespace-{namespace}
  labels:
    kubernetes.io/service-name: service-{number}
addressType: IPv4
ports:
- name: http
  protocol: TCP
  port: 8080
endpoints:
"
    );
    for i in 0..endpoints {
        let address = backend(number * endpoints + i);
        let node = (number + i) % NODES;
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "- addresses: [{address}]\n  conditions: {{ready: true, serving: true, terminating: false}}\n  nodeName: node-{node}"
        );
    }
    text.push_str("---\n");
    text
}
