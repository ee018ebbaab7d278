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
}

const _: () = {
    let mut i = 0;
    while i < DropReason::ALL.len() {
        assert!(DropReason::ALL[i] as usize == i);
        i += 1;
    }
};
