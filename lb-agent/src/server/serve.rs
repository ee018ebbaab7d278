//! One listening socket with its routes, limited in every respect: its port may be reachable from anywhere.

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

/// Limits of each socket.
const LIMITS: Limits = Limits {
    connections: 64,
    timeout: Duration::from_secs(10),
};
/// Delay after a failed accept (too many open files).
const PAUSE: Duration = Duration::from_millis(100);

/// Limits of a listening socket.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// Connections that are served at the same time; more wait until one has ended.
    connections: usize,
    /// Maximum duration of a connection, which carries one request.
    timeout: Duration,
}

/// Listens on an address, and returns a future that serves it. Dropping the future closes the socket and all
/// connections.
///
/// # Errors
/// If the address cannot be listened on.
pub(crate) fn serve(at: SocketAddr, routes: Router) -> io::Result<impl Future<Output = Infallible> + Send> {
    let listener = bind::listen(at)?;
    debug!(%at, "listening");
    Ok(answer(listener, routes, LIMITS))
}

async fn answer(listener: TcpListener, routes: Router, limits: Limits) -> Infallible {
    let permits = Arc::new(Semaphore::new(limits.connections));
    // Dropped with this future, and all connections with it.
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let permit = Arc::clone(&permits).acquire_owned().await;
        match listener.accept().await {
            Ok((stream, _)) => {
                let routes = routes.clone();
                connections.spawn(async move {
                    let _permit = permit;
                    answer_one(stream, routes, limits.timeout).await;
                });
            }
            Err(error) => {
                warn!(%error, "failed to accept a connection");
                sleep(PAUSE).await;
            }
        }
    }
}

async fn answer_one(stream: TcpStream, routes: Router, limit: Duration) {
    let mut http = http1::Builder::new();
    http.keep_alive(false);
    let service = TowerToHyperService::new(routes);
    let connection = http.serve_connection(TokioIo::new(stream), service);
    match timeout(limit, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "a connection failed"),
        Err(_) => debug!("a connection exceeded its time limit"),
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
        // Without `Connection: close`, so that the server closes the connection.
        stream.write_all(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n").await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    }

    #[tokio::test]
    async fn silent_connections_time_out_and_do_not_block_others() {
        let listener = bind::listen((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let at = listener.local_addr().unwrap();
        let limits = Limits {
            connections: 2,
            timeout: Duration::from_millis(100),
        };
        let routes = Router::new().route("/", get(async || "well"));
        let server = tokio::spawn(answer(listener, routes, limits));
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
