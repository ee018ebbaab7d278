//! Check that the tests which docs/conformance.md names exist in this repository.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

/// Returns the source of a test program: its file, or all files of its folder.
fn source(program: &str) -> Result<String> {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/tests");
    let file = tests.join(format!("{program}.rs"));
    if file.exists() {
        return Ok(fs::read_to_string(file)?);
    }
    let folder = tests.join(program);
    let mut text = String::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("no tests called {program}"))? {
        text += &fs::read_to_string(entry?.path())?;
    }
    Ok(text)
}

#[test]
fn every_test_that_the_page_names_exists() -> Result<()> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/conformance.md");
    let page = fs::read_to_string(page)?;
    let rows = page.lines().filter(|line| line.starts_with("| ")).count();
    ensure!(rows > 150, "only {rows} rows");
    let code = page.split('`').skip(1).step_by(2);
    let named: BTreeSet<_> = code.filter_map(|code| code.split_once("::")).collect();
    ensure!(named.len() > 15, "only {named:?}");
    for (program, function) in named {
        let declared = format!("fn {function}(");
        ensure!(
            source(program)?.contains(&declared),
            "there is no {program}::{function}"
        );
    }
    Ok(())
}
