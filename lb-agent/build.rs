//! scratch
fn main() -> aya_build::Result<()> {
    // scratch, replaced at merge
    unsafe { std::env::set_var("RUSTC_BOOTSTRAP", "aya_ebpf,lb_ebpf") };
    aya_build::build_ebpf(
        [aya_build::Package {
            name: "lb-ebpf",
            root_dir: concat!(env!("CARGO_MANIFEST_DIR"), "/../lb-ebpf"),
            ..Default::default()
        }],
        aya_build::Toolchain::Custom("ebpf"),
    )
}
