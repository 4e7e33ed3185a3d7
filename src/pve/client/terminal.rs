//! A CT's terminal: `POST …/termproxy` and the websocket behind it.
//!
//! This is the web interface's console, with its limits: one merged stream, no exit status, and all
//! clients of a CT share one terminal. What a container prints does not take this way.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use hyper::Method;
use hyper::body::Bytes;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::{client::generate_key, derive_accept_key};
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{self, Message};

use super::{Call, Client, Payload, Request, query};
use crate::config::Vmid;
use crate::pve::credentials::Ready;
use crate::pve::error::{self, Error};
use crate::pve::http::{Server, Upgrade, Upgraded};
use crate::pve::types::TerminalTicket;
use crate::pve::upid::Upid;

/// Longest message that is taken, and longest input that is sent in one.
const MAX_MESSAGE: usize = 1 << 20;
const MAX_INPUT: usize = 1024;

/// An open terminal. Dropping it closes the connection; the program behind it goes on.
pub struct Terminal {
    socket: WebSocketStream<TlsStream<TcpStream>>,
    server: Arc<Server>,
    call: Call,
    upid: Upid,
    /// Output that came together with the answer to the ticket.
    early: Option<Bytes>,
    write_timeout: Duration,
}

impl fmt::Debug for Terminal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Terminal").field("upid", &self.upid).finish_non_exhaustive()
    }
}

impl Client {
    /// Opens the terminal of a running CT, within the limit for one call. Needs `VM.Console`.
    ///
    /// What it is connected to depends on the CT's `cmode`. One that is not connected in time ends
    /// by itself after 10 s.
    pub async fn terminal(&self, vmid: Vmid) -> Result<Terminal, Error> {
        let deadline = Instant::now() + self.inner.settings.request_timeout;
        let call = self.ct_call("POST", vmid, "/termproxy");
        let reply = self.send_until(&call, &Payload::Nothing, deadline).await?;
        let ticket = TerminalTicket::from_json(&reply.data);
        let ticket = ticket.ok_or_else(|| self.unlike(call, "no terminal in the answer"))?;
        // Without its query in messages: the ticket is in it.
        let call = self.ct_call("GET", vmid, "/vncwebsocket");
        let fields = [("port", ticket.port.as_str()), ("vncticket", ticket.ticket.as_str())];
        let path = format!("/api2/json{}{}", call.path, query(&fields));
        // That of the call before, as long as it did not fail.
        let Some(server) = self.inner.endpoints.in_order(Instant::now()).into_iter().next() else {
            return Err(Error::Setup { reason: "there is no endpoint".into() });
        };
        let socket = self.websocket(&server, &call, &path, deadline).await?;
        let (upid, write_timeout) = (ticket.upid, self.inner.settings.request_timeout);
        let mut terminal = Terminal { socket, server, call, upid, early: None, write_timeout };
        let login = format!("{}:{}\n", ticket.user, ticket.ticket);
        let opened = timeout_at(deadline, async {
            terminal.send(login.into()).await?;
            terminal.accepted().await
        });
        match opened.await {
            Ok(result) => result.map(|()| terminal),
            Err(_) => Err(Error::Timeout {
                endpoint: terminal.server.url().to_owned(),
                call: Box::new(terminal.call),
                sent: true,
                after: write_timeout,
            }),
        }
    }

    /// Turns a connection into a websocket (RFC 6455).
    async fn websocket(
        &self,
        server: &Arc<Server>,
        call: &Call,
        path: &str,
        deadline: Instant,
    ) -> Result<WebSocketStream<TlsStream<TcpStream>>, Error> {
        // The call before has logged in.
        let Ready::Yes(proof) = self.inner.credentials.ready() else {
            return Err(Error::Unsendable {
                call: Box::new(call.clone()),
                reason: "the ticket has just become too old; try again".into(),
            });
        };
        let key = generate_key();
        let mut headers = proof.headers(call.method);
        let fixed = [
            ("upgrade", "websocket"),
            ("connection", "Upgrade"),
            ("sec-websocket-version", "13"),
            // Without it Proxmox frames otherwise.
            ("sec-websocket-protocol", "binary"),
        ];
        for (name, value) in fixed {
            headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        // Invariant: the key is base64.
        if let Ok(value) = HeaderValue::from_str(&key) {
            headers.insert(HeaderName::from_static("sec-websocket-key"), value);
        }
        let begun = Instant::now();
        let request = Request { method: Method::GET, path, headers, payload: &Payload::Nothing };
        let upgraded = server.upgrade(&request, deadline).await;
        let upgraded = upgraded
            .map_err(|broken| error::from_broken(server.url(), call, begun.elapsed(), broken))?;
        let Upgraded { headers, stream, early } = match upgraded {
            Upgrade::Done(upgraded) => *upgraded,
            Upgrade::Refused(answer) => {
                self.understood(server, call, answer)?;
                return Err(self.unlike(call.clone(), "it did not become a websocket"));
            }
        };
        if !is_accepted(&headers, &key) {
            return Err(self.unlike(call.clone(), "the websocket answers another request"));
        }
        let config = WebSocketConfig::default()
            .max_message_size(Some(MAX_MESSAGE))
            .max_frame_size(Some(MAX_MESSAGE));
        let socket =
            WebSocketStream::from_partially_read(stream, early.into(), Role::Client, Some(config));
        Ok(socket.await)
    }
}

fn is_accepted(headers: &HeaderMap, key: &str) -> bool {
    let expected = derive_accept_key(key.as_bytes());
    headers.get("sec-websocket-accept").is_some_and(|value| value.as_bytes() == expected.as_bytes())
}

impl Terminal {
    /// The task that is the terminal's other end.
    pub fn upid(&self) -> &Upid {
        &self.upid
    }

    /// The next output, cut anywhere; `None` at the end. Waits as long as there is none. May be
    /// dropped without loss.
    pub async fn read(&mut self) -> Result<Option<Bytes>, Error> {
        if let Some(early) = self.early.take() {
            return Ok(Some(early));
        }
        loop {
            return match self.socket.next().await {
                Some(Ok(Message::Binary(bytes))) => Ok(Some(bytes)),
                Some(Ok(Message::Text(text))) => Ok(Some(text.into())),
                // Answered by the socket itself.
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => continue,
                Some(Ok(Message::Close(_))) | None => Ok(None),
                Some(Err(error)) if is_end(&error) => Ok(None),
                Some(Err(error)) => Err(self.broken(&error)),
            };
        }
    }

    /// Types these bytes.
    pub async fn write(&mut self, input: &[u8]) -> Result<(), Error> {
        for chunk in input.chunks(MAX_INPUT) {
            let mut message = format!("0:{}:", chunk.len()).into_bytes();
            message.extend_from_slice(chunk);
            self.send(message.into()).await?;
        }
        Ok(())
    }

    /// Tells the terminal's size in characters.
    pub async fn resize(&mut self, columns: u16, rows: u16) -> Result<(), Error> {
        self.send(format!("1:{columns}:{rows}:").into()).await
    }

    /// Keeps an idle terminal open; the web interface does it every 30 s.
    pub async fn keep_alive(&mut self) -> Result<(), Error> {
        self.send(Bytes::from_static(b"2")).await
    }

    async fn send(&mut self, message: Bytes) -> Result<(), Error> {
        match timeout(self.write_timeout, self.socket.send(Message::Binary(message))).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(self.broken(&error)),
            Err(_) => Err(Error::Timeout {
                endpoint: self.server.url().to_owned(),
                call: Box::new(self.call.clone()),
                sent: true,
                after: self.write_timeout,
            }),
        }
    }

    /// Waits for `OK`, which may come in pieces or with output behind it.
    async fn accepted(&mut self) -> Result<(), Error> {
        let mut answer = Vec::new();
        while answer.len() < 2 {
            match self.read().await? {
                Some(bytes) => answer.extend_from_slice(&bytes),
                None => break,
            }
        }
        let Some(early) = answer.strip_prefix(b"OK") else {
            return Err(Error::Protocol {
                endpoint: self.server.url().to_owned(),
                call: Box::new(self.call.clone()),
                status: 101,
                reason: "the terminal did not take its ticket".into(),
            });
        };
        self.early = (!early.is_empty()).then(|| Bytes::copy_from_slice(early));
        Ok(())
    }

    fn broken(&self, error: &tungstenite::Error) -> Error {
        let (endpoint, cause) = (self.server.url().to_owned(), error::one_line(&error.to_string()));
        Error::Unreachable { endpoint, sent: true, cause }
    }
}

/// Proxmox ends the connection without a word.
fn is_end(error: &tungstenite::Error) -> bool {
    use tungstenite::error::ProtocolError;
    match error {
        tungstenite::Error::ConnectionClosed
        | tungstenite::Error::AlreadyClosed
        | tungstenite::Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => true,
        tungstenite::Error::Io(error) => error.kind() == std::io::ErrorKind::UnexpectedEof,
        _ => false,
    }
}
