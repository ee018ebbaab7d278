//! A namespace of the API for one test.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use serde_json::{Value, json};

use super::{ControlPlane, KubeletPod, Objects, PodTemplate};
use crate::{Cluster, eventually_within};

/// A namespace. Dropping it deletes the Services and pods in it; the name stays taken.
#[derive(Debug)]
pub struct Namespace<'a> {
    control_plane: &'a ControlPlane,
    objects: &'a Objects,
    name: String,
}

impl ControlPlane {
    /// Makes a namespace.
    ///
    /// # Errors
    /// If there is such a one already.
    pub fn namespace(&self, name: &str) -> Result<Namespace<'_>> {
        let object = json!({"metadata": {"name": name}});
        self.objects
            .create_global::<k8s_openapi::api::core::v1::Namespace>(object)
            .with_context(|| format!("making namespace {name}"))?;
        Ok(Namespace {
            control_plane: self,
            objects: &self.objects,
            name: name.to_owned(),
        })
    }
}

impl<'a> Namespace<'a> {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The client of the API.
    #[must_use]
    pub fn objects(&self) -> &'a Objects {
        self.objects
    }

    /// Makes a Service; what the API server has added, its addresses for one, is in what is returned.
    ///
    /// # Errors
    /// If the API server refuses it.
    pub fn create_service(&self, name: &str, spec: Value) -> Result<Service> {
        self.create_labelled_service(name, json!({}), spec)
    }

    /// The same with labels.
    ///
    /// # Errors
    /// If the API server refuses it.
    pub fn create_labelled_service(&self, name: &str, labels: Value, spec: Value) -> Result<Service> {
        let mut object = json!({"metadata": {"name": name}});
        object["metadata"]["labels"] = labels;
        object["spec"] = spec;
        self.objects
            .create(&self.name, object)
            .with_context(|| format!("making Service {name}"))
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

    /// Changes the status of a Service by a merge patch, as a cloud's controller does.
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
    /// If there is none.
    pub fn delete_service(&self, name: &str) -> Result<()> {
        self.objects
            .delete::<Service>(&self.name, name, None)
            .with_context(|| format!("deleting Service {name}"))
    }

    /// The slices of a Service.
    ///
    /// # Errors
    /// If the API server does not answer.
    pub fn slices(&self, service: &str) -> Result<Vec<EndpointSlice>> {
        self.objects
            .list(&self.name, &format!("kubernetes.io/service-name={service}"))
    }

    /// Waits until the slices of a Service have so many endpoints that are ready.
    ///
    /// # Errors
    /// If that takes too long.
    pub fn wait_for_ready(&self, service: &str, count: usize) -> Result<()> {
        eventually_within(
            Duration::from_secs(60),
            &format!("{count} endpoints of {service}"),
            || {
                let slices = self.slices(service)?;
                let conditions = slice_endpoints(&slices).filter_map(|endpoint| endpoint.conditions.as_ref());
                let ready = conditions.filter(|conditions| conditions.ready == Some(true)).count();
                ensure!(ready == count, "{ready} of {slices:?}");
                Ok(())
            },
        )
    }

    /// Starts a pod on a node of the cluster and tells the API server of it; it is not ready yet.
    ///
    /// # Errors
    /// If the node has such a pod, or the API server refuses it.
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

/// All endpoints of slices.
pub fn slice_endpoints(slices: &[EndpointSlice]) -> impl Iterator<Item = &Endpoint> {
    slices.iter().flat_map(|slice| slice.endpoints.iter().flatten())
}
