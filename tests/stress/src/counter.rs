//! A program that counts packets at a network device, as a program of another product may do.

use anyhow::{Context as _, Result};
use aya::maps::{Array, MapData};
use aya::programs::tc::{NlOptions, TcAttachOptions};
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfLoader};
use lb_common::abi::map_name;
use lb_probe::{COUNT, COUNTER};

use crate::probe::OBJECT;

/// The loaded program. Dropping this detaches it from its devices.
pub struct Counter {
    programs: Ebpf,
    count: Array<MapData, u64>,
}

impl Counter {
    /// Loads the program.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn load() -> Result<Self> {
        let mut loader = EbpfLoader::new();
        // The maps of the other program in the object.
        for name in [
            map_name::FRONTENDS,
            map_name::SERVICES,
            map_name::BACKEND_SLOTS,
            map_name::BACKENDS,
        ] {
            loader.map_max_entries(name, 1);
        }
        let mut programs = loader.load(OBJECT).context("loading the counter")?;
        let count = programs.take_map(COUNT).context("the object has no map COUNT")?;
        let mut counter = Self {
            programs,
            count: count.try_into()?,
        };
        counter.program()?.load().context("loading the counter")?;
        Ok(counter)
    }

    fn program(&mut self) -> Result<&mut SchedClassifier> {
        let program = self.programs.program_mut(COUNTER);
        Ok(program.context("the object has no counter program")?.try_into()?)
    }

    /// Attaches the program after all others to the ingress of a device in the calling thread's network namespace: by tcx, or
    /// by a filter with a priority in an existing clsact qdisc.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn attach(&mut self, device: &str, priority: Option<u16>) -> Result<()> {
        let options = match priority {
            None => TcAttachOptions::TcxOrder(LinkOrder::last()),
            Some(priority) => TcAttachOptions::Netlink(NlOptions {
                priority,
                ..NlOptions::default()
            }),
        };
        let attached = self
            .program()?
            .attach_with_options(device, TcAttachType::Ingress, options);
        attached.context("attaching the counter").map(drop)
    }

    /// Returns the number of counted packets.
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn count(&self) -> Result<u64> {
        self.count.get(&0, 0).context("reading the counter")
    }
}
