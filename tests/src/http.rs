//! Requests as load balancers, probes and Prometheus make them.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::de::DeserializeOwned;

use crate::{Netns, scaled_timeout};

/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(10);

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// Status code.
    pub status: u16,
    headers: BTreeMap<String, String>,
    /// What it says.
    pub body: String,
}

impl Response {
    /// A header, by its name in lower case.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// The body as JSON.
    ///
    /// # Errors
    /// Where it is not, or is not of that type.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_str(&self.body).with_context(|| format!("not as expected: {}", self.body))
    }
}

/// Asks from a place.
///
/// # Errors
/// When nobody listens, or the answer is none of HTTP.
pub fn get(from: &Netns, at: SocketAddr, path: &str) -> Result<Response> {
    let asked = from.within(|| ask(at, path))?;
    asked.with_context(|| format!("GET {at}{path} from {}", from.name()))
}

fn ask(at: SocketAddr, path: &str) -> Result<Response> {
    let mut stream = TcpStream::connect_timeout(&at, scaled_timeout(ANSWER))?;
    stream.set_read_timeout(Some(scaled_timeout(ANSWER)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    parse(&text).with_context(|| format!("no answer of HTTP: {text}"))
}

fn parse(text: &str) -> Option<Response> {
    let (head, body) = text.split_once("\r\n\r\n")?;
    let mut lines = head.lines();
    let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let headers = lines.map(|line| {
        let (name, value) = line.split_once(':')?;
        Some((name.to_lowercase(), value.trim().to_owned()))
    });
    Some(Response {
        status,
        headers: headers.collect::<Option<_>>()?,
        body: body.to_owned(),
    })
}
