//! `service list` and `backend list`: rows joined from the pinned maps.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use lb_common::abi::{BackendRef, Frontend, FrontendKind, Name, Service, ServiceIndex, backend_flags};
use lb_common::logic::generation;
use serde::Serialize;

use super::{Format, ReadArgs, output};
use lb_core::maps::Dump;
use lb_core::names::{ServicePortName, port_id};
use lb_core::places::Places;

/// Whether a frontend or a service port is as the agent wants it, by the pinned maps alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    /// Named in NAMES, but not completely written or not completely removed.
    Pending,
    /// Complete: NAMES and SERVICES have the same generation, and a frontend leads here.
    Done,
    /// NOTICES has a problem of it.
    Error,
}

impl Status {
    fn label(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Done => "done",
            Self::Error => "error",
        }
    }

    /// Derives the status of a service port. `frontends`: those that lead to it.
    fn of_port(name: &Name, service: &Service, frontends: &[FrontendRow], problems: &Places) -> Self {
        if port_id(name).is_some_and(|id| problems.has_port(&id))
            || frontends.iter().any(|row| row.status == Self::Error)
        {
            return Self::Error;
        }
        let is_written = generation::is_live(service.generation) && service.generation == name.generation;
        if is_written && !frontends.is_empty() {
            Self::Done
        } else {
            Self::Pending
        }
    }
}

#[derive(Debug, Clone, Serialize)]
struct FrontendRow {
    address: IpAddr,
    port: u16,
    kind: String,
    status: Status,
}

#[derive(Debug, Serialize)]
struct ServiceRow {
    #[serde(flatten)]
    owner: ServicePortName,
    index: u32,
    generation: u32,
    status: Status,
    frontends: Vec<FrontendRow>,
    /// Number of members of the cluster set.
    backends: u16,
    /// Number of members of the internal set, which serves cluster IPs.
    internal: u16,
    /// Number of members of the external set, which serves external addresses.
    external: u16,
    affinity_timeout: u32,
    connections: u64,
    refused: u64,
}

/// Returns the frontends by service index, without address marks.
fn frontends(dump: &Dump, problems: &Places) -> BTreeMap<ServiceIndex, Vec<FrontendRow>> {
    let mut all: BTreeMap<ServiceIndex, Vec<FrontendRow>> = BTreeMap::new();
    for (key, Frontend { service, kind, .. }) in &dump.frontends {
        let known = FrontendKind::from_u8(*kind);
        if known.is_some_and(FrontendKind::is_mark) {
            continue;
        }
        let owner = dump.names.get(service).and_then(port_id);
        let has_problem = problems.has_frontend(owner.as_ref(), key);
        let is_written = dump
            .service(*service)
            .is_some_and(|service| generation::is_live(service.generation));
        all.entry(*service).or_default().push(FrontendRow {
            status: match (has_problem, is_written) {
                (true, _) => Status::Error,
                (false, true) => Status::Done,
                (false, false) => Status::Pending,
            },
            address: key.addr.into(),
            port: key.port,
            kind: known.map_or_else(|| format!("unknown ({kind})"), |kind| kind.label().into()),
        });
    }
    all
}

pub(super) fn services(args: &ReadArgs) -> anyhow::Result<()> {
    let maps = args.pin.open()?;
    let dump = maps.dump()?;
    let problems = Places::of(&maps.problems()?);
    let mut frontends = frontends(&dump, &problems);
    let mut rows = Vec::new();
    for (index, name) in &dump.names {
        let Some(service) = dump.service(*index) else {
            continue;
        };
        let stats = maps.stats(*index)?;
        let frontends = frontends.remove(index).unwrap_or_default();
        rows.push(ServiceRow {
            owner: ServicePortName::of(Some(name)),
            index: index.get(),
            generation: service.generation,
            status: Status::of_port(name, service, &frontends, &problems),
            frontends,
            backends: service.cluster.len,
            internal: service.internal.len,
            external: service.external.len,
            affinity_timeout: service.affinity_timeout,
            connections: stats.connections,
            refused: stats.refused,
        });
    }
    let unwritten = unwritten(&dump, &problems);
    let notes = notes(unwritten.len(), maps.state().map_or(0, |state| state.more_problems));
    rows.extend(unwritten);
    rows.sort_by_key(|row| row.owner.to_string());
    let header = [
        "SERVICE",
        "PROTOCOL",
        "STATUS",
        "FRONTENDS",
        "BACKENDS",
        "CONNECTIONS",
        "REFUSED",
    ];
    output::rows(args.output, header, &rows, |row| {
        let frontends: Vec<_> = row
            .frontends
            .iter()
            .map(|f| match f.status {
                Status::Done => format!("{}:{} ({})", f.address, f.port, f.kind),
                status => format!("{}:{} ({}, {})", f.address, f.port, f.kind, status.label()),
            })
            .collect();
        [
            row.owner.to_string(),
            row.owner.protocol.clone(),
            row.status.label().into(),
            frontends.join(", "),
            row.backends.to_string(),
            row.connections.to_string(),
            row.refused.to_string(),
        ]
    })?;
    match args.output {
        Format::Json => notes.iter().for_each(|note| output::warn(note)),
        Format::Table => notes.iter().try_for_each(|note| output::print(note))?,
    }
    Ok(())
}

/// Returns rows of the service ports that NOTICES names and NAMES does not have. All their numbers are zero.
fn unwritten(dump: &Dump, problems: &Places) -> Vec<ServiceRow> {
    let written: BTreeSet<_> = dump.names.values().filter_map(port_id).collect();
    let unwritten = problems.ports().into_iter().filter(|id| !written.contains(id));
    let rows = unwritten.map(|id| ServiceRow {
        owner: ServicePortName::from(&id),
        index: 0,
        generation: 0,
        status: Status::Error,
        frontends: Vec::new(),
        backends: 0,
        internal: 0,
        external: 0,
        affinity_timeout: 0,
        connections: 0,
        refused: 0,
    });
    rows.collect()
}

/// Returns lines about what the rows do not contain: the number of service ports that are not written, and the number of
/// problems that NOTICES has no room for.
fn notes(unwritten: usize, unlisted_problems: u32) -> Vec<String> {
    let ports = match unwritten {
        0 => None,
        1 => Some("1 service port is not written: `lb-agent status` has the reason".to_owned()),
        n => Some(format!(
            "{n} service ports are not written: `lb-agent status` has the reasons"
        )),
    };
    let unlisted = match unlisted_problems {
        0 => None,
        1 => Some("1 more problem is only in the log of the agent: another service port may not be written".to_owned()),
        n => Some(format!(
            "{n} more problems are only in the log of the agent: further service ports may not be written"
        )),
    };
    ports.into_iter().chain(unlisted).collect()
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
    /// The sets that contain the backend.
    sets: Vec<&'static str>,
    local: bool,
    /// Whether no set contains the backend: it keeps established connections and gets no new ones.
    draining: bool,
    /// Number of sockets connected to the backend.
    sockets: usize,
}

pub(super) fn backends(args: &ReadArgs) -> anyhow::Result<()> {
    let maps = args.pin.open()?;
    let dump = maps.dump()?;
    let mut connected: HashMap<BackendRef, usize> = HashMap::new();
    for record in maps.sockets()? {
        *connected.entry(record.backend).or_default() += 1;
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
                sockets: connected
                    .get(&BackendRef {
                        id,
                        generation: backend.generation,
                    })
                    .copied()
                    .unwrap_or(0),
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

#[cfg(test)]
mod tests {
    use super::*;
    use lb_core::names::name_of;

    fn row(status: Status) -> FrontendRow {
        FrontendRow {
            address: [10, 96, 0, 1].into(),
            port: 80,
            kind: "ClusterIP".into(),
            status,
        }
    }

    #[test]
    fn a_service_port_is_done_if_all_maps_agree() {
        let id = lb_core::names::PortId {
            service: lb_core::model::ObjectKey::new("default", "web"),
            port_name: "".into(),
            protocol: lb_core::model::Protocol::Tcp,
            ipv6: false,
        };
        let written = generation::taken(0);
        let name = name_of(&id, 80, written);
        let service = |generation| Service {
            generation,
            ..Service::default()
        };
        let none = Places::default();
        let done = [row(Status::Done)];
        let status = |service: Service, frontends: &[FrontendRow], problems: &Places| {
            Status::of_port(&name, &service, frontends, problems)
        };
        assert_eq!(status(service(written), &done, &none), Status::Done);
        assert_eq!(status(service(written), &[], &none), Status::Pending, "no frontend");
        assert_eq!(status(service(0), &done, &none), Status::Pending, "not written");
        let problem = Places::from_iter(["Service default/web TCP IPv4"]);
        assert_eq!(status(service(written), &done, &problem), Status::Error);
        assert_eq!(status(service(written), &[row(Status::Error)], &none), Status::Error);
        let of_frontend = Places::from_iter(["Service default/web TCP IPv4, frontend 10.96.0.9:80/TCP"]);
        assert_eq!(
            status(service(written), &done, &of_frontend),
            Status::Error,
            "not in FRONTENDS"
        );
        let of_service = Places::from_iter(["Service default/web"]);
        assert_eq!(status(service(written), &done, &of_service), Status::Error);
        let of_longer = Places::from_iter(["Service default/web2"]);
        assert_eq!(status(service(written), &done, &of_longer), Status::Done);
        let of_another = Places::from_iter(["Service default/web TCP IPv6"]);
        assert_eq!(status(service(written), &done, &of_another), Status::Done);
    }

    #[test]
    fn service_ports_without_room_have_rows_and_are_counted() {
        let mut dump = Dump::default();
        let places = Places::from_iter(["Service default/s8 TCP IPv4", "Service default/s9 port dns UDP IPv6"]);
        let rows = unwritten(&dump, &places);
        let text: Vec<_> = rows.iter().map(|row| (row.owner.to_string(), row.status)).collect();
        let expected = [
            ("default/s8:?".to_owned(), Status::Error),
            ("default/s9:dns".to_owned(), Status::Error),
        ];
        assert_eq!(text, expected);
        let id = places.ports().into_iter().next().unwrap();
        dump.names
            .insert(ServiceIndex::new(1), name_of(&id, 80, generation::taken(0)));
        assert_eq!(unwritten(&dump, &places).len(), 1, "one of them is written");
        assert_eq!(notes(0, 0), [""; 0]);
        assert_eq!(
            notes(8, 0),
            ["8 service ports are not written: `lb-agent status` has the reasons"]
        );
        assert!(notes(8, 28)[1].starts_with("28 more problems are only in the log"));
    }
}
