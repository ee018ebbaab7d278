//! `lb-agent run --ebpf-log`: the lines that the programs log.

use std::net::SocketAddr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lb_agent::loader::{self, EbpfLog, Loader, Lock, OBJECT, PinPath, SocketLb};
use lb_agent::node::devices::Layer;
use lb_core::maps::Capacities;
use lb_tests::manifests::{Manifests, Port, service, slice};
use lb_tests::{Cluster, Connect, Pod, Process, RunningAgent, scaled_timeout, testbed};

const PATIENCE: Duration = Duration::from_secs(10);
const HTTP: Port<'static> = Port::tcp("http", 80);
const TARGET: Port<'static> = Port::tcp("http", 8080);

struct Setup {
    agent: RunningAgent,
    _manifests: Manifests,
    client: Pod,
    pod: Pod,
    _server: Process,
    _cluster: Cluster,
}

/// Starts an agent whose sockets of pods are left to the packet path, so that both paths log.
fn setup(flags: &[&str]) -> Result<Setup> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let (client, pod) = (cluster.add_pod("n1", "client")?, cluster.add_pod("n1", "a")?);
    let server = testbed().serve(&pod, &["[::]:8080=a"])?;
    let manifests = Manifests::new(&cluster)?;
    let text = service("web", "10.96.0.10", &[HTTP], "")
        + &slice("web", TARGET, &[(pod.address().into(), "n1")])
        + &service("empty", "10.96.0.20", &[HTTP], "");
    manifests.write("all.yaml", &text)?;
    let agent = manifests.serve(&cluster, "n1", flags)?;
    Ok(Setup {
        agent,
        _manifests: manifests,
        client,
        pod,
        _server: server,
        _cluster: cluster,
    })
}

impl Setup {
    /// Connects from the pod to both Services: one has a backend, the other refuses.
    fn connect(&self) -> Result<()> {
        for (to, failures) in [("10.96.0.10:80", 0), ("10.96.0.20:80", 1)] {
            let to: SocketAddr = to.parse()?;
            let summary = testbed().connect(&self.client, &Connect::to(&[to]).count(1))?;
            ensure!(summary.failure_count == failures, "{to}: {summary:?}");
        }
        Ok(())
    }

    /// Returns the lines of the programs, once one of them has each of the texts.
    fn lines(&self, texts: &[&str]) -> Result<Vec<String>> {
        let deadline = Instant::now() + scaled_timeout(PATIENCE);
        loop {
            let log = self.agent.log_tail();
            let lines: Vec<_> = log.lines().filter(|line| line.contains("lb_ebpf")).collect();
            let missing: Vec<_> = texts
                .iter()
                .filter(|text| !lines.iter().any(|line| line.contains(**text)))
                .collect();
            if missing.is_empty() {
                return Ok(lines.into_iter().map(Into::into).collect());
            }
            ensure!(Instant::now() < deadline, "no line with {missing:?} in\n{log}");
            sleep(Duration::from_millis(50));
        }
    }
}

#[test]
fn programs_log_nothing_by_default() -> Result<()> {
    let setup = setup(&[])?;
    setup.connect()?;
    // A line takes some milliseconds at most.
    sleep(Duration::from_millis(500));
    assert!(setup.lines(&[])?.is_empty());
    Ok(())
}

#[test]
fn warn_logs_refused_calls_and_packets() -> Result<()> {
    let setup = setup(&["--ebpf-log", "warn"])?;
    setup.connect()?;
    let lines = setup.lines(&["connect4 TCP pid", "10.96.0.20:80 service", "refused no_endpoint"])?;
    assert!(lines.iter().all(|line| line.contains("WARN")), "{lines:#?}");
    assert!(!lines.iter().any(|line| line.contains("10.96.0.10:80")), "{lines:#?}");
    Ok(())
}

#[test]
fn warn_logs_rejected_packets() -> Result<()> {
    let setup = setup(&["--ebpf-log", "warn", "--socket-lb", "node"])?;
    setup.connect()?;
    let client = format!("ingress TCP {}:", setup.client.address());
    let lines = setup.lines(&[&client, "> 10.96.0.20:80 service", "rejected no_endpoint"])?;
    assert!(!lines.iter().any(|line| line.contains("10.96.0.10:80")), "{lines:#?}");
    Ok(())
}

#[test]
fn lines_of_a_flood_are_counted_and_not_printed_one_by_one() -> Result<()> {
    let setup = setup(&["--ebpf-log", "warn"])?;
    let flood = Connect::to(&["10.96.0.20:80".parse()?]).count(20_000).threads(2);
    let summary = testbed().connect(&setup.client, &flood)?;
    ensure!(summary.failure_count == 20_000, "{summary:?}");
    let lines = setup.lines(&["lines were not printed: at most 1000 in a second are"])?;
    assert!(
        lines.iter().any(|line| line.contains("refused no_endpoint")),
        "{lines:#?}"
    );
    Ok(())
}

#[test]
fn debug_logs_every_decision_of_a_connection() -> Result<()> {
    let setup = setup(&["--ebpf-log", "debug"])?;
    setup.connect()?;
    let translated = format!("10.96.0.10:80 => {}", setup.pod.socket(8080));
    setup.lines(&["connect4 TCP pid", &translated, "refused no_endpoint"])?;
    Ok(())
}

#[test]
fn debug_logs_every_packet_of_a_flow() -> Result<()> {
    let setup = setup(&["--ebpf-log", "debug", "--socket-lb", "node"])?;
    setup.connect()?;
    let backend = setup.pod.socket(8080);
    // Both pods are behind one bridge, which the request leaves with a source of the node: the reply comes in by it.
    let reply = format!("ingress TCP {backend} >");
    let translated = format!("> {backend}");
    setup.lines(&[
        "new flow",
        "request",
        "reply",
        &reply,
        &translated,
        "rejected no_endpoint",
    ])?;
    Ok(())
}

/// Without log lines, the verifier removes their code, so every level costs more instructions than the one before.
#[test]
fn log_lines_are_removed_by_the_verifier_by_default() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let verified = |log| -> Result<u32> {
        let pins = PinPath::new(cluster.pin_path("n1"));
        let lock = Lock::take(&pins)?;
        let loader = Loader::new(OBJECT, &lock, SocketLb::All, log)?;
        let mut maps = loader.load(|_| Capacities::default())?.maps;
        loader::load_device_programs(maps.programs_mut(), Layer::Network)?;
        let total = loader::verified(maps.programs())?
            .iter()
            .filter_map(|p| p.verified)
            .sum();
        drop((maps, lock));
        loader::cleanup(&pins)?;
        Ok(total)
    };
    let [off, warn, debug] = [
        verified(EbpfLog::Off)?,
        verified(EbpfLog::Warn)?,
        verified(EbpfLog::Debug)?,
    ];
    println!("off {off}, warn {warn}, debug {debug} instructions verified");
    assert!(off < warn && warn < debug, "off {off}, warn {warn}, debug {debug}");
    Ok(())
}
