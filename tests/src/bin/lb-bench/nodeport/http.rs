//! An HTTP client with several connections in parallel, and a server. Each is a process; the client receives an order per
//! line.

use std::cell::RefCell;
use std::env::current_exe;
use std::io::{Write as _, stdin, stdout};
use std::net::{Ipv6Addr, SocketAddr};
use std::process::{ChildStdin, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode, header};
use axum::routing::get;
use axum::serve::ListenerExt as _;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use hyper::client::conn::http1::{Connection, SendRequest, handshake};
use hyper_util::rt::TokioIo;
use lb_tests::{Netns, Process, monotonic_ns};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use crate::objects::BACKEND_PORT;
use crate::worker::stay_on_one_processor;

/// Connections in parallel.
const CONNECTIONS: usize = 16;

/// Time limit of one order.
const PATIENCE: Duration = Duration::from_secs(60);
/// Time limit of one request.
const SILENCE: Duration = Duration::from_secs(10);
/// Time limit for the start of a server.
const START: Duration = Duration::from_secs(20);

const ANSWER: &str = "hello\n";

/// An order: the requests that the client makes.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) to: SocketAddr,
    pub(crate) requests: u32,
    /// True for a new connection per request; otherwise connections are opened before the measurement.
    pub(crate) fresh: bool,
}

/// Result of an order.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Done {
    /// Nanoseconds of each request, including its connection if that is new.
    pub(crate) times: Vec<u32>,
    pub(crate) seconds: f64,
}

/// Handle of a client process.
pub(crate) struct Client {
    process: Process,
    orders: ChildStdin,
}

impl Client {
    pub(crate) fn start(netns: &Netns) -> Result<Self> {
        let mut command = netns.command(current_exe().context("finding this program")?)?;
        let mut process = Process::spawn_reading(command.arg("http-client").stdin(Stdio::piped()))?;
        let orders = process.take_stdin().context("a client has a standard input")?;
        Ok(Self { process, orders })
    }

    /// Sends an order to the client and waits for the result.
    pub(crate) fn order(&mut self, order: &Order) -> Result<Done> {
        let line = serde_json::to_string(order).context("writing JSON")?;
        writeln!(self.orders, "{line}").context("writing to a client")?;
        let answer = self.process.line(PATIENCE)?;
        serde_json::from_str(&answer).with_context(|| format!("the client sent an unexpected line: {answer:?}"))
    }
}

/// Starts a server on all addresses of a namespace.
pub(crate) fn serve(netns: &Netns) -> Result<Process> {
    let mut command = netns.command(current_exe().context("finding this program")?)?;
    Process::spawn_ready(command.arg("http-server"), START)
}

/// Runs the server process until it is killed.
#[tokio::main(flavor = "current_thread")]
pub(crate) async fn run_server() -> Result<ExitCode> {
    stay_on_one_processor()?;
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, BACKEND_PORT)).await;
    let listener = listener.context("listening")?.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            eprintln!("TCP_NODELAY: {error}");
        }
    });
    writeln!(stdout(), "ready").context("writing to standard output")?;
    let routes = Router::new().route("/", get(async || ANSWER));
    axum::serve(listener, routes).await.context("serving")?;
    Ok(ExitCode::SUCCESS)
}

/// Runs the client process until its standard input ends.
pub(crate) fn run_client() -> Result<ExitCode> {
    stay_on_one_processor()?;
    for line in stdin().lines() {
        let order: Order = serde_json::from_str(&line.context("reading orders")?).context("reading an order")?;
        let done = carry_out(order).with_context(|| format!("asking {}", order.to))?;
        let line = serde_json::to_string(&done).context("writing JSON")?;
        writeln!(stdout(), "{line}").context("writing to standard output")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Carries out an order. Kept connections have made a request before the time is taken, and are closed at the end.
#[tokio::main(flavor = "current_thread")]
async fn carry_out(order: Order) -> Result<Done> {
    let kept = RefCell::new(Vec::new());
    if !order.fresh {
        for _ in 0..CONNECTIONS {
            let sender = in_time(async {
                let (mut sender, connection) = open(order.to).await?;
                tokio::spawn(connection);
                ask(&mut sender, "keep-alive").await?;
                Ok(sender)
            });
            let sender = sender.await?;
            kept.borrow_mut().push(sender);
        }
    }
    let one = async || {
        let begun = monotonic_ns();
        if order.fresh {
            ask_once(order.to).await?;
        } else {
            let mut sender = kept.borrow_mut().pop().context("no connection is free")?;
            ask(&mut sender, "keep-alive").await?;
            kept.borrow_mut().push(sender);
        }
        Ok((monotonic_ns() - begun).try_into().unwrap_or(u32::MAX))
    };
    let requests = stream::iter(0..order.requests).map(|_| in_time(one()));
    let start = monotonic_ns();
    Ok(Done {
        times: requests.buffer_unordered(CONNECTIONS).try_collect().await?,
        seconds: (monotonic_ns() - start) as f64 / 1e9,
    })
}

async fn in_time<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let done = timeout(SILENCE, work).await;
    done.with_context(|| format!("no answer within {SILENCE:?}"))?
}

/// Connects. The returned connection makes progress only while it is polled.
async fn open(to: SocketAddr) -> Result<(SendRequest<Body>, Connection<TokioIo<TcpStream>, Body>)> {
    let stream = TcpStream::connect(to).await.context("connecting")?;
    stream.set_nodelay(true).context("TCP_NODELAY")?;
    handshake(TokioIo::new(stream)).await.context("beginning to ask")
}

/// Makes a request and checks the response.
async fn ask(sender: &mut SendRequest<Body>, connection: &'static str) -> Result<()> {
    let request = Request::get("/")
        .header(header::HOST, "bench")
        .header(header::CONNECTION, connection);
    let request = request.body(Body::empty()).context("making a request")?;
    sender.ready().await.context("waiting for a connection")?;
    let (head, body) = sender.send_request(request).await.context("asking")?.into_parts();
    let body = to_bytes(Body::new(body), ANSWER.len()).await.context("reading")?;
    ensure!(
        head.status == StatusCode::OK && body == ANSWER,
        "the answer is another one"
    );
    Ok(())
}

/// Makes a request over a new connection, and waits until the server has closed it: the side that closes first keeps its port
/// in TIME_WAIT.
async fn ask_once(to: SocketAddr) -> Result<()> {
    let (mut sender, connection) = open(to).await?;
    let rest = async { connection.without_shutdown().await.context("asking") };
    let ((), rest) = tokio::try_join!(ask(&mut sender, "close"), rest)?;
    let length = rest.io.into_inner().read(&mut [0]).await.context("reading")?;
    ensure!(length == 0, "the server sent data after its response");
    Ok(())
}
