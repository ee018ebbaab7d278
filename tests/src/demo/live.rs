//! The live table.

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

/// Time between two pictures.
const PERIOD: Duration = Duration::from_secs(1);

/// The width for output that is no terminal.
const DEFAULT_WIDTH: u16 = 120;

/// What one Service port's clients have seen.
#[derive(Default)]
struct PortCounts {
    /// Per backend: connections in all, and up to the picture before.
    backends: BTreeMap<String, (u64, u64)>,
    failed: u64,
}

/// Shows the table until a signal comes or the time is over. Whether every answer was right.
pub(super) fn run(demo: &DemoCluster, seconds: Option<u64>, signals: &Signals) -> Result<bool> {
    let mut loops = Vec::new();
    for (index, service) in demo.services.iter().enumerate() {
        for (name, netns, address) in demo.client_targets(service) {
            loops.push((index, name, CurlLoop::start(netns, address)?));
        }
    }
    let mut counts: Vec<PortCounts> = demo.services.iter().map(|_| PortCounts::default()).collect();
    let mut last_trouble = None;
    let mut screen = Screen::new();
    let begin = Instant::now();
    let mut before = begin;
    loop {
        signals.sleep(PERIOD);
        if signals.arrived() || seconds.is_some_and(|seconds| begin.elapsed() >= Duration::from_secs(seconds)) {
            break;
        }
        for (index, name, curl) in &mut loops {
            for answer in curl.answers() {
                let service = &demo.services[*index];
                let trouble = match answer {
                    CurlResult::From(pod) if service.backends.iter().any(|backend| backend.pod == pod) => {
                        counts[*index].backends.entry(pod).or_default().0 += 1;
                        continue;
                    }
                    CurlResult::From(stranger) => format!("answered by {stranger}"),
                    CurlResult::Failed(why) => why,
                };
                counts[*index].failed += 1;
                last_trouble = Some(format!("{} from {name}: {trouble}", service.frontend));
            }
        }
        let now = Instant::now();
        let frame = frame(demo, &mut counts, (now - before).as_secs_f64(), last_trouble.as_deref());
        before = now;
        screen.show(&frame)?;
    }
    Ok(counts
        .iter()
        .all(|counts| counts.failed == 0 && !counts.backends.is_empty()))
}

/// The table and the lines around it.
fn frame(demo: &DemoCluster, counts: &mut [PortCounts], seconds: f64, trouble: Option<&str>) -> String {
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
            // The Service stands before its first backend only.
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
            table.add_row(["", "", "wrong or no answer", "", "", "", &failed, ""]);
        }
    }
    let mut text = format!("{table}\n");
    for line in agents(demo) {
        let _ = writeln!(text, "{line}");
    }
    if let Some(trouble) = trouble {
        let _ = writeln!(text, "last trouble: {trouble}");
    }
    let mut clients: Vec<String> = demo.namespaces().map(|(name, _)| name).collect();
    clients.push("a client outside, which asks both nodes' ports".to_owned());
    let _ = writeln!(
        text,
        "curl runs on {}. Ctrl-C ends this and removes everything.",
        clients.join(", ")
    );
    text
}

/// What is always a problem here, where every node has a cgroup of its own.
const CGROUP_IS_NOT_ROOT: usize = 1;

/// A row of `lb-agent service list`.
#[derive(Deserialize)]
struct ServiceRow {
    namespace: String,
    name: String,
    connections: u64,
    refused: u64,
}

/// A line per node: the agent's state, and what the kernel has counted.
fn agents(demo: &DemoCluster) -> Vec<String> {
    demo.agents
        .iter()
        .map(|agent| {
            let state = match agent.status() {
                Ok(status) if status.agent.running => format!(
                    "lb-agent pid {}, {} applies{}{}",
                    status.agent.pid,
                    status.agent.applies,
                    if status.agent.complete { "" } else { ", not complete" },
                    if status.problems.len() > CGROUP_IS_NOT_ROOT {
                        ", has problems to tell"
                    } else {
                        ""
                    },
                ),
                Ok(_) => "lb-agent does not run".to_owned(),
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

/// Draws each picture over the one before, where the output is a terminal.
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
        // A line that wraps, or one that scrolls out, cannot be drawn over.
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
