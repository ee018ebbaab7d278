//! Places of problems with Services, service ports and frontends: the texts in NOTICES, and the objects that they name.

use std::collections::BTreeSet;

use lb_common::abi::{FrontendKey, ProblemRecord};

use crate::model::{ObjectKey, Protocol};
use crate::names::{PortId, pad, text};

/// Returns the place of a problem with a whole Service.
#[must_use]
pub fn of_service(service: &ObjectKey) -> String {
    format!("Service {service}")
}

/// Returns the place of a problem with a service port.
#[must_use]
pub fn of_port(id: &PortId) -> String {
    format!("Service {id}")
}

/// Returns the place of a problem with a frontend. `owner`: the service port that gets it, if there is one.
#[must_use]
pub fn of_frontend(owner: Option<&PortId>, key: &FrontendKey) -> String {
    let frontend = match key.port {
        0 => format!("address mark of {}", key.addr),
        port => format!("frontend {}/{}", key.addr.socket(port), Protocol::name_of(key.proto)),
    };
    match owner {
        Some(id) => format!("{}{SEPARATOR}{frontend}", of_port(id)),
        None => frontend,
    }
}

/// Returns a record of NOTICES with this place.
fn record(place: &str) -> ProblemRecord {
    ProblemRecord {
        place: pad(place),
        message: pad(""),
    }
}

/// Stands between a service port and its frontend.
const SEPARATOR: &str = ", ";

/// The places of the problems in NOTICES.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Places(BTreeSet<String>);

impl Places {
    /// Reads the places of records in NOTICES. Those that are not UTF-8 are left out.
    pub fn of<'a>(records: impl IntoIterator<Item = &'a ProblemRecord>) -> Self {
        records.into_iter().filter_map(|record| text(&record.place)).collect()
    }

    /// Whether NOTICES has a place. A record has only the beginning of a long text.
    fn has(&self, place: &str) -> bool {
        text(&record(place).place).is_some_and(|place| self.0.contains(place))
    }

    /// Returns whether a Service, one of its service ports or a frontend of that port has a problem.
    #[must_use]
    pub fn has_port(&self, id: &PortId) -> bool {
        let with_frontend = format!("{}{SEPARATOR}", of_port(id));
        self.has(&of_service(&id.service))
            || self.has(&of_port(id))
            || self.0.iter().any(|place| place.starts_with(&with_frontend))
    }

    /// Returns whether a frontend has a problem, whatever service port should get it. `owner`: the one that has it.
    #[must_use]
    pub fn has_frontend(&self, owner: Option<&PortId>, key: &FrontendKey) -> bool {
        self.has(&of_frontend(owner, key)) || self.frontend(key).is_some()
    }

    /// Returns the place of the problem of a frontend, whatever service port gets it.
    #[must_use]
    pub fn frontend(&self, key: &FrontendKey) -> Option<&str> {
        let frontend = of_frontend(None, key);
        let of_port = format!("{SEPARATOR}{frontend}");
        let mut all = self.0.iter().map(String::as_str);
        all.find(|place| *place == frontend || place.ends_with(&of_port))
    }

    /// Returns the service ports that have a problem, or one of whose frontends has one.
    #[must_use]
    pub fn ports(&self) -> BTreeSet<PortId> {
        let ports = self.0.iter().filter_map(|place| port(place));
        ports.collect()
    }
}

impl<'a> FromIterator<&'a str> for Places {
    fn from_iter<I: IntoIterator<Item = &'a str>>(places: I) -> Self {
        Self(places.into_iter().map(ToOwned::to_owned).collect())
    }
}

/// Returns the service port that a place names, if it names one: the inverse of [`of_port`] and [`of_frontend`].
fn port(place: &str) -> Option<PortId> {
    let id = place.strip_prefix("Service ")?;
    let id = id.split_once(SEPARATOR).map_or(id, |(id, _)| id);
    let words: Vec<_> = id.split(' ').collect();
    let (service, port_name, protocol, family) = match words[..] {
        [service, protocol, family] => (service, "", protocol, family),
        [service, "port", name, protocol, family] => (service, name, protocol, family),
        _ => return None,
    };
    let (namespace, name) = service.split_once('/')?;
    let all = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
    Some(PortId {
        service: ObjectKey::new(namespace, name),
        port_name: port_name.into(),
        protocol: all.into_iter().find(|known| known.name() == protocol)?,
        ipv6: match family {
            "IPv4" => false,
            "IPv6" => true,
            _ => return None,
        },
    })
}

#[cfg(test)]
mod tests {
    use lb_common::abi::Addr;

    use super::*;

    fn id(port_name: &str, protocol: Protocol, ipv6: bool) -> PortId {
        PortId {
            service: ObjectKey::new("default", "web"),
            port_name: port_name.into(),
            protocol,
            ipv6,
        }
    }

    #[test]
    fn a_place_names_its_service_port_and_frontend() {
        let addr = Addr::from_v4([10, 96, 0, 1]);
        let key = FrontendKey::new(addr, 80, 17);
        for id in [id("", Protocol::Tcp, false), id("dns", Protocol::Udp, true)] {
            let frontend = of_frontend(Some(&id), &key);
            let places = Places::from_iter([frontend.as_str()]);
            assert_eq!(places.ports(), [id.clone()].into());
            assert!(places.has_port(&id) && places.has_frontend(Some(&id), &key));
            assert_eq!(places.frontend(&key), Some(frontend.as_str()));
            assert_eq!(
                places.frontend(&FrontendKey::new(addr, 80, 6)),
                None,
                "another protocol"
            );
            let of_port = of_port(&id);
            assert_eq!(Places::from_iter([of_port.as_str()]).ports(), [id].into());
        }
        let other = [
            "Service default/web",
            "Service default/web2 TCP IPv4",
            "a.yaml: document 1",
            "eth0",
        ];
        assert!(!Places::from_iter([other[1]]).has_port(&id("", Protocol::Tcp, false)));
        assert_eq!(
            Places::from_iter([other[0], other[2], other[3]]).ports(),
            BTreeSet::new()
        );
    }

    #[test]
    fn a_place_that_is_longer_than_the_record_is_found() {
        let long = "x".repeat(63);
        let id = PortId {
            service: ObjectKey::new(&long, &long),
            port_name: long.as_str().into(),
            protocol: Protocol::Tcp,
            ipv6: true,
        };
        let key = FrontendKey::new(
            "fd00:1111:2222:3333:4444:5555:6666:7777"
                .parse::<std::net::IpAddr>()
                .unwrap()
                .into(),
            65535,
            6,
        );
        let places = Places::of(&[record(&of_frontend(Some(&id), &key))]);
        assert!(places.has_port(&id) && places.has_frontend(Some(&id), &key));
        assert_eq!(places.ports(), [id].into());
    }
}
