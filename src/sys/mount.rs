//! The mount API: `open_tree(2)`, `mount_setattr(2)`, `move_mount(2)`, `fsopen(2)`.
//!
//! Everything works on descriptors: what is mounted where is decided before the mount can be seen,
//! and neither the working directory nor a string limited to one page is involved.

use std::ffi::{CString, c_char, c_int, c_long};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

use nix::libc;

// `enum fsconfig_command` of <linux/mount.h>.
const FSCONFIG_SET_FLAG: c_int = 0;
const FSCONFIG_SET_STRING: c_int = 1;
const FSCONFIG_CMD_CREATE: c_int = 6;
/// `AT_RECURSIVE` of <linux/fcntl.h>.
const AT_RECURSIVE: c_int = 0x8000;

/// What `mount_setattr(2)` changes: `MOUNT_ATTR_*` bits, and one of `MS_SHARED`, `MS_SLAVE`,
/// `MS_PRIVATE`, `MS_UNBINDABLE` or 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Change {
    pub set: u64,
    pub clear: u64,
    pub propagation: u64,
}

/// Clones the mount at `path` (or the part of it below `path`) into a detached mount, with the
/// mounts below it if `recursive`. A symbolic link at the end of `path` is followed.
///
/// The clone is a member of the source's peer group until [`change`] says otherwise.
///
/// # Errors
/// Those of `open_tree(2)`.
pub fn clone_tree(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let path = c_string(path.as_os_str().as_bytes())?;
    let mut flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= AT_RECURSIVE.unsigned_abs();
    }
    // SAFETY: `path` is a C string that outlives the call.
    owned(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) })
}

/// Changes the mount that `mount` is the root of, and those below it if `recursive`.
///
/// # Errors
/// Those of `mount_setattr(2)`; nothing was changed then.
pub fn change(mount: BorrowedFd<'_>, recursive: bool, change: Change) -> io::Result<()> {
    set_attributes(
        mount,
        recursive,
        libc::mount_attr {
            attr_set: change.set,
            attr_clr: change.clear,
            propagation: change.propagation,
            userns_fd: 0,
        },
    )
}

fn set_attributes(
    mount: BorrowedFd<'_>,
    recursive: bool,
    attr: libc::mount_attr,
) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty C string, `attr` is valid for the size that is passed.
    let r = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if r == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Shows the files of a detached mount, and of those below it if `recursive`, with the ids that
/// `user_namespace` maps theirs to.
///
/// # Errors
/// `EINVAL` if a file system cannot be mapped (overlay, for one) or is mapped already.
pub fn map_ids(
    mount: BorrowedFd<'_>,
    recursive: bool,
    user_namespace: BorrowedFd<'_>,
) -> io::Result<()> {
    set_attributes(
        mount,
        recursive,
        libc::mount_attr {
            attr_set: libc::MOUNT_ATTR_IDMAP,
            attr_clr: 0,
            propagation: 0,
            userns_fd: user_namespace.as_raw_fd().unsigned_abs().into(),
        },
    )
}

/// Attaches a detached mount on what `target` is open on.
///
/// # Errors
/// Those of `move_mount(2)`.
pub fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both descriptors are open, both paths are empty C strings.
    let r = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            target.as_raw_fd(),
            c"".as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH,
        )
    };
    if r == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A filesystem that is being configured.
#[derive(Debug)]
pub struct Filesystem(OwnedFd);

impl Filesystem {
    /// # Errors
    /// `ENODEV` if the kernel does not know the type.
    pub fn open(fstype: &str) -> io::Result<Self> {
        let fstype = c_string(fstype.as_bytes())?;
        // SAFETY: `fstype` is a C string that outlives the call.
        let fd = unsafe { libc::syscall(libc::SYS_fsopen, fstype.as_ptr(), libc::FSOPEN_CLOEXEC) };
        owned(fd).map(Self)
    }

    /// Sets a parameter that has a value. The kernel takes at most 255 bytes of it.
    ///
    /// # Errors
    /// `EINVAL`, also for a parameter that this kernel does not know.
    pub fn set(&self, key: &str, value: &[u8]) -> io::Result<()> {
        let key = c_string(key.as_bytes())?;
        let value = c_string(value)?;
        self.configure(FSCONFIG_SET_STRING, key.as_ptr(), value.as_ptr())
    }

    /// Sets a parameter that has none.
    ///
    /// # Errors
    /// `EINVAL`, also for a parameter that this kernel does not know.
    pub fn set_flag(&self, key: &str) -> io::Result<()> {
        let key = c_string(key.as_bytes())?;
        self.configure(FSCONFIG_SET_FLAG, key.as_ptr(), ptr::null())
    }

    /// Creates the filesystem and a detached mount of it with `MOUNT_ATTR_*` `attributes`.
    ///
    /// # Errors
    /// Those of `mount(2)`; [`Self::messages`] may know more.
    pub fn mount(&self, attributes: u64) -> io::Result<OwnedFd> {
        const FSMOUNT_CLOEXEC: c_int = 1;
        self.configure(FSCONFIG_CMD_CREATE, ptr::null(), ptr::null())?;
        // SAFETY: integers only.
        owned(unsafe {
            libc::syscall(libc::SYS_fsmount, self.0.as_raw_fd(), FSMOUNT_CLOEXEC, attributes)
        })
    }

    /// What the kernel has logged for this filesystem so far, and forgets.
    #[must_use]
    pub fn messages(&self) -> String {
        let mut all = Vec::new();
        let mut buffer = [0; 512];
        // Each read is one message, such as "e overlay: ...".
        while let Ok(n) = nix::unistd::read(&self.0, &mut buffer) {
            let message = String::from_utf8_lossy(&buffer[..n]);
            let message = message.trim();
            all.push(message.get(2..).unwrap_or(message).to_owned());
            if n == 0 || all.len() > 16 {
                break;
            }
        }
        all.join("; ")
    }

    fn configure(
        &self,
        command: c_int,
        key: *const c_char,
        value: *const c_char,
    ) -> io::Result<()> {
        // SAFETY: the callers pass C strings that outlive the call, or null where the command
        // takes none.
        let r = unsafe {
            libc::syscall(libc::SYS_fsconfig, self.0.as_raw_fd(), command, key, value, 0)
        };
        if r == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

fn c_string(bytes: &[u8]) -> io::Result<CString> {
    CString::new(bytes).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn owned(fd: c_long) -> io::Result<OwnedFd> {
    match c_int::try_from(fd) {
        // SAFETY: the kernel has just returned this descriptor to us alone.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
