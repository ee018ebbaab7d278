//! Moves: pinned maps are replaced by maps of another size while the programs serve.
//!
//! 1. The new maps are pinned in `next/`, and programs that use both are loaded. The maps that only the agent fills are copied.
//! 2. The programs at all hooks are replaced one by one, in any order: those of before and those that use both insert into the old
//!    maps.
//! 3. [`MovePhase::Copy`] is stored: all programs insert into the new maps, and look up the new maps, then the old ones.
//! 4. The entries of the old maps are copied. None is removed there, so that no lookup misses.
//! 5. [`MovePhase::Rename`] is stored, the pins of the new maps replace those of the old maps, and programs that use the new maps only
//!    are loaded and replace those of step 2.
//!
//! A start that was killed in between leaves `next/` with MOVE, which has the phase. The next start continues from there.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use lb_common::abi::{MAPS, MOVE_MAP, MapSpec, MovePhase, SizedMap};
use lb_core::maps::Capacities;
use lb_core::maps::resize::{Kept, Recovery, Resize};
use lb_core::model::{Problem, ProblemKind};
use tracing::{info, warn};

use super::{LoadError, Loading, PinPath, attach, tc};
use crate::maps::bpf::PinnedMaps;
use crate::maps::moves::{PhaseMap, wait_for_programs};

fn failed(path: &Path, call: &'static str) -> impl FnOnce(io::Error) -> LoadError {
    let path = path.to_owned();
    move |source| LoadError::Call { path, call, source }
}

/// The pinned maps after all moves.
#[derive(Debug, Default)]
pub(super) struct Moved {
    /// Programs that are attached use maps that are no longer pinned.
    pub(super) has_old_programs: bool,
    /// Maps that do not have the size that their flag requires.
    pub(super) problems: Vec<Problem>,
}

/// Completes the move of an earlier start, and replaces the pinned maps that do not have the required size.
///
/// # Errors
/// Returns a [`LoadError`] if the pins are of another layout, or if a move that must be completed fails.
pub(super) fn resize(loading: &Loading<'_>, wanted: &Capacities) -> Result<Moved, LoadError> {
    let mut moved = Moved::default();
    if loading.pins.next().exists() {
        moved.has_old_programs = true;
        moved.problems.extend(lost_problem(recover(loading)?));
    }
    if !MAPS.iter().all(|map| loading.pins.maps().join(map.name).exists()) {
        // The first start was killed before it had pinned all maps. Nothing is attached.
        return Ok(moved);
    }
    let old = PinnedMaps::open(&loading.pins.maps())?;
    let resize = Resize::new(old.capacities(), wanted, &old.needed()?);
    moved.problems.extend(resize.kept.iter().map(problem_of));
    if !resize.is_needed() {
        return Ok(moved);
    }
    if old.state().is_some_and(|state| state.netns != loading.netns) {
        moved.problems.push(problem(
            "maps",
            "the maps keep their sizes, since they were made in another network namespace; the next start replaces them".into(),
        ));
        return Ok(moved);
    }
    moved.has_old_programs = true;
    let replaced = Replaced::new(loading.pins, |map| resize.replaces(map));
    match prepare(loading, &old, &replaced, &resize.to) {
        Ok(programs) => {
            moved
                .problems
                .extend(lost_problem(finish(loading, &programs, &replaced)?));
            for &map in SizedMap::ALL {
                let (from, to) = (old.capacities()[map], resize.to[map]);
                if from != to {
                    info!(map = map.name(), from, to, "replaced a map by one of another size");
                }
            }
        }
        Err(error) => {
            warn!(%error, "maps keep their sizes");
            discard(loading.pins)?;
            moved
                .problems
                .push(problem("maps", format!("the maps keep their sizes: {error}")));
        }
    }
    Ok(moved)
}

/// Replaces the program at every hook by the one with its name.
///
/// # Errors
/// Returns a [`LoadError`] if a program cannot be loaded or attached.
pub(super) fn replace_programs(programs: &mut Ebpf, pins: &PinPath) -> Result<(), LoadError> {
    attach::replace(programs, pins)?;
    tc::replace(programs, pins)
}

/// The maps that are being replaced.
pub(super) struct Replaced<'a> {
    pins: &'a PinPath,
    pub(super) maps: Vec<&'static MapSpec>,
}

impl<'a> Replaced<'a> {
    fn new(pins: &'a PinPath, is_replaced: impl Fn(&MapSpec) -> bool) -> Self {
        let maps = MAPS.iter().filter(|map| is_replaced(map)).collect();
        Self { pins, maps }
    }

    fn contains(&self, name: &str) -> bool {
        self.maps.iter().any(|map| map.name == name)
    }

    /// Returns the path of the map that is used after the move.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        if self.contains(name) {
            self.pins.next().join(name)
        } else {
            self.pins.maps().join(name)
        }
    }
}

/// Continues the move of an earlier start. Returns the number of entries that found no room.
fn recover(loading: &Loading<'_>) -> Result<usize, LoadError> {
    let next = loading.pins.next();
    let phase = PhaseMap::open(&next)?.and_then(|phase| phase.get());
    let recovery = Recovery::of(phase);
    info!(?recovery, "an earlier start was interrupted while it replaced maps");
    match recovery {
        Recovery::Discard => discard(loading.pins).map(|()| 0),
        Recovery::Copy => {
            let replaced = Replaced::new(loading.pins, |map| next.join(map.name).exists());
            let mut programs = loading.load_moving(&replaced, &Capacities::DEFAULT)?;
            replace_programs(&mut programs, loading.pins)?;
            finish(loading, &programs, &replaced)
        }
        Recovery::Rename => rename(loading.pins).map(|()| 0),
    }
}

/// Removes the pins of the new maps.
fn discard(pins: &PinPath) -> Result<(), LoadError> {
    let next = pins.next();
    match fs::remove_dir_all(&next) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(&next, "remove")(error)),
        _ => Ok(()),
    }
}

/// Creates the new maps, and attaches programs that use both. Returns these programs.
fn prepare(
    loading: &Loading<'_>,
    old: &PinnedMaps,
    replaced: &Replaced<'_>,
    to: &Capacities,
) -> Result<Ebpf, LoadError> {
    let next = loading.pins.next();
    fs::create_dir(&next).map_err(failed(&next, "mkdir"))?;
    let mut programs = loading.load_moving(replaced, to)?;
    let mut new = PinnedMaps::open_each(|name| replaced.path(name))?;
    old.copy_agent_maps(&mut new, |name| replaced.contains(name))?;
    replace_programs(&mut programs, loading.pins)?;
    // Programs of before do not look into the new maps.
    wait_for_programs()?;
    Ok(programs)
}

/// Makes the programs insert into the new maps, copies the entries of the old maps, and renames the pins. Returns the number of
/// entries that found no room.
fn finish(loading: &Loading<'_>, programs: &Ebpf, replaced: &Replaced<'_>) -> Result<usize, LoadError> {
    let phase = PhaseMap::open(&loading.pins.next())?.ok_or_else(|| LoadError::PinPath {
        path: loading.pins.next().join(MOVE_MAP),
        what: "does not exist".into(),
    })?;
    phase.set(MovePhase::Copy);
    // Afterwards no program inserts into the old maps.
    wait_for_programs()?;
    let old = PinnedMaps::open(&loading.pins.maps())?;
    let lost = old.move_entries(programs, |name| replaced.contains(name))?;
    phase.set(MovePhase::Rename);
    rename(loading.pins).map(|()| lost)
}

/// Replaces the pins of the old maps by those of the new ones.
fn rename(pins: &PinPath) -> Result<(), LoadError> {
    let next = pins.next();
    for map in MAPS {
        let new = next.join(map.name);
        if new.exists() {
            fs::rename(&new, pins.maps().join(map.name)).map_err(failed(&new, "rename"))?;
        }
    }
    discard(pins)
}

fn problem_of(kept: &Kept) -> Problem {
    let Kept { map, wanted, needed } = kept;
    problem(
        map.name(),
        format!(
            "the map keeps its size: --{} {wanted} is less than the {needed} entries that it needs",
            map.flag()
        ),
    )
}

/// Returns the problem of entries that found no room in the new maps, if there are any.
fn lost_problem(lost: usize) -> Option<Problem> {
    (lost > 0).then(|| {
        problem(
            "maps",
            format!("{lost} entries found no room when maps were replaced; the log of this start names the maps"),
        )
    })
}

fn problem(place: &str, message: String) -> Problem {
    Problem::new(place, message).kind(ProblemKind::Map)
}
