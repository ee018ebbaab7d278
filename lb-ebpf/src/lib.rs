//! Nothing: a library target, so that the agent's build script can depend on this crate and cargo rebuilds the kernel
//! object when it changes. The programs are in `main.rs`.
#![no_std]
