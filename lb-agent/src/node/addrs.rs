//! The addresses of this node that serve node ports.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use lb_common::abi::Addr;

use super::devices::Patterns;
use super::links::LinkSnapshot;

/// `--nodeport-addresses`: which of the node's addresses serve node ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// Addresses in these networks. A family without a network in the list uses all of its addresses.
    Within(Vec<IpNet>),
    /// The first address of each family in the Node object of this node. Without such an object, the addresses of the
    /// devices that have a default route.
    Primary,
}

/// A word of `--nodeport-addresses` that is neither `primary` nor a network.
#[derive(Debug, thiserror::Error)]
#[error("neither \"primary\" nor a network such as 10.0.0.0/8")]
pub struct NodePortAddressesError;

/// All addresses.
impl Default for NodePortAddresses {
    fn default() -> Self {
        Self::Within(Vec::new())
    }
}

impl FromStr for NodePortAddresses {
    type Err = NodePortAddressesError;

    fn from_str(text: &str) -> Result<Self, NodePortAddressesError> {
        if text == "primary" {
            return Ok(Self::Primary);
        }
        let networks = text
            .split(',')
            .map(|word| word.trim().parse().map_err(|_| NodePortAddressesError));
        networks.collect::<Result<_, _>>().map(Self::Within)
    }
}

/// Which addresses serve node ports; all by default.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Selection {
    /// Devices by name.
    pub devices: Patterns,
    /// Addresses.
    pub wanted: NodePortAddresses,
}

impl Selection {
    /// Whether every address is selected, including addresses that are added later.
    #[must_use]
    pub fn is_everything(&self) -> bool {
        let all = match &self.wanted {
            NodePortAddresses::Within(networks) => [false, true].into_iter().all(|v6| {
                let mut family = networks.iter().filter(|net| net.addr().is_ipv6() == v6).peekable();
                family.peek().is_none() || family.any(|net| net.prefix_len() == 0)
            }),
            NodePortAddresses::Primary => false,
        };
        all && self.devices.is_empty()
    }

    /// Whether the selection depends on default routes. A node may have very many routes: they are not listed without
    /// need.
    #[must_use]
    pub fn looks_at_routes(&self) -> bool {
        self.wanted == NodePortAddresses::Primary
    }
}

impl LinkSnapshot {
    /// Every address of every device except loopback.
    #[must_use]
    pub fn own_addresses(&self) -> BTreeSet<Addr> {
        self.select(&Selection::default(), None)
    }

    /// The addresses that serve node ports; `node` are those in the Node object of this node.
    ///
    /// Loopback is not included: the programs handle it, since every network namespace has its own.
    #[must_use]
    pub fn select(&self, selection: &Selection, node: Option<&[IpAddr]>) -> BTreeSet<Addr> {
        let Selection { devices, wanted } = selection;
        let is_wanted = |device: u32, ip: IpAddr| match (wanted, node) {
            (NodePortAddresses::Within(networks), _) => {
                let mut family = networks
                    .iter()
                    .filter(|net| net.addr().is_ipv6() == ip.is_ipv6())
                    .peekable();
                family.peek().is_none() || family.any(|net| net.contains(&ip))
            }
            (NodePortAddresses::Primary, Some(node)) => node.iter().find(|a| a.is_ipv6() == ip.is_ipv6()) == Some(&ip),
            (NodePortAddresses::Primary, None) => self.defaults.contains(&(ip.is_ipv6(), device)),
        };
        let links = self.links.iter().filter(|(_, link)| devices.select(&link.name));
        let addresses = links.flat_map(|(index, link)| link.addresses.iter().map(|address| (*index, address.ip)));
        let selected = addresses.filter(|(index, ip)| !ip.is_loopback() && is_wanted(*index, *ip));
        selected.map(|(_, ip)| Addr::from(ip)).collect()
    }
}

/// The [own addresses](LinkSnapshot::own_addresses) of the network namespace of the calling thread, now.
///
/// # Errors
/// Returns the error of the system call.
pub fn all() -> io::Result<BTreeSet<Addr>> {
    Ok(LinkSnapshot::take(false)?.own_addresses())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot() -> LinkSnapshot {
        let mut snapshot = LinkSnapshot::of(&[
            ("lo", &["127.0.0.1", "::1", "192.0.2.7"]),
            ("eth0", &["192.168.0.1", "192.168.0.2", "fd00::1", "fe80::1"]),
            ("cni0", &["10.10.1.1"]),
        ]);
        snapshot.defaults = [(false, 2), (true, 3)].into();
        snapshot
    }

    fn selected(devices: &[&str], wanted: &str, node: Option<&[&str]>) -> Vec<String> {
        let selection = Selection {
            devices: Patterns::new(devices),
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
        let own = snapshot().own_addresses();
        assert_eq!(own, all.map(|ip| ip.parse::<IpAddr>().unwrap().into()).into());
    }

    #[test]
    fn what_narrows_nothing_is_everything() {
        let is_everything = |devices: &[&str], wanted: NodePortAddresses| {
            let devices = Patterns::new(devices);
            Selection { devices, wanted }.is_everything()
        };
        assert!(is_everything(&[], NodePortAddresses::default()));
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
        assert_eq!(selected(&["l?", "c*"], "0.0.0.0/0", None), ["10.10.1.1", "192.0.2.7"]);
        assert_eq!(selected(&[], "192.168.0.2/32,::/128", None), ["192.168.0.2"]);
        // A family without a network uses all addresses.
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
            assert!(text.parse::<NodePortAddresses>().is_err(), "{text}");
        }
    }
}
