//! What becomes of CTs and of the host around them. Needs root and LXC.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pve_sim::acl::Identity;
use pve_sim::cluster::{Cluster, Options};
use pve_sim::control;
use pve_sim::node::{Node, StartError};
use pve_sim::profile::{Kind, Profile};
use pve_sim::unit::Supervisor;
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio::time::sleep;

const CONF: &str = "arch: amd64\nconsole: 0\nentrypoint: /bin/sleep 1000\nhostname: ct\n\
    memory: 256\nostype: unmanaged\ntty: 0\nlxc.apparmor.profile: unconfined\n";

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn options(root: &Path, node: &str) -> Options {
    Options {
        root: root.to_owned(),
        nodes: vec![node.to_owned()],
        addresses: Vec::new(),
        profile: Profile { kind: Kind::Instant, scale: 0.02 },
        supervisor: Supervisor::Simulator,
    }
}

fn open(root: &Path) -> Arc<Cluster> {
    // A child of another test that has not executed its program yet still has the lock of the last one.
    for _ in 0..100 {
        match Cluster::open(&options(root, "pve1")) {
            Err(StartError::InUse(_)) => std::thread::sleep(Duration::from_millis(20)),
            result => return result.unwrap(),
        }
    }
    panic!("{} stays in use", root.display());
}

/// A VMID of this process's own, as all CTs of a host share the cgroup tree.
fn vmid(n: u32) -> u32 {
    800_000_000 + std::process::id() % 100_000 * 1000 + n
}

fn require_cts() {
    let ok = fs::metadata("/root").is_ok()
        && fs::read_dir("/proc/1/fd").is_ok()
        && Path::new("/bin/busybox").exists()
        && Path::new("/usr/bin/lxc-start").exists();
    assert!(ok, "needs root, lxc-start and busybox: `make test` installs them");
}

fn write_ct(dir: &Path, node: &Node, vmid: u32) {
    let rootfs = dir.join("rootfs");
    if !rootfs.exists() {
        for name in ["bin", "dev", "proc", "sys"] {
            fs::create_dir_all(rootfs.join(name)).unwrap();
        }
        fs::copy("/bin/busybox", rootfs.join("bin/busybox")).unwrap();
        symlink("busybox", rootfs.join("bin/sleep")).unwrap();
    }
    let conf = format!("{CONF}rootfs: {}\n", rootfs.display());
    fs::write(node.paths.confs.join(format!("{vmid}.conf")), conf).unwrap();
}

/// Runs a start task, and returns how it ended.
async fn start_status(node: &Arc<Node>, vmid: u32) -> String {
    let who = Identity::token("root@pam", "t", false);
    let this = node.clone();
    let upid = node.tasks.spawn("pve1", "vzstart", &vmid.to_string(), &who, |task| {
        this.start_ct(task, vmid, false, Instant::now())
    });
    let task = node.tasks.get(&upid).unwrap();
    while !task.ended() {
        sleep(Duration::from_millis(2)).await;
    }
    task.status()["exitstatus"].as_str().unwrap().to_owned()
}

/// Starts a CT and returns the pid of its lxc-start.
async fn start(node: &Arc<Node>, vmid: u32) -> u32 {
    assert_eq!(start_status(node, vmid).await, "OK");
    let text = fs::read_to_string(node.paths.units.join(vmid.to_string())).unwrap();
    text.split(' ').next().unwrap().parse().unwrap()
}

fn alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

fn cgroups(vmid: u32) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let dirs = mounts.lines().filter_map(|l| {
        let mut fields = l.split(' ');
        let (dir, kind) = (fields.nth(1)?, fields.next()?);
        kind.starts_with("cgroup").then(|| PathBuf::from(dir))
    });
    dirs.flat_map(|d| ["lxc", "lxc.monitor"].map(|p| d.join(p).join(vmid.to_string())))
        .filter(|d| d.exists())
        .collect()
}

#[test]
fn what_a_killed_simulator_left_behind_is_ended_by_the_next() {
    require_cts();
    let dir = tempfile::tempdir().unwrap();
    let (root, vmid) = (dir.path().join("node"), vmid(1));
    let first = runtime();
    let node = {
        let _guard = first.enter();
        open(&root)
    };
    write_ct(dir.path(), node.first(), vmid);
    let pid = first.block_on(start(node.first(), vmid));
    drop(node);
    // Nothing is told to anybody, as if the process had been killed.
    first.shutdown_timeout(Duration::from_secs(1));
    assert!(alive(pid));
    assert!(!cgroups(vmid).is_empty());

    let second = runtime();
    second.block_on(async {
        let node = open(&root);
        for _ in 0..200 {
            if !alive(pid) {
                break;
            }
            sleep(Duration::from_millis(10)).await;
        }
        assert!(!alive(pid));
        assert_eq!(cgroups(vmid), Vec::<PathBuf>::new());
        start(node.first(), vmid).await;
        node.shut_down().await;
    });
}

#[test]
fn a_ct_runs_like_a_systemd_unit_and_leaves_nothing() {
    require_cts();
    let dir = tempfile::tempdir().unwrap();
    let vmid = vmid(2);
    runtime().block_on(async {
        let node = open(&dir.path().join("node"));
        write_ct(dir.path(), node.first(), vmid);
        let pid = start(node.first(), vmid).await;
        assert!(node.first().is_running(vmid));
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let stat = fs::read_to_string(proc.join("stat")).unwrap();
        let session = stat.rsplit_once(") ").unwrap().1.split(' ').nth(3).unwrap().to_owned();
        assert_eq!(session, pid.to_string());
        let environ = fs::read(proc.join("environ")).unwrap();
        let names: Vec<_> = environ
            .split(|b| *b == 0)
            .filter(|e| !e.is_empty())
            .map(|e| String::from_utf8_lossy(e).split('=').next().unwrap().to_owned())
            .collect();
        assert_eq!(names, ["LANG", "PATH"]);
        for (fd, target) in [("0", "/dev/null"), ("1", "/dev/null")] {
            assert_eq!(fs::read_link(proc.join("fd").join(fd)).unwrap(), Path::new(target));
        }
        assert!(!cgroups(vmid).is_empty());

        let unit = fs::read_to_string(node.first().paths.units.join("lxc-monitord")).unwrap();
        let monitord: u32 = unit.split(' ').next().unwrap().parse().unwrap();
        let fifo = format!("/run/lxc/{}/monitor-fifo", node.first().paths.lxc.display());
        assert!(alive(monitord) && Path::new(&fifo).exists());
        node.shut_down().await;
        assert!(!alive(monitord));
        assert!(!Path::new(&fifo).parent().unwrap().exists());
        assert!(!alive(pid));
        assert!(!node.first().is_running(vmid));
        assert_eq!(cgroups(vmid), Vec::<PathBuf>::new());
        assert_eq!(fs::read_dir(&node.first().paths.units).unwrap().count(), 0);
    });
}

/// Kills the `lxc-start` of a CT, and waits until its unit is inactive.
async fn kill(node: &Node, vmid: u32, pid: u32) {
    pve_sim::sys::kill(pid, 9).unwrap();
    let unit = node.paths.units.join(vmid.to_string());
    for _ in 0..500 {
        if !unit.exists() {
            return;
        }
        sleep(Duration::from_millis(10)).await;
    }
    panic!("the unit is still active");
}

#[test]
fn cgroups_that_a_killed_lxc_start_leaves_are_removed_by_the_stock_hook() {
    require_cts();
    let dir = tempfile::tempdir().unwrap();
    let vmid = vmid(3);
    runtime().block_on(async {
        let cluster = open(&dir.path().join("node"));
        let node = cluster.first();
        write_ct(dir.path(), node, vmid);
        let pid = start(node, vmid).await;
        kill(node, vmid, pid).await;
        assert!(!cgroups(vmid).is_empty(), "somebody else has removed them");
        start(node, vmid).await;
        cluster.shut_down().await;
        assert_eq!(cgroups(vmid), Vec::<PathBuf>::new());
    });
}

#[test]
fn without_the_stock_hook_they_make_the_next_start_fail() {
    require_cts();
    let dir = tempfile::tempdir().unwrap();
    let vmid = vmid(4);
    runtime().block_on(async {
        let cluster = open(&dir.path().join("node"));
        let node = cluster.first();
        write_ct(dir.path(), node, vmid);
        let include = dir.path().join("include.conf");
        let rootfs = dir.path().join("rootfs");
        let keys = format!("lxc.hook.pre-start =\nlxc.rootfs.path = {}\n", rootfs.display());
        fs::write(&include, keys).unwrap();
        let conf = node.paths.confs.join(format!("{vmid}.conf"));
        let text = fs::read_to_string(&conf).unwrap();
        fs::write(&conf, format!("{text}lxc.include: {}\n", include.display())).unwrap();
        let pid = start(node, vmid).await;
        kill(node, vmid, pid).await;
        let status = start_status(node, vmid).await;
        assert_eq!(status, format!("startup for container '{vmid}' failed"));
        cluster.shut_down().await;
        assert_eq!(cgroups(vmid), Vec::<PathBuf>::new());
        start(node, vmid).await;
        cluster.shut_down().await;
    });
}

#[test]
fn a_held_lock_fails_with_the_recorded_text() {
    let dir = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let node = open(&dir.path().join("node"));
        let held = node.first().lock_ct(100).await.unwrap();
        let text = "can't lock file '/run/lock/lxc/pve-config-100.lock' - got timeout";
        assert_eq!(node.first().lock_ct(100).await.unwrap_err(), text);
        node.first().lock_ct(101).await.unwrap();
        drop(held);
        node.first().lock_ct(100).await.unwrap();
    });
}

#[test]
fn a_directory_that_lost_its_quorum_can_be_used_again() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("node");
    runtime().block_on(async {
        let node = open(&root);
        let file = node.first().paths.confs.join("100.conf");
        node.dc.set_quorate(false).unwrap();
        let error = fs::write(&file, "memory: 16\n").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        node.shut_down().await;
        fs::write(&file, "memory: 16\n").unwrap();
        // Killed, or nearly so.
        pve_sim::sys::cover_read_only(&node.dc.pve).unwrap();
        drop(node);
        let node = open(&root);
        fs::remove_file(&file).unwrap();
        node.dc.set_quorate(false).unwrap();
        drop(node);
        fs::remove_dir_all(&root).unwrap();
    });
}

#[test]
fn a_directory_serves_one_simulator_and_keeps_its_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("node");
    let node = open(&root);
    let error = Cluster::open(&options(&root, "pve1")).err().unwrap();
    assert!(error.to_string().contains("in use"), "{error}");
    let token = fs::read_to_string(root.join("shim-token")).unwrap();
    assert!(token.starts_with("containerd@pve!shim=") && token.len() == 57, "{token}");
    drop(node);
    drop(open(&root));
    assert_eq!(fs::read_to_string(root.join("shim-token")).unwrap(), token);
    let error = Cluster::open(&options(&root, "../x")).err().unwrap();
    assert!(error.to_string().contains("host name"), "{error}");
}

#[test]
fn a_ct_runs_from_the_volumes_that_were_made_for_it() {
    require_cts();
    let dir = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let cluster = open(&dir.path().join("node"));
        let node = cluster.first().clone();
        // For the template.
        write_ct(dir.path(), &node, vmid(9));
        node.remove_conf(vmid(9)).unwrap();
        symlink("busybox", dir.path().join("rootfs/bin/sh")).unwrap();
        // No LXC understands all quotes in a command.
        let script = dir.path().join("rootfs/bin/run");
        fs::write(&script, "#!/bin/sh\necho > /data/seen\nexec sleep 1000\n").unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let tar = std::process::Command::new("tar")
            .arg("-czf")
            .arg(node.paths.vz.join("template/cache/t.tar.gz"))
            .arg("-C")
            .arg(dir.path().join("rootfs"))
            .arg(".")
            .status();
        assert!(tar.unwrap().success());
        for (n, rootfs) in [(5, "local:1"), (6, "local:0")] {
            let vmid = vmid(n);
            let call = |method: &str, path: String, params: Value| {
                let call = json!({"method": method, "path": path, "params": params});
                let (cluster, command) = (cluster.clone(), json!({"call": call}).to_string());
                async move { control::command(&cluster, &command).await.unwrap() }
            };
            let params = json!({
                "vmid": vmid.to_string(), "ostemplate": "local:vztmpl/t.tar.gz", "rootfs": rootfs,
                "mp0": "local:0,mp=/data", "ostype": "unmanaged", "arch": "amd64",
                "unprivileged": "0", "console": "0", "tty": "0",
                "entrypoint": "/bin/run",
            });
            let made = call("POST", "/nodes/pve1/lxc".into(), params).await;
            assert_eq!(made["exitstatus"], "OK", "{rootfs}");
            start(&node, vmid).await;
            let volume = format!("images/{vmid}/subvol-{vmid}-disk-1.subvol");
            let seen = node.paths.vz.join(volume).join("seen");
            for _ in 0..500 {
                if seen.exists() {
                    break;
                }
                sleep(Duration::from_millis(10)).await;
            }
            assert!(seen.exists(), "{rootfs}: nothing was written to the mount point");
            let gone =
                call("DELETE", format!("/nodes/pve1/lxc/{vmid}"), json!({"force": "1"})).await;
            assert_eq!(gone["exitstatus"], "OK", "{rootfs}");
            assert!(!node.paths.vz.join("images").join(vmid.to_string()).exists(), "{rootfs}");
        }
        cluster.shut_down().await;
    });
}
