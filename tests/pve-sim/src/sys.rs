//! The system calls that have no safe wrapper here. The only place with unsafe code.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::AsRawFd;
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
