//! Which image a container was made from, asked of containerd.
//!
//! A specification has at most the image's name, and a name may mean another image tomorrow; whoever
//! looks at a CT wants the digest. For people only: nothing is decided by it.
//!
//! Source: containerd's `api/services/containers/v1`, `api/services/images/v1`, and gRPC's
//! `PROTOCOL-HTTP2.md`.

use std::io;
use std::path::Path;
use std::time::Duration;

use containerd_shim_protos::protobuf::well_known_types::empty::Empty;
use containerd_shim_protos::protobuf::well_known_types::wrappers::StringValue;
use containerd_shim_protos::protobuf::{self, Message, UnknownValueRef};
use hyper::http::{HeaderMap, Request, Uri, uri};
use tokio::net::UnixStream;

/// How long containerd may take. It has other things to do while a container is made of it, and
/// nobody should wait for words.
const LIMIT: Duration = Duration::from_millis(500);
/// More than any description of an image or a container, which includes its specification.
const MAX_REPLY: usize = 4 << 20;
/// Before each message: whether it is compressed, and its length.
const PREFIX: usize = 5;

/// A container's image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// A reference, as containerd knows it.
    pub name: String,
    /// Of the index or the manifest, such as `sha256:…`.
    pub digest: Option<String>,
}

/// Why the image is not known.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket.
    #[error("cannot connect to containerd: {0}")]
    Connect(#[source] io::Error),
    /// The connection or the stream.
    #[error("cannot call {method} of containerd: {source}")]
    Transport {
        /// Service and method.
        method: &'static str,
        /// What failed.
        source: h2::Error,
    },
    /// gRPC's status is not 0.
    #[error("{method} of containerd failed with status {status}: {message}")]
    Status {
        /// Service and method.
        method: &'static str,
        /// gRPC's number.
        status: String,
        /// containerd's words.
        message: String,
    },
    /// The reply is no message of that service.
    #[error("the reply of {method} of containerd is not understood")]
    Reply {
        /// Service and method.
        method: &'static str,
    },
    /// The call took too long.
    #[error("containerd did not answer within {} ms", LIMIT.as_millis())]
    Slow,
}

const CONTAINER: &str = "containerd.services.containers.v1.Containers/Get";
const IMAGE: &str = "containerd.services.images.v1.Images/Get";

/// The image of a container: the one called `name`, if the specification tells, or what containerd
/// has recorded. `None` for a container that was made of a bare directory.
///
/// # Errors
/// containerd's, or that it does not answer.
pub async fn of_container(
    socket: &Path,
    namespace: &str,
    container: &str,
    name: Option<&str>,
) -> Result<Option<Image>, Error> {
    // It pins the image already.
    if let Some((name, (_, digest))) = name.and_then(|name| Some((name, name.split_once('@')?))) {
        return Ok(Some(Image { name: name.to_owned(), digest: Some(digest.to_owned()) }));
    }
    let ask = async {
        let mut containerd = Containerd::connect(socket, namespace).await?;
        let name = match name {
            Some(name) => name.to_owned(),
            None => containerd.get(CONTAINER, container, &[1, 3]).await?,
        };
        if name.is_empty() {
            return Ok(None);
        }
        let digest = containerd.get(IMAGE, &name, &[1, 3, 2]).await?;
        Ok(Some(Image { name, digest: Some(digest).filter(|digest| !digest.is_empty()) }))
    };
    tokio::time::timeout(LIMIT, ask).await.unwrap_or(Err(Error::Slow))
}

/// A connection that ends with this value.
struct Containerd<'a> {
    namespace: &'a str,
    requests: h2::client::SendRequest<hyper::body::Bytes>,
    connection: tokio::task::JoinHandle<()>,
}

impl Drop for Containerd<'_> {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl<'a> Containerd<'a> {
    async fn connect(socket: &Path, namespace: &'a str) -> Result<Self, Error> {
        let stream = UnixStream::connect(socket).await.map_err(Error::Connect)?;
        let (requests, connection) = h2::client::handshake(stream)
            .await
            .map_err(|error| Error::Connect(io::Error::other(error)))?;
        // What goes wrong with it is told by the calls.
        let connection = tokio::spawn(async { drop(connection.await) });
        Ok(Self { namespace, requests, connection })
    }

    /// Calls a method whose request has one string, and returns the string at a path of field numbers in
    /// its reply; an empty one is not sent and may stand at the end only.
    async fn get(
        &mut self,
        method: &'static str,
        wanted: &str,
        path: &[u32],
    ) -> Result<String, Error> {
        let mut request = StringValue::new();
        request.value = wanted.to_owned();
        let unreadable = |_: protobuf::Error| Error::Reply { method };
        let reply = self.call(method, &request.write_to_bytes().map_err(unreadable)?).await?;
        let value = field(&reply, path).map_err(unreadable)?;
        String::from_utf8(value).map_err(|_| Error::Reply { method })
    }

    async fn call(&mut self, method: &'static str, message: &[u8]) -> Result<Vec<u8>, Error> {
        let transport = |source| Error::Transport { method, source };
        let head = self.head(method).map_err(|_| Error::Reply { method })?;
        let (response, mut body) = self.requests.send_request(head, false).map_err(transport)?;
        let length = u32::try_from(message.len()).map_err(|_| Error::Reply { method })?;
        let framed = [&[0][..], &length.to_be_bytes(), message].concat();
        body.send_data(framed.into(), true).map_err(transport)?;
        let (head, mut body) = response.await.map_err(transport)?.into_parts();
        let mut reply = Vec::new();
        while let Some(chunk) = body.data().await {
            let chunk = chunk.map_err(transport)?;
            // So that the other side may go on sending.
            body.flow_control().release_capacity(chunk.len()).map_err(transport)?;
            reply.extend_from_slice(&chunk);
            if reply.len() > MAX_REPLY {
                return Err(Error::Reply { method });
            }
        }
        let trailers = body.trailers().await.map_err(transport)?;
        // Without a reply the status comes with the head.
        let status = trailers.as_ref().unwrap_or(&head.headers);
        let text = |headers: &HeaderMap, name| {
            let value = headers.get(name).map(|value| value.as_bytes());
            String::from_utf8_lossy(value.unwrap_or_default()).into_owned()
        };
        match text(status, "grpc-status").as_str() {
            "0" if reply.len() >= PREFIX && reply[0] == 0 => Ok(reply.split_off(PREFIX)),
            "0" => Err(Error::Reply { method }),
            number => Err(Error::Status {
                method,
                status: number.to_owned(),
                message: text(status, "grpc-message"),
            }),
        }
    }

    fn head(&self, method: &str) -> Result<Request<()>, hyper::http::Error> {
        let uri = Uri::builder()
            .scheme(uri::Scheme::HTTP)
            .authority("containerd")
            .path_and_query(format!("/{method}"))
            .build()?;
        Request::post(uri)
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("containerd-namespace", self.namespace)
            .body(())
    }
}

/// What stands at a path of field numbers, each of a message in the one before. To `Empty` all
/// fields are unknown, and unknown fields are kept: that spares the messages' generated code.
fn field(message: &[u8], path: &[u32]) -> Result<Vec<u8>, protobuf::Error> {
    let Some((number, rest)) = path.split_first() else { return Ok(message.to_vec()) };
    let fields = Empty::parse_from_bytes(message)?;
    match fields.special_fields.unknown_fields().get(*number) {
        Some(UnknownValueRef::LengthDelimited(inner)) => field(inner, rest),
        _ => Ok(Vec::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    /// One field with a length.
    fn delimited(number: u8, inner: &[u8]) -> Vec<u8> {
        let mut message = vec![number << 3 | 2];
        assert!(inner.len() < 128);
        message.push(inner.len() as u8);
        message.extend_from_slice(inner);
        message
    }

    /// A containerd with one container and one image.
    async fn serve(listener: UnixListener) {
        let (stream, _) = listener.accept().await.unwrap();
        let mut connection = h2::server::handshake(stream).await.unwrap();
        while let Some(call) = connection.accept().await {
            let (request, mut respond) = call.unwrap();
            tokio::spawn(async move {
                let (head, mut body) = request.into_parts();
                let message = body.data().await.unwrap().unwrap().split_off(PREFIX);
                let reply = match (head.uri.path().rsplit('.').next().unwrap(), &message[2..]) {
                    _ if head.headers["containerd-namespace"] != "k8s.io" => None,
                    ("Containers/Get", b"web") => {
                        let container = [delimited(1, b"web"), delimited(3, b"busybox:1")].concat();
                        Some(delimited(1, &container))
                    }
                    ("Containers/Get", b"bare") => Some(delimited(1, &delimited(1, b"bare"))),
                    ("Images/Get", b"busybox:1") => {
                        let target = [delimited(1, b"media"), delimited(2, b"sha256:ab")].concat();
                        let image = [delimited(1, b"busybox:1"), delimited(3, &target)].concat();
                        Some(delimited(1, &image))
                    }
                    _ => None,
                };
                let mut status = HeaderMap::new();
                let head = hyper::http::Response::new(());
                if let Some(reply) = reply {
                    let mut stream = respond.send_response(head, false).unwrap();
                    // In two pieces.
                    stream.send_data(vec![0, 0, 0, 0].into(), false).unwrap();
                    let rest = [&[reply.len() as u8][..], &reply].concat();
                    stream.send_data(rest.into(), false).unwrap();
                    status.insert("grpc-status", "0".parse().unwrap());
                    stream.send_trailers(status).unwrap();
                } else {
                    let (mut head, ()) = head.into_parts();
                    head.headers.insert("grpc-status", "5".parse().unwrap());
                    head.headers.insert("grpc-message", "not found".parse().unwrap());
                    let head = hyper::http::Response::from_parts(head, ());
                    respond.send_response(head, true).unwrap();
                }
            });
        }
    }

    async fn ask(namespace: &str, container: &str, name: Option<&str>) -> String {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("c.sock");
        let server = tokio::spawn(serve(UnixListener::bind(&socket).unwrap()));
        let answer = of_container(&socket, namespace, container, name).await;
        server.abort();
        match answer {
            Ok(Some(Image { name, digest })) => format!("{name} {}", digest.unwrap_or_default()),
            Ok(None) => "none".to_owned(),
            Err(error) => error.to_string(),
        }
    }

    #[tokio::test]
    async fn containerd_knows_the_image() {
        assert_eq!(ask("k8s.io", "web", None).await, "busybox:1 sha256:ab");
        assert_eq!(ask("k8s.io", "other", Some("busybox:1")).await, "busybox:1 sha256:ab");
        assert_eq!(ask("k8s.io", "bare", None).await, "none");
        let refused = "Images/Get of containerd failed with status 5: not found";
        assert!(ask("k8s.io", "web", Some("busybox:2")).await.ends_with(refused));
        assert!(ask("other", "web", None).await.ends_with("with status 5: not found"));
    }

    #[tokio::test]
    async fn a_digest_in_the_name_needs_no_question() {
        let nowhere = Path::new("/nonexistent/c.sock");
        let image = of_container(nowhere, "n", "c", Some("busybox@sha256:ab")).await.unwrap();
        assert_eq!(image.unwrap().digest.as_deref(), Some("sha256:ab"));
        let error = of_container(nowhere, "n", "c", Some("busybox:1")).await.unwrap_err();
        assert!(matches!(error, Error::Connect(_)), "{error}");
    }

    #[tokio::test]
    async fn a_silent_containerd_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("c.sock");
        let _listener = UnixListener::bind(&socket).unwrap();
        let error = of_container(&socket, "n", "c", None).await.unwrap_err();
        assert!(matches!(error, Error::Slow), "{error}");
    }

    #[tokio::test]
    async fn something_else_on_the_socket_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("c.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let reply = b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n";
            tokio::io::AsyncWriteExt::write_all(&mut stream, reply).await.unwrap();
        });
        assert!(of_container(&socket, "n", "c", None).await.is_err());
        server.abort();
    }
}
