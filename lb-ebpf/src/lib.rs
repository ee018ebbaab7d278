//! Nothing: what runs in the kernel is the binary of this package.
//!
//! `lb-agent` has this library as a build-dependency. That is how cargo learns that the eBPF object, which the build
//! script of `lb-agent` makes, is to be made again when `lb-common` or another dependency of this package changes.

#![no_std]
