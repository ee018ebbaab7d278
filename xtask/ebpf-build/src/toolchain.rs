//! The compiler and the linker of the eBPF object.
//!
//! `cargo xtask setup` installs a toolchain that this module finds, and the build scripts use it. The search looks at the
//! file system only, which takes microseconds, and starts no program.

use std::env;
use std::path::{Path, PathBuf};

/// Name of rustup's custom toolchain for eBPF: a link to a compiler that ships a compiled `core` for eBPF.
pub const LINKED: &str = "ebpf";

/// Target triple of the eBPF object, in the byte order of this machine.
pub const TARGET: &str = if cfg!(target_endian = "big") {
    "bpfeb-unknown-none"
} else {
    "bpfel-unknown-none"
};

/// An installed compiler for eBPF.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EbpfToolchain {
    /// rustup's nightly with `rust-src`, which compiles `core` along (`-Z build-std`). Contains the toolchain's folder.
    Nightly(PathBuf),
    /// rustup's custom toolchain [`LINKED`], which ships `core`. Contains the toolchain's folder.
    Linked(PathBuf),
}

/// Returns the toolchain below `rustup_home` that the build uses: nightly, or else the linked one.
pub fn choose(rustup_home: &Path) -> Option<EbpfToolchain> {
    let toolchains = rustup_home.join("toolchains");
    let nightly = ["gnu", "musl"]
        .map(|libc| toolchains.join(format!("nightly-{}-unknown-linux-{libc}", env::consts::ARCH)))
        .into_iter()
        .find(|dir| has_source(dir));
    if let Some(dir) = nightly {
        return Some(EbpfToolchain::Nightly(dir));
    }
    let linked = toolchains.join(LINKED);
    has_core(&linked).then_some(EbpfToolchain::Linked(linked))
}

/// Returns rustup's home: `RUSTUP_HOME`, or else `~/.rustup`.
pub fn rustup_home() -> Option<PathBuf> {
    env::var_os("RUSTUP_HOME")
        .map(PathBuf::from)
        .or_else(|| env::home_dir().map(|home| home.join(".rustup")))
}

/// Returns the path of bpf-linker in the two places that rustup's cargo searches: `PATH`, then cargo's `bin` folder.
pub fn linker() -> Option<PathBuf> {
    let name = "bpf-linker";
    which::which(name).ok().or_else(|| {
        let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from);
        let cargo_home = cargo_home.or_else(|| Some(env::home_dir()?.join(".cargo")))?;
        Some(cargo_home.join("bin").join(name)).filter(|path| path.is_file())
    })
}

/// Returns true if the toolchain in `dir` can compile `core` itself.
fn has_source(dir: &Path) -> bool {
    is_complete(dir) && dir.join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file()
}

/// Returns true if the toolchain in `dir` ships a compiled `core` for eBPF.
pub fn has_core(dir: &Path) -> bool {
    let lib = dir.join("lib/rustlib").join(TARGET).join("lib");
    let core = lib.read_dir().ok().is_some_and(|mut entries| {
        entries.any(|entry| entry.is_ok_and(|entry| entry.file_name().as_encoded_bytes().starts_with(b"libcore-")))
    });
    core && is_complete(dir)
}

/// Returns true if `dir` contains a compiler and a cargo.
fn is_complete(dir: &Path) -> bool {
    ["rustc", "cargo"]
        .iter()
        .all(|program| dir.join("bin").join(program).is_file())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::*;

    /// Adds a toolchain with these files, and empty programs, to rustup's home.
    fn add_toolchain(home: &TempDir, name: &str, files: &[&str]) -> PathBuf {
        let dir = home.path().join("toolchains").join(name);
        for file in files.iter().chain(&["bin/rustc", "bin/cargo"]) {
            let path = dir.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        dir
    }

    #[test]
    fn nightly_is_preferred_if_it_has_the_source() {
        let home = TempDir::new().unwrap();
        assert_eq!(choose(home.path()), None);
        let nightly = format!("nightly-{}-unknown-linux-gnu", env::consts::ARCH);
        add_toolchain(&home, &nightly, &[]);
        assert_eq!(choose(home.path()), None);
        let core = format!("lib/rustlib/{TARGET}/lib/libcore-0123.rlib");
        let linked = add_toolchain(&home, LINKED, &[&core]);
        assert_eq!(choose(home.path()), Some(EbpfToolchain::Linked(linked)));
        let nightly = add_toolchain(&home, &nightly, &["lib/rustlib/src/rust/library/core/src/lib.rs"]);
        assert_eq!(choose(home.path()), Some(EbpfToolchain::Nightly(nightly)));
    }

    #[test]
    fn toolchain_without_core_for_ebpf_is_not_chosen() {
        let home = TempDir::new().unwrap();
        add_toolchain(
            &home,
            LINKED,
            &["lib/rustlib/x86_64-unknown-linux-gnu/lib/libcore-0123.rlib"],
        );
        assert_eq!(choose(home.path()), None);
    }
}
