//! Access to a packet in the kernel: reads, and changes that keep the kernel's state of its checksum correct.

use aya_ebpf::bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers::generated::{
    bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_skb_change_head, bpf_skb_pull_data, bpf_skb_store_bytes,
};
use lb_common::abi::DropReason;
use lb_common::logic::checksum::Sum;
use lb_common::logic::packet::{Bytes, ETHERNET};
use network_types::ip::Ipv6Hdr;
use network_types::tcp::TcpHdr;

/// Length of the longest headers that are read.
const HEADERS: u32 = (ETHERNET + Ipv6Hdr::LEN + TcpHdr::LEN) as u32;

/// Flag of `bpf_l4_csum_replace` since Linux 6.16, and since newer stable releases of older kernels.
///
/// If the device has summed the packet (`CHECKSUM_COMPLETE`), the helper adjusts that sum (`skb->csum`) for a change of the
/// addresses, as IPv4 requires: the changes of addresses and header checksum cancel each other out in it, and that of the
/// transport checksum remains. In IPv6 the change of the transport checksum cancels out that of the addresses, so the sum
/// stays. With this flag the helper leaves it alone (`inet_proto_csum_replace_by_diff` in `net/core/utils.c`).
const BPF_F_IPV6: u64 = 1 << 7;

/// Flag for UDP: a checksum of zero, which means "none" (RFC 768), is not updated.
pub(crate) const MAY_BE_ZERO: u64 = BPF_F_MARK_MANGLED_0 as u64;

/// The packet of a program's context.
#[derive(Clone, Copy)]
pub(crate) struct Skb(*mut __sk_buff);

impl Skb {
    /// Returns the packet of `skb`, which must be the context of the running program.
    #[inline(always)]
    pub(crate) const fn new(skb: *mut __sk_buff) -> Self {
        Self(skb)
    }

    /// Returns the context of the running program.
    #[inline(always)]
    pub(crate) const fn as_ptr(self) -> *mut __sk_buff {
        self.0
    }

    /// Returns the address of the first byte that can be read.
    #[inline(always)]
    fn data(self) -> usize {
        // SAFETY: the context is that of the running program.
        unsafe { (*self.0).data as usize }
    }

    /// Returns the address after the last byte that can be read.
    #[inline(always)]
    fn data_end(self) -> usize {
        // SAFETY: the context is that of the running program.
        unsafe { (*self.0).data_end as usize }
    }

    /// Returns the length of the packet, including its non-linear part.
    #[inline(always)]
    pub(crate) fn len(self) -> u32 {
        // SAFETY: the context is that of the running program.
        unsafe { (*self.0).len }
    }

    /// Returns the index of the device that the running program is attached to.
    #[inline(always)]
    pub(crate) fn ifindex(self) -> u32 {
        // SAFETY: the context is that of the running program.
        unsafe { (*self.0).ifindex }
    }

    /// Returns whether the kernel removed a VLAN tag, or is about to add one.
    #[inline(always)]
    pub(crate) fn has_vlan(self) -> bool {
        // SAFETY: the context is that of the running program.
        unsafe { (*self.0).vlan_present != 0 }
    }

    /// Returns whether a socket of this machine sent the packet.
    #[inline(always)]
    pub(crate) fn has_socket(self) -> bool {
        // SAFETY: the context is that of the running program.
        unsafe { !(*self.0).__bindgen_anon_2.sk.is_null() }
    }

    /// Makes the headers readable in one piece if they are not.
    #[inline(always)]
    pub(crate) fn pull(self) {
        let len = self.len();
        let wanted = if len < HEADERS { len } else { HEADERS };
        if self.data() + wanted as usize > self.data_end() {
            // SAFETY: the context is that of the running program. If the call fails, the headers count as truncated.
            unsafe { bpf_skb_pull_data(self.0, wanted) };
        }
    }

    /// Writes a value to the packet at an offset.
    #[inline(always)]
    pub(crate) fn store<T: Copy>(self, at: usize, value: &T) -> Result<(), DropReason> {
        let from = core::ptr::from_ref(value).cast();
        // SAFETY: the context is that of the running program, and the length is the size of the value.
        let result = unsafe { bpf_skb_store_bytes(self.0, at as u32, from, size_of::<T>() as u32, 0) };
        check(result)
    }

    /// Adds room for a link-layer header before the packet.
    #[inline(always)]
    pub(crate) fn add_link_header(self) -> Result<(), DropReason> {
        // SAFETY: the context is that of the running program.
        check(unsafe { bpf_skb_change_head(self.0, ETHERNET as u32, 0) })
    }

    /// Updates the IPv4 header checksum at `at` for a change of the header.
    #[inline(always)]
    pub(crate) fn l3_csum_replace(self, at: usize, change: Sum) -> Result<(), DropReason> {
        // SAFETY: the context is that of the running program.
        check(unsafe { bpf_l3_csum_replace(self.0, at as u32, 0, change.to_u32().into(), 0) })
    }

    /// Updates the transport checksum at `at` for a change of the addresses, which the pseudo-header contains.
    #[inline(always)]
    pub(crate) fn l4_csum_replace_addrs(
        self,
        at: usize,
        change: Sum,
        is_v4: bool,
        flags: u64,
    ) -> Result<(), DropReason> {
        let flags = flags | u64::from(BPF_F_PSEUDO_HDR);
        let change = u64::from(change.to_u32());
        if !is_v4 {
            // SAFETY: the context is that of the running program.
            let result = unsafe { bpf_l4_csum_replace(self.0, at as u32, 0, change, flags | BPF_F_IPV6) };
            if result == 0 {
                return Ok(());
            }
            // The kernel does not have the flag. The device's sum is then wrong: the stack logs "hw csum failure" and sums itself.
        }
        // SAFETY: the context is that of the running program.
        check(unsafe { bpf_l4_csum_replace(self.0, at as u32, 0, change, flags) })
    }

    /// Updates the transport checksum at `at` for a change of the transport header or the payload.
    #[inline(always)]
    pub(crate) fn l4_csum_replace(self, at: usize, change: Sum, flags: u64) -> Result<(), DropReason> {
        // SAFETY: the context is that of the running program.
        check(unsafe { bpf_l4_csum_replace(self.0, at as u32, 0, change.to_u32().into(), flags) })
    }
}

/// Returns the result of a helper that returns zero on success.
#[inline(always)]
const fn check(result: i64) -> Result<(), DropReason> {
    if result == 0 {
        Ok(())
    } else {
        Err(DropReason::RewriteFailed)
    }
}

impl Bytes for Skb {
    #[inline(always)]
    fn byte(&self, at: usize) -> Option<u8> {
        let at = self.data() + at;
        if at + 1 > self.data_end() {
            return None;
        }
        // SAFETY: the bounds were checked, so the byte is within the packet.
        Some(unsafe { imp::byte(at) })
    }

    #[inline(always)]
    fn half(&self, at: usize) -> Option<u16> {
        let at = self.data() + at;
        if at + 2 > self.data_end() {
            return None;
        }
        // SAFETY: the bounds were checked, so the bytes are within the packet.
        Some(u16::from_be(unsafe { imp::half(at) }))
    }

    #[inline(always)]
    fn word(&self, at: usize) -> Option<u32> {
        let at = self.data() + at;
        if at + 4 > self.data_end() {
            return None;
        }
        // SAFETY: the bounds were checked, so the bytes are within the packet.
        Some(unsafe { imp::word(at) })
    }

    #[inline(always)]
    fn size(&self) -> usize {
        self.len() as usize
    }

    #[inline(always)]
    fn is_gso(&self) -> bool {
        // SAFETY: the context is that of the running program.
        unsafe { (*self.0).gso_size != 0 }
    }
}

/// Unaligned loads from the packet. The compiler would split an unaligned load into bytes; the kernel accepts it if the
/// machine supports it, and otherwise moves the data.
#[cfg(target_arch = "bpf")]
mod imp {
    use core::arch::asm;

    #[inline(always)]
    pub(super) unsafe fn byte(at: usize) -> u8 {
        let value: u64;
        // SAFETY: the caller guarantees that the bytes are within the packet.
        unsafe { asm!("{value} = *(u8 *)({at} + 0)", at = in(reg) at, value = out(reg) value) };
        value as u8
    }

    #[inline(always)]
    pub(super) unsafe fn half(at: usize) -> u16 {
        let value: u64;
        // SAFETY: the caller guarantees that the bytes are within the packet.
        unsafe { asm!("{value} = *(u16 *)({at} + 0)", at = in(reg) at, value = out(reg) value) };
        value as u16
    }

    #[inline(always)]
    pub(super) unsafe fn word(at: usize) -> u32 {
        let value: u64;
        // SAFETY: the caller guarantees that the bytes are within the packet.
        unsafe { asm!("{value} = *(u32 *)({at} + 0)", at = in(reg) at, value = out(reg) value) };
        value as u32
    }
}

#[cfg(not(target_arch = "bpf"))]
mod imp {
    pub(super) unsafe fn byte(at: usize) -> u8 {
        // SAFETY: the caller guarantees that the bytes are within the packet.
        unsafe { (at as *const u8).read() }
    }

    pub(super) unsafe fn half(at: usize) -> u16 {
        // SAFETY: the caller guarantees that the bytes are within the packet.
        unsafe { (at as *const u16).read_unaligned() }
    }

    pub(super) unsafe fn word(at: usize) -> u32 {
        // SAFETY: the caller guarantees that the bytes are within the packet.
        unsafe { (at as *const u32).read_unaligned() }
    }
}
