//! Which compiler makes the eBPF object.
//!
//! Shared by `cargo xtask setup`, which makes a road passable, and by the build script of `lb-agent`, which takes it.
//! Only the file system is asked: it answers in microseconds.

use std::env;
use std::path::{Path, PathBuf};

/// The toolchain that rustup runs as `ebpf`: a link to a compiler that brings a compiled `core` for eBPF.
pub(crate) const LINKED: &str = "ebpf";

/// The target of the eBPF object, on a machine of this byte order.
pub(crate) const TARGET: &str = if cfg!(target_endian = "big") {
    "bpfeb-unknown-none"
} else {
    "bpfel-unknown-none"
};

/// A compiler for eBPF that is present.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Road {
    /// rustup's nightly with `rust-src`: `core` is compiled along (`-Z build-std`). Holds the toolchain's folder.
    Nightly(PathBuf),
    /// rustup's custom toolchain [`LINKED`]: `core` is there already. Holds the toolchain's folder.
    Linked(PathBuf),
}

/// Chooses among the toolchains below `rustup_home`: nightly before the linked one.
pub(crate) fn choose(rustup_home: &Path) -> Option<Road> {
    let toolchains = rustup_home.join("toolchains");
    let nightly = ["gnu", "musl"]
        .map(|libc| toolchains.join(format!("nightly-{}-unknown-linux-{libc}", env::consts::ARCH)))
        .into_iter()
        .find(|dir| has_source(dir));
    if let Some(dir) = nightly {
        return Some(Road::Nightly(dir));
    }
    let linked = toolchains.join(LINKED);
    has_core(&linked).then_some(Road::Linked(linked))
}

/// rustup's home: `RUSTUP_HOME`, else `~/.rustup`.
pub(crate) fn rustup_home() -> Option<PathBuf> {
    env::var_os("RUSTUP_HOME")
        .map(PathBuf::from)
        .or_else(|| env::home_dir().map(|home| home.join(".rustup")))
}

/// bpf-linker, where rustup's cargo finds it: in the search path or in cargo's own folder.
pub(crate) fn linker() -> Option<PathBuf> {
    let name = "bpf-linker";
    which::which(name).ok().or_else(|| {
        let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from);
        let cargo_home = cargo_home.or_else(|| Some(env::home_dir()?.join(".cargo")))?;
        Some(cargo_home.join("bin").join(name)).filter(|path| path.is_file())
    })
}

/// The toolchain in `dir` can build `core` itself.
fn has_source(dir: &Path) -> bool {
    runs(dir) && dir.join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file()
}

/// The toolchain in `dir` brings a compiled `core` for eBPF.
pub(crate) fn has_core(dir: &Path) -> bool {
    let lib = dir.join("lib/rustlib").join(TARGET).join("lib");
    let core = lib.read_dir().ok().is_some_and(|mut entries| {
        entries.any(|entry| entry.is_ok_and(|entry| entry.file_name().as_encoded_bytes().starts_with(b"libcore-")))
    });
    core && runs(dir)
}

/// There are a compiler and a cargo in `dir`.
fn runs(dir: &Path) -> bool {
    ["rustc", "cargo"]
        .iter()
        .all(|program| dir.join("bin").join(program).is_file())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// An empty folder of this test process, removed on drop.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let dir = env::temp_dir().join(format!("lb-xtask-{}-{name}", std::process::id()));
            fs::create_dir_all(&dir).unwrap();
            Self(dir)
        }

        fn toolchain(&self, name: &str, files: &[&str]) -> PathBuf {
            let dir = self.0.join("toolchains").join(name);
            for file in files.iter().chain(&["bin/rustc", "bin/cargo"]) {
                let path = dir.join(file);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, "").unwrap();
            }
            dir
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn nightly_goes_first_if_it_has_the_source() {
        let home = Folder::new("roads");
        assert_eq!(choose(&home.0), None);
        let nightly = format!("nightly-{}-unknown-linux-gnu", env::consts::ARCH);
        home.toolchain(&nightly, &[]);
        assert_eq!(choose(&home.0), None);
        let core = format!("lib/rustlib/{TARGET}/lib/libcore-0123.rlib");
        let linked = home.toolchain(LINKED, &[&core]);
        assert_eq!(choose(&home.0), Some(Road::Linked(linked)));
        let nightly = home.toolchain(&nightly, &["lib/rustlib/src/rust/library/core/src/lib.rs"]);
        assert_eq!(choose(&home.0), Some(Road::Nightly(nightly)));
    }

    #[test]
    fn an_ordinary_toolchain_is_no_road() {
        let home = Folder::new("ordinary");
        home.toolchain(LINKED, &["lib/rustlib/x86_64-unknown-linux-gnu/lib/libcore-0123.rlib"]);
        assert_eq!(choose(&home.0), None);
    }
}
