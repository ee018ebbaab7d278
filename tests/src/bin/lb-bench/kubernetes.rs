//! `kubernetes`: lb and the real kube-proxy on the same objects of a real API server, one after the other.
//!
//! All Services but one have endpoints without a server; their only cost is to be known to the proxy. The endpoint of the
//! remaining Service changes repeatedly, while a client on the node connects to it continuously and reports the backend that
//! answers.

mod objects;
mod proxy;
pub(crate) mod watch;

use std::env::current_exe;
use std::process::{ExitCode, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use comfy_table::Table;
use lb_tests::control_plane::ControlPlane;
use lb_tests::{Cluster, Pod, Process, Random, monotonic_ns, testbed};
use serde::Serialize;

use self::objects::Probe;
use self::proxy::{Kind, Proxy};
use crate::numbers::percentile;
use crate::report::{self, Check, Machine, Named, Reporting, table};

/// Node with the measured proxy. Backends are on the other node.
const NODE: &str = "n1";
const BACKEND_PORT: u16 = 8080;
/// Time limit for a proxy to serve all Services, or a change.
const PATIENCE: Duration = Duration::from_secs(180);
/// Milliseconds between two changes: the minimum, and the largest random addition, which keeps changes out of step with the
/// proxies' timers.
const PAUSE: (u64, u64) = (200, 1200);

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Number of Services
    #[arg(long, default_value_t = LIMITED, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    services: u32,
    /// Endpoints of each Service
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=100))]
    endpoints: u32,
    /// Measured changes of one endpoint
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    changes: u32,
    #[command(flatten)]
    reporting: Reporting,
}

/// Number of Services that the limits apply to.
const LIMITED: u32 = 5_000;

/// Times in seconds and memory in bytes of one proxy.
#[derive(Debug, Serialize)]
struct Measured {
    proxy: Kind,
    /// From the start of the process until /healthz returns 200.
    healthy: f64,
    /// From the start of the process until the first connection to a Service; kube-proxy writes all of them at once, and
    /// lb is healthy when all are in its maps.
    serving: f64,
    /// `VmRSS` after that, without BPF maps that the process has mapped.
    resident: u64,
    /// Peak resident memory, including such maps.
    peak: u64,
    /// From the request that changes an endpoint to the first connection to it.
    change_p50: f64,
    change_p99: f64,
    /// From the request to the API server's reply, which is part of the change's time.
    answer_p50: f64,
}

/// Report, as the JSON file contains it.
#[derive(Debug, Serialize)]
struct Report {
    machine: Machine,
    services: u32,
    endpoints: u32,
    changes: u32,
    proxies: Vec<Measured>,
    checks: Vec<Check<Named>>,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let machine = Machine::this()?;
    let bench = Bench::new(options)?;
    let proxies = [Kind::Lb, Kind::KubeProxy].map(|kind| bench.measure(kind));
    let proxies: Vec<_> = proxies.into_iter().collect::<Result<_>>()?;
    let checks = if options.services == LIMITED {
        checks(&proxies)
    } else {
        Vec::new()
    };
    let report = Report {
        machine,
        services: options.services,
        endpoints: options.endpoints,
        changes: options.changes,
        proxies,
        checks,
    };
    let title = format!("{} Services x {} endpoints", report.services, report.endpoints);
    report::print([
        (title.as_str(), proxy_table(&report.proxies)),
        ("limits", report::check_table("lb / kube-proxy", &report.checks)),
    ])?;
    options.reporting.write("kubernetes.json", &report)?;
    let complete = report.checks.first().map(drop);
    options.reporting.verdict(
        &report.checks,
        complete.with_context(|| format!("the limits apply to {LIMITED} Services: measure that size")),
    )
}

/// A cluster with all objects in its API.
struct Bench<'a> {
    options: &'a Options,
    /// Dropped in this order.
    _servers: [Process; 2],
    client: Pod,
    backends: [Pod; 2],
    probe: Probe,
    control_plane: ControlPlane,
    cluster: Cluster,
}

impl<'a> Bench<'a> {
    fn new(options: &'a Options) -> Result<Self> {
        let bed = testbed();
        let cluster = Cluster::builder().nodes(2).client(true).build()?;
        let control_plane = ControlPlane::start(&cluster, cluster.client())?;
        let client = cluster.add_pod(NODE, "client")?;
        let backends = [cluster.add_pod("n2", "backend-0")?, cluster.add_pod("n2", "backend-1")?];
        let serve = |number: usize| bed.serve(&backends[number], &[&format!("0.0.0.0:{BACKEND_PORT}={number}")]);
        let servers = [serve(0)?, serve(1)?];
        let begun = Instant::now();
        objects::create(&control_plane, options.services.saturating_sub(1), options.endpoints)?;
        let probe = Probe::create(&control_plane, BACKEND_PORT, &backends[0])?;
        eprintln!("{} Services created in {:.0?}", options.services, begun.elapsed());
        Ok(Self {
            options,
            _servers: servers,
            client,
            backends,
            probe,
            control_plane,
            cluster,
        })
    }

    fn measure(&self, kind: Kind) -> Result<Measured> {
        self.probe.point_to(&self.control_plane, &self.backends[0])?;
        let mut watch = self.client.command(current_exe().context("finding this program")?)?;
        watch
            .arg("watch")
            .arg("--to")
            .arg(self.probe.address().to_string())
            .stdin(Stdio::null());
        let mut watch = Process::spawn_reading(&mut watch)?;
        let begun = monotonic_ns();
        let mut proxy = Proxy::start(kind, &self.cluster, &self.control_plane, self.options.services)?;
        proxy.wait_healthy(PATIENCE)?;
        let healthy = monotonic_ns();
        let serving = wait_for(&mut watch, 0).with_context(|| proxy.log_tail())?;
        // Memory that only the start needed is freed meanwhile.
        sleep(Duration::from_secs(5));
        let (resident, peak) = proxy.memory()?;

        let mut random = Random::new(1);
        let (mut changes, mut answers) = (Vec::new(), Vec::new());
        for change in 1..=self.options.changes {
            sleep(Duration::from_millis(PAUSE.0 + random.below(PAUSE.1)));
            let to = change as usize % 2;
            let asked = monotonic_ns();
            self.probe.point_to(&self.control_plane, &self.backends[to])?;
            answers.push(seconds(asked, monotonic_ns()));
            let there = wait_for(&mut watch, to).with_context(|| proxy.log_tail())?;
            changes.push(seconds(asked, there));
        }
        drop(watch);
        proxy.end()?;
        changes.sort_unstable_by(f64::total_cmp);
        answers.sort_unstable_by(f64::total_cmp);
        Ok(Measured {
            proxy: kind,
            healthy: seconds(begun, healthy),
            serving: seconds(begun, serving),
            resident,
            peak,
            change_p50: percentile(&changes, 50),
            change_p99: percentile(&changes, 99),
            answer_p50: percentile(&answers, 50),
        })
    }
}

/// Returns the start time of the first connection that `backend` answered.
fn wait_for(watch: &mut Process, backend: usize) -> Result<u64> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let line = watch.line(deadline.saturating_duration_since(Instant::now()))?;
        let (start, name) = line.split_once(' ').context("not a line of `watch`")?;
        if name == backend.to_string() {
            return start.parse().context("no time");
        }
    }
}

/// Returns the seconds between two times of the monotonic clock.
fn seconds(from: u64, to: u64) -> f64 {
    to.saturating_sub(from) as f64 / 1e9
}

/// Limits as ratios, because the measuring machine may be slow.
fn checks(proxies: &[Measured]) -> Vec<Check<Named>> {
    let [lb, kube_proxy] = proxies else {
        return Vec::new();
    };
    let check =
        |what, value: fn(&Measured) -> f64, limit| Check::at_most(limit, Named { what }, value(lb) / value(kube_proxy));
    vec![
        check("resident memory", |m| m.resident as f64, 0.5),
        check("start to healthy and serving", |m| m.serving.max(m.healthy), 0.5),
        check("one change, p50", |m| m.change_p50, 0.2),
        check("one change, p99", |m| m.change_p99, 0.5),
    ]
}

fn proxy_table(proxies: &[Measured]) -> Table {
    let mut table = table(&[
        "proxy",
        "resident (MB)",
        "peak (MB)",
        "healthy (s)",
        "serving (s)",
        "change p50 (ms)",
        "p99 (ms)",
        "API's answer p50 (ms)",
    ]);
    for m in proxies {
        let megabytes = |bytes: u64| format!("{:.1}", bytes as f64 / 1e6);
        let milliseconds = |seconds: f64| format!("{:.1}", seconds * 1e3);
        table.add_row([
            m.proxy.label().to_owned(),
            megabytes(m.resident),
            megabytes(m.peak),
            format!("{:.2}", m.healthy),
            format!("{:.2}", m.serving),
            milliseconds(m.change_p50),
            milliseconds(m.change_p99),
            milliseconds(m.answer_p50),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(proxy: Kind, factor: f64) -> Measured {
        Measured {
            proxy,
            healthy: factor,
            serving: 2.0 * factor,
            resident: (1000.0 * factor) as u64,
            peak: 0,
            change_p50: factor,
            change_p99: factor,
            answer_p50: 0.0,
        }
    }

    #[test]
    fn limits_are_ratios() {
        let met = |lb| {
            let checks = checks(&[measured(Kind::Lb, lb), measured(Kind::KubeProxy, 1.0)]);
            checks.iter().filter(|check| check.met).count()
        };
        assert_eq!((met(0.1), met(0.3), met(0.6)), (4, 3, 0));
    }
}
