//! The test bed of `connect` and `udp` for one number of Services: namespaces, maps, programs and rules.

use std::fs::File;

use anyhow::{Context as _, Result, ensure};
use aya::Ebpf;
use lb_agent::loader::{self, Cgroup, Lock, OBJECT, PinPath, SocketLb};
use lb_agent::maps::bpf::BpfMaps;
use lb_common::abi::{ServiceIndex, SizedMap};
use lb_core::maps::Capacities;
use lb_core::model::{Batch, Protocol};
use lb_core::reconcile::Reconciler;
use lb_tests::{Cluster, Pod};
use serde::Serialize;

use crate::connect::kube_proxy;
use crate::objects::{Family, NODE, Services};
use crate::programs::{self, Hook, Maker, Runs};
use crate::scenario::Scenario;
use crate::worker::{Order, Worker};

/// A way by which a client reaches a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Way {
    /// The backend's own address.
    Direct,
    /// The backend's own address, measured a second time: its difference from [`Way::Direct`] is noise.
    DirectAgain,
    Lb,
    C,
    KubeProxyNftables,
    KubeProxyIptables,
}

impl Way {
    /// Ways without rules.
    pub(crate) const PLAIN: [Self; 4] = [Self::Direct, Self::DirectAgain, Self::Lb, Self::C];

    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::DirectAgain => "direct again",
            Self::Lb => "lb",
            Self::C => "C",
            Self::KubeProxyNftables => "kube-proxy nftables",
            Self::KubeProxyIptables => "kube-proxy iptables",
        }
    }

    /// Returns the name of the way's pod.
    fn pod(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::DirectAgain => "again",
            Self::Lb => "lb",
            Self::C => "c",
            Self::KubeProxyNftables => "nftables",
            Self::KubeProxyIptables => "iptables",
        }
    }

    /// Returns the destinations of this way's client: a direct one uses the addresses of backends.
    pub(crate) fn destinations(self, scenario: Scenario) -> Scenario {
        match self {
            Self::Direct | Self::DirectAgain => scenario.missed(),
            Self::Lb | Self::C | Self::KubeProxyNftables | Self::KubeProxyIptables => scenario,
        }
    }

    pub(crate) fn has_rules(self) -> bool {
        matches!(self, Self::KubeProxyNftables | Self::KubeProxyIptables)
    }
}

/// Times of loading rules.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Loading {
    pub(crate) services: u32,
    pub(crate) family: Family,
    pub(crate) nftables_seconds: f64,
    pub(crate) iptables_seconds: f64,
    /// Program that loaded the rules of iptables.
    pub(crate) iptables_program: &'static str,
}

/// C programs that are attached to a pod one at a time, and the workers that run them and lb's programs.
pub(crate) struct DetachedPrograms {
    pub(crate) programs: Ebpf,
    /// Cgroup of the pod.
    pub(crate) cgroup: File,
    worker: Worker,
    lb_worker: Worker,
}

impl DetachedPrograms {
    /// Gives an order to the worker of the attached C program `name`, or without a name to that of lb. Returns the runs of the program,
    /// which for lb is the one at `hook`.
    pub(crate) fn run(&mut self, bed: &TestBed, name: Option<&str>, hook: Hook, order: &Order) -> Result<Runs> {
        let Self {
            programs,
            worker,
            lb_worker,
            ..
        } = self;
        let worker = if name.is_some() { worker } else { lb_worker };
        let runs = || match name {
            Some(name) => programs::runs_of(programs, name),
            None => bed.runs(Maker::Lb, hook),
        };
        let before = runs()?;
        worker.order(order)?;
        Ok(runs()?.since(before))
    }
}

/// lb's programs, and the C, floor and empty programs, on the same maps; pods for the programs of each maker, and for the other
/// ways.
pub(crate) struct TestBed {
    pub(crate) services: Services,
    /// Fills the maps; the programs that were loaded with it are not attached.
    reconciler: Reconciler<BpfMaps>,
    /// lb's programs.
    lb: BpfMaps,
    /// The C, floor and empty programs and their object, if a C compiler is installed.
    c: Option<(Ebpf, Vec<u8>)>,
    loading: Option<Loading>,
    pods: Vec<(Way, Pod)>,
    /// Pod of the floor, if it is measured.
    floor: Option<Pod>,
    /// Pod without programs, for those of [`DetachedPrograms`], if the floor is measured.
    detached: Option<Pod>,
    empty: Pod,
    pins: PinPath,
    lock: Lock,
    /// Last field, so that the cluster is dropped after everything in it.
    _cluster: Cluster,
}

impl TestBed {
    /// Creates the bed. `object` contains the compiled C programs. The rules of the ways that have rules are loaded.
    pub(crate) fn new(services: Services, object: Option<&[u8]>, ways: &[Way]) -> Result<Self> {
        let cluster = Cluster::builder().nodes(1).build()?;
        let ways = ways.iter().filter(|way| **way != Way::C || object.is_some());
        let pods = ways
            .map(|way| Ok((*way, cluster.add_pod("n1", way.pod())?)))
            .collect::<Result<Vec<_>>>()?;
        // The floor has no socket records, by which a UDP socket receives replies from its Service.
        let has_floor = object.is_some() && services.protocol == Protocol::Tcp;
        let floor = has_floor.then(|| cluster.add_pod("n1", "floor")).transpose()?;
        let detached = has_floor.then(|| cluster.add_pod("n1", "detached")).transpose()?;
        let empty = cluster.add_pod("n1", "empty")?;
        for pod in pods.iter().map(|(_, pod)| pod).chain(&floor).chain([&empty]) {
            // Backends are at addresses that no interface has; see `bring_up_backends`.
            pod.sysctl("net.ipv6.ip_nonlocal_bind", "1")?;
        }
        for (way, pod) in &pods {
            // A Service's address has a route only in pods with rules, which rewrite packets.
            if !way.has_rules() {
                remove_routes(pod)?;
            }
        }
        for pod in floor.iter().chain(&detached).chain([&empty]) {
            remove_routes(pod)?;
        }
        let loading = load_rules(&pods, services, &cluster)?;

        let pins = PinPath::new(cluster.pin_path("n1"));
        let lock = Lock::take(&pins)?;
        let reconciler = fill(
            loader::load(OBJECT, &lock, &capacities(services), SocketLb::All)?,
            services,
        )?;
        let lb = load_lb(&lock, services, &pods)?;
        let c = object
            .map(|object| anyhow::Ok((load_c(object, &pins, &pods, floor.as_ref(), &empty)?, object.to_vec())))
            .transpose()?;
        Ok(Self {
            services,
            reconciler,
            lb,
            c,
            loading,
            pods,
            floor,
            detached,
            empty,
            pins,
            lock,
            _cluster: cluster,
        })
    }

    /// Loads and attaches every program again. The address of a program determines which of its loads and branches alias
    /// with others in the processor's predictors and caches. By chance this makes a short program a fifth faster or slower,
    /// for as long as it stays loaded.
    pub(crate) fn reload(&mut self) -> Result<()> {
        self.lb = load_lb(&self.lock, self.services, &self.pods)?;
        if let Some((programs, object)) = &mut self.c {
            *programs = load_c(object, &self.pins, &self.pods, self.floor.as_ref(), &self.empty)?;
        }
        Ok(())
    }

    /// Starts a worker in each pod that has a program at one of the hooks.
    pub(crate) fn program_workers(&self, hooks: &[Hook]) -> Result<Vec<(Maker, Worker)>> {
        let pod = |maker| match maker {
            Maker::Lb => find(&self.pods, Way::Lb),
            Maker::C => find(&self.pods, Way::C),
            Maker::Floor => self.floor.as_ref(),
            Maker::Empty => self.c.is_some().then_some(&self.empty),
        };
        Maker::ALL
            .into_iter()
            .filter(|maker| hooks.iter().any(|hook| hook.has_program(*maker)))
            .filter_map(|maker| Some((maker, pod(maker)?)))
            .map(|(maker, pod)| Ok((maker, Worker::start(pod)?)))
            .collect()
    }

    /// Loads the C programs a second time, attached to no hook, and starts the workers. Returns `None` if the bed has no floor.
    pub(crate) fn load_detached(&self) -> Result<Option<DetachedPrograms>> {
        let (Some((_, object)), Some(pod)) = (&self.c, &self.detached) else {
            return Ok(None);
        };
        Ok(Some(DetachedPrograms {
            programs: programs::load(object, &self.pins, SizedMap::Sockets.default_capacity())?,
            cgroup: programs::open_cgroup(pod)?,
            worker: Worker::start(pod)?,
            lb_worker: Worker::start(find(&self.pods, Way::Lb).context("no such pod")?)?,
        }))
    }

    /// Starts a worker on each way.
    pub(crate) fn way_workers(&self) -> Result<Vec<(Way, Worker)>> {
        let start = |(way, pod): &(Way, Pod)| Ok((*way, Worker::start(pod)?));
        self.pods.iter().map(start).collect()
    }

    /// Makes every backend's address local to each pod.
    pub(crate) fn bring_up_backends(&self) -> Result<()> {
        let family = if self.services.family == Family::Ipv6 {
            "-6 "
        } else {
            ""
        };
        let route = format!("{family}route add local {} dev lo", self.services.backends());
        let pods = self.pods.iter().map(|(_, pod)| pod);
        for pod in pods.chain(&self.floor).chain([&self.empty]) {
            pod.ip(&route)?;
        }
        Ok(())
    }

    /// Returns the connections that the programs of lb and C have counted, over all Services.
    pub(crate) fn connections(&self) -> Result<u64> {
        let maps = self.reconciler.maps().pinned();
        // Service index zero is unused.
        (0..=self.services.number).try_fold(0, |sum, service| {
            Ok(sum + maps.stats(ServiceIndex::new(service))?.connections)
        })
    }

    /// Returns the counters of a maker's program at a hook.
    pub(crate) fn runs(&self, maker: Maker, hook: Hook) -> Result<Runs> {
        let programs = match maker {
            Maker::Lb => self.lb.programs(),
            Maker::C | Maker::Floor | Maker::Empty => &self.c.as_ref().context("the C programs are not loaded")?.0,
        };
        programs::runs(programs, maker, hook)
    }

    /// Removes the bed; returns the times of loading rules.
    pub(crate) fn take_down(self) -> Result<Option<Loading>> {
        let Self {
            reconciler,
            lb,
            c,
            loading,
            pins,
            lock,
            ..
        } = self;
        drop((reconciler, lb, c, lock));
        loader::cleanup(&pins)?;
        Ok(loading)
    }
}

fn find(pods: &[(Way, Pod)], way: Way) -> Option<&Pod> {
    pods.iter().find(|(w, _)| *w == way).map(|(_, pod)| pod)
}

/// Removes a pod's default routes, so that it reaches only its neighbors.
fn remove_routes(pod: &Pod) -> Result<()> {
    pod.ip("route delete default")?;
    pod.ip("-6 route delete default")?;
    Ok(())
}

/// Loads the rules of kube-proxy into their pods, if the bed has them.
fn load_rules(pods: &[(Way, Pod)], services: Services, cluster: &Cluster) -> Result<Option<Loading>> {
    let (Some(nftables), Some(iptables)) = (find(pods, Way::KubeProxyNftables), find(pods, Way::KubeProxyIptables))
    else {
        return Ok(None);
    };
    let nftables = kube_proxy::load_nftables(nftables, services, &[], cluster.scratch())?;
    let (iptables, program) = kube_proxy::load_iptables(iptables, services, &[], cluster.scratch())?;
    Ok(Some(Loading {
        services: services.number,
        family: services.family,
        nftables_seconds: nftables.as_secs_f64(),
        iptables_seconds: iptables.as_secs_f64(),
        iptables_program: program,
    }))
}

/// Loads lb's programs, on the pinned maps if they exist, and attaches them to the hooks of their pod.
fn load_lb(lock: &Lock, services: Services, pods: &[(Way, Pod)]) -> Result<BpfMaps> {
    let lb = loader::load(OBJECT, lock, &capacities(services), SocketLb::All)?;
    let pod = find(pods, Way::Lb).context("no such pod")?;
    loader::attach(lb.programs(), lock.pins(), &Cgroup::open(pod.process_cgroup())?)?;
    Ok(lb)
}

/// Loads the C, floor and empty programs, and attaches them to the hooks of their pods.
fn load_c(object: &[u8], pins: &PinPath, pods: &[(Way, Pod)], floor: Option<&Pod>, empty: &Pod) -> Result<Ebpf> {
    let mut c = programs::load(object, pins, SizedMap::Sockets.default_capacity())?;
    programs::attach(&mut c, Maker::C, find(pods, Way::C).context("no such pod")?)?;
    if let Some(floor) = floor {
        programs::attach(&mut c, Maker::Floor, floor)?;
    }
    programs::attach(&mut c, Maker::Empty, empty)?;
    Ok(c)
}

fn capacities(services: Services) -> Capacities {
    let set = services.endpoints.next_power_of_two();
    Capacities::DEFAULT
        .with(SizedMap::Services, services.number + 16)
        .with(SizedMap::Frontends, 2 * services.number + 16)
        .with(SizedMap::Backends, services.number * services.endpoints + 16)
        .with(SizedMap::BackendSlots, (services.number + 16) * set)
        .with(SizedMap::Conntrack, 2)
        .with(SizedMap::ConntrackNew, 64)
}

/// Fills the maps as the agent does.
fn fill(maps: BpfMaps, services: Services) -> Result<Reconciler<BpfMaps>> {
    let mut lb = Reconciler::adopt(maps, NODE)?;
    lb.apply(Batch::of(services.objects().collect()));
    ensure!(lb.problems().is_empty(), "{:?}", lb.problems().first());
    Ok(lb)
}
