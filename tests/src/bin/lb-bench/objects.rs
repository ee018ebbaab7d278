//! Services and endpoints: objects in memory as a source yields them (with the sharing between objects that a source does),
//! and equal objects as manifests.

use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use lb_core::model::{
    Change, Endpoint, EndpointLocation, EndpointPort, EndpointSlice, Object, ObjectKey, Protocol, Service, ServicePort,
};
use serde::Serialize;

/// Services per namespace.
const NAMESPACE: u32 = 100;
/// Number of nodes that the endpoints are spread over.
const NODES: u32 = 50;

/// Name of the agent's node.
pub(crate) const NODE: &str = "node-0";

/// The port of every Service.
pub(crate) const SERVICE_PORT: u16 = 80;
/// The port of every endpoint.
pub(crate) const BACKEND_PORT: u16 = 8080;

fn key(service: u32, suffix: &str) -> ObjectKey {
    let namespace = format!("namespace-{}", service / NAMESPACE);
    ObjectKey::new(&namespace, &format!("service-{service}{suffix}"))
}

/// Returns `namespace/name` of a Service.
pub(crate) fn name(service: u32) -> String {
    format!("namespace-{}/service-{service}", service / NAMESPACE)
}

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Family {
    Ipv4,
    Ipv6,
}

impl Family {
    pub(crate) const ALL: [Self; 2] = [Self::Ipv4, Self::Ipv6];

    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Ipv4 => "IPv4",
            Self::Ipv6 => "IPv6",
        }
    }
}

/// The Services of a benchmark, which are alike, each with endpoints of its own.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Services {
    pub(crate) number: u32,
    /// Endpoints of each Service.
    pub(crate) endpoints: u32,
    pub(crate) family: Family,
    pub(crate) protocol: Protocol,
}

impl Services {
    /// Returns all Services, each followed by its slice.
    pub(crate) fn objects(self) -> impl Iterator<Item = Change> {
        (0..self.number).flat_map(move |i| [self.service(i), self.slice(i, None)])
    }

    /// Returns the cluster IP of a Service.
    pub(crate) fn vip(self, service: u32) -> IpAddr {
        self.above([10, 96, 0, 0], 0x96, service + 1)
    }

    /// Returns the address of an endpoint by its number among all; the endpoints of one Service are consecutive.
    pub(crate) fn backend(self, number: u32) -> IpAddr {
        self.above([12, 0, 0, 0], 0x12, number)
    }

    /// Returns the network that contains all backends.
    pub(crate) fn backends(self) -> String {
        let length = match self.family {
            Family::Ipv4 => 8,
            Family::Ipv6 => 64,
        };
        format!("{}/{length}", self.backend(0))
    }

    /// Returns the address of a network at an offset.
    fn above(self, v4: [u8; 4], v6: u16, number: u32) -> IpAddr {
        match self.family {
            Family::Ipv4 => Ipv4Addr::from_bits(Ipv4Addr::from(v4).to_bits() + number).into(),
            Family::Ipv6 => {
                let network = Ipv6Addr::new(0xfd00, v6, 0, 0, 0, 0, 0, 0);
                Ipv6Addr::from_bits(network.to_bits() + u128::from(number)).into()
            }
        }
    }

    /// Returns a Service with one port.
    fn service(self, number: u32) -> Change {
        Change::Set(Object::Service(Arc::new(Service {
            created: Some(1_700_000_000 + i64::from(number)),
            cluster_ips: Box::new([self.vip(number)]),
            ports: ServicePort::shared(vec![ServicePort {
                protocol: self.protocol,
                ..ServicePort::tcp("http", SERVICE_PORT)
            }]),
            ..Service::new(key(number, ""))
        })))
    }

    /// Returns the only slice of a Service; with `moved`, its first endpoint has another address.
    pub(crate) fn slice(self, number: u32, moved: Option<u32>) -> Change {
        let endpoint = |i: u32| {
            let address = match moved.filter(|_| i == 0) {
                Some(moved) => self.above([11, 0, 0, 0], 0x11, moved),
                None => self.backend(number * self.endpoints + i),
            };
            let location = EndpointLocation::on(&format!("node-{}", (number + i) % NODES));
            Endpoint::ready(address, location.shared())
        };
        Change::Set(Object::EndpointSlice(Arc::new(EndpointSlice {
            key: key(number, "-x7k2p"),
            service: format!("service-{number}").into(),
            ipv6: self.family == Family::Ipv6,
            endpoints: (0..self.endpoints).map(endpoint).collect(),
            ports: EndpointPort::shared(vec![EndpointPort {
                protocol: self.protocol,
                ..EndpointPort::tcp("http", BACKEND_PORT)
            }]),
        })))
    }

    /// Writes all Services as manifests into a folder, one file per namespace; returns the bytes written. TCP only.
    pub(crate) fn write_manifests(self, folder: &Path) -> Result<u64> {
        let mut bytes = 0;
        for first in (0..self.number).step_by(NAMESPACE as usize) {
            let numbers = first..self.number.min(first + NAMESPACE);
            let text: String = numbers.map(|number| self.manifest(number)).collect();
            let path = folder.join(format!("namespace-{}.yaml", first / NAMESPACE));
            fs::write(&path, &text).with_context(|| format!("writing {}", path.display()))?;
            bytes += text.len() as u64;
        }
        Ok(bytes)
    }

    /// Returns a Service and its slice as YAML.
    fn manifest(self, number: u32) -> String {
        let namespace = number / NAMESPACE;
        let address_type = self.family.label();
        let cluster_ip = self.vip(number);
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
addressType: {address_type}
ports:
- name: http
  protocol: TCP
  port: 8080
endpoints:
"
        );
        for i in 0..self.endpoints {
            let address = self.backend(number * self.endpoints + i);
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
}
