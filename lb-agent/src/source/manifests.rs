//! Objects from files: `--manifests PATH`.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::parse::{self, Found, Position};
use lb_core::model::{Batch, Change, Object, ObjectId, Problem};

/// The largest file that is read, in bytes.
pub const MAX_FILE_BYTES: u64 = 256 << 20;

/// A file that was written less than this before it was read may be written again without a new time stamp, which has
/// the resolution of the kernel's tick; it is read again.
const STAMP_RESOLUTION: Duration = Duration::from_millis(50);

/// Services, EndpointSlices and Nodes from files and folders.
///
/// Files are YAML or JSON, with several documents or a List. Of a folder, the files `*.yaml`, `*.yml` and `*.json` are
/// read in the order of their names; hidden files and folders in it are not. Symbolic links are followed, so that a
/// mounted ConfigMap works.
///
/// - While a file has a problem, its last version without problems stays in force. If there was none, its good
///   documents are used.
/// - If an object is defined twice, the first definition counts, in the order of the paths, then of the file names,
///   then of the documents.
/// - A file that is gone takes its objects with it. A folder that is gone or cannot be read does not.
#[derive(Debug)]
pub struct ManifestSource {
    roots: Vec<Root>,
    files: BTreeMap<FileId, FileState>,
    /// The files that define each object, in order of precedence. The first definition was delivered.
    known: BTreeMap<Arc<ObjectId>, Vec<Claim>>,
    /// Objects with several claims.
    contested: BTreeSet<Arc<ObjectId>>,
}

/// Objects with claims that changed, with the version that was delivered last.
type Touched = BTreeMap<Arc<ObjectId>, Option<Object>>;

#[derive(Debug)]
struct Root {
    path: PathBuf,
    was_folder: bool,
}

/// A file: which root it belongs to, and its path. The order is that of precedence.
type FileId = Arc<(usize, Box<Path>)>;

#[derive(Debug, Clone)]
struct Claim {
    file: FileId,
    position: Position,
    object: Object,
}

#[derive(Debug, Default)]
struct FileState {
    fingerprint: Option<Fingerprint>,
    /// It had no problem at least once.
    was_good: bool,
    /// The objects that are in force.
    objects: Vec<Arc<ObjectId>>,
    problems: Vec<Problem>,
}

/// Identity, size and time stamps of a file. The file is read again if one of them has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fingerprint {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Fingerprint {
    fn of(meta: &Metadata) -> Self {
        Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }
}

/// The files of one scan.
#[derive(Debug, Default)]
struct Scan {
    present: BTreeSet<FileId>,
    /// Indexes of the roots that cannot be read (a folder that is gone, for example): their files stay in force.
    kept: HashSet<usize>,
    problems: Vec<Problem>,
}

impl ManifestSource {
    /// Creates a source for these files and folders, in order of precedence, without reading them.
    #[must_use]
    pub fn new(paths: Vec<PathBuf>) -> Self {
        let root = |path| Root {
            path,
            was_folder: false,
        };
        Self {
            roots: paths.into_iter().map(root).collect(),
            files: BTreeMap::new(),
            known: BTreeMap::new(),
            contested: BTreeSet::new(),
        }
    }

    /// Reads changed files, and returns the difference from the previous call.
    ///
    /// A file is read again if its device, inode, size or time stamps have changed. The batch is complete if
    /// there is no problem.
    pub fn rescan(&mut self) -> Batch {
        self.rescan_forced(&[])
    }

    /// Like [`rescan`](Self::rescan), but also reads a file if `forced` names it or its folder, whatever its time
    /// stamps are. Paths are compared as absolute, not as canonical ones; see
    /// [`Watcher::changed`](super::watch::Watcher::changed).
    pub fn rescan_forced(&mut self, forced: &[PathBuf]) -> Batch {
        let forced: HashSet<PathBuf> = forced.iter().map(|path| absolute(path)).collect();
        let scan = self.scan();
        let mut touched = Touched::new();
        let gone: Vec<FileId> = self
            .files
            .keys()
            .filter(|id| !scan.present.contains(*id) && !scan.kept.contains(&id.0))
            .cloned()
            .collect();
        for id in gone {
            if let Some(state) = self.files.remove(&id) {
                self.withdraw(&id, state.objects, &mut touched);
            }
        }
        let mut seen = HashSet::new();
        for id in &scan.present {
            self.refresh(id, &forced, &mut seen, &mut touched);
        }

        let changes = touched.into_iter();
        let changes = changes
            .filter_map(|(id, delivered)| self.deliver(&id, delivered))
            .collect();
        let mut problems = scan.problems;
        problems.extend(self.files.values().flat_map(|state| state.problems.iter().cloned()));
        problems.extend(self.contests());
        Batch {
            changes,
            complete: problems.is_empty(),
            problems,
            ..Batch::default()
        }
    }

    /// Lists the files that are there.
    fn scan(&mut self) -> Scan {
        let mut scan = Scan::default();
        for (index, root) in self.roots.iter_mut().enumerate() {
            let mut keep = |error: &io::Error| {
                scan.kept.insert(index);
                scan.problems.push(problem(&root.path, error.to_string()));
            };
            match fs::metadata(&root.path) {
                Ok(meta) if meta.is_dir() => match folder(&root.path) {
                    Ok(files) => {
                        root.was_folder = true;
                        let files = files.into_iter().map(|path| Arc::new((index, path.into())));
                        scan.present.extend(files);
                    }
                    Err(error) => keep(&error),
                },
                Ok(_) => {
                    root.was_folder = false;
                    scan.present.insert(Arc::new((index, root.path.as_path().into())));
                }
                // A link to nowhere is still there.
                Err(error)
                    if error.kind() == ErrorKind::NotFound
                        && !root.was_folder
                        && fs::symlink_metadata(&root.path).is_err() =>
                {
                    scan.problems.push(problem(&root.path, error.to_string()));
                }
                Err(error) => keep(&error),
            }
        }
        scan
    }

    /// Reads a file if it has changed.
    fn refresh(
        &mut self,
        id: &FileId,
        forced: &HashSet<PathBuf>,
        seen: &mut HashSet<(u64, u64)>,
        touched: &mut Touched,
    ) {
        let path: &Path = &id.1;
        let state = self.files.entry(id.clone()).or_default();
        let meta = match fs::metadata(path) {
            Ok(meta) => meta,
            Err(error) if error.kind() == ErrorKind::NotFound && fs::symlink_metadata(path).is_err() => {
                // Gone since the folder was listed.
                if let Some(state) = self.files.remove(id) {
                    self.withdraw(id, state.objects, touched);
                }
                return;
            }
            Err(error) => {
                state.fingerprint = None;
                state.problems = vec![problem(path, error.to_string())];
                return;
            }
        };
        // Given twice, such as a file and its folder: the first counts.
        if !seen.insert((meta.dev(), meta.ino())) {
            if let Some(state) = self.files.remove(id) {
                self.withdraw(id, state.objects, touched);
            }
            return;
        }
        let absolute = absolute(path);
        let is_forced = forced.contains(&absolute) || absolute.parent().is_some_and(|folder| forced.contains(folder));
        if !is_forced && state.fingerprint == Some(Fingerprint::of(&meta)) {
            return;
        }
        let (fingerprint, bytes) = match read(path) {
            Ok(read) => read,
            Err(error) => {
                state.fingerprint = None;
                state.problems = vec![problem(path, error.to_string())];
                return;
            }
        };
        state.fingerprint = fingerprint;
        let name = display(path);
        let json = path.extension().is_some_and(|extension| extension == "json");
        let parsed = parse::parse(&name, &bytes, json);
        state.problems = parsed.problems;
        let mut first: HashMap<Arc<ObjectId>, Found> = HashMap::with_capacity(parsed.objects.len());
        let mut order = Vec::with_capacity(parsed.objects.len());
        for found in parsed.objects {
            let object = found.object.id();
            let object = match self.known.get_key_value(&object) {
                Some((known, _)) => Arc::clone(known),
                None => Arc::new(object),
            };
            if let Some(other) = first.get(&object) {
                state.problems.push(defined_twice(
                    &name,
                    found.position,
                    &object,
                    &other.position.place(&name),
                ));
            } else {
                order.push(Arc::clone(&object));
                first.insert(object, found);
            }
        }
        if !state.problems.is_empty() && state.was_good {
            return;
        }
        state.was_good |= state.problems.is_empty();
        let old = std::mem::replace(&mut state.objects, order);
        self.withdraw(id, old, touched);
        for (object, found) in first {
            let claim = Claim {
                file: Arc::clone(id),
                position: found.position,
                object: found.object,
            };
            self.touch(&object, touched);
            let claims = self.known.entry(Arc::clone(&object)).or_default();
            let place = claims.partition_point(|other| other.file < claim.file);
            // Nearly all have one: the usual growth makes room for four.
            claims.reserve_exact(1);
            claims.insert(place, claim);
            if claims.len() > 1 {
                self.contested.insert(object);
            }
        }
    }

    /// Takes back a file's claims.
    fn withdraw(&mut self, file: &FileId, objects: Vec<Arc<ObjectId>>, touched: &mut Touched) {
        for object in objects {
            self.touch(&object, touched);
            if let Some(claims) = self.known.get_mut(&object) {
                claims.retain(|claim| claim.file != *file);
                if claims.len() < 2 {
                    self.contested.remove(&object);
                }
            }
        }
    }

    /// Records the delivered version of an object, before the first change of its claims.
    fn touch(&self, id: &Arc<ObjectId>, touched: &mut Touched) {
        let delivered = || self.known.get(id)?.first().map(|claim| claim.object.clone());
        touched.entry(Arc::clone(id)).or_insert_with(delivered);
    }

    /// Returns the change that delivers the first definition of an object, or its removal, unless that was delivered already.
    fn deliver(&mut self, id: &ObjectId, delivered: Option<Object>) -> Option<Change> {
        let Some(claim) = self.known.get_mut(id).and_then(|claims| claims.first_mut()) else {
            self.known.remove(id);
            return delivered.map(|_| Change::Remove(id.clone()));
        };
        match delivered {
            Some(delivered) if delivered == claim.object => {
                // One copy, which the index has too.
                claim.object = delivered;
                None
            }
            Some(_) | None => Some(Change::Set(claim.object.clone())),
        }
    }

    /// Objects that several files define.
    fn contests(&self) -> impl Iterator<Item = Problem> {
        self.contested.iter().flat_map(|id| {
            let claims = self.known.get(id).map(Vec::as_slice).unwrap_or_default();
            let winner = claims
                .first()
                .map(|claim| claim.position.place(&display(&claim.file.1)));
            claims.iter().skip(1).map(move |claim| {
                let winner = winner.as_deref().unwrap_or_default();
                defined_twice(&display(&claim.file.1), claim.position, id, winner)
            })
        })
    }
}

fn defined_twice(file: &str, position: Position, id: &ObjectId, winner: &str) -> Problem {
    let what = position.prefix();
    let message = format!("{what}{id} is defined already in {winner}, which stays in force");
    Problem::new(position.place(file), message)
}

fn problem(path: &Path, message: impl Into<String>) -> Problem {
    Problem::new(display(path), message)
}

/// A path for messages, since file names may contain any byte.
fn display(path: &Path) -> String {
    path.to_string_lossy()
        .chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

/// An absolute path, computed without the file system.
pub(super) fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// Whether a file of a folder is a manifest, by its name.
pub(super) fn is_manifest(path: &Path) -> bool {
    let hidden = path
        .file_name()
        .is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    let named = path
        .extension()
        .is_some_and(|extension| extension == "yaml" || extension == "yml" || extension == "json");
    named && !hidden
}

/// The manifests of a folder.
fn folder(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(path)? {
        let path = entry?.path();
        if is_manifest(&path) && !path.is_dir() {
            files.push(path);
        }
    }
    Ok(files)
}

/// Reads a file and its fingerprint for the next comparison; `None` if the fingerprint may miss a change.
fn read(path: &Path) -> io::Result<(Option<Fingerprint>, Vec<u8>)> {
    // Opening a FIFO must not wait for its writer.
    let file: File = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let now = SystemTime::now();
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let too_large = || io::Error::other(format!("larger than {} MiB", MAX_FILE_BYTES >> 20));
    if meta.size() > MAX_FILE_BYTES {
        return Err(too_large());
    }
    let mut bytes = Vec::with_capacity(usize::try_from(meta.size()).unwrap_or_default() + 1);
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > MAX_FILE_BYTES {
        return Err(too_large());
    }
    // A time stamp in the future counts as old: otherwise the file would be read at every scan.
    let fresh = meta
        .modified()
        .is_ok_and(|modified| now.duration_since(modified).is_ok_and(|age| age < STAMP_RESOLUTION));
    Ok(((!fresh).then(|| Fingerprint::of(&meta)), bytes))
}
