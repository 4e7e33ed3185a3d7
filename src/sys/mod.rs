//! System calls: the crate's only `unsafe`.
//!
//! Thin, typed wrappers over what nix does not cover. No policy lives here.

pub mod command;
pub mod credentials;
pub mod landlock;
pub mod limits;
pub mod loop_device;
pub mod memory;
pub mod mount;
pub mod namespace;
pub mod pidfd;
pub mod pipe;
pub mod socket;
pub mod tty;
pub mod user_namespace;

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Has the runtime watch a descriptor, which must be non-blocking if it is read or written through
/// the result (a pidfd is only waited for).
///
/// # Errors
/// Those of `epoll_ctl(2)`.
pub fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: `AsyncFd` owns the descriptor, which therefore stays open, and the same, until
    // after it has been deregistered.
    unsafe { AsyncFd::register(fd) }.map_err(Into::into)
}

/// As [`watch`], for exceptional conditions (`POLLPRI`) only, which is how cgroup2's `*.events` files
/// tell that they have changed.
///
/// # Errors
/// Those of `epoll_ctl(2)`.
pub fn watch_priority(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: as in `watch`.
    unsafe { AsyncFd::register_with_interest(fd, Interest::PRIORITY) }.map_err(Into::into)
}
