//! The addresses that belong to nodes, and the networks that are inside the cluster. Pure.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use ipnet::{IpNet, Ipv4Net};
use lb_common::abi::{Addr, cluster_flags};

use crate::maps::prefix::{Prefix, covers_v4, normal};
use crate::model::Node;

/// Addresses and networks that a change of Nodes touched.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TouchedNodes {
    /// Addresses that became, or ceased to be, addresses of a node.
    pub addresses: BTreeSet<Addr>,
    /// Keys of CLUSTER_CIDRS.
    pub cidrs: BTreeSet<Prefix<Addr>>,
}

/// Number of reasons for each flag of a network. A network can have several: a Node, addresses, and settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct FlagReasons {
    /// Reasons for [`cluster_flags::INSIDE`].
    inside: u32,
    /// Reasons for [`cluster_flags::HERE`].
    here: u32,
}

impl FlagReasons {
    fn flags(self) -> u32 {
        let flag = |count, flag| if count > 0 { flag } else { 0 };
        flag(self.inside, cluster_flags::INSIDE) | flag(self.here, cluster_flags::HERE)
    }
}

/// All Nodes, and this node's own addresses. The cost of a change follows the number of addresses and networks that it
/// touches.
///
/// Inside the cluster are this node's addresses, its pods (`spec.podCIDRs` of its own Node), and the configured
/// networks. Pods of other nodes count as outside when they send to this node, as any other machine does: their own
/// node did not translate the packet.
#[derive(Debug, Default)]
pub struct Nodes {
    /// Addresses of this node's devices.
    own: BTreeSet<Addr>,
    /// Number of Nodes that have each address.
    others: HashMap<Addr, u32>,
    /// [`normal`] networks. In their order, a network comes before all networks inside it.
    networks: BTreeMap<IpNet, FlagReasons>,
}

/// All of IPv4. If an IPv6 network covers it, it has an entry of its own, so that IPv4 addresses do not get the flags
/// of that network.
const ALL_V4: IpNet = IpNet::V4(Ipv4Net::new_assert(std::net::Ipv4Addr::UNSPECIFIED, 0));

impl Nodes {
    /// Creates the record without Nodes and addresses. `inside`: networks that are inside the cluster.
    #[must_use]
    pub fn new(inside: &[IpNet]) -> Self {
        let mut new = Self::default();
        for net in inside {
            new.count_reason(*net, cluster_flags::INSIDE, true, &mut TouchedNodes::default());
        }
        new
    }

    /// Returns whether an address belongs to this node or to any Node.
    #[must_use]
    pub fn has_address(&self, addr: Addr) -> bool {
        self.own.contains(&addr) || self.others.contains_key(&addr)
    }

    /// Replaces the addresses of this node, except loopback addresses, which are ignored.
    pub fn set_own(&mut self, own: BTreeSet<Addr>, touched: &mut TouchedNodes) {
        let own: BTreeSet<Addr> = own.into_iter().filter(|addr| !is_loopback(*addr)).collect();
        let before = std::mem::take(&mut self.own);
        for (addr, is_there) in before
            .difference(&own)
            .map(|gone| (*gone, false))
            .chain(own.difference(&before).map(|new| (*new, true)))
        {
            self.count_reason(
                IpNet::from(std::net::IpAddr::from(addr)),
                cluster_flags::INSIDE,
                is_there,
                touched,
            );
            touched.addresses.insert(addr);
        }
        self.own = own;
    }

    /// Replaces, adds or removes a Node. `is_own`: whether it is the Node of this node.
    pub fn update(&mut self, before: Option<&Node>, now: Option<&Node>, is_own: bool, touched: &mut TouchedNodes) {
        if let (Some(before), Some(now)) = (before, now)
            && (&before.addresses, &before.pod_cidrs) == (&now.addresses, &now.pod_cidrs)
        {
            return;
        }
        // New addresses and networks first, so that those that stay are never removed.
        for (node, is_there) in [(now, true), (before, false)] {
            let Some(node) = node else { continue };
            for addr in &node.addresses {
                let addr = Addr::from(*addr);
                count(self.others.entry(addr).or_default(), is_there);
                touched.addresses.insert(addr);
            }
            if !is_own {
                // Pods of other nodes count as outside.
                continue;
            }
            for net in &node.pod_cidrs {
                self.count_reason(*net, cluster_flags::INSIDE | cluster_flags::HERE, is_there, touched);
            }
        }
        for addr in before.into_iter().flat_map(|node| &node.addresses) {
            let addr = Addr::from(*addr);
            if self.others.get(&addr) == Some(&0) {
                self.others.remove(&addr);
            }
        }
    }

    /// Adds or removes one reason for flags of a network.
    fn count_reason(&mut self, net: IpNet, flags: u32, add: bool, touched: &mut TouchedNodes) {
        let net = normal(net);
        let mut entry = match self.networks.entry(net) {
            Entry::Occupied(entry) => entry,
            Entry::Vacant(entry) => entry.insert_entry(FlagReasons::default()),
        };
        let reasons = entry.get_mut();
        let before = reasons.flags();
        if flags & cluster_flags::INSIDE != 0 {
            count(&mut reasons.inside, add);
        }
        if flags & cluster_flags::HERE != 0 {
            count(&mut reasons.here, add);
        }
        let now = reasons.flags();
        if now == 0 {
            entry.remove();
        }
        if now == before {
            return;
        }
        touched.cidrs.insert(net.into());
        touched.cidrs.extend(self.within(net).map(|net| Prefix::from(*net)));
        if covers_v4(&net) {
            touched.cidrs.insert(ALL_V4.into());
        }
    }

    /// Returns the networks inside a network, including itself.
    fn within(&self, net: IpNet) -> impl Iterator<Item = &IpNet> {
        let all = self.networks.range(net..).map(|(inner, _)| inner);
        all.take_while(move |inner| net.contains(*inner))
    }

    /// Returns the flags of a network in CLUSTER_CIDRS; `None` if it has no entry there. An address gets the flags of
    /// the longest network that contains it, so each entry includes the flags of the networks around it.
    #[must_use]
    pub fn flags(&self, cidr: &Prefix<Addr>) -> Option<u32> {
        let net = cidr.network()?;
        let is_barrier = net == ALL_V4 && self.networks.keys().any(covers_v4);
        if !is_barrier && !self.networks.contains_key(&net) {
            return None;
        }
        let around = std::iter::successors(Some(net), IpNet::supernet);
        Some(
            around
                .filter_map(|net| self.networks.get(&net))
                .fold(0, |flags, reasons| flags | reasons.flags()),
        )
    }

    /// Returns all entries of CLUSTER_CIDRS.
    pub fn cidrs(&self) -> impl Iterator<Item = (Prefix<Addr>, u32)> {
        let all: BTreeSet<Prefix<Addr>> = self.networks.keys().chain([&ALL_V4]).map(|net| (*net).into()).collect();
        all.into_iter().filter_map(|cidr| Some((cidr, self.flags(&cidr)?)))
    }
}

/// Counts one more, or one less.
fn count(counter: &mut u32, add: bool) {
    *counter = if add { *counter + 1 } else { counter.saturating_sub(1) };
}

fn is_loopback(addr: Addr) -> bool {
    std::net::IpAddr::from(addr).is_loopback()
}
