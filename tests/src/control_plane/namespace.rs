//! Namespaces of the API, one per test.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use serde_json::{Value, json};

use super::{ControlPlane, KubeletPod, Objects, PodTemplate};
use crate::{Cluster, eventually_within};

/// A namespace. Dropping this deletes the Services, EndpointSlices and pods in it, but not the namespace itself.
#[derive(Debug)]
pub struct Namespace<'a> {
    control_plane: &'a ControlPlane,
    objects: &'a Objects,
    name: String,
}

impl ControlPlane {
    /// Creates a namespace.
    ///
    /// # Errors
    /// If there is already a namespace of this name.
    pub fn namespace(&self, name: &str) -> Result<Namespace<'_>> {
        let object = json!({"metadata": {"name": name}});
        self.objects
            .create_global::<k8s_openapi::api::core::v1::Namespace>(object)
            .with_context(|| format!("creating namespace {name}"))?;
        Ok(Namespace {
            control_plane: self,
            objects: &self.objects,
            name: name.to_owned(),
        })
    }
}

impl<'a> Namespace<'a> {
    /// The name of the namespace.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The client of the API.
    #[must_use]
    pub fn objects(&self) -> &'a Objects {
        self.objects
    }

    /// Creates a Service and returns it with the fields that the API server has added, such as its addresses.
    ///
    /// # Errors
    /// If the API server refuses it.
    pub fn create_service(&self, name: &str, spec: Value) -> Result<Service> {
        self.create_labelled_service(name, json!({}), spec)
    }

    /// Creates a Service with labels, like [`Self::create_service`].
    ///
    /// # Errors
    /// If the API server refuses it.
    pub fn create_labelled_service(&self, name: &str, labels: Value, spec: Value) -> Result<Service> {
        let mut object = json!({"metadata": {"name": name}});
        object["metadata"]["labels"] = labels;
        object["spec"] = spec;
        self.objects
            .create(&self.name, object)
            .with_context(|| format!("creating Service {name}"))
    }

    /// Changes a Service by a merge patch.
    ///
    /// # Errors
    /// If the API server refuses it.
    pub fn patch_service(&self, name: &str, change: Value) -> Result<Service> {
        self.objects
            .patch(&self.name, name, change)
            .with_context(|| format!("changing Service {name}"))
    }

    /// Changes the status of a Service by a merge patch, as the controller of a cloud provider does.
    ///
    /// # Errors
    /// If the API server refuses it.
    pub fn patch_service_status(&self, name: &str, change: Value) -> Result<Service> {
        self.objects
            .patch_status(&self.name, name, change)
            .with_context(|| format!("changing the status of Service {name}"))
    }

    /// Deletes a Service.
    ///
    /// # Errors
    /// If there is no such Service.
    pub fn delete_service(&self, name: &str) -> Result<()> {
        self.objects
            .delete::<Service>(&self.name, name, None)
            .with_context(|| format!("deleting Service {name}"))
    }

    /// Returns the EndpointSlices of a Service.
    ///
    /// # Errors
    /// If the API server does not answer.
    pub fn slices(&self, service: &str) -> Result<Vec<EndpointSlice>> {
        self.objects
            .list(&self.name, &format!("kubernetes.io/service-name={service}"))
    }

    /// Waits until the EndpointSlices of a Service have exactly `count` ready endpoints.
    ///
    /// # Errors
    /// If that takes too long.
    pub fn wait_for_ready(&self, service: &str, count: usize) -> Result<()> {
        eventually_within(
            Duration::from_secs(60),
            &format!("{count} ready endpoints of {service}"),
            || {
                let slices = self.slices(service)?;
                let conditions = slice_endpoints(&slices).filter_map(|endpoint| endpoint.conditions.as_ref());
                let ready = conditions.filter(|conditions| conditions.ready == Some(true)).count();
                ensure!(ready == count, "{ready} are ready: {slices:?}");
                Ok(())
            },
        )
    }

    /// Creates a pod on a node of the cluster and in the API. It is not ready yet.
    ///
    /// # Errors
    /// If the node has a pod of this name, or the API server refuses it.
    pub fn start_pod(
        &self,
        cluster: &Cluster,
        node: &str,
        name: &str,
        template: &PodTemplate,
    ) -> Result<KubeletPod<'a>> {
        KubeletPod::start(self.control_plane, &self.name, cluster, node, name, template)
    }
}

impl Drop for Namespace<'_> {
    fn drop(&mut self) {
        let services = self.objects.delete_all::<Service>(&self.name);
        let slices = self.objects.delete_all::<EndpointSlice>(&self.name);
        let pods = self.objects.delete_all::<Pod>(&self.name);
        if let Err(error) = services.and(slices).and(pods) {
            eprintln!("namespace {}: {error:#}", self.name);
        }
    }
}

/// Returns all endpoints of several EndpointSlices.
pub fn slice_endpoints(slices: &[EndpointSlice]) -> impl Iterator<Item = &Endpoint> {
    slices.iter().flat_map(|slice| slice.endpoints.iter().flatten())
}
