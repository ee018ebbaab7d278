//! Reads nodes, Services and endpoints from the manifests. This is not the agent's reader: it parses only what the demo
//! needs to create the pods.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

/// A document of a manifest.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    kind: String,
    metadata: Metadata,
    #[serde(default)]
    spec: Spec,
    #[serde(default)]
    ports: Vec<NumberedPort>,
    #[serde(default)]
    endpoints: Vec<Endpoint>,
}

#[derive(Debug, Deserialize)]
struct Metadata {
    name: String,
    #[serde(default = "default_namespace")]
    namespace: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

fn default_namespace() -> String {
    "default".to_owned()
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    #[serde(default, rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(default)]
    ports: Vec<NumberedPort>,
    #[serde(default, rename = "podCIDR")]
    pod_cidr: Option<String>,
}

/// A port of a Service or of an EndpointSlice.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct NumberedPort {
    #[serde(default)]
    name: String,
    port: u16,
    /// The node port; only of a Service.
    #[serde(default)]
    node_port: Option<u16>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Endpoint {
    addresses: Vec<Ipv4Addr>,
    node_name: String,
    target_ref: TargetRef,
}

#[derive(Debug, Deserialize)]
struct TargetRef {
    name: String,
}

/// The nodes and Services of the manifests.
#[derive(Debug)]
pub(super) struct Manifests {
    /// Node names with their podCIDR, in order of name.
    pub(super) nodes: Vec<(String, String)>,
    /// Every port of every Service.
    pub(super) services: Vec<ServicePort>,
}

/// A port of a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ServicePort {
    pub(super) namespace: String,
    pub(super) name: String,
    /// The cluster IP and the port.
    pub(super) frontend: SocketAddr,
    /// The node port.
    pub(super) node_port: Option<u16>,
    pub(super) backends: Vec<Backend>,
}

/// A port of a pod.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Backend {
    pub(super) pod: String,
    pub(super) node: String,
    pub(super) address: Ipv4Addr,
    pub(super) port: u16,
}

impl Manifests {
    /// Reads all `.yaml` files of a directory.
    pub(super) fn read(directory: &Path) -> Result<Self> {
        let mut documents = Vec::new();
        for entry in fs::read_dir(directory).with_context(|| format!("listing {}", directory.display()))? {
            let path = entry
                .with_context(|| format!("listing {}", directory.display()))?
                .path();
            if path.extension().is_none_or(|extension| extension != "yaml") {
                continue;
            }
            let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            let found: Vec<Document> =
                serde_saphyr::from_multiple(&text).with_context(|| format!("parsing {}", path.display()))?;
            documents.extend(found);
        }
        Self::from_documents(&documents)
    }

    fn from_documents(documents: &[Document]) -> Result<Self> {
        let of_kind = |kind: &'static str| documents.iter().filter(move |document| document.kind == kind);
        let mut nodes = of_kind("Node")
            .map(|node| {
                let range = node.spec.pod_cidr.clone();
                Ok((
                    node.metadata.name.clone(),
                    range.with_context(|| format!("{} has no podCIDR", node.metadata.name))?,
                ))
            })
            .collect::<Result<Vec<_>>>()?;
        nodes.sort();
        let mut services = Vec::new();
        for service in of_kind("Service") {
            let (name, namespace) = (&service.metadata.name, &service.metadata.namespace);
            let address = service.spec.cluster_ip.as_deref().unwrap_or_default();
            let address: IpAddr = address
                .parse()
                .with_context(|| format!("the clusterIP of {name} is {address:?}"))?;
            for port in &service.spec.ports {
                let mut backends: Vec<Backend> = of_kind("EndpointSlice")
                    .filter(|slice| slice.metadata.namespace == *namespace)
                    .filter(|slice| slice.metadata.labels.get("kubernetes.io/service-name") == Some(name))
                    .flat_map(|slice| backends(slice, &port.name))
                    .collect();
                backends.sort();
                ensure!(
                    !backends.is_empty(),
                    "{name} has no endpoint with a port named {:?}",
                    port.name
                );
                services.push(ServicePort {
                    namespace: namespace.clone(),
                    name: name.clone(),
                    frontend: SocketAddr::new(address, port.port),
                    node_port: port.node_port,
                    backends,
                });
            }
        }
        ensure!(
            !nodes.is_empty() && !services.is_empty(),
            "the manifests have no Node or no Service"
        );
        // The order of the files in a directory is not defined.
        services.sort_by_key(|service| service.frontend);
        Ok(Self { nodes, services })
    }
}

/// Returns the backends of a slice for the Service port `name`.
fn backends<'a>(slice: &'a Document, name: &'a str) -> impl Iterator<Item = Backend> + 'a {
    let ports = slice.ports.iter().filter(move |port| port.name == name);
    ports.flat_map(|port| {
        slice.endpoints.iter().filter_map(|endpoint| {
            Some(Backend {
                pod: endpoint.target_ref.name.clone(),
                node: endpoint.node_name.clone(),
                address: *endpoint.addresses.first()?,
                port: port.port,
            })
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_examples_are_read() {
        let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
        let manifests = Manifests::read(&examples).unwrap();
        let names: Vec<_> = manifests.nodes.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["n1", "n2"]);
        let [example, demo, hello] = manifests.services.as_slice() else {
            panic!("{manifests:?}");
        };
        assert_eq!(
            (example.name.as_str(), example.frontend, example.node_port),
            ("example-service", "10.96.0.54:80".parse().unwrap(), Some(30554))
        );
        assert_eq!((demo.node_port, hello.node_port), (None, Some(30001)));
        assert_eq!(
            (demo.name.as_str(), demo.frontend),
            ("service-demo", "10.96.0.80:80".parse().unwrap())
        );
        let nodes: Vec<_> = demo.backends.iter().map(|backend| backend.node.as_str()).collect();
        assert_eq!(nodes, ["n1", "n2"]);
        assert_eq!(
            (hello.name.as_str(), hello.frontend),
            ("hello-world-service", "10.96.40.0:4000".parse().unwrap())
        );
        assert_eq!(hello.backends.len(), 1);
        assert_eq!((hello.backends[0].node.as_str(), hello.backends[0].port), ("n2", 8080));
    }
}
