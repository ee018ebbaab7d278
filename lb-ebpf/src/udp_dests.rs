//! UDP_FLOWS: the UDP destinations of unconnected sockets, up to four per socket.
//!
//! Several threads may use one socket, so a value is read and written under its lock. The verifier permits no calls
//! while a lock is held, so the code under the lock consists of loads and stores of words.

use aya_ebpf::bindings::{BPF_NOEXIST, bpf_spin_lock as RawLock};
use aya_ebpf::helpers::generated::{bpf_spin_lock, bpf_spin_unlock};
use lb_common::abi::{self, Addr, BackendRef, DESTS_PER_SOCKET, DropReason, UdpDest, bpf_spin_lock as Lock};
use lb_common::logic::ip128::Ip128;
use lb_common::logic::route::Destination;
use lb_common::logic::udp_dest;

use crate::backend::Choice;
use crate::maps::UDP_FLOWS;
use crate::volatile::{self, read_once, write_once};

static EMPTY: abi::UdpDests = abi::UdpDests {
    lock: Lock { val: 0 },
    pad: 0,
    netns: 0,
    dests: [UdpDest {
        vip: Addr::UNSPECIFIED,
        backend_addr: Addr::UNSPECIFIED,
        vip_port: 0,
        backend_port: 0,
        backend: BackendRef::NONE,
        service: 0,
        asked: 0,
        unanswered: 0,
        pad: 0,
    }; DESTS_PER_SOCKET],
};

/// The UDP destinations of one socket: a value of UDP_FLOWS.
pub(crate) struct UdpDests(*mut abi::UdpDests);

/// The UDP destinations of one socket while their lock is held; dropping it releases the lock.
struct Locked<'a>(&'a UdpDests);

/// Result of [`UdpDests::claim`].
pub(crate) struct Claimed {
    /// Backend of the destination: the new one, or the one that another thread has stored concurrently.
    pub(crate) choice: Choice,
    /// Another destination of the socket was evicted to make room.
    pub(crate) replaced: bool,
}

impl UdpDests {
    /// Returns the UDP destinations of a socket, if it has an entry.
    #[inline(always)]
    pub(crate) fn of(cookie: u64) -> Option<Self> {
        UDP_FLOWS.get_ptr_mut(cookie).map(Self)
    }

    /// Returns the UDP destinations of a socket; inserts an empty entry if it has none.
    ///
    /// # Errors
    /// Returns [`DropReason::UdpFlowsFull`] if the map has no room.
    #[inline(always)]
    pub(crate) fn of_or_new(cookie: u64) -> Result<Self, DropReason> {
        if let Some(flows) = Self::of(cookie) {
            return Ok(flows);
        }
        // The value is passed by reference, since it is too large for the stack. If another thread has inserted an
        // entry concurrently, that entry is kept.
        let empty = &EMPTY;
        let _ = UDP_FLOWS.insert(cookie, empty, u64::from(BPF_NOEXIST));
        Self::of(cookie).ok_or(DropReason::UdpFlowsFull)
    }

    /// Returns the backend that the socket has for a destination, and records a request at `now` (nanoseconds).
    #[inline(always)]
    pub(crate) fn ask(&self, to: Destination, now: u64) -> Option<Choice> {
        let locked = self.lock();
        let mut found = None;
        for flow in locked.flows() {
            // SAFETY: the pointer is to a destination of a value of the map, and `locked` holds its lock.
            if unsafe { is_to(flow, to) } {
                // SAFETY: the pointer is to a destination of a value of the map, and `locked` holds its lock.
                found = Some(unsafe {
                    note_question(flow, now);
                    choice(flow)
                });
                break;
            }
        }
        found
    }

    /// Stores a backend for a destination of the socket. `old` is the destination's backend that is no longer usable,
    /// if it had one. If the socket has no free destination, the one with the oldest request is evicted.
    #[inline(always)]
    pub(crate) fn claim(
        &self,
        to: Destination,
        old: Option<Choice>,
        new: Choice,
        service: u32,
        netns: u64,
        now: u64,
    ) -> Claimed {
        let locked = self.lock();
        let mut place = self.first();
        let mut oldest = u64::MAX;
        let mut known = false;
        for flow in locked.flows() {
            // SAFETY: the pointer is to a destination of a value of the map, and `locked` holds its lock.
            let (mine, asked) = unsafe { (is_to(flow, to), read_once!((*flow).asked)) };
            if mine {
                place = flow;
                known = true;
                break;
            }
            if asked < oldest {
                oldest = asked;
                place = flow;
            }
        }
        // SAFETY: the pointer is to a destination of a value of the map, and `locked` holds its lock.
        unsafe {
            if known {
                let there = choice(place);
                if old.is_none_or(|old| old.id != there.id) {
                    return Claimed {
                        choice: there,
                        replaced: false,
                    };
                }
            }
            let replaced = !known && read_once!((*place).vip_port) != 0;
            volatile::store_addr(&raw mut (*place).vip, to.addr);
            volatile::store_addr(&raw mut (*place).backend_addr, new.addr);
            write_once!((*place).vip_port, to.port);
            write_once!((*place).backend_port, new.port);
            volatile::store_ref(&raw mut (*place).backend, new.id);
            write_once!((*place).service, service);
            write_once!((*place).asked, now);
            write_once!((*place).unanswered, 1);
            write_once!((*self.0).netns, netns);
            Claimed { choice: new, replaced }
        }
    }

    /// Returns the destination of the request that a datagram from `source` replies to, and records the reply at `now`.
    #[inline(always)]
    pub(crate) fn answer(&self, source: Destination, now: u64) -> Option<(Ip128, u16)> {
        let locked = self.lock();
        let mut best: Option<*mut UdpDest> = None;
        let mut best_claim = 0;
        for flow in locked.flows() {
            // SAFETY: the pointer is to a destination of a value of the map, and `locked` holds its lock.
            unsafe {
                let port = read_once!((*flow).backend_port);
                if port == source.port && volatile::load_addr(&raw const (*flow).backend_addr).same(source.addr) {
                    let asked = read_once!((*flow).asked);
                    let unanswered = read_once!((*flow).unanswered);
                    let claim = udp_dest::claim(asked, unanswered, now);
                    if claim >= best_claim {
                        best_claim = claim;
                        best = Some(flow);
                    }
                }
            }
        }
        let flow = best?;
        // SAFETY: the pointer is to a destination of a value of the map, and `locked` holds its lock.
        unsafe {
            let unanswered = read_once!((*flow).unanswered);
            write_once!((*flow).unanswered, unanswered.saturating_sub(1));
            if unanswered > 1 {
                // More replies are expected. With the later time, the requests to other destinations come first.
                write_once!((*flow).asked, now);
            }
            Some((
                volatile::load_addr(&raw const (*flow).vip),
                read_once!((*flow).vip_port),
            ))
        }
    }

    #[inline(always)]
    fn first(&self) -> *mut UdpDest {
        // SAFETY: the pointer is to a value of the map; only the address of a field is computed.
        unsafe { (&raw mut (*self.0).dests).cast::<UdpDest>() }
    }

    #[inline(always)]
    fn lock(&self) -> Locked<'_> {
        // SAFETY: the pointer is to a value of the map, and the lock is at its beginning.
        unsafe { bpf_spin_lock((&raw mut (*self.0).lock).cast::<RawLock>()) };
        Locked(self)
    }
}

impl Locked<'_> {
    #[inline(always)]
    fn flows(&self) -> impl Iterator<Item = *mut UdpDest> + use<> {
        let first = self.0.first();
        // SAFETY: the index is less than `DESTS_PER_SOCKET`, the number of destinations in the value.
        (0..DESTS_PER_SOCKET).map(move |i| unsafe { first.add(i) })
    }
}

impl Drop for Locked<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        let at = self.0.0;
        // SAFETY: the pointer is to a value of the map, and `UdpDests::lock` has taken its lock.
        unsafe { bpf_spin_unlock((&raw mut (*at).lock).cast::<RawLock>()) };
    }
}

/// Returns whether an entry is for a destination.
///
/// # Safety
/// `at` must point to a destination of a locked value.
#[inline(always)]
unsafe fn is_to(at: *const UdpDest, to: Destination) -> bool {
    // SAFETY: the caller guarantees that `at` points to a destination of a locked value.
    unsafe { read_once!((*at).vip_port) == to.port && volatile::load_addr(&raw const (*at).vip).same(to.addr) }
}

/// Returns the backend of a destination.
///
/// # Safety
/// `at` must point to a destination of a locked value.
#[inline(always)]
unsafe fn choice(at: *const UdpDest) -> Choice {
    // SAFETY: the caller guarantees that `at` points to a destination of a locked value.
    unsafe {
        Choice {
            addr: volatile::load_addr(&raw const (*at).backend_addr),
            port: read_once!((*at).backend_port),
            id: volatile::load_ref(&raw const (*at).backend),
            // The entry does not contain the flags, and the socket hooks do not use them.
            flags: 0,
        }
    }
}

/// Records a request to a destination.
///
/// # Safety
/// `at` must point to a destination of a locked value.
#[inline(always)]
unsafe fn note_question(at: *mut UdpDest, now: u64) {
    // SAFETY: the caller guarantees that `at` points to a destination of a locked value.
    unsafe {
        let before = read_once!((*at).asked);
        let unanswered = read_once!((*at).unanswered);
        if unanswered == 0 || now.saturating_sub(before) >= udp_dest::PATIENCE {
            write_once!((*at).asked, now);
        }
        write_once!((*at).unanswered, udp_dest::asked(unanswered, before, now));
    }
}

/// Deletes the UDP destinations of a socket, by its cookie.
#[inline(always)]
pub(crate) fn forget(cookie: u64) {
    let _ = UDP_FLOWS.remove(cookie);
}

const _: () = assert!(size_of::<Lock>() == size_of::<RawLock>());
