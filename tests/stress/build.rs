//! Compiles `lb-probe` for the kernel; the object is `$OUT_DIR/lb-probe`.

fn main() -> anyhow::Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    lb_ebpf_build::build("lb-probe", concat!(env!("CARGO_MANIFEST_DIR"), "/../probe"), &[])
}
