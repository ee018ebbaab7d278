//! Whether the kernel of this machine can run lb, found by trying.

use std::path::Path;
use std::process::Output;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::privilege::{as_root, search_path};

/// Why lb cannot run on this machine's kernel; nothing if it can. Asks as root.
pub(crate) fn shortcoming() -> Result<Option<String>> {
    // Loads a small program of each type, and tells which of them the kernel took.
    let probe = output_as_root("bpftool", &["--json", "feature", "probe", "kernel"])?;
    if let Some(why) = refusal(&serde_json::from_slice(&probe.stdout).unwrap_or_default()) {
        return Ok(Some(why));
    }
    let Ok(cgroups) = lb_tests::cgroup2_root() else {
        return Ok(Some("no cgroup2 hierarchy is mounted".to_owned()));
    };
    let writable = output_as_root("test", &["-w", &cgroups.to_string_lossy()])?;
    Ok((!writable.status.success()).then(|| format!("{} cannot be written to", cgroups.display())))
}

/// What is wrong with the features that bpftool has found.
fn refusal(features: &Value) -> Option<String> {
    if features["program_types"]["have_cgroup_sock_addr_prog_type"] == true {
        return None;
    }
    let error = features["error"]
        .as_str()
        .unwrap_or("the kernel took no program for sockets of a cgroup");
    Some(error.to_owned())
}

fn output_as_root(program: &str, arguments: &[&str]) -> Result<Output> {
    as_root(Path::new(program), &[("PATH", search_path())], "looking at the kernel")?
        .args(arguments)
        .output()
        .with_context(|| format!("cannot run {program}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_kernel_that_took_the_program_will_do() {
        let features = |took| json!({"program_types": {"have_cgroup_sock_addr_prog_type": took}});
        assert_eq!(refusal(&features(true)), None);
        let why = "the kernel took no program for sockets of a cgroup";
        assert_eq!(refusal(&features(false)).as_deref(), Some(why));
        assert_eq!(refusal(&Value::Null).as_deref(), Some(why));
        assert_eq!(
            refusal(&json!({"error": "missing CAP_BPF"})).as_deref(),
            Some("missing CAP_BPF")
        );
    }
}
