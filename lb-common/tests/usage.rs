//! The uses of what the registries of the ABI define. The compiler does not report a public item without a use.

use std::fs;
use std::path::Path;

use lb_common::abi::layout::Shape;
use lb_common::abi::{Capacity, DropReason, MAPS, map_name, map_spec};

/// Maps that only the agent and the command line read and write.
const AGENT_ONLY: [&str; 3] = [map_name::NAMES, map_name::STATE, map_name::NOTICES];

/// Maps sized by a flag that only the agent inserts into. It copies them to the new maps before a program uses those.
const COPIED_BY_AGENT: [&str; 5] = [
    map_name::SERVICES,
    map_name::NAMES,
    map_name::FRONTENDS,
    map_name::BACKENDS,
    map_name::BACKEND_SLOTS,
];

/// Returns the code of the programs and of the logic that they call, without comments and tests.
fn code() -> String {
    code_of(&["../lb-ebpf/src", "src/logic"])
}

/// Returns the code in folders, without comments and tests. Paths are relative to this package.
fn code_of(folders: &[&str]) -> String {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut code = String::new();
    for folder in folders {
        for entry in fs::read_dir(package.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            assert!(path.is_file(), "{}: this test reads no nested folders", path.display());
            let text = fs::read_to_string(&path).unwrap();
            let product = text.split("#[cfg(test)]").next().unwrap_or_default();
            for line in product.lines().filter(|line| !line.trim_start().starts_with("//")) {
                code.push_str(line);
                code.push('\n');
            }
        }
    }
    code
}

/// Returns whether a name is in the code as a whole word.
fn uses(code: &str, name: &str) -> bool {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    code.match_indices(name).any(|(at, _)| {
        let (before, after) = (&code[..at], &code[at + name.len()..]);
        !before.ends_with(is_word) && !after.starts_with(is_word)
    })
}

#[test]
fn programs_use_every_map_that_is_not_the_agents_own() {
    let code = code();
    for map in MAPS {
        assert_eq!(
            uses(&code, map.name),
            !AGENT_ONLY.contains(&map.name),
            "{}: use it in lb-ebpf/src, or add it to AGENT_ONLY",
            map.name
        );
    }
}

#[test]
fn the_agent_opens_every_map() {
    let agent = code_of(&["../lb-agent/src/maps"]);
    for map in MAPS {
        assert!(
            uses(&agent, map.name),
            "{}: lb-agent/src/maps does not use it",
            map.name
        );
    }
}

#[test]
fn a_move_copies_every_map_that_a_flag_sizes() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let agent = fs::read_to_string(package.join("../lb-agent/src/maps/moves.rs")).unwrap();
    let programs = code();
    for map in MAPS.iter().filter(|map| matches!(map.capacity, Capacity::Sized(_))) {
        assert!(
            uses(&agent, map.name),
            "{}: lb-agent/src/maps/moves.rs does not copy it",
            map.name
        );
        let old = format!("{}_OLD", map.name);
        assert_eq!(
            uses(&programs, &old),
            !COPIED_BY_AGENT.contains(&map.name),
            "{}: define and use {old} in lb-ebpf/src, or add the map to COPIED_BY_AGENT",
            map.name
        );
    }
}

#[test]
fn a_program_reads_every_field_of_a_service() {
    let Shape::Struct(_, fields) = map_spec::SERVICES.value.shape else {
        panic!("{}", map_spec::SERVICES.value);
    };
    let code = code();
    for field in fields.iter().filter(|field| field.name != "pad") {
        let name = field.name;
        assert!(
            uses(&code, name),
            "neither lb-ebpf/src nor lb-common/src/logic reads {name} of the entry of SERVICES"
        );
    }
}

#[test]
fn a_program_returns_every_drop_reason() {
    let code = code();
    for reason in DropReason::ALL {
        let name = format!("DropReason::{reason:?}");
        assert!(
            uses(&code, &name),
            "neither lb-ebpf/src nor lb-common/src/logic has {name}"
        );
    }
}

#[test]
fn the_agent_sets_and_a_program_reads_every_service_flag() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/abi/service.rs");
    let text = fs::read_to_string(file).unwrap();
    let (_, flags) = text.split_once("pub mod service_flags {").unwrap();
    let (flags, _) = flags.split_once("\n}").unwrap();
    let names = flags.lines().filter_map(|line| line.trim().strip_prefix("pub const "));
    let names: Vec<_> = names.filter_map(|line| line.split(':').next()).collect();
    assert!(names.len() > 1, "{names:?}");
    let code = code();
    let desired = code_of(&["../lb-agent/core/src/desired"]);
    for name in names {
        let name = format!("service_flags::{name}");
        assert!(uses(&desired, &name), "lb-agent/core/src/desired does not set {name}");
        assert!(
            uses(&code, &name),
            "neither lb-ebpf/src nor lb-common/src/logic has {name}"
        );
    }
}
