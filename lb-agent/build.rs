//! Compiles `lb-ebpf` for the kernel; the object is `$OUT_DIR/lb-ebpf`.

use std::env;
use std::path::Path;

use anyhow::{Context as _, bail};
use aya_build::{Package, Toolchain, build_ebpf};

#[path = "../xtask/src/road.rs"]
mod road;

use road::Road;

/// The one thing that goes wrong in a fresh clone.
const MISSING: &str = "the eBPF toolchain is missing: run `cargo xtask setup`";

fn main() -> anyhow::Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=RUSTUP_HOME");
    let home = road::rustup_home().context(MISSING)?;
    let Some(road) = road::choose(&home) else {
        bail!(MISSING);
    };
    rerun_if_changed(&road::linker().context(MISSING)?);

    let toolchain = match &road {
        Road::Nightly(dir) => {
            rerun_if_changed(&dir.join("lib/rustlib/multirust-channel-manifest.toml"));
            Toolchain::Nightly
        }
        Road::Linked(dir) => {
            rerun_if_changed(&dir.join("bin/rustc"));
            // SAFETY: a build script has one thread, and this is before it starts another.
            unsafe { env::set_var("RUSTC_BOOTSTRAP", "aya_ebpf") };
            Toolchain::Custom(road::LINKED)
        }
    };
    build_ebpf(
        [Package {
            name: "lb-ebpf",
            root_dir: concat!(env!("CARGO_MANIFEST_DIR"), "/../lb-ebpf"),
            ..Package::default()
        }],
        toolchain,
    )
}

/// A path that does not exist would make cargo run this script every time.
fn rerun_if_changed(path: &Path) {
    if path.exists() {
        println!("cargo::rerun-if-changed={}", path.display());
    }
}
