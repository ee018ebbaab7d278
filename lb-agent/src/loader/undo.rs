//! Reverting changes to a node other than pins: filters at devices and reserved ports, which the pinned maps record.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::path::Path;

use lb_common::abi::{Device, VERSION, device_flags};
use tracing::warn;

use super::{LoadError, PinPath, failed, tc};
use crate::maps::old::OldMaps;
use crate::node::links::LinkSnapshot;
use crate::node::netns::Namespaces;
use crate::node::ports::{PortRange, ReservedPorts};

/// Reverts the changes in the network namespace of the agent that made them, if that namespace can be found.
pub(super) fn undo(pins: &PinPath) -> Result<(), LoadError> {
    let layouts = pins.other_layouts()?.into_iter().chain([VERSION]);
    layouts
        .map(|layout| pins.maps_of(layout))
        .try_for_each(|maps| undo_from(&maps))
}

/// Reverts the changes that the maps in a directory record, if they can be read.
fn undo_from(maps: &Path) -> Result<(), LoadError> {
    let maps = OldMaps::open(maps)?;
    let (Ok(devices), Ok(config)) = (maps.devices(), maps.config()) else {
        return Ok(());
    };
    let state = maps.state()?;
    let mut namespaces = Namespaces::new().map_err(failed("(node)", "reading /proc"))?;
    let own = namespaces.own();
    let netns = state.map_or(own, |state| state.netns);
    let ports = config
        .snat_ports()
        .filter(|_| state.is_some_and(|state| state.own_ports != 0));
    let visit = namespaces.visit(&BTreeSet::from([netns]), |_| undo_here(&devices, ports.clone()));
    for (path, error) in visit.refused {
        warn!(path = %path.display(), %error, "cannot look for the agent's network namespace: filters may stay there");
    }
    visit.visited.into_values().collect()
}

/// Reverts the changes in the network namespace of the calling thread. `ports` are those that the agent reserved.
fn undo_here(devices: &BTreeMap<u32, Device>, ports: Option<RangeInclusive<u16>>) -> Result<(), LoadError> {
    let own_qdiscs = devices
        .iter()
        .filter(|(_, device)| device.flags & device_flags::OWN_QDISC != 0)
        .map(|(index, _)| *index)
        .collect();
    let there = LinkSnapshot::take(false).map_err(failed("(node)", "listing devices"))?;
    tc::remove_all_filters(there.indexes(), &own_qdiscs)?;
    if let Some((first, last)) = ports.map(RangeInclusive::into_inner) {
        let released = ReservedPorts::new().release(PortRange { first, last });
        if let Err(error) = released {
            warn!(%error, "the ports {first}-{last} stay in net.ipv4.ip_local_reserved_ports");
        }
    }
    Ok(())
}
