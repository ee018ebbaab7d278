//! The demo with an agent that exits at once. The demo with a real agent is `cargo xtask run --check`.

use std::path::{Path, PathBuf};

use lb_tests::demo::{Options, run};
use lb_tests::testbed;

#[test]
fn demo_fails_when_the_agent_exits() {
    let options = Options {
        agent: PathBuf::from("false"),
        testbed: testbed().program().to_owned(),
        examples: Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples"),
        check: true,
        seconds: None,
    };
    // By then the nodes are built and the pods answer; nothing answers at the virtual addresses.
    let error = run(&options).unwrap_err();
    assert!(format!("{error:#}").contains("lb-agent on n1 has ended"), "{error:#}");
}
