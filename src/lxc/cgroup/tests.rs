use std::fs;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use containerd_shim_protos::cgroups::metrics as v1;
use containerd_shim_protos::cgroups_v2::metrics as v2;
use containerd_shim_protos::protobuf::Message;
use tokio::time::{sleep, timeout};

use super::*;
use crate::oci::plan::{Limit, Resources};

#[test]
fn the_limit_is_right_above_the_last_component() {
    for (cgroup, expected) in [
        ("/lxc/700/ns", Some("/lxc/700")),
        ("/lxc/700/ns/init.scope", None),
        ("/kubepods/burstable/pod1/abc/ns", Some("/kubepods/burstable/pod1/abc")),
        // The client's own "ns": what is above it is not this container's.
        ("/pods/ns/a/ns", Some("/pods/ns/a")),
        ("/lxc/nspawn/ns", Some("/lxc/nspawn")),
        ("/lxc/700/nsx", None),
        ("/ns", None),
        ("/", None),
        ("/system.slice/containerd.service", None),
    ] {
        assert_eq!(split_inner(cgroup), expected, "{cgroup}");
    }
}

#[test]
fn a_process_outside_of_cts_is_refused() {
    let pid = i32::try_from(std::process::id()).unwrap();
    assert!(matches!(Cgroup::of_process(pid), Err(Error::NotInCt { .. })));
    assert!(Cgroup::of_process(i32::MAX).unwrap_err().is_gone());
}

#[test]
fn paths_that_leave_the_hierarchy_are_refused() {
    for path in ["", "/", "/lxc/1", "lxc/../..", "lxc//1", "./x", "a\nb"] {
        assert!(matches!(Cgroup::at(path), Err(Error::BadPath { .. })), "{path:?}");
        assert!(matches!(remove_stale(&[path]), Err(Error::BadPath { .. })), "{path:?}");
    }
}

static COUNT: AtomicU32 = AtomicU32::new(0);

/// Cgroups as liblxc makes them, and the processes in them.
struct Live {
    name: String,
    children: Vec<Child>,
}

impl Live {
    /// `None` where this process may not make cgroups: the test has then nothing to test.
    fn new() -> Option<Self> {
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("shim-test-{}/{n}", std::process::id());
        let live = Self { name, children: Vec::new() };
        let hierarchies = Hierarchies::detect().ok()?;
        for hierarchy in hierarchies.iter() {
            let mut directory = hierarchy.directory("/")?;
            let mut parts: Vec<_> = live.name.split('/').collect();
            parts.push("ns");
            for part in parts {
                if hierarchy.kind == Kind::V2 {
                    for controller in ["memory", "pids", "cpu", "cpuset", "io"] {
                        let _ = write(
                            &directory.join("cgroup.subtree_control"),
                            &format!("+{controller}"),
                        );
                    }
                }
                directory.push(part);
                match fs::create_dir(&directory) {
                    Ok(()) => {}
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                    Err(e) => {
                        eprintln!("skipped: no cgroup can be made: {e}");
                        return None;
                    }
                }
                if hierarchy.has("cpuset") {
                    for file in ["cpuset.cpus", "cpuset.mems"] {
                        let of_parent = read(&directory.parent()?.join(file)).ok()?;
                        write(&directory.join(file), of_parent.trim()).ok()?;
                    }
                }
            }
        }
        Some(live)
    }

    /// Runs a shell command in the inner cgroups.
    fn run(&mut self, script: &str) -> i32 {
        let cgroup = Cgroup::at(&self.name).unwrap();
        let joins: String = cgroup
            .places
            .iter()
            .map(|p| format!("echo $$ > {}/cgroup.procs || exit 99; ", p.inner.display()))
            .collect();
        let child = Command::new("/bin/sh")
            .args(["-c", &format!("{joins} echo in; {script}")])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        self.children.push(child);
        let mut word = [0; 3];
        let output = self.children.last_mut().unwrap().stdout.as_mut().unwrap();
        io::Read::read_exact(output, &mut word).unwrap();
        pid
    }

    fn cgroup(&self) -> Cgroup {
        Cgroup::at(&self.name).unwrap()
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
        }
        let cgroup = self.cgroup();
        for place in &cgroup.places {
            let _ = write(&place.limit.join("freezer.state"), "THAWED");
            let _ = write(&place.limit.join("cgroup.kill"), "1");
        }
        for child in &mut self.children {
            let _ = child.wait();
        }
        for _ in 0..100 {
            if remove_stale(&[&self.name]).is_ok() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        // The parent goes with the last test.
        for place in &cgroup.places {
            let _ = fs::remove_dir(place.limit.parent().unwrap());
        }
    }
}

/// On a hybrid host, the same CT as a host with v1 alone (without `cgroup.kill`), and one with cgroup2
/// alone, would see it.
fn by_version(cgroup: &Cgroup) -> Vec<Cgroup> {
    [Mode::V1, Mode::V2]
        .into_iter()
        .map(|mode| {
            let mut places = cgroup.places.clone();
            places.retain(|p| (p.kind == Kind::V2) == (mode == Mode::V2));
            Cgroup { mode, places }
        })
        .filter(|cgroup| !cgroup.places.is_empty())
        .collect()
}

#[test]
fn a_process_is_found_in_its_ct() {
    let Some(mut live) = Live::new() else { return };
    let pid = live.run("sleep 100 & wait");
    assert_eq!(Cgroup::of_process(pid).unwrap(), live.cgroup());
    let pids = live.cgroup().pids().unwrap();
    assert!(pids.contains(&pid.unsigned_abs()) && pids.len() <= 2, "{pids:?}");
    let (kind, files) = live.cgroup().exec_files(pid).unwrap();
    let mode = live.cgroup().mode();
    assert_eq!(kind == ExecCgroup::Tasks, mode == Mode::V1);
    assert_eq!(files.len(), live.cgroup().places.len());
}

#[tokio::test]
async fn freezing_stops_and_thawing_continues() {
    let Some(mut live) = Live::new() else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("count");
    live.run(&format!("while :; do echo x >> {}; sleep 0.01; done", file.display()));
    let size = || fs::metadata(&file).map_or(0, |m| m.len());
    while size() == 0 {
        sleep(Duration::from_millis(5)).await;
    }
    for cgroup in by_version(&live.cgroup()).into_iter().cycle().take(6) {
        cgroup.freeze().await.unwrap();
        cgroup.freeze().await.unwrap();
        let frozen = size();
        sleep(Duration::from_millis(60)).await;
        assert_eq!(size(), frozen);
        cgroup.thaw().await.unwrap();
        let start = Instant::now();
        while size() == frozen {
            assert!(start.elapsed() < Duration::from_secs(5), "still frozen");
            sleep(Duration::from_millis(5)).await;
        }
    }
}

#[tokio::test]
async fn killing_ends_everybody_even_if_frozen() {
    let Some(mut live) = Live::new() else { return };
    let versions = by_version(&live.cgroup());
    for (n, cgroup) in versions.iter().cycle().take(4).enumerate() {
        let freeze = n >= 2;
        live.run("trap '' TERM; for i in 1 2 3 4 5; do sleep 100 & done; wait");
        if freeze {
            cgroup.freeze().await.unwrap();
        }
        assert!(!cgroup.pids().unwrap().is_empty());
        let start = Instant::now();
        // Zombies of this process are no longer members.
        cgroup.kill_all().await.unwrap();
        assert!(start.elapsed() < Duration::from_secs(3));
        assert!(cgroup.pids().unwrap().is_empty());
        live.children.pop().unwrap().wait().unwrap();
        cgroup.thaw().await.unwrap();
    }
}

/// As a pid that was reused after it had been read from the cgroup would be.
#[test]
fn who_is_not_in_the_cgroup_gets_no_signal() {
    let Some(mut live) = Live::new() else { return };
    live.run("sleep 100");
    let cgroup = live.cgroup();
    let sleep = || std::process::Command::new("/bin/sleep").arg("100").spawn().unwrap();
    let mut stranger = sleep();
    cgroup.signal(stranger.id(), libc::SIGKILL);
    let all = cgroup.signal_all(libc::SIGKILL).unwrap();
    assert!(!all.is_empty() && !all.contains(&stranger.id()));
    live.children.pop().unwrap().wait().unwrap();
    // Of two signals the first would tell how it ended.
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(stranger.id() as i32),
        nix::sys::signal::SIGTERM,
    )
    .unwrap();
    let status = stranger.wait().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGTERM));
}

#[tokio::test]
async fn killing_a_ct_that_is_gone_is_done() {
    let cgroup = Cgroup::at("shim-test-gone/1").unwrap();
    cgroup.kill_all().await.unwrap();
    assert!(cgroup.pids().unwrap().is_empty());
    assert!(cgroup.freeze().await.unwrap_err().is_gone());
    assert!(cgroup.metrics().unwrap_err().is_gone());
    remove_stale(&["shim-test-gone/1"]).unwrap();
}

#[test]
fn limits_reach_the_kernel_and_can_go_up_and_down() {
    let Some(mut live) = Live::new() else { return };
    live.run("sleep 100");
    let cgroup = live.cgroup();
    let value = |v1: &str, v2: &str| {
        let controller = v1.split('.').next().unwrap();
        let (place, version) = cgroup.controller(controller, controller).unwrap();
        let file = if version == Version::V1 { v1 } else { v2 };
        read(&place.limit.join(file)).unwrap().trim().to_owned()
    };
    let mb = |n: u64| Some(Limit::Value(n << 20));
    for (memory, both) in [(64, 96), (32, 40), (128, 160), (16, 200), (64, 64)] {
        let r =
            Resources { memory_limit: mb(memory), memory_swap: mb(both), ..Resources::default() };
        cgroup.apply(&r, false).unwrap();
        assert_eq!(
            value("memory.limit_in_bytes", "memory.max"),
            (memory << 20).to_string(),
            "{memory}"
        );
    }
    let r = Resources {
        cpu_shares: Some(512),
        cpu_quota: Some(Limit::Value(50_000)),
        cpu_period: Some(100_000),
        pids_limit: Some(Limit::Value(20)),
        ..Resources::default()
    };
    cgroup.apply(&r, false).unwrap();
    assert_eq!(value("pids.max", "pids.max"), "20");
    let quota = |n: u64, period: u64| Resources {
        cpu_quota: Some(Limit::Value(n)),
        cpu_period: Some(period),
        cpu_burst: Some(n / 2),
        ..Resources::default()
    };
    for (n, period) in [(20_000, 20_000), (100_000, 1_000_000), (1000, 1000)] {
        cgroup.apply(&quota(n, period), false).unwrap();
        assert_eq!(
            value("cpu.cfs_period_us", "cpu.max").split(' ').next_back().unwrap(),
            period.to_string()
        );
    }
    let idle = |idle, shares| Resources {
        cpu_idle: Some(idle),
        cpu_shares: Some(shares),
        ..Resources::default()
    };
    for (on, shares) in [(1, 100), (0, 2048), (1, 2048), (0, 4)] {
        cgroup.apply(&idle(on, shares), false).unwrap();
        assert_eq!(value("cpu.idle", "cpu.idle"), on.to_string());
    }
    // Proxmox's default goes, and unlimited is unlimited.
    cgroup.apply(&Resources::default(), true).unwrap();
    let unlimited = value("memory.limit_in_bytes", "memory.max");
    assert!(unlimited == "max" || unlimited.parse::<u64>().unwrap() > 1 << 50, "{unlimited}");
}

#[test]
fn a_cpuset_reaches_the_processes_and_can_shrink_and_grow() {
    let Some(mut live) = Live::new() else { return };
    let pid = live.run("sleep 100");
    let cgroup = live.cgroup();
    let Some((place, _)) = cgroup.controller("cpuset", "cpuset") else { return };
    let nested = place.inner.join("nested");
    let all = read(&place.limit.parent().unwrap().join("cpuset.cpus")).unwrap();
    if cgroup.mode() != Mode::V2 {
        fs::create_dir(&nested).unwrap();
        write(&nested.join("cpuset.cpus"), all.trim()).unwrap();
    }
    let allowed = || {
        let status = read(format!("/proc/{pid}/status").as_ref()).unwrap();
        let line = status.lines().find(|l| l.starts_with("Cpus_allowed_list:")).unwrap();
        line.split_whitespace().last().unwrap().to_owned()
    };
    let before = allowed();
    let set = |cpus: &str| {
        let r = Resources { cpuset_cpus: Some(cpus.into()), ..Resources::default() };
        cgroup.apply(&r, false)
    };
    set("0").unwrap();
    assert_eq!(allowed(), "0");
    set(&before).unwrap();
    assert_eq!(allowed(), before);
    let error = set("0-4000").unwrap_err().to_string();
    assert!(error.contains("cpuset.cpus"), "{error}");
    assert!(set("nonsense").is_err());
}

/// Fills memory until it is killed.
const HOG: &str = "head -c 200M /dev/zero | tail";

#[tokio::test]
async fn an_oom_kill_is_counted_and_told() {
    let Some(mut live) = Live::new() else { return };
    let cgroup = live.cgroup();
    let limit = Resources {
        memory_limit: Some(Limit::Value(20 << 20)),
        memory_swap: Some(Limit::Value(20 << 20)),
        ..Resources::default()
    };
    if cgroup.memory_dir().is_none() || cgroup.apply(&limit, true).is_err() {
        eprintln!("skipped: no memory controller, or no swap accounting");
        return;
    }
    let mut watch = cgroup.watch_oom().unwrap();
    assert!(timeout(Duration::from_millis(100), watch.next()).await.is_err(), "nothing yet");
    for expected in 1..=3 {
        live.run(&format!("{HOG}; sleep 100"));
        let told = timeout(Duration::from_secs(20), watch.next()).await.expect("not told");
        assert_eq!(told, Some(expected));
        assert_eq!(cgroup.oom_kills().unwrap(), expected);
        let text = read(&cgroup.memory_dir().unwrap().join(match cgroup.mode() {
            Mode::V2 => "memory.events",
            _ => "memory.oom_control",
        }));
        assert!(text.unwrap().contains(&format!("oom_kill {expected}")));
    }
}

#[test]
fn the_figures_of_a_busy_ct_are_not_zero() {
    let Some(mut live) = Live::new() else { return };
    live.run("i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; echo ready; sleep 100");
    let output = live.children[0].stdout.as_mut().unwrap();
    io::Read::read_exact(output, &mut [0; 6]).unwrap();
    // The kernel adds small amounts of memory up every two seconds only.
    let start = Instant::now();
    loop {
        let any = live.cgroup().metrics().unwrap();
        let (text, complete) = if live.cgroup().mode() == Mode::V2 {
            let m = v2::Metrics::parse_from_bytes(&any.value).unwrap();
            let complete = m.cpu.usage_usec > 1000
                && m.memory.usage > 4096
                && m.memory.anon > 0
                && m.pids.current > 0;
            (format!("{m:?}"), complete)
        } else {
            let m = v1::Metrics::parse_from_bytes(&any.value).unwrap();
            let complete = m.cpu.usage.total > 1_000_000
                && m.memory.usage.usage > 4096
                && m.memory.rss > 0
                && m.pids.current > 0;
            (format!("{m:?}"), complete)
        };
        if complete {
            break;
        }
        assert!(start.elapsed() < Duration::from_secs(8), "{text}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// What the OOM watch of cgroup2 relies on, with a file that every host with cgroup2 has.
#[tokio::test]
async fn a_change_of_an_events_file_is_told() {
    let Some(mut live) = Live::new() else { return };
    let cgroup = live.cgroup();
    let Some(place) = cgroup.unified() else { return };
    let path = place.limit.join("cgroup.events");
    let watch = crate::sys::watch_priority(fs::File::open(&path).unwrap().into()).unwrap();
    let populated = || {
        let file = fs::File::from(watch.get_ref().try_clone().unwrap());
        let mut buffer = [0; 256];
        let n = std::os::unix::fs::FileExt::read_at(&file, &mut buffer, 0).unwrap();
        processes::value_of(std::str::from_utf8(&buffer[..n]).unwrap(), "populated").unwrap()
    };
    assert_eq!(populated(), 0);
    for _ in 0..3 {
        live.run("sleep 100");
        for expected in [1, 0] {
            loop {
                let ready = watch.ready(tokio::io::Interest::PRIORITY);
                timeout(Duration::from_secs(5), ready)
                    .await
                    .expect("not told")
                    .unwrap()
                    .clear_ready();
                if populated() == expected {
                    break;
                }
            }
            write(&place.limit.join("cgroup.kill"), "1").unwrap();
        }
    }
}

#[test]
fn stale_cgroups_are_removed_unless_in_use() {
    let Some(mut live) = Live::new() else { return };
    let cgroup = live.cgroup();
    live.run("sleep 100");
    let error = remove_stale(&[&live.name]).unwrap_err();
    assert!(matches!(error, Error::InUse { .. }), "{error}");
    assert!(cgroup.places.iter().all(|p| p.inner.is_dir()), "nothing is removed then");
    let mut child = live.children.pop().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    // The shell's own child.
    let _ = cgroup.unified().map(|p| write(&p.limit.join("cgroup.kill"), "1"));
    let start = Instant::now();
    while remove_stale(&[&live.name]).is_err() {
        assert!(start.elapsed() < Duration::from_secs(5));
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(cgroup.places.iter().all(|p| !p.limit.exists()));
}
