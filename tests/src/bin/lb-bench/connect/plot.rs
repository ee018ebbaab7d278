//! Plots: one point for each number of Services, one line for each way or maker.

use std::fmt::Display;
use std::ops::Range;
use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use super::Report;
use crate::objects::Family;
use crate::programs::Hook;
use crate::scenario::Scenario;
use crate::testbed::Way;

const SIZE: (u32, u32) = (900, 480);
/// Color of a line; a maker or way has one color in both plots.
fn color(name: &str) -> RGBColor {
    match name {
        LB => RGBColor(0xd6, 0x27, 0x28),
        C => RGBColor(0x1f, 0x77, 0xb4),
        FLOOR => RGBColor(0x94, 0x67, 0xbd),
        _ if name == Way::KubeProxyNftables.label() => RGBColor(0x2c, 0xa0, 0x2c),
        _ if name == Way::KubeProxyIptables.label() => RGBColor(0xff, 0x7f, 0x0e),
        _ if name == Way::DirectAgain.label() => RGBColor(0xaa, 0xaa, 0xaa),
        _ => RGBColor(0x55, 0x55, 0x55),
    }
}

const LB: &str = "lb";
const C: &str = "C";
const FLOOR: &str = "floor";

/// A line: its name, and the measured value for each number of Services.
struct Line {
    name: String,
    points: Vec<(u32, f64)>,
}

/// Draws `connect-latency.svg` and `connect-cost.svg`: IPv4 connections to random Services, or to the only Service.
pub(crate) fn draw(report: &Report, folder: &Path) -> Result<()> {
    let shown = |scenario: &Scenario| {
        scenario.is_hit() && scenario.family == Family::Ipv4 && (!scenario.is_hot() || scenario.services == 1)
    };
    let mut ways: Vec<Line> = Vec::new();
    for l in report.latencies.iter().filter(|l| shown(&l.scenario)) {
        add(&mut ways, l.way.label(), l.scenario.services, l.p50);
    }
    let mut makers = Vec::new();
    for cost in report
        .costs
        .iter()
        .filter(|c| c.hook == Hook::Connect4 && shown(&c.scenario))
    {
        add(&mut makers, LB, cost.scenario.services, cost.lb);
        for (name, value) in [(C, cost.c), (FLOOR, cost.floor), ("empty program", cost.empty)] {
            if let Some(value) = value {
                add(&mut makers, name, cost.scenario.services, value);
            }
        }
    }
    chart(
        &folder.join("connect-latency.svg"),
        "connect() to a Service, median",
        "us",
        &ways,
    )?;
    chart(
        &folder.join("connect-cost.svg"),
        "a run of connect4, with the reading of the clock",
        "ns",
        &makers,
    )
}

fn add(lines: &mut Vec<Line>, name: &str, services: u32, value: f64) {
    let point = (services, value);
    match lines.iter_mut().find(|line| line.name == name) {
        Some(line) => line.points.push(point),
        None => lines.push(Line {
            name: name.to_owned(),
            points: vec![point],
        }),
    }
}

/// Draws one plot with two logarithmic axes.
fn chart(path: &Path, title: &str, unit: &str, lines: &[Line]) -> Result<()> {
    let failed = |error: &dyn Display| anyhow!("drawing {}: {error}", path.display());
    let points = || lines.iter().flat_map(|line| &line.points);
    let services = bounds(points().map(|point| f64::from(point.0)));
    let values = bounds(points().map(|point| point.1));

    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(|e| failed(&e))?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(services.log_scale(), values.log_scale())
        .map_err(|e| failed(&e))?;
    chart
        .configure_mesh()
        .x_desc("Services")
        .y_desc(unit)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .draw()
        .map_err(|e| failed(&e))?;
    for line in lines {
        let color = color(&line.name);
        let points = || {
            line.points
                .iter()
                .map(|(services, value)| (f64::from(*services), *value))
        };
        chart
            .draw_series(LineSeries::new(points(), color.stroke_width(2)))
            .map_err(|e| failed(&e))?
            .label(&line.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2)));
        chart
            .draw_series(points().map(|point| Circle::new(point, 3, color.filled())))
            .map_err(|e| failed(&e))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()
        .map_err(|e| failed(&e))?;
    area.present().map_err(|e| failed(&e))
}

/// Returns a range around positive values, with some room.
fn bounds(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (low, high) = values.fold((f64::MAX, f64::MIN_POSITIVE), |(low, high), v| {
        (low.min(v), high.max(v))
    });
    if low > high { 1.0..10.0 } else { low / 1.5..high * 1.5 }
}
