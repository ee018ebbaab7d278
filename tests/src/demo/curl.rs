//! curl, again and again, at a bounded rate.

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::{Netns, Process, scaled_timeout};

/// Requests a second of one [`CurlLoop`].
const RATE: u32 = 5;

/// How long one request may take.
const LONGEST: Duration = Duration::from_secs(2);

/// After an answer's body curl writes a line with its exit status and the peer's address; no name begins like that.
const MARK: &str = "#curl ";

/// One answer to curl, or none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum CurlResult {
    /// The name that the backend gave.
    From(String),
    /// What went wrong.
    Failed(String),
}

/// A curl that asks an address again and again, with a new connection each time.
pub(super) struct CurlLoop {
    address: SocketAddr,
    process: Process,
    body: Option<String>,
}

impl CurlLoop {
    pub(super) fn start(netns: &Netns, address: SocketAddr) -> Result<Self> {
        let mut command = netns.command("curl")?;
        command
            .args(arguments())
            .args(["--rate", &format!("{RATE}/s")])
            // curl takes each number of the range for another page: it will run for weeks.
            .arg(format!("http://{address}/?[1-100000000]"))
            .stdin(Stdio::null())
            .stderr(Stdio::null());
        Ok(Self {
            address,
            process: Process::spawn_reading(&mut command)?,
            body: None,
        })
    }

    /// The answers since the last call.
    pub(super) fn answers(&mut self) -> Vec<CurlResult> {
        let mut answers = Vec::new();
        for line in self.process.pending_lines() {
            match line.strip_prefix(MARK) {
                None => self.body = Some(line),
                Some(status) => answers.push(parse_result(self.body.take(), status, self.address)),
            }
        }
        answers
    }
}

/// One request by curl.
pub(super) fn call(netns: &Netns, address: SocketAddr) -> Result<CurlResult> {
    let output = netns
        .command("curl")?
        .args(arguments())
        .arg(format!("http://{address}/"))
        .stdin(Stdio::null())
        .output()
        .context("running curl")?;
    let output = String::from_utf8_lossy(&output.stdout);
    let (body, status) = output.rsplit_once(MARK).unwrap_or((&output, "says nothing"));
    Ok(parse_result(Some(body.trim().to_owned()), status.trim(), address))
}

fn arguments() -> [String; 7] {
    [
        "--silent".to_owned(),
        "--noproxy".to_owned(),
        "*".to_owned(),
        "--max-time".to_owned(),
        scaled_timeout(LONGEST).as_secs().to_string(),
        "--write-out".to_owned(),
        format!("{MARK}%{{exitcode}} %{{http_code}} %{{remote_ip}}:%{{remote_port}} %{{errormsg}}\\n"),
    ]
}

/// Right is: success, from the address that was asked.
fn parse_result(body: Option<String>, status: &str, address: SocketAddr) -> CurlResult {
    match body {
        Some(name) if status.trim_end() == format!("0 200 {address}") => CurlResult::From(name),
        _ => CurlResult::Failed(format!("curl: {}", status.trim_end())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_address_asked_may_answer() {
        let address = "10.96.0.80:80".parse().unwrap();
        let body = || Some("a".to_owned());
        assert_eq!(
            parse_result(body(), "0 200 10.96.0.80:80 ", address),
            CurlResult::From("a".to_owned())
        );
        for wrong in ["0 200 10.10.1.2:80 ", "0 404 10.96.0.80:80 ", "7 000 : refused"] {
            assert!(
                matches!(parse_result(body(), wrong, address), CurlResult::Failed(_)),
                "{wrong}"
            );
        }
        assert!(matches!(
            parse_result(None, "0 200 10.96.0.80:80 ", address),
            CurlResult::Failed(_)
        ));
    }
}
