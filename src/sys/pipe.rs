//! Pipes.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::libc;

/// How many bytes wait in a pipe to be read.
///
/// # Errors
/// `EBADF`, `ENOTTY`: it is none.
pub fn bytes_waiting(pipe: BorrowedFd<'_>) -> io::Result<usize> {
    let mut waiting: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int.
    let r = unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &raw mut waiting) };
    if r == 0 { Ok(waiting.unsigned_abs() as usize) } else { Err(io::Error::last_os_error()) }
}
