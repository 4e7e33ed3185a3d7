//! One connection to containerd's event service, and exact knowledge of what became of a call.
//!
//! `Forward` is not idempotent and events must not be lost, so after a failed call the only question
//! is whether containerd has the event. A generic client cannot answer it: it reports "closed".
//! This one makes one unary call at a time over a Unix stream socket, where the kernel gives
//! evidence:
//!
//! - the request could not be written completely: a partial frame is never acted upon: not delivered;
//! - the peer closed the socket with unread bytes: the kernel reports `ECONNRESET` (`unix(7)`
//!   sockets do so at close), and the only unread bytes can be those of this request: not delivered;
//! - a plain end of file, or no answer within the deadline: containerd has read the request and it is
//!   *unknown* whether it acted on it.
//!
//! The wire format is ttrpc's `PROTOCOL.md`: a ten byte header, then a `Request` or `Response`.

use std::io;
use std::time::Duration;

use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout, timeout_at};
use ttrpc::proto::{
    Code, MESSAGE_LENGTH_MAX, MESSAGE_TYPE_REQUEST, MESSAGE_TYPE_RESPONSE, Request, Response,
};

const SERVICE: &str = "containerd.services.events.ttrpc.v1.Events";
const METHOD: &str = "Forward";

/// What a failed call says about the event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// containerd did not act on it.
    NotDelivered,
    /// It may have.
    Unknown,
    /// containerd answered that it will not take this event; asking again gives the same answer.
    Refused,
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("cannot connect: {0}")]
    Connect(io::Error),
    #[error("the connection broke before the request was delivered: {0}")]
    Send(io::Error),
    #[error("the connection ended before the reply: {0}")]
    Reply(io::Error),
    #[error("no reply within {0:?}")]
    Deadline(Duration),
    #[error("a reply that is not one: {0}")]
    Garbled(&'static str),
    #[error("containerd answered {code:?}: {message}")]
    Status { code: Code, message: String },
    #[error("the event is too large to send ({0} bytes)")]
    TooLarge(usize),
}

impl Error {
    pub(super) fn fate(&self) -> Fate {
        match self {
            Error::Connect(_) | Error::Send(_) => Fate::NotDelivered,
            Error::Reply(e) if e.kind() == io::ErrorKind::ConnectionReset => Fate::NotDelivered,
            Error::Reply(_) | Error::Deadline(_) | Error::Garbled(_) => Fate::Unknown,
            Error::Status { code: Code::INVALID_ARGUMENT, .. } | Error::TooLarge(_) => {
                Fate::Refused
            }
            // An answer, but of a daemon that is starting, stopping or overloaded.
            Error::Status { .. } => Fate::NotDelivered,
        }
    }
}

/// A connection on which one call at a time is made.
pub(super) struct Connection {
    stream: UnixStream,
    next_stream: u32,
}

impl Connection {
    /// `address` is a path, with or without `unix://`.
    pub(super) async fn open(address: &str, deadline: Duration) -> Result<Connection, Error> {
        let path = address.strip_prefix("unix://").unwrap_or(address);
        let stream = timeout(deadline, UnixStream::connect(path))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(Error::Connect)?;
        Ok(Connection { stream, next_stream: 1 })
    }

    /// Forwards one event and waits for containerd's word that it has it. After an error other than
    /// [`Error::Status`] the connection must not be used again.
    pub(super) async fn forward(
        &mut self,
        envelope: &Envelope,
        deadline: Duration,
    ) -> Result<(), Error> {
        let until = Instant::now() + deadline;
        let stream = self.next_stream;
        self.next_stream = self.next_stream.wrapping_add(2);
        let frame = frame(stream, envelope, deadline)?;
        timeout_at(until, self.stream.write_all(&frame))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(Error::Send)?;
        let response = timeout_at(until, self.reply(stream))
            .await
            .unwrap_or(Err(Error::Deadline(deadline)))?;
        match response.status.into_option() {
            Some(status) if status.code() != Code::OK => {
                Err(Error::Status { code: status.code(), message: status.message })
            }
            _ => Ok(()),
        }
    }

    async fn reply(&mut self, stream: u32) -> Result<Response, Error> {
        let mut header = [0; 10];
        self.stream.read_exact(&mut header).await.map_err(Error::Reply)?;
        let [l0, l1, l2, l3, s0, s1, s2, s3, kind, _flags] = header;
        let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
        if u32::from_be_bytes([s0, s1, s2, s3]) != stream || kind != MESSAGE_TYPE_RESPONSE {
            return Err(Error::Garbled("it belongs to another call"));
        }
        if length > MESSAGE_LENGTH_MAX {
            return Err(Error::Garbled("it is longer than any message may be"));
        }
        let mut payload = vec![0; length];
        self.stream.read_exact(&mut payload).await.map_err(Error::Reply)?;
        Response::parse_from_bytes(&payload).map_err(|_| Error::Garbled("it cannot be decoded"))
    }
}

fn frame(stream: u32, envelope: &Envelope, deadline: Duration) -> Result<Vec<u8>, Error> {
    let mut forward = ForwardRequest::new();
    forward.envelope = MessageField::some(envelope.clone());
    let mut request = Request::new();
    request.service = SERVICE.to_string();
    request.method = METHOD.to_string();
    // proto3 has no required field whose absence could make writing to memory fail.
    request.payload = forward.write_to_bytes().unwrap_or_default();
    request.timeout_nano = i64::try_from(deadline.as_nanos()).unwrap_or(i64::MAX);
    let payload = request.write_to_bytes().unwrap_or_default();
    if payload.len() > MESSAGE_LENGTH_MAX {
        return Err(Error::TooLarge(payload.len()));
    }
    let mut frame = Vec::with_capacity(10 + payload.len());
    frame.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    frame.extend_from_slice(&stream.to_be_bytes());
    frame.extend_from_slice(&[MESSAGE_TYPE_REQUEST, 0]);
    frame.extend_from_slice(&payload);
    Ok(frame)
}

#[cfg(test)]
mod tests {
    use super::super::Event;
    use super::*;
    use std::time::UNIX_EPOCH;
    use tokio::net::UnixListener;

    const SOON: Duration = Duration::from_millis(200);

    fn envelope() -> Envelope {
        Event::Start { container_id: "c".into(), pid: 1 }.envelope("ns", UNIX_EPOCH)
    }

    /// What a server does with the connection it accepted.
    #[derive(Clone, Copy)]
    enum Server {
        CloseUnread,
        CloseHalfRead,
        CloseRead,
        Silent,
        Answer(Code),
    }

    async fn fate_with(server: Server) -> Option<Fate> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let peer = tokio::spawn(async move {
            let (mut peer, _) = listener.accept().await.unwrap();
            peer.readable().await.unwrap();
            let frame = frame(1, &envelope(), SOON).unwrap();
            let read = match server {
                Server::CloseUnread => 0,
                Server::CloseHalfRead => frame.len() - 1,
                Server::CloseRead | Server::Silent | Server::Answer(_) => frame.len(),
            };
            let mut request = vec![0; read];
            peer.read_exact(&mut request).await.unwrap();
            assert_eq!(request, frame[..read]);
            match server {
                Server::Silent => std::future::pending().await,
                Server::Answer(code) => {
                    let mut response = Response::new();
                    response.set_status(ttrpc::get_status(code, "words"));
                    let payload = response.write_to_bytes().unwrap();
                    peer.write_u32(payload.len() as u32).await.unwrap();
                    peer.write_u32(1).await.unwrap();
                    peer.write_all(&[MESSAGE_TYPE_RESPONSE, 0]).await.unwrap();
                    peer.write_all(&payload).await.unwrap();
                }
                Server::CloseUnread | Server::CloseHalfRead | Server::CloseRead => {}
            }
        });
        let mut connection =
            Connection::open(&format!("unix://{}", path.display()), SOON).await.unwrap();
        let result = connection.forward(&envelope(), SOON).await;
        peer.abort();
        result.err().map(|e| e.fate())
    }

    #[tokio::test]
    async fn the_fate_of_an_event_is_read_from_how_the_call_failed() {
        for (why, server, fate) in [
            ("closed before reading", Server::CloseUnread, Some(Fate::NotDelivered)),
            (
                "closed in the middle of the request",
                Server::CloseHalfRead,
                Some(Fate::NotDelivered),
            ),
            ("closed after reading", Server::CloseRead, Some(Fate::Unknown)),
            ("silent", Server::Silent, Some(Fate::Unknown)),
            ("ok", Server::Answer(Code::OK), None),
            ("invalid", Server::Answer(Code::INVALID_ARGUMENT), Some(Fate::Refused)),
            ("starting", Server::Answer(Code::UNIMPLEMENTED), Some(Fate::NotDelivered)),
            ("overloaded", Server::Answer(Code::UNAVAILABLE), Some(Fate::NotDelivered)),
        ] {
            assert_eq!(fate_with(server).await, fate, "{why}");
        }
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_has_not_got_the_event() {
        let dir = tempfile::tempdir().unwrap();
        let address = dir.path().join("none");
        let error = Connection::open(address.to_str().unwrap(), SOON).await.err().unwrap();
        assert_eq!(error.fate(), Fate::NotDelivered);
    }
}
