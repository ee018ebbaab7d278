//! The decision about a new connection or flow: the lookups, their order, and the meaning of each result.
//!
//! The kernel programs and `explain` both call these functions, each with its own [`Services`]. The choice of the
//! backend, which needs a random number and the affinity of the client, follows in the caller.

use super::frontend::{self, Destination, Tables};
use super::ip128::Ip128;
use super::packet::Packet;
use super::selection;
use crate::abi::{DropReason, Frontend, ServiceIndex, Set, cluster_flags};

/// The maps that a decision reads in addition to those of [`Tables`].
pub trait Services: Tables {
    /// A handle of one entry of SERVICES.
    type Service: Copy;

    /// Returns an entry of SERVICES, if the index is in range.
    fn service(&self, index: ServiceIndex) -> Option<Self::Service>;
    /// Returns the [`crate::abi::service_flags`] of an entry.
    fn flags(&self, service: Self::Service) -> u32;
}

/// The maps that only the decision about packets reads.
pub trait PacketTables: Services {
    /// Returns the [`cluster_flags`] of the longest prefix in CLUSTER_CIDRS that contains the address, or zero.
    fn cluster_flags(&self, addr: Ip128) -> u32;
    /// Returns whether SOURCE_RANGES has a range of the service port that contains the address.
    fn is_in_source_range(&self, service: ServiceIndex, addr: Ip128) -> bool;
}

/// The frontend lookup of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketFrontend {
    /// The socket is in another network namespace than the node's, and only the node's is served.
    OtherNamespace,
    /// The destination is not a frontend.
    None,
    /// The destination is this frontend.
    Found(Frontend),
}

/// A service, and the set of it that a connection or flow selects from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admission<S> {
    /// The entry of SERVICES.
    pub service: S,
    /// The set.
    pub set: Set,
    /// The client is a pod of this node. Always false for sockets.
    pub client_is_local: bool,
}

/// The properties of a packet without a flow that decide whether it can start one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival {
    /// The hook is at egress.
    pub at_egress: bool,
    /// A socket of this machine sent the packet.
    pub has_socket: bool,
    /// The kernel removed a VLAN tag from the packet, or is about to add one.
    pub has_vlan: bool,
    /// The packet can be the first one of a flow: see [`can_start_flow`].
    pub can_start_flow: bool,
}

/// Returns whether a packet can be the first one of a flow: any datagram, or a SYN. Any other segment belongs to a
/// connection that is older than lb, or that another program translates.
#[inline(always)]
#[must_use]
pub const fn can_start_flow(packet: &Packet) -> bool {
    !packet.is_tcp() || packet.is_initial_syn()
}

/// Looks up the frontend of a socket's destination. `node_only`: only sockets of the node's network namespace are served.
///
/// # Errors
/// Returns [`DropReason::NoSuchPort`] for a port that a service address does not have.
#[inline(always)]
pub fn socket_frontend(tables: &impl Tables, node_only: bool, to: Destination) -> Result<SocketFrontend, DropReason> {
    if node_only && !tables.is_on_node() {
        return Ok(SocketFrontend::OtherNamespace);
    }
    Ok(match frontend::of_socket(tables, to)? {
        Some(frontend) => SocketFrontend::Found(frontend),
        None => SocketFrontend::None,
    })
}

/// Returns the service and the set that serve a socket. Returns `None` if only the packet path can decide: a
/// load-balancer address that is for some sources only, since the source of a socket is not known when it connects.
///
/// # Errors
/// Returns the errors of [`selection::set_for_socket`], and [`DropReason::BadServiceIndex`] if SERVICES does not have the
/// index of the frontend.
#[inline(always)]
pub fn admit_socket<T: Services>(tables: &T, frontend: Frontend) -> Result<Option<Admission<T::Service>>, DropReason> {
    let set = selection::set_for_socket(frontend)?;
    let service = tables.service(frontend.service).ok_or(DropReason::BadServiceIndex)?;
    if frontend::has_source_ranges(frontend, tables.flags(service)) {
        return Ok(None);
    }
    Ok(Some(Admission {
        service,
        set,
        client_is_local: false,
    }))
}

/// Looks up the frontend of a packet that belongs to no flow. Returns `None` if lb does not translate the packet.
///
/// At egress, only the packets of sockets of this machine are translated. Any other packet has passed an ingress hook
/// untranslated, and its route may lead back to the device that it arrived at.
///
/// # Errors
/// Returns:
/// - [`DropReason::Untranslated`] for a packet of no socket that is about to leave for a service address.
/// - [`DropReason::NoSuchPort`] for a port that a service address does not have.
/// - [`DropReason::Vlan`] for a packet with a VLAN tag to a frontend.
#[inline(always)]
pub fn packet_frontend(
    tables: &impl Tables,
    arrival: Arrival,
    to: Destination,
) -> Result<Option<Frontend>, DropReason> {
    if arrival.at_egress && !arrival.has_socket {
        return if frontend::is_service_address(tables, to.addr) {
            Err(DropReason::Untranslated)
        } else {
            Ok(None)
        };
    }
    if !arrival.can_start_flow {
        return Ok(None);
    }
    let Some(frontend) = frontend::of_packet(tables, to)? else {
        return Ok(None);
    };
    if arrival.has_vlan {
        return Err(DropReason::Vlan);
    }
    Ok(Some(frontend))
}

/// Returns the service and the set that serve the flow of a packet from `client`. A client inside the cluster, and any
/// socket of this machine, uses the cluster set for external addresses.
///
/// # Errors
/// Returns:
/// - the errors of [`selection::set_for_packet`].
/// - [`DropReason::BadServiceIndex`] if SERVICES does not have the index of the frontend.
/// - [`DropReason::SourceNotAllowed`] if the client is in none of the source ranges of a load-balancer address.
#[inline(always)]
pub fn admit_packet<T: PacketTables>(
    tables: &T,
    frontend: Frontend,
    client: Ip128,
    at_egress: bool,
) -> Result<Admission<T::Service>, DropReason> {
    let flags = tables.cluster_flags(client);
    let inside = at_egress || flags & cluster_flags::INSIDE != 0;
    let set = selection::set_for_packet(frontend, inside)?;
    let service = tables.service(frontend.service).ok_or(DropReason::BadServiceIndex)?;
    if frontend::has_source_ranges(frontend, tables.flags(service))
        && !tables.is_in_source_range(frontend.service, client)
    {
        return Err(DropReason::SourceNotAllowed);
    }
    Ok(Admission {
        service,
        set,
        client_is_local: flags & cluster_flags::HERE != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::{FrontendKind, ip_protocol, service_flags};

    const VIP: Ip128 = Ip128::from_v4(0x0100_600a);
    const LB: Ip128 = Ip128::from_v4(0x0100_00c0);
    const NODE: Ip128 = Ip128::from_v4(0x0100_a8c0);
    const POD: Ip128 = Ip128::from_v4(0x0200_0a0a);
    const OTHER_POD: Ip128 = Ip128::from_v4(0x0201_0a0a);
    const ALLOWED: Ip128 = Ip128::from_v4(0x0900_33c6);
    const OUTSIDE: Ip128 = Ip128::from_v4(0x0800_33c6);

    /// Service 1 has a cluster IP and a node port, service 2 a load-balancer address with source ranges, service 9 is
    /// not in SERVICES.
    struct Fake {
        on_node: bool,
    }

    impl Tables for Fake {
        fn frontend(&self, key: Destination) -> Option<Frontend> {
            let (service, kind) = match (key.addr, key.port) {
                (VIP, 80) => (1, FrontendKind::ClusterIp),
                (VIP, 99) => (9, FrontendKind::ClusterIp),
                (VIP, 0) => (0, FrontendKind::Address),
                (LB, 443) => (2, FrontendKind::LoadBalancer),
                (LB, 0) => (0, FrontendKind::ExternalAddress),
                (addr, 30001) if addr.same(addr.unspecified()) => (1, FrontendKind::NodePort),
                _ => return None,
            };
            Some(frontend(service, kind))
        }

        fn may_have(&self, addr: Ip128) -> bool {
            [VIP, LB, NODE].contains(&addr)
        }

        fn is_node_address(&self, addr: Ip128) -> bool {
            addr == NODE
        }

        fn is_on_node(&self) -> bool {
            self.on_node
        }
    }

    impl Services for Fake {
        type Service = ServiceIndex;

        fn service(&self, index: ServiceIndex) -> Option<ServiceIndex> {
            (index.get() < 9).then_some(index)
        }

        fn flags(&self, service: ServiceIndex) -> u32 {
            if service.get() == 2 {
                service_flags::SOURCE_RANGES
            } else {
                0
            }
        }
    }

    impl PacketTables for Fake {
        fn cluster_flags(&self, addr: Ip128) -> u32 {
            match addr {
                POD => cluster_flags::INSIDE | cluster_flags::HERE,
                OTHER_POD => cluster_flags::INSIDE,
                _ => 0,
            }
        }

        fn is_in_source_range(&self, service: ServiceIndex, addr: Ip128) -> bool {
            service.get() == 2 && addr == ALLOWED
        }
    }

    fn frontend(service: u32, kind: FrontendKind) -> Frontend {
        Frontend::new(ServiceIndex::new(service), kind)
    }

    fn to(addr: Ip128, port: u16) -> Destination {
        Destination {
            addr,
            port,
            proto: ip_protocol::TCP,
        }
    }

    const AT_INGRESS: Arrival = Arrival {
        at_egress: false,
        has_socket: false,
        has_vlan: false,
        can_start_flow: true,
    };
    const FROM_SOCKET: Arrival = Arrival {
        at_egress: true,
        has_socket: true,
        ..AT_INGRESS
    };

    #[test]
    fn table_of_packet_frontends() {
        let forwarded = Arrival {
            has_socket: false,
            ..FROM_SOCKET
        };
        let tagged = Arrival {
            has_vlan: true,
            ..AT_INGRESS
        };
        let midstream = Arrival {
            can_start_flow: false,
            ..AT_INGRESS
        };
        for (arrival, addr, port, expected) in [
            (AT_INGRESS, VIP, 80, Ok(Some(1))),
            (AT_INGRESS, VIP, 81, Err(DropReason::NoSuchPort)),
            (AT_INGRESS, LB, 443, Ok(Some(2))),
            (AT_INGRESS, LB, 80, Err(DropReason::NoSuchPort)),
            (AT_INGRESS, NODE, 30001, Ok(Some(1))),
            (AT_INGRESS, NODE, 22, Ok(None)),
            (AT_INGRESS, OUTSIDE, 80, Ok(None)),
            (FROM_SOCKET, VIP, 80, Ok(Some(1))),
            (FROM_SOCKET, VIP, 81, Err(DropReason::NoSuchPort)),
            (FROM_SOCKET, OUTSIDE, 80, Ok(None)),
            // A packet of no socket that reaches egress was not translated at ingress.
            (forwarded, VIP, 80, Err(DropReason::Untranslated)),
            (forwarded, VIP, 81, Err(DropReason::Untranslated)),
            (forwarded, LB, 443, Err(DropReason::Untranslated)),
            (forwarded, NODE, 30001, Ok(None)),
            (tagged, VIP, 80, Err(DropReason::Vlan)),
            (tagged, VIP, 81, Err(DropReason::NoSuchPort)),
            (tagged, NODE, 22, Ok(None)),
            (midstream, VIP, 80, Ok(None)),
            (midstream, VIP, 81, Ok(None)),
            (midstream, NODE, 30001, Ok(None)),
        ] {
            let found = packet_frontend(&Fake { on_node: false }, arrival, to(addr, port));
            assert_eq!(
                found.map(|found| found.map(|frontend| frontend.service.get())),
                expected,
                "{arrival:?} {addr:?} {port}"
            );
        }
    }

    #[test]
    fn table_of_admitted_packets() {
        let cluster_ip = frontend(1, FrontendKind::ClusterIp);
        let node_port = frontend(1, FrontendKind::NodePort);
        let load_balancer = frontend(2, FrontendKind::LoadBalancer);
        let external_ip = frontend(2, FrontendKind::ExternalIp);
        let out_of_range = frontend(9, FrontendKind::ClusterIp);
        for (frontend, client, at_egress, expected) in [
            (cluster_ip, OUTSIDE, false, Ok((Set::Internal, false))),
            (cluster_ip, POD, false, Ok((Set::Internal, true))),
            (node_port, OUTSIDE, false, Ok((Set::External, false))),
            (node_port, OTHER_POD, false, Ok((Set::Cluster, false))),
            (node_port, POD, false, Ok((Set::Cluster, true))),
            (node_port, NODE, true, Ok((Set::Cluster, false))),
            (load_balancer, ALLOWED, false, Ok((Set::External, false))),
            (load_balancer, OUTSIDE, false, Err(DropReason::SourceNotAllowed)),
            (load_balancer, POD, false, Err(DropReason::SourceNotAllowed)),
            (load_balancer, NODE, true, Err(DropReason::SourceNotAllowed)),
            // Source ranges apply to the load-balancer address only.
            (external_ip, OUTSIDE, false, Ok((Set::External, false))),
            (out_of_range, OUTSIDE, false, Err(DropReason::BadServiceIndex)),
        ] {
            let admission = admit_packet(&Fake { on_node: false }, frontend, client, at_egress);
            assert_eq!(
                admission.map(|admission| (admission.set, admission.client_is_local)),
                expected,
                "{frontend:?} {client:?}"
            );
        }
        let mut unknown = cluster_ip;
        unknown.kind = 99;
        assert_eq!(
            admit_packet(&Fake { on_node: false }, unknown, POD, false),
            Err(DropReason::BadKind)
        );
    }

    #[test]
    fn table_of_sockets() {
        let lookup = |on_node, node_only, addr, port| socket_frontend(&Fake { on_node }, node_only, to(addr, port));
        assert_eq!(lookup(false, true, VIP, 80), Ok(SocketFrontend::OtherNamespace));
        assert_eq!(lookup(false, true, VIP, 81), Ok(SocketFrontend::OtherNamespace));
        assert_eq!(lookup(true, true, OUTSIDE, 80), Ok(SocketFrontend::None));
        assert_eq!(lookup(false, false, VIP, 81), Err(DropReason::NoSuchPort));
        let Ok(SocketFrontend::Found(found)) = lookup(false, false, VIP, 80) else {
            panic!("the cluster IP is a frontend");
        };
        let fake = Fake { on_node: false };
        let admission = admit_socket(&fake, found).map(|admission| admission.map(|a| (a.service, a.set)));
        assert_eq!(admission, Ok(Some((ServiceIndex::new(1), Set::Internal))));
        let load_balancer = frontend(2, FrontendKind::LoadBalancer);
        assert_eq!(admit_socket(&fake, load_balancer), Ok(None));
        let out_of_range = frontend(9, FrontendKind::ClusterIp);
        assert_eq!(admit_socket(&fake, out_of_range), Err(DropReason::BadServiceIndex));
        let mark = Frontend::mark(FrontendKind::Address);
        assert_eq!(admit_socket(&fake, mark), Err(DropReason::NoSuchPort));
    }

    #[test]
    fn a_flow_starts_with_a_datagram_or_a_syn() {
        use super::super::packet::tcp_flags::{ACK, FIN, RST, SYN};
        let packet = |proto, flags| Packet {
            src: POD,
            dst: VIP,
            src_port: 1000,
            dst_port: 80,
            proto,
            flags,
            ttl: 64,
            tos: 0,
            transport_len: 20,
        };
        assert!(can_start_flow(&packet(ip_protocol::UDP, 0)));
        assert!(can_start_flow(&packet(ip_protocol::TCP, SYN)));
        for flags in [0, ACK, SYN | ACK, FIN | ACK, RST, SYN | RST] {
            assert!(!can_start_flow(&packet(ip_protocol::TCP, flags)), "{flags}");
        }
    }
}
