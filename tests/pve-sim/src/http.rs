//! HTTP/1.1 as Proxmox VE's server speaks it.
//!
//! Written by hand because the real server does what HTTP libraries prevent: it sends two
//! contradictory `Connection` lines and keeps the connection open, puts error texts into the
//! reason phrase, and answers a body that is too large while the client still sends it.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{sleep, timeout};

use crate::acl::Identity;
use crate::api::{self, Answer};
use crate::cluster::Cluster;
use crate::conf::percent_decode;
use crate::console::Client;
use crate::control;
use crate::error::ApiError;
use crate::fault::{Call, Effect};
use crate::node::Node;
use crate::params::Params;
use crate::upload::{self, Parser, Upload, UploadError};
use crate::websocket::Handshake;

const MAX_HEADER_LINES: usize = 64;
const MAX_HEADER_BYTES: usize = 8 * 1024;
const MAX_BODY: usize = 512 * 1024;
const MAX_REQUESTS: u32 = 100;
/// How long an idle connection is kept.
const IDLE: Duration = Duration::from_secs(5);
/// How long a client may take to send a request it has begun.
const RECEIVE: Duration = Duration::from_secs(30);

/// A request, as the API sees it.
#[derive(Debug, Default)]
pub struct Request {
    /// `GET`, `POST`, `PUT`, `DELETE`.
    pub method: String,
    /// The path as sent, without the query.
    pub path: String,
    /// Parameters of query and body.
    pub params: Params,
    /// The `Authorization` header.
    pub authorization: Option<String>,
    /// The `Cookie` header.
    pub cookie: Option<String>,
    /// The `CSRFPreventionToken` header.
    pub csrf: Option<String>,
    /// What a client says who wants a websocket.
    pub websocket: Option<Handshake>,
    /// The file of an upload.
    pub upload: Option<Arc<Upload>>,
    /// When the request was complete.
    pub at: Option<Instant>,
}

impl Request {
    /// The login ticket among the cookies.
    pub fn ticket(&self) -> Option<String> {
        let cookies = self.cookie.as_deref()?.split(';');
        let value = cookies.filter_map(|c| c.trim().strip_prefix("PVEAuthCookie=")).next()?;
        Some(percent_decode(value))
    }
}

struct Head {
    request: Request,
    query: String,
    content_type: String,
    body: Body,
    expects_continue: bool,
    close: bool,
}

enum Body {
    Length(usize),
    Chunked,
}

/// Why no further request can be read.
enum Stop {
    /// The client has gone, or sends nothing.
    Gone,
    /// The request is answered with this, and the connection closed.
    Answer(ApiError),
}

impl From<io::Error> for Stop {
    fn from(_: io::Error) -> Self {
        Self::Gone
    }
}

/// Serves a connection to a node until it ends.
pub async fn serve<S>(cluster: Arc<Cluster>, node: Arc<Node>, stream: S)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let server = Server { cluster, node };
    let mut connection = Connection { stream, buffer: Vec::new() };
    for count in 1.. {
        let (reply, close) = match connection.read_request(&server).await {
            Ok((request, close)) => (server.respond(request).await, close),
            Err(Stop::Gone) => return,
            Err(Stop::Answer(error)) => (Reply::from(Err(error)), true),
        };
        let Some(mut reply) = reply.filter(|_| server.node.is_online()) else { return };
        if let Some(client) = reply.take_websocket() {
            return connection.become_websocket(client).await;
        }
        let close = close || reply.closes() || count >= MAX_REQUESTS;
        if connection.write_reply(&reply, close).await.is_err() || close {
            let _ = connection.stream.shutdown().await;
            return;
        }
    }
}

/// The node that a connection leads to.
struct Server {
    cluster: Arc<Cluster>,
    node: Arc<Node>,
}

/// What is sent for a request.
struct Reply {
    answer: Result<Answer, ApiError>,
    cut: Option<Cut>,
}

/// A fault of the answer's body: after how many bytes it ends, and whether its length says so.
struct Cut {
    bytes: usize,
    announced: bool,
}

impl Reply {
    fn from(answer: Result<Answer, ApiError>) -> Option<Self> {
        Some(Self { answer, cut: None })
    }

    /// The client of a websocket, if the connection is to become one.
    fn take_websocket(&mut self) -> Option<Client> {
        self.answer.as_mut().ok().and_then(|a| a.websocket.take())
    }

    /// Whether the connection ends with it.
    fn closes(&self) -> bool {
        self.cut.is_some() || self.answer.as_ref().map_or(true, |a| a.close)
    }
}

impl Server {
    /// Answers a request, unless a fault is set for it. Without a reply the connection ends.
    async fn respond(&self, request: Request) -> Option<Reply> {
        let path = request.path.strip_prefix("/api2/json").unwrap_or(&request.path);
        let effects = self.cluster.dc.faults.of_request(&request.method, path);
        for effect in &effects {
            match effect {
                Effect::DelayRequest { ms } => sleep(Duration::from_millis(*ms)).await,
                Effect::CallBefore(call) => self.interfere(call).await,
                Effect::LoseRequest => return None,
                Effect::Status { code, reason } => {
                    let error = ApiError::Gateway { code: *code, reason: reason.clone() };
                    return Reply::from(Err(error));
                }
                _ => {}
            }
        }
        if effects.contains(&Effect::Duplicate) {
            let _ = self.answer(&request).await;
        }
        let mut reply = Reply { answer: self.answer(&request).await, cut: None };
        for effect in &effects {
            match effect {
                Effect::DelayAnswer { ms } => sleep(Duration::from_millis(*ms)).await,
                Effect::CallAfter(call) => self.interfere(call).await,
                Effect::LoseAnswer => return None,
                Effect::Truncate { bytes } => {
                    reply.cut = Some(Cut { bytes: *bytes, announced: false });
                }
                Effect::Garble { bytes } => {
                    reply.cut = Some(Cut { bytes: *bytes, announced: true });
                }
                _ => {}
            }
        }
        Some(reply)
    }

    async fn interfere(&self, call: &Call) {
        if let Err(error) = control::administrate(&self.cluster, call).await {
            self.node.note(&format!("{} {} of a fault: {error}", call.method, call.path));
        }
    }

    fn authenticate(&self, request: &Request) -> Result<Identity, ApiError> {
        if api::is_public(request) {
            return Ok(Identity::nobody());
        }
        self.cluster.dc.authenticate(request)
    }

    /// Authenticates, answers, and lets pass the time that this takes on a real node.
    async fn answer(&self, request: &Request) -> Result<Answer, ApiError> {
        let start = request.at.unwrap_or_else(Instant::now);
        let profile = &self.node.profile;
        let result = match self.authenticate(request) {
            Ok(who) => api::handle(&self.cluster, &self.node, &who, request).await,
            Err(error) => Err(error),
        };
        if result.as_ref().is_err_and(|e| e.status() == 401) {
            sleep(profile.unauthorized()).await;
            return result;
        }
        let call = result.as_ref().map_or(crate::profile::Call::Plain, |a| a.call);
        let rest = profile.call(call).saturating_sub(start.elapsed());
        if !rest.is_zero() {
            sleep(rest).await;
        }
        result
    }
}

struct Connection<S> {
    stream: S,
    buffer: Vec<u8>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// Reads more bytes; `Gone` at the end of the stream.
    async fn fill(&mut self, wait: Duration) -> Result<(), Stop> {
        let mut chunk = [0u8; 16 * 1024];
        let n = timeout(wait, self.stream.read(&mut chunk)).await.map_err(|_| Stop::Gone)??;
        if n == 0 {
            return Err(Stop::Gone);
        }
        self.buffer.extend_from_slice(&chunk[..n]);
        Ok(())
    }

    async fn read_request(&mut self, server: &Server) -> Result<(Request, bool), Stop> {
        let head = loop {
            if let Some(head) = self.parse_head().map_err(Stop::Answer)? {
                break head;
            }
            let wait = if self.buffer.is_empty() { IDLE } else { RECEIVE };
            self.fill(wait).await?;
        };
        if head.expects_continue {
            self.stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
            self.stream.flush().await?;
        }
        let boundary = upload::boundary(&head.content_type);
        if let Some(boundary) =
            boundary.filter(|_| api::is_upload(&head.request.method, &head.request.path))
        {
            return self.read_upload(server, head, &boundary).await;
        }
        let body = match head.body {
            Body::Length(n) if n > MAX_BODY => return Err(Stop::Answer(ApiError::TooLarge)),
            Body::Length(n) => self.take(n).await?,
            Body::Chunked => self.read_chunks().await?,
        };
        let mut request = head.request;
        request.params = Params::from_form(head.query.as_bytes());
        if !body.is_empty() && matches!(request.method.as_str(), "POST" | "PUT") {
            let form = if head.content_type.to_ascii_lowercase().starts_with("application/json") {
                Params::from_json(&body).map_err(Stop::Answer)?
            } else {
                Params::from_form(&body)
            };
            request.params.merge(form);
        }
        request.at = Some(Instant::now());
        Ok((request, head.close))
    }

    /// Reads a file into the directory of the node, if the client may send it at all.
    async fn read_upload(
        &mut self,
        server: &Server,
        head: Head,
        boundary: &str,
    ) -> Result<(Request, bool), Stop> {
        let mut request = head.request;
        if let Err(error) = server.authenticate(&request) {
            sleep(server.node.profile.unauthorized()).await;
            return Err(Stop::Answer(error));
        }
        let Body::Length(mut left) = head.body else {
            let text = "upload: chunked bodies are not supported";
            return Err(Stop::Answer(ApiError::BadRequest(text.into())));
        };
        let bad = |e: UploadError| Stop::Answer(ApiError::BadRequest(e.to_string()));
        let mut parser = Parser::new(&server.node.paths.uploads, boundary);
        while left > 0 {
            if self.buffer.is_empty() {
                self.fill(RECEIVE).await?;
            }
            let n = left.min(self.buffer.len());
            parser.push(&self.buffer[..n]).map_err(bad)?;
            self.buffer.drain(..n);
            left -= n;
        }
        let (fields, file) = parser.finish().map_err(bad)?;
        request.params = Params::from_form(head.query.as_bytes());
        request.params.merge(fields);
        request.upload = file;
        request.at = Some(Instant::now());
        Ok((request, head.close))
    }

    async fn take(&mut self, n: usize) -> Result<Vec<u8>, Stop> {
        while self.buffer.len() < n {
            self.fill(RECEIVE).await?;
        }
        Ok(self.buffer.drain(..n).collect())
    }

    async fn read_line(&mut self) -> Result<String, Stop> {
        loop {
            if let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return Ok(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
            if self.buffer.len() > MAX_HEADER_BYTES {
                return Err(Stop::Answer(ApiError::BadRequest("invalid chunk".into())));
            }
            self.fill(RECEIVE).await?;
        }
    }

    async fn read_chunks(&mut self) -> Result<Vec<u8>, Stop> {
        let mut body = Vec::new();
        loop {
            let line = self.read_line().await?;
            let size = line.split(';').next().unwrap_or_default().trim();
            let size = usize::from_str_radix(size, 16)
                .map_err(|_| Stop::Answer(ApiError::BadRequest("invalid chunk".into())))?;
            if size > MAX_BODY || body.len() + size > MAX_BODY {
                return Err(Stop::Answer(ApiError::TooLarge));
            }
            if size == 0 {
                for _ in 0..MAX_HEADER_LINES {
                    if self.read_line().await?.is_empty() {
                        return Ok(body);
                    }
                }
                return Err(Stop::Answer(ApiError::BadRequest("too many trailers".into())));
            }
            body.extend(self.take(size).await?);
            self.read_line().await?;
        }
    }

    /// Takes a complete head from the buffer, if there is one.
    fn parse_head(&mut self) -> Result<Option<Head>, ApiError> {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADER_LINES];
        let mut parsed = httparse::Request::new(&mut headers);
        let length = match parsed.parse(&self.buffer) {
            Ok(httparse::Status::Complete(length)) if length <= MAX_HEADER_BYTES => length,
            Ok(httparse::Status::Partial) if self.buffer.len() <= MAX_HEADER_BYTES => {
                return Ok(None);
            }
            Ok(_) => {
                return Err(ApiError::BadRequest("too large http header".into()));
            }
            Err(httparse::Error::TooManyHeaders) => {
                return Err(ApiError::BadRequest("too many http header lines (> 64)".into()));
            }
            Err(_) => return Err(ApiError::BadRequest("bad request".into())),
        };
        let head = read_head(&parsed)?;
        self.buffer.drain(..length);
        Ok(Some(head))
    }

    /// Leaves HTTP. What the client has sent already belongs to the websocket.
    async fn become_websocket(mut self, client: Client) {
        let protocol = match &client.handshake.protocol {
            Some(protocol) => format!("Sec-WebSocket-Protocol: {protocol}\r\n"),
            None => String::new(),
        };
        let head = format!(
            "HTTP/1.1 101 Switching Protocols\r\n\
             Upgrade: websocket\r\n\
             Connection: upgrade\r\n\
             Sec-WebSocket-Accept: {}\r\n\
             {protocol}\r\n",
            client.handshake.accept()
        );
        if self.stream.write_all(head.as_bytes()).await.is_ok() {
            // A client that breaks the rules is cut off, as one that goes.
            let _ = client.serve(&mut self.stream, self.buffer).await;
        }
        let _ = self.stream.shutdown().await;
    }

    async fn write_reply(&mut self, reply: &Reply, close: bool) -> io::Result<()> {
        let (mut head, body) = match &reply.answer {
            Ok(answer) => render_ok(answer, close),
            Err(error) => render_error(error),
        };
        let mut body = body.as_bytes();
        let mut length = body.len();
        if let Some(cut) = &reply.cut {
            body = &body[..cut.bytes.min(body.len())];
            if cut.announced {
                length = body.len();
            }
        }
        head.push_str(&format!("Content-Length: {length}\r\n\r\n"));
        self.stream.write_all(&[head.as_bytes(), body].concat()).await?;
        self.stream.flush().await
    }
}

fn read_head(parsed: &httparse::Request<'_, '_>) -> Result<Head, ApiError> {
    let bad = |what: &str| ApiError::BadRequest(what.to_owned());
    let target = parsed.path.unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let mut head = Head {
        request: Request {
            method: parsed.method.unwrap_or_default().to_owned(),
            path: path.to_owned(),
            ..Request::default()
        },
        query: query.to_owned(),
        content_type: String::new(),
        body: Body::Length(0),
        expects_continue: false,
        close: parsed.version == Some(0),
    };
    let (mut upgrade, mut key, mut protocol) = (false, None, None);
    for header in parsed.headers.iter() {
        let value = String::from_utf8_lossy(header.value).into_owned();
        match header.name.to_ascii_lowercase().as_str() {
            "upgrade" => upgrade = value.eq_ignore_ascii_case("websocket"),
            "sec-websocket-key" => key = Some(value),
            // It comes back in a header of the answer.
            "sec-websocket-protocol" if value == "binary" => protocol = Some(value),
            "authorization" => head.request.authorization = Some(value),
            "cookie" => head.request.cookie = Some(value),
            "csrfpreventiontoken" => head.request.csrf = Some(value),
            "content-type" => head.content_type = value,
            "connection" if value.eq_ignore_ascii_case("close") => head.close = true,
            "expect" => head.expects_continue = value.eq_ignore_ascii_case("100-continue"),
            "content-length" if matches!(head.body, Body::Length(_)) => {
                let n = value.trim().parse().map_err(|_| bad("invalid content length"))?;
                head.body = Body::Length(n);
            }
            "transfer-encoding" => {
                if !value.eq_ignore_ascii_case("chunked") {
                    return Err(bad("unknown transfer encoding"));
                }
                head.body = Body::Chunked;
            }
            _ => {}
        }
    }
    head.request.websocket = key.filter(|_| upgrade).map(|key| Handshake { key, protocol });
    Ok(head)
}

/// A head with what every answer has.
fn head(status: u16, reason: &str, connection: &str) -> String {
    // A line break in an error text would end the status line.
    let reason: String = reason.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let date = http_date(SystemTime::now());
    format!(
        "HTTP/1.1 {status} {reason}\r\n\
         Cache-Control: max-age=0\r\n\
         {connection}\
         Date: {date}\r\n\
         Pragma: no-cache\r\n\
         Server: pve-api-daemon/3.0\r\n\
         Expires: {date}\r\n"
    )
}

const JSON: &str = "Content-Type: application/json;charset=UTF-8\r\n";

/// Head without the length, and body.
fn render_ok(answer: &Answer, close: bool) -> (String, String) {
    let mut body = String::from("{\"data\":");
    body.push_str(&answer.data.to_string());
    if let Some(total) = answer.total {
        body.push_str(&format!(",\"total\":{total}"));
    }
    body.push('}');
    let connection = match (close, answer.protected) {
        (true, _) => "Connection: close\r\n",
        (false, false) => "Connection: Keep-Alive\r\n",
        // The privileged daemon's header, passed on by the front end, and its own.
        (false, true) => "Connection: close\r\nConnection: Keep-Alive\r\n",
    };
    let mut text = head(200, "OK", connection);
    text.push_str(JSON);
    (text, body)
}

fn render_error(error: &ApiError) -> (String, String) {
    let message = error.to_string();
    let (kind, body) = match error {
        ApiError::Unauthorized(_) | ApiError::Gateway { .. } => ("", String::new()),
        ApiError::TooLarge => ("Content-Type: text/plain\r\n", message.clone()),
        _ => {
            // Only the answer to an unknown path has no newline after its text.
            let end = if matches!(error, ApiError::NotImplemented { .. }) { "" } else { "\n" };
            let mut body = serde_json::json!({"data": null, "message": format!("{message}{end}")});
            if let ApiError::Params(errors) = error {
                body["errors"] = serde_json::json!(errors);
            }
            (JSON, body.to_string())
        }
    };
    let mut text = head(error.status(), &message, "Connection: close\r\n");
    text.push_str(kind);
    (text, body)
}

/// `Sun, 06 Nov 1994 08:49:37 GMT`.
fn http_date(time: SystemTime) -> String {
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let secs = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let days = secs / 86_400;
    let (h, m, s) = (secs / 3600 % 24, secs / 60 % 60, secs % 60);
    // The civil date from the number of days, in years that begin in March.
    let z = days + 719_468;
    let era = z / 146_097;
    let doe = z % 146_097;
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = (mp + 2) % 12;
    let year = yoe + era * 400 + u64::from(month < 2);
    format!(
        "{}, {day:02} {} {year} {h:02}:{m:02}:{s:02} GMT",
        DAYS[(days % 7) as usize],
        MONTHS[month as usize]
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_http() {
        let date = |secs| http_date(UNIX_EPOCH + Duration::from_secs(secs));
        assert_eq!(date(784_111_777), "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(date(951_782_400), "Tue, 29 Feb 2000 00:00:00 GMT");
        assert_eq!(date(0), "Thu, 01 Jan 1970 00:00:00 GMT");
    }

    #[test]
    fn an_error_text_cannot_add_a_header() {
        let (text, _) = render_error(&ApiError::Failed("a\r\nX: y".into()));
        assert!(text.starts_with("HTTP/1.1 500 a  X: y\r\n"), "{text}");
    }
}
