//! Reasons why a connection or packet was not translated.

use crate::errno::{self, Errno};

/// Treatment of a packet that is not translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RejectWith {
    /// The packet continues unchanged.
    Pass,
    /// The packet is dropped without a reply.
    Drop,
    /// The packet is dropped and refused by a TCP RST, or by ICMP port unreachable.
    Refused,
    /// The packet is dropped and answered with ICMP fragmentation needed, or ICMPv6 packet too big.
    TooBig,
    /// The packet is dropped and answered with ICMP time exceeded.
    TimeExceeded,
}

/// Defines the reasons. Each row has the number, the metric label, the error of a system call, the fate of a packet, and
/// the text for people.
///
/// A reason that is only counted, such as `EventLost`, or that only sockets or only packets have, has `ECONNREFUSED` or `Drop` in
/// the column that is not used.
macro_rules! drop_reasons {
    ($(
        $(#[$doc:meta])*
        $name:ident = $number:literal, $label:literal, socket: $errno:ident, packet: $reject:ident, $text:literal;
    )*) => {
        /// Reason why a connection or packet was refused, dropped, passed on untranslated, or served with a
        /// restriction.
        ///
        /// The number is the index into DROPS. New reasons are added at the end only.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u32)]
        pub enum DropReason {
            $($(#[$doc])* $name = $number,)*
        }

        impl DropReason {
            /// All reasons, in the order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// Number of entries of DROPS. It has room for reasons of later builds, since another length needs a new layout.
            pub const CAPACITY: u32 = if cfg!(feature = "made-up-layout") { 80 } else { 64 };

            /// Returns the label in the metric `lb_drops_total`.
            #[must_use]
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label,)* }
            }

            /// Returns the description for people.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// Returns the error of a system call that fails for this reason.
            ///
            /// REJECT is ECONNREFUSED. DROP is EHOSTUNREACH: a socket gets an error at once instead of a timeout.
            #[inline(always)]
            #[must_use]
            pub const fn errno(self) -> Errno {
                match self { $(Self::$name => errno::$errno,)* }
            }

            /// Returns what happens to a packet that is not translated for this reason.
            #[inline(always)]
            #[must_use]
            pub const fn reject_with(self) -> RejectWith {
                match self { $(Self::$name => RejectWith::$reject,)* }
            }

            /// Returns the reason with a number, if there is one.
            #[must_use]
            pub const fn from_u32(number: u32) -> Option<Self> {
                match number { $($number => Some(Self::$name),)* _ => None }
            }
        }
    };
}

drop_reasons! {
    /// The Service has no usable endpoint: REJECT.
    NoEndpoint = 0, "no_endpoint", socket: ECONNREFUSED, packet: Refused, "the service has no usable endpoint";
    /// The traffic policy is Local and no endpoint is on this node: DROP.
    NoLocalEndpoint = 1, "no_local_endpoint", socket: EHOSTUNREACH, packet: Drop,
        "the traffic policy is Local and no endpoint is on this node";
    /// The address belongs to a Service that does not have the port: REJECT.
    NoSuchPort = 2, "no_such_port", socket: ECONNREFUSED, packet: Refused, "the service address has no such port";
    /// A frontend refers to a service index beyond the end of SERVICES: the maps are corrupt.
    BadServiceIndex = 3, "bad_service_index", socket: ECONNREFUSED, packet: Drop,
        "a frontend names a service index out of range";
    /// A set refers to a slot beyond the end of BACKEND_SLOTS: the maps are corrupt.
    BadSlot = 4, "bad_slot", socket: ECONNREFUSED, packet: Drop, "a backend set names a slot out of range";
    /// The address family of a backend is not the socket's: the maps are corrupt.
    BadFamily = 5, "bad_family", socket: ECONNREFUSED, packet: Drop,
        "a backend's address is not of the frontend's family";
    /// The kind of a frontend is unknown to this build: the maps are corrupt.
    BadKind = 6, "bad_kind", socket: ECONNREFUSED, packet: Drop, "a frontend is of an unknown kind";
    /// SOCKETS and SOCKETS_MORE are full: the connection was made without a record.
    SocketsFull = 7, "sockets_full", socket: ECONNREFUSED, packet: Drop,
        "no room for a socket record (connected without one)";
    /// The ring buffer was full: a trace event is missing.
    EventLost = 8, "event_lost", socket: ECONNREFUSED, packet: Drop, "an event was lost (ring buffer full)";
    /// SOCKETS and SOCKETS_MORE are full: a UDP `connect()` failed with ENOMEM, since without a record its replies would
    /// come from the wrong address.
    UdpSocketsFull = 9, "udp_sockets_full", socket: ENOMEM, packet: Drop,
        "no room for the record of a connected UDP socket";
    /// UDP_FLOWS is full: a UDP send failed with ENOMEM.
    UdpFlowsFull = 10, "udp_flows_full", socket: ENOMEM, packet: Drop,
        "no room for the flows of an unconnected UDP socket";
    /// An unconnected UDP socket sent to more services than are remembered: the least recently used one was replaced.
    UdpFlowReplaced = 11, "udp_flow_replaced", socket: ECONNREFUSED, packet: Drop,
        "an unconnected UDP socket uses more services than are remembered";
    /// `bind()` to a node port in the node's network namespace: EADDRINUSE.
    NodePortTaken = 12, "node_port_taken", socket: EADDRINUSE, packet: Drop, "the port is the node port of a service";
    /// CT is full: the packet that would have established a flow was dropped.
    ConntrackFull = 13, "conntrack_full", socket: ECONNREFUSED, packet: Drop, "no room for another established flow";
    /// No SNAT port is free for another flow to the backend: dropped.
    SnatPortsExhausted = 14, "snat_ports_exhausted", socket: ECONNREFUSED, packet: Drop,
        "no source port is free for another flow to the backend";
    /// The client is in none of the `loadBalancerSourceRanges`: DROP.
    SourceNotAllowed = 15, "source_not_allowed", socket: ECONNREFUSED, packet: Drop,
        "the client is in none of the load-balancer source ranges";
    /// There is no route to the backend or to the client: dropped.
    NoRoute = 16, "no_route", socket: ECONNREFUSED, packet: Drop, "no route to the packet's destination";
    /// The device that leads to the backend has no address of the family: dropped.
    NoSourceAddress = 17, "no_source_address", socket: ECONNREFUSED, packet: Drop,
        "the device to the backend has no address of that family";
    /// The packet is larger than the path MTU to the backend: dropped, and the sender gets an ICMP error.
    TooBig = 18, "too_big", socket: ECONNREFUSED, packet: TooBig,
        "the packet is longer than the path allows (an ICMP error was sent)";
    /// The time to live of the packet has expired: dropped, and the sender gets an ICMP error.
    TtlExceeded = 19, "ttl_exceeded", socket: ECONNREFUSED, packet: TimeExceeded,
        "the time to live is over (an ICMP error was sent)";
    /// The backend of a TCP flow is no longer in any EndpointSlice: reset.
    BackendGone = 20, "backend_gone", socket: ECONNREFUSED, packet: Refused, "the backend of the flow is gone";
    /// A packet to a service address was about to leave the node untranslated: dropped.
    Untranslated = 21, "untranslated", socket: ECONNREFUSED, packet: Drop,
        "a packet to a service address was about to leave";
    /// A helper of the kernel failed while the packet was rewritten: dropped.
    RewriteFailed = 22, "rewrite_failed", socket: ECONNREFUSED, packet: Drop, "the packet could not be changed";
    /// Headers are truncated or inconsistent: passed on untouched.
    Malformed = 23, "malformed", socket: ECONNREFUSED, packet: Pass, "the headers make no sense (passed on)";
    /// A fragment: passed on untouched.
    Fragment = 24, "fragment", socket: ECONNREFUSED, packet: Pass, "a fragment (passed on)";
    /// IPv4 options or IPv6 extension headers: passed on untouched.
    HeaderOptions = 25, "header_options", socket: ECONNREFUSED, packet: Pass,
        "IP options or extension headers (passed on)";
    /// A protocol that lb does not translate in packets: passed on untouched.
    OtherProtocol = 26, "other_protocol", socket: ECONNREFUSED, packet: Pass,
        "a protocol that is not translated in packets (passed on)";
    /// An ICMP error, which may quote a packet of a flow: passed on untouched.
    IcmpError = 27, "icmp_error", socket: ECONNREFUSED, packet: Pass, "an ICMP error (passed on)";
    /// A VLAN tag: passed on untouched. The device of that VLAN receives the packet without the tag.
    Vlan = 28, "vlan", socket: ECONNREFUSED, packet: Pass, "a packet with a VLAN tag (passed on)";
}

const _: () = {
    assert!(DropReason::ALL.len() <= DropReason::CAPACITY as usize);
    let mut i = 0;
    while i < DropReason::ALL.len() {
        assert!(DropReason::ALL[i] as usize == i);
        i += 1;
    }
};
