//! What must hold for any bytes: called with the corpus and the regressions of `tests/fuzz`, and with random bytes.

use std::collections::HashSet;

use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::source::parse::parse;
use lb_core::model::{Batch, Change};
use lb_core::reconcile::random;
use lb_core::testing::{ROOM, assert_clean, maps, start};

/// The bytes are a manifest: parsing ends, every problem names a place in the file, and what is valid can be applied.
///
/// # Panics
/// Where it is not so.
pub(crate) fn manifests(bytes: &[u8]) {
    let lines = bytes.split(|byte| *byte == b'\n').count();
    for json in [false, true] {
        let parsed = parse("m", bytes, json);
        for problem in &parsed.problems {
            let line = problem.place.strip_prefix("m: document ").and_then(|rest| {
                let (document, line) = rest.split_once(" (line ")?;
                document.parse::<usize>().ok()?;
                line.strip_suffix(')')?.parse().ok()
            });
            assert!(
                problem.place == "m" || line.is_some_and(|line| (1..=lines).contains(&line)),
                "{problem} is not in {lines} lines"
            );
            assert!(
                !problem.message.is_empty() && !problem.message.contains(char::is_control),
                "{problem:?}"
            );
        }
        let mut seen = HashSet::new();
        let objects = parsed.objects.into_iter().map(|found| found.object);
        let batch = Batch::of(
            objects
                .filter(|object| seen.insert(object.id()))
                .map(Change::Set)
                .collect(),
        );
        let mut lb = start(maps());
        lb.apply(batch);
        lb.settle().expect("maps in memory have grace");
        // What is too much for the small maps is named; claims of two Services are no fault.
        if lb.problems().iter().all(|problem| problem.message.contains("older")) {
            assert_clean(&lb);
        }
    }
}

/// The bytes are the seed of a run: objects come, change and go, the agent dies, writes fail. After every write a program that
/// reads the maps finds every frontend's backends; in the end the maps are as desired, and the same again writes nothing.
///
/// # Panics
/// Where it is not so.
pub(crate) fn apply(bytes: &[u8]) {
    let mut seed = [0; 32];
    for (at, byte) in bytes.iter().enumerate() {
        seed[at % 32] ^= byte;
    }
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let acts = prop::collection::vec(random::any_act(), 1..60).new_tree(&mut runner);
    random::run(ROOM, acts.expect("nothing is filtered").current());
}

#[cfg(test)]
mod tests;
