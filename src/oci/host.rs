//! What of the host decides how a specification is translated.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use proxmox_shim_init::protocol::CgroupHierarchy;

/// Facts about the node, so that the translation itself is a pure function.
#[derive(Debug, Clone)]
pub struct Host {
    /// What is mounted below `/sys/fs/cgroup`.
    pub cgroups: Cgroups,
    /// The AppArmor security module is enabled.
    pub apparmor: bool,
    /// Whether an AppArmor profile is known not to be loaded.
    pub lacks_profile: fn(name: &str) -> bool,
    /// The highest capability the kernel knows (`cap_last_cap`).
    pub last_capability: u32,
    /// Containers whose specification has no user namespace get that of Proxmox's unprivileged CTs.
    pub unprivileged: bool,
    /// `/proc/kcore` exists, so `/dev/core` gets a link.
    pub kcore: bool,
    /// Whether a path names the shim's own namespace of a kind (a name in `/proc/self/ns`): a
    /// container that joins that one by path shares it with the host.
    pub is_own_namespace: fn(kind: &str, path: &Path) -> bool,
}

/// The host's cgroup layout.
#[derive(Debug, Clone, PartialEq)]
pub enum Cgroups {
    /// Version 1, or hybrid.
    V1 { hierarchies: Vec<CgroupHierarchy> },
    /// cgroup2 alone.
    V2,
}

impl Host {
    /// Asks the running kernel.
    ///
    /// # Errors
    /// `/proc` is not readable or holds no number where one belongs.
    pub fn probe() -> io::Result<Self> {
        let last_capability = std::fs::read_to_string("/proc/sys/kernel/cap_last_cap")?;
        Ok(Self {
            cgroups: Cgroups::from_mountinfo(&std::fs::read_to_string("/proc/self/mountinfo")?),
            apparmor: std::fs::read("/sys/module/apparmor/parameters/enabled")
                .is_ok_and(|enabled| enabled.starts_with(b"Y")),
            lacks_profile,
            last_capability: last_capability.trim().parse().map_err(io::Error::other)?,
            unprivileged: false,
            kcore: Path::new("/proc/kcore").exists(),
            is_own_namespace,
        })
    }

    /// Keeps [placeholders](is_placeholder) apart from the host's namespaces, which they look like.
    #[must_use]
    pub(super) fn with_placeholders(self) -> Self {
        let is_own_namespace =
            |kind: &str, path: &Path| !is_placeholder(path) && is_own_namespace(kind, path);
        Self { is_own_namespace, ..self }
    }

    pub(super) fn is_cgroup2(&self) -> bool {
        self.cgroups == Cgroups::V2
    }
}

impl Cgroups {
    /// Reads `/proc/<pid>/mountinfo` as proc(5) describes it.
    #[must_use]
    pub fn from_mountinfo(mountinfo: &str) -> Self {
        const ROOT: &str = "/sys/fs/cgroup";
        let mut hierarchies: Vec<CgroupHierarchy> = Vec::new();
        for line in mountinfo.lines() {
            let Some((mount, filesystem)) = line.split_once(" - ") else { continue };
            let Some(point) = mount.split(' ').nth(4) else { continue };
            let mut filesystem = filesystem.split(' ');
            let (fstype, options) = (filesystem.next(), filesystem.nth(1).unwrap_or_default());
            match fstype {
                Some("cgroup2") if point == ROOT => return Self::V2,
                Some(fstype @ ("cgroup" | "cgroup2")) => {
                    let Some(name) = point.strip_prefix(ROOT).and_then(|p| p.strip_prefix('/'))
                    else {
                        continue;
                    };
                    // A path below is a bind mount of a part, not a hierarchy.
                    if name.contains('/') || hierarchies.iter().any(|h| h.name == name) {
                        continue;
                    }
                    let unified = fstype == "cgroup2";
                    hierarchies.push(CgroupHierarchy {
                        name: name.to_owned(),
                        options: if unified { String::new() } else { v1_options(options) },
                        unified,
                    });
                }
                _ => {}
            }
        }
        Self::V1 { hierarchies }
    }
}

/// The options that select the hierarchy at mount(2): controllers, or `none,name=…`.
fn v1_options(super_options: &str) -> String {
    let selecting: Vec<&str> = super_options
        .split(',')
        .filter(|option| {
            !matches!(*option, "rw" | "ro" | "xattr" | "noprefix" | "clone_children")
                && !option.starts_with("release_agent=")
                && !option.starts_with("cpuset_")
        })
        .collect();
    match selecting.iter().all(|option| option.starts_with("name=")) {
        true => format!("none,{}", selecting.join(",")),
        false => selecting.join(","),
    }
}

/// Whether a path stands for the namespace of a pod sandbox whose pid the client does not know.
#[must_use]
pub fn is_placeholder(path: &Path) -> bool {
    path.parent() == Some(Path::new("/proc/1/ns"))
}

/// Without the list, which only root sees and only where securityfs is mounted, the kernel tells at the
/// start.
fn lacks_profile(name: &str) -> bool {
    std::fs::read_to_string("/sys/kernel/security/apparmor/profiles")
        .is_ok_and(|loaded| !is_loaded(&loaded, name))
}

/// Reads the list of the loaded profiles: one a line, followed by its mode.
fn is_loaded(loaded: &str, name: &str) -> bool {
    // Not in the list: what confines nothing, several profiles at once, and those of a namespace.
    name == "unconfined"
        || name.starts_with([':', '&'])
        || name.contains("//&")
        || loaded.lines().any(|line| line.rsplit_once(" (").is_some_and(|(found, _)| found == name))
}

fn is_own_namespace(kind: &str, path: &Path) -> bool {
    let own = std::fs::metadata(Path::new("/proc/self/ns").join(kind));
    match (own, std::fs::metadata(path)) {
        (Ok(own), Ok(other)) => (own.dev(), own.ino()) == (other.dev(), other.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup2_alone() {
        let mounts =
            "25 1 0:22 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(Cgroups::from_mountinfo(mounts), Cgroups::V2);
    }

    #[test]
    fn hybrid_with_joint_and_named_hierarchies() {
        let mounts = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:3 - cgroup cgroup rw,cpu,cpuacct
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,release_agent=/x,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
42 31 0:29 /a /sys/fs/cgroup/cpu,cpuacct/a rw,relatime - cgroup cgroup rw,cpu,cpuacct
99 31 0:29 / /var/lib/other/cgroup rw,relatime - cgroup cgroup rw,cpu,cpuacct
";
        let hierarchy = |name: &str, options: &str, unified| CgroupHierarchy {
            name: name.to_owned(),
            options: options.to_owned(),
            unified,
        };
        assert_eq!(
            Cgroups::from_mountinfo(mounts),
            Cgroups::V1 {
                hierarchies: vec![
                    hierarchy("cpu,cpuacct", "cpu,cpuacct", false),
                    hierarchy("systemd", "none,name=systemd", false),
                    hierarchy("unified", "", true),
                ]
            }
        );
    }

    #[test]
    fn profiles_are_found_in_the_kernels_list() {
        let loaded = "a (b) (complain)\n/usr/bin/lxc-start (enforce)\nlxc//child (unconfined)\n";
        for name in ["a (b)", "/usr/bin/lxc-start", "lxc//child"] {
            assert!(is_loaded(loaded, name), "{name}");
        }
        for name in ["unconfined", ":ns:a", "&a", "a//&b"] {
            assert!(is_loaded(loaded, name), "{name} cannot be looked up");
        }
        for name in ["a", "lxc", "/usr/bin/lxc-start (enforce)", ""] {
            assert!(!is_loaded(loaded, name), "{name}");
        }
    }

    #[test]
    fn own_namespaces_are_recognised() {
        assert!(is_own_namespace("net", Path::new("/proc/self/ns/net")));
        assert!(!is_own_namespace("net", Path::new("/proc/self/ns/uts")));
        assert!(!is_own_namespace("net", Path::new("/nonexistent")));
    }

    #[test]
    fn probe_works_on_this_machine() {
        let host = Host::probe().unwrap();
        assert!(host.last_capability >= 40);
    }
}
