//! An API server that goes, comes, forgets, and tells things in another order: what is in force stays in force, and in
//! the end it is what a new list says. Each test has a control plane of its own.

use std::env;
use std::net::{IpAddr, SocketAddr};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use lb_tests::control_plane::{Namespace, Template};
use lb_tests::load::Load;
use lb_tests::{Connect, Random, scaled};
use serde_json::{Value, json};

use crate::TestAlone;
use crate::bed::{Backend, Bed, Outcome, TARGET, Target, USER, tcp};

/// Tests that make their bed themselves.
pub(crate) const TESTS: &[TestAlone] = &[
    ("the_api_server_goes_and_comes", plain, the_api_server_goes_and_comes),
    (
        "events_in_another_order_and_twice",
        mixing,
        events_in_another_order_and_twice,
    ),
];

/// Agents that can be cut off.
fn plain() -> Result<Bed> {
    Bed::with(|control_plane| Ok(Some(control_plane.mixer(USER, None)?)))
}

/// Agents that are told things in another order.
fn mixing() -> Result<Bed> {
    Bed::with(|control_plane| Ok(Some(control_plane.mixer(USER, Some(Random::from_env()))?)))
}

/// For so many seconds the API server is away; a minute where this is not set.
const AWAY: &str = "LB_API_AWAY";
/// How long it may take until all have found the API server again: they try less and less often.
const BACK: Duration = Duration::from_secs(90);

/// A Service that does not change, with a backend on each node.
struct Steady<'a> {
    target: Target,
    backends: [Backend<'a>; 2],
}

impl<'a> Steady<'a> {
    fn new(bed: &Bed, namespace: &Namespace<'a>) -> Result<Self> {
        let ports = json!([{"port": 80, "targetPort": TARGET}]);
        let spec = json!({"selector": {"app": "steady"}, "ports": ports});
        let target = tcp(&namespace.create_service("steady", spec)?, 80)?;
        let template = Template::app("steady");
        let backends = [
            bed.backend(namespace, "n1", "a", &template)?,
            bed.backend(namespace, "n2", "b", &template)?,
        ];
        bed.expect(&bed.everybody(), target, &Outcome::names(&["a", "b"]))?;
        Ok(Self { target, backends })
    }

    /// Connections from a pod on each node, until [`untouched`].
    fn load(&self, bed: &Bed) -> Result<Vec<Load>> {
        let connect = Connect::to(&[self.target.address()]).rate(100.0);
        let pods = bed.pods();
        let loads = pods.into_iter().map(|pod| Bed::testbed().start(pod, &connect));
        loads.collect()
    }
}

/// Not one connection has failed.
fn untouched(loads: Vec<Load>, names: &[&str]) -> Result<()> {
    for load in loads {
        let summary = load.stop()?;
        summary.all_well()?;
        for name in names {
            ensure!(summary.reached(name) > 0, "{name} was never reached: {summary:?}");
        }
    }
    Ok(())
}

fn away() -> Result<Duration> {
    let seconds = env::var(AWAY).unwrap_or_else(|_| "60".to_owned());
    let seconds = seconds
        .parse()
        .with_context(|| format!("{AWAY} is a number of seconds, not {seconds}"))?;
    Ok(Duration::from_secs(seconds))
}

fn the_api_server_goes_and_comes(bed: &Bed) -> Result<()> {
    let control_plane = &bed.control_plane;
    let mixer = bed.mixer.as_ref().context("no mixer")?;
    let namespace = control_plane.namespace("outage")?;
    let steady = Steady::new(bed, &namespace)?;
    let loads = steady.load(bed)?;
    let everybody = bed.everybody();
    let expect = |names: &[&str]| bed.expect_within(BACK, &everybody, steady.target, &Outcome::names(names));

    // Killed, and started again.
    control_plane.kill_api_server()?;
    control_plane.start_api_server()?;
    let c = bed.backend(&namespace, "n3", "c", &Template::app("steady"))?;
    expect(&["a", "b", "c"])?;

    // Silent: what is asked gets no answer.
    control_plane.freeze_api_server()?;
    sleep(Duration::from_secs(3));
    control_plane.thaw_api_server()?;
    c.kubelet.set_ready(false)?;
    expect(&["a", "b"])?;

    // Away. Agents that start meanwhile serve what is pinned.
    let until = Instant::now() + away()?;
    control_plane.kill_api_server()?;
    bed.restart_agents()?;
    for place in bed.everybody() {
        let found = steady.target.outcome(place)?;
        ensure!(found == Outcome::names(&["a", "b"]), "{found:?} from {}", place.name());
    }
    sleep(until.saturating_duration_since(Instant::now()));
    control_plane.start_api_server()?;
    c.kubelet.set_ready(true)?;
    expect(&["a", "b", "c"])?;

    // Cut off while things change, and what was seen last is forgotten: by etcd, and by an API server that is new.
    let before = mixer.mixed().gone;
    mixer.shut();
    steady.backends[0].kubelet.set_ready(false)?;
    let ports = json!([{"port": 80, "targetPort": TARGET}]);
    let other = namespace.create_service("other", json!({"selector": {"app": "steady"}, "ports": ports}))?;
    namespace.wait_for_ready("other", 2)?;
    control_plane.compact()?;
    control_plane.kill_api_server()?;
    control_plane.start_api_server()?;
    mixer.open();
    expect(&["b", "c"])?;
    bed.expect(&everybody, tcp(&other, 80)?, &Outcome::names(&["b", "c"]))?;
    let gone = mixer.mixed().gone - before;
    ensure!(gone > 0, "nobody was told 410 Gone");
    untouched(loads, &["a", "b", "c"])
}

/// Services of a test that are made, changed and deleted, with slices by hand.
const SERVICES: u64 = 8;

fn events_in_another_order_and_twice(bed: &Bed) -> Result<()> {
    let namespace = bed.control_plane.namespace("mixed")?;
    let steady = Steady::new(bed, &namespace)?;
    let loads = steady.load(bed)?;
    let mixer = bed.mixer.as_ref().context("no mixer")?;
    let addresses = steady.backends.each_ref().map(|backend| backend.kubelet.addresses()[0]);
    let mut random = Random::from_env();
    let mut there = [false; SERVICES as usize];
    for _ in 0..scaled(6) {
        for _ in 0..60 {
            let nth = random.below(SERVICES) as usize;
            let name = format!("s{nth}");
            if there[nth] {
                there[nth] = change(&namespace, &name, &mut random, addresses)?;
            } else {
                make(&namespace, &name, &mut random, addresses)?;
                there[nth] = true;
            }
        }
        bed.verify()?;
    }
    // And sockets see the last of it.
    for nth in (0..SERVICES).filter(|nth| there[*nth as usize]) {
        let name = format!("s{nth}");
        namespace.patch_service(
            &name,
            json!({"spec": {
                "ports": ports(80), "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
            }}),
        )?;
        set_slice(&namespace, &name, &[addresses[1]])?;
    }
    for nth in (0..SERVICES).filter(|nth| there[*nth as usize]) {
        let service: Service = namespace.objects().get(namespace.name(), &format!("s{nth}"))?;
        bed.expect(&bed.everybody(), tcp(&service, 80)?, &Outcome::names(&["b"]))?;
    }
    let mixed = mixer.mixed();
    println!("{mixed:?}");
    ensure!(
        mixed.late > 20 && mixed.repeated > 20 && mixed.ended > 2,
        "hardly anything was mixed: {mixed:?}"
    );
    bed.expect(&bed.everybody(), steady.target, &Outcome::names(&["a", "b"]))?;
    untouched(loads, &["a", "b"])
}

fn ports(port: u16) -> Value {
    json!([{"name": "http", "port": port, "targetPort": TARGET}])
}

/// Makes a Service at an address that is always the same, and its slice: in either order.
fn make(namespace: &Namespace<'_>, name: &str, random: &mut Random, addresses: [IpAddr; 2]) -> Result<()> {
    let number: u8 = name.trim_start_matches('s').parse()?;
    let address = SocketAddr::from(([10, 96, 0, 100 + number], 80)).ip();
    let first = random.coin();
    if first {
        set_slice(namespace, name, &addresses[..1])?;
    }
    namespace.create_service(name, json!({"clusterIP": address, "ports": ports(80)}))?;
    if !first {
        set_slice(namespace, name, &addresses)?;
    }
    Ok(())
}

/// Changes a Service or its slice, or deletes both; returns whether it is there still.
fn change(namespace: &Namespace<'_>, name: &str, random: &mut Random, addresses: [IpAddr; 2]) -> Result<bool> {
    match random.below(7) {
        0 => set_slice(namespace, name, &[])?,
        1 => set_slice(namespace, name, &addresses[..1])?,
        2 => set_slice(namespace, name, &addresses)?,
        3 => {
            let port = 80 + u16::try_from(random.below(3))?;
            namespace.patch_service(name, json!({"spec": {"ports": ports(port)}}))?;
        }
        4 => {
            let affinity = if random.coin() { "ClientIP" } else { "None" };
            namespace.patch_service(name, json!({"spec": {"sessionAffinity": affinity}}))?;
        }
        5 => {
            let policy = if random.coin() { "Local" } else { "Cluster" };
            namespace.patch_service(name, json!({"spec": {"internalTrafficPolicy": policy}}))?;
        }
        _ => {
            namespace.delete_service(name)?;
            namespace
                .objects()
                .delete::<EndpointSlice>(namespace.name(), name, None)?;
            return Ok(false);
        }
    }
    Ok(true)
}

/// Makes the slice of a Service, or changes its endpoints.
fn set_slice(namespace: &Namespace<'_>, service: &str, addresses: &[IpAddr]) -> Result<()> {
    let endpoint = |address: &IpAddr| json!({"addresses": [address], "conditions": {"ready": true}});
    let endpoints: Vec<_> = addresses.iter().map(endpoint).collect();
    let objects = namespace.objects();
    if objects.get::<EndpointSlice>(namespace.name(), service).is_ok() {
        let change = json!({"endpoints": endpoints});
        objects.patch::<EndpointSlice>(namespace.name(), service, change)?;
        return Ok(());
    }
    let slice = json!({
        "metadata": {"name": service, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": TARGET}],
        "endpoints": endpoints,
    });
    objects.create::<EndpointSlice>(namespace.name(), slice)?;
    Ok(())
}
