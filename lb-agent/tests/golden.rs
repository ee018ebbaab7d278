//! Golden tests: every manifest `golden/NAME.yaml` must give the map dump in `golden/NAME.maps.txt`.
//!
//! The output of `lb-agent COMMAND --help` must match `help.txt`, since the command line is a contract.
//!
//! `LB_BLESS=1 cargo test -p lb-agent --test golden` rewrites the files; review the diff before committing it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use lb_agent::source::manifests::ManifestSource;
use lb_common::abi::SizedMap;
use lb_core::maps::fake::FakeMaps;
use lb_core::maps::{Capacities, Maps as _, dump};
use lb_core::reconcile::Reconciler;
use lb_core::verify::verify;

const CAPACITIES: Capacities = Capacities::uniform(64)
    .with(SizedMap::Services, 32)
    .with(SizedMap::Sockets, 1)
    .with(SizedMap::SocketsMore, 1);

/// Returns whether the golden files are to be rewritten.
fn is_blessing() -> bool {
    std::env::var_os("LB_BLESS").is_some_and(|value| value == "1")
}

/// Returns the map dump and the problems of node n1 for a manifest.
fn maps_of(manifest: &Path) -> String {
    let mut source = ManifestSource::new(vec![manifest.to_owned()]);
    let mut lb = Reconciler::adopt(FakeMaps::new(CAPACITIES), "n1").expect("maps in memory");
    lb.apply(source.rescan());
    lb.settle().expect("maps in memory");
    let dump = lb.maps().dump().expect("maps in memory");
    assert_eq!(verify(lb.desired(), &dump), [], "{}", manifest.display());
    let mut text = dump::render(&dump);
    for problem in lb.problems() {
        // Without the path of the repository.
        let folder = manifest.parent().unwrap_or(Path::new("")).display().to_string();
        text += &format!("problem: {}\n", problem.to_string().replace(&format!("{folder}/"), ""));
    }
    text
}

#[test]
fn manifests_produce_the_golden_maps() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let entries = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    let (mut manifests, texts): (Vec<PathBuf>, Vec<PathBuf>) =
        entries.partition(|path| path.extension().is_some_and(|e| e == "yaml"));
    manifests.sort();
    assert!(manifests.len() > 10, "{manifests:?}");
    let mut failures = Vec::new();
    for manifest in &manifests {
        let text = manifest.with_extension("maps.txt");
        let is = maps_of(manifest);
        if is_blessing() {
            fs::write(&text, &is).unwrap();
        }
        let blessed = fs::read_to_string(&text).unwrap_or_default();
        if is != blessed {
            failures.push(format!("{}\n--- expected\n{blessed}--- now\n{is}", text.display()));
        }
    }
    for text in texts {
        if !manifests
            .iter()
            .any(|manifest| manifest.with_extension("maps.txt") == text)
        {
            failures.push(format!("{}: no manifest has this name", text.display()));
        }
    }
    assert!(
        failures.is_empty(),
        "{}\nIf the new output is correct, run with LB_BLESS=1",
        failures.join("\n")
    );
}

/// Commands, as typed.
const COMMANDS: [&str; 12] = [
    "",
    "run",
    "status",
    "service list",
    "backend list",
    "socket list",
    "affinity list",
    "conntrack list",
    "explain",
    "trace",
    "verify",
    "cleanup",
];

/// Returns the help text of a command.
fn help(command: &str) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_lb-agent"))
        .args(command.split_whitespace())
        .arg("--help")
        .env_remove("NODE_NAME")
        .output()
        .expect("lb-agent");
    assert!(output.status.success(), "{command}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn help_texts_match_the_golden_file() {
    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/help.txt");
    let is: String = COMMANDS
        .iter()
        .map(|command| format!("$ lb-agent {command} --help\n{}\n", help(command)).replace("agent  --", "agent --"))
        .collect();
    if is_blessing() {
        fs::write(&text, &is).unwrap();
    }
    let blessed = fs::read_to_string(&text).unwrap_or_default();
    assert!(
        is == blessed,
        "--- expected\n{blessed}--- now\n{is}\nIf the new output is correct, run with LB_BLESS=1"
    );
}
