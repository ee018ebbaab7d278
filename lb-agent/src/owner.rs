//! Whose a service index is, for people.

use std::fmt;

use lb_common::abi::Name;
use serde::Serialize;

use crate::actual::port_id;

/// A port of a Service in one family, as NAMES has it; question marks and zeros where it has none, or nonsense.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Owner {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) port_name: String,
    pub(crate) protocol: String,
    pub(crate) port: u16,
    pub(crate) family: u8,
}

impl Owner {
    pub(crate) fn of(name: Option<&Name>) -> Self {
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
impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}:", self.namespace, self.name)?;
        if self.port_name.is_empty() {
            write!(f, "{}", self.port)
        } else {
            f.write_str(&self.port_name)
        }
    }
}
