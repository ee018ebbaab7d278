//! Services and EndpointSlices, created in the API as a controller does.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1::{Namespace, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Client;
use kube::api::{Api, PostParams};
use lb_tests::Pod;
use lb_tests::control_plane::ControlPlane;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

const NAMESPACE: &str = "bench";
const PROBE: &str = "probe";
const PORT: u16 = 80;
/// First address of the endpoints without a server.
const FIRST: u32 = Ipv4Addr::new(12, 0, 0, 0).to_bits();
/// Requests in parallel.
const AT_ONCE: usize = 8;
/// Services in one group; creating a group must take less time than the limit of one request.
const GO: u32 = 250;

/// Creates Services with `endpoints` endpoints each.
pub(crate) fn create(control_plane: &ControlPlane, services: u32, endpoints: u32) -> Result<()> {
    let namespace = json!({"metadata": {"name": NAMESPACE}});
    control_plane.objects().create_global::<Namespace>(namespace)?;
    for first in (0..services).step_by(GO as usize) {
        let numbers = first..services.min(first + GO);
        control_plane.objects().with(move |client| async move {
            let (mut tasks, places) = (JoinSet::new(), Arc::new(Semaphore::new(AT_ONCE)));
            for number in numbers {
                let (client, places) = (client.clone(), Arc::clone(&places));
                tasks.spawn(async move {
                    let _place = places.acquire().await.context("the semaphore is never closed")?;
                    let name = format!("service-{number}");
                    let first = FIRST + number * endpoints;
                    let addresses: Vec<_> = (first..first + endpoints).map(Ipv4Addr::from_bits).collect();
                    post::<Service>(&client, service(&name)).await?;
                    post::<EndpointSlice>(&client, slice(&name, 8080, &addresses)).await
                });
            }
            while let Some(done) = tasks.join_next().await {
                done.context("a request panicked")??;
            }
            Ok(())
        })?;
    }
    Ok(())
}

async fn post<K>(client: &Client, object: Value) -> Result<()>
where
    K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned
        + serde::Serialize,
{
    let object: K = serde_json::from_value(object).context("not such an object")?;
    let api = Api::<K>::namespaced(client.clone(), NAMESPACE);
    api.create(&PostParams::default(), &object).await?;
    Ok(())
}

/// Returns a Service without a selector, so that no controller manages its endpoints.
fn service(name: &str) -> Value {
    json!({
        "metadata": {"name": name},
        "spec": {"ports": [{"name": "http", "port": PORT, "protocol": "TCP"}]},
    })
}

fn slice(service: &str, port: u16, addresses: &[Ipv4Addr]) -> Value {
    json!({
        "metadata": {"name": service, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": port, "protocol": "TCP"}],
        "endpoints": endpoints(addresses),
    })
}

fn endpoints(addresses: &[Ipv4Addr]) -> Value {
    let ready = json!({"ready": true, "serving": true, "terminating": false});
    addresses
        .iter()
        .map(|address| json!({"addresses": [address], "conditions": ready}))
        .collect()
}

/// The Service with the endpoint that changes.
#[derive(Debug)]
pub(crate) struct Probe {
    address: SocketAddr,
    slice: String,
}

impl Probe {
    pub(crate) fn create(control_plane: &ControlPlane, port: u16, backend: &Pod) -> Result<Self> {
        let objects = control_plane.objects();
        let made: Service = objects.create(NAMESPACE, service(PROBE))?;
        let address = made.spec.and_then(|spec| spec.cluster_ip).context("no address")?;
        let slice = slice(PROBE, port, &[backend.address()]);
        let slice: EndpointSlice = objects.create(NAMESPACE, slice)?;
        Ok(Self {
            slice: slice.metadata.name.context("no name")?,
            address: SocketAddr::new(address.parse().context("not an address")?, PORT),
        })
    }

    /// Cluster IP and port.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Makes `backend` its only endpoint; returns after the API server's reply.
    pub(crate) fn point_to(&self, control_plane: &ControlPlane, backend: &Pod) -> Result<()> {
        let change = json!({"endpoints": endpoints(&[backend.address()])});
        let objects = control_plane.objects();
        objects.patch::<EndpointSlice>(NAMESPACE, &self.slice, change).map(drop)
    }
}
