//! Empty library target: the agent's build script depends on it, so that cargo rebuilds the kernel object when this crate
//! changes. The programs are in `main.rs`.
#![no_std]
