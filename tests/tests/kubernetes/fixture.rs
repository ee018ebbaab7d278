//! What all tests share: a cluster, its control plane, an agent on each of two nodes, and who asks them.

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
    Agent, CallResult, Cluster, Connect, Netns, Pod, Process, RunningAgent, SocketCall, SocketKind, Testbed,
    eventually_within, scaled_timeout,
};

const TESTBED: &str = env!("CARGO_BIN_EXE_lb-testbed");
/// Where servers in pods listen, for streams and for datagrams.
pub(crate) const TARGET: u16 = 8080;
/// Streams that find out who answers. Of five backends, one is not among them in one of 10^9 cases.
const CONNECTIONS: u64 = 100;
/// How long they may take together.
const SOME: Duration = Duration::from_secs(4);
/// Datagrams that do; of two backends.
const DATAGRAMS: u64 = 40;
/// The nodes that have an agent, and a client pod. The third has pods for them to reach.
const SERVED: [&str; 2] = ["n1", "n2"];

/// Who the agents are: what kube-proxy may, they may.
pub(crate) const USER: &str = "kube-proxy";

pub(crate) const ECONNREFUSED: i32 = 111;
pub(crate) const EHOSTUNREACH: i32 = 113;
const ENETUNREACH: i32 = 101;
const ETIMEDOUT: i32 = 110;
/// How long nobody answers. A pod's packets meet silence where its node has told it often that there is no route.
const SILENCE: Duration = Duration::from_millis(500);

/// Three nodes, the first of zone a, the others of zone b.
pub(crate) struct Fixture {
    agents: Vec<Mutex<RunningAgent>>,
    /// The same, but for `verify`, which asks the API server itself.
    direct: Vec<Agent>,
    /// What stands between the agents and the API server.
    pub(crate) watch_proxy: Option<WatchProxy>,
    pub(crate) control_plane: ControlPlane,
    clients: Vec<Pod>,
    pub(crate) cluster: Cluster,
}

/// What happens to those who connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// These answered.
    Names(BTreeSet<String>),
    /// They are told at once that they cannot: the error number.
    Failed(i32),
    /// The address is none: nothing in a cluster has a route out of it.
    Nobody,
}

impl Outcome {
    /// These answer, and nobody else.
    pub(crate) fn names(names: &[&str]) -> Self {
        Self::Names(names.iter().map(|&name| name.to_owned()).collect())
    }
}

/// A pod with servers of streams and datagrams that tell its name.
pub(crate) struct Backend<'a> {
    pub(crate) kubelet: KubeletPod<'a>,
    _servers: Vec<Process>,
}

impl Fixture {
    /// With agents that ask the API server.
    pub(crate) fn new() -> Result<Self> {
        Self::with(|_| Ok(None))
    }

    /// With agents that ask what `mixer` makes.
    pub(crate) fn with(watch_proxy: impl FnOnce(&ControlPlane) -> Result<Option<WatchProxy>>) -> Result<Self> {
        let cluster = Cluster::builder().nodes(3).client(true).build()?;
        let control_plane = ControlPlane::start(&cluster, cluster.client())?;
        for (node, zone) in [("n1", "a"), ("n2", "b"), ("n3", "b")] {
            control_plane.set_zone(node, Some(zone))?;
        }
        let watch_proxy = watch_proxy(&control_plane)?;
        let program = Agent::find(TESTBED.as_ref())?;
        let config = control_plane.kubeconfig(USER);
        let agent = |node, url: &str| Agent::with_api_server(&cluster, cluster.node(node), &program, &config, url);
        let mut agents = Vec::new();
        let mut direct = Vec::new();
        let mut clients = Vec::new();
        for node in SERVED {
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

    pub(crate) fn testbed() -> Testbed {
        Testbed::new(TESTBED)
    }

    /// What the programs have logged last.
    pub(crate) fn log_tails(&self) -> String {
        let agents = self.agents.iter().map(|agent| {
            let agent = agent.lock().unwrap_or_else(PoisonError::into_inner);
            format!("lb-agent on {}:\n{}\n", agent.node(), agent.log_tail())
        });
        agents.collect::<String>() + &self.control_plane.log_tails()
    }

    /// Waits until both agents have in their maps what the API says, computed anew.
    pub(crate) fn verify(&self) -> Result<()> {
        for (agent, direct) in self.agents.iter().zip(&self.direct) {
            let mut agent = agent.lock().unwrap_or_else(PoisonError::into_inner);
            agent.wait("as the API says", |agent| {
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

    /// A client pod on each node.
    pub(crate) fn pods(&self) -> Vec<&Netns> {
        self.clients.iter().map(|pod| &**pod).collect()
    }

    /// The client pod on a node.
    pub(crate) fn pod_on(&self, node: &str) -> &Netns {
        let pod = self.clients.iter().find(|pod| pod.node() == node);
        pod.unwrap_or_else(|| panic!("no client on {node}"))
    }

    /// A node's own processes.
    pub(crate) fn node(&self, node: &str) -> &Netns {
        self.cluster.node(node)
    }

    /// Both nodes and a pod on each: everybody who is served.
    pub(crate) fn everybody(&self) -> Vec<&Netns> {
        let nodes = SERVED.map(|node| self.node(node));
        self.pods().into_iter().chain(nodes).collect()
    }

    /// Everybody on one node.
    pub(crate) fn all_on(&self, node: &str) -> Vec<&Netns> {
        vec![self.pod_on(node), self.node(node)]
    }

    /// Starts a pod that serves streams and datagrams at [`TARGET`] and is ready.
    pub(crate) fn backend<'a>(
        &self,
        namespace: &Namespace<'a>,
        node: &str,
        name: &str,
        template: &PodTemplate,
    ) -> Result<Backend<'a>> {
        self.backend_at(namespace, node, name, template, &[TARGET])
    }

    /// The same at other ports.
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
            Self::testbed().serve_with(kubelet.netns(), &listen, &["--echo"])?,
            Self::testbed().serve_datagrams(kubelet.netns(), &listen)?,
        ];
        kubelet.set_ready(true)?;
        Ok(Backend {
            kubelet,
            _servers: servers,
        })
    }

    /// Waits until those who connect from each of these places have this outcome, with streams and, if `datagrams`, with
    /// datagrams. Then the agents' maps must be what the API says, and the outcome still the same.
    pub(crate) fn expect(&self, from: &[&Netns], to: Target, expected: &Outcome) -> Result<()> {
        self.expect_within(Duration::from_secs(20), from, to, expected)
    }

    /// The same with another limit.
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
        check().context("that was so, and is no more")
    }
}

/// Where to connect to, and how.
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
    /// Where it is.
    pub(crate) fn address(self) -> SocketAddr {
        match self {
            Self::Tcp(to) | Self::Udp(to) => to,
        }
    }

    /// What happens to those who connect from `place` now.
    pub(crate) fn outcome(self, netns: &Netns) -> Result<Outcome> {
        match self {
            Self::Tcp(to) => streams(netns, to),
            Self::Udp(to) => datagrams(netns, to),
        }
    }
}

fn streams(netns: &Netns, to: SocketAddr) -> Result<Outcome> {
    let connect = Connect::to(&[to]).peer_check();
    // One to see whether there is anybody.
    let probe = Fixture::testbed().connect(netns, &connect.clone().count(1).timeout(scaled_timeout(SILENCE)))?;
    let errno = probe.failures.first().map(|failure| (failure.step, failure.errno));
    if let Some((ConnectStep::Connect, ENETUNREACH | ETIMEDOUT)) = errno {
        return Ok(Outcome::Nobody);
    }
    // Not for long: where that changes meanwhile, each of them may meet silence.
    let connect = connect.count(CONNECTIONS).seconds(scaled_timeout(SOME).as_secs_f64());
    let summary = Fixture::testbed().connect(netns, &connect)?;
    ensure!(summary.peer_mismatches == 0, "{:?}", summary.mismatches);
    ensure!(summary.connections == CONNECTIONS, "they take long: {summary:?}");
    if summary.failure_count == 0 {
        return Ok(Outcome::Names(summary.per_backend.into_keys().collect()));
    }
    ensure!(summary.failure_count == CONNECTIONS, "some fail: {summary:?}");
    let failures = summary.failures.iter();
    let ways: BTreeSet<_> = failures
        .map(|failure| (failure.step == ConnectStep::Connect, failure.errno))
        .collect();
    match ways.into_iter().collect::<Vec<_>>()[..] {
        [(true, errno)] => Ok(Outcome::Failed(errno)),
        _ => bail!("they fail in different ways: {:?}", summary.failures),
    }
}

fn datagrams(netns: &Netns, to: SocketAddr) -> Result<Outcome> {
    let kind = if to.is_ipv4() {
        SocketKind::Udp4
    } else {
        SocketKind::Udp6
    };
    let mut socket = Fixture::testbed().scripted_socket(netns, kind)?;
    let mut names = BTreeSet::new();
    for _ in 0..DATAGRAMS {
        if let CallResult::Failed(errno) = socket.call(&SocketCall::Connect(to))? {
            ensure!(names.is_empty(), "{names:?} answered, then error {errno}");
            return Ok(Outcome::Failed(errno));
        }
        ensure!(socket.peer()? == to, "the peer is another");
        socket.send("hello")?;
        let (_, text) = socket.receive()?;
        names.extend(text.split_whitespace().next().map(str::to_owned));
    }
    Ok(Outcome::Names(names))
}

/// The addresses of a Service, in its own order.
pub(crate) fn addresses(service: &Service) -> Result<Vec<IpAddr>> {
    let spec = service.spec.as_ref().context("a Service without spec")?;
    let all = spec.cluster_ips.as_deref().unwrap_or_default();
    all.iter()
        .map(|ip| ip.parse().with_context(|| format!("the address {ip}")))
        .collect()
}

/// A TCP port of the first address of a Service.
pub(crate) fn tcp(service: &Service, port: u16) -> Result<Target> {
    let first = *addresses(service)?.first().context("a Service without address")?;
    Ok(Target::Tcp((first, port).into()))
}

/// A UDP port of the first address of a Service.
pub(crate) fn udp(service: &Service, port: u16) -> Result<Target> {
    let first = *addresses(service)?.first().context("a Service without address")?;
    Ok(Target::Udp((first, port).into()))
}
