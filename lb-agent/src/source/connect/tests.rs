//! Several servers on loopback, of which some fail.

use std::net::SocketAddr;
use std::sync::atomic::AtomicU16;

use axum::Router;
use axum::http::StatusCode as Answer;
use k8s_openapi::api::core::v1;
use kube::Api;
use kube::api::ListParams;
use tokio::net::TcpListener;

use super::*;

/// A server that answers every request with a configured status, and with an empty list if that is 200.
struct Server {
    address: SocketAddr,
    status: Arc<AtomicU16>,
    asked: Arc<AtomicUsize>,
}

impl Server {
    async fn start(status: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (status, asked) = (Arc::new(AtomicU16::new(status)), Arc::<AtomicUsize>::default());
        let (now, count) = (Arc::clone(&status), Arc::clone(&asked));
        let answer = move || {
            count.fetch_add(1, Ordering::Relaxed);
            let status = Answer::from_u16(now.load(Ordering::Relaxed)).unwrap();
            let list = r#"{"kind": "NodeList", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": []}"#;
            async move { (status, [("content-type", "application/json")], list) }
        };
        tokio::spawn(async move { axum::serve(listener, Router::new().fallback(answer)).await });
        Self { address, status, asked }
    }

    fn url(&self) -> Uri {
        format!("http://{}", self.address).parse().unwrap()
    }

    fn set(&self, status: u16) {
        self.status.store(status, Ordering::Relaxed);
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

/// The URL of a port without a listener.
async fn nobody() -> Uri {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    format!("http://{}", listener.local_addr().unwrap()).parse().unwrap()
}

fn kubeconfig(server: &str, more: &str) -> tempfile::NamedTempFile {
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{{name: c, context: {{cluster: k, user: u}}}}]\n\
         clusters: [{{name: k, cluster: {{server: \"{server}\"{more}}}}}]\nusers: [{{name: u, user: {{token: t}}}}]\n"
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

async fn connection(servers: Vec<Uri>) -> Connection {
    let file = kubeconfig("http://127.0.0.1:1", "");
    let settings = ApiServerSettings {
        kubeconfig: Some(file.path().to_owned()),
        servers,
    };
    connect(&settings).await.unwrap()
}

async fn list(connection: &Connection) -> Result<(), kube::Error> {
    let nodes: Api<v1::Node> = Api::all(connection.client.clone());
    nodes.list(&ListParams::default()).await.map(drop)
}

#[tokio::test]
async fn the_next_server_is_asked_when_one_is_away_or_unavailable() {
    let (first, second) = (Server::start(200).await, Server::start(200).await);
    let connection = connection(vec![nobody().await, first.url(), second.url()]).await;
    for _ in 0..3 {
        list(&connection).await.unwrap();
    }
    assert_eq!(
        (first.asked(), second.asked()),
        (3, 0),
        "a server that answers is stayed with"
    );
    first.set(503);
    list(&connection).await.unwrap();
    assert_eq!((first.asked(), second.asked()), (4, 1));
    list(&connection).await.unwrap();
    assert_eq!((first.asked(), second.asked()), (4, 2));
    assert!(connection.failures.borrow().is_empty());
}

#[tokio::test]
async fn what_fails_everywhere_is_noted_until_it_works() {
    let server = Server::start(503).await;
    let connection = connection(vec![server.url(), nobody().await]).await;
    list(&connection).await.unwrap_err();
    let failures = || connection.failures.borrow().clone();
    assert_eq!(failures().keys().collect::<Vec<_>>(), ["/api/v1/nodes"]);
    server.set(403);
    list(&connection).await.unwrap_err();
    assert_eq!(failures()["/api/v1/nodes"], "403 Forbidden");
    server.set(410);
    list(&connection).await.unwrap_err();
    assert!(failures().is_empty(), "a new list follows");
    server.set(200);
    list(&connection).await.unwrap();
    assert!(failures().is_empty());
}

#[tokio::test]
async fn the_url_of_the_kubeconfig_is_used_where_no_other_is_given() {
    let server = Server::start(200).await;
    let file = kubeconfig(&server.url().to_string(), "");
    let settings = ApiServerSettings {
        kubeconfig: Some(file.path().to_owned()),
        servers: Vec::new(),
    };
    list(&connect(&settings).await.unwrap()).await.unwrap();
    assert_eq!(server.asked(), 1);
}

#[tokio::test]
async fn settings_that_cannot_be_used_are_named() {
    let file = kubeconfig("http://127.0.0.1:1", ", proxy-url: \"http://127.0.0.1:2\"");
    let settings = |path: &std::path::Path| ApiServerSettings {
        kubeconfig: Some(path.to_owned()),
        servers: Vec::new(),
    };
    let error = connect(&settings(file.path())).await.unwrap_err().to_string();
    assert!(error.contains("http://127.0.0.1:2"), "{error}");
    std::fs::write(file.path(), "clusters: 7").unwrap();
    let error = connect(&settings(file.path())).await.unwrap_err().to_string();
    assert!(error.contains(file.path().to_str().unwrap()), "{error}");
    let error = connect(&settings("/nonexistent/kubeconfig".as_ref()))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("/nonexistent/kubeconfig"), "{error}");
}
