//! Manifests for tests, as text.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use crate::{Agent, Cluster, Running};
use anyhow::{Context as _, Result};

/// A port of a Service of the tests.
#[derive(Debug, Clone, Copy)]
pub struct Port<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its number.
    pub port: u16,
}

/// A Service with TCP ports, as YAML; `more` is added to its spec.
#[must_use]
pub fn service(name: &str, ip: &str, ports: &[Port<'_>], more: &str) -> String {
    let mut text = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: default}}\nspec:\n  clusterIP: {ip}\n"
    );
    if !more.is_empty() {
        text.push_str(&format!("  {more}\n"));
    }
    text.push_str("  ports:\n");
    for Port { name, port } in ports {
        text.push_str(&format!("  - {{name: {name}, port: {port}}}\n"));
    }
    text.push_str("---\n");
    text
}

/// The endpoints of one port of a Service, as YAML: addresses with the names of their nodes.
#[must_use]
pub fn slice(service: &str, port: Port<'_>, endpoints: &[(IpAddr, &str)]) -> String {
    let Port { name, port } = port;
    let mut text = format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {service}-{name}\n  namespace: \
         default\n  labels: {{kubernetes.io/service-name: {service}}}\naddressType: IPv4\nports:\n- {{name: {name}, \
         port: {port}}}\nendpoints:\n"
    );
    for (address, node) in endpoints {
        text.push_str(&format!("- {{addresses: [{address}], nodeName: {node}}}\n"));
    }
    if endpoints.is_empty() {
        text.truncate(text.len() - "endpoints:\n".len());
        text.push_str("endpoints: []\n");
    }
    text.push_str("---\n");
    text
}

/// A folder of manifests of a cluster.
pub struct Manifests(PathBuf);

impl Manifests {
    /// An empty folder, which goes with the cluster.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new(cluster: &Cluster) -> Result<Self> {
        let folder = cluster.scratch().join("manifests");
        fs::create_dir_all(&folder)?;
        Ok(Self(folder))
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Replaces a file at once, as an editor would.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        let new = self.0.join(format!(".{name}.new"));
        fs::write(&new, text)?;
        fs::rename(&new, self.0.join(name)).context("renaming a manifest")
    }

    /// Starts an agent on a node with these manifests, and waits until all is served. Its binary is found `beside`
    /// another.
    ///
    /// # Errors
    /// When it is not ready in time.
    pub fn serve(&self, cluster: &Cluster, node: &str, beside: &Path, flags: &[&str]) -> Result<Running> {
        let agent = Agent::new(cluster, cluster.node(node), &Agent::find(beside)?, &self.0);
        let mut running = Running::start(agent, flags)?;
        running.wait_ready(&|| false)?;
        Ok(running)
    }
}
