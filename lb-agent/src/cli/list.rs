//! `service list` and `backend list`: the pinned maps, joined.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use lb_common::abi::{Frontend, FrontendKey, FrontendKind, backend_flags};
use lb_common::logic::generation;
use serde::Serialize;

use super::{ReadArgs, output};
use lb_core::maps::Dump;
use lb_core::names::ServicePortName;

#[derive(Debug, Clone, Serialize)]
struct FrontendRow {
    address: IpAddr,
    port: u16,
    kind: String,
}

#[derive(Debug, Serialize)]
struct ServiceRow {
    #[serde(flatten)]
    owner: ServicePortName,
    index: u32,
    generation: u32,
    frontends: Vec<FrontendRow>,
    /// Members of the whole-cluster set.
    backends: u16,
    /// Members of the set that serves cluster IPs.
    internal: u16,
    /// Members of the set that serves external addresses.
    external: u16,
    affinity_timeout: u32,
    connections: u64,
    refused: u64,
}

/// Frontends by service index.
fn frontends(dump: &Dump) -> BTreeMap<u32, Vec<FrontendRow>> {
    let mut all: BTreeMap<u32, Vec<FrontendRow>> = BTreeMap::new();
    for (FrontendKey { addr, port, .. }, Frontend { service, kind, .. }) in &dump.frontends {
        let known = FrontendKind::from_u8(*kind);
        if known.is_some_and(FrontendKind::is_mark) {
            continue;
        }
        all.entry(*service).or_default().push(FrontendRow {
            address: (*addr).into(),
            port: *port,
            kind: known.map_or_else(|| format!("unknown ({kind})"), |kind| kind.label().into()),
        });
    }
    all
}

pub(super) fn services(args: &ReadArgs) -> anyhow::Result<()> {
    let maps = args.pin.open()?;
    let dump = maps.dump()?;
    let mut frontends = frontends(&dump);
    let mut rows = Vec::new();
    for (index, name) in &dump.names {
        let Some(service) = dump.services.get(*index as usize) else {
            continue;
        };
        let stats = maps.stats(*index)?;
        rows.push(ServiceRow {
            owner: ServicePortName::of(Some(name)),
            index: *index,
            generation: service.generation,
            frontends: frontends.remove(index).unwrap_or_default(),
            backends: service.cluster.len,
            internal: service.internal.len,
            external: service.external.len,
            affinity_timeout: service.affinity_timeout,
            connections: stats.connections,
            refused: stats.refused,
        });
    }
    rows.sort_by_key(|row| row.owner.to_string());
    let header = ["SERVICE", "PROTOCOL", "FRONTENDS", "BACKENDS", "CONNECTIONS", "REFUSED"];
    output::rows(args.output, header, &rows, |row| {
        let frontends: Vec<_> = row
            .frontends
            .iter()
            .map(|f| format!("{}:{} ({})", f.address, f.port, f.kind))
            .collect();
        [
            row.owner.to_string(),
            row.owner.protocol.clone(),
            frontends.join(", "),
            row.backends.to_string(),
            row.connections.to_string(),
            row.refused.to_string(),
        ]
    })
}

#[derive(Debug, Serialize)]
struct BackendRow {
    #[serde(flatten)]
    owner: ServicePortName,
    address: IpAddr,
    /// Port of the backend.
    backend_port: u16,
    id: u32,
    generation: u32,
    /// Sets that it is a member of.
    sets: Vec<&'static str>,
    local: bool,
    /// In no set: it serves what it has, and gets nothing new.
    draining: bool,
    /// Sockets that are connected to it.
    sockets: usize,
}

pub(super) fn backends(args: &ReadArgs) -> anyhow::Result<()> {
    let maps = args.pin.open()?;
    let dump = maps.dump()?;
    let mut connected: HashMap<(u32, u32), usize> = HashMap::new();
    for record in maps.sockets()? {
        *connected.entry((record.backend, record.generation)).or_default() += 1;
    }
    let mut rows: Vec<_> = (0_u32..)
        .zip(&dump.backends)
        .filter(|(_, backend)| generation::is_live(backend.generation))
        .map(|(id, backend)| {
            let bits = [
                (backend_flags::INTERNAL, "internal"),
                (backend_flags::EXTERNAL, "external"),
                (backend_flags::CLUSTER, "cluster"),
            ];
            let sets: Vec<_> = bits
                .iter()
                .filter(|(bit, _)| backend.flags & bit != 0)
                .map(|(_, name)| *name)
                .collect();
            BackendRow {
                owner: ServicePortName::of(dump.names.get(&backend.service)),
                address: backend.addr.into(),
                backend_port: backend.port,
                id,
                generation: backend.generation,
                draining: sets.is_empty(),
                sets,
                local: backend.flags & backend_flags::LOCAL != 0,
                sockets: connected.get(&(id, backend.generation)).copied().unwrap_or(0),
            }
        })
        .collect();
    rows.sort_by_key(|row| (row.owner.to_string(), row.address, row.backend_port));
    let header = ["SERVICE", "BACKEND", "ID", "NODE", "STATE", "SOCKETS"];
    output::rows(args.output, header, &rows, |row| {
        [
            row.owner.to_string(),
            std::net::SocketAddr::new(row.address, row.backend_port).to_string(),
            row.id.to_string(),
            if row.local { "this" } else { "other" }.into(),
            if row.draining { "draining" } else { "used" }.into(),
            row.sockets.to_string(),
        ]
    })
}
