//! The next hop of a packet that the program forwards without the stack: MTU check and redirection.

use core::ptr;

use aya_ebpf::bindings::{bpf_check_mtu_flags, bpf_check_mtu_ret, bpf_redir_neigh};
use aya_ebpf::helpers::generated::{bpf_check_mtu, bpf_redirect_neigh};
use lb_common::abi::DropReason;

use crate::skb::Skb;

/// The next hop on the route to an address.
pub(crate) struct NextHop {
    /// Index of the device that leads to the next hop.
    pub(crate) device: u32,
    /// Address of the next hop, and its family.
    pub(crate) neighbour: bpf_redir_neigh,
}

impl NextHop {
    /// Checks that the packet, which is as long as the translated one, is not longer than the MTU of the route.
    ///
    /// # Errors
    /// Returns [`DropReason::TooBig`]; `mtu` is then the maximum length from the IP header on, in bytes.
    #[inline(always)]
    pub(crate) fn check_mtu(&self, skb: Skb, mtu: &mut u32) -> Result<(), DropReason> {
        *mtu = 0;
        // SAFETY: the context is that of the running program, and the helper stores an `u32` in `mtu`.
        let result = unsafe {
            let flags = u64::from(bpf_check_mtu_flags::BPF_MTU_CHK_SEGS);
            bpf_check_mtu(skb.as_ptr().cast(), self.device, ptr::from_mut(mtu), 0, flags)
        };
        if result == i64::from(bpf_check_mtu_ret::BPF_MTU_CHK_RET_SUCCESS) {
            Ok(())
        } else {
            Err(DropReason::TooBig)
        }
    }

    /// Sends the packet to the next hop, and returns the verdict.
    #[inline(always)]
    pub(crate) fn redirect(&mut self) -> i32 {
        let len = size_of::<bpf_redir_neigh>() as i32;
        // SAFETY: the pointer is to a field of `self`, and `len` is its size.
        unsafe { bpf_redirect_neigh(self.device, &raw mut self.neighbour, len, 0) as i32 }
    }
}
