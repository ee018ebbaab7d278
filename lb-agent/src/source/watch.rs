//! Detects changes of manifests: inotify, and a slow timer for changes that inotify does not report.
//!
//! Folders are watched, never files: a file that an editor replaces by renaming has a new inode, and a mounted
//! ConfigMap changes by the renaming of a link beside the files.

use std::collections::{BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use notify::event::{AccessKind, AccessMode, ModifyKind};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout};

use super::manifests::{absolute, is_manifest};

/// Quiet period after which a change is reported.
const QUIET: Duration = Duration::from_millis(10);
/// Longest time that a change waits for the quiet period.
const PATIENCE: Duration = Duration::from_millis(200);
/// Interval of scans without an inotify event.
const PERIOD: Duration = Duration::from_secs(3);
/// The largest number of paths that are reported individually; beyond it, every folder is reported.
const MAX_PATHS: usize = 4096;

/// Reports when files may have changed.
///
/// If inotify is unavailable (its limits are per user, and small), the timer remains; see
/// [`degraded`](Self::degraded).
#[derive(Debug)]
pub struct Watcher {
    paths: Vec<PathBuf>,
    inotify: Option<RecommendedWatcher>,
    shared: Arc<Shared>,
    /// The watched folders (canonical), with device and inode, which distinguish a new folder of the same name.
    watched: HashMap<PathBuf, (u64, u64)>,
    degraded: Option<String>,
    /// Time of the next scan without an event.
    next: Instant,
    /// Time of the first pending change.
    since: Option<Instant>,
}

/// State shared by inotify's thread and the agent.
#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    wake: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// By canonical path, for one inode can be watched by one name only.
    interests: HashMap<PathBuf, Interest>,
    pending: BTreeSet<PathBuf>,
    /// Watched folders that were removed or moved away: their watches are dead or lie.
    stale: BTreeSet<PathBuf>,
    /// Events were lost, or are too many to report.
    overflow: bool,
}

/// The names of interest in a folder.
#[derive(Debug, Default, Clone)]
struct Interest {
    /// The paths by which the folder was given; all manifests in it matter then.
    folders: BTreeSet<PathBuf>,
    /// Names of interest, with the paths that they are reported as.
    names: HashMap<OsString, BTreeSet<PathBuf>>,
}

impl Interest {
    /// The paths to report when `name` has changed.
    fn paths(&self, name: &OsStr) -> Vec<PathBuf> {
        // All files of a mounted ConfigMap are links through `..data`.
        if name.as_encoded_bytes().starts_with(b"..") {
            return self.all();
        }
        let named = self.names.get(name).into_iter().flatten().cloned();
        let folders = self.folders.iter().filter(|_| is_manifest(Path::new(name)));
        named.chain(folders.map(|folder| folder.join(name))).collect()
    }

    fn all(&self) -> Vec<PathBuf> {
        self.folders
            .iter()
            .chain(self.names.values().flatten())
            .cloned()
            .collect()
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn event(&self, event: notify::Result<Event>) {
        let relevant = match event {
            // Reading a manifest is an event too.
            Ok(event) if is_read(event.kind) => false,
            Ok(event) => self.state().event(&event),
            Err(error) => {
                tracing::warn!(%error, "inotify");
                self.state().overflow = true;
                true
            }
        };
        if relevant {
            self.wake.notify_one();
        }
    }
}

fn is_read(kind: EventKind) -> bool {
    matches!(kind, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write))
}

impl State {
    /// Records an event; returns false if it concerns no manifest.
    fn event(&mut self, event: &Event) -> bool {
        let mut relevant = event.need_rescan();
        self.overflow |= relevant;
        for path in &event.paths {
            let mut changed = Vec::new();
            if let Some(interest) = self.interests.get(path) {
                changed = interest.all();
                if matches!(
                    event.kind,
                    EventKind::Remove(_) | EventKind::Modify(ModifyKind::Name(_))
                ) {
                    self.stale.insert(path.clone());
                }
            }
            if let (Some(folder), Some(name)) = (path.parent(), path.file_name())
                && let Some(interest) = self.interests.get(folder)
            {
                changed.extend(interest.paths(name));
            }
            relevant |= !changed.is_empty();
            if self.pending.len() < MAX_PATHS {
                self.pending.extend(changed);
            } else {
                self.overflow |= !changed.is_empty();
            }
        }
        relevant
    }
}

impl Watcher {
    /// Begins to watch these files and folders, whether they are there or not. To be called before the first scan, so
    /// that nothing is lost in between.
    #[must_use]
    pub fn new(paths: &[PathBuf]) -> Self {
        let shared = Arc::new(Shared::default());
        let handler = Arc::clone(&shared);
        let config = notify::Config::default().with_follow_symlinks(false);
        let inotify = RecommendedWatcher::new(move |event| handler.event(event), config);
        let mut watcher = Self {
            paths: paths.iter().map(|path| absolute(path)).collect(),
            degraded: inotify.as_ref().err().map(ToString::to_string),
            inotify: inotify.ok(),
            shared,
            watched: HashMap::new(),
            next: Instant::now() + PERIOD,
            since: None,
        };
        watcher.rewatch();
        if let Some(error) = watcher.degraded() {
            tracing::warn!(
                error,
                "manifests are looked at every {PERIOD:?} only, for inotify fails"
            );
        }
        watcher
    }

    /// The reason why changes are detected late, if they are: a folder that inotify cannot watch.
    #[must_use]
    pub fn degraded(&self) -> Option<&str> {
        self.degraded.as_deref()
    }

    /// Waits until something may have changed: absolute paths of files, or of folders if all files in them may have
    /// changed, for [`ManifestSource::rescan_forced`](super::manifests::ManifestSource::rescan_forced). No paths at all
    /// mean that a few seconds have passed, and that the time stamps are to be compared.
    ///
    /// May be dropped at any point without the loss of a change.
    pub async fn changed(&mut self) -> Vec<PathBuf> {
        loop {
            let wake = self.shared.wake.notified();
            if self.is_pending() {
                break;
            }
            tokio::select! {
                () = wake => {}
                () = sleep_until(self.next) => {
                    self.next = Instant::now() + PERIOD;
                    return self.rewatch();
                }
            }
        }
        let since = *self.since.get_or_insert_with(Instant::now);
        while since.elapsed() < PATIENCE && timeout(QUIET, self.shared.wake.notified()).await.is_ok() {}
        self.since = None;
        self.next = Instant::now() + PERIOD;
        let new = self.rewatch();
        let mut state = self.shared.state();
        let mut paths = std::mem::take(&mut state.pending);
        paths.extend(new);
        if std::mem::take(&mut state.overflow) {
            paths.extend(state.interests.values().flat_map(Interest::all));
        }
        paths.into_iter().collect()
    }

    fn is_pending(&self) -> bool {
        let state = self.shared.state();
        state.overflow || !state.pending.is_empty()
    }

    /// Updates the watches to the folders that exist now; returns the paths with new watches.
    fn rewatch(&mut self) -> Vec<PathBuf> {
        let Some(inotify) = &mut self.inotify else {
            return Vec::new();
        };
        let interests = interests(&self.paths);
        let stale = {
            let mut state = self.shared.state();
            state.interests.clone_from(&interests);
            std::mem::take(&mut state.stale)
        };
        let identity = |path: &Path| {
            fs::metadata(path)
                .ok()
                .filter(Metadata::is_dir)
                .map(|m| (m.dev(), m.ino()))
        };
        self.watched.retain(|folder, known| {
            let same = interests.contains_key(folder) && !stale.contains(folder) && identity(folder) == Some(*known);
            if !same {
                // It fails if the kernel has dropped the watch together with the folder.
                let _ = inotify.unwatch(folder);
            }
            same
        });
        let mut new = Vec::new();
        let mut failed = None;
        for (folder, interest) in interests {
            if self.watched.contains_key(&folder) {
                continue;
            }
            let Some(identity) = identity(&folder) else {
                continue;
            };
            match inotify.watch(&folder, RecursiveMode::NonRecursive) {
                Ok(()) => {
                    self.watched.insert(folder, identity);
                    new.extend(interest.all());
                }
                Err(error) => failed = Some(format!("{}: {error}", folder.display())),
            }
        }
        self.degraded = failed;
        new
    }
}

/// The folders to watch: each given folder; the parent folder of every path; and if a path is a link,
/// the folder of its target.
fn interests(paths: &[PathBuf]) -> HashMap<PathBuf, Interest> {
    let mut interests: HashMap<PathBuf, Interest> = HashMap::new();
    for told in paths {
        let target = fs::canonicalize(told).ok();
        for path in [Some(told), target.as_ref()].into_iter().flatten() {
            if let (Some(folder), Some(name)) = (path.parent(), path.file_name())
                && let Ok(folder) = fs::canonicalize(folder)
            {
                let interest = interests.entry(folder).or_default();
                interest.names.entry(name.to_owned()).or_default().insert(told.clone());
            }
        }
        if let Some(target) = target.filter(|target| target.is_dir()) {
            interests.entry(target).or_default().folders.insert(told.clone());
        }
    }
    interests
}
