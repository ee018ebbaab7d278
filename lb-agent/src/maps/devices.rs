//! DEVICES, and the SNAT ports in CONFIG.

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::ops::RangeInclusive;

use lb_common::abi::{Config, Device, DeviceSwap, map_name, program_name};
use lb_core::maps::MapError;
use zerocopy::IntoBytes as _;

use super::batch::read_hash;
use super::bpf::{BPF_NOEXIST, BpfMaps, DEVICE, PinnedMaps, call, errno, is_missing};

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
        let there = self.pinned.devices()?;
        for gone in there.keys().filter(|index| !wanted.contains_key(index)) {
            self.pinned
                .devices
                .remove(&gone.to_ne_bytes())
                .or_else(|e| if is_missing(&e) { Ok(()) } else { Err(e) })
                .map_err(call(map_name::DEVICES, "BPF_MAP_DELETE_ELEM"))?;
        }
        let mut missing = 0;
        for (index, device) in wanted {
            match there.get(index) {
                Some(is) if is == device => {}
                Some(_) => self.replace_device(*index, *device)?,
                None => missing += usize::from(!self.insert_device(*index, *device)?),
            }
        }
        Ok(missing)
    }

    /// Inserts an entry, and returns whether it fits.
    fn insert_device(&mut self, index: u32, device: Device) -> Result<bool, MapError> {
        let value: [u8; DEVICE] = zerocopy::transmute!(device);
        match self.pinned.devices.insert(index.to_ne_bytes(), value, BPF_NOEXIST) {
            Ok(()) => Ok(true),
            Err(error) if errno(&error) == Some(libc::E2BIG) => Ok(false),
            Err(error) => Err(call(map_name::DEVICES, "BPF_MAP_UPDATE_ELEM")(error)),
        }
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
