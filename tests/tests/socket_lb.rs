//! Socket-level load balancing and socket records, on a real kernel.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lb_tests::load::ConnectStep;
use lb_tests::manifests::{Manifests, Port, service, slice};
use lb_tests::{
    Agent, Cluster, Connect, Pod, Process, Ruleset, RunningAgent, addr, scaled_count, scaled_timeout, testbed,
};
use serde_json::Value;

const HTTP: Port<'static> = Port::tcp("http", 80);
const TARGET: Port<'static> = Port::tcp("http", 8080);
const VIP: &str = "10.96.0.10:80";

/// One node with a client pod, two backends, and an agent.
struct Setup {
    agent: RunningAgent,
    manifests: Manifests,
    client: Pod,
    backends: [Pod; 2],
    /// Rules of every namespace before the agent was started.
    rules: Vec<Ruleset>,
    _servers: Vec<Process>,
    cluster: Cluster,
}

/// Returns the iptables and nftables rules of the node and of pods.
fn rules<'a>(cluster: &Cluster, pods: impl Iterator<Item = &'a Pod>) -> Result<Vec<Ruleset>> {
    pods.map(|pod| pod.ruleset())
        .chain([cluster.node("n1").ruleset()])
        .collect()
}

fn setup(more: &[&str]) -> Result<Setup> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let client = cluster.add_pod("n1", "client")?;
    let backends = [cluster.add_pod("n1", "a")?, cluster.add_pod("n1", "b")?];
    let servers = backends
        .iter()
        .zip(["0.0.0.0:8080=a", "0.0.0.0:8080=b"])
        .map(|(pod, listen)| testbed().serve_with(pod, &[listen], &["--echo"]))
        .collect::<Result<Vec<_>>>()?;
    let manifests = Manifests::new(&cluster)?;
    let endpoints = backends.each_ref().map(|pod| (pod.address().into(), "n1"));
    manifests.write(
        "web.yaml",
        &(service("web", "10.96.0.10", &[HTTP], "") + &slice("web", TARGET, &endpoints)),
    )?;
    let rules = rules(&cluster, backends.iter().chain([&client]))?;
    let agent = manifests.serve(&cluster, "n1", more)?;
    Ok(Setup {
        agent,
        rules,
        manifests,
        client,
        backends,
        _servers: servers,
        cluster,
    })
}

/// Waits until there is no socket record: sockets are released shortly after close(), not at once.
fn wait_for_no_records(agent: &Agent) -> Result<()> {
    let deadline = Instant::now() + scaled_timeout(Duration::from_secs(10));
    loop {
        let status = agent.status()?;
        let left = (status.used("SOCKETS")?, status.used("SOCKETS_MORE")?);
        if left == (0, 0) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "records are left: {left:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn getpeername_is_the_vip_and_100_000_closed_sockets_leave_no_record() -> Result<()> {
    let count = scaled_count(100_000);
    let setup = setup(&[])?;
    let load = Connect::to(&[addr(VIP)]).count(count).threads(4).peer_check();
    let summary = testbed().connect(&setup.client, &load)?;
    summary.all_well()?;
    assert_eq!(summary.reached("a") + summary.reached("b"), count);
    wait_for_no_records(&setup.agent)?;
    let services: Vec<Value> = setup.agent.json(&["service", "list"])?;
    assert_eq!(services[0]["connections"], count);
    assert_eq!(services[0]["frontends"][0]["address"], "10.96.0.10");
    assert_eq!(services[0]["frontends"][0]["status"], "done");
    assert_eq!(services[0]["status"], "done");
    let now = rules(&setup.cluster, setup.backends.iter().chain([&setup.client]))?;
    assert!(
        setup.rules == now,
        "the rules of a namespace changed (iptables-save, nft list ruleset)"
    );
    Ok(())
}

#[test]
fn host_processes_and_hairpin_pods_are_served() -> Result<()> {
    let setup = setup(&[])?;
    let node = setup.cluster.node("n1");
    testbed()
        .connect(node, &Connect::to(&[addr(VIP)]).count(200).threads(2).peer_check())?
        .all_well()?;
    // A pod reaches itself through its own Service.
    testbed()
        .connect(&setup.backends[0], &Connect::to(&[addr(VIP)]).count(200).peer_check())?
        .all_well()?;
    Ok(())
}

#[test]
fn socket_list_shows_live_sockets_with_their_backend() -> Result<()> {
    let setup = setup(&[])?;
    let held = testbed().hold(&setup.client, &[addr(VIP)], 50)?;
    let rows: Vec<Value> = setup.agent.json(&["socket", "list"])?;
    assert_eq!(rows.len(), 50);
    let of = |pod: &Pod| {
        rows.iter()
            .filter(|r| r["backend"] == pod.socket(8080).to_string())
            .count()
    };
    assert_eq!(of(&setup.backends[0]) + of(&setup.backends[1]), 50);
    for row in &rows {
        assert_eq!(
            (&row["original"], &row["name"]),
            (&Value::from(VIP), &Value::from("web"))
        );
        assert_eq!(row["current"], true);
    }
    let backends: Vec<Value> = setup.agent.json(&["backend", "list"])?;
    let sockets: u64 = backends.iter().filter_map(|row| row["sockets"].as_u64()).sum();
    assert_eq!((backends.len(), sockets), (2, 50));

    // The removal of a backend leaves its TCP sockets alone, and marks them in the list.
    let one = [(setup.backends[0].address().into(), "n1")];
    setup.manifests.write(
        "web.yaml",
        &(service("web", "10.96.0.10", &[HTTP], "") + &slice("web", TARGET, &one)),
    )?;
    let mut agent = setup.agent;
    agent.wait_ready(&|| false)?;
    let rows: Vec<Value> = agent.json(&["socket", "list"])?;
    let gone = rows.iter().filter(|row| row["current"] == false).count();
    assert_eq!(
        (rows.len(), gone),
        (
            50,
            rows.iter()
                .filter(|r| r["backend"] == setup.backends[1].socket(8080).to_string())
                .count()
        )
    );
    let held = held.finish()?;
    assert_eq!((held.held, held.live), (50, 50));
    wait_for_no_records(&agent)
}

#[test]
fn socket_records_overflow_to_the_hash_and_a_full_hash_is_counted() -> Result<()> {
    let setup = setup(&["--max-sockets", "16", "--max-sockets-more", "100"])?;
    let held = testbed().hold(&setup.client, &[addr(VIP)], 100)?;
    let status = setup.agent.status()?;
    assert_eq!(status.used("SOCKETS")? + status.used("SOCKETS_MORE")?, 100);
    assert!(status.used("SOCKETS_MORE")? >= 84, "there are 16 slots");
    // Other sockets are opened and closed meanwhile, and all of them see the VIP as peer: with a record in a slot, in
    // the hash, and in the hash when it fills up.
    let summary = testbed().connect(
        &setup.client,
        &Connect::to(&[addr(VIP)]).count(2_000).threads(4).peer_check(),
    )?;
    summary.all_well()?;
    assert_eq!(held.finish()?.live, 100);
    wait_for_no_records(&setup.agent)?;

    // Both maps are full: connections succeed all the same.
    let held = testbed().hold(&setup.client, &[addr(VIP)], 300)?;
    let status = setup.agent.status()?;
    let recorded = status.used("SOCKETS")? + status.used("SOCKETS_MORE")?;
    assert!(recorded < 300, "{recorded} records");
    assert_eq!(status.dropped("sockets_full")?, 300 - recorded);
    assert_eq!(held.finish()?.live, 300);
    wait_for_no_records(&setup.agent)
}

/// Makes connections that must all fail at connect() with one error number.
fn refused(setup: &Setup, to: &str, errno: i32) -> Result<()> {
    let summary = testbed().connect(&setup.client, &Connect::to(&[addr(to)]).count(20))?;
    ensure!(summary.failure_count == 20, "{to}: {summary:?}");
    for failure in &summary.failures {
        ensure!(
            failure.errno == errno && failure.step == ConnectStep::Connect,
            "{to}: {failure:?}, not errno {errno}"
        );
    }
    Ok(())
}

#[test]
fn connect_without_endpoint_is_refused_with_the_right_errno() -> Result<()> {
    let mut setup = setup(&[])?;
    let elsewhere = [("10.10.9.9".parse()?, "n9")];
    let text = service("empty", "10.96.0.11", &[HTTP], "")
        + &slice("empty", TARGET, &[])
        + &service("sliceless", "10.96.0.12", &[HTTP], "")
        + &service("local", "10.96.0.13", &[HTTP], "internalTrafficPolicy: Local")
        + &slice("local", TARGET, &elsewhere)
        + &service("empty-local", "10.96.0.14", &[HTTP], "internalTrafficPolicy: Local");
    setup.manifests.write("more.yaml", &text)?;
    setup.agent.wait_ready(&|| false)?;

    refused(&setup, "10.96.0.11:80", libc::ECONNREFUSED)?;
    refused(&setup, "10.96.0.12:80", libc::ECONNREFUSED)?;
    refused(&setup, "10.96.0.13:80", libc::EHOSTUNREACH)?;
    refused(&setup, "10.96.0.14:80", libc::ECONNREFUSED)?;
    refused(&setup, "10.96.0.10:81", libc::ECONNREFUSED)?;
    let status = setup.agent.status()?;
    let drops = ["no_endpoint", "no_local_endpoint", "no_such_port"].map(|reason| status.dropped(reason).unwrap_or(0));
    assert_eq!(drops, [60, 20, 20]);
    let services: Vec<Value> = setup.agent.json(&["service", "list"])?;
    let refused = |name: &str| {
        services
            .iter()
            .find(|s| s["name"] == name)
            .map(|s| s["refused"].clone())
    };
    assert_eq!(
        (refused("empty"), refused("local"), refused("web")),
        (Some(20.into()), Some(20.into()), Some(0.into()))
    );

    // Addresses outside of all Services are not translated.
    let direct = setup.backends[0].socket(8080);
    let summary = testbed().connect(&setup.client, &Connect::to(&[direct]).count(10).peer_check())?;
    summary.all_well()?;
    assert_eq!(summary.reached("a"), 10);
    Ok(())
}

#[test]
fn client_in_another_cgroup_is_not_translated() -> Result<()> {
    let cluster = Cluster::builder().nodes(2).build()?;
    let (server, stranger) = (cluster.add_pod("n1", "a")?, cluster.add_pod("n2", "b")?);
    let _process = testbed().serve(&server, &["0.0.0.0:8080=a"])?;
    let manifests = Manifests::new(&cluster)?;
    let endpoints = [(server.address().into(), "n1")];
    manifests.write(
        "web.yaml",
        &(service("web", "10.96.0.10", &[HTTP], "") + &slice("web", TARGET, &endpoints)),
    )?;
    let _agent = manifests.serve(&cluster, "n1", &[])?;
    testbed()
        .connect(cluster.node("n1"), &Connect::to(&[addr(VIP)]).count(5))?
        .all_well()?;
    // n2 has no agent: its hooks are not attached, and the VIP leads nowhere.
    let timeout = Duration::from_millis(300);
    let summary = testbed().connect(&stranger, &Connect::to(&[addr(VIP)]).count(3).timeout(timeout))?;
    assert_eq!(summary.failure_count, 3, "{summary:?}");
    Ok(())
}
