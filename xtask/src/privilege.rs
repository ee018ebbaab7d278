//! Being root, or becoming root.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::Command;

use anyhow::bail;
use nix::unistd::Uid;

/// This process is root.
pub(crate) fn is_root() -> bool {
    Uid::effective().is_root()
}

/// A command that runs `program` as root with `env` set: as it is for root, else through sudo. `what` says what needs
/// root, for the error where there is no sudo.
pub(crate) fn as_root(program: &Path, env: &[(&str, OsString)], what: &str) -> anyhow::Result<Command> {
    if is_root() {
        let mut command = Command::new(program);
        command.envs(env.iter().map(|(name, value)| (name, value)));
        return Ok(command);
    }
    if which::which("sudo").is_err() {
        bail!("{what} needs root, and there is no sudo: run this command as root");
    }
    let mut command = Command::new("sudo");
    // sudo may drop variables in spite of -E; env sets those that matter.
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

/// The user's search path with root's folders: a user's own often lacks `/usr/sbin`, where `nft` and `bridge` are.
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
