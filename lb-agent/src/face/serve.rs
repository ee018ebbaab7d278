//! One listening socket with the routes behind it, bounded in every way: its port may be open to the world.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use super::bind;

/// Connections of one socket that are served at once; more wait until one has ended.
const CONNECTIONS: usize = 64;
/// How long a connection may take. It carries one request.
const PATIENCE: Duration = Duration::from_secs(10);
/// Time between a failure to accept (too many open files) and the next try.
const PAUSE: Duration = Duration::from_millis(100);

/// Listens at an address and answers, until it is dropped. Connections end with it.
///
/// # Errors
/// Where the address cannot be listened at.
pub(super) fn serve(at: SocketAddr, routes: Router) -> io::Result<impl Future<Output = Infallible> + Send> {
    let listener = bind::listen(at)?;
    debug!(%at, "listening");
    Ok(answer(listener, routes))
}

async fn answer(listener: TcpListener, routes: Router) -> Infallible {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    // Dropped with this future, and all connections with it.
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let place = Arc::clone(&places).acquire_owned().await;
        match listener.accept().await {
            Ok((stream, _)) => {
                let routes = routes.clone();
                connections.spawn(async move {
                    let _place = place;
                    answer_one(stream, routes).await;
                });
            }
            Err(error) => {
                warn!(%error, "a connection could not be accepted");
                sleep(PAUSE).await;
            }
        }
    }
}

async fn answer_one(stream: TcpStream, routes: Router) {
    let mut http = http1::Builder::new();
    http.keep_alive(false);
    let service = TowerToHyperService::new(routes);
    let connection = http.serve_connection(TokioIo::new(stream), service);
    match timeout(PATIENCE, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "a connection failed"),
        Err(_) => debug!("a connection took too long"),
    }
}
