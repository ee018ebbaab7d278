//! The test bed, which package `lb-tests` provides.

use std::path::PathBuf;

use anyhow::bail;

/// The programs that the bed starts.
#[derive(Debug)]
pub(crate) struct Programs {
    /// `lb-agent`.
    pub(crate) agent: PathBuf,
    /// `lb-testbed`, the helper that serves and connects inside the bed's namespaces.
    pub(crate) testbed: Option<PathBuf>,
}

/// Removes what interrupted tests and demos left on this machine; returns a line for each thing.
#[expect(clippy::unnecessary_wraps, reason = "lb_tests::remove_leftovers can fail")]
pub(crate) fn remove_leftovers() -> anyhow::Result<Vec<String>> {
    Ok(Vec::new())
}

/// Shows lb at work; with `check`, without waiting for a person, and an error if anything is not as it should be.
pub(crate) fn demo(programs: &Programs, check: bool) -> anyhow::Result<()> {
    bail!("the demo is not wired yet ({programs:?}, check: {check})")
}
