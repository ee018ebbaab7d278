//! A process as a client: its network namespace and its cgroup.

use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path};

use anyhow::Context as _;

use crate::loader;
use crate::maps::sys;
use crate::node::{links, netns};

/// Returns the cookie of the network namespace of a process.
pub(super) fn netns_cookie(pid: u32) -> anyhow::Result<u64> {
    let path = format!("/proc/{pid}/ns/net");
    let theirs = File::open(&path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => anyhow::anyhow!("there is no process {pid}"),
        io::ErrorKind::PermissionDenied => anyhow::anyhow!("no permission to open {path}: CAP_SYS_PTRACE is needed"),
        _ => anyhow::Error::new(error).context(format!("opening {path}")),
    })?;
    let ours = fs::metadata("/proc/self/ns/net").context("opening /proc/self/ns/net")?;
    let there = theirs
        .metadata()
        .with_context(|| format!("reading the metadata of {path}"))?;
    if (ours.dev(), ours.ino()) == (there.dev(), there.ino()) {
        return sys::netns_cookie().context("SO_NETNS_COOKIE");
    }
    let entered = netns::within(&theirs, sys::netns_cookie);
    entered
        .with_context(|| format!("entering the network namespace of process {pid} (that needs CAP_SYS_ADMIN)"))?
        .context("SO_NETNS_COOKIE")
}

/// Returns the source address of packets that a process sends to an address; `None` if there is no route, or if its
/// network namespace cannot be entered.
pub(super) fn source(pid: u32, to: IpAddr) -> Option<IpAddr> {
    let netns = File::open(format!("/proc/{pid}/ns/net"));
    let source = netns.and_then(|netns| netns::within(&netns, || links::source(to))?);
    source.ok().flatten()
}

/// Returns the name of a process; `?` if it has ended.
pub(super) fn command(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).map_or_else(|_| "?".into(), |text| text.trim_end().to_owned())
}

/// Whether a process is below a cgroup, so that the programs there handle its calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Below {
    Yes,
    No,
    /// Its cgroup is not visible from this cgroup namespace.
    Unknown,
}

/// Returns whether a process is in the cgroup with this id, or in one below it.
pub(super) fn is_below(pid: u32, cgroup: u64) -> anyhow::Result<Below> {
    if loader::is_root_cgroup(cgroup) {
        return Ok(Below::Yes);
    }
    let path = format!("/proc/{pid}/cgroup");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let root = loader::cgroup_root()?;
    Ok(unified(&text).map_or(Below::Unknown, |path| below(&root, path, cgroup)))
}

/// Returns the path in the cgroup2 hierarchy, from the text of `/proc/PID/cgroup` (cgroups(7)).
fn unified(text: &str) -> Option<&Path> {
    text.lines().find_map(|line| line.strip_prefix("0::/")).map(Path::new)
}

/// Returns whether the cgroup with this id is on the path from the root of the hierarchy to `path`.
fn below(root: &Path, path: &Path, cgroup: u64) -> Below {
    if path.components().any(|part| part == Component::ParentDir) {
        return Below::Unknown;
    }
    let path = root.join(path);
    let ids = path.ancestors().take_while(|dir| dir.starts_with(root));
    let ids: io::Result<Vec<u64>> = ids.map(|dir| fs::metadata(dir).map(|it| it.ino())).collect();
    match ids {
        Ok(ids) if ids.contains(&cgroup) => Below::Yes,
        Ok(_) => Below::No,
        Err(_) => Below::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unified_hierarchy_is_the_line_without_a_controller() {
        let hybrid = "12:cpu:/a\n1:name=systemd:/b\n0::/pods/one\n";
        assert_eq!(unified(hybrid), Some(Path::new("pods/one")));
        assert_eq!(unified("0::/\n"), Some(Path::new("")));
        assert_eq!(unified("1:cpu:/a\n"), None);
    }

    #[test]
    fn cgroup_and_its_descendants_are_below_it() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        fs::create_dir_all(root.join("node/pod")).unwrap();
        fs::create_dir_all(root.join("other")).unwrap();
        let node = fs::metadata(root.join("node")).unwrap().ino();
        let is = |path: &str| below(root, Path::new(path), node);
        assert_eq!([is("node"), is("node/pod")], [Below::Yes, Below::Yes]);
        assert_eq!([is(""), is("other")], [Below::No, Below::No]);
        assert_eq!([is("../node"), is("node/gone")], [Below::Unknown, Below::Unknown]);
    }
}
