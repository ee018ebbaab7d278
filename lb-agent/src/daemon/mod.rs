//! The daemon: reads changes from the source, applies them to the maps, and keeps programs, servers and problems up to
//! date, until it receives SIGTERM or SIGINT.

mod devices;
mod host;
mod problems;
mod sizes;

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use ipnet::IpNet;
use lb_common::abi::{Addr, Event, ProblemRecord, State, map_name};
use lb_core::maps::{Capacities, Maps as _};
use lb_core::model::{Batch, Problem, ProblemKind};
use lb_core::names::pad;
use lb_core::reconcile::{LARGE_BATCH, Reconciler, Usage};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{debug, error, info, warn};

use self::devices::Devices;
pub use self::devices::PacketSettings;
use self::problems::{Problems, Reporter};
pub use self::sizes::MapSettings;
use self::sizes::{Scope, Sizes};
use crate::config::Config;
use crate::ebpf_log::{self, Printer};
use crate::heap;
use crate::k8s_events::KubeEvents;
use crate::loader::{self, Cgroup, EbpfLog, LoadError, Loaded, Loader, Lock, OBJECT, PinPath, SocketLb, TraceLock};
use crate::maps::bpf::{BpfMaps, PinnedMaps};
use crate::maps::gate::MapGate;
use crate::maps::sys;
use crate::node::addrs::Selection;
use crate::node::ct_gc::{self, CtGc, Pass};
use crate::node::destroy::{DestroySettings, Destroyer};
use crate::node::links;
use crate::node::map_usage::MapUsage;
use crate::node::nf_conntrack::NfConntrack;
use crate::server::{ServerSettings, Servers};
use crate::source::Source;

/// Interval of the checks for changes that no event reports: a trace that was killed, programs that were detached, and
/// writes that failed.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// Everything that the daemon is started with, apart from the source.
#[derive(Debug)]
pub struct DaemonSettings {
    /// Name of this node.
    pub node: String,
    /// The directory of the pins.
    pub pins: PinPath,
    /// The cgroup that the socket programs are attached to; `None` for the root of the cgroup2 mount.
    pub cgroup: Option<PathBuf>,
    /// Which processes get socket-level load balancing.
    pub socket_lb: SocketLb,
    /// Level of the log of the eBPF programs.
    pub ebpf_log: EbpfLog,
    /// An eBPF object to load instead of the embedded one.
    pub object: Option<PathBuf>,
    /// Limits of the sizes of maps.
    pub maps: MapSettings,
    /// Networks inside the cluster, in addition to the addresses and the pods of this node.
    pub inside: Vec<IpNet>,
    /// kube-proxy's configuration file, if there is one.
    pub config: Option<Config>,
    /// Addresses and content of the HTTP servers.
    pub servers: ServerSettings,
    /// The devices and addresses that serve node ports.
    pub selection: Selection,
    /// How packets are served at devices.
    pub packets: PacketSettings,
    /// Which sockets of removed backends are destroyed.
    pub sockets: DestroySettings,
}

/// Runs the daemon until a signal ends it. Programs and maps stay pinned and go on serving.
///
/// `source` is awaited after the maps are loaded, so that only the agent that has the lock connects to the API server.
///
/// # Errors
/// If another agent runs, or if programs, maps, the source, a server or a thread cannot be set up; later, if the source
/// fails for good.
pub async fn serve(
    settings: DaemonSettings,
    source: impl Future<Output = anyhow::Result<Source>>,
) -> anyhow::Result<()> {
    let DaemonSettings {
        node,
        pins,
        cgroup,
        socket_lb,
        ebpf_log,
        object,
        maps: map_settings,
        inside,
        config,
        servers,
        selection,
        packets,
        sockets,
    } = settings;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;

    let lock = Lock::take(&pins)?;
    let cgroup = Cgroup::open(cgroup.as_deref())?;
    if !cgroup.is_root() {
        warn!(
            cgroup = %cgroup.path().display(),
            "not the root of the hierarchy: processes outside of it get no socket-level load balancing"
        );
    }
    let read = |path: &PathBuf| fs::read(path).with_context(|| format!("reading {}", path.display()));
    let object = object.as_ref().map(read).transpose()?;
    let object = object.as_deref().unwrap_or(OBJECT);
    let mut sizes = Sizes::new(map_settings)?;
    let loader = Loader::new(object, &lock, socket_lb, ebpf_log)?;
    let Loaded {
        mut maps,
        problems: map_problems,
        is_new,
    } = loader.load(|pinned| sizes.at_start(pinned))?;
    sizes.started(map_problems);
    let has_log = ebpf_log != EbpfLog::Off;
    let printer = has_log.then(|| ebpf_log::start(maps.programs_mut())).transpose()?;
    end_orphaned_trace(maps.pinned(), lock.pins())?;
    let mut grace = maps.grace_watch();

    let mut source = source.await?;
    let client = source.client();
    let in_cluster = client.is_some();
    let gate = MapGate::default();
    let servers =
        Servers::start(servers, in_cluster, &lock.pins().maps(), &gate).context("serving health and metrics")?;
    let mut server_problems = servers.problems();
    let events = client.map(|client| KubeEvents::start(client, &node, servers.metrics()));
    let nf_conntrack = host::tune(config.as_ref(), in_cluster);
    let mut addresses = links::follow(selection.looks_at_routes()).context("listing the node's devices")?;
    let devices = Devices::open(
        packets,
        selection.devices.clone(),
        &maps,
        lock.pins(),
        addresses.clone(),
    )?;
    let reconciler = Reconciler::adopt(maps, &node)?.with_inside(&inside);
    let mut daemon = Daemon {
        reconciler,
        loader,
        sizes,
        gate: gate.clone(),
        printer,
        is_new,
        servers,
        events,
        nf_conntrack,
        selection,
        node_addrs: None,
        devices,
        is_attached: false,
        state: initial_state(&node, &cgroup, socket_lb)?,
        problems: Problems::default(),
    };
    daemon.apply_nf_conntrack();
    daemon.problems.set(Reporter::MapSizes, daemon.sizes.problems());
    daemon.update_memory_limit();
    daemon.reconciler.set_addresses(addresses.borrow().own_addresses());
    let mut check = tokio::time::interval(CHECK_INTERVAL);
    // Maps are filled before programs read them, and before programs of an earlier build are replaced. If the source has
    // to be waited for, the maps of an earlier run are enough.
    while daemon.state.applies == 0 && (source.is_local() || !daemon.reconciler.is_serving()) {
        tokio::select! {
            batch = source.next() => daemon.apply_first(batch?, source.is_local())?,
            Ok(()) = server_problems.changed() => {
                daemon.problems.set(Reporter::Servers, server_problems.borrow_and_update().clone());
            }
            _ = check.tick() => {}
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
        }
        daemon.servers.alive();
    }
    // An agent that is killed from here on leaves these maps, with the programs that use them.
    daemon.loader.put_in_force()?;
    daemon.is_attached = true;
    daemon.update_devices(true);
    loader::attach(daemon.reconciler.maps().programs(), lock.pins(), &cgroup)?;
    if let Err(error) = daemon.loader.remove_other_layouts() {
        warn!(%error, "the maps of another layout stay until the next start");
    }
    daemon.publish_problems();
    daemon.publish_state();
    daemon.servers.serving();
    let (usage, _) = daemon.reconciler.usage();
    info!(
        node, cgroup = %cgroup.path().display(), pins = %lock.pins().root().display(),
        services = usage.services, backends = usage.backends, "serving"
    );
    let maps = lock.pins().maps();
    let mut destroyer = Destroyer::start(&maps, &gate, sockets).context("starting the socket destroyer")?;
    let mut socket_problems = destroyer.problems();
    let timeouts = ct_gc::timeouts(&config.map(|config| config.conntrack).unwrap_or_default());
    let mut ct_gc = CtGc::start(&maps, &gate, timeouts).context("starting the CT garbage collector")?;
    let mut map_usage = MapUsage::start(&maps, &gate).context("starting to count the entries of maps")?;
    let mut withdrawals = daemon.reconciler.withdrawals();

    loop {
        tokio::select! {
            batch = source.next() => {
                daemon.apply(batch?)?;
                daemon.publish_state();
            }
            Ok(()) = grace.changed() => daemon.reconciler.reclaim(),
            Ok(()) = addresses.changed() => {
                daemon.update_devices(false);
                daemon.publish();
            }
            Some(event) = destroyer.destroyed() => daemon.trace(&event),
            Some(pass) = ct_gc.pass() => daemon.record_gc(pass),
            Some(counts) = map_usage.next() => daemon.record_usage(counts)?,
            Ok(()) = socket_problems.changed() => {
                daemon.report(Reporter::SocketDestroyer, socket_problems.borrow_and_update().clone());
            }
            Ok(()) = server_problems.changed() => {
                daemon.report(Reporter::Servers, server_problems.borrow_and_update().clone());
            }
            _ = check.tick() => {
                daemon.reconciler.reclaim();
                daemon.apply_nf_conntrack();
                // Programs that another process detached, and attachments that failed.
                daemon.update_devices(true);
                if daemon.update_memory_limit() {
                    daemon.publish_state();
                }
                daemon.publish();
                daemon.servers.metrics().watch_restarts(source.restarts());
                if let Err(error) = end_orphaned_trace(daemon.reconciler.maps().pinned(), lock.pins()) {
                    warn!(%error, "failed to check for a trace that was killed");
                }
            }
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
        daemon.servers.alive();
        if daemon.reconciler.withdrawals() != withdrawals {
            withdrawals = daemon.reconciler.withdrawals();
            destroyer.wake();
        }
    }
    info!("stopped; pinned programs go on serving (`lb-agent cleanup` removes them)");
    Ok(())
}

/// Stops the programs from writing trace events if the `lb-agent trace` that requested them was killed.
fn end_orphaned_trace(maps: &PinnedMaps, pins: &PinPath) -> Result<(), LoadError> {
    if maps.config().events != 0
        && let Some(_lock) = TraceLock::try_take(pins)?
    {
        maps.write_events(0);
    }
    Ok(())
}

fn seconds_since_1970() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// STATE of an agent that has applied nothing yet.
fn initial_state(node: &str, cgroup: &Cgroup, socket_lb: SocketLb) -> anyhow::Result<State> {
    Ok(State {
        pid: std::process::id(),
        complete: 0,
        started: seconds_since_1970(),
        applied: 0,
        applies: 0,
        cgroup: cgroup.id(),
        netns: sys::netns_cookie().context("SO_NETNS_COOKIE")?,
        more_problems: 0,
        node_only: u32::from(socket_lb == SocketLb::Node),
        own_ports: 0,
        map_memory: 0,
        node: pad(node),
        version: pad(env!("CARGO_PKG_VERSION")),
        reserved: [0; 20],
    })
}

/// The reconciler, and the parts of the node that follow its state.
struct Daemon<'a> {
    reconciler: Reconciler<BpfMaps>,
    loader: Loader<'a>,
    sizes: Sizes,
    gate: MapGate,
    /// Prints the log of the programs; `None` if they do not log.
    printer: Option<Printer>,
    /// Whether no map was pinned before the start.
    is_new: bool,
    servers: Servers,
    /// Publishes problems of Services as Kubernetes Events; `None` without an API server.
    events: Option<KubeEvents>,
    /// Settings of nf_conntrack; `None` if the agent leaves them unchanged.
    nf_conntrack: Option<NfConntrack>,
    /// The devices and addresses that serve node ports.
    selection: Selection,
    /// The content of NODE_ADDRS; `None` if it was not written, or not completely.
    node_addrs: Option<BTreeSet<Addr>>,
    devices: Devices,
    /// Whether programs may be attached: the maps are filled.
    is_attached: bool,
    state: State,
    problems: Problems,
}

impl Daemon<'_> {
    /// Applies a batch before programs are attached. Until the source is complete only its problems matter, unless an
    /// incomplete source is all there is (`partial`).
    fn apply_first(&mut self, batch: Batch, partial: bool) -> anyhow::Result<()> {
        if batch.complete || partial {
            self.apply(batch)?;
        } else {
            self.problems.set(Reporter::Services, batch.problems);
            self.problems.log();
        }
        Ok(())
    }

    fn apply(&mut self, batch: Batch) -> anyhow::Result<()> {
        let completes = batch.complete && !self.reconciler.is_complete();
        let has_changes = !batch.changes.is_empty() || completes || self.state.applies == 0;
        if !has_changes && self.reconciler.source_problems() == batch.problems {
            return Ok(());
        }
        let applying = self.servers.applying(&batch);
        let changes = batch.changes.len();
        let before = self.reconciler.maps().written();
        self.reconciler.receive(batch);
        self.make_room(Scope::Agent)?;
        self.reconciler.write();
        self.servers.applied(&applying, &mut self.reconciler);
        let written = self.reconciler.maps().written() - before;
        debug!(changes, written, "applied");
        if changes >= LARGE_BATCH {
            // The batch and the state that it replaced are freed by now.
            heap::trim();
        }
        self.state.applies += 1;
        self.state.applied = seconds_since_1970();
        self.state.complete = self.reconciler.is_complete().into();
        // The Node object may have other addresses.
        self.update_devices(false);
        self.publish_problems();
        Ok(())
    }

    /// Replaces maps that do not have enough room for the received changes, or for the counted entries.
    fn make_room(&mut self, scope: Scope) -> anyhow::Result<()> {
        let (_, present) = self.reconciler.usage();
        let demand = self.reconciler.demand();
        match self.sizes.growth(&present, demand, scope) {
            Ok(Some(to)) => self.replace_maps(&to)?,
            Ok(None) => self.problems.set(Reporter::MapSizes, self.sizes.problems()),
            Err(error) => {
                let message = format!("the maps keep their sizes: reading the memory that they may take: {error}");
                let mut problems = self.sizes.problems();
                problems.push(Problem::new("maps", message).kind(ProblemKind::Map));
                self.problems.set(Reporter::MapSizes, problems);
            }
        }
        Ok(())
    }

    /// Records the entries of the maps that programs fill. Maps that are nearly full grow, and maps that were in little use
    /// for long shrink.
    fn record_usage(&mut self, counts: Capacities) -> anyhow::Result<()> {
        self.sizes.counted(counts);
        let (usage, before) = self.reconciler.usage();
        self.make_room(Scope::All)?;
        if self.reconciler.maps().capacities() == before {
            let needed = self.reconciler.needed();
            if let Some(to) = self.sizes.shrunk(&before, usage, &needed) {
                self.replace_maps(&to)?;
            }
        }
        if self.reconciler.maps().capacities() != before {
            // Writes that failed may have room now.
            self.reconciler.reclaim();
        }
        self.publish();
        Ok(())
    }

    /// Replaces the maps that do not have the required size, while the programs serve.
    fn replace_maps(&mut self, to: &Capacities) -> anyhow::Result<()> {
        let begun = Instant::now();
        // Other threads must not change entries that are being copied.
        let mut gate = self.gate.close();
        let (usage, before) = self.reconciler.usage();
        let needed = self.reconciler.needed();
        let is_unused = self.is_new && !self.is_attached && usage == Usage::default();
        let loader = &self.loader;
        let resized = self.reconciler.replace_maps(|maps| {
            if is_unused {
                loader.recreate(maps, to)
            } else {
                loader.resize(maps, to, &needed)
            }
        });
        let problems = resized.context("replacing maps")?;
        let has_moved = self.reconciler.maps().capacities() != before;
        if has_moved {
            gate.maps_were_replaced();
            info!(took = ?begun.elapsed(), "replaced maps");
            if self.printer.is_some() {
                // The new programs log to a map of their own.
                self.printer = Some(ebpf_log::start(self.reconciler.maps_mut().programs_mut())?);
            }
        }
        drop(gate);
        self.sizes.moved(has_moved, problems);
        self.problems.set(Reporter::MapSizes, self.sizes.problems());
        self.update_memory_limit();
        Ok(())
    }

    /// Updates the limit of the maps' memory in STATE, and returns whether it has changed.
    fn update_memory_limit(&mut self) -> bool {
        let (_, present) = self.reconciler.usage();
        let limit = match self.sizes.allowed(&present) {
            // Zero would mean that the limit is not known.
            Ok(allowed) => ((allowed.total >> 20) as u32).max(1),
            Err(error) => {
                warn!(%error, "cannot read the memory that maps may take");
                return false;
            }
        };
        std::mem::replace(&mut self.state.map_memory, limit) != limit
    }

    /// Attaches programs to exactly the devices that there are now, and writes the addresses that serve node ports to
    /// NODE_ADDRS: an address is added after its device has programs, and a device loses them after its addresses are
    /// removed. With `check`, also if no change was reported.
    fn update_devices(&mut self, check: bool) {
        if !self.is_attached {
            return;
        }
        let node = self.reconciler.node().map(|node| node.addresses.clone());
        let maps = self.reconciler.maps_mut();
        let attached = self.devices.attach(maps, &node.unwrap_or_default(), check);
        // Before anything is served at them: an address of the node must not have an address mark.
        self.reconciler.set_addresses(self.devices.snapshot().own_addresses());
        self.write_node_addrs();
        if let Some(mut problems) = attached {
            problems.extend(self.devices.detach(self.reconciler.maps_mut()));
            self.problems.set(Reporter::Devices, problems);
            self.state.own_ports = self.devices.own_ports().into();
        }
    }

    /// Writes the addresses that serve node ports now to NODE_ADDRS, if they have changed or did not fit before.
    fn write_node_addrs(&mut self) {
        let node = self.reconciler.node().map(|node| node.addresses.as_slice());
        let selected = self.devices.snapshot().select(&self.selection, node);
        if self.node_addrs.as_ref() == Some(&selected) {
            return;
        }
        if !self.selection.is_everything() {
            let addresses = selected.iter().map(|addr| (*addr).into()).collect();
            self.servers.health_check_addresses(Some(addresses));
        }
        let message = match self.reconciler.write_node_addrs(&selected) {
            Ok(0) => None,
            Ok(missing) => Some(format!(
                "no room for {missing} addresses of this node: node ports are not served there"
            )),
            Err(error) => Some(error.to_string()),
        };
        self.node_addrs = message.is_none().then_some(selected);
        let problem = message.map(|message| Problem::new(map_name::NODE_ADDRS, message).kind(ProblemKind::Node));
        self.problems
            .set(Reporter::NodeAddresses, problem.into_iter().collect());
    }

    /// Passes the event of a destroyed socket to `lb-agent trace`.
    fn trace(&self, event: &Event) {
        self.servers.metrics().socket_destroyed();
        if let Err(error) = self.reconciler.maps().report_event(event) {
            warn!(%error, "a trace event was lost");
        }
    }

    /// Records a pass of the CT garbage collector.
    fn record_gc(&mut self, pass: Pass) {
        self.servers.metrics().ct_gc_pass(&pass);
        self.report(Reporter::CtGc, pass.problem.into_iter().collect());
    }

    /// Applies the settings of nf_conntrack that are not applied yet.
    fn apply_nf_conntrack(&mut self) {
        if let Some(settings) = &mut self.nf_conntrack {
            self.problems.set(Reporter::NfConntrack, settings.apply());
        }
    }

    /// Replaces the problems of a reporter, and publishes them if they have changed.
    fn report(&mut self, reporter: Reporter, problems: Vec<Problem>) {
        self.problems.set(reporter, problems);
        self.publish();
    }

    /// Publishes the problems if they have changed, and then STATE.
    fn publish(&mut self) {
        if self.publish_problems() {
            self.publish_state();
        }
    }

    fn publish_state(&self) {
        self.reconciler.maps().pinned().write_state(&self.state);
    }

    /// Publishes the problems to the log, the metrics, Kubernetes Events and NOTICES if they have changed. Returns
    /// whether they have.
    fn publish_problems(&mut self) -> bool {
        self.problems.set(Reporter::Services, self.reconciler.problems());
        let Some(problems) = self.problems.changed() else {
            return false;
        };
        self.servers
            .metrics()
            .problems(problems.iter().map(|problem| problem.kind));
        if let Some(events) = &self.events {
            events.set(&problems);
        }
        let notices: Vec<_> = problems
            .iter()
            .map(|problem| ProblemRecord {
                place: pad(&problem.place),
                message: pad(&problem.message),
            })
            .collect();
        match self.reconciler.maps_mut().pinned_mut().write_problems(&notices) {
            Ok(more) => {
                self.state.more_problems = more as u32;
                self.problems.published(problems);
            }
            Err(error) => error!(%error, "failed to write problems for `lb-agent status`"),
        }
        true
    }
}
