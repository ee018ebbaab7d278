//! The pin path: its location, its locks, and the directories below it.

use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use lb_common::abi::{MAPS, VERSION, layout_of};
use nix::fcntl::{Flock, FlockArg, OFlag, open};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::Mode;
use nix::sys::statfs::{BPF_FS_MAGIC, FsType, statfs};

use super::{LoadError, failed};
use crate::maps::sys;

/// The conventional mount point of the kernel's BPF file system.
const BPFFS: &str = "/sys/fs/bpf";

/// Time for which taking a lock is retried. `status` takes a lock for a moment, to find out whether another process has
/// it.
const PATIENCE: Duration = Duration::from_secs(1);
/// Time between two tries.
const PAUSE: Duration = Duration::from_millis(10);

/// The directory below which an agent pins maps and links.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PinPath(PathBuf);

fn is_bpffs(path: &Path) -> bool {
    path.ancestors()
        .find(|p| p.exists())
        .and_then(|p| statfs(p).ok())
        .is_some_and(|stat| FsType(stat.filesystem_type().0) == BPF_FS_MAGIC)
}

impl PinPath {
    /// Returns the pin path at a path on a BPF file system, which may not be mounted yet.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Returns the directory itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.0
    }

    /// Returns the directory of a layout.
    pub(super) fn layout(&self, layout: u32) -> PathBuf {
        self.0.join(format!("v{layout}"))
    }

    /// Returns the directory of the maps of a layout.
    pub(super) fn maps_of(&self, layout: u32) -> PathBuf {
        self.layout(layout).join("maps")
    }

    /// Returns the directory of the maps that replace others, while a build with a layout moves them.
    pub(super) fn next_of(&self, layout: u32) -> PathBuf {
        self.layout(layout).join("next")
    }

    /// Returns the directory that shows that the maps of a layout are not in force yet.
    pub(super) fn filling(&self, layout: u32) -> PathBuf {
        self.layout(layout).join("filling")
    }

    /// Returns the directory of the links of a layout.
    pub(super) fn links_of(&self, layout: u32) -> PathBuf {
        self.layout(layout).join("links")
    }

    /// Returns the directory of the maps of this build's layout.
    #[must_use]
    pub fn maps(&self) -> PathBuf {
        self.maps_of(VERSION)
    }

    /// Returns the directory of the maps that replace others during a move.
    pub(super) fn next(&self) -> PathBuf {
        self.next_of(VERSION)
    }

    /// Returns the directory of the links of this build's layout.
    #[must_use]
    pub fn links(&self) -> PathBuf {
        self.links_of(VERSION)
    }

    /// Creates the directory, and mounts the BPF file system if it is not mounted.
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

    /// Creates the directories of this build's layout, and returns that of the maps.
    pub(super) fn create_dirs(&self) -> Result<PathBuf, LoadError> {
        for dir in [self.maps(), self.links()] {
            fs::create_dir_all(&dir).map_err(failed(&dir, "mkdir"))?;
        }
        Ok(self.maps())
    }

    /// Returns the other layouts that have a directory here.
    ///
    /// # Errors
    /// Returns [`LoadError::PinPath`] if there is something else than directories of layouts.
    pub(super) fn other_layouts(&self) -> Result<Vec<u32>, LoadError> {
        let mut layouts = Vec::new();
        for path in entries(&self.0)? {
            let name = path.file_name().and_then(|name| name.to_str());
            let layout = name.and_then(layout_of).ok_or_else(|| LoadError::PinPath {
                path: path.clone(),
                what: "is no directory of lb: remove it, or use another --pin-path".into(),
            })?;
            layouts.push(layout);
        }
        layouts.retain(|layout| *layout != VERSION);
        layouts.sort_unstable();
        Ok(layouts)
    }

    /// Removes maps of the own layout that this build does not have: one of a later build would not follow the changes that this
    /// build makes.
    pub(super) fn remove_unknown_maps(&self) -> Result<(), LoadError> {
        for pin in entries(&self.maps())? {
            let is_known = pin
                .file_name()
                .is_some_and(|name| MAPS.iter().any(|map| name == map.name));
            if !is_known {
                fs::remove_file(&pin).map_err(failed(&pin, "unlink"))?;
            }
        }
        Ok(())
    }

    /// Returns whether maps of a layout are pinned.
    pub(super) fn has_maps(&self, layout: u32) -> bool {
        entries(&self.maps_of(layout)).is_ok_and(|maps| !maps.is_empty())
    }

    /// Moves the links of another layout to the directory of this build's. The names of links are those of the programs in every
    /// layout.
    pub(super) fn take_links(&self, layout: u32) -> Result<(), LoadError> {
        let from = self.links_of(layout);
        if !from.exists() {
            return Ok(());
        }
        for link in entries(&from)? {
            let to = self.links().join(link.file_name().unwrap_or_default());
            fs::rename(&link, &to).map_err(failed(&link, "rename"))?;
        }
        Ok(())
    }

    /// Removes the maps of a layout, then the rest of its directory, except the links of this build's layout: at every moment the
    /// remaining maps are marked like all of them before.
    pub(super) fn remove_layout(&self, layout: u32) -> Result<(), LoadError> {
        remove_dir(&self.maps_of(layout))?;
        if layout == VERSION {
            remove_dir(&self.filling(layout))
        } else {
            remove_dir(&self.layout(layout))
        }
    }

    /// Removes everything, links first. Links are detached explicitly, since the kernel releases a link some time after its
    /// last pin.
    pub(super) fn remove_all(&self) -> Result<(), LoadError> {
        for dir in entries(&self.0)? {
            let links = dir.join("links");
            if links.exists() {
                for link in entries(&links)? {
                    // A file that is not a link, or cannot be detached, is removed below like the others.
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

/// Removes a directory with its content, if it exists.
pub(super) fn remove_dir(dir: &Path) -> Result<(), LoadError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(dir, "remove")(error)),
        _ => Ok(()),
    }
}

/// Returns the paths in a directory.
pub(super) fn entries(dir: &Path) -> Result<Vec<PathBuf>, LoadError> {
    fs::read_dir(dir)
        .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect())
        .map_err(failed(dir, "readdir"))
}

/// The exclusive lock for writing below a pin path. The kernel releases it when the process ends.
#[derive(Debug)]
pub struct Lock {
    pins: PinPath,
    /// Kept open, since that holds the lock.
    _file: Flock<fs::File>,
}

impl Lock {
    /// Creates the directory if it does not exist, and takes the lock.
    ///
    /// # Errors
    /// Returns [`LoadError::Locked`] if another process holds the lock for longer than a second.
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

    /// Returns whether a process holds the lock.
    #[must_use]
    pub fn is_taken(pins: &PinPath) -> bool {
        matches!(try_lock(pins.root(), FlockArg::LockSharedNonblock), Ok(None))
    }

    /// Returns the pin path that the lock protects.
    #[must_use]
    pub fn pins(&self) -> &PinPath {
        &self.pins
    }
}

/// The exclusive lock for requesting trace events and reading them. The kernel releases it when the process ends.
#[derive(Debug)]
pub struct TraceLock {
    /// Kept open, since that holds the lock. It is the directory of the maps: the agent locks the root.
    _file: Flock<fs::File>,
}

impl TraceLock {
    /// Takes the lock; returns `None` if another process holds it.
    ///
    /// # Errors
    /// Returns [`LoadError::Call`] if a system call fails, or if nothing is pinned.
    pub fn take(pins: &PinPath) -> Result<Option<Self>, LoadError> {
        Ok(lock(&pins.maps())?.map(|file| Self { _file: file }))
    }

    /// Takes the lock like [`Self::take`], but does not wait for a process that holds it for a moment only.
    ///
    /// # Errors
    /// Returns the errors of [`Self::take`].
    pub fn try_take(pins: &PinPath) -> Result<Option<Self>, LoadError> {
        let file = try_lock(&pins.maps(), FlockArg::LockExclusiveNonblock)?;
        Ok(file.map(|file| Self { _file: file }))
    }
}

/// Locks a directory exclusively; returns `None` if another process keeps a lock on it.
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

/// Locks a directory; returns `None` if another process holds a lock that excludes this one.
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
