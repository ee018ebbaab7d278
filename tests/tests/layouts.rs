//! Starts over the pins of a newer layout: maps that can be read are taken over under load, and the loss of others is reported. The
//! directory of this build's layout is renamed to stand for that of a newer one.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use lb_common::abi::{Addr, MAPS, VERSION, map_name, map_spec};
use lb_tests::fixture::TwoNodeFixture;
use lb_tests::manifests::vips;
use lb_tests::workload::Workload;
use lb_tests::{Agent, Connect, Pod, scaled_count_above, scaled_timeout, testbed};

/// Number of starts over a newer layout.
const ROUNDS: u64 = 3;
/// Connections that are held open.
const HELD: u32 = 20;
/// The node port of the first Service of a [`Workload`].
const NODE_PORT: u16 = 30080;

/// Renames the directory of this build's layout to that of a newer one while no agent runs, and returns the directory of its maps.
fn make_layout_newer(agent: &Agent) -> Result<PathBuf> {
    let [own, newer] = [VERSION, VERSION + 1].map(|layout| agent.pin_path().join(format!("v{layout}")));
    fs::rename(&own, &newer).with_context(|| format!("renaming {}", own.display()))?;
    Ok(newer.join("maps"))
}

/// Pins a new map with these properties.
fn pin_map(pin: &Path, properties: &str) -> Result<()> {
    let output = Command::new("bpftool")
        .args(["map", "create"])
        .arg(pin)
        .args(properties.split(' '))
        .output()
        .context("running bpftool")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Pins a map that this build does not know.
fn pin_unknown_map(maps: &Path) -> Result<()> {
    pin_map(&maps.join("MADE_UP"), "type array key 4 value 8 entries 1 name MADE_UP")
}

/// Replaces NODE_ADDRS by a map that has more entries than this build has room for.
fn replace_node_addrs(maps: &Path) -> Result<()> {
    let (pin, entries) = (
        maps.join(map_name::NODE_ADDRS),
        map_spec::NODE_ADDRS.default_capacity() + 100,
    );
    fs::remove_file(&pin).with_context(|| format!("removing {}", pin.display()))?;
    pin_map(
        &pin,
        &format!("type hash key 16 value 4 entries {entries} name NODE_ADDRS"),
    )?;
    let mut map: HashMap<_, [u8; 16], u32> = Map::HashMap(MapData::from_pin(&pin)?).try_into()?;
    for number in 0..entries {
        let [_, _, high, low] = number.to_be_bytes();
        map.insert(Addr::from_v4([240, 0, high, low]).bytes, 0_u32, 0)?;
    }
    Ok(())
}

/// Fails if there are pins of maps that this build does not know.
fn check_pins(agent: &Agent) -> Result<()> {
    let maps = agent.pin_path().join(format!("v{VERSION}/maps"));
    for pin in fs::read_dir(&maps).with_context(|| format!("listing {}", maps.display()))? {
        let name = pin?.file_name();
        ensure!(MAPS.iter().any(|map| name == map.name), "{name:?} is still pinned");
    }
    Ok(())
}

/// Returns the maps that the agent reports as lost.
fn lost_maps(agent: &Agent) -> Result<Vec<&'static str>> {
    let problems = agent.status()?.problems;
    let is_between = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
    let words: Vec<_> = problems
        .iter()
        .filter(|problem| problem.place == "maps")
        .flat_map(|problem| problem.message.split(is_between))
        .collect();
    Ok(MAPS
        .iter()
        .map(|map| map.name)
        .filter(|name| words.contains(name))
        .collect())
}

/// Gives maps names that this build does not know.
fn rename(maps: &Path, names: &[&str]) -> Result<()> {
    names.iter().try_for_each(|map| {
        fs::rename(maps.join(map), maps.join(format!("{map}_OTHER"))).with_context(|| format!("renaming {map}"))
    })
}

/// Starts the agent of the first node again after it was killed, over a newer layout whose maps `change` has changed.
fn start_over(fixture: &mut TwoNodeFixture, change: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let agent = &mut fixture.agents[0];
    agent.kill()?;
    change(&make_layout_newer(agent)?)?;
    agent.start_again()?;
    agent.wait_ready(&|| false)?;
    agent.check_layout(VERSION)
}

/// Returns the address of the first Service of a [`Workload`].
fn web() -> SocketAddr {
    SocketAddr::new(vips(20)[0], 80)
}

/// Fails unless new connections from a pod and through the node port succeed.
fn check_new_connections(fixture: &TwoNodeFixture, pod: &Pod) -> Result<()> {
    let node_port = SocketAddr::new(IpAddr::from(fixture.node("n1").address()), NODE_PORT);
    testbed()
        .connect(pod, &Connect::to(&[web()]).count(20).peer_check())?
        .all_well()?;
    testbed()
        .connect(fixture.client(), &Connect::to(&[node_port]).count(20))?
        .all_well()
}

#[test]
fn maps_of_a_newer_layout_are_taken_over() -> Result<()> {
    let mut workload = Workload::new(&[])?;
    workload.run(scaled_count_above(ROUNDS, 1), |fixture, _| {
        let agent = &mut fixture.agents[0];
        agent.kill()?;
        pin_unknown_map(&make_layout_newer(agent)?)?;
        agent.start_again()?;
        agent.wait_ready(&|| false)?;
        agent.check_layout(VERSION)?;
        check_pins(agent)?;
        agent.check_problems()
    })
}

#[test]
fn maps_that_cannot_be_read_are_lost_and_named() -> Result<()> {
    let mut workload = Workload::new(&[])?;
    let fixture = &mut workload.fixture;
    let pod = fixture.cluster.add_pod("n1", "pod")?;
    let held = testbed().hold(&pod, &[web()], HELD)?;
    start_over(fixture, |maps| {
        rename(maps, &[map_name::CT, map_name::STATS])?;
        replace_node_addrs(maps)
    })?;
    let lost = lost_maps(&fixture.agents[0])?;
    ensure!(lost == [map_name::CT, map_name::CT_NEW, map_name::STATS], "{lost:?}");
    check_new_connections(fixture, &pod)?;
    let held = held.finish()?;
    ensure!((held.held, held.live) == (HELD.into(), HELD.into()), "{held:?}");
    Ok(())
}

#[test]
fn without_readable_services_the_maps_are_made_from_the_source() -> Result<()> {
    let mut workload = Workload::new(&[])?;
    let fixture = &mut workload.fixture;
    let pod = fixture.cluster.add_pod("n1", "pod")?;
    let held = testbed().hold(&pod, &[web()], HELD)?;
    let connect = Connect::to(&[web()]);
    let connect = connect
        .threads(2)
        .rate(200.0)
        .timeout(scaled_timeout(Duration::from_secs(5)));
    let load = testbed().start(&pod, &connect)?;
    start_over(fixture, |maps| rename(maps, &[map_name::SERVICES]))?;
    let lost = lost_maps(&fixture.agents[0])?;
    ensure!(lost.contains(&map_name::SERVICES), "{lost:?}");
    check_new_connections(fixture, &pod)?;
    let summary = load.stop()?;
    println!("{} connections", summary.connections);
    summary.all_well()?;
    let held = held.finish()?;
    ensure!((held.held, held.live) == (HELD.into(), HELD.into()), "{held:?}");
    Ok(())
}
