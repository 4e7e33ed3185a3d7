//! HTTPS to one server: its connections, and one request over one of them.
//!
//! Knows nothing of Proxmox's API but how its server treats connections (see [`stream`]). What
//! matters to everybody above is whether a request that failed can have been received; that is in
//! [`Broken`].
//!
//! On hyper and not on reqwest, which the tests use: Proxmox answers each call of its privileged daemon
//! with `Connection: close` and `Connection: Keep-Alive` and keeps the connection. reqwest gives it up, so
//! that each status, start and stop would cost a TLS handshake; nor does it tell whether a request was
//! written. `make bench` compares both with the same bytes by hand: reqwest takes four times as long for a
//! status or a start, and six to eight times the processor time.

mod body;
mod stream;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper::body::{Body as _, Bytes};
use hyper::client::conn::http1::SendRequest;
use hyper::ext::ReasonPhrase;
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderMap, HeaderValue};
use hyper::{Method, Response, StatusCode};
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use body::Body;
pub(super) use body::{Part, Payload};
use stream::Stream;

/// Below the 5 s after which pveproxy closes an idle connection.
const POOL_IDLE: Duration = Duration::from_secs(3);
/// Below the 100 requests after which pveproxy closes a connection.
const MAX_USES: u32 = 90;
/// Idle connections that are kept.
const MAX_IDLE: usize = 2;
/// Far above any answer the shim asks for; a server gone mad must not fill the memory.
const MAX_BODY: usize = 16 << 20;

/// A server and its idle connections.
pub(super) struct Server {
    url: String,
    /// Without the brackets of an IPv6 address.
    host: String,
    port: u16,
    authority: HeaderValue,
    name: ServerName<'static>,
    tls: TlsConnector,
    connect_timeout: Duration,
    idle: Mutex<Idle>,
}

#[derive(Default)]
struct Idle {
    /// The last one was used last.
    connections: Vec<Connection>,
    /// A task watches them grow old.
    watched: bool,
}

struct Connection {
    sender: SendRequest<Body>,
    /// Tells the stream that an answer's head comes next.
    awaiting_head: Arc<AtomicBool>,
    last_used: Instant,
    uses: u32,
}

/// A request; the credentials are among its headers.
pub(super) struct Request<'a> {
    pub(super) method: Method,
    /// With its query.
    pub(super) path: &'a str,
    pub(super) headers: HeaderMap,
    pub(super) payload: &'a Payload,
}

/// A whole answer.
pub(super) struct Answer {
    pub(super) status: u16,
    /// As sent; the text of a 401 is nowhere else.
    pub(super) reason: String,
    pub(super) body: Vec<u8>,
}

/// What became of a request for another protocol.
pub(super) enum Upgrade {
    /// The server speaks it now.
    Done(Box<Upgraded>),
    Refused(Answer),
}

/// A connection that is no longer one of HTTP.
pub(super) struct Upgraded {
    /// Of the answer.
    pub(super) headers: HeaderMap,
    pub(super) stream: TlsStream<TcpStream>,
    /// What came together with the answer.
    pub(super) early: Bytes,
}

/// Why there is no whole answer.
#[derive(Debug)]
pub(super) enum Broken {
    /// No connection: the request was not sent.
    Connect(io::Error),
    /// The request cannot be made: it was not sent.
    Unsendable(String),
    /// No answer in time. `sent` if the request may have been received.
    Timeout { sent: bool },
    /// The connection broke when the request may have been received.
    Lost(hyper::Error),
    /// There is more of the answer than anybody wants.
    TooLong { status: u16 },
}

impl Server {
    /// A server at `url`, which is `https://HOST:PORT`. Does not connect yet.
    pub(super) fn new(
        url: &str,
        tls: TlsConnector,
        connect_timeout: Duration,
    ) -> Result<Arc<Server>, String> {
        let bad = || format!("'{url}' is not https://HOST:PORT");
        let authority = url.strip_prefix("https://").ok_or_else(bad)?;
        let (host, port) = authority.rsplit_once(':').ok_or_else(bad)?;
        let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        Ok(Arc::new(Server {
            url: url.to_owned(),
            host: host.to_owned(),
            port: port.parse().map_err(|_| bad())?,
            authority: HeaderValue::from_str(authority).map_err(|_| bad())?,
            name: ServerName::try_from(host.to_owned()).map_err(|_| bad())?,
            tls,
            connect_timeout,
            idle: Mutex::default(),
        }))
    }

    /// `https://HOST:PORT`
    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// Sends a request once and reads the whole answer, all before `deadline`.
    ///
    /// A pooled connection that turns out closed before anything was written is replaced. Dropping
    /// the future closes the connection in use; the server may carry the request out all the same.
    pub(super) async fn exchange(
        self: &Arc<Self>,
        request: &Request<'_>,
        deadline: Instant,
    ) -> Result<Answer, Broken> {
        let (mut connection, response) = self.send(request, deadline).await?;
        let late = |_| Broken::Timeout { sent: true };
        let answer = timeout_at(deadline, read(response)).await.map_err(late)??;
        connection.last_used = Instant::now();
        connection.uses += 1;
        self.give_back(connection);
        Ok(answer)
    }

    /// Sends a request for another protocol, before `deadline`.
    pub(super) async fn upgrade(
        self: &Arc<Self>,
        request: &Request<'_>,
        deadline: Instant,
    ) -> Result<Upgrade, Broken> {
        let (_connection, response) = self.send(request, deadline).await?;
        let late = |_| Broken::Timeout { sent: true };
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            let answer = timeout_at(deadline, read(response)).await.map_err(late)??;
            return Ok(Upgrade::Refused(answer));
        }
        let headers = response.headers().clone();
        let upgraded = timeout_at(deadline, hyper::upgrade::on(response)).await.map_err(late)?;
        // Invariant: each connection is over a `Stream`.
        let Ok(parts) = upgraded.map_err(Broken::Lost)?.downcast::<Stream>() else {
            return Err(Broken::Unsendable("the upgraded connection is of another kind".into()));
        };
        let (stream, early) = (parts.io.into_inner(), parts.read_buf);
        Ok(Upgrade::Done(Box::new(Upgraded { headers, stream, early })))
    }

    async fn send(
        self: &Arc<Self>,
        request: &Request<'_>,
        deadline: Instant,
    ) -> Result<(Connection, Response<hyper::body::Incoming>), Broken> {
        let mut message = self.message(request).await?;
        loop {
            let (mut connection, fresh) = match self.take(deadline).await {
                Some(connection) => (connection, false),
                None => (self.connect(deadline).await?, true),
            };
            connection.awaiting_head.store(true, Ordering::Relaxed);
            let answer = timeout_at(deadline, connection.sender.try_send_request(message)).await;
            let mut error = match answer.map_err(|_| Broken::Timeout { sent: true })? {
                Ok(response) => return Ok((connection, response)),
                Err(error) => error,
            };
            match error.take_message() {
                // Nothing of it was written, so that it can go over another connection. This ends:
                // each round takes one out of the pool.
                Some(back) if !fresh => message = back,
                Some(_) => return Err(Broken::Connect(io::Error::other(error.into_error()))),
                None => return Err(Broken::Lost(error.into_error())),
            }
        }
    }

    async fn message(&self, request: &Request<'_>) -> Result<hyper::Request<Body>, Broken> {
        let (body, content_type) = request.payload.body().await.map_err(Broken::Unsendable)?;
        let message = hyper::Request::builder()
            .method(request.method.clone())
            .uri(request.path)
            .header(HOST, self.authority.clone())
            .body(body);
        let mut message =
            message.map_err(|e| Broken::Unsendable(format!("'{}': {e}", request.path)))?;
        message.headers_mut().extend(request.headers.clone());
        if let Some(content_type) = content_type {
            message.headers_mut().insert(CONTENT_TYPE, content_type);
        } else if request.method != Method::GET {
            // hyper leaves it out; RFC 9110 wants it where content could be.
            message.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
        }
        Ok(message)
    }

    /// TCP, TLS and HTTP, within the limit for connections.
    async fn connect(&self, deadline: Instant) -> Result<Connection, Broken> {
        let limit = deadline.min(Instant::now() + self.connect_timeout);
        let connection = timeout_at(limit, async {
            let tcp = TcpStream::connect((self.host.as_str(), self.port)).await?;
            tcp.set_nodelay(true)?;
            let tls = self.tls.connect(self.name.clone(), tcp).await?;
            let awaiting_head = Arc::new(AtomicBool::new(false));
            let stream = Stream::new(tls, awaiting_head.clone());
            let handshake = hyper::client::conn::http1::handshake(stream);
            let (sender, driver) = handshake.await.map_err(io::Error::other)?;
            // Ends when the sender is dropped or the server closes. Its errors reach the request
            // they concern.
            tokio::spawn(async move { drop(driver.with_upgrades().await) });
            Ok(Connection { sender, awaiting_head, last_used: Instant::now(), uses: 0 })
        });
        let connection = connection.await.map_err(|_| Broken::Timeout { sent: false })?;
        connection.map_err(Broken::Connect)
    }

    /// An idle connection that is still open.
    async fn take(&self, deadline: Instant) -> Option<Connection> {
        loop {
            let mut connection = self.idle().connections.pop()?;
            let young = connection.last_used.elapsed() < POOL_IDLE;
            // At once, but for the driver's turn after the last answer.
            if young && matches!(timeout_at(deadline, connection.sender.ready()).await, Ok(Ok(())))
            {
                return Some(connection);
            }
        }
    }

    fn give_back(self: &Arc<Self>, connection: Connection) {
        if connection.uses >= MAX_USES || connection.sender.is_closed() {
            return;
        }
        let mut idle = self.idle();
        if idle.connections.len() >= MAX_IDLE {
            idle.connections.remove(0);
        }
        idle.connections.push(connection);
        if !std::mem::replace(&mut idle.watched, true) {
            tokio::spawn(watch(Arc::downgrade(self)));
        }
    }

    /// Drops idle connections that have become too old, and tells when the next one will.
    fn evict(&self) -> Option<Instant> {
        let mut idle = self.idle();
        idle.connections.retain(|connection| connection.last_used.elapsed() < POOL_IDLE);
        let oldest = idle.connections.iter().map(|connection| connection.last_used).min();
        idle.watched = oldest.is_some();
        oldest.map(|last_used| last_used + POOL_IDLE)
    }

    /// Never held across an await.
    fn idle(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Closes idle connections before the server does it; ends when there are none.
async fn watch(server: std::sync::Weak<Server>) {
    let mut next = Instant::now() + POOL_IDLE;
    loop {
        sleep_until(next).await;
        match server.upgrade().and_then(|server| server.evict()) {
            Some(time) => next = time,
            None => return,
        }
    }
}

async fn read(response: Response<hyper::body::Incoming>) -> Result<Answer, Broken> {
    let status = response.status();
    let reason = response
        .extensions()
        .get::<ReasonPhrase>()
        .map(|reason| String::from_utf8_lossy(reason.as_bytes()).into_owned());
    let reason = reason.or_else(|| status.canonical_reason().map(str::to_owned));
    let (status, reason) = (status.as_u16(), reason.unwrap_or_default());
    let told = response.body().size_hint().lower();
    if told > MAX_BODY as u64 {
        return Err(Broken::TooLong { status });
    }
    let mut incoming = std::pin::pin!(response.into_body());
    let mut body = Vec::new();
    while let Some(frame) = std::future::poll_fn(|cx| incoming.as_mut().poll_frame(cx)).await {
        let Ok(data) = frame.map_err(Broken::Lost)?.into_data() else { continue };
        if body.len() + data.len() > MAX_BODY {
            return Err(Broken::TooLong { status });
        }
        body.extend_from_slice(&data);
    }
    Ok(Answer { status, reason, body })
}
