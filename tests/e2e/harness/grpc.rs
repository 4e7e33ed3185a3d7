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

    /// A message within this one.
    pub fn message(self, field: u64, value: &Message) -> Message {
        self.bytes(field, value.encode())
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

/// One field of an encoded message: a number, or the bytes of a string or message.
enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let (mut value, mut shift) = (0u64, 0);
    loop {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f).checked_shl(shift)?;
        shift += 7;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
}

/// The fields in their order, up to one of a kind that is not known here.
fn fields(mut bytes: &[u8]) -> impl Iterator<Item = (u64, Field<'_>)> {
    std::iter::from_fn(move || {
        let key = varint(&mut bytes)?;
        let length = match key & 7 {
            0 => return Some((key >> 3, Field::Number(varint(&mut bytes)?))),
            1 => 8,
            2 => usize::try_from(varint(&mut bytes)?).ok()?,
            5 => 4,
            _ => return None,
        };
        let (value, rest) = bytes.split_at_checked(length)?;
        bytes = rest;
        Some((key >> 3, Field::Bytes(value)))
    })
}

/// A number field of an encoded message.
pub fn number_in(message: &[u8], field: u64) -> Option<u64> {
    fields(message).find_map(|(number, value)| match value {
        Field::Number(value) if number == field => Some(value),
        _ => None,
    })
}

/// All strings or messages in a repeated field.
pub fn strings_in(message: &[u8], field: u64) -> Vec<Vec<u8>> {
    let bytes = fields(message).filter_map(|(number, value)| match value {
        Field::Bytes(bytes) if number == field => Some(bytes.to_vec()),
        _ => None,
    });
    bytes.collect()
}

/// The string or message at a path of fields.
pub fn find(message: &[u8], path: &[u64]) -> Option<Vec<u8>> {
    let Some((field, rest)) = path.split_first() else { return Some(message.to_vec()) };
    find(strings_in(message, *field).first()?, rest)
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
    command.args(["--silent", "--show-error", "--max-time", "170", "--http2-prior-knowledge"]);
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
