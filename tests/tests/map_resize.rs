//! Other sizes of maps, under load: at a start with other flags, and in the running agent when the use of maps changes. The maps
//! are replaced, and every connection, flow and counter survives.

use std::collections::BTreeMap;
use std::env;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lb_agent::loader::PinPath;
use lb_agent::maps::ct::CtMaps;
use lb_common::abi::{Addr, CtEntry, CtKey, SizedMap, ip_protocol};
use lb_common::logic::ct::reverse_key;
use lb_core::maps::Capacities;
use lb_tests::fixture::TwoNodeFixture;
use lb_tests::manifests::{Manifests, Port, service, slice, vips};
use lb_tests::workload::Workload;
use lb_tests::{
    Agent, Cluster, Connect, Pod, Process, RunningAgent, monotonic_ns, scaled_count_above, scaled_timeout, testbed,
};
use serde_json::Value;

/// Number of times that maps grow and shrink.
const ROUNDS: u64 = 4;
/// Variable with another number of times; `cargo xtask stress --resize` sets it.
const ROUNDS_VARIABLE: &str = "LB_RESIZES";
/// Factor between the two sizes.
const FACTOR: u32 = 4;
/// Port of the servers of the many Services.
const SERVER_PORT: u16 = 8081;

/// Held by each test: its clients load all processors, and waits for sizes have a limit.
static TURN: Mutex<()> = Mutex::new(());

/// Waits for the other tests of this program.
fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the smaller size of a map. Closed flows stay in CT for two minutes: 48,000 entries at 200 connections per second,
/// and a fourth of that in reserve.
fn small(map: SizedMap) -> u32 {
    match map {
        SizedMap::Services | SizedMap::Backends | SizedMap::Sockets => 64,
        SizedMap::Frontends | SizedMap::BackendSlots | SizedMap::UdpFlows => 128,
        SizedMap::Affinity => 1024,
        SizedMap::SocketsMore => 4096,
        SizedMap::ConntrackNew => 1 << 14,
        SizedMap::Conntrack => 1 << 17,
    }
}

/// Returns the sizes of all maps when some have grown.
fn sizes_with(grown: &[SizedMap]) -> Capacities {
    Capacities::uniform(0).map(|map, _| small(map) * if grown.contains(&map) { FACTOR } else { 1 })
}

/// Returns the flags that set the sizes of all maps: as both limits.
fn flags(sizes: &Capacities) -> Vec<String> {
    let flag = |map: &SizedMap| {
        let size = sizes[*map].to_string();
        [minimum_flag(*map), size.clone(), format!("--{}", map.flag()), size]
    };
    SizedMap::ALL.iter().flat_map(flag).collect()
}

/// Returns the hidden flag for the smallest size of a map.
fn minimum_flag(map: SizedMap) -> String {
    format!("--{}", map.flag().replace("max-", "min-"))
}

/// Returns the sizes of all maps.
fn sizes(agent: &Agent) -> Result<Capacities> {
    let status: Value = agent.json(&["status"])?;
    let rows = status["maps"].as_array().context("maps")?;
    let mut sizes = Capacities::uniform(0);
    for map in SizedMap::ALL {
        let row = rows.iter().find(|row| row["name"] == map.name()).context("a map")?;
        sizes = sizes.with(*map, row["capacity"].as_u64().context("a capacity")? as u32);
    }
    Ok(sizes)
}

/// Waits until an agent serves this number of Services, and runs `verify`, which reads all manifests again.
fn wait_for_services(agent: &mut RunningAgent, number: u32) -> Result<()> {
    agent.wait("serving all Services", |agent| {
        let used = agent.status()?.used("SERVICES")?;
        ensure!(used >= number.into(), "{used} of {number} Services");
        Ok(())
    })?;
    agent.verify()
}

/// Waits until an agent replaces maps, kills it, and starts it again.
fn kill_while_maps_are_replaced(agent: &mut RunningAgent) -> Result<()> {
    let next = PinPath::new(agent.pin_path()).maps().with_file_name("next");
    let deadline = Instant::now() + scaled_timeout(Duration::from_secs(30));
    while !next.exists() {
        ensure!(Instant::now() < deadline, "no maps are replaced");
        thread::sleep(Duration::from_millis(1));
    }
    // Loading the programs takes most of the time.
    thread::sleep(scaled_timeout(Duration::from_millis(300)));
    agent.kill()?;
    println!("killed, while next exists: {}", next.exists());
    agent.start_again()
}

/// Returns manifests of Services with one port and the given endpoints each.
fn many_services(numbers: Range<u32>, endpoints: &[(IpAddr, &str)]) -> String {
    let (port, target) = (Port::tcp("web", 80), Port::tcp("web", SERVER_PORT));
    let one = |number: u32| {
        let [_, _, c, d] = (number + 1).to_be_bytes();
        let name = format!("many-{number}");
        service(&name, &format!("10.97.{c}.{d}"), &[port], "") + &slice(&name, target, endpoints)
    };
    numbers.map(one).collect()
}

/// Returns the address of a Service of [`many_services`].
fn address_of(number: u32) -> SocketAddr {
    let [_, _, c, d] = (number + 1).to_be_bytes();
    SocketAddr::from(([10, 97, c, d], 80))
}

/// Returns the number of times that maps grow and shrink.
fn rounds() -> Result<u64> {
    let set: Option<u64> = env::var(ROUNDS_VARIABLE).ok().map(|text| text.parse()).transpose()?;
    Ok(set.unwrap_or_else(|| scaled_count_above(ROUNDS, 1)))
}

/// Returns the maps that grow in a round: all maps and one map alternately, so that twenty rounds have each map alone.
fn maps_of_round(round: u64) -> &'static [SizedMap] {
    if round.is_multiple_of(2) {
        return SizedMap::ALL;
    }
    let one = round as usize / 2 % SizedMap::COUNT;
    &SizedMap::ALL[one..=one]
}

#[test]
fn maps_grow_and_shrink_under_load_without_a_failed_connection() -> Result<()> {
    let _turn = turn();
    let first = flags(&sizes_with(&[]));
    let mut workload = Workload::new(&first.iter().map(String::as_str).collect::<Vec<_>>())?;
    workload.run(2 * rounds()?, |fixture, step| {
        let grown = if step % 2 == 0 { maps_of_round(step / 2) } else { &[] };
        let expected = sizes_with(grown);
        let agent = &mut fixture.agents[0];
        agent.kill()?;
        let flags = flags(&expected);
        let flags: Vec<_> = flags.iter().map(String::as_str).collect();
        let start = Instant::now();
        agent.start_again_with(&flags)?;
        agent.wait_ready(&|| false)?;
        println!("grown: {grown:?}, started in {:?}", start.elapsed());
        let sizes = sizes(agent)?;
        ensure!(sizes == expected, "{sizes:?}, not {expected:?}");
        Ok(())
    })?;
    workload.fixture.agents[0].check_problems()?;
    let status = workload.fixture.agents[0].status()?;
    let dropped: Vec<_> = status.drops.iter().filter(|drop| drop.count > 0).collect();
    println!("drops: {dropped:?}");
    Ok(())
}

/// Returns the IPv4 endpoints of the fixture.
fn endpoints(fixture: &TwoNodeFixture) -> Vec<(IpAddr, &str)> {
    let all = fixture.endpoints().into_iter();
    all.filter(|(ip, _)| ip.is_ipv4()).collect()
}

/// Maps that hold Services.
const OF_SERVICES: [SizedMap; 4] = [
    SizedMap::Services,
    SizedMap::Frontends,
    SizedMap::Backends,
    SizedMap::BackendSlots,
];

/// Numbers of Services that a source delivers one after another.
const SERVICES: [u32; 3] = [300, 700, 1700];

#[test]
fn maps_grow_before_services_would_be_refused() -> Result<()> {
    let _turn = turn();
    let mut workload = Workload::new(&[])?;
    let before = sizes(&workload.fixture.agents[0])?;
    let client = workload.fixture.cluster.add_pod("n1", "more")?;
    workload.run(SERVICES.len() as u64, |fixture, round| {
        let last = SERVICES[round as usize];
        let first = round.checked_sub(1).map_or(0, |before| SERVICES[before as usize]);
        let text = many_services(first..last, &endpoints(fixture));
        let begun = Instant::now();
        fixture.manifests.write(&format!("many-{last}.yaml"), &text)?;
        let agent = &mut fixture.agents[0];
        if round as usize == SERVICES.len() - 1 {
            kill_while_maps_are_replaced(agent)?;
        }
        wait_for_services(agent, last)?;
        agent.check_problems()?;
        println!("{last} Services after {:?}, {:?}", begun.elapsed(), sizes(agent)?);
        let targets = [first, last - 1].map(address_of);
        testbed().connect(&client, &Connect::to(&targets).count(20))?.all_well()
    })?;
    let agent = &mut workload.fixture.agents[0];
    let after = sizes(agent)?;
    for map in OF_SERVICES {
        ensure!(
            after[map] > before[map] && after[map].is_power_of_two(),
            "{map:?}: {after:?}"
        );
    }
    // The next start keeps the sizes, and replaces nothing.
    agent.kill()?;
    agent.start_again()?;
    agent.wait_ready(&|| false)?;
    ensure!(sizes(agent)? == after, "{:?}", sizes(agent)?);
    agent.check_problems()
}

/// Creates a node with a client and a server.
fn one_node() -> Result<(Cluster, Manifests, Pod, Pod, Process)> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let manifests = Manifests::new(&cluster)?;
    let (client, pod) = (cluster.add_pod("n1", "client")?, cluster.add_pod("n1", "a")?);
    let server = testbed().serve(&pod, &[&format!("0.0.0.0:{SERVER_PORT}=a")])?;
    Ok((cluster, manifests, client, pod, server))
}

#[test]
fn first_start_creates_maps_for_the_services_of_its_source() -> Result<()> {
    let _turn = turn();
    let (cluster, manifests, client, pod, _server) = one_node()?;
    let ends = [(pod.address().into(), "n1")];
    manifests.write("many.yaml", &many_services(0..1000, &ends))?;
    let agent = manifests.serve(&cluster, "n1", &[])?;
    let sizes = sizes(&agent)?;
    ensure!(sizes[SizedMap::Services] == 2048, "{sizes:?}");
    agent.check_problems()?;
    // No program was attached that uses two maps.
    let log = agent.log_tail();
    ensure!(log.contains("replaced maps"), "{log}");
    let next = PinPath::new(agent.pin_path()).maps().with_file_name("next");
    ensure!(!next.exists(), "{}", next.display());
    testbed()
        .connect(&client, &Connect::to(&[address_of(0), address_of(999)]).count(20))?
        .all_well()
}

/// Connections that are held open in the test of growth with the number of sockets.
const HELD: u32 = 400;

#[test]
fn maps_of_programs_grow_and_shrink_with_their_use() -> Result<()> {
    let _turn = turn();
    let minimums = [
        (SizedMap::Sockets, 64),
        (SizedMap::SocketsMore, 1024),
        (SizedMap::Conntrack, 4096),
        (SizedMap::ConntrackNew, 2048),
    ];
    let minimum = |map| minimums.iter().find(|(of, _)| *of == map).map(|(_, size)| *size);
    let mut flags: Vec<_> = minimums
        .iter()
        .flat_map(|(map, size)| [minimum_flag(*map), size.to_string()])
        .collect();
    flags.extend(["--shrink-after", "10000"].map(String::from));
    let mut workload = Workload::new(&flags.iter().map(String::as_str).collect::<Vec<_>>())?;
    let client = workload.fixture.cluster.add_pod("n1", "more")?;
    workload.run(1, |fixture, _| {
        let web = SocketAddr::new(vips(20)[0], 80);
        let held = testbed().hold(&client, &[web], HELD)?;
        let agent = &mut fixture.agents[0];
        agent.wait("growing", |agent| {
            let sizes = sizes(agent)?;
            for map in [SizedMap::Sockets, SizedMap::Conntrack] {
                ensure!(Some(sizes[map]) > minimum(map), "{sizes:?}");
            }
            ensure!(
                sizes[SizedMap::ConntrackNew] >= sizes[SizedMap::Conntrack] / 2,
                "{sizes:?}"
            );
            Ok(())
        })?;
        println!("grown to {:?}", sizes(agent)?);
        agent.check_problems()?;
        let held = held.finish()?;
        ensure!((held.held, held.live) == (HELD.into(), HELD.into()), "{held:?}");
        agent.wait("shrinking", |agent| {
            let sizes = sizes(agent)?;
            // The workload needs more than the minimum.
            ensure!(sizes[SizedMap::Sockets] < HELD, "{sizes:?}");
            Ok(())
        })
    })?;
    workload.fixture.agents[0].check_problems()
}

#[test]
fn maps_of_services_shrink_after_the_services_are_removed() -> Result<()> {
    let _turn = turn();
    let mut workload = Workload::new(&["--shrink-after", "1000"])?;
    let before = sizes(&workload.fixture.agents[0])?;
    let client = workload.fixture.cluster.add_pod("n1", "more")?;
    // The indexes are used again, after those of before were dropped.
    workload.run(2, |fixture, _| {
        let [many, one] = [1200, 1].map(|number| many_services(0..number, &endpoints(fixture)));
        fixture.manifests.write("many.yaml", &many)?;
        let agent = &mut fixture.agents[0];
        wait_for_services(agent, 1200)?;
        let grown = sizes(agent)?;
        ensure!(OF_SERVICES.iter().all(|map| grown[*map] > before[*map]), "{grown:?}");
        testbed()
            .connect(&client, &Connect::to(&[address_of(1199)]).count(20))?
            .all_well()?;
        fixture.manifests.write("many.yaml", &one)?;
        let agent = &mut fixture.agents[0];
        agent.wait("shrinking", |agent| {
            let sizes = sizes(agent)?;
            ensure!(OF_SERVICES.iter().all(|map| sizes[*map] == before[*map]), "{sizes:?}");
            Ok(())
        })?;
        agent.check_problems()
    })
}

#[test]
fn memory_limit_is_a_problem_and_refuses_only_what_has_no_room() -> Result<()> {
    let _turn = turn();
    let (cluster, manifests, client, pod, _server) = one_node()?;
    let ends = [(pod.address().into(), "n1")];
    manifests.write("a.yaml", &many_services(0..10, &ends))?;
    let mut agent = manifests.serve(&cluster, "n1", &["--map-memory", "1Mi"])?;
    let before = sizes(&agent)?;
    manifests.write("b.yaml", &many_services(10..2000, &ends))?;
    agent.wait("reporting the limit", |agent| {
        let problems = agent.status()?.problems;
        let names = |text: &str| {
            problems
                .iter()
                .any(|p| p.place == "SERVICES" && p.message.contains(text))
        };
        ensure!(names("--map-memory"), "{problems:?}");
        let status: Value = agent.json(&["status"])?;
        ensure!(status["map_memory"]["limit"] == 1 << 20, "{}", status["map_memory"]);
        Ok(())
    })?;
    ensure!(sizes(&agent)? == before, "{:?}", sizes(&agent)?);
    let targets: Vec<_> = (0..10).map(address_of).collect();
    testbed()
        .connect(&client, &Connect::to(&targets).count(50))?
        .all_well()?;
    // With more memory, the next start serves all of them.
    agent.kill()?;
    agent.start_again_with(&["--map-memory", "1Gi"])?;
    agent.wait_ready(&|| false)?;
    agent.check_problems()?;
    testbed()
        .connect(&client, &Connect::to(&[address_of(1999)]).count(20))?
        .all_well()
}

/// Number of flows of the large map.
const FLOWS: u32 = 50_000;

#[test]
fn a_large_conntrack_map_is_replaced_as_a_whole() -> Result<()> {
    let _turn = turn();
    let cluster = Cluster::builder().nodes(1).build()?;
    let manifests = Manifests::new(&cluster)?;
    let size = 3 * FLOWS;
    let mut agent = manifests.serve(&cluster, "n1", &["--min-conntrack", &size.to_string()])?;
    let maps = PinPath::new(agent.pin_path()).maps();
    agent.kill()?;
    let flows = scaled_count_above(FLOWS.into(), 1000) as u32;
    let mut before = CtMaps::open(&maps)?;
    for flow in 0..flows {
        let [_, a, b, c] = flow.to_be_bytes();
        let key = CtKey {
            src: Addr::from_v4([203, a, b, c]),
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
            ..CtEntry::default()
        };
        before.established.insert(&key, &entry)?;
        before.established.insert(&reverse_key(&entry, key.proto), &entry)?;
    }
    let before: BTreeMap<_, _> = before.established.all()?.into_iter().collect();
    let start = Instant::now();
    agent.start_again_with(&["--min-conntrack", &(2 * size).to_string()])?;
    agent.wait_ready(&|| false)?;
    ensure!(sizes(&agent)?[SizedMap::Conntrack] == 2 * size);
    println!("{} entries, ready after {:?}", before.len(), start.elapsed());
    let after: BTreeMap<_, _> = CtMaps::open(&maps)?.established.all()?.into_iter().collect();
    ensure!(before.len() == 2 * flows as usize, "{} entries", before.len());
    ensure!(
        before == after,
        "{} entries before, {} after",
        before.len(),
        after.len()
    );
    Ok(())
}
