//! The channel between `start` and the server it starts: a socket pair.
//!
//! `start` sends a [`Handover`], the server answers with a [`Readiness`], and `start` sends one more
//! byte when containerd has the reply. A server that sees the end of the channel instead has a
//! parent that failed or was killed; containerd believes that no shim was started, so it ends.

use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::RuntimeOptions;

/// Larger than any message: options are at most 4 MiB, and JSON writes up to four characters a byte.
const MAX_MESSAGE: u32 = 32 << 20;

/// The byte that says containerd has the reply.
pub(super) const COMMITTED: u8 = b'C';

/// What the server needs to know beyond its command line. Not in the environment, which other
/// processes inherit and everybody's `ps` can show, and has a limit.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Handover {
    pub(super) ttrpc_address: Option<String>,
    pub(super) options: Option<RuntimeOptions>,
    /// A name that [`parse_level`](crate::log_fifo::parse_level) knows.
    pub(super) level: Option<String>,
}

/// `Err` is a sentence for the administrator.
pub(super) type Readiness = Result<(), String>;

pub(super) fn send<T: Serialize>(mut channel: impl Write, message: &T) -> io::Result<()> {
    let json = serde_json::to_vec(message)?;
    let length = u32::try_from(json.len()).ok().filter(|length| *length <= MAX_MESSAGE);
    let length = length.ok_or(io::ErrorKind::FileTooLarge)?;
    let mut bytes = length.to_be_bytes().to_vec();
    bytes.extend_from_slice(&json);
    channel.write_all(&bytes)
}

pub(super) fn receive<T: DeserializeOwned>(mut channel: impl Read) -> io::Result<T> {
    let mut length = [0; 4];
    channel.read_exact(&mut length)?;
    let length = u32::from_be_bytes(length);
    if length > MAX_MESSAGE {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let mut json = vec![0; length as usize];
    channel.read_exact(&mut json)?;
    Ok(serde_json::from_slice(&json)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_as_sent() {
        let message = Handover {
            ttrpc_address: Some("/run/x".into()),
            options: Some(RuntimeOptions { type_url: "t".into(), value: vec![0, 255] }),
            level: None,
        };
        let mut channel = Vec::new();
        send(&mut channel, &message).unwrap();
        send(&mut channel, &Readiness::Err("no".into())).unwrap();
        let mut rest = channel.as_slice();
        assert_eq!(receive::<Handover>(&mut rest).unwrap(), message);
        assert_eq!(receive::<Readiness>(&mut rest).unwrap(), Err("no".to_string()));
        assert!(receive::<Readiness>(&mut rest).is_err(), "the end is an error");
    }

    #[test]
    fn a_false_length_is_refused() {
        assert!(receive::<Handover>([255; 8].as_slice()).is_err());
    }
}
