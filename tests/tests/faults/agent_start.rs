//! Faults at the system calls of a real agent's start, which creates pins, fills maps and attaches programs.

use std::fs::{self, OpenOptions};
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use lb_agent::loader::{self, Cgroup, PinPath};
use lb_agent::maps::bpf::PinnedMaps;
use lb_common::abi::FrontendKey;
use lb_tests::manifests::{Manifests, Port, service, slice};
use lb_tests::{Agent, Cluster, RunningAgent, scaled_count};

use crate::ptrace::{self, Call, FaultKind, FaultPoint, RunEnd};
use crate::reader::{Always, Reader};

const NODE: &str = "n1";

/// Small maps, since the reader reads all of them.
const FLAGS: [&str; 12] = [
    "--max-services",
    "16",
    "--max-frontends",
    "32",
    "--max-backends",
    "32",
    "--max-backend-slots",
    "64",
    "--max-sockets",
    "16",
    "--max-sockets-more",
    "16",
];

/// Number of served devices: `eth0`, `cni0`, `flannel.1`.
const DEVICES: usize = 3;

/// Commands of bpf(2) that change state visible to other processes: elements of maps, pins and links. (`bpf_cmd` of the
/// kernel's header: MAP_UPDATE_ELEM, MAP_DELETE_ELEM, OBJ_PIN, PROG_TEST_RUN, LINK_CREATE, LINK_UPDATE.) Between two of
/// these calls, or of those that change directories, a kill leaves the same state wherever it happens.
const CHANGING: [u64; 6] = [2, 3, 6, 10, 28, 29];

fn changes_something(call: Call) -> bool {
    match call.number {
        libc::SYS_bpf => CHANGING.contains(&call.first),
        libc::SYS_mkdir | libc::SYS_mkdirat => true,
        libc::SYS_rename | libc::SYS_renameat | libc::SYS_renameat2 => true,
        libc::SYS_unlink | libc::SYS_unlinkat => true,
        _ => false,
    }
}

struct Fixture {
    agent: Agent,
    manifests: Manifests,
    pins: PinPath,
    cluster: Cluster,
}

impl Fixture {
    fn new() -> Result<Self> {
        let cluster = Cluster::builder().nodes(1).build()?;
        let manifests = Manifests::new(&cluster)?;
        let program = Agent::find()?;
        Ok(Self {
            agent: Agent::new(&cluster, cluster.node(NODE), &program, manifests.path()),
            manifests,
            pins: PinPath::new(cluster.pin_path(NODE)),
            cluster,
        })
    }

    /// Writes the manifests of one of two states; the Service `web` is in both.
    fn write(&self, second: bool) -> Result<()> {
        let (port, target) = (Port::tcp("http", 80), Port::tcp("http", 8080));
        let web: &[_] = if second {
            &["10.1.0.2", "10.1.0.3"]
        } else {
            &["10.1.0.1"]
        };
        let (other, ip) = if second {
            ("after", "10.96.0.4")
        } else {
            ("before", "10.96.0.3")
        };
        let mut text = String::new();
        for (name, ip, backends) in [("web", "10.96.0.1", web), (other, ip, &["10.3.0.1"])] {
            let mut endpoints = Vec::new();
            for backend in backends {
                endpoints.push((backend.parse()?, NODE));
            }
            text += &(service(name, ip, &[port], "") + &slice(name, target, &endpoints));
        }
        self.manifests.write("all.yaml", &text)
    }

    /// Starts the agent with a fault, and kills it once it serves.
    fn start(&self, fault: FaultPoint) -> Result<(RunEnd, bool)> {
        let log = self.cluster.scratch().join("traced.log");
        let file = OpenOptions::new().create(true).write(true).truncate(true).open(&log)?;
        let node = self.cluster.node(NODE);
        let mut command = node.command(Agent::find()?)?;
        command
            .args(["run", "--node-name", NODE, "--manifests"])
            .arg(self.manifests.path())
            .arg("--cgroup")
            .arg(node.cgroup())
            .arg("--pin-path")
            .arg(self.pins.root())
            .args(FLAGS)
            .env("RUST_LOG", "info")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file);
        let serves = |call: Call| Ok(call.number == libc::SYS_write && fs::read_to_string(&log)?.contains("serving"));
        ptrace::run(&mut command, fault, changes_something, serves)
            .with_context(|| fs::read_to_string(&log).unwrap_or_default())
    }

    /// Starts the agent without a fault, checks the result, and kills the agent.
    fn start_well(&self) -> Result<()> {
        let mut running = RunningAgent::start(self.agent.clone(), &FLAGS)?;
        running.wait_ready(&|| false)?;
        running.kill()?;
        let cgroup = Cgroup::open(Some(self.cluster.node(NODE).cgroup()))?.id();
        for (name, attached) in loader::attached(&self.pins)? {
            let attached = attached.with_context(|| format!("{name} is not attached"))?;
            ensure!(attached.cgroup == cgroup, "{name} is attached elsewhere: {attached:?}");
        }
        let links = fs::read_dir(self.pins.links())?.count();
        // In addition to the links of the cgroup hooks there are two per served device, except on kernels without tcx.
        let devices = self.agent.status()?.devices;
        let served: Vec<_> = devices.iter().filter_map(|device| device.attached.as_deref()).collect();
        ensure!(served.len() == DEVICES, "{devices:?}");
        let of_devices = served.iter().filter(|way| **way == "tcx").count() * 2;
        ensure!(
            links == loader::attached(&self.pins)?.len() + of_devices,
            "{links} links"
        );
        Ok(())
    }
}

/// Injects one fault at each call of a start in turn, and starts without a fault after each. `before` runs before each
/// fault. Returns the number of calls that were tried.
fn try_all(fixture: &Fixture, kind: FaultKind, first: u64, mut before: impl FnMut() -> Result<()>) -> Result<u64> {
    let stride = 100 / scaled_count(100);
    let mut tried = 0;
    let mut at = first % stride;
    loop {
        before()?;
        let what = || format!("{kind:?} at call {at}");
        let (end, reached) = fixture.start(FaultPoint { at, kind }).with_context(what)?;
        let expected = match (kind, reached) {
            (_, false) => end == RunEnd::Done,
            // The thread that waits for grace periods may still be in its call when the agent serves.
            (FaultKind::Die, true) => matches!(end, RunEnd::Died | RunEnd::Done),
            // A failed call that is optional or retried does not end the agent.
            (FaultKind::Fail, true) => matches!(end, RunEnd::Done | RunEnd::Exited(1)),
        };
        ensure!(expected, "{}: {end:?}", what());
        fixture.start_well().with_context(what)?;
        if !reached {
            return Ok(tried);
        }
        tried += 1;
        at += stride;
    }
}

fn faults_at_a_first_start(kind: FaultKind) -> Result<()> {
    let fixture = Fixture::new()?;
    fixture.write(false)?;
    // Runs in a process of its own: between fork and exec, a child of another test shares a lock of this process.
    let cleanup = || fixture.agent.output(&["cleanup"]).map(drop);
    let tried = try_all(&fixture, kind, 0, cleanup)?;
    println!("{kind:?} at {tried} calls of a first start");
    // Pins of maps and links, and entries of two Services.
    ensure!(tried >= scaled_count(25), "too few calls");
    cleanup()
}

fn faults_at_the_next_start(kind: FaultKind) -> Result<()> {
    let fixture = Fixture::new()?;
    let mut second = false;
    fixture.write(second)?;
    fixture.start_well()?;
    let web: std::net::Ipv4Addr = "10.96.0.1".parse()?;
    let always = Always {
        key: FrontendKey::new(web.into(), 80, 6),
        owner: 1,
    };
    let reader = Reader::start(PinnedMaps::open(&fixture.pins.maps())?, vec![always]);
    let tried = try_all(&fixture, kind, 3, || {
        ensure!(!reader.has_ended(), "the reader has ended");
        second = !second;
        fixture.write(second)
    });
    // An error of the reader is reported before one of the trials.
    let seen = reader.stop()?;
    let tried = tried?;
    println!("{kind:?} at {tried} calls of the next start; {seen:?}");
    ensure!(tried >= scaled_count(8), "too few calls");
    ensure!(seen.chains > 0, "the reader has checked no chain");
    Ok(())
}

#[test]
fn first_start_killed_at_any_syscall_is_completed_by_the_next() -> Result<()> {
    faults_at_a_first_start(FaultKind::Die)
}

#[test]
fn first_start_with_any_failing_syscall_is_completed_by_the_next() -> Result<()> {
    faults_at_a_first_start(FaultKind::Fail)
}

#[test]
fn restart_killed_at_any_syscall_is_completed_by_the_next() -> Result<()> {
    faults_at_the_next_start(FaultKind::Die)
}

#[test]
fn restart_with_any_failing_syscall_is_completed_by_the_next() -> Result<()> {
    faults_at_the_next_start(FaultKind::Fail)
}
