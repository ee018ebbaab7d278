//! Devices of the node in `status`: attached programs, and the source addresses of forwarded packets.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::Context as _;
use lb_common::abi::{Addr, Device};
use nix::net::if_::if_indextoname;
use serde::Serialize;

use super::{Format, output};
use crate::loader::{self, DeviceProgram, PinPath};
use crate::maps::bpf::PinnedMaps;
use crate::node::netns::Namespaces;

#[derive(Debug, Serialize)]
pub(super) struct DeviceRow {
    name: String,
    index: u32,
    /// `tcx` or `clsact`; `None` if no programs are attached.
    attached: Option<&'static str>,
    ingress: Option<ProgramAt>,
    egress: Option<ProgramAt>,
    source_v4: Option<IpAddr>,
    source_v6: Option<IpAddr>,
}

#[derive(Debug, Serialize)]
struct ProgramAt {
    id: u32,
    tag: String,
}

impl From<DeviceProgram> for ProgramAt {
    fn from(at: DeviceProgram) -> Self {
        Self {
            id: at.program,
            tag: format!("{:016x}", at.tag),
        }
    }
}

/// Returns the devices in the agent's network namespace.
pub(super) fn rows(maps: &PinnedMaps, pins: &PinPath) -> anyhow::Result<Vec<DeviceRow>> {
    let mut namespaces = Namespaces::new().context("reading /proc")?;
    let netns = maps.state().map_or(namespaces.own(), |state| state.netns);
    let visit = namespaces.visit(&BTreeSet::from([netns]), |_| rows_here(maps, pins));
    if let Some((path, error)) = visit.refused.into_iter().next() {
        let path = path.display().to_string();
        return Err(anyhow::Error::new(error).context(format!("entering the agent's network namespace: {path}")));
    }
    let rows = visit.visited.into_values().next();
    rows.unwrap_or_else(|| Ok(Vec::new()))
}

/// Returns the devices in the network namespace of the calling thread.
fn rows_here(maps: &PinnedMaps, pins: &PinPath) -> anyhow::Result<Vec<DeviceRow>> {
    let devices = maps.devices()?;
    let at = loader::at_devices(pins, devices.keys().copied())?;
    let rows = at.into_iter().map(|(index, [ingress, egress])| {
        let Device { v4, v6, .. } = devices.get(&index).copied().unwrap_or_default();
        let source = |addr: Addr| (addr != Addr::UNSPECIFIED).then(|| addr.into());
        let name = if_indextoname(index).map_or_else(|_| "?".into(), |name| name.to_string_lossy().into_owned());
        DeviceRow {
            name,
            index,
            attached: ingress.as_ref().or(egress.as_ref()).map(|at| at.way.name()),
            ingress: ingress.map(Into::into),
            egress: egress.map(Into::into),
            source_v4: source(v4),
            source_v6: source(v6),
        }
    });
    Ok(rows.collect())
}

pub(super) fn print(rows: &[DeviceRow]) -> anyhow::Result<()> {
    let dash = || "-".to_owned();
    let program = |at: &Option<ProgramAt>| at.as_ref().map_or_else(dash, |at| at.id.to_string());
    let source = |ip: Option<IpAddr>| ip.map_or_else(dash, |ip| ip.to_string());
    output::rows(
        Format::Table,
        [
            "DEVICE",
            "INDEX",
            "ATTACHED",
            "INGRESS",
            "EGRESS",
            "SOURCE",
            "SOURCE (IPV6)",
        ],
        rows,
        |row| {
            [
                row.name.clone(),
                row.index.to_string(),
                row.attached.unwrap_or("no").to_owned(),
                program(&row.ingress),
                program(&row.egress),
                source(row.source_v4),
                source(row.source_v6),
            ]
        },
    )
}
