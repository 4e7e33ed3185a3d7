//! Namespaces: `ioctl_nsfs(2)`.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::libc;

/// The kind of the namespace that the descriptor is open on, as `CLONE_NEW*`.
///
/// # Errors
/// `ENOTTY` if it is open on something else.
pub fn kind(namespace: BorrowedFd<'_>) -> io::Result<i32> {
    /// `_IO(0xb7, 3)` (`linux/nsfs.h`).
    const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
    // SAFETY: the request takes no argument.
    let kind = unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_NSTYPE) };
    if kind < 0 { Err(io::Error::last_os_error()) } else { Ok(kind) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    #[test]
    fn namespaces_know_their_kind_and_files_have_none() {
        let kind = |path: &str| kind(File::open(path).unwrap().as_fd());
        assert_eq!(kind("/proc/self/ns/net").unwrap(), libc::CLONE_NEWNET);
        assert_eq!(kind("/proc/self/ns/uts").unwrap(), libc::CLONE_NEWUTS);
        assert!(kind("/dev/null").is_err() && kind("/etc/passwd").is_err());
    }
}
