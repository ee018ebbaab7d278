//! Clients outside the cluster: two nodes with an agent each, a pod on each, and what who asks a node port gets.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::manifests::{Manifests, node};
use crate::scripted_socket::plain;
use crate::{
    CallResult, Cluster, Netns, Node, Pod, Process, RunningAgent, SocketCall, SocketKind, Testbed, Underlay,
    pause_between_polls, scaled_timeout,
};

/// The ports of streams and datagrams at which pods serve.
pub const POD_PORTS: [u16; 2] = [8080, 5353];

/// What a client gets: who answers, and whom that saw; or an errno.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// An answer.
    Served {
        /// The name of who answers.
        by: String,
        /// The client's address as that sees it.
        seen: IpAddr,
    },
    /// The error number.
    Failed(i32),
}

impl Outcome {
    /// Fails unless it was served by `by`, who saw `seen` where that is said.
    ///
    /// # Errors
    /// See above.
    pub fn ensure_served_by(&self, by: &str, seen: Option<IpAddr>, what: &str) -> Result<()> {
        let Self::Served { by: is, seen: saw } = self else {
            bail!("{what}: {self:?}, not served by {by}");
        };
        ensure!(
            is == by && seen.is_none_or(|seen| seen == *saw),
            "{what}: {self:?}, not {by} {seen:?}"
        );
        Ok(())
    }
}

/// The kind of socket for TCP or UDP to an address.
#[must_use]
pub fn socket_kind(udp: bool, to: IpAddr) -> SocketKind {
    match (udp, to.is_ipv4()) {
        (false, true) => SocketKind::Tcp4,
        (false, false) => SocketKind::Tcp6,
        (true, true) => SocketKind::Udp4,
        (true, false) => SocketKind::Udp6,
    }
}

/// Two nodes with an agent each, clients outside, and a pod on each node: `one` and `two`, which serve streams and datagrams.
pub struct TwoNodeFixture {
    /// The agents of the nodes.
    pub agents: [RunningAgent; 2],
    /// What they serve.
    pub manifests: Manifests,
    /// The pods.
    pub pods: [Pod; 2],
    testbed: Testbed,
    _servers: Vec<Process>,
    /// All else; the last to go.
    pub cluster: Cluster,
}

impl TwoNodeFixture {
    /// With one client outside; `bed` is the path of `lb-testbed`.
    ///
    /// # Errors
    /// When something cannot be made or started.
    pub fn new(program: &str, underlay: Underlay) -> Result<Self> {
        Self::with(program, underlay, 1, &[])
    }

    /// With so many clients, and flags for the agents.
    ///
    /// # Errors
    /// When something cannot be made or started.
    pub fn with(program: &str, underlay: Underlay, clients: u8, flags: &[&str]) -> Result<Self> {
        let testbed = Testbed::new(program);
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
            manifests.serve(&cluster, "n1", Path::new(program), flags)?,
            manifests.serve(&cluster, "n2", Path::new(program), flags)?,
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

    /// A node by its name.
    #[must_use]
    pub fn node(&self, name: &str) -> &Node {
        self.cluster.node(name)
    }

    /// The first client.
    #[must_use]
    pub fn client(&self) -> &Netns {
        self.cluster.client()
    }

    /// Asks once, from a new socket, by TCP or UDP.
    ///
    /// # Errors
    /// When another answers than who was asked, or the answer is not understood.
    pub fn request(&self, from: &Netns, udp: bool, to: SocketAddr) -> Result<Outcome> {
        self.testbed.request(from, udp, to)
    }

    /// Writes a manifest, and waits until both agents have applied it.
    ///
    /// # Errors
    /// When they do not, or their maps are not as they should be then.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        let applies = |agent: &RunningAgent| anyhow::Ok(agent.status()?.agent.applies);
        let before = [applies(&self.agents[0])?, applies(&self.agents[1])?];
        self.manifests.write(name, text)?;
        let deadline = Instant::now() + scaled_timeout(Duration::from_secs(10));
        for (agent, before) in self.agents.iter().zip(before) {
            let mut asked = Instant::now();
            while applies(agent)? == before {
                ensure!(Instant::now() < deadline, "{name} is not applied");
                pause_between_polls(asked);
                asked = Instant::now();
            }
        }
        self.agents.iter().try_for_each(|agent| agent.verify())
    }

    /// Both pods, in both families, as endpoints.
    #[must_use]
    pub fn endpoints(&self) -> Vec<(IpAddr, &str)> {
        self.pods.iter().flat_map(endpoints_of).collect()
    }

    /// How many packets both agents have dropped, or passed on, for a reason.
    ///
    /// # Errors
    /// When one does not answer.
    pub fn dropped(&self, reason: &str) -> Result<u64> {
        let all = self.agents.iter().map(|agent| agent.status()?.dropped(reason));
        all.sum()
    }
}

impl Testbed {
    /// Servers of streams and datagrams on all addresses of a place, which tell a name and the address that they see.
    ///
    /// # Errors
    /// When they are not ready in time.
    pub fn serve_both(&self, netns: &Netns, name: &str, [tcp, udp]: [u16; 2]) -> Result<[Process; 2]> {
        let tell = ["--report-source"];
        Ok([
            self.serve_with(netns, &[&format!("[::]:{tcp}={name}")], &tell)?,
            self.serve_datagrams_with(netns, &[&format!("[::]:{udp}={name}")], &tell)?,
        ])
    }

    /// Asks such a server once, from a new socket, by TCP or UDP.
    ///
    /// # Errors
    /// When another answers than who was asked, or the answer is not understood.
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
                    "{to} was asked, {by:?} answered"
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

    /// All that answer at an address and the sources that they see, asked often.
    ///
    /// # Errors
    /// As [`Self::request`].
    pub fn request_many(&self, from: &Netns, udp: bool, to: SocketAddr, times: u64) -> Result<BTreeSet<Outcome>> {
        (0..times).map(|_| self.request(from, udp, to)).collect()
    }
}

/// A pod as endpoints.
#[must_use]
pub fn endpoints_of(pod: &Pod) -> [(IpAddr, &str); 2] {
    [(pod.address().into(), pod.node()), (pod.address6().into(), pod.node())]
}

/// The addresses of a node that a client outside reaches.
#[must_use]
pub fn node_addresses(node: &Node) -> [IpAddr; 2] {
    [node.address().into(), node.address6().into()]
}
