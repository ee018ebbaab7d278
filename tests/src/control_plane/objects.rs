//! A blocking client for objects of the Kubernetes API.

use std::fmt::Debug;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::NamespaceResourceScope;
use kube::{Client, Config, Resource};
use nix::sched::{CloneFlags, setns};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;

use crate::{Netns, scaled_timeout};

/// Time limit of one request.
const REQUEST: Duration = Duration::from_secs(20);

/// A client of the API server that opens its connections in a network namespace.
pub struct Objects {
    /// All threads of the runtime have entered the network namespace.
    runtime: Runtime,
    client: Mutex<Option<Client>>,
}

impl Debug for Objects {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Objects").finish_non_exhaustive()
    }
}

/// A type of objects of the API.
pub trait Object:
    Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Serialize + Send + Sync + 'static
{
}

impl<K> Object for K where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Serialize + Send + Sync + 'static
{
}

/// A type of objects that belong to a namespace.
pub trait Namespaced: Object + Resource<Scope = NamespaceResourceScope> {}

impl<K> Namespaced for K where K: Object + Resource<Scope = NamespaceResourceScope> {}

impl Objects {
    /// Creates a client that is not connected yet.
    pub(super) fn new(netns: &Netns) -> Result<Self> {
        let netns = netns.open()?;
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .thread_name("objects")
            .on_thread_start(move || {
                setns(&netns, CloneFlags::CLONE_NEWNET).expect("a thread may enter a namespace of its own cluster");
            })
            .build()
            .context("starting a runtime")?;
        Ok(Self {
            runtime,
            client: Mutex::default(),
        })
    }

    /// Sets server and credentials from a kubeconfig.
    pub(super) fn connect(&self, kubeconfig: &Path) -> Result<()> {
        let client = self.client_of(kubeconfig)?;
        *self.client.lock().unwrap_or_else(PoisonError::into_inner) = Some(client);
        Ok(())
    }

    /// Returns a `kube` client for a kubeconfig. It must be used on threads of this runtime.
    pub(super) fn client_of(&self, kubeconfig: &Path) -> Result<Client> {
        let kubeconfig = Kubeconfig::read_from(kubeconfig).context("reading a kubeconfig")?;
        self.run(async move {
            let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
            Ok(Client::try_from(config)?)
        })
    }

    /// Runs a request on a thread in the network namespace and waits for its result.
    pub(super) fn run<T: Send + 'static>(&self, work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
        let task = self
            .runtime
            .spawn(async { timeout(scaled_timeout(REQUEST), work).await });
        let done = self.runtime.block_on(task).context("a request panicked")?;
        done.context("the API server does not answer")?
    }

    fn client(&self) -> Result<Client> {
        let client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        client.clone().context("the API server was not started yet")
    }

    /// Runs a request that `request` makes with the client, and waits for its result.
    ///
    /// # Errors
    /// If the request fails, or takes too long.
    pub fn with<T, F>(&self, request: impl FnOnce(Client) -> F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        self.run(request(self.client()?))
    }

    /// Sends a POST request to a path, for example of a subresource, and returns the response.
    ///
    /// # Errors
    /// If the API server refuses it.
    pub fn post(&self, path: &str, object: &Value) -> Result<Value> {
        let request = http::Request::post(path)
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(object.to_string().into_bytes())
            .context("not a path")?;
        self.with(|client| async move { Ok(client.request(request).await?) })
    }

    /// Creates an object in a namespace.
    ///
    /// # Errors
    /// If `object` is not of type `K`, or the API server refuses it.
    pub fn create<K: Namespaced>(&self, namespace: &str, object: Value) -> Result<K> {
        let object: K = serde_json::from_value(object).context("not an object of that type")?;
        let namespace = namespace.to_owned();
        self.with(|client| async move {
            let api = Api::<K>::namespaced(client, &namespace);
            Ok(api.create(&PostParams::default(), &object).await?)
        })
    }

    /// Creates an object without a namespace.
    ///
    /// # Errors
    /// If `object` is not of type `K`, or the API server refuses it.
    pub fn create_global<K: Object>(&self, object: Value) -> Result<K> {
        let object: K = serde_json::from_value(object).context("not an object of that type")?;
        self.with(|client| async move { Ok(Api::<K>::all(client).create(&PostParams::default(), &object).await?) })
    }

    /// Returns an object.
    ///
    /// # Errors
    /// If there is no such object.
    pub fn get<K: Namespaced>(&self, namespace: &str, name: &str) -> Result<K> {
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        self.with(|client| async move { Ok(Api::<K>::namespaced(client, &namespace).get(&name).await?) })
    }

    /// Returns the objects with these labels, for example `app=web`.
    ///
    /// # Errors
    /// If the API server does not answer.
    pub fn list<K: Namespaced>(&self, namespace: &str, labels: &str) -> Result<Vec<K>> {
        let (namespace, params) = (namespace.to_owned(), ListParams::default().labels(labels));
        self.with(|client| async move { Ok(Api::<K>::namespaced(client, &namespace).list(&params).await?.items) })
    }

    /// Merges a change into an object (RFC 7386: lists are replaced, null removes).
    ///
    /// # Errors
    /// If the API server refuses it.
    pub fn patch<K: Namespaced>(&self, namespace: &str, name: &str, change: Value) -> Result<K> {
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        self.with(|client| async move {
            let api = Api::<K>::namespaced(client, &namespace);
            Ok(api.patch(&name, &PatchParams::default(), &Patch::Merge(change)).await?)
        })
    }

    /// Merges a change into the status of an object, like [`Self::patch`].
    ///
    /// # Errors
    /// If the API server refuses it.
    pub(crate) fn patch_status<K: Namespaced>(&self, namespace: &str, name: &str, change: Value) -> Result<K> {
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        self.with(|client| async move {
            let api = Api::<K>::namespaced(client, &namespace);
            Ok(api
                .patch_status(&name, &PatchParams::default(), &Patch::Merge(change))
                .await?)
        })
    }

    /// Merges a change into an object without a namespace, or into its status.
    ///
    /// # Errors
    /// If the API server refuses it.
    pub fn patch_global<K: Object>(&self, name: &str, change: Value, status: bool) -> Result<K> {
        let name = name.to_owned();
        self.with(|client| async move {
            let (api, params, patch) = (Api::<K>::all(client), PatchParams::default(), Patch::Merge(change));
            Ok(if status {
                api.patch_status(&name, &params, &patch).await?
            } else {
                api.patch(&name, &params, &patch).await?
            })
        })
    }

    /// Deletes an object, with a grace period in seconds for a pod.
    ///
    /// # Errors
    /// If the API server refuses it, or there is no such object.
    pub fn delete<K: Namespaced>(&self, namespace: &str, name: &str, grace: Option<u32>) -> Result<()> {
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        let params = DeleteParams {
            grace_period_seconds: grace,
            ..DeleteParams::default()
        };
        self.with(|client| async move {
            Api::<K>::namespaced(client, &namespace).delete(&name, &params).await?;
            Ok(())
        })
    }

    /// Deletes all objects of a type in a namespace, without a grace period.
    ///
    /// # Errors
    /// If the API server refuses it.
    pub(super) fn delete_all<K: Namespaced>(&self, namespace: &str) -> Result<()> {
        let namespace = namespace.to_owned();
        let params = DeleteParams {
            grace_period_seconds: Some(0),
            ..DeleteParams::default()
        };
        self.with(|client| async move {
            let api = Api::<K>::namespaced(client, &namespace);
            api.delete_collection(&params, &ListParams::default()).await?;
            Ok(())
        })
    }
}
