//! Compiles `lb-ebpf` for the kernel: the object `$OUT_DIR/lb-ebpf`, and `$OUT_DIR/lb-ebpf-moving`, which is loaded while maps are
//! replaced.

fn main() -> anyhow::Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    let package = concat!(env!("CARGO_MANIFEST_DIR"), "/../lb-ebpf");
    lb_ebpf_build::build_with("lb-ebpf", package, "moving")?;
    lb_ebpf_build::build("lb-ebpf", package)
}
