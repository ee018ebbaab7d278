//! Looks frontends up as lb's programs do, and checks every step. Tests run the program a million times per second by
//! `BPF_PROG_TEST_RUN` while the maps change. It is not part of lb-agent, and `lb_probe` is never attached.
#![cfg_attr(target_arch = "bpf", no_std)]
#![cfg_attr(target_arch = "bpf", no_main)]
#![expect(
    clippy::needless_pass_by_value,
    reason = "the macros of entry points pass the context by value"
)]

use core::hint::black_box;
use core::ptr;

use aya_ebpf::bindings::{BPF_F_MMAPABLE, TC_ACT_OK, TC_ACT_SHOT};
use aya_ebpf::btf_maps::{Array, HashMap, PerCpuArray};
use aya_ebpf::helpers::generated::{bpf_get_prandom_u32, bpf_ktime_get_ns};
use aya_ebpf::macros::{btf_map, classifier};
use aya_ebpf::programs::TcContext;
use lb_common::abi::{
    Addr, Backend, BackendSlot, FilterBit, Frontend, FrontendKey, FrontendKind, Service, SetWord, map_spec,
};
use lb_common::logic::selection;
use lb_probe::{LookupRequest, Tally, Verdict};

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;

/// How often a lookup that pauses reads the clock. That takes some 400 microseconds, like an interrupt between two reads,
/// and is long enough for several changes.
const LINGER: u32 = 16_384;

// The maps of lb. The loader uses the pinned maps instead of creating these.

#[btf_map]
static FRONTENDS: HashMap<FrontendKey, Frontend, { map_spec::FRONTENDS.default_capacity() as usize }> = HashMap::new();

#[btf_map]
static FILTER: Array<u64, { map_spec::FILTER.default_capacity() as usize }, MMAPABLE> = Array::new();

#[btf_map]
static SERVICES: Array<Service, { map_spec::SERVICES.default_capacity() as usize }, MMAPABLE> = Array::new();

#[btf_map]
static BACKEND_SLOTS: Array<BackendSlot, { map_spec::BACKEND_SLOTS.default_capacity() as usize }, MMAPABLE> =
    Array::new();

#[btf_map]
static BACKENDS: Array<Backend, { map_spec::BACKENDS.default_capacity() as usize }, MMAPABLE> = Array::new();

/// The results of the lookups.
#[btf_map]
static TALLY: PerCpuArray<Tally, 1> = PerCpuArray::new();

/// Runs a [`LookupRequest`]. Returns `TC_ACT_SHOT` if the packet is not one.
#[classifier]
pub(crate) fn lb_probe(ctx: TcContext) -> i32 {
    let at = ctx.data();
    if at + size_of::<LookupRequest>() > ctx.data_end() {
        return TC_ACT_SHOT;
    }
    // SAFETY: the bounds were checked, every bit pattern is a valid `LookupRequest`, and the read does not need alignment.
    let request = unsafe { (at as *const LookupRequest).read_unaligned() };
    let Some(tally) = TALLY.get_ptr_mut(0) else {
        return TC_ACT_SHOT;
    };
    // SAFETY: the entry belongs to this CPU, and no other program of this type interrupts this one.
    let tally = unsafe { &mut *tally };
    let mut trace = LookupTrace::default();
    match look_up(&request, &mut trace) {
        Ok(()) => tally.counts[Verdict::Good as usize] += 1,
        Err(verdict) => {
            if let Some(count) = tally.counts.get_mut(verdict as usize) {
                *count += 1;
            }
            tally.verdict = verdict as u32;
            tally.service = trace.service;
            tally.slot = trace.slot;
            tally.addr = trace.addr;
            tally.backend = trace.backend;
            tally.slot_generation = trace.slot_generation;
            tally.backend_generation = trace.backend_generation;
        }
    }
    TC_ACT_OK
}

/// Number of counted packets.
#[btf_map]
static COUNT: Array<u64, 1> = Array::new();

/// Counts a packet and ends the chain of programs, as a program of a network plugin may do. Tests attach it next to lb's
/// programs.
#[classifier]
pub(crate) fn lb_count(_ctx: TcContext) -> i32 {
    if let Some(count) = COUNT.get_ptr_mut(0) {
        // SAFETY: the pointer refers to a value of the map. A lost increment of a concurrent CPU does not matter.
        unsafe { ptr::write_volatile(count, ptr::read_volatile(count) + 1) };
    }
    TC_ACT_OK
}

/// The values that a lookup has read so far.
#[derive(Default)]
struct LookupTrace {
    service: u32,
    slot: u32,
    addr: u32,
    backend: u32,
    slot_generation: u32,
    backend_generation: u32,
}

#[inline(always)]
fn look_up(request: &LookupRequest, trace: &mut LookupTrace) -> Result<(), Verdict> {
    // SAFETY: the helper has no arguments and no preconditions.
    let random = unsafe { bpf_get_prandom_u32() };
    // The read before which this lookup pauses; 3 means no pause.
    let pause_at = if (random >> 2) & request.linger_mask == 0 {
        random & 3
    } else {
        3
    };

    let bit = FilterBit::from(request.key.addr);
    let word = FILTER.get_ptr(bit.word()).ok_or(Verdict::Filtered)?;
    // SAFETY: the pointer refers to a value of the map, which is 8 bytes long and 8-byte aligned.
    if !bit.is_in(unsafe { ptr::read_volatile(word) }) {
        return Err(Verdict::Filtered);
    }
    let words = FRONTENDS.get_ptr(request.key).ok_or(Verdict::NoFrontend)?.cast::<u64>();
    // SAFETY: the pointer refers to a value of the map, which is two words long and 8-byte aligned. The value may change at
    // any time, so the reads are volatile.
    let first = unsafe { ptr::read_volatile(words) };
    if pause_at == 0 {
        linger();
    }
    // SAFETY: as before.
    let frontend = Frontend::from_words([first, unsafe { ptr::read_volatile(words.add(1)) }]);
    trace.service = frontend.service.get();
    if frontend.kind != FrontendKind::ClusterIp as u8 {
        return Err(Verdict::WrongKind);
    }
    if pause_at == 1 {
        linger();
    }
    // Every second lookup uses the set in the frontend, if there is one that belongs to its service.
    let uses_frontend = random & 1 << 31 != 0;
    // SAFETY: the helper has no arguments and no preconditions.
    let random = unsafe { bpf_get_prandom_u32() };
    if uses_frontend
        && let Ok(at) = selection::slot(frontend.set, random)
        && let Some(slot) = BACKEND_SLOTS.get_ptr(at)
    {
        // SAFETY: `slot` refers to a value of BACKEND_SLOTS, and the field is aligned.
        let owner = unsafe { ptr::read_volatile((&raw const (*slot).service).cast::<u32>()) };
        if owner == frontend.service.get() {
            return check(request, frontend, at, slot, pause_at, trace);
        }
    }

    let service = SERVICES
        .get_ptr(frontend.service.get())
        .ok_or(Verdict::IndexOutOfRange)?;
    // SAFETY: the pointer refers to a value of the map, in which a set word is 8 bytes long and 8-byte aligned.
    let word = unsafe { ptr::read_volatile((&raw const (*service).internal).cast::<u64>()) };
    let set = SetWord::from_word(word);
    if pause_at == 1 {
        linger();
    }

    let at = selection::slot(set, random).map_err(|_| Verdict::EmptySet)?;
    let slot = BACKEND_SLOTS.get_ptr(at).ok_or(Verdict::SlotOutOfRange)?;
    check(request, frontend, at, slot, pause_at, trace)
}

/// Checks that a slot has a backend of the frontend's Service.
#[inline(always)]
fn check(
    request: &LookupRequest,
    frontend: Frontend,
    at: u32,
    slot: *const BackendSlot,
    pause_at: u32,
    trace: &mut LookupTrace,
) -> Result<(), Verdict> {
    trace.slot = at;
    // SAFETY: `slot` refers to a value of BACKEND_SLOTS, and the field is aligned.
    let (addr, port) = unsafe {
        (
            last(&raw const (*slot).addr),
            ptr::read_volatile(&raw const (*slot).port),
        )
    };
    trace.addr = addr;
    // SAFETY: `slot` refers to a value of BACKEND_SLOTS, and the field is aligned.
    trace.backend = unsafe { ptr::read_volatile(&raw const (*slot).backend.id) };
    // SAFETY: `slot` refers to a value of BACKEND_SLOTS, and the field is aligned.
    trace.slot_generation = unsafe { ptr::read_volatile(&raw const (*slot).backend.generation) };
    if addr & request.mask != request.owner {
        return Err(Verdict::ForeignBackend);
    }
    if pause_at == 2 {
        linger();
    }

    let backend = BACKENDS.get_ptr(trace.backend).ok_or(Verdict::Stale)?;
    // SAFETY: `backend` refers to a value of BACKENDS, and the field is aligned.
    trace.backend_generation = unsafe { ptr::read_volatile(&raw const (*backend).generation) };
    // The backend may have been withdrawn since the set was read, but its id is not used again before a grace period.
    let withdrawn = trace.slot_generation.wrapping_add(1);
    let current = trace.backend_generation == trace.slot_generation || trace.backend_generation == withdrawn;
    // SAFETY: `backend` refers to a value of BACKENDS, and the field is aligned.
    let (backend_addr, backend_port, owner) = unsafe {
        (
            last(&raw const (*backend).addr),
            ptr::read_volatile(&raw const (*backend).port),
            ptr::read_volatile(&raw const (*backend).service),
        )
    };
    if !current || backend_addr != addr || backend_port != port || owner != frontend.service {
        return Err(Verdict::Stale);
    }
    Ok(())
}

/// Returns the last four bytes of an address in the order of memory, which is network order.
///
/// # Safety
/// `at` must be valid for reads.
#[inline(always)]
unsafe fn last(at: *const Addr) -> u32 {
    // SAFETY: the caller passes a pointer that is valid for reads, and an `Addr` consists of four aligned words.
    unsafe { at.cast::<u32>().add(3).read_volatile() }
}

/// Pauses for some 400 microseconds.
#[inline(never)]
fn linger() {
    let mut at = 0;
    while at < LINGER {
        // SAFETY: the helper has no arguments and no preconditions.
        black_box(unsafe { bpf_ktime_get_ns() });
        at += 1;
    }
}

/// Required by `no_std`. A kernel program cannot panic: the verifier rejects an object with a remaining panic path.
#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// License of the programs. The kernel allows some helpers only under a GPL-compatible license.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Other targets only check this crate, with the standard library: a dependency may enable that there.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
