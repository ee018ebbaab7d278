//! Compilation of a package for the kernel from a build script.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::Path;

use anyhow::Context as _;
use aya_build::{Package, Toolchain, build_ebpf};

use crate::toolchain::{self, EbpfToolchain};

/// The error of a fresh clone.
const MISSING: &str = "the eBPF toolchain is missing: run `cargo xtask setup`";

/// Compiles the programs of the package `name` in the folder `root_dir` with some of its features; each object is
/// `$OUT_DIR/PROGRAM`.
///
/// For build scripts: it reads their environment and prints instructions for cargo. A missing toolchain is reported to
/// cargo as an error of the build, with the command that installs it.
///
/// # Errors
/// If cargo did not set `OUT_DIR`, or if the package does not compile.
pub fn build(name: &str, root_dir: &str, features: &[&str]) -> anyhow::Result<()> {
    compile(name, root_dir, features).map(drop)
}

/// Compiles the program of the package `name` with one feature more, like [`build`]; the object is `$OUT_DIR/NAME-FEATURE`. To be
/// called before [`build`], whose object would be overwritten by the one with the feature.
///
/// # Errors
/// Returns the errors of [`build`], and an error if the object cannot be renamed.
pub fn build_with(name: &str, root_dir: &str, features: &[&str], feature: &str) -> anyhow::Result<()> {
    if !compile(name, root_dir, &[features, &[feature]].concat())? {
        return Ok(());
    }
    let out_dir = env::var_os("OUT_DIR").context("OUT_DIR is not set")?;
    let object = Path::new(&out_dir).join(name);
    let renamed = Path::new(&out_dir).join(format!("{name}-{feature}"));
    fs::rename(&object, &renamed).with_context(|| format!("renaming {}", object.display()))
}

/// Compiles a package with some of its features. Returns false if the toolchain is missing.
fn compile(name: &str, root_dir: &str, features: &[&str]) -> anyhow::Result<bool> {
    println!("cargo::rerun-if-env-changed=RUSTUP_HOME");
    let found = toolchain::rustup_home().and_then(|home| toolchain::choose(&home));
    let (Some(found), Some(linker)) = (found, toolchain::linker()) else {
        println!("cargo::error={MISSING}");
        return Ok(false);
    };
    rerun_if_changed(&linker);

    let rustup_toolchain = match &found {
        EbpfToolchain::Nightly(dir) => {
            rerun_if_changed(&dir.join("lib/rustlib/multirust-channel-manifest.toml"));
            Toolchain::Nightly
        }
        EbpfToolchain::Linked(dir) => {
            rerun_if_changed(&dir.join("bin/rustc"));
            // These two crates use unstable features, which a stable compiler refuses otherwise.
            set_env("RUSTC_BOOTSTRAP", "aya_ebpf,lb_ebpf");
            Toolchain::Custom(toolchain::LINKED)
        }
    };
    // cargo runs a build script in a folder of its own for each profile and each selection of packages. The object is
    // equal in all of them, so they share one build folder.
    let out_dir = env::var_os("OUT_DIR").context("OUT_DIR is not set")?;
    if let Some(target_dir) = Path::new(&out_dir).ancestors().nth(4) {
        set_env("CARGO_BUILD_BUILD_DIR", target_dir.join("ebpf"));
    }
    // aya-build prints cargo's progress as warnings of the build script, which cargo repeats at every build.
    set_env("CARGO_TERM_QUIET", "true");
    build_ebpf(
        [Package {
            name,
            root_dir,
            features,
            ..Package::default()
        }],
        rustup_toolchain,
    )?;
    Ok(true)
}

/// Sets a variable for the programs that the build script starts.
fn set_env(name: &str, value: impl AsRef<OsStr>) {
    // SAFETY: a build script has one thread when it calls `build`, and `build` sets all variables before `build_ebpf`
    // starts other threads.
    unsafe { env::set_var(name, value) };
}

/// Makes cargo run the build script again when `path` changes. A path that does not exist is left out, because cargo would
/// run the script at every build.
fn rerun_if_changed(path: &Path) {
    if path.exists() {
        println!("cargo::rerun-if-changed={}", path.display());
    }
}
