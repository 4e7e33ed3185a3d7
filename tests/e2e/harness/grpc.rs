//! Unary calls of containerd's own API, for what `ctr` has no command for. curl speaks HTTP/2 over
//! the socket; the few messages are encoded by hand.

use std::path::Path;
use std::process::Command;

use super::process::Running;

/// A protobuf message under construction: only strings, bytes and numbers are needed.
#[derive(Default, Clone)]
pub struct Message(Vec<u8>);

impl Message {
    pub fn new() -> Message {
        Message::default()
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    /// A length-delimited field: string, bytes or message.
    pub fn bytes(mut self, field: u64, value: impl AsRef<[u8]>) -> Message {
        self.varint(field << 3 | 2);
        self.varint(value.as_ref().len() as u64);
        self.0.extend_from_slice(value.as_ref());
        self
    }

    pub fn number(mut self, field: u64, value: u64) -> Message {
        self.varint(field << 3);
        self.varint(value);
        self
    }

    /// `google.protobuf.Any`.
    pub fn any(self, field: u64, type_url: &str, value: impl AsRef<[u8]>) -> Message {
        let any = Message::new().bytes(1, type_url).bytes(2, value);
        self.bytes(field, any.0)
    }

    pub fn encode(&self) -> &[u8] {
        &self.0
    }
}

/// A number field of an encoded message without nested groups.
pub fn number_in(message: &[u8], field: u64) -> Option<u64> {
    let mut bytes = message.iter().copied();
    let varint = |bytes: &mut dyn Iterator<Item = u8>| {
        let (mut value, mut shift) = (0u64, 0);
        loop {
            let byte = bytes.next()?;
            value |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
    };
    loop {
        let key = varint(&mut bytes)?;
        match key & 7 {
            0 => {
                let value = varint(&mut bytes)?;
                if key >> 3 == field {
                    return Some(value);
                }
            }
            2 => {
                let length = varint(&mut bytes)?;
                for _ in 0..length {
                    bytes.next()?;
                }
            }
            _ => return None,
        }
    }
}

/// The gRPC status of a failed call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub code: u32,
    pub message: String,
}

/// Calls `service/method`; the reply without its frame.
pub fn call(
    socket: &Path,
    namespace: &str,
    method: &str,
    message: &Message,
) -> Result<Vec<u8>, Failure> {
    let mut frame = vec![0];
    frame.extend_from_slice(&(message.0.len() as u32).to_be_bytes());
    frame.extend_from_slice(&message.0);
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--max-time", "50", "--http2-prior-knowledge"]);
    command.args(["--noproxy", "*", "--dump-header", "/dev/stderr", "--data-binary", "@-"]);
    command.args(["-H", "content-type: application/grpc", "-H", "te: trailers"]);
    command.arg("-H").arg(format!("containerd-namespace: {namespace}"));
    command.arg("--unix-socket").arg(socket).arg(format!("http://localhost/{method}"));
    let output = Running::spawn(&mut command, Some(&frame)).wait().ok();
    let header = |name: &str| {
        output
            .stderr
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.trim().to_owned())
    };
    let code = header("grpc-status").and_then(|code| code.parse().ok());
    match code {
        Some(0) => Ok(output.stdout.get(5..).unwrap_or_default().to_vec()),
        Some(code) => Err(Failure { code, message: header("grpc-message").unwrap_or_default() }),
        None => panic!("{method}: no grpc-status in {:?}", output.stderr),
    }
}
