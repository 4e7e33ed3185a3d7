//! The REST client: how a call is sent, repeated and read back. The calls themselves are in the
//! modules below, by area of the API.
//!
//! # Connections
//!
//! HTTP/1.1 only, because a 401 has its text in the reason phrase alone. Connections are kept
//! across calls, also where Proxmox says that it closes and does not (`http::stream`), and dropped
//! when they were idle for 3 s, before the server does it after 5 s; a request that meets a closed
//! one goes over a new one. TLS sessions are resumed.
//!
//! # Time
//!
//! `proxmox.request_timeout` bounds a call as a whole, login, repetitions and other endpoints
//! included; within it `proxmox.connect_timeout` bounds each connection's set-up. Reading back what
//! became of a change may take as long again and 1.5 s more. What waits for a task takes a deadline
//! of its own. Dropping a call's future closes its connection; a change that was sent may take
//! effect all the same.
//!
//! # Several endpoints
//!
//! They are nodes of one cluster, each of which answers for all. The first is preferred; one that
//! failed is tried last for [`REST`]. A call goes on to the next endpoint
//!
//! - if it was provably not sent: no connection, or a certificate that is not trusted;
//! - if it is a GET, also when its connection broke, its answer was lost or it took too long. So
//!   that there is time left for that, the endpoints share a GET's time.
//!
//! # What is repeated
//!
//! - A request of which nothing was written, because its pooled connection turned out closed:
//!   always.
//! - GET: up to [`GET_ATTEMPTS`] times at one endpoint when its connection broke. Not after a
//!   time-out: its caller has waited long enough.
//! - POST and DELETE: never. When it is unclear whether one took effect, the node is asked: for the
//!   task that it would have started, then for the state that it would have changed. What is found
//!   is the answer; if nothing is found, the first error is ([`Client::create`], [`Client::start`],
//!   [`Client::stop`], [`Client::destroy`] and all others that start a task).
//! - [`Client::stop_ours`] and [`Client::destroy_ours`] may be repeated as a whole, because they
//!   verify the CT's identity anew before each call and what they ask for is idempotent.
//! - PUT: never. Proxmox stores some changes although it answers with an error, so after any error
//!   the caller reads the configuration again. That of a size starts a task, as a POST does.
//! - A login: as a GET, because it changes nothing.
//!
//! A 401 is not repeated, as Proxmox holds each back for 3 s; but a ticket that was not obtained
//! for the very call may have died early, so that one new login is tried. The refusal proves that
//! the first request did nothing.

mod access;
mod change;
mod cluster;
mod endpoints;
mod lxc;
mod ours;
mod storage;
mod tasks;
mod terminal;

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper::Method;
use hyper::header::HeaderMap;
use secrecy::ExposeSecret;
use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::credentials::{Credentials, Ready};
use super::error::{self, Call, Context, Error};
use super::http::{Answer, Payload, Request, Server};
use super::tls;
use super::types::Loose;
use crate::config::{Config, Proxmox, Vmid};
use change::Told;
use endpoints::Endpoints;
pub use lxc::CloneOptions;
pub use ours::Outcome;
pub use storage::Upload;
pub use tasks::TaskFilter;
pub use terminal::Terminal;

const GET_ATTEMPTS: u32 = 3;
/// The pause between two of them.
const GET_PAUSE: Duration = Duration::from_millis(20);
/// How long an endpoint that failed comes last.
const REST: Duration = Duration::from_secs(30);

/// A client of a cluster's API, for the CTs of one node. Cloning is cheap; clones share
/// connections.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    endpoints: Endpoints,
    settings: Proxmox,
    credentials: Credentials,
    /// Never held across an await.
    told: Mutex<Told>,
}

/// What a call answered.
struct Reply {
    data: Value,
    /// Of a list, how many entries there are; only some lists say so.
    total: Option<u64>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let settings = &self.inner.settings;
        f.debug_struct("Client")
            .field("endpoints", &settings.endpoints)
            .field("node", &settings.node)
            .field("who", &self.inner.credentials.who())
            .finish_non_exhaustive()
    }
}

impl Client {
    /// Reads the secret and the certificates that `config` names and prepares the client. Does not
    /// connect yet.
    pub fn new(config: &Config) -> Result<Client, Error> {
        let settings = config.proxmox.clone();
        let credentials = Credentials::load(&settings.login)?;
        let tls = tls::connector(&settings.trust)?;
        let server = |url: &String| Server::new(url, tls.clone(), settings.connect_timeout);
        let servers = settings.endpoints.iter().map(server).collect::<Result<_, _>>();
        let endpoints = Endpoints::new(servers.map_err(|reason| Error::Setup { reason })?);
        let inner = Inner { endpoints, settings, credentials, told: Mutex::default() };
        Ok(Client { inner: Arc::new(inner) })
    }

    fn call(&self, method: &'static str, path: String, vmid: Option<Vmid>) -> Call {
        Call { method, path, vmid }
    }

    fn ct_call(&self, method: &'static str, vmid: Vmid, below: &str) -> Call {
        self.call(method, self.node_path(&format!("lxc/{vmid}{below}")), Some(vmid))
    }

    fn node_path(&self, below: &str) -> String {
        format!("/nodes/{}/{below}", self.inner.settings.node)
    }

    /// The endpoint that messages name where it cannot be told which one it was.
    fn endpoint(&self) -> String {
        self.inner.endpoints.preferred()
    }

    /// An answer of success that is not what it should be.
    fn unlike(&self, call: Call, reason: &str) -> Error {
        let (endpoint, call) = (self.endpoint(), Box::new(call));
        Error::Protocol { endpoint, call, status: 200, reason: reason.to_owned() }
    }

    async fn get(&self, call: &Call) -> Result<Value, Error> {
        Ok(self.send(call, &Payload::Nothing).await?.data)
    }

    /// Makes a call within the limit for one.
    async fn send(&self, call: &Call, payload: &Payload) -> Result<Reply, Error> {
        self.send_until(call, payload, Instant::now() + self.inner.settings.request_timeout).await
    }

    /// Makes a call.
    async fn send_until(
        &self,
        call: &Call,
        payload: &Payload,
        deadline: Instant,
    ) -> Result<Reply, Error> {
        let repeatable = call.method == "GET";
        let servers = self.inner.endpoints.in_order(Instant::now());
        let mut first = None;
        for (n, server) in servers.iter().enumerate() {
            let left = deadline.saturating_duration_since(Instant::now());
            let until = match u32::try_from(servers.len() - n) {
                Ok(servers) if repeatable => Instant::now() + left / servers,
                _ => deadline,
            };
            let error = match self.attempts(server, call, payload, until).await {
                Ok(reply) => return Ok(reply),
                Err(error) => error,
            };
            if !error.is_of_endpoint() {
                return Err(error);
            }
            self.inner.endpoints.failed(server, Instant::now());
            if !repeatable && error.is_unclear() {
                return Err(error);
            }
            if n + 1 < servers.len() {
                log::warn!(error = error.to_string().as_str(); "trying the next endpoint");
            }
            first.get_or_insert(error);
        }
        // Invariant: there is at least one endpoint; the configuration has no fewer.
        Err(first.unwrap_or_else(|| Error::Setup { reason: "there is no endpoint".into() }))
    }

    /// As often as the call may be repeated at one endpoint.
    async fn attempts(
        &self,
        server: &Arc<Server>,
        call: &Call,
        payload: &Payload,
        until: Instant,
    ) -> Result<Reply, Error> {
        let attempts = if call.method == "GET" { GET_ATTEMPTS } else { 1 };
        for _ in 1..attempts {
            match self.authenticated(server, call, payload, until).await {
                Err(error) if error.is_broken() && Instant::now() < until => {}
                result => return result,
            }
            sleep(GET_PAUSE).await;
        }
        self.authenticated(server, call, payload, until).await
    }

    /// Sends a request once, after a login if one is needed.
    async fn authenticated(
        &self,
        server: &Arc<Server>,
        call: &Call,
        payload: &Payload,
        until: Instant,
    ) -> Result<Reply, Error> {
        let mut fresh = false;
        loop {
            let proof = match self.inner.credentials.ready() {
                Ready::Yes(proof) => proof,
                Ready::LogIn { secret, renewal } => {
                    match self.log_in(server, secret.expose_secret(), until).await {
                        Ok(()) => fresh = true,
                        // The password may still be good.
                        Err(Error::Authentication { .. }) if renewal => {
                            self.inner.credentials.forget_ticket();
                        }
                        Err(error) => return Err(error.unsent()),
                    }
                    continue;
                }
            };
            match self.once(server, call, payload, proof.headers(call.method), until).await {
                Err(Error::Authentication { .. }) if proof.is_ticket() && !fresh => {
                    self.inner.credentials.forget_ticket();
                }
                result => return result,
            }
        }
    }

    /// Sends one request once.
    async fn once(
        &self,
        server: &Arc<Server>,
        call: &Call,
        payload: &Payload,
        headers: HeaderMap,
        until: Instant,
    ) -> Result<Reply, Error> {
        let begun = Instant::now();
        let path = format!("/api2/json{}", call.path);
        let request = Request { method: method(call), path: &path, headers, payload };
        let answer = server
            .exchange(&request, until)
            .await
            .map_err(|broken| error::from_broken(server.url(), call, begun.elapsed(), broken))?;
        let (status, micros) = (answer.status, begun.elapsed().as_micros() as u64);
        log::trace!(method = call.method, path = call.path.as_str(), status, micros; "proxmox call");
        self.understood(server, call, answer)
    }

    fn understood(&self, server: &Server, call: &Call, answer: Answer) -> Result<Reply, Error> {
        let Answer { status, reason, body } = answer;
        if !(200..300).contains(&status) {
            let Inner { settings, credentials, .. } = &*self.inner;
            let context = Context {
                endpoint: server.url(),
                node: &settings.node,
                who: credentials.who(),
                file: credentials.file(),
            };
            return Err(error::from_answer(&context, call.clone(), status, &reason, &body));
        }
        match serde_json::from_slice::<Value>(&body) {
            Ok(Value::Object(mut answer)) => Ok(Reply {
                // It may be missing.
                data: answer.remove("data").unwrap_or_default(),
                total: answer.get("total").and_then(|total| Loose(total).as_number()),
            }),
            _ => Err(Error::Protocol {
                endpoint: server.url().to_owned(),
                call: Box::new(call.clone()),
                status,
                reason: "the answer is not Proxmox's JSON".to_owned(),
            }),
        }
    }
}

fn method(call: &Call) -> Method {
    match call.method {
        "GET" => Method::GET,
        "POST" => Method::POST,
        "PUT" => Method::PUT,
        _ => Method::DELETE,
    }
}

/// A value as one segment of a path. RFC 3986 leaves what a UPID or volume id has as it is, but for
/// the slash.
fn segment(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// A query, with its question mark; empty if there are no fields.
fn query(fields: &[(&str, &str)]) -> String {
    let query = form_urlencoded::Serializer::new(String::new()).extend_pairs(fields).finish();
    if query.is_empty() { query } else { format!("?{query}") }
}

#[cfg(test)]
mod tests;
