//! What the kernel's Landlock can do.

use std::ptr;

use nix::libc;

const LANDLOCK_CREATE_RULESET_VERSION: libc::c_uint = 1;

/// The version of `landlock(7)`'s ABI; 0 without Landlock.
#[must_use]
pub fn abi() -> u32 {
    // SAFETY: with this flag the kernel reads nothing and only returns a number.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            ptr::null::<libc::c_void>(),
            0usize,
            LANDLOCK_CREATE_RULESET_VERSION,
        )
    };
    u32::try_from(version).unwrap_or(0)
}
