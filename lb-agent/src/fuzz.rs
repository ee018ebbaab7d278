//! Properties that hold for any bytes. They are checked with the corpus and the regressions of `tests/fuzz`, and with
//! random bytes.

use std::collections::HashSet;

use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::source::parse::parse;
use lb_core::model::{Batch, Change};
use lb_core::reconcile::random;
use lb_core::testing::{ROOM, assert_clean, maps, start};

/// The bytes are a manifest: parsing terminates, every problem names a place in the file, and valid objects can be
/// applied.
///
/// # Panics
/// If the property does not hold.
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
        // The small maps may be full, which is reported; conflicts between two Services are no faults.
        if lb.problems().iter().all(|problem| problem.message.contains("older")) {
            assert_clean(&lb);
        }
    }
}

/// The bytes are the seed of a run: objects are added, changed and removed, the agent dies, writes fail. After every
/// write a program that reads the maps finds the backends of every frontend. In the end the maps are as desired, and
/// applying the objects again writes nothing.
///
/// # Panics
/// If the property does not hold.
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
