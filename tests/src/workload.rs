//! Clients of every kind that run while an agent is restarted, replaced or reconfigured.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};

use crate::fixture::{TwoNodeFixture, socket_kind};
use crate::load::{Load, Summary};
use crate::manifests::{vips, web_and_dns};
use crate::{Connect, HeldConnections, Netns, Pod, Process, ScriptedSocket, Underlay, scaled_timeout, testbed};

/// TCP and UDP port of the servers in the pods.
const SERVER_PORTS: [u16; 2] = [8081, 5354];
/// Names of the Services. The second has session affinity.
const SERVICES: [&str; 2] = ["web", "sticky"];
/// TCP and UDP node ports of the Services.
const NODE_PORTS: [[u16; 2]; 2] = [[30080, 30053], [30081, 30054]];
/// Last part of the addresses of the Services.
const ADDRESSES: [u8; 2] = [20, 21];
/// Number of connections that each client holds.
const HELD: u32 = 20;
/// Time limit for all rounds in seconds: clients that ended earlier would find no failure.
const LONGEST_RUN: f64 = 3600.0;

/// Two nodes with two Services, and clients in a pod and outside: short connections, held connections, and connected and
/// unconnected UDP sockets, in both families.
pub struct Workload {
    /// The nodes and their agents.
    pub fixture: TwoNodeFixture,
    _servers: Vec<Process>,
    client: Pod,
}

impl Workload {
    /// Starts nodes, agents with these flags, and servers.
    ///
    /// # Errors
    /// If a part cannot be created or started.
    pub fn new(flags: &[&str]) -> Result<Self> {
        let fixture = TwoNodeFixture::with(Underlay::Vxlan, 1, flags)?;
        let mut servers = Vec::new();
        let [tcp, udp] = SERVER_PORTS;
        for pod in &fixture.pods {
            servers.push(testbed().serve_with(pod, &[&format!("[::]:{tcp}={}", pod.name())], &["--echo"])?);
            servers.push(testbed().serve_datagrams(pod, &[&format!("[::]:{udp}={}", pod.name())])?);
        }
        let ends = fixture.endpoints();
        let text: String = ["", "sessionAffinity: ClientIP"]
            .into_iter()
            .enumerate()
            .map(|(i, spec)| {
                web_and_dns(
                    SERVICES[i],
                    ADDRESSES[i],
                    Some(NODE_PORTS[i]),
                    spec,
                    &ends,
                    SERVER_PORTS,
                )
            })
            .collect();
        fixture.write("services.yaml", &text)?;
        Ok(Self {
            client: fixture.cluster.add_pod("n1", "client")?,
            fixture,
            _servers: servers,
        })
    }

    /// Runs `step` in each round, which gets the number of the round, while all clients run.
    ///
    /// # Errors
    /// If a step fails; if a connection fails, a datagram is lost or reaches another server, a held connection ends, or
    /// getpeername changes; if `verify` finds a difference, or a counter has fallen.
    pub fn run(&mut self, rounds: u64, mut step: impl FnMut(&mut TwoNodeFixture, u64) -> Result<()>) -> Result<()> {
        let outside = self.fixture.client().clone();
        let held = [self.hold(&self.client, false)?, self.hold(&outside, true)?];
        let web = self.at(0, false, false, 0);
        let mut peer = testbed().scripted_socket(&self.client, socket_kind(false, web.ip()))?;
        peer.connect(web)?;
        let loads = [
            self.start_clients(&self.client, false)?,
            self.start_clients(&outside, true)?,
        ];
        let stop = AtomicBool::new(false);
        let clients = self.udp_clients()?;
        let counts = thread::scope(|scope| -> Result<Vec<u64>> {
            let threads: Vec<_> = clients
                .into_iter()
                .map(|client| scope.spawn(|| client.run(&stop)))
                .collect();
            let result = (0..rounds).try_for_each(|round| {
                let before = self.connections()?;
                step(&mut self.fixture, round)?;
                self.fixture.agents[0].verify()?;
                let after = self.connections()?;
                println!("round {round}: {before:?} connections before, {after:?} after");
                ensure!(before <= after, "counters are lower after the step");
                ensure!(peer.peer()? == web, "getpeername returns {}", peer.peer()?);
                Ok(())
            });
            stop.store(true, Ordering::Relaxed);
            let counts = threads
                .into_iter()
                .map(|thread| thread.join().map_err(|_| anyhow!("a client has panicked"))?);
            let counts = counts.collect();
            result.and(counts)
        })?;
        for (load, outside) in loads.into_iter().zip([false, true]) {
            let summary = load.stop()?;
            println!("outside: {outside}, {} connections", summary.connections);
            self.check(&summary, outside)?;
        }
        println!("{counts:?} datagrams");
        for held in held {
            let held = held.finish()?;
            ensure!((held.held, held.live) == (HELD.into(), HELD.into()), "{held:?}");
        }
        Ok(())
    }

    /// Returns the counters of both Services on the first node.
    fn connections(&self) -> Result<[u64; 2]> {
        let agent = &self.fixture.agents[0];
        Ok([
            agent.connections(SERVICES[0], None)?,
            agent.connections(SERVICES[1], None)?,
        ])
    }

    /// Returns the address of a Service for its TCP or UDP port: the cluster IP, or the node's address and node port.
    fn at(&self, service: usize, is_udp: bool, outside: bool, family: usize) -> SocketAddr {
        if outside {
            let node = self.fixture.node("n1");
            let ip = [IpAddr::from(node.address()), node.address6().into()][family];
            return SocketAddr::new(ip, NODE_PORTS[service][usize::from(is_udp)]);
        }
        SocketAddr::new(vips(ADDRESSES[service])[family], if is_udp { 53 } else { 80 })
    }

    /// Holds connections to the first Service in both families.
    fn hold(&self, netns: &Netns, outside: bool) -> Result<HeldConnections> {
        let targets = [self.at(0, false, outside, 0), self.at(0, false, outside, 1)];
        testbed().hold(netns, &targets, HELD)
    }

    /// Starts clients in a network namespace that connect to both Services in both families until they are stopped.
    fn start_clients(&self, netns: &Netns, outside: bool) -> Result<Load> {
        let targets: Vec<_> = (0..4).map(|i| self.at(i / 2, false, outside, i % 2)).collect();
        let connect = Connect::to(&targets)
            .threads(2)
            .rate(200.0)
            .seconds(LONGEST_RUN)
            .timeout(scaled_timeout(Duration::from_secs(5)))
            .peer_check();
        testbed().start(netns, &connect)
    }

    /// Fails unless all connections succeeded, and those to the Service with affinity reached one server.
    fn check(&self, summary: &Summary, outside: bool) -> Result<()> {
        summary.all_well()?;
        for family in 0..2 {
            let to = self.at(1, false, outside, family).to_string();
            let reached = summary.per_target.get(&to).context("no connection")?;
            ensure!(reached.len() == 1, "connections to {to} reached {reached:?}");
        }
        Ok(())
    }

    fn udp_clients(&self) -> Result<Vec<UdpClient>> {
        let outside: &Netns = self.fixture.client();
        let mut clients = Vec::new();
        for family in 0..2 {
            let inside = self.at(0, true, false, family);
            clients.push(UdpClient::new(&self.client, inside, false)?);
            clients.push(UdpClient::new(&self.client, inside, true)?);
            clients.push(UdpClient::new(outside, self.at(0, true, true, family), true)?);
        }
        Ok(clients)
    }
}

/// A UDP socket that sends to a Service until it is stopped.
struct UdpClient {
    socket: ScriptedSocket,
    to: SocketAddr,
    /// The socket is connected to the Service.
    is_connected: bool,
}

impl UdpClient {
    fn new(netns: &Netns, to: SocketAddr, is_connected: bool) -> Result<Self> {
        let mut socket = testbed().scripted_socket(netns, socket_kind(true, to.ip()))?;
        if is_connected {
            socket.connect(to)?;
        }
        Ok(Self {
            socket,
            to,
            is_connected,
        })
    }

    /// Sends a datagram, and returns the server that replied.
    fn exchange(&mut self, text: &str) -> Result<String> {
        if self.is_connected {
            self.socket.send(text)?;
            return self.socket.receive_reply(self.to, text);
        }
        self.socket.exchange(self.to, text)
    }

    /// Sends datagrams until `stop`. All have to reach the same server. Returns their number.
    fn run(mut self, stop: &AtomicBool) -> Result<u64> {
        let what = format!("connected: {}, to {}", self.is_connected, self.to);
        let first = self.exchange("first").with_context(|| what.clone())?;
        let mut count = 1;
        while !stop.load(Ordering::Relaxed) {
            let text = format!("datagram {count}");
            let by = self.exchange(&text).with_context(|| format!("{what}: {text}"))?;
            ensure!(by == first, "{what}: {text} reached {by}, not {first}");
            count += 1;
            thread::sleep(Duration::from_millis(1));
        }
        Ok(count)
    }
}
