//! Packet parsing and rewriting with the functions that cargo-fuzz calls: the corpus, inputs that failed once, and
//! random changes of these.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use lb_packet_checks as checks;
use lb_tests::{Random, scaled_count};

/// Checks the inputs of a target, and `changed` more inputs that differ from them in a few bytes.
fn check(target: &str, check: fn(&[u8]), changed: u64) -> Result<()> {
    let mut inputs = Vec::new();
    for kind in ["corpus", "regressions"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("fuzz")
            .join(kind)
            .join(target);
        for entry in fs::read_dir(&folder).with_context(|| format!("listing {}", folder.display()))? {
            let path = entry?.path();
            if path.ends_with(".gitkeep") {
                continue;
            }
            println!("{}", path.display());
            let input = fs::read(&path)?;
            check(&input);
            inputs.push(input);
        }
    }
    inputs.retain(|input| !input.is_empty());
    ensure!(!inputs.is_empty(), "there is no corpus for {target}");
    let mut random = Random::from_env();
    for _ in 0..scaled_count(changed) {
        let mut input = inputs[random.below(inputs.len() as u64) as usize].clone();
        for _ in 0..=random.below(4) {
            let at = random.below(input.len() as u64) as usize;
            input[at] = random.next_u64() as u8;
        }
        check(&input);
    }
    Ok(())
}

#[test]
fn parsed_packets_agree_with_etherparse() -> Result<()> {
    check("parse", checks::parse, 20_000)
}

#[test]
fn rewritten_packets_have_correct_checksums() -> Result<()> {
    check("rewrite", checks::rewrite, 20_000)
}
