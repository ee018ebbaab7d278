//! Starts with other sizes of maps, under load: the maps are replaced, and every connection, flow and counter survives.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use lb_agent::loader::PinPath;
use lb_agent::maps::ct::CtMaps;
use lb_common::abi::{Addr, CtEntry, CtKey, SizedMap, ip_protocol};
use lb_common::logic::ct::reverse_key;
use lb_tests::fixture::{TwoNodeFixture, socket_kind};
use lb_tests::load::{Load, Summary};
use lb_tests::manifests::{Manifests, vips, web_and_dns};
use lb_tests::{
    Agent, Cluster, Connect, Netns, Pod, Process, ScriptedSocket, Underlay, monotonic_ns, scaled_count_above,
    scaled_timeout, testbed,
};
use serde_json::Value;

/// Number of times that the maps grow and shrink.
const ROUNDS: u64 = 4;
/// Factor between the two sizes.
const FACTOR: u32 = 4;
/// TCP and UDP port of the servers in the pods.
const SERVER_PORTS: [u16; 2] = [8081, 5354];
/// TCP and UDP node ports of the Service without affinity, and of the one with affinity.
const NODE_PORTS: [[u16; 2]; 2] = [[30080, 30053], [30081, 30054]];
/// Last part of the addresses of the Services.
const ADDRESSES: [u8; 2] = [20, 21];

/// Returns the smaller size of a map. Closed flows stay in CT for two minutes.
fn small(map: SizedMap) -> u32 {
    match map {
        SizedMap::Services | SizedMap::Backends | SizedMap::Sockets => 64,
        SizedMap::Frontends | SizedMap::BackendSlots | SizedMap::UdpFlows => 128,
        SizedMap::Affinity => 1024,
        SizedMap::SocketsMore => 4096,
        SizedMap::ConntrackNew => 1 << 14,
        SizedMap::Conntrack => 1 << 16,
    }
}

/// Returns the flags that set the sizes of all maps.
fn flags(factor: u32) -> Vec<String> {
    let flag = |map: &SizedMap| [format!("--{}", map.flag()), (small(*map) * factor).to_string()];
    SizedMap::ALL.iter().flat_map(flag).collect()
}

/// Fails unless every map has its size.
fn check_sizes(agent: &Agent, factor: u32) -> Result<()> {
    let status: Value = agent.json(&["status"])?;
    let rows = status["maps"].as_array().context("maps")?;
    for map in SizedMap::ALL {
        let row = rows.iter().find(|row| row["name"] == map.name()).context("a map")?;
        ensure!(
            row["capacity"] == small(*map) * factor,
            "{row}: not {factor} times {}",
            small(*map)
        );
    }
    Ok(())
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

/// Two nodes with servers, and the addresses of the Services.
struct Setup {
    fixture: TwoNodeFixture,
    _servers: Vec<Process>,
    client: Pod,
}

impl Setup {
    fn new() -> Result<Self> {
        let flags = flags(1);
        let flags: Vec<_> = flags.iter().map(String::as_str).collect();
        let fixture = TwoNodeFixture::with(Underlay::Vxlan, 1, &flags)?;
        let mut servers = Vec::new();
        let [tcp, udp] = SERVER_PORTS;
        for pod in &fixture.pods {
            servers.push(testbed().serve_with(pod, &[&format!("[::]:{tcp}={}", pod.name())], &["--echo"])?);
            servers.push(testbed().serve_datagrams(pod, &[&format!("[::]:{udp}={}", pod.name())])?);
        }
        let ends = fixture.endpoints();
        let text = web_and_dns("web", ADDRESSES[0], Some(NODE_PORTS[0]), "", &ends, SERVER_PORTS)
            + &web_and_dns(
                "sticky",
                ADDRESSES[1],
                Some(NODE_PORTS[1]),
                "sessionAffinity: ClientIP",
                &ends,
                SERVER_PORTS,
            );
        fixture.write("services.yaml", &text)?;
        Ok(Self {
            client: fixture.cluster.add_pod("n1", "client")?,
            fixture,
            _servers: servers,
        })
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

    /// Starts clients in a network namespace that connect to both Services in both families until they are stopped.
    fn start_clients(&self, netns: &Netns, outside: bool) -> Result<Load> {
        let targets: Vec<_> = (0..4).map(|i| self.at(i / 2, false, outside, i % 2)).collect();
        let connect = Connect::to(&targets)
            .threads(2)
            .rate(200.0)
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

    /// Kills the agent of the first node and starts it with other sizes. Returns the duration of the start.
    fn restart(&mut self, factor: u32) -> Result<Duration> {
        let flags = flags(factor);
        let flags: Vec<_> = flags.iter().map(String::as_str).collect();
        let agent = &mut self.fixture.agents[0];
        agent.kill()?;
        let start = Instant::now();
        agent.start_again_with(&flags)?;
        agent.wait_ready(&|| false)?;
        Ok(start.elapsed())
    }
}

#[test]
fn maps_grow_and_shrink_under_load_without_a_failed_connection() -> Result<()> {
    let mut setup = Setup::new()?;
    let outside = setup.fixture.client().clone();
    let web = setup.at(0, false, false, 0);
    let held = [
        testbed().hold(&setup.client, &[web, setup.at(0, false, false, 1)], 20)?,
        testbed().hold(
            &outside,
            &[setup.at(0, false, true, 0), setup.at(0, false, true, 1)],
            20,
        )?,
    ];
    let mut peer = testbed().scripted_socket(&setup.client, socket_kind(false, web.ip()))?;
    peer.connect(web)?;
    let inside = setup.start_clients(&setup.client, false)?;
    let from_outside = setup.start_clients(&outside, true)?;
    let stop = AtomicBool::new(false);
    let clients = setup.udp_clients()?;
    let counts = thread::scope(|scope| -> Result<Vec<u64>> {
        let threads: Vec<_> = clients
            .into_iter()
            .map(|client| scope.spawn(|| client.run(&stop)))
            .collect();
        let rounds = (0..2 * scaled_count_above(ROUNDS, 1)).try_for_each(|round| {
            let factor = if round % 2 == 0 { FACTOR } else { 1 };
            let before = [
                setup.fixture.agents[0].connections("web", None)?,
                setup.fixture.agents[0].connections("sticky", None)?,
            ];
            let took = setup.restart(factor)?;
            let agent = &setup.fixture.agents[0];
            check_sizes(agent, factor)?;
            agent.verify()?;
            let after = [agent.connections("web", None)?, agent.connections("sticky", None)?];
            println!(
                "round {round}, factor {factor}: started in {took:?}, {before:?} connections before, {after:?} after"
            );
            ensure!(before <= after, "counters are lower after the start");
            ensure!(peer.peer()? == web, "getpeername returns {}", peer.peer()?);
            Ok(())
        });
        stop.store(true, Ordering::Relaxed);
        let counts = threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow!("a client has panicked"))?);
        let counts = counts.collect();
        rounds.and(counts)
    })?;
    let [inside, from_outside] = [inside.stop()?, from_outside.stop()?];
    println!(
        "{} and {} connections, {counts:?} datagrams",
        inside.connections, from_outside.connections
    );
    setup.check(&inside, false)?;
    setup.check(&from_outside, true)?;
    for held in held {
        let held = held.finish()?;
        ensure!((held.held, held.live) == (20, 20), "{held:?}");
    }
    let status = setup.fixture.agents[0].status()?;
    ensure!(
        status.problems.iter().all(|p| p.place.starts_with("cgroup")),
        "{:?}",
        status.problems
    );
    let dropped: Vec<_> = status.drops.iter().filter(|drop| drop.count > 0).collect();
    println!("drops: {dropped:?}");
    Ok(())
}

/// Number of flows of the large map.
const FLOWS: u32 = 50_000;

#[test]
fn a_large_conntrack_map_is_replaced_as_a_whole() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let manifests = Manifests::new(&cluster)?;
    let mut agent = manifests.serve(&cluster, "n1", &[])?;
    let maps = PinPath::new(agent.pin_path()).maps();
    agent.kill()?;
    let flows = scaled_count_above(FLOWS.into(), 1000) as u32;
    let mut before = CtMaps::open(&maps)?;
    for flow in 0..flows {
        let [_, a, b, c] = flow.to_be_bytes();
        let key = CtKey {
            src: Addr::from_v4([203, a, b, c]),
            dst: Addr::from_v4([192, 0, 2, 2]),
            src_port: 1000,
            dst_port: 80,
            proto: ip_protocol::TCP,
            pad: [0; 3],
        };
        let entry = CtEntry {
            src: key.src,
            dst: Addr::from_v4([192, 0, 2, 3]),
            src_port: key.src_port,
            dst_port: 8080,
            seen: monotonic_ns(),
            ..CtEntry::default()
        };
        before.established.insert(&key, &entry)?;
        before.established.insert(&reverse_key(&entry, key.proto), &entry)?;
    }
    let before: BTreeMap<_, _> = before.established.all()?.into_iter().collect();
    let size = (2 * SizedMap::Conntrack.default_capacity()).to_string();
    let start = Instant::now();
    agent.start_again_with(&["--max-conntrack", &size])?;
    agent.wait_ready(&|| false)?;
    println!("{} entries, ready after {:?}", before.len(), start.elapsed());
    let after: BTreeMap<_, _> = CtMaps::open(&maps)?.established.all()?.into_iter().collect();
    ensure!(before.len() == 2 * flows as usize, "{} entries", before.len());
    ensure!(
        before == after,
        "{} entries before, {} after",
        before.len(),
        after.len()
    );
    Ok(())
}
