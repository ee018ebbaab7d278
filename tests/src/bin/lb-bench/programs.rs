//! The compared programs, which are lb's, equal ones in C, the floor, and empty ones, and the kernel's statistics of their
//! runs.

use std::fs::File;
use std::process::{Command, Stdio};
use std::{fs, io::Write as _};

use anyhow::{Context as _, Result, bail, ensure};
use aya::programs::{CgroupAttachMode, Program, ProgramInfo};
use aya::{Ebpf, EbpfLoader};
use lb_agent::loader::PinPath;
use lb_common::abi::{SOCKETS_MASK_GLOBAL, map_name, program_name};
use lb_tests::Netns;
use serde::Serialize;

/// Source of the C, floor and empty programs for sockets.
pub(crate) const SOURCE: &str = include_str!("../../../bench/sockets.bpf.c");
/// Header that the C sources include.
const HEADER: &str = include_str!("../../../bench/lb.h");

/// Name of the C compiler.
pub(crate) const CLANG: &str = "clang";

/// Maps of lb that the C programs use.
const SHARED: [&str; 13] = [
    map_name::FRONTENDS,
    map_name::FILTER,
    map_name::SERVICES,
    map_name::BACKEND_SLOTS,
    map_name::BACKENDS,
    map_name::NODE_ADDRS,
    map_name::SOCKETS,
    map_name::SOCKETS_MORE,
    map_name::UDP_FLOWS,
    map_name::AFFINITY,
    map_name::STATS,
    map_name::DROPS,
    map_name::CONFIG,
];

/// Maker of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Maker {
    Lb,
    /// Programs in C that do the work of lb's.
    C,
    /// Programs in C that do the least that a load balancer can do, only at the hooks of `connect()` and for TCP.
    Floor,
    Empty,
}

impl Maker {
    pub(crate) const ALL: [Self; 4] = [Self::Lb, Self::C, Self::Floor, Self::Empty];

    /// Returns whether the programs count connections in STATS.
    pub(crate) fn counts_connections(self) -> bool {
        match self {
            Self::Lb | Self::C => true,
            Self::Floor | Self::Empty => false,
        }
    }
}

/// Nanoseconds per run of each maker's program, one value per round.
#[derive(Debug, Default)]
pub(crate) struct Rounds([Vec<f64>; Maker::ALL.len()]);

impl Rounds {
    pub(crate) fn add(&mut self, maker: Maker, nanoseconds: f64) {
        self.0[maker as usize].push(nanoseconds);
    }

    pub(crate) fn of(&self, maker: Maker) -> impl Iterator<Item = f64> {
        self.0[maker as usize].iter().copied()
    }

    /// Returns the nanoseconds per run above the empty program of the round.
    pub(crate) fn above_empty(&self, maker: Maker) -> impl Iterator<Item = f64> {
        self.of(maker)
            .zip(self.of(Maker::Empty))
            .map(|(own, empty)| own - empty)
    }

    /// Returns the ratios of lb to another maker, both above the empty program of the round.
    pub(crate) fn ratios_to(&self, other: Maker) -> impl Iterator<Item = f64> {
        let (lb, other) = (self.above_empty(Maker::Lb), self.above_empty(other));
        lb.zip(other).map(|(lb, other)| lb / other)
    }
}

/// A cgroup hook of [`program_name`] that the benchmarks reach; they bind no port of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Hook {
    Connect4,
    Connect6,
    Sendmsg4,
    Sendmsg6,
    Recvmsg4,
    Recvmsg6,
    Getpeername4,
    Getpeername6,
    SockRelease,
}

impl Hook {
    const ALL: [Self; 9] = [
        Self::Connect4,
        Self::Connect6,
        Self::Sendmsg4,
        Self::Sendmsg6,
        Self::Recvmsg4,
        Self::Recvmsg6,
        Self::Getpeername4,
        Self::Getpeername6,
        Self::SockRelease,
    ];

    /// Returns the name of lb's program at this hook.
    fn program_of_lb(self) -> &'static str {
        match self {
            Self::Connect4 => program_name::CONNECT4,
            Self::Connect6 => program_name::CONNECT6,
            Self::Sendmsg4 => program_name::SENDMSG4,
            Self::Sendmsg6 => program_name::SENDMSG6,
            Self::Recvmsg4 => program_name::RECVMSG4,
            Self::Recvmsg6 => program_name::RECVMSG6,
            Self::Getpeername4 => program_name::GETPEERNAME4,
            Self::Getpeername6 => program_name::GETPEERNAME6,
            Self::SockRelease => program_name::SOCK_RELEASE,
        }
    }

    /// Returns the name of the hook: that of lb's program without its prefix.
    pub(crate) fn label(self) -> &'static str {
        let program = self.program_of_lb();
        program.strip_prefix("lb_").unwrap_or(program)
    }

    /// Returns whether a maker has a program at this hook.
    pub(crate) fn has_program(self, maker: Maker) -> bool {
        match maker {
            Maker::Lb | Maker::C | Maker::Empty => true,
            Maker::Floor => matches!(self, Self::Connect4 | Self::Connect6),
        }
    }

    /// Returns the name of a maker's program at this hook.
    fn program(self, maker: Maker) -> String {
        match maker {
            Maker::Lb => self.program_of_lb().to_owned(),
            Maker::C => format!("c_{}", self.label()),
            Maker::Floor => format!("floor_{}", self.label()),
            Maker::Empty => format!("empty_{}", self.label()),
        }
    }
}

/// Compiles C programs.
pub(crate) fn compile(source: &str) -> Result<Vec<u8>> {
    let scratch = tempfile::tempdir().context("making a scratch directory")?;
    let object = scratch.path().join("programs.bpf.o");
    fs::write(scratch.path().join("lb.h"), HEADER).context("writing a header")?;
    let mut clang = Command::new(CLANG)
        .args(["-target", "bpf", "-O2", "-g", "-mcpu=v3", "-x", "c", "-c", "-", "-o"])
        .arg(&object)
        .arg("-I")
        .arg(scratch.path())
        .stdin(Stdio::piped())
        .spawn()
        .context("starting clang")?;
    let written = clang.stdin.take().map(|mut stdin| stdin.write_all(source.as_bytes()));
    let status = clang.wait().context("waiting for clang")?;
    ensure!(status.success(), "clang: {status}");
    written.transpose().context("writing to clang")?;
    fs::read(&object).with_context(|| format!("reading {}", object.display()))
}

/// Loads the C programs on the pinned maps. `sockets` is the number of slots in SOCKETS.
pub(crate) fn load(object: &[u8], pins: &PinPath, sockets: u32) -> Result<Ebpf> {
    let mut loader = EbpfLoader::new();
    for name in SHARED {
        loader.map_pin_path(name, pins.maps().join(name));
    }
    let mask = sockets - 1;
    loader
        .override_global(SOCKETS_MASK_GLOBAL, &mask, true)
        .load(object)
        .context("loading the C programs")
}

/// Attaches the C programs of one maker to a pod's cgroup, for as long as `programs` lives.
pub(crate) fn attach(programs: &mut Ebpf, maker: Maker, netns: &Netns) -> Result<()> {
    let cgroup = open_cgroup(netns)?;
    for hook in Hook::ALL.into_iter().filter(|hook| hook.has_program(maker)) {
        attach_one(programs, &hook.program(maker), &cgroup)?;
    }
    Ok(())
}

/// Opens the cgroup of a pod's processes.
pub(crate) fn open_cgroup(netns: &Netns) -> Result<File> {
    let path = netns.process_cgroup().context("the place has no cgroup")?;
    File::open(path).with_context(|| format!("opening {}", path.display()))
}

/// Loads a C program and attaches it to a cgroup, until it is unloaded.
pub(crate) fn attach_one(programs: &mut Ebpf, name: &str, cgroup: &File) -> Result<()> {
    match program_mut(programs, name)? {
        Program::CgroupSockAddr(program) => {
            program.load()?;
            program.attach(cgroup, CgroupAttachMode::Single)?;
        }
        Program::CgroupSock(program) => {
            program.load()?;
            program.attach(cgroup, CgroupAttachMode::Single)?;
        }
        _ => bail!("{name} is of another type"),
    }
    Ok(())
}

/// Detaches and unloads a C program; it can be attached again.
pub(crate) fn unload(programs: &mut Ebpf, name: &str) -> Result<()> {
    match program_mut(programs, name)? {
        Program::CgroupSockAddr(program) => program.unload()?,
        Program::CgroupSock(program) => program.unload()?,
        _ => bail!("{name} is of another type"),
    }
    Ok(())
}

fn program_mut<'a>(programs: &'a mut Ebpf, name: &str) -> Result<&'a mut Program> {
    programs.program_mut(name).with_context(|| format!("no program {name}"))
}

/// The kernel's counters of a program's runs, which count while statistics are enabled.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Runs {
    pub(crate) number: u64,
    pub(crate) nanoseconds: u64,
}

impl Runs {
    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            number: self.number - before.number,
            nanoseconds: self.nanoseconds - before.nanoseconds,
        }
    }

    /// Returns the nanoseconds per run.
    pub(crate) fn cost(self) -> f64 {
        self.nanoseconds as f64 / self.number as f64
    }
}

/// Returns the counters of a maker's program at a hook.
pub(crate) fn runs(programs: &Ebpf, maker: Maker, hook: Hook) -> Result<Runs> {
    runs_of(programs, &hook.program(maker))
}

/// Returns the counters of a loaded program, by its name.
pub(crate) fn runs_of(programs: &Ebpf, name: &str) -> Result<Runs> {
    let info = info(programs, name)?;
    Ok(Runs {
        number: info.run_count(),
        nanoseconds: u64::try_from(info.run_time().as_nanos())?,
    })
}

fn info(programs: &Ebpf, name: &str) -> Result<ProgramInfo> {
    let program = programs.program(name).with_context(|| format!("no program {name}"))?;
    program
        .info()
        .with_context(|| format!("reading the program info of {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn c_source_has_every_program_and_map() {
        for hook in Hook::ALL {
            for maker in [Maker::C, Maker::Floor, Maker::Empty] {
                let is_defined = SOURCE.contains(&format!(" {}(", hook.program(maker)));
                assert_eq!(is_defined, hook.has_program(maker), "{hook:?} {maker:?}");
            }
        }
        for map in SHARED {
            let declared = format!("}} {map} SEC(\".maps\");");
            assert!([SOURCE, HEADER].iter().any(|text| text.contains(&declared)), "{map}");
        }
    }

    #[test]
    fn cost_is_time_per_run_between_two_readings() {
        let runs = |number, nanoseconds| Runs { number, nanoseconds };
        assert!((runs(30, 900).since(runs(10, 100)).cost() - 40.0).abs() < 1e-9);
    }
}
