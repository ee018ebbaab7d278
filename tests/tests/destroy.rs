//! Sockets whose backend was removed are destroyed, and only those; records without a socket are swept.

use std::net::SocketAddr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lb_tests::manifests::Manifests;
use lb_tests::{Cluster, Place, Pod, Process, Running, Sockets, Testbed, patience};
use nix::errno::Errno;
use serde_json::Value;

const BED: &str = env!("CARGO_BIN_EXE_lb-testbed");
const VIP: &str = "10.96.0.10";
const DNS: u16 = 53;

fn bed() -> Testbed {
    Testbed::new(BED)
}

fn vip() -> SocketAddr {
    format!("{VIP}:{DNS}").parse().unwrap()
}

/// The address as an IPv6 socket names it.
fn mapped() -> SocketAddr {
    format!("[::ffff:{VIP}]:{DNS}").parse().unwrap()
}

/// A Service with one port in UDP and TCP, and its endpoints with their conditions.
fn manifest(endpoints: &[(&Pod, &str)]) -> String {
    let endpoints: String = endpoints
        .iter()
        .map(|(pod, conditions)| {
            format!(
                "- {{addresses: [{}], nodeName: n1, conditions: {{{conditions}}}}}\n",
                pod.address()
            )
        })
        .collect();
    format!(
        "apiVersion: v1
kind: Service
metadata: {{name: dns, namespace: default}}
spec:
  clusterIP: {VIP}
  ports:
  - {{name: dns, port: {DNS}, protocol: UDP}}
  - {{name: dns-tcp, port: {DNS}, protocol: TCP}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: dns-1, namespace: default, labels: {{kubernetes.io/service-name: dns}}}}
addressType: IPv4
ports:
- {{name: dns, port: 5353, protocol: UDP}}
- {{name: dns-tcp, port: 5353, protocol: TCP}}
endpoints:{}\n{endpoints}",
        if endpoints.is_empty() { " []" } else { "" }
    )
}

const READY: &str = "ready: true";
const TERMINATING: &str = "ready: false, serving: true, terminating: true";

/// One node with a client pod, two servers, and an agent.
struct Setup {
    agent: Running,
    manifests: Manifests,
    client: Pod,
    servers: [Pod; 2],
    _udp: Vec<Sockets>,
    _tcp: Vec<Process>,
    cluster: Cluster,
}

fn setup(flags: &[&str]) -> Result<Setup> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let client = cluster.add_pod("n1", "client")?;
    let servers = [cluster.add_pod("n1", "a")?, cluster.add_pod("n1", "b")?];
    let (mut udp, mut tcp) = (Vec::new(), Vec::new());
    for (pod, name) in servers.iter().zip(["a", "b"]) {
        let mut server = Sockets::start(&bed(), pod)?;
        server.serve(name, pod.socket(5353))?.context("serving UDP")?;
        udp.push(server);
        tcp.push(bed().serve_with(pod, &[&format!("0.0.0.0:5353={name}")], &["--echo"])?);
    }
    let manifests = Manifests::new(&cluster)?;
    manifests.write("dns.yaml", &manifest(&[(&servers[0], READY)]))?;
    let agent = manifests.serve(&cluster, "n1", BED.as_ref(), flags)?;
    Ok(Setup {
        agent,
        manifests,
        client,
        servers,
        _udp: udp,
        _tcp: tcp,
        cluster,
    })
}

impl Setup {
    /// Replaces the endpoints, and waits until the agent has applied them.
    fn publish(&self, endpoints: &[(&Pod, &str)]) -> Result<()> {
        let before = self.agent.status()?.agent.applies;
        self.manifests.write("dns.yaml", &manifest(endpoints))?;
        eventually("the change is applied", || {
            Ok(self.agent.status()?.agent.applies > before)
        })
    }

    fn sockets(&self, place: &Place) -> Result<Sockets> {
        Sockets::start(&bed(), place)
    }
}

/// Waits until something is true.
fn eventually(what: &str, mut check: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + patience(Duration::from_secs(10));
    while !check()? {
        ensure!(Instant::now() < deadline, "not in time: {what}");
        sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// What `socket list` says of connected sockets.
fn connected_rows(setup: &Setup) -> Result<Vec<Value>> {
    let mut rows: Vec<Value> = setup.agent.json(&["socket", "list"])?;
    rows.retain(|row| row["kind"] == "connected");
    Ok(rows)
}

/// How many sockets of a namespace the kernel has connected to an address: `kind` is `-u` or `-t`.
fn connected(place: &Place, kind: &str, to: SocketAddr) -> Result<usize> {
    let text = place.run("ss", &["-Hn", kind, "state", "established"])?;
    let (plain, mapped) = (to.to_string(), format!("[::ffff:{}]:{}", to.ip(), to.port()));
    let ends = |line: &&str| line.split_whitespace().any(|word| word == plain || word == mapped);
    Ok(text.lines().filter(ends).count())
}

/// Opens a UDP socket that is connected to the Service, and asks it once.
fn connect(sockets: &mut Sockets, name: &str, local: &str, to: SocketAddr, server: &str) -> Result<()> {
    sockets.udp(name, local)?.context("binding")?;
    sockets.connect(name, to)?.context("connecting")?;
    let answer = sockets.ask(name, "hello")?.context("asking")?;
    assert_eq!(
        answer,
        format!("{to} {server} hello"),
        "from the address that was asked"
    );
    Ok(())
}

/// What a socket says whose backend was removed: ECONNABORTED once, and then it has no peer.
fn is_destroyed(result: &std::result::Result<String, Errno>) -> bool {
    matches!(result, Err(Errno::ECONNABORTED | Errno::ECONNREFUSED))
}

#[test]
fn connected_udp_sockets_of_a_removed_backend_are_destroyed_and_no_others() -> Result<()> {
    let setup = setup(&[])?;
    let [a, b] = &setup.servers;
    let node = setup.cluster.node("n1");
    let (mut pod, mut host) = (setup.sockets(&setup.client)?, setup.sockets(node)?);
    for sockets in [&mut pod, &mut host] {
        connect(sockets, "v4", "0.0.0.0:0", vip(), "a")?;
        connect(sockets, "v6", "[::]:0", mapped(), "a")?;
        sockets.udp("free", "0.0.0.0:0")?.context("binding")?;
        let answer = sockets.ask_at("free", "hello", vip())?.context("asking")?;
        assert_eq!(answer, format!("{} a hello", vip()));
        // To the same backend, but not through the Service.
        connect(sockets, "direct", "0.0.0.0:0", a.socket(5353), "a")?;
        // Through the Service once, and elsewhere since.
        connect(sockets, "moved", "0.0.0.0:0", vip(), "a")?;
        sockets
            .connect("moved", b.socket(5353))?
            .context("connecting elsewhere")?;
    }
    pod.tcp("tcp", vip())?.context("connecting by TCP")?;

    setup.publish(&[(b, READY)])?;
    for (name, place) in [("pod", &*setup.client), ("node", &**node)] {
        // What is left is the socket that is connected to the address of the backend itself.
        eventually(name, || Ok(connected(place, "-u", a.socket(5353))? == 1))?;
    }
    for sockets in [&mut pod, &mut host] {
        for name in ["v4", "v6"] {
            let result = sockets.ask(name, "again")?;
            assert!(is_destroyed(&result), "{name}: {result:?}");
        }
        let answer = sockets.ask("direct", "again")?.context("asking directly")?;
        assert_eq!(answer, format!("{} a again", a.socket(5353)));
        let answer = sockets.ask("moved", "again")?.context("asking elsewhere")?;
        assert_eq!(answer, format!("{} b again", b.socket(5353)));
        // An unconnected socket picks anew.
        let answer = sockets.ask_at("free", "again", vip())?.context("asking again")?;
        assert_eq!(answer, format!("{} b again", vip()));
        // And so does one that was destroyed, when it connects again.
        sockets.connect("v4", vip())?.context("connecting again")?;
        let answer = sockets.ask("v4", "anew")?.context("asking anew")?;
        assert_eq!(answer, format!("{} b anew", vip()));
    }
    assert!(pod.ask("tcp", "hello")?.is_ok(), "TCP lives on");
    assert_eq!(connected(&setup.client, "-t", a.socket(5353))?, 1);
    eventually("only the records of live sockets are left", || {
        let rows = connected_rows(&setup)?;
        let gone = rows.iter().filter(|row| row["current"] == false).count();
        // Two that connected again, and the TCP socket, whose backend is gone.
        Ok((rows.len(), gone) == (3, 1))
    })?;
    setup.agent.verify()
}

#[test]
fn a_terminating_backend_keeps_its_sockets_until_it_is_gone() -> Result<()> {
    let setup = setup(&[])?;
    let [a, b] = &setup.servers;
    let mut pod = setup.sockets(&setup.client)?;
    connect(&mut pod, "old", "0.0.0.0:0", vip(), "a")?;
    setup.publish(&[(a, TERMINATING), (b, READY)])?;
    connect(&mut pod, "new", "0.0.0.0:0", vip(), "b")?;
    // Longer than a removed backend's sockets live.
    sleep(Duration::from_millis(1500));
    let answer = pod.ask("old", "still")?.context("asking a terminating backend")?;
    assert_eq!(answer, format!("{} a still", vip()));
    setup.publish(&[(b, READY)])?;
    eventually(
        "it is gone",
        || Ok(connected(&setup.client, "-u", a.socket(5353))? == 0),
    )?;
    assert!(is_destroyed(&pod.ask("old", "again")?));
    assert!(pod.ask("new", "again")?.is_ok());
    Ok(())
}

#[test]
fn no_socket_that_connects_while_its_backend_is_removed_stays() -> Result<()> {
    const ROUNDS: usize = 6;
    let setup = setup(&[])?;
    let [a, b] = &setup.servers;
    let node = setup.cluster.node("n1");
    for round in 0..ROUNDS {
        let (old, new) = if round % 2 == 0 { (a, b) } else { (b, a) };
        let mut clients = [setup.sockets(&setup.client)?, setup.sockets(node)?];
        for client in &mut clients {
            client.churn(vip(), Duration::from_millis(600))?;
        }
        sleep(Duration::from_millis(150));
        setup.publish(&[(new, READY)])?;
        let mut count = 0;
        for client in &mut clients {
            count += client.churned()?.context("connecting")?;
        }
        ensure!(count > 100, "only {count} sockets");
        for place in [&*setup.client, &**node] {
            eventually("no socket is left", || {
                Ok(connected(place, "-u", old.socket(5353))? == 0)
            })?;
            ensure!(connected(place, "-u", new.socket(5353))? > 0, "others live");
        }
        // None is connected later either.
        sleep(Duration::from_millis(300));
        assert_eq!(connected(&setup.client, "-u", old.socket(5353))?, 0);
    }
    setup.agent.verify()
}

#[test]
fn sockets_whose_backend_went_while_no_agent_ran_are_destroyed_at_the_next_start() -> Result<()> {
    let mut setup = setup(&[])?;
    let [a, b] = setup.servers.clone();
    let mut pod = setup.sockets(&setup.client)?;
    connect(&mut pod, "old", "0.0.0.0:0", vip(), "a")?;
    setup.agent.kill()?;
    setup.manifests.write("dns.yaml", &manifest(&[(&b, READY)]))?;
    assert!(pod.ask("old", "still")?.is_ok());
    setup.agent.start_again()?;
    setup.agent.wait_ready(&|| false)?;
    eventually("it is destroyed", || {
        Ok(connected(&setup.client, "-u", a.socket(5353))? == 0)
    })?;
    assert!(is_destroyed(&pod.ask("old", "again")?));
    Ok(())
}

#[test]
fn tcp_sockets_are_destroyed_where_that_is_asked_for() -> Result<()> {
    let setup = setup(&["--destroy-tcp"])?;
    let [a, b] = &setup.servers;
    let mut pod = setup.sockets(&setup.client)?;
    pod.tcp("old", vip())?.context("connecting by TCP")?;
    ensure!(pod.ask("old", "hello")?.is_ok());
    setup.publish(&[(a, TERMINATING), (b, READY)])?;
    sleep(Duration::from_millis(500));
    ensure!(pod.ask("old", "still")?.is_ok(), "the termination grace");
    pod.tcp("new", vip())?.context("connecting by TCP")?;
    setup.publish(&[(b, READY)])?;
    eventually(
        "it is gone",
        || Ok(connected(&setup.client, "-t", a.socket(5353))? == 0),
    )?;
    let result = pod.ask("old", "again")?;
    assert!(
        matches!(result, Err(Errno::ECONNABORTED | Errno::EPIPE | Errno::ECONNRESET)),
        "{result:?}"
    );
    ensure!(pod.ask("new", "again")?.is_ok());
    Ok(())
}

#[test]
fn records_without_a_socket_are_swept_and_others_stay() -> Result<()> {
    let mut setup = setup(&["--sweep-age", "1000"])?;
    let node = setup.cluster.node("n1");
    let (mut pod, mut host) = (setup.sockets(&setup.client)?, setup.sockets(node)?);
    connect(&mut pod, "live", "0.0.0.0:0", vip(), "a")?;
    host.udp("free", "0.0.0.0:0")?.context("binding")?;
    host.ask_at("free", "hello", vip())?.context("asking")?;
    // A pod that goes, with its namespace, while sockets of it are remembered: nothing detached may forget them.
    let doomed = setup.cluster.add_pod("n1", "doomed")?;
    let mut lost = setup.sockets(&doomed)?;
    connect(&mut lost, "lost", "0.0.0.0:0", vip(), "a")?;
    let count = |setup: &Setup| -> Result<usize> { Ok(connected_rows(setup)?.len()) };
    assert_eq!(count(&setup)?, 2);
    // Without a program at the release of sockets, as for the sockets that the kernel itself opens.
    setup.agent.kill()?;
    let link = setup.agent.pin_path().join("v2/links/lb_sock_release");
    std::fs::remove_file(&link).with_context(|| format!("removing {}", link.display()))?;
    drop(lost);
    setup.cluster.remove_pod(&doomed)?;
    assert_eq!(count(&setup)?, 2);
    let _agent = setup.agent.start(&["--sweep-age", "1000"])?;
    eventually("the lost record is swept", || Ok(count(&setup)? == 1))?;
    sleep(Duration::from_secs(3));
    assert_eq!(count(&setup)?, 1, "that of a live socket stays");
    let answer = pod.ask("live", "still")?.context("asking")?;
    assert_eq!(answer, format!("{} a still", vip()), "and is translated");
    Ok(())
}
