//! The pin path: where it is, who may write to it, and what is below it.

use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg, OFlag, open};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::Mode;
use nix::sys::statfs::{BPF_FS_MAGIC, FsType, statfs};

use super::{LoadError, version_dir};
use crate::maps::sys;

/// Where the kernel's BPF file system is mounted by convention.
const BPFFS: &str = "/sys/fs/bpf";

/// How long a lock is tried for: `status` holds one for a moment, only to learn whether it can be had.
const PATIENCE: Duration = Duration::from_secs(1);
/// Time between two tries.
const PAUSE: Duration = Duration::from_millis(10);

/// The folder that an agent pins everything below.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PinPath(PathBuf);

fn failed(path: &Path, call: &'static str) -> impl FnOnce(io::Error) -> LoadError {
    let path = path.to_owned();
    move |source| LoadError::Call { path, call, source }
}

fn is_bpffs(path: &Path) -> bool {
    path.ancestors()
        .find(|p| p.exists())
        .and_then(|p| statfs(p).ok())
        .is_some_and(|stat| FsType(stat.filesystem_type().0) == BPF_FS_MAGIC)
}

impl PinPath {
    /// A path that is on a BPF file system, or will be.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The folder itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.0
    }

    /// Where this build's maps are pinned.
    #[must_use]
    pub fn maps(&self) -> PathBuf {
        self.0.join(version_dir()).join("maps")
    }

    /// Where this build's links are pinned.
    #[must_use]
    pub fn links(&self) -> PathBuf {
        self.0.join(version_dir()).join("links")
    }

    /// Makes the folder, and mounts the BPF file system where it is not mounted.
    fn create(&self) -> Result<(), LoadError> {
        if !is_bpffs(&self.0) {
            if !self.0.starts_with(BPFFS) {
                return Err(LoadError::PinPath {
                    path: self.0.clone(),
                    what: format!("--pin-path must be on a BPF file system, such as {BPFFS}"),
                });
            }
            mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
                .map_err(|e| failed(Path::new(BPFFS), "mount")(e.into()))?;
        }
        fs::create_dir_all(&self.0).map_err(failed(&self.0, "mkdir"))
    }

    /// Makes the folders of this build's layout; returns that of the maps.
    pub(super) fn create_dirs(&self) -> Result<PathBuf, LoadError> {
        for dir in [self.maps(), self.links()] {
            fs::create_dir_all(&dir).map_err(failed(&dir, "mkdir"))?;
        }
        Ok(self.maps())
    }

    /// Refuses what a build with another layout has pinned.
    pub(super) fn refuse_other_versions(&self) -> Result<(), LoadError> {
        let entries = fs::read_dir(&self.0).map_err(failed(&self.0, "readdir"))?;
        for entry in entries {
            let entry = entry.map_err(failed(&self.0, "readdir"))?;
            if entry.file_name() != version_dir().as_str() {
                return Err(LoadError::Layout {
                    path: entry.path(),
                    what: format!("belongs to another layout than {}", version_dir()),
                });
            }
        }
        Ok(())
    }

    /// Removes everything, links first: detached here, since the kernel ends a link some time after its last pin.
    pub(super) fn remove_all(&self) -> Result<(), LoadError> {
        for dir in entries(&self.0)? {
            let links = dir.join("links");
            if links.exists() {
                for link in entries(&links)? {
                    // What is no link, or cannot be detached, is removed below like the rest.
                    if let Ok(link) = sys::obj_get(&link) {
                        sys::link_detach(link.as_fd()).ok();
                    }
                }
            }
            fs::remove_dir_all(&dir).map_err(failed(&dir, "remove"))?;
        }
        fs::remove_dir(&self.0).map_err(failed(&self.0, "rmdir"))
    }
}

/// The paths in a folder.
fn entries(dir: &Path) -> Result<Vec<PathBuf>, LoadError> {
    fs::read_dir(dir)
        .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect())
        .map_err(failed(dir, "readdir"))
}

/// The right to write below a pin path: one process has it, and loses it when it ends.
#[derive(Debug)]
pub struct Lock {
    pins: PinPath,
    /// Held open.
    _file: Flock<fs::File>,
}

impl Lock {
    /// Makes the folder where it is not there, and takes the lock.
    ///
    /// # Errors
    /// [`LoadError::Locked`] where another process has it, and keeps it for a second.
    pub fn take(pins: &PinPath) -> Result<Self, LoadError> {
        pins.create()?;
        match lock(pins.root())? {
            Some(file) => Ok(Self {
                pins: pins.clone(),
                _file: file,
            }),
            None => Err(LoadError::Locked(pins.root().into())),
        }
    }

    /// Whether some process has the lock.
    #[must_use]
    pub fn is_taken(pins: &PinPath) -> bool {
        matches!(try_lock(pins.root(), FlockArg::LockSharedNonblock), Ok(None))
    }

    /// What the lock is for.
    #[must_use]
    pub fn pins(&self) -> &PinPath {
        &self.pins
    }
}

/// The right to say which events are written, and to read them: one process has it, and loses it when it ends.
#[derive(Debug)]
pub struct TraceLock {
    /// Held open: the folder of the maps, since the root's lock is the agent's.
    _file: Flock<fs::File>,
}

impl TraceLock {
    /// Takes the lock; `None` where another process has it.
    ///
    /// # Errors
    /// The system call's, also where nothing is pinned.
    pub fn take(pins: &PinPath) -> Result<Option<Self>, LoadError> {
        Ok(lock(&pins.maps())?.map(|file| Self { _file: file }))
    }

    /// As [`Self::take`], but does not wait for who may have it for a moment only.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub fn try_take(pins: &PinPath) -> Result<Option<Self>, LoadError> {
        let file = try_lock(&pins.maps(), FlockArg::LockExclusiveNonblock)?;
        Ok(file.map(|file| Self { _file: file }))
    }
}

/// The folder, locked for this process alone; `None` where somebody else has it, and keeps it.
fn lock(path: &Path) -> Result<Option<Flock<fs::File>>, LoadError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let locked = try_lock(path, FlockArg::LockExclusiveNonblock)?;
        if locked.is_some() || Instant::now() >= deadline {
            return Ok(locked);
        }
        thread::sleep(PAUSE);
    }
}

/// The locked folder; `None` where somebody else holds a lock that excludes this one.
fn try_lock(path: &Path, how: FlockArg) -> Result<Option<Flock<fs::File>>, LoadError> {
    let dir = open(
        path,
        OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_RDONLY,
        Mode::empty(),
    )
    .map_err(|e| failed(path, "open")(e.into()))?;
    let file = fs::File::from(dir.as_fd().try_clone_to_owned().map_err(failed(path, "dup"))?);
    match Flock::lock(file, how) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, error)) => Err(failed(path, "flock")(error.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_only_looks_keeps_nobody_out() {
        let folder = tempfile::tempdir().unwrap();
        let looks = try_lock(folder.path(), FlockArg::LockSharedNonblock).unwrap().unwrap();
        assert!(
            try_lock(folder.path(), FlockArg::LockExclusiveNonblock)
                .unwrap()
                .is_none()
        );
        let looking = thread::spawn(move || {
            thread::sleep(10 * PAUSE);
            drop(looks);
        });
        let kept = lock(folder.path()).unwrap().expect("who looked has gone");
        looking.join().unwrap();
        assert!(lock(folder.path()).unwrap().is_none(), "somebody has it for good");
        drop(kept);
    }
}
