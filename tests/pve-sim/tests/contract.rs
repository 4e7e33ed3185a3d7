//! Replays the recorded calls against the simulator and compares the answers.
//!
//! For each recording the node is brought into the state that the request needs; then status,
//! reason phrase, headers, keys and types of the body, error texts and the end of the task must
//! be the recorded ones. VMIDs are replaced, ids and times ignored. Recordings whose CT runs need
//! root and LXC.

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pve_sim::acl::{Acl, Identity};
use pve_sim::cluster::{Cluster, Options};
use pve_sim::node::Node;
use pve_sim::profile::{Kind, Profile};
use serde_json::{Value as Json, json};
use sha2::{Digest, Sha256};
use tokio::time::sleep;

mod client;
use client::Answer;

/// How many calls were recorded in all.
const RECORDED: usize = 283;

/// Recordings that cannot be had, and why.
const EXCUSED: &[(&str, &str)] = &[
    (
        "err-put-hotplug-failed",
        "the recording node lacked the memory controller; other nodes answer 200",
    ),
    ("lxc-rrddata", "the simulator keeps no history of an hour"),
    ("node-network", "the interfaces are those of the host, which has no bridge vmbr0"),
];

/// The VMIDs of the recordings that stand for CTs.
const VMIDS: [u32; 16] =
    [100, 110, 111, 112, 113, 160, 161, 162, 163, 170, 180, 190, 200, 201, 500, 999];

type Failure = String;

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(run())
}

async fn run() -> ExitCode {
    // As with other tests, an argument selects by a part of the name.
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-'));
    let names: Vec<_> = recordings()
        .into_iter()
        .filter(|n| filter.as_ref().is_none_or(|f| n.contains(f.as_str())))
        .collect();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let can_run = can_run();
    let mut world = World::new(dir.path());
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for name in &names {
        if needs_running_ct(name) && !can_run {
            skipped += 1;
            continue;
        }
        let recording = load(name);
        match world.replay(name, &recording).await {
            Ok(()) => passed += 1,
            Err(failure) => {
                failed += 1;
                println!("{name}: {failure}");
            }
        }
        world.reset().await;
    }
    world.end().await;
    for (name, why) in EXCUSED {
        println!("cannot be had: {name}: {why}");
    }
    if skipped > 0 {
        println!(
            "{skipped} recordings could not replay: running CTs need root and the package lxc"
        );
    }
    println!("pve-api contract: {passed} of {RECORDED} recordings replay");
    if failed + skipped == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/transcripts")
}

fn recordings() -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(fixtures())
        .expect("the recordings")
        .filter_map(|e| e.ok()?.file_name().to_str()?.strip_suffix(".json").map(str::to_owned))
        .filter(|n| EXCUSED.iter().all(|(excused, _)| excused != n))
        .collect();
    names.sort();
    assert_eq!(names.len() + EXCUSED.len(), RECORDED, "recordings are missing");
    names
}

fn load(name: &str) -> Json {
    let path = fixtures().join(format!("{name}.json"));
    let text = std::fs::read_to_string(path).expect("a recording");
    serde_json::from_str(&text).expect("JSON")
}

fn can_run() -> bool {
    let root = std::fs::metadata("/proc/self").is_ok_and(|m| {
        use std::os::unix::fs::MetadataExt;
        m.uid() == 0
    });
    let has = |program: &str| {
        std::env::var_os("PATH")
            .is_some_and(|p| std::env::split_paths(&p).any(|dir| dir.join(program).exists()))
    };
    root && has("lxc-start") && Path::new("/bin/busybox").exists()
}

fn needs_running_ct(name: &str) -> bool {
    matches!(state(name), State::Running { .. } | State::PostStop)
        || matches!(
            name,
            "lxc-start"
                | "lxc-start-entrypoint"
                | "err-start-short-lived"
                | "err-start-missing-entrypoint"
        )
}

/// What a recording finds when its request comes.
#[derive(Clone, Copy)]
enum State {
    /// No CT of the request's VMID.
    Nothing,
    /// A stopped CT, with these lines besides the plain ones.
    Stopped(&'static str),
    /// A running CT whose init stays, with these lines besides the plain ones.
    Running(&'static str),
    /// A CT whose init has ended and whose post-stop hook still runs.
    PostStop,
    /// A stopped CT with exactly the recorded configuration.
    Recorded,
    /// A CT without `unprivileged` and such: only these lines.
    Exactly(&'static str),
    /// A stopped CT whose rootfs is a directory in the storage, with these lines besides.
    Subvol(&'static str),
    /// A stopped CT whose rootfs is an image of 1 GiB in the storage.
    Image,
}

fn state(name: &str) -> State {
    use State::*;
    match name {
        "err-ct-missing-config"
        | "err-ct-missing-delete"
        | "err-ct-missing-start"
        | "err-ct-missing-status" => Nothing,
        "lxc-clone-full" | "lxc-clone-linked-unsupported" => {
            Subvol("net0: name=eth0,hwaddr=BC:24:11:00:00:01,type=veth\n")
        }
        "err-move-volume"
        | "err-resize-subvol-dir"
        | "lxc-template"
        | "lxc-delete"
        | "storage-content"
        | "lxc-feature-snapshot"
        | "lxc-snapshot-dir" => Subvol(""),
        "lxc-resize" => Image,
        "lxc-stop-skiplock-ticket" => Running("lock: backup\n"),
        "err-locked-put-ticket" | "err-locked-unlock-ticket" => Stopped("lock: backup\n"),
        "lxc-interfaces" => Running(""),
        "lxc-interfaces-net" => Running(concat!(
            "lxc.net.0.type: veth\nlxc.net.0.name: eth0\nlxc.net.0.flags: up\n",
            "lxc.net.0.ipv4.address: 192.0.2.50/24\n",
        )),
        "err-vmid-in-use" => Stopped(""),
        name if name.starts_with("perm-create-")
            || name.starts_with("lxc-create-")
            || name.starts_with("err-create-")
            || name.starts_with("storage-") =>
        {
            Nothing
        }
        "err-bad-param" | "err-missing-param" | "err-no-permission-create" => Nothing,
        "err-delete-protected" => Stopped("protection: 1\n"),
        "lxc-put-unprotect" => Stopped("protection: 1\n"),
        "perm-put-delete-full" | "perm-put-delete-user" => Stopped("protection: 1\n"),
        "err-locked-delete" | "err-locked-delete-force" | "err-locked-config" => {
            Stopped("lock: backup\n")
        }
        "err-locked-delete-create" | "err-locked-start-stopped" => Stopped("lock: create\n"),
        "err-locked-stop" | "err-start-running-locked" | "lxc-status-current-locked" => {
            Running("lock: backup\n")
        }
        "err-start-bridge-missing" => Stopped("net0: name=eth0,bridge=vmbr9,type=veth\n"),
        "lxc-put-delete-net" => Stopped("net0: name=eth0,bridge=vmbr9,type=veth\n"),
        "err-start-missing-entrypoint" => Stopped("entrypoint: /nope\n"),
        "err-start-short-lived" => Stopped("entrypoint: /bin/true\n"),
        "lxc-start" | "lxc-start-entrypoint" => Stopped("entrypoint: /bin/sleep 1000\n"),
        "err-start-during-poststop" | "lxc-delete-during-poststop" => PostStop,
        "err-delete-running"
        | "lxc-delete-force-purge"
        | "err-resume-running"
        | "err-start-running"
        | "err-skiplock-stop-token"
        | "lxc-list"
        | "lxc-reboot"
        | "lxc-shutdown-forcestop"
        | "lxc-shutdown-timeout"
        | "lxc-status-current-just-started"
        | "lxc-status-current-running"
        | "lxc-stop"
        | "lxc-suspend"
        | "cluster-resources-all"
        | "cluster-resources-vm"
        | "lxc-put-config-pending"
        | "lxc-put-live-fastplug"
        | "lxc-put-pending-console" => Running(""),
        "lxc-status-current-running-full" | "lxc-status-current-suspended" => {
            Running("tags: containerd;k8s\n")
        }
        "lxc-status-current-stopped" => Stopped("tags: containerd;k8s\n"),
        "lxc-put-config-revert" => {
            Stopped("\n[pve:pending]\nlxc.environment.runtime: Z=1\ndelete: hostname\n")
        }
        "lxc-config-after-put" => Exactly(concat!(
            "#hello world\n#line2\narch: amd64\ncmode: console\nconsole: 1\ncores: 1\n",
            "cpulimit: 0.5\ncpuunits: 200\nentrypoint: /bin/sh\nfeatures: nesting=1\n",
            "hostname: newname\nmemory: 256\nnameserver: 192.0.2.53\nnet0: name=eth0\nonboot: 0\n",
            "ostype: unmanaged\nrootfs: local:0\nsearchdomain: x.local\nswap: 128\n",
            "tags: containerd;k8s\ntty: 1\nunprivileged: 1\n",
            "lxc.environment.runtime: A=1\n\n[pve:pending]\nlxc.environment.runtime: Z=1\n",
        )),
        "lxc-pending-after-put" => state("lxc-config-after-put"),
        "lxc-pending-console" => Exactly(concat!(
            "#x\narch: amd64\ncores: 1\nentrypoint: /bin/sleep 1000\nhostname: other\n",
            "memory: 512\nostype: unmanaged\nrootfs: local:0\nswap: 512\ntags: a;b\n",
            "unprivileged: 1\n\n[pve:pending]\nconsole: 0\nentrypoint: /bin/sleep 2000\n",
        )),
        name if name.starts_with("lxc-config") => Recorded,
        _ => Stopped(""),
    }
}

/// The nodes under test and what the recordings are translated with.
struct World {
    dir: PathBuf,
    cluster: Arc<Cluster>,
    node: Arc<Node>,
    rootfs: PathBuf,
    templates: PathBuf,
    vmids: BTreeMap<u32, u32>,
}

impl World {
    fn new(dir: &Path) -> Self {
        let rootfs = make_rootfs(dir);
        let templates = make_templates(dir, &rootfs);
        // Numbers of its own, as the cgroups of all CTs of a host lie side by side.
        let base = 900_000_000 + std::process::id() % 100_000 * 1000;
        let vmids = VMIDS.iter().map(|v| (*v, base + v)).collect();
        let cluster = open(dir, Kind::Instant, 0.1);
        let node = cluster.first().clone();
        Self { dir: dir.to_owned(), cluster, node, rootfs, templates, vmids }
    }

    fn reopen(&mut self, kind: Kind, scale: f64) {
        self.cluster = open(&self.dir, kind, scale);
        self.node = self.cluster.first().clone();
    }

    async fn replay(&mut self, name: &str, recording: &Json) -> Result<(), Failure> {
        if name == "err-start-short-lived" {
            // Without delays the start may be over before its init is.
            self.cluster.shut_down().await;
            self.reopen(Kind::Node, 0.2);
        }
        self.set_acl(name);
        let request = &recording["request"];
        let path = self.translate(request["path"].as_str().unwrap_or_default());
        let vmid = path.split('/').skip_while(|s| *s != "lxc").nth(1);
        let vmid = vmid.and_then(|v| v.split('?').next()?.parse().ok());
        let asked = request["form"]["vmid"].as_u64().and_then(|v| u32::try_from(v).ok());
        let vmid = vmid.or_else(|| self.vmids.get(&asked?).copied());
        self.prepare(name, vmid.unwrap_or(self.vmids[&100]), recording).await?;
        let path = self.task_path(name, path).await;

        let answer = self.send(name, request, &path).await;
        self.compare_answer(name, &recording["response"], &answer)?;
        if !recording["task"].is_null() {
            let data = &answer.body["data"];
            let upid = data.as_str().or(data["upid"].as_str()).unwrap_or_default().to_owned();
            self.compare_task(&recording["task"], &upid).await?;
        }
        for task in self.node.tasks.list().iter().filter(|_| name == "lxc-template") {
            self.task_end(&task.upid.to_string()).await?;
        }
        self.check_effect(name, vmid.unwrap_or(0))
    }

    fn set_acl(&self, name: &str) {
        let mut acl = Acl::default();
        let root = acl.users.get_mut("root@pam").expect("root@pam");
        root.password = Some("PASSWORD".into());
        let secret = if name == "err-bad-token" { "another" } else { "TOKEN-SECRET" };
        if name == "access-ticket-bad-password" {
            root.password = Some("another".into());
        }
        if !name.starts_with("access-token-create") {
            acl.add_token("root@pam", "full", secret, false);
            acl.add_token("root@pam", "ps", secret, true);
        }
        if name != "access-user-create" {
            acl.add_token("shim@pve", "t1", secret, true);
        }
        let granted = name.starts_with("perm-") || name == "task-status-other-user";
        if granted || name == "access-acl" {
            for subject in ["root@pam!ps", "shim@pve"] {
                acl.grant("/", subject, "PVEAdmin");
            }
        }
        if granted {
            acl.grant("/", "shim@pve!t1", "PVEAdmin");
        }
        *self.cluster.dc.acl_mut() = acl;
    }

    /// Replaces the recorded VMIDs.
    fn translate(&self, text: &str) -> String {
        let show = |path: &Path| path.display().to_string();
        let text = text
            .replace("/var/lib/vz", &show(&self.node.paths.vz))
            .replace("/var/lib/lxc", &show(&self.node.paths.lxc))
            .replace("/srv/bindrf", &show(&self.dir.join("bindrf")));
        let mut out = String::new();
        let mut digits = String::new();
        for c in text.chars().chain(['\0']) {
            if c.is_ascii_digit() {
                digits.push(c);
                continue;
            }
            match digits.parse().ok().and_then(|n| self.vmids.get(&n)) {
                Some(vmid) => out.push_str(&vmid.to_string()),
                None => out.push_str(&digits),
            }
            digits.clear();
            out.push(c);
        }
        out.pop();
        out
    }

    fn write_conf(&self, vmid: u32, text: &str) {
        std::fs::write(self.node.paths.confs.join(format!("{vmid}.conf")), text).expect("a file");
    }

    async fn prepare(&self, name: &str, vmid: u32, recording: &Json) -> Result<(), Failure> {
        let plain = format!(
            "arch: amd64\nhostname: ct\nmemory: 512\nostype: unmanaged\nrootfs: {}\nswap: 512\n",
            self.rootfs.display()
        );
        let running = "console: 0\ntty: 0\nlxc.apparmor.profile: unconfined\n";
        self.prepare_storage(name);
        match state(name) {
            State::Nothing => {}
            State::Subvol(extra) => {
                let volume = format!("{vmid}/subvol-{vmid}-disk-0.subvol");
                let dir = self.node.paths.vz.join("images").join(&volume);
                std::fs::create_dir_all(dir.join("bin")).expect("a directory");
                std::fs::write(dir.join("bin/file"), "content").expect("a file");
                let conf = plain.replace(&format!("rootfs: {}", self.rootfs.display()), "");
                let rootfs = format!("rootfs: local:{volume},size=0T\nunprivileged: 1\n");
                self.write_conf(vmid, &format!("{conf}{rootfs}{extra}"));
            }
            State::Image => {
                let volume = format!("{vmid}/vm-{vmid}-disk-0.raw");
                let path = self.node.paths.vz.join("images").join(&volume);
                std::fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
                let file = std::fs::File::create(path).expect("a file");
                file.set_len(1 << 30).expect("a size");
                let conf = plain.replace(&format!("rootfs: {}", self.rootfs.display()), "");
                self.write_conf(vmid, &format!("{conf}rootfs: local:{volume},size=1G\n"));
            }
            State::Exactly(text) => self.write_conf(vmid, text),
            State::Stopped(extra) if extra.contains("entrypoint") => {
                self.write_conf(vmid, &format!("{plain}{running}{extra}"));
            }
            State::Stopped(extra) => {
                self.write_conf(vmid, &format!("{plain}unprivileged: 1\n{extra}"));
            }
            State::Running(extra) => {
                let init = "entrypoint: /bin/sleep 1000\n";
                let conf = format!("{plain}{running}{init}{extra}");
                self.write_conf(vmid, &conf.replace("lock: backup\n", ""));
                self.start(vmid).await?;
                // What blocks a start appears on a running CT later.
                self.write_conf(vmid, &conf);
            }
            State::PostStop => {
                let hook = "lxc.hook.post-stop: /bin/sh -c 'sleep 3' x\n";
                let init = "entrypoint: /bin/sleep 1\n";
                self.write_conf(vmid, &format!("{plain}{running}{init}{hook}"));
                self.start(vmid).await?;
                while self.node.is_running(vmid) {
                    sleep(Duration::from_millis(5)).await;
                }
            }
            State::Recorded => {
                let mut text = String::new();
                let data = &recording["response"]["body"]["data"];
                for (key, value) in data.as_object().expect("a configuration") {
                    let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                    match key.as_str() {
                        "digest" => {}
                        "description" => {
                            value.lines().for_each(|l| text.push_str(&format!("#{l}\n")));
                        }
                        "env" => value.split('\0').for_each(|e| {
                            text.push_str(&format!("lxc.environment.runtime: {e}\n"));
                        }),
                        _ => text.push_str(&format!("{key}: {value}\n")),
                    }
                }
                self.write_conf(vmid, &text);
            }
        }
        Ok(())
    }

    /// Puts templates into the storage, and what else a recording finds outside of CTs.
    fn prepare_storage(&self, name: &str) {
        let cache = self.node.paths.vz.join("template/cache");
        let mut files = vec!["bb_1.0_amd64.tar.gz"];
        if name == "storage-content-vztmpl-after" {
            files.extend(["app_cmd.tar", "app_full.tar", "app_none.tar", "app_num.tar"]);
            files.extend(["oci_up.tar", "up_1.0_amd64.tar.gz"]);
        }
        if name.starts_with("lxc-create-oci") {
            files.push("app.tar");
        }
        for file in files {
            let of = |file: &str| match file.ends_with(".gz") {
                true => "bb_1.0_amd64.tar.gz",
                false => "app.tar",
            };
            let target = match name.strip_prefix("lxc-create-oci-") {
                Some(app) if file == "app.tar" => format!("{app}.tar"),
                _ => file.to_owned(),
            };
            std::fs::copy(self.templates.join(of(file)), cache.join(target)).expect("a template");
        }
        let bind = self.dir.join("bindrf");
        let _ = std::fs::remove_dir_all(&bind);
        std::fs::create_dir(&bind).expect("a directory");
    }

    /// Starts a CT the short way.
    async fn start(&self, vmid: u32) -> Result<(), Failure> {
        let who = identity();
        let node = self.node.clone();
        let upid = self.node.tasks.spawn("pve1", "vzstart", &vmid.to_string(), &who, |task| {
            node.start_ct(task, vmid, false, Instant::now())
        });
        let status = self.task_end(&upid).await?;
        match status["exitstatus"].as_str() {
            Some("OK") => Ok(()),
            other => Err(format!("the CT does not start: {other:?}")),
        }
    }

    /// Makes the task that a request about tasks needs, and puts it into the path.
    async fn task_path(&self, name: &str, path: String) -> String {
        if name == "vncproxy-no-server" {
            // Another terminal has the first port.
            let other = load("termproxy");
            let path = self.translate(other["request"]["path"].as_str().unwrap_or_default());
            self.send("", &other["request"], &path).await;
        }
        if name == "cluster-tasks" {
            self.make_task_list().await;
        }
        if !name.starts_with("task") {
            return path;
        }
        let (running, aborted) = match name {
            "task-delete-running"
            | "task-log-running"
            | "task-status-running"
            | "tasks-list-active" => (true, false),
            "task-status-aborted" | "task-status-other-user" => (true, true),
            _ => (false, false),
        };
        let (kind, id) = if running { ("vzstart", "180") } else { ("vzcreate", "110") };
        let id = self.translate(id);
        let mut upid = String::new();
        // The list is a page of three.
        for _ in 0..3 {
            let id = id.clone();
            upid =
                self.node.tasks.spawn("pve1", kind, &id.clone(), &identity(), |task| async move {
                    if running {
                        task.running(Some(format!("systemctl start pve-container@{id}")));
                        sleep(Duration::from_secs(2)).await;
                    } else {
                        task.log("extracting archive '/var/lib/vz/template/cache/x.tar.gz'");
                        task.log("Total bytes read: 2140160 (2.1MiB, 32MiB/s)");
                    }
                    Ok(())
                });
            if name == "tasks-list-active" {
                break;
            }
        }
        if aborted {
            self.node.tasks.get(&upid).expect("the task").interrupt();
        }
        if aborted || !running {
            self.task_end(&upid).await.expect("an end");
        }
        path.split('/')
            .map(|s| if s.starts_with("UPID:") { upid.as_str() } else { s })
            .collect::<Vec<_>>()
            .join("/")
    }

    /// The tasks of a recorded list; all but the newest have been listed before.
    async fn make_task_list(&self) {
        let recording = load("cluster-tasks");
        let rows = recording["response"]["body"]["data"].as_array().expect("rows").clone();
        for (left, row) in rows.iter().enumerate().rev() {
            let text = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
            let (user, token) = (text("user"), row["tokenid"].as_str());
            let who = match token {
                Some(token) => Identity::token(&user, token, false),
                None => Identity::user(&user),
            };
            let status = text("status");
            let upid =
                self.node.tasks.spawn("pve1", &text("type"), &text("id"), &who, |_| async move {
                    if status == "OK" { Ok(()) } else { Err(status) }
                });
            self.task_end(&upid).await.expect("an end");
            if left == 1 {
                self.send("", &recording["request"], "/api2/json/cluster/tasks").await;
            }
        }
    }

    async fn task_end(&self, upid: &str) -> Result<Json, Failure> {
        let task = self.node.tasks.get(upid).ok_or_else(|| format!("no task {upid}"))?;
        for _ in 0..4000 {
            if task.ended() {
                return Ok(task.status());
            }
            sleep(Duration::from_millis(5)).await;
        }
        Err(format!("{upid} does not end"))
    }

    async fn send(&self, name: &str, request: &Json, path: &str) -> Answer {
        let method = request["method"].as_str().unwrap_or_default();
        let tickets = &self.cluster.dc.tickets;
        let mut text = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n");
        for (header, value) in request["headers"].as_object().into_iter().flatten() {
            let mut value = value.as_str().unwrap_or_default().to_owned();
            if name != "err-bad-ticket" {
                value = value.replace("=TICKET", &format!("={}", tickets.issue("root@pam")));
            }
            value = value.replace("CSRF-TOKEN", &tickets.csrf("root@pam"));
            text.push_str(&format!("{header}: {value}\r\n"));
        }
        let mut body = Vec::new();
        let fields = request["form"].as_object().into_iter().flatten().map(|(key, value)| {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let vmid = matches!(key.as_str(), "vmid" | "newid") || value.starts_with("/srv/");
            (key, if vmid { self.translate(&value) } else { value })
        });
        if !request["json"].is_null() {
            body = request["json"].to_string().into_bytes();
        } else if path.ends_with("/upload") {
            let file = match name {
                "storage-upload-oci-tar" => "oci_up.tar",
                _ => "up_1.0_amd64.tar.gz",
            };
            for (key, value) in fields {
                let head = format!("Content-Disposition: form-data; name=\"{key}\"");
                body.extend(format!("--BOUNDARY\r\n{head}\r\n\r\n{value}\r\n").into_bytes());
            }
            let head =
                format!("Content-Disposition: form-data; name=\"filename\"; filename=\"{file}\"");
            body.extend(format!("--BOUNDARY\r\n{head}\r\n\r\n").into_bytes());
            body.extend(std::fs::read(self.templates.join("app.tar")).expect("a template"));
            body.extend(b"\r\n--BOUNDARY--\r\n");
        } else if matches!(method, "POST" | "PUT") {
            let mut form = form_urlencoded::Serializer::new(String::new());
            fields.for_each(|(key, value)| {
                form.append_pair(key, &value);
            });
            body = form.finish().into_bytes();
        }
        text.push_str(&format!("Content-Length: {}\r\n\r\n", body.len()));
        let request = [text.as_bytes(), &body].concat();
        Answer::read(&self.cluster, request).await
    }

    fn compare_answer(&self, name: &str, expected: &Json, got: &Answer) -> Result<(), Failure> {
        let reason = self.translate(expected["reason"].as_str().unwrap_or_default());
        let status = expected["status"].as_u64().unwrap_or(0);
        if (status, reason.as_str()) != (u64::from(got.status), &got.reason) {
            return Err(format!("{} {} instead of {status} {reason}", got.status, got.reason));
        }
        for (header, value) in expected["headers"].as_object().into_iter().flatten() {
            let value = value.as_str().unwrap_or_default();
            let got = got.headers.get(&header.to_ascii_lowercase()).map_or("", String::as_str);
            if header != "Content-Encoding" && got != value {
                return Err(format!("{header}: {got} instead of {value}"));
            }
        }
        let has_type = !expected["headers"]["Content-Type"].is_null();
        if got.headers.contains_key("content-type") != has_type {
            return Err("Content-Type where there should be none".into());
        }
        for text in ["message", "errors"] {
            let expected = &expected["body"][text];
            let expected: Json = serde_json::from_str(&self.translate(&expected.to_string()))
                .map_err(|e| e.to_string())?;
            if expected != got.body[text] {
                return Err(format!("{text}: {} instead of {expected}", got.body[text]));
            }
        }
        let body = self.translate(&expected["body"].to_string());
        let body = serde_json::from_str(&body).map_err(|e| e.to_string())?;
        same_shape(&body, &got.body, name)
    }

    async fn compare_task(&self, expected: &Json, upid: &str) -> Result<(), Failure> {
        let status = self.task_end(upid).await?;
        for key in ["exitstatus", "type", "id", "user", "tokenid", "status"] {
            let text = self.translate(expected["status"][key].as_str().unwrap_or_default());
            let got = without_pid(status[key].as_str().unwrap_or_default());
            if got != without_pid(&text) {
                return Err(format!("{key}: {got} instead of {text}"));
            }
        }
        same_shape(&expected["status"], &status, "task")?;
        let last = expected["log"].as_array().and_then(|l| l.last()?.as_str()).unwrap_or_default();
        let (_, log) = self.node.tasks.get(upid).ok_or("no task")?.page(0, 0);
        let got = log.as_array().and_then(|l| l.last()?["t"].as_str()).unwrap_or_default();
        // The log of one recording was cut.
        if last.starts_with("TASK") && without_pid(got) != without_pid(&self.translate(last)) {
            return Err(format!("log ends with {got}: {log}"));
        }
        Ok(())
    }

    /// What the request must have done, or not done, beside the answer.
    fn check_effect(&self, name: &str, vmid: u32) -> Result<(), Failure> {
        let check = |ok: bool, text: &str| if ok { Ok(()) } else { Err(text.to_owned()) };
        let conf = self.node.load(vmid);
        let has = |key: &str| conf.as_ref().ok().and_then(|c| c.current.text(key));
        let pending = |key: &str| conf.as_ref().ok().and_then(|c| c.pending.text(key));
        match name {
            "lxc-delete"
            | "lxc-delete-force"
            | "lxc-delete-force-purge"
            | "lxc-delete-during-poststop" => {
                check(conf.is_err(), "the configuration is still there")?;
                check(self.rootfs.join("bin/busybox").exists(), "the rootfs was touched")?;
                check(!self.node.is_running(vmid), "the CT still runs")
            }
            "lxc-create-full" => {
                check(has("hostname").as_deref() == Some("ct110"), "the name was not stored")?;
                check(has("lock").is_none(), "still locked")?;
                let bin = format!("images/{vmid}/subvol-{vmid}-disk-0.subvol/bin/busybox");
                check(self.node.paths.vz.join(bin).exists(), "nothing was unpacked")
            }
            "lxc-create-oci-app_full" => {
                let entrypoint = has("entrypoint");
                let expected = Some("/bin/sh -c 'echo hi'");
                check(entrypoint.as_deref() == expected, "the entrypoint was not taken")?;
                let data = format!("images/{vmid}/subvol-{vmid}-disk-0.subvol/data");
                check(self.node.paths.vz.join(data).is_dir(), "there is no volume directory")
            }
            "lxc-clone-full" => {
                let to = self.vmids[&111];
                let copy = format!("images/{to}/subvol-{to}-disk-0.subvol/bin/file");
                check(self.node.paths.vz.join(copy).exists(), "nothing was copied")?;
                let clone = self.node.load(to)?.current;
                check(clone.text("hostname").as_deref() == Some("clone1"), "not renamed")?;
                check(clone.text("net0") != has("net0"), "the same MAC address twice")
            }
            "lxc-resize" => check(
                has("rootfs").is_some_and(|r| r.ends_with("size=2G")),
                "the new size was not stored",
            ),
            "err-move-volume" => check(
                has("unused0").is_some_and(|u| u.contains("disk-0")),
                "the old volume was forgotten",
            ),
            "lxc-template" => check(has("template").is_some(), "no template"),
            "err-create-template-missing" | "perm-create-rootfs-bind-ticket" => {
                check(conf.is_err(), "the configuration is still there")
            }
            "storage-upload-vztmpl" => {
                let file = "template/cache/up_1.0_amd64.tar.gz";
                check(self.node.paths.vz.join(file).exists(), "nothing was stored")
            }
            "err-put-bridge-missing" => check(has("net0").is_some(), "net0 was not stored"),
            "lxc-put-live-fastplug" => {
                check(has("hostname").as_deref() == Some("other"), "the name was not stored")?;
                check(has("description").as_deref() == Some("x\n"), "the notes were not stored")
            }
            "lxc-put-config-pending" => {
                check(pending("env").as_deref() == Some("Z=1"), "env is not pending")?;
                check(has("hostname").as_deref() == Some("newname"), "the name was not stored")
            }
            "lxc-put-pending-console" => check(pending("console").is_some(), "not pending"),
            "lxc-put-config-revert" => check(
                conf.is_ok_and(|c| c.pending == pve_sim::conf::Section::default()),
                "changes are still pending",
            ),
            "lxc-put-unprotect" => check(has("protection").is_none(), "still protected"),
            "lxc-set-lock-token" => check(has("lock").is_some(), "not locked"),
            "lxc-start" | "lxc-start-entrypoint" | "lxc-reboot" | "lxc-shutdown-timeout" => {
                check(self.node.is_running(vmid), "the CT does not run")
            }
            "lxc-stop" | "lxc-shutdown-forcestop" => {
                check(!self.node.is_running(vmid), "the CT still runs")
            }
            _ => Ok(()),
        }
    }

    async fn reset(&mut self) {
        // What a task still starts would outlive the node.
        for task in self.node.tasks.list() {
            let _ = self.task_end(&task.upid.to_string()).await;
        }
        self.cluster.shut_down().await;
        // New nodes, so that no CT, task, list or lock of one recording is seen by the next.
        self.reopen(Kind::Instant, 0.1);
    }

    async fn end(&self) {
        self.cluster.shut_down().await;
    }
}

fn identity() -> Identity {
    Identity::token("root@pam", "full", false)
}

/// `x.tmp.N` without the number.
fn without_pid(text: &str) -> String {
    match text.split_once(".tmp.") {
        Some((before, after)) => {
            format!("{before}.tmp.{}", after.trim_start_matches(|c: char| c.is_ascii_digit()))
        }
        None => text.to_owned(),
    }
}

/// Each cluster has a directory of its own, as an open one keeps its lock.
fn open(dir: &Path, kind: Kind, scale: f64) -> Arc<Cluster> {
    static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let n = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let options = Options {
        supervisor: pve_sim::unit::Supervisor::Simulator,
        root: dir.join(format!("node-{n}")),
        nodes: vec!["pve1".into()],
        addresses: Vec::new(),
        profile: Profile { kind, scale },
    };
    Cluster::open(&options).expect("a cluster")
}

/// A template that is a plain archive, and one that is an OCI archive.
fn make_templates(dir: &Path, rootfs: &Path) -> PathBuf {
    let templates = dir.join("templates");
    std::fs::create_dir(&templates).expect("a directory");
    let tar = |arguments: &[&str], file: &Path, from: &Path| {
        let mut command = std::process::Command::new("tar");
        command.args(arguments).arg(file).arg("-C").arg(from).arg(".");
        assert!(command.status().expect("tar").success());
    };
    tar(&["-czf"], &templates.join("bb_1.0_amd64.tar.gz"), rootfs);

    let image = dir.join("image");
    let blobs = image.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).expect("a directory");
    let add = |content: &[u8]| -> Json {
        let digest = pve_sim::conf::hex(&Sha256::digest(content));
        std::fs::write(blobs.join(&digest), content).expect("a blob");
        json!({"digest": format!("sha256:{digest}"), "size": content.len()})
    };
    let layer = dir.join("layer.tar");
    tar(&["-cf"], &layer, rootfs);
    let layer = add(&std::fs::read(layer).expect("a layer"));
    let config = json!({"config": {
        "Entrypoint": ["/bin/sh"], "Cmd": ["-c", "echo hi"], "Env": ["PATH=/bin"],
        "WorkingDir": "/", "User": "1000:1000", "StopSignal": "SIGTERM", "Volumes": {"/data": {}},
    }});
    let config = add(config.to_string().as_bytes());
    let manifest = add(json!({"config": config, "layers": [layer]}).to_string().as_bytes());
    let write = |name: &str, text: String| std::fs::write(image.join(name), text).expect("a file");
    write("oci-layout", json!({"imageLayoutVersion": "1.0.0"}).to_string());
    write("index.json", json!({"manifests": [manifest]}).to_string());
    tar(&["-cf"], &templates.join("app.tar"), &image);
    templates
}

fn make_rootfs(dir: &Path) -> PathBuf {
    let rootfs = dir.join("rootfs");
    for name in ["bin", "dev", "etc", "proc", "sys"] {
        std::fs::create_dir_all(rootfs.join(name)).expect("a directory");
    }
    if std::fs::copy("/bin/busybox", rootfs.join("bin/busybox")).is_ok() {
        for name in ["sh", "sleep", "true"] {
            symlink("busybox", rootfs.join("bin").join(name)).expect("a link");
        }
    }
    rootfs
}

/// Compares keys and types, deeply. Entries of lists are paired by what identifies them.
fn same_shape(expected: &Json, got: &Json, at: &str) -> Result<(), Failure> {
    match (expected, got) {
        (Json::Object(a), Json::Object(b)) => {
            for key in a.keys() {
                if !b.contains_key(key) {
                    return Err(format!("{at}.{key} is missing"));
                }
            }
            for key in b.keys() {
                if !a.contains_key(key) {
                    return Err(format!("{at}.{key} should not be there"));
                }
            }
            a.iter().try_for_each(|(k, v)| same_shape(v, &b[k], &format!("{at}.{k}")))
        }
        (Json::Array(a), Json::Array(b)) => {
            if a.len() != b.len() {
                return Err(format!("{at} has {} entries instead of {}", b.len(), a.len()));
            }
            let sorted = |list: &[Json]| {
                let mut list = list.to_vec();
                let of = |row: &Json, key: &str| row[key].as_str().unwrap_or_default().to_owned();
                let keys = ["volid", "roleid", "key", "subdir", "type", "tokenid"];
                list.sort_by_key(|row| keys.map(|key| of(row, key)));
                list
            };
            sorted(a).iter().zip(sorted(b)).try_for_each(|(x, y)| same_shape(x, &y, at))
        }
        (Json::Null, Json::Null)
        | (Json::Bool(_), Json::Bool(_))
        | (Json::Number(_), Json::Number(_))
        | (Json::String(_), Json::String(_)) => Ok(()),
        _ => Err(format!("{at} is {got} instead of {expected}")),
    }
}
