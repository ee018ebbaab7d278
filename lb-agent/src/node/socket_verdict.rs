//! Decides which sockets are destroyed and which records are obsolete, from a record and a listing of the
//! sockets of its network namespace.

use std::collections::BTreeSet;

use lb_common::abi::SocketRecord;

use super::sockdiag::{Socket, Sockets};

/// How long connect() may take from the record of a choice to the socket's having that destination, in nanoseconds.
pub(crate) const CONNECTING: u64 = 1_000_000_000;

/// The action for a record of a removed backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The socket is connected to the backend that was removed.
    Destroy(Socket),
    /// The socket is connected elsewhere, or no longer connected: the record is deleted.
    Forget,
    /// The listing lacks the socket. A listing arrives in parts, and a socket that ends between two of them may hide
    /// another: only a socket that two listings lack is gone.
    Missing,
    /// The connect() that wrote the record may still be in progress.
    Wait,
}

/// Decides about a record of a removed backend, by a listing that began at `begun` (nanoseconds of CLOCK_MONOTONIC).
///
/// A socket is destroyed only if cookie and destination are those of the record, and only if it is connected: a socket
/// that has since connected elsewhere, or disconnected, has nothing to do with the removed backend.
pub(super) fn of_removed(record: &SocketRecord, listing: &Sockets, begun: u64) -> Verdict {
    let backend = record.backend_addr.socket(record.backend_port);
    let is_backends = |socket: &Socket| socket.protocol as u8 == record.proto && socket.is_connected_to(backend);
    match listing.get(&record.socket) {
        Some(socket) if is_backends(socket) => Verdict::Destroy(*socket),
        _ if begun.saturating_sub(record.time) < CONNECTING => Verdict::Wait,
        Some(_) => Verdict::Forget,
        None => Verdict::Missing,
    }
}

/// An entry as of its last write. An entry that was written again is another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum EntryVersion {
    /// A record of a connected socket.
    Record {
        /// Key of the record.
        key: u64,
        /// Time of the connect().
        time: u64,
    },
    /// An unconnected socket's destinations.
    UdpDests {
        /// Cookie of the socket.
        cookie: u64,
        /// Time of its last datagram.
        time: u64,
    },
}

/// Entries without a socket in the last listing.
#[derive(Debug, Default)]
pub(super) struct Suspects(BTreeSet<EntryVersion>);

impl Suspects {
    /// Records the entries without a socket; returns those that had none the last time either.
    pub(super) fn without_socket(&mut self, now: BTreeSet<EntryVersion>) -> BTreeSet<EntryVersion> {
        let twice = now.intersection(&self.0).copied().collect();
        self.0 = now;
        twice
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::sockdiag::Protocol;
    use lb_common::abi::Addr;

    const ESTABLISHED: u8 = 1;
    const CLOSED: u8 = 7;
    const LISTEN: u8 = 10;
    const LATE: u64 = 5 * CONNECTING;

    fn record(proto: u8) -> SocketRecord {
        SocketRecord {
            cookie: 7,
            socket: 7,
            proto,
            time: LATE - CONNECTING,
            backend_addr: Addr::from_v4([10, 10, 1, 2]),
            backend_port: 53,
            ..SocketRecord::default()
        }
    }

    fn socket(protocol: Protocol, state: u8, remote: &str) -> Socket {
        Socket {
            cookie: 7,
            protocol,
            family: 2,
            state,
            local: "10.10.1.9:4000".parse().unwrap(),
            remote: remote.parse().unwrap(),
            interface: 0,
        }
    }

    fn verdict(record: &SocketRecord, socket: Option<Socket>, begun: u64) -> Verdict {
        let listing = socket.into_iter().map(|socket| (socket.cookie, socket)).collect();
        of_removed(record, &listing, begun)
    }

    #[test]
    fn only_sockets_that_are_connected_to_the_backend_are_destroyed() {
        use Protocol::{Tcp, Udp};
        // Protocol of the record, socket, whether it is destroyed.
        let cases = [
            (17, socket(Udp, ESTABLISHED, "10.10.1.2:53"), true),
            (17, socket(Udp, ESTABLISHED, "[::ffff:10.10.1.2]:53"), true),
            (17, socket(Udp, ESTABLISHED, "10.10.1.2:54"), false),
            (17, socket(Udp, ESTABLISHED, "10.10.1.3:53"), false),
            (17, socket(Udp, CLOSED, "0.0.0.0:0"), false),
            (17, socket(Udp, CLOSED, "10.10.1.2:53"), false),
            (17, socket(Tcp, ESTABLISHED, "10.10.1.2:53"), false),
            (6, socket(Tcp, ESTABLISHED, "10.10.1.2:53"), true),
            (6, socket(Tcp, 2, "10.10.1.2:53"), true),
            (6, socket(Tcp, LISTEN, "10.10.1.2:53"), false),
            (6, socket(Tcp, CLOSED, "10.10.1.2:53"), false),
        ];
        for (proto, socket, destroyed) in cases {
            let expected = if destroyed {
                Verdict::Destroy(socket)
            } else {
                Verdict::Forget
            };
            assert_eq!(
                verdict(&record(proto), Some(socket), LATE),
                expected,
                "{proto} {socket:?}"
            );
        }
    }

    #[test]
    fn a_socket_with_another_cookie_is_left_alone() {
        let other = Socket {
            cookie: 8,
            ..socket(Protocol::Udp, ESTABLISHED, "10.10.1.2:53")
        };
        assert_eq!(verdict(&record(17), Some(other), LATE), Verdict::Missing);
    }

    #[test]
    fn the_subflow_of_an_mptcp_socket_is_what_is_destroyed() {
        let record = SocketRecord {
            cookie: 0xffff_8880_0000_1000,
            ..record(6)
        };
        let subflow = socket(Protocol::Tcp, ESTABLISHED, "10.10.1.2:53");
        assert_eq!(verdict(&record, Some(subflow), LATE), Verdict::Destroy(subflow));
    }

    #[test]
    fn a_connect_that_may_still_run_is_waited_for() {
        let record = record(17);
        let unconnected = socket(Protocol::Udp, CLOSED, "0.0.0.0:0");
        assert_eq!(verdict(&record, Some(unconnected), LATE - 1), Verdict::Wait);
        assert_eq!(verdict(&record, None, LATE - 1), Verdict::Wait);
        assert_eq!(verdict(&record, None, record.time - 1), Verdict::Wait);
        let connected = socket(Protocol::Udp, ESTABLISHED, "10.10.1.2:53");
        assert_eq!(
            verdict(&record, Some(connected), record.time),
            Verdict::Destroy(connected)
        );
    }

    #[test]
    fn what_two_listings_in_a_row_lack_is_forgotten() {
        let old = EntryVersion::Record { key: 1, time: 5 };
        let dests = EntryVersion::UdpDests { cookie: 1, time: 5 };
        let rewritten = EntryVersion::Record { key: 1, time: 6 };
        let mut suspects = Suspects::default();
        let set = |versions: &[EntryVersion]| versions.iter().copied().collect::<BTreeSet<_>>();
        assert_eq!(suspects.without_socket(set(&[old])), set(&[]));
        assert_eq!(suspects.without_socket(set(&[rewritten, dests])), set(&[]));
        assert_eq!(suspects.without_socket(set(&[rewritten])), set(&[rewritten]));
        assert_eq!(suspects.without_socket(set(&[])), set(&[]));
        assert_eq!(suspects.without_socket(set(&[rewritten])), set(&[]));
    }
}
