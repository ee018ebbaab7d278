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

use super::callers::{Answer, Caller};
use super::signals::Signals;
use super::stage::Stage;

/// Time between two pictures.
const PERIOD: Duration = Duration::from_secs(1);

/// The width for output that is no terminal.
const DEFAULT_WIDTH: u16 = 120;

/// What one Service port's clients have seen.
#[derive(Default)]
struct Seen {
    /// Per backend: connections in all, and up to the picture before.
    backends: BTreeMap<String, (u64, u64)>,
    failed: u64,
}

/// Shows the table until a signal comes or the time is over. Whether every answer was right.
pub(super) fn run(stage: &Stage, seconds: Option<u64>, signals: &Signals) -> Result<bool> {
    let mut callers = Vec::new();
    for (index, service) in stage.services.iter().enumerate() {
        for (name, place, address) in stage.calls(service) {
            callers.push((index, name, Caller::start(place, address)?));
        }
    }
    let mut seen: Vec<Seen> = stage.services.iter().map(|_| Seen::default()).collect();
    let mut last_trouble = None;
    let mut screen = Screen::new();
    let begin = Instant::now();
    let mut before = begin;
    loop {
        signals.sleep(PERIOD);
        if signals.arrived() || seconds.is_some_and(|seconds| begin.elapsed() >= Duration::from_secs(seconds)) {
            break;
        }
        for (index, name, caller) in &mut callers {
            for answer in caller.answers() {
                let service = &stage.services[*index];
                let trouble = match answer {
                    Answer::From(pod) if service.backends.iter().any(|backend| backend.pod == pod) => {
                        seen[*index].backends.entry(pod).or_default().0 += 1;
                        continue;
                    }
                    Answer::From(stranger) => format!("answered by {stranger}"),
                    Answer::Failed(why) => why,
                };
                seen[*index].failed += 1;
                last_trouble = Some(format!("{} from {name}: {trouble}", service.frontend));
            }
        }
        let now = Instant::now();
        let picture = picture(stage, &mut seen, (now - before).as_secs_f64(), last_trouble.as_deref());
        before = now;
        screen.show(&picture)?;
    }
    Ok(seen.iter().all(|seen| seen.failed == 0 && !seen.backends.is_empty()))
}

/// The table and the lines around it.
fn picture(stage: &Stage, seen: &mut [Seen], seconds: f64, trouble: Option<&str>) -> String {
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
    for (service, seen) in stage.services.iter().zip(seen) {
        let total: u64 = seen.backends.values().map(|(count, _)| count).sum();
        for (number, backend) in service.backends.iter().enumerate() {
            let (count, before) = seen.backends.entry(backend.pod.clone()).or_default();
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
        if seen.failed > 0 {
            let failed = seen.failed.to_string();
            table.add_row(["", "", "wrong or no answer", "", "", "", &failed, ""]);
        }
    }
    let mut text = format!("{table}\n");
    for line in agents(stage) {
        let _ = writeln!(text, "{line}");
    }
    if let Some(trouble) = trouble {
        let _ = writeln!(text, "last trouble: {trouble}");
    }
    let mut places: Vec<String> = stage.places().map(|(name, _)| name).collect();
    places.push("a client outside, which asks both nodes' ports".to_owned());
    let _ = writeln!(
        text,
        "curl runs on {}. Ctrl-C ends this and removes everything.",
        places.join(", ")
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
fn agents(stage: &Stage) -> Vec<String> {
    stage
        .agents
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

    fn show(&mut self, picture: &str) -> Result<()> {
        self.draw(picture).context("writing to standard output")
    }

    fn draw(&mut self, picture: &str) -> std::io::Result<()> {
        let mut out = stdout().lock();
        if !self.terminal {
            write!(out, "{picture}")?;
            return out.flush();
        }
        // A line that wraps, or one that scrolls out, cannot be drawn over.
        let (width, height) = size()?;
        if self.lines > 0 {
            queue!(out, MoveToPreviousLine(self.lines.min(height.saturating_sub(1))))?;
        }
        queue!(out, Clear(ClearType::FromCursorDown))?;
        self.lines = 0;
        for line in picture.lines().take(height.saturating_sub(1).into()) {
            let line: String = line.chars().take(width.into()).collect();
            queue!(out, Print(line), Print("\r\n"))?;
            self.lines += 1;
        }
        out.flush()
    }
}
