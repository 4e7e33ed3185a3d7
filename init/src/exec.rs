//! `exec`: one more process in a running CT.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;

use crate::error::{Attempt, Error, Result};
use crate::process;
use crate::protocol::{
    BitSet, EXEC_SOCKET_FD, EXIT_NOT_EXECUTED, ExecCgroup, ExecSetup, Reply, Request,
};
use crate::rootfs::Root;
use crate::socket::{Channel, read_setup};
use crate::sys::{self, Cloned};
use crate::terminal::Streams;

/// The whole mode. In the new process it does not return unless the workload could not be
/// executed.
pub fn run() -> ExitCode {
    // Before anything of the CT can look at this process: neither its memory nor its descriptors
    // nor its executable are the container's business.
    let socket = sys::set_not_dumpable()
        .and_then(|()| sys::close_from(3))
        .and_then(|()| sys::adopt(EXEC_SOCKET_FD));
    let Ok(socket) = socket else {
        let _ = std::io::stderr()
            .write_all(b"proxmox-shim-init: exec is started by the shim, with a socket as stdin\n");
        return ExitCode::FAILURE;
    };
    let channel = Channel::new(socket);
    match start(&channel) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            channel.send_failure(&error);
            ExitCode::from(EXIT_NOT_EXECUTED as u8)
        }
    }
}

/// `Ok` in the old process once the new one exists.
fn start(channel: &Channel) -> Result<()> {
    let (request, fds) = channel.receive()?;
    let Request::Exec { cgroup, cgroup_files, stdio } = request else {
        return Err(Error::Protocol("expected Exec"));
    };
    let mut fds = fds.into_iter();
    let missing = || Error::Protocol("a descriptor of Exec is missing");
    let mut setup: ExecSetup = read_setup(fds.next().ok_or_else(missing)?)?;
    let pidfd = fds.next().ok_or_else(missing)?;
    let mut files: Vec<OwnedFd> = fds.by_ref().take(cgroup_files).collect();
    let stdio_fds: Vec<OwnedFd> = fds.collect();
    if files.len() != cgroup_files || stdio_fds.len() != if stdio { 3 } else { 0 } {
        return Err(missing());
    }
    let affinity = &setup.process.exec_cpu_affinity;
    set_affinity(affinity.initial.as_ref())?;
    let directory = match cgroup {
        ExecCgroup::Tasks => None,
        ExecCgroup::Directory if files.is_empty() => return Err(missing()),
        ExecCgroup::Directory => Some(files.remove(0)),
    };
    for tasks in files {
        File::from(tasks).write_all(b"0").attempt(|| "join a cgroup of the CT")?;
    }
    // With cgroup2's `nsdelegate`, systemd's choice, a member of a cgroup namespace brings nothing
    // into it from outside, not even its own child: so only the new process enters that one.
    let later = match directory {
        Some(_) => setup.namespaces & libc::CLONE_NEWCGROUP as u32,
        None => 0,
    };
    // In a user namespace the new process loses what it needs for some of its settings.
    let user = setup.namespaces & libc::CLONE_NEWUSER as u32;
    let procfs = process::needs_procfs(&setup.process)
        .then(|| sys::openat(sys::cwd(), c"/proc", libc::O_PATH | libc::O_DIRECTORY, 0))
        .transpose()
        .attempt(|| "open the node's \"/proc\"")?;
    sys::enter_namespaces(pidfd.as_fd(), setup.namespaces & !later & !user)
        .attempt(|| "enter the namespaces of the CT (is its init still running?)")?;
    // The new process must not say anything before Spawned has been sent.
    let (wait, release) = sys::pipe().attempt(|| "create a pipe")?;
    let cloned = sys::clone_sibling(directory.as_ref().map(AsFd::as_fd))
        .attempt(|| "start a process in the CT's cgroup")?;
    drop(directory);
    match cloned {
        Cloned::Parent { pid, pidfd } => {
            drop(wait);
            channel.send(&Reply::Spawned { pid }, &[pidfd.as_fd()])?;
            File::from(release).write_all(b"1").attempt(|| "release the new process")
        }
        Cloned::Child => {
            drop(release);
            let mut byte = [0];
            // The end of the pipe: the shim was not told of this process and would never reap it.
            if File::from(wait).read_exact(&mut byte).is_err() {
                return Err(Error::Disconnected);
            }
            if later != 0 {
                sys::enter_namespaces(pidfd.as_fd(), later)
                    .attempt(|| "enter the cgroup namespace of the CT")?;
            }
            process::set_privileged(&setup.process, procfs.as_ref())?;
            (setup.process.oom_score_adj, setup.process.apparmor_profile) = (None, None);
            setup.process.rlimits.clear();
            drop(procfs);
            if user != 0 {
                become_root_of(pidfd.as_fd())?;
            }
            drop(pidfd);
            set_affinity(affinity.last.as_ref())?;
            Err(become_process(channel, &setup, stdio_fds))
        }
    }
}

fn set_affinity(cpus: Option<&BitSet>) -> Result<()> {
    match cpus {
        Some(cpus) => sys::set_affinity(&cpus.0).attempt(|| "error setting CPU affinity"),
        None => Ok(()),
    }
}

/// Enters the user namespace of a process.
fn become_root_of(process: BorrowedFd<'_>) -> Result<()> {
    sys::enter_namespaces(process, libc::CLONE_NEWUSER as u32)
        .attempt(|| "enter the user namespace of the CT")?;
    // Root of the node is nobody there, who may not even open a terminal.
    sys::set_groups(&[])
        .and_then(|()| sys::set_gid(0))
        .and_then(|()| sys::set_uid(0))
        .attempt(|| "become root of the CT")
}

fn become_process(channel: &Channel, setup: &ExecSetup, stdio: Vec<OwnedFd>) -> Error {
    let prepare = || {
        let root = Root::open().attempt(|| "open the container's root")?;
        Streams::open(&root, &setup.process, stdio)?.report_ready(channel)?;
        Ok(root)
    };
    match prepare() {
        Ok(root) => process::execute(&setup.process, root, None, channel, || Ok(())),
        Err(error) => error,
    }
}
