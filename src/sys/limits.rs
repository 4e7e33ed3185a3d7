//! Resource limits: `prlimit(2)`.

use std::io;
use std::sync::OnceLock;

use nix::libc;
use tokio::process::Command;

/// The limit on descriptors that this process was started with: soft, hard.
static DESCRIPTORS: OnceLock<[u64; 2]> = OnceLock::new();

/// Sets one of `RLIMIT_*`; 0 is this process.
///
/// # Errors
/// Those of `prlimit(2)`.
pub fn set(pid: i32, resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    prlimit(pid, resource, Some(&[soft, hard]), None)
}

/// Lets this process have as many descriptors as it may: a container's mounts are open all at once, and
/// systemd's soft limit of 1024 is for programs that use `select(2)`.
///
/// # Errors
/// Those of `prlimit(2)`.
pub fn raise_descriptors() -> io::Result<()> {
    let mut limit = [0; 2];
    prlimit(0, libc::RLIMIT_NOFILE, None, Some(&mut limit))?;
    set(0, libc::RLIMIT_NOFILE, limit[1], limit[1])?;
    // What the first call has found is what the process was started with.
    let _ = DESCRIPTORS.set(limit);
    Ok(())
}

/// Gives a child of this process the limit that it would have had without [`raise_descriptors`].
///
/// # Errors
/// Those of `prlimit(2)`.
pub fn restore_descriptors(pid: i32) -> io::Result<()> {
    match DESCRIPTORS.get() {
        Some(&[soft, hard]) => set(pid, libc::RLIMIT_NOFILE, soft, hard),
        None => Ok(()),
    }
}

/// The same before it executes its program.
pub fn restore_descriptors_in(command: &mut Command) {
    // SAFETY: between fork and exec the closure only reads a value that is set once and makes a system
    // call.
    unsafe {
        command.pre_exec(|| restore_descriptors(0));
    }
}

fn prlimit(
    pid: i32,
    resource: u32,
    new: Option<&[u64; 2]>,
    old: Option<&mut [u64; 2]>,
) -> io::Result<()> {
    // struct rlimit64
    let new = new.map_or(std::ptr::null(), |limit| limit.as_ptr());
    let old = old.map_or(std::ptr::null_mut(), |limit| limit.as_mut_ptr());
    // SAFETY: both are null, or room for the two u64 that the kernel reads or writes.
    let r = unsafe { libc::syscall(libc::SYS_prlimit64, pid, resource, new, old) };
    if r == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
