//! Lists of endpoints in little memory.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use super::{Endpoint, EndpointLocation};

/// Endpoints of one family, in the order in which they were collected.
///
/// A cluster may have hundreds of thousands of endpoints. Here an IPv4 endpoint takes 16 bytes, half of an [`Endpoint`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoints(List);

#[derive(Debug, Clone, PartialEq, Eq)]
enum List {
    V4(Box<[Packed<Ipv4Addr>]>),
    /// A pointer of one word: with the length beside it, it would make each IPv4 list a word larger.
    V6(Box<Ipv6List>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Ipv6List(Box<[Packed<Ipv6Addr>]>);

/// The fields of an [`Endpoint`], with an address of a known family.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Packed<A> {
    address: A,
    ready: bool,
    serving: bool,
    terminating: bool,
    location: Arc<EndpointLocation>,
}

impl<A> Packed<A> {
    fn new(endpoint: &Endpoint, address: A) -> Self {
        let Endpoint {
            address: _,
            ready,
            serving,
            terminating,
            ref location,
        } = *endpoint;
        Self {
            address,
            ready,
            serving,
            terminating,
            location: Arc::clone(location),
        }
    }

    fn unpack(&self, address: IpAddr) -> Endpoint {
        Endpoint {
            address,
            ready: self.ready,
            serving: self.serving,
            terminating: self.terminating,
            location: Arc::clone(&self.location),
        }
    }
}

impl Endpoints {
    /// Returns the endpoints.
    pub fn iter(&self) -> impl Iterator<Item = Endpoint> + Clone {
        let (ipv4, ipv6) = match &self.0 {
            List::V4(list) => (&**list, [].as_slice()),
            List::V6(list) => ([].as_slice(), &*list.0),
        };
        let ipv4 = ipv4.iter().map(|packed| packed.unpack(packed.address.into()));
        ipv4.chain(ipv6.iter().map(|packed| packed.unpack(packed.address.to_canonical())))
    }
}

impl Default for Endpoints {
    fn default() -> Self {
        Self(List::V4(Box::default()))
    }
}

impl FromIterator<Endpoint> for Endpoints {
    fn from_iter<I: IntoIterator<Item = Endpoint>>(endpoints: I) -> Self {
        let endpoints: Vec<_> = endpoints.into_iter().collect();
        let ipv4 = endpoints.iter().map(|endpoint| match endpoint.address {
            IpAddr::V4(ip) => Some(Packed::new(endpoint, ip)),
            IpAddr::V6(_) => None,
        });
        let ipv6 = endpoints.iter().map(|endpoint| match endpoint.address {
            IpAddr::V4(ip) => Packed::new(endpoint, ip.to_ipv6_mapped()),
            IpAddr::V6(ip) => Packed::new(endpoint, ip),
        });
        let ipv4: Option<_> = ipv4.collect();
        Self(ipv4.map_or_else(|| List::V6(Box::new(Ipv6List(ipv6.collect()))), List::V4))
    }
}

impl From<Vec<Endpoint>> for Endpoints {
    fn from(endpoints: Vec<Endpoint>) -> Self {
        endpoints.into_iter().collect()
    }
}

impl<const N: usize> From<[Endpoint; N]> for Endpoints {
    fn from(endpoints: [Endpoint; N]) -> Self {
        endpoints.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::endpoint;

    #[test]
    fn endpoints_round_trip() {
        let ipv4 = ["10.0.0.1 @n1 unready", "10.0.0.2 serving", "255.255.255.255 zone:a"];
        let ipv6 = ["::1 @n1 terminating", "fd00::1 gone"];
        let mixed = ["10.0.0.1", "fd00::1"];
        for texts in [&[][..], &ipv4, &ipv6, &mixed] {
            let all: Vec<_> = texts.iter().map(|text| endpoint(text)).collect();
            assert_eq!(Endpoints::from(all.clone()).iter().collect::<Vec<_>>(), all);
        }
    }
}
