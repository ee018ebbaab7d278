//! Moves: pinned maps are replaced by maps of another size or layout while the programs serve.
//!
//! 1. The new maps are pinned in `next/`, and programs that use both are loaded. The maps that only the agent fills are copied.
//! 2. The programs at all hooks are replaced one by one, in any order: those of before and those that use both insert into the old
//!    maps.
//! 3. [`MovePhase::Copy`] is stored: all programs insert into the new maps, and look up the new maps, then the old ones.
//! 4. The entries of the old maps are copied. None is removed there, so that no lookup misses.
//! 5. [`MovePhase::Rename`] is stored, the pins of the new maps replace those of the old maps, and programs that use the new maps only
//!    are loaded and replace those of step 2.
//!
//! A start that was killed in between leaves `next/` with MOVE, which has the phase. The next start continues from there, also if
//! it is one of a build with another layout. The rules that all layouts follow are in [`lb_common::abi::PinnedMap`] and its module.
//!
//! The maps in force are those of the only layout with a directory `maps` that is not empty. If there are two, one of them also has
//! a directory `filling`, and the maps of the other one are in force. While maps are being made from the source, their layout has
//! it. When they are complete, it passes to the other layout by one rename, programs are attached, and that layout is removed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use aya::Ebpf;
use aya::programs::ProgramError;
use lb_common::abi::{MAPS, MOVE_MAP, MapRole, MapSpec, MovePhase, SizedMap, VERSION};
use lb_core::maps::Capacities;
use lb_core::maps::resize::{Kept, Recovery, Resize};
use lb_core::maps::takeover::{self, Fate, Readable, Takeover};
use lb_core::model::{Problem, ProblemKind};
use tracing::{info, warn};

use super::pins::{entries, remove_dir};
use super::{LoadError, Loader, PinPath, attach, failed, tc};
use crate::maps::bpf::PinnedMaps;
use crate::maps::moves::{PhaseMap, wait_for_programs};
use crate::maps::old::OldMaps;

/// The pinned maps after all moves.
#[derive(Debug, Default)]
pub(super) struct Moved {
    /// Programs that are attached use maps that are no longer pinned.
    pub(super) has_old_programs: bool,
    /// A move was begun and failed before its programs inserted into the new maps.
    pub(super) is_discarded: bool,
    /// Maps that keep their size, since their content would not fit.
    pub(super) kept: Vec<Kept>,
    /// Maps that do not have the required size, or whose entries are lost.
    pub(super) problems: Vec<Problem>,
}

impl Moved {
    /// Adds the result of another move.
    pub(super) fn add(&mut self, other: Self) {
        self.has_old_programs |= other.has_old_programs;
        self.problems.extend(other.kept.iter().map(problem_of));
        self.problems.extend(other.problems);
    }
}

/// Completes the move of an earlier start, and moves the content of maps of another layout to maps of this build. If those cannot be
/// read, they stay in force until the maps of this build are complete: see [`put_in_force`].
///
/// # Errors
/// Returns a [`LoadError`] if a move fails.
pub(super) fn take_over(loader: &Loader<'_>) -> Result<Moved, LoadError> {
    let pins = loader.pins;
    let mut moved = Moved::default();
    let others = pins.other_layouts()?;
    for &layout in &others {
        pins.take_links(layout)?;
    }
    for layout in others.into_iter().chain([VERSION]) {
        if pins.next_of(layout).exists() {
            moved.has_old_programs = true;
            moved.problems.extend(recover(loader, layout)?);
        }
    }
    let others = pins.other_layouts()?;
    let Some(source) = other_in_force(pins, VERSION)? else {
        // A build of another layout was killed before its maps were in force. Its programs may be attached.
        moved.has_old_programs |= !others.is_empty();
        remove_others(pins)?;
        return Ok(moved);
    };
    pins.remove_layout(VERSION)?;
    pins.create_dirs()?;
    info!(layout = source, "taking over the maps of another layout");
    moved.add(take_over_from(loader, source)?);
    Ok(moved)
}

/// Moves the content of the maps of another layout to maps of this build.
fn take_over_from(loader: &Loader<'_>, source: u32) -> Result<Moved, LoadError> {
    let pins = loader.pins;
    let old = OldMaps::open(&pins.maps_of(source))?;
    let readable = |map: &MapSpec| {
        Some(Readable {
            map: old.pinned_map(map.name)?,
            entries: old.capacity(map.name)?,
        })
    };
    let takeover = match Takeover::new(readable) {
        Ok(takeover) => takeover,
        Err(unreadable) => {
            let message = format!(
                "the maps of layout v{source} could not be read ({}): all maps are made from the source, and flows of packets, \
                 affinity and counters are lost",
                unreadable.join(", ")
            );
            let filling = pins.filling(VERSION);
            fs::create_dir_all(&filling).map_err(failed(&filling, "mkdir"))?;
            return Ok(Moved {
                problems: vec![problem("maps", message)],
                ..Moved::default()
            });
        }
    };
    let replaced = Replaced {
        old: pins.maps_of(source),
        next: pins.next(),
        moved: takeover.with(Fate::Moved).collect(),
        emptied: takeover.with(Fate::Emptied).collect(),
    };
    let mut moved = Moved::default();
    if !replaced.is_empty() && old.state()?.is_some_and(|state| state.netns != loader.netns) {
        let message = format!(
            "filters of clsact qdiscs in the network namespace of the former agent keep the maps of layout v{source}, which do not \
             change any more: `lb-agent cleanup` in that namespace removes them"
        );
        moved.problems.push(problem("maps", message));
    }
    if replaced.is_empty() {
        fs::rename(&replaced.old, pins.maps()).map_err(failed(&replaced.old, "rename"))?;
        pins.remove_layout(source)?;
    } else {
        let to = old.capacities_with_room_for_records()?;
        let programs =
            prepare(loader, &old, &replaced, &to).or_else(|error| remove_dir(&replaced.next).and(Err(error)))?;
        moved.has_old_programs = true;
        let lost = finish(loader, &programs, &replaced, source, VERSION)?;
        moved.problems.extend(lost_problem(lost));
    }
    moved.problems.extend(unreadable_problem(source, &takeover.lost()));
    info!(from = source, to = VERSION, "took over the maps of another layout");
    Ok(moved)
}

/// Puts the maps of this build in force, which were made from the source while those of another layout were in force. To be called
/// before programs are attached that use them.
///
/// # Errors
/// Returns a [`LoadError`] if a system call fails.
pub(super) fn put_in_force(pins: &PinPath) -> Result<(), LoadError> {
    let Some(former) = other_in_force(pins, VERSION)? else {
        return Ok(());
    };
    let own = pins.filling(VERSION);
    fs::rename(&own, pins.filling(former)).map_err(failed(&own, "rename"))
}

/// Removes the directories of all other layouts: the maps of this build are in force.
///
/// # Errors
/// Returns a [`LoadError`] if a system call fails.
pub(super) fn remove_others(pins: &PinPath) -> Result<(), LoadError> {
    let others = pins.other_layouts()?;
    others.into_iter().try_for_each(|layout| pins.remove_layout(layout))?;
    remove_dir(&pins.filling(VERSION))
}

/// Returns the layout other than `layout` whose maps are in force, if there is one.
fn other_in_force(pins: &PinPath, layout: u32) -> Result<Option<u32>, LoadError> {
    let all = pins.other_layouts()?.into_iter().chain([VERSION]);
    let mut others = all.filter(|other| *other != layout && pins.has_maps(*other));
    // Of two layouts with maps, one has the mark.
    Ok(others.find(|other| !pins.filling(*other).exists()))
}

/// Removes the maps of a first start that was killed before it had pinned all of them: the next one may want other sizes. Nothing is
/// attached then.
///
/// # Errors
/// Returns a [`LoadError`] if a system call fails.
pub(super) fn begin_again(pins: &PinPath) -> Result<(), LoadError> {
    if entries(&pins.links())?.is_empty() && !missing(pins).is_empty() {
        remove_dir(&pins.maps())?;
        pins.create_dirs()?;
    }
    Ok(())
}

/// The maps that have to be pinned together. The others are made again at each start if they are missing.
fn needed() -> impl Iterator<Item = &'static MapSpec> {
    MAPS.iter().filter(|map| map.role != MapRole::Renewed)
}

/// Returns the needed maps that are not pinned.
fn missing(pins: &PinPath) -> Vec<&'static str> {
    needed()
        .map(|map| map.name)
        .filter(|name| !pins.maps().join(name).exists())
        .collect()
}

/// Replaces the pinned maps that do not have the required size. Returns the required numbers of entries too: `wanted` gets those
/// of the pinned maps, if there are any.
///
/// # Errors
/// Returns a [`LoadError`] if a move that must be completed fails.
pub(super) fn at_start(
    loader: &Loader<'_>,
    wanted: impl FnOnce(Option<&Capacities>) -> Capacities,
) -> Result<(Moved, Capacities), LoadError> {
    let mut moved = Moved::default();
    let missing = missing(loader.pins);
    if missing.len() == needed().count() {
        return Ok((moved, wanted(None)));
    }
    let pinned = OldMaps::open(&loader.pins.maps())?.capacities();
    let wanted = wanted(Some(&pinned));
    if !missing.is_empty() {
        // The new map gets the size of those that it belongs to.
        let message = format!(
            "these maps were not pinned any more, so their entries are lost: {}",
            missing.join(", ")
        );
        moved.problems.push(problem("maps", message));
        return Ok((moved, pinned));
    }
    moved.add(resize(loader, &wanted, &Capacities::uniform(0))?);
    Ok((moved, wanted))
}

/// Replaces the pinned maps that do not have the required size. `needed`: the smallest numbers of entries that the maps can
/// have, in addition to those that their content requires.
///
/// # Errors
/// Returns a [`LoadError`] if a move that must be completed fails.
pub(super) fn resize(loader: &Loader<'_>, wanted: &Capacities, needed: &Capacities) -> Result<Moved, LoadError> {
    let mut moved = Moved::default();
    let old = OldMaps::open(&loader.pins.maps())?;
    if old.capacities() == *wanted {
        return Ok(moved);
    }
    let content = old.needed()?;
    let needed = content.map(|map, entries| entries.max(needed[map]));
    let resize = Resize::new(old.capacities(), wanted, &needed);
    moved.kept.clone_from(&resize.kept);
    if !resize.is_needed() {
        return Ok(moved);
    }
    if old.state()?.is_some_and(|state| state.netns != loader.netns) {
        moved.problems.push(problem(
            "maps",
            "the maps keep their sizes, since they were made in another network namespace; the next start replaces them".into(),
        ));
        return Ok(moved);
    }
    moved.has_old_programs = true;
    let replaced = Replaced::of_size(loader.pins, &resize);
    match prepare(loader, &old, &replaced, &resize.to) {
        Ok(programs) => {
            let lost = finish(loader, &programs, &replaced, VERSION, VERSION)?;
            moved.problems.extend(lost_problem(lost));
            log_sizes(&old.capacities(), &resize.to);
        }
        Err(error) => {
            warn!(%error, "maps keep their sizes");
            remove_dir(&replaced.next)?;
            moved.is_discarded = true;
            moved.problems.push(not_replaced(&error));
        }
    }
    Ok(moved)
}

/// Replaces the maps that do not have the required size by empty ones, and returns the programs that use them. No program may
/// be attached.
///
/// # Errors
/// Returns a [`LoadError`] if a system call fails. The maps are the same as before then, except if a pin cannot be renamed.
pub(super) fn recreate(loader: &Loader<'_>, from: &Capacities, to: &Capacities) -> Result<Ebpf, LoadError> {
    let next = loader.pins.next();
    let resize = Resize::new(*from, to, &Capacities::uniform(0));
    let replaced = Replaced::of_size(loader.pins, &resize);
    // Without MOVE: a start that finds this directory removes it.
    fs::create_dir(&next).map_err(failed(&next, "mkdir"))?;
    let loaded = loader.load_with(|name| replaced.path(name), to, None);
    let programs = loaded.or_else(|error| remove_dir(&next).and(Err(error)))?;
    rename(loader.pins, VERSION, VERSION)?;
    log_sizes(from, to);
    Ok(programs)
}

fn log_sizes(from: &Capacities, to: &Capacities) {
    for &map in SizedMap::ALL {
        let (from, to) = (from[map], to[map]);
        if from != to {
            info!(map = map.name(), from, to, "replaced a map by one of another size");
        }
    }
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
pub(super) struct Replaced {
    /// Directory of the maps in force.
    pub(super) old: PathBuf,
    /// Directory of the new maps, and of MOVE.
    pub(super) next: PathBuf,
    /// Maps whose content is moved.
    pub(super) moved: Vec<&'static MapSpec>,
    /// Maps that begin empty.
    emptied: Vec<&'static MapSpec>,
}

impl Replaced {
    /// Returns the maps that get another size.
    fn of_size(pins: &PinPath, resize: &Resize) -> Self {
        Self {
            old: pins.maps(),
            next: pins.next(),
            moved: MAPS.iter().filter(|map| resize.replaces(map)).collect(),
            emptied: Vec::new(),
        }
    }

    /// Returns the maps that an interrupted move was replacing.
    fn interrupted(old: PathBuf, next: PathBuf) -> Result<Self, LoadError> {
        let there = OldMaps::open(&old)?;
        let replaced: Vec<_> = MAPS.iter().filter(|map| next.join(map.name).exists()).collect();
        let (moved, emptied) = takeover::interrupted(&replaced, |map| there.has(map));
        Ok(Self {
            old,
            next,
            moved,
            emptied,
        })
    }

    fn is_empty(&self) -> bool {
        self.moved.is_empty() && self.emptied.is_empty()
    }

    /// Returns whether the content of a map is moved.
    pub(super) fn moves(&self, name: &str) -> bool {
        self.moved.iter().any(|map| map.name == name)
    }

    /// Returns the path of the map that is used after the move.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        let is_new = self.moves(name) || self.emptied.iter().any(|map| map.name == name);
        let dir = if is_new { &self.next } else { &self.old };
        dir.join(name)
    }
}

/// Continues the move of an earlier start, whose build had a layout. Returns the problems.
///
/// A move is copying only when the programs at all hooks use the old and the new maps, so they stay. Those of this build may not be
/// able to use maps of another layout.
fn recover(loader: &Loader<'_>, layout: u32) -> Result<Vec<Problem>, LoadError> {
    let pins = loader.pins;
    let next = pins.next_of(layout);
    let phase = PhaseMap::open(&next)?.and_then(|phase| phase.get());
    let recovery = Recovery::of(phase);
    info!(
        layout,
        ?recovery,
        "an earlier start was interrupted while it replaced maps"
    );
    // While pins are renamed, both layouts of a move have maps.
    let from = other_in_force(pins, layout)?.or_else(|| pins.has_maps(layout).then_some(layout));
    // Programs inserted into the new maps, of which some may have a layout that this build cannot read.
    let new = OldMaps::open(&next)?;
    let is_readable = MAPS.iter().all(|map| !next.join(map.name).exists() || new.has(map));
    match (recovery, from) {
        (Recovery::Discard, _) | (_, None) => remove_dir(&next).map(|()| Vec::new()),
        (Recovery::Copy, Some(from)) if is_readable => {
            let replaced = Replaced::interrupted(pins.maps_of(from), next.clone())?;
            let programs = match loader.load_move(&replaced) {
                Err(error) if is_rejected(&error) => {
                    warn!(%error, "the verifier does not accept the maps of another layout");
                    return discard(&next, layout);
                }
                loaded => loaded?,
            };
            let no_room = finish(loader, &programs, &replaced, from, layout)?;
            let unreadable = unreadable_problem(from, &takeover::lost(replaced.emptied));
            Ok(lost_problem(no_room).into_iter().chain(unreadable).collect())
        }
        (Recovery::Copy, Some(_)) => discard(&next, layout),
        (Recovery::Rename, Some(from)) => rename(pins, from, layout).map(|()| Vec::new()),
    }
}

/// Removes the new maps of a move that this build cannot continue, with the entries that programs have inserted. Returns the problem.
fn discard(next: &Path, layout: u32) -> Result<Vec<Problem>, LoadError> {
    remove_dir(next)?;
    let message = format!("the maps of layout v{layout} could not be read, so the entries of its start are lost");
    Ok(vec![problem("maps", message)])
}

/// Returns whether the verifier rejects a program, so that another start would fail too.
fn is_rejected(error: &LoadError) -> bool {
    let LoadError::Program {
        source: ProgramError::LoadError { io_error, .. },
        ..
    } = error
    else {
        return false;
    };
    matches!(io_error.raw_os_error(), Some(libc::EACCES | libc::EINVAL))
}

/// Creates the new maps, and attaches programs that use both. Returns these programs.
fn prepare(loader: &Loader<'_>, old: &OldMaps, replaced: &Replaced, to: &Capacities) -> Result<Ebpf, LoadError> {
    let begun = Instant::now();
    let next = &replaced.next;
    fs::create_dir(next).map_err(failed(next, "mkdir"))?;
    let mut programs = loader.load_moving(replaced, to)?;
    let mut new = PinnedMaps::open_each(|name| replaced.path(name))?;
    old.copy_agent_maps(&mut new, |name| replaced.moves(name))?;
    new.fill_filter()?;
    replace_programs(&mut programs, loader.pins)?;
    // Programs of before do not look into the new maps.
    wait_for_programs()?;
    info!(took = ?begun.elapsed(), "attached programs that use the old and the new maps");
    Ok(programs)
}

/// Makes the programs insert into the new maps, copies the entries of the old maps, and renames the pins. `from` and `to` are the
/// layouts of the old maps and of the new ones. Returns the number of entries that found no room.
fn finish(loader: &Loader<'_>, programs: &Ebpf, replaced: &Replaced, from: u32, to: u32) -> Result<usize, LoadError> {
    let begun = Instant::now();
    let phase = PhaseMap::open(&replaced.next)?.ok_or_else(|| LoadError::PinPath {
        path: replaced.next.join(MOVE_MAP),
        what: "does not exist".into(),
    })?;
    phase.set(MovePhase::Copy);
    // Afterwards no program inserts into the old maps.
    wait_for_programs()?;
    let old = OldMaps::open(&replaced.old)?;
    let lost = old.move_entries(programs, |name| replaced.moves(name))?;
    info!(took = ?begun.elapsed(), lost, "copied the entries of the old maps");
    phase.set(MovePhase::Rename);
    rename(loader.pins, from, to).map(|()| lost)
}

/// Replaces the pins of the old maps by those of the new ones. If the old maps are of another layout, the maps that were not replaced
/// are moved, then that layout is removed, except the links of this build's layout. SERVICES, which has the number of entries, comes
/// after the maps of the same size: an agent that dies in between does not leave one that is smaller.
fn rename(pins: &PinPath, from: u32, to: u32) -> Result<(), LoadError> {
    let (next, maps) = (pins.next_of(to), pins.maps_of(to));
    fs::create_dir_all(&maps).map_err(failed(&maps, "mkdir"))?;
    for map in MAPS.iter().rev() {
        rename_pin(&next.join(map.name), &maps.join(map.name))?;
    }
    if from != to {
        let old = pins.maps_of(from);
        for map in MAPS {
            let target = maps.join(map.name);
            if !target.exists() {
                rename_pin(&old.join(map.name), &target)?;
            }
        }
        // Last, since the phase in this directory shows that the maps are complete.
        pins.remove_layout(from)?;
    }
    remove_dir(&next)
}

/// Renames a pin, if it exists: an earlier start may have done so.
fn rename_pin(from: &Path, to: &Path) -> Result<(), LoadError> {
    match fs::rename(from, to) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(from, "rename")(error)),
        _ => Ok(()),
    }
}

/// Returns the problem of maps that could not be replaced.
pub(super) fn not_replaced(error: &LoadError) -> Problem {
    problem("maps", format!("the maps keep their sizes: {error}"))
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
            format!("{lost} entries found no room when maps were replaced; the log of the agent names the maps"),
        )
    })
}

/// Returns the problem of maps of a layout whose entries are lost, if there are any.
fn unreadable_problem(layout: u32, lost: &[&str]) -> Option<Problem> {
    (!lost.is_empty()).then(|| {
        let lost = lost.join(", ");
        problem(
            "maps",
            format!("the maps of layout v{layout} could not be read, so their entries are lost: {lost}"),
        )
    })
}

fn problem(place: &str, message: String) -> Problem {
    Problem::new(place, message).kind(ProblemKind::Map)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A layout of a later build.
    const LATER: u32 = VERSION + 1;

    /// Creates an empty file in place of a pin, and the directories above it.
    fn create(pin: &Path) {
        fs::create_dir_all(pin.parent().unwrap()).unwrap();
        fs::write(pin, "").unwrap();
    }

    #[test]
    fn maps_made_from_the_source_are_in_force_before_those_of_another_layout_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let pins = PinPath::new(folder.path());
        for layout in [VERSION, LATER] {
            create(&pins.maps_of(layout).join("CT"));
        }
        fs::create_dir(pins.filling(VERSION)).unwrap();
        assert_eq!(other_in_force(&pins, VERSION).unwrap(), Some(LATER));
        put_in_force(&pins).unwrap();
        assert_eq!(other_in_force(&pins, VERSION).unwrap(), None);
        assert_eq!(other_in_force(&pins, LATER).unwrap(), Some(VERSION));
        remove_others(&pins).unwrap();
        assert!(pins.other_layouts().unwrap().is_empty());
        assert!(pins.has_maps(VERSION) && !pins.filling(VERSION).exists());
        put_in_force(&pins).unwrap();
        assert!(pins.has_maps(VERSION) && !pins.filling(VERSION).exists());
    }

    #[test]
    fn a_first_start_that_was_killed_between_its_pins_begins_again() {
        let folder = tempfile::tempdir().unwrap();
        let pins = PinPath::new(folder.path());
        let last = pins.maps().join(MAPS[MAPS.len() - 1].name);
        let create_all = || {
            fs::create_dir_all(pins.links()).unwrap();
            for map in MAPS {
                create(&pins.maps().join(map.name));
            }
        };
        create_all();
        begin_again(&pins).unwrap();
        assert!(missing(&pins).is_empty());
        let names = pins.maps().join("NAMES");
        fs::remove_file(&names).unwrap();
        begin_again(&pins).unwrap();
        assert!(!last.exists() && pins.maps().exists());
        // Programs that are attached use the maps.
        create_all();
        fs::remove_file(&names).unwrap();
        create(&pins.links().join("lb_connect4"));
        begin_again(&pins).unwrap();
        assert!(last.exists());
        assert_eq!(missing(&pins), ["NAMES"]);
    }

    #[test]
    fn links_stay_when_the_move_to_a_later_layout_is_completed() {
        let folder = tempfile::tempdir().unwrap();
        let pins = PinPath::new(folder.path());
        let link = pins.links().join("lb_connect4");
        let (maps, later) = (pins.maps(), pins.maps_of(LATER));
        let next = pins.next_of(LATER);
        for pin in [
            link.clone(),
            maps.join("CT"),
            maps.join("NAMES"),
            next.join("CT"),
            next.join(MOVE_MAP),
        ] {
            create(&pin);
        }
        rename(&pins, VERSION, LATER).unwrap();
        assert!(link.exists());
        assert!(!maps.exists() && !next.exists());
        assert!(later.join("CT").exists() && later.join("NAMES").exists());
    }
}
