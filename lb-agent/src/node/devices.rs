//! Selects the devices that programs are attached to, and the source address of packets that lb sends out by a device.

use std::collections::BTreeMap;
use std::net::IpAddr;

use lb_common::abi::{Addr, Device, device_flags};
use wildmatch::WildMatch;

use super::links::{Kind, Link, LinkSnapshot};

/// `--devices`: names of devices, in which `*` stands for any text and `?` for one character. An empty list selects all
/// devices that lb serves by default.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Patterns(Vec<WildMatch>);

impl Patterns {
    /// Creates patterns from names.
    #[must_use]
    pub fn new(names: &[impl AsRef<str>]) -> Self {
        Self(names.iter().map(|name| WildMatch::new(name.as_ref())).collect())
    }

    /// Whether the list is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a device has one of the names.
    #[must_use]
    pub fn select(&self, name: &str) -> bool {
        self.0.is_empty() || self.0.iter().any(|pattern| pattern.matches(name))
    }
}

/// Form of the packets of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// Packets begin with a link-layer header.
    Link,
    /// Packets begin with the IP header (tun, WireGuard).
    Network,
}

/// A device that programs are attached to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Served {
    /// Its current name.
    pub name: String,
    /// Form of its packets.
    pub layer: Layer,
}

/// Whether programs are attached to a device. Socket hooks serve loopback; packets that arrive by a port of a bridge
/// are seen at the bridge if they are for the node or beyond, and packets from port to port are not translated.
fn is_served(link: &Link, patterns: &Patterns) -> bool {
    match link.kind {
        Kind::Loopback => false,
        Kind::Dummy | Kind::Bridge | Kind::Other if !patterns.is_empty() => patterns.select(&link.name),
        Kind::Dummy => false,
        Kind::Bridge | Kind::Other => !link.is_port && link.name != "kube-ipvs0",
    }
}

impl LinkSnapshot {
    /// The devices that programs are attached to, by index.
    #[must_use]
    pub fn served(&self, patterns: &Patterns) -> BTreeMap<u32, Served> {
        let served = self.links.iter().filter(|(_, link)| is_served(link, patterns));
        served.map(|(index, link)| (*index, link.served())).collect()
    }

    /// Indexes of all devices.
    pub fn indexes(&self) -> impl Iterator<Item = u32> {
        self.links.keys().copied()
    }

    /// The desired contents of DEVICES: every device by which a packet may leave. `node` has the addresses in the Node
    /// object of this node.
    #[must_use]
    pub fn sources(&self, node: &[IpAddr]) -> BTreeMap<u32, Device> {
        let [v4, v6] = [false, true].map(|v6| self.primary(v6, node).unwrap_or_default());
        let out = self.links.iter().filter(|(_, link)| link.kind != Kind::Loopback);
        out.map(|(index, link)| {
            let device = Device {
                v4: link.source(false).unwrap_or(v4),
                v6: link.source(true).unwrap_or(v6),
                flags: if link.kind == Kind::Bridge {
                    device_flags::BRIDGE
                } else {
                    0
                },
                ..Device::default()
            };
            (*index, device)
        })
        .collect()
    }

    /// The node's address of a family: the first address in its Node object that it really has; else the address of the
    /// device by which packets leave for other networks; else the address of any device.
    fn primary(&self, v6: bool, node: &[IpAddr]) -> Option<Addr> {
        let is_own = |ip: IpAddr| {
            let mut own = self.links.values().flat_map(|link| &link.addresses);
            own.any(|address| address.is_global && address.ip == ip)
        };
        let of_object = node.iter().find(|ip| ip.is_ipv6() == v6 && is_own(**ip));
        let of_way_out = || self.links.get(self.way_out.get(&v6)?)?.source(v6);
        let of_any = || self.links.values().find_map(|link| link.source(v6));
        of_object.map(|ip| Addr::from(*ip)).or_else(of_way_out).or_else(of_any)
    }
}

impl Link {
    fn served(&self) -> Served {
        Served {
            name: self.name.clone(),
            layer: if self.has_link_header {
                Layer::Link
            } else {
                Layer::Network
            },
        }
    }

    /// The source address, in one family, of packets that leave by this device.
    fn source(&self, v6: bool) -> Option<Addr> {
        let global = self.addresses.iter().filter(|a| a.ip.is_ipv6() == v6 && a.is_global);
        // `min_by_key` returns the first of equal elements: the kernel's order decides.
        global.min_by_key(|a| a.is_secondary).map(|a| Addr::from(a.ip))
    }
}

#[cfg(test)]
mod tests {
    use super::super::links::Address;
    use super::*;

    /// A device: name, kind, whether it is a port.
    fn device(name: &str, kind: Kind, is_port: bool) -> Link {
        Link {
            name: name.to_owned(),
            kind,
            has_link_header: true,
            is_port,
            addresses: Vec::new(),
        }
    }

    #[test]
    fn which_devices_are_served() {
        let devices = [
            device("lo", Kind::Loopback, false),
            device("eth0", Kind::Other, false),
            device("cni0", Kind::Other, false),
            device("flannel.1", Kind::Other, false),
            // A port of the bridge, and the veth of a pod that is in no bridge.
            device("veth1", Kind::Other, true),
            device("cali7", Kind::Other, false),
            device("dummy0", Kind::Dummy, false),
            device("kube-ipvs0", Kind::Other, false),
        ];
        let cases: [(&[&str], &[&str]); 7] = [
            (&[], &["eth0", "cni0", "flannel.1", "cali7"]),
            (&["eth0"], &["eth0"]),
            (&["eth*", "flannel.?"], &["eth0", "flannel.1"]),
            // A name overrides the kind, except for loopback.
            (&["veth?", "dummy0"], &["veth1", "dummy0"]),
            (
                &["*"],
                &["eth0", "cni0", "flannel.1", "veth1", "cali7", "dummy0", "kube-ipvs0"],
            ),
            (&["lo"], &[]),
            (&["eth"], &[]),
        ];
        for (patterns, expected) in cases {
            let patterns = Patterns::new(patterns);
            let served: Vec<_> = devices.iter().filter(|link| is_served(link, &patterns)).collect();
            let names: Vec<_> = served.iter().map(|link| link.name.as_str()).collect();
            assert_eq!(names, expected, "{patterns:?}");
        }
    }

    #[test]
    fn what_has_no_link_layer_has_other_programs() {
        let mut snapshot = LinkSnapshot::of(&[("eth0", &["192.168.0.1"]), ("wg0", &["10.9.0.1"])]);
        snapshot.links.get_mut(&2).unwrap().has_link_header = false;
        let layers: Vec<_> = snapshot.served(&Patterns::default()).into_values().collect();
        assert_eq!(
            layers.iter().map(|s| s.layer).collect::<Vec<_>>(),
            [Layer::Link, Layer::Network]
        );
    }

    /// The source addresses of a device, as text; `-` if there is none.
    fn sources(snapshot: &LinkSnapshot, node: &[&str], index: u32) -> [String; 2] {
        let node: Vec<IpAddr> = node.iter().map(|ip| ip.parse().unwrap()).collect();
        let device = snapshot.sources(&node)[&index];
        [device.v4, device.v6].map(|addr| match addr {
            Addr::UNSPECIFIED => "-".to_owned(),
            addr => IpAddr::from(addr).to_string(),
        })
    }

    fn snapshot() -> LinkSnapshot {
        let mut snapshot = LinkSnapshot::of(&[
            ("lo", &["127.0.0.1", "::1"]),
            ("cni0", &["10.10.1.1"]),
            ("eth0", &["fe80::1", "192.168.0.1", "192.168.0.2", "fd00::1"]),
            ("cali7", &["fe80::7", "169.254.1.1"]),
        ]);
        snapshot.way_out = [(false, 3)].into();
        snapshot
    }

    #[test]
    fn a_packet_gets_the_address_of_the_device_it_leaves_by() {
        let snapshot = snapshot();
        assert_eq!(sources(&snapshot, &[], 3), ["192.168.0.1", "fd00::1"]);
        // The Node object does not matter if the device has an address.
        assert_eq!(sources(&snapshot, &["192.168.0.2"], 3), ["192.168.0.1", "fd00::1"]);
        assert_eq!(sources(&snapshot, &[], 2), ["10.10.1.1", "fd00::1"]);
        assert_eq!(
            snapshot.sources(&[]).into_keys().collect::<Vec<_>>(),
            [2, 3, 4],
            "not lo"
        );
    }

    #[test]
    fn a_device_without_an_address_has_the_node_s() {
        let snapshot = snapshot();
        // The address of the device with the default route, and without a default route any address.
        assert_eq!(sources(&snapshot, &[], 4), ["192.168.0.1", "fd00::1"]);
        let node = ["203.0.113.9", "192.168.0.2", "10.10.1.1"];
        assert_eq!(sources(&snapshot, &node, 4), ["192.168.0.2", "fd00::1"]);
        assert_eq!(sources(&snapshot, &["203.0.113.9"], 4), ["192.168.0.1", "fd00::1"]);
        let bare = LinkSnapshot::of(&[("lo", &["127.0.0.1"]), ("eth0", &["fe80::1"])]);
        assert_eq!(sources(&bare, &[], 2), ["-", "-"]);
        // An address for others may stand on loopback.
        let anycast = LinkSnapshot::of(&[("lo", &["127.0.0.1", "192.0.2.7"]), ("eth0", &[])]);
        assert_eq!(sources(&anycast, &[], 2), ["192.0.2.7", "-"]);
    }

    #[test]
    fn addresses_that_may_not_be_used_are_not() {
        let mut snapshot = LinkSnapshot::of(&[("eth0", &["fd00::1", "fd00::2", "fd00::3"])]);
        let set = |snapshot: &mut LinkSnapshot, at: usize, change: fn(&mut Address)| {
            change(&mut snapshot.links.get_mut(&1).unwrap().addresses[at]);
        };
        set(&mut snapshot, 0, |a| a.is_global = false);
        assert_eq!(sources(&snapshot, &[], 1)[1], "fd00::2");
        // A temporary address only if there is no other.
        set(&mut snapshot, 1, |a| a.is_secondary = true);
        assert_eq!(sources(&snapshot, &[], 1)[1], "fd00::3");
        set(&mut snapshot, 2, |a| a.is_global = false);
        assert_eq!(sources(&snapshot, &[], 1)[1], "fd00::2");
    }
}
