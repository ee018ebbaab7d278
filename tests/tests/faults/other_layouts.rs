//! Maps as builds with other layouts have them, made from those of this build: only `cargo xtask test --upgrade` has such builds.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray};
use lb_agent::loader::PinPath;
use lb_common::abi::{Capacity, MapKind, MapSpec, VERSION, map_spec};

/// Number of drop reasons in layout 3, and so of entries of DROPS.
const DROPS: u32 = 29;

/// Turns the pinned maps into those of layout 3, with the same content. The attached programs continue to use the maps of before.
pub(crate) fn make_layout_3(pins: &PinPath) -> Result<()> {
    for dir in rename_layout(pins, 3)? {
        replace::<64>(&dir, &map_spec::CT, copy_hash::<40, 128, 64>)?;
        replace::<64>(&dir, &map_spec::CT_NEW, copy_hash::<40, 128, 64>)?;
        replace::<96>(&dir, &map_spec::SOCKETS_MORE, copy_hash::<8, 128, 96>)?;
        replace::<40>(&dir, &map_spec::DEVICES, copy_hash::<4, 64, 40>)?;
        replace::<96>(&dir, &map_spec::SOCKETS, copy_array::<128, 96>)?;
        replace::<40>(&dir, &map_spec::SERVICES, copy_array::<64, 40>)?;
        replace::<8>(&dir, &map_spec::CONFIG, copy_array::<64, 8>)?;
        replace::<352>(&dir, &map_spec::STATE, copy_array::<512, 352>)?;
        replace::<16>(&dir, &map_spec::STATS, copy_per_cpu::<32, 16>)?;
        replace::<8>(&dir, &map_spec::DROPS, copy_per_cpu::<8, 8>)?;
    }
    Ok(())
}

/// Turns the pinned maps into those of a later layout with longer values, with the same content. The attached programs continue to use
/// the maps of before.
pub(crate) fn make_later_layout(pins: &PinPath) -> Result<()> {
    for dir in rename_layout(pins, VERSION + 1)? {
        replace::<88>(&dir, &map_spec::DEVICES, copy_hash::<4, 64, 88>)?;
        replace::<160>(&dir, &map_spec::SOCKETS, copy_array::<128, 160>)?;
        replace::<96>(&dir, &map_spec::SERVICES, copy_array::<64, 96>)?;
        replace::<48>(&dir, &map_spec::STATS, copy_per_cpu::<32, 48>)?;
    }
    Ok(())
}

/// Gives the pins of this build's layout to another one, and returns its directories with maps.
fn rename_layout(pins: &PinPath, layout: u32) -> Result<[PathBuf; 2]> {
    let [own, other] = [VERSION, layout].map(|layout| pins.root().join(format!("v{layout}")));
    fs::rename(&own, &other).with_context(|| format!("renaming {}", own.display()))?;
    Ok(["maps", "next"].map(|dir| other.join(dir)))
}

/// Replaces the map in a directory, if there is one, by a map with values of `N` bytes: as many as in layout 3, or more than those of
/// this build.
fn replace<const N: usize>(dir: &Path, map: &MapSpec, copy: impl Fn(MapData, MapData) -> Result<()>) -> Result<()> {
    let is_longer = N > map.value_size() as usize;
    ensure!(
        is_longer || map.smallest_value() as usize == N,
        "values of {}",
        map.name
    );
    let (pin, new) = (dir.join(map.name), dir.with_file_name("new"));
    if !pin.exists() {
        return Ok(());
    }
    let old = MapData::from_pin(&pin).with_context(|| format!("opening {}", map.name))?;
    let entries = match map.capacity {
        Capacity::Sized(_) => old.info()?.max_entries(),
        Capacity::Fixed(_) if map.name == map_spec::DROPS.name => DROPS,
        Capacity::Fixed(entries) => entries,
    };
    let kind = match map.kind {
        MapKind::Array => "array",
        MapKind::PerCpuArray => "percpu_array",
        MapKind::Hash => "hash",
        MapKind::LruHash => "lru_hash",
        MapKind::LpmTrie | MapKind::RingBuf => anyhow::bail!("{} is the same in layout 3", map.name),
    };
    let (key, name) = (map.key_size(), map.name);
    let words = format!(
        "type {kind} key {key} value {N} entries {entries} name {name} flags {}",
        map.flags
    );
    let output = Command::new("bpftool")
        .args(["map", "create"])
        .arg(&new)
        .args(words.split(' '))
        .output()
        .context("running bpftool")?;
    ensure!(
        output.status.success(),
        "{name}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    copy(old, MapData::from_pin(&new)?).with_context(|| format!("copying {name}"))?;
    fs::rename(&new, &pin).with_context(|| format!("renaming {name}"))
}

/// Returns the first bytes of a value, or the value and zeros.
fn first<const FROM: usize, const TO: usize>(value: [u8; FROM]) -> [u8; TO] {
    std::array::from_fn(|i| value.get(i).copied().unwrap_or(0))
}

fn copy_hash<const K: usize, const FROM: usize, const TO: usize>(old: MapData, new: MapData) -> Result<()> {
    // aya treats both kinds of hashes alike.
    let old: HashMap<_, [u8; K], [u8; FROM]> = Map::HashMap(old).try_into()?;
    let mut new: HashMap<_, [u8; K], [u8; TO]> = Map::HashMap(new).try_into()?;
    for entry in &old {
        let (key, value) = entry?;
        new.insert(key, first::<FROM, TO>(value), 0)?;
    }
    Ok(())
}

fn copy_array<const FROM: usize, const TO: usize>(old: MapData, new: MapData) -> Result<()> {
    let old: Array<_, [u8; FROM]> = Map::Array(old).try_into()?;
    let mut new: Array<_, [u8; TO]> = Map::Array(new).try_into()?;
    for index in 0..new.len() {
        new.set(index, first::<FROM, TO>(old.get(&index, 0)?), 0)?;
    }
    Ok(())
}

fn copy_per_cpu<const FROM: usize, const TO: usize>(old: MapData, new: MapData) -> Result<()> {
    let old: PerCpuArray<_, [u8; FROM]> = Map::PerCpuArray(old).try_into()?;
    let mut new: PerCpuArray<_, [u8; TO]> = Map::PerCpuArray(new).try_into()?;
    for index in 0..new.len() {
        let values: Vec<_> = old
            .get(&index, 0)?
            .iter()
            .map(|value| first::<FROM, TO>(*value))
            .collect();
        new.set(index, values.try_into()?, 0)?;
    }
    Ok(())
}
