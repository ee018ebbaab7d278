//! The cluster of the demo with everything that runs in it, except for the clients.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::manifests::{Manifests, ServicePort};
use super::signals::Signals;
use super::{Options, print_line};
use crate::{Agent, Cluster, Connect, Netns, Pod, Process, Ruleset, RunningAgent, Testbed, Underlay, scaled_timeout};

/// Time limit for nginx to listen.
const START: Duration = Duration::from_secs(10);

/// The cluster of the demo. Its fields are in the order of their removal.
pub(super) struct DemoCluster {
    pub(super) agents: Vec<RunningAgent>,
    _servers: Vec<Process>,
    /// A pod without a server on each node, for clients.
    pub(super) client_pods: Vec<Pod>,
    /// Each node's packet-filter rules before its agent was started.
    pub(super) rules_before: Vec<Ruleset>,
    pub(super) services: Vec<ServicePort>,
    pub(super) testbed: Testbed,
    pub(super) cluster: Cluster,
}

impl DemoCluster {
    pub(super) fn set_up(options: &Options, signals: &Signals) -> Result<Self> {
        let manifests = Manifests::read(&options.examples)?;
        let testbed = Testbed::new(&options.testbed);
        let count = u8::try_from(manifests.nodes.len()).context("too many nodes")?;
        print_line(&format!(
            "building {count} nodes joined by VXLAN, and an outside client"
        ))?;
        let cluster = Cluster::builder()
            .nodes(count)
            .underlay(Underlay::Vxlan)
            .client(true)
            .build()?;
        for ((name, range), node) in manifests.nodes.iter().zip(cluster.nodes()) {
            ensure!(
                name == node.name() && *range == format!("{}/24", node.pod_network()),
                "the manifests have a node {name} with podCIDR {range}, but the demo creates {} with {}/24",
                node.name(),
                node.pod_network()
            );
        }
        let servers = start_servers(&cluster, &manifests.services, signals)?;
        let client_pods = cluster
            .nodes()
            .iter()
            .map(|node| cluster.add_pod(node.name(), &format!("client-{}", node.name())))
            .collect::<Result<_>>()?;
        let rules_before = cluster
            .nodes()
            .iter()
            .map(|node| node.ruleset())
            .collect::<Result<_>>()?;
        let mut demo = Self {
            agents: Vec::new(),
            _servers: servers,
            client_pods,
            rules_before,
            services: manifests.services,
            testbed,
            cluster,
        };
        demo.ensure_unserved()?;
        demo.start_agents(options, signals)?;
        Ok(demo)
    }

    /// Returns the clients in the cluster with their names: the host and a pod of every node.
    pub(super) fn clients(&self) -> impl Iterator<Item = (String, &Netns)> {
        let hosts = self
            .cluster
            .nodes()
            .iter()
            .map(|node| (format!("host {}", node.name()), &**node));
        let pods = self
            .client_pods
            .iter()
            .map(|pod| (format!("pod on {}", pod.node()), &**pod));
        hosts.chain(pods)
    }

    /// Returns the clients of a Service port with their names and the addresses that they connect to: the cluster IP for
    /// hosts and pods, the node port of every node for the outside client.
    pub(super) fn client_targets(&self, service: &ServicePort) -> Vec<(String, &Netns, SocketAddr)> {
        let inside = self.clients().map(|(name, netns)| (name, netns, service.frontend));
        let node_port = service.node_port.into_iter();
        let outside = node_port.flat_map(|port| {
            self.cluster.nodes().iter().map(move |node| {
                let address = SocketAddr::new(node.address().into(), port);
                (
                    format!("an outside client by {}", node.name()),
                    &**self.cluster.client(),
                    address,
                )
            })
        });
        inside.chain(outside).collect()
    }

    /// Checks that no frontend answers before the agents are started.
    fn ensure_unserved(&self) -> Result<()> {
        for service in &self.services {
            for (client, netns, address) in self.client_targets(service) {
                let connect = Connect::to(&[address]).count(1).timeout(Duration::from_millis(300));
                let summary = self.testbed.connect(netns, &connect)?;
                ensure!(
                    summary.failure_count == 1,
                    "{address} answers to {client} before any agent was started"
                );
            }
        }
        Ok(())
    }

    fn start_agents(&mut self, options: &Options, signals: &Signals) -> Result<()> {
        let start = Instant::now();
        for node in self.cluster.nodes() {
            self.agents.push(RunningAgent::start(
                Agent::new(&self.cluster, node, &options.agent, &options.examples),
                &[],
            )?);
        }
        for agent in &mut self.agents {
            agent.wait_ready(&|| signals.arrived())?;
        }
        print_line(&format!(
            "lb-agent is ready on all nodes after {} ms",
            start.elapsed().as_millis()
        ))?;
        for agent in &self.agents {
            for problem in agent.status()?.problems {
                print_line(&format!(
                    "{} reports a problem: {}: {}",
                    agent.node(),
                    problem.place,
                    problem.message
                ))?;
            }
        }
        Ok(())
    }
}

/// Creates a pod with nginx for every backend.
fn start_servers(cluster: &Cluster, services: &[ServicePort], signals: &Signals) -> Result<Vec<Process>> {
    // A pod may be a backend of several Services and ports.
    let mut pods: BTreeMap<(&str, &str, Ipv4Addr), Vec<u16>> = BTreeMap::new();
    for backend in services.iter().flat_map(|service| &service.backends) {
        let ports = pods.entry((&backend.node, &backend.pod, backend.address)).or_default();
        if !ports.contains(&backend.port) {
            ports.push(backend.port);
        }
    }
    print_line(&format!("starting {} pods with nginx", pods.len()))?;
    let mut servers = Vec::new();
    for ((node, name, address), ports) in pods {
        let pod = cluster.add_pod_at(node, name, address)?;
        servers.push(start_nginx(cluster, &pod, &ports, signals)?);
    }
    Ok(servers)
}

fn start_nginx(cluster: &Cluster, pod: &Pod, ports: &[u16], signals: &Signals) -> Result<Process> {
    let directory = cluster.scratch().join(pod.name());
    fs::create_dir(&directory).with_context(|| format!("creating {}", directory.display()))?;
    fs::write(directory.join("nginx.conf"), configuration(pod.name(), ports)).context("writing nginx.conf")?;
    let log = File::create(directory.join("log")).context("creating the log of nginx")?;
    let mut command = pod.command("nginx")?;
    command
        .args(["-e", "stderr", "-c", "nginx.conf", "-p"])
        .arg(&directory)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    let mut process = Process::spawn(&mut command)?;
    let deadline = Instant::now() + scaled_timeout(START);
    for &port in ports {
        while pod.within(|| TcpStream::connect(pod.socket(port)))?.is_err() {
            if signals.arrived() {
                bail!("interrupted");
            }
            if !process.is_running()? || Instant::now() >= deadline {
                let log = fs::read_to_string(directory.join("log")).unwrap_or_default();
                bail!("nginx in pod {} does not listen on port {port}: {log}", pod.name());
            }
            signals.sleep(Duration::from_millis(10));
        }
    }
    Ok(process)
}

/// Returns a configuration for one process that uses only its own directory, answers with the pod's name, and closes each
/// connection after the response.
fn configuration(name: &str, ports: &[u16]) -> String {
    let listen: String = ports
        .iter()
        .map(|port| format!("listen {port} backlog=1024; "))
        .collect();
    format!(
        "daemon off;
master_process off;
pid nginx.pid;
error_log stderr;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  keepalive_timeout 0;
  client_body_temp_path body;
  proxy_temp_path proxy;
  fastcgi_temp_path fastcgi;
  uwsgi_temp_path uwsgi;
  scgi_temp_path scgi;
  default_type text/plain;
  server {{
    {listen}
    location / {{ return 200 \"{name}\\n\"; }}
  }}
}}
"
    )
}
