//! Websocket frames, as far as a terminal needs them (RFC 6455).

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha1::{Digest, Sha1};

/// The longest message that a client may send.
const MAX: u64 = 1 << 20;

/// What a client asks for when it wants to change protocols.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handshake {
    /// `Sec-WebSocket-Key`
    pub key: String,
    /// `Sec-WebSocket-Protocol`
    pub protocol: Option<String>,
}

impl Handshake {
    /// The value of `Sec-WebSocket-Accept`.
    pub fn accept(&self) -> String {
        const GUID: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
        STANDARD.encode(Sha1::digest(format!("{}{GUID}", self.key)))
    }
}

/// A frame from a client.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    /// A piece of the stream; where it is cut means nothing.
    Data(Vec<u8>),
    /// To be answered with [`PONG`].
    Ping,
    /// The end.
    Close,
    /// Nothing to do.
    Other,
}

/// The client breaks the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("invalid websocket frame")]
pub struct Invalid;

/// The answer to a ping, without what the ping carried.
pub const PONG: [u8; 2] = [0x8a, 0];

/// Takes the first frame from the buffer, if it is complete.
pub fn decode(buffer: &mut Vec<u8>) -> Result<Option<Frame>, Invalid> {
    let (Some(first), Some(second)) = (buffer.first(), buffer.get(1)) else { return Ok(None) };
    // Clients must mask, and no extension is agreed upon.
    if second & 0x80 == 0 || first & 0x70 != 0 {
        return Err(Invalid);
    }
    let (opcode, short) = (first & 0x0f, usize::from(second & 0x7f));
    let extra = match short {
        126 => 2,
        127 => 8,
        _ => 0,
    };
    let Some(length) = buffer.get(2..2 + extra) else { return Ok(None) };
    let length = match extra {
        0 => short as u64,
        _ => length.iter().fold(0u64, |n, b| n << 8 | u64::from(*b)),
    };
    if length > MAX {
        return Err(Invalid);
    }
    let start = 2 + extra + 4;
    let end = start + length as usize;
    let Some(masked) = buffer.get(start..end) else { return Ok(None) };
    let mask = &buffer[start - 4..start];
    let data: Vec<u8> = masked.iter().zip(mask.iter().cycle()).map(|(b, m)| b ^ m).collect();
    buffer.drain(..end);
    Ok(Some(match opcode {
        0..=2 => Frame::Data(data),
        8 => Frame::Close,
        9 => Frame::Ping,
        10 => Frame::Other,
        _ => return Err(Invalid),
    }))
}

/// A binary frame of a server.
pub fn encode(data: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x82];
    match data.len() {
        n if n < 126 => frame.push(n as u8),
        n if n <= usize::from(u16::MAX) => {
            frame.push(126);
            frame.extend((n as u16).to_be_bytes());
        }
        n => {
            frame.push(127);
            frame.extend((n as u64).to_be_bytes());
        }
    }
    frame.extend_from_slice(data);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(hex: &str) -> Vec<u8> {
        hex.split(' ').map(|b| u8::from_str_radix(b, 16).unwrap()).collect()
    }

    #[test]
    fn recorded_frames_are_understood() {
        let mut buffer = bytes("82 88 37 fa 21 3d 06 c0 19 0d 0d c8 15 07");
        buffer.extend(bytes("82 8a 37 fa 21 3d 07 c0 17 07 5e 9e 01 10 42 f0"));
        buffer.extend(bytes("82 81 37 fa 21 3d 05 89 80 37 fa 21 3d 82"));
        let mut next = || decode(&mut buffer).unwrap();
        assert_eq!(next(), Some(Frame::Data(b"1:80:24:".to_vec())));
        assert_eq!(next(), Some(Frame::Data(b"0:6:id -u\n".to_vec())));
        assert_eq!(next(), Some(Frame::Data(b"2".to_vec())));
        assert_eq!(next(), Some(Frame::Ping));
        assert_eq!(next(), None);
    }

    #[test]
    fn frames_have_the_recorded_bytes() {
        assert_eq!(encode(b"OK"), bytes("82 02 4f 4b"));
        assert_eq!(encode(&[0; 135])[..4], bytes("82 7e 00 87")[..]);
        assert_eq!(encode(&[0; 70_000])[..10], bytes("82 7f 00 00 00 00 00 01 11 70")[..]);
        let key = "dGhlIHNhbXBsZSBub25jZQ==".to_owned();
        let handshake = Handshake { key, protocol: None };
        assert_eq!(handshake.accept(), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn a_frame_is_understood_however_it_is_cut() {
        let frame = bytes("82 fe 00 7e 37 fa 21 3d");
        let frame = [&frame[..], &[0x37; 126]].concat();
        for cut in 0..frame.len() {
            let mut buffer = frame[..cut].to_vec();
            assert_eq!(decode(&mut buffer), Ok(None), "{cut}");
            buffer.extend(&frame[cut..]);
            assert!(matches!(decode(&mut buffer), Ok(Some(Frame::Data(d))) if d.len() == 126));
        }
    }

    #[test]
    fn what_breaks_the_rules_is_refused() {
        for hex in ["82 02 4f 4b", "c2 80", "83 80 0 0 0 0", "82 ff 00 00 00 01 00 00 00 00"] {
            assert_eq!(decode(&mut bytes(hex)), Err(Invalid), "{hex}");
        }
    }
}
