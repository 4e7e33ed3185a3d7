//! Credentials of one thread, by the system calls themselves: the C library would change those of all
//! threads.

use std::io;

use nix::libc;
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};

const VERSION_3: u32 = 0x2008_0522;

/// Has this thread access files as this user and group, with all of its capabilities: by itself a
/// change of the user away from root takes those away that override permissions.
///
/// # Errors
/// The ids are not mapped, or the thread may not have them.
pub fn become_file_user(uid: u32, gid: u32) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    // Neither call reports a failure; each returns what was before.
    setfsgid(gid);
    setfsuid(uid);
    if setfsgid(gid) != gid || setfsuid(uid) != uid {
        return Err(nix::errno::Errno::EPERM.into());
    }
    let header = [VERSION_3, 0];
    // Effective, permitted, inheritable; low and high half.
    let mut sets = [[0u32; 3]; 2];
    // SAFETY: version 3 writes two structures of three u32.
    let got = unsafe { libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr()) };
    if got != 0 {
        return Err(io::Error::last_os_error());
    }
    for [effective, permitted, _] in &mut sets {
        *effective = *permitted;
    }
    // SAFETY: version 3 reads two structures of three u32.
    let set = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
