//! Which frontend a destination is: the order of the lookups, for the data plane and for `explain` alike.

use super::ip128::Ip128;
use crate::abi::{DropReason, Frontend, FrontendKind, service_flags};

/// A destination as the data plane computes with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Destination {
    /// Address.
    pub addr: Ip128,
    /// Port, host byte order.
    pub port: u16,
    /// IANA protocol number.
    pub proto: u8,
}

impl Destination {
    /// Under which the mark of a service address stands.
    #[inline(always)]
    const fn mark(addr: Ip128) -> Self {
        Self {
            addr,
            port: 0,
            proto: 0,
        }
    }

    /// Under which a node port stands, for every address that serves it.
    #[inline(always)]
    const fn node_port(self) -> Self {
        Self {
            addr: self.addr.unspecified(),
            ..self
        }
    }
}

/// What the decision looks at.
pub trait Tables {
    /// The entry of FRONTENDS with this key; port and protocol are zero for the mark of a service address.
    fn frontend(&self, key: Destination) -> Option<Frontend>;
    /// Whether NODE_ADDRS has the address.
    fn is_node_address(&self, addr: Ip128) -> bool;
    /// Whether the socket is in the node's network namespace.
    fn is_on_node(&self) -> bool;
}

/// The frontend that a socket's destination is; `None`: no business of lb's.
///
/// - The destination zero is loopback, as in the kernel's `ip_route_output_key` and `tcp_v6_connect`.
/// - On loopback there are node ports, for the node's own sockets only: a pod's loopback is its own.
/// - An address and port of a Service come first, then the ports that a service address does not have, then node ports
///   on this node's addresses.
///
/// # Errors
/// [`DropReason::NoSuchPort`] for a port that a service address does not have.
#[inline(always)]
pub fn frontend(tables: &impl Tables, to: Destination) -> Result<Option<Frontend>, DropReason> {
    let addr = to.addr.or_loopback();
    let to = Destination { addr, ..to };
    if addr.is_loopback() {
        return Ok(if tables.is_on_node() {
            tables.frontend(to.node_port())
        } else {
            None
        });
    }
    if let Some(found) = tables.frontend(to) {
        return Ok(Some(found));
    }
    if tables
        .frontend(Destination::mark(addr))
        .is_some_and(|mark| mark.kind == FrontendKind::Address as u8)
    {
        return Err(DropReason::NoSuchPort);
    }
    Ok(if tables.is_node_address(addr) {
        tables.frontend(to.node_port())
    } else {
        None
    })
}

/// The frontend that a packet's destination is; `None`: no business of lb's. Fragments, and protocols that packets are
/// not translated for, are not to be asked about.
///
/// An address and port of a Service come first, then the ports that a service address does not have (external and
/// load-balancer addresses too), then node ports on this node's addresses. Loopback is nobody's.
///
/// # Errors
/// [`DropReason::NoSuchPort`] for a port that a service address does not have.
#[inline(always)]
pub fn packet_frontend(tables: &impl Tables, to: Destination) -> Result<Option<Frontend>, DropReason> {
    // A node port stands under the zero address, which no packet may ask for.
    if to.addr.or_loopback().is_loopback() {
        return Ok(None);
    }
    if let Some(found) = tables.frontend(to) {
        return Ok(Some(found));
    }
    if is_service_address(tables, to.addr) {
        return Err(DropReason::NoSuchPort);
    }
    Ok(if tables.is_node_address(to.addr) {
        tables.frontend(to.node_port())
    } else {
        None
    })
}

/// Whether an address is a Service's, and no node's.
#[inline(always)]
pub fn is_service_address(tables: &impl Tables, addr: Ip128) -> bool {
    tables.frontend(Destination::mark(addr)).is_some()
}

/// Returns whether a frontend is for the clients in SOURCE_RANGES only: a load-balancer address of a service with these
/// flags. Socket hooks leave it to the packet path, which has the source address.
#[inline(always)]
#[must_use]
pub const fn has_source_ranges(frontend: Frontend, service_flags: u32) -> bool {
    frontend.kind == FrontendKind::LoadBalancer as u8 && service_flags & service_flags::SOURCE_RANGES != 0
}

/// Whether a bind to this address and port takes a node port of the node: `node_port` tells whether a family (by its
/// unspecified address) has it. To be asked in the node's namespace only.
///
/// A listener on all addresses of IPv6 takes the port of IPv4 as well; that it may have been told not to (IPV6_V6ONLY)
/// cannot be seen here.
#[inline(always)]
pub fn binds_node_port(tables: &impl Tables, to: Destination) -> bool {
    let has = |addr: Ip128| {
        let key = Destination { addr, ..to };
        tables
            .frontend(key)
            .is_some_and(|found| found.kind == FrontendKind::NodePort as u8)
    };
    let any = to.addr.unspecified();
    if to.addr.same(any) {
        has(any) || (!any.is_v4() && has(Ip128::from_v4(0)))
    } else {
        has(any) && (to.addr.is_loopback() || tables.is_node_address(to.addr))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::Addr;
    use core::net::IpAddr;

    struct Fake {
        on_node: bool,
    }

    const FRONTENDS: &[(&str, u16, u8, u32, FrontendKind)] = &[
        ("10.96.0.1", 80, 6, 1, FrontendKind::ClusterIp),
        ("10.96.0.1", 0, 0, 0, FrontendKind::Address),
        ("fd00:96::1", 80, 6, 2, FrontendKind::ClusterIp),
        ("0.0.0.0", 30001, 6, 3, FrontendKind::NodePort),
        ("::", 30002, 6, 4, FrontendKind::NodePort),
        ("192.0.2.1", 443, 6, 5, FrontendKind::LoadBalancer),
        ("192.0.2.1", 0, 0, 0, FrontendKind::ExternalAddress),
        ("192.168.0.1", 443, 6, 6, FrontendKind::LoadBalancer),
    ];
    const NODE: [&str; 2] = ["192.168.0.1", "fd00::1"];

    impl Tables for Fake {
        fn frontend(&self, key: Destination) -> Option<Frontend> {
            let mut found = FRONTENDS
                .iter()
                .filter(|(addr, port, proto, ..)| (words(addr), *port, *proto) == (key.addr, key.port, key.proto));
            found
                .next()
                .map(|(_, _, _, service, kind)| Frontend::new(*service, *kind))
        }

        fn is_node_address(&self, addr: Ip128) -> bool {
            NODE.iter().any(|node| words(node) == addr)
        }

        fn is_on_node(&self) -> bool {
            self.on_node
        }
    }

    fn words(addr: &str) -> Ip128 {
        Addr::from(addr.parse::<IpAddr>().unwrap()).into()
    }

    fn to(addr: &str, port: u16) -> Destination {
        Destination {
            addr: words(addr),
            port,
            proto: 6,
        }
    }

    fn fake(on_node: bool) -> Fake {
        Fake { on_node }
    }

    #[test]
    fn table_of_destinations() {
        // Destination, from the node, from a pod.
        let cases = [
            ("10.96.0.1", 80, Ok(Some(1)), Ok(Some(1))),
            (
                "10.96.0.1",
                81,
                Err(DropReason::NoSuchPort),
                Err(DropReason::NoSuchPort),
            ),
            ("fd00:96::1", 80, Ok(Some(2)), Ok(Some(2))),
            ("fd00:96::1", 81, Ok(None), Ok(None)),
            ("192.168.0.1", 30001, Ok(Some(3)), Ok(Some(3))),
            ("192.168.0.1", 30002, Ok(None), Ok(None)),
            ("192.168.0.2", 30001, Ok(None), Ok(None)),
            ("fd00::1", 30002, Ok(Some(4)), Ok(Some(4))),
            ("fd00::1", 30001, Ok(None), Ok(None)),
            ("127.0.0.1", 30001, Ok(Some(3)), Ok(None)),
            ("127.9.9.9", 30001, Ok(Some(3)), Ok(None)),
            ("0.0.0.0", 30001, Ok(Some(3)), Ok(None)),
            ("::1", 30002, Ok(Some(4)), Ok(None)),
            ("::", 30002, Ok(Some(4)), Ok(None)),
            ("192.0.2.1", 443, Ok(Some(5)), Ok(Some(5))),
            ("192.0.2.1", 80, Ok(None), Ok(None)),
        ];
        for (addr, port, node, pod) in cases {
            let found = |on_node| frontend(&fake(on_node), to(addr, port)).map(|found| found.map(|f| f.service));
            assert_eq!(found(true), node, "{addr}:{port} from the node");
            assert_eq!(found(false), pod, "{addr}:{port} from a pod");
        }
    }

    #[test]
    fn table_of_packets() {
        let cases = [
            ("10.96.0.1", 80, Ok(Some(1))),
            ("10.96.0.1", 81, Err(DropReason::NoSuchPort)),
            ("fd00:96::1", 80, Ok(Some(2))),
            ("fd00:96::1", 81, Ok(None)),
            ("192.0.2.1", 443, Ok(Some(5))),
            ("192.0.2.1", 80, Err(DropReason::NoSuchPort)),
            // An address of the node is never marked, so that its other ports are the node's own.
            ("192.168.0.1", 443, Ok(Some(6))),
            ("192.168.0.1", 80, Ok(None)),
            ("192.168.0.1", 30001, Ok(Some(3))),
            ("192.168.0.1", 30002, Ok(None)),
            ("192.168.0.2", 30001, Ok(None)),
            ("fd00::1", 30002, Ok(Some(4))),
            ("127.0.0.1", 30001, Ok(None)),
            ("::1", 30002, Ok(None)),
            ("0.0.0.0", 30001, Ok(None)),
            ("::", 30002, Ok(None)),
        ];
        for (addr, port, expected) in cases {
            for on_node in [true, false] {
                let found = packet_frontend(&fake(on_node), to(addr, port)).map(|found| found.map(|f| f.service));
                assert_eq!(found, expected, "{addr}:{port}");
            }
        }
    }

    #[test]
    fn source_ranges_apply_to_load_balancer_addresses() {
        let kind = |kind| Frontend::new(1, kind);
        assert!(has_source_ranges(
            kind(FrontendKind::LoadBalancer),
            service_flags::SOURCE_RANGES
        ));
        assert!(!has_source_ranges(kind(FrontendKind::LoadBalancer), 0));
        assert!(!has_source_ranges(
            kind(FrontendKind::ClusterIp),
            service_flags::SOURCE_RANGES
        ));
    }

    #[test]
    fn table_of_binds() {
        let cases = [
            ("0.0.0.0", 30001, true),
            ("0.0.0.0", 30002, false),
            ("0.0.0.0", 80, false),
            ("::", 30001, true),
            ("::", 30002, true),
            ("127.0.0.1", 30001, true),
            ("192.168.0.1", 30001, true),
            // An address that serves no node ports.
            ("192.168.9.9", 30001, false),
            ("::1", 30002, true),
            ("::1", 30001, false),
        ];
        for (addr, port, taken) in cases {
            assert_eq!(binds_node_port(&fake(true), to(addr, port)), taken, "{addr}:{port}");
        }
    }
}
