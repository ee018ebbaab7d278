//! Memory of the state of a large cluster: the objects, and the desired content of the maps.

use std::alloc::{GlobalAlloc, Layout, System};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use lb_core::model::{
    Batch, Change, Endpoint, EndpointLocation, EndpointPort, EndpointSlice, Object, ObjectKey, Service, ServicePort,
};
use lb_core::state::State;

/// The allocator of the C library, with a count of the bytes in use.
struct Counting;

static IN_USE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: All calls go to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        IN_USE.fetch_add(layout.size(), Relaxed);
        // SAFETY: The caller's guarantees are those of this call.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: The caller's guarantees are those of this call.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const SERVICES: u32 = 2_000;
const ENDPOINTS: u32 = 10;

/// Returns a Service with one port, and its slice.
fn objects(number: u32) -> [Change; 2] {
    let endpoint = |i: u32| {
        let address = Ipv4Addr::from_bits(0x0c00_0000 + number * ENDPOINTS + i);
        let location = EndpointLocation::on(&format!("node-{}", (number + i) % 50));
        Endpoint::ready(address.into(), location.shared())
    };
    let name = format!("service-{number}");
    let service = Service {
        created: Some(1_700_000_000),
        cluster_ips: Box::new([Ipv4Addr::from_bits(0x0a60_0001 + number).into()]),
        ports: ServicePort::shared(vec![ServicePort::tcp("http", 80)]),
        ..Service::new(ObjectKey::new("default", &name))
    };
    let slice = EndpointSlice {
        key: ObjectKey::new("default", &format!("{name}-x7k2p")),
        service: name.into(),
        ipv6: false,
        endpoints: (0..ENDPOINTS).map(endpoint).collect(),
        ports: EndpointPort::shared(vec![EndpointPort::tcp("http", 8080)]),
    };
    [
        Object::Service(Arc::new(service)),
        Object::EndpointSlice(Arc::new(slice)),
    ]
    .map(Change::Set)
}

#[test]
fn an_endpoint_takes_less_than_105_bytes() {
    let mut state = State::new("node-0");
    let before = IN_USE.load(Relaxed);
    drop(state.apply(Batch::of((0..SERVICES).flat_map(objects).collect())));
    let bytes = IN_USE.load(Relaxed).saturating_sub(before) / (SERVICES * ENDPOINTS) as usize;
    assert!(bytes < 105, "{bytes} bytes");
}
