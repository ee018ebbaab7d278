//! Map lookups for the decisions of `lb_common::logic`.

use core::ffi::c_void;
use core::ptr;

use aya_ebpf::btf_maps::lpm_trie::Key as Prefix;
use aya_ebpf::helpers::generated::bpf_get_netns_cookie;
use lb_common::abi::{Addr, FilterBit, Frontend, FrontendKeyWords, FrontendKind, ServiceIndex, SourceRange};
use lb_common::logic::decide::{PacketTables, Services};
use lb_common::logic::frontend::{Destination, Tables};
use lb_common::logic::ip128::Ip128;

use crate::backend::ServiceRef;
use crate::maps::{CLUSTER_CIDRS, FILTER, FRONTENDS, NODE_ADDRS, SOURCE_RANGES, node_netns};

/// The maps that decisions depend on, and the context of the program for its socket.
pub(crate) struct MapTables {
    /// The context of the running program.
    pub(crate) ctx: *mut c_void,
}

impl MapTables {
    /// Returns the cookie of the socket's network namespace.
    #[inline(always)]
    pub(crate) fn netns(&self) -> u64 {
        // SAFETY: the context is that of the running program.
        unsafe { bpf_get_netns_cookie(self.ctx) }
    }
}

/// Returns the two words of an entry of FRONTENDS.
#[inline(always)]
fn find_frontend(key: Destination) -> Option<*const u64> {
    let value = FRONTENDS.get_ptr(FrontendKeyWords::new(key.addr.0, key.port, key.proto).as_key())?;
    Some(value.cast())
}

impl Tables for MapTables {
    #[inline(always)]
    fn frontend(&self, key: Destination) -> Option<Frontend> {
        let words = find_frontend(key)?;
        // SAFETY: the pointer is to a value of the map, which is two words and is aligned to 8 bytes; `lb_frontend_swap` may store
        // to it at any time.
        let words = unsafe { [ptr::read_volatile(words), ptr::read_volatile(words.add(1))] };
        Some(Frontend::from_words(words))
    }

    #[inline(always)]
    fn is_node_port(&self, key: Destination) -> bool {
        find_frontend(key).is_some_and(|words| {
            // SAFETY: as above. The set is not read.
            let frontend = Frontend::from_words([unsafe { ptr::read_volatile(words) }, 0]);
            frontend.kind == FrontendKind::NodePort as u8
        })
    }

    #[inline(always)]
    fn may_have(&self, addr: Ip128) -> bool {
        let bit = FilterBit::of(addr.0);
        // A bit outside of the map, which has all, would settle nothing.
        FILTER.get_ptr(bit.word()).is_none_or(|word| {
            // SAFETY: the pointer is to a value of the map, which has 8 bytes and is aligned to 8 bytes; the agent may store to it
            // at any time.
            bit.is_in(unsafe { ptr::read_volatile(word) })
        })
    }

    #[inline(always)]
    fn is_node_address(&self, addr: Ip128) -> bool {
        NODE_ADDRS.get_ptr(Addr::from_words(&addr.0)).is_some()
    }

    #[inline(always)]
    fn is_on_node(&self) -> bool {
        self.netns() == node_netns()
    }
}

impl Services for MapTables {
    type Service = ServiceRef;

    #[inline(always)]
    fn service(&self, index: ServiceIndex) -> Option<ServiceRef> {
        ServiceRef::find(index)
    }

    #[inline(always)]
    fn flags(&self, service: ServiceRef) -> u32 {
        service.flags
    }
}

impl PacketTables for MapTables {
    #[inline(always)]
    fn cluster_flags(&self, addr: Ip128) -> u32 {
        let key = Prefix::new(128, Addr::from(addr));
        CLUSTER_CIDRS.get(&key).map_or(0, |flags| {
            // SAFETY: the reference is to a value of the map; the agent may store to it at any time.
            unsafe { ptr::from_ref(flags).read_volatile() }
        })
    }

    #[inline(always)]
    fn is_in_source_range(&self, service: ServiceIndex, addr: Ip128) -> bool {
        let range = SourceRange {
            service,
            addr: Addr::from(addr),
        };
        SOURCE_RANGES.get(&Prefix::new(160, range)).is_some()
    }
}
