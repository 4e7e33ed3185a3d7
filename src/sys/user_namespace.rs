//! User namespaces as the carriers of an id mapping: `mount_setattr(2)` takes a mapping in this form.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::libc;

use super::pidfd;

/// A new user namespace with no process in it. The texts are those of `/proc/<pid>/uid_map` and
/// `gid_map` (user_namespaces(7)).
///
/// # Errors
/// `EINVAL` for mappings that the kernel does not take, `EPERM` without the needed privileges, `ENOSPC`
/// beyond `/proc/sys/user/max_user_namespaces`.
pub fn with_mappings(uid_map: &str, gid_map: &str) -> io::Result<OwnedFd> {
    let (wait, release) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    let mut pidfd: libc::c_int = -1;
    // SAFETY: clone_args is plain integers; all-zero is a valid value.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = (libc::CLONE_NEWUSER | libc::CLONE_PIDFD).unsigned_abs().into();
    args.pidfd = &raw mut pidfd as u64;
    args.exit_signal = libc::SIGCHLD.unsigned_abs().into();
    // SAFETY: without CLONE_VM the child has a copy of all memory, in which other threads may have
    // left locks taken. It only makes system calls.
    let pid =
        unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<libc::clone_args>()) };
    match pid {
        ..0 => return Err(io::Error::last_os_error()),
        0 => {
            let mut byte = 0u8;
            // SAFETY: async-signal-safe calls on descriptors of this process. Its own copy of the
            // other end must not keep the pipe open if the parent dies.
            unsafe {
                libc::close(release.as_raw_fd());
                libc::read(wait.as_raw_fd(), (&raw mut byte).cast(), 1);
                libc::_exit(0)
            }
        }
        _ => {}
    }
    // SAFETY: the kernel has just made this descriptor for us alone.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    let namespace = fs::write(format!("/proc/{pid}/uid_map"), uid_map)
        .and_then(|()| fs::write(format!("/proc/{pid}/gid_map"), gid_map))
        .and_then(|()| File::open(format!("/proc/{pid}/ns/user")));
    // Whatever else has a copy of the pipe's end: a child that is just being started, say.
    let _ = pidfd::send_signal(pidfd.as_fd(), libc::SIGKILL);
    pidfd::wait(pidfd.as_fd())?;
    namespace.map(OwnedFd::from)
}

/// Whether the user namespace of a process has these mappings, in any order.
///
/// # Errors
/// `ENOENT` if the process has ended.
pub fn has_mappings(pid: i32, uid_map: &str, gid_map: &str) -> io::Result<bool> {
    let has = |name: &str, wanted: &str| {
        let actual = fs::read_to_string(format!("/proc/{pid}/{name}"))?;
        Ok::<_, io::Error>(lines(&actual) == lines(wanted))
    };
    Ok(has("uid_map", uid_map)? && has("gid_map", gid_map)?)
}

/// The lines of a map, sorted, without the kernel's alignment.
fn lines(map: &str) -> Vec<String> {
    let mut lines: Vec<String> =
        map.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    lines.sort();
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_the_kernel_refuses_leaves_no_child() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        with_mappings("0 100000 65536\n", "0 200000 5\n7 300000 1\n").unwrap();
        let error = with_mappings("0 0 0\n", "0 0 1\n").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        let threads = fs::read_dir("/proc/self/task").unwrap().flatten();
        let children = threads.map(|t| fs::read_to_string(t.path().join("children")));
        let zombies: Vec<_> = children
            .flat_map(|list| {
                let list = list.unwrap_or_default();
                list.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
            })
            .filter(|pid| {
                fs::read_to_string(format!("/proc/{pid}/comm"))
                    .is_ok_and(|name| name.starts_with("sys::user_n"))
            })
            .collect();
        assert_eq!(zombies, Vec::<String>::new());
    }
}
