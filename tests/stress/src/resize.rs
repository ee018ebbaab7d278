//! Resizes: the maps grow and shrink between two changes, while the lookups continue.

use std::sync::{PoisonError, RwLock};

use anyhow::{Result, bail};
use lb_common::abi::SizedMap;
use lb_core::maps::Capacities;

use crate::in_process_agent::{CAPACITIES, InProcessAgent};
use crate::probe::Probe;
use crate::workload::{ChangeKind, Workload};

/// Factor between the two capacities of a map.
const FACTOR: u32 = 4;
/// Number of changes after which the content must fit into smaller maps. Usually none or a few are enough.
const MAX_CHANGES: usize = 1000;

/// Returns the maps of each resize in this many rounds: every map alone, then all maps together.
#[must_use]
pub fn resize_rounds(rounds: usize) -> Vec<&'static [SizedMap]> {
    (0..rounds)
        .flat_map(|_| SizedMap::ALL.chunks(1).chain([SizedMap::ALL]))
        .collect()
}

/// Returns the capacities when these maps have grown.
pub(crate) fn grown(maps: &[SizedMap]) -> Capacities {
    CAPACITIES.map(|map, entries| if maps.contains(&map) { entries * FACTOR } else { entries })
}

/// Replaces the maps that do not have these capacities, then the probe by one that uses the new maps.
///
/// lb's own programs are switched to the new maps before the agent writes to those. So the lookups read the former maps, which
/// remain complete, until the probe is replaced, and the caller changes nothing before that.
pub(crate) fn resize(
    agent: &mut InProcessAgent,
    workload: &mut Workload,
    probe: &RwLock<Probe>,
    to: Capacities,
) -> Result<()> {
    fit(agent, workload, &to)?;
    agent.resize(to)?;
    let new = Probe::load(&agent.lock().pins().maps(), &to)?;
    // The lock waits until no reader uses the former probe.
    probe.write().unwrap_or_else(PoisonError::into_inner).replace_by(new)
}

/// Changes Services until the content of the maps fits: entries at high positions, which were in use when the maps were
/// larger, pass to lower ones.
fn fit(agent: &mut InProcessAgent, workload: &mut Workload, capacities: &Capacities) -> Result<()> {
    let kinds = [ChangeKind::Endpoints, ChangeKind::Services];
    for kind in kinds.into_iter().cycle().take(MAX_CHANGES) {
        let needed = agent.reconciler()?.needed();
        if SizedMap::ALL.iter().all(|map| needed[*map] <= capacities[*map]) {
            return Ok(());
        }
        agent.apply(workload.end_overflow())?;
        agent.apply(workload.change(kind))?;
        agent.reconciler()?.settle()?;
    }
    bail!("after {MAX_CHANGES} changes, the content of the maps does not fit into {capacities:?}")
}
