//! The system calls that have no safe wrapper here. The only place with unsafe code.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Sends a signal.
pub fn kill(pid: u32, signal: i32) -> io::Result<()> {
    let pid = libc::pid_t::try_from(pid).map_err(|_| io::ErrorKind::InvalidInput)?;
    if pid <= 0 {
        // 0 and below would address groups of processes, this one among them.
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: kill() takes no pointers.
    check(unsafe { libc::kill(pid, signal) })
}

/// Takes the lock of a file without waiting; it lasts as long as the file is open.
pub fn try_flock(file: &std::fs::File) -> io::Result<()> {
    // SAFETY: flock() takes no pointers; the descriptor is open as long as `file` is borrowed.
    check(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) })
}

/// Bytes of a filesystem: total, used, available to users.
pub fn disk(path: &Path) -> io::Result<(u64, u64, u64)> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: statvfs is plain data, for which all zeroes is a valid value.
    let mut st: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: `path` is NUL-terminated and `st` valid for writing during the call.
    check(unsafe { libc::statvfs(path.as_ptr(), &mut st) })?;
    let unit = st.f_frsize;
    Ok((st.f_blocks * unit, (st.f_blocks - st.f_bfree) * unit, st.f_bavail * unit))
}

/// Sends a message over a Unix socket together with this process's credentials.
///
/// The kernel adds credentials by itself only if the receiver has asked for them before the
/// message is sent, which a server that has just accepted the connection may not have yet.
pub fn send_with_credentials(socket: impl AsFd, message: &[u8]) -> io::Result<()> {
    const SPACE: usize = 64;
    #[repr(align(8))]
    struct Control([u8; SPACE]);
    let mut control = Control([0; SPACE]);
    let mut iov = libc::iovec {
        // sendmsg() only reads from it.
        iov_base: message.as_ptr().cast_mut().cast(),
        iov_len: message.len(),
    };
    // SAFETY: getpid(), getuid() and getgid() take nothing and cannot fail.
    let own =
        unsafe { libc::ucred { pid: libc::getpid(), uid: libc::getuid(), gid: libc::getgid() } };
    // SAFETY: msghdr is plain data, for which all zeroes is a valid value.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &mut iov;
    header.msg_iovlen = 1;
    header.msg_control = control.0.as_mut_ptr().cast();
    let length = size_of::<libc::ucred>() as u32;
    // SAFETY: CMSG_SPACE, CMSG_LEN and CMSG_FIRSTHDR only compute. `control` is aligned for a
    // cmsghdr and, with 64 bytes, has room for one that carries 12, so the first header and its
    // data lie inside it. All pointers in `header` outlive the call of sendmsg().
    let sent = unsafe {
        header.msg_controllen = libc::CMSG_SPACE(length) as _;
        let cmsg = libc::CMSG_FIRSTHDR(&header);
        (*cmsg).cmsg_level = libc::SOL_SOCKET;
        (*cmsg).cmsg_type = libc::SCM_CREDENTIALS;
        (*cmsg).cmsg_len = libc::CMSG_LEN(length) as _;
        libc::CMSG_DATA(cmsg).cast::<libc::ucred>().write_unaligned(own);
        libc::sendmsg(socket.as_fd().as_raw_fd(), &header, libc::MSG_NOSIGNAL)
    };
    match usize::try_from(sent) {
        Ok(n) if n == message.len() => Ok(()),
        Ok(_) => Err(io::ErrorKind::WriteZero.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Makes the child of `command` a session leader, as a unit of systemd is.
pub fn new_session(command: &mut tokio::process::Command) {
    // SAFETY: between fork and exec only setsid() is called, which is async-signal-safe.
    unsafe {
        command.pre_exec(|| check(libc::setsid()));
    }
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
