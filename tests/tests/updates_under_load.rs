//! Connections while the maps change: the reconciler and the real maps, in this process.

use std::net::{Ipv4Addr, SocketAddr};
use std::slice;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lb_agent::loader::{self, Cgroup, Lock, OBJECT, PinPath, SocketLb};
use lb_agent::maps::bpf::BpfMaps;
use lb_common::abi::{DropReason, SizedMap};
use lb_core::maps::{Capacities, Maps as _};
use lb_core::model::{Batch, Change};
use lb_core::reconcile::Reconciler;
use lb_core::verify::verify;
use lb_stress::objects::{self, BACKEND_PORT};
use lb_tests::load::{Load, Record};
use lb_tests::{
    Cluster, Connect, DowntimeLog, Pod, Process, Random, Testbed, chi_squared_p, scaled_count, scaled_count_above,
    scaled_timeout, testbed,
};

const NODE: &str = "n1";
/// Number of changes that are applied under load.
const APPLIES: u64 = 1000;
const VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 80);
/// Small, so that 100 entries of FRONTENDS can be 90 % full, and indexes, ids and slots are soon reused.
const CAPACITIES: Capacities = Capacities::uniform(64)
    .with(SizedMap::Services, 72)
    .with(SizedMap::Frontends, 100)
    .with(SizedMap::Backends, 96)
    .with(SizedMap::BackendSlots, 128)
    .with(SizedMap::Sockets, 1024)
    .with(SizedMap::SocketsMore, 4096);

/// A backend: an address of the server pod. It always answers with its name, whether a Service uses it or not.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Backend {
    name: String,
    address: Ipv4Addr,
}

impl Backend {
    /// Returns `count` backends with names such as `a0`, at addresses that end in `from` and above.
    fn several(prefix: &str, from: u8, count: u8) -> Vec<Self> {
        let backend = |number| Self {
            name: format!("{prefix}{number}"),
            address: Ipv4Addr::new(10, 10, 1, from + number),
        };
        (0..count).map(backend).collect()
    }
}

/// A node with a server, a pod for clients, and a reconciler that serves it.
struct Fixture {
    reconciler: Reconciler<BpfMaps>,
    _lock: Lock,
    _server: Process,
    client: Pod,
    testbed: Testbed,
    cluster: Cluster,
}

impl Fixture {
    fn new(backends: &[Backend]) -> Result<Self> {
        let cluster = Cluster::builder().nodes(1).build()?;
        let testbed = testbed();
        let server = cluster.add_pod(NODE, "server")?;
        let mut listen = Vec::new();
        for Backend { name, address } in backends {
            server.add_address(&format!("{address}/24"), "eth0")?;
            listen.push(format!("{address}:{BACKEND_PORT}={name}"));
        }
        let listen: Vec<_> = listen.iter().map(String::as_str).collect();
        let serving = testbed.serve(&server, &listen)?;
        let lock = Lock::take(&PinPath::new(cluster.pin_path(NODE)))?;
        let maps = loader::load(OBJECT, &lock, &CAPACITIES, SocketLb::All)?;
        let cgroup = Cgroup::open(Some(cluster.node(NODE).cgroup()))?;
        loader::attach(maps.programs(), lock.pins(), &cgroup)?;
        Ok(Self {
            reconciler: Reconciler::adopt(maps, NODE)?,
            _lock: lock,
            _server: serving,
            client: cluster.add_pod(NODE, "client")?,
            testbed,
            cluster,
        })
    }

    /// Applies changes as a whole.
    fn apply(&mut self, changes: Vec<Change>) {
        self.reconciler.apply(Batch::of(changes));
    }

    /// Fails unless the maps match the desired state.
    fn check(&self) -> Result<()> {
        let drifts = verify(self.reconciler.desired(), &self.reconciler.maps().dump()?);
        ensure!(drifts.is_empty(), "the maps differ from the desired state: {drifts:?}");
        let problems = self.reconciler.problems();
        // An address that two Services claim is a problem too, but an expected one.
        let failed: Vec<_> = problems
            .iter()
            .filter(|problem| problem.message.contains("the maps are not up to date"))
            .collect();
        ensure!(failed.is_empty(), "{failed:?}");
        Ok(())
    }

    /// Fails unless FRONTENDS is 90 % full.
    fn check_fill(&self) -> Result<()> {
        let (usage, capacities) = self.reconciler.usage();
        ensure!(
            usage.frontends * 10 >= capacities[SizedMap::Frontends] * 9,
            "{} of {} frontends are too few for this test",
            usage.frontends,
            capacities[SizedMap::Frontends]
        );
        Ok(())
    }

    /// Starts four threads that connect until they are stopped, a little slower than they could, which leaves CPU time
    /// to the reconciler.
    fn start_clients(&self, targets: &[SocketAddr]) -> Result<Load> {
        let connect = Connect::to(targets)
            .threads(4)
            .rate(8000.0)
            .timeout(scaled_timeout(Duration::from_secs(5)))
            .peer_check()
            .log(&self.cluster.scratch().join("connections"));
        self.testbed.start(&self.client, &connect)
    }

    /// Stops the clients, and returns the records of all connections.
    fn stop_clients(&self, load: Load) -> Result<Vec<Record>> {
        let summary = load.stop()?;
        summary.all_well()?;
        self.records()
    }

    /// Returns the records that the clients have written at their end.
    fn records(&self) -> Result<Vec<Record>> {
        Record::read_log(&self.cluster.scratch().join("connections"))
    }

    /// Fails if a program has counted a drop for any reason but these.
    fn check_drops(&self, expected: &[DropReason]) -> Result<()> {
        for reason in DropReason::ALL.iter().filter(|reason| !expected.contains(reason)) {
            let count = self.reconciler.maps().pinned().drops(*reason)?;
            ensure!(count == 0, "the data plane counted {count} times: {}", reason.text());
        }
        Ok(())
    }
}

/// Returns a Service of type ClusterIP.
fn service(name: &str, address: Ipv4Addr, ports: &[(&str, u16)], created: i64) -> Change {
    Change::Set(objects::service_object(objects::service(name, address, ports, created)))
}

/// Returns the one EndpointSlice of a Service, for all its ports.
fn endpoints<'a>(service: &str, ports: &[&str], backends: impl IntoIterator<Item = &'a Backend>) -> Change {
    let addresses: Vec<_> = backends.into_iter().map(|backend| backend.address).collect();
    Change::Set(objects::slice_object(objects::slice(service, ports, NODE, &addresses)))
}

/// Services that no client connects to, that come and go, and that fill FRONTENDS.
struct OtherServices {
    present: Vec<u8>,
    absent: Vec<u8>,
    backend: Backend,
}

impl OtherServices {
    /// As many as fill FRONTENDS to 90 % and a little more (a Service is two entries), and half as many absent.
    fn new(backend: &Backend) -> Self {
        Self {
            present: (0..44).collect(),
            absent: (44..66).collect(),
            backend: backend.clone(),
        }
    }

    fn name(number: u8) -> String {
        format!("other-{number}")
    }

    fn set(&self, number: u8) -> [Change; 2] {
        let name = Self::name(number);
        let address = Ipv4Addr::new(10, 96, 1, number);
        [
            service(&name, address, &[("", 80)], 0),
            endpoints(&name, &[""], [&self.backend]),
        ]
    }

    fn all(&self) -> impl Iterator<Item = Change> {
        self.present.iter().flat_map(|&number| self.set(number))
    }

    /// Removes up to three Services, and adds as many others.
    fn replace_some(&mut self, random: &mut Random) -> Vec<Change> {
        let mut changes = Vec::new();
        for _ in 0..=random.below(3) {
            let (goes, comes) = (random.take(&mut self.present), random.take(&mut self.absent));
            changes.extend(self.set(comes));
            let name = Self::name(goes);
            changes.extend(objects::ids(&name).map(Change::Remove));
            self.present.push(comes);
            self.absent.push(goes);
        }
        changes
    }
}

/// The other Services change at every n-th apply.
const OTHERS_EVERY: u64 = 4;

#[test]
fn endpoint_churn_fails_no_connection() -> Result<()> {
    let mut random = Random::from_env();
    let backends = Backend::several("b", 100, 8);
    let mut fixture = Fixture::new(&backends)?;
    let mut others = OtherServices::new(&backends[0]);
    let mut present = u64::from(u8::MAX);
    let in_use = |present: u64| {
        let bits = backends.iter().enumerate();
        bits.filter(move |(bit, _)| present >> bit & 1 == 1)
            .map(|(_, backend)| backend)
    };
    let mut downtime_log = DowntimeLog::default();

    let mut changes: Vec<_> = others.all().collect();
    changes.push(service("web", VIP, &[("", 80)], 0));
    changes.push(endpoints("web", &[""], &backends));
    fixture.apply(changes);
    fixture.check()?;

    let load = fixture.start_clients(&[SocketAddr::new(VIP.into(), 80)])?;
    for apply in 0..scaled_count(APPLIES) {
        // Any number of backends but none, and never the same as before.
        let before = present;
        while present == before {
            present = 1 + random.below(255);
        }
        let mut changes = vec![endpoints("web", &[""], in_use(present))];
        let others_change = apply % OTHERS_EVERY == 0;
        if others_change {
            changes.extend(others.replace_some(&mut random));
        }
        for backend in in_use(present & !before) {
            downtime_log.end(&backend.name);
        }
        fixture.apply(changes);
        for backend in in_use(before & !present) {
            downtime_log.begin(&backend.name);
        }
        if others_change {
            // The remaining entries of removed Services are cleared after a grace period.
            fixture.reconciler.settle()?;
        }
        fixture.check().with_context(|| format!("after apply {apply}"))?;
        fixture.check_fill()?;
        sleep(Duration::from_micros(random.below(8000)));
    }
    let records = fixture.stop_clients(load)?;
    println!("{} connections, {} downtime_log", records.len(), downtime_log.count());
    downtime_log.check(&records)?;
    fixture.check_drops(&[])
}

#[test]
fn port_moving_between_services_fails_no_connection() -> Result<()> {
    let mut random = Random::from_env();
    let sides = [Backend::several("left", 100, 3), Backend::several("right", 110, 3)];
    let names = ["left", "right"];
    let own_ports = [8081, 8082];
    let mut fixture = Fixture::new(&sides.concat())?;
    let mut others = OtherServices::new(&sides[0][0]);
    let mut downtime_log = DowntimeLog::default();
    // The owner of port 80 is the only Service that claims it, or the older of the two.
    let claims = |owner: usize, both: bool| {
        [0, 1].map(|side| {
            let mut ports = vec![("own", own_ports[side])];
            if side == owner || both {
                ports.push(("shared", 80));
            }
            service(names[side], VIP, &ports, i64::from(side != owner))
        })
    };

    let mut owner = 0;
    let mut changes: Vec<_> = others.all().collect();
    changes.extend(claims(owner, false));
    for (name, backends) in names.iter().zip(&sides) {
        changes.push(endpoints(name, &["own", "shared"], backends));
    }
    fixture.apply(changes);
    fixture.check()?;

    let shared = SocketAddr::new(VIP.into(), 80);
    let own = own_ports.map(|port| SocketAddr::new(VIP.into(), port));
    let load = fixture.start_clients(&[shared, own[0], shared, own[1]])?;
    for apply in 0..scaled_count(APPLIES) {
        let before = owner;
        owner = 1 - owner;
        let mut changes = Vec::from(claims(owner, random.next_bool()));
        if apply % OTHERS_EVERY == 0 {
            changes.extend(others.replace_some(&mut random));
        }
        sides[owner].iter().for_each(|backend| downtime_log.end(&backend.name));
        fixture.apply(changes);
        sides[before]
            .iter()
            .for_each(|backend| downtime_log.begin(&backend.name));
        // A removed service port is cleared after a grace period.
        fixture.reconciler.settle()?;
        fixture.check().with_context(|| format!("after apply {apply}"))?;
        fixture.check_fill()?;
    }
    let records = fixture.stop_clients(load)?;
    let (to_shared, to_own): (Vec<_>, Vec<_>) = records.into_iter().partition(|record| record.to == shared);
    println!(
        "{} connections to the shared port, {} to others, {} downtime_log",
        to_shared.len(),
        to_own.len(),
        downtime_log.count()
    );
    downtime_log.check(&to_shared)?;
    for record in to_own {
        let side = usize::from(record.to == own[1]);
        let reached = record.outcome.as_deref().unwrap_or_default();
        ensure!(
            reached.starts_with(names[side]),
            "a port of one Service reached another Service: {record:?}"
        );
    }
    fixture.check_drops(&[])
}

/// Ports without endpoints: the program refuses the connection, which costs little, as does a store in FRONTENDS. So
/// this test makes a thousand times as many as the tests above, to find rare misses. (With a map update instead of the
/// store, this test fails within a second.)
#[test]
fn frontend_updates_are_never_missed_by_lookups() -> Result<()> {
    const STORES: u64 = 1_000_000;
    let stores = scaled_count(STORES);
    let backend = Backend::several("b", 100, 1).remove(0);
    let mut fixture = Fixture::new(slice::from_ref(&backend))?;
    let ports = [80, 81, 82, 83, 84, 85, 86, 87];
    let names = ports.map(|port| format!("port-{port}"));
    let named: Vec<_> = names.iter().map(String::as_str).zip(ports).collect();
    let mut changes: Vec<_> = OtherServices::new(&backend).all().collect();
    changes.push(service("void", VIP, &named, 0));
    fixture.apply(changes);
    fixture.check()?;
    fixture.check_fill()?;

    let targets = ports.map(|port| SocketAddr::new(VIP.into(), port));
    let load = fixture
        .testbed
        .start(&fixture.client, &Connect::to(&targets).refused())?;
    let frontends: Vec<_> = fixture.reconciler.maps().dump()?.frontends.into_iter().collect();
    for (key, value) in frontends.into_iter().cycle().take(usize::try_from(stores)?) {
        fixture.reconciler.maps_mut().store_frontend(key, value)?;
    }
    let summary = load.stop()?;
    println!("{} connections refused, {stores} stores", summary.connections);
    summary.all_well()?;
    // All were refused for the right reason.
    fixture.check_drops(&[DropReason::NoEndpoint])?;
    fixture.check()
}

#[test]
fn connections_are_distributed_evenly() -> Result<()> {
    // With 500 connections to each of four backends, a share that is off by a seventh is found.
    let count = scaled_count_above(10_000, 2_000);
    let backends = Backend::several("b", 100, 4);
    let mut fixture = Fixture::new(&backends)?;
    fixture.apply(vec![
        service("web", VIP, &[("", 80)], 0),
        endpoints("web", &[""], &backends),
    ]);
    fixture.check()?;
    let connect = Connect::to(&[SocketAddr::new(VIP.into(), 80)])
        .count(count)
        .threads(2)
        .timeout(scaled_timeout(Duration::from_secs(5)));
    // One even distribution in a thousand looks uneven, so the test tries twice.
    for attempt in 1..=2 {
        let summary = fixture.testbed.connect(&fixture.client, &connect)?;
        summary.all_well()?;
        let counts: Vec<_> = backends.iter().map(|backend| summary.reached(&backend.name)).collect();
        ensure!(counts.iter().sum::<u64>() == count, "{counts:?}");
        let p = chi_squared_p(&counts);
        println!("attempt {attempt}: {counts:?}, p = {p:.4}");
        if p > 0.001 {
            return fixture.check_drops(&[]);
        }
    }
    panic!("{count} connections are not distributed evenly in two attempts");
}
