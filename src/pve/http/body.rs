//! What a request carries: nothing, a form, or a form with a file that is read as it is sent.

use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use hyper::body::{Bytes, Frame, SizeHint};
use hyper::header::HeaderValue;
use tokio::fs::File;
use tokio::io::{AsyncRead, ReadBuf};

const CHUNK: usize = 64 << 10;

/// A request's content, from which as many bodies can be made as there are attempts.
pub(in crate::pve) enum Payload {
    Nothing,
    /// `application/x-www-form-urlencoded`
    Form(Bytes),
    /// `multipart/form-data`: fields, then one file.
    Multipart {
        boundary: String,
        fields: Vec<Part>,
        file: Part,
        path: PathBuf,
        size: u64,
    },
}

/// One part of a multipart form.
pub(in crate::pve) struct Part {
    /// Without quotes and control characters, as is `filename`.
    pub(in crate::pve) name: &'static str,
    pub(in crate::pve) filename: Option<String>,
    /// The file's is empty: its content follows.
    pub(in crate::pve) value: String,
}

impl Payload {
    pub(in crate::pve) fn form(fields: &[(&str, &str)]) -> Payload {
        let mut form = form_urlencoded::Serializer::new(String::new());
        for (name, value) in fields {
            form.append_pair(name, value);
        }
        Payload::Form(form.finish().into())
    }

    pub(super) async fn body(&self) -> Result<(Body, Option<HeaderValue>), String> {
        match self {
            Payload::Nothing => Ok((Body::bytes(Bytes::new()), None)),
            Payload::Form(form) => {
                let content_type = HeaderValue::from_static("application/x-www-form-urlencoded");
                Ok((Body::bytes(form.clone()), Some(content_type)))
            }
            Payload::Multipart { boundary, fields, file, path, size } => {
                let mut head = String::new();
                for part in fields.iter().chain([file]) {
                    let filename = part.filename.as_ref();
                    let filename = filename.map(|name| format!("; filename=\"{name}\""));
                    head.push_str(&format!(
                        "--{boundary}\r\nContent-Disposition: form-data; name=\"{}\"{}\r\n\r\n{}",
                        part.name,
                        filename.unwrap_or_default(),
                        part.value,
                    ));
                    if part.filename.is_none() {
                        head.push_str("\r\n");
                    }
                }
                let opened = File::open(path).await;
                let opened = opened.map_err(|e| format!("{}: {e}", path.display()))?;
                let content_type = format!("multipart/form-data; boundary={boundary}");
                let content_type =
                    HeaderValue::from_str(&content_type).map_err(|e| e.to_string())?;
                let tail = Bytes::from(format!("\r\n--{boundary}--\r\n"));
                let body = Body {
                    length: head.len() as u64 + size + tail.len() as u64,
                    head: head.into(),
                    file: Some((opened, *size)),
                    tail,
                };
                Ok((body, Some(content_type)))
            }
        }
    }
}

/// What is still to be sent of a request's content.
pub(super) struct Body {
    head: Bytes,
    /// With the number of bytes to come of it.
    file: Option<(File, u64)>,
    tail: Bytes,
    /// Of all that is left.
    length: u64,
}

impl Body {
    fn bytes(bytes: Bytes) -> Body {
        Body { length: bytes.len() as u64, head: bytes, file: None, tail: Bytes::new() }
    }

    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        if !self.head.is_empty() {
            return Poll::Ready(Ok(Some(std::mem::take(&mut self.head))));
        }
        if let Some((file, left)) = &mut self.file
            && *left > 0
        {
            let mut chunk = vec![0; usize::try_from(*left).unwrap_or(CHUNK).min(CHUNK)];
            let mut buffer = ReadBuf::new(&mut chunk);
            ready!(Pin::new(file).poll_read(cx, &mut buffer))?;
            let n = buffer.filled().len();
            if n == 0 {
                let short = "the file has become shorter";
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::UnexpectedEof, short)));
            }
            *left -= n as u64;
            chunk.truncate(n);
            return Poll::Ready(Ok(Some(chunk.into())));
        }
        self.file = None;
        let tail = std::mem::take(&mut self.tail);
        Poll::Ready(Ok((!tail.is_empty()).then_some(tail)))
    }
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let chunk = ready!(self.poll_chunk(cx));
        if let Ok(Some(chunk)) = &chunk {
            self.length -= chunk.len() as u64;
        }
        Poll::Ready(chunk.transpose().map(|chunk| chunk.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        self.length == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.length)
    }
}
