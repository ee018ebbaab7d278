//! Compiles `lb-probe` for the kernel; the object is `$OUT_DIR/lb-probe`.

#[path = "../../lb-agent/build/object.rs"]
mod object;

fn main() -> anyhow::Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=../../lb-agent/build/object.rs");
    object::build("lb-probe", concat!(env!("CARGO_MANIFEST_DIR"), "/../probe"))
}
