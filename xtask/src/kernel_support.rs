//! Support of lb by the kernel of this machine, found by loading programs.

use std::path::Path;
use std::process::Output;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::privilege::{as_root, search_path};

/// Returns the reason why lb cannot run on this machine's kernel, or nothing if it can. Probes as root.
pub(crate) fn shortcoming() -> Result<Option<String>> {
    // bpftool loads a small program of each type and reports the types that the kernel accepted.
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

/// Returns the reason why the features that bpftool found are not enough.
fn refusal(features: &Value) -> Option<String> {
    if features["program_types"]["have_cgroup_sock_addr_prog_type"] == true {
        return None;
    }
    let error = features["error"]
        .as_str()
        .unwrap_or("the kernel accepts no program for sockets of a cgroup");
    Some(error.to_owned())
}

fn output_as_root(program: &str, arguments: &[&str]) -> Result<Output> {
    as_root(Path::new(program), &[("PATH", search_path())], "probing the kernel")?
        .args(arguments)
        .output()
        .with_context(|| format!("cannot run {program}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn kernel_that_accepts_the_program_is_supported() {
        let features = |accepted| json!({"program_types": {"have_cgroup_sock_addr_prog_type": accepted}});
        assert_eq!(refusal(&features(true)), None);
        let why = "the kernel accepts no program for sockets of a cgroup";
        assert_eq!(refusal(&features(false)).as_deref(), Some(why));
        assert_eq!(refusal(&Value::Null).as_deref(), Some(why));
        assert_eq!(
            refusal(&json!({"error": "missing CAP_BPF"})).as_deref(),
            Some("missing CAP_BPF")
        );
    }
}
