//! DEVICES, and the part of CONFIG that says which ports packets to other nodes get.

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::ops::RangeInclusive;

use lb_common::abi::{Config, Device, map_name};

use super::bpf::{DEVICE, PinnedMaps, call, errno, is_missing, read_hash};
use lb_core::maps::MapError;

impl PinnedMaps {
    /// DEVICES, by index of the interface.
    ///
    /// # Errors
    /// The system call's.
    pub fn devices(&self) -> Result<BTreeMap<u32, Device>, MapError> {
        read_hash(map_name::DEVICES, &self.devices)
    }

    /// Makes DEVICES hold these; how many did not fit.
    ///
    /// # Errors
    /// The system call's.
    pub fn write_devices(&mut self, wanted: &BTreeMap<u32, Device>) -> Result<usize, MapError> {
        let there = self.devices()?;
        for gone in there.keys().filter(|index| !wanted.contains_key(index)) {
            self.devices
                .remove(&gone.to_ne_bytes())
                .or_else(|e| if is_missing(&e) { Ok(()) } else { Err(e) })
                .map_err(call(map_name::DEVICES, "BPF_MAP_DELETE_ELEM"))?;
        }
        let mut missing = 0;
        for (index, device) in wanted.iter().filter(|(index, device)| there.get(index) != Some(device)) {
            missing += usize::from(!self.write_device(*index, *device)?);
        }
        Ok(missing)
    }

    /// False where it does not fit.
    fn write_device(&mut self, index: u32, device: Device) -> Result<bool, MapError> {
        let value: [u8; DEVICE] = zerocopy::transmute!(device);
        match self.devices.insert(index.to_ne_bytes(), value, 0) {
            Ok(()) => Ok(true),
            Err(error) if errno(&error) == Some(libc::E2BIG) => Ok(false),
            Err(error) => Err(call(map_name::DEVICES, "BPF_MAP_UPDATE_ELEM")(error)),
        }
    }

    /// The ports that packets to other nodes get; `None` where they get none.
    #[must_use]
    pub fn snat_ports(&self) -> Option<RangeInclusive<u16>> {
        let Config {
            snat_first, snat_last, ..
        } = self.config();
        (snat_first != 0 && snat_first <= snat_last).then_some(snat_first..=snat_last)
    }

    /// Tells the programs which ports those are, by one store.
    pub fn write_snat_ports(&self, ports: Option<RangeInclusive<u16>>) {
        const {
            assert!(offset_of!(Config, snat_first) == 4 && offset_of!(Config, snat_last) == 6);
        }
        let (first, last) = ports.map_or((1, 0), RangeInclusive::into_inner);
        let [a, b] = first.to_ne_bytes();
        let [c, d] = last.to_ne_bytes();
        let word = u32::from_ne_bytes([a, b, c, d]);
        // The other half of the word is that of who traces.
        self.config
            .update_u32(0, offset_of!(Config, snat_first), |_| Some(word));
    }
}
