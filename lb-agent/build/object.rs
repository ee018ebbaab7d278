//! Compiles a package for the kernel: shared by the build scripts that do.

use std::env;
use std::ffi::OsStr;
use std::path::Path;

use anyhow::Context as _;
use aya_build::{Package, Toolchain, build_ebpf};

#[path = "../../xtask/src/road.rs"]
mod road;

use road::Road;

/// The one thing that goes wrong in a fresh clone.
const MISSING: &str = "the eBPF toolchain is missing: run `cargo xtask setup`";

/// Compiles the programs of a package in a folder; the objects are `$OUT_DIR/PROGRAM`.
pub(crate) fn build(name: &str, root_dir: &str) -> anyhow::Result<()> {
    println!("cargo::rerun-if-env-changed=RUSTUP_HOME");
    let road = road::rustup_home().and_then(|home| road::choose(&home));
    let (Some(road), Some(linker)) = (road, road::linker()) else {
        println!("cargo::error={MISSING}");
        return Ok(());
    };
    rerun_if_changed(&linker);

    let toolchain = match &road {
        Road::Nightly(dir) => {
            rerun_if_changed(&dir.join("lib/rustlib/multirust-channel-manifest.toml"));
            Toolchain::Nightly
        }
        Road::Linked(dir) => {
            rerun_if_changed(&dir.join("bin/rustc"));
            // These two use features that are not stable.
            set_env("RUSTC_BOOTSTRAP", "aya_ebpf,lb_ebpf");
            Toolchain::Custom(road::LINKED)
        }
    };
    // cargo runs this script in a folder of its own for each profile and each choice of packages: what they compile is
    // the same every time, and shared.
    let out_dir = env::var_os("OUT_DIR").context("OUT_DIR is not set")?;
    if let Some(target_dir) = Path::new(&out_dir).ancestors().nth(4) {
        set_env("CARGO_BUILD_BUILD_DIR", target_dir.join("ebpf"));
    }
    // Its progress would come as warnings, at every build again.
    set_env("CARGO_TERM_QUIET", "true");
    build_ebpf(
        [Package {
            name,
            root_dir,
            ..Package::default()
        }],
        toolchain,
    )
}

/// Sets a variable for the programs that this script starts.
fn set_env(name: &str, value: impl AsRef<OsStr>) {
    // SAFETY: a build script has one thread, and all calls are before it starts another.
    unsafe { env::set_var(name, value) };
}

/// A path that does not exist would make cargo run this script every time.
fn rerun_if_changed(path: &Path) {
    if path.exists() {
        println!("cargo::rerun-if-changed={}", path.display());
    }
}
