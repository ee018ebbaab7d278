//! The agents of earlier commits, for `test --upgrade`.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};

use crate::artifacts::build_agent_of;
use crate::commits::{check_out, resolve};
use crate::workspace::root;

/// The file with the commits.
const VERSIONS: &str = "tests/upgrade/versions";

/// Which earlier commits are built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Versions {
    /// All of the file.
    All,
    /// The newest one.
    Newest,
}

/// Builds the agents of the commits in the file, and returns their paths: `lb-agent` in a folder named after the commit.
///
/// They are built in this workspace's target folder, since that has most of their dependencies. This replaces this
/// workspace's own agent there, which therefore has to be built afterwards. `features` are those of `lb-tests` that the build of the
/// tests has too.
///
/// # Errors
/// If the file has no commit or one that does not exist, or if a build fails.
pub(crate) fn build(versions: Versions, features: &[&str]) -> Result<Vec<PathBuf>> {
    let path = root().join(VERSIONS);
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut commits = commits(&text);
    ensure!(!commits.is_empty(), "{VERSIONS} has no commit");
    if versions == Versions::Newest {
        commits.drain(..commits.len() - 1);
    }
    commits.into_iter().map(|commit| agent_of(commit, features)).collect()
}

/// Returns the first word of each line that is no comment.
fn commits(text: &str) -> Vec<&str> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| line.split_whitespace().next()).collect()
}

/// Builds the agent of a commit, unless it was built before.
fn agent_of(commit: &str, features: &[&str]) -> Result<PathBuf> {
    let commit = resolve(commit).with_context(|| format!("in {VERSIONS}"))?;
    let folder = root().join("target/upgrade").join(&commit);
    let agent = folder.join("lb-agent");
    if agent.is_file() {
        return Ok(agent);
    }
    println!("building the agent of {commit}");
    let source = check_out(&commit, &folder)?;
    let built = build_agent_of(&source, features)?;
    // The copy has another name until it is complete.
    let unfinished = folder.join("lb-agent.new");
    fs::copy(&built, &unfinished).with_context(|| format!("cannot copy {}", built.display()))?;
    fs::rename(&unfinished, &agent).with_context(|| format!("cannot rename {}", unfinished.display()))?;
    Ok(agent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commits_are_the_first_words_of_lines() {
        assert_eq!(commits("# why\nabc the first\n\ndef\n"), ["abc", "def"]);
    }

    #[test]
    fn every_listed_commit_has_its_full_hash() {
        let text = fs::read_to_string(root().join(VERSIONS)).unwrap();
        let commits = commits(&text);
        assert!(!commits.is_empty());
        for commit in commits {
            assert!(
                commit.len() == 40 && commit.bytes().all(|c| c.is_ascii_hexdigit()),
                "{commit}"
            );
        }
    }
}
