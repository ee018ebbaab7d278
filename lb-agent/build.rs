//! Compiles `lb-ebpf` for the kernel: the object `$OUT_DIR/lb-ebpf`, and `$OUT_DIR/lb-ebpf-moving`, which is loaded while maps are
//! replaced.

use std::env;

fn main() -> anyhow::Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    let package = concat!(env!("CARGO_MANIFEST_DIR"), "/../lb-ebpf");
    // The programs have the layout of the agent.
    let is_made_up = env::var_os("CARGO_FEATURE_MADE_UP_LAYOUT").is_some();
    let features: &[&str] = if is_made_up { &["made-up-layout"] } else { &[] };
    lb_ebpf_build::build_with("lb-ebpf", package, features, "moving")?;
    lb_ebpf_build::build("lb-ebpf", package, features)
}
