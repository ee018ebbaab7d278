//! Conntrack entries and socket records, written to the pinned maps while no agent runs.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, HashMap, Map, MapData};
use lb_agent::maps::bpf::PinnedMaps;
use lb_agent::maps::ct::CtMaps;
use lb_common::abi::{
    Addr, BackendRef, CtEntry, CtKey, ServiceIndex, SocketRecord, ct_flags, ct_state, ip_protocol, map_name, map_spec,
};
use lb_common::logic::ct::reverse_key;
use lb_common::logic::record;
use lb_core::maps::Direction;
use lb_tests::monotonic_ns;
use zerocopy::IntoBytes as _;

const KEY: usize = size_of::<CtKey>();
/// Sizes of the values of CT and of socket records in this build, and in layout 3.
const FLOW: usize = size_of::<CtEntry>();
const FLOW_3: usize = map_spec::CT.smallest_value() as usize;
const RECORD: usize = size_of::<SocketRecord>();
const RECORD_3: usize = map_spec::SOCKETS.smallest_value() as usize;

/// The first cookie: a multiple of every number of slots, and above those that the kernel has assigned.
const FIRST_COOKIE: u64 = 1 << 40;

const NODE: (Addr, u16) = (Addr::from_v4([192, 0, 2, 2]), 80);
const BACKEND: (Addr, u16) = (Addr::from_v4([192, 0, 2, 3]), 8080);
const CLIENT_PORT: u16 = 1000;
/// The first backend and the first service port of new maps.
const BACKEND_REF: BackendRef = BackendRef { id: 1, generation: 1 };
const SERVICE: ServiceIndex = ServiceIndex::new(1);

/// Established TCP flows, two entries each, and records of connected TCP sockets.
pub(crate) struct Entries {
    flows: Vec<Direction>,
    records: Vec<SocketRecord>,
}

impl Entries {
    /// Creates `conntrack` entries of flows, rounded down to an even number, and `sockets` records. All of them were used now.
    pub(crate) fn new(conntrack: u32, sockets: u32) -> Self {
        let now = monotonic_ns();
        Self {
            flows: (0..conntrack / 2).flat_map(|number| flow(number, now)).collect(),
            records: (0..sockets).map(|number| record(number, now)).collect(),
        }
    }

    /// Writes them to the maps of this build that are pinned in a directory.
    pub(crate) fn write(&self, maps: &Path) -> Result<()> {
        self.write_values::<FLOW, RECORD>(maps)
    }

    /// Writes them to the maps of layout 3 that are pinned in a directory.
    pub(crate) fn write_as_layout_3(&self, maps: &Path) -> Result<()> {
        self.write_values::<FLOW_3, RECORD_3>(maps)
    }

    /// Writes the first bytes of the values: `F` of a flow, `R` of a record. Records are where programs would have stored them: the
    /// first socket of each slot is in SOCKETS, and the slot counts the others, which are in SOCKETS_MORE.
    fn write_values<const F: usize, const R: usize>(&self, maps: &Path) -> Result<()> {
        let open = |name: &str| MapData::from_pin(maps.join(name)).with_context(|| format!("opening {name}"));
        let mut ct: HashMap<_, [u8; KEY], [u8; F]> = Map::HashMap(open(map_name::CT)?).try_into()?;
        for (key, entry) in &self.flows {
            ct.insert(first::<KEY>(key.as_bytes())?, first::<F>(entry.as_bytes())?, 0)?;
        }
        let mut sockets: Array<_, [u8; R]> = Map::Array(open(map_name::SOCKETS)?).try_into()?;
        let mut more: HashMap<_, u64, [u8; R]> = Map::HashMap(open(map_name::SOCKETS_MORE)?).try_into()?;
        let slots = sockets.len();
        for (number, one) in (0..).zip(&self.records) {
            if number < slots {
                let after = self.records.len() as u32 - 1 - number;
                let one = SocketRecord {
                    spilled: after / slots,
                    ..*one
                };
                let slot = record::slot(one.cookie, slots - 1);
                sockets.set(slot, first::<R>(one.as_bytes())?, 0)?;
            } else {
                more.insert(one.cookie, first::<R>(one.as_bytes())?, 0)?;
            }
        }
        Ok(())
    }

    /// Fails unless the maps of this build that are pinned in a directory have all of them, unchanged.
    pub(crate) fn check(&self, maps: &Path) -> Result<()> {
        let flows: BTreeMap<_, _> = CtMaps::open(maps)?.established.all()?.into_iter().collect();
        let kept = self
            .flows
            .iter()
            .filter(|(key, entry)| flows.get(key) == Some(entry))
            .count();
        ensure!(
            kept == self.flows.len(),
            "{kept} of {} conntrack entries are left",
            self.flows.len()
        );
        let records = PinnedMaps::open(maps)?.sockets()?.into_iter();
        let records: BTreeMap<_, _> = records.map(|record| (record.cookie, record)).collect();
        // A move copies all records to SOCKETS_MORE, where `spilled` is zero.
        let kept = self
            .records
            .iter()
            .filter(|record| records.get(&record.cookie) == Some(*record))
            .count();
        ensure!(
            kept == self.records.len(),
            "{kept} of {} socket records are left",
            self.records.len()
        );
        Ok(())
    }
}

/// Returns both directions of an established flow.
fn flow(number: u32, seen: u64) -> [Direction; 2] {
    let [_, a, b, c] = number.to_be_bytes();
    let client = Addr::from_v4([203, a, b, c]);
    let key = CtKey {
        src: client,
        dst: NODE.0,
        src_port: CLIENT_PORT,
        dst_port: NODE.1,
        proto: ip_protocol::TCP,
        pad: [0; 3],
    };
    let request = CtEntry {
        src: client,
        dst: BACKEND.0,
        src_port: CLIENT_PORT,
        dst_port: BACKEND.1,
        backend: BACKEND_REF,
        service: SERVICE,
        seen,
        state: ct_state::SYN,
        ..CtEntry::default()
    };
    let reply = CtEntry {
        src: NODE.0,
        dst: client,
        src_port: NODE.1,
        dst_port: CLIENT_PORT,
        flags: ct_flags::REPLY | ct_flags::EGRESS,
        ..request
    };
    [(key, request), (reverse_key(&request, key.proto), reply)]
}

/// Returns the record of a connected socket.
fn record(number: u32, time: u64) -> SocketRecord {
    let cookie = FIRST_COOKIE + u64::from(number);
    SocketRecord {
        cookie,
        sequence: record::closed(0),
        netns: 1,
        time,
        original_addr: NODE.0,
        backend_addr: BACKEND.0,
        original_port: NODE.1,
        backend_port: BACKEND.1,
        backend: BACKEND_REF,
        service: SERVICE,
        socket: cookie,
        proto: ip_protocol::TCP,
        ..SocketRecord::default()
    }
}

/// Returns the first bytes of a key or a value.
fn first<const N: usize>(bytes: &[u8]) -> Result<[u8; N]> {
    bytes.first_chunk().copied().context("a value is too short")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_direction_of_a_flow_leads_to_the_other() {
        let entries = Entries::new(7, 3);
        assert_eq!((entries.flows.len(), entries.records.len()), (6, 3));
        for flow in entries.flows.chunks_exact(2) {
            let [(request, to_backend), (reply, to_client)] = flow else {
                panic!("two directions");
            };
            assert_eq!(reverse_key(to_backend, request.proto), *reply);
            assert_eq!(reverse_key(to_client, reply.proto), *request);
        }
    }

    #[test]
    fn values_of_layout_3_have_every_field_in_use() {
        assert_eq!((FLOW_3, RECORD_3), (CtEntry::USED, SocketRecord::USED));
        assert_eq!(first::<2>(&[1, 2, 3]).unwrap(), [1, 2]);
        assert!(first::<4>(&[1, 2, 3]).is_err());
    }
}
