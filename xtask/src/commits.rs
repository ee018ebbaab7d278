//! Checkouts of other commits of this repository.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use crate::command::clean_command;

/// Returns the full hash of a commit.
///
/// # Errors
/// If there is no such commit.
pub(crate) fn resolve(commit: &str) -> Result<String> {
    let revision = format!("{commit}^{{commit}}");
    let output = clean_command("git")
        .args(["rev-parse", "--verify", "--quiet", "--end-of-options", &revision])
        .output()
        .context("cannot run git")?;
    ensure!(
        output.status.success(),
        "{commit:?} is no commit of this repository (a shallow clone has only the newest)"
    );
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// Checks `commit` out into `source` below `folder`, unless it is there, and returns that path.
///
/// # Errors
/// If git fails.
pub(crate) fn check_out(commit: &str, folder: &Path) -> Result<PathBuf> {
    let source = folder.join("source");
    if !source.join("Cargo.toml").is_file() {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        // Forced: a worktree whose folder was deleted with `target` is still registered.
        let status = clean_command("git")
            .args(["worktree", "add", "--quiet", "--force", "--detach"])
            .arg(&source)
            .arg(commit)
            .status()
            .context("cannot run git")?;
        ensure!(status.success(), "git cannot check out {commit} ({status})");
    }
    Ok(source)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commit_must_exist() {
        assert_eq!(resolve("HEAD").unwrap().len(), 40);
        assert!(resolve("no-such-commit").is_err());
        assert!(resolve("--help").is_err());
    }
}
