//! Copies between a terminal's master and its streams.
//!
//! A terminal cannot be handed over as FIFOs can: its far end belongs to the CT, and only the shim can
//! carry its bytes to containerd. The copies run on the reactor: a parked one costs no thread.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use log::{debug, warn};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::task::{AbortHandle, JoinHandle};

use crate::sys;

/// What a terminal's master returns at once: the kernel's buffers are pages.
const OUTPUT_BUFFER: usize = 16 * 1024;
const INPUT_BUFFER: usize = 4 * 1024;

pub(super) type Reader = Box<dyn AsyncRead + Send + Unpin>;
pub(super) type Writer = Box<dyn AsyncWrite + Send + Unpin>;

/// A terminal that is being copied. Dropping it ends the copies.
#[derive(Debug)]
pub(super) struct Terminal {
    master: Arc<AsyncFd<OwnedFd>>,
    output: Option<JoinHandle<()>>,
    copies: Vec<AbortHandle>,
}

impl Terminal {
    pub(super) fn start(
        master: OwnedFd,
        input: Option<Reader>,
        output: Option<Writer>,
    ) -> io::Result<Self> {
        set_nonblocking(&master, true)?;
        let master = Arc::new(sys::watch(master)?);
        let mut copies = Vec::new();
        let output = tokio::spawn(copy_output(Arc::clone(&master), output));
        copies.push(output.abort_handle());
        if let Some(input) = input {
            copies.push(tokio::spawn(copy_input(input, Arc::clone(&master))).abort_handle());
        }
        Ok(Self { master, output: Some(output), copies })
    }

    pub(super) fn resize(&self, columns: u16, rows: u16) -> io::Result<()> {
        sys::tty::set_window_size(self.master.get_ref().as_fd(), columns, rows)
    }

    /// The copy of the output, which ends when the last process has closed the terminal and all it
    /// wrote has been passed on.
    pub(super) fn take_output(&mut self) -> Option<JoinHandle<()>> {
        self.output.take()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        for copy in &self.copies {
            copy.abort();
        }
    }
}

async fn copy_output(master: Arc<AsyncFd<OwnedFd>>, mut output: Option<Writer>) {
    let mut buffer = vec![0; OUTPUT_BUFFER];
    loop {
        let read = match read(&master, &mut buffer).await {
            // EIO is how a terminal says that nobody has it open any more.
            Ok(0) | Err(_) => break,
            Ok(n) => n,
        };
        // Waits while the reader is slow: then so does the workload, when the terminal is full.
        if let Some(writer) = &mut output
            && let Err(error) = writer.write_all(&buffer[..read]).await
        {
            warn!("the terminal's output is lost from here on: {error}");
            // Go on reading: a workload must not hang because a logger died.
            output = None;
        }
    }
    if let Some(mut writer) = output
        && let Err(error) = writer.flush().await
    {
        warn!("the end of the terminal's output is lost: {error}");
    }
}

async fn copy_input(mut input: Reader, master: Arc<AsyncFd<OwnedFd>>) {
    let mut buffer = vec![0; INPUT_BUFFER];
    loop {
        let read = match input.read(&mut buffer).await {
            // CloseIO. A terminal has no end of file of its own to pass on.
            Ok(0) => return,
            Ok(n) => n,
            Err(error) => {
                warn!("the terminal's input has ended: {error}");
                return;
            }
        };
        if let Err(error) = write_all(&master, &buffer[..read]).await {
            debug!("the terminal is closed: {error}");
            return;
        }
    }
}

async fn read(master: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        let mut guard = master.readable().await?;
        match guard.try_io(|fd| Ok(nix::unistd::read(fd.get_ref(), buffer)?)) {
            Ok(Err(error)) if error.raw_os_error() == Some(Errno::EINTR as i32) => {}
            Ok(result) => return result,
            Err(_would_block) => {}
        }
    }
}

pub(super) async fn write_all(fd: &AsyncFd<OwnedFd>, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        let mut guard = fd.writable().await?;
        match guard.try_io(|fd| Ok(nix::unistd::write(fd.get_ref(), data)?)) {
            Ok(Err(error)) if error.raw_os_error() == Some(Errno::EINTR as i32) => {}
            Ok(written) => data = &data[written?..],
            Err(_would_block) => {}
        }
    }
    Ok(())
}

/// The flag belongs to the open file: all descriptors made from it by dup or sent elsewhere share it.
pub(super) fn set_nonblocking(fd: &OwnedFd, nonblocking: bool) -> io::Result<()> {
    let mut flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    flags.set(OFlag::O_NONBLOCK, nonblocking);
    fcntl(fd, FcntlArg::F_SETFL(flags))?;
    Ok(())
}
