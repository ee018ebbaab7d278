//! Links anew when another bpf-linker is installed, which cargo cannot see by itself.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if let Ok(linker) = which::which("bpf-linker") {
        println!("cargo::rerun-if-changed={}", linker.display());
    }
}
