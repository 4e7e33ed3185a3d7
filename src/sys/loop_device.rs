//! Loop devices: loop(4).

use std::ffi::{c_int, c_ulong};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::libc;

// <linux/loop.h>
const LOOP_CONFIGURE: c_ulong = 0x4C0A;
const LOOP_CTL_GET_FREE: c_ulong = 0x4C82;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
/// The field ends with a NUL.
const NAME_LENGTH: usize = 63;

/// `struct loop_info64`.
#[repr(C)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct Configuration {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

/// The number of a loop device that is not in use at this moment; the kernel makes one if need be.
///
/// # Errors
/// `/dev/loop-control` cannot be opened, or those of `LOOP_CTL_GET_FREE`.
pub fn free() -> io::Result<u32> {
    let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
    // SAFETY: the request has no argument.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE as _) };
    u32::try_from(number).map_err(|_| io::Error::last_os_error())
}

/// Puts `image` behind `device` until the last user of the device has gone (`LO_FLAGS_AUTOCLEAR`);
/// an open descriptor is one. `name` is what `losetup` shows.
///
/// # Errors
/// `EBUSY` if somebody else has just taken the device, and those of `LOOP_CONFIGURE`.
pub fn configure(
    device: BorrowedFd<'_>,
    image: BorrowedFd<'_>,
    read_only: bool,
    name: &[u8],
) -> io::Result<()> {
    // SAFETY: all-zero is a valid value of this structure of integers.
    let mut configuration: Configuration = unsafe { std::mem::zeroed() };
    configuration.fd = image.as_raw_fd().unsigned_abs();
    configuration.info.flags = LO_FLAGS_AUTOCLEAR | if read_only { LO_FLAGS_READ_ONLY } else { 0 };
    let name = &name[..name.len().min(NAME_LENGTH)];
    configuration.info.file_name[..name.len()].copy_from_slice(name);
    // SAFETY: the kernel reads one loop_config.
    let result: c_int =
        unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE as _, &raw const configuration) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
