//! Several nodes, storages, and what administrators do with them.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use pve_sim::cluster::{Cluster, Options};
use pve_sim::control;
use pve_sim::node::Node;
use pve_sim::profile::{Kind, Profile};
use serde_json::{Value as Json, json};

mod client;
use client::exchange_with;

struct World {
    cluster: Arc<Cluster>,
    dir: tempfile::TempDir,
}

impl World {
    fn new(nodes: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = Options {
            supervisor: pve_sim::unit::Supervisor::Simulator,
            root: dir.path().join("node"),
            nodes: nodes.iter().map(|n| (*n).to_owned()).collect(),
            addresses: Vec::new(),
            profile: Profile { kind: Kind::Instant, scale: 0.02 },
        };
        Self { cluster: Cluster::open(&options).unwrap(), dir }
    }

    fn node(&self, name: &str) -> &Arc<Node> {
        self.cluster.node(name).unwrap()
    }

    async fn control(&self, command: Json) -> Result<Json, String> {
        control::command(&self.cluster, &command.to_string()).await
    }

    /// A call of the administrator, who waits for the task.
    async fn admin(&self, method: &str, path: &str, params: Json) -> Result<Json, String> {
        self.control(json!({"call": {"method": method, "path": path, "params": params}})).await
    }

    /// Status and reason of a call to one node with a token.
    async fn call(&self, entry: &str, token: &str, path: &str) -> (u16, String, Json) {
        let request = format!(
            "GET /api2/json{path} HTTP/1.1\r\nConnection: close\r\n\
             Authorization: PVEAPIToken={token}\r\n\r\n"
        );
        let bytes = exchange_with(&self.cluster, self.node(entry), request).await;
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let line = head.lines().next().unwrap().strip_prefix("HTTP/1.1 ").unwrap();
        let (status, reason) = line.split_once(' ').unwrap();
        let body = serde_json::from_str(body).unwrap_or(Json::Null);
        (status.parse().unwrap(), reason.to_owned(), body)
    }

    fn token(&self) -> String {
        let file = self.cluster.dc.root.join("admin-token");
        fs::read_to_string(file).unwrap().trim().to_owned()
    }

    /// Puts a template into a storage directory.
    fn template(&self, storage: &Path) {
        let rootfs = self.dir.path().join("template");
        fs::create_dir_all(rootfs.join("etc")).unwrap();
        fs::write(rootfs.join("etc/os-release"), "ID=debian\n").unwrap();
        let status = std::process::Command::new("tar")
            .arg("-czf")
            .arg(storage.join("template/cache/t.tar.gz"))
            .arg("-C")
            .arg(&rootfs)
            .arg(".")
            .status();
        assert!(status.unwrap().success());
    }

    /// Makes a CT from the template.
    async fn create(&self, vmid: u32, more: Json) -> Result<Json, String> {
        let mut params = json!({
            "vmid": vmid.to_string(), "ostemplate": "local:vztmpl/t.tar.gz", "rootfs": "local:0",
        });
        for (key, value) in more.as_object().unwrap() {
            params[key] = value.clone();
        }
        self.admin("POST", "/nodes/pve1/lxc", params).await
    }

    fn rootfs(&self, vmid: u32) -> String {
        let node = self.cluster.node_of(vmid);
        node.load(vmid).unwrap().current.text("rootfs").unwrap()
    }
}

#[tokio::test]
async fn nodes_answer_for_each_other_until_one_goes_away() {
    let world = World::new(&["pve1", "pve2"]);
    let conf = "arch: amd64\nostype: unmanaged\nrootfs: /nowhere\n";
    fs::write(world.node("pve2").paths.confs.join("200.conf"), conf).unwrap();
    let token = world.token();
    let path = "/nodes/pve2/lxc/200/config";
    for entry in ["pve1", "pve2"] {
        assert_eq!(world.call(entry, &token, path).await.0, 200, "by {entry}");
    }
    let (status, reason, _) = world.call("pve1", &token, "/nodes/pve1/lxc/200/config").await;
    assert_eq!(status, 500);
    assert_eq!(reason, "Configuration file 'nodes/pve1/lxc/200.conf' does not exist");
    let (_, _, nodes) = world.call("pve1", &token, "/cluster/resources").await;
    let guests = nodes["data"].as_array().unwrap().iter().filter(|r| r["type"] == "lxc");
    assert_eq!(guests.map(|r| &r["node"]).collect::<Vec<_>>(), [&json!("pve2")]);

    world.control(json!({"node": {"node": "pve2", "online": false}})).await.unwrap();
    let (status, reason, body) = world.call("pve1", &token, path).await;
    assert_eq!((status, reason.as_str(), body), (595, "No route to host", Json::Null));
    let (_, _, nodes) = world.call("pve1", &token, "/nodes").await;
    let states: Vec<_> = nodes["data"].as_array().unwrap().iter().map(|n| &n["status"]).collect();
    assert_eq!(states, [&json!("online"), &json!("offline")]);
    let gone = exchange_with(&world.cluster, world.node("pve2"), "GET / HTTP/1.1\r\n\r\n").await;
    assert_eq!(gone, b"");
    world.control(json!({"node": {"node": "pve2", "online": true}})).await.unwrap();
    assert_eq!(world.call("pve1", &token, path).await.0, 200);
    assert!(world.node("pve2").paths.units.join("lxc-monitord").exists(), "a service is missing");
}

#[tokio::test]
async fn the_list_of_resources_is_old_and_the_next_vmid_nobody_s() {
    let world = World::new(&["pve1"]);
    let conf = "arch: amd64\nostype: unmanaged\nrootfs: /nowhere\n";
    let put = |vmid: u32| {
        fs::write(world.node("pve1").paths.confs.join(format!("{vmid}.conf")), conf).unwrap()
    };
    let guests = async || {
        let list = world.call("pve1", &world.token(), "/cluster/resources").await.2;
        list["data"].as_array().unwrap().iter().filter(|r| r["type"] == "lxc").count()
    };
    put(200);
    assert_eq!(guests().await, 1);
    put(201);
    let (_, _, list) = world.call("pve1", &world.token(), "/nodes/pve1/lxc").await;
    assert_eq!(list["data"].as_array().unwrap().len(), 2);
    assert_eq!(guests().await, 1, "it must not know of it yet");
    // 10 s in the time of this world.
    tokio::time::sleep(std::time::Duration::from_millis(250)).await;
    assert_eq!(guests().await, 2);

    for _ in 0..2 {
        let next = world.admin("GET", "/cluster/nextid", json!({})).await.unwrap();
        assert_eq!(next, "100");
    }
}

#[tokio::test]
async fn without_quorum_nothing_can_be_changed() {
    let world = World::new(&["pve1", "pve2"]);
    world.template(&world.node("pve1").paths.vz);
    let conf = "arch: amd64\nostype: unmanaged\nrootfs: /nowhere\n";
    fs::write(world.node("pve1").paths.confs.join("200.conf"), conf).unwrap();
    world.control(json!({"quorum": {"quorate": false}})).await.unwrap();
    let path = "/nodes/pve1/lxc/200";
    let error = world.admin("PUT", &format!("{path}/config"), json!({"tags": "a"})).await;
    assert!(error.unwrap_err().ends_with("Permission denied"));
    let error = world.create(201, json!({})).await.unwrap_err();
    assert_eq!(error, "unable to create CT 201 - cluster not ready - no quorum?");
    let ended = world.admin("DELETE", path, json!({})).await.unwrap();
    assert_eq!(ended["exitstatus"], "cluster not ready - no quorum?");
    assert!(world.node("pve1").load(200).is_ok());
    let (_, _, status) = world.call("pve1", &world.token(), "/cluster/status").await;
    assert_eq!(status["data"][0]["quorate"], 0);
    world.control(json!({"quorum": {"quorate": true}})).await.unwrap();
    world.admin("PUT", &format!("{path}/config"), json!({"tags": "a"})).await.unwrap();
}

#[tokio::test]
async fn a_vmid_belongs_to_one_guest_of_any_kind_on_any_node() {
    let world = World::new(&["pve1", "pve2"]);
    world.template(&world.node("pve1").paths.vz);
    let vms = world.cluster.dc.pve.join("nodes/pve2/qemu-server");
    fs::create_dir_all(&vms).unwrap();
    fs::write(vms.join("100.conf"), "memory: 512\n").unwrap();
    fs::write(world.node("pve2").paths.confs.join("101.conf"), "memory: 512\n").unwrap();
    for (vmid, text) in [
        (100, "VM 100 already exists on node 'pve2'"),
        (101, "CT 101 already exists on node 'pve2'"),
    ] {
        assert_eq!(world.create(vmid, json!({})).await.unwrap_err(), text);
    }
    let next = world.admin("GET", "/cluster/nextid", json!({})).await.unwrap();
    assert_eq!(next, "102");
}

#[tokio::test]
async fn of_many_creates_of_one_vmid_one_wins() {
    let world = World::new(&["pve1"]);
    world.template(&world.node("pve1").paths.vz);
    let tries = (0..8).map(|_| world.create(300, json!({})));
    let mut won = 0;
    for result in futures(tries).await {
        match result {
            Ok(status) => {
                assert_eq!(status["exitstatus"], "OK");
                won += 1;
            }
            Err(text) => assert!(text.ends_with("CT 300 already exists on node 'pve1'"), "{text}"),
        }
    }
    assert_eq!(won, 1);
    assert_eq!(world.rootfs(300), "local:300/subvol-300-disk-0.subvol,size=0T");
}

/// Polls all of them to their ends.
async fn futures<F: Future>(list: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut pending: Vec<_> = list.map(Box::pin).collect();
    let mut done = Vec::new();
    std::future::poll_fn(|cx| {
        pending.retain_mut(|f| match f.as_mut().poll(cx) {
            std::task::Poll::Ready(output) => {
                done.push(output);
                false
            }
            std::task::Poll::Pending => true,
        });
        if pending.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    done
}

#[tokio::test]
async fn a_create_that_fails_or_is_interrupted_leaves_nothing() {
    let world = World::new(&["pve1"]);
    let node = world.node("pve1");
    world.template(&node.paths.vz);
    let nothing = || {
        let images = node.paths.vz.join("images");
        assert!(node.load(300).is_err());
        assert_eq!(fs::read_dir(images).map_or(0, |d| d.count()), 0);
    };
    for step in ["begin", "locked", "allocated", "extracted"] {
        let fault = json!({"type": "vzcreate", "step": step, "text": "broken"});
        world.control(json!({"fail-task": fault})).await.unwrap();
        let ended = world.create(300, json!({"mp0": "local:1,mp=/x"})).await.unwrap();
        let status = ended["exitstatus"].as_str().unwrap();
        assert!(status.ends_with("broken"), "{status}");
        nothing();
    }
    world.control(json!({"fill-storage": {"storage": "local", "full": true}})).await.unwrap();
    let ended = world.create(300, json!({})).await.unwrap();
    let text = "unable to create CT 300 - No space left on device";
    assert_eq!(ended["exitstatus"], text);
    nothing();
    let (_, _, status) =
        world.call("pve1", &world.token(), "/nodes/pve1/storage/local/status").await;
    assert_eq!(status["data"]["avail"], 0);
    world.control(json!({"fill-storage": {"storage": "local", "full": false}})).await.unwrap();

    // An archive that is none, and a task that is interrupted while it waits for a lock.
    fs::write(node.paths.vz.join("template/cache/bad.tar.gz"), "no archive").unwrap();
    let ended = world.create(300, json!({"ostemplate": "local:vztmpl/bad.tar.gz"})).await.unwrap();
    let status = ended["exitstatus"].as_str().unwrap();
    assert!(status.ends_with("failed: exit code 2"), "{status}");
    nothing();
    world.control(json!({"hold-lock": {"vmid": 300}})).await.unwrap();
    let interrupt = async {
        let task = loop {
            if let Some(task) = node.tasks.list().into_iter().find(|t| !t.ended()) {
                break task;
            }
            tokio::task::yield_now().await;
        };
        task.interrupt();
    };
    let (ended, ()) = tokio::join!(world.create(300, json!({})), interrupt);
    assert_eq!(ended.unwrap()["exitstatus"], "received interrupt");
    nothing();
}

#[tokio::test]
async fn volumes_are_made_kept_and_freed() {
    let world = World::new(&["pve1"]);
    let node = world.node("pve1");
    world.template(&node.paths.vz);
    let ended = world.create(300, json!({"rootfs": "local:1", "mp0": "local:0,mp=/x"})).await;
    assert_eq!(ended.unwrap()["exitstatus"], "OK");
    let images = node.paths.vz.join("images/300");
    let files = || {
        let mut names: Vec<_> = fs::read_dir(&images)
            .into_iter()
            .flatten()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(files(), ["subvol-300-disk-1.subvol", "vm-300-disk-0.raw"]);
    let conf = |key: &str| node.load(300).unwrap().current.text(key);
    assert_eq!(conf("ostype").as_deref(), Some("debian"));
    assert_eq!(conf("lock"), None);

    let path = "/nodes/pve1/lxc/300/config";
    world.admin("PUT", path, json!({"mp1": "local:0,mp=/y"})).await.unwrap();
    assert_eq!(files().len(), 3);
    world.admin("PUT", path, json!({"delete": "mp1"})).await.unwrap();
    assert_eq!(conf("unused0").as_deref(), Some("local:300/subvol-300-disk-2.subvol"));
    assert_eq!(files().len(), 3);
    world.admin("PUT", path, json!({"delete": "unused0"})).await.unwrap();
    assert_eq!((conf("unused0"), files().len()), (None, 2));

    // What no configuration names goes only if asked for.
    fs::write(images.join("vm-300-disk-9.raw"), "").unwrap();
    world.admin("DELETE", "/nodes/pve1/lxc/300", json!({})).await.unwrap();
    assert_eq!(files(), ["vm-300-disk-9.raw"]);
    world.create(300, json!({})).await.unwrap();
    let all = json!({"destroy-unreferenced-disks": "1"});
    world.admin("DELETE", "/nodes/pve1/lxc/300", all).await.unwrap();
    assert!(!images.exists());
}

#[tokio::test]
async fn templates_are_unpacked_for_the_ids_of_the_ct() {
    use std::os::unix::fs::MetadataExt;
    let world = World::new(&["pve1"]);
    let node = world.node("pve1");
    world.template(&node.paths.vz);
    let (cache, rootfs) = (node.paths.vz.join("template/cache"), world.dir.path().join("template"));
    for (n, (file, option)) in [
        ("t.tar", None),
        ("t.tar.gz", Some("-z")),
        ("t.tar.xz", Some("-J")),
        ("t.tar.zst", Some("--zstd")),
    ]
    .into_iter()
    .enumerate()
    {
        let mut tar = std::process::Command::new("tar");
        tar.args(option).arg("-cf").arg(cache.join(file)).arg("-C").arg(&rootfs).arg(".");
        assert!(tar.status().unwrap().success(), "{file}");
        for (unprivileged, owner) in [(0, 0), (1, 100_000)] {
            let vmid = 300 + 2 * n as u32 + unprivileged;
            let template = format!("local:vztmpl/{file}");
            let more = json!({"ostemplate": template, "unprivileged": unprivileged.to_string()});
            let ended = world.create(vmid, more).await.unwrap();
            assert_eq!(ended["exitstatus"], "OK", "{file}");
            let volume = format!("images/{vmid}/subvol-{vmid}-disk-0.subvol");
            let meta = fs::metadata(node.paths.vz.join(volume).join("etc/os-release")).unwrap();
            assert_eq!((meta.uid(), meta.gid()), (owner, owner), "{file}");
        }
    }
}

#[tokio::test]
async fn a_migration_takes_local_volumes_along() {
    let world = World::new(&["pve1", "pve2"]);
    world.template(&world.node("pve1").paths.vz);
    world.create(300, json!({"mp0": "shared:0,mp=/x"})).await.unwrap();
    let path = "/nodes/pve1/lxc/300/migrate";
    let ended = world.admin("POST", path, json!({"target": "pve2"})).await.unwrap();
    assert_eq!(ended["exitstatus"], "OK");
    assert!(world.node("pve1").load(300).is_err());
    assert_eq!(world.cluster.node_of(300).name, "pve2");
    let volume = "images/300/subvol-300-disk-0.subvol/etc/os-release";
    assert!(world.node("pve2").paths.vz.join(volume).exists());
    assert!(!world.node("pve1").paths.vz.join("images/300").exists());
    let shared = world.cluster.dc.root.join("shared/images/300");
    assert_eq!(fs::read_dir(shared).unwrap().count(), 1);

    // A directory of the host cannot move.
    let conf = "arch: amd64\nostype: unmanaged\nrootfs: /srv\n";
    fs::write(world.node("pve1").paths.confs.join("301.conf"), conf).unwrap();
    let path = "/nodes/pve1/lxc/301/migrate";
    let ended = world.admin("POST", path, json!({"target": "pve2"})).await.unwrap();
    assert_eq!(ended["exitstatus"], "migration aborted");
    assert!(world.node("pve1").load(301).is_ok());
}

#[tokio::test]
async fn rights_follow_roles_pools_and_tokens() {
    let world = World::new(&["pve1"]);
    let conf = "arch: amd64\nostype: unmanaged\nrootfs: /nowhere\n";
    fs::write(world.node("pve1").paths.confs.join("100.conf"), conf).unwrap();
    let admin = async |method: &str, path: &str, params: Json| {
        world.admin(method, path, params).await.unwrap()
    };
    admin("POST", "/access/users", json!({"userid": "joe@pve", "password": "password1"})).await;
    let path = "/access/users/joe@pve/token/t1";
    let made = admin("POST", path, json!({"privsep": "1"})).await;
    let token = format!("joe@pve!t1={}", made["value"].as_str().unwrap());
    let config = "/nodes/pve1/lxc/100/config";
    assert_eq!(world.call("pve1", &token, config).await.0, 403);
    let acl = |user: &str, role: &str, path: &str| {
        let who = if user.contains('!') { "tokens" } else { "users" };
        json!({who: user, "roles": role, "path": path})
    };
    admin("PUT", "/access/acl", acl("joe@pve", "PVEVMUser", "/vms/100")).await;
    // A separated token has nothing of its own yet.
    assert_eq!(world.call("pve1", &token, config).await.0, 403);
    admin("PUT", "/access/acl", acl("joe@pve!t1", "PVEAdmin", "/vms")).await;
    assert_eq!(world.call("pve1", &token, config).await.0, 200);
    let mut delete = acl("joe@pve", "PVEVMUser", "/vms/100");
    delete["delete"] = json!("1");
    admin("PUT", "/access/acl", delete).await;
    assert_eq!(world.call("pve1", &token, config).await.0, 403);
    // By a pool.
    admin("POST", "/pools", json!({"poolid": "p"})).await;
    admin("PUT", "/pools", json!({"poolid": "p", "vms": "100"})).await;
    admin("PUT", "/access/acl", acl("joe@pve", "PVEVMUser", "/pool/p")).await;
    assert_eq!(world.call("pve1", &token, config).await.0, 200);
    let error = world.admin("DELETE", "/pools", json!({"poolid": "p"})).await.unwrap_err();
    assert!(error.ends_with("is not empty"), "{error}");
    admin("DELETE", "/access/users/joe@pve", json!({})).await;
    assert_eq!(world.call("pve1", &token, config).await.0, 401);
}

#[tokio::test]
async fn another_certificate_has_another_fingerprint() {
    let world = World::new(&["pve1"]);
    let before = world.cluster.certificate.fingerprint();
    let ca = world.cluster.certificate.ca_pem();
    let after = world.control(json!({"rotate-certificate": {}})).await.unwrap();
    assert_ne!(after["fingerprint"], json!(before));
    assert_eq!(world.cluster.certificate.ca_pem(), ca);
    let nodes = world.admin("GET", "/nodes", json!({})).await.unwrap();
    assert_eq!(nodes[0]["ssl_fingerprint"], after["fingerprint"]);
}
