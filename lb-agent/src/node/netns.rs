//! Network namespaces by their cookie. The kernel has no such lookup, so they are searched wherever they can be held:
//! by processes and threads, by open descriptors, and by bind mounts (`ip netns`, CNI).
//!
//! Needs `CAP_SYS_PTRACE` to see the namespaces of other processes, and `CAP_SYS_ADMIN` to enter one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::thread;

use nix::sched::{CloneFlags, setns};

use crate::maps::sys;

/// Inode of the initial process namespace (`PROC_PID_INIT_INO`), in which /proc shows every process.
const INITIAL_PIDS: u64 = 0xeffffffc;

/// Runs `work` on a thread of its own in a network namespace. Sockets that it opens belong to that namespace, also
/// after they have left the closure.
///
/// # Errors
/// Returns an error if the namespace cannot be entered.
pub(crate) fn within<T: Send>(netns: &File, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let enter = move || {
            setns(netns, CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        };
        let thread = thread::Builder::new().name("lb-netns".into());
        let thread = thread.spawn_scoped(scope, enter)?;
        thread.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

/// The result of visiting namespaces.
#[derive(Debug)]
pub(crate) struct Visit<T> {
    /// The results of `work`, by cookie.
    pub(crate) visited: BTreeMap<u64, T>,
    /// Cookies of namespaces that this walk would have found, if there were any.
    pub(crate) missing: BTreeSet<u64>,
    /// Paths that cannot be entered or read, with the error. The wanted namespaces in neither `visited` nor `missing`
    /// may be among them; empty if there are none.
    pub(crate) refused: Vec<(PathBuf, io::Error)>,
}

/// Paths that hold namespaces, by inode.
type Handles = BTreeMap<u64, PathBuf>;

/// The namespaces of this machine.
pub(crate) struct Namespaces {
    own: u64,
    own_inode: u64,
    /// Cookies of namespaces that were entered, by inode. An inode can be another's later.
    cookies: BTreeMap<u64, u64>,
    /// Cookies of all namespaces that were ever entered.
    entered: BTreeSet<u64>,
    /// Whether every process can be seen.
    sees_all: bool,
}

impl Namespaces {
    /// Creates the search for the namespaces of this machine. The calling thread's namespace is the node's.
    ///
    /// # Errors
    /// Returns an error if /proc cannot be read.
    pub(crate) fn new() -> io::Result<Self> {
        let own = sys::netns_cookie()?;
        let inode = |path| Ok::<_, io::Error>(inode_of(&fs::read_link(path)?).unwrap_or(0));
        let pids = fs::read_link("/proc/self/ns/pid")?;
        Ok(Self {
            own,
            own_inode: inode("/proc/thread-self/ns/net")?,
            cookies: BTreeMap::new(),
            entered: BTreeSet::from([own]),
            sees_all: inode_in(&pids, "pid:[") == Some(INITIAL_PIDS),
        })
    }

    /// Cookie of the node's namespace.
    pub(crate) fn own(&self) -> u64 {
        self.own
    }

    /// Whether processes of other process namespaces can be seen.
    pub(crate) fn sees_all(&self) -> bool {
        self.sees_all
    }

    /// Enters the current namespace, which needs the same privileges as entering another one.
    ///
    /// # Errors
    /// Returns an error if that is not permitted.
    pub(crate) fn probe() -> io::Result<()> {
        within(&File::open("/proc/thread-self/ns/net")?, || ())
    }

    /// Runs `work` with the cookie in each wanted namespace that can be found. Must be called on
    /// a thread that is in the node's namespace.
    pub(crate) fn visit<T: Send>(&mut self, wanted: &BTreeSet<u64>, work: impl Fn(u64) -> T + Sync) -> Visit<T> {
        let mut visit = Visit {
            visited: BTreeMap::new(),
            missing: wanted.clone(),
            refused: Vec::new(),
        };
        if visit.missing.remove(&self.own) {
            visit.visited.insert(self.own, work(self.own));
        }
        if visit.missing.is_empty() {
            return visit;
        }
        let mut tried = BTreeSet::from([self.own_inode]);
        let mut search = Search::default();
        search.processes();
        search.mounts();
        self.enter(&search.found, &mut tried, &mut visit, &work);
        if !visit.missing.is_empty() {
            search.threads_and_descriptors();
            self.enter(&search.found, &mut tried, &mut visit, &work);
        }
        self.cookies.retain(|inode, _| search.found.contains_key(inode));
        let looked_for = visit.missing.len();
        // A namespace that could not be entered may be any of them. So may one that is held only by inaccessible
        // processes; but a namespace that was entered before had other holders, which are gone.
        let denied = |(_, error): &(_, io::Error)| error.kind() == io::ErrorKind::PermissionDenied;
        let sees_most = visit.refused.is_empty() && search.refused.iter().all(denied);
        let sees_all = self.sees_all && search.refused.is_empty();
        visit
            .missing
            .retain(|cookie| sees_most && (sees_all || self.entered.contains(cookie)));
        if visit.missing.len() == looked_for {
            visit.refused.clear();
        } else {
            visit.refused.append(&mut search.refused);
        }
        visit
    }

    /// Enters the candidates: the known namespaces first, then the unknown, then those with an inode that was known for
    /// another namespace.
    fn enter<T: Send>(
        &mut self,
        found: &Handles,
        tried: &mut BTreeSet<u64>,
        visit: &mut Visit<T>,
        work: &(impl Fn(u64) -> T + Sync),
    ) {
        let rank = |inode: &u64| match self.cookies.get(inode) {
            Some(cookie) if visit.missing.contains(cookie) => 0,
            None => 1,
            Some(_) => 2,
        };
        let mut order: Vec<_> = found.iter().filter(|(inode, _)| !tried.contains(inode)).collect();
        order.sort_by_key(|(inode, _)| rank(inode));
        for (inode, path) in order {
            if visit.missing.is_empty() {
                return;
            }
            tried.insert(*inode);
            let missing = &visit.missing;
            let result = File::open(path).and_then(|netns| {
                within(&netns, || {
                    let cookie = sys::netns_cookie()?;
                    Ok::<_, io::Error>((cookie, missing.contains(&cookie).then(|| work(cookie))))
                })?
            });
            match result {
                Ok((cookie, done)) => {
                    self.cookies.insert(*inode, cookie);
                    self.entered.insert(cookie);
                    visit.missing.remove(&cookie);
                    visit.visited.extend(done.map(|done| (cookie, done)));
                }
                Err(error) if is_over(&error) => {}
                Err(error) => visit.refused.push((path.clone(), error)),
            }
        }
    }
}

/// A walk through /proc.
#[derive(Debug, Default)]
struct Search {
    found: Handles,
    refused: Vec<(PathBuf, io::Error)>,
}

impl Search {
    /// The namespace of each process.
    fn processes(&mut self) {
        for process in self.entries(Path::new("/proc"), is_number) {
            self.link(process.join("ns/net"));
        }
    }

    /// The namespaces of threads and of open descriptors.
    fn threads_and_descriptors(&mut self) {
        for process in self.entries(Path::new("/proc"), is_number) {
            for thread in self.entries(&process.join("task"), is_number) {
                self.link(thread.join("ns/net"));
            }
            for descriptor in self.entries(&process.join("fd"), is_number) {
                self.link(descriptor);
            }
        }
    }

    /// Bind mounts, in this process's mount namespace and in that of the first process.
    fn mounts(&mut self) {
        for process in ["/proc/self", "/proc/1"] {
            let process = Path::new(process);
            match fs::read_to_string(process.join("mountinfo")) {
                Ok(text) => {
                    for (inode, mount) in text.lines().filter_map(bind_mount) {
                        let path = process.join("root").join(mount.trim_start_matches('/'));
                        self.found.entry(inode).or_insert(path);
                    }
                }
                Err(error) => self.refuse(process, error),
            }
        }
    }

    /// Records the network namespace that a link refers to, if it refers to one.
    fn link(&mut self, path: PathBuf) {
        match fs::read_link(&path) {
            Ok(target) => {
                if let Some(inode) = inode_of(&target) {
                    self.found.entry(inode).or_insert(path);
                }
            }
            Err(error) => self.refuse(&path, error),
        }
    }

    fn entries(&mut self, folder: &Path, wanted: impl Fn(&str) -> bool) -> Vec<PathBuf> {
        let mut paths = Vec::new();
        let mut read = || -> io::Result<()> {
            for entry in fs::read_dir(folder)? {
                let entry = entry?;
                if entry.file_name().to_str().is_some_and(&wanted) {
                    paths.push(entry.path());
                }
            }
            Ok(())
        };
        if let Err(error) = read() {
            self.refuse(folder, error);
        }
        paths
    }

    fn refuse(&mut self, path: &Path, error: io::Error) {
        if !is_over(&error) {
            self.refused.push((path.into(), error));
        }
    }
}

fn is_number(name: &str) -> bool {
    name.bytes().all(|byte| byte.is_ascii_digit())
}

/// Whether the process, thread or mount has ended in the meantime.
fn is_over(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH | libc::EINVAL))
}

/// The inode in a link such as `net:[4026531840]`.
fn inode_of(target: &Path) -> Option<u64> {
    inode_in(target, "net:[")
}

fn inode_in(target: &Path, prefix: &str) -> Option<u64> {
    let inode = target.to_str()?.strip_prefix(prefix)?.strip_suffix(']')?;
    inode.parse().ok()
}

/// Inode and mount point, if a line of mountinfo (proc_pid_mountinfo(5)) is the mount of a network namespace.
fn bind_mount(line: &str) -> Option<(u64, String)> {
    let mut fields = line.split(' ').skip(3);
    let inode = inode_of(Path::new(fields.next()?))?;
    Some((inode, unescaped(fields.next()?)))
}

/// Decodes `\ooo`, which mountinfo uses for blanks and backslashes.
fn unescaped(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part.get(..3).and_then(|octal| u8::from_str_radix(octal, 8).ok());
        match code {
            Some(code) => {
                plain.push(char::from(code));
                plain.push_str(&part[3..]);
            }
            None => {
                plain.push('\\');
                plain.push_str(part);
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_of_network_namespaces() {
        let inode = |text| inode_of(Path::new(text));
        assert_eq!(inode("net:[4026531840]"), Some(4_026_531_840));
        assert_eq!(inode("mnt:[4026531840]"), None);
        assert_eq!(inode("socket:[1]"), None);
        assert_eq!(inode("/dev/null"), None);
    }

    #[test]
    fn bind_mounts_of_network_namespaces() {
        let line = "812 27 0:4 net:[4026532450] /run/netns/with\\040blank rw shared:5 - nsfs nsfs rw";
        assert_eq!(bind_mount(line), Some((4_026_532_450, "/run/netns/with blank".into())));
        assert_eq!(
            bind_mount("27 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw"),
            None
        );
        assert_eq!(bind_mount("812 27 0:4 mnt:[4026532450] /x rw - nsfs nsfs rw"), None);
        assert_eq!(bind_mount(""), None);
        assert_eq!(unescaped(r"a\134b\9"), r"a\b\9");
    }
}
