//! The identity of service ports as NAMES holds it, and texts of fixed length.

use std::fmt;

use lb_common::abi::Name;
use serde::Serialize;

use crate::desired::PortId;
use crate::model::{ObjectKey, Protocol};

/// A port of a Service in one family, as NAMES has it; question marks and zeros where it has none, or nonsense.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ServicePortName {
    pub namespace: String,
    pub name: String,
    pub port_name: String,
    pub protocol: String,
    pub port: u16,
    pub family: u8,
}

impl ServicePortName {
    pub fn of(name: Option<&Name>) -> Self {
        let unknown = || "?".to_owned();
        match name.and_then(|name| Some((name, port_id(name)?))) {
            Some((name, id)) => Self {
                namespace: id.service.namespace.to_string(),
                name: id.service.name.to_string(),
                port_name: id.port_name.to_string(),
                protocol: id.protocol.to_string(),
                port: name.port,
                family: name.family,
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

/// `namespace/name:port-name`, or the port's number where it has no name.
impl fmt::Display for ServicePortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}:", self.namespace, self.name)?;
        if self.port_name.is_empty() {
            write!(f, "{}", self.port)
        } else {
            f.write_str(&self.port_name)
        }
    }
}

/// The text in a field that is padded with zero bytes.
#[must_use]
pub fn text(field: &[u8]) -> Option<&str> {
    let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
    std::str::from_utf8(&field[..end]).ok()
}

/// Copies a text into a field, cut at a character boundary where it is longer.
pub fn pad<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [0; N];
    let mut end = text.len().min(N);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    field[..end].copy_from_slice(&text.as_bytes()[..end]);
    field
}

/// The identity that an entry of NAMES gives.
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

/// The entry of NAMES of a service port.
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
