//! Process descriptors: `pidfd_open(2)`, `pidfd_send_signal(2)`, `PIDFD_GET_INFO`, `waitid(2)`.
//!
//! A pidfd names one process for ever. A pid does not: it is reused, and a signal sent to a reused
//! pid hits a stranger. So the shim signals through pidfds only.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::libc;

/// How a process ended, as containerd reports it: 0..255 for an exit, 128+n for signal n.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitStatus(pub u32);

impl ExitStatus {
    /// From the status word of `wait(2)`.
    #[must_use]
    pub fn from_wait(status: i32) -> Self {
        if libc::WIFSIGNALED(status) {
            Self(128 + libc::WTERMSIG(status).unsigned_abs())
        } else {
            Self(libc::WEXITSTATUS(status).unsigned_abs())
        }
    }
}

/// Opens `pid`, a process of this pid namespace.
///
/// # Errors
/// `ESRCH` if there is no such process.
pub fn open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    owned(fd)
}

/// Sends `signal` to the process.
///
/// # Errors
/// `ESRCH` if it has ended (also as a zombie that was reaped), `EINVAL` for a bad signal number.
pub fn send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: the descriptor is open for the call's duration; a null siginfo means that of kill(2).
    let r = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if r == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What `PIDFD_GET_INFO` tells about the end of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Info {
    /// It has not been reaped yet.
    Running,
    /// It was reaped; the kernel kept the status for holders of a pidfd.
    Exited(ExitStatus),
    /// The kernel is older than 6.15 (or the call is filtered) and can't say.
    Unsupported,
}

/// Asks for the exit status through a pidfd that was opened before the process ended.
///
/// # Errors
/// An unexpected error of `ioctl(2)`.
pub fn exit_info(pidfd: BorrowedFd<'_>) -> io::Result<Info> {
    const PIDFD_INFO_EXIT: u64 = 1 << 3;
    // SAFETY: pidfd_info is plain integers; all-zero is a valid value.
    let mut info: libc::pidfd_info = unsafe { std::mem::zeroed() };
    info.mask = PIDFD_INFO_EXIT;
    // SAFETY: the ioctl's number encodes the size of the structure that the pointer is valid for.
    let r = unsafe { libc::ioctl(pidfd.as_raw_fd(), libc::PIDFD_GET_INFO, &raw mut info) };
    if r == 0 {
        return Ok(if info.mask & PIDFD_INFO_EXIT != 0 {
            Info::Exited(ExitStatus::from_wait(info.exit_code))
        } else {
            Info::Running
        });
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // 6.13 and 6.14 know the call but not the exit status, and forget a reaped process.
        Some(libc::ENOTTY | libc::EINVAL | libc::ENOSYS | libc::ESRCH) => Ok(Info::Unsupported),
        _ => Err(error),
    }
}

/// Whether the kernel keeps the exit status of a process for all who hold its pidfd (6.15).
///
/// 6.13 and 6.14 know the call, and a living process looks the same to them.
#[must_use]
pub fn keeps_exit_status() -> bool {
    const SINCE: (u32, u32) = (6, 15);
    let asked = open(std::process::id().cast_signed()).and_then(|own| exit_info(own.as_fd()));
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    asked.is_ok_and(|info| info == Info::Running)
        && kernel_version(&release).is_some_and(|version| version >= SINCE)
}

/// The first two numbers of `6.12.48+deb13-amd64`.
fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

/// Reaps a child of this process by pidfd; `None` while it runs.
///
/// # Errors
/// `ECHILD` if it is not a child, or was reaped already.
pub fn reap(pidfd: BorrowedFd<'_>) -> io::Result<Option<ExitStatus>> {
    wait_with(pidfd, libc::WNOHANG)
}

/// Waits for the end of a child of this process, which the caller knows to be near, and reaps it.
///
/// # Errors
/// As [`reap`].
pub fn wait(pidfd: BorrowedFd<'_>) -> io::Result<()> {
    loop {
        match wait_with(pidfd, 0) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result.map(drop),
        }
    }
}

fn wait_with(pidfd: BorrowedFd<'_>, flags: libc::c_int) -> io::Result<Option<ExitStatus>> {
    // SAFETY: siginfo_t is plain data; all-zero is a valid value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: `info` outlives the call; P_PIDFD takes a descriptor as the id.
    let r = unsafe {
        libc::waitid(
            libc::P_PIDFD,
            pidfd.as_raw_fd().unsigned_abs(),
            &raw mut info,
            libc::WEXITED | flags,
        )
    };
    if r != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: waitid filled the SIGCHLD members, or left all of them zero.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    if pid == 0 {
        return Ok(None);
    }
    let status = status.unsigned_abs();
    Ok(Some(if info.si_code == libc::CLD_EXITED {
        ExitStatus(status & 0xff)
    } else {
        ExitStatus(128 + status)
    }))
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(fd) {
        // SAFETY: the kernel has just returned this descriptor to us alone.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn ended(script: &str) -> (OwnedFd, std::process::Child) {
        let child = Command::new("/bin/sh").args(["-c", script]).spawn().unwrap();
        let fd = open(child.id() as i32).unwrap();
        (fd, child)
    }

    fn reap_blocking(fd: &OwnedFd) -> ExitStatus {
        loop {
            if let Some(status) = reap(fd.as_fd()).unwrap() {
                return status;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    #[test]
    fn exits_and_signals_are_told_apart_by_both_sources() {
        for (script, expected) in [
            ("exit 0", 0),
            ("exit 3", 3),
            ("exit 255", 255),
            ("kill -9 $$", 137),
            ("kill -1 $$", 129),
        ] {
            let (fd, _child) = ended(script);
            assert_eq!(reap_blocking(&fd), ExitStatus(expected), "{script}: waitid");
            match exit_info(fd.as_fd()).unwrap() {
                Info::Exited(status) => assert_eq!(status, ExitStatus(expected), "{script}: info"),
                Info::Unsupported => {}
                Info::Running => panic!("{script}: reaped but running"),
            }
        }
    }

    #[test]
    fn the_kernel_keeps_what_it_is_said_to_keep() {
        let (fd, mut child) = ended("exit 3");
        child.wait().unwrap();
        let kept = exit_info(fd.as_fd()).unwrap() == Info::Exited(ExitStatus(3));
        assert_eq!(keeps_exit_status(), kept);
    }

    #[test]
    fn kernel_versions_are_read() {
        for (release, version) in [
            ("6.12.48+deb13-amd64\n", Some((6, 12))),
            ("6.15.0\n", Some((6, 15))),
            ("6.8-rc1", Some((6, 8))),
            ("7.0", Some((7, 0))),
            ("", None),
            ("6", None),
            ("x6.1", None),
        ] {
            assert_eq!(kernel_version(release), version, "{release}");
        }
    }

    #[test]
    fn a_living_process_has_no_status_and_gets_signals() {
        let (fd, _child) = ended("sleep 30");
        assert_eq!(reap(fd.as_fd()).unwrap(), None);
        assert_ne!(exit_info(fd.as_fd()).unwrap(), Info::Exited(ExitStatus(0)));
        send_signal(fd.as_fd(), libc::SIGTERM).unwrap();
        assert_eq!(reap_blocking(&fd), ExitStatus(143));
        assert_eq!(
            send_signal(fd.as_fd(), libc::SIGTERM).unwrap_err().raw_os_error(),
            Some(libc::ESRCH)
        );
    }
}
