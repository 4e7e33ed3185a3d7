//! Namespaces: `ioctl_nsfs(2)`.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

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

/// The user namespace that owns the one which the descriptor is open on.
///
/// # Errors
/// `EPERM` if it is not below that of this process, `ENOTTY` for another file.
pub fn owner(namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    /// `_IO(0xb7, 1)` (`linux/nsfs.h`).
    const NS_GET_USERNS: libc::Ioctl = 0xb701;
    // SAFETY: the request takes no argument.
    let owner = unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_USERNS) };
    if owner < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, closed on exec, for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(owner) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn namespaces_know_their_kind_and_files_have_none() {
        let kind = |path: &str| kind(File::open(path).unwrap().as_fd());
        assert_eq!(kind("/proc/self/ns/net").unwrap(), libc::CLONE_NEWNET);
        assert_eq!(kind("/proc/self/ns/uts").unwrap(), libc::CLONE_NEWUTS);
        assert!(kind("/dev/null").is_err() && kind("/etc/passwd").is_err());
    }

    #[test]
    fn namespaces_know_their_owner() {
        let own = File::open("/proc/self/ns/net").unwrap();
        let owner = File::from(owner(own.as_fd()).unwrap()).metadata().unwrap();
        assert_eq!(owner.ino(), std::fs::metadata("/proc/self/ns/user").unwrap().ino());
        assert!(super::owner(File::open("/dev/null").unwrap().as_fd()).is_err());
    }
}
