//! A tiny HTTPS server that answers as a script says, byte for byte as recorded, for tests of the
//! client. What needs state is tested against the simulator instead.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::{self, HandshakeKind, ServerConfig};
use tokio_rustls::server::TlsStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::fixtures::{Recorded, recorded};
use crate::config::Fingerprint;

/// A request as the server saw it.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) method: String,
    /// Without `/api2/json`.
    pub(super) path: String,
    /// By name in lower case.
    headers: BTreeMap<String, String>,
    /// As text; bytes that are none are replaced.
    pub(super) body: String,
    /// Which request of the whole run this is, from 0.
    pub(super) number: usize,
}

impl Seen {
    /// Empty if there is none.
    pub(super) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map(String::as_str).unwrap_or_default()
    }

    pub(super) fn is(&self, method: &str, path: &str) -> bool {
        self.method == method && self.path.split('?').next() == Some(path)
    }
}

pub(super) enum Reply {
    Recorded(Recorded),
    Json(Value),
    /// These bytes, then the connection is closed.
    Raw(String),
    /// The connection is closed without a word.
    Close,
    /// Nothing ever.
    Silence,
    /// This one, sent two times at once.
    Twice(Box<Reply>),
    /// This one, after a while.
    Later(Duration, Box<Reply>),
    /// A websocket, with these bytes right behind the answer; then what the function makes of the
    /// connection.
    WebSocket {
        early: Vec<u8>,
        then: fn(TlsStream<TcpStream>) -> BoxFuture<'static, ()>,
    },
}

impl Reply {
    pub(super) fn recorded(name: &str) -> Reply {
        Reply::Recorded(recorded(name))
    }

    pub(super) fn data(data: Value) -> Reply {
        Reply::Json(serde_json::json!({ "data": data }))
    }
}

type Script = Arc<dyn Fn(&Seen) -> Reply + Send + Sync>;

pub(super) struct Fake {
    pub(super) address: SocketAddr,
    pub(super) fingerprint: Fingerprint,
    tls: Arc<Mutex<TlsAcceptor>>,
    pub(super) ca_file: PathBuf,
    pub(super) dir: tempfile::TempDir,
    seen: Arc<Mutex<Vec<Seen>>>,
    connections: Arc<AtomicUsize>,
    resumed: Arc<AtomicUsize>,
    open: Arc<AtomicUsize>,
}

impl Fake {
    /// Starts a server in the current runtime; it ends with it.
    pub(super) async fn start(script: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Fake {
        Fake::start_for("127.0.0.1", script).await
    }

    /// With a certificate that is made out to `name` alone.
    pub(super) async fn start_for(
        name: &str,
        script: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
    ) -> Fake {
        let dir = tempfile::tempdir().unwrap();
        let (config, certificate, ca_pem) = certificates(name);
        let ca_file = dir.path().join("ca.pem");
        std::fs::write(&ca_file, ca_pem).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let tls = Arc::new(Mutex::new(TlsAcceptor::from(Arc::new(config))));
        let fake = Fake {
            address: listener.local_addr().unwrap(),
            fingerprint: super::tls::fingerprint(&certificate),
            tls: tls.clone(),
            ca_file,
            dir,
            seen: Arc::default(),
            connections: Arc::default(),
            resumed: Arc::default(),
            open: Arc::default(),
        };
        let script: Script = Arc::new(script);
        let (seen, connections, resumed, open) =
            (fake.seen.clone(), fake.connections.clone(), fake.resumed.clone(), fake.open.clone());
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let acceptor = tls.lock().unwrap().clone();
                let (script, seen) = (script.clone(), seen.clone());
                let (connections, resumed, open) =
                    (connections.clone(), resumed.clone(), open.clone());
                tokio::spawn(async move {
                    open.fetch_add(1, Ordering::SeqCst);
                    if let Ok(stream) = acceptor.accept(socket).await {
                        connections.fetch_add(1, Ordering::SeqCst);
                        if stream.get_ref().1.handshake_kind() == Some(HandshakeKind::Resumed) {
                            resumed.fetch_add(1, Ordering::SeqCst);
                        }
                        serve(stream, script, seen).await;
                    }
                    open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        fake
    }

    /// Shows another certificate from now on; answers with its fingerprint.
    pub(super) fn rotate_certificate(&self) -> Fingerprint {
        let (config, certificate, _) = certificates("127.0.0.1");
        *self.tls.lock().unwrap() = TlsAcceptor::from(Arc::new(config));
        super::tls::fingerprint(&certificate)
    }

    /// For a server of one's own with this one's certificate.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        self.tls.lock().unwrap().clone()
    }

    /// `https://HOST:PORT`
    pub(super) fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    pub(super) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// `METHOD path` of each request, without queries.
    pub(super) fn calls(&self) -> Vec<String> {
        let call =
            |s: Seen| format!("{} {}", s.method, s.path.split('?').next().unwrap_or_default());
        self.seen().into_iter().map(call).collect()
    }

    /// Finished TLS handshakes, and how many of them resumed a session.
    pub(super) fn handshakes(&self) -> (usize, usize) {
        (self.connections.load(Ordering::SeqCst), self.resumed.load(Ordering::SeqCst))
    }

    pub(super) fn open_connections(&self) -> usize {
        self.open.load(Ordering::SeqCst)
    }
}

fn certificates(name: &str) -> (ServerConfig, rustls::pki_types::CertificateDer<'static>, String) {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca = ca.self_signed(&ca_key).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let leaf = rcgen::CertificateParams::new([name.to_owned()])
        .unwrap()
        .signed_by(&key, &ca, &ca_key)
        .unwrap();
    let der = leaf.der().clone();
    let key = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![der.clone()], key)
        .unwrap();
    (config, der, ca.pem())
}

async fn serve(
    mut stream: tokio_rustls::server::TlsStream<TcpStream>,
    script: Script,
    seen: Arc<Mutex<Vec<Seen>>>,
) {
    let mut buffer = Vec::new();
    loop {
        let Some(mut request) = read_request(&mut stream, &mut buffer).await else { return };
        request.number = seen.lock().unwrap().len();
        seen.lock().unwrap().push(request.clone());
        let mut reply = script(&request);
        if let Reply::Later(pause, later) = reply {
            tokio::time::sleep(pause).await;
            reply = *later;
        }
        let times = match reply {
            Reply::Twice(again) => {
                reply = *again;
                2
            }
            _ => 1,
        };
        let (bytes, close) = match reply {
            Reply::Close => return,
            Reply::Silence => std::future::pending().await,
            Reply::WebSocket { early, then } => {
                let accept = derive_accept_key(request.header("sec-websocket-key").as_bytes());
                let head = format!(
                    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\
                     Sec-WebSocket-Accept: {accept}\r\nSec-WebSocket-Protocol: binary\r\n\r\n"
                );
                stream.write_all(&[head.into_bytes(), early].concat()).await.unwrap();
                stream.flush().await.unwrap();
                return then(stream).await;
            }
            reply => wire(reply),
        };
        if stream.write_all(&bytes.repeat(times)).await.is_err() || stream.flush().await.is_err() {
            return;
        }
        if close {
            let _ = stream.shutdown().await;
            return;
        }
    }
}

/// The bytes of an answer, and whether the connection is closed after it.
fn wire(reply: Reply) -> (Vec<u8>, bool) {
    match reply {
        Reply::Recorded(r) => {
            let mut head = format!("HTTP/1.1 {} {}\r\n", r.status(), r.reason());
            let mut says = Vec::new();
            for (name, value) in r.headers() {
                head.push_str(&format!("{name}: {value}\r\n"));
                if name == "Connection" {
                    says.push(value);
                }
            }
            let body = r.body();
            head.push_str(&format!("Content-Length: {}\r\n\r\n", body.len()));
            // As the real one: after an error, and where it says nothing else.
            ([head.into_bytes(), body].concat(), r.status() >= 400 || says == ["close"])
        }
        Reply::Json(body) => {
            let body = body.to_string();
            let head = "HTTP/1.1 200 OK\r\nConnection: Keep-Alive\r\nContent-Type: application/json;charset=UTF-8\r\n";
            (format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()).into_bytes(), false)
        }
        Reply::Raw(text) => (text.into_bytes(), true),
        _ => unreachable!("handled by the caller"),
    }
}

async fn read_request(
    stream: &mut (impl AsyncReadExt + Unpin),
    buffer: &mut Vec<u8>,
) -> Option<Seen> {
    let head_end = loop {
        if let Some(at) = buffer.windows(4).position(|w| w == b"\r\n\r\n") {
            break at + 4;
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8(buffer[..head_end].to_vec()).unwrap();
    let lines = head.lines().filter_map(|line| line.split_once(": "));
    let headers: BTreeMap<String, String> =
        lines.map(|(name, value)| (name.to_lowercase(), value.to_owned())).collect();
    let length: usize = headers.get("content-length").map_or(0, |n| n.parse().unwrap());
    while buffer.len() < head_end + length {
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
    let body = String::from_utf8_lossy(&buffer[head_end..head_end + length]).into_owned();
    buffer.drain(..head_end + length);
    let mut words = head.split(' ');
    let (method, path) =
        (words.next()?.to_owned(), words.next()?.strip_prefix("/api2/json")?.to_owned());
    Some(Seen { method, path, headers, body, number: 0 })
}
