//! `holder`: the process that keeps a pod's namespaces while its containers come and go, in place of
//! a pause container's.
//!
//! Asked to end, it writes its exit record: nobody else knows its status if the shim is gone by then.
//! Only a signal that cannot be caught ends it without one.
//!
//! It executes nothing. Containers of the pod may share its pid namespace and look at it in `/proc`,
//! so nothing of the host is reachable through it: its root is an empty, read-only file system, it
//! has no capabilities, and it is not dumpable, which closes `/proc/<pid>/{root,exe,fd,mem}` to them.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;

use crate::container;
use crate::error::{Attempt, Error, Result, quote};
use crate::hook::holder_record;
use crate::process;
use crate::protocol::{
    EXEC_SOCKET_FD, EXIT_NOT_EXECUTED, ExecCgroup, HolderSetup, Process, Reply, Request,
};
use crate::socket::{Channel, read_setup};
use crate::sys::{self, Cloned};

/// What the holder waits for: children to reap, and requests to end.
const SIGNALS: [i32; 3] = [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT];

/// The whole mode. In the new process it returns when that is to end.
pub fn run() -> ExitCode {
    let socket = sys::set_not_dumpable()
        .and_then(|()| sys::close_from(3))
        .and_then(|()| sys::adopt(EXEC_SOCKET_FD));
    let Ok(socket) = socket else {
        let _ = std::io::stderr().write_all(
            b"proxmox-shim-init: holder is started by the shim, with a socket as stdin\n",
        );
        return ExitCode::FAILURE;
    };
    let channel = Channel::new(socket);
    match start(&channel) {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(started)) => hold(channel, started),
        Err(error) => {
            channel.send_failure(&error);
            ExitCode::from(EXIT_NOT_EXECUTED as u8)
        }
    }
}

/// What the new process has from the old one.
struct Started {
    setup: HolderSetup,
    /// The node's.
    procfs: OwnedFd,
    exit_record: File,
}

/// `None` in the old process once the new one exists.
fn start(channel: &Channel) -> Result<Option<Started>> {
    let (request, fds) = channel.receive()?;
    let Request::Holder { cgroup, cgroup_files, namespaces } = request else {
        return Err(Error::Protocol("expected Holder"));
    };
    let mut fds = fds.into_iter();
    let missing = || Error::Protocol("a descriptor of Holder is missing");
    let setup: HolderSetup = read_setup(fds.next().ok_or_else(missing)?)?;
    let exit_record = File::from(fds.next().ok_or_else(missing)?);
    let mut files: Vec<OwnedFd> = fds.by_ref().take(cgroup_files).collect();
    let joined: Vec<OwnedFd> = fds.collect();
    if files.len() != cgroup_files || joined.len() != namespaces {
        return Err(missing());
    }
    let directory = match cgroup {
        ExecCgroup::Tasks => None,
        ExecCgroup::Directory if files.is_empty() => return Err(missing()),
        ExecCgroup::Directory => Some(files.remove(0)),
    };
    for tasks in files {
        File::from(tasks).write_all(b"0").attempt(|| "join a cgroup of the pod")?;
    }
    // The node's: root of a user namespace may not set what follows, nor mount a procfs of the node's
    // processes.
    let procfs = process::private_procfs()?;
    process::set_privileged(&unprivileged(&setup), Some(&procfs))?;
    for namespace in joined {
        sys::join_namespace(namespace.as_fd()).attempt(|| "join a namespace of the pod")?;
    }
    sys::new_namespaces(setup.new_namespaces | libc::CLONE_NEWNS as u32)
        .attempt(|| "make the namespaces of the pod")?;
    // The new process must not say anything before Spawned has been sent.
    let (wait, release) = sys::pipe().attempt(|| "create a pipe")?;
    let cloned = sys::clone_sibling(directory.as_ref().map(AsFd::as_fd))
        .attempt(|| "start a process in the pod's cgroup")?;
    drop(directory);
    match cloned {
        Cloned::Parent { pid, pidfd } => {
            drop(wait);
            channel.send(&Reply::Spawned { pid }, &[pidfd.as_fd()])?;
            File::from(release).write_all(b"1").attempt(|| "release the new process")?;
            Ok(None)
        }
        Cloned::Child => {
            drop(release);
            let mut byte = [0];
            // The end of the pipe: the shim was not told of this process and would never reap it.
            match File::from(wait).read_exact(&mut byte) {
                Ok(()) => Ok(Some(Started { setup, procfs, exit_record })),
                Err(_) => Err(Error::Disconnected),
            }
        }
    }
}

fn hold(channel: Channel, started: Started) -> ExitCode {
    let Started { setup, procfs, exit_record } = started;
    let prepared = prepare(&channel, &setup, procfs).and_then(|()| match channel.receive()? {
        (Request::Go, _) => Ok(()),
        _ => Err(Error::Protocol("expected Go")),
    });
    match prepared {
        Ok(()) => {
            // Its end tells the shim that the pod has been started.
            drop(channel);
            wait_for_the_end(exit_record)
        }
        // The shim has given up on this pod.
        Err(Error::Disconnected) => ExitCode::FAILURE,
        Err(error) => {
            channel.send_failure(&error);
            ExitCode::from(EXIT_NOT_EXECUTED as u8)
        }
    }
}

/// Everything up to [`Reply::Ready`].
fn prepare(channel: &Channel, setup: &HolderSetup, procfs: OwnedFd) -> Result<()> {
    if setup.user_namespace {
        // Until now the node's root, which may enter the pod's cgroup.
        sys::set_gid(0)
            .and_then(|()| sys::set_uid(0))
            .attempt(|| "become root of the user namespace")?;
    }
    // The socket was stdin, too. The shim made the others /dev/null.
    sys::become_stdio(sys::stdio(1), 0).attempt(|| "close the socket's other descriptor")?;
    sys::reset_signals();
    sys::block_signals(&SIGNALS).attempt(|| "block signals")?;
    // What ps(1) shows; it would be a number, as the program is executed by descriptor.
    sys::set_name(c"pod-sandbox").attempt(|| "set the name of the process")?;
    sys::new_session().attempt(|| "start a session")?;
    if let Some(name) = &setup.hostname {
        sys::set_hostname(name).attempt(|| format!("set the hostname {}", quote(name)))?;
    }
    if let Some(name) = &setup.domainname {
        sys::set_domainname(name).attempt(|| format!("set the domain name {}", quote(name)))?;
    }
    if setup.loopback_up {
        sys::loopback_up().attempt(|| "bring the loopback interface up")?;
    }
    let process = unprivileged(setup);
    container::write_sysctls(&procfs, &setup.sysctls)?;
    drop(procfs);
    enter_empty_root()?;
    process::become_user(&process, false)?;
    sys::set_no_new_privileges().attempt(|| "set no_new_privs")?;
    // A change of user has reset it.
    sys::set_not_dumpable().attempt(|| "hide the process's memory")?;
    channel.send(&Reply::Ready { terminal: false }, &[])
}

/// The pod's user and nothing else.
fn unprivileged(setup: &HolderSetup) -> Process {
    Process {
        uid: setup.uid,
        gid: setup.gid,
        additional_gids: setup.additional_gids.clone(),
        no_new_privileges: true,
        oom_score_adj: setup.oom_score_adj,
        ..Process::default()
    }
}

/// Replaces the host's file systems by an empty one in this process's own mount namespace.
fn enter_empty_root() -> Result<()> {
    sys::set_root_propagation(libc::MS_REC | libc::MS_PRIVATE)
        .attempt(|| "make the mounts private")?;
    let attributes = sys::attr::RDONLY | sys::attr::NOSUID | sys::attr::NODEV | sys::attr::NOEXEC;
    let empty = sys::fs_open(c"tmpfs")
        .and_then(|fs| sys::fs_mount(fs.as_fd(), attributes))
        .attempt(|| "make an empty root")?;
    // Any directory that every host has.
    let place = sys::openat(sys::cwd(), c"/proc", libc::O_PATH | libc::O_DIRECTORY, 0)
        .attempt(|| "open \"/proc\"")?;
    sys::attach_mount(empty.as_fd(), place.as_fd()).attempt(|| "mount an empty root")?;
    drop((empty, place));
    sys::chdir(c"/proc")
        .and_then(|()| sys::pivot_root(c".", c"."))
        .and_then(|()| sys::detach_mount(c"."))
        .and_then(|()| sys::chdir(c"/"))
        .attempt(|| "enter an empty root")
}

fn wait_for_the_end(mut exit_record: File) -> ExitCode {
    loop {
        match sys::wait_signal(&SIGNALS) {
            Ok(libc::SIGCHLD) => sys::reap_children(),
            // Asked to end, as a pause container understands it.
            Ok(_) => {
                // A shim that lives sees the status itself, and there is nobody else to tell.
                let _ = exit_record.write_all(holder_record(0).as_bytes());
                return ExitCode::SUCCESS;
            }
            // Stopped and continued, or traced.
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return ExitCode::FAILURE,
        }
    }
}
