//! The live table of the demo.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{IsTerminal as _, Write as _, stdout};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, ContentArrangement, Table};
use crossterm::cursor::MoveToPreviousLine;
use crossterm::queue;
use crossterm::style::Print;
use crossterm::terminal::{Clear, ClearType, size};
use serde::Deserialize;

use super::cluster::DemoCluster;
use super::curl::{CurlLoop, CurlResult};
use super::signals::Signals;

/// Time between two frames.
const PERIOD: Duration = Duration::from_secs(1);

/// Width of the table if standard output is not a terminal.
const DEFAULT_WIDTH: u16 = 120;

/// Results of the requests to one Service port.
#[derive(Default)]
struct PortCounts {
    /// Connections per backend: in total, and up to the last frame.
    backends: BTreeMap<String, (u64, u64)>,
    failed: u64,
}

/// Shows the table until a signal arrives or the time is over. Returns whether every response was right.
pub(super) fn run(demo: &DemoCluster, seconds: Option<u64>, signals: &Signals) -> Result<bool> {
    let mut loops = Vec::new();
    for (index, service) in demo.services.iter().enumerate() {
        for (name, netns, address) in demo.client_targets(service) {
            loops.push((index, name, CurlLoop::start(netns, address)?));
        }
    }
    let mut counts: Vec<PortCounts> = demo.services.iter().map(|_| PortCounts::default()).collect();
    let mut last_failure = None;
    let mut screen = Screen::new();
    let begin = Instant::now();
    let mut before = begin;
    loop {
        signals.sleep(PERIOD);
        if signals.arrived() || seconds.is_some_and(|seconds| begin.elapsed() >= Duration::from_secs(seconds)) {
            break;
        }
        for (index, name, curl) in &mut loops {
            for result in curl.results() {
                let service = &demo.services[*index];
                let failure = match result {
                    CurlResult::From(pod) if service.backends.iter().any(|backend| backend.pod == pod) => {
                        counts[*index].backends.entry(pod).or_default().0 += 1;
                        continue;
                    }
                    CurlResult::From(other) => format!("answered by {other}, which is not a backend"),
                    CurlResult::Failed(why) => why,
                };
                counts[*index].failed += 1;
                last_failure = Some(format!("{} from {name}: {failure}", service.frontend));
            }
        }
        let now = Instant::now();
        let frame = frame(demo, &mut counts, (now - before).as_secs_f64(), last_failure.as_deref());
        before = now;
        screen.show(&frame)?;
    }
    Ok(counts
        .iter()
        .all(|counts| counts.failed == 0 && !counts.backends.is_empty()))
}

/// Renders the table and the lines below it.
fn frame(demo: &DemoCluster, counts: &mut [PortCounts], seconds: f64, failure: Option<&str>) -> String {
    let mut table = Table::new();
    table
        .load_style(UTF8_FULL_CONDENSED)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_width(size().map_or(DEFAULT_WIDTH, |(width, _)| width.max(40)))
        .set_header([
            "Service", "Address", "Backend", "Pod", "Node", "Conn/s", "Total", "Share",
        ]);
    for column in table.column_iter_mut().skip(5) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    for (service, counts) in demo.services.iter().zip(counts) {
        let total: u64 = counts.backends.values().map(|(count, _)| count).sum();
        for (number, backend) in service.backends.iter().enumerate() {
            let (count, before) = counts.backends.entry(backend.pod.clone()).or_default();
            let rate = (*count - *before) as f64 / seconds.max(0.001);
            let share = *count as f64 * 100.0 / total.max(1) as f64;
            *before = *count;
            // Only the row of the first backend shows the Service.
            let (name, address) = if number == 0 {
                let port = service.node_port.map_or_else(String::new, |port| format!(", *:{port}"));
                (service.name.clone(), format!("{}{port}", service.frontend))
            } else {
                Default::default()
            };
            table.add_row([
                name,
                address,
                format!("{}:{}", backend.address, backend.port),
                backend.pod.clone(),
                backend.node.clone(),
                format!("{rate:.1}"),
                count.to_string(),
                format!("{share:.1} %"),
            ]);
        }
        if counts.failed > 0 {
            let failed = counts.failed.to_string();
            table.add_row(["", "", "wrong or no response", "", "", "", &failed, ""]);
        }
    }
    let mut text = format!("{table}\n");
    for line in agents(demo) {
        let _ = writeln!(text, "{line}");
    }
    if let Some(failure) = failure {
        let _ = writeln!(text, "last failure: {failure}");
    }
    let mut clients: Vec<String> = demo.clients().map(|(name, _)| name).collect();
    clients.push("an outside client, which connects to the node ports of both nodes".to_owned());
    let _ = writeln!(
        text,
        "curl runs on {}. Press Ctrl-C to end the demo and remove everything.",
        clients.join(", ")
    );
    text
}

/// Number of problems that every agent of the demo reports, because every node has its own cgroup.
const CGROUP_IS_NOT_ROOT: usize = 1;

/// A row of `lb-agent service list`.
#[derive(Deserialize)]
struct ServiceRow {
    namespace: String,
    name: String,
    connections: u64,
    refused: u64,
}

/// Returns one line per node: the agent's state, and the connections that the programs have counted.
fn agents(demo: &DemoCluster) -> Vec<String> {
    demo.agents
        .iter()
        .map(|agent| {
            let state = match agent.status() {
                Ok(status) if status.agent.running => format!(
                    "lb-agent pid {}, {} batches applied{}{}",
                    status.agent.pid,
                    status.agent.applies,
                    if status.agent.complete { "" } else { ", not complete" },
                    if status.problems.len() > CGROUP_IS_NOT_ROOT {
                        ", has problems (see `lb-agent status`)"
                    } else {
                        ""
                    },
                ),
                Ok(_) => "lb-agent is not running".to_owned(),
                Err(error) => first_line(&format!("lb-agent status: {error:#}")),
            };
            let counted = match agent.json::<Vec<ServiceRow>>(&["service", "list"]) {
                Ok(rows) => rows
                    .iter()
                    .map(|row| {
                        format!(
                            "{}/{} {} (refused {})",
                            row.namespace, row.name, row.connections, row.refused
                        )
                    })
                    .collect::<Vec<_>>()
                    .join(", "),
                Err(error) => first_line(&format!("lb-agent service list: {error:#}")),
            };
            format!(
                "{}: {state}; connections counted in the kernel: {counted}",
                agent.node()
            )
        })
        .collect()
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

/// Draws each frame over the last one if standard output is a terminal.
struct Screen {
    terminal: bool,
    lines: u16,
}

impl Screen {
    fn new() -> Self {
        Self {
            terminal: stdout().is_terminal(),
            lines: 0,
        }
    }

    fn show(&mut self, frame: &str) -> Result<()> {
        self.draw(frame).context("writing to standard output")
    }

    fn draw(&mut self, frame: &str) -> std::io::Result<()> {
        let mut out = stdout().lock();
        if !self.terminal {
            write!(out, "{frame}")?;
            return out.flush();
        }
        // A line that wraps or scrolls out of the terminal cannot be overwritten.
        let (width, height) = size()?;
        if self.lines > 0 {
            queue!(out, MoveToPreviousLine(self.lines.min(height.saturating_sub(1))))?;
        }
        queue!(out, Clear(ClearType::FromCursorDown))?;
        self.lines = 0;
        for line in frame.lines().take(height.saturating_sub(1).into()) {
            let line: String = line.chars().take(width.into()).collect();
            queue!(out, Print(line), Print("\r\n"))?;
            self.lines += 1;
        }
        out.flush()
    }
}
