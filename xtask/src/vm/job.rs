//! The job of a virtual machine: programs to run, and the files that they need.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::Result;

use crate::artifacts::{Built, TestProgram};
use crate::testbed::Programs;
use crate::workspace::{current_program, root};

/// Test programs that virtual machines run without a filter, in this order, and the tests of each (all if none is named):
/// those that depend on the kernel's version, that is, on what the verifier accepts, what helpers and hooks do, how programs are
/// attached and replaced, and what system calls on maps and sockets do.
const SELECTED: [(&str, &[&str]); 17] = [
    ("verifier", &[]),
    (
        "tc_programs",
        &[
            "local_backend_sees_the_client_and_the_reply_comes_from_the_frontend",
            "remote_backend_sees_the_snat_address_and_the_reply_is_translated_back",
            "no_endpoint_gets_tcp_reset_or_icmp_port_unreachable",
            "expired_and_oversized_packets_get_icmp_errors",
            "concurrent_first_packets_create_one_flow",
        ],
    ),
    (
        "packet_path",
        &[
            "outside_client_reaches_pods_of_all_nodes_over_vxlan",
            "oversized_or_expired_packets_get_icmp_errors",
        ],
    ),
    (
        "devices",
        &[
            "attachments_follow_device_changes",
            "restart_keeps_links_and_replaces_programs",
            "switching_between_tcx_and_clsact_reattaches",
        ],
    ),
    (
        "socket_lb",
        &[
            "getpeername_is_the_vip_and_100_000_closed_sockets_leave_no_record",
            "connect_without_endpoint_is_refused_with_the_right_errno",
        ],
    ),
    (
        "udp",
        &[
            "connected_udp_sockets_report_the_vip_as_peer",
            "unconnected_udp_sockets_keep_their_backend_and_receive_from_the_vip",
            "tcp_and_mptcp_connect_in_both_families",
        ],
    ),
    (
        "updates_under_load",
        &[
            "endpoint_churn_fails_no_connection",
            "frontend_updates_are_never_missed_by_lookups",
        ],
    ),
    ("restart", &["another_build_takes_over_without_breaking_connections"]),
    ("layouts", &["maps_that_cannot_be_read_are_lost_and_named"]),
    ("map_readers", &[]),
    (
        "socket_destroy",
        &[
            "only_connected_udp_sockets_of_a_removed_backend_are_destroyed",
            "destroy_tcp_flag_destroys_tcp_sockets",
        ],
    ),
    ("nodeports", &["bind_to_a_node_port_fails_with_eaddrinuse_on_the_node"]),
    (
        "ebpf_log",
        &[
            "debug_logs_every_decision_of_a_connection",
            "debug_logs_every_packet_of_a_flow",
        ],
    ),
    ("outside_clients", &["client_behind_tun_reaches_remote_backend"]),
    ("flannel_masquerade", &["services_work_beside_flannel_rules_over_vxlan"]),
    // A resize loads all programs twice, which takes an emulated machine too long.
    ("stress", &["lookups_never_miss_or_return_a_foreign_backend"]),
    (
        "trace",
        &["trace_shows_connects_and_refusals", "trace_shows_destroyed_sockets"],
    ),
];

/// Of the programs in [`SELECTED`], those that run on one of several machines each, in turn.
const SHARED: [&str; 5] = ["ebpf_log", "flannel_masquerade", "outside_clients", "stress", "trace"];

/// Test programs that virtual machines skip without a filter, since nothing in them depends on the kernel's version. The unit
/// tests of `lb-tests` need no kernel, and are not named here. `map_resize` does depend on it, but its load leaves an emulated
/// machine no time for a start that moves maps: run it by its name.
const SKIPPED: [&str; 13] = [
    "demo",
    "dns_clients",
    "explain",
    "external_ips",
    "faults",
    "fuzz_corpus",
    "map_resize",
    "packet_path_maps",
    "pinned_maps",
    "server",
    "session_affinity",
    "syn_flood",
    "testbed",
];

/// Test programs that need files that virtual machines do not have.
const ABSENT: [&str; 1] = ["upgrade"];

/// Time limit of one program in seconds, so that a program that hangs does not keep the others from running.
pub(super) const PROGRAM_LIMIT: u32 = 15 * 60;

/// Prefix of the line that the virtual machine prints when a program has ended.
pub(super) const ENDED: &str = "lb-vm: ended ";

/// Programs to run, and the files that they need in addition to those of every machine.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    /// Steps, which run one after the other.
    pub(super) steps: Vec<Step>,
    /// Files: path in the virtual machine and path on this machine.
    pub(super) files: Vec<(PathBuf, PathBuf)>,
    /// Environment variables of all programs.
    pub(super) env: Vec<(&'static str, OsString)>,
}

/// A program to run, with its arguments and environment.
#[derive(Debug, Clone)]
pub(crate) struct Step {
    /// Unique name, one word.
    pub(super) name: String,
    /// Path of the program, which is among the job's files.
    pub(super) program: PathBuf,
    /// Its arguments.
    pub(super) arguments: Vec<OsString>,
    /// Environment variables of this program.
    pub(super) env: Vec<(&'static str, OsString)>,
    /// Working folder.
    pub(super) dir: PathBuf,
    /// True for a test program, which prints a summary with its own counts.
    pub(super) prints_summary: bool,
    /// True if only one of several machines runs it.
    pub(super) shared: bool,
}

impl Job {
    /// Returns the job of the tests that need a kernel: those with `filter` in their name, all of them (`everything`), or
    /// else those that depend on the kernel's version. The tests are those in `built`. The programs that they start are
    /// those in `release`, if it has them, because emulation is slow.
    pub(crate) fn tests(built: &Built, release: &Built, filter: Option<&str>, everything: bool) -> Result<Self> {
        let is_selection = filter.is_none() && !everything;
        let place = |test: &TestProgram| SELECTED.iter().position(|(program, _)| *program == test.target);
        // Under emulation, the Kubernetes control plane would not start in time.
        let absent = |test: &TestProgram| test.needs_kubernetes() || ABSENT.contains(&test.target.as_str());
        let wanted =
            |test: &&TestProgram| test.needs_root() && !absent(test) && (!is_selection || place(test).is_some());
        if is_selection {
            let partly = SELECTED.iter().filter(|(_, tests)| !tests.is_empty());
            let partly: Vec<_> = partly.map(|(program, _)| *program).collect();
            println!(
                "skipping what does not depend on the kernel's version or takes too long (--vm-all runs it): {}, and some tests of {}; on one \
                 machine each: {}",
                SKIPPED.join(", "),
                partly.join(", "),
                SHARED.join(", ")
            );
        }
        let mut tests: Vec<_> = built.tests.iter().filter(wanted).collect();
        tests.sort_by_key(|test| place(test).unwrap_or(SELECTED.len()));
        let mut files: Vec<_> = built
            .all_programs()
            // xtask itself is of no use in the virtual machine, and large.
            .filter(|(name, _)| *name != env!("CARGO_PKG_NAME"))
            .map(|(name, path)| (path.clone(), release.program(name).unwrap_or_else(|_| path.clone())))
            .collect();
        files.extend(tests.iter().map(|test| (test.path.clone(), test.path.clone())));
        let programs = built.programs()?;
        Ok(Self {
            steps: tests
                .into_iter()
                .map(|test| Step::tests(test, filter, is_selection))
                .collect(),
            files,
            env: vec![
                ("LB_AGENT", programs.agent.into()),
                ("LB_TESTBED", programs.testbed.into()),
            ],
        })
    }

    /// Returns the part of the job for one of several machines.
    pub(super) fn share(&self, machine: usize, machines: usize) -> Self {
        let mut turn = (0..machines).cycle();
        let mut share = self.clone();
        share.steps.retain(|step| !step.shared || turn.next() == Some(machine));
        share
    }

    /// Returns the job that checks the demo.
    pub(crate) fn demo(programs: &Programs) -> Result<Self> {
        let xtask = current_program()?;
        let files = [&xtask, &programs.agent, &programs.testbed].map(|path| (path.clone(), path.clone()));
        let (agent, testbed) = (&programs.agent, &programs.testbed);
        let arguments = ["run", "--check", "--agent"].map(OsString::from).into_iter();
        let arguments = arguments.chain([agent.into(), "--testbed".into(), testbed.into()]);
        Ok(Self {
            steps: vec![Step {
                name: "demo".to_owned(),
                program: xtask,
                arguments: arguments.collect(),
                env: Vec::new(),
                dir: root(),
                prints_summary: false,
                shared: false,
            }],
            files: files.into(),
            env: Vec::new(),
        })
    }
}

impl Step {
    fn tests(test: &TestProgram, filter: Option<&str>, is_selection: bool) -> Self {
        // One test at a time with its output unbuffered, so that a person who waits can follow the progress.
        let mut arguments = vec!["--test-threads=1", "--nocapture"];
        arguments.extend(filter);
        let selected = SELECTED.iter().find(|(program, _)| *program == test.target);
        if let Some((_, tests)) = selected.filter(|(_, tests)| is_selection && !tests.is_empty()) {
            // The names are complete.
            arguments.push("--exact");
            arguments.extend(*tests);
        }
        Self {
            name: format!("{}/{}", test.package, test.target),
            program: test.path.clone(),
            arguments: arguments.into_iter().map(OsString::from).collect(),
            env: vec![
                ("CARGO_MANIFEST_DIR", test.dir.clone().into()),
                ("CARGO_PKG_NAME", test.package.clone().into()),
            ],
            dir: test.dir.clone(),
            prints_summary: true,
            shared: is_selection && SHARED.contains(&test.target.as_str()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn source(program: &str) -> String {
        let folder = root().join("tests/tests");
        let file = folder.join(format!("{program}.rs"));
        fs::read_to_string(&file).unwrap_or_else(|_| fs::read_to_string(folder.join(program).join("main.rs")).unwrap())
    }

    #[test]
    fn every_selected_test_exists() {
        for (program, tests) in SELECTED {
            let text = source(program);
            for test in tests {
                assert!(text.contains(&format!("#[test]\nfn {test}()")), "{program}: {test}");
            }
        }
        for program in SHARED {
            assert!(SELECTED.iter().any(|(selected, _)| *selected == program), "{program}");
        }
    }

    #[test]
    fn every_program_is_selected_or_skipped() {
        let mut listed: Vec<_> = SELECTED.map(|(program, _)| program).into();
        listed.extend(SKIPPED);
        listed.extend(ABSENT);
        listed.sort_unstable();
        let entries = fs::read_dir(root().join("tests/tests")).unwrap().map(Result::unwrap);
        let programs = entries.filter(|entry| {
            let path = entry.path();
            path.extension().is_some_and(|extension| extension == "rs") || path.join("main.rs").is_file()
        });
        let names = programs.map(|entry| entry.path().file_stem().unwrap().to_str().unwrap().to_owned());
        let mut names: Vec<_> = names.filter(|name| !name.starts_with("kubernetes")).collect();
        names.sort_unstable();
        assert_eq!(names, listed);
    }
}
