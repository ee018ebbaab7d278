//! The maps as `lb_common::logic` looks at them.

use core::ffi::c_void;
use core::ptr;

use aya_ebpf::helpers::generated::bpf_get_netns_cookie;
use lb_common::abi::Frontend;
use lb_common::logic::ip128::Ip128;
use lb_common::logic::route::{Destination, Tables};

use crate::maps::{FRONTENDS, NODE_ADDRS, node_netns};
use crate::volatile::{AddrKey, Key};

/// FRONTENDS and NODE_ADDRS, and the socket of a program's context.
pub(crate) struct MapTables {
    /// The context of the running program.
    pub(crate) ctx: *mut c_void,
}

impl MapTables {
    /// The cookie of the socket's network namespace.
    #[inline(always)]
    pub(crate) fn netns(&self) -> u64 {
        // SAFETY: the context is that of the running program.
        unsafe { bpf_get_netns_cookie(self.ctx) }
    }
}

impl Tables for MapTables {
    #[inline(always)]
    fn frontend(&self, key: Destination) -> Option<Frontend> {
        let value = FRONTENDS.get_ptr(Key::of(key).as_key())?;
        // SAFETY: the pointer is to a value of the map, 8 bytes and aligned so; `lb_frontend_swap` may store to it.
        Some(Frontend::from_word(unsafe { ptr::read_volatile(value.cast::<u64>()) }))
    }

    #[inline(always)]
    fn is_node_address(&self, addr: Ip128) -> bool {
        NODE_ADDRS.get_ptr(AddrKey::of(addr).as_key()).is_some()
    }

    #[inline(always)]
    fn is_on_node(&self) -> bool {
        self.netns() == node_netns()
    }
}
