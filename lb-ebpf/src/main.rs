//! The kernel programs of lb: entry points by hook. They look up maps, call `lb_common::logic`, apply what it says,
//! count, and return the verdict.
#![no_std]
#![no_main]
#![expect(
    clippy::needless_pass_by_value,
    reason = "the macros of entry points pass the context by value"
)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

mod agent_calls;
mod atomic;
mod backend;
mod count;
mod ct;
mod family;
mod map_tables;
mod maps;
mod mptcp;
mod packet_ctx;
mod reject;
mod send;
mod skb;
mod snat_port;
mod sock;
mod sock_addr;
mod sockets;
mod tc;
mod udp_dests;
mod volatile;

/// The kernel side cannot panic: a panic path that survives in the object is a verifier rejection.
#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Some helpers are for programs under a GPL-compatible licence only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
