//! Kubernetes manifests for tests, as YAML text.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use crate::{Agent, Cluster, Node, RunningAgent};
use anyhow::{Context as _, Result};

/// A port of a Service, or of its endpoints.
#[derive(Debug, Clone, Copy)]
pub struct Port<'a> {
    /// The port's name.
    pub name: &'a str,
    /// The port number.
    pub port: u16,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: &'a str,
    /// The node port; only of a Service.
    pub node_port: Option<u16>,
}

impl<'a> Port<'a> {
    /// Creates a TCP port.
    #[must_use]
    pub const fn tcp(name: &'a str, port: u16) -> Self {
        Self {
            name,
            port,
            protocol: "TCP",
            node_port: None,
        }
    }

    /// Creates a UDP port.
    #[must_use]
    pub const fn udp(name: &'a str, port: u16) -> Self {
        Self {
            protocol: "UDP",
            ..Self::tcp(name, port)
        }
    }

    /// Returns the port with a node port.
    #[must_use]
    pub const fn on_nodes(self, port: u16) -> Self {
        Self {
            node_port: Some(port),
            ..self
        }
    }
}

/// Returns a Service with the cluster IPs `ips`: one address, or one of each family with a comma between. `more` is added
/// to its spec.
#[must_use]
pub fn service(name: &str, ips: &str, ports: &[Port<'_>], more: &str) -> String {
    let first = ips.split(',').next().unwrap_or_default();
    let all: Vec<_> = ips.split(',').map(|ip| format!("\"{ip}\"")).collect();
    let mut text = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: default}}\nspec:\n  clusterIP: \"{first}\"\n  \
         clusterIPs: [{}]\n",
        all.join(", ")
    );
    if ports.iter().any(|port| port.node_port.is_some()) && !more.contains("type:") {
        text.push_str("  type: NodePort\n");
    }
    if !more.is_empty() {
        text.push_str(&format!("  {more}\n"));
    }
    text.push_str("  ports:\n");
    for Port {
        name,
        port,
        protocol,
        node_port,
    } in ports
    {
        let node_port = node_port.map_or(String::new(), |port| format!(", nodePort: {port}"));
        text.push_str(&format!(
            "  - {{name: {name}, port: {port}, protocol: {protocol}{node_port}}}\n"
        ));
    }
    text.push_str("---\n");
    text
}

/// Returns the EndpointSlice of one port of a Service. The endpoints, addresses with the names of their nodes, are all of
/// one family. Without endpoints the slice is of IPv4.
#[must_use]
pub fn slice(service: &str, port: Port<'_>, endpoints: &[(IpAddr, &str)]) -> String {
    let endpoints: Vec<_> = endpoints.iter().map(|&(ip, node)| (ip, node, "")).collect();
    slice_with_conditions(service, port, &endpoints)
}

/// Returns an EndpointSlice like [`slice()`]; the third part of an endpoint is the content of its `conditions`.
#[must_use]
pub fn slice_with_conditions(service: &str, port: Port<'_>, endpoints: &[(IpAddr, &str, &str)]) -> String {
    let Port {
        name, port, protocol, ..
    } = port;
    let family = match endpoints.first() {
        Some((IpAddr::V6(_), ..)) => "IPv6",
        _ => "IPv4",
    };
    let mut text = format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {service}-{name}-{}\n  namespace: \
         default\n  labels: {{kubernetes.io/service-name: {service}}}\naddressType: {family}\nports:\n- {{name: {name}, \
         port: {port}, protocol: {protocol}}}\nendpoints:\n",
        family.to_lowercase()
    );
    for (address, node, conditions) in endpoints {
        text.push_str(&format!(
            "- {{addresses: [\"{address}\"], nodeName: {node}, conditions: {{{conditions}}}}}\n"
        ));
    }
    if endpoints.is_empty() {
        text.truncate(text.len() - "endpoints:\n".len());
        text.push_str("endpoints: []\n");
    }
    text.push_str("---\n");
    text
}

/// Returns a Service with the TCP port `web` (80) and the UDP port `dns` (53) at the addresses of [`vips`], and its
/// EndpointSlices. The endpoints are of one family or both; `target` has their TCP and UDP port. `more` is added to the
/// spec of the Service.
#[must_use]
pub fn web_and_dns(
    name: &str,
    last: u8,
    node_ports: Option<[u16; 2]>,
    more: &str,
    endpoints: &[(IpAddr, &str)],
    target: [u16; 2],
) -> String {
    let (web, dns) = (Port::tcp("web", 80), Port::udp("dns", 53));
    let ports = match node_ports {
        Some([tcp, udp]) => [web.on_nodes(tcp), dns.on_nodes(udp)],
        None => [web, dns],
    };
    let text = service(name, &ips(last), &ports, more);
    let targets = [Port::tcp("web", target[0]), Port::udp("dns", target[1])];
    targets
        .into_iter()
        .fold(text, |text, port| text + &slices(name, port, endpoints))
}

/// Returns a Service of type NodePort with the TCP port `web` (80) at the addresses of [`vips`], and its EndpointSlices.
/// `target` is the port of the endpoints.
#[must_use]
pub fn web(name: &str, last: u8, node_port: u16, endpoints: &[(IpAddr, &str)], target: u16) -> String {
    let ports = [Port::tcp("web", 80).on_nodes(node_port)];
    service(name, &ips(last), &ports, "type: NodePort") + &slices(name, Port::tcp("web", target), endpoints)
}

/// Returns the IPv4 and the IPv6 cluster IP with this last part, which has the same digits in both: 10.96.0.`last` and
/// fd00:96::`last`.
///
/// # Panics
/// Never.
#[must_use]
pub fn vips(last: u8) -> [IpAddr; 2] {
    [format!("10.96.0.{last}"), format!("fd00:96::{last}")].map(|ip| ip.parse().expect("an address"))
}

/// Returns the addresses of [`vips`] in the form that [`service`] takes.
#[must_use]
pub fn ips(last: u8) -> String {
    vips(last).map(|ip| ip.to_string()).join(",")
}

/// Returns EndpointSlices for endpoints of one family or both: one slice per family, and one without endpoints if there are
/// none.
#[must_use]
pub fn slices(service: &str, port: Port<'_>, endpoints: &[(IpAddr, &str)]) -> String {
    let (v4, v6): (Vec<_>, Vec<_>) = endpoints.iter().partition(|(ip, _)| ip.is_ipv4());
    let mut text = slice(service, port, &v4);
    if !v6.is_empty() {
        text += &slice(service, port, &v6);
    }
    text
}

/// Returns the Node object of a node, with the networks of its pods and its addresses.
#[must_use]
pub fn node(node: &Node) -> String {
    format!(
        "apiVersion: v1\nkind: Node\nmetadata: {{name: {}}}\nspec: {{podCIDRs: [\"{}/24\", \"{}/64\"]}}\nstatus: \
         {{addresses: [{{type: InternalIP, address: \"{}\"}}, {{type: InternalIP, address: \"{}\"}}]}}\n---\n",
        node.name(),
        node.pod_network(),
        node.pod_network6(),
        node.address(),
        node.address6()
    )
}

/// A directory of manifests in the scratch directory of a cluster.
pub struct Manifests(PathBuf);

impl Manifests {
    /// Creates an empty directory, which is removed with the cluster.
    ///
    /// # Errors
    /// If the directory cannot be created.
    pub fn new(cluster: &Cluster) -> Result<Self> {
        let directory = cluster.scratch().join("manifests");
        fs::create_dir_all(&directory)?;
        Ok(Self(directory))
    }

    /// The path of the directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Replaces a file atomically by renaming, as an editor does.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        let new = self.0.join(format!(".{name}.new"));
        fs::write(&new, text)?;
        fs::rename(&new, self.0.join(name)).context("renaming a manifest")
    }

    /// Starts an agent on a node with these manifests, and waits until it has applied them.
    ///
    /// # Errors
    /// If there is no binary of the agent, or the agent is not ready in time.
    pub fn serve(&self, cluster: &Cluster, node: &str, flags: &[&str]) -> Result<RunningAgent> {
        let agent = Agent::new(cluster, cluster.node(node), &Agent::find()?, &self.0);
        let mut running = RunningAgent::start(agent, flags)?;
        running.wait_ready(&|| false)?;
        Ok(running)
    }
}
