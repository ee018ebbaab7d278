//! The layout of the maps against `layout.golden`: sizes, offsets, kinds and flags of everything that is pinned.
//!
//! Maps outlive the agent that created them, so a change needs a new `VERSION`. `cargo xtask bless` then writes the file
//! again. Without a new `VERSION` it only adds to the file, and fails if a line would change or disappear. A field that takes the
//! place of padding or of a `reserved` field is an addition.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

use lb_common::abi::layout::{Shape, TypeLayout};
use lb_common::abi::{Capacity, MAPS, MapKind, VERSION};

/// Adds a type and the types of its fields, as text by name.
fn add(types: &mut BTreeMap<String, String>, layout: &'static TypeLayout) {
    match layout.shape {
        Shape::Scalar(_) => {}
        Shape::Array(element, _) => add(types, element),
        Shape::Struct(name, fields) => {
            let mut text = format!("type {name}: {} bytes, aligned to {}\n", layout.size, layout.align);
            for field in fields {
                let _ = writeln!(
                    text,
                    "{name}.{} at {}: {}, {} bytes",
                    field.name, field.offset, field.layout, field.layout.size
                );
                add(types, field.layout);
            }
            types.insert(name.to_owned(), text);
        }
    }
}

fn layout() -> String {
    let mut maps = BTreeMap::new();
    let mut types = BTreeMap::new();
    for map in MAPS {
        add(&mut types, map.key);
        add(&mut types, map.value);
        let entries = match map.capacity {
            Capacity::Sized(sized) => format!("as many entries as --{}", sized.flag()),
            Capacity::Fixed(bytes) if map.kind == MapKind::RingBuf => format!("{bytes} bytes"),
            Capacity::Fixed(entries) => format!("{entries} entries"),
        };
        let text = format!(
            "map {}: {:?} of {} ({} bytes) to {} ({} bytes), flags {:#x}, {entries}\n",
            map.name,
            map.kind,
            map.key,
            map.key_size(),
            map.value,
            map.value_size(),
            map.flags,
        );
        maps.insert(map.name, text);
    }
    let maps: String = maps.into_values().collect();
    let types: Vec<_> = types.into_values().collect();
    format!("layout {VERSION}\n\n{maps}\n{}", types.join("\n"))
}

/// Returns whether a line is of padding or of a `reserved` field in a value. All builds write zero there, so entries of an earlier build have zero in a
/// field that takes its place. Keys are compared as a whole, so a field of a key is a change.
fn is_padding_of_value(line: &str) -> bool {
    let is_key = |name: &str| {
        MAPS.iter()
            .any(|map| matches!(map.key.shape, Shape::Struct(key, _) if key == name))
    };
    let field = line.split_once(".pad at ").or_else(|| line.split_once(".reserved at "));
    field.is_some_and(|(name, _)| !is_key(name))
}

#[test]
fn golden_layout_changes_only_with_a_new_version() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/layout.golden");
    let golden = fs::read_to_string(&file).unwrap_or_default();
    let now = layout();
    if now == golden {
        return;
    }
    let is_new_version = golden.lines().next() != now.lines().next();
    let lost: Vec<_> = golden
        .lines()
        .filter(|line| !now.lines().any(|new| new == *line) && !is_padding_of_value(line))
        .collect();
    let may_bless = is_new_version || lost.is_empty();
    if may_bless && env::var_os("LB_BLESS").is_some_and(|value| value == "1") {
        fs::write(&file, &now).unwrap();
        return;
    }
    let remedy = if may_bless {
        "`cargo xtask bless` writes the file again"
    } else {
        "the layout changed: it needs a new VERSION in lb-common/src/abi/maps.rs"
    };
    panic!("{}: {remedy}\n--- golden\n{golden}\n--- now\n{now}", file.display());
}
