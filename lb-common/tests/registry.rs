//! The registry of maps against docs/architecture.md, and what holds for all of its rows.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use lb_common::abi::{Capacity, MAPS, MapKind, SizedMap, VERSION};

/// Returns the rows of the table of maps in docs/architecture.md: names, type.
fn documented() -> Vec<(Vec<String>, String)> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/architecture.md");
    let text = fs::read_to_string(file).unwrap();
    let table = text.lines().skip_while(|line| !line.starts_with("| map | type |"));
    let rows = table.skip(2).take_while(|line| line.starts_with('|'));
    rows.map(|row| {
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        let names = cells[1].split(',').map(|name| name.trim().to_owned()).collect();
        (names, cells[2].to_owned())
    })
    .collect()
}

#[test]
fn the_table_of_maps_in_the_architecture_has_every_map_with_its_type() {
    let rows = documented();
    assert!(rows.len() > 10, "{rows:?}");
    let mut names = BTreeSet::new();
    for (row, types) in &rows {
        // One type for all maps of a row, or one for each.
        let types: Vec<_> = types.split(';').map(str::trim).collect();
        for (i, name) in row.iter().enumerate() {
            let map = MAPS.iter().find(|map| map.name == name);
            let map = map.unwrap_or_else(|| panic!("docs/architecture.md: there is no map {name}"));
            let documented = types.get(i).or(types.first()).unwrap();
            let word = match map.kind {
                MapKind::Array => "array",
                MapKind::PerCpuArray => "per-CPU array",
                MapKind::Hash => "hash",
                MapKind::LruHash => "LRU hash",
                MapKind::LpmTrie => "LPM trie",
                MapKind::RingBuf => "ring buffer",
            };
            assert!(
                documented.starts_with(word),
                "docs/architecture.md: {name} is {documented}, not {word}"
            );
            assert!(
                names.insert(name.clone()),
                "docs/architecture.md: {name} is listed twice"
            );
        }
    }
    for map in MAPS {
        assert!(
            names.contains(map.name),
            "docs/architecture.md: the table of maps lacks {}",
            map.name
        );
    }
}

#[test]
fn documents_have_pin_paths_of_this_version() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
    for (file, root) in [("architecture.md", "PIN_PATH"), ("operations.md", "/sys/fs/bpf/lb")] {
        let path = format!("{root}/v{VERSION}/");
        let text = fs::read_to_string(docs.join(file)).unwrap();
        assert!(text.contains(&path), "docs/{file} lacks a path in {path}");
    }
}

#[test]
fn every_flag_has_one_map_and_a_default_in_its_range() {
    let mut flags = BTreeSet::new();
    for sized in SizedMap::ALL {
        let (min, max) = sized.range();
        assert!((min..=max).contains(&sized.default_capacity()), "{sized:?}");
        assert!(
            (sized.default_capacity()..=max).contains(&sized.default_bound()),
            "{sized:?}"
        );
        // A map grows to powers of two.
        assert!(sized.default_bound().is_power_of_two(), "{sized:?}");
        assert!(flags.insert(sized.flag()), "{sized:?}");
        assert!(sized.flag().starts_with("max-"), "{sized:?}");
        let map = MAPS.iter().find(|map| map.name == sized.name()).unwrap();
        assert_eq!(map.capacity, Capacity::Sized(*sized));
        assert_eq!(map.default_capacity(), sized.default_capacity());
        assert_eq!(map.role, sized.role());
    }
    assert_eq!(SizedMap::ALL.len(), SizedMap::COUNT);
}

#[test]
fn the_agent_fills_the_maps_of_services_and_programs_fill_the_others() {
    let filled_by_agent = SizedMap::ALL.iter().filter(|map| !map.is_filled_by_programs());
    let of_services = [
        SizedMap::Services,
        SizedMap::Frontends,
        SizedMap::Backends,
        SizedMap::BackendSlots,
    ];
    assert_eq!(filled_by_agent.copied().collect::<Vec<_>>(), of_services);
}

#[test]
fn rows_fit_the_kernel() {
    for map in MAPS {
        if map.kind == MapKind::RingBuf {
            assert!(map.default_capacity().is_power_of_two(), "{}: size in bytes", map.name);
        }
        if let MapKind::Array | MapKind::PerCpuArray = map.kind {
            assert_eq!(map.key_size(), 4, "{}", map.name);
        }
    }
}
