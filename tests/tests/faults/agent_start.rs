//! Faults at the system calls of a real agent's start, which creates pins, fills maps and attaches programs.

use std::cell::Cell;
use std::env;
use std::fs::{self, OpenOptions};
use std::net::SocketAddr;
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, Map, MapData, MapInfo};
use lb_agent::loader::{self, Cgroup, PinPath};
use lb_agent::maps::bpf::PinnedMaps;
use lb_agent::maps::ct::CtMaps;
use lb_common::abi::{
    Addr, CtEntry, CtKey, FrontendKey, MOVE_MAP, Move, MovePhase, SizedMap, VERSION, ct_flags, ct_state, ip_protocol,
    map_name,
};
use lb_common::logic::ct::reverse_key;
use lb_core::maps::Capacities;
use lb_tests::manifests::{Manifests, Port, service, slice};
use lb_tests::{Agent, Cluster, Pod, RunningAgent, ScriptedSocket, SocketKind, monotonic_ns, scaled_count, testbed};

use crate::other_layouts::{make_later_layout, make_layout_3};
use crate::ptrace::{self, Call, FaultKind, FaultPoint, RunEnd};
use crate::reader::{Always, Reader};

const NODE: &str = "n1";

/// Small maps, since the reader reads all of them.
const SIZES: Capacities = Capacities::uniform(64)
    .with(SizedMap::Services, 16)
    .with(SizedMap::Frontends, 32)
    .with(SizedMap::Backends, 32)
    .with(SizedMap::Sockets, 16)
    .with(SizedMap::SocketsMore, 32)
    .with(SizedMap::Affinity, 256)
    .with(SizedMap::ConntrackNew, 256);

/// Factor between [`SIZES`] and the larger sizes of a start that replaces the maps.
const FACTOR: u32 = 2;

/// Returns the flags that set the sizes of all maps: as both limits.
fn flags(sizes: &Capacities) -> Vec<String> {
    let flag = |map: &SizedMap| {
        let (bound, size) = (format!("--{}", map.flag()), sizes[*map].to_string());
        [bound.replace("max-", "min-"), size.clone(), bound, size]
    };
    SizedMap::ALL.iter().flat_map(flag).collect()
}

/// Address of the Service `keep`.
const KEEP: &str = "10.96.0.9";

/// Number of served devices: `eth0`, `cni0`, `flannel.1`.
const DEVICES: usize = 3;

/// Commands of bpf(2) that change state visible to other processes: elements of maps, pins and links. (`bpf_cmd` of the
/// kernel's header: MAP_UPDATE_ELEM, MAP_DELETE_ELEM, OBJ_PIN, PROG_TEST_RUN, LINK_CREATE, LINK_UPDATE.) Between two of
/// these calls, or of those that change directories, a kill leaves the same state wherever it happens.
const CHANGING: [u64; 6] = [2, 3, 6, PROG_TEST_RUN, 28, LINK_UPDATE];
/// Command of bpf(2) that runs an agent call.
const PROG_TEST_RUN: u64 = 10;
/// Command of bpf(2) that replaces the program of a link.
const LINK_UPDATE: u64 = 29;

fn changes_something(call: Call) -> bool {
    match call.number {
        libc::SYS_bpf => CHANGING.contains(&call.first),
        libc::SYS_mkdir | libc::SYS_mkdirat => true,
        libc::SYS_rename | libc::SYS_renameat | libc::SYS_renameat2 => true,
        libc::SYS_unlink | libc::SYS_unlinkat | libc::SYS_rmdir => true,
        _ => false,
    }
}

struct Fixture {
    agent: Agent,
    manifests: Manifests,
    pins: PinPath,
    /// Sizes of the maps that the next start requires.
    sizes: Cell<Capacities>,
    /// A pod with a UDP port of the Service `keep`, which is in both states.
    pod: Pod,
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
            sizes: Cell::new(SIZES),
            pod: cluster.add_pod(NODE, "pod")?,
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
        let dns = Port::udp("dns", 53);
        text += &service("keep", KEEP, &[dns], "sessionAffinity: ClientIP");
        text += &slice("keep", dns, &[(self.pod.address().into(), NODE)]);
        self.manifests.write("all.yaml", &text)
    }

    /// Starts the agent with a fault, and kills it once it serves.
    fn start(&self, fault: FaultPoint) -> Result<(RunEnd, bool)> {
        self.start_counting(fault, changes_something)
    }

    /// Starts the agent, and kills it after the first bpf(2) with a command.
    fn start_until(&self, command: u64) -> Result<()> {
        let first = FaultPoint {
            at: 0,
            kind: FaultKind::Die,
        };
        let is_chosen = |call: Call| call.number == libc::SYS_bpf && call.first == command;
        let (end, _) = self.start_counting(first, is_chosen)?;
        ensure!(end == RunEnd::Died, "{end:?} without the command {command}");
        Ok(())
    }

    /// Starts the agent with a fault at one of the calls that are counted, and kills it once it serves.
    fn start_counting(&self, fault: FaultPoint, counts: impl Fn(Call) -> bool) -> Result<(RunEnd, bool)> {
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
            .args(flags(&self.sizes.get()))
            .env("RUST_LOG", "info")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file);
        let serves = |call: Call| Ok(call.number == libc::SYS_write && fs::read_to_string(&log)?.contains("serving"));
        ptrace::run(&mut command, fault, counts, serves).with_context(|| fs::read_to_string(&log).unwrap_or_default())
    }

    /// Starts the agent without a fault, checks the result, and kills the agent.
    fn start_well(&self) -> Result<()> {
        let flags = flags(&self.sizes.get());
        let flags: Vec<_> = flags.iter().map(String::as_str).collect();
        let mut running = RunningAgent::start(self.agent.clone(), &flags)?;
        running.wait_ready(&|| false)?;
        running.kill()?;
        let cgroup = Cgroup::open(Some(self.cluster.node(NODE).cgroup()))?.id();
        for (name, attached) in loader::attached(&self.pins)? {
            let attached = attached.with_context(|| format!("{name} is not attached"))?;
            ensure!(attached.cgroup == cgroup, "{name} is attached elsewhere: {attached:?}");
        }
        let maps = PinnedMaps::open(&self.pins.maps())?;
        ensure!(maps.capacities() == self.sizes.get(), "{:?}", maps.capacities());
        let next = self.pins.maps().with_file_name("next");
        ensure!(!next.exists(), "{} exists", next.display());
        self.agent.check_layout(VERSION)?;
        self.agent.verify()?;
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

/// Environment variable: with any value, a start that replaces the maps or their layout has a fault at each of its calls.
const EVERY_CALL: &str = "LB_FAULT_AT_EVERY_CALL";
/// Every this many calls of such a start have a fault otherwise: its calls for one map are like those for another.
const RESIZE_STRIDE: u64 = 4;

/// Returns the stride of the faults at a start that replaces the maps or their layout.
fn resize_stride() -> u64 {
    if env::var_os(EVERY_CALL).is_some() {
        1
    } else {
        RESIZE_STRIDE
    }
}

/// Returns the first call with a fault at such a start. The two kinds of faults are at different calls.
fn first_fault(kind: FaultKind) -> u64 {
    match kind {
        FaultKind::Die => 0,
        FaultKind::Fail => 2,
    }
}

/// Injects one fault at every `stride`th call of a start in turn, and starts without a fault after each. `before` runs before
/// each fault. Returns the number of calls that were tried.
fn try_all(
    fixture: &Fixture,
    kind: FaultKind,
    first: u64,
    stride: u64,
    mut before: impl FnMut() -> Result<()>,
) -> Result<u64> {
    let stride = stride * (100 / scaled_count(100));
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
    let tried = try_all(&fixture, kind, 0, 1, cleanup)?;
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
    let tried = try_all(&fixture, kind, 3, 1, || {
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

/// State of each kind that a move of maps must keep.
struct State {
    connected: ScriptedSocket,
    unconnected: ScriptedSocket,
    flow: [(CtKey, CtEntry); 2],
}

impl State {
    fn new(fixture: &Fixture) -> Result<Self> {
        let keep = SocketAddr::new(KEEP.parse()?, 53);
        let mut connected = testbed().scripted_socket(&fixture.pod, SocketKind::Udp4)?;
        connected.connect(keep)?;
        let mut unconnected = testbed().scripted_socket(&fixture.pod, SocketKind::Udp4)?;
        unconnected.send_to(keep, "hello")?;
        let key = CtKey {
            src: Addr::from_v4([192, 0, 2, 1]),
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
            state: ct_state::SYN,
            ..CtEntry::default()
        };
        let reply = CtEntry {
            src: key.dst,
            dst: key.src,
            src_port: key.dst_port,
            dst_port: key.src_port,
            flags: ct_flags::REPLY,
            ..entry
        };
        let flow = [(key, entry), (reverse_key(&entry, key.proto), reply)];
        let mut maps = CtMaps::open(&fixture.pins.maps())?;
        for (key, entry) in &flow {
            maps.established.insert(key, entry)?;
        }
        let state = Self {
            connected,
            unconnected,
            flow,
        };
        Ok(state)
    }

    /// Fails unless the maps have all of the state.
    fn check(&mut self, fixture: &Fixture) -> Result<()> {
        let peer = self.connected.peer()?;
        ensure!(peer == SocketAddr::new(KEEP.parse()?, 53), "getpeername returns {peer}");
        let maps = PinnedMaps::open(&fixture.pins.maps())?;
        let cookie = self.connected.cookie()?;
        let records: Vec<_> = maps
            .sockets()?
            .into_iter()
            .filter(|record| record.socket == cookie)
            .collect();
        ensure!(records.len() == 1, "records of the connected socket: {records:?}");
        let cookie = self.unconnected.cookie()?;
        let dests = maps.udp_dests()?;
        let dests = dests
            .get(&cookie)
            .context("the unconnected socket has no destinations")?;
        ensure!(
            dests.dests.iter().filter(|dest| dest.vip_port == 53).count() == 1,
            "{dests:?}"
        );
        ensure!(maps.affinity()?.len() == 1, "{:?}", maps.affinity()?);
        let flows = CtMaps::open(&fixture.pins.maps())?;
        for (key, entry) in &self.flow {
            let found = flows.established.get(key)?;
            ensure!(found.as_ref() == Some(entry), "{key:?}: {found:?}, not {entry:?}");
        }
        let connections = fixture.agent.connections("keep", None)?;
        ensure!(connections == 2, "{connections} connections are counted");
        Ok(())
    }
}

fn faults_at_a_resize(kind: FaultKind) -> Result<()> {
    let fixture = Fixture::new()?;
    fixture.write(false)?;
    fixture.start_well()?;
    let mut state = State::new(&fixture)?;
    state.check(&fixture)?;
    let mut is_large = false;
    let stride = resize_stride();
    let tried = try_all(&fixture, kind, first_fault(kind), stride, || {
        state.check(&fixture)?;
        is_large = !is_large;
        let mut sizes = SIZES;
        for &map in SizedMap::ALL {
            let factor = if is_large { FACTOR } else { 1 };
            sizes = sizes.with(map, SIZES[map] * factor);
        }
        fixture.sizes.set(sizes);
        Ok(())
    })?;
    state.check(&fixture)?;
    println!("{kind:?} at {tried} calls of a start that replaces the maps");
    // Pins of maps, entries of Services, links and renames.
    ensure!(tried >= scaled_count(60 / stride), "too few calls");
    Ok(())
}

#[test]
fn resize_killed_at_any_syscall_is_completed_by_the_next_start() -> Result<()> {
    faults_at_a_resize(FaultKind::Die)
}

#[test]
fn resize_with_any_failing_syscall_is_completed_by_the_next_start() -> Result<()> {
    faults_at_a_resize(FaultKind::Fail)
}

fn faults_at_an_upgrade(kind: FaultKind) -> Result<()> {
    let fixture = Fixture::new()?;
    fixture.write(false)?;
    fixture.start_well()?;
    let mut state = State::new(&fixture)?;
    let stride = resize_stride();
    let tried = try_all(&fixture, kind, first_fault(kind), stride, || {
        state.check(&fixture)?;
        make_layout_3(&fixture.pins)
    })?;
    state.check(&fixture)?;
    println!("{kind:?} at {tried} calls of a start that replaces the layout");
    // Pins of maps and links, entries of Services, and renames.
    ensure!(tried >= scaled_count(60 / stride), "too few calls");
    Ok(())
}

#[test]
fn upgrade_from_layout_3_killed_at_any_syscall_is_completed_by_the_next_start() -> Result<()> {
    faults_at_an_upgrade(FaultKind::Die)
}

#[test]
fn upgrade_from_layout_3_with_any_failing_syscall_is_completed_by_the_next_start() -> Result<()> {
    faults_at_an_upgrade(FaultKind::Fail)
}

/// Kills a start while it copies entries to maps of another size, and gives its maps to another layout. The next start has to complete
/// that move before it takes the maps over.
fn other_layout_while_entries_are_copied(make_other: fn(&PinPath) -> Result<()>) -> Result<()> {
    let fixture = Fixture::new()?;
    fixture.write(false)?;
    fixture.start_well()?;
    let mut state = State::new(&fixture)?;
    state.check(&fixture)?;
    fixture.sizes.set(SIZES.map(|_, size| size * FACTOR));
    fixture.start_until(PROG_TEST_RUN)?;
    let next = fixture.pins.maps().with_file_name("next");
    let phases: Array<_, [u8; size_of::<Move>()]> = Map::Array(MapData::from_pin(next.join(MOVE_MAP))?).try_into()?;
    let state_of_move: Move = zerocopy::transmute!(phases.get(&0, 0)?);
    ensure!(state_of_move.phase == MovePhase::Copy as u32, "{state_of_move:?}");
    make_other(&fixture.pins)?;
    fixture.start_well()?;
    let problems = fixture.agent.status()?.problems;
    ensure!(problems.iter().all(|problem| problem.place != "maps"), "{problems:?}");
    state.check(&fixture)
}

#[test]
fn a_move_of_layout_3_is_completed() -> Result<()> {
    other_layout_while_entries_are_copied(make_layout_3)
}

#[test]
fn a_move_of_a_later_layout_is_completed() -> Result<()> {
    other_layout_while_entries_are_copied(make_later_layout)
}

#[test]
fn maps_made_from_the_source_stay_if_the_agent_is_killed_while_it_attaches_programs() -> Result<()> {
    let fixture = Fixture::new()?;
    fixture.write(false)?;
    fixture.start_well()?;
    let [own, later] = [VERSION, VERSION + 1].map(|layout| fixture.pins.root().join(format!("v{layout}")));
    fs::rename(own, &later).context("renaming the layout")?;
    let services = later.join("maps").join(map_name::SERVICES);
    fs::rename(&services, services.with_file_name("OTHER")).context("renaming SERVICES")?;
    fixture.start_until(LINK_UPDATE)?;
    let id = || Ok::<_, anyhow::Error>(MapInfo::from_pin(fixture.pins.maps().join(map_name::CT))?.id());
    let made = id()?;
    fixture.start_well()?;
    ensure!(id()? == made, "the maps were made again");
    Ok(())
}

#[test]
fn upgrade_makes_room_for_the_records_of_all_sockets() -> Result<()> {
    let fixture = Fixture::new()?;
    // Few sockets find their slot taken.
    let small = SIZES.with(SizedMap::Sockets, 1024).with(SizedMap::SocketsMore, 2);
    fixture.sizes.set(small);
    fixture.write(false)?;
    fixture.start_well()?;
    let keep = SocketAddr::new(KEEP.parse()?, 53);
    let mut sockets = Vec::new();
    for _ in 0..8 {
        let mut socket = testbed().scripted_socket(&fixture.pod, SocketKind::Udp4)?;
        socket.connect(keep)?;
        sockets.push(socket);
    }
    make_layout_3(&fixture.pins)?;
    fixture
        .sizes
        .set(small.with(SizedMap::SocketsMore, SIZES[SizedMap::SocketsMore]));
    fixture.start_well()?;
    for socket in &mut sockets {
        let peer = socket.peer()?;
        ensure!(peer == keep, "getpeername returns {peer}");
    }
    Ok(())
}
