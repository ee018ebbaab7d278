//! DEVICES, and the SNAT ports in CONFIG.

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::ops::RangeInclusive;

use lb_common::abi::{Config, Device, DeviceSwap, map_name, program_name};
use lb_core::maps::MapError;
use lb_core::sync::Writes;
use zerocopy::IntoBytes as _;

use super::batch::read_hash;
use super::bpf::{BPF_NOEXIST, BpfMaps, DEVICE, PinnedMaps, delete_all, insert_all};

impl PinnedMaps {
    /// Returns DEVICES, by interface index. [`Device::sequence`] is zero in every value.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails.
    pub fn devices(&self) -> Result<BTreeMap<u32, Device>, MapError> {
        let mut all: BTreeMap<u32, Device> = read_hash(map_name::DEVICES, &self.devices)?;
        for device in all.values_mut() {
            device.sequence = 0;
        }
        Ok(all)
    }

    /// Returns the SNAT ports; `None` if there are none.
    #[must_use]
    pub fn snat_ports(&self) -> Option<RangeInclusive<u16>> {
        self.config().snat_ports()
    }

    /// Writes the SNAT ports for the programs, by one store.
    pub fn write_snat_ports(&self, ports: Option<RangeInclusive<u16>>) {
        const {
            assert!(offset_of!(Config, snat_first) == 4 && offset_of!(Config, snat_last) == 6);
        }
        let (first, last) = ports.map_or((1, 0), RangeInclusive::into_inner);
        let [a, b] = first.to_ne_bytes();
        let [c, d] = last.to_ne_bytes();
        let word = u32::from_ne_bytes([a, b, c, d]);
        // `trace` writes the other half of the word.
        self.config
            .update_u32(0, offset_of!(Config, snat_first), |_| Some(word));
    }
}

impl BpfMaps {
    /// Makes DEVICES equal to `wanted`, and returns the number of devices that did not fit.
    ///
    /// An entry that exists is replaced in place by the agent call `lb_device_swap`. The map API would replace the element
    /// of the hash, and a lookup in between would miss it.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails, and [`MapError::Unexpected`] if an entry disappeared meanwhile.
    pub fn write_devices(&mut self, wanted: &BTreeMap<u32, Device>) -> Result<usize, MapError> {
        let name = map_name::DEVICES;
        let writes = Writes::between(self.pinned.devices()?, wanted);
        // Deletions come first, so that a full map has room.
        let gone = writes.deletes.iter().map(|index| index.to_ne_bytes());
        delete_all(name, &mut self.pinned.devices, gone)?;
        for (index, device) in writes.stores {
            self.replace_device(index, device)?;
        }
        let new = writes.inserts.into_iter();
        let new = new.map(|(index, device)| {
            let value: [u8; DEVICE] = zerocopy::transmute!(device);
            (index.to_ne_bytes(), value)
        });
        insert_all(name, &mut self.pinned.devices, new, BPF_NOEXIST)
    }

    /// Replaces an entry in place.
    fn replace_device(&self, index: u32, value: Device) -> Result<(), MapError> {
        let map = map_name::DEVICES;
        let request = DeviceSwap { index, pad: 0, value };
        let call = "BPF_PROG_TEST_RUN of lb_device_swap";
        let done = self
            .run(program_name::DEVICE_SWAP, request.as_bytes())
            .map_err(|source| MapError::Call { map, call, source })?;
        if done {
            return Ok(());
        }
        Err(MapError::Unexpected {
            map,
            what: format!("interface {index} does not exist, so it cannot be replaced in place"),
        })
    }
}
