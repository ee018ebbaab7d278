//! curl, again and again, at a bounded rate.

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::{Place, Process, patience};

/// Requests a second of one [`Caller`].
const RATE: u32 = 5;

/// How long one request may take.
const LONGEST: Duration = Duration::from_secs(2);

/// After an answer's body curl writes a line with its exit status and the peer's address; no name begins like that.
const MARK: &str = "#curl ";

/// One answer to curl, or none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    /// The name that the backend gave.
    From(String),
    /// What went wrong.
    Failed(String),
}

/// A curl that asks an address again and again, with a new connection each time.
pub(super) struct Caller {
    address: SocketAddr,
    process: Process,
    body: Option<String>,
}

impl Caller {
    pub(super) fn start(place: &Place, address: SocketAddr) -> Result<Self> {
        let mut command = place.command("curl")?;
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
    pub(super) fn answers(&mut self) -> Vec<Answer> {
        let mut answers = Vec::new();
        for line in self.process.pending_lines() {
            match line.strip_prefix(MARK) {
                None => self.body = Some(line),
                Some(status) => answers.push(judge(self.body.take(), status, self.address)),
            }
        }
        answers
    }
}

/// One request by curl.
pub(super) fn call(place: &Place, address: SocketAddr) -> Result<Answer> {
    let output = place
        .command("curl")?
        .args(arguments())
        .arg(format!("http://{address}/"))
        .stdin(Stdio::null())
        .output()
        .context("running curl")?;
    let output = String::from_utf8_lossy(&output.stdout);
    let (body, status) = output.rsplit_once(MARK).unwrap_or((&output, "says nothing"));
    Ok(judge(Some(body.trim().to_owned()), status.trim(), address))
}

fn arguments() -> [String; 7] {
    [
        "--silent".to_owned(),
        "--noproxy".to_owned(),
        "*".to_owned(),
        "--max-time".to_owned(),
        patience(LONGEST).as_secs().to_string(),
        "--write-out".to_owned(),
        format!("{MARK}%{{exitcode}} %{{http_code}} %{{remote_ip}}:%{{remote_port}} %{{errormsg}}\\n"),
    ]
}

/// Right is: success, from the address that was asked.
fn judge(body: Option<String>, status: &str, address: SocketAddr) -> Answer {
    match body {
        Some(name) if status.trim_end() == format!("0 200 {address}") => Answer::From(name),
        _ => Answer::Failed(format!("curl: {}", status.trim_end())),
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
            judge(body(), "0 200 10.96.0.80:80 ", address),
            Answer::From("a".to_owned())
        );
        for wrong in ["0 200 10.10.1.2:80 ", "0 404 10.96.0.80:80 ", "7 000 : refused"] {
            assert!(matches!(judge(body(), wrong, address), Answer::Failed(_)), "{wrong}");
        }
        assert!(matches!(
            judge(None, "0 200 10.96.0.80:80 ", address),
            Answer::Failed(_)
        ));
    }
}
