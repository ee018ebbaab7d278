//! The frontend of a destination: the lookups and their order, for programs and for `explain`.

use super::ip128::Ip128;
use crate::abi::{DropReason, Frontend, FrontendKind, service_flags};

/// A destination of a socket or packet.
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
    /// Returns the key of an address mark.
    #[inline(always)]
    const fn mark(addr: Ip128) -> Self {
        Self {
            addr,
            port: 0,
            proto: 0,
        }
    }

    /// Returns the key of a node port. All addresses of a family share the key.
    #[inline(always)]
    const fn node_port(self) -> Self {
        Self {
            addr: self.addr.unspecified(),
            ..self
        }
    }
}

/// The maps that the lookup of a frontend reads.
pub trait Tables {
    /// Returns the entry of FRONTENDS with this key. Port and protocol are zero for an address mark.
    fn frontend(&self, key: Destination) -> Option<Frontend>;
    /// Returns whether the entry of FRONTENDS with this key is a node port.
    fn is_node_port(&self, key: Destination) -> bool {
        self.frontend(key)
            .is_some_and(|found| found.kind == FrontendKind::NodePort as u8)
    }
    /// Returns whether FRONTENDS or NODE_ADDRS may have the address: its bit in FILTER is set.
    fn may_have(&self, addr: Ip128) -> bool;
    /// Returns whether NODE_ADDRS contains the address.
    fn is_node_address(&self, addr: Ip128) -> bool;
    /// Returns whether the socket is in the node's network namespace.
    fn is_on_node(&self) -> bool;
}

/// Returns the frontend of a socket's destination, or `None` if lb does not serve it.
///
/// - The destination zero is loopback, as in the kernel's `ip_route_output_key` and `tcp_v6_connect`.
/// - Loopback addresses have node ports for the node's own sockets only, since each pod has its own loopback.
/// - An address and port of a Service come first, then the ports that a service address does not have, then node ports
///   on this node's addresses.
///
/// # Errors
/// Returns [`DropReason::NoSuchPort`] for a port that a service address does not have.
#[inline(always)]
pub fn of_socket(tables: &impl Tables, to: Destination) -> Result<Option<Frontend>, DropReason> {
    let addr = to.addr.or_loopback();
    let to = Destination { addr, ..to };
    if addr.is_loopback() {
        return Ok(if tables.is_on_node() {
            tables.frontend(to.node_port())
        } else {
            None
        });
    }
    if !tables.may_have(addr) {
        return Ok(None);
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

/// Returns the frontend of a packet's destination, or `None` if lb does not serve it. The caller must not pass fragments or
/// protocols that packets are not translated for.
///
/// An address and port of a Service come first, then the ports that a service address does not have (external and
/// load-balancer addresses too), then node ports on this node's addresses. Loopback destinations are never translated
/// here.
///
/// # Errors
/// Returns [`DropReason::NoSuchPort`] for a port that a service address does not have.
#[inline(always)]
pub fn of_packet(tables: &impl Tables, to: Destination) -> Result<Option<Frontend>, DropReason> {
    // The key of a node port has the zero address, which must not be reachable as a destination.
    if to.addr.or_loopback().is_loopback() {
        return Ok(None);
    }
    if !tables.may_have(to.addr) {
        return Ok(None);
    }
    if let Some(found) = tables.frontend(to) {
        return Ok(Some(found));
    }
    if has_mark(tables, to.addr) {
        return Err(DropReason::NoSuchPort);
    }
    Ok(if tables.is_node_address(to.addr) {
        tables.frontend(to.node_port())
    } else {
        None
    })
}

/// Returns whether an address has an address mark: it belongs to a Service. External addresses that are also addresses of the
/// node have none.
#[inline(always)]
pub fn is_service_address(tables: &impl Tables, addr: Ip128) -> bool {
    tables.may_have(addr) && has_mark(tables, addr)
}

#[inline(always)]
fn has_mark(tables: &impl Tables, addr: Ip128) -> bool {
    tables.frontend(Destination::mark(addr)).is_some()
}

/// Returns whether a frontend is for the clients in SOURCE_RANGES only: a load-balancer address of a service with these
/// flags. Socket hooks leave it to the packet path, which has the source address.
#[inline(always)]
#[must_use]
pub const fn has_source_ranges(frontend: Frontend, service_flags: u32) -> bool {
    frontend.kind == FrontendKind::LoadBalancer as u8 && service_flags & service_flags::SOURCE_RANGES != 0
}

/// Returns whether a bind to this address and port would take a node port. Valid in the node's namespace only.
///
/// A listener on all IPv6 addresses takes the port of IPv4 as well, unless it has IPV6_V6ONLY set. The hook cannot read
/// that option.
#[inline(always)]
pub fn binds_node_port(tables: &impl Tables, to: Destination) -> bool {
    let has = |addr: Ip128| tables.is_node_port(Destination { addr, ..to });
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
    use crate::abi::{Addr, ServiceIndex};
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
                .map(|(_, _, _, service, kind)| Frontend::new(ServiceIndex::new(*service), *kind))
        }

        fn may_have(&self, addr: Ip128) -> bool {
            let mut addrs = FRONTENDS.iter().map(|(addr, ..)| *addr).chain(NODE);
            addrs.any(|has| words(has) == addr)
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
            let found = |on_node| of_socket(&fake(on_node), to(addr, port)).map(|found| found.map(|f| f.service.get()));
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
                let found = of_packet(&fake(on_node), to(addr, port)).map(|found| found.map(|f| f.service.get()));
                assert_eq!(found, expected, "{addr}:{port}");
            }
        }
    }

    #[test]
    fn source_ranges_apply_to_load_balancer_addresses() {
        let kind = |kind| Frontend::new(ServiceIndex::new(1), kind);
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
