//! The test bed of the package `lb-tests`: its programs, leftovers and demo.

use std::path::PathBuf;

use anyhow::bail;
use lb_tests::demo;

use crate::workspace::root;

/// Paths of the programs that the test bed starts.
#[derive(Debug)]
pub(crate) struct Programs {
    /// `lb-agent`.
    pub(crate) agent: PathBuf,
    /// `lb-testbed`, the helper that serves and connects inside the test bed's namespaces.
    pub(crate) testbed: PathBuf,
}

/// Removes the leftovers of interrupted tests and demos on this machine; returns a line for each.
pub(crate) fn remove_leftovers() -> anyhow::Result<Vec<String>> {
    lb_tests::remove_leftovers()
}

/// Runs the demo.
///
/// # Errors
/// If the demo cannot run, or with `check` if one of its checks fails. With `check` it does not wait for input.
pub(crate) fn demo(programs: &Programs, check: bool) -> anyhow::Result<()> {
    let all_well = demo::run(&demo::Options {
        agent: programs.agent.clone(),
        testbed: programs.testbed.clone(),
        examples: root().join("examples"),
        check,
        seconds: None,
    })?;
    if !all_well {
        bail!("a check of the demo failed");
    }
    Ok(())
}
