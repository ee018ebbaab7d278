//! Requests by curl: single ones, and loops at a limited rate.

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::{Netns, Process, scaled_timeout};

/// Requests per second of one [`CurlLoop`].
const RATE: u32 = 5;

/// Time limit of one request.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Beginning of the line with exit status and peer address that curl writes after a response's body. No name of a pod
/// begins with this text.
const MARK: &str = "#curl ";

/// The result of one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum CurlResult {
    /// The name of the pod that answered.
    From(String),
    /// The reason of a failed request.
    Failed(String),
}

/// A curl process that sends requests to an address in a loop, each on a new connection.
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
            // curl requests each number of the range as a page of its own, which takes weeks.
            .arg(format!("http://{address}/?[1-100000000]"))
            .stdin(Stdio::null())
            .stderr(Stdio::null());
        Ok(Self {
            address,
            process: Process::spawn_reading(&mut command)?,
            body: None,
        })
    }

    /// Returns the results since the last call.
    pub(super) fn results(&mut self) -> Vec<CurlResult> {
        let mut results = Vec::new();
        for line in self.process.pending_lines() {
            match line.strip_prefix(MARK) {
                None => self.body = Some(line),
                Some(status) => results.push(parse_result(self.body.take(), status, self.address)),
            }
        }
        results
    }
}

/// Sends one request by curl.
pub(super) fn request(netns: &Netns, address: SocketAddr) -> Result<CurlResult> {
    let output = netns
        .command("curl")?
        .args(arguments())
        .arg(format!("http://{address}/"))
        .stdin(Stdio::null())
        .output()
        .context("running curl")?;
    let output = String::from_utf8_lossy(&output.stdout);
    let (body, status) = output.rsplit_once(MARK).unwrap_or((&output, "no status"));
    Ok(parse_result(Some(body.trim().to_owned()), status.trim(), address))
}

fn arguments() -> [String; 7] {
    [
        "--silent".to_owned(),
        "--noproxy".to_owned(),
        "*".to_owned(),
        "--max-time".to_owned(),
        scaled_timeout(TIMEOUT).as_secs().to_string(),
        "--write-out".to_owned(),
        format!("{MARK}%{{exitcode}} %{{http_code}} %{{remote_ip}}:%{{remote_port}} %{{errormsg}}\\n"),
    ]
}

/// Parses the output of curl. A request succeeds if its status is 200 and its peer is the requested address.
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
    fn only_the_requested_address_may_answer() {
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
