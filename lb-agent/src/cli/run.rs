//! `run`: from changes of the source to changes of the maps, until a signal says stop.

use std::collections::BTreeSet;
use std::fs;
use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use lb_common::abi::{Addr, Event, Notice, State, map_name};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{debug, error, info, warn};

use super::config::{ConfigArgs, tune};
use super::packets::{PacketArgs, Packets};
use super::{CapacityArgs, PinArgs, SourceArgs};
use crate::config::Config;
use crate::ebpf_log;
use crate::heap;
use crate::k8s_events::Notices;
use crate::loader::{self, Cgroup, EbpfLog, LoadError, Lock, OBJECT, PinPath, SocketLb, TraceLock};
use crate::maps::bpf::{BpfMaps, PinnedMaps};
use crate::maps::sys;
use crate::node::addrs::{Selection, Wanted};
use crate::node::ct_gc::{self, Collector, Turn};
use crate::node::destroy::{self, Destroyer};
use crate::node::devices::Patterns;
use crate::node::links;
use crate::node::nf_conntrack::Conntrack;
use crate::server::Face;
use lb_core::maps::Maps as _;
use lb_core::model::{Batch, Problem, ProblemKind};
use lb_core::names::pad;
use lb_core::reconcile::{LARGE, Reconciler};

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    pin: PinArgs,
    /// Cgroup (v2) whose processes are served [default: the root of the cgroup2 mount]
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,
    /// Whose sockets are served: those of all processes, or only those of the node's network namespace (where pods have
    /// something between their sockets and the node: Istio, Kata, gVisor, KubeVirt)
    #[arg(long, value_enum, default_value_t = SocketLbArg::All)]
    socket_lb: SocketLbArg,
    #[command(flatten)]
    node_ports: NodePortArgs,
    #[command(flatten)]
    packets: PacketArgs,
    /// Destroy TCP sockets of removed backends too, not only connected UDP sockets: a terminating backend keeps them
    /// until its endpoint is gone. Both need CAP_NET_ADMIN and a kernel with CONFIG_INET_DIAG_DESTROY; sockets of pods need
    /// CAP_SYS_PTRACE and CAP_SYS_ADMIN as well, and the machine's process namespace (hostPID). `status` says what is
    /// missing; sockets that cannot be reached live on
    #[arg(long)]
    destroy_tcp: bool,
    /// Milliseconds after which a socket record may be swept, and between two sweeps; for tests
    #[arg(long, value_name = "MS", default_value_t = 60_000, hide = true)]
    sweep_age: u64,
    /// Format of the log, on the error output; what it contains is set by RUST_LOG
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    /// Lines that the eBPF programs log, with the target lb_ebpf: `warn` for calls and packets that are refused or dropped,
    /// `debug` for every decision about a Service. The programs of `off` have no code for it
    #[arg(long, value_enum, value_name = "LEVEL", default_value_t = EbpfLogArg::Off)]
    ebpf_log: EbpfLogArg,
    /// Load this eBPF object in place of the one that is part of the program; for developers
    #[arg(long, value_name = "FILE", hide = true)]
    ebpf_object: Option<PathBuf>,
    // Last: its heading is that of all that follows.
    #[command(flatten)]
    capacities: CapacityArgs,
}

/// Which addresses serve node ports.
#[derive(Debug, Args)]
struct NodePortArgs {
    /// Devices of lb, there now or later, in which `*` and `?` stand for any characters: packets are served there, and
    /// node ports at their addresses [default: for packets all but loopback, dummies, and ports of bridges and bonds; for
    /// addresses all]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    devices: Vec<String>,
    /// Which of the node's addresses serve node ports: those in the networks named (all of a family that none is named
    /// of), or `primary`: the first address of each family in this node's Node object, without one the addresses of the
    /// devices with a default route. Loopback serves the node's own sockets in any case [default: all]
    #[arg(long, value_name = "CIDR,...|primary")]
    nodeport_addresses: Option<Wanted>,
}

impl NodePortArgs {
    fn selection(&self) -> Selection {
        let Self {
            devices,
            nodeport_addresses,
        } = self;
        Selection {
            devices: Patterns::new(devices),
            wanted: nodeport_addresses.clone().unwrap_or_default(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum SocketLbArg {
    All,
    Node,
}

impl From<SocketLbArg> for SocketLb {
    fn from(arg: SocketLbArg) -> Self {
        match arg {
            SocketLbArg::All => Self::All,
            SocketLbArg::Node => Self::Node,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum EbpfLogArg {
    Off,
    Warn,
    Debug,
}

impl From<EbpfLogArg> for EbpfLog {
    fn from(arg: EbpfLogArg) -> Self {
        match arg {
            EbpfLogArg::Off => Self::Off,
            EbpfLogArg::Warn => Self::Warn,
            EbpfLogArg::Debug => Self::Debug,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

/// Time between two looks for a trace that was killed.
const LOOK: Duration = Duration::from_secs(5);

pub(super) fn run(mut args: RunArgs) -> anyhow::Result<()> {
    let mut filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    if args.ebpf_log != EbpfLogArg::Off {
        filter = filter.add_directive(ebpf_log::DIRECTIVE.parse().context("the filter of the programs' log")?);
    }
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match args.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    let config = args.config.read()?;
    if let Some(config) = &config {
        args.complete(config);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve(&args, config.as_ref()))
}

impl RunArgs {
    /// Takes from a file what no flag says.
    fn complete(&mut self, config: &Config) {
        self.source.complete(config);
        let addresses = &mut self.node_ports.nodeport_addresses;
        *addresses = addresses.take().or_else(|| config.node_port_addresses.clone());
    }
}

async fn serve(args: &RunArgs, config: Option<&Config>) -> anyhow::Result<()> {
    let node = args.source.node()?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;

    let lock = Lock::take(&args.pin.pins())?;
    let cgroup = Cgroup::open(args.cgroup.as_deref())?;
    if !cgroup.is_root() {
        warn!(cgroup = %cgroup.path().display(), "not the root of the hierarchy: processes outside of it are not served");
    }
    let read = |path: &PathBuf| fs::read(path).with_context(|| format!("reading {}", path.display()));
    let other = args.ebpf_object.as_ref().map(read).transpose()?;
    let socket_lb = SocketLb::from(args.socket_lb);
    let object = other.as_deref().unwrap_or(OBJECT);
    let log = EbpfLog::from(args.ebpf_log);
    let mut maps = loader::load_logging(object, &lock, &args.capacities.into(), socket_lb, log)?;
    if log != EbpfLog::Off {
        ebpf_log::start(maps.programs_mut())?;
    }
    end_orphaned_trace(maps.pinned(), lock.pins())?;
    let mut grace = maps.grace_watch();

    let mut source = args.source.open().await?;
    let client = source.client();
    let in_cluster = client.is_some();
    let settings = args.config.face(config.unwrap_or(&Config::default()), in_cluster);
    let face = Face::start(settings, &lock.pins().maps()).context("serving health and metrics")?;
    let mut unserved = face.problems();
    let notices = client.map(|client| Notices::start(client, &node, face.metrics()));
    let mut conntrack = tune(config, in_cluster);
    let outside = Outside {
        face,
        notices,
        unserved: Vec::new(),
        unset: conntrack.as_mut().map(Conntrack::apply).unwrap_or_default(),
        conntrack,
    };
    let selection = args.node_ports.selection();
    let mut addresses = links::follow(selection.looks_at_routes()).context("listing the node's devices")?;
    let patterns = selection.devices.clone();
    let packets = Packets::open(&args.packets, patterns, &maps, lock.pins(), addresses.clone())?;
    let reconciler = Reconciler::adopt(maps, &node)?.with_inside(args.source.inside(config));
    let node_ports = NodePorts {
        selection,
        written: None,
        problem: None,
    };
    let mut agent = Agent::new(reconciler, &node, &cgroup, socket_lb, node_ports, packets, outside)?;
    agent.reconciler.set_addresses(addresses.borrow().own_addresses());
    let mut look = tokio::time::interval(LOOK);
    // The maps are filled before programs look at them, and before programs of an earlier build are replaced; what an
    // earlier run has left is enough where the source has to be waited for.
    while agent.state.applies == 0 && (source.is_here() || !agent.reconciler.is_serving()) {
        tokio::select! {
            batch = source.next() => agent.first(batch?, source.is_here()),
            Ok(()) = unserved.changed() => agent.outside.unserved = unserved.borrow_and_update().clone(),
            _ = look.tick() => {}
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
        }
        agent.outside.face.alive();
    }
    agent.is_attached = true;
    agent.follow_devices(true);
    loader::attach(agent.reconciler.maps().programs(), lock.pins(), &cgroup)?;
    agent.publish_problems();
    agent.publish_state();
    agent.outside.face.serving();
    let (usage, _) = agent.reconciler.usage();
    info!(
        node, cgroup = %cgroup.path().display(), pins = %lock.pins().root().display(),
        services = usage.services, backends = usage.backends, "serving"
    );
    let settings = destroy::Settings {
        tcp: args.destroy_tcp,
        sweep: Duration::from_millis(args.sweep_age),
    };
    let mut destroyer = Destroyer::start(&lock.pins().maps(), settings).context("looking after sockets")?;
    let mut trouble = destroyer.problems();
    let tracking = config.map(|config| config.conntrack).unwrap_or_default();
    let mut collector =
        Collector::start(&lock.pins().maps(), ct_gc::timeouts(&tracking)).context("looking after flows")?;
    let mut withdrawals = agent.reconciler.withdrawals();

    loop {
        tokio::select! {
            batch = source.next() => {
                agent.apply(batch?);
                agent.publish_state();
            }
            Ok(()) = grace.changed() => agent.reconciler.reclaim(),
            Ok(()) = addresses.changed() => agent.note_devices(false),
            Some(event) = destroyer.destroyed() => agent.tell(&event),
            Some(turn) = collector.turn() => agent.note_flows(turn),
            Ok(()) = trouble.changed() => agent.note_sockets(trouble.borrow_and_update().clone()),
            Ok(()) = unserved.changed() => agent.note_servers(unserved.borrow_and_update().clone()),
            _ = look.tick() => {
                agent.tune();
                // What others have taken away, or what failed.
                agent.note_devices(true);
                agent.outside.face.metrics().watch_restarts(source.restarts());
                if let Err(error) = end_orphaned_trace(agent.reconciler.maps().pinned(), lock.pins()) {
                    warn!(%error, "looking for a trace that was killed");
                }
            }
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
        agent.outside.face.alive();
        if agent.reconciler.withdrawals() != withdrawals {
            withdrawals = agent.reconciler.withdrawals();
            destroyer.wake();
        }
    }
    info!("stopped; what is pinned goes on serving (`lb-agent cleanup` ends it)");
    Ok(())
}

/// Makes the programs write no events where whoever asked for them was killed.
fn end_orphaned_trace(maps: &PinnedMaps, pins: &PinPath) -> Result<(), LoadError> {
    if maps.config().events != 0
        && let Some(_lock) = TraceLock::try_take(pins)?
    {
        maps.write_events(0);
    }
    Ok(())
}

/// Where node ports are served.
struct NodePorts {
    selection: Selection,
    /// What was written last.
    written: Option<BTreeSet<Addr>>,
    /// What could not be written.
    problem: Option<Problem>,
}

/// What others see of the agent, and what it sets beside the maps.
struct Outside {
    face: Face,
    /// Where owners of Services are told; `None` without an API server.
    notices: Option<Notices>,
    /// What the servers could not do.
    unserved: Vec<Problem>,
    /// Settings of the kernel's connection tracking, where they are the agent's to make.
    conntrack: Option<Conntrack>,
    /// Which of them could not be set.
    unset: Vec<Problem>,
}

/// The reconciler, and what the command line is told about it.
struct Agent {
    reconciler: Reconciler<BpfMaps>,
    outside: Outside,
    node_ports: NodePorts,
    packets: Packets,
    /// Programs may be put at hooks: the maps were filled.
    is_attached: bool,
    state: State,
    /// What could not be done to sockets.
    trouble: Vec<Problem>,
    /// What could not be done to flows.
    uncollected: Option<Problem>,
    /// What was last logged and told.
    problems: Vec<Problem>,
}

fn seconds_since_1970() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

impl Agent {
    fn new(
        reconciler: Reconciler<BpfMaps>,
        node: &str,
        cgroup: &Cgroup,
        socket_lb: SocketLb,
        node_ports: NodePorts,
        packets: Packets,
        outside: Outside,
    ) -> anyhow::Result<Self> {
        let state = State {
            pid: std::process::id(),
            complete: 0,
            started: seconds_since_1970(),
            applied: 0,
            applies: 0,
            cgroup: cgroup.id(),
            netns: sys::netns_cookie().context("SO_NETNS_COOKIE")?,
            more_notices: 0,
            node_only: u32::from(socket_lb == SocketLb::Node),
            own_ports: 0,
            pad: 0,
            node: pad(node),
            version: pad(env!("CARGO_PKG_VERSION")),
        };
        Ok(Self {
            reconciler,
            outside,
            node_ports,
            packets,
            is_attached: false,
            state,
            trouble: Vec::new(),
            uncollected: None,
            problems: Vec::new(),
        })
    }

    /// Before programs are attached: while the source has more to tell, only what is wrong with it is of interest,
    /// unless `partial` is all that can be had.
    fn first(&mut self, batch: Batch, partial: bool) {
        if batch.complete || partial {
            self.apply(batch);
        } else {
            self.log_problems(&batch.problems);
            self.problems = batch.problems;
        }
    }

    fn apply(&mut self, batch: Batch) {
        let completes = batch.complete && !self.reconciler.is_complete();
        let news = !batch.changes.is_empty() || completes || self.state.applies == 0;
        if !news && self.reconciler.source_problems() == batch.problems {
            return;
        }
        let applying = self.outside.face.applying(&batch);
        let changes = batch.changes.len();
        let before = self.reconciler.maps().written();
        self.reconciler.apply(batch);
        self.outside.face.applied(&applying, &mut self.reconciler);
        let written = self.reconciler.maps().written() - before;
        debug!(changes, written, "applied");
        if changes >= LARGE {
            // The batch and the state that it replaced are freed by now.
            heap::trim();
        }
        self.state.applies += 1;
        self.state.applied = seconds_since_1970();
        self.state.complete = self.reconciler.is_complete().into();
        // The Node object may name others.
        self.follow_devices(false);
        self.publish_problems();
    }

    /// Makes programs be at the devices that there are now, and nowhere else, and NODE_ADDRS say which addresses serve
    /// node ports: an address after its device, and a device as long as its addresses. With `look`, also where nothing
    /// was told.
    fn follow_devices(&mut self, look: bool) {
        if !self.is_attached {
            return;
        }
        let node = self.reconciler.node().map(|node| node.addresses.clone());
        let maps = self.reconciler.maps_mut();
        let looked = self.packets.attach(maps, &node.unwrap_or_default(), look);
        // Before anything is served at them: no mark of a service address may be on an address of the node.
        self.reconciler.set_addresses(self.packets.snapshot().own_addresses());
        self.write_addresses();
        if looked {
            self.packets.detach(self.reconciler.maps_mut());
            self.state.own_ports = self.packets.own_ports().into();
        }
    }

    /// Makes NODE_ADDRS say which addresses serve node ports now.
    fn write_addresses(&mut self) {
        let selection = &self.node_ports.selection;
        let node = self.reconciler.node().map(|node| node.addresses.as_slice());
        let selected = self.packets.snapshot().select(selection, node);
        if self.node_ports.problem.is_none() && self.node_ports.written.as_ref() == Some(&selected) {
            return;
        }
        if !selection.is_everything() {
            let addresses = selected.iter().map(|addr| (*addr).into()).collect();
            self.outside.face.health_check_addresses(Some(addresses));
        }
        let message = match self.reconciler.maps_mut().pinned_mut().write_node_addrs(&selected) {
            Ok(0) => None,
            Ok(missing) => Some(format!(
                "{missing} addresses of this node do not fit: no node ports there"
            )),
            Err(error) => Some(error.to_string()),
        };
        let place = map_name::NODE_ADDRS.to_owned();
        self.node_ports.problem = message.map(|message| Problem::new(place, message).kind(ProblemKind::Node));
        self.node_ports.written = Some(selected);
    }

    /// Tells whoever traces.
    fn tell(&self, event: &Event) {
        self.outside.face.metrics().socket_destroyed();
        if let Err(error) = self.reconciler.maps().tell(event) {
            warn!(%error, "an event is lost");
        }
    }

    /// The node's devices or addresses have changed, or are to be looked at.
    fn note_devices(&mut self, look: bool) {
        let trouble = |agent: &Self| -> Vec<Problem> {
            let problems = agent.packets.problems().chain(&agent.node_ports.problem);
            problems.cloned().collect()
        };
        let before = trouble(self);
        self.follow_devices(look);
        if trouble(self) == before {
            return;
        }
        self.publish_problems();
        self.publish_state();
    }

    /// What cannot be done to sockets has changed.
    fn note_sockets(&mut self, trouble: Vec<Problem>) {
        self.trouble = trouble;
        self.publish_problems();
        self.publish_state();
    }

    /// Flows were looked at for those that are over.
    fn note_flows(&mut self, turn: Turn) {
        self.outside.face.metrics().flows_collected(&turn);
        if turn.problem != self.uncollected {
            self.uncollected = turn.problem;
            self.publish_problems();
            self.publish_state();
        }
    }

    /// What the servers could not do has changed.
    fn note_servers(&mut self, unserved: Vec<Problem>) {
        self.outside.unserved = unserved;
        self.publish_problems();
        self.publish_state();
    }

    /// Sets what could not be set before.
    fn tune(&mut self) {
        let Some(conntrack) = &mut self.outside.conntrack else {
            return;
        };
        let unset = conntrack.apply();
        if unset != self.outside.unset {
            self.outside.unset = unset;
            self.publish_problems();
            self.publish_state();
        }
    }

    fn publish_state(&self) {
        self.reconciler.maps().pinned().write_state(&self.state);
    }

    /// Logs problems that are new and those that are gone.
    fn log_problems(&self, problems: &[Problem]) {
        for problem in problems.iter().filter(|p| !self.problems.contains(p)) {
            warn!(place = problem.place, "{}", problem.message);
        }
        for problem in self.problems.iter().filter(|p| !problems.contains(p)) {
            info!(place = problem.place, "no longer: {}", problem.message);
        }
    }

    /// Logs problems that are new and those that are gone, and tells all to the command line.
    fn publish_problems(&mut self) {
        let mut problems = self.reconciler.problems();
        let Outside { unserved, unset, .. } = &self.outside;
        let node = self
            .node_ports
            .problem
            .iter()
            .chain(self.packets.problems())
            .chain(unset);
        let beside = self.trouble.iter().chain(&self.uncollected);
        problems.extend(node.chain(beside).chain(unserved).cloned());
        self.log_problems(&problems);
        self.outside
            .face
            .metrics()
            .problems(problems.iter().map(|problem| problem.kind));
        if let Some(notices) = &self.outside.notices {
            notices.tell(&problems);
        }
        let notices: Vec<_> = problems
            .iter()
            .map(|problem| Notice {
                place: pad(&problem.place),
                message: pad(&problem.message),
            })
            .collect();
        match self.reconciler.maps_mut().pinned_mut().write_notices(&notices) {
            Ok(more) => self.state.more_notices = more as u32,
            Err(error) => error!(%error, "cannot tell problems to `lb-agent status`"),
        }
        self.problems = problems;
    }
}
