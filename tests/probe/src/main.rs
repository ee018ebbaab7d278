//! The lookup of a frontend as lb's programs do it, judged at every step: for tests, which run it a million times a
//! second by `BPF_PROG_TEST_RUN` while the maps change. It is no part of the product, and never attached.
#![no_std]
#![no_main]
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
use lb_common::abi::{Addr, Backend, BackendSlot, Frontend, FrontendKey, FrontendKind, Service, SetWord, capacity};
use lb_common::logic::connect;
use lb_probe::{LookupRequest, Tally, Verdict};

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;

/// How often a lookup that lingers asks for the time: some 400 microseconds, as if an interrupt had come in between,
/// and long enough for several changes.
const LINGER: u32 = 16_384;

// The maps of lb: the test opens those that are pinned in place of these.

#[btf_map]
static FRONTENDS: HashMap<FrontendKey, Frontend, { capacity::FRONTENDS as usize }> = HashMap::new();

#[btf_map]
static SERVICES: Array<Service, { capacity::SERVICES as usize }, MMAPABLE> = Array::new();

#[btf_map]
static BACKEND_SLOTS: Array<BackendSlot, { capacity::BACKEND_SLOTS as usize }, MMAPABLE> = Array::new();

#[btf_map]
static BACKENDS: Array<Backend, { capacity::BACKENDS as usize }, MMAPABLE> = Array::new();

/// What was found.
#[btf_map]
static TALLY: PerCpuArray<Tally, 1> = PerCpuArray::new();

/// Answers a [`LookupRequest`]. `TC_ACT_SHOT`: that was none.
#[classifier]
pub(crate) fn lb_probe(ctx: TcContext) -> i32 {
    let at = ctx.data();
    if at + size_of::<LookupRequest>() > ctx.data_end() {
        return TC_ACT_SHOT;
    }
    // SAFETY: the bounds were checked, and every bit pattern is a `LookupRequest`; packet data is not aligned.
    let request = unsafe { (at as *const LookupRequest).read_unaligned() };
    let Some(tally) = TALLY.get_ptr_mut(0) else {
        return TC_ACT_SHOT;
    };
    // SAFETY: the entry is this CPU's own, and a program of this type is not interrupted by another.
    let tally = unsafe { &mut *tally };
    let mut trace = Trace::default();
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

/// How many packets came by.
#[btf_map]
static COUNT: Array<u64, 1> = Array::new();

/// Counts a packet and ends the chain, as a program of a network plugin may: for tests that attach it beside lb's.
#[classifier]
pub(crate) fn lb_count(_ctx: TcContext) -> i32 {
    if let Some(count) = COUNT.get_ptr_mut(0) {
        // SAFETY: the pointer is to a value of the map; that another CPU counts at the same instant does not matter.
        unsafe { ptr::write_volatile(count, ptr::read_volatile(count) + 1) };
    }
    TC_ACT_OK
}

/// What was read, as far as the lookup came.
#[derive(Default)]
struct Trace {
    service: u32,
    slot: u32,
    addr: u32,
    backend: u32,
    slot_generation: u32,
    backend_generation: u32,
}

#[inline(always)]
fn look_up(request: &LookupRequest, trace: &mut Trace) -> Result<(), Verdict> {
    // SAFETY: the helper takes nothing.
    let random = unsafe { bpf_get_prandom_u32() };
    // Where this lookup lingers: at one of four places, the last of which is none.
    let place = if (random >> 2) & request.linger_mask == 0 {
        random & 3
    } else {
        3
    };

    let word = FRONTENDS.get_ptr(request.key).ok_or(Verdict::NoFrontend)?;
    // SAFETY: the pointer is to a value of the map, 8 bytes and aligned so; it may change at any time.
    let frontend = Frontend::from_word(unsafe { ptr::read_volatile(word.cast::<u64>()) });
    trace.service = frontend.service;
    if frontend.kind != FrontendKind::ClusterIp as u8 {
        return Err(Verdict::WrongKind);
    }
    if place == 0 {
        linger();
    }

    let service = SERVICES.get_ptr(frontend.service).ok_or(Verdict::IndexOutOfRange)?;
    // SAFETY: the pointer is to a value of the map; a set word is 8 bytes and aligned so.
    let word = unsafe { ptr::read_volatile((&raw const (*service).internal).cast::<u64>()) };
    let set = SetWord::from_word(word);
    if place == 1 {
        linger();
    }

    // SAFETY: the helper takes nothing.
    let random = unsafe { bpf_get_prandom_u32() };
    let at = connect::slot(set, random).map_err(|_| Verdict::EmptySet)?;
    trace.slot = at;
    let slot = BACKEND_SLOTS.get_ptr(at).ok_or(Verdict::SlotOutOfRange)?;
    // SAFETY: the pointer is to a value of the map.
    let (addr, port) = unsafe {
        (
            last(&raw const (*slot).addr),
            ptr::read_volatile(&raw const (*slot).port),
        )
    };
    trace.addr = addr;
    // SAFETY: as above.
    trace.backend = unsafe { ptr::read_volatile(&raw const (*slot).backend) };
    // SAFETY: as above.
    trace.slot_generation = unsafe { ptr::read_volatile(&raw const (*slot).generation) };
    if addr & request.mask != request.owner {
        return Err(Verdict::ForeignBackend);
    }
    if place == 2 {
        linger();
    }

    let backend = BACKENDS.get_ptr(trace.backend).ok_or(Verdict::Stale)?;
    // SAFETY: the pointer is to a value of the map.
    trace.backend_generation = unsafe { ptr::read_volatile(&raw const (*backend).generation) };
    // It may have been withdrawn since the set was read, but its id is nobody else's before a grace period has passed.
    let withdrawn = trace.slot_generation.wrapping_add(1);
    let current = trace.backend_generation == trace.slot_generation || trace.backend_generation == withdrawn;
    // SAFETY: as above.
    let (is_addr, is_port, owner) = unsafe {
        (
            last(&raw const (*backend).addr),
            ptr::read_volatile(&raw const (*backend).port),
            ptr::read_volatile(&raw const (*backend).service),
        )
    };
    if !current || is_addr != addr || is_port != port || owner != frontend.service {
        return Err(Verdict::Stale);
    }
    Ok(())
}

/// The last four bytes of an address, as they are in memory.
///
/// # Safety
/// `at` must be valid for reads.
#[inline(always)]
unsafe fn last(at: *const Addr) -> u32 {
    // SAFETY: an `Addr` is four aligned words; see above.
    unsafe { at.cast::<u32>().add(3).read_volatile() }
}

/// Takes some time.
#[inline(never)]
fn linger() {
    let mut at = 0;
    while at < LINGER {
        // SAFETY: the helper takes nothing.
        black_box(unsafe { bpf_ktime_get_ns() });
        at += 1;
    }
}

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
