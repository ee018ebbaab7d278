//! The eBPF object: the verifier's verdict, the layout of the maps, and code that matters in detail.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use lb_agent::loader::{self, Lock, OBJECT, PinPath, SocketLb};
use lb_agent::node::devices::Layer;
use lb_common::abi::{SizedMap, map_name, program_name};
use lb_core::maps::Capacities;
use lb_tests::Cluster;
use object::{Object as _, ObjectSection as _, ObjectSymbol as _, RelocationTarget, SymbolKind};

const CAPACITIES: Capacities = Capacities::uniform(16)
    .with(SizedMap::UdpFlows, 64)
    .with(SizedMap::Affinity, 64)
    .with(SizedMap::Conntrack, 64)
    .with(SizedMap::ConntrackNew, 64);

/// Limit for the instructions that the verifier processes in one program; the kernel's own limit is 1,000,000.
const LIMIT: u32 = 25_000;

#[test]
fn verifier_accepts_every_program_and_map_layouts_match_the_loader() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let pins = PinPath::new(cluster.pin_path("n1"));
    let lock = Lock::take(&pins)?;
    let mut maps = loader::load(OBJECT, &lock, &CAPACITIES, SocketLb::All)?;
    // No device here needs the programs without a link layer.
    loader::load_device_programs(maps.programs_mut(), Layer::Network)?;
    let mut names = Vec::new();
    for program in loader::verified(maps.programs())? {
        let verified = program
            .verified
            .context("this kernel does not report verified instructions")?;
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
    let mut expected = program_name::ALL.to_vec();
    expected.sort_unstable();
    assert_eq!(names, expected);
    drop(maps);
    // The second start compares every pinned map with its expected layout, and takes the maps over.
    loader::load(OBJECT, &lock, &CAPACITIES, SocketLb::All)?;
    // A map of another size is replaced.
    let larger = CAPACITIES.with(SizedMap::Frontends, 32);
    let maps = loader::load(OBJECT, &lock, &larger, SocketLb::All)?;
    assert_eq!(maps.pinned().capacities(), larger);
    drop((maps, lock));
    assert!(loader::cleanup(&pins)?);
    assert!(!pins.root().exists());
    Ok(())
}

/// An eBPF instruction: opcode, registers, offset and immediate.
struct Instruction {
    opcode: u8,
    destination: u8,
    source: u8,
    offset: i16,
    immediate: i32,
}

fn instructions(code: &[u8]) -> Vec<Instruction> {
    code.chunks_exact(8)
        .map(|i| Instruction {
            opcode: i[0],
            destination: i[1] & 0xf,
            source: i[1] >> 4,
            offset: i16::from_le_bytes([i[2], i[3]]),
            immediate: i32::from_le_bytes([i[4], i[5], i[6], i[7]]),
        })
        .collect()
}

const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
const LOAD_8_BYTES: u8 = 0x79;
const FRAME_POINTER: u8 = 10;

/// A load that is not from the stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Load {
    opcode: u8,
    /// Register that has the address.
    source: u8,
    offset: i16,
}

/// The code between a call and the next one, on one path.
#[derive(Debug)]
struct Path<'a> {
    /// Map of the look-up that the path ends with; `None` if it ends with something else.
    looks_up: Option<&'a str>,
    loads: Vec<Load>,
}

/// Returns the paths from an instruction to the next call or the end. `maps` has the map of each instruction that refers to one.
fn paths<'a>(code: &[Instruction], maps: &'a BTreeMap<usize, String>, from: usize) -> Vec<Path<'a>> {
    const LOOKUP: i32 = 1;
    const LOAD_CLASS: u8 = 0x01;
    const JUMP_CLASSES: [u8; 2] = [0x05, 0x06];
    let (mut paths, mut open) = (Vec::new(), vec![(from, Vec::new(), None)]);
    while let Some((mut at, mut loads, mut last_map)) = open.pop() {
        loop {
            let i = &code[at];
            let to = |offset: i64| usize::try_from(at as i64 + 1 + offset).unwrap();
            last_map = maps.get(&at).map(String::as_str).or(last_map);
            match i.opcode {
                CALL | EXIT => {
                    let is_lookup = i.opcode == CALL && i.immediate == LOOKUP && i.source == 0;
                    let looks_up = last_map.filter(|_| is_lookup);
                    paths.push(Path { looks_up, loads });
                    break;
                }
                // Unconditional jumps, by the offset and by the immediate.
                0x05 => at = to(i.offset.into()),
                0x06 => at = to(i.immediate.into()),
                opcode => {
                    if JUMP_CLASSES.contains(&(opcode & 0x07)) {
                        open.push((to(i.offset.into()), loads.clone(), last_map));
                    } else if opcode & 0x07 == LOAD_CLASS && i.source != FRAME_POINTER {
                        loads.push(Load {
                            opcode,
                            source: i.source,
                            offset: i.offset,
                        });
                    }
                    at += 1;
                }
            }
        }
    }
    paths
}

/// A set word is published by one 8-byte store. A program that read base and length by two loads could see halves of
/// two sets. In SERVICES, the last load before the lookup of the selected slot is the set word's, and no other load has a part of it.
/// In FRONTENDS, the set word is the second word of the value that the lookup returned.
#[test]
fn set_word_is_read_by_a_single_load() -> Result<()> {
    let object = object::File::parse(OBJECT)?;
    for hook in ["connect4", "connect6", "sendmsg4", "sendmsg6"] {
        let section = object.section_by_name(&format!("cgroup/{hook}"));
        let section = section.with_context(|| format!("no {hook}"))?;
        let code = instructions(section.data()?);
        let mut maps = BTreeMap::new();
        for (offset, relocation) in section.relocations() {
            if let RelocationTarget::Symbol(symbol) = relocation.target() {
                let symbol = object.symbol_by_index(symbol)?;
                maps.insert(offset as usize / 8, symbol.name()?.to_owned());
            }
        }
        let calls: Vec<_> = (0..code.len()).filter(|at| code[*at].opcode == CALL).collect();
        let all: Vec<_> = calls.iter().flat_map(|at| paths(&code, &maps, at + 1)).collect();
        let to_slot: Vec<_> = all
            .iter()
            .filter(|path| path.looks_up == Some(map_name::BACKEND_SLOTS))
            .filter_map(|path| Some((path.loads.last()?, path)))
            .collect();
        assert!(!to_slot.is_empty(), "{hook} selects no slot");
        for (last, path) in to_slot {
            assert_eq!(last.opcode, LOAD_8_BYTES, "{hook}: {path:?}");
            let is_of_word = |load: &&Load| load.source == last.source && load.offset.abs_diff(last.offset) < 8;
            assert_eq!(path.loads.iter().filter(is_of_word).count(), 1, "{hook}: {path:?}");
        }

        let mut sets = 0;
        let ends = |from: usize| paths(&code, &maps, from);
        let starts = calls.iter().filter(|at| {
            // A call is a lookup in FRONTENDS if a path to it says so.
            let before = calls
                .iter()
                .rev()
                .find(|before| before < at)
                .map_or(0, |before| before + 1);
            code[**at].immediate == 1
                && ends(before)
                    .iter()
                    .any(|path| path.looks_up == Some(map_name::FRONTENDS))
        });
        for at in starts {
            for path in ends(at + 1) {
                let value: Vec<_> = path.loads.iter().filter(|load| load.source == 0).collect();
                for (number, load) in value.iter().enumerate() {
                    assert_eq!(load.opcode, LOAD_8_BYTES, "{hook}: {path:?}");
                    assert!(!value[..number].contains(load), "{hook} reads a word twice: {path:?}");
                    sets += usize::from(load.offset == 8);
                }
            }
        }
        assert!(
            sets > 0 || !hook.starts_with("connect"),
            "{hook} reads no set of a frontend"
        );
    }
    Ok(())
}

/// Location of a function in the object: its section, and its offset there.
type Location = (usize, u64);

struct Function {
    name: String,
    /// Stack frame in bytes.
    frame: u32,
    calls: Vec<Location>,
}

/// Returns the stack frame of code in bytes: how far below the frame pointer it reads, writes, or takes an address.
fn frame(code: &[Instruction]) -> u32 {
    const LOAD: u8 = 1;
    const STORES: [u8; 2] = [2, 3];
    const MOVE: u8 = 0xbf;
    const ADD: u8 = 0x07;
    let below = code.iter().enumerate().map(|(at, i)| match i.opcode & 0x07 {
        LOAD if i.source == FRAME_POINTER => i.offset.into(),
        class if STORES.contains(&class) && i.destination == FRAME_POINTER => i.offset.into(),
        _ => match code.get(at + 1) {
            Some(next)
                if (i.opcode, i.source) == (MOVE, FRAME_POINTER)
                    && (next.opcode, next.destination) == (ADD, i.destination) =>
            {
                next.immediate
            }
            _ => 0,
        },
    });
    below.min().unwrap_or(0).unsigned_abs()
}

fn functions(object: &object::File<'_>) -> Result<BTreeMap<Location, Function>> {
    const OF_THE_OBJECT: u8 = 1;
    let mut functions = BTreeMap::new();
    for symbol in object.symbols().filter(|symbol| symbol.kind() == SymbolKind::Text) {
        let index = symbol.section_index().context("a function without code")?;
        let section = object.section_by_index(index)?;
        let bytes = section.data_range(symbol.address(), symbol.size())?;
        let code = instructions(bytes.context("a function beyond its section")?);
        let mut called = BTreeMap::new();
        for (at, relocation) in section.relocations() {
            if let RelocationTarget::Symbol(target) = relocation.target() {
                let target = object.symbol_by_index(target)?;
                called.insert(at, (target.section_index(), target.address()));
            }
        }
        let mut calls = Vec::new();
        for (number, i) in code.iter().enumerate() {
            if (i.opcode, i.source) != (CALL, OF_THE_OBJECT) {
                continue;
            }
            let at = symbol.address() + 8 * number as u64;
            calls.push(match called.get(&at) {
                Some((section, address)) => (section.context("a call to nowhere")?.0, *address),
                None => (index.0, at.wrapping_add_signed(8 * (i64::from(i.immediate) + 1))),
            });
        }
        let function = Function {
            name: symbol.name()?.to_owned(),
            frame: frame(&code),
            calls,
        };
        functions.insert((index.0, symbol.address()), function);
    }
    Ok(functions)
}

/// Linux 6.1 rounds each frame up to 32 bytes (`check_max_stack_depth`), 6.12 to fewer: a program that this kernel
/// accepts may be rejected there.
#[test]
fn call_chains_fit_the_stack_limit_of_older_kernels() -> Result<()> {
    const STACK: u32 = 512;
    const STEP: u32 = 32;
    let object = object::File::parse(OBJECT)?;
    let functions = functions(&object)?;
    let mut open: Vec<(Location, u32, String)> = functions.keys().map(|at| (*at, 0, String::new())).collect();
    let mut deepest = (0, String::new());
    while let Some((at, above, chain)) = open.pop() {
        let Function { name, frame, calls } = functions.get(&at).with_context(|| format!("{chain} calls {at:?}"))?;
        let depth = above + (*frame).max(1).next_multiple_of(STEP);
        let chain = format!("{chain} {name} ({frame})");
        ensure!(depth <= STACK, "{depth} bytes of {STACK}:{chain}");
        open.extend(calls.iter().map(|to| (*to, depth, chain.clone())));
        deepest = deepest.max((depth, chain));
    }
    println!("{} bytes of {STACK}:{}", deepest.0, deepest.1);
    assert!(
        deepest.1.contains("lb_step_"),
        "the deepest chain must be in the packet path"
    );
    Ok(())
}
