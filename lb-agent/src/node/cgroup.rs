//! The agent's own cgroup, and the memory that it and those above it still allow.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Largest number of cgroups that are read in the search for the agent's own.
const SEARCHED: usize = 1 << 15;

/// The cgroup of this process in the mounted hierarchy that has the memory controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MemoryCgroup {
    /// The mount point.
    root: PathBuf,
    dir: PathBuf,
    files: Files,
}

/// Names of the files with the limit and the use of memory in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Files {
    limit: &'static str,
    usage: &'static str,
}

const V1: Files = Files {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
};

const V2: Files = Files {
    limit: "memory.max",
    usage: "memory.current",
};

impl MemoryCgroup {
    /// Finds the cgroup of this process. The search may read all cgroups of the machine, so it is for the start of the agent.
    ///
    /// # Errors
    /// Returns an error if /proc cannot be read, no hierarchy with the memory controller is mounted, or none of its cgroups lists this
    /// process.
    pub(crate) fn own() -> io::Result<Self> {
        let [mounts, cgroup] = ["/proc/mounts", "/proc/self/cgroup"].map(fs::read_to_string);
        Self::find(&mounts?, &cgroup?, std::process::id())
    }

    /// Finds the cgroup of a process from the texts of /proc/mounts and of its /proc/PID/cgroup.
    ///
    /// In a container, the path in /proc/PID/cgroup is relative to a cgroup namespace, while the mounted hierarchy can be that of the
    /// machine, as in the pods of the DaemonSet. Therefore a path counts only if the cgroup there lists the process: the kernel
    /// shows ids of the reader's process namespace in `cgroup.procs`, and zero for other processes.
    fn find(mounts: &str, cgroup: &str, pid: u32) -> io::Result<Self> {
        let not_found = |what: String| io::Error::new(io::ErrorKind::NotFound, what);
        let (root, own, files) = hierarchy(mounts, cgroup)
            .ok_or_else(|| not_found("no cgroup hierarchy with the memory controller is mounted".into()))?;
        let is_below = own.split('/').all(|part| part != "..");
        let named = is_below.then(|| root.join(own.trim_start_matches('/')));
        let dir = named
            .filter(|dir| lists(dir, pid))
            .or_else(|| search(&root, pid))
            .ok_or_else(|| not_found(format!("no cgroup below {} lists process {pid}", root.display())))?;
        Ok(Self { root, dir, files })
    }

    /// Returns the bytes that the cgroup and those above it still allow; `None` if none has a limit. In version 1 of cgroups,
    /// no limit is a limit of about 2^63 bytes.
    pub(crate) fn left(&self) -> Option<u64> {
        let dirs = self.dir.ancestors().take_while(|dir| dir.starts_with(&self.root));
        dirs.filter_map(|dir| {
            let read = |file| fs::read_to_string(dir.join(file)).ok()?.trim().parse::<u64>().ok();
            // "max" is no number.
            let limit = read(self.files.limit)?;
            Some(limit.saturating_sub(read(self.files.usage)?))
        })
        .min()
    }
}

/// Returns the mount point of the hierarchy with the memory controller, and the path of the cgroup there in the text of /proc/PID/cgroup
/// (cgroups(7)): a hierarchy of version 1 if one has the controller, else that of version 2.
fn hierarchy<'a>(mounts: &str, cgroup: &'a str) -> Option<(PathBuf, &'a str, Files)> {
    let find = |is_wanted: &dyn Fn(&str) -> bool| {
        cgroup.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
            is_wanted(controllers).then_some(path)
        })
    };
    let has_memory = |list: &str| list.split(',').any(|name| name == "memory");
    if let Some(own) = find(&has_memory) {
        let root = mount_point(mounts, |kind, options| kind == "cgroup" && has_memory(options))?;
        return Some((root, own, V1));
    }
    let root = mount_point(mounts, |kind, _| kind == "cgroup2")?;
    Some((root, find(&str::is_empty)?, V2))
}

/// Returns the first mount point with a type and options in the text of /proc/mounts.
fn mount_point(mounts: &str, is_wanted: impl Fn(&str, &str) -> bool) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (path, kind, options) = (fields.next()?, fields.next()?, fields.next()?);
        // proc(5): white space and backslashes are octal escapes.
        is_wanted(kind, options).then(|| PathBuf::from(path.replace("\\040", " ").replace("\\011", "\t")))
    })
}

/// Returns whether a cgroup lists a process.
fn lists(dir: &Path, pid: u32) -> bool {
    let pid = pid.to_string();
    fs::read_to_string(dir.join("cgroup.procs")).is_ok_and(|text| text.lines().any(|line| line == pid))
}

/// Returns the cgroup that lists a process.
fn search(root: &Path, pid: u32) -> Option<PathBuf> {
    let mut dirs = VecDeque::from([root.to_owned()]);
    for _ in 0..SEARCHED {
        let dir = dirs.pop_front()?;
        if lists(&dir, pid) {
            return Some(dir);
        }
        // It may have been removed since.
        let Ok(entries) = fs::read_dir(&dir) else { continue };
        let is_dir = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
        dirs.extend(entries.flatten().filter(is_dir).map(|entry| entry.path()));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const PID: u32 = 4711;

    /// A hierarchy of cgroups in a directory; the path has a space.
    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn root(&self) -> PathBuf {
            self.0.path().join("a cgroup")
        }

        /// Adds a cgroup that lists these processes.
        fn add(&self, path: &str, pids: &[u32]) -> PathBuf {
            let dir = self.root().join(path);
            fs::create_dir_all(&dir).unwrap();
            let lines: Vec<_> = pids.iter().map(u32::to_string).collect();
            fs::write(dir.join("cgroup.procs"), lines.join("\n")).unwrap();
            dir
        }

        /// Returns the cgroup that is found for [`PID`] by its /proc/PID/cgroup.
        fn find(&self, cgroup: &str) -> io::Result<PathBuf> {
            let root = self.root().display().to_string().replace(' ', "\\040");
            let mounts = format!("proc /proc proc rw 0 0\ncgroup2 {root} cgroup2 rw,nsdelegate 0 0\n");
            let found = MemoryCgroup::find(&mounts, cgroup, PID)?;
            assert_eq!((found.root, found.files), (self.root(), V2));
            Ok(found.dir)
        }
    }

    fn write(dir: &Path, files: Files, limit: &str, usage: &str) {
        fs::write(dir.join(files.limit), limit).unwrap();
        fs::write(dir.join(files.usage), usage).unwrap();
    }

    #[test]
    fn own_cgroup_is_the_one_that_lists_the_process() {
        let tree = Tree::new();
        tree.add("", &[1]);
        let service = tree.add("system.slice/lb.service", &[12, PID]);
        assert_eq!(tree.find("0::/system.slice/lb.service\n").unwrap(), service);

        // A pod with a cgroup namespace of its own and the machine's hierarchy.
        let tree = Tree::new();
        tree.add("", &[1]);
        tree.add("kubepods.slice", &[]);
        tree.add("kubepods.slice/pod1", &[0]);
        tree.add("kubepods.slice/pod1/a", &[471, 47_110]);
        tree.add("init", &[0, 0]);
        let container = tree.add("kubepods.slice/pod1/b", &[0, PID]);
        for cgroup in ["0::/\n", "0::/init\n", "0::/../b\n", "1:name=systemd:/x\n0::/a:b\n"] {
            assert_eq!(tree.find(cgroup).unwrap(), container, "{cgroup:?}");
        }

        // The container runtime's own mount, which has the container's cgroup as its root.
        let tree = Tree::new();
        let root = tree.add("", &[PID]);
        assert_eq!(tree.find("0::/\n").unwrap(), root.join(""));
    }

    #[test]
    fn a_process_that_no_cgroup_lists_is_an_error() {
        let tree = Tree::new();
        tree.add("", &[1]);
        tree.add("other", &[2]);
        let error = tree.find("0::/other\n").unwrap_err().to_string();
        assert!(error.contains("4711") && error.contains("a cgroup"), "{error}");
        let error = MemoryCgroup::find("proc /proc proc rw 0 0\n", "0::/\n", PID).unwrap_err();
        assert!(error.to_string().contains("mounted"), "{error}");
    }

    #[test]
    fn memory_controller_of_version_1_comes_first() {
        let mounts = "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n\
                      cgroup /sys/fs/cgroup/cpu cgroup rw,cpu,cpuacct 0 0\n\
                      cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n";
        let hybrid = "9:cpu,cpuacct:/x\n4:memory:/kubepods/pod1\n1:name=systemd:/y\n0::/system.slice\n";
        let memory = PathBuf::from("/sys/fs/cgroup/memory");
        assert_eq!(hierarchy(mounts, hybrid), Some((memory, "/kubepods/pod1", V1)));
        let unified = PathBuf::from("/sys/fs/cgroup/unified");
        assert_eq!(
            hierarchy(mounts, "1:name=systemd:/y\n0::/system.slice\n"),
            Some((unified, "/system.slice", V2))
        );
        assert_eq!(hierarchy("cgroup2 /x cgroup2 rw 0 0\n", hybrid), None);
    }

    #[test]
    fn the_tightest_cgroup_decides() {
        for files in [V1, V2] {
            let tree = Tree::new();
            let dir = tree.add("pods/agent", &[PID]);
            let cgroup = MemoryCgroup {
                root: tree.root(),
                dir: dir.clone(),
                files,
            };
            assert_eq!(cgroup.left(), None);
            write(&dir, files, "max\n", "10\n");
            assert_eq!(cgroup.left(), None);
            write(&dir, files, "100\n", "30\n");
            assert_eq!(cgroup.left(), Some(70));
            write(dir.parent().unwrap(), files, "60\n", "50\n");
            assert_eq!(cgroup.left(), Some(10));
            write(&dir, files, "100\n", "130\n");
            assert_eq!(cgroup.left(), Some(0));
            // Not a cgroup.
            write(tree.0.path(), files, "1\n", "1\n");
            write(&dir, files, "100\n", "95\n");
            assert_eq!(cgroup.left(), Some(5));
        }
    }
}
