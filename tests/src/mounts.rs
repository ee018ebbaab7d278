//! The kernel file systems that the test bed needs: cgroup2 and bpffs.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};

/// The mount point of bpffs.
pub const BPFFS: &str = "/sys/fs/bpf";

/// Returns the mount point of the cgroup2 hierarchy from `/proc/mounts`: `/sys/fs/cgroup` on most machines,
/// `/sys/fs/cgroup/unified` on hybrid ones.
///
/// # Errors
/// If `/proc/mounts` cannot be read or contains no cgroup2 mount.
pub fn cgroup2_root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").context("reading /proc/mounts")?;
    mount_point(&mounts, "cgroup2").context("no cgroup2 mount in /proc/mounts")
}

/// Mounts a bpffs at [`BPFFS`] unless one is mounted there. Several processes may call this at the same time.
///
/// # Errors
/// If `/sys/fs/bpf` is missing, or the kernel refuses the mount.
pub fn ensure_bpffs() -> Result<()> {
    // A second mount on top of the first would hide its pins, so one caller at a time checks and mounts. A caller that
    // opens the directory after the mount locks another inode, but then finds the mount.
    let directory = File::open(BPFFS).with_context(|| format!("opening {BPFFS}"))?;
    let _lock = Flock::lock(directory, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("locking {BPFFS}"))?;
    if has_bpffs()? {
        return Ok(());
    }
    mount(
        Some("bpf"),
        BPFFS,
        Some("bpf"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        Some("mode=0700"),
    )
    .with_context(|| format!("mounting bpffs at {BPFFS}"))
}

/// Returns whether a bpffs is mounted at [`BPFFS`].
pub(crate) fn has_bpffs() -> Result<bool> {
    let mounts = fs::read_to_string("/proc/mounts").context("reading /proc/mounts")?;
    Ok(fields(&mounts).any(|(point, kind)| kind == "bpf" && point == Path::new(BPFFS)))
}

/// Returns the first mount point of file system `kind` in the text of `/proc/mounts`.
fn mount_point(mounts: &str, kind: &str) -> Option<PathBuf> {
    fields(mounts).find_map(|(point, found)| (found == kind).then_some(point))
}

/// Returns the mount point and type of every line of `/proc/mounts`.
fn fields(mounts: &str) -> impl Iterator<Item = (PathBuf, &str)> {
    mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (point, kind) = (words.next()?, words.next()?);
        // The kernel writes a blank, tab, newline or backslash as an octal number.
        let point = point
            .replace("\\040", " ")
            .replace("\\011", "\t")
            .replace("\\012", "\n")
            .replace("\\134", "\\");
        Some((PathBuf::from(point), kind))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_cgroup2_on_a_hybrid_machine() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
                      cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/uni\\040fied cgroup2 rw,relatime 0 0\n";
        assert_eq!(
            mount_point(mounts, "cgroup2"),
            Some(PathBuf::from("/sys/fs/cgroup/uni fied"))
        );
        assert_eq!(mount_point(mounts, "bpf"), None);
    }
}
