//! An API server that fails, returns, loses its history, and sends events in another order: the state in force stays in
//! force, and converges to the result of a new list. Each test has a control plane of its own.

use std::env;
use std::net::{IpAddr, SocketAddr};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use lb_tests::control_plane::{Namespace, PodTemplate};
use lb_tests::load::Load;
use lb_tests::{Connect, Random, scaled_count, testbed};
use serde_json::{Value, json};

use crate::TestAlone;
use crate::fixture::{Backend, Fixture, Outcome, TARGET, Target, USER, tcp};

/// Tests that create their own fixture.
pub(crate) const TESTS: &[TestAlone] = &[
    (
        "services_survive_api_server_outages",
        cut_off_fixture,
        services_survive_api_server_outages,
    ),
    (
        "reordered_and_repeated_watch_events_converge",
        reordering_fixture,
        reordered_and_repeated_watch_events_converge,
    ),
];

/// Creates agents that can be cut off from the API server.
fn cut_off_fixture() -> Result<Fixture> {
    Fixture::with(|control_plane| Ok(Some(control_plane.watch_proxy(USER, None)?)))
}

/// Creates agents that receive events in another order.
fn reordering_fixture() -> Result<Fixture> {
    Fixture::with(|control_plane| Ok(Some(control_plane.watch_proxy(USER, Some(Random::from_env()))?)))
}

/// Variable with the length of the outage in seconds; a minute if it is not set.
const OUTAGE_SECONDS: &str = "LB_API_AWAY";
/// Time limit for the agents to reach the API server again: their retries back off.
const RECONNECT_LIMIT: Duration = Duration::from_secs(90);

/// A Service that does not change, with a backend on each node.
struct Steady<'a> {
    target: Target,
    backends: [Backend<'a>; 2],
}

impl<'a> Steady<'a> {
    fn new(fixture: &Fixture, namespace: &Namespace<'a>) -> Result<Self> {
        let ports = json!([{"port": 80, "targetPort": TARGET}]);
        let spec = json!({"selector": {"app": "steady"}, "ports": ports});
        let target = tcp(&namespace.create_service("steady", spec)?, 80)?;
        let template = PodTemplate::app("steady");
        let backends = [
            fixture.backend(namespace, "n1", "a", &template)?,
            fixture.backend(namespace, "n2", "b", &template)?,
        ];
        fixture.expect(&fixture.all_clients(), target, &Outcome::names(&["a", "b"]))?;
        Ok(Self { target, backends })
    }

    /// Starts connections from a pod on each node, which run until [`expect_no_failures`].
    fn load(&self, fixture: &Fixture) -> Result<Vec<Load>> {
        let connect = Connect::to(&[self.target.address()]).rate(100.0);
        let pods = fixture.pods();
        let loads = pods.into_iter().map(|pod| testbed().start(pod, &connect));
        loads.collect()
    }
}

/// Fails if any connection has failed.
fn expect_no_failures(loads: Vec<Load>, names: &[&str]) -> Result<()> {
    for load in loads {
        let summary = load.stop()?;
        summary.all_well()?;
        for name in names {
            ensure!(summary.reached(name) > 0, "{name} was never reached: {summary:?}");
        }
    }
    Ok(())
}

fn outage() -> Result<Duration> {
    let seconds = env::var(OUTAGE_SECONDS).unwrap_or_else(|_| "60".to_owned());
    let seconds = seconds
        .parse()
        .with_context(|| format!("{OUTAGE_SECONDS} must be a number of seconds, not {seconds}"))?;
    Ok(Duration::from_secs(seconds))
}

fn services_survive_api_server_outages(fixture: &Fixture) -> Result<()> {
    let control_plane = &fixture.control_plane;
    let watch_proxy = fixture.watch_proxy.as_ref().context("no mixer")?;
    let namespace = control_plane.namespace("outage")?;
    let steady = Steady::new(fixture, &namespace)?;
    let loads = steady.load(fixture)?;
    let all_clients = fixture.all_clients();
    let expect =
        |names: &[&str]| fixture.expect_within(RECONNECT_LIMIT, &all_clients, steady.target, &Outcome::names(names));

    // The API server is killed and started again.
    control_plane.kill_api_server()?;
    control_plane.start_api_server()?;
    let c = fixture.backend(&namespace, "n3", "c", &PodTemplate::app("steady"))?;
    expect(&["a", "b", "c"])?;

    // The API server hangs: requests get no answer.
    control_plane.freeze_api_server()?;
    sleep(Duration::from_secs(3));
    control_plane.thaw_api_server()?;
    c.kubelet.set_ready(false)?;
    expect(&["a", "b"])?;

    // The API server is down. Agents that start meanwhile serve the pinned state.
    let until = Instant::now() + outage()?;
    control_plane.kill_api_server()?;
    fixture.restart_agents()?;
    for netns in fixture.all_clients() {
        let found = steady.target.outcome(netns)?;
        ensure!(found == Outcome::names(&["a", "b"]), "{found:?} from {}", netns.name());
    }
    sleep(until.saturating_duration_since(Instant::now()));
    control_plane.start_api_server()?;
    c.kubelet.set_ready(true)?;
    expect(&["a", "b", "c"])?;

    // The agents are cut off while objects change, and the version that they saw last is lost: etcd is compacted and
    // the API server is new.
    let before = watch_proxy.stats().gone;
    watch_proxy.close();
    steady.backends[0].kubelet.set_ready(false)?;
    let ports = json!([{"port": 80, "targetPort": TARGET}]);
    let other = namespace.create_service("other", json!({"selector": {"app": "steady"}, "ports": ports}))?;
    namespace.wait_for_ready("other", 2)?;
    control_plane.compact()?;
    control_plane.kill_api_server()?;
    control_plane.start_api_server()?;
    watch_proxy.open();
    expect(&["b", "c"])?;
    fixture.expect(&all_clients, tcp(&other, 80)?, &Outcome::names(&["b", "c"]))?;
    let gone = watch_proxy.stats().gone - before;
    ensure!(gone > 0, "no watch ended with 410 Gone");
    expect_no_failures(loads, &["a", "b", "c"])
}

/// Number of Services that are created, changed and deleted, with manual slices.
const SERVICES: u64 = 8;

fn reordered_and_repeated_watch_events_converge(fixture: &Fixture) -> Result<()> {
    let namespace = fixture.control_plane.namespace("mixed")?;
    let steady = Steady::new(fixture, &namespace)?;
    let loads = steady.load(fixture)?;
    let watch_proxy = fixture.watch_proxy.as_ref().context("no mixer")?;
    let addresses = steady.backends.each_ref().map(|backend| backend.kubelet.addresses()[0]);
    let mut random = Random::from_env();
    let mut exists = [false; SERVICES as usize];
    for _ in 0..scaled_count(6) {
        for _ in 0..60 {
            let nth = random.below(SERVICES) as usize;
            let name = format!("s{nth}");
            if exists[nth] {
                exists[nth] = change(&namespace, &name, &mut random, addresses)?;
            } else {
                make(&namespace, &name, &mut random, addresses)?;
                exists[nth] = true;
            }
        }
        fixture.verify()?;
    }
    // Sockets see the last state.
    for nth in (0..SERVICES).filter(|nth| exists[*nth as usize]) {
        let name = format!("s{nth}");
        namespace.patch_service(
            &name,
            json!({"spec": {
                "ports": ports(80), "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
            }}),
        )?;
        set_slice(&namespace, &name, &[addresses[1]])?;
    }
    for nth in (0..SERVICES).filter(|nth| exists[*nth as usize]) {
        let service: Service = namespace.objects().get(namespace.name(), &format!("s{nth}"))?;
        fixture.expect(&fixture.all_clients(), tcp(&service, 80)?, &Outcome::names(&["b"]))?;
    }
    let mixed = watch_proxy.stats();
    println!("{mixed:?}");
    ensure!(
        mixed.reordered > 20 && mixed.repeated > 20 && mixed.ended > 2,
        "the proxy changed too few events: {mixed:?}"
    );
    fixture.expect(&fixture.all_clients(), steady.target, &Outcome::names(&["a", "b"]))?;
    expect_no_failures(loads, &["a", "b"])
}

fn ports(port: u16) -> Value {
    json!([{"name": "http", "port": port, "targetPort": TARGET}])
}

/// Creates a Service at a fixed address, and its slice, in either order.
fn make(namespace: &Namespace<'_>, name: &str, random: &mut Random, addresses: [IpAddr; 2]) -> Result<()> {
    let number: u8 = name.trim_start_matches('s').parse()?;
    let address = SocketAddr::from(([10, 96, 0, 100 + number], 80)).ip();
    let first = random.next_bool();
    if first {
        set_slice(namespace, name, &addresses[..1])?;
    }
    namespace.create_service(name, json!({"clusterIP": address, "ports": ports(80)}))?;
    if !first {
        set_slice(namespace, name, &addresses)?;
    }
    Ok(())
}

/// Changes a Service or its slice, or deletes both. Returns whether the Service still exists.
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
            let affinity = if random.next_bool() { "ClientIP" } else { "None" };
            namespace.patch_service(name, json!({"spec": {"sessionAffinity": affinity}}))?;
        }
        5 => {
            let policy = if random.next_bool() { "Local" } else { "Cluster" };
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

/// Creates the slice of a Service, or replaces its endpoints.
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
