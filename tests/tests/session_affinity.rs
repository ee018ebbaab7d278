//! sessionAffinity ClientIP.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};
use lb_tests::manifests::{Manifests, Port, service, slice};
use lb_tests::{Cluster, Connect, Netns, Pod, Process, RunningAgent, SocketKind, addr, testbed};

const VIP: &str = "10.96.0.10:80";
const VIP6: &str = "[fd00:96::10]:80";
/// Number of connections of one client. All of them reach the same of four backends by chance once in 4^23 runs.
const ENOUGH: u64 = 24;

struct Setup {
    agent: RunningAgent,
    manifests: Manifests,
    clients: [Pod; 2],
    servers: Vec<Pod>,
    _processes: Vec<Process>,
    cluster: Cluster,
}

impl Setup {
    fn new() -> Result<Self> {
        let cluster = Cluster::builder().nodes(1).build()?;
        let clients = [cluster.add_pod("n1", "client")?, cluster.add_pod("n1", "other")?];
        let mut servers = Vec::new();
        let mut processes = Vec::new();
        for name in ["a", "b", "c", "d"] {
            let pod = cluster.add_pod("n1", name)?;
            processes.push(testbed().serve_with(&pod, &[&format!("[::]:8080={name}")], &[])?);
            processes.push(testbed().serve_datagrams(&pod, &[&format!("{}={name}", pod.socket(5353))])?);
            servers.push(pod);
        }
        let manifests = Manifests::new(&cluster)?;
        write(&manifests, &servers, &affinity(3600))?;
        let agent = manifests.serve(&cluster, "n1", &[])?;
        Ok(Self {
            agent,
            manifests,
            clients,
            servers,
            _processes: processes,
            cluster,
        })
    }

    fn change(&mut self, servers: &[Pod], more: &str) -> Result<()> {
        write(&self.manifests, servers, more)?;
        self.agent.wait_ready(&|| false)
    }
}

/// Returns the backends that a client's connections reach.
fn reached(client: &Netns, to: &str) -> Result<BTreeSet<String>> {
    let summary = testbed().connect(client, &Connect::to(&[addr(to)]).count(ENOUGH).threads(4))?;
    summary.all_well()?;
    Ok(summary.per_backend.into_keys().collect())
}

fn affinity(seconds: u32) -> String {
    format!("sessionAffinity: ClientIP\n  sessionAffinityConfig: {{clientIP: {{timeoutSeconds: {seconds}}}}}")
}

fn write(manifests: &Manifests, servers: &[Pod], more: &str) -> Result<()> {
    let ports = [Port::tcp("web", 80), Port::udp("dns", 53)];
    let v4: Vec<(IpAddr, &str)> = servers.iter().map(|pod| (pod.address().into(), "n1")).collect();
    let v6: Vec<(IpAddr, &str)> = servers.iter().map(|pod| (pod.address6().into(), "n1")).collect();
    let text = service("web", "10.96.0.10,fd00:96::10", &ports, more)
        + &slice("web", Port::tcp("web", 8080), &v4)
        + &slice("web", Port::udp("dns", 5353), &v4)
        + &slice("web", Port::tcp("web", 8080), &v6);
    manifests.write("web.yaml", &text)
}

#[test]
fn client_keeps_its_backend_until_the_backend_is_removed() -> Result<()> {
    let mut setup = Setup::new()?;
    let clients: [&Netns; 3] = [&setup.clients[0], &setup.clients[1], setup.cluster.node("n1")];
    let mut first = Vec::new();
    for client in clients {
        let kept = reached(client, VIP)?;
        assert_eq!(kept.len(), 1, "of {}: {kept:?}", client.name());
        assert_eq!(reached(client, VIP)?, kept, "the second run reaches the same backend");
        first.extend(kept);
        assert_eq!(reached(client, VIP6)?.len(), 1);
    }
    // The backend is removed, and the affinity ends at once; the client keeps its new backend.
    let client = setup.clients[0].clone();
    let rest: Vec<Pod> = setup
        .servers
        .iter()
        .filter(|pod| pod.name() != first[0])
        .cloned()
        .collect();
    setup.change(&rest, &affinity(3600))?;
    let second = reached(&client, VIP)?;
    ensure!(
        second.len() == 1 && !second.contains(&first[0]),
        "{first:?}, then {second:?}"
    );
    // The old backend returns as another backend with the same address: the client keeps the second one.
    let all = setup.servers.clone();
    setup.change(&all, &affinity(3600))?;
    assert_eq!(reached(&client, VIP)?, second);
    Ok(())
}

#[test]
fn udp_sockets_of_one_client_share_a_backend() -> Result<()> {
    let setup = Setup::new()?;
    let mut names = BTreeSet::new();
    for i in 0..ENOUGH {
        let mut socket = testbed().scripted_socket(&setup.clients[0], SocketKind::Udp4)?;
        let to = addr("10.96.0.10:53");
        if i % 2 == 0 {
            socket.connect(to)?;
            socket.send("x")?;
            names.insert(socket.receive_reply(to, "x")?);
        } else {
            names.insert(socket.exchange(to, "x")?);
        }
    }
    assert_eq!(names.len(), 1, "{names:?}");
    Ok(())
}

#[test]
fn affinity_can_be_disabled_and_enabled_at_runtime() -> Result<()> {
    let mut setup = Setup::new()?;
    let client = setup.clients[0].clone();
    let servers = setup.servers.clone();
    assert_eq!(reached(&client, VIP)?.len(), 1);
    setup.change(&servers, "")?;
    assert!(reached(&client, VIP)?.len() > 1, "affinity is off");
    setup.change(&servers, &affinity(3600))?;
    assert_eq!(reached(&client, VIP)?.len(), 1, "affinity is on again");
    Ok(())
}

#[test]
fn affinity_times_out_when_idle_and_is_refreshed_by_use() -> Result<()> {
    let mut setup = Setup::new()?;
    let servers = setup.servers.clone();
    let client = setup.clients[0].clone();
    setup.change(&servers, &affinity(3))?;
    let one = || -> Result<String> {
        let summary = testbed().connect(&client, &Connect::to(&[addr(VIP)]).count(1))?;
        summary.all_well()?;
        Ok(summary.per_backend.into_keys().collect())
    };
    // With a connection every two seconds, the affinity outlives its timeout of three seconds several times.
    let first = one()?;
    for _ in 0..4 {
        sleep(Duration::from_secs(2));
        assert_eq!(one()?, first);
    }
    // Without connections for longer than that, it expires: at least one of eight new choices is another backend. (By
    // chance none: 4^-8 = 1.5e-5.)
    for _ in 0..8 {
        sleep(Duration::from_millis(3100));
        if one()? != first {
            return Ok(());
        }
    }
    anyhow::bail!("always {first}, although the affinity has expired each time")
}
