//! `status`: attached programs, map usage, drops and problems.

use std::collections::BTreeSet;

use lb_common::abi::{DropReason, SizedMap, VERSION};
use lb_core::maps::memory;
use lb_core::names::text;
use lb_core::reconcile::Usage;
use serde::Serialize;

use super::devices::{self, DeviceRow};
use super::{Format, ReadArgs, output};
use crate::loader::{self, Lock};

#[derive(Debug, Serialize)]
struct Status {
    pin_path: String,
    abi: u32,
    agent: Agent,
    programs: Vec<ProgramRow>,
    devices: Vec<DeviceRow>,
    maps: Vec<MapRow>,
    map_memory: MapMemory,
    drops: Vec<DropRow>,
    problems: Vec<ProblemRow>,
}

/// The agent, from the STATE that it last wrote.
#[derive(Debug, Serialize)]
struct Agent {
    running: bool,
    pid: u32,
    version: String,
    node: String,
    netns_cookie: u64,
    cgroup: u64,
    started: u64,
    applied: u64,
    applies: u64,
    complete: bool,
}

#[derive(Debug, Serialize)]
struct ProgramRow {
    name: String,
    attached: bool,
    id: u32,
    tag: String,
    cgroup: u64,
}

#[derive(Debug, Serialize)]
struct MapRow {
    name: &'static str,
    used: usize,
    capacity: u32,
    /// Kernel memory in bytes that the map takes when it is full, with the maps of the same number of entries.
    memory: u64,
    flag: &'static str,
}

/// Kernel memory of all maps with a number of entries that the agent chooses.
#[derive(Debug, Serialize)]
struct MapMemory {
    /// Bytes that the maps take when they are full.
    bytes: u64,
    /// Largest number of bytes to which maps grow, as the agent last computed it; `null` if none is known.
    limit: Option<u64>,
}

#[derive(Debug, Serialize)]
struct DropRow {
    reason: &'static str,
    text: &'static str,
    count: u64,
}

#[derive(Debug, Serialize)]
struct ProblemRow {
    place: String,
    message: String,
}

pub(super) fn status(args: &ReadArgs) -> anyhow::Result<()> {
    let pins = args.pin.pins();
    let maps = args.pin.open()?;
    let dump = maps.dump()?;
    let running = Lock::is_taken(&pins);
    let state = maps.state();
    let string = |field: &[u8]| text(field).unwrap_or("?").to_owned();
    let agent = Agent {
        running,
        pid: state.map_or(0, |s| s.pid),
        version: state.map_or_else(String::new, |s| string(&s.version)),
        node: state.map_or_else(String::new, |s| string(&s.node)),
        netns_cookie: state.map_or(0, |s| s.netns),
        cgroup: state.map_or(0, |s| s.cgroup),
        started: state.map_or(0, |s| s.started),
        applied: state.map_or(0, |s| s.applied),
        applies: state.map_or(0, |s| s.applies),
        complete: state.is_some_and(|s| s.complete != 0),
    };
    let mut problems: Vec<_> = maps
        .problems()?
        .iter()
        .map(|problem| ProblemRow {
            place: string(&problem.place),
            message: string(&problem.message),
        })
        .collect();
    if let Some(more) = state.map(|s| s.more_problems).filter(|more| *more > 0) {
        problems.push(ProblemRow {
            place: "status".into(),
            message: format!("{more} more problems are in the log of the agent"),
        });
    }
    let programs: Vec<_> = loader::attached(&pins)?
        .into_iter()
        .map(|(name, at)| ProgramRow {
            name: name.into(),
            attached: at.as_ref().is_some_and(|at| at.cgroup != 0),
            id: at.as_ref().map_or(0, |at| at.program),
            tag: at.as_ref().map_or_else(String::new, |at| format!("{:016x}", at.tag)),
            cgroup: at.map_or(0, |at| at.cgroup),
        })
        .collect();
    let below: BTreeSet<u64> = programs
        .iter()
        .filter(|p| p.attached && !loader::is_root_cgroup(p.cgroup))
        .map(|p| p.cgroup)
        .collect();
    problems.extend(below.into_iter().map(|cgroup| ProblemRow {
        place: format!("cgroup {cgroup}"),
        message: "not the root of the hierarchy: processes outside of it get no socket-level load balancing".into(),
    }));
    let devices = devices::rows(&maps, &pins).unwrap_or_else(|error| {
        problems.push(ProblemRow {
            place: "devices".into(),
            message: output::chain(&error),
        });
        Vec::new()
    });
    let filled = Usage::of(&dump);
    let capacities = maps.capacities();
    let cpus = aya::util::nr_cpus().map_err(|(path, error)| anyhow::anyhow!("{path}: {error}"))? as u32;
    let limit = state.map(|s| u64::from(s.map_memory) << 20);
    let map_memory = MapMemory {
        bytes: memory::total(&capacities, cpus),
        limit: limit.filter(|limit| *limit > 0),
    };
    let maps_rows = SizedMap::ALL
        .iter()
        .map(|map| {
            Ok(MapRow {
                name: map.name(),
                used: maps.used(*map, &filled)?,
                capacity: capacities[*map],
                memory: memory::of(*map, capacities[*map], cpus),
                flag: map.flag(),
            })
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let drops = DropReason::ALL
        .iter()
        .map(|reason| {
            Ok(DropRow {
                reason: reason.label(),
                text: reason.text(),
                count: maps.drops(*reason)?,
            })
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let status = Status {
        pin_path: pins.root().display().to_string(),
        abi: VERSION,
        agent,
        programs,
        devices,
        maps: maps_rows,
        map_memory,
        drops,
        problems,
    };
    match args.output {
        Format::Json => output::json(&status),
        Format::Table => print(&status),
    }
}

/// Returns a number of bytes as text.
fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// Returns the number of batches that were applied, in words.
fn applied(batches: u64) -> String {
    let noun = if batches == 1 { "batch" } else { "batches" };
    format!("{batches} {noun} applied")
}

fn print(status: &Status) -> anyhow::Result<()> {
    let Status {
        pin_path,
        abi,
        agent,
        programs,
        devices,
        maps,
        map_memory,
        drops,
        problems,
    } = status;
    let running = if agent.running {
        "running"
    } else {
        "not running (pinned programs go on serving)"
    };
    output::print(&format!(
        "agent      {running}, pid {}, version {}, node {}",
        agent.pid, agent.version, agent.node
    ))?;
    let complete = if agent.complete {
        "all objects applied"
    } else {
        "waiting for the initial lists of the source"
    };
    output::print(&format!("state      {}, {complete}", applied(agent.applies)))?;
    output::print(&format!("pinned     {pin_path}, layout v{abi}"))?;
    output::print("")?;
    output::rows(
        Format::Table,
        ["PROGRAM", "ATTACHED", "ID", "TAG", "CGROUP"],
        programs,
        |p| {
            let attached = if p.attached { "yes" } else { "NO" };
            [
                p.name.clone(),
                attached.into(),
                p.id.to_string(),
                p.tag.clone(),
                p.cgroup.to_string(),
            ]
        },
    )?;
    if !devices.is_empty() {
        output::print("")?;
        devices::print(devices)?;
    }
    output::print("")?;
    output::rows(
        Format::Table,
        ["MAP", "USED", "CAPACITY", "MEMORY", "BOUND"],
        maps,
        |m| {
            [
                m.name.into(),
                m.used.to_string(),
                m.capacity.to_string(),
                mib(m.memory),
                format!("--{}", m.flag),
            ]
        },
    )?;
    let limit = map_memory
        .limit
        .map_or_else(String::new, |limit| format!(", limit {}", mib(limit)));
    output::print(&format!(
        "memory of these maps when full: {}{limit} (--map-memory)",
        mib(map_memory.bytes)
    ))?;
    let counted: Vec<_> = drops.iter().filter(|drop| drop.count > 0).collect();
    if !counted.is_empty() {
        output::print("")?;
        output::rows(Format::Table, ["COUNT", "REASON"], &counted, |d| {
            [d.count.to_string(), d.text.into()]
        })?;
    }
    if !problems.is_empty() {
        output::print("")?;
        output::print_pairs(["PROBLEM", ""], problems, |p| [p.place.clone(), p.message.clone()])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn applied_batches_are_counted_in_words() {
        assert_eq!(applied(1), "1 batch applied");
        assert_eq!(applied(2), "2 batches applied");
    }
}
