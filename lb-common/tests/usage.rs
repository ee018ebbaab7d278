//! The uses of what the registries of the ABI define. The compiler does not report a public item without a use.

use std::fs;
use std::path::Path;

use lb_common::abi::{DropReason, MAPS, map_name};

/// Maps that only the agent and the command line read and write.
const AGENT_ONLY: [&str; 3] = [map_name::NAMES, map_name::STATE, map_name::NOTICES];

/// Returns the code of the programs and of the logic that they call, without comments and tests.
fn code() -> String {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut code = String::new();
    for folder in [package.join("../lb-ebpf/src"), package.join("src/logic")] {
        for entry in fs::read_dir(&folder).unwrap() {
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
fn a_program_reads_every_service_flag() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/abi/service.rs");
    let text = fs::read_to_string(file).unwrap();
    let (_, flags) = text.split_once("pub mod service_flags {").unwrap();
    let (flags, _) = flags.split_once("\n}").unwrap();
    let names = flags.lines().filter_map(|line| line.trim().strip_prefix("pub const "));
    let names: Vec<_> = names.filter_map(|line| line.split(':').next()).collect();
    assert!(names.len() > 1, "{names:?}");
    let code = code();
    for name in names {
        let name = format!("service_flags::{name}");
        assert!(
            uses(&code, &name),
            "neither lb-ebpf/src nor lb-common/src/logic has {name}"
        );
    }
}
