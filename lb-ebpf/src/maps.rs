//! The maps. Sizes are defaults: the loader sets them from the agent's flags.

use aya_ebpf::Global;
use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf};
use aya_ebpf::macros::btf_map;
use lb_common::abi::{
    Addr, Affinity, AffinityKey, Backend, BackendSlot, Config, CtEntry, CtKey, Device, DropReason, Event, Frontend,
    FrontendKey, Name, Notice, Service, ServiceStats, SocketRecord, SourceRange, State, UdpFlows, capacity,
};

use crate::packet_ctx::PacketCtx;

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;
const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;

#[btf_map]
pub(crate) static FRONTENDS: HashMap<FrontendKey, Frontend, { capacity::FRONTENDS as usize }> = HashMap::new();

#[btf_map]
pub(crate) static SERVICES: Array<Service, { capacity::SERVICES as usize }, MMAPABLE> = Array::new();

#[btf_map]
pub(crate) static BACKEND_SLOTS: Array<BackendSlot, { capacity::BACKEND_SLOTS as usize }, MMAPABLE> = Array::new();

#[btf_map]
pub(crate) static BACKENDS: Array<Backend, { capacity::BACKENDS as usize }, MMAPABLE> = Array::new();

#[btf_map]
pub(crate) static NODE_ADDRS: HashMap<Addr, u32, { capacity::NODE_ADDRS as usize }> = HashMap::new();

#[btf_map]
pub(crate) static SOCKETS: Array<SocketRecord, { capacity::SOCKETS as usize }, MMAPABLE> = Array::new();

#[btf_map]
pub(crate) static SOCKETS_MORE: HashMap<u64, SocketRecord, { capacity::SOCKETS_MORE as usize }, NO_PREALLOC> =
    HashMap::new();

#[btf_map]
pub(crate) static UDP_FLOWS: HashMap<u64, UdpFlows, { capacity::UDP_FLOWS as usize }, NO_PREALLOC> = HashMap::new();

#[btf_map]
pub(crate) static AFFINITY: LruHashMap<AffinityKey, Affinity, { capacity::AFFINITY as usize }> = LruHashMap::new();

#[btf_map]
pub(crate) static NAMES: HashMap<u32, Name, { capacity::SERVICES as usize }, NO_PREALLOC> = HashMap::new();

#[btf_map]
pub(crate) static STATS: PerCpuArray<ServiceStats, { capacity::SERVICES as usize }> = PerCpuArray::new();

#[btf_map]
pub(crate) static DROPS: PerCpuArray<u64, { DropReason::COUNT as usize }> = PerCpuArray::new();

#[btf_map]
pub(crate) static EVENTS: RingBuf<Event, { capacity::EVENTS_BYTES as usize }> = RingBuf::new();

#[btf_map]
pub(crate) static CONFIG: Array<Config, 1, MMAPABLE> = Array::new();

#[btf_map]
pub(crate) static STATE: Array<State, 1, MMAPABLE> = Array::new();

#[btf_map]
pub(crate) static NOTICES: HashMap<u32, Notice, { capacity::NOTICES as usize }, NO_PREALLOC> = HashMap::new();

#[btf_map]
pub(crate) static CT: HashMap<CtKey, CtEntry, { capacity::CT as usize }> = HashMap::new();

#[btf_map]
pub(crate) static CT_NEW: LruHashMap<CtKey, CtEntry, { capacity::CT_NEW as usize }> = LruHashMap::new();

#[btf_map]
pub(crate) static DEVICES: HashMap<u32, Device, { capacity::DEVICES as usize }, NO_PREALLOC> = HashMap::new();

#[btf_map]
pub(crate) static SOURCE_RANGES: LpmTrie<SourceRange, u32, { capacity::SOURCE_RANGES as usize }> = LpmTrie::new();

#[btf_map]
pub(crate) static CLUSTER_CIDRS: LpmTrie<Addr, u32, { capacity::CLUSTER_CIDRS as usize }> = LpmTrie::new();

/// What the packet path works with, one on each CPU. Nobody else's: not pinned.
#[btf_map]
pub(crate) static SCRATCH: PerCpuArray<PacketCtx, 1> = PerCpuArray::new();

/// Number of slots in SOCKETS, less one. Set by the loader before the programs are loaded.
#[unsafe(no_mangle)]
static SOCKETS_MASK: Global<u32> = Global::new(capacity::SOCKETS - 1);

/// `bpf_get_netns_cookie` of the node. Set by the loader.
#[unsafe(no_mangle)]
static NODE_NETNS: Global<u64> = Global::new(0);

/// Not zero: only sockets of the node's namespace are served. Set by the loader.
#[unsafe(no_mangle)]
static NODE_ONLY: Global<u32> = Global::new(0);

/// The cookie of the node's network namespace.
#[inline(always)]
pub(crate) fn node_netns() -> u64 {
    NODE_NETNS.load()
}

/// Whether only sockets of the node's namespace are served.
#[inline(always)]
pub(crate) fn node_only() -> bool {
    NODE_ONLY.load() != 0
}

/// The number of slots in SOCKETS, less one.
#[inline(always)]
pub(crate) fn sockets_mask() -> u32 {
    SOCKETS_MASK.load()
}
