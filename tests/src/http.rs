//! HTTP requests as load balancers, probes and Prometheus send them.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::de::DeserializeOwned;

use crate::{Netns, scaled_timeout};

/// Time limit for connecting, and for each read of the response.
const TIMEOUT: Duration = Duration::from_secs(10);

/// An HTTP response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The status code.
    pub status: u16,
    headers: BTreeMap<String, String>,
    /// The body.
    pub body: String,
}

impl Response {
    /// Returns a header by its name in lower case.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// Parses the body as JSON.
    ///
    /// # Errors
    /// If the body is not JSON, or does not have that type.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_str(&self.body).with_context(|| format!("unexpected body: {}", self.body))
    }
}

/// Sends a GET request from a network namespace and returns the response.
///
/// # Errors
/// If the connection fails, or the response is not HTTP.
pub fn get(from: &Netns, at: SocketAddr, path: &str) -> Result<Response> {
    let response = from.within(|| request(at, path))?;
    response.with_context(|| format!("GET {at}{path} from {}", from.name()))
}

fn request(at: SocketAddr, path: &str) -> Result<Response> {
    let mut stream = TcpStream::connect_timeout(&at, scaled_timeout(TIMEOUT))?;
    stream.set_read_timeout(Some(scaled_timeout(TIMEOUT)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    parse(&text).with_context(|| format!("not an HTTP response: {text}"))
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
