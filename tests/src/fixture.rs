//! A fixture for tests of outside clients: two nodes with an agent and a server pod each, and the outcomes of requests.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::manifests::{Manifests, node};
use crate::scripted_socket::plain;
use crate::{
    CallResult, Cluster, Netns, Node, Pod, Process, RunningAgent, SocketCall, SocketKind, Testbed, Underlay,
    pause_between_polls, scaled_timeout, testbed,
};

/// The TCP and the UDP port of the server pods.
pub const POD_PORTS: [u16; 2] = [8080, 5353];

/// The outcome of a request: the server that answered and the source address that it saw, or an error number.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// A server answered.
    Served {
        /// The name of the server.
        by: String,
        /// The client's address, as the server saw it.
        seen: IpAddr,
    },
    /// The request failed with this error number.
    Failed(i32),
}

impl Outcome {
    /// Checks that `by` answered, and that it saw `seen` if that is given.
    ///
    /// # Errors
    /// If the outcome is another one.
    pub fn ensure_served_by(&self, by: &str, seen: Option<IpAddr>, what: &str) -> Result<()> {
        let Self::Served { by: is, seen: saw } = self else {
            bail!("{what}: {self:?}, expected an answer of {by}");
        };
        ensure!(
            is == by && seen.is_none_or(|seen| seen == *saw),
            "{what}: {self:?}, expected {by} {seen:?}"
        );
        Ok(())
    }
}

/// Returns the kind of socket for TCP or UDP to an address.
#[must_use]
pub fn socket_kind(udp: bool, to: IpAddr) -> SocketKind {
    match (udp, to.is_ipv4()) {
        (false, true) => SocketKind::Tcp4,
        (false, false) => SocketKind::Tcp6,
        (true, true) => SocketKind::Udp4,
        (true, false) => SocketKind::Udp6,
    }
}

/// Two nodes with an agent each, outside clients, and a pod on each node: `one` and `two`, with a TCP and a UDP server.
pub struct TwoNodeFixture {
    /// The agents of the nodes.
    pub agents: [RunningAgent; 2],
    /// The manifests that the agents read.
    pub manifests: Manifests,
    /// The pods `one` and `two`.
    pub pods: [Pod; 2],
    testbed: Testbed,
    _servers: Vec<Process>,
    /// The cluster; the last field, so that it is dropped last.
    pub cluster: Cluster,
}

impl TwoNodeFixture {
    /// Builds the fixture with one outside client.
    ///
    /// # Errors
    /// If a part of it cannot be created or started.
    pub fn new(underlay: Underlay) -> Result<Self> {
        Self::with(underlay, 1, &[])
    }

    /// Builds the fixture with a number of outside clients, and with flags for the agents.
    ///
    /// # Errors
    /// If a part of it cannot be created or started.
    pub fn with(underlay: Underlay, clients: u8, flags: &[&str]) -> Result<Self> {
        let testbed = testbed();
        let cluster = Cluster::builder()
            .nodes(2)
            .clients(clients)
            .underlay(underlay)
            .build()?;
        let pods = [cluster.add_pod("n1", "one")?, cluster.add_pod("n2", "two")?];
        let mut servers = Vec::new();
        for pod in &pods {
            servers.extend(testbed.serve_both(pod, pod.name(), POD_PORTS)?);
        }
        let manifests = Manifests::new(&cluster)?;
        let text: String = cluster.nodes().iter().map(node).collect();
        manifests.write("nodes.yaml", &text)?;
        let agents = [
            manifests.serve(&cluster, "n1", flags)?,
            manifests.serve(&cluster, "n2", flags)?,
        ];
        Ok(Self {
            agents,
            manifests,
            pods,
            testbed,
            _servers: servers,
            cluster,
        })
    }

    /// Returns a node by its name.
    #[must_use]
    pub fn node(&self, name: &str) -> &Node {
        self.cluster.node(name)
    }

    /// Returns the first outside client.
    #[must_use]
    pub fn client(&self) -> &Netns {
        self.cluster.client()
    }

    /// Sends one request from a new socket, by TCP or UDP.
    ///
    /// # Errors
    /// If the reply has another source than `to`, or cannot be parsed.
    pub fn request(&self, from: &Netns, udp: bool, to: SocketAddr) -> Result<Outcome> {
        self.testbed.request(from, udp, to)
    }

    /// Writes a manifest, waits until both agents have applied it, and runs `verify` on both.
    ///
    /// # Errors
    /// If an agent does not apply it in time, or its maps differ from the desired state.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        let applies = |agent: &RunningAgent| anyhow::Ok(agent.status()?.agent.applies);
        let before = [applies(&self.agents[0])?, applies(&self.agents[1])?];
        self.manifests.write(name, text)?;
        let deadline = Instant::now() + scaled_timeout(Duration::from_secs(10));
        for (agent, before) in self.agents.iter().zip(before) {
            let mut asked = Instant::now();
            while applies(agent)? == before {
                ensure!(Instant::now() < deadline, "{name} was not applied in time");
                pause_between_polls(asked);
                asked = Instant::now();
            }
        }
        self.agents.iter().try_for_each(|agent| agent.verify())
    }

    /// Returns both pods, in both families, as endpoints: addresses with the names of their nodes.
    #[must_use]
    pub fn endpoints(&self) -> Vec<(IpAddr, &str)> {
        self.pods.iter().flat_map(endpoints_of).collect()
    }

    /// Returns the sum of both nodes' counters of a drop reason.
    ///
    /// # Errors
    /// If `status` fails or does not have the reason.
    pub fn dropped(&self, reason: &str) -> Result<u64> {
        let all = self.agents.iter().map(|agent| agent.status()?.dropped(reason));
        all.sum()
    }
}

impl Testbed {
    /// Starts a TCP and a UDP server on all addresses of `netns`. Both reply with `name` and the source address that they
    /// see.
    ///
    /// # Errors
    /// If a server is not ready in time.
    pub fn serve_both(&self, netns: &Netns, name: &str, [tcp, udp]: [u16; 2]) -> Result<[Process; 2]> {
        let flags = ["--report-source"];
        Ok([
            self.serve_with(netns, &[&format!("[::]:{tcp}={name}")], &flags)?,
            self.serve_datagrams_with(netns, &[&format!("[::]:{udp}={name}")], &flags)?,
        ])
    }

    /// Sends one request to a server of [`Self::serve_both`], from a new socket, by TCP or UDP.
    ///
    /// # Errors
    /// If the reply has another source than `to`, or cannot be parsed.
    pub fn request(&self, from: &Netns, udp: bool, to: SocketAddr) -> Result<Outcome> {
        let mut socket = self.scripted_socket(from, socket_kind(udp, to.ip()))?;
        if let CallResult::Failed(errno) = socket.call(&SocketCall::Connect(to))? {
            return Ok(Outcome::Failed(errno));
        }
        if udp {
            socket.send("hello")?;
        }
        match socket.call(&SocketCall::Receive)? {
            CallResult::Received(by, text) => {
                ensure!(
                    by.is_none_or(|by| plain(by) == plain(to)),
                    "the reply to a request to {to} came from {by:?}"
                );
                let mut words = text.split_whitespace();
                let (Some(by), Some(seen)) = (words.next(), words.next()) else {
                    bail!("{text:?}");
                };
                Ok(Outcome::Served {
                    by: by.to_owned(),
                    seen: seen.parse::<IpAddr>().context("an address")?.to_canonical(),
                })
            }
            CallResult::Failed(errno) => Ok(Outcome::Failed(errno)),
            other => bail!("{other:?}"),
        }
    }

    /// Sends a number of requests to an address and returns the different outcomes.
    ///
    /// # Errors
    /// If a reply has another source than `to`, or cannot be parsed.
    pub fn request_many(&self, from: &Netns, udp: bool, to: SocketAddr, times: u64) -> Result<BTreeSet<Outcome>> {
        (0..times).map(|_| self.request(from, udp, to)).collect()
    }
}

/// Returns a pod as endpoints: its IPv4 and its IPv6 address, with the name of its node.
#[must_use]
pub fn endpoints_of(pod: &Pod) -> [(IpAddr, &str); 2] {
    [(pod.address().into(), pod.node()), (pod.address6().into(), pod.node())]
}

/// Returns the addresses of a node that outside clients reach: IPv4 and IPv6.
#[must_use]
pub fn node_addresses(node: &Node) -> [IpAddr; 2] {
    [node.address().into(), node.address6().into()]
}
