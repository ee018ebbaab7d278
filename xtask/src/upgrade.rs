//! The agents of other builds, for `test --upgrade` and `bench upgrade`: those of earlier commits, and one with a later layout of
//! maps.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use crate::artifacts::{build_agent_of, build_agent_with};
use crate::commits::{check_out, resolve};
use crate::workspace::root;

/// The file with the commits.
const VERSIONS: &str = "tests/upgrade/versions";

/// Feature of `lb-agent` that gives its maps a layout after the present one; the name of the folder, too.
const MADE_UP_LAYOUT: &str = "made-up-layout";

/// Which earlier commits are built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Versions {
    /// All of the file.
    All,
    /// The newest one.
    Newest,
    /// The oldest one.
    Oldest,
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
    match versions {
        Versions::All => {}
        Versions::Newest => drop(commits.drain(..commits.len() - 1)),
        Versions::Oldest => commits.truncate(1),
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
    let folder = folder(&commit);
    let agent = folder.join("lb-agent");
    if agent.is_file() {
        return Ok(agent);
    }
    println!("building the agent of {commit}");
    let source = check_out(&commit, &folder)?;
    rename_packages(&source.join("Cargo.toml"), &commit)?;
    let built = build_agent_of(&source, features)?;
    keep(&built, &folder)
}

/// Gives the packages of a checkout another version. cargo takes packages of two checkouts for the same if they have the same name and
/// version, and would use artifacts of one for the other.
fn rename_packages(manifest: &Path, commit: &str) -> Result<()> {
    let text = fs::read_to_string(manifest).with_context(|| format!("cannot read {}", manifest.display()))?;
    let renamed = with_version_of(&text, commit).with_context(|| format!("no version in {}", manifest.display()))?;
    fs::write(manifest, renamed).with_context(|| format!("cannot write {}", manifest.display()))
}

/// Returns the manifest of a workspace with the version of a commit for all packages, or `None` if it has no version.
fn with_version_of(manifest: &str, commit: &str) -> Option<String> {
    const KEY: &str = "\nversion = \"";
    let (before, after) = manifest.split_once(KEY)?;
    let (version, after) = after.split_once('"')?;
    let (version, _) = version.split_once('-').unwrap_or((version, ""));
    Some(format!("{before}{KEY}{version}-at{commit}\"{after}"))
}

/// Builds this workspace's agent with the made-up layout, and returns its path. Like [`build`], this replaces the agent in the
/// target folder. It is built each time, since the workspace may have changed.
///
/// # Errors
/// If the build fails.
pub(crate) fn build_made_up(features: &[&str]) -> Result<PathBuf> {
    let built = build_agent_with(MADE_UP_LAYOUT, features)?;
    keep(&built, &folder(MADE_UP_LAYOUT))
}

/// Returns the folder of an agent.
fn folder(name: &str) -> PathBuf {
    root().join("target/upgrade").join(name)
}

/// Copies an agent into a folder, since the next build overwrites it, and returns the path of the copy.
fn keep(built: &Path, folder: &Path) -> Result<PathBuf> {
    let agent = folder.join("lb-agent");
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    // The copy has another name until it is complete.
    let unfinished = folder.join("lb-agent.new");
    fs::copy(built, &unfinished).with_context(|| format!("cannot copy {}", built.display()))?;
    fs::rename(&unfinished, &agent).with_context(|| format!("cannot rename {}", unfinished.display()))?;
    Ok(agent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_of_a_commit_have_a_version_of_their_own() {
        let manifest = "[workspace.package]\nversion = \"0.1.0\"\nedition = \"2024\"\n";
        let renamed = with_version_of(manifest, "8ec0a92").unwrap();
        assert_eq!(renamed, manifest.replace("0.1.0", "0.1.0-at8ec0a92"));
        assert_eq!(with_version_of(&renamed, "8ec0a92"), Some(renamed));
        assert_eq!(with_version_of("[workspace]\n", "8ec0a92"), None);
    }

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
