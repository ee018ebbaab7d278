//! Sockets of removed backends are destroyed, and no others; records without a socket are swept.

use std::fs::remove_file;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use lb_agent::loader::PinPath;
use lb_agent::maps::bpf::PinnedMaps;
use lb_common::abi::{SocketRecord, VERSION, map_name};
use lb_tests::manifests::{Manifests, Port, service, slice_with_conditions};
use lb_tests::scripted_socket::plain;
use lb_tests::{
    Agent, Cluster, Netns, Pod, Process, RunningAgent, ScriptedSocket, SocketCall, SocketKind, scaled_count_above,
    scaled_timeout, testbed, unit_capabilities,
};
use libc::{ECONNABORTED, EDESTADDRREQ, ENOTCONN};
use serde_json::Value;

/// Port of the servers, for UDP and TCP.
const TARGET: u16 = 5353;
/// Time limit from the publication of a backend's removal to the destruction of its sockets.
const DESTROY_LIMIT: Duration = Duration::from_secs(1);

/// Kind of a socket, and the address that it connects to.
type SocketTarget = (SocketKind, SocketAddr);

/// Returns the ways in which a UDP socket can address a port of two addresses: IPv4, IPv6, and IPv4 on an IPv6 socket,
/// in v4-mapped notation or as AF_INET.
fn ways(v4: Ipv4Addr, v6: Ipv6Addr, port: u16) -> [SocketTarget; 4] {
    let mapped = v4.to_ipv6_mapped();
    [
        (SocketKind::Udp4, (v4, port).into()),
        (SocketKind::Udp6, (v6, port).into()),
        (SocketKind::Udp6, (mapped, port).into()),
        (SocketKind::Udp6, (v4, port).into()),
    ]
}

/// The Service with changing backends.
fn dns() -> [SocketTarget; 4] {
    ways(Ipv4Addr::new(10, 96, 0, 10), "fd00:96::10".parse().unwrap(), 53)
}

/// A second Service. Its backend is always the first server.
fn other() -> [SocketTarget; 4] {
    ways(Ipv4Addr::new(10, 96, 0, 11), "fd00:96::11".parse().unwrap(), 53)
}

fn direct(pod: &Pod) -> [SocketTarget; 4] {
    ways(pod.address(), pod.address6(), TARGET)
}

/// TCP and MPTCP to the Service with changing backends.
fn streams() -> [SocketTarget; 5] {
    let [(_, v4), (_, v6), (_, mapped), _] = dns();
    [
        (SocketKind::Tcp4, v4),
        (SocketKind::Tcp6, v6),
        (SocketKind::Tcp6, mapped),
        (SocketKind::Mptcp4, v4),
        (SocketKind::Mptcp6, v6),
    ]
}

const READY: &str = "ready: true";
const TERMINATING: &str = "ready: false, serving: true, terminating: true";

/// Returns the manifest of a Service in both families, UDP and TCP, and of its endpoints with their conditions.
fn manifest(name: &str, ips: &str, endpoints: &[(&Pod, &str)]) -> String {
    let mut text = service(name, ips, &[Port::udp("dns", 53), Port::tcp("dns-tcp", 53)], "");
    for port in [Port::udp("dns", TARGET), Port::tcp("dns-tcp", TARGET)] {
        let all = |address: fn(&Pod) -> IpAddr| -> Vec<_> {
            let endpoints = endpoints.iter();
            endpoints
                .map(|(pod, conditions)| (address(pod), "n1", *conditions))
                .collect()
        };
        text += &slice_with_conditions(name, port, &all(|pod| pod.address().into()));
        text += &slice_with_conditions(name, port, &all(|pod| pod.address6().into()));
    }
    text
}

/// One node with a client pod, two servers, and an agent.
struct Setup {
    agent: RunningAgent,
    manifests: Manifests,
    client: Pod,
    servers: [Pod; 2],
    _processes: Vec<Process>,
    cluster: Cluster,
}

fn setup(flags: &[&str]) -> Result<Setup> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let client = cluster.add_pod("n1", "client")?;
    let servers = [cluster.add_pod("n1", "a")?, cluster.add_pod("n1", "b")?];
    let mut processes = Vec::new();
    for pod in &servers {
        let name = pod.name();
        let listen = [pod.socket(TARGET), pod.socket6(TARGET)].map(|at| format!("{at}={name}"));
        processes.push(testbed().serve_datagrams(pod, &listen.each_ref().map(String::as_str))?);
        processes.push(testbed().serve_with(pod, &[&format!("[::]:{TARGET}={name}")], &["--echo"])?);
    }
    let manifests = Manifests::new(&cluster)?;
    manifests.write("dns.yaml", &dns_with(&[(&servers[0], READY)]))?;
    let other = manifest("other", "10.96.0.11,fd00:96::11", &[(&servers[0], READY)]);
    manifests.write("other.yaml", &other)?;
    let agent = manifests.serve(&cluster, "n1", flags)?;
    Ok(Setup {
        agent,
        manifests,
        client,
        servers,
        _processes: processes,
        cluster,
    })
}

fn dns_with(endpoints: &[(&Pod, &str)]) -> String {
    manifest("dns", "10.96.0.10,fd00:96::10", endpoints)
}

/// Waits until exactly `count` UDP sockets of each namespace are connected to a server. Fails if there are ever fewer.
fn wait_for_count(count: usize, namespaces: &[&Netns], server: &Pod) -> Result<()> {
    in_time(DESTROY_LIMIT, "sockets of a removed backend are destroyed", || {
        let mut all = true;
        for netns in namespaces {
            let connected = connected(netns, "--udp", server)?;
            let name = netns.name();
            ensure!(connected >= count, "{connected} of {count} are left in {name}");
            all &= connected == count;
        }
        Ok(all)
    })
}

impl Setup {
    /// Returns a pod and the node.
    fn namespaces(&self) -> [&Netns; 2] {
        [&self.client, self.cluster.node("n1")]
    }

    /// Replaces the endpoints of the Service, and waits until the agent has published them.
    fn publish(&self, endpoints: &[(&Pod, &str)]) -> Result<()> {
        let before = self.agent.status()?.agent.applies;
        self.manifests.write("dns.yaml", &dns_with(endpoints))?;
        eventually("the change is applied", || {
            Ok(self.agent.status()?.agent.applies > before)
        })
    }

    /// Returns the records of connected sockets.
    fn records(&self) -> Result<Vec<Value>> {
        let mut rows: Vec<Value> = self.agent.json(&["socket", "list"])?;
        rows.retain(|row| row["kind"] == "connected");
        Ok(rows)
    }

    /// Returns the number of unconnected sockets that have UDP destinations.
    fn flows(&self) -> Result<usize> {
        let maps = PinnedMaps::open(&PinPath::new(self.agent.pin_path()).maps())?;
        Ok(maps.udp_dests()?.len())
    }
}

/// Waits until a condition is true.
fn eventually(what: &str, check: impl FnMut() -> Result<bool>) -> Result<()> {
    in_time(Duration::from_secs(10), what, check)
}

fn in_time(time: Duration, what: &str, mut check: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + scaled_timeout(time);
    loop {
        // A check that begins before the deadline counts, even if it ends later.
        let late = Instant::now() >= deadline;
        if check()? {
            return Ok(());
        }
        ensure!(!late, "not within {time:?}: {what}");
        sleep(Duration::from_millis(20));
    }
}

/// Returns the number of sockets of a namespace that are connected to a server; `kind` is `--udp` or `--tcp`.
fn connected(netns: &Netns, kind: &str, server: &Pod) -> Result<usize> {
    let to = [server.socket(TARGET), server.socket6(TARGET)];
    let mut count = 0;
    for line in netns.run("ss", &["-Hn", kind, "state", "established"])?.lines() {
        let peer = line.split_whitespace().nth(3).and_then(|peer| peer.parse().ok());
        let peer: SocketAddr = peer.with_context(|| format!("no peer: {line}"))?;
        count += usize::from(to.contains(&plain(peer)));
    }
    Ok(count)
}

/// Returns a connected socket that was answered by a server.
fn connect(netns: &Netns, (kind, to): SocketTarget, server: &Pod) -> Result<ScriptedSocket> {
    let mut socket = testbed().scripted_socket(netns, kind)?;
    socket.connect(to).with_context(|| format!("{kind:?} to {to}"))?;
    exchange(&mut socket, (kind, to), server)?;
    Ok(socket)
}

/// Sends a message on a connected socket. The server must answer it, from the address that the socket is connected to.
fn exchange(socket: &mut ScriptedSocket, (kind, to): SocketTarget, server: &Pod) -> Result<()> {
    let context = || format!("{kind:?} to {to}");
    if matches!(kind, SocketKind::Udp4 | SocketKind::Udp6) {
        socket.send("hello").with_context(context)?;
        let name = socket.receive_reply(plain(to), "hello").with_context(context)?;
        ensure!(name == server.name(), "{kind:?} to {to}: {name}");
    } else {
        socket.send("hello").with_context(context)?;
        // The greeting and the echo, in any number of pieces.
        let mut received = String::new();
        while !received.ends_with("hello") {
            let (_, more) = socket.receive().with_context(context)?;
            ensure!(!more.is_empty(), "{kind:?} to {to}: closed");
            received += &more;
        }
        let name = received.lines().next().filter(|line| *line != "hello");
        ensure!(
            name.is_none_or(|name| name == server.name()),
            "{kind:?} to {to}: {received}"
        );
    }
    Ok(())
}

/// Fails unless a socket was destroyed: it has no peer to send to, and the first receive returns the reason.
fn expect_destroyed(socket: &mut ScriptedSocket) -> Result<()> {
    assert_eq!(socket.errno(&SocketCall::PeerName)?, ENOTCONN);
    assert_eq!(socket.errno(&SocketCall::Send("hello".into()))?, EDESTADDRREQ);
    assert_eq!(socket.errno(&SocketCall::Receive)?, ECONNABORTED);
    Ok(())
}

/// Sockets of one kind in one namespace.
struct Sockets {
    dns: ScriptedSocket,
    /// Connected to the same server through another Service.
    other: ScriptedSocket,
    /// Connected to the same server without a Service.
    direct: ScriptedSocket,
    /// Connected through the Service once, and elsewhere since.
    moved: ScriptedSocket,
    unconnected: ScriptedSocket,
}

impl Sockets {
    fn open(netns: &Netns, way: usize, [a, b]: &[Pod; 2]) -> Result<Self> {
        let (kind, vip) = dns()[way];
        let mut moved = connect(netns, dns()[way], a)?;
        moved.connect(direct(b)[way].1)?;
        let mut unconnected = testbed().scripted_socket(netns, kind)?;
        assert_eq!(unconnected.exchange(plain(vip), "first")?, "a");
        Ok(Self {
            dns: connect(netns, dns()[way], a)?,
            other: connect(netns, other()[way], a)?,
            direct: connect(netns, direct(a)[way], a)?,
            moved,
            unconnected,
        })
    }

    /// Checks each socket after the first server was replaced by the second.
    fn check(&mut self, way: usize, [a, b]: &[Pod; 2]) -> Result<()> {
        let vip = dns()[way].1;
        expect_destroyed(&mut self.dns).with_context(|| format!("way {way}"))?;
        exchange(&mut self.other, other()[way], a)?;
        exchange(&mut self.direct, direct(a)[way], a)?;
        exchange(&mut self.moved, direct(b)[way], b)?;
        // An unconnected socket selects a new backend, and so does a destroyed one when it connects again.
        assert_eq!(self.unconnected.exchange(plain(vip), "second")?, "b");
        self.dns.connect(vip)?;
        exchange(&mut self.dns, dns()[way], b)
    }
}

#[test]
fn only_connected_udp_sockets_of_a_removed_backend_are_destroyed() -> Result<()> {
    let setup = setup(&[])?;
    let [a, b] = &setup.servers;
    let mut sockets = Vec::new();
    for netns in setup.namespaces() {
        for way in 0..dns().len() {
            sockets.push((way, Sockets::open(netns, way, &setup.servers)?));
        }
    }
    let mut streams: Vec<_> = streams()
        .into_iter()
        .map(|way| Ok((way, connect(&setup.client, way, a)?)))
        .collect::<Result<_>>()?;
    for netns in setup.namespaces() {
        assert_eq!(connected(netns, "--udp", a)?, 3 * dns().len(), "{}", netns.name());
    }

    setup.publish(&[(b, READY)])?;
    // The remaining sockets are connected directly, or through the other Service.
    wait_for_count(2 * dns().len(), &setup.namespaces(), a)?;
    for (way, sockets) in &mut sockets {
        sockets.check(*way, &setup.servers)?;
    }
    for (way, stream) in &mut streams {
        exchange(stream, *way, a).context("TCP connections survive")?;
    }
    assert_eq!(connected(&setup.client, "--tcp", a)?, streams.len());
    eventually("only the records of connected sockets are left", || {
        let records = setup.records()?;
        let gone = records.iter().filter(|row| row["current"] == false).count();
        // Of each kind, the socket of the other Service and the one that connected again.
        Ok((records.len(), gone) == (2 * sockets.len() + streams.len(), streams.len()))
    })?;
    setup.agent.verify()
}

#[test]
fn terminating_backend_keeps_its_udp_sockets() -> Result<()> {
    let setup = setup(&[])?;
    let [a, b] = &setup.servers;
    let open = |way: SocketTarget, server| Ok((way, connect(&setup.client, way, server)?));
    let mut old: Vec<_> = dns().into_iter().map(|way| open(way, a)).collect::<Result<_>>()?;
    setup.publish(&[(a, TERMINATING), (b, READY)])?;
    let mut new: Vec<_> = dns().into_iter().map(|way| open(way, b)).collect::<Result<_>>()?;
    // Longer than the time limit for sockets of a removed backend.
    sleep(scaled_timeout(DESTROY_LIMIT) + DESTROY_LIMIT / 2);
    for (way, socket) in &mut old {
        exchange(socket, *way, a)?;
    }
    setup.publish(&[(b, READY)])?;
    wait_for_count(0, &[&setup.client], a)?;
    for (_, socket) in &mut old {
        expect_destroyed(socket)?;
    }
    for (way, socket) in &mut new {
        exchange(socket, *way, b)?;
    }
    Ok(())
}

#[test]
fn udp_sockets_connecting_during_backend_removal_are_destroyed() -> Result<()> {
    let setup = setup(&[])?;
    let [a, b] = &setup.servers;
    for round in 0..scaled_count_above(6, 2) {
        let (old, new) = if round % 2 == 0 { (a, b) } else { (b, a) };
        let mut churns = Vec::new();
        for netns in setup.namespaces() {
            for (kind, to) in &dns()[..3] {
                churns.push(testbed().churn(netns, *kind, *to)?);
            }
        }
        setup.publish(&[(new, READY)])?;
        let mut count = 0;
        for churn in &mut churns {
            count += churn.stop()?;
        }
        ensure!(count > 100, "only {count} sockets");
        for netns in setup.namespaces() {
            eventually("no socket is left", || Ok(connected(netns, "--udp", old)? == 0))?;
            ensure!(
                connected(netns, "--udp", new)? > 0,
                "sockets of the new backend survive"
            );
        }
    }
    setup.agent.verify()
}

/// A program at connect() may have selected a backend a moment before its removal, while the socket gets its peer only
/// after the agent has looked. The test writes the record of such a call itself.
#[test]
fn connect_finishing_after_backend_removal_is_destroyed() -> Result<()> {
    let setup = setup(&[])?;
    let [a, b] = &setup.servers;
    let folder = PinPath::new(setup.agent.pin_path()).maps();
    let maps = PinnedMaps::open(&folder)?;
    let more = Map::HashMap(MapData::from_pin(folder.join(map_name::SOCKETS_MORE))?);
    let mut more: HashMap<_, u64, [u8; size_of::<SocketRecord>()]> = more.try_into()?;
    // As if the call lasted as long as this test may take, on a slow machine too.
    let time = lb_tests::monotonic_ns() + scaled_timeout(Duration::from_secs(20)).as_nanos() as u64;
    let (mut late, mut elsewhere) = (Vec::new(), Vec::new());
    for way in 0..dns().len() {
        let mut socket = connect(&setup.client, dns()[way], a)?;
        let cookie = socket.cookie()?;
        let records = maps.sockets()?;
        let example = records.iter().find(|record| record.cookie == cookie);
        for (server, sockets) in [(a, &mut late), (b, &mut elsewhere)] {
            let (kind, to) = direct(server)[way];
            let mut socket = testbed().scripted_socket(&setup.client, kind)?;
            let cookie = socket.cookie()?;
            let record = SocketRecord {
                cookie,
                socket: cookie,
                spilled: 0,
                time,
                ..*example.context("no record")?
            };
            let bytes: [u8; size_of::<SocketRecord>()] = zerocopy::transmute!(record);
            more.insert(cookie, bytes, 0)?;
            sockets.push((socket, (kind, to)));
        }
    }
    setup.publish(&[(b, READY)])?;
    sleep(scaled_timeout(DESTROY_LIMIT));
    assert_eq!(connected(&setup.client, "--udp", a)?, 0);
    // The sockets of the second half call connect() again for another peer.
    for (socket, (_, to)) in late.iter_mut().chain(&mut elsewhere) {
        socket.connect(*to)?;
    }
    eventually("no socket is left", || Ok(connected(&setup.client, "--udp", a)? == 0))?;
    late.iter_mut().try_for_each(|(socket, _)| expect_destroyed(socket))?;
    elsewhere
        .iter_mut()
        .try_for_each(|(socket, way)| exchange(socket, *way, b))
}

#[test]
fn agent_start_destroys_sockets_of_backends_removed_while_down() -> Result<()> {
    let mut setup = setup(&[])?;
    let [a, b] = setup.servers.clone();
    let mut sockets = Vec::new();
    for netns in setup.namespaces() {
        for way in dns() {
            sockets.push((way, connect(netns, way, &a)?));
        }
    }
    setup.agent.kill()?;
    setup.manifests.write("dns.yaml", &dns_with(&[(&b, READY)]))?;
    for (way, socket) in &mut sockets {
        exchange(socket, *way, &a)?;
    }
    setup.agent.start_again()?;
    setup.agent.wait_ready(&|| false)?;
    wait_for_count(0, &setup.namespaces(), &a)?;
    sockets.iter_mut().try_for_each(|(_, socket)| expect_destroyed(socket))
}

#[test]
fn missing_cap_sys_admin_is_reported_and_pod_sockets_wait_for_the_next_agent() -> Result<()> {
    let mut setup = setup(&[])?;
    let [a, b] = setup.servers.clone();
    let node = setup.cluster.node("n1");
    let (mut sockets, mut nodes) = (Vec::new(), Vec::new());
    for way in dns() {
        sockets.push(connect(&setup.client, way, &a)?);
        nodes.push(connect(node, way, &a)?);
    }
    // This agent publishes the change, and can destroy sockets of the node only.
    setup.agent.kill()?;
    setup.manifests.write("dns.yaml", &dns_with(&[(&b, READY)]))?;
    let mut bound = restricted(&setup, "-all,+bpf,+perfmon,+net_admin")?;
    eventually("the change is applied", || {
        ensure!(bound.is_running()?, "{}", setup.agent.log_tail());
        Ok(setup.agent.verify().is_ok())
    })?;
    eventually("status reports the missing capability", || {
        let problems = setup.agent.status()?.problems;
        Ok(problems
            .iter()
            .any(|problem| problem.place == "entering network namespaces" && problem.message.contains("CAP_SYS_ADMIN")))
    })?;
    eventually("sockets of the node are destroyed", || {
        Ok(connected(node, "--udp", &a)? == 0)
    })?;
    nodes.iter_mut().try_for_each(expect_destroyed)?;
    sleep(scaled_timeout(DESTROY_LIMIT) + DESTROY_LIMIT / 2);
    assert_eq!(connected(&setup.client, "--udp", &a)?, sockets.len());
    bound.kill()?;
    setup.agent.start_again()?;
    setup.agent.wait_ready(&|| false)?;
    wait_for_count(0, &[&setup.client], &a)?;
    sockets.iter_mut().try_for_each(expect_destroyed)?;
    let problems = setup.agent.status()?.problems;
    ensure!(problems.iter().all(|p| p.place.starts_with("cgroup")), "{problems:?}");
    Ok(())
}

#[test]
fn systemd_unit_capabilities_suffice_to_destroy_pod_sockets() -> Result<()> {
    let mut setup = setup(&[])?;
    let [a, b] = setup.servers.clone();
    setup.agent.kill()?;
    let _agent = restricted(&setup, &unit_capabilities()?)?;
    let mut sockets = Vec::new();
    for netns in setup.namespaces() {
        for way in dns() {
            sockets.push(connect(netns, way, &a)?);
        }
    }
    setup.manifests.write("dns.yaml", &dns_with(&[(&b, READY)]))?;
    for netns in setup.namespaces() {
        eventually("no socket is left", || Ok(connected(netns, "--udp", &a)? == 0))?;
    }
    sockets.iter_mut().try_for_each(expect_destroyed)?;
    let problems = setup.agent.status()?.problems;
    ensure!(problems.iter().all(|p| p.place.starts_with("cgroup")), "{problems:?}");
    Ok(())
}

/// Starts an agent with some capabilities only.
fn restricted(setup: &Setup, bounding_set: &str) -> Result<Process> {
    let node = setup.cluster.node("n1");
    let mut command = node.command("setpriv")?;
    command
        .arg(format!("--bounding-set={bounding_set}"))
        .args(["--inh-caps=-all", "--no-new-privs"])
        .arg(Agent::find()?)
        .args(["run", "--node-name", "n1", "--manifests"])
        .arg(setup.manifests.path())
        .arg("--cgroup")
        .arg(node.cgroup())
        .arg("--pin-path")
        .arg(setup.agent.pin_path());
    Process::spawn(&mut command)
}

#[test]
fn destroy_tcp_flag_destroys_tcp_sockets() -> Result<()> {
    let setup = setup(&["--destroy-tcp"])?;
    let [a, b] = &setup.servers;
    let mut old = Vec::new();
    for netns in setup.namespaces() {
        for way in streams() {
            old.push((way, connect(netns, way, a)?));
        }
    }
    setup.publish(&[(a, TERMINATING), (b, READY)])?;
    sleep(scaled_timeout(DESTROY_LIMIT) + DESTROY_LIMIT / 2);
    for (way, stream) in &mut old {
        exchange(stream, *way, a).context("while the backend terminates")?;
    }
    let mut new = Vec::new();
    for way in streams() {
        new.push((way, connect(&setup.client, way, b)?));
    }
    setup.publish(&[(b, READY)])?;
    for netns in setup.namespaces() {
        eventually("the TCP sockets are destroyed", || {
            Ok(connected(netns, "--tcp", a)? == 0)
        })?;
    }
    for ((kind, to), stream) in &mut old {
        // The server does not support MPTCP, so the end of the subflow ends the connection.
        assert_eq!(stream.errno(&SocketCall::Receive)?, ECONNABORTED, "{kind:?} to {to}");
    }
    for (way, stream) in &mut new {
        exchange(stream, *way, b)?;
    }
    Ok(())
}

#[test]
fn stale_socket_records_are_swept() -> Result<()> {
    let setup = setup(&["--sweep-age", "1000"])?;
    let [a, b] = &setup.servers;
    let all = || dns().into_iter().chain(streams());
    // A pod is removed with its namespace while its sockets still have records. The agent knows that namespace.
    let removed_pod = setup.cluster.add_pod("n1", "removed")?;
    let old = connect(&removed_pod, dns()[0], a)?;
    setup.publish(&[(b, READY)])?;
    wait_for_count(0, &[&removed_pod], a)?;
    drop(old);
    eventually("the record is deleted", || Ok(setup.records()?.is_empty()))?;

    let (mut live, mut lost) = (Vec::new(), Vec::new());
    for netns in setup.namespaces() {
        for way in all() {
            live.push((way, connect(netns, way, b)?));
        }
    }
    for netns in [&*removed_pod, &*setup.client] {
        for way in all() {
            lost.push(connect(netns, way, b)?);
        }
    }
    let unconnected = |netns| -> Result<ScriptedSocket> {
        let mut socket = testbed().scripted_socket(netns, SocketKind::Udp4)?;
        socket.exchange(dns()[0].1, "hello")?;
        Ok(socket)
    };
    let mut live_flows = unconnected(&setup.client)?;
    let lost_flows = [unconnected(&setup.client)?, unconnected(&removed_pod)?];
    assert_eq!(setup.records()?.len(), live.len() + lost.len());
    assert_eq!(setup.flows()?, 3);
    // The release of these sockets is not reported, as with sockets that the kernel opens for itself.
    let link = format!("v{VERSION}/links/lb_sock_release");
    let link = setup.agent.pin_path().join(link);
    remove_file(&link).with_context(|| format!("removing {}", link.display()))?;
    // The kernel detaches a program some time after its link is gone.
    eventually("socket release is no longer reported", || {
        let before = setup.records()?.len();
        drop(connect(&setup.client, dns()[0], b)?);
        Ok(setup.records()?.len() > before)
    })?;
    drop((lost, lost_flows));
    setup.cluster.remove_pod(&removed_pod)?;
    eventually("records without a socket are swept", || {
        Ok((setup.records()?.len(), setup.flows()?) == (live.len(), 1))
    })?;
    // Some more sweeps.
    sleep(Duration::from_secs(3));
    assert_eq!((setup.records()?.len(), setup.flows()?), (live.len(), 1));
    for (way, socket) in &mut live {
        exchange(socket, *way, b)?;
        assert_eq!(socket.peer()?, plain(way.1), "getpeername still returns the VIP");
    }
    assert_eq!(live_flows.exchange(dns()[0].1, "hello")?, "b");
    Ok(())
}

#[test]
fn trace_reports_cookie_and_backend_of_a_destroyed_socket() -> Result<()> {
    let setup = setup(&[])?;
    let [a, b] = &setup.servers;
    let (kind, vip) = dns()[1];
    let mut socket = connect(&setup.client, (kind, vip), a)?;
    let cookie = socket.cookie()?;
    let mut command = setup.cluster.node("n1").command(Agent::find()?)?;
    command
        .args(["trace", "-o", "json", "--count", "1", "--pin-path"])
        .arg(setup.agent.pin_path())
        .stdin(Stdio::null());
    let mut tracer = Process::spawn_reading(&mut command)?;
    let maps = PinnedMaps::open(&PinPath::new(setup.agent.pin_path()).maps())?;
    eventually("tracing is enabled", || Ok(maps.config().events != 0))?;
    setup.publish(&[(b, READY)])?;
    let line = tracer.line(scaled_timeout(Duration::from_secs(10)))?;
    let row: Value = serde_json::from_str(&line)?;
    assert_eq!(row["event"], "destroyed", "{line}");
    assert_eq!(row["cookie"], cookie, "{line}");
    assert_eq!(row["to"], vip.to_string(), "{line}");
    assert_eq!(row["backend"], a.socket6(TARGET).to_string(), "{line}");
    expect_destroyed(&mut socket)
}
