//! Descriptors at fixed numbers in a child process.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use tokio::process::Command;

/// Gives the child `fds` as its descriptors 3, 4, and so on. They are open here until `command` is
/// dropped.
///
/// # Errors
/// `EMFILE`.
pub fn pass_descriptors(command: &mut Command, fds: Vec<OwnedFd>) -> io::Result<()> {
    let first_free = 3 + i32::try_from(fds.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut moves = Vec::with_capacity(fds.len());
    for (target, fd) in (3..).zip(fds) {
        // Out of the range of the targets, or one move would close the source of another.
        let source = if fd.as_raw_fd() < first_free {
            let raw = fcntl(&fd, FcntlArg::F_DUPFD_CLOEXEC(first_free))?;
            // SAFETY: fcntl has just returned this descriptor to us alone.
            unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(raw) }
        } else {
            fd
        };
        moves.push((source, target));
    }
    // SAFETY: between fork and exec the closure only calls dup2, which is async-signal-safe, and
    // reads a vector that was allocated before the fork.
    unsafe {
        command.pre_exec(move || {
            for (source, target) in &moves {
                // dup2 also clears close-on-exec.
                if libc::dup2(source.as_raw_fd(), *target) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    Ok(())
}
