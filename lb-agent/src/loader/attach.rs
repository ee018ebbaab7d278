//! Cgroup hooks: programs that are attached to a cgroup by pinned links, which are updated in place.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::programs::{ProgramFd, ProgramInfo};
use aya_obj::generated::bpf_attach_type;
use lb_common::abi::{PROGRAM_PREFIX, program_name};
use tracing::info;

use super::pins::entries;
use super::{LoadError, PinPath, failed};
use crate::maps::sys;

/// A cgroup of the cgroup2 hierarchy.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    dir: File,
    id: u64,
}

impl Cgroup {
    /// Opens a cgroup; without a path, the root of the first cgroup2 mount in /proc/mounts.
    ///
    /// # Errors
    /// Returns a [`LoadError`] if there is no cgroup2 mount, or the path cannot be opened.
    pub fn open(path: Option<&Path>) -> Result<Self, LoadError> {
        let path = match path {
            Some(path) => path.to_owned(),
            None => root()?,
        };
        let dir = File::open(&path).map_err(failed(&path, "open"))?;
        let id = dir.metadata().map_err(failed(&path, "stat"))?.ino();
        Ok(Self { path, dir, id })
    }

    /// Returns the inode of the cgroup, which is its id.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Returns the path of the cgroup.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns whether every process of the machine is below the cgroup.
    #[must_use]
    pub fn is_root(&self) -> bool {
        is_root(self.id)
    }
}

/// Returns whether an id is that of the root of the hierarchy.
#[must_use]
pub(crate) fn is_root(id: u64) -> bool {
    id == 1
}

/// Returns the first cgroup2 mount in /proc/mounts.
pub(crate) fn root() -> Result<PathBuf, LoadError> {
    let mounts = Path::new("/proc/mounts");
    let text = fs::read_to_string(mounts).map_err(failed(mounts, "read"))?;
    mount_point(&text).ok_or_else(|| LoadError::PinPath {
        path: mounts.into(),
        what: "no cgroup2 mount: mount one, or set --cgroup".into(),
    })
}

/// Returns the first mount point of type cgroup2 in the text of /proc/mounts.
fn mount_point(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_, path, kind) = (fields.next()?, fields.next()?, fields.next()?);
        // proc(5): white space and backslashes are octal escapes.
        (kind == "cgroup2").then(|| PathBuf::from(path.replace("\\040", " ").replace("\\011", "\t")))
    })
}

/// A hook and the program at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hook {
    /// Name of the program, and of the pinned link.
    pub name: &'static str,
    attach_type: bpf_attach_type,
}

/// All hooks in attach order: release hooks before connect hooks, and reverse translation before forward translation.
const HOOKS: [Hook; 11] = {
    use bpf_attach_type as at;
    const fn hook(name: &'static str, attach_type: bpf_attach_type) -> Hook {
        Hook { name, attach_type }
    }
    [
        hook(program_name::SOCK_RELEASE, at::BPF_CGROUP_INET_SOCK_RELEASE),
        hook(program_name::GETPEERNAME4, at::BPF_CGROUP_INET4_GETPEERNAME),
        hook(program_name::GETPEERNAME6, at::BPF_CGROUP_INET6_GETPEERNAME),
        hook(program_name::RECVMSG4, at::BPF_CGROUP_UDP4_RECVMSG),
        hook(program_name::RECVMSG6, at::BPF_CGROUP_UDP6_RECVMSG),
        hook(program_name::POST_BIND4, at::BPF_CGROUP_INET4_POST_BIND),
        hook(program_name::POST_BIND6, at::BPF_CGROUP_INET6_POST_BIND),
        hook(program_name::SENDMSG4, at::BPF_CGROUP_UDP4_SENDMSG),
        hook(program_name::SENDMSG6, at::BPF_CGROUP_UDP6_SENDMSG),
        hook(program_name::CONNECT4, at::BPF_CGROUP_INET4_CONNECT),
        hook(program_name::CONNECT6, at::BPF_CGROUP_INET6_CONNECT),
    ]
};

/// Attaches the loaded programs to their hooks. A pinned link is updated in place, so the hook always has a program.
///
/// # Errors
/// Returns [`LoadError::Call`] if a system call fails.
pub fn attach(programs: &Ebpf, pins: &PinPath, cgroup: &Cgroup) -> Result<(), LoadError> {
    for hook in HOOKS {
        let program = program_of(programs, hook)?;
        let path = pins.links().join(hook.name);
        // The BPF file system does not accept dots in names. A link that a killed start left may be at another cgroup.
        let new = pins.links().join(format!("{}-new", hook.name));
        if new.exists() {
            fs::remove_file(&new).map_err(failed(&new, "unlink"))?;
        }
        if path.exists() {
            let link = sys::obj_get(&path).map_err(failed(&path, "BPF_OBJ_GET"))?;
            let at = sys::cgroup_link(link.as_fd()).map_err(failed(&path, "BPF_OBJ_GET_INFO_BY_FD"))?;
            if at.cgroup == cgroup.id() {
                sys::link_update(link.as_fd(), program.as_fd()).map_err(failed(&path, "BPF_LINK_UPDATE"))?;
                continue;
            }
            info!(hook = hook.name, cgroup = %cgroup.path().display(), "moves to another cgroup");
        }
        let link = sys::link_create(program.as_fd(), cgroup.dir.as_fd(), hook.attach_type)
            .map_err(failed(cgroup.path(), "BPF_LINK_CREATE"))?;
        // A rename keeps an earlier link alive until the new one is pinned.
        sys::obj_pin(link.as_fd(), &new).map_err(failed(&new, "BPF_OBJ_PIN"))?;
        fs::rename(&new, &path).map_err(failed(&path, "rename"))?;
    }
    remove_unknown_links(pins)
}

/// Removes the links of programs that this build does not have: another build attached them, and they would go on with maps that
/// nothing updates.
fn remove_unknown_links(pins: &PinPath) -> Result<(), LoadError> {
    for link in entries(&pins.links())? {
        let name = link.file_name().and_then(OsStr::to_str).unwrap_or_default();
        if name.starts_with(PROGRAM_PREFIX) && !HOOKS.iter().any(|hook| hook.name == name) {
            fs::remove_file(&link).map_err(failed(&link, "unlink"))?;
        }
    }
    Ok(())
}

/// Replaces the program of every pinned link by the one of the same hook. Hooks without a link stay without one.
///
/// # Errors
/// Returns a [`LoadError`] if a system call fails.
pub(super) fn replace(programs: &Ebpf, pins: &PinPath) -> Result<(), LoadError> {
    for hook in HOOKS {
        let path = pins.links().join(hook.name);
        if !path.exists() {
            continue;
        }
        let program = program_of(programs, hook)?;
        let link = sys::obj_get(&path).map_err(failed(&path, "BPF_OBJ_GET"))?;
        match sys::link_update(link.as_fd(), program.as_fd()) {
            // The cgroup was removed.
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {}
            result => result.map_err(failed(&path, "BPF_LINK_UPDATE"))?,
        }
    }
    Ok(())
}

/// Returns the loaded program of a hook.
fn program_of(programs: &Ebpf, hook: Hook) -> Result<&ProgramFd, LoadError> {
    let program = programs.program(hook.name).ok_or_else(|| LoadError::PinPath {
        path: hook.name.into(),
        what: "the object does not contain the program".into(),
    })?;
    program.fd().map_err(|source| LoadError::Program {
        name: hook.name.into(),
        source,
    })
}

/// A program that is attached to a hook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// Name of the program.
    pub name: &'static str,
    /// Id of the cgroup; zero if the cgroup was removed.
    pub cgroup: u64,
    /// Id of the program.
    pub program: u32,
    /// Tag of the program: a hash of its instructions.
    pub tag: u64,
}

/// Returns the attached program of every hook, by the pinned links; `None` for a hook without a link.
///
/// # Errors
/// Returns [`LoadError::Call`] if a system call fails.
pub fn attached(pins: &PinPath) -> Result<Vec<(&'static str, Option<Attached>)>, LoadError> {
    HOOKS
        .into_iter()
        .map(|hook| {
            let path = pins.links().join(hook.name);
            if !path.exists() {
                return Ok((hook.name, None));
            }
            let link = sys::obj_get(&path).map_err(failed(&path, "BPF_OBJ_GET"))?;
            let at = sys::cgroup_link(link.as_fd()).map_err(failed(&path, "BPF_OBJ_GET_INFO_BY_FD"))?;
            let tag = program_tag(at.program).unwrap_or(0);
            let attached = Attached {
                name: hook.name,
                cgroup: at.cgroup,
                program: at.program,
                tag,
            };
            Ok((hook.name, Some(attached)))
        })
        .collect()
}

fn program_tag(id: u32) -> Option<u64> {
    aya::programs::loaded_programs()
        .filter_map(Result::ok)
        .find(|p: &ProgramInfo| p.id() == id)
        .map(|p| p.tag())
}

#[cfg(test)]
mod tests {
    use aya_obj::{Object, ProgramSection};

    use super::*;
    use crate::loader::OBJECT;

    /// Returns the attach type of a section of programs for cgroups; `None` for devices and agent calls.
    fn attach_type(section: &ProgramSection) -> Option<bpf_attach_type> {
        match section {
            ProgramSection::CgroupSockAddr { attach_type } => Some((*attach_type).into()),
            ProgramSection::CgroupSock { attach_type } => Some((*attach_type).into()),
            ProgramSection::SchedClassifier | ProgramSection::Xdp { .. } => None,
            other => panic!("`load_all` in lb-agent/src/loader/mod.rs does not load {other:?}"),
        }
    }

    #[test]
    fn links_of_programs_of_another_build_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let pins = PinPath::new(folder.path());
        fs::create_dir_all(pins.links()).unwrap();
        for name in ["lb_connect4", "lb_other", "lb_other-new", "ingress-7"] {
            fs::write(pins.links().join(name), "").unwrap();
        }
        remove_unknown_links(&pins).unwrap();
        let left = entries(&pins.links()).unwrap();
        let mut left: Vec<_> = left.iter().filter_map(|link| link.file_name()?.to_str()).collect();
        left.sort_unstable();
        assert_eq!(left, ["ingress-7", "lb_connect4"]);
    }

    #[test]
    fn every_cgroup_program_of_the_object_is_named_attached_and_documented() {
        let object = Object::parse(OBJECT).unwrap();
        let mut compiled: Vec<_> = object.programs.keys().map(String::as_str).collect();
        let mut named = program_name::ALL.to_vec();
        assert!(named.iter().all(|name| name.starts_with(PROGRAM_PREFIX)));
        compiled.sort_unstable();
        named.sort_unstable();
        assert_eq!(
            compiled, named,
            "programs of lb-ebpf, and lb-common/src/abi/programs.rs"
        );
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/architecture.md");
        let architecture = fs::read_to_string(file).unwrap();
        let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let words: Vec<_> = architecture.split(|c| !is_word(c)).collect();
        let mut hooks = 0;
        for (name, program) in &object.programs {
            let Some(attach_type) = attach_type(&program.section) else {
                continue;
            };
            let hook = HOOKS.iter().find(|hook| hook.name == name);
            let hook = hook.unwrap_or_else(|| panic!("HOOKS in lb-agent/src/loader/attach.rs lacks {name}"));
            assert_eq!(hook.attach_type, attach_type, "attach type of {name}");
            let word = name.trim_start_matches("lb_");
            assert!(words.contains(&word), "docs/architecture.md lacks the hook {word}");
            hooks += 1;
        }
        assert_eq!(hooks, HOOKS.len(), "HOOKS has a program that is not for cgroups");
    }

    #[test]
    fn finds_the_cgroup2_mount_wherever_it_is() {
        let hybrid = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(mount_point(hybrid), Some("/sys/fs/cgroup/unified".into()));
        let odd = "cgroup2 /mnt/a\\040b cgroup2 rw 0 0\n";
        assert_eq!(mount_point(odd), Some("/mnt/a b".into()));
        assert_eq!(mount_point("proc /proc proc rw 0 0\n"), None);
    }
}
