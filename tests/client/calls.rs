//! Calls that need state, from a template to a terminal.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;
use shim_proxmox::config::Vmid;
use shim_proxmox::pve::{CloneOptions, Error, Failure, TaskFilter, TaskStatus, Terminal, Upload};
use tokio::time::{Instant, timeout_at};

use crate::world::{World, client, soon, vmid};

const TEMPLATE: &str = "local:vztmpl/busybox.tar";

/// A template with busybox as its shell.
fn template(w: &World) -> PathBuf {
    let path = w.simulator.dir.path().join("busybox.tar");
    let mut tar = tar::Builder::new(std::fs::File::create(&path).unwrap());
    tar.append_path_with_name("/bin/busybox", "bin/busybox").unwrap();
    for name in ["sh", "sleep", "echo"] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        header.set_mode(0o777);
        tar.append_link(&mut header, format!("bin/{name}"), "busybox").unwrap();
    }
    for name in ["dev", "proc", "sys", "etc"] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Directory);
        header.set_size(0);
        header.set_mode(0o755);
        tar.append_data(&mut header, name, std::io::empty()).unwrap();
    }
    tar.finish().unwrap();
    path
}

async fn upload(w: &World) {
    let path = template(w);
    let upload = Upload { content: "vztmpl", name: "busybox.tar", path: &path };
    let upid = w.client.upload("local", &upload, soon()).await.unwrap();
    w.client.wait(&upid, soon()).await.unwrap();
}

/// Creates a CT that sleeps, with a shell as its terminal.
async fn create(w: &World) -> Vmid {
    let vmid = vmid();
    let config = [
        ("hostname", "made"),
        ("ostype", "unmanaged"),
        ("rootfs", "local:0"),
        ("entrypoint", "/bin/sleep 1000"),
        ("cmode", "shell"),
        ("unprivileged", "0"),
    ];
    let upid = w.client.create(vmid, TEMPLATE, &config).await.unwrap();
    w.client.wait(&upid, soon()).await.unwrap();
    vmid
}

#[tokio::test]
async fn a_ct_is_made_of_an_uploaded_template_changed_copied_and_removed() {
    let w = World::new().await;
    upload(&w).await;
    let volumes = w.client.storage_content("local", Some("vztmpl")).await.unwrap();
    let size = std::fs::metadata(w.simulator.dir.path().join("busybox.tar")).unwrap().len();
    let found = volumes.iter().find(|volume| volume.id == TEMPLATE).unwrap();
    assert_eq!(found.size, Some(size));

    let vmid = create(&w).await;
    w.client.put_config(vmid, &[("env", "A=1\0B=two words")], None).await.unwrap();
    let config = w.client.config(vmid).await.unwrap();
    assert_eq!(config.hostname.as_deref(), Some("made"));
    assert_eq!(config.env, ["A=1", "B=two words"]);
    // The liblxc of this machine need not know an environment of that kind.
    w.client.put_config(vmid, &[("delete", "env")], Some(&config.digest)).await.unwrap();
    assert!(!w.client.is_free(vmid).await.unwrap());
    let error = w.client.create(vmid, TEMPLATE, &[]).await.unwrap_err();
    assert_eq!(error.failure(), Some(&Failure::Exists), "{error:?}");

    let upid = w.client.start(vmid).await.unwrap();
    w.client.wait(&upid, soon()).await.unwrap();
    w.client.put_config(vmid, &[("env", "C=3\0D=4")], None).await.unwrap();
    let pending = w.client.pending(vmid).await.unwrap();
    let env = pending.iter().find(|value| value.key == "env").unwrap();
    assert_eq!((env.current.as_deref(), env.pending.as_deref()), (None, Some("C=3\0D=4")));
    assert!(w.client.interfaces(vmid).await.unwrap().is_some());

    let upid = w.client.shutdown(vmid, Duration::from_secs(1), true).await.unwrap();
    w.client.wait(&upid, soon()).await.unwrap();
    assert!(!w.client.status(vmid).await.unwrap().running);

    let copy = self::vmid();
    let options = CloneOptions {
        vmid: copy,
        hostname: Some("copy"),
        full: true,
        storage: None,
        snapshot: None,
    };
    let upid = w.client.clone_ct(vmid, &options).await.unwrap();
    w.client.wait(&upid, soon()).await.unwrap();
    assert_eq!(w.client.config(copy).await.unwrap().hostname.as_deref(), Some("copy"));
    for vmid in [vmid, copy] {
        let upid = w.client.destroy(vmid).await.unwrap();
        w.client.wait(&upid, soon()).await.unwrap();
    }
    let left = w.client.list().await.unwrap();
    assert_eq!(left.iter().map(|ct| ct.vmid).collect::<Vec<_>>(), [w.vmid()]);
}

#[tokio::test]
async fn what_a_creation_lacks_is_named() {
    let w = World::new().await;
    let rootfs = [("rootfs", "local:0"), ("ostype", "unmanaged")];
    let upid = w.client.create(vmid(), "local:vztmpl/nope.tar", &rootfs).await.unwrap();
    let error = w.client.wait(&upid, soon()).await.unwrap_err();
    let missing = Failure::VolumeMissing { volume: "local:vztmpl/nope.tar".into() };
    assert_eq!(error.failure(), Some(&missing), "{error:?}");
    upload(&w).await;
    let error = w.client.create(vmid(), TEMPLATE, &[("rootfs", "nope:1")]).await.unwrap_err();
    let Some(Failure::StorageUnusable { storage, .. }) = error.failure() else {
        panic!("{error:?}")
    };
    assert_eq!(storage, "nope");
    let error = w.client.create(vmid(), TEMPLATE, &[("memory", "many")]).await.unwrap_err();
    let Some(Failure::BadParameter { errors }) = error.failure() else { panic!("{error:?}") };
    assert!(errors.contains_key("memory"), "{errors:?}");

    w.control(json!({"fill-storage": {"storage": "local", "full": true}})).await;
    let upid = w.client.create(vmid(), TEMPLATE, &rootfs).await.unwrap();
    let error = w.client.wait(&upid, soon()).await.unwrap_err();
    assert!(matches!(error.failure(), Some(Failure::StorageFull { .. })), "{error:?}");
}

#[tokio::test]
async fn a_creation_whose_answer_is_lost_or_doubled_makes_one_ct() {
    for effect in [json!("lose-answer"), json!({"garble": {"bytes": 3}}), json!("duplicate")] {
        let w = World::new().await;
        upload(&w).await;
        let (id, config) = (vmid(), [("rootfs", "local:0"), ("ostype", "unmanaged")]);
        let fault = json!({"method": "POST", "path": "/nodes/pve1/lxc", "effect": effect});
        w.control(json!({ "fault": fault })).await;
        match w.client.create(id, TEMPLATE, &config).await {
            Ok(upid) => w.client.wait(&upid, soon()).await.unwrap(),
            // The second of two says so, while the first is at work.
            Err(error) => {
                assert_eq!(error.failure(), Some(&Failure::Exists), "{effect}: {error:?}")
            }
        }
        let filter = TaskFilter { vmid: Some(id), kind: Some("vzcreate"), ..Default::default() };
        let done = |status: &TaskStatus| *status == TaskStatus::Stopped { exitstatus: "OK".into() };
        let begun = Instant::now();
        let tasks = loop {
            let tasks = w.client.tasks(&filter).await.unwrap();
            if tasks.iter().all(|task| task.status != TaskStatus::Running) {
                break tasks;
            }
            assert!(begun.elapsed() < Duration::from_secs(10));
        };
        assert_eq!(tasks.iter().filter(|task| done(&task.status)).count(), 1, "{effect}");
        assert_eq!(w.client.list().await.unwrap().len(), 2, "{effect}");
    }
}

#[tokio::test]
async fn of_creations_that_were_told_the_same_vmid_one_wins() {
    let w = World::new().await;
    upload(&w).await;
    let tries = (0..6).map(|_| {
        let client = w.client.clone();
        tokio::spawn(async move {
            let id = client.next_id().await.unwrap();
            let config = [("rootfs", "local:0"), ("ostype", "unmanaged")];
            let result = match client.create(id, TEMPLATE, &config).await {
                Ok(upid) => client.wait(&upid, soon()).await,
                Err(error) => Err(error),
            };
            (id, result)
        })
    });
    let mut won = Vec::new();
    for task in tries.collect::<Vec<_>>() {
        match task.await.unwrap() {
            (id, Ok(())) => won.push(id),
            (_, Err(error)) => assert_eq!(error.failure(), Some(&Failure::Exists), "{error:?}"),
        }
    }
    // Who asked after the first creation was told the next VMID; none is there twice.
    let distinct: std::collections::BTreeSet<_> = won.iter().collect();
    assert!(!won.is_empty() && distinct.len() == won.len(), "{won:?}");
    assert_eq!(w.client.list().await.unwrap().len(), won.len() + 1);
}

#[tokio::test]
async fn snapshots_that_the_storage_cannot_take_are_refused_by_their_task() {
    let w = World::new().await;
    upload(&w).await;
    let vmid = create(&w).await;
    assert_eq!(w.client.snapshots(vmid).await.unwrap(), []);
    let upid = w.client.snapshot(vmid, "s1", Some("first")).await.unwrap();
    let error = w.client.wait(&upid, soon()).await.unwrap_err();
    assert!(error.to_string().contains("snapshot feature is not available"), "{error}");
    let upid = w.client.rollback(vmid, "s1").await.unwrap();
    let error = w.client.wait(&upid, soon()).await.unwrap_err();
    let missing = Failure::SnapshotMissing { snapshot: "s1".into() };
    assert_eq!(error.failure(), Some(&missing), "{error:?}");
}

/// Reads until there is such output.
async fn until(terminal: &mut Terminal, output: &str) {
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains(output) {
        match timeout_at(soon(), terminal.read()).await {
            Ok(Ok(Some(output))) => seen.extend_from_slice(&output),
            other => panic!("{other:?} after {:?}", String::from_utf8_lossy(&seen)),
        }
    }
}

#[tokio::test]
async fn a_terminal_runs_a_shell_in_the_ct() {
    let w = World::new().await;
    upload(&w).await;
    let vmid = create(&w).await;
    let upid = w.client.start(vmid).await.unwrap();
    w.client.wait(&upid, soon()).await.unwrap();
    // The simulator's termproxy waits for less than a real one, as everything here.
    let mut terminal = w.client.terminal(vmid).await.unwrap();
    terminal.resize(80, 24).await.unwrap();
    // What is typed before the shell has set its terminal up is lost.
    until(&mut terminal, "# ").await;
    terminal.write(b"echo $((6*7))ok\n").await.unwrap();
    until(&mut terminal, "42ok").await;
    terminal.keep_alive().await.unwrap();
    terminal.write(b"exit\n").await.unwrap();
    while timeout_at(soon(), terminal.read()).await.expect("an end in time").unwrap().is_some() {}
}

#[tokio::test]
async fn a_user_logs_in_and_may_what_a_token_may_not() {
    let w = World::new().await;
    let password = std::fs::read_to_string(w.simulator.get("password_file")).unwrap();
    let file = w.simulator.dir.path().join("password");
    let configuration = |text: &str| {
        use std::os::unix::fs::PermissionsExt;
        std::fs::write(&file, text).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        let lines = w.simulator.configuration();
        let lines = lines.lines().filter(|line| !line.starts_with("token_file"));
        lines.map(|line| format!("{line}\n")).collect::<String>()
            + &format!("password_file = \"{}\"\n", file.display())
    };
    let user = client(&configuration(&password.replacen('=', ":", 1)));
    user.check().await.unwrap();
    let upid = user.start(w.vmid()).await.unwrap();
    user.wait(&upid, soon()).await.unwrap();
    assert_eq!(upid.user(), "root@pam");
    // Bind mounts are for root@pam alone, and no token is that.
    let changes = [("mp0", "/srv,mp=/x")];
    let error = w.client.put_config(w.vmid(), &changes, None).await.unwrap_err();
    assert!(matches!(error, Error::Permission { .. }), "{error:?}");
    assert_eq!(user.stop_ours(&w.ours, soon()).await.unwrap(), shim_proxmox::pve::Outcome::Done);
    user.put_config(w.vmid(), &changes, None).await.unwrap();

    let wrong = client(&configuration("root@pam:nope\n"));
    let error = wrong.check().await.unwrap_err();
    assert!(matches!(error, Error::Authentication { .. }), "{error:?}");
}

#[tokio::test]
async fn what_there_is_can_be_listed() {
    let w = World::new().await;
    assert_eq!(w.client.nodes().await.unwrap()[0].name, "pve1");
    assert!(!w.client.node_status().await.unwrap().pve_version.is_empty());
    assert!(w.client.cluster_status().await.unwrap().quorate);
    assert!(w.client.is_free(vmid()).await.unwrap());
    w.client.next_id().await.unwrap();
    assert!(w.client.permissions().await.unwrap()["/"].contains("VM.Allocate"));
    assert_eq!(w.client.pools().await.unwrap(), []);
    assert!(w.client.resources().await.unwrap().iter().any(|r| r.vmid == Some(w.vmid())));
    let storages = w.client.storages().await.unwrap();
    let local = storages.iter().find(|storage| storage.name == "local").unwrap();
    assert_eq!(w.client.storage_status("local").await.unwrap().kind, local.kind);
}
