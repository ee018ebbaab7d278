//! The addresses of this node that serve node ports, followed as they come and go.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::str::FromStr;
use std::thread;
use std::time::Duration;

use ipnet::IpNet;
use lb_common::abi::Addr;
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::route::{RouteAttribute, RouteHeader, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use tokio::sync::watch;
use tracing::warn;

use super::netlink::{Listing, Netlink, Subscription};

/// Time for the rest of a burst of changes to come.
const BURST: Duration = Duration::from_millis(20);
/// Time until the kernel is asked again after it failed to answer.
const AGAIN: Duration = Duration::from_secs(1);
/// How often a listing is begun anew because of changes.
const TRIES: usize = 10;

/// `--nodeport-addresses`: which of the node's addresses serve node ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// Those in these networks. A family that no network is named of has all of its addresses.
    Within(Vec<IpNet>),
    /// The first address of each family in the Node object of this node. Without such an object, the addresses of the
    /// devices that have a default route.
    Primary,
}

/// A word of `--nodeport-addresses` that is neither `primary` nor a network.
#[derive(Debug, thiserror::Error)]
#[error("neither \"primary\" nor a network such as 10.0.0.0/8")]
pub struct NotWanted;

/// All.
impl Default for Wanted {
    fn default() -> Self {
        Self::Within(Vec::new())
    }
}

impl FromStr for Wanted {
    type Err = NotWanted;

    fn from_str(text: &str) -> Result<Self, NotWanted> {
        if text == "primary" {
            return Ok(Self::Primary);
        }
        let networks = text.split(',').map(|word| word.trim().parse().map_err(|_| NotWanted));
        networks.collect::<Result<_, _>>().map(Self::Within)
    }
}

/// Which addresses serve node ports; all by default.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Selection {
    /// Devices by name; all where empty.
    pub devices: BTreeSet<String>,
    /// Addresses.
    pub wanted: Wanted,
}

/// The addresses and default routes of this node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Snapshot {
    /// Every address of every device, with the name of the device.
    addresses: BTreeSet<(String, IpAddr)>,
    /// Devices that the default routes of a family (true: IPv6) lead to.
    defaults: BTreeSet<(bool, String)>,
}

impl Selection {
    /// Whether every address is selected, also one that comes later.
    #[must_use]
    pub fn is_everything(&self) -> bool {
        let all = match &self.wanted {
            Wanted::Within(networks) => [false, true].into_iter().all(|v6| {
                let mut family = networks.iter().filter(|net| net.addr().is_ipv6() == v6).peekable();
                family.peek().is_none() || family.any(|net| net.prefix_len() == 0)
            }),
            Wanted::Primary => false,
        };
        all && self.devices.is_empty()
    }

    /// Whether the selection depends on default routes. A node may have very many routes: they are not looked at without
    /// need.
    fn looks_at_routes(&self) -> bool {
        self.wanted == Wanted::Primary
    }
}

impl Snapshot {
    /// What the kernel says now, in the network namespace of the calling thread; default routes only if wanted.
    ///
    /// # Errors
    /// The system call's.
    fn take(routes: bool) -> io::Result<Self> {
        for _ in 0..TRIES {
            if let Some(snapshot) = Self::try_take(routes)? {
                return Ok(snapshot);
            }
        }
        Err(io::Error::other("addresses change faster than they can be listed"))
    }

    /// `None` where something changed meanwhile.
    fn try_take(routes: bool) -> io::Result<Option<Self>> {
        let mut netlink = Netlink::open(NETLINK_ROUTE)?;
        let mut names = BTreeMap::new();
        let mut whole = netlink.list(RouteNetlinkMessage::GetLink(LinkMessage::default()), |message| {
            if let RouteNetlinkMessage::NewLink(link) = message {
                let name = link.attributes.into_iter().find_map(|attribute| match attribute {
                    LinkAttribute::IfName(name) => Some(name),
                    _ => None,
                });
                names.extend(name.map(|name| (link.header.index, name)));
            }
        })? == Listing::Whole;
        let mut snapshot = Self::default();
        whole &= netlink.list(RouteNetlinkMessage::GetAddress(AddressMessage::default()), |message| {
            if let RouteNetlinkMessage::NewAddress(address) = message
                && let (Some(name), Some(ip)) = (names.get(&address.header.index), local(&address))
            {
                snapshot.addresses.insert((name.clone(), ip));
            }
        })? == Listing::Whole;
        if !routes {
            return Ok(whole.then_some(snapshot));
        }
        whole &= netlink.list(RouteNetlinkMessage::GetRoute(RouteMessage::default()), |message| {
            if let RouteNetlinkMessage::NewRoute(route) = message {
                let v6 = route.header.address_family == AddressFamily::Inet6;
                let devices = default_devices(&route)
                    .into_iter()
                    .filter_map(|index| names.get(&index));
                snapshot.defaults.extend(devices.map(|name| (v6, name.clone())));
            }
        })? == Listing::Whole;
        Ok(whole.then_some(snapshot))
    }

    /// The addresses that serve node ports; `node` are those in the Node object of this node.
    ///
    /// Loopback is no part of them: the programs know it, since it is another one in each network namespace.
    #[must_use]
    pub fn select(&self, selection: &Selection, node: Option<&[IpAddr]>) -> BTreeSet<Addr> {
        let Selection { devices, wanted } = selection;
        let is_wanted = |device: &String, ip: IpAddr| match (wanted, node) {
            (Wanted::Within(networks), _) => {
                let mut family = networks
                    .iter()
                    .filter(|net| net.addr().is_ipv6() == ip.is_ipv6())
                    .peekable();
                family.peek().is_none() || family.any(|net| net.contains(&ip))
            }
            (Wanted::Primary, Some(node)) => node.iter().find(|a| a.is_ipv6() == ip.is_ipv6()) == Some(&ip),
            (Wanted::Primary, None) => self.defaults.contains(&(ip.is_ipv6(), device.clone())),
        };
        let selected = self.addresses.iter().filter(|(device, ip)| {
            let on_device = devices.is_empty() || devices.contains(device);
            on_device && !ip.is_loopback() && is_wanted(device, *ip)
        });
        selected.map(|(_, ip)| Addr::from(*ip)).collect()
    }
}

/// The node's side of an address; `None` for one that another machine has too.
fn local(address: &AddressMessage) -> Option<IpAddr> {
    if address.header.flags.contains(AddressHeaderFlags::Dadfailed) {
        return None;
    }
    let find = |pick: fn(&AddressAttribute) -> Option<IpAddr>| address.attributes.iter().find_map(pick);
    // Where both are there, the device is a point-to-point one and IFA_ADDRESS is the other side.
    let local = find(|a| {
        if let AddressAttribute::Local(ip) = a {
            Some(*ip)
        } else {
            None
        }
    });
    local.or_else(|| {
        find(|a| {
            if let AddressAttribute::Address(ip) = a {
                Some(*ip)
            } else {
                None
            }
        })
    })
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

/// Follows what a selection looks at in the network namespace of the calling thread, on a thread of its own. What there
/// is when this returns is there already.
///
/// # Errors
/// Where the kernel cannot be asked.
pub fn follow(selection: &Selection) -> io::Result<watch::Receiver<Snapshot>> {
    const ADDRESSES: i32 = libc::RTMGRP_LINK | libc::RTMGRP_IPV4_IFADDR | libc::RTMGRP_IPV6_IFADDR;
    const ROUTES: i32 = libc::RTMGRP_IPV4_ROUTE | libc::RTMGRP_IPV6_ROUTE;
    let routes = selection.looks_at_routes();
    let groups = if routes { ADDRESSES | ROUTES } else { ADDRESSES };
    // First, so that no change falls in between.
    let subscription = Subscription::open(NETLINK_ROUTE, groups as u32)?;
    let (told, snapshots) = watch::channel(Snapshot::take(routes)?);
    thread::Builder::new().name("lb-addresses".into()).spawn(move || {
        while !told.is_closed() {
            // Waits for a change; a failure is no reason not to look.
            if let Err(error) = subscription.wait() {
                warn!(%error, "changes of addresses may be seen late");
                thread::sleep(AGAIN);
            }
            thread::sleep(BURST);
            let snapshot = loop {
                match Snapshot::take(routes) {
                    Ok(snapshot) => break snapshot,
                    Err(error) => warn!(%error, "cannot list the node's addresses; trying again"),
                }
                thread::sleep(AGAIN);
            };
            told.send_if_modified(|known| {
                let news = *known != snapshot;
                *known = snapshot;
                news
            });
        }
    })?;
    Ok(snapshots)
}

/// Every address of every device but loopback's, now, in the network namespace of the calling thread.
///
/// # Errors
/// The system call's.
pub fn all() -> io::Result<BTreeSet<Addr>> {
    Ok(Snapshot::take(false)?.select(&Selection::default(), None))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot() -> Snapshot {
        let addresses = [
            ("lo", "127.0.0.1"),
            ("lo", "::1"),
            ("lo", "192.0.2.7"),
            ("eth0", "192.168.0.1"),
            ("eth0", "192.168.0.2"),
            ("eth0", "fd00::1"),
            ("eth0", "fe80::1"),
            ("cni0", "10.10.1.1"),
        ];
        Snapshot {
            addresses: addresses
                .map(|(device, ip)| (device.to_owned(), ip.parse().unwrap()))
                .into(),
            defaults: [(false, "eth0".to_owned()), (true, "cni0".to_owned())].into(),
        }
    }

    fn selected(devices: &[&str], wanted: &str, node: Option<&[&str]>) -> Vec<String> {
        let selection = Selection {
            devices: devices.iter().map(|&device| device.to_owned()).collect(),
            wanted: wanted.parse().unwrap(),
        };
        let node: Option<Vec<IpAddr>> = node.map(|node| node.iter().map(|ip| ip.parse().unwrap()).collect());
        let selected = snapshot().select(&selection, node.as_deref());
        selected
            .into_iter()
            .map(|addr| IpAddr::from(addr).to_string())
            .collect()
    }

    #[test]
    fn every_address_but_loopback_serves_by_default() {
        let all = [
            "10.10.1.1",
            "192.0.2.7",
            "192.168.0.1",
            "192.168.0.2",
            "fd00::1",
            "fe80::1",
        ];
        assert_eq!(selected(&[], "0.0.0.0/0,::/0", None), all);
    }

    #[test]
    fn what_narrows_nothing_is_everything() {
        let is_everything = |devices: &[&str], wanted: Wanted| {
            let devices = devices.iter().map(|&device| device.to_owned()).collect();
            Selection { devices, wanted }.is_everything()
        };
        assert!(is_everything(&[], Wanted::default()));
        for text in ["0.0.0.0/0,::/0", "0.0.0.0/0", "10.0.0.0/8,0.0.0.0/0"] {
            assert!(is_everything(&[], text.parse().unwrap()), "{text}");
            assert!(!is_everything(&["eth0"], text.parse().unwrap()), "{text}");
        }
        for text in ["10.0.0.0/8", "0.0.0.0/0,fd00::/8", "primary"] {
            assert!(!is_everything(&[], text.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn devices_and_networks_narrow_that() {
        assert_eq!(selected(&["lo"], "0.0.0.0/0", None), ["192.0.2.7"]);
        assert_eq!(selected(&[], "192.168.0.2/32,::/128", None), ["192.168.0.2"]);
        // A family without a network has all.
        assert_eq!(
            selected(&[], "192.168.0.0/24", None),
            ["192.168.0.1", "192.168.0.2", "fd00::1", "fe80::1"]
        );
        assert_eq!(selected(&["cni0"], "192.168.0.0/24,::/0", None), [""; 0]);
    }

    #[test]
    fn primary_is_what_the_node_object_says() {
        let node = ["192.168.0.2", "192.168.0.1", "fd00::1"];
        assert_eq!(selected(&[], "primary", Some(&node)), ["192.168.0.2", "fd00::1"]);
        assert_eq!(selected(&[], "primary", Some(&["203.0.113.9"])), [""; 0]);
        assert_eq!(selected(&[], "primary", None), ["192.168.0.1", "192.168.0.2"]);
    }

    #[test]
    fn what_is_no_network_is_refused() {
        for text in ["", "primary,10.0.0.0/8", "10.0.0.1/33", "eth0"] {
            assert!(text.parse::<Wanted>().is_err(), "{text}");
        }
    }
}
