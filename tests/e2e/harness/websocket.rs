//! A client of the streams that CRI serves for exec, attach and port-forward, in their WebSocket form
//! (RFC 6455; Kubernetes' `v4.channel.k8s.io`: the first byte of each message is its channel).

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use super::process::scaled;

pub const STDIN: u8 = 0;
pub const STDOUT: u8 = 1;
pub const ERROR: u8 = 3;

/// An open connection.
pub struct Channels {
    reader: BufReader<TcpStream>,
    /// What has come so far, by channel.
    pub received: BTreeMap<u8, Vec<u8>>,
}

impl Channels {
    /// Opens the URL that CRI answered with.
    pub fn open(url: &str) -> Channels {
        let (host, path) = url
            .strip_prefix("http://")
            .and_then(|rest| rest.split_once('/'))
            .unwrap_or_else(|| panic!("not a URL of a stream: {url}"));
        let mut stream = TcpStream::connect(host).expect("connect to the streaming server");
        stream.set_read_timeout(Some(scaled(Duration::from_secs(30)))).expect("set a timeout");
        write!(
            stream,
            "GET /{path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\
             Origin: http://{host}\r\nSec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n"
        )
        .expect("send the handshake");
        let mut reader = BufReader::new(stream);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert_ne!(reader.read_line(&mut head).expect("read the handshake"), 0, "{head}");
        }
        assert!(head.starts_with("HTTP/1.1 101"), "{head}");
        Channels { reader, received: BTreeMap::new() }
    }

    pub fn send(&mut self, channel: u8, data: &[u8]) {
        assert!(data.len() < 125, "short messages only");
        let mut frame = vec![0x82, 0x80 | (data.len() + 1) as u8];
        // A mask of zeros leaves the data as it is.
        frame.extend_from_slice(&[0, 0, 0, 0, channel]);
        frame.extend_from_slice(data);
        self.reader.get_mut().write_all(&frame).expect("send a message");
    }

    /// Reads until `done`, or to the end of the connection.
    pub fn read_until(&mut self, done: impl Fn(&BTreeMap<u8, Vec<u8>>) -> bool) {
        while !done(&self.received) {
            let mut head = [0; 2];
            if self.reader.read_exact(&mut head).is_err() || head[0] & 0xf == 8 {
                return;
            }
            let mut length = u64::from(head[1] & 0x7f);
            if length >= 126 {
                let mut bytes = [0; 8];
                let used = if length == 126 { 6 } else { 0 };
                self.reader.read_exact(&mut bytes[used..]).expect("read a length");
                length = u64::from_be_bytes(bytes);
            }
            let mut data = vec![0; usize::try_from(length).expect("a sane length")];
            self.reader.read_exact(&mut data).expect("read a message");
            if let Some((channel, data)) = data.split_first() {
                self.received.entry(*channel).or_default().extend_from_slice(data);
            }
        }
    }

    /// What has come on a channel, as text.
    pub fn text(&self, channel: u8) -> String {
        let bytes = self.received.get(&channel).cloned().unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}
