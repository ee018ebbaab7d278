//! Tests of the test bed itself.

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Result;
use lb_tests::load::{ConnectStep, Record};
use lb_tests::{
    BPFFS, Cluster, Connect, Process, Underlay, cgroup2_root, ensure_bpffs, monotonic_ns, remove_leftovers,
    scaled_timeout, testbed,
};

/// Returns the names of all namespaces, cgroups, pins and temporary files on this machine that begin with `prefix`.
fn names_with_prefix(prefix: &str) -> Vec<String> {
    let cgroups = cgroup2_root().unwrap();
    [
        cgroups.as_path(),
        Path::new("/run/netns"),
        Path::new(BPFFS),
        &std::env::temp_dir(),
    ]
    .iter()
    .flat_map(|directory| fs::read_dir(directory).unwrap())
    .map(|entry| entry.unwrap().file_name().into_string().unwrap())
    .filter(|name| name.starts_with(prefix))
    .collect()
}

/// Returns whether a process with this id runs.
fn runs(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

#[test]
fn pods_reach_each_other_over_vxlan_and_routes() -> Result<()> {
    for underlay in [Underlay::Vxlan, Underlay::Routes] {
        let cluster = Cluster::builder().nodes(2).underlay(underlay).build()?;
        let (a, b, c) = (
            cluster.add_pod("n1", "a")?,
            cluster.add_pod("n1", "b")?,
            cluster.add_pod("n2", "c")?,
        );
        let _server_b = testbed().serve_with(&b, &["0.0.0.0:8080=b"], &["--report-source"])?;
        let _server_c = testbed().serve_with(&c, &["0.0.0.0:8080=c", "0.0.0.0:8081"], &["--report-source"])?;

        let targets = [b.socket(8080), c.socket(8080)];
        let summary = testbed().connect(&a, &Connect::to(&targets).count(20).threads(2).peer_check())?;
        summary.all_well()?;
        assert_eq!((summary.reached("b"), summary.reached("c")), (10, 10));
        assert_eq!(
            summary.per_target[&targets[0].to_string()],
            BTreeMap::from([("b".to_owned(), 10)])
        );
        // Packets between pods keep their source address.
        assert_eq!(summary.per_source, BTreeMap::from([(a.address().to_string(), 20)]));

        // From the node, over the overlay: the source is the overlay device's own address.
        let summary = testbed().connect(cluster.node("n1"), &Connect::to(&[c.socket(8080)]).count(3))?;
        summary.all_well()?;
        let source = match underlay {
            Underlay::Vxlan => cluster.node("n1").pod_network(),
            Underlay::Routes => cluster.node("n1").address(),
        };
        assert_eq!(summary.per_source, BTreeMap::from([(source.to_string(), 3)]));

        // A server without a name reports its listening address.
        let summary = testbed().connect(&a, &Connect::to(&[c.socket(8081)]).count(1))?;
        assert_eq!(summary.reached("0.0.0.0:8081"), 1);
    }
    Ok(())
}

#[test]
fn outside_client_reaches_nodes_and_service_addresses_are_unroutable() -> Result<()> {
    let cluster = Cluster::builder().nodes(2).clients(2).build()?;
    let node = cluster.node("n2");
    let _server = testbed().serve_with(node, &["0.0.0.0:8080=n2"], &["--report-source"])?;
    for client in cluster.clients() {
        let summary = testbed().connect(client, &Connect::to(&[node.socket(8080)]).count(5))?;
        summary.all_well()?;
        assert_eq!(summary.per_source, BTreeMap::from([(client.address().to_string(), 5)]));
    }
    let pod = cluster.add_pod("n1", "a")?;
    let service = "10.96.0.80:80".parse()?;
    let timeout = Duration::from_millis(300);
    for netns in [&**cluster.client(), &**cluster.node("n1")] {
        let summary = testbed().connect(netns, &Connect::to(&[service]).count(1).timeout(timeout))?;
        assert_eq!(summary.failures[0].errno, libc::ENETUNREACH, "{summary:?}");
    }
    // The pod has a default route, but its node then has no route.
    let summary = testbed().connect(&pod, &Connect::to(&[service]).count(1).timeout(timeout))?;
    assert_eq!(summary.failure_count, 1, "{summary:?}");
    Ok(())
}

#[test]
fn processes_run_in_their_namespace_and_cgroup() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).client(true).build()?;
    let node = cluster.node("n1");
    let pod = cluster.add_pod("n1", "a")?;
    let cgroup_of = |netns: &lb_tests::Netns| -> Result<String> {
        let text = netns.run("cat", &["/proc/self/cgroup"])?;
        let line = text.lines().find(|line| line.starts_with("0::")).unwrap();
        Ok(line["0::/".len()..].to_owned())
    };
    let prefix = cluster.prefix();
    assert_eq!(cgroup_of(node)?, format!("{prefix}n1/host"));
    assert_eq!(cgroup_of(&pod)?, format!("{prefix}n1/pods/a"));
    assert_eq!(cgroup_of(cluster.client())?, format!("{prefix}client1"));
    assert!(node.cgroup().ends_with(format!("{prefix}n1")));
    assert!(cluster.pin_path("n1").ends_with(format!("{prefix}n1")));

    // The mounts of the machine are visible: bpffs too.
    assert_eq!(
        node.run("stat", &["--file-system", "--format=%T", BPFFS])?.trim(),
        "bpf_fs"
    );

    // A closure in the pod sees the pod's addresses.
    let listener = pod.within(|| std::net::TcpListener::bind((pod.address(), 0)))??;
    assert_eq!(listener.local_addr()?.ip(), pod.address());
    assert!(pod.addresses()?.contains(&pod.address().into()));

    pod.add_address("10.10.1.50/32", "lo")?;
    let _server = testbed().serve(&pod, &["10.10.1.50:80=extra"])?;
    let summary = testbed().connect(&pod, &Connect::to(&["10.10.1.50:80".parse()?]).count(1))?;
    assert_eq!(summary.reached("extra"), 1);

    pod.sysctl("net.ipv4.ip_nonlocal_bind", "1")?;
    assert_eq!(pod.run("cat", &["/proc/sys/net/ipv4/ip_nonlocal_bind"])?.trim(), "1");
    assert_eq!(node.run("cat", &["/proc/sys/net/ipv4/ip_nonlocal_bind"])?.trim(), "0");
    Ok(())
}

#[test]
fn failed_connections_report_stage_and_errno() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let pod = cluster.add_pod("n1", "a")?;
    let summary = testbed().connect(&pod, &Connect::to(&[pod.socket(81)]).count(150))?;
    assert_eq!(
        (summary.connections, summary.failure_count, summary.failures.len()),
        (150, 150, 100)
    );
    let first = &summary.failures[0];
    assert_eq!((first.errno, first.step), (libc::ECONNREFUSED, ConnectStep::Connect));
    assert!(summary.all_well().is_err());

    // A listener that never accepts.
    let _mute = pod.within(|| std::net::TcpListener::bind((pod.address(), 82)))??;
    let connect = Connect::to(&[pod.socket(82)])
        .count(1)
        .timeout(Duration::from_millis(100));
    let summary = testbed().connect(&pod, &connect)?;
    assert_eq!(
        (summary.failures[0].errno, summary.failures[0].step),
        (libc::EAGAIN, ConnectStep::Read)
    );

    // No machine has that address: the kernel sends ARP requests for 3 s without a reply.
    let unused = "10.10.1.77:80".parse()?;
    let connect = Connect::to(&[unused]).count(1).timeout(Duration::from_millis(100));
    assert_eq!(testbed().connect(&pod, &connect)?.failures[0].errno, libc::ETIMEDOUT);
    Ok(())
}

#[test]
fn load_logs_connections_and_stops_on_request() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let (a, b) = (cluster.add_pod("n1", "a")?, cluster.add_pod("n1", "b")?);
    let server = testbed().serve(&b, &["0.0.0.0:8080=b"])?;
    let log = cluster.scratch().join("log");
    let begin = monotonic_ns();
    let mut load = testbed().start(
        &a,
        &Connect::to(&[b.socket(8080)])
            .threads(2)
            .timeout(scaled_timeout(Duration::from_millis(200)))
            .log(&log),
    )?;
    std::thread::sleep(scaled_timeout(Duration::from_millis(500)));
    server.kill()?;
    let killed = monotonic_ns();
    std::thread::sleep(scaled_timeout(Duration::from_millis(100)));
    assert!(load.is_running()?);
    let summary = load.stop()?;
    let records = Record::read_log(&log)?;
    assert_eq!(records.len() as u64, summary.connections);
    assert!(summary.reached("b") > 0, "{summary:?}");
    assert!(records.is_sorted_by_key(|record| record.start_ns));
    assert!(
        records
            .iter()
            .all(|record| begin < record.start_ns && record.start_ns <= record.end_ns)
    );
    // Connections that began after the server's end failed.
    assert!(records.iter().any(|record| record.start_ns > killed));
    assert!(
        records
            .iter()
            .filter(|record| record.start_ns > killed)
            .all(|record| record.outcome == Err(libc::ECONNREFUSED))
    );
    Ok(())
}

#[test]
fn held_connections_and_rate_limits_are_counted() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let (a, b) = (cluster.add_pod("n1", "a")?, cluster.add_pod("n1", "b")?);
    let first = testbed().serve_with(&b, &["0.0.0.0:8080=first"], &["--echo"])?;
    let _second = testbed().serve_with(&b, &["0.0.0.0:8081=second"], &["--echo"])?;
    let targets = [b.socket(8080), b.socket(8081)];

    let held = testbed().hold(&a, &targets, 1500)?.finish()?;
    assert_eq!((held.held, held.live), (1500, 1500), "{held:?}");

    let holding = testbed().hold(&a, &targets, 10)?;
    first.kill()?;
    let held = holding.finish()?;
    assert_eq!((held.held, held.live), (10, 5), "{held:?}");
    assert_eq!(held.live_per_backend, BTreeMap::from([("second".to_owned(), 5)]));

    let time = scaled_timeout(Duration::from_millis(500));
    let load = Connect::to(&targets[1..]).rate(100.0).seconds(time.as_secs_f64());
    let summary = testbed().connect(&a, &load.threads(4))?;
    summary.all_well()?;
    let most = time.as_millis() as u64 / 10 + 1;
    assert!((10..=most).contains(&summary.connections), "{summary:?}");
    Ok(())
}

#[test]
fn http_server_answers_curl_and_load() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let (a, b) = (cluster.add_pod("n1", "a")?, cluster.add_pod("n1", "b")?);
    let _server = testbed().serve_with(&b, &["0.0.0.0:80=b"], &["--http"])?;
    assert_eq!(
        a.run(
            "curl",
            &["--silent", "--show-error", &format!("http://{}/", b.address())]
        )?,
        "b\n"
    );
    let summary = testbed().connect(&a, &Connect::to(&[b.socket(80)]).http().count(50))?;
    summary.all_well()?;
    assert_eq!(summary.reached("b"), 50);
    Ok(())
}

#[test]
fn removed_pod_frees_its_address() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let a = cluster.add_pod("n1", "a")?;
    let b = cluster.add_pod("n1", "b")?;
    let mut server = testbed().serve(&b, &["0.0.0.0:8080=b"])?;
    cluster.remove_pod(&b)?;
    assert!(!server.is_running()?);
    assert_eq!(names_with_prefix(b.netns_name()), [""; 0]);
    assert!(b.command("true").is_err());

    // A new pod takes the address of the removed one.
    assert!(cluster.add_pod_at("n1", "c", a.address()).is_err());
    assert!(cluster.add_pod_at("n1", "c", "10.10.2.9".parse()?).is_err());
    let c = cluster.add_pod_at("n1", "c", b.address())?;
    let _server = testbed().serve(&c, &["0.0.0.0:8080=c"])?;
    let summary = testbed().connect(&a, &Connect::to(&[c.socket(8080)]).count(3))?;
    summary.all_well()?;
    assert_eq!(summary.reached("c"), 3);
    Ok(())
}

#[test]
fn ruleset_reflects_nft_changes() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let node = cluster.node("n1");
    let before = node.ruleset()?;
    assert_eq!(before, node.ruleset()?);
    node.run_with_input(
        "nft",
        &["-f", "-"],
        "table inet bed { chain in {\ntcp dport 30001 counter accept\n}\n}\n",
    )?;
    let after = node.ruleset()?;
    assert_ne!(before, after);
    assert!(after.mentions("30001") && !before.mentions("30001"));
    Ok(())
}

#[test]
fn dropping_a_cluster_removes_everything() -> Result<()> {
    let cluster = Cluster::builder().nodes(2).client(true).build()?;
    let pod = cluster.add_pod("n1", "a")?;
    let server = testbed().serve(&pod, &["0.0.0.0:8080"])?;
    // A process without a guard, and one that was forked by another process.
    let stray = pod.command("sleep")?.arg("1000").spawn()?;
    pod.run("sh", &["-c", "sleep 1000 >/dev/null 2>&1 &"])?;
    fs::create_dir_all(cluster.pin_path("n1").join("maps"))?;
    fs::write(cluster.scratch().join("file"), "")?;
    let procs = fs::read_to_string(pod.process_cgroup().unwrap().join("cgroup.procs"))?;
    let pids: Vec<u32> = procs.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(pids.len(), 3, "{procs}");
    assert!(pids.contains(&stray.id()) && pids.contains(&server.id()));

    let prefix = cluster.prefix().to_owned();
    assert!(names_with_prefix(&prefix).len() >= 8);
    drop(cluster);
    assert_eq!(names_with_prefix(&prefix), [""; 0]);
    assert!(pids.iter().all(|&pid| !runs(pid)));
    Ok(())
}

#[test]
fn panic_removes_the_cluster() {
    let mut prefix = String::new();
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let cluster = Cluster::builder().nodes(1).build().unwrap();
        prefix = cluster.prefix().to_owned();
        let pod = cluster.add_pod("n1", "a").unwrap();
        let _server = testbed().serve(&pod, &["0.0.0.0:8080"]).unwrap();
        panic!("this panic is part of the test");
    }));
    assert!(panicked.is_err());
    assert!(!prefix.is_empty());
    assert_eq!(names_with_prefix(&prefix), [""; 0]);
}

#[test]
fn leftovers_of_ended_owners_are_removed_and_of_running_owners_kept() -> Result<()> {
    let mine = Cluster::builder().nodes(1).build()?;
    ensure_bpffs()?;
    let mut owner = Process::spawn_reading(
        Command::new(testbed().program())
            .args(["cluster", "--nodes=1", "--pods=1"])
            .stdin(Stdio::piped()),
    )?;
    let start = scaled_timeout(Duration::from_secs(20));
    let prefix = owner.line(start)?;
    assert_eq!(owner.line(start)?, "ready");
    fs::create_dir_all(Path::new(BPFFS).join(format!("{prefix}n1")))?;
    let cgroup = cgroup2_root()?.join(format!("{prefix}n1/pods/pod1/cgroup.procs"));
    let server: u32 = fs::read_to_string(cgroup)?.trim().parse()?;
    assert!(runs(server));

    remove_leftovers()?;
    assert!(
        names_with_prefix(&prefix).len() >= 5,
        "the cluster of a running owner stays"
    );
    owner.kill()?;
    // Another test on this machine may do this at the same moment.
    remove_leftovers()?;
    assert_eq!(names_with_prefix(&prefix), [""; 0]);
    assert!(!runs(server));
    assert!(!names_with_prefix(mine.prefix()).is_empty());
    Ok(())
}
