//! The cgroups of CTs, on pure cgroup2 and on hosts with version 1 hierarchies.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use crate::generate::Limits;
use crate::sys;

/// Names that liblxc makes at the root of each hierarchy.
const PARENTS: [&str; 3] = ["lxc", "lxc.monitor", "lxc.pivot"];

/// One mounted cgroup hierarchy.
#[derive(Debug, Clone)]
struct Hierarchy {
    /// Where it is mounted.
    mount: PathBuf,
    /// Directory below which liblxc puts its cgroups.
    base: PathBuf,
    /// Controllers of version 1; `None` for version 2.
    v1: Option<Vec<String>>,
    /// Those of [`PARENTS`] that were there before the simulator.
    existing: Vec<&'static str>,
}

/// All mounted hierarchies.
#[derive(Debug, Clone)]
pub struct Cgroups(Vec<Hierarchy>);

impl Cgroups {
    /// Finds the hierarchies of this host.
    pub fn discover() -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let own = fs::read_to_string("/proc/1/cgroup").unwrap_or_default();
        Self(find(&mounts, &own))
    }

    /// The directories below which liblxc puts its cgroups.
    pub fn bases(&self) -> impl Iterator<Item = &Path> {
        self.0.iter().map(|h| h.base.as_path())
    }

    /// The controllers that cgroup2 has.
    pub fn v2_controllers(&self) -> Vec<String> {
        self.0
            .iter()
            .filter(|h| h.v1.is_none())
            .filter_map(|h| fs::read_to_string(h.base.join("cgroup.controllers")).ok())
            .flat_map(|t| t.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
            .collect()
    }

    /// The directory with the limits of the CT whose init is `pid`, for a controller, and whether it
    /// is version 2. Proxmox asks LXC for it, because an include may have put it anywhere; the
    /// kernel knows it too. `None` if the CT or the controller does not exist.
    fn dir(&self, pid: u32, controller: &str, probe: &str) -> Option<(PathBuf, bool)> {
        let v1 = self
            .0
            .iter()
            .find(|h| h.v1.as_ref().is_some_and(|list| list.iter().any(|c| c == controller)));
        let hierarchy = v1.or_else(|| self.0.iter().find(|h| h.v1.is_none()))?;
        let v2 = hierarchy.v1.is_none();
        let membership = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        let path = limit_cgroup(&membership, if v2 { "" } else { controller })?;
        let dir = hierarchy.mount.join(path);
        // Without its controller a cgroup2 directory lacks the files.
        (dir.is_dir() && (!v2 || dir.join(probe).exists())).then_some((dir, v2))
    }

    /// Bytes of memory that a CT uses.
    pub fn memory_usage(&self, pid: u32) -> Option<u64> {
        let (dir, v2) = self.dir(pid, "memory", "memory.current")?;
        let file = if v2 { "memory.current" } else { "memory.usage_in_bytes" };
        fs::read_to_string(dir.join(file)).ok()?.trim().parse().ok()
    }

    /// CPU time that a CT has used.
    pub fn cpu_usage(&self, pid: u32) -> Option<Duration> {
        let (dir, v2) = self.dir(pid, "cpuacct", "cpu.stat")?;
        if !v2 {
            let text = fs::read_to_string(dir.join("cpuacct.usage")).ok()?;
            return text.trim().parse().ok().map(Duration::from_nanos);
        }
        let text = fs::read_to_string(dir.join("cpu.stat")).ok()?;
        let usec = text.lines().find_map(|l| l.strip_prefix("usage_usec "))?;
        usec.trim().parse().ok().map(Duration::from_micros)
    }

    /// Sets memory and swap of a running CT.
    pub fn set_memory(&self, pid: u32, limits: &Limits) -> io::Result<()> {
        let (dir, v2) = self.dir(pid, "memory", "memory.max").ok_or_else(not_running)?;
        if v2 {
            let write = |file: &str, value: i64| fs::write(dir.join(file), value.to_string());
            write("memory.swap.max", limits.swap)?;
            write("memory.max", limits.memory)?;
            return write("memory.high", limits.memory_high());
        }
        let limit = dir.join("memory.limit_in_bytes");
        let both = dir.join("memory.memsw.limit_in_bytes");
        let total = limits.memory.saturating_add(limits.swap);
        if !both.exists() {
            return fs::write(limit, limits.memory.to_string());
        }
        // The sum must never be below the memory, so the order depends on the direction.
        if fs::write(&both, total.to_string()).is_ok() {
            fs::write(&limit, limits.memory.to_string())
        } else {
            fs::write(&limit, limits.memory.to_string())?;
            fs::write(&both, total.to_string())
        }
    }

    /// Sets CPU time and weight of a running CT.
    pub fn set_cpu(&self, pid: u32, limits: &Limits) -> io::Result<()> {
        let (dir, v2) = self.dir(pid, "cpu", "cpu.max").ok_or_else(not_running)?;
        if v2 {
            fs::write(dir.join("cpu.max"), limits.cpu_max())?;
            return fs::write(dir.join("cpu.weight"), limits.cpu_weight().to_string());
        }
        let quota = limits.cpulimit.map_or(-1, |n| (n * 100_000.0) as i64);
        if dir.join("cpu.cfs_quota_us").exists() {
            fs::write(dir.join("cpu.cfs_period_us"), "100000")?;
            fs::write(dir.join("cpu.cfs_quota_us"), quota.to_string())?;
        }
        let shares = limits.cpuunits.unwrap_or(1024).clamp(2, 262_144);
        fs::write(dir.join("cpu.shares"), shares.to_string())
    }

    /// Kills whatever is left in a CT's cgroups and removes them. Cheap if there are none.
    pub fn remove(&self, vmid: u32) {
        for hierarchy in &self.0 {
            for parent in PARENTS {
                let dir = hierarchy.base.join(parent).join(vmid.to_string());
                if dir.is_dir() {
                    remove_tree(&dir);
                }
            }
        }
    }

    /// Removes the empty parents that appeared since the start.
    pub fn remove_parents(&self) {
        for hierarchy in &self.0 {
            for parent in PARENTS.iter().filter(|p| !hierarchy.existing.contains(p)) {
                // Not empty means that somebody else uses it.
                let _ = fs::remove_dir(hierarchy.base.join(parent));
            }
        }
    }
}

/// The cgroup with the limits, relative to its mount, from the text of `/proc/<init>/cgroup`: the
/// parent of the `ns` in which init is.
fn limit_cgroup<'a>(membership: &'a str, controller: &str) -> Option<&'a str> {
    let path = membership.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (names, path) = (fields.next()?, fields.next()?);
        names.split(',').any(|name| name == controller).then_some(path)
    })?;
    Some(path.strip_suffix("/ns").unwrap_or(path).trim_start_matches('/'))
}

fn not_running() -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, "container not running")
}

fn find(mounts: &str, own: &str) -> Vec<Hierarchy> {
    let mut list: Vec<Hierarchy> = Vec::new();
    for line in mounts.lines() {
        let mut fields = line.split(' ').skip(1);
        let (Some(dir), Some(kind), Some(options)) = (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let own_path = |wanted: &str| {
            own.lines()
                .filter_map(|l| {
                    let mut parts = l.splitn(3, ':').skip(1);
                    Some((parts.next()?, parts.next()?))
                })
                .find(|(names, _)| names.split(',').any(|n| n == wanted))
                .map(|(_, path)| path.trim_start_matches('/').to_owned())
        };
        let (v1, path) = match kind {
            "cgroup2" => (None, own_path("").unwrap_or_default()),
            "cgroup" => {
                let names: Vec<String> = options.split(',').map(str::to_owned).collect();
                let Some(path) = names.iter().find_map(|n| own_path(n)) else { continue };
                (Some(names), path)
            }
            _ => continue,
        };
        // liblxc starts from init's cgroup, but not from systemd's scope for init.
        let path = path.trim_end_matches("init.scope").trim_end_matches('/').to_owned();
        let base = Path::new(dir).join(path);
        if list.iter().any(|h| h.base == base) {
            continue;
        }
        let existing = PARENTS.iter().copied().filter(|p| base.join(p).exists()).collect();
        list.push(Hierarchy { mount: dir.into(), base, v1, existing });
    }
    list
}

/// Kills the processes of a cgroup and removes it with its children.
fn remove_tree(dir: &Path) {
    for attempt in 0..100 {
        kill_all(dir);
        if remove_empty(dir) {
            return;
        }
        // A killed process leaves its cgroup only when it has been reaped.
        thread::sleep(Duration::from_millis(if attempt < 10 { 1 } else { 10 }));
    }
}

fn children(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()).collect()
}

fn kill_all(dir: &Path) {
    // A frozen process of version 1 dies only once it is thawed; cgroup2 kills it anyway.
    let _ = fs::write(dir.join("freezer.state"), "THAWED");
    for pid in fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default().lines() {
        if let Ok(pid) = pid.parse() {
            let _ = sys::kill(pid, libc::SIGKILL);
        }
    }
    children(dir).iter().for_each(|child| kill_all(child));
}

fn remove_empty(dir: &Path) -> bool {
    // All of them, even after the first that stays.
    let done = children(dir).iter().filter(|child| !remove_empty(child)).count() == 0;
    done && (fs::remove_dir(dir).is_ok() || !dir.exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_beside_the_cgroup_of_init() {
        let text = "4:memory:/default/web/ns\n1:cpu,cpuacct:/lxc/100/ns\n0::/kubepods/x/ns\n";
        assert_eq!(limit_cgroup(text, "memory"), Some("default/web"));
        assert_eq!(limit_cgroup(text, "cpuacct"), Some("lxc/100"));
        assert_eq!(limit_cgroup(text, ""), Some("kubepods/x"));
        assert_eq!(limit_cgroup(text, "pids"), None);
    }

    #[test]
    fn finds_both_versions_below_the_cgroup_of_pid_1() {
        let mounts = "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n\
            m /sys/fs/cgroup/memory cgroup rw,nosuid,memory 0 0\n\
            s /sys/fs/cgroup/systemd cgroup rw,xattr,name=systemd 0 0\n\
            t /tmp tmpfs rw 0 0\n";
        let own = "9:name=systemd:/a\n4:memory:/\n0::/init.scope\n";
        let found: Vec<_> = find(mounts, own)
            .into_iter()
            .map(|h| (h.base.display().to_string(), h.v1.is_some()))
            .collect();
        assert_eq!(
            found,
            [
                ("/sys/fs/cgroup/unified/".to_owned(), false),
                ("/sys/fs/cgroup/memory/".to_owned(), true),
                ("/sys/fs/cgroup/systemd/a".to_owned(), true),
            ]
        );
    }
}
