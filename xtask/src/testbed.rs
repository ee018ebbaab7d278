//! The test bed, which package `lb-tests` provides.

use std::path::PathBuf;

use anyhow::bail;
use lb_tests::demo;

use crate::workspace::root;

/// The programs that the bed starts.
#[derive(Debug)]
pub(crate) struct Programs {
    /// `lb-agent`.
    pub(crate) agent: PathBuf,
    /// `lb-testbed`, the helper that serves and connects inside the bed's namespaces.
    pub(crate) testbed: PathBuf,
}

/// Removes what interrupted tests and demos left on this machine; returns a line for each thing.
pub(crate) fn remove_leftovers() -> anyhow::Result<Vec<String>> {
    lb_tests::remove_leftovers()
}

/// Shows lb at work; with `check`, without waiting for a person, and an error if anything is not as it should be.
pub(crate) fn demo(programs: &Programs, check: bool) -> anyhow::Result<()> {
    let all_well = demo::run(&demo::Options {
        agent: programs.agent.clone(),
        testbed: programs.testbed.clone(),
        examples: root().join("examples"),
        check,
        seconds: None,
    })?;
    if !all_well {
        bail!("the demo found something that is not as it should be");
    }
    Ok(())
}
