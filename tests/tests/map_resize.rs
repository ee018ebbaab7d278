//! Starts with other sizes of maps, under load: the maps are replaced, and every connection, flow and counter survives.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use lb_agent::loader::PinPath;
use lb_agent::maps::ct::CtMaps;
use lb_common::abi::{Addr, CtEntry, CtKey, SizedMap, ip_protocol};
use lb_common::logic::ct::reverse_key;
use lb_tests::manifests::Manifests;
use lb_tests::workload::Workload;
use lb_tests::{Agent, Cluster, monotonic_ns, scaled_count_above};
use serde_json::Value;

/// Number of times that the maps grow and shrink.
const ROUNDS: u64 = 4;
/// Factor between the two sizes.
const FACTOR: u32 = 4;
/// Returns the smaller size of a map. Closed flows stay in CT for two minutes.
fn small(map: SizedMap) -> u32 {
    match map {
        SizedMap::Services | SizedMap::Backends | SizedMap::Sockets => 64,
        SizedMap::Frontends | SizedMap::BackendSlots | SizedMap::UdpFlows => 128,
        SizedMap::Affinity => 1024,
        SizedMap::SocketsMore => 4096,
        SizedMap::ConntrackNew => 1 << 14,
        SizedMap::Conntrack => 1 << 16,
    }
}

/// Returns the flags that set the sizes of all maps.
fn flags(factor: u32) -> Vec<String> {
    let flag = |map: &SizedMap| [format!("--{}", map.flag()), (small(*map) * factor).to_string()];
    SizedMap::ALL.iter().flat_map(flag).collect()
}

/// Fails unless every map has its size.
fn check_sizes(agent: &Agent, factor: u32) -> Result<()> {
    let status: Value = agent.json(&["status"])?;
    let rows = status["maps"].as_array().context("maps")?;
    for map in SizedMap::ALL {
        let row = rows.iter().find(|row| row["name"] == map.name()).context("a map")?;
        ensure!(
            row["capacity"] == small(*map) * factor,
            "{row}: not {factor} times {}",
            small(*map)
        );
    }
    Ok(())
}

#[test]
fn maps_grow_and_shrink_under_load_without_a_failed_connection() -> Result<()> {
    let first = flags(1);
    let mut workload = Workload::new(&first.iter().map(String::as_str).collect::<Vec<_>>())?;
    workload.run(2 * scaled_count_above(ROUNDS, 1), |fixture, round| {
        let factor = if round % 2 == 0 { FACTOR } else { 1 };
        let agent = &mut fixture.agents[0];
        agent.kill()?;
        let flags = flags(factor);
        let flags: Vec<_> = flags.iter().map(String::as_str).collect();
        let start = Instant::now();
        agent.start_again_with(&flags)?;
        agent.wait_ready(&|| false)?;
        println!("factor {factor}: started in {:?}", start.elapsed());
        check_sizes(agent, factor)
    })?;
    let status = workload.fixture.agents[0].status()?;
    ensure!(
        status.problems.iter().all(|p| p.place.starts_with("cgroup")),
        "{:?}",
        status.problems
    );
    let dropped: Vec<_> = status.drops.iter().filter(|drop| drop.count > 0).collect();
    println!("drops: {dropped:?}");
    Ok(())
}

/// Number of flows of the large map.
const FLOWS: u32 = 50_000;

#[test]
fn a_large_conntrack_map_is_replaced_as_a_whole() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let manifests = Manifests::new(&cluster)?;
    let mut agent = manifests.serve(&cluster, "n1", &[])?;
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
    let size = (2 * SizedMap::Conntrack.default_capacity()).to_string();
    let start = Instant::now();
    agent.start_again_with(&["--max-conntrack", &size])?;
    agent.wait_ready(&|| false)?;
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
