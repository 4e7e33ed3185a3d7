//! A TLS connection as hyper reads and writes it.
//!
//! Proxmox answers its privileged calls with two header lines, `Connection: close` and
//! `Connection: Keep-Alive`, and keeps the connection open: pvedaemon writes the first about its
//! own connection with pveproxy, which passes it on and adds the second about ours. hyper obeys
//! the first, as HTTP demands, and every start, stop and status would cost a TLS handshake. So the
//! first line is renamed here on its way in, in just this case: an answer of success with both
//! lines. All others are as the server meant them; it does close after an error and after an
//! upload, and says only so.
//!
//! If the server closes after all, nothing worse happens than with any idle connection: the next
//! request meets the end before it is written and goes over a new connection.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use hyper::rt::ReadBufCursor;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

/// The plaintext of one TLS record: Proxmox's head and the beginning of its body are in one.
const CHUNK: usize = 16 << 10;

pub(super) struct Stream {
    tls: TlsStream<TcpStream>,
    /// The next bytes begin an answer.
    awaiting_head: Arc<AtomicBool>,
}

impl Stream {
    pub(super) fn new(tls: TlsStream<TcpStream>, awaiting_head: Arc<AtomicBool>) -> Stream {
        Stream { tls, awaiting_head }
    }

    pub(super) fn into_inner(self) -> TlsStream<TcpStream> {
        self.tls
    }
}

impl hyper::rt::Read for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut out: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let mut chunk = [0; CHUNK];
        let limit = CHUNK.min(out.remaining());
        let mut buffer = ReadBuf::new(&mut chunk[..limit]);
        ready!(Pin::new(&mut self.tls).poll_read(cx, &mut buffer))?;
        if self.awaiting_head.swap(false, Ordering::Relaxed) {
            believe_keep_alive(buffer.filled_mut());
        }
        out.put_slice(buffer.filled());
        Poll::Ready(Ok(()))
    }
}

impl hyper::rt::Write for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(cx)
    }
}

/// Renames `Connection: close` in the head of a successful answer that also says
/// `Connection: Keep-Alive`. A head that is not complete stays as it is.
fn believe_keep_alive(bytes: &mut [u8]) {
    const NAME: &[u8] = b"connection";
    const OTHER_NAME: &[u8; 10] = b"x-upstream";
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n");
    let (true, Some(end)) = (bytes.starts_with(b"HTTP/1.1 2"), end) else { return };
    let (mut close, mut keep_alive) = (None, false);
    let mut at = 0;
    for line in bytes[..end].split(|byte| *byte == b'\n') {
        if line.len() > NAME.len()
            && line[..NAME.len()].eq_ignore_ascii_case(NAME)
            && line[NAME.len()] == b':'
        {
            match line[NAME.len() + 1..].trim_ascii() {
                value if value.eq_ignore_ascii_case(b"close") => close = Some(at),
                value if value.eq_ignore_ascii_case(b"keep-alive") => keep_alive = true,
                _ => {}
            }
        }
        at += line.len() + 1;
    }
    if let (Some(at), true) = (close, keep_alive) {
        bytes[at..at + NAME.len()].copy_from_slice(OTHER_NAME);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn after(head: &str) -> String {
        let mut bytes = head.as_bytes().to_vec();
        believe_keep_alive(&mut bytes);
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn only_the_contradiction_of_a_success_is_resolved() {
        let both = "Connection: close\r\nConnection: Keep-Alive\r\n\r\n{}";
        assert_eq!(
            after(&format!("HTTP/1.1 200 OK\r\n{both}")),
            format!("HTTP/1.1 200 OK\r\n{}", both.replacen("Connection", "x-upstream", 1))
        );
        let reverse =
            "HTTP/1.1 200 OK\r\nConnection: Keep-Alive\r\nX: y\r\nCONNECTION:close\r\n\r\n";
        assert_eq!(after(reverse), reverse.replace("CONNECTION", "x-upstream"));
        for kept in [
            &format!("HTTP/1.1 500 x\r\n{both}"),
            &format!("HTTP/1.1 101 x\r\n{both}"),
            &format!("HTTP/1.0 200 x\r\n{both}"),
            // An upload's, and a plain call's.
            "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n",
            "HTTP/1.1 200 OK\r\nConnection: Keep-Alive\r\n\r\n",
            // In the body, or not all there.
            "HTTP/1.1 200 OK\r\nConnection: Keep-Alive\r\n\r\nConnection: close\r\n\r\n",
            "HTTP/1.1 200 OK\r\nConnection: close\r\nConnection: Keep-Alive\r\n",
            "HTTP/1.1 200 OK\r\nConnection: close\r\nConnection: upgrade\r\n\r\n",
            "HTTP/1.1 200 OK\r\nX-Connection: close\r\nConnection: Keep-Alive\r\n\r\n",
            "",
        ] {
            assert_eq!(after(kept), kept);
        }
    }

    proptest! {
        #[test]
        fn nothing_but_that_name_changes(
            lines in proptest::collection::vec("(?i)(connection|x): ?(close|keep-alive|\\PC{0,5})", 0..5),
            rest in "\\PC{0,10}",
        ) {
            let head = format!("HTTP/1.1 200 OK\r\n{}\r\n\r\n{rest}", lines.join("\r\n"));
            let changed = after(&head);
            prop_assert_eq!(changed.len(), head.len());
            let lower = changed.to_lowercase().replace("x-upstream", "connection");
            prop_assert_eq!(lower, head.to_lowercase());
        }
    }
}
