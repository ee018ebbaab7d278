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

/// What one socket takes.
const BOUNDS: Bounds = Bounds {
    connections: 64,
    patience: Duration::from_secs(10),
};
/// Time between a failure to accept (too many open files) and the next try.
const PAUSE: Duration = Duration::from_millis(100);

/// How much a socket takes.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    /// Connections that are served at once; more wait until one has ended.
    connections: usize,
    /// How long a connection may take. It carries one request.
    patience: Duration,
}

/// Listens at an address and answers, until it is dropped. Connections end with it.
///
/// # Errors
/// Where the address cannot be listened at.
pub(crate) fn serve(at: SocketAddr, routes: Router) -> io::Result<impl Future<Output = Infallible> + Send> {
    let listener = bind::listen(at)?;
    debug!(%at, "listening");
    Ok(answer(listener, routes, BOUNDS))
}

async fn answer(listener: TcpListener, routes: Router, bounds: Bounds) -> Infallible {
    let places = Arc::new(Semaphore::new(bounds.connections));
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
                    answer_one(stream, routes, bounds.patience).await;
                });
            }
            Err(error) => {
                warn!(%error, "a connection could not be accepted");
                sleep(PAUSE).await;
            }
        }
    }
}

async fn answer_one(stream: TcpStream, routes: Router, patience: Duration) {
    let mut http = http1::Builder::new();
    http.keep_alive(false);
    let service = TowerToHyperService::new(routes);
    let connection = http.serve_connection(TokioIo::new(stream), service);
    match timeout(patience, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "a connection failed"),
        Err(_) => debug!("a connection took too long"),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use axum::routing::get;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    async fn ask(at: SocketAddr) -> io::Result<String> {
        let mut stream = TcpStream::connect(at).await?;
        // Without `Connection: close`: the server ends it.
        stream.write_all(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n").await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    }

    #[tokio::test]
    async fn who_says_nothing_is_cut_off_and_keeps_nobody_out() {
        let listener = bind::listen((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let at = listener.local_addr().unwrap();
        let bounds = Bounds {
            connections: 2,
            patience: Duration::from_millis(100),
        };
        let routes = Router::new().route("/", get(async || "well"));
        let server = tokio::spawn(answer(listener, routes, bounds));
        let mut silent = Vec::new();
        for _ in 0..8 {
            silent.push(TcpStream::connect(at).await.unwrap());
        }
        assert!(ask(at).await.unwrap().ends_with("\r\n\r\nwell"));
        for stream in &mut silent {
            assert_eq!(stream.read(&mut [0]).await.unwrap(), 0, "cut off");
        }
        assert!(ask(at).await.unwrap().ends_with("well"));
        server.abort();
        assert!(server.await.unwrap_err().is_cancelled());
        assert!(ask(at).await.is_err(), "closed");
    }
}
