//! [`Plan`] to `lxc.conf`: the file that the CT's Proxmox configuration includes.
//!
//! An include comes last, so it can clear what Proxmox and the distribution's common file set. It
//! does so for everything that would change the process: hooks, capabilities, seccomp, mounts and
//! the environment are init's work (see the crate `proxmox-shim-init`). Limits are not here either,
//! because an update changes them while the CT runs; the shim writes them to the cgroup's files.
//! Device rules are, because on cgroup2 they are a program that LXC must attach.
//!
//! Every line is root's on the node, so all text goes through one writer, which refuses what LXC's
//! parser could take for another line or another word. Syntax and meaning of the keys:
//! lxc.container.conf(5).

use std::fmt::Write;
use std::path::{Path, PathBuf};

use proxmox_shim_init::protocol::{BINARY_NAME, CT_DIR, CT_PROC_DIR};

use crate::lxc::device_access::{self, DeviceAccess};
use crate::oci::Cgroups;
use crate::oci::plan::{DeviceRule, Namespace, Plan, UserNamespace};

/// The socket directory's name in a run directory.
pub const CTL_DIR: &str = "ctl";
/// The log's name in a run directory.
pub const LOG_NAME: &str = "lxc.log";

/// Where the parts of one CT are on the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    pub vmid: u32,
    /// The mounted root filesystem.
    pub rootfs: PathBuf,
    /// The container's run directory; holds [`CTL_DIR`] and [`LOG_NAME`].
    pub run_dir: PathBuf,
    /// The node's path of init's binary.
    pub init: PathBuf,
    /// The kernel keeps the exit status of PID 1 for others than its parent.
    pub keeps_exit_status: bool,
    pub cgroups: CgroupVersion,
    /// AppArmor is enabled on the node.
    pub apparmor: bool,
}

/// Which of LXC's two families of cgroup keys the node understands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CgroupVersion {
    /// Version 1, or hybrid.
    V1,
    V2,
}

impl From<&Cgroups> for CgroupVersion {
    fn from(cgroups: &Cgroups) -> Self {
        match cgroups {
            Cgroups::V1 { .. } => Self::V1,
            Cgroups::V2 => Self::V2,
        }
    }
}

/// Why no configuration can be written.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// LXC's parser would not give the value back.
    #[error("{value:?} cannot be written as the value of {key}: {reason}")]
    Value { key: &'static str, value: String, reason: &'static str },
    /// A path that is not UTF-8 or not absolute.
    #[error("{} cannot be used by LXC: it must be absolute and UTF-8", path.display())]
    Path { path: PathBuf },
    /// The plan joins a cgroup namespace.
    #[error("LXC cannot join the cgroup namespace {}", path.display())]
    CgroupNamespace { path: PathBuf },
    /// The device rules cannot be kept.
    #[error(transparent)]
    Devices(#[from] device_access::Error),
}

/// Keys that are cleared: what an earlier file sets would act on init, or twice.
const CLEARED: [&str; 31] = [
    "lxc.hook.pre-start",
    "lxc.hook.pre-mount",
    "lxc.hook.mount",
    "lxc.hook.autodev",
    "lxc.hook.start-host",
    "lxc.hook.start",
    "lxc.hook.stop",
    "lxc.hook.post-stop",
    "lxc.hook.clone",
    "lxc.hook.destroy",
    "lxc.cap.drop",
    "lxc.cap.keep",
    "lxc.mount.auto",
    "lxc.mount.entry",
    "lxc.seccomp.profile",
    "lxc.environment",
    "lxc.uts.name",
    "lxc.net",
    "lxc.sysctl",
    "lxc.prlimit",
    "lxc.rootfs.options",
    "lxc.init.cwd",
    "lxc.init.groups",
    "lxc.namespace.keep",
    "lxc.namespace.clone",
    "lxc.namespace.share.net",
    "lxc.namespace.share.ipc",
    "lxc.namespace.share.uts",
    "lxc.namespace.share.pid",
    "lxc.namespace.share.cgroup",
    "lxc.namespace.share.user",
];

/// Writes `lxc.conf`.
///
/// # Errors
/// A path or name of the plan or the layout cannot be expressed in LXC's syntax.
pub fn render(plan: &Plan, layout: &Layout) -> Result<String, Error> {
    let mut config = Config::default();
    for key in CLEARED {
        config.set(key, "")?;
    }
    // The map of a user namespace is in the CT's own file.
    if plan.user_namespace.is_none() {
        config.set("lxc.idmap", "")?;
    }

    // As root of its user namespace and without any confinement, so that init can mount; it
    // confines itself when it executes the workload.
    config.set("lxc.init.uid", "0")?;
    config.set("lxc.init.gid", "0")?;
    config.set("lxc.no_new_privs", "0")?;
    if layout.apparmor {
        config.set("lxc.apparmor.profile", "unconfined")?;
    }

    config.set("lxc.autodev", "0")?;
    config.set("lxc.pty.max", "0")?;
    config.set("lxc.tty.max", "0")?;
    config.set("lxc.console.path", "none")?;
    config.set("lxc.rootfs.path", &format!("dir:{}", absolute(&layout.rootfs)?))?;

    // Init and its socket lie on a scratch /dev, so that nothing of them reaches the snapshot;
    // init removes all of it.
    config.set("lxc.mount.entry", "none dev tmpfs nosuid,mode=755,size=64k,create=dir 0 0")?;
    let directory = CT_DIR.trim_start_matches('/');
    let ctl = mount_field(absolute(&layout.run_dir.join(CTL_DIR))?);
    config.set("lxc.mount.entry", &format!("{ctl} {directory} none bind,create=dir 0 0"))?;
    let binary = mount_field(absolute(&layout.init)?);
    config.set(
        "lxc.mount.entry",
        &format!("{binary} {directory}/{BINARY_NAME} none bind,ro,create=file 0 0"),
    )?;
    if plan.user_namespace.is_some() && plan.namespaces.pid != Namespace::Host {
        // In a user namespace a new procfs can be mounted only as long as another one can be seen
        // completely. Init's come when the node's is out of sight.
        let directory = CT_PROC_DIR.trim_start_matches('/');
        let entry = format!("proc {directory} proc nosuid,nodev,noexec,create=dir,optional 0 0");
        config.set("lxc.mount.entry", &entry)?;
    }
    config.set("lxc.init.cmd", &format!("{CT_DIR}/{BINARY_NAME} init"))?;
    // Used by an orderly stop from Proxmox; LXC's own choice means nothing to an application.
    config.set("lxc.signal.halt", "SIGTERM")?;

    // LXC gives these to a shell, with `exec` before them.
    let init = shell_path(absolute(&layout.init)?);
    let run_dir = shell_path(absolute(&layout.run_dir)?);
    config.set("lxc.hook.version", "1")?;
    if !layout.keeps_exit_status || plan.may_reboot() {
        config.set("lxc.hook.start-host", &format!("{init} hook start-host {run_dir}"))?;
    }
    config.set("lxc.hook.stop", &format!("{init} hook stop {run_dir}"))?;
    config.set("lxc.hook.post-stop", &format!("{init} hook post-stop"))?;

    namespaces(&mut config, plan)?;
    cgroup(&mut config, plan, layout.vmid)?;
    devices(&mut config, &plan.device_rules, layout.cgroups)?;

    // One source of the exit status where the kernel keeps none: see init's hook mode.
    config.set("lxc.log.level", "INFO")?;
    config.set("lxc.log.file", absolute(&layout.run_dir.join(LOG_NAME))?)?;
    Ok(config.text)
}

fn namespaces(config: &mut Config, plan: &Plan) -> Result<(), Error> {
    let namespaces = [
        ("net", "lxc.namespace.share.net", &plan.namespaces.network),
        ("ipc", "lxc.namespace.share.ipc", &plan.namespaces.ipc),
        ("uts", "lxc.namespace.share.uts", &plan.namespaces.uts),
        ("pid", "lxc.namespace.share.pid", &plan.namespaces.pid),
        ("cgroup", "", &plan.namespaces.cgroup),
    ];
    // LXC reads `lxc.namespace.share.cgroup` and makes a new one all the same (measured with 5.0).
    if let Namespace::Path(path) = &plan.namespaces.cgroup {
        return Err(Error::CgroupNamespace { path: path.clone() });
    }
    // As soon as the list is there, LXC makes a new one of every kind that is not in it, among
    // them a user namespace without a mapping and a time namespace.
    let mut keep = vec!["time"];
    match &plan.user_namespace {
        None => keep.insert(0, "user"),
        // LXC needs the map, which is in the CT's own file, also for one that it joins: it becomes
        // root of it.
        Some(UserNamespace { path: Some(path), .. }) => {
            config.set("lxc.namespace.share.user", absolute(path)?)?;
        }
        Some(UserNamespace { path: None, .. }) => {}
    }
    for (kind, _, namespace) in namespaces {
        if *namespace == Namespace::Host {
            keep.push(kind);
        }
    }
    config.set("lxc.namespace.keep", &keep.join(" "))?;
    for (_, key, namespace) in namespaces {
        if let Namespace::Path(path) = namespace {
            config.set(key, absolute(path)?)?;
        }
    }
    Ok(())
}

/// The CT's cgroup and that of its lxc-start, relative to each hierarchy's root.
#[must_use]
pub fn cgroups(plan: &Plan, vmid: u32) -> [String; 2] {
    let container = plan.cgroups_path.clone().unwrap_or_else(|| format!("lxc/{vmid}"));
    [container, format!("lxc.monitor/{vmid}")]
}

/// The limits are on the container's directory and its processes in a directory below it, which
/// is the root of its cgroup namespace: it cannot change its own limits.
fn cgroup(config: &mut Config, plan: &Plan, vmid: u32) -> Result<(), Error> {
    let [container, monitor] = cgroups(plan, vmid);
    let container = container.as_str();
    if container.starts_with('/') || container.split('/').any(|part| part == "..") {
        return Err(Error::Value {
            key: "lxc.cgroup.dir.container",
            value: container.to_owned(),
            reason: "it must be relative to the cgroup hierarchy",
        });
    }
    // LXC's three keys belong together. The monitor stays where Proxmox puts it, outside of the
    // container's accounting.
    config.set("lxc.cgroup.relative", "0")?;
    config.set("lxc.cgroup.dir.monitor", &monitor)?;
    config.set("lxc.cgroup.dir.container", container)?;
    config.set("lxc.cgroup.dir.container.inner", "ns")
}

/// Only the node's own family of keys is written: LXC 7 does not know the one of cgroup v1 any more.
fn devices(config: &mut Config, rules: &[DeviceRule], version: CgroupVersion) -> Result<(), Error> {
    let (allow, deny) = match version {
        CgroupVersion::V1 => ("lxc.cgroup.devices.allow", "lxc.cgroup.devices.deny"),
        CgroupVersion::V2 => ("lxc.cgroup2.devices.allow", "lxc.cgroup2.devices.deny"),
    };
    config.set(allow, "")?;
    config.set(deny, "")?;
    let DeviceAccess { allows_all, exceptions } = DeviceAccess::of(rules, version)?;
    let (default, except) = if allows_all { (allow, deny) } else { (deny, allow) };
    config.set(default, "a")?;
    for exception in exceptions {
        config.set(except, &format!("{} {}", exception.devices(), exception.access))?;
    }
    Ok(())
}

/// The only place that makes lines.
#[derive(Default)]
struct Config {
    text: String,
}

impl Config {
    fn set(&mut self, key: &'static str, value: &str) -> Result<(), Error> {
        let refuse = |reason| Err(Error::Value { key, value: value.to_owned(), reason });
        if value.chars().any(char::is_control) {
            return refuse("it contains control characters");
        }
        if value.trim() != value {
            return refuse("LXC would cut off the white space around it");
        }
        if value.starts_with(['\'', '"']) {
            return refuse("LXC would strip the quotes around it");
        }
        match value {
            "" => writeln!(self.text, "{key} ="),
            _ => writeln!(self.text, "{key} = {value}"),
        }
        .unwrap_or_else(|_| unreachable!("writing to a string cannot fail"));
        Ok(())
    }
}

fn absolute(path: &Path) -> Result<&str, Error> {
    match path.to_str().filter(|_| path.is_absolute()) {
        Some(path) => Ok(path),
        None => Err(Error::Path { path: path.to_owned() }),
    }
}

/// A field of a line of fstab(5), which getmntent(3) splits at blanks and unescapes. Control
/// characters are left for the writer to refuse.
fn mount_field(text: &str) -> String {
    text.replace('\\', "\\134").replace(' ', "\\040")
}

/// An absolute path as one word for sh(1). The quotes start after the slash, because LXC's parser
/// strips a pair of them around a whole value.
fn shell_path(path: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%".contains(c);
    match path.strip_prefix('/').filter(|rest| !rest.chars().all(plain)) {
        Some(rest) => format!("/'{}'", rest.replace('\'', "'\\''")),
        None => path.to_owned(),
    }
}

#[cfg(test)]
mod tests;
