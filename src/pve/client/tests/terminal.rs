//! The terminal, with the frames of the recording.

use futures_util::future::BoxFuture;
use futures_util::{FutureExt, SinkExt, StreamExt};
use tokio::io::AsyncWriteExt;
use tokio_rustls::server::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;

use super::*;

type Socket = TlsStream<tokio::net::TcpStream>;

async fn console(early: Vec<u8>, then: fn(Socket) -> BoxFuture<'static, ()>) -> Fake {
    Fake::start(move |seen| match seen.method.as_str() {
        "POST" => Reply::recorded("termproxy"),
        _ => Reply::WebSocket { early: early.clone(), then },
    })
    .await
}

async fn next(socket: &mut WebSocketStream<Socket>) -> Vec<u8> {
    socket.next().await.unwrap().unwrap().into_data().to_vec()
}

/// As recorded: `OK`, dtach's clear, the shell's first line; it echoes the size and the input, and
/// ends without a close frame.
fn shell(stream: Socket) -> BoxFuture<'static, ()> {
    async move {
        let mut socket = WebSocketStream::from_raw_socket(stream, Role::Server, None).await;
        assert_eq!(next(&mut socket).await, b"root@pam!full:PVEVNC:VNC-TICKET\n");
        let raw = socket.get_mut();
        raw.write_all(&[0x82, 0x02, 0x4f, 0x4b]).await.unwrap();
        raw.write_all(&[0x82, 0x06, 0x1b, 0x5b, 0x48, 0x1b, 0x5b, 0x4a]).await.unwrap();
        let line = [&[0x82, 0x7e, 0x00, 0x87][..], &[b'#'; 135]].concat();
        raw.write_all(&line).await.unwrap();
        raw.flush().await.unwrap();
        assert_eq!(next(&mut socket).await, b"1:80:24:");
        assert_eq!(next(&mut socket).await, b"0:6:id -u\n");
        // Longer input comes in pieces.
        assert_eq!(next(&mut socket).await, [b"0:1024:".as_slice(), &[b'x'; 1024]].concat());
        assert_eq!(next(&mut socket).await, b"0:1:x");
        assert_eq!(next(&mut socket).await, b"2");
        socket.send(Message::Ping(Vec::new().into())).await.unwrap();
        assert!(matches!(socket.next().await, Some(Ok(Message::Pong(_)))));
        let raw = socket.get_mut();
        raw.write_all(&[0x82, 0x04, 0x30, 0x0d, 0x0d, 0x0a]).await.unwrap();
        raw.shutdown().await.unwrap();
    }
    .boxed()
}

#[tokio::test]
async fn a_terminal_is_typed_into_and_read_until_its_end() {
    let fake = console(Vec::new(), shell).await;
    let mut terminal = client(&fake).terminal(id(500)).await.unwrap();
    assert_eq!(terminal.upid().kind(), "vncproxy");
    assert_eq!(terminal.read().await.unwrap().unwrap(), b"\x1b[H\x1b[J"[..]);
    assert_eq!(terminal.read().await.unwrap().unwrap().len(), 135);
    terminal.resize(80, 24).await.unwrap();
    terminal.write(b"id -u\n").await.unwrap();
    terminal.write(&[b'x'; 1025]).await.unwrap();
    terminal.keep_alive().await.unwrap();
    assert_eq!(terminal.read().await.unwrap().unwrap(), b"0\r\r\n"[..]);
    assert_eq!(terminal.read().await.unwrap(), None);
    let seen = fake.seen();
    assert!(seen[0].is("POST", "/nodes/pve1/lxc/500/termproxy"));
    assert_eq!(
        seen[1].path,
        "/nodes/pve1/lxc/500/vncwebsocket?port=5900&vncticket=PVEVNC%3AVNC-TICKET"
    );
    assert_eq!(seen[1].header("sec-websocket-protocol"), "binary");
    assert_eq!(seen[1].header("sec-websocket-version"), "13");
    assert!(seen[1].header("authorization").starts_with("PVEAPIToken="));
    assert!(!format!("{terminal:?}").contains("TICKET"));
}

fn hang(stream: Socket) -> BoxFuture<'static, ()> {
    async move {
        let _stream = stream;
        std::future::pending().await
    }
    .boxed()
}

#[tokio::test]
async fn the_first_ok_may_come_in_pieces_or_with_output_behind_it() {
    // Right behind the head of the answer.
    let early = [0x82, 0x01, b'O', 0x82, 0x03, b'K', b'h', b'i'];
    let fake = console(early.to_vec(), hang).await;
    let mut terminal = client(&fake).terminal(id(500)).await.unwrap();
    assert_eq!(terminal.read().await.unwrap().unwrap(), b"hi"[..]);
}

#[tokio::test]
async fn a_terminal_that_does_not_open_is_an_error_in_time() {
    for (early, expected) in [
        // A word that is not `OK`, a close frame, nothing at all.
        (vec![0x82, 0x02, b'N', b'O'], "did not take its ticket"),
        (vec![0x88, 0x00], "did not take its ticket"),
        (vec![], "did not answer"),
        // Masked, which a server must not.
        (vec![0x82, 0x82, 1, 2, 3, 4, 5, 6], "cannot reach"),
    ] {
        let fake = console(early, hang).await;
        let error = client(&fake).terminal(id(500)).await.unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[tokio::test]
async fn a_refused_websocket_tells_why_and_keeps_its_ticket_to_itself() {
    let text = "permission denied - invalid PVEVNC ticket";
    let body = json!({"data": null, "message": format!("{text}\n")}).to_string();
    let raw = format!("HTTP/1.1 401 {text}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let wrong = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\
                 Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
    for (answer, expected) in
        [(raw.as_str(), text), (wrong, "answers another request"), ("", "cannot reach")]
    {
        let answer = answer.to_owned();
        let fake = Fake::start(move |seen| match seen.method.as_str() {
            "POST" => Reply::recorded("termproxy"),
            _ => Reply::Raw(answer.clone()),
        })
        .await;
        let error = client(&fake).terminal(id(500)).await.unwrap_err();
        let shown = format!("{error} {error:?}");
        assert!(shown.contains(expected) && !shown.contains("VNC-TICKET"), "{shown}");
        assert!(!shown.contains("PVEVNC%3A"), "{shown}");
    }
}
