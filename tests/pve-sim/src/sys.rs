//! The system calls that have no safe wrapper here. The only place with unsafe code.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

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

/// Makes a directory read-only for everybody, by mounting it over itself.
pub fn cover_read_only(dir: &Path) -> io::Result<()> {
    let path = CString::new(dir.as_os_str().as_bytes())?;
    let mount = |flags: libc::c_ulong| {
        let none = std::ptr::null();
        // SAFETY: `path` is NUL-terminated; for a bind mount type and data are not looked at.
        check(unsafe { libc::mount(path.as_ptr(), path.as_ptr(), none, flags, none.cast()) })
    };
    mount(libc::MS_BIND)?;
    let read_only = mount(libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY);
    if read_only.is_err() {
        uncover(dir)?;
    }
    read_only
}

/// Undoes that; nothing happens to a directory that can be written.
pub fn uncover(dir: &Path) -> io::Result<()> {
    if statvfs(dir)?.f_flag & libc::ST_RDONLY == 0 {
        return Ok(());
    }
    let path = CString::new(dir.as_os_str().as_bytes())?;
    // SAFETY: `path` is NUL-terminated.
    check(unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) })
}

/// Bytes of a filesystem: total, used, available to users.
pub fn disk(path: &Path) -> io::Result<(u64, u64, u64)> {
    let st = statvfs(path)?;
    let unit = st.f_frsize;
    Ok((st.f_blocks * unit, (st.f_blocks - st.f_bfree) * unit, st.f_bavail * unit))
}

fn statvfs(path: &Path) -> io::Result<libc::statvfs> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: statvfs is plain data, for which all zeroes is a valid value.
    let mut st: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: `path` is NUL-terminated and `st` valid for writing during the call.
    check(unsafe { libc::statvfs(path.as_ptr(), &mut st) })?;
    Ok(st)
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

/// A program to run the way systemd runs the main process of a unit.
#[derive(Debug)]
pub struct Unit<'a> {
    /// Name of the program, looked up in `PATH`.
    pub program: &'a CStr,
    /// Its arguments, the name first.
    pub args: &'a [CString],
    /// Its whole environment, as `NAME=value`.
    pub env: &'a [CString],
    /// The file for its standard error, emptied first.
    pub stderr: &'a CStr,
}

/// Starts a process in a session of its own, with nothing to read or write but a file for
/// errors, and with all signals in their default state. It has the caller's working directory,
/// and those of the caller's descriptors that are not close-on-exec.
///
/// By posix_spawn(), as a fork of this process takes several times as long.
pub fn spawn(unit: &Unit<'_>) -> io::Result<u32> {
    let pointers = |list: &[CString]| -> Vec<*mut libc::c_char> {
        let strings = list.iter().map(|s| s.as_ptr().cast_mut());
        strings.chain([std::ptr::null_mut()]).collect()
    };
    let (args, env) = (pointers(unit.args), pointers(unit.env));
    let null = c"/dev/null".as_ptr();
    let write = libc::O_WRONLY | libc::O_CREAT | libc::O_TRUNC;
    let flags = libc::POSIX_SPAWN_SETSID
        | libc::POSIX_SPAWN_SETSIGMASK as libc::c_short
        | libc::POSIX_SPAWN_SETSIGDEF as libc::c_short;
    let mut pid = 0;
    // SAFETY: attributes and actions are initialised by their init functions before any other
    // use and destroyed once; the functions on them copy what they are given. All strings and
    // both pointer lists, which end in a null pointer, live until posix_spawnp() has returned,
    // and it does not write to them.
    let result = unsafe {
        let mut attr: libc::posix_spawnattr_t = std::mem::zeroed();
        let mut files: libc::posix_spawn_file_actions_t = std::mem::zeroed();
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::sigemptyset(&mut none);
        libc::posix_spawnattr_init(&mut attr);
        libc::posix_spawn_file_actions_init(&mut files);
        let open = libc::posix_spawn_file_actions_addopen;
        let prepared = [
            libc::posix_spawnattr_setflags(&mut attr, flags),
            libc::posix_spawnattr_setsigmask(&mut attr, &none),
            libc::posix_spawnattr_setsigdefault(&mut attr, &all),
            open(&mut files, 0, null, libc::O_RDONLY, 0),
            open(&mut files, 1, null, libc::O_WRONLY, 0),
            open(&mut files, 2, unit.stderr.as_ptr(), write, 0o644),
        ];
        let result = match prepared.into_iter().find(|error| *error != 0) {
            Some(error) => error,
            None => {
                let program = unit.program.as_ptr();
                let (args, env) = (args.as_ptr(), env.as_ptr());
                libc::posix_spawnp(&mut pid, program, &files, &attr, args, env)
            }
        };
        libc::posix_spawn_file_actions_destroy(&mut files);
        libc::posix_spawnattr_destroy(&mut attr);
        result
    };
    match result {
        0 => u32::try_from(pid).map_err(|_| io::ErrorKind::InvalidData.into()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// A pseudo terminal: the master, which does not block, and the slave. Needs a tokio runtime.
pub fn open_pty() -> io::Result<(AsyncFd<OwnedFd>, OwnedFd)> {
    let (mut master, mut slave) = (-1, -1);
    let none = std::ptr::null_mut();
    // SAFETY: both descriptors are valid for writing during the call; null stands for no name, no
    // attributes and no size.
    check(unsafe { libc::openpty(&mut master, &mut slave, none, none.cast(), none.cast()) })?;
    // SAFETY: the call has just made both, and nothing else knows them.
    let (master, slave) = unsafe { (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
    for fd in [&master, &slave] {
        // SAFETY: fcntl() with F_SETFD takes no pointers.
        check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) })?;
    }
    // SAFETY: fcntl() with F_SETFL takes no pointers.
    check(unsafe { libc::fcntl(master.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) })?;
    // SAFETY: an OwnedFd keeps its descriptor, the same one, open until it is dropped, and
    // AsyncFd drops it only after it has deregistered it.
    let master =
        unsafe { AsyncFd::register_with_interest(master, Interest::READABLE | Interest::WRITABLE) };
    Ok((master.map_err(io::Error::from)?, slave))
}

/// Sets the size of a pseudo terminal by its master.
pub fn resize_pty(master: &impl AsRawFd, columns: u16, rows: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads a winsize, which lives during the call.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &size) })
}

/// Has the programs of a pseudo terminal told that its size may have changed: the kernel sends
/// the signal only if it really has, so it changes twice.
pub fn redraw(master: &impl AsRawFd) -> io::Result<()> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes a winsize, which is valid for writing during the call.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGWINSZ, &mut size) })?;
    let (columns, rows) = match (size.ws_col, size.ws_row) {
        (0, _) | (_, 0) => (80, 24),
        size => size,
    };
    resize_pty(master, columns, rows.saturating_add(1))?;
    resize_pty(master, columns, rows)
}

/// Reads what there is.
pub fn read(fd: &impl AsRawFd, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: `buffer` is valid for writing its length during the call.
    let n = unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Writes what there is room for.
pub fn write(fd: &impl AsRawFd, bytes: &[u8]) -> io::Result<usize> {
    // SAFETY: `bytes` is valid for reading its length during the call.
    let n = unsafe { libc::write(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// A descriptor that becomes readable when the process ends. Needs a tokio runtime.
pub fn pidfd(pid: u32) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: pidfd_open() takes no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, libc::PIDFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).map_err(|_| io::ErrorKind::InvalidData)?;
    // SAFETY: the kernel has just made this descriptor, and nothing else knows it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: an OwnedFd keeps its descriptor, the same one, open until it is dropped, and
    // AsyncFd drops it only after it has deregistered it.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(Into::into)
}

/// Reaps a child if it has ended: whether it ended with status 0.
pub fn try_wait(pid: u32) -> io::Result<Option<bool>> {
    let pid = libc::pid_t::try_from(pid).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut status = 0;
    // SAFETY: `status` is valid for writing during the call.
    match unsafe { libc::waitpid(pid, &mut status, libc::WNOHANG) } {
        0 => Ok(None),
        n if n < 0 => Err(io::Error::last_os_error()),
        _ => Ok(Some(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0)),
    }
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
