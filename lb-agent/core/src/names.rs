//! The identity of service ports, their entries in NAMES, and texts of fixed length.

use std::fmt;
use std::sync::Arc;

use lb_common::abi::Name;
use serde::Serialize;

use crate::model::{ObjectKey, Protocol};

/// The identity of a service port: one port of a Service in one family. It keeps its service index if the port number or
/// an address changes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortId {
    /// The Service.
    pub service: ObjectKey,
    /// Name of the port; empty if the only port has none.
    pub port_name: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// Family of the frontends.
    pub ipv6: bool,
}

impl fmt::Display for PortId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.ipv6 { "IPv6" } else { "IPv4" };
        match &*self.port_name {
            "" => write!(f, "{} {} {family}", self.service, self.protocol),
            name => write!(f, "{} port {name} {} {family}", self.service, self.protocol),
        }
    }
}

/// A port of a Service in one family, as NAMES has it. It has question marks and zeros if the entry is missing or invalid.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ServicePortName {
    /// Namespace of the Service.
    pub namespace: String,
    /// Name of the Service.
    pub name: String,
    /// Name of the port; empty if the only port has none.
    pub port_name: String,
    /// Protocol, in capitals.
    pub protocol: String,
    /// `spec.ports[].port`, host byte order.
    pub port: u16,
    /// IP family of the frontends: 4 or 6.
    pub family: u8,
}

impl From<&PortId> for ServicePortName {
    /// The port has number zero: an identity does not contain it.
    fn from(id: &PortId) -> Self {
        Self {
            namespace: id.service.namespace.to_string(),
            name: id.service.name.to_string(),
            port_name: id.port_name.to_string(),
            protocol: id.protocol.to_string(),
            port: 0,
            family: if id.ipv6 { 6 } else { 4 },
        }
    }
}

impl ServicePortName {
    /// Reads an entry of NAMES.
    pub fn of(name: Option<&Name>) -> Self {
        let unknown = || "?".to_owned();
        match name.and_then(|name| Some((name, port_id(name)?))) {
            Some((name, id)) => Self {
                port: name.port,
                ..Self::from(&id)
            },
            None => Self {
                namespace: unknown(),
                name: unknown(),
                port_name: unknown(),
                protocol: unknown(),
                port: 0,
                family: 0,
            },
        }
    }
}

/// `namespace/name:port-name`, with the port's number if it has no name; a question mark if that is not known.
impl fmt::Display for ServicePortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}:", self.namespace, self.name)?;
        match (&*self.port_name, self.port) {
            ("", 0) => f.write_str("?"),
            ("", port) => write!(f, "{port}"),
            (name, _) => f.write_str(name),
        }
    }
}

/// Returns the text in a field that is padded with zero bytes; `None` if it is not UTF-8.
#[must_use]
pub fn text(field: &[u8]) -> Option<&str> {
    let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
    std::str::from_utf8(&field[..end]).ok()
}

/// Copies a text into a field that is padded with zero bytes. A longer text is cut at a character boundary.
pub fn pad<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [0; N];
    let mut end = text.len().min(N);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    field[..end].copy_from_slice(&text.as_bytes()[..end]);
    field
}

/// Returns the identity in an entry of NAMES; `None` if the entry is invalid.
#[must_use]
pub fn port_id(name: &Name) -> Option<PortId> {
    let protocol = Protocol::from_number(name.proto)?;
    let (namespace, service, port_name) = (text(&name.namespace)?, text(&name.name)?, text(&name.port_name)?);
    if namespace.is_empty() || service.is_empty() || !matches!(name.family, 4 | 6) {
        return None;
    }
    Some(PortId {
        service: ObjectKey::new(namespace, service),
        port_name: port_name.into(),
        protocol,
        ipv6: name.family == 6,
    })
}

/// Returns the entry of NAMES of a service port.
pub fn name_of(id: &PortId, port: u16, generation: u32) -> Name {
    Name {
        namespace: pad(&id.service.namespace),
        name: pad(&id.service.name),
        port_name: pad(&id.port_name),
        generation,
        port,
        proto: id.protocol as u8,
        family: if id.ipv6 { 6 } else { 4 },
    }
}
