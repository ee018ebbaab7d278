//! The node's network devices, their addresses and the default route, followed as they change.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::thread;
use std::time::Duration;

use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    InfoKind, InfoPortKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use tokio::sync::watch;
use tracing::warn;

use super::netlink::{Listing, Netlink, Subscription};

/// Time to wait for the rest of a burst of changes.
const BURST: Duration = Duration::from_millis(20);
/// Time until a failed listing is repeated.
const RETRY_DELAY: Duration = Duration::from_secs(1);
/// Interval of listings without a notification: the kernel notifies of few changes of routes.
const LISTING_INTERVAL: Duration = Duration::from_secs(10);
/// How often a listing is restarted because of changes.
const TRIES: usize = 10;

/// An address on its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) ip: IpAddr,
    /// Usable as the source address of packets to other hosts: not local to the link or the host, not deprecated, and
    /// not tentative (duplicate address detection has ended).
    pub(super) is_global: bool,
    /// One of several of a network, or one that is temporary.
    pub(super) is_secondary: bool,
}

/// A network device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) name: String,
    pub(super) kind: Kind,
    /// Packets have a link-layer header, as on Ethernet.
    pub(super) has_link_header: bool,
    /// Packets that it receives continue as if received by another device: a bridge, bond or team that it is a port of.
    pub(super) is_port: bool,
    /// In the kernel's order.
    pub(super) addresses: Vec<Address>,
}

/// The kind of a device, as far as lb distinguishes kinds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Loopback,
    /// Receives no packets, only holds addresses (`kube-ipvs0`).
    Dummy,
    Bridge,
    Other,
}

/// The devices, addresses and default routes of this node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LinkSnapshot {
    /// Devices by their index.
    pub(super) links: BTreeMap<u32, Link>,
    /// Devices of the default routes of a family (true: IPv6); not listed without need.
    pub(super) defaults: BTreeSet<(bool, u32)>,
    /// The device by which packets of a family leave for other networks.
    pub(super) way_out: BTreeMap<bool, u32>,
}

impl LinkSnapshot {
    /// Lists the devices of the network namespace of the calling thread; default routes only if wanted.
    ///
    /// # Errors
    /// Returns the error of the system call.
    pub fn take(routes: bool) -> io::Result<Self> {
        for _ in 0..TRIES {
            if let Some(snapshot) = Self::try_take(routes)? {
                return Ok(snapshot);
            }
        }
        Err(io::Error::other("devices change faster than they can be listed"))
    }

    /// `None` if something changed during the listing.
    fn try_take(routes: bool) -> io::Result<Option<Self>> {
        let mut netlink = Netlink::open(NETLINK_ROUTE)?;
        let mut snapshot = Self::default();
        let mut whole = netlink.list(RouteNetlinkMessage::GetLink(LinkMessage::default()), |message| {
            if let RouteNetlinkMessage::NewLink(message) = message {
                let index = message.header.index;
                snapshot.links.extend(link(message).map(|link| (index, link)));
            }
        })? == Listing::Whole;
        whole &= netlink.list(RouteNetlinkMessage::GetAddress(AddressMessage::default()), |message| {
            if let RouteNetlinkMessage::NewAddress(message) = message
                && let Some(link) = snapshot.links.get_mut(&message.header.index)
            {
                link.addresses.extend(address(&message));
            }
        })? == Listing::Whole;
        for v6 in [false, true] {
            snapshot
                .way_out
                .extend(way_out(&mut netlink, v6)?.map(|index| (v6, index)));
        }
        if !routes {
            return Ok(whole.then_some(snapshot));
        }
        whole &= netlink.list(RouteNetlinkMessage::GetRoute(RouteMessage::default()), |message| {
            if let RouteNetlinkMessage::NewRoute(route) = message {
                let v6 = route.header.address_family == AddressFamily::Inet6;
                let devices = default_devices(&route).into_iter();
                snapshot.defaults.extend(devices.map(|index| (v6, index)));
            }
        })? == Listing::Whole;
        Ok(whole.then_some(snapshot))
    }
}

/// Converts a device of a listing; `None` if it has no name.
fn link(message: LinkMessage) -> Option<Link> {
    let header = message.header;
    let mut name = None;
    let mut kind = if header.flags.contains(LinkFlags::Loopback) {
        Kind::Loopback
    } else {
        Kind::Other
    };
    let mut is_port = false;
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = Some(text),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(InfoKind::Dummy) => kind = Kind::Dummy,
                        LinkInfo::Kind(InfoKind::Bridge) => kind = Kind::Bridge,
                        LinkInfo::PortKind(of) => {
                            is_port = matches!(of, InfoPortKind::Bridge | InfoPortKind::Bond | InfoPortKind::Team);
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Some(Link {
        name: name?,
        kind,
        has_link_header: header.link_layer_type == LinkLayerType::Ether,
        is_port,
        addresses: Vec::new(),
    })
}

/// The node's side of an address; `None` for an address that another machine has too.
fn address(message: &AddressMessage) -> Option<Address> {
    let header = &message.header;
    if header.flags.contains(AddressHeaderFlags::Dadfailed) {
        return None;
    }
    let find = |pick: fn(&AddressAttribute) -> Option<IpAddr>| message.attributes.iter().find_map(pick);
    // If both are present, the device is point-to-point and IFA_ADDRESS is the other side.
    let local = find(|a| match a {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    });
    let ip = local.or_else(|| {
        find(|a| match a {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        })
    })?;
    let is_near = match ip {
        IpAddr::V4(ip) => ip.is_link_local() || ip.is_loopback(),
        IpAddr::V6(ip) => ip.is_unicast_link_local() || ip.is_loopback(),
    };
    let unsure = AddressHeaderFlags::Tentative | AddressHeaderFlags::Deprecated;
    let is_far = matches!(
        header.scope,
        AddressScope::Universe | AddressScope::Site | AddressScope::Other(_)
    );
    Some(Address {
        ip,
        is_global: is_far && !is_near && !header.flags.intersects(unsure),
        is_secondary: header.flags.contains(AddressHeaderFlags::Secondary),
    })
}

/// The device by which a packet to another network leaves. The destination is a documentation address (RFC 5737, RFC
/// 3849): one lookup replaces a listing of all routes, of which there may be very many.
fn way_out(netlink: &mut Netlink, v6: bool) -> io::Result<Option<u32>> {
    const FAR: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
    const FAR6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
    let far = if v6 { FAR6.into() } else { FAR.into() };
    let attributes = route(netlink, far)?.into_iter().flat_map(|route| route.attributes);
    let mut devices = attributes.filter_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(index),
        _ => None,
    });
    Ok(devices.next())
}

/// The source address of packets that a socket sends to another address, in the network namespace of the calling
/// thread; `None` if there is no route, or if the packets do not leave the node.
///
/// # Errors
/// Returns the error of the system call.
pub fn source(to: IpAddr) -> io::Result<Option<IpAddr>> {
    let route = route(&mut Netlink::open(NETLINK_ROUTE)?, to)?;
    let route = route.filter(|route| route.header.kind != RouteType::Local);
    let attributes = route.into_iter().flat_map(|route| route.attributes);
    let mut sources = attributes.filter_map(|attribute| match attribute {
        RouteAttribute::PrefSource(RouteAddress::Inet(ip)) => Some(ip.into()),
        RouteAttribute::PrefSource(RouteAddress::Inet6(ip)) => Some(ip.into()),
        _ => None,
    });
    Ok(sources.next())
}

/// The kernel's route to an address, if there is one.
fn route(netlink: &mut Netlink, to: IpAddr) -> io::Result<Option<RouteMessage>> {
    let (family, length, to) = match to {
        IpAddr::V4(ip) => (AddressFamily::Inet, 32, RouteAddress::Inet(ip)),
        IpAddr::V6(ip) => (AddressFamily::Inet6, 128, RouteAddress::Inet6(ip)),
    };
    let mut request = RouteMessage::default();
    request.header.address_family = family;
    request.header.destination_prefix_length = length;
    request.attributes.push(RouteAttribute::Destination(to));
    match netlink.get(RouteNetlinkMessage::GetRoute(request)) {
        Ok(RouteNetlinkMessage::NewRoute(route)) => Ok(Some(route)),
        Ok(_) => Ok(None),
        Err(error) => match error.raw_os_error() {
            // No route, a route that rejects packets (unreachable, prohibit, blackhole), or no such family.
            Some(
                libc::ENETUNREACH
                | libc::EHOSTUNREACH
                | libc::EACCES
                | libc::EINVAL
                | libc::EAFNOSUPPORT
                | libc::EOPNOTSUPP
                | libc::ENETDOWN,
            ) => Ok(None),
            _ => Err(error),
        },
    }
}

/// Indexes of the devices that a route leads to, if it is a default route of the main table.
fn default_devices(route: &RouteMessage) -> Vec<u32> {
    let header = &route.header;
    let is_default = header.destination_prefix_length == 0
        && header.table == RouteHeader::RT_TABLE_MAIN
        && header.kind == RouteType::Unicast;
    if !is_default {
        return Vec::new();
    }
    let devices = route.attributes.iter().flat_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => vec![*index],
        RouteAttribute::MultiPath(hops) => hops.iter().map(|hop| hop.interface_index).collect(),
        _ => Vec::new(),
    });
    devices.collect()
}

/// Follows the devices of the network namespace of the calling thread on a thread of its own, and default routes if
/// wanted (a node may have very many routes). The first listing is complete when this returns.
///
/// # Errors
/// Returns the error of the first listing.
pub fn follow(routes: bool) -> io::Result<watch::Receiver<LinkSnapshot>> {
    const ADDRESSES: i32 = libc::RTMGRP_LINK | libc::RTMGRP_IPV4_IFADDR | libc::RTMGRP_IPV6_IFADDR;
    const ROUTES: i32 = libc::RTMGRP_IPV4_ROUTE | libc::RTMGRP_IPV6_ROUTE;
    let groups = if routes { ADDRESSES | ROUTES } else { ADDRESSES };
    // Subscribed first, so that no change is missed in between.
    let subscription = Subscription::open(NETLINK_ROUTE, groups as u32, LISTING_INTERVAL)?;
    let (reports, snapshots) = watch::channel(LinkSnapshot::take(routes)?);
    thread::Builder::new().name("lb-devices".into()).spawn(move || {
        while !reports.is_closed() {
            // Waits for a change. The devices are listed also after a failure, since changes may have been missed.
            if let Err(error) = subscription.wait() {
                warn!(%error, "changes of devices and addresses may be seen late");
                thread::sleep(RETRY_DELAY);
            }
            thread::sleep(BURST);
            let snapshot = loop {
                match LinkSnapshot::take(routes) {
                    Ok(snapshot) => break snapshot,
                    Err(error) => warn!(%error, "cannot list the node's devices; trying again"),
                }
                thread::sleep(RETRY_DELAY);
            };
            reports.send_if_modified(|known| {
                let is_new = *known != snapshot;
                *known = snapshot;
                is_new
            });
        }
    })?;
    Ok(snapshots)
}

#[cfg(test)]
impl LinkSnapshot {
    /// Devices with the indexes 1, 2 and so on: names, and addresses with the kernel's flags.
    pub(super) fn of(devices: &[(&str, &[&str])]) -> Self {
        let links = (1..).zip(devices).map(|(index, (name, addresses))| {
            let addresses = addresses.iter().map(|text| {
                let ip: IpAddr = text.parse().unwrap();
                let mut message = AddressMessage::default();
                message.attributes.push(AddressAttribute::Address(ip));
                address(&message).unwrap()
            });
            let link = Link {
                name: (*name).to_owned(),
                kind: if *name == "lo" { Kind::Loopback } else { Kind::Other },
                has_link_header: true,
                is_port: false,
                addresses: addresses.collect(),
            };
            (index, link)
        });
        Self {
            links: links.collect(),
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stays_here_has_no_source() {
        let here = source(Ipv4Addr::LOCALHOST.into()).unwrap();
        assert_eq!(here, None);
    }

    /// Bits of `ifa_flags` (`linux/if_addr.h`).
    const SECONDARY: u8 = 0x01;
    const DADFAILED: u8 = 0x08;
    const DEPRECATED: u8 = 0x20;
    const TENTATIVE: u8 = 0x40;

    #[test]
    fn what_an_address_is_good_for() {
        // (address, its peer, flags, scope) and (address, global, secondary).
        type Told = (&'static str, Option<&'static str>, u8, AddressScope);
        type Judged = Option<(&'static str, bool, bool)>;
        let cases: [(Told, Judged); 11] = [
            (
                ("192.0.2.1", None, 0, AddressScope::Universe),
                Some(("192.0.2.1", true, false)),
            ),
            (
                ("192.0.2.1", Some("192.0.2.2"), 0, AddressScope::Universe),
                Some(("192.0.2.1", true, false)),
            ),
            (
                ("192.0.2.1", None, SECONDARY, AddressScope::Universe),
                Some(("192.0.2.1", true, true)),
            ),
            (
                ("192.0.2.1", None, 0, AddressScope::Link),
                Some(("192.0.2.1", false, false)),
            ),
            (
                ("127.0.0.1", None, 0, AddressScope::Host),
                Some(("127.0.0.1", false, false)),
            ),
            (
                ("169.254.0.1", None, 0, AddressScope::Universe),
                Some(("169.254.0.1", false, false)),
            ),
            (
                ("fd00::1", None, 0, AddressScope::Universe),
                Some(("fd00::1", true, false)),
            ),
            (
                ("fe80::1", None, 0, AddressScope::Link),
                Some(("fe80::1", false, false)),
            ),
            (
                ("fd00::1", None, TENTATIVE, AddressScope::Universe),
                Some(("fd00::1", false, false)),
            ),
            (
                ("fd00::1", None, DEPRECATED, AddressScope::Universe),
                Some(("fd00::1", false, false)),
            ),
            (("fd00::1", None, DADFAILED, AddressScope::Universe), None),
        ];
        for ((ip, peer, flags, scope), expected) in cases {
            let mut message = AddressMessage::default();
            message.header.flags = AddressHeaderFlags::from_bits_retain(flags);
            message.header.scope = scope;
            let own: IpAddr = ip.parse().unwrap();
            message.attributes = match peer {
                Some(peer) => vec![
                    AddressAttribute::Address(peer.parse().unwrap()),
                    AddressAttribute::Local(own),
                ],
                None => vec![AddressAttribute::Address(own)],
            };
            let is = address(&message).map(|a| (a.ip.to_string(), a.is_global, a.is_secondary));
            let expected = expected.map(|(ip, global, secondary)| (ip.to_owned(), global, secondary));
            assert_eq!(is, expected, "{ip} {flags:#x} {scope:?}");
        }
    }

    #[test]
    fn what_a_device_is() {
        let message = |flags: LinkFlags, layer: LinkLayerType, infos: Vec<LinkInfo>| {
            let mut message = LinkMessage::default();
            message.header.flags = flags;
            message.header.link_layer_type = layer;
            message.attributes = vec![LinkAttribute::IfName("x".to_owned()), LinkAttribute::LinkInfo(infos)];
            let link = link(message).unwrap();
            (link.kind, link.has_link_header, link.is_port)
        };
        let none = LinkFlags::empty();
        let ether = LinkLayerType::Ether;
        let port = |kind| vec![LinkInfo::Kind(InfoKind::Veth), LinkInfo::PortKind(kind)];
        let is = message(LinkFlags::Loopback, LinkLayerType::Loopback, vec![]);
        assert_eq!(is, (Kind::Loopback, false, false));
        assert_eq!(message(none, ether, vec![]), (Kind::Other, true, false));
        let dummy = vec![LinkInfo::Kind(InfoKind::Dummy)];
        assert_eq!(message(none, ether, dummy), (Kind::Dummy, true, false));
        let bridge = vec![LinkInfo::Kind(InfoKind::Bridge)];
        assert_eq!(message(none, ether, bridge), (Kind::Bridge, true, false));
        let wireguard = vec![LinkInfo::Kind(InfoKind::Wireguard)];
        assert_eq!(
            message(none, LinkLayerType::None, wireguard),
            (Kind::Other, false, false)
        );
        for (kind, is_port) in [
            (InfoPortKind::Bridge, true),
            (InfoPortKind::Bond, true),
            (InfoPortKind::Team, true),
            (InfoPortKind::Vrf, false),
            (InfoPortKind::Other("openvswitch".to_owned()), false),
        ] {
            assert_eq!(message(none, ether, port(kind)), (Kind::Other, true, is_port));
        }
        assert!(link(LinkMessage::default()).is_none(), "no name");
    }
}
