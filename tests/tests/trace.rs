//! `lb-agent trace`: events as they happen, for one reader, with a count of lost ones.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lb_agent::loader::{self, Lock, PinPath, SocketLb};
use lb_agent::maps::bpf::PinnedMaps;
use lb_common::abi::{Addr, Event, EventKind, SizedMap};
use lb_core::maps::Capacities;
use lb_tests::manifests::{Manifests, Port, service, slice};
use lb_tests::{
    Agent, CallResult, Cluster, Connect, Netns, Pod, Process, RunningAgent, SocketCall, SocketKind, scaled_timeout,
    testbed,
};
use nix::sys::signal::Signal;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(10);
const HTTP: Port<'static> = Port::tcp("http", 80);
const DNS: Port<'static> = Port::udp("dns", 53);
const TARGET: Port<'static> = Port::tcp("http", 8080);
const DNS_TARGET: Port<'static> = Port::udp("dns", 5353);

struct Setup {
    agent: RunningAgent,
    manifests: Manifests,
    client: Pod,
    pod: Pod,
    _servers: [Process; 2],
    cluster: Cluster,
}

/// Returns the manifests of Services `web` and `db`, both served by one pod, by TCP and UDP, IPv4 and IPv6.
fn manifest(pod: &Pod) -> String {
    let (v4, v6) = ([(pod.address().into(), "n1")], [(pod.address6().into(), "n1")]);
    let mut text = String::new();
    for (name, ips) in [("web", "10.96.0.10,fd00:96::10"), ("db", "10.96.0.20,fd00:96::20")] {
        text += &service(name, ips, &[HTTP, DNS], "");
        for port in [TARGET, DNS_TARGET] {
            text += &(slice(name, port, &v4) + &slice(name, port, &v6));
        }
    }
    text
}

fn setup() -> Result<Setup> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let (client, pod) = (cluster.add_pod("n1", "client")?, cluster.add_pod("n1", "a")?);
    let both = [pod.socket(5353), pod.socket6(5353)].map(|at| format!("{at}=a"));
    let servers = [
        testbed().serve(&pod, &["[::]:8080=a"])?,
        testbed().serve_datagrams(&pod, &both.each_ref().map(String::as_str))?,
    ];
    let manifests = Manifests::new(&cluster)?;
    manifests.write("all.yaml", &manifest(&pod))?;
    let agent = manifests.serve(&cluster, "n1", &[])?;
    Ok(Setup {
        agent,
        manifests,
        client,
        pod,
        _servers: servers,
        cluster,
    })
}

/// Returns the bits that select which events are written.
fn enabled_events(pin_path: &Path) -> Result<u32> {
    Ok(PinnedMaps::open(&PinPath::new(pin_path).maps())?.config().events)
}

/// Starts `lb-agent trace -o json`, and waits until events are enabled.
fn trace(netns: &Netns, pin_path: &Path, flags: &[&str]) -> Result<Process> {
    let mut command = netns.command(Agent::find()?)?;
    command
        .args(["trace", "-o", "json", "--pin-path"])
        .arg(pin_path)
        .args(flags);
    let mut process = Process::spawn_reading(command.stdin(Stdio::null()))?;
    let deadline = Instant::now() + scaled_timeout(PATIENCE);
    while enabled_events(pin_path)? == 0 {
        ensure!(process.is_running()?, "the tracer has ended");
        ensure!(Instant::now() < deadline, "the tracer does not enable events");
        sleep(Duration::from_millis(10));
    }
    Ok(process)
}

/// Waits until events are disabled.
fn wait_for_disabled_events(setup: &Setup) -> Result<()> {
    let deadline = Instant::now() + scaled_timeout(2 * PATIENCE);
    while setup.enabled_events()? != 0 {
        ensure!(Instant::now() < deadline, "events are still enabled");
        sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn event(tracer: &mut Process) -> Result<Value> {
    let line = tracer.line(scaled_timeout(PATIENCE))?;
    serde_json::from_str(&line).with_context(|| line.clone())
}

/// Connects, and expects all connections to succeed or all to fail.
fn connect(setup: &Setup, to: &str, count: u64, well: bool) -> Result<()> {
    let to: SocketAddr = to.parse()?;
    let summary = testbed().connect(&setup.client, &Connect::to(&[to]).count(count))?;
    ensure!(summary.failure_count == if well { 0 } else { count }, "{summary:?}");
    Ok(())
}

impl Setup {
    fn trace(&self, flags: &[&str]) -> Result<Process> {
        trace(self.cluster.node("n1"), self.agent.pin_path(), flags)
    }

    fn enabled_events(&self) -> Result<u32> {
        enabled_events(self.agent.pin_path())
    }
}

#[test]
fn trace_shows_connects_and_refusals() -> Result<()> {
    let setup = setup()?;
    // Connections before the start are not shown.
    connect(&setup, "10.96.0.10:80", 3, true)?;
    let mut tracer = setup.trace(&[])?;
    connect(&setup, "10.96.0.10:80", 2, true)?;
    for _ in 0..2 {
        let row = event(&mut tracer)?;
        let (service, command) = (&row["service"], &row["command"]);
        assert_eq!(
            (&row["event"], &row["to"]),
            (&"connected".into(), &"10.96.0.10:80".into())
        );
        assert_eq!(
            (&service["name"], &service["namespace"]),
            (&"web".into(), &"default".into())
        );
        assert_eq!(row["backend"], setup.pod.socket(8080).to_string());
        assert_eq!((&row["protocol"], &row["reason"]), (&"TCP".into(), &Value::Null));
        // The client may have ended before the tracer looks up its name.
        assert!(command == "lb-testbed" || command == "?", "{row:#}");
        assert!(row["pid"].as_u64().is_some_and(|pid| pid > 1), "{row:#}");
    }
    connect(&setup, "10.96.0.10:81", 1, false)?;
    let row = event(&mut tracer)?;
    assert_eq!(
        (&row["event"], &row["reason"]),
        (&"refused".into(), &"no_such_port".into())
    );
    assert_eq!((&row["service"], &row["backend"]), (&Value::Null, &Value::Null));

    // Only one tracer can run at a time.
    let second = setup.agent.output(&["trace", "--count", "1"]);
    assert!(second.is_err_and(|error| error.to_string().contains("only one can run at a time")));

    assert_ne!(setup.enabled_events()?, 0);
    assert!(tracer.stop(scaled_timeout(PATIENCE))?.success());
    assert_eq!(
        setup.enabled_events()?,
        0,
        "SIGTERM ends the tracer and disables events"
    );
    Ok(())
}

#[test]
fn trace_shows_udp_in_both_families() -> Result<()> {
    let setup = setup()?;
    let mut tracer = setup.trace(&["--service", "default/web"])?;
    for (kind, to, backend) in [
        (SocketKind::Udp4, "10.96.0.10:53", setup.pod.socket(5353)),
        (SocketKind::Udp6, "[fd00:96::10]:53", setup.pod.socket6(5353)),
        // By a v4-mapped address.
        (SocketKind::Udp6, "10.96.0.10:53", setup.pod.socket(5353)),
    ] {
        let mut socket = testbed().scripted_socket(&setup.client, kind)?;
        let CallResult::Number(cookie) = socket.call(&SocketCall::Cookie)? else {
            anyhow::bail!("no cookie");
        };
        let at: SocketAddr = to.parse()?;
        socket.exchange(at, "x")?;
        socket.connect(at)?;
        let refused = SocketAddr::new(at.ip(), 54);
        socket.errno(&SocketCall::SendTo(refused, "x".into()))?;
        let rows = [event(&mut tracer)?, event(&mut tracer)?, event(&mut tracer)?];
        let events = rows.each_ref().map(|row| row["event"].as_str().unwrap_or_default());
        assert_eq!(events, ["sent", "connected", "refused"], "{kind:?} {to}");
        for row in &rows {
            assert_eq!(
                (&row["protocol"], &row["pid"], &row["cookie"], &row["command"]),
                (&"UDP".into(), &socket.id().into(), &cookie.into(), &"lb-testbed".into())
            );
        }
        for row in &rows[..2] {
            assert_eq!((&row["to"], &row["service"]["port_name"]), (&to.into(), &"dns".into()));
            assert_eq!(row["backend"], backend.to_string());
        }
        assert_eq!(
            (&rows[2]["to"], &rows[2]["reason"]),
            (&refused.to_string().into(), &"no_such_port".into())
        );
    }
    Ok(())
}

#[test]
fn trace_shows_destroyed_sockets() -> Result<()> {
    let setup = setup()?;
    let mut tracer = setup.trace(&["--service", "default/web"])?;
    let mut sockets = Vec::new();
    for (kind, to) in [
        (SocketKind::Udp4, "10.96.0.10:53"),
        (SocketKind::Udp6, "[fd00:96::10]:53"),
    ] {
        let mut socket = testbed().scripted_socket(&setup.client, kind)?;
        socket.connect(to.parse()?)?;
        let row = event(&mut tracer)?;
        assert_eq!((&row["event"], &row["to"]), (&"connected".into(), &to.into()));
        sockets.push((socket, row));
    }
    // The endpoints are removed.
    let without = service("web", "10.96.0.10,fd00:96::10", &[HTTP, DNS], "");
    setup.manifests.write("all.yaml", &without)?;
    let mut destroyed = [event(&mut tracer)?, event(&mut tracer)?];
    destroyed.sort_by_key(|row| row["to"].as_str().map(str::to_owned));
    for (row, (_, connected)) in destroyed.iter().zip(&sockets) {
        assert_eq!(
            (&row["event"], &row["pid"]),
            (&"destroyed".into(), &0.into()),
            "{row:#}"
        );
        for field in ["to", "backend", "cookie", "netns", "protocol", "service"] {
            assert_eq!(row[field], connected[field], "{field}");
        }
    }
    Ok(())
}

#[test]
fn trace_filters_by_service() -> Result<()> {
    let setup = setup()?;
    let mut tracer = setup.trace(&["--service", "default/db", "--count", "3"])?;
    for (to, well) in [
        ("10.96.0.10:80", true),
        ("10.96.0.10:81", false),
        ("10.96.0.20:80", true),
        ("10.96.0.20:81", false),
        ("10.96.0.10:80", true),
        ("10.96.0.20:80", true),
        ("10.96.0.20:80", true),
    ] {
        connect(&setup, to, 1, well)?;
    }
    // A refused connection to a port that the address does not have belongs to the Service too.
    let rows = [event(&mut tracer)?, event(&mut tracer)?, event(&mut tracer)?];
    let to = rows
        .each_ref()
        .map(|row| row["to"].as_str().unwrap_or_default().to_owned());
    assert_eq!(to, ["10.96.0.20:80", "10.96.0.20:81", "10.96.0.20:80"]);
    assert!(
        tracer.wait(scaled_timeout(PATIENCE))?.success(),
        "the tracer ends after three events"
    );
    assert_eq!(setup.enabled_events()?, 0);
    Ok(())
}

#[test]
fn events_are_disabled_after_the_tracer_is_killed() -> Result<()> {
    let mut setup = setup()?;
    // No agent runs that could disable events.
    setup.agent.kill()?;
    setup.trace(&[])?.kill()?;
    assert_ne!(setup.enabled_events()?, 0);
    connect(&setup, "10.96.0.20:80", 1, true)?;
    // The next tracer does not show events that were never read. Its output is a table.
    let mut command = setup.cluster.node("n1").command(Agent::find()?)?;
    command
        .args(["trace", "--count", "1", "--pin-path"])
        .arg(setup.agent.pin_path());
    let mut tracer = Process::spawn_reading(command.stdin(Stdio::null()))?;
    let header = tracer.line(scaled_timeout(PATIENCE))?;
    assert!(header.starts_with("TIME (UTC)"), "{header}");
    connect(&setup, "10.96.0.10:80", 1, true)?;
    let line = tracer.line(scaled_timeout(PATIENCE))?;
    assert!(
        line.contains("connected") && line.contains("default/web:http"),
        "{line}"
    );
    assert!(
        line.contains("10.96.0.10:80/TCP") && line.contains(&setup.pod.socket(8080).to_string()),
        "{line}"
    );
    assert!(tracer.wait(scaled_timeout(PATIENCE))?.success());
    assert_eq!(setup.enabled_events()?, 0);

    setup.trace(&[])?.kill()?;
    assert_ne!(setup.enabled_events()?, 0);
    setup.agent.start_again()?;
    setup.agent.wait_ready(&|| false)?;
    assert_eq!(setup.enabled_events()?, 0, "the start of an agent disables events");

    setup.trace(&[])?.kill()?;
    wait_for_disabled_events(&setup).context("a running agent disables events")?;

    // A restart of the agent keeps the events of a tracer that is still running.
    let mut tracer = setup.trace(&[])?;
    setup.agent.kill()?;
    setup.agent.start_again()?;
    setup.agent.wait_ready(&|| false)?;
    connect(&setup, "10.96.0.10:80", 1, true)?;
    assert_eq!(event(&mut tracer)?["event"], "connected");
    Ok(())
}

#[test]
fn trace_shows_the_present_names_after_maps_were_replaced() -> Result<()> {
    let mut setup = setup()?;
    let mut tracer = setup.trace(&[])?;
    connect(&setup, "10.96.0.10:80", 1, true)?;
    assert_eq!(event(&mut tracer)?["service"]["name"], "web");
    // NAMES is replaced by a larger map. Then another Service gets the indexes of `web`.
    setup.agent.kill()?;
    setup.agent.start_again_with(&["--min-services", "1024"])?;
    setup.agent.wait_ready(&|| false)?;
    let text = manifest(&setup.pod).replace("web", "other");
    setup
        .manifests
        .write("all.yaml", &service("db", "10.96.0.20,fd00:96::20", &[HTTP, DNS], ""))?;
    setup.agent.wait("without `web`", |agent| {
        let used = agent.status()?.used("SERVICES")?;
        ensure!(used == 4, "{used} service ports");
        Ok(())
    })?;
    setup.manifests.write("all.yaml", &text)?;
    setup.agent.wait("with `other`", Agent::verify)?;
    connect(&setup, "10.96.0.10:80", 1, true)?;
    assert_eq!(event(&mut tracer)?["service"]["name"], "other");
    Ok(())
}

#[test]
fn lost_events_are_counted_and_shown() -> Result<()> {
    // The ring buffer has room for fewer events.
    const COUNT: u64 = 4_000;
    let setup = setup()?;
    let refused = Connect::to(&["10.96.0.10:81".parse()?]).refused().count(COUNT);
    testbed().connect(&setup.client, &refused)?;
    let status = setup.agent.status()?;
    assert_eq!(
        (
            status.dropped("no_such_port")?,
            status.dropped("event_lost")?,
            setup.enabled_events()?
        ),
        (COUNT, 0, 0),
        "no event is written while events are disabled"
    );
    let mut tracer = setup.trace(&[])?;
    // The tracer is stopped while the ring buffer overflows.
    tracer.signal(Signal::SIGSTOP)?;
    let summary = testbed().connect(&setup.client, &refused)?;
    assert_eq!(summary.connections, COUNT);
    let lost = setup.agent.status()?.dropped("event_lost")?;
    assert!(lost > 0 && lost < COUNT, "{lost}");
    tracer.signal(Signal::SIGCONT)?;
    let (mut shown, mut lost_events) = (0, 0);
    while shown + lost_events < COUNT {
        let row = event(&mut tracer)?;
        match row["event"].as_str() {
            Some("lost") => lost_events += row["count"].as_u64().context("count")?,
            Some("refused") => shown += 1,
            _ => anyhow::bail!("{row:#}"),
        }
    }
    assert_eq!((shown + lost_events, lost_events), (COUNT, lost));
    Ok(())
}

#[test]
fn agent_events_reach_the_tracer() -> Result<()> {
    const SMALL: Capacities = Capacities::uniform(16)
        .with(SizedMap::Conntrack, 64)
        .with(SizedMap::ConntrackNew, 64);
    let cluster = Cluster::builder().nodes(1).build()?;
    let pins = PinPath::new(cluster.pin_path("n1"));
    let lock = Lock::take(&pins)?;
    let maps = loader::load(loader::OBJECT, &lock, &SMALL, SocketLb::All)?;
    let destroyed = |port| Event {
        time: lb_tests::monotonic_ns(),
        cookie: 0x1234_5678_9abc,
        netns: 77,
        addr: Addr::from_v4([10, 96, 0, 10]),
        backend_addr: Addr::from_v4([10, 10, 1, 2]),
        port,
        backend_port: 5353,
        proto: 17,
        kind: EventKind::Destroyed as u8,
        ..Event::default()
    };
    // Events are disabled.
    maps.report_event(&destroyed(1))?;
    let mut tracer = trace(cluster.node("n1"), pins.root(), &["--count", "2"])?;
    for port in [53, 54] {
        maps.report_event(&destroyed(port))?;
        let row = event(&mut tracer)?;
        assert_eq!(
            (&row["event"], &row["to"]),
            (&"destroyed".into(), &format!("10.96.0.10:{port}").into())
        );
        assert_eq!(
            (&row["backend"], &row["protocol"]),
            (&"10.10.1.2:5353".into(), &"UDP".into())
        );
        assert_eq!(
            (&row["netns"], &row["cookie"]),
            (&77.into(), &0x1234_5678_9abc_u64.into())
        );
        assert_eq!((&row["pid"], &row["reason"]), (&0.into(), &Value::Null));
    }
    assert!(tracer.wait(scaled_timeout(PATIENCE))?.success());
    Ok(())
}
