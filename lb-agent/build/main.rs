//! Compiles `lb-ebpf` for the kernel; the object is `$OUT_DIR/lb-ebpf`.

mod object;

fn main() -> anyhow::Result<()> {
    println!("cargo::rerun-if-changed=build");
    object::build("lb-ebpf", concat!(env!("CARGO_MANIFEST_DIR"), "/../lb-ebpf"))
}
