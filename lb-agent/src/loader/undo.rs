//! Reverting changes to a node other than pins: filters at devices and reserved ports, which the pinned maps record.

use std::collections::BTreeSet;
use std::io;

use lb_common::abi::device_flags;
use tracing::warn;

use super::{LoadError, PinPath, tc};
use crate::maps::bpf::PinnedMaps;
use crate::node::links::LinkSnapshot;
use crate::node::netns::Namespaces;
use crate::node::ports::{PortRange, ReservedPorts};

fn failed(call: &'static str) -> impl FnOnce(io::Error) -> LoadError {
    move |source| LoadError::Call {
        path: "(node)".into(),
        call,
        source,
    }
}

/// Reverts the changes in the network namespace of the agent that made them, if that namespace can be found.
pub(super) fn undo(pins: &PinPath) -> Result<(), LoadError> {
    // Without maps of this layout, there is nothing to revert.
    let Ok(maps) = PinnedMaps::open(&pins.maps()) else {
        return Ok(());
    };
    let mut namespaces = Namespaces::new().map_err(failed("reading /proc"))?;
    let own = namespaces.own();
    let netns = maps.state().map_or(own, |state| state.netns);
    let visit = namespaces.visit(&BTreeSet::from([netns]), |_| undo_here(&maps));
    for (path, error) in visit.refused {
        warn!(path = %path.display(), %error, "cannot look for the agent's network namespace: filters may stay there");
    }
    visit.visited.into_values().collect()
}

/// Reverts the changes in the network namespace of the calling thread.
fn undo_here(maps: &PinnedMaps) -> Result<(), LoadError> {
    let devices = maps.devices()?;
    let own_qdiscs = devices
        .into_iter()
        .filter(|(_, device)| device.flags & device_flags::OWN_QDISC != 0)
        .map(|(index, _)| index)
        .collect();
    let there = LinkSnapshot::take(false).map_err(failed("listing devices"))?;
    tc::remove_all_filters(there.indexes(), &own_qdiscs)?;
    let ports = maps
        .snat_ports()
        .filter(|_| maps.state().is_some_and(|state| state.own_ports != 0));
    if let Some((first, last)) = ports.map(std::ops::RangeInclusive::into_inner) {
        let released = ReservedPorts::new().release(PortRange { first, last });
        if let Err(error) = released {
            warn!(%error, "the ports {first}-{last} stay in net.ipv4.ip_local_reserved_ports");
        }
    }
    Ok(())
}
