//! The kernel programs themselves: the verifier's verdict, the layout of their maps, and their code where it matters.

use anyhow::{Context as _, Result, ensure};
use lb_agent::loader::{self, Lock, OBJECT, PinPath};
use lb_agent::maps::Capacities;
use lb_tests::Cluster;
use object::{Object as _, ObjectSection as _, ObjectSymbol as _, RelocationTarget};

const CAPACITIES: Capacities = Capacities {
    services: 16,
    frontends: 16,
    backends: 16,
    backend_slots: 16,
    sockets: 16,
    sockets_more: 16,
};

/// Instructions that the verifier may walk through in one program; it gives up at 1,000,000.
const LIMIT: u32 = 20_000;

#[test]
fn the_verifier_accepts_every_program_and_maps_are_laid_out_as_the_loader_expects() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let pins = PinPath::new(cluster.pin_path("n1"));
    let lock = Lock::take(&pins)?;
    let maps = loader::load(OBJECT, &lock, &CAPACITIES)?;
    let mut names = Vec::new();
    for program in loader::verified(maps.programs())? {
        let verified = program
            .verified
            .context("this kernel does not tell verified instructions")?;
        println!(
            "{:<20} tag {:016x}  {verified:>6} instructions verified  {:>6} bytes",
            program.name,
            program.tag,
            program.size.unwrap_or(0)
        );
        ensure!(
            verified <= LIMIT,
            "{}: {verified} instructions are more than {LIMIT}",
            program.name
        );
        names.push(program.name);
    }
    names.sort();
    assert_eq!(
        names,
        ["lb_connect4", "lb_frontend_swap", "lb_getpeername4", "lb_sock_release"]
    );
    drop(maps);
    // The second start compares every pinned map with what it expects, and takes them over.
    loader::load(OBJECT, &lock, &CAPACITIES)?;
    // Another size is no reason to refuse: what is pinned is kept.
    let larger = Capacities {
        frontends: 32,
        ..CAPACITIES
    };
    let maps = loader::load(OBJECT, &lock, &larger)?;
    assert_eq!(maps.pinned().capacities(), CAPACITIES);
    drop((maps, lock));
    assert!(loader::cleanup(&pins)?);
    assert!(!pins.root().exists());
    Ok(())
}

/// An eBPF instruction: opcode, registers (source in the upper half), offset and immediate.
struct Instruction {
    opcode: u8,
    source: u8,
    immediate: i32,
}

fn instructions(code: &[u8]) -> Vec<Instruction> {
    code.chunks_exact(8)
        .map(|i| Instruction {
            opcode: i[0],
            source: i[1] >> 4,
            immediate: i32::from_le_bytes([i[4], i[5], i[6], i[7]]),
        })
        .collect()
}

/// A set word is published by one 8-byte store; whoever reads base and length by two loads could see halves of two
/// sets.
#[test]
fn a_set_word_is_read_by_one_load() -> Result<()> {
    const CALL: u8 = 0x85;
    const LOAD_CLASS: u8 = 0x01;
    const LOAD_8_BYTES: u8 = 0x79;
    const FRAME_POINTER: u8 = 10;
    const LOOKUP: i32 = 1;
    let object = object::File::parse(OBJECT)?;
    let section = object.section_by_name("cgroup/connect4").context("no connect4")?;
    let code = instructions(section.data()?);
    let mut lookups = 0;
    for (at, relocation) in section.relocations() {
        let RelocationTarget::Symbol(symbol) = relocation.target() else {
            continue;
        };
        if object.symbol_by_index(symbol)?.name()? != "SERVICES" {
            continue;
        }
        lookups += 1;
        let rest = &code[usize::try_from(at)? / 8..];
        let lookup = rest.iter().position(|i| i.opcode == CALL).context("no lookup")?;
        assert_eq!(rest[lookup].immediate, LOOKUP);
        let rest = &rest[lookup + 1..];
        let next_call = rest
            .iter()
            .position(|i| i.opcode == CALL)
            .context("nothing after the lookup")?;
        let loads: Vec<_> = rest[..next_call]
            .iter()
            .filter(|i| i.opcode & 0x07 == LOAD_CLASS && i.source != FRAME_POINTER)
            .map(|i| i.opcode)
            .collect();
        assert_eq!(
            loads,
            [LOAD_8_BYTES],
            "loads between the lookup in SERVICES and the next call"
        );
    }
    assert_eq!(lookups, 1, "lookups in SERVICES");
    Ok(())
}
