//! `init`: PID 1 of the CT, from LXC's exec to the workload's.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;

use crate::error::{Attempt, Error, Result, quote};
use crate::mounts::{self, Mounter};
use crate::oci_hooks;
use crate::process;
use crate::protocol::{
    CT_DIR, ContainerSetup, Device, EXIT_NOT_EXECUTED, Reply, Request, SOCKET_NAME, TimeNamespace,
    VERSION,
};
use crate::rootfs::{Kind, Root};
use crate::socket::{Channel, read_setup};
use crate::sys;
use crate::terminal::Streams;

const FOREIGN: &[u8] =
    b"this CT was not started by containerd; start the container with containerd instead\n";

/// The whole mode. Does not return unless the workload could not be executed.
pub fn run() -> ExitCode {
    // lxc-start passes descriptors on that it does not know; none of them is for us.
    let prepared = sys::set_not_dumpable().and_then(|()| sys::close_from(3));
    let connected = prepared.and_then(|()| Channel::connect(&format!("{CT_DIR}/{SOCKET_NAME}")));
    let Ok(channel) = connected else {
        let _ = std::io::stderr().write_all(FOREIGN);
        return ExitCode::FAILURE;
    };
    match become_workload(&channel) {
        // The shim has given up on this container; it reports that itself.
        Error::Disconnected => ExitCode::FAILURE,
        error => {
            channel.send_failure(&error);
            ExitCode::from(EXIT_NOT_EXECUTED as u8)
        }
    }
}

fn become_workload(channel: &Channel) -> Error {
    let prepare = || {
        let (setup, root, procfs) = set_up(channel)?;
        match channel.receive()? {
            (Request::Go, _) => {}
            _ => return Err(Error::Protocol("expected Go")),
        }
        Ok((setup, root, procfs))
    };
    match prepare() {
        Ok((setup, root, procfs)) => {
            process::execute(&setup.process, root, procfs, channel, || {
                oci_hooks::start_container(&setup.start_container)
            })
        }
        Err(error) => error,
    }
}

/// Everything up to [`Reply::Ready`]. The procfs is attached nowhere; the process may need it.
fn set_up(channel: &Channel) -> Result<(ContainerSetup, Root, Option<OwnedFd>)> {
    channel.send(&Reply::Hello { version: VERSION }, &[])?;
    let Received { setup, time_namespace, stdio } = receive_setup(channel)?;
    enter_time_namespace(&setup.time_namespace, time_namespace)?;
    // Modes below are exact.
    sys::umask(0);
    // While LXC's can be seen.
    let instances = mounts::new_procfs(&setup.mounts)?;
    let procfs = (!setup.sysctls.is_empty() || process::needs_procfs(&setup.process))
        .then(process::private_procfs)
        .transpose()?;
    remove_traces()?;
    let root = Root::open().attempt(|| "open the container's root")?;

    let mut mounter = Mounter::new(&root, channel, instances);
    for mount in &setup.mounts {
        mounter.mount(mount)?;
    }
    for device in &setup.devices {
        make_device(&root, device)?;
    }
    for (from, to) in &setup.links {
        make_link(&root, from, to)?;
    }
    make_cwd(&root, &setup.process.cwd)?;
    if setup.loopback_up {
        sys::loopback_up().attempt(|| "bring the loopback interface up")?;
    }
    hooks_of_creation(channel, &setup)?;

    let streams = Streams::open(&root, &setup.process, stdio)?;
    streams.bind_console(&root)?;
    if let Some(name) = &setup.hostname {
        sys::set_hostname(name).attempt(|| format!("set the hostname {}", quote(name)))?;
    }
    if let Some(name) = &setup.domainname {
        sys::set_domainname(name).attempt(|| format!("set the domain name {}", quote(name)))?;
    }
    if let Some(procfs) = &procfs {
        write_sysctls(procfs, &setup.sysctls)?;
    }

    mounts::make_read_only(&root, &setup.readonly_paths)?;
    mounts::mask(&root, &setup.masked_paths)?;
    mounter.finish()?;
    if let Some(flags) = setup.root_propagation {
        // Not of what lies on it: each bind mount has come with its own.
        sys::set_root_propagation(flags & !libc::MS_REC)
            .attempt(|| "set the root's propagation")?;
    }
    if setup.root_readonly {
        // Last: everything above may create what is missing.
        let fd = root.open_at("/", libc::O_PATH).attempt(|| "open the container's root")?;
        sys::change_mount(fd.as_fd(), sys::attr::RDONLY, 0, false)
            .attempt(|| "make the root read-only")?;
    }
    streams.report_ready(channel)?;
    Ok((setup, root, procfs))
}

/// The moment for which the specification has three kinds of hooks: all mounts are there, and
/// nothing is read-only or masked yet. The shim runs those of the host first.
fn hooks_of_creation(channel: &Channel, setup: &ContainerSetup) -> Result<()> {
    channel.send(&Reply::Mounted, &[])?;
    let (Request::Finish, mut fds) = channel.receive()? else {
        return Err(Error::Protocol("expected Finish"));
    };
    match (setup.create_container.hooks.is_empty(), fds.pop()) {
        (true, None) => Ok(()),
        (false, Some(host)) => {
            oci_hooks::create_container(&setup.create_container, &setup.rootfs, host)
        }
        _ => Err(Error::Protocol("expected the host's tree for createContainer hooks only")),
    }
}

/// [`Request::Container`] with its descriptors.
struct Received {
    setup: ContainerSetup,
    time_namespace: Option<OwnedFd>,
    stdio: Vec<OwnedFd>,
}

fn receive_setup(channel: &Channel) -> Result<Received> {
    let (request, fds) = channel.receive()?;
    let Request::Container { stdio } = request else {
        return Err(Error::Protocol("expected Container"));
    };
    let mut fds = fds.into_iter();
    let setup: ContainerSetup =
        read_setup(fds.next().ok_or(Error::Protocol("the setup is missing"))?)?;
    let time_namespace = match setup.time_namespace {
        TimeNamespace::Join => {
            Some(fds.next().ok_or(Error::Protocol("the time namespace is missing"))?)
        }
        TimeNamespace::Host | TimeNamespace::New { .. } => None,
    };
    let stdio_fds: Vec<OwnedFd> = fds.collect();
    if stdio_fds.len() != if stdio { 3 } else { 0 } {
        return Err(Error::Protocol("expected three stdio descriptors"));
    }
    Ok(Received { setup, time_namespace, stdio: stdio_fds })
}

fn enter_time_namespace(kind: &TimeNamespace, given: Option<OwnedFd>) -> Result<()> {
    let namespace = match (kind, given) {
        (TimeNamespace::Host, _) => return Ok(()),
        (TimeNamespace::Join, given) => {
            given.ok_or(Error::Protocol("the time namespace is missing"))?
        }
        (TimeNamespace::New { offsets }, _) => {
            sys::new_time_namespace().attempt(|| "create a time namespace")?;
            let proc = process::private_procfs()?;
            if !offsets.is_empty() {
                process::write_at(&proc, c"self/timens_offsets", offsets)
                    .attempt(|| format!("set the clock offsets {}", quote(offsets)))?;
            }
            let flags = libc::O_RDONLY;
            sys::openat(proc.as_fd(), c"self/ns/time_for_children", flags, 0)
                .attempt(|| "open the new time namespace")?
        }
    };
    sys::enter_time_namespace(namespace.as_fd()).attempt(|| "enter the time namespace")
}

/// Removes what LXC mounted for us: the scratch tmpfs on `/dev` with the socket directory and this
/// program in it. What is created from now on lies in the container's own file systems.
///
/// liblxc leaves every mount shared; without the first step a mount of the container could
/// propagate to a clone of the same tree.
fn remove_traces() -> Result<()> {
    sys::set_root_propagation(libc::MS_REC | libc::MS_PRIVATE)
        .attempt(|| "make the mounts private")?;
    // Lazily: this program runs from there until it executes the workload.
    sys::detach_mount(c"/dev").attempt(|| "remove the helper's mount from \"/dev\"")?;
    sys::chdir(c"/").attempt(|| "enter the container's root")?;
    // liblxc makes a missing /proc with mode 0, and the image's diff would show it.
    let proc =
        sys::openat(sys::cwd(), c"/proc", libc::O_RDONLY | libc::O_NOFOLLOW | libc::O_DIRECTORY, 0);
    if let Ok(proc) = proc
        && sys::fstat(proc.as_fd()).is_ok_and(|s| s.st_mode & 0o7777 == 0)
    {
        sys::fchmod(proc.as_fd(), 0o755).attempt(|| "set the mode of \"/proc\"")?;
    }
    Ok(())
}

fn make_device(root: &Root, device: &Device) -> Result<()> {
    let action = || format!("create device {}", quote(&device.path));
    let (directory, name) = root.parent(&device.path).attempt(action)?;
    let number = sys::device(device.major, device.minor);
    match sys::mknodat(directory.as_fd(), &name, device.mode, number) {
        Ok(()) if (device.uid, device.gid) == (0, 0) => Ok(()),
        Ok(()) => sys::lchownat(directory.as_fd(), &name, device.uid, device.gid).attempt(action),
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            let found = sys::lstatat(directory.as_fd(), &name).attempt(action)?;
            let kind = device.mode & libc::S_IFMT;
            if found.st_mode & libc::S_IFMT == kind
                && (kind == libc::S_IFIFO || found.st_rdev == number)
            {
                return Ok(());
            }
            Err(Error::Refused {
                object: quote(&device.path),
                reason: "exists and is not the device it should be",
            })
        }
        Err(e) => Err(e).attempt(action),
    }
}

/// What exists stays, as with runc; except `/dev/ptmx`, which must be the container's own devpts
/// and nothing that the image brought.
fn make_link(root: &Root, from: &str, to: &str) -> Result<()> {
    let action = || format!("create link {}", quote(to));
    let (directory, name) = root.parent(to).attempt(action)?;
    let text = sys::c_string(from).attempt(action)?;
    let made = match sys::symlinkat(&text, directory.as_fd(), &name) {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            if crate::rootfs::clean(to) != "/dev/ptmx" {
                return Ok(());
            }
            sys::unlinkat(directory.as_fd(), &name)
                .and_then(|()| sys::symlinkat(&text, directory.as_fd(), &name))
        }
        other => other,
    };
    made.attempt(action)
}

/// A missing working directory is created, as runc does.
fn make_cwd(root: &Root, cwd: &str) -> Result<()> {
    root.target(cwd, Kind::Directory).map(drop).attempt(|| format!("mkdir {cwd}"))
}

pub(crate) fn write_sysctls(procfs: &OwnedFd, sysctls: &[(String, String)]) -> Result<()> {
    for (key, value) in sysctls {
        let action = || format!("set sysctl {} to {}", quote(key), quote(value));
        let path = sysctl_path(key)
            .ok_or_else(|| Error::Refused { object: quote(key), reason: "is no sysctl" })?;
        sys::c_string(path)
            .and_then(|path| process::write_at(procfs, &path, value))
            .attempt(action)?;
    }
    Ok(())
}

/// The file of a sysctl, relative to procfs. As in `sysctl(8)`, the first separator decides: in
/// `net.ipv4.conf.eth0/1.forwarding` the slash stands for a dot in a name, in
/// `net/ipv4/conf/eth0.1/forwarding` the dot is one.
fn sysctl_path(key: &str) -> Option<String> {
    let dotted = match key.find(['.', '/']) {
        Some(at) => key.as_bytes()[at] == b'.',
        None => false,
    };
    let path: String = key
        .chars()
        .map(|c| match c {
            '.' if dotted => '/',
            '/' if dotted => '.',
            c => c,
        })
        .collect();
    let valid =
        path.split('/').all(|part| !matches!(part, "" | "." | "..") && !part.contains('\0'));
    valid.then(|| format!("sys/{path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctl_keys_become_paths_like_sysctl_8() {
        let table = [
            ("net.ipv4.ip_forward", Some("sys/net/ipv4/ip_forward")),
            ("net/ipv4/ip_forward", Some("sys/net/ipv4/ip_forward")),
            ("net.ipv4.conf.eth0/1.mtu", Some("sys/net/ipv4/conf/eth0.1/mtu")),
            ("net/ipv4/conf/eth0.1/mtu", Some("sys/net/ipv4/conf/eth0.1/mtu")),
            ("kernel", Some("sys/kernel")),
            ("", None),
            ("/etc/passwd", None),
            ("net/../../x", None),
            ("net.//.x", None),
            ("net..x", None),
            (".net", None),
        ];
        for (key, path) in table {
            assert_eq!(sysctl_path(key).as_deref(), path, "{key}");
        }
    }
}
