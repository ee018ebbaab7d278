//! Fixture of all tests: a cluster, its control plane, an agent on each of two nodes, and client pods.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::core::v1::Service;
use lb_tests::control_plane::{ControlPlane, KubeletPod, Namespace, PodTemplate, WatchProxy};
use lb_tests::load::ConnectStep;
use lb_tests::{
    Agent, CallResult, Cluster, Connect, Netns, Pod, Process, RunningAgent, SocketCall, SocketKind, eventually_within,
    scaled_timeout, testbed,
};
use libc::{ENETUNREACH, ETIMEDOUT};

/// Port of the servers in pods, for TCP and UDP.
pub(crate) const TARGET: u16 = 8080;
/// Number of TCP connections to find out which backends answer. With five backends, one is missed in one of 10^9 cases.
const CONNECTIONS: u64 = 100;
/// Time limit for all of these connections together.
const CONNECT_LIMIT: Duration = Duration::from_secs(4);
/// Number of UDP sockets to find out which of two backends answer.
const DATAGRAMS: u64 = 40;
/// Nodes that have an agent and a client pod. The third node has pods that serve.
const AGENT_NODES: [&str; 2] = ["n1", "n2"];

/// User of the agents in the API, with the permissions of kube-proxy.
pub(crate) const USER: &str = "kube-proxy";

/// Timeout of a probe that gets no answer. A pod's packets go unanswered if its node has reached the kernel's rate
/// limit for ICMP errors to it.
const PROBE_TIMEOUT: Duration = Duration::from_millis(500);

/// Three nodes: the first in zone a, the others in zone b.
pub(crate) struct Fixture {
    agents: Vec<Mutex<RunningAgent>>,
    /// The agents again, connected to the API server directly, for `verify`.
    direct: Vec<Agent>,
    /// Proxy between the agents and the API server.
    pub(crate) watch_proxy: Option<WatchProxy>,
    pub(crate) control_plane: ControlPlane,
    clients: Vec<Pod>,
    pub(crate) cluster: Cluster,
}

/// Result of connecting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// These servers answered.
    Names(BTreeSet<String>),
    /// connect() failed at once with this error number.
    Failed(i32),
    /// The address belongs to no Service: the cluster has no route for it.
    NoRoute,
}

impl Outcome {
    /// Returns the outcome in which exactly these servers answer.
    pub(crate) fn names(names: &[&str]) -> Self {
        Self::Names(names.iter().map(|&name| name.to_owned()).collect())
    }
}

/// A pod with TCP and UDP servers that answer with its name.
pub(crate) struct Backend<'a> {
    pub(crate) kubelet: KubeletPod<'a>,
    _servers: Vec<Process>,
}

impl Fixture {
    /// Creates a fixture with agents that connect to the API server.
    pub(crate) fn new() -> Result<Self> {
        Self::with(|_| Ok(None))
    }

    /// Creates a fixture with agents that connect to the proxy that `watch_proxy` returns.
    pub(crate) fn with(watch_proxy: impl FnOnce(&ControlPlane) -> Result<Option<WatchProxy>>) -> Result<Self> {
        let cluster = Cluster::builder().nodes(3).client(true).build()?;
        let control_plane = ControlPlane::start(&cluster, cluster.client())?;
        for (node, zone) in [("n1", "a"), ("n2", "b"), ("n3", "b")] {
            control_plane.set_zone(node, Some(zone))?;
        }
        let watch_proxy = watch_proxy(&control_plane)?;
        let program = Agent::find()?;
        let config = control_plane.kubeconfig(USER);
        let agent = |node, url: &str| Agent::with_api_server(&cluster, cluster.node(node), &program, &config, url);
        let mut agents = Vec::new();
        let mut direct = Vec::new();
        let mut clients = Vec::new();
        for node in AGENT_NODES {
            let url = watch_proxy
                .as_ref()
                .map_or_else(|| control_plane.url(), WatchProxy::url);
            agents.push(Mutex::new(RunningAgent::start(agent(node, &url), &[])?));
            direct.push(agent(node, &control_plane.url()));
            clients.push(cluster.add_pod(node, "client")?);
        }
        let new = Self {
            agents,
            direct,
            watch_proxy,
            control_plane,
            clients,
            cluster,
        };
        new.verify()?;
        Ok(new)
    }

    /// Returns the last log lines of all programs.
    pub(crate) fn log_tails(&self) -> String {
        let agents = self.agents.iter().map(|agent| {
            let agent = agent.lock().unwrap_or_else(PoisonError::into_inner);
            format!("lb-agent on {}:\n{}\n", agent.node(), agent.log_tail())
        });
        agents.collect::<String>() + &self.control_plane.log_tails()
    }

    /// Waits until the maps of both agents match the objects of the API, as `verify` computes independently.
    pub(crate) fn verify(&self) -> Result<()> {
        for (agent, direct) in self.agents.iter().zip(&self.direct) {
            let mut agent = agent.lock().unwrap_or_else(PoisonError::into_inner);
            agent.wait("consistent with the API", |agent| {
                ensure!(agent.status()?.agent.complete, "not complete");
                direct.verify()
            })?;
        }
        Ok(())
    }

    /// Kills both agents and starts them again.
    pub(crate) fn restart_agents(&self) -> Result<()> {
        for agent in &self.agents {
            let mut agent = agent.lock().unwrap_or_else(PoisonError::into_inner);
            agent.kill()?;
            agent.start_again()?;
        }
        Ok(())
    }

    /// Returns a client pod on each node.
    pub(crate) fn pods(&self) -> Vec<&Netns> {
        self.clients.iter().map(|pod| &**pod).collect()
    }

    /// Returns the client pod on a node.
    pub(crate) fn pod_on(&self, node: &str) -> &Netns {
        let pod = self.clients.iter().find(|pod| pod.node() == node);
        pod.unwrap_or_else(|| panic!("no client on {node}"))
    }

    /// Returns a node's own processes.
    pub(crate) fn node(&self, node: &str) -> &Netns {
        self.cluster.node(node)
    }

    /// Returns all clients inside the cluster: both nodes and a pod on each.
    pub(crate) fn all_clients(&self) -> Vec<&Netns> {
        let nodes = AGENT_NODES.map(|node| self.node(node));
        self.pods().into_iter().chain(nodes).collect()
    }

    /// Returns the clients on one node.
    pub(crate) fn clients_on(&self, node: &str) -> Vec<&Netns> {
        vec![self.pod_on(node), self.node(node)]
    }

    /// Starts a pod that serves TCP and UDP at [`TARGET`] and is ready.
    pub(crate) fn backend<'a>(
        &self,
        namespace: &Namespace<'a>,
        node: &str,
        name: &str,
        template: &PodTemplate,
    ) -> Result<Backend<'a>> {
        self.backend_at(namespace, node, name, template, &[TARGET])
    }

    /// Starts a pod that serves TCP and UDP at these ports and is ready.
    pub(crate) fn backend_at<'a>(
        &self,
        namespace: &Namespace<'a>,
        node: &str,
        name: &str,
        template: &PodTemplate,
        ports: &[u16],
    ) -> Result<Backend<'a>> {
        let kubelet = namespace.start_pod(&self.cluster, node, name, template)?;
        let listen: Vec<_> = ports.iter().map(|port| format!("[::]:{port}={name}")).collect();
        let listen: Vec<_> = listen.iter().map(String::as_str).collect();
        let servers = vec![
            testbed().serve_with(kubelet.netns(), &listen, &["--echo"])?,
            testbed().serve_datagrams(kubelet.netns(), &listen)?,
        ];
        kubelet.set_ready(true)?;
        Ok(Backend {
            kubelet,
            _servers: servers,
        })
    }

    /// Waits until connections from each of these clients have this outcome. Then the maps of the agents must match the
    /// API, and the outcome must still be the same.
    pub(crate) fn expect(&self, from: &[&Netns], to: Target, expected: &Outcome) -> Result<()> {
        self.expect_within(Duration::from_secs(20), from, to, expected)
    }

    /// Waits for an outcome as [`Self::expect`] does, with another time limit.
    pub(crate) fn expect_within(&self, limit: Duration, from: &[&Netns], to: Target, expected: &Outcome) -> Result<()> {
        let check = || {
            for netns in from {
                let found = to.outcome(netns)?;
                ensure!(
                    found == *expected,
                    "{to} from {}: {found:?}, not {expected:?}",
                    netns.name()
                );
            }
            Ok(())
        };
        eventually_within(limit, &format!("{to}: {expected:?}"), check)?;
        self.verify()?;
        check().context("the outcome changed again")
    }
}

/// Protocol and address of a destination.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Target {
    Tcp(SocketAddr),
    Udp(SocketAddr),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(to) => write!(f, "{to}/tcp"),
            Self::Udp(to) => write!(f, "{to}/udp"),
        }
    }
}

impl Target {
    /// Address and port.
    pub(crate) fn address(self) -> SocketAddr {
        match self {
            Self::Tcp(to) | Self::Udp(to) => to,
        }
    }

    /// Returns the result of connecting from `place` now.
    pub(crate) fn outcome(self, netns: &Netns) -> Result<Outcome> {
        match self {
            Self::Tcp(to) => streams(netns, to),
            Self::Udp(to) => datagrams(netns, to),
        }
    }
}

fn streams(netns: &Netns, to: SocketAddr) -> Result<Outcome> {
    let connect = Connect::to(&[to]).peer_check();
    // A single connection first, to find out whether the address is served.
    let probe = testbed().connect(netns, &connect.clone().count(1).timeout(scaled_timeout(PROBE_TIMEOUT)))?;
    let errno = probe.failures.first().map(|failure| (failure.step, failure.errno));
    if let Some((ConnectStep::Connect, ENETUNREACH | ETIMEDOUT)) = errno {
        return Ok(Outcome::NoRoute);
    }
    // Limited in time: if the outcome changes meanwhile, each connection may run into a timeout.
    let connect = connect
        .count(CONNECTIONS)
        .seconds(scaled_timeout(CONNECT_LIMIT).as_secs_f64());
    let summary = testbed().connect(netns, &connect)?;
    ensure!(summary.peer_mismatches == 0, "{:?}", summary.mismatches);
    ensure!(
        summary.connections == CONNECTIONS,
        "the connections take too long: {summary:?}"
    );
    if summary.failure_count == 0 {
        return Ok(Outcome::Names(summary.per_backend.into_keys().collect()));
    }
    ensure!(
        summary.failure_count == CONNECTIONS,
        "only some connections fail: {summary:?}"
    );
    let failures = summary.failures.iter();
    let ways: BTreeSet<_> = failures
        .map(|failure| (failure.step == ConnectStep::Connect, failure.errno))
        .collect();
    match ways.into_iter().collect::<Vec<_>>()[..] {
        [(true, errno)] => Ok(Outcome::Failed(errno)),
        _ => bail!("connections fail in different ways: {:?}", summary.failures),
    }
}

fn datagrams(netns: &Netns, to: SocketAddr) -> Result<Outcome> {
    let kind = if to.is_ipv4() {
        SocketKind::Udp4
    } else {
        SocketKind::Udp6
    };
    let mut socket = testbed().scripted_socket(netns, kind)?;
    let mut names = BTreeSet::new();
    for _ in 0..DATAGRAMS {
        // A socket that connects again in the same tick of the clock gets the same backend.
        socket.call(&SocketCall::Reopen)?;
        if let CallResult::Failed(errno) = socket.call(&SocketCall::Connect(to))? {
            ensure!(names.is_empty(), "{names:?} answered, then error {errno}");
            return Ok(Outcome::Failed(errno));
        }
        ensure!(socket.peer()? == to, "getpeername returns another address");
        socket.send("hello")?;
        let (_, text) = socket.receive()?;
        names.extend(text.split_whitespace().next().map(str::to_owned));
    }
    Ok(Outcome::Names(names))
}

/// Returns the addresses of a Service, in its own order.
pub(crate) fn addresses(service: &Service) -> Result<Vec<IpAddr>> {
    let spec = service.spec.as_ref().context("a Service without spec")?;
    let all = spec.cluster_ips.as_deref().unwrap_or_default();
    all.iter()
        .map(|ip| ip.parse().with_context(|| format!("the address {ip}")))
        .collect()
}

/// Returns a TCP port of the first address of a Service.
pub(crate) fn tcp(service: &Service, port: u16) -> Result<Target> {
    let first = *addresses(service)?.first().context("a Service without address")?;
    Ok(Target::Tcp((first, port).into()))
}

/// Returns a UDP port of the first address of a Service.
pub(crate) fn udp(service: &Service, port: u16) -> Result<Target> {
    let first = *addresses(service)?.first().context("a Service without address")?;
    Ok(Target::Udp((first, port).into()))
}
