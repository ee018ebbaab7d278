//! UDP_FLOWS: the UDP destinations of unconnected sockets, up to four per socket.
//!
//! Several threads may use one socket, so a value is read and written under its lock. The verifier permits no calls
//! while a lock is held, so the code under the lock consists of loads and stores of words.

use core::mem::MaybeUninit;

use aya_ebpf::bindings::{BPF_NOEXIST, bpf_spin_lock as RawLock};
use aya_ebpf::helpers::generated::{bpf_spin_lock, bpf_spin_unlock};
use lb_common::abi::{
    self, Addr, BackendRef, DESTS_PER_SOCKET, DropReason, ServiceIndex, UdpDest, bpf_spin_lock as Lock, moving,
};
use lb_common::errno::EEXIST;
use lb_common::logic::frontend::Destination;
use lb_common::logic::ip128::Ip128;
use lb_common::logic::udp_dest;

use crate::backend::SelectedBackend;
use crate::maps::{UDP_FLOWS, UDP_FLOWS_OLD, inserts_into_new, is_moving};
use crate::volatile::{self, read_once, write_once};

/// An empty value, which programs insert by reference.
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
        service: ServiceIndex::NONE,
        asked: 0,
        unanswered: 0,
        pad: 0,
    }; DESTS_PER_SOCKET],
};

/// The UDP destinations of one socket: a value of UDP_FLOWS.
pub(crate) struct UdpDests(*mut abi::UdpDests);

/// The UDP destinations of one socket while their lock is held; dropping it releases the lock.
struct Locked<'a>(&'a UdpDests);

/// Result of [`UdpDests::store`].
pub(crate) struct Stored {
    /// Backend of the destination: the new one, or the one that another thread has stored concurrently.
    pub(crate) backend: SelectedBackend,
    /// Another destination of the socket was evicted to make room.
    pub(crate) evicted: bool,
}

impl UdpDests {
    /// Looks up the UDP destinations of a socket, by its cookie.
    #[inline(always)]
    pub(crate) fn find(cookie: u64) -> Option<Self> {
        if let Some(at) = UDP_FLOWS.get_ptr_mut(cookie) {
            return Some(Self(at));
        }
        Self::find_old(cookie)
    }

    /// Looks up the UDP destinations of a socket in the old map; `None` if the map is not being replaced.
    #[inline(always)]
    pub(crate) fn find_old(cookie: u64) -> Option<Self> {
        if is_moving(moving::UDP_FLOWS) {
            return UDP_FLOWS_OLD.get_ptr_mut(cookie).map(Self);
        }
        None
    }

    /// Returns the UDP destinations of a socket; inserts an empty entry if it has none.
    ///
    /// # Errors
    /// Returns [`DropReason::UdpFlowsFull`] if the map has no room.
    #[inline(always)]
    pub(crate) fn find_or_insert(cookie: u64) -> Result<Self, DropReason> {
        if let Some(dests) = Self::find(cookie) {
            return Ok(dests);
        }
        // The value is passed by reference, since it is too large for the stack. If another thread has inserted an
        // entry concurrently, that entry is kept.
        let empty = &EMPTY;
        let _ = if is_moving(moving::UDP_FLOWS) && !inserts_into_new() {
            UDP_FLOWS_OLD.insert(cookie, empty, u64::from(BPF_NOEXIST))
        } else {
            UDP_FLOWS.insert(cookie, empty, u64::from(BPF_NOEXIST))
        };
        Self::find(cookie).ok_or(DropReason::UdpFlowsFull)
    }

    /// Returns the backend that the socket has for a destination, and records a request at `now` (nanoseconds).
    #[inline(always)]
    pub(crate) fn request(&self, to: Destination, now: u64) -> Option<SelectedBackend> {
        let locked = self.lock();
        let mut found = None;
        for dest in locked.iter() {
            // SAFETY: the pointer is to a destination of a value of the map, and `locked` holds its lock.
            if unsafe { is_to(dest, to) } {
                // SAFETY: the pointer is to a destination of a value of the map, and `locked` holds its lock.
                found = Some(unsafe {
                    record_request(dest, now);
                    backend_of(dest)
                });
                break;
            }
        }
        found
    }

    /// Stores a backend for a destination of the socket. `old` is the destination's backend that is no longer usable,
    /// if it had one. If the socket has no free destination, the one with the oldest request is evicted.
    #[inline(always)]
    pub(crate) fn store(
        &self,
        to: Destination,
        old: Option<SelectedBackend>,
        new: SelectedBackend,
        service: ServiceIndex,
        netns: u64,
        now: u64,
    ) -> Stored {
        let locked = self.lock();
        let mut target = self.first();
        let mut oldest = u64::MAX;
        let mut known = false;
        for dest in locked.iter() {
            // SAFETY: the pointer is to a destination of a value of the map, and `locked` holds its lock.
            let (matches, asked) = unsafe { (is_to(dest, to), read_once!((*dest).asked)) };
            if matches {
                target = dest;
                known = true;
                break;
            }
            if asked < oldest {
                oldest = asked;
                target = dest;
            }
        }
        // SAFETY: the pointer is to a destination of a value of the map, and `locked` holds its lock.
        unsafe {
            if known {
                let current = backend_of(target);
                if old.is_none_or(|old| old.reference != current.reference) {
                    return Stored {
                        backend: current,
                        evicted: false,
                    };
                }
            }
            let evicted = !known && read_once!((*target).vip_port) != 0;
            volatile::store_addr(&raw mut (*target).vip, to.addr);
            volatile::store_addr(&raw mut (*target).backend_addr, new.addr);
            write_once!((*target).vip_port, to.port);
            write_once!((*target).backend_port, new.port);
            volatile::store_ref(&raw mut (*target).backend, new.reference);
            write_once!((*target).service, service);
            write_once!((*target).asked, now);
            write_once!((*target).unanswered, 1);
            write_once!((*self.0).netns, netns);
            Stored { backend: new, evicted }
        }
    }

    /// Returns the destination of the request that a datagram from `source` replies to, and records the reply at `now`.
    #[inline(always)]
    pub(crate) fn reply(&self, source: Destination, now: u64) -> Option<(Ip128, u16)> {
        let locked = self.lock();
        let mut best: Option<*mut UdpDest> = None;
        let mut best_priority = 0;
        for dest in locked.iter() {
            // SAFETY: the pointer is to a destination of a value of the map, and `locked` holds its lock.
            unsafe {
                let port = read_once!((*dest).backend_port);
                if port == source.port && volatile::load_addr(&raw const (*dest).backend_addr).same(source.addr) {
                    let asked = read_once!((*dest).asked);
                    let unanswered = read_once!((*dest).unanswered);
                    let priority = udp_dest::priority(asked, unanswered, now);
                    if priority >= best_priority {
                        best_priority = priority;
                        best = Some(dest);
                    }
                }
            }
        }
        let dest = best?;
        // SAFETY: the pointer is to a destination of a value of the map, and `locked` holds its lock.
        unsafe {
            let unanswered = read_once!((*dest).unanswered);
            write_once!((*dest).unanswered, unanswered.saturating_sub(1));
            if unanswered > 1 {
                // More replies are expected. With the later time, the requests to other destinations come first.
                write_once!((*dest).asked, now);
            }
            Some((
                volatile::load_addr(&raw const (*dest).vip),
                read_once!((*dest).vip_port),
            ))
        }
    }

    /// Returns the first of the destinations.
    #[inline(always)]
    fn first(&self) -> *mut UdpDest {
        // SAFETY: the pointer is to a value of the map; only the address of a field is computed.
        unsafe { (&raw mut (*self.0).dests).cast::<UdpDest>() }
    }

    /// Takes the lock of the value.
    #[inline(always)]
    fn lock(&self) -> Locked<'_> {
        // SAFETY: the pointer is to a value of the map, and the lock is at its beginning.
        unsafe { bpf_spin_lock((&raw mut (*self.0).lock).cast::<RawLock>()) };
        Locked(self)
    }
}

impl Locked<'_> {
    /// Returns pointers to all destinations, used and free.
    #[inline(always)]
    fn iter(&self) -> impl Iterator<Item = *mut UdpDest> + use<> {
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
unsafe fn backend_of(at: *const UdpDest) -> SelectedBackend {
    // SAFETY: the caller guarantees that `at` points to a destination of a locked value.
    unsafe {
        SelectedBackend {
            addr: volatile::load_addr(&raw const (*at).backend_addr),
            port: read_once!((*at).backend_port),
            reference: volatile::load_ref(&raw const (*at).backend),
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
unsafe fn record_request(at: *mut UdpDest, now: u64) {
    // SAFETY: the caller guarantees that `at` points to a destination of a locked value.
    unsafe {
        let before = read_once!((*at).asked);
        let unanswered = read_once!((*at).unanswered);
        if unanswered == 0 || now.saturating_sub(before) >= udp_dest::REPLY_TIMEOUT {
            write_once!((*at).asked, now);
        }
        write_once!(
            (*at).unanswered,
            udp_dest::unanswered_after_request(unanswered, before, now)
        );
    }
}

/// Deletes the UDP destinations of a socket, by its cookie.
#[inline(always)]
pub(crate) fn remove(cookie: u64) {
    if is_moving(moving::UDP_FLOWS) {
        let _ = UDP_FLOWS_OLD.remove(cookie);
    }
    let _ = UDP_FLOWS.remove(cookie);
}

/// Copies the destinations of a socket from the old map to the new one, if the new map does not have the socket. Returns
/// false if the new map is full.
#[inline(never)]
pub(crate) fn copy(cookie: u64) -> bool {
    let Some(from) = UDP_FLOWS_OLD.get_ptr_mut(cookie) else {
        return true;
    };
    let mut room = MaybeUninit::<abi::UdpDests>::uninit();
    let value = copy_locked(&UdpDests(from), &mut room);
    match UDP_FLOWS.insert(cookie, value, u64::from(BPF_NOEXIST)) {
        Ok(()) => {}
        Err(error) => return error == -EEXIST.number,
    }
    if UDP_FLOWS_OLD.get_ptr(cookie).is_none() {
        // The socket was closed meanwhile.
        let _ = UDP_FLOWS.remove(cookie);
    }
    true
}

/// Copies the destinations that programs stored in the old entry of a socket while [`copy`] ran, if the new entry has room
/// for them. To be run a grace period after it.
#[inline(never)]
pub(crate) fn copy_late(cookie: u64) -> bool {
    let (Some(from), Some(to)) = (UDP_FLOWS_OLD.get_ptr_mut(cookie), UDP_FLOWS.get_ptr_mut(cookie)) else {
        return true;
    };
    let mut room = MaybeUninit::<abi::UdpDests>::uninit();
    let value: *const abi::UdpDests = copy_locked(&UdpDests(from), &mut room);
    let new = UdpDests(to);
    for i in 0..DESTS_PER_SOCKET {
        // SAFETY: the index is less than the number of destinations in the value, which is a local variable.
        let late = unsafe { (&raw const (*value).dests).cast::<UdpDest>().add(i) };
        // SAFETY: the pointer is to an initialized destination.
        let (addr, port) = unsafe {
            (
                volatile::load_addr(&raw const (*late).vip),
                read_once!((*late).vip_port),
            )
        };
        if port != 0 {
            let locked = new.lock();
            store_late(&locked, late, addr, port);
        }
    }
    true
}

/// Stores a destination if the socket does not have it and has a free place.
#[inline(always)]
fn store_late(locked: &Locked<'_>, late: *const UdpDest, addr: Ip128, port: u16) {
    let mut free: Option<*mut UdpDest> = None;
    for dest in locked.iter() {
        // SAFETY: the pointer is to a destination of a value of the map, and `locked` holds its lock.
        let known = unsafe { read_once!((*dest).vip_port) };
        if known == 0 {
            free = Some(dest);
        } else if known == port
            // SAFETY: the pointer is to a destination of a value of the map, and `locked` holds its lock.
            && unsafe { volatile::load_addr(&raw const (*dest).vip) }.same(addr)
        {
            return;
        }
    }
    if let Some(free) = free {
        // SAFETY: the pointers are to a local variable and to a destination of a value of the map, and `locked` holds its lock.
        unsafe { volatile::copy(late, free) };
    }
}

/// Copies a value under its lock, without the lock itself.
#[inline(always)]
fn copy_locked<'a>(from: &UdpDests, room: &'a mut MaybeUninit<abi::UdpDests>) -> &'a abi::UdpDests {
    let to = room.as_mut_ptr();
    {
        let _locked = from.lock();
        // The first word has the lock, which programs may not read.
        for at in 1..size_of::<abi::UdpDests>() / 8 {
            // SAFETY: the index is less than the number of words of the value, and the lock of the value is held.
            unsafe {
                let word = from.0.cast::<u64>().add(at).read_volatile();
                to.cast::<u64>().add(at).write_volatile(word);
            }
        }
    }
    // SAFETY: the store is within the value, and all of its bytes are initialized afterwards.
    unsafe {
        to.cast::<u64>().write_volatile(0);
        room.assume_init_ref()
    }
}

const _: () = assert!(size_of::<Lock>() == size_of::<RawLock>());
