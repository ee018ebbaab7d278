//! What whole-system tests share: a node with an agent, and manifests as text.

use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use lb_tests::{Agent, Cluster, Testbed};

/// The helper binary.
pub(crate) fn bed() -> Testbed {
    Testbed::new(env!("CARGO_BIN_EXE_lb-testbed"))
}

/// The agent's binary: `LB_AGENT`, or beside the helper.
pub(crate) fn agent_program() -> Result<PathBuf> {
    let path = match std::env::var_os("LB_AGENT") {
        Some(path) => PathBuf::from(path),
        None => Path::new(env!("CARGO_BIN_EXE_lb-testbed")).with_file_name("lb-agent"),
    };
    fs::metadata(&path).with_context(|| format!("{}: build it (`cargo build -p lb-agent`)", path.display()))?;
    Ok(path)
}

/// A port of a Service of the tests.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Port<'a> {
    pub(crate) name: &'a str,
    pub(crate) port: u16,
}

/// A Service with TCP ports, as YAML; `more` is added to its spec.
pub(crate) fn service(name: &str, ip: &str, ports: &[Port<'_>], more: &str) -> String {
    let mut text = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: default}}\nspec:\n  clusterIP: {ip}\n"
    );
    if !more.is_empty() {
        writeln!(text, "  {more}").unwrap();
    }
    text.push_str("  ports:\n");
    for Port { name, port } in ports {
        writeln!(text, "  - {{name: {name}, port: {port}}}").unwrap();
    }
    text.push_str("---\n");
    text
}

/// The endpoints of one port of a Service, as YAML: addresses with the names of their nodes.
pub(crate) fn slice(service: &str, port: Port<'_>, endpoints: &[(IpAddr, &str)]) -> String {
    let Port { name, port } = port;
    let mut text = format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {service}-{name}\n  namespace: \
         default\n  labels: {{kubernetes.io/service-name: {service}}}\naddressType: IPv4\nports:\n- {{name: {name}, \
         port: {port}}}\nendpoints:\n"
    );
    for (address, node) in endpoints {
        writeln!(text, "- {{addresses: [{address}], nodeName: {node}}}").unwrap();
    }
    if endpoints.is_empty() {
        text.truncate(text.len() - "endpoints:\n".len());
        text.push_str("endpoints: []\n");
    }
    text.push_str("---\n");
    text
}

/// A socket address from text.
pub(crate) fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// A folder of manifests of a cluster.
pub(crate) struct Manifests(PathBuf);

impl Manifests {
    pub(crate) fn new(cluster: &Cluster) -> Result<Self> {
        let folder = cluster.scratch().join("manifests");
        fs::create_dir_all(&folder)?;
        Ok(Self(folder))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Replaces a file at once, as an editor or `kubectl` would.
    pub(crate) fn write(&self, name: &str, text: &str) -> Result<()> {
        let new = self.0.join(format!(".{name}.new"));
        fs::write(&new, text)?;
        fs::rename(&new, self.0.join(name)).context("renaming a manifest")
    }

    /// Starts an agent on a node with these manifests, and waits until all is served.
    pub(crate) fn serve(&self, cluster: &Cluster, node: &str, more: &[&str]) -> Result<Agent> {
        let mut agent = Agent::start(cluster, cluster.node(node), &agent_program()?, &self.0, more)?;
        agent.wait_ready(&|| false)?;
        Ok(agent)
    }
}
