//! Finds the eBPF toolchain of this machine and, with the feature `build`, compiles a package for the kernel.

#[cfg(feature = "build")]
mod build;
pub mod toolchain;

#[cfg(feature = "build")]
pub use build::{build, build_with};
