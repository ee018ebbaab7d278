//! Commands that run as root, directly or through sudo.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::Command;

use anyhow::bail;
use nix::unistd::Uid;

/// Returns true if this process is root.
pub(crate) fn is_root() -> bool {
    Uid::effective().is_root()
}

/// Returns a command that runs `program` as root with the variables `env`: directly if this process is root, else through
/// sudo. `what` names the action that needs root, for the error.
///
/// # Errors
/// If this process is not root and sudo is not installed.
pub(crate) fn as_root(program: &Path, env: &[(&str, OsString)], what: &str) -> anyhow::Result<Command> {
    if is_root() {
        let mut command = Command::new(program);
        command.envs(env.iter().map(|(name, value)| (name, value)));
        return Ok(command);
    }
    if which::which("sudo").is_err() {
        bail!("{what} needs root, and sudo is not installed: run this command as root");
    }
    let mut command = Command::new("sudo");
    // sudo may drop variables despite -E; env sets those that matter.
    command.args(["-E", "env"]);
    for (name, value) in env {
        let mut word = OsString::from(name);
        word.push("=");
        word.push(value);
        command.arg(word);
    }
    command.arg(program.as_os_str());
    Ok(command)
}

/// Returns the user's search path with root's folders appended. A user's own path often lacks `/usr/sbin`, which contains
/// `nft` and `bridge`.
pub(crate) fn search_path() -> OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    for dir in ["/usr/local/sbin", "/usr/sbin", "/sbin"] {
        let known = std::env::split_paths(&path).any(|known| known.as_os_str() == OsStr::new(dir));
        if !known {
            path.push(":");
            path.push(dir);
        }
    }
    path
}
