//! Objects of the API, read and written from ordinary threads.

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

/// How long one request may take.
const REQUEST: Duration = Duration::from_secs(20);

/// A client of the API server whose connections are made in a place.
pub struct Objects {
    /// All of its threads have entered the place's network namespace.
    runtime: Runtime,
    client: Mutex<Option<Client>>,
}

impl Debug for Objects {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Objects").finish_non_exhaustive()
    }
}

/// What the API has.
pub trait Object:
    Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Serialize + Send + Sync + 'static
{
}

impl<K> Object for K where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Serialize + Send + Sync + 'static
{
}

/// What it has in namespaces.
pub trait Namespaced: Object + Resource<Scope = NamespaceResourceScope> {}

impl<K> Namespaced for K where K: Object + Resource<Scope = NamespaceResourceScope> {}

impl Objects {
    /// One that is not connected yet.
    pub(super) fn new(netns: &Netns) -> Result<Self> {
        let netns = netns.open()?;
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .thread_name("objects")
            .on_thread_start(move || {
                setns(&netns, CloneFlags::CLONE_NEWNET)
                    .expect("a thread may enter the namespace that its cluster made");
            })
            .build()
            .context("starting a runtime")?;
        Ok(Self {
            runtime,
            client: Mutex::default(),
        })
    }

    /// Takes server and credentials from a kubeconfig.
    pub(super) fn connect(&self, kubeconfig: &Path) -> Result<()> {
        let client = self.client_of(kubeconfig)?;
        *self.client.lock().unwrap_or_else(PoisonError::into_inner) = Some(client);
        Ok(())
    }

    /// Another client, which works on threads of this one.
    pub(super) fn client_of(&self, kubeconfig: &Path) -> Result<Client> {
        let kubeconfig = Kubeconfig::read_from(kubeconfig).context("reading a kubeconfig")?;
        self.run(async move {
            let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
            Ok(Client::try_from(config)?)
        })
    }

    /// Runs a request on a thread that is in the namespace.
    pub(super) fn run<T: Send + 'static>(&self, work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
        let task = self
            .runtime
            .spawn(async { timeout(scaled_timeout(REQUEST), work).await });
        let done = self.runtime.block_on(task).context("a request panicked")?;
        done.context("the API server does not answer")?
    }

    fn client(&self) -> Result<Client> {
        let client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        client.clone().context("there was no API server yet")
    }

    /// Runs a request of the caller's own making.
    ///
    /// # Errors
    /// If it fails, or takes too long.
    pub fn with<T, F>(&self, request: impl FnOnce(Client) -> F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        self.run(request(self.client()?))
    }

    /// Posts to a path, as to a subresource of an object, and returns the answer.
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

    /// Makes an object.
    ///
    /// # Errors
    /// If it is not one, or the API server refuses it.
    pub fn create<K: Namespaced>(&self, namespace: &str, object: Value) -> Result<K> {
        let object: K = serde_json::from_value(object).context("not such an object")?;
        let namespace = namespace.to_owned();
        self.with(|client| async move {
            let api = Api::<K>::namespaced(client, &namespace);
            Ok(api.create(&PostParams::default(), &object).await?)
        })
    }

    /// Makes an object that is in no namespace.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn create_global<K: Object>(&self, object: Value) -> Result<K> {
        let object: K = serde_json::from_value(object).context("not such an object")?;
        self.with(|client| async move { Ok(Api::<K>::all(client).create(&PostParams::default(), &object).await?) })
    }

    /// An object.
    ///
    /// # Errors
    /// If there is none.
    pub fn get<K: Namespaced>(&self, namespace: &str, name: &str) -> Result<K> {
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        self.with(|client| async move { Ok(Api::<K>::namespaced(client, &namespace).get(&name).await?) })
    }

    /// Objects with these labels, as `app=web`.
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

    /// The same for an object's status.
    ///
    /// # Errors
    /// If the API server refuses it.
    pub fn patch_status<K: Namespaced>(&self, namespace: &str, name: &str, change: Value) -> Result<K> {
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        self.with(|client| async move {
            let api = Api::<K>::namespaced(client, &namespace);
            Ok(api
                .patch_status(&name, &PatchParams::default(), &Patch::Merge(change))
                .await?)
        })
    }

    /// Changes an object that is in no namespace, or its status.
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

    /// Deletes an object, with so many seconds of grace if it is one that needs time to end.
    ///
    /// # Errors
    /// If the API server refuses it, or there is none.
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

    /// Deletes all objects of a kind in a namespace, without grace.
    ///
    /// # Errors
    /// If the API server refuses it.
    pub fn delete_all<K: Namespaced>(&self, namespace: &str) -> Result<()> {
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
