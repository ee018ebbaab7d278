//! Figures of lb in the reports that `lb-bench` writes as JSON.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

/// Figures by name. In each of them less is better.
pub(crate) type Figures = BTreeMap<String, f64>;

/// Returns lb's figures in the report of `benchmark`.
///
/// - `costs`: nanoseconds per run of a program of lb, above those of an empty program of the same run.
/// - `latencies`: median microseconds of `connect()` through lb.
/// - `rates`, `requests`: seconds per exchange or request through lb.
///
/// # Errors
/// If the report has another shape, has no figure, or has two figures of one name.
pub(crate) fn read(benchmark: &str, report: &Value) -> Result<Figures> {
    let mut figures = Figures::new();
    let mut add = |name: String, value: f64| {
        let is_new = figures.insert(format!("{benchmark}: {name}"), value).is_none();
        ensure!(is_new, "the report of {benchmark} has two figures called {name:?}");
        Ok(())
    };
    for cost in entries(report, "costs") {
        let lb = number(cost, "lb")?;
        // `nodeport` reports nanoseconds above the empty program. The reports of the others include them.
        let value = if benchmark == "nodeport" {
            lb
        } else {
            lb - number(cost, "empty").context("the report has no empty program to compare with: clang is missing")?
        };
        add(format!("program, {}", label(cost)), value)?;
    }
    for latency in entries(report, "latencies").filter(|entry| is_lb(entry)) {
        add(format!("connect(), {}", label(latency)), number(latency, "p50")?)?;
    }
    for (list, what) in [("rates", "exchange"), ("requests", "request")] {
        for entry in entries(report, list).filter(|entry| is_lb(entry)) {
            add(format!("{what}, {}", label(entry)), number(entry, "rate")?.recip())?;
        }
    }
    ensure!(!figures.is_empty(), "the report of {benchmark} has no figures");
    Ok(figures)
}

/// Returns the objects of a list in the report, none if there is no such list.
fn entries<'a>(report: &'a Value, list: &str) -> impl Iterator<Item = &'a Value> {
    report[list].as_array().into_iter().flatten()
}

/// Returns true for a figure of lb, false for one of another way to the backend.
fn is_lb(entry: &Value) -> bool {
    entry["way"] == "lb"
}

fn number(entry: &Value, field: &str) -> Result<f64> {
    let value = entry[field].as_f64().filter(|value| value.is_finite());
    value.with_context(|| format!("no number {field:?} in {entry}"))
}

/// Returns the fields that identify an entry, in words.
fn label(entry: &Value) -> String {
    let mut words = Vec::new();
    for field in ["call", "packet", "family", "outcome", "spread"] {
        words.extend(entry[field].as_str().map(|text| text.replace('_', " ")));
    }
    let manner = &entry["manner"];
    for (flag, yes, no) in [
        (&entry["udp"], "UDP", "TCP"),
        (&entry["fresh"], "new connections", "kept connections"),
        (&entry["elsewhere"], "backend elsewhere", "backend here"),
        (&manner["connected"], "connected", "unconnected"),
        (&manner["fresh"], "new socket each", "one socket"),
    ] {
        words.extend(flag.as_bool().map(|set| if set { yes } else { no }.to_owned()));
    }
    words.extend(entry["services"].as_u64().map(|number| format!("{number} Services")));
    words.join(", ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn program_costs_are_above_the_empty_program() {
        let cost = json!({
            "call": "first_send", "hook": "sendmsg4", "services": 1000, "family": "ipv4", "spread": "hot",
            "outcome": "hit", "lb": 130.5, "c": 120.0, "empty": 30.5, "ratio": {"low": 1.0, "median": 1.1, "high": 1.2},
        });
        let figures = read("udp", &json!({"costs": [cost]})).unwrap();
        let name = "udp: program, first send, ipv4, hit, hot, 1000 Services".to_owned();
        assert_eq!(figures, Figures::from([(name, 100.0)]));
    }

    #[test]
    fn floor_of_a_program_is_optional() {
        let mut cost = json!({"call": "connect", "services": 1, "lb": 130.5, "c": 120.0, "empty": 30.5});
        let without = read("connect", &json!({"costs": [cost]})).unwrap();
        cost["floor"] = json!(70.5);
        cost["ratio_to_floor"] = json!({"low": 2.4, "median": 2.5, "high": 2.6});
        let with = read("connect", &json!({"costs": [cost], "checks": []})).unwrap();
        assert_eq!(with, without);
    }

    #[test]
    fn packet_costs_have_the_empty_program_taken_off() {
        let cost = |udp| json!({"packet": "here_new", "hook": "ingress", "family": "ipv6", "udp": udp, "lb": 200.0, "empty": 40.0});
        let figures = read("nodeport", &json!({"costs": [cost(false), cost(true)]})).unwrap();
        let names: Vec<_> = figures.keys().map(String::as_str).collect();
        assert_eq!(
            names,
            [
                "nodeport: program, here new, ipv6, TCP",
                "nodeport: program, here new, ipv6, UDP"
            ]
        );
        assert!(figures.values().all(|value| (value - 200.0).abs() < 1e-9));
    }

    #[test]
    fn only_the_way_of_lb_is_compared_and_rates_become_seconds() {
        let rate = |way, rate| {
            json!({"way": way, "services": 1, "family": "ipv4", "spread": "hot", "outcome": "hit",
                   "manner": {"connected": true, "fresh": false}, "rate": rate})
        };
        let figures = read("udp", &json!({"rates": [rate("direct", 9.0), rate("lb", 4.0)]})).unwrap();
        let name = "udp: exchange, ipv4, hit, hot, connected, one socket, 1 Services".to_owned();
        assert_eq!(figures, Figures::from([(name, 0.25)]));
    }

    #[test]
    fn unexpected_reports_are_errors() {
        assert!(read("udp", &json!({})).is_err());
        assert!(read("udp", &json!({"costs": [{"call": "connect", "lb": "fast"}]})).is_err());
        assert!(
            read(
                "udp",
                &json!({"costs": [{"call": "connect", "lb": 1.0, "empty": null}]})
            )
            .is_err()
        );
        let twice = json!({"call": "connect", "lb": 2.0, "empty": 1.0});
        assert!(read("connect", &json!({"costs": [twice, twice]})).is_err());
    }
}
