//! Resource limits of another process: `prlimit(2)`.

use std::io;

use nix::libc;

/// Sets one of `RLIMIT_*`.
///
/// # Errors
/// Those of `prlimit(2)`.
pub fn set(pid: i32, resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = [soft, hard]; // struct rlimit64
    // SAFETY: the kernel reads two u64 and is asked to write nothing.
    let r = unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            pid,
            resource,
            limit.as_ptr(),
            std::ptr::null_mut::<libc::c_void>(),
        )
    };
    if r == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
