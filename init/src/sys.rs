//! The system calls: the only module with `unsafe`.
//!
//! Each function is one call (or one inseparable group), takes and returns owned or borrowed
//! descriptors, sets `CLOEXEC` on every descriptor it makes, and returns the kernel's error as it
//! is. Policy belongs to the callers.

use std::ffi::{CStr, CString};
use std::io;
use std::mem::{MaybeUninit, size_of, size_of_val};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use crate::protocol::Scheduler;
use libc::{c_int, c_long, c_uint, c_ulong, c_void};

/// `MOUNT_ATTR_*` of `mount_setattr(2)`.
pub mod attr {
    /// Read-only.
    pub const RDONLY: u64 = 0x1;
    /// No set-user-ID bits.
    pub const NOSUID: u64 = 0x2;
    /// No device files.
    pub const NODEV: u64 = 0x4;
    /// No execution.
    pub const NOEXEC: u64 = 0x8;
    /// No access times.
    pub const NOATIME: u64 = 0x10;
    /// Always access times.
    pub const STRICTATIME: u64 = 0x20;
    /// No access times of directories.
    pub const NODIRATIME: u64 = 0x80;
    /// No symbolic links.
    pub const NOSYMFOLLOW: u64 = 0x20_0000;
}

const FSOPEN_CLOEXEC: c_uint = 1;
const FSMOUNT_CLOEXEC: c_uint = 1;
const FSCONFIG_SET_FLAG: c_uint = 0;
const FSCONFIG_SET_STRING: c_uint = 1;
const FSCONFIG_CMD_CREATE: c_uint = 6;
const OPEN_TREE_CLONE: c_uint = 1;
const MOVE_MOUNT_F_EMPTY_PATH: c_uint = 0x4;
const MOVE_MOUNT_T_EMPTY_PATH: c_uint = 0x40;
/// The C library's constant does not fit its own type.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
const KEYCTL_JOIN_SESSION_KEYRING: c_long = 1;
const LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET: u64 = 1;
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
/// `_IOWR(0xFF, 11, struct pidfd_info)` with the structure's first version (64 bytes).
const PIDFD_GET_INFO: c_ulong = 0xC040_FF0B;
const PIDFD_INFO_EXIT: u64 = 1 << 3;

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn check_long(result: c_long) -> io::Result<c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn own(result: c_int) -> io::Result<OwnedFd> {
    let fd = check(result)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn own_long(result: c_long) -> io::Result<OwnedFd> {
    own(c_int::try_from(result).unwrap_or(-1))
}

/// A C string; a NUL inside is `EINVAL`.
pub fn c_string(text: impl AsRef<[u8]>) -> io::Result<CString> {
    CString::new(text.as_ref()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// `prctl(PR_SET_DUMPABLE, 0)`: no other process may trace or read this one.
pub fn set_not_dumpable() -> io::Result<()> {
    prctl(libc::PR_SET_DUMPABLE, 0, 0).map(drop)
}

fn prctl(option: c_int, a: c_ulong, b: c_ulong) -> io::Result<c_int> {
    // SAFETY: only options whose arguments are plain numbers are passed here.
    check(unsafe { libc::prctl(option, a, b, 0 as c_ulong, 0 as c_ulong) })
}

/// Closes all descriptors from `first` on.
///
/// Only for use at the very start, when no owned descriptor of that range exists.
pub fn close_from(first: RawFd) -> io::Result<()> {
    // SAFETY: callers do this before they own a descriptor (see above).
    check_long(unsafe { libc::syscall(libc::SYS_close_range, first as c_uint, c_uint::MAX, 0) })
        .map(drop)
}

/// Sets close-on-exec on all descriptors from 3 on.
pub fn cloexec_all() -> io::Result<()> {
    // SAFETY: changes only flags.
    check_long(unsafe {
        libc::syscall(libc::SYS_close_range, 3 as c_uint, c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC)
    })
    .map(drop)
}

/// A descriptor that the parent process left for this one, with a number above stdio's, so that
/// the workload's stdio can take its place, and close-on-exec. Fails with `EBADF` if it is not open.
pub fn adopt(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC takes a number.
    let copy = check(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) })?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// `dup2(2)` to 0, 1 or 2.
pub fn become_stdio(fd: BorrowedFd<'_>, number: RawFd) -> io::Result<()> {
    debug_assert!((0..3).contains(&number));
    // SAFETY: 0..2 are owned by nobody in this program; std only borrows them.
    check(unsafe { libc::dup2(fd.as_raw_fd(), number) }).map(drop)
}

// --- files -----------------------------------------------------------------------------------

/// `openat(2)` with `O_CLOEXEC`.
pub fn openat(dir: BorrowedFd<'_>, path: &CStr, flags: c_int, mode: u32) -> io::Result<OwnedFd> {
    // SAFETY: `path` is NUL-terminated.
    own(unsafe {
        libc::openat(dir.as_raw_fd(), path.as_ptr(), flags | libc::O_CLOEXEC, mode as libc::mode_t)
    })
}

/// `openat2(2)` below `root` as if it were `/`, without magic links, with `O_CLOEXEC`.
pub fn open_in_root(root: BorrowedFd<'_>, path: &CStr, flags: c_int) -> io::Result<OwnedFd> {
    // SAFETY: an all-zero open_how is valid.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = (flags | libc::O_CLOEXEC) as u64;
    how.resolve = libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS;
    // A rename elsewhere in the tree makes the kernel ask for a retry; a hostile one can do so
    // forever.
    for _ in 0..128 {
        // SAFETY: `path` is NUL-terminated, `how` has the size that is passed.
        let result = own_long(unsafe {
            libc::syscall(
                libc::SYS_openat2,
                root.as_raw_fd(),
                path.as_ptr(),
                &how,
                size_of::<libc::open_how>(),
            )
        });
        match result {
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => {}
            other => return other,
        }
    }
    Err(io::Error::from_raw_os_error(libc::EAGAIN))
}

/// `fstat(2)`.
pub fn fstat(fd: BorrowedFd<'_>) -> io::Result<libc::stat> {
    let mut stat = MaybeUninit::uninit();
    // SAFETY: the kernel fills the structure if it succeeds.
    check(unsafe { libc::fstat(fd.as_raw_fd(), stat.as_mut_ptr()) })?;
    // SAFETY: it succeeded.
    Ok(unsafe { stat.assume_init() })
}

/// `fstatat(2)` without following a symbolic link.
pub fn lstatat(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<libc::stat> {
    let mut stat = MaybeUninit::uninit();
    // SAFETY: `name` is NUL-terminated; the kernel fills the structure if it succeeds.
    check(unsafe {
        libc::fstatat(dir.as_raw_fd(), name.as_ptr(), stat.as_mut_ptr(), libc::AT_SYMLINK_NOFOLLOW)
    })?;
    // SAFETY: it succeeded.
    Ok(unsafe { stat.assume_init() })
}

/// `stat(2)`.
pub fn stat(path: &CStr) -> io::Result<libc::stat> {
    let mut stat = MaybeUninit::uninit();
    // SAFETY: `path` is NUL-terminated; the kernel fills the structure if it succeeds.
    check(unsafe { libc::stat(path.as_ptr(), stat.as_mut_ptr()) })?;
    // SAFETY: it succeeded.
    Ok(unsafe { stat.assume_init() })
}

/// Whether the effective user may execute `path` (`faccessat(2)`, which knows of noexec mounts).
pub fn may_execute(path: &CStr) -> io::Result<()> {
    // SAFETY: `path` is NUL-terminated.
    check(unsafe { libc::faccessat(libc::AT_FDCWD, path.as_ptr(), libc::X_OK, libc::AT_EACCESS) })
        .map(drop)
}

/// The file system's magic number.
pub fn file_system(fd: BorrowedFd<'_>) -> io::Result<i64> {
    let mut stat = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the kernel fills the structure if it succeeds.
    check(unsafe { libc::fstatfs(fd.as_raw_fd(), stat.as_mut_ptr()) })?;
    // SAFETY: it succeeded.
    let stat = unsafe { stat.assume_init() };
    #[allow(clippy::unnecessary_cast)] // the field's type differs between architectures
    Ok(stat.f_type as i64)
}

/// `procfs`'s magic number.
pub const PROC_MAGIC: i64 = 0x9fa0;
/// `devpts`'s magic number.
pub const DEVPTS_MAGIC: i64 = 0x1cd1;

/// `readlinkat(2)`; an empty `name` reads the link that `dir` itself is.
pub fn readlinkat(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0u8; libc::PATH_MAX as usize];
    // SAFETY: the kernel writes at most the buffer's length.
    let length = unsafe {
        libc::readlinkat(dir.as_raw_fd(), name.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len())
    };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    buffer.truncate(length);
    Ok(buffer)
}

/// `mkdirat(2)`.
pub fn mkdirat(dir: BorrowedFd<'_>, name: &CStr, mode: u32) -> io::Result<()> {
    // SAFETY: `name` is NUL-terminated.
    check(unsafe { libc::mkdirat(dir.as_raw_fd(), name.as_ptr(), mode) }).map(drop)
}

/// `mknodat(2)`.
pub fn mknodat(dir: BorrowedFd<'_>, name: &CStr, mode: u32, device: u64) -> io::Result<()> {
    // SAFETY: `name` is NUL-terminated.
    check(unsafe { libc::mknodat(dir.as_raw_fd(), name.as_ptr(), mode, device) }).map(drop)
}

/// A device number.
pub fn device(major: u32, minor: u32) -> u64 {
    libc::makedev(major, minor)
}

/// `symlinkat(2)`.
pub fn symlinkat(text: &CStr, dir: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    // SAFETY: both are NUL-terminated.
    check(unsafe { libc::symlinkat(text.as_ptr(), dir.as_raw_fd(), name.as_ptr()) }).map(drop)
}

/// `unlinkat(2)` of something that is not a directory.
pub fn unlinkat(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    // SAFETY: `name` is NUL-terminated.
    check(unsafe { libc::unlinkat(dir.as_raw_fd(), name.as_ptr(), 0) }).map(drop)
}

/// `fchownat(2)` without following a symbolic link.
pub fn lchownat(dir: BorrowedFd<'_>, name: &CStr, uid: u32, gid: u32) -> io::Result<()> {
    // SAFETY: `name` is NUL-terminated.
    check(unsafe {
        libc::fchownat(dir.as_raw_fd(), name.as_ptr(), uid, gid, libc::AT_SYMLINK_NOFOLLOW)
    })
    .map(drop)
}

/// `fchown(2)` of the owner; the group stays.
pub fn fchown_user(fd: BorrowedFd<'_>, uid: u32) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::fchown(fd.as_raw_fd(), uid, u32::MAX) }).map(drop)
}

/// `fchmod(2)`.
pub fn fchmod(fd: BorrowedFd<'_>, mode: u32) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::fchmod(fd.as_raw_fd(), mode) }).map(drop)
}

/// The names in a directory, without `.` and `..`. `dir` must be open for reading.
pub fn read_dir(dir: BorrowedFd<'_>) -> io::Result<Vec<CString>> {
    let mut names = Vec::new();
    let mut buffer = [0u64; 1024];
    loop {
        // SAFETY: the kernel writes at most the buffer's length.
        let length = check_long(unsafe {
            libc::syscall(
                libc::SYS_getdents64,
                dir.as_raw_fd(),
                buffer.as_mut_ptr(),
                size_of::<[u64; 1024]>(),
            )
        })? as usize;
        if length == 0 {
            return Ok(names);
        }
        // SAFETY: u64s are plain bytes, and `length` is within the buffer.
        let bytes = unsafe { std::slice::from_raw_parts(buffer.as_ptr().cast::<u8>(), length) };
        let mut at = 0;
        // struct linux_dirent64: ino 8, off 8, reclen 2, type 1, name.
        while at + 19 <= length {
            let record = usize::from(u16::from_ne_bytes([bytes[at + 16], bytes[at + 17]]));
            if record < 19 || at + record > length {
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            if let Ok(name) = CStr::from_bytes_until_nul(&bytes[at + 19..at + record])
                && name.to_bytes() != b"."
                && name.to_bytes() != b".."
            {
                names.push(name.to_owned());
            }
            at += record;
        }
    }
}

/// `umask(2)`.
pub fn umask(mask: u32) {
    // SAFETY: cannot fail.
    unsafe { libc::umask(mask) };
}

/// `chdir(2)`.
pub fn chdir(path: &CStr) -> io::Result<()> {
    // SAFETY: `path` is NUL-terminated.
    check(unsafe { libc::chdir(path.as_ptr()) }).map(drop)
}

/// `fchdir(2)`.
pub fn fchdir(directory: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: a number.
    check(unsafe { libc::fchdir(directory.as_raw_fd()) }).map(drop)
}

/// The working directory as the kernel names it: the system call itself, because the C library
/// hides the `(unreachable)` prefix.
pub fn getcwd() -> io::Result<Vec<u8>> {
    let mut buffer = vec![0u8; libc::PATH_MAX as usize];
    // SAFETY: the kernel writes at most the buffer's length.
    let length =
        check_long(unsafe { libc::syscall(libc::SYS_getcwd, buffer.as_mut_ptr(), buffer.len()) })?;
    buffer.truncate((length as usize).saturating_sub(1));
    Ok(buffer)
}

/// A pipe, read end first.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: two descriptors are written.
    check(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) })?;
    Ok((own(fds[0])?, own(fds[1])?))
}

/// Waits until one of `fds` is readable or closed, or the time is over. Answers which are.
pub fn poll_readable<const N: usize>(
    fds: [BorrowedFd<'_>; N],
    milliseconds: i32,
) -> io::Result<[bool; N]> {
    let mut polls =
        fds.map(|fd| libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 });
    // SAFETY: the array has N elements.
    match check(unsafe { libc::poll(polls.as_mut_ptr(), N as libc::nfds_t, milliseconds) }) {
        Err(e) if e.kind() != io::ErrorKind::Interrupted => return Err(e),
        _ => {}
    }
    Ok(polls.map(|p| p.revents != 0))
}

/// `O_NONBLOCK`.
pub fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) }).map(drop)
}

// --- mounts ----------------------------------------------------------------------------------

/// Sets the propagation (`MS_*`, with `MS_REC` if wanted) of `/`.
pub fn set_root_propagation(flags: u64) -> io::Result<()> {
    // SAFETY: source, type and data may be null for a propagation change.
    check(unsafe {
        libc::mount(ptr::null(), c"/".as_ptr(), ptr::null(), flags as c_ulong, ptr::null())
    })
    .map(drop)
}

/// Detaches the mount at `path` and everything on it; a symbolic link is not followed.
pub fn detach_mount(path: &CStr) -> io::Result<()> {
    // SAFETY: `path` is NUL-terminated.
    check(unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW) })
        .map(drop)
}

/// `pivot_root(2)`. With `.` for both, the working directory, which must be a mount point, becomes the
/// root, with the old root mounted on it.
pub fn pivot_root(new_root: &CStr, put_old: &CStr) -> io::Result<()> {
    // SAFETY: both are NUL-terminated.
    check_long(unsafe { libc::syscall(libc::SYS_pivot_root, new_root.as_ptr(), put_old.as_ptr()) })
        .map(drop)
}

/// A detached copy of the mount that `fd` is on, rooted at `fd`.
pub fn clone_mount(fd: BorrowedFd<'_>, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OPEN_TREE_CLONE | libc::O_CLOEXEC as c_uint | libc::AT_EMPTY_PATH as c_uint;
    if recursive {
        flags |= libc::AT_RECURSIVE as c_uint;
    }
    // SAFETY: the path is an empty C string.
    own_long(unsafe { libc::syscall(libc::SYS_open_tree, fd.as_raw_fd(), c"".as_ptr(), flags) })
}

/// Attaches a detached mount on `target`.
pub fn attach_mount(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both paths are empty C strings.
    check_long(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            target.as_raw_fd(),
            c"".as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH,
        )
    })
    .map(drop)
}

#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

/// `mount_setattr(2)`: sets attributes ([`attr`]) and, unless 0, the propagation (one of `MS_*`).
pub fn change_mount(
    mount: BorrowedFd<'_>,
    set: u64,
    propagation: u64,
    recursive: bool,
) -> io::Result<()> {
    let change = MountAttr { set, clear: 0, propagation, userns_fd: 0 };
    let mut flags = libc::AT_EMPTY_PATH;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: the path is an empty C string; the structure has the size that is passed.
    check_long(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags as c_uint,
            &change,
            size_of::<MountAttr>(),
        )
    })
    .map(drop)
}

/// `fsopen(2)`: the configuration of a new file system.
pub fn fs_open(kind: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: `kind` is NUL-terminated.
    own_long(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) })
}

fn fs_config(
    fs: BorrowedFd<'_>,
    command: c_uint,
    key: *const libc::c_char,
    value: *const libc::c_char,
) -> io::Result<()> {
    // SAFETY: key and value are null or NUL-terminated, as the command demands (private callers).
    check_long(unsafe {
        libc::syscall(libc::SYS_fsconfig, fs.as_raw_fd(), command, key, value, 0 as c_int)
    })
    .map(drop)
}

/// An option without a value.
pub fn fs_set_flag(fs: BorrowedFd<'_>, key: &CStr) -> io::Result<()> {
    fs_config(fs, FSCONFIG_SET_FLAG, key.as_ptr(), ptr::null())
}

/// An option with a value; the kernel takes 255 bytes.
pub fn fs_set(fs: BorrowedFd<'_>, key: &CStr, value: &CStr) -> io::Result<()> {
    fs_config(fs, FSCONFIG_SET_STRING, key.as_ptr(), value.as_ptr())
}

/// Makes (or finds) the superblock and returns a detached mount of it.
pub fn fs_mount(fs: BorrowedFd<'_>, attributes: u64) -> io::Result<OwnedFd> {
    fs_config(fs, FSCONFIG_CMD_CREATE, ptr::null(), ptr::null())?;
    // SAFETY: numbers only.
    own_long(unsafe {
        libc::syscall(libc::SYS_fsmount, fs.as_raw_fd(), FSMOUNT_CLOEXEC, attributes as c_uint)
    })
}

/// What the file system had to say about a failure, if anything.
pub fn fs_message(fs: BorrowedFd<'_>) -> Option<String> {
    let mut buffer = [0u8; 512];
    // SAFETY: the kernel writes at most the buffer's length.
    let length = unsafe { libc::read(fs.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
    let text = buffer.get(..usize::try_from(length).ok()?)?;
    // "e tmpfs: Unknown parameter 'x'": the level comes first.
    let text = String::from_utf8_lossy(text.get(2..)?);
    Some(text.trim_end().to_owned())
}

// --- the CT's network and name ---------------------------------------------------------------

/// `sethostname(2)`.
pub fn set_hostname(name: &str) -> io::Result<()> {
    // SAFETY: pointer and length belong together.
    check(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) }).map(drop)
}

/// `setdomainname(2)`.
pub fn set_domainname(name: &str) -> io::Result<()> {
    // SAFETY: pointer and length belong together.
    check(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) }).map(drop)
}

/// Brings the interface `lo` up.
pub fn loopback_up() -> io::Result<()> {
    // SAFETY: numbers only.
    let socket =
        own(unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: an all-zero ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    // SAFETY: the kernel reads the name and writes the flags of the structure.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS as _, &mut request) })?;
    // SAFETY: the kernel has set this member of the union.
    unsafe { request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short };
    // SAFETY: the kernel reads the structure.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request) }).map(drop)
}

// --- terminal --------------------------------------------------------------------------------

/// `setsid(2)`; being a session leader already is no error.
pub fn new_session() -> io::Result<()> {
    // SAFETY: no arguments.
    match check(unsafe { libc::setsid() }) {
        Err(e) if e.raw_os_error() != Some(libc::EPERM) => Err(e),
        _ => Ok(()),
    }
}

/// Unlocks a pseudo terminal and opens its other side by the master's descriptor, without a path.
pub fn open_peer(master: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let locked: c_int = 0;
    // SAFETY: the kernel reads one int.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &locked) })?;
    // SAFETY: the argument is a number.
    own(unsafe {
        libc::ioctl(
            master.as_raw_fd(),
            libc::TIOCGPTPEER,
            libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC,
        )
    })
}

/// `TIOCSWINSZ`, in characters.
pub fn set_window_size(master: BorrowedFd<'_>, rows: u16, columns: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel reads the structure.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &size) }).map(drop)
}

/// Makes a terminal the controlling one of this session.
pub fn set_controlling_terminal(terminal: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the argument is a number.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) }).map(drop)
}

// --- credentials and limits ------------------------------------------------------------------

/// `prlimit(2)` of this process.
pub fn set_rlimit(resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = [soft, hard]; // struct rlimit64
    // SAFETY: the kernel reads two u64.
    check_long(unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            0 as c_int,
            resource,
            limit.as_ptr(),
            ptr::null_mut::<c_void>(),
        )
    })
    .map(drop)
}

/// `sched_setattr(2)` of this process.
pub fn set_scheduler(scheduler: &Scheduler) -> io::Result<()> {
    #[repr(C)]
    struct SchedAttr {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        runtime: u64,
        deadline: u64,
        period: u64,
        /// The lowest and the highest frequency wanted (`SCHED_FLAG_UTIL_CLAMP_*`).
        clamps: [u32; 2],
    }
    let attributes = SchedAttr {
        size: size_of::<SchedAttr>() as u32,
        policy: scheduler.policy,
        flags: scheduler.flags,
        nice: scheduler.nice,
        priority: scheduler.priority,
        runtime: scheduler.runtime,
        deadline: scheduler.deadline,
        period: scheduler.period,
        clamps: [0; 2],
    };
    // SAFETY: the structure says its size itself.
    check_long(unsafe { libc::syscall(libc::SYS_sched_setattr, 0 as c_int, &attributes, 0) })
        .map(drop)
}

/// `ioprio_set(2)` of this process.
pub fn set_io_priority(priority: u16) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: c_int = 1;
    // SAFETY: numbers only.
    check_long(unsafe {
        libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0 as c_int, c_int::from(priority))
    })
    .map(drop)
}

/// `sched_setaffinity(2)` of this process.
pub fn set_affinity(mask: &[u64]) -> io::Result<()> {
    // SAFETY: pointer and length belong together.
    check_long(unsafe {
        libc::syscall(libc::SYS_sched_setaffinity, 0 as c_int, size_of_val(mask), mask.as_ptr())
    })
    .map(drop)
}

/// `set_mempolicy(2)` of this process.
pub fn set_memory_policy(mode: u32, nodes: &[u64]) -> io::Result<()> {
    let pointer = if nodes.is_empty() { ptr::null() } else { nodes.as_ptr() };
    // The kernel takes one bit less than it is told.
    let bits = if nodes.is_empty() { 0 } else { 64 * nodes.len() + 1 };
    // SAFETY: pointer and length belong together.
    check_long(unsafe { libc::syscall(libc::SYS_set_mempolicy, mode as c_int, pointer, bits) })
        .map(drop)
}

/// `personality(2)` of this process.
pub fn set_personality(personality: u32) -> io::Result<()> {
    // SAFETY: a number.
    check(unsafe { libc::personality(c_ulong::from(personality)) }).map(drop)
}

/// Joins a new, anonymous session keyring.
pub fn new_session_keyring() -> io::Result<()> {
    // SAFETY: a null name asks for an anonymous keyring.
    check_long(unsafe {
        libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, ptr::null::<libc::c_char>())
    })
    .map(drop)
}

/// Whether a capability is in the bounding set; `None` if the kernel does not know it.
pub fn bounding_has(capability: u32) -> Option<bool> {
    prctl(libc::PR_CAPBSET_READ, c_ulong::from(capability), 0).ok().map(|r| r == 1)
}

/// Removes a capability from the bounding set.
pub fn bounding_drop(capability: u32) -> io::Result<()> {
    prctl(libc::PR_CAPBSET_DROP, c_ulong::from(capability), 0).map(drop)
}

/// Whether a change of user keeps the permitted capabilities.
pub fn keep_capabilities(keep: bool) -> io::Result<()> {
    prctl(libc::PR_SET_KEEPCAPS, c_ulong::from(keep), 0).map(drop)
}

/// `capset(2)` of this process.
pub fn set_capabilities(effective: u64, permitted: u64, inheritable: u64) -> io::Result<()> {
    let header = [CAPABILITY_VERSION_3, 0u32];
    let half = |shift: u32| {
        [effective, permitted, inheritable].map(|set| ((set >> shift) & 0xffff_ffff) as u32)
    };
    let data = [half(0), half(32)];
    // SAFETY: version 3 reads two structures of three u32.
    check_long(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) }).map(drop)
}

/// Empties the ambient set.
pub fn ambient_clear() -> io::Result<()> {
    prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as c_ulong, 0).map(drop)
}

/// Adds a capability to the ambient set.
pub fn ambient_raise(capability: u32) -> io::Result<()> {
    prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE as c_ulong, c_ulong::from(capability))
        .map(drop)
}

/// `setgroups(2)`.
pub fn set_groups(groups: &[u32]) -> io::Result<()> {
    // SAFETY: pointer and length belong together.
    check(unsafe { libc::setgroups(groups.len(), groups.as_ptr()) }).map(drop)
}

/// `setresgid(2)`, all three.
pub fn set_gid(gid: u32) -> io::Result<()> {
    // SAFETY: numbers only; one thread.
    check(unsafe { libc::setresgid(gid, gid, gid) }).map(drop)
}

/// `setresuid(2)`, all three.
pub fn set_uid(uid: u32) -> io::Result<()> {
    // SAFETY: numbers only; one thread.
    check(unsafe { libc::setresuid(uid, uid, uid) }).map(drop)
}

/// The signal this process gets when its parent dies; 0 for none.
pub fn parent_death_signal() -> io::Result<c_int> {
    let mut signal: c_int = 0;
    // SAFETY: the kernel writes one int.
    check(unsafe { libc::prctl(libc::PR_GET_PDEATHSIG, &mut signal) })?;
    Ok(signal)
}

/// See [`parent_death_signal`].
pub fn set_parent_death_signal(signal: c_int) -> io::Result<()> {
    prctl(libc::PR_SET_PDEATHSIG, signal as c_ulong, 0).map(drop)
}

/// `no_new_privs`.
pub fn set_no_new_privileges() -> io::Result<()> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0).map(drop)
}

/// From now on this process and what it starts can connect only to those abstract Unix sockets that
/// such processes made. Needs `CAP_SYS_ADMIN` or no_new_privs.
pub fn scope_abstract_sockets() -> io::Result<()> {
    // struct landlock_ruleset_attr: handled_access_fs, handled_access_net, scoped.
    let rules = [0u64, 0, LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET];
    // SAFETY: the kernel reads the array, whose size it is told.
    let ruleset = own_long(unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            rules.as_ptr(),
            size_of_val(&rules),
            0 as c_uint,
        )
    })?;
    // SAFETY: takes no pointer.
    check_long(unsafe {
        libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0 as c_uint)
    })
    .map(drop)
}

/// Loads a seccomp filter: `program` is an array of `struct sock_filter`. Answers the listener if
/// `flags` ask for one.
pub fn load_seccomp(flags: u32, program: &[u8]) -> io::Result<Option<OwnedFd>> {
    let mut filter: Vec<libc::sock_filter> = program
        .chunks_exact(8)
        .map(|i| libc::sock_filter {
            code: u16::from_ne_bytes([i[0], i[1]]),
            jt: i[2],
            jf: i[3],
            k: u32::from_ne_bytes([i[4], i[5], i[6], i[7]]),
        })
        .collect();
    let length = u16::try_from(filter.len())
        .ok()
        .filter(|_| program.len().is_multiple_of(8))
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
    let program = libc::sock_fprog { len: length, filter: filter.as_mut_ptr() };
    // SAFETY: the kernel reads `len` instructions, which `filter` holds.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &program) };
    match c_ulong::from(flags) & libc::SECCOMP_FILTER_FLAG_NEW_LISTENER {
        0 => check_long(result).map(|_| None),
        // The kernel sets close-on-exec.
        _ => own_long(check_long(result)?).map(Some),
    }
}

/// Default action for every signal and an empty mask.
///
/// By system calls, because the C library hides two real-time signals that a parent may have left
/// ignored, and because Rust's start-up ignores SIGPIPE.
pub fn reset_signals() {
    // struct sigaction of the kernel is at most this long everywhere; all zero is SIG_DFL.
    let default = [0u64; 8];
    for signal in 1..=64 as c_int {
        if signal == libc::SIGKILL || signal == libc::SIGSTOP {
            continue;
        }
        // SAFETY: the kernel reads one sigaction; 8 is the size of its signal set.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                ptr::null_mut::<c_void>(),
                8usize,
            )
        };
    }
    // SAFETY: the kernel reads eight bytes.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            default.as_ptr(),
            ptr::null_mut::<c_void>(),
            8usize,
        )
    };
}

/// Replaces this process. Returns only in case of an error.
pub fn execve(path: &CStr, args: &[CString], env: &[CString]) -> io::Error {
    let pointers = |list: &[CString]| -> Vec<*const libc::c_char> {
        list.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
    };
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: both arrays end with null, and their strings outlive the call.
    unsafe { libc::execve(path.as_ptr(), args.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

// --- processes -------------------------------------------------------------------------------

/// `pidfd_open(2)`.
pub fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: numbers only.
    own_long(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// A copy of another process's descriptor.
pub fn pidfd_getfd(process: BorrowedFd<'_>, fd: u32) -> io::Result<OwnedFd> {
    // SAFETY: numbers only.
    own_long(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd, 0) })
}

/// The wait status of a reaped process (kernel 6.15 or later); `None` if the kernel has none yet.
pub fn pidfd_wait_status(process: BorrowedFd<'_>) -> io::Result<Option<i32>> {
    // struct pidfd_info: mask, cgroupid (u64); pid, tgid, ppid, eight ids (u32); exit_code (i32).
    let mut info = [0u64; 8];
    info[0] = PIDFD_INFO_EXIT;
    // SAFETY: the request's number says 64 bytes, which `info` has.
    check(unsafe { libc::ioctl(process.as_raw_fd(), PIDFD_GET_INFO, info.as_mut_ptr()) })?;
    let last = info[7].to_ne_bytes();
    let status = i32::from_ne_bytes([last[4], last[5], last[6], last[7]]);
    Ok((info[0] & PIDFD_INFO_EXIT != 0).then_some(status))
}

/// Whether the parent has reaped the process; a zombie still takes a signal.
pub fn pidfd_is_reaped(process: BorrowedFd<'_>) -> bool {
    // SAFETY: numbers only; a null siginfo means that of kill(2).
    let result = unsafe {
        let info = ptr::null::<libc::siginfo_t>();
        libc::syscall(libc::SYS_pidfd_send_signal, process.as_raw_fd(), 0, info, 0)
    };
    check_long(result).is_err_and(|e| e.raw_os_error() == Some(libc::ESRCH))
}

/// `fork(2)`: whether this is the child. For a process with one thread.
pub fn fork() -> io::Result<bool> {
    // SAFETY: as in clone_sibling, no other thread can hold a lock that the child needs.
    check(unsafe { libc::fork() }).map(|pid| pid == 0)
}

/// `flock(2)`. The lock belongs to the open file: a forked process shares it, and it is gone when the
/// last of them has closed it.
pub fn lock(file: BorrowedFd<'_>, operation: c_int) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::flock(file.as_raw_fd(), operation) }).map(drop)
}

/// Has the children of this process begin in a new time namespace.
pub fn new_time_namespace() -> io::Result<()> {
    // SAFETY: a number; the time namespace of this process itself stays.
    check(unsafe { libc::unshare(libc::CLONE_NEWTIME) }).map(drop)
}

/// Enters a time namespace.
pub fn enter_time_namespace(namespace: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: numbers only; one thread.
    check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWTIME) }).map(drop)
}

/// Enters the namespaces (`CLONE_NEW*`) of a process.
pub fn enter_namespaces(process: BorrowedFd<'_>, namespaces: u32) -> io::Result<()> {
    // SAFETY: numbers only; one thread.
    check(unsafe { libc::setns(process.as_raw_fd(), namespaces as c_int) }).map(drop)
}

/// Joins the namespace that `namespace` is open on, whatever its kind.
pub fn join_namespace(namespace: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: numbers only; one thread.
    check(unsafe { libc::setns(namespace.as_raw_fd(), 0) }).map(drop)
}

/// Makes new namespaces (`CLONE_NEW*`); of a pid namespace the next child is the first process.
pub fn new_namespaces(flags: u32) -> io::Result<()> {
    // SAFETY: numbers only; one thread.
    check(unsafe { libc::unshare(flags as c_int) }).map(drop)
}

/// What `/proc/<pid>/comm` shows; the kernel takes 15 bytes.
pub fn set_name(name: &CStr) -> io::Result<()> {
    // SAFETY: `name` is NUL-terminated; the kernel reads at most 16 bytes of it.
    check(unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr(), 0, 0, 0) }).map(drop)
}

fn signal_set(signals: &[c_int]) -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set; sigaddset takes any number.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), *signal);
        }
        set.assume_init()
    }
}

/// Keeps `signals` pending until [`wait_signal`] takes them, and unblocks all others.
pub fn block_signals(signals: &[c_int]) -> io::Result<()> {
    let set = signal_set(signals);
    // SAFETY: the set is initialised; the old one is not wanted.
    check(unsafe { libc::sigprocmask(libc::SIG_SETMASK, &set, ptr::null_mut()) }).map(drop)
}

/// Waits for one of `signals`, which must be blocked, and takes it.
pub fn wait_signal(signals: &[c_int]) -> io::Result<c_int> {
    let set = signal_set(signals);
    // SAFETY: the set is initialised; the information is not wanted.
    check(unsafe { libc::sigwaitinfo(&set, ptr::null_mut()) })
}

/// Reaps all children that have ended.
pub fn reap_children() {
    // SAFETY: the status is not wanted.
    while unsafe { libc::waitpid(-1, ptr::null_mut(), libc::WNOHANG) } > 0 {}
}

/// Which side of [`clone_sibling`] this is.
pub enum Cloned {
    /// The new process.
    Child,
    /// The old one.
    Parent {
        /// In the pid namespace of the old one.
        pid: i32,
        /// Of the new process.
        pidfd: OwnedFd,
    },
}

/// A new process with the same parent as this one, in the pid namespace set by `setns(2)` and, if
/// given, in the cgroup2 directory `cgroup`.
pub fn clone_sibling(cgroup: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    let mut pidfd: c_int = -1;
    // SAFETY: all-zero clone_args is valid.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    // The exit signal is inherited from this process: CLONE_PARENT demands 0 here.
    args.flags = (libc::CLONE_PARENT | libc::CLONE_PIDFD) as u64;
    args.pidfd = &raw mut pidfd as u64;
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM the child has its own copy of all memory and goes on like after
    // fork(2). The process has one thread, so no lock can be held by a thread that is missing in
    // the child.
    let pid = check_long(unsafe {
        libc::syscall(libc::SYS_clone3, &args, size_of::<libc::clone_args>())
    })?;
    Ok(match pid {
        0 => Cloned::Child,
        pid => Cloned::Parent { pid: pid as i32, pidfd: own(pidfd)? },
    })
}

// --- sockets ---------------------------------------------------------------------------------

/// A non-blocking connection to the `SOCK_STREAM` socket with an abstract name.
pub fn connect_abstract(name: &[u8]) -> io::Result<OwnedFd> {
    // SAFETY: an all-zero sockaddr_un is valid.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    if name.len() >= address.sun_path.len() {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    // The name begins with a NUL and ends with the address.
    for (to, from) in address.sun_path.iter_mut().skip(1).zip(name) {
        *to = *from as libc::c_char;
    }
    let length = std::mem::offset_of!(libc::sockaddr_un, sun_path) + 1 + name.len();
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: numbers only.
    let socket = own(unsafe { libc::socket(libc::AF_UNIX, kind, 0) })?;
    // SAFETY: the kernel reads `length` bytes, which lie inside the address.
    check(unsafe {
        libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length as libc::socklen_t)
    })?;
    Ok(socket)
}

/// A connection to a `SOCK_SEQPACKET` socket.
pub fn connect_seqpacket(path: &str) -> io::Result<OwnedFd> {
    // SAFETY: an all-zero sockaddr_un is valid.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    if path.len() >= address.sun_path.len() {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    for (to, from) in address.sun_path.iter_mut().zip(path.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: numbers only.
    let socket =
        own(unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the kernel reads one sockaddr_un.
    check(unsafe {
        libc::connect(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_un>() as libc::socklen_t,
        )
    })?;
    Ok(socket)
}

/// The most descriptors one message carries (`SCM_MAX_FD`).
pub const MAX_DESCRIPTORS: usize = 253;
/// u64s, for the alignment of `cmsghdr`, that hold a header and [`MAX_DESCRIPTORS`].
const CONTROL_WORDS: usize = 16 + MAX_DESCRIPTORS.div_ceil(2);

/// Sends one datagram with descriptors.
pub fn send(socket: BorrowedFd<'_>, data: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    if fds.len() > MAX_DESCRIPTORS {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut control = [0u64; CONTROL_WORDS];
    let mut part = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    // SAFETY: an all-zero msghdr is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    if !fds.is_empty() {
        let bytes = size_of_val(fds) as c_uint;
        message.msg_control = control.as_mut_ptr().cast();
        // SAFETY: arithmetic only.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(bytes) } as _;
        // SAFETY: `control` is aligned and long enough for a header and MAX_DESCRIPTORS;
        // BorrowedFd has the layout of RawFd.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(&message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(bytes) as _;
            ptr::copy_nonoverlapping(
                fds.as_ptr().cast::<u8>(),
                libc::CMSG_DATA(header),
                bytes as usize,
            );
        }
    }
    loop {
        // SAFETY: everything `message` points to is alive.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL) };
        match check_long(sent as c_long) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other.map(drop),
        }
    }
}

/// Receives one datagram into `data` and answers its length and descriptors; length 0 is the end.
/// A datagram or a list of descriptors that did not fit is `EMSGSIZE`.
pub fn receive(socket: BorrowedFd<'_>, data: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut control = [0u64; CONTROL_WORDS];
    let mut part = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
    // SAFETY: an all-zero msghdr is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    let length = loop {
        // SAFETY: everything `message` points to is alive and as long as it says.
        let got =
            unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC) };
        match check_long(got as c_long) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => break other? as usize,
        }
    };
    let mut fds = Vec::new();
    // SAFETY: the kernel has set msg_controllen to what it wrote, and CMSG_* stay within it; each
    // descriptor of an SCM_RIGHTS message is new and ours.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let bytes = (*header).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                let first = libc::CMSG_DATA(header).cast::<c_int>();
                for i in 0..bytes / size_of::<c_int>() {
                    fds.push(OwnedFd::from_raw_fd(first.add(i).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(&message, header);
        }
    }
    if message.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    Ok((length, fds))
}

/// The working directory as a descriptor for the `*at` calls.
pub fn cwd() -> BorrowedFd<'static> {
    // SAFETY: AT_FDCWD is never closed.
    unsafe { BorrowedFd::borrow_raw(libc::AT_FDCWD) }
}

/// The process's standard input, output or error.
pub fn stdio(number: RawFd) -> BorrowedFd<'static> {
    debug_assert!((0..3).contains(&number));
    // SAFETY: nothing in this program closes 0..2.
    unsafe { BorrowedFd::borrow_raw(number) }
}

/// A second descriptor of the same open file.
pub fn duplicate(fd: impl AsFd) -> io::Result<OwnedFd> {
    fd.as_fd().try_clone_to_owned()
}
