//! Carries a process's output from a pipe to a client's FIFO or to a file of the host.
//!
//! A file is never handed to the process itself: through the descriptor it could truncate the log, or
//! change the mode of what is the host's.
//!
//! To a FIFO the bytes are moved by splice(2): the pages that the process has filled go from one pipe
//! into the other, and nobody copies them. Only a few bytes are copied instead, since a spliced page takes
//! one of the FIFO's 16 places however little it holds: 16 words, each written when the one before had
//! been moved, would fill a FIFO that nobody reads at the moment.
//!
//! While the FIFO is full nothing is taken from the pipe, and when that is full too the process waits, as
//! it would with the FIFO itself.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use log::warn;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::{pipe2, read};
use tokio::io::AsyncWriteExt;
use tokio::io::unix::AsyncFd;
use tokio::task::{AbortHandle, JoinHandle, consume_budget};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::terminal::{set_nonblocking, write_all};
use crate::sys;

/// How much the process may write before it has to wait for the shim: as much as every process may ask
/// for (the default of `fs.pipe-max-size`).
const PIPE_SIZE: i32 = 1 << 20;
/// Less than this is copied rather than spliced.
const COPIED: usize = 16 * 1024;
/// How long a pipe may stay empty after the process has ended until those that still have it open are no
/// longer listened to. It is for processes that end right after their parent, such as a `tee`.
const SILENCE: Duration = Duration::from_millis(100);

/// A stream that is being relayed. Dropping it ends that: whoever still writes gets `EPIPE`.
#[derive(Debug)]
pub(super) struct Relay {
    copy: Option<JoinHandle<()>>,
    abort: AbortHandle,
    process_ended: CancellationToken,
}

impl Relay {
    /// Begins to relay to `fifo`, which must be non-blocking, and returns the process's end of the pipe.
    pub(super) fn to_fifo(stream: &'static str, fifo: OwnedFd) -> io::Result<(Self, OwnedFd)> {
        Self::start(stream, Sink::Fifo(sys::watch(fifo)?))
    }

    /// Begins to relay to a regular file or a device, and returns the process's end of the pipe.
    pub(super) fn to_file(stream: &'static str, file: OwnedFd) -> io::Result<(Self, OwnedFd)> {
        Self::start(stream, Sink::File(tokio::fs::File::from_std(file.into())))
    }

    fn start(stream: &'static str, mut sink: Sink) -> io::Result<(Self, OwnedFd)> {
        let (pipe, process_end) = pipe2(OFlag::O_CLOEXEC)?;
        // Refused if the administrator allows less, and then the default will do.
        let _ = fcntl(&pipe, FcntlArg::F_SETPIPE_SZ(PIPE_SIZE));
        set_nonblocking(&pipe, true)?;
        let pipe = sys::watch(pipe)?;
        let process_ended = CancellationToken::new();
        let ended = process_ended.clone();
        let copy = tokio::spawn(async move {
            let relayed = match relay(&pipe, &mut sink, &ended).await {
                Ok(()) => sink.flush().await,
                failed => failed,
            };
            if let Err(error) = relayed {
                warn!("the {stream} of a process is lost from here on: {error}");
            }
        });
        let abort = copy.abort_handle();
        Ok((Self { copy: Some(copy), abort, process_ended }, process_end))
    }

    /// To be called when the process has ended. What it returns, once, ends when all output has been
    /// passed on: at the end of the pipe, or, if another process has it open, after [`SILENCE`].
    pub(super) fn ended(&mut self) -> Option<JoinHandle<()>> {
        self.process_ended.cancel();
        self.copy.take()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.abort.abort();
    }
}

/// Where the output goes.
enum Sink {
    Fifo(AsyncFd<OwnedFd>),
    /// Written on the blocking pool: it may lie on a slow disk or on the network.
    File(tokio::fs::File),
}

impl Sink {
    async fn write_all(&mut self, data: &[u8]) -> io::Result<()> {
        match self {
            Self::Fifo(fifo) => write_all(fifo, data).await,
            Self::File(file) => file.write_all(data).await,
        }
    }

    async fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Fifo(_) => Ok(()),
            Self::File(file) => file.flush().await,
        }
    }
}

async fn relay(
    pipe: &AsyncFd<OwnedFd>,
    sink: &mut Sink,
    process_ended: &CancellationToken,
) -> io::Result<()> {
    let mut buffer = vec![0; COPIED];
    let mut can_splice = true;
    loop {
        let silence = async {
            process_ended.cancelled().await;
            sleep(SILENCE).await;
        };
        let mut readable = tokio::select! {
            // The reactor looks at descriptors before it looks at the clock, so that bytes that are
            // there win, however late this runs.
            biased;
            readable = pipe.readable() => readable?,
            () = silence => return Ok(()),
        };
        let fifo = match sink {
            Sink::Fifo(fifo) if can_splice && sys::pipe::bytes_waiting(pipe.as_fd())? >= COPIED => {
                Some(&*fifo)
            }
            _ => None,
        };
        if let Some(fifo) = fifo {
            match splice_some(pipe, fifo).await {
                // A kernel that can't: nothing has been moved.
                Err(error) if is(&error, Errno::EINVAL) => can_splice = false,
                result => result?,
            }
        } else {
            match readable.try_io(|pipe| Ok(read(pipe, &mut buffer)?)) {
                Ok(Ok(0)) => return Ok(()),
                Ok(Ok(n)) => sink.write_all(&buffer[..n]).await?,
                Ok(Err(error)) if is(&error, Errno::EINTR) => {}
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => {}
            }
        }
        // With a fast process and a fast client neither end ever has to be waited for.
        consume_budget().await;
    }
}

/// Moves what the FIFO has room for, and waits for room first. The pipe must not be empty: then only
/// the FIFO can be why nothing was moved.
async fn splice_some(pipe: &AsyncFd<OwnedFd>, fifo: &AsyncFd<OwnedFd>) -> io::Result<()> {
    loop {
        let mut writable = fifo.writable().await?;
        let flags = SpliceFFlags::SPLICE_F_NONBLOCK;
        match splice(pipe, None, fifo, None, PIPE_SIZE as usize, flags) {
            Ok(_) => return Ok(()),
            Err(Errno::EAGAIN) => writable.clear_ready(),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno as i32)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use tokio::task::spawn_blocking;

    use super::*;

    #[tokio::test]
    async fn where_splice_is_refused_the_bytes_are_copied() {
        let (mut client, fifo) = UnixStream::pair().unwrap();
        // The kernel splices to no file that is open for appending.
        fcntl(&fifo, FcntlArg::F_SETFL(OFlag::O_APPEND | OFlag::O_NONBLOCK)).unwrap();
        let (pipe, process_end) = pipe2(OFlag::O_CLOEXEC).unwrap();
        set_nonblocking(&pipe, true).unwrap();
        let data: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
        let expected = data.clone();
        let writing = spawn_blocking(move || File::from(process_end).write_all(&data).unwrap());
        let reading = spawn_blocking(move || {
            let mut received = Vec::new();
            client.read_to_end(&mut received).unwrap();
            received
        });
        let (pipe, fifo) = (sys::watch(pipe).unwrap(), sys::watch(fifo.into()).unwrap());
        let mut sink = Sink::Fifo(fifo);
        relay(&pipe, &mut sink, &CancellationToken::new()).await.unwrap();
        drop(sink);
        writing.await.unwrap();
        assert!(reading.await.unwrap() == expected);
    }
}
