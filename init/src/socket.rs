//! The connection to the shim: [`protocol`](crate::protocol) messages over `SOCK_SEQPACKET`.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;

use crate::error::{Attempt, Error, Result};
use crate::protocol::{MAX_DATAGRAM, Reply, Request};
use crate::sys;

/// More than any specification; a bound, so that a confused peer cannot exhaust the memory.
const MAX_SETUP: u64 = 256 << 20;
/// A message for people; longer than any path it may name.
const MAX_MESSAGE: usize = MAX_DATAGRAM / 2;
/// How long the host may be too crowded with descriptors under way to take one more.
const CROWDED: Duration = Duration::from_secs(25);

/// One connection.
pub struct Channel(OwnedFd);

impl Channel {
    /// Connects to the socket at `path`.
    pub fn connect(path: &str) -> io::Result<Self> {
        sys::connect_seqpacket(path).map(Self)
    }

    /// A connection that is open already.
    pub fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Sends a reply with descriptors.
    pub fn send(&self, reply: &Reply, fds: &[BorrowedFd<'_>]) -> Result<()> {
        let data = postcard::to_allocvec(reply)
            .map_err(|_| Error::Protocol("a reply could not be encoded"))?;
        let deadline = Instant::now() + CROWDED;
        loop {
            match sys::send(self.0.as_fd(), &data, fds) {
                Err(e) if is_gone(&e) => return Err(Error::Disconnected),
                // Without a system call, as the container's seccomp filter may be in force.
                Err(e) if is_crowded(&e) && Instant::now() < deadline => std::hint::spin_loop(),
                other => return other.attempt(|| "send to the shim"),
            }
        }
    }

    /// Reports a failure; if that fails too, nobody is left to tell.
    pub fn send_failure(&self, error: &Error) {
        let mut message = error.to_string();
        if message.len() > MAX_MESSAGE {
            let end = (0..=MAX_MESSAGE).rev().find(|i| message.is_char_boundary(*i));
            message.truncate(end.unwrap_or(0));
        }
        let _ = self.send(&Reply::Failed { message }, &[]);
    }

    /// Waits for the next request. The end of the connection is [`Error::Disconnected`].
    pub fn receive(&self) -> Result<(Request, Vec<OwnedFd>)> {
        let mut buffer = vec![0; MAX_DATAGRAM];
        let (length, fds) = match sys::receive(self.0.as_fd(), &mut buffer) {
            Err(e) if is_gone(&e) => return Err(Error::Disconnected),
            other => other.attempt(|| "receive from the shim")?,
        };
        if length == 0 {
            return Err(Error::Disconnected);
        }
        let request = postcard::from_bytes(&buffer[..length])
            .map_err(|_| Error::Protocol("a request could not be decoded"))?;
        Ok((request, fds))
    }
}

/// More descriptors are under way on this host than the limit of open files allows: those of other
/// containers with many mounts, for a moment.
fn is_crowded(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ETOOMANYREFS)
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EPIPE | libc::ECONNRESET | libc::ENOTCONN))
}

/// Decodes what a memfd holds. Every setup begins with its protocol version, which is compared
/// first: the rest of another version would be misread.
pub fn read_setup<T: DeserializeOwned>(memfd: OwnedFd) -> Result<T> {
    let mut file = File::from(memfd);
    let mut data = Vec::new();
    file.rewind()
        .and_then(|()| file.take(MAX_SETUP).read_to_end(&mut data))
        .attempt(|| "read the setup from the shim")?;
    let (version, _) = postcard::take_from_bytes::<u32>(&data)
        .map_err(|_| Error::Protocol("the setup has no version"))?;
    if version != crate::protocol::VERSION {
        return Err(Error::Version { shim: version });
    }
    postcard::from_bytes(&data).map_err(|_| Error::Protocol("the setup could not be decoded"))
}
