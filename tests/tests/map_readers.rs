//! Maps that are read or changed while the other side works on them: reading as a whole while entries come and go, and
//! replacing a device while it is looked up.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use lb_agent::loader::{self, Lock, OBJECT, PinPath, SocketLb};
use lb_common::abi::{Device, SizedMap, SocketRecord, map_name};
use lb_core::maps::Capacities;
use lb_core::reconcile::Usage;
use lb_tests::{Cluster, scaled_count};
use zerocopy::IntoBytes as _;

const CAPACITIES: Capacities = Capacities::uniform(64).with(SizedMap::SocketsMore, 4096);
const RECORD: usize = size_of::<SocketRecord>();
const DEVICE: usize = size_of::<Device>();

/// Entries that exist all the time, and entries that come and go.
const STABLE: u64 = 500;
const CHANGING: u64 = 200;

fn open<const K: usize, const V: usize>(dir: &Path, name: &str) -> Result<HashMap<MapData, [u8; K], [u8; V]>> {
    let map = MapData::from_pin(dir.join(name)).with_context(|| format!("{name} is not pinned"))?;
    Ok(HashMap::try_from(Map::HashMap(map))?)
}

#[test]
fn a_map_that_changes_is_read_completely_and_each_entry_once() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let lock = Lock::take(&PinPath::new(cluster.pin_path("n1")))?;
    let maps = loader::load(OBJECT, &lock, &CAPACITIES, SocketLb::All)?;
    let dir = lock.pins().maps();
    let mut records = open::<8, RECORD>(&dir, map_name::SOCKETS_MORE)?;
    let record = |cookie: u64| {
        let value = SocketRecord {
            cookie,
            sequence: 2,
            ..SocketRecord::default()
        };
        let value: [u8; RECORD] = zerocopy::transmute!(value);
        value
    };
    for cookie in 1..=STABLE {
        records.insert(cookie.to_ne_bytes(), record(cookie), 0)?;
    }
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let changes = scope.spawn(|| -> Result<()> {
            let cookies = 10_000..10_000 + CHANGING;
            while !stop.load(Ordering::Relaxed) {
                for cookie in cookies.clone() {
                    records.insert(cookie.to_ne_bytes(), record(cookie), 0)?;
                }
                for cookie in cookies.clone() {
                    records.remove(&cookie.to_ne_bytes())?;
                }
            }
            Ok(())
        });
        let read = || -> Result<()> {
            for _ in 0..scaled_count(300) {
                let used = maps.pinned().used(SizedMap::SocketsMore, &Usage::default())? as u64;
                ensure!(
                    (STABLE..=STABLE + CHANGING).contains(&used),
                    "{used} entries were counted"
                );
                let listed: Vec<u64> = maps.pinned().sockets()?.iter().map(|record| record.cookie).collect();
                let cookies: BTreeSet<u64> = listed.iter().copied().collect();
                ensure!(cookies.len() == listed.len(), "a record was listed twice");
                ensure!(
                    (1..=STABLE).all(|cookie| cookies.contains(&cookie)),
                    "a record is missing"
                );
            }
            Ok(())
        };
        let result = read();
        stop.store(true, Ordering::Relaxed);
        changes.join().expect("the thread does not panic")?;
        result
    })
}

#[test]
fn a_device_that_is_replaced_is_found_by_every_lookup() -> Result<()> {
    const DEVICES: u32 = 4000;
    let cluster = Cluster::builder().nodes(1).build()?;
    let lock = Lock::take(&PinPath::new(cluster.pin_path("n1")))?;
    let mut maps = loader::load(OBJECT, &lock, &CAPACITIES, SocketLb::All)?;
    let dir = lock.pins().maps();
    let device = |round: u32| Device {
        v4: IpAddr::from(Ipv4Addr::from(0x0a00_0000 + round)).into(),
        v6: IpAddr::from(Ipv6Addr::from(u128::from(round) << 64 | u128::from(round))).into(),
        ..Device::default()
    };
    let mut wanted: BTreeMap<u32, Device> = (1..=DEVICES).map(|index| (index, device(index))).collect();
    assert_eq!(maps.write_devices(&wanted)?, 0);
    let (stop, missed, looked_up) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        let lookups = scope.spawn(|| -> Result<()> {
            let devices = open::<4, DEVICE>(&dir, map_name::DEVICES)?;
            while !stop.load(Ordering::Relaxed) {
                for index in 1..=DEVICES {
                    let found = devices.get(&index.to_ne_bytes(), 0).is_ok();
                    missed.fetch_add(u64::from(!found), Ordering::Relaxed);
                    looked_up.fetch_add(1, Ordering::Relaxed);
                }
            }
            Ok(())
        });
        let mut replace = || -> Result<()> {
            for round in 1..=scaled_count(20) as u32 {
                for (index, value) in &mut wanted {
                    *value = device(DEVICES + round * index);
                }
                assert_eq!(maps.write_devices(&wanted)?, 0);
            }
            Ok(())
        };
        let result = replace();
        stop.store(true, Ordering::Relaxed);
        lookups.join().expect("the thread does not panic")?;
        result
    })?;
    println!(
        "{} lookups, {} missed",
        looked_up.load(Ordering::Relaxed),
        missed.load(Ordering::Relaxed)
    );
    assert_eq!(
        missed.load(Ordering::Relaxed),
        0,
        "lookups missed a device that was replaced"
    );
    assert_eq!(maps.pinned().devices()?, wanted);
    // What is not wanted any more is deleted, and an even sequence is left in every value.
    wanted.retain(|index, _| *index <= 10);
    maps.write_devices(&wanted)?;
    assert_eq!(maps.pinned().devices()?, wanted);
    let devices = open::<4, DEVICE>(&dir, map_name::DEVICES)?;
    for (index, device) in &wanted {
        let value = devices.get(&index.to_ne_bytes(), 0)?;
        let is: Device = zerocopy::transmute!(value);
        assert!(
            is.sequence > 0 && is.sequence.is_multiple_of(2),
            "{index}: {}",
            is.sequence
        );
        assert_eq!((is.v4.as_bytes(), is.v6), (device.v4.as_bytes(), device.v6));
    }
    Ok(())
}
