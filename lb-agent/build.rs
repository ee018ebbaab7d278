//! Compiles `lb-ebpf` for the kernel; the object is `$OUT_DIR/lb-ebpf`.

fn main() -> anyhow::Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    lb_ebpf_build::build("lb-ebpf", concat!(env!("CARGO_MANIFEST_DIR"), "/../lb-ebpf"))
}
