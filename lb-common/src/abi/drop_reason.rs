//! Why the data plane did not do what was asked.

/// Defines the reasons once: discriminant, metric label and log text.
macro_rules! drop_reasons {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $label:literal, $text:literal;)*) => {
        /// Why a connection or packet was refused, dropped, or served without something.
        ///
        /// The discriminant is the index into DROPS. Reasons are only ever added, at the end.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u32)]
        pub enum DropReason {
            $($(#[$doc])* $name = $number,)*
        }

        impl DropReason {
            /// All reasons, in the order of their discriminants.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// Length of DROPS.
            pub const COUNT: u32 = Self::ALL.len() as u32;

            /// Label of the metric `lb_drops_total`.
            #[must_use]
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label,)* }
            }

            /// For people.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// The reason with a discriminant, if there is one.
            #[must_use]
            pub const fn from_u32(number: u32) -> Option<Self> {
                match number { $($number => Some(Self::$name),)* _ => None }
            }
        }
    };
}

drop_reasons! {
    /// The Service has no usable endpoint: REJECT.
    NoEndpoint = 0, "no_endpoint", "the service has no usable endpoint";
    /// The traffic policy is Local and no endpoint is on this node: DROP.
    NoLocalEndpoint = 1, "no_local_endpoint", "the traffic policy is Local and no endpoint is on this node";
    /// The address is a Service's, the port is not: REJECT.
    NoSuchPort = 2, "no_such_port", "the service address has no such port";
    /// A frontend names a service index that SERVICES does not have: the maps are broken.
    BadServiceIndex = 3, "bad_service_index", "a frontend names a service index out of range";
    /// A set names a slot that BACKEND_SLOTS does not have: the maps are broken.
    BadSlot = 4, "bad_slot", "a backend set names a slot out of range";
    /// A backend's address is not of the socket's family: the maps are broken.
    BadFamily = 5, "bad_family", "a backend's address is not of the frontend's family";
    /// A frontend's kind is unknown to this build: the maps are broken.
    BadKind = 6, "bad_kind", "a frontend is of an unknown kind";
    /// SOCKETS and SOCKETS_MORE are full: the connection was made without a record.
    SocketsFull = 7, "sockets_full", "no room for a socket record (connected without one)";
    /// The ring buffer was full: an event is missing.
    EventLost = 8, "event_lost", "an event was lost (ring buffer full)";
    /// SOCKETS and SOCKETS_MORE are full: a UDP `connect()` failed with ENOMEM, since without a record its answers would
    /// come from the wrong address.
    UdpSocketsFull = 9, "udp_sockets_full", "no room for the record of a connected UDP socket";
    /// UDP_FLOWS is full: a UDP send failed with ENOMEM.
    UdpFlowsFull = 10, "udp_flows_full", "no room for the flows of an unconnected UDP socket";
    /// An unconnected UDP socket sent to more services than are remembered: the least recently used was forgotten.
    UdpFlowReplaced = 11, "udp_flow_replaced", "an unconnected UDP socket uses more services than are remembered";
    /// `bind()` to a node port, in the node's network namespace: EADDRINUSE.
    NodePortTaken = 12, "node_port_taken", "the port is the node port of a service";
    /// CT is full: the packet that would have made a new flow one to be kept was dropped.
    ConntrackFull = 13, "conntrack_full", "no room for another established flow";
    /// No source port is free for another flow to the backend: dropped.
    SnatPortsExhausted = 14, "snat_ports_exhausted", "no source port is free for another flow to the backend";
    /// `loadBalancerSourceRanges` do not have the client: DROP.
    SourceNotAllowed = 15, "source_not_allowed", "the client is in none of the load-balancer source ranges";
    /// There is no route to the backend or to the client: dropped.
    NoRoute = 16, "no_route", "no route to where the packet has to go";
    /// The device that leads to the backend has no address that could be the source: dropped.
    NoSourceAddress = 17, "no_source_address", "the device to the backend has no address of that family";
    /// The packet is longer than the way to the backend is wide: the sender was told so.
    TooBig = 18, "too_big", "the packet is longer than the path allows (the sender was told)";
    /// The packet has been on its way for too long: the sender was told so.
    TtlExceeded = 19, "ttl_exceeded", "the time to live is over (the sender was told)";
    /// The backend of a TCP flow is in no slice any more: reset.
    BackendGone = 20, "backend_gone", "the backend of the flow is gone";
    /// A packet to a service address that nothing has translated, on its way out: dropped.
    Untranslated = 21, "untranslated", "a packet to a service address was about to leave";
    /// A helper of the kernel failed in the middle of a change: dropped.
    RewriteFailed = 22, "rewrite_failed", "the packet could not be changed";
    /// Headers are cut off or lie: passed on untouched.
    Malformed = 23, "malformed", "the headers make no sense (passed on)";
    /// A fragment: passed on untouched.
    Fragment = 24, "fragment", "a fragment (passed on)";
    /// IPv4 options or IPv6 extension headers: passed on untouched.
    HeaderOptions = 25, "header_options", "IP options or extension headers (passed on)";
    /// A protocol that packets are not translated for: passed on untouched.
    OtherProtocol = 26, "other_protocol", "a protocol that is not translated in packets (passed on)";
    /// An ICMP error, which may quote a packet of a flow: passed on untouched.
    IcmpError = 27, "icmp_error", "an ICMP error (passed on)";
    /// A VLAN tag: passed on untouched; the device of that VLAN will see the packet without.
    Vlan = 28, "vlan", "a packet with a VLAN tag (passed on)";
}

const _: () = {
    let mut i = 0;
    while i < DropReason::ALL.len() {
        assert!(DropReason::ALL[i] as usize == i);
        i += 1;
    }
};
