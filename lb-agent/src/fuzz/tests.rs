//! The corpus, the regressions, and random bytes: a few fixed ones, or as many as `cargo xtask fuzz` requests.

use std::cell::Cell;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proptest::sample::Index;
use proptest::test_runner::TestError;

use super::*;

/// Environment variable: seconds of random bytes, instead of a few fixed ones.
const SECONDS: &str = "LB_FUZZ_SECONDS";

/// Returns the directory `tests/fuzz/KIND/TARGET`.
fn folder(kind: &str, target: &str) -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.with_file_name("tests").join("fuzz").join(kind).join(target)
}

/// Returns the files of a directory, sorted, without hidden ones.
fn inputs(kind: &str, target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let mut paths: Vec<_> = fs::read_dir(folder(kind, target))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| !path.file_name().unwrap().as_encoded_bytes().starts_with(b"."))
        .collect();
    paths.sort();
    paths
        .into_iter()
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect()
}

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let all = inputs("corpus", target);
    assert!(!all.is_empty(), "there is no corpus for {target}");
    all.into_iter().map(|(_, bytes)| bytes).collect()
}

fn replay(target: &str, check: fn(&[u8])) {
    for (path, bytes) in inputs("corpus", target)
        .into_iter()
        .chain(inputs("regressions", target))
    {
        println!("{}", path.display());
        check(&bytes);
    }
}

/// Runs a target with inputs of a strategy. A failing input is minimized and stored as a regression.
fn fuzz(target: &str, check: fn(&[u8]), cases: u32, strategy: impl Strategy<Value = Vec<u8>>) {
    let seconds: Option<u64> = env::var(SECONDS).ok().map(|text| text.parse().unwrap());
    let config = |cases| Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    };
    let end = Instant::now() + Duration::from_secs(seconds.unwrap_or(0));
    let inputs = Cell::new(0_u64);
    loop {
        // A new runner for each round: a runner generates its number of cases only once.
        let mut runner = match seconds {
            None => TestRunner::new_with_rng(config(cases), TestRng::deterministic_rng(RngAlgorithm::ChaCha)),
            Some(_) => TestRunner::new(config(50)),
        };
        let result = runner.run(&strategy, |bytes| {
            inputs.set(inputs.get() + 1);
            check(&bytes);
            Ok(())
        });
        if let Err(TestError::Fail(why, bytes)) = result {
            let hash = bytes.iter().fold(0_u64, |hash, byte| {
                (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
            });
            let path = folder("regressions", target).join(format!("{hash:016x}"));
            fs::write(&path, bytes).unwrap();
            panic!("{why}\nkept as {}", path.display());
        }
        result.unwrap();
        if Instant::now() >= end {
            break;
        }
    }
    println!("{target}: {} inputs", inputs.get());
    assert!(inputs.get() >= u64::from(cases), "too few inputs for {target}");
}

/// A fragment of a manifest that is copied elsewhere, or a token.
fn damaged(corpus: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    const TOKENS: &[&str] = &[
        "---\n",
        "\n",
        "  ",
        "- ",
        ": ",
        "{",
        "}",
        "[",
        "]",
        "\"",
        "'",
        "&a ",
        "*a",
        "<<: ",
        "|",
        "!!str ",
        "null",
        "-1",
        "65536",
        "1e9",
        "true",
        "~",
        "\u{feff}",
        "\0",
        "\t",
        "#",
        "None",
        "::1",
        "::ffff:1.2.3.4",
        "0.0.0.0",
        "TCP",
        "kind",
        "items",
        "List",
    ];
    let token = prop::sample::select(TOKENS).prop_map(|token| token.as_bytes().to_vec());
    let bytes = prop::collection::vec(any::<u8>(), 0..4);
    let piece = (prop::sample::select(corpus.clone()), any::<Index>(), 0..80_usize).prop_map(|(text, at, len)| {
        let at = at.index(text.len());
        text[at..(at + len).min(text.len())].to_vec()
    });
    let edit = (
        any::<Index>(),
        0..40_usize,
        prop_oneof![4 => token, 1 => bytes, 3 => piece],
    );
    (prop::sample::select(corpus), prop::collection::vec(edit, 0..8)).prop_map(|(mut text, edits)| {
        for (at, cut, new) in edits {
            let at = at.index(text.len() + 1);
            let end = (at + cut).min(text.len());
            text.splice(at..end, new);
        }
        text
    })
}

#[test]
fn manifests_of_the_corpus_and_of_regressions() {
    replay("manifests", manifests);
}

#[test]
fn runs_of_the_corpus_and_of_regressions() {
    replay("apply", apply);
}

#[test]
fn damaged_manifests() {
    fuzz("manifests", manifests, 200, damaged(corpus("manifests")));
}

#[test]
fn random_runs() {
    fuzz("apply", apply, 50, prop::collection::vec(any::<u8>(), 32));
}
