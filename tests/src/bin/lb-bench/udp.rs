//! `udp`: costs of datagrams to a Service, compared with direct ones and equal programs in C, on connected and unconnected
//! sockets.
//!
//! All traffic stays in network namespaces of the test bed, which have no route to the outside. The client and the server
//! behind every backend's address are one thread, so no context switch is measured.

mod rate;

use std::process::ExitCode;

use anyhow::Result;
use aya::sys::{Stats, enable_stats};
use comfy_table::Table;
use indicatif::ProgressBar;
use lb_core::model::Protocol;
use serde::Serialize;

use crate::cost::{self, Call, Cost, Step};
use crate::objects::Services;
use crate::report::{self, CallInScenario, Check, Machine, percent_cells, table};
use crate::scenario::Scenario;
use crate::sizes::{self, Options};
use crate::testbed::{TestBed, Way};
use crate::worker::{SocketUse, Task};
use rate::{Rate, label};

/// Sockets for the programs of one maker in one round; all are open at once.
const SOCKETS: u32 = 500;
/// Sockets that only call `connect()`, one after the other. There are more of them, because the cost of a miss is dominated by
/// random memory accesses.
const ASKED: u32 = 2000;

/// Steps without backends, which measure the programs without a packet.
const ASKING: [Step; 4] = [
    Step {
        task: Task::Ask,
        count: ASKED,
        calls: &[Call::Connect],
    },
    Step {
        task: Task::FirstSend,
        count: SOCKETS,
        calls: &[Call::FirstSend],
    },
    Step {
        task: Task::NextSend,
        count: SOCKETS,
        calls: &[Call::NextSend],
    },
    Step {
        task: Task::Close,
        count: SOCKETS,
        calls: &[Call::Close],
    },
];

/// Steps with backends that reply.
const RECEIVING: [Step; 2] = [
    Step {
        task: Task::Exchange(SocketUse {
            connected: false,
            fresh: true,
        }),
        count: SOCKETS,
        calls: &[Call::ReceiveUnconnected],
    },
    Step {
        task: Task::Exchange(SocketUse {
            connected: true,
            fresh: true,
        }),
        count: SOCKETS,
        calls: &[Call::ReceiveConnected],
    },
];

/// Report, as the JSON file contains it.
#[derive(Debug, Serialize)]
struct Report {
    machine: Machine,
    endpoints: u32,
    rounds: u32,
    costs: Vec<Cost>,
    rates: Vec<Rate>,
    checks: Vec<Check<CallInScenario>>,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let mut report = Report {
        machine: Machine::this()?,
        endpoints: options.endpoints,
        rounds: options.rounds,
        costs: Vec::new(),
        rates: Vec::new(),
        checks: Vec::new(),
    };
    sizes::each(options, Protocol::Udp, |services, object, bar| {
        measure(services, object, bar, &mut report)
    })?;
    report.checks = report::check_limits(&report.costs);
    report::print([
        ("exchanges", rate_table(&report.rates)),
        ("runs of a program", report::cost_table(&report.costs)),
        ("limits", report::check_table("figure", &report.checks)),
    ])?;
    options.reporting.write("udp.json", &report)?;
    let complete = report::is_complete(&report.checks);
    options.reporting.verdict(&report.checks, complete)
}

/// Measures one number of Services in one family.
fn measure(services: Services, object: Option<&[u8]>, bar: &ProgressBar, whole: &mut Report) -> Result<()> {
    let rounds = whole.rounds;
    let mut bed = TestBed::new(services, object, &Way::PLAIN)?;
    let scenarios = Scenario::all(services);
    bar.set_length(2 * (u64::from(rounds) + 1) + rate::ticks(&bed, rounds));
    bar.set_message("programs");
    let statistics = enable_stats(Stats::RunTime)?;
    let asked = report::compare_again_if_exceeded(bar, || {
        cost::compare(&mut bed, &scenarios, &ASKING, rounds, || bar.inc(1))
    })?;
    bed.bring_up_backends()?;
    let received = report::compare_again_if_exceeded(bar, || {
        cost::compare(&mut bed, &scenarios, &RECEIVING, rounds, || bar.inc(1))
    })?;
    drop(statistics);
    whole.costs.extend(asked.into_iter().chain(received));
    bar.set_message("datagrams");
    whole.rates.extend(rate::measure(&bed, rounds, || bar.inc(1))?);
    bed.take_down()?;
    Ok(())
}

fn rate_table(rates: &[Rate]) -> Table {
    let mut table = table(&[
        "Services",
        "family",
        "to",
        "socket",
        "by",
        "per second",
        "of direct (%)",
        "quartiles",
    ]);
    for rate in rates {
        let [percent, quartiles] = percent_cells(rate.way, rate.of_direct);
        table.add_row([
            rate.scenario.services.to_string(),
            rate.scenario.family.label().to_owned(),
            rate.scenario.label(),
            label(rate.manner).to_owned(),
            rate.way.label().to_owned(),
            format!("{:.0}", rate.rate),
            percent,
            quartiles,
        ]);
    }
    table
}
