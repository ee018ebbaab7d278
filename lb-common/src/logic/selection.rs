//! Selection for a connecting socket or for the first packet of a flow: the set, one of its slots, and a SNAT port.

use crate::abi::{DropReason, Frontend, FrontendKind, Service, Set, SetWord, set_flags};
use crate::mix::mix;

/// Returns the set for a socket of this node's host or pods. Such a client is inside the cluster, so external addresses
/// have the semantics of policy Cluster for it.
///
/// # Errors
/// Returns [`DropReason::NoSuchPort`] for an address mark, and [`DropReason::BadKind`] for a number that is not a kind.
#[inline(always)]
pub const fn set_for_socket(frontend: Frontend) -> Result<Set, DropReason> {
    match FrontendKind::from_u8(frontend.kind) {
        Some(FrontendKind::ClusterIp) => Ok(Set::Internal),
        Some(FrontendKind::NodePort | FrontendKind::ExternalIp | FrontendKind::LoadBalancer) => Ok(Set::Cluster),
        Some(FrontendKind::Address | FrontendKind::ExternalAddress) => Err(DropReason::NoSuchPort),
        None => Err(DropReason::BadKind),
    }
}

/// Returns the set for a packet. For a source inside the cluster, external addresses have the semantics of policy
/// Cluster.
///
/// # Errors
/// Returns the errors of [`set_for_socket`].
#[inline(always)]
pub const fn set_for_packet(frontend: Frontend, inside: bool) -> Result<Set, DropReason> {
    match set_for_socket(frontend) {
        Ok(Set::Cluster) if !inside => Ok(Set::External),
        result @ (Ok(Set::Internal | Set::External | Set::Cluster) | Err(_)) => result,
    }
}

/// Returns [`Frontend::set`] of a frontend that leads to a service: the word of the set for sockets. It is zero if programs have to
/// read the entry of SERVICES, for the reason of an empty set, affinity or source ranges.
#[must_use]
pub const fn set_in_frontend(frontend: Frontend, service: &Service) -> SetWord {
    match set_for_socket(frontend) {
        Ok(set) if service.flags == 0 && service.set_word(set).len != 0 => service.set_word(set),
        Ok(Set::Internal | Set::External | Set::Cluster) | Err(_) => SetWord::NONE,
    }
}

/// Returns the slot of a new connection: one of the set, selected by a random number.
///
/// # Errors
/// Returns [`DropReason::NoLocalEndpoint`] if the set is empty and its flags contain `EMPTY_DROPS`, and
/// [`DropReason::NoEndpoint`] if it is empty without that flag.
#[inline(always)]
pub const fn slot(set: SetWord, random: u32) -> Result<u32, DropReason> {
    if set.len == 0 {
        return Err(if set.flags & set_flags::EMPTY_DROPS != 0 {
            DropReason::NoLocalEndpoint
        } else {
            DropReason::NoEndpoint
        });
    }
    Ok(set.base.wrapping_add(pick(random, set.len)))
}

/// Returns a number that selects the slot for a socket, from its cookie and a time in nanoseconds, in place of a random one: the kernel's
/// generator is a call. Cookies are numbered, and the time differs when a socket tries again. A process can predict the
/// number for its own sockets, and so choose among the backends, as it can by trying again.
#[inline(always)]
#[must_use]
pub const fn number_of_socket(cookie: u64, time: u64) -> u32 {
    (mix(cookie ^ time.rotate_left(32)) >> 32) as u32
}

/// Maps a random 32-bit number evenly to `0..len`. Returns zero if `len` is zero.
///
/// The function multiplies instead of using `%`: the verifier keeps the bound, and a multiplication costs less than a
/// division. The result is biased by at most `len / 2^32` (Lemire, "Fast Random Integer Generation in an Interval",
/// 2019).
#[inline(always)]
#[must_use]
pub const fn pick(random: u32, len: u16) -> u32 {
    ((random as u64 * len as u64) >> 32) as u32
}

/// Maps a random 32-bit number evenly to the ports `first..=last`. Returns `None` if the range is empty.
#[inline(always)]
#[must_use]
pub const fn port(first: u16, last: u16, random: u32) -> Option<u16> {
    if first == 0 || last < first {
        return None;
    }
    let count = last as u64 - first as u64 + 1;
    Some(first + ((random as u64 * count) >> 32) as u16)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::abi::{ServiceIndex, service_flags};
    use crate::errno::{ECONNREFUSED, EHOSTUNREACH};

    const SERVICE: ServiceIndex = ServiceIndex::new(1);

    #[test]
    fn cluster_ips_have_the_internal_set_and_all_else_the_cluster_set() {
        let set = |kind| set_for_socket(Frontend::new(SERVICE, kind));
        assert_eq!(set(FrontendKind::ClusterIp), Ok(Set::Internal));
        for kind in [
            FrontendKind::NodePort,
            FrontendKind::ExternalIp,
            FrontendKind::LoadBalancer,
        ] {
            assert_eq!(set(kind), Ok(Set::Cluster));
        }
        for mark in [FrontendKind::Address, FrontendKind::ExternalAddress] {
            assert_eq!(set(mark), Err(DropReason::NoSuchPort));
        }
        let mut unknown = Frontend::new(SERVICE, FrontendKind::ClusterIp);
        for kind in [0, 7, 255] {
            unknown.kind = kind;
            assert_eq!(set_for_socket(unknown), Err(DropReason::BadKind));
        }
    }

    #[test]
    fn a_frontend_has_the_set_that_needs_nothing_else_of_its_service() {
        let word = |base, len| SetWord {
            base,
            len,
            ..SetWord::NONE
        };
        let service = Service {
            internal: word(1, 2),
            external: word(3, 1),
            cluster: word(4, 3),
            ..Service::default()
        };
        let set = |kind, service: &Service| set_in_frontend(Frontend::new(SERVICE, kind), service);
        assert_eq!(set(FrontendKind::ClusterIp, &service), service.internal);
        assert_eq!(set(FrontendKind::NodePort, &service), service.cluster);
        assert_eq!(set(FrontendKind::LoadBalancer, &service), service.cluster);
        assert_eq!(set(FrontendKind::Address, &service), SetWord::NONE);
        for flags in [service_flags::AFFINITY, service_flags::SOURCE_RANGES, 1 << 31] {
            let service = Service { flags, ..service };
            assert_eq!(set(FrontendKind::ClusterIp, &service), SetWord::NONE);
        }
        let empty = SetWord {
            flags: set_flags::EMPTY_DROPS,
            ..word(7, 0)
        };
        let service = Service {
            internal: empty,
            ..service
        };
        assert_eq!(set(FrontendKind::ClusterIp, &service), SetWord::NONE);
    }

    #[test]
    fn the_policy_is_for_packets_from_outside() {
        let set = |kind, inside| set_for_packet(Frontend::new(SERVICE, kind), inside);
        for inside in [true, false] {
            assert_eq!(set(FrontendKind::ClusterIp, inside), Ok(Set::Internal));
            for mark in [FrontendKind::Address, FrontendKind::ExternalAddress] {
                assert_eq!(set(mark, inside), Err(DropReason::NoSuchPort));
            }
            let mut unknown = Frontend::new(SERVICE, FrontendKind::ClusterIp);
            for kind in [0, 7, 255] {
                unknown.kind = kind;
                assert_eq!(set_for_packet(unknown, inside), Err(DropReason::BadKind));
            }
        }
        for kind in [
            FrontendKind::NodePort,
            FrontendKind::ExternalIp,
            FrontendKind::LoadBalancer,
        ] {
            assert_eq!(set(kind, true), Ok(Set::Cluster));
            assert_eq!(set(kind, false), Ok(Set::External));
        }
    }

    #[test]
    fn sockets_are_spread_evenly_whatever_the_distance_of_their_cookies() {
        const SOCKETS: u64 = 10_000;
        for distance in [1, 2, 3, 4, 8, 16, 64, 256, 1000, 4096, 1 << 20, 1 << 32] {
            for len in [2, 3, 5, 10] {
                let mut counts = [0_u64; 10];
                for socket in 0..SOCKETS {
                    let number = number_of_socket(77 + socket * distance, 5_000_000);
                    counts[pick(number, len) as usize] += 1;
                }
                let mean = SOCKETS as f64 / f64::from(len);
                let counts = &counts[..len.into()];
                let chi_squared: f64 = counts.iter().map(|n| (*n as f64 - mean).powi(2) / mean).sum();
                // With 9 degrees of freedom, random numbers exceed this once in 10,000 times.
                assert!(chi_squared < 33.7, "{distance} {len}: {counts:?}");
            }
        }
    }

    #[test]
    fn a_socket_that_tries_again_gets_another_backend_sometimes() {
        let tries = (0..100).map(|tick| pick(number_of_socket(9, tick * 4_000_000), 2));
        let second = tries.filter(|slot| *slot == 1).count();
        assert!((30..=70).contains(&second), "{second}");
    }

    #[test]
    fn an_empty_set_says_why() {
        let empty = SetWord {
            base: 7,
            len: 0,
            flags: 0,
        };
        assert_eq!(slot(empty, 9), Err(DropReason::NoEndpoint));
        let drops = SetWord {
            flags: set_flags::EMPTY_DROPS,
            ..empty
        };
        assert_eq!(slot(drops, 9), Err(DropReason::NoLocalEndpoint));
        assert_eq!(DropReason::NoEndpoint.errno(), ECONNREFUSED);
        assert_eq!(DropReason::NoLocalEndpoint.errno(), EHOSTUNREACH);
    }

    #[test]
    fn slots_stay_in_the_range() {
        let set = SetWord {
            base: 100,
            len: 3,
            flags: 0,
        };
        assert_eq!(slot(set, 0), Ok(100));
        assert_eq!(slot(set, u32::MAX), Ok(102));
    }

    proptest! {
        #[test]
        fn stays_in_bounds(random: u32, len in 1..=u16::MAX) {
            prop_assert!(pick(random, len) < u32::from(len));
        }
    }

    #[test]
    fn every_member_has_the_same_share() {
        for len in [1_u16, 2, 3, 7, 10] {
            let mut counts = [0_u32; 10];
            for i in 0..100_000_u32 {
                counts[pick(i * (u32::MAX / 100_000), len) as usize] += 1;
            }
            for count in &counts[..len as usize] {
                assert!(
                    count.abs_diff(100_000 / u32::from(len)) <= 1 + u32::from(len),
                    "{len}: {counts:?}"
                );
            }
        }
    }
}
