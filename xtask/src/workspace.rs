//! Paths of the workspace and of this program.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

/// Returns the folder of the workspace.
pub(crate) fn root() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package).to_path_buf()
}

/// Returns the path of this program.
///
/// The build of the tests may replace the file while it runs; the kernel then appends a mark to the path of the old one,
/// and this function returns the path of the new one.
///
/// # Errors
/// If the kernel does not report the path.
pub(crate) fn current_program() -> anyhow::Result<PathBuf> {
    let path = env::current_exe().context("cannot find the path of this program")?;
    let replaced = path.to_str().and_then(|path| path.strip_suffix(" (deleted)"));
    Ok(replaced.map_or_else(|| path.clone(), PathBuf::from))
}
