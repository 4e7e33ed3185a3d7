//! Each call is sent as recorded, and its answer understood.

use std::collections::BTreeMap;

use super::*;
use crate::pve::CloneOptions;

/// Answers everything with a recording, and checks that what was asked is what was recorded.
async fn as_recorded<T>(name: &'static str, act: impl AsyncFn(Client) -> Result<T, Error>) -> T {
    let fake = Fake::start(move |_| Reply::recorded(name)).await;
    let answer = act(client(&fake)).await.unwrap_or_else(|error| panic!("{name}: {error:?}"));
    let (seen, expected) = (fake.seen(), recorded(name));
    assert_eq!(seen.len(), 1, "{name}");
    let form = |text: &str| -> BTreeMap<String, String> {
        form_urlencoded::parse(text.as_bytes()).into_owned().collect()
    };
    let (path, query) = seen[0].path.split_once('?').unwrap_or((&seen[0].path, ""));
    assert_eq!(seen[0].method, expected.method(), "{name}");
    assert_eq!(path, expected.path().split('?').next().unwrap(), "{name}");
    let sent = form(if query.is_empty() { &seen[0].body } else { query });
    assert_eq!(sent, expected.form(), "{name}");
    answer
}

#[tokio::test]
async fn cts_are_created_cloned_and_resized() {
    let form = recorded("lxc-create-full").form();
    let config: Vec<(&str, &str)> = form
        .iter()
        .filter(|(key, _)| !["vmid", "ostemplate"].contains(&key.as_str()))
        .map(|(key, value)| (key.as_str(), value.as_str()))
        .collect();
    let template = "local:vztmpl/bb_1.0_amd64.tar.gz";
    let upid =
        as_recorded("lxc-create-full", async |c| c.create(id(110), template, &config).await).await;
    assert_eq!((upid.kind(), upid.id()), ("vzcreate", "110"));
    let options = CloneOptions {
        vmid: id(111),
        hostname: Some("clone1"),
        full: true,
        storage: None,
        snapshot: None,
    };
    let upid = as_recorded("lxc-clone-full", async |c| c.clone_ct(id(110), &options).await).await;
    assert_eq!(upid.kind(), "vzclone");
    let upid = as_recorded("lxc-resize", async |c| c.resize(id(113), "rootfs", "+1G").await).await;
    assert_eq!(upid.kind(), "resize");
}

#[tokio::test]
async fn cts_are_shut_down_and_rebooted() {
    let three = Duration::from_secs(3);
    let upid =
        as_recorded("lxc-shutdown-forcestop", async |c| c.shutdown(id(110), three, true).await)
            .await;
    assert_eq!(upid.kind(), "vzshutdown");
    let upid = as_recorded("lxc-reboot", async |c| c.reboot(id(110), three).await).await;
    assert_eq!(upid.kind(), "vzreboot");
}

#[tokio::test]
async fn snapshots_are_taken_listed_and_rolled_back_to() {
    let upid =
        as_recorded("lxc-snapshot-dir", async |c| c.snapshot(id(110), "s1", None).await).await;
    assert_eq!(upid.kind(), "vzsnapshot");
    let upid = as_recorded("lxc-rollback-missing", async |c| c.rollback(id(110), "s1").await).await;
    assert_eq!(upid.kind(), "vzrollback");
    assert_eq!(as_recorded("lxc-snapshot-list", async |c| c.snapshots(id(100)).await).await, []);
    let fake = Fake::start(|_| Reply::recorded("lxc-rollback-missing")).await;
    let c = client(&fake);
    // No name leaves its place in the path.
    c.delete_snapshot(id(110), "../x?a=b#c d%").await.unwrap();
    assert_eq!(fake.seen()[0].path, "/nodes/pve1/lxc/110/snapshot/..%2Fx%3Fa=b%23c%20d%25");
}

#[tokio::test]
async fn pending_values_and_interfaces_are_read() {
    let values = as_recorded("lxc-pending-after-put", async |c| c.pending(id(110)).await).await;
    assert!(values.iter().any(|value| value.key == "env" && value.pending.is_some()));
    let found = as_recorded("lxc-interfaces-net", async |c| c.interfaces(id(110)).await).await;
    assert_eq!(found.unwrap().len(), 2);
    let fake = Fake::start(|_| Reply::data(json!(null))).await;
    assert_eq!(client(&fake).interfaces(id(999)).await.unwrap(), None);
}

#[tokio::test]
async fn the_cluster_is_described() {
    assert_eq!(as_recorded("nodes", async |c| c.nodes().await).await[0].name, "pve1");
    let status = as_recorded("node-status", async |c| c.node_status().await).await;
    assert_eq!(status.uptime, 3192);
    assert!(as_recorded("cluster-status", async |c| c.cluster_status().await).await.quorate);
    assert_eq!(as_recorded("cluster-nextid", async |c| c.next_id().await).await, id(101));
    let resources = as_recorded("cluster-resources-all", async |c| c.resources().await).await;
    assert_eq!(resources.len(), 4);
    assert_eq!(as_recorded("pools", async |c| c.pools().await).await, []);
    let rights = as_recorded("access-permissions", async |c| c.permissions().await).await;
    assert!(rights["/"].contains("VM.Allocate"));
}

#[tokio::test]
async fn a_vmid_is_free_or_used() {
    assert!(as_recorded("cluster-nextid-free", async |c| c.is_free(id(4242)).await).await);
    assert!(!as_recorded("cluster-nextid-used", async |c| c.is_free(id(100)).await).await);
}

#[tokio::test]
async fn storages_are_listed() {
    let storages = as_recorded("storage-list", async |c| c.storages().await).await;
    assert_eq!(storages[0].name, "local");
    let status = as_recorded("storage-status", async |c| c.storage_status("local").await).await;
    assert_eq!((status.name.as_str(), status.kind.as_str()), ("local", "dir"));
    let volumes = as_recorded("storage-content-vztmpl", async |c| {
        c.storage_content("local", Some("vztmpl")).await
    })
    .await;
    assert_eq!(volumes[0].content, "vztmpl");
}

#[tokio::test]
async fn tasks_are_listed_read_and_stopped() {
    let text = recorded("task-delete-running").path().split('/').nth(4).unwrap().to_owned();
    let upid: Upid = text.parse().unwrap();
    as_recorded("task-delete-running", async |c| c.stop_task(&upid).await).await;
    let text = recorded("task-log-paging").path().split('/').nth(4).unwrap().to_owned();
    let upid: Upid = text.parse().unwrap();
    let lines = as_recorded("task-log-paging", async |c| c.task_log(&upid, 1, 1).await).await;
    assert_eq!(lines.len(), 1);
    let fake = Fake::start(|_| Reply::recorded("tasks-list-active")).await;
    let filter = TaskFilter { active: true, ..TaskFilter::default() };
    let tasks = client(&fake).tasks(&filter).await.unwrap();
    assert_eq!(tasks[0].status, TaskStatus::Running);
    assert!(fake.seen()[0].path.contains("source=active"));
}

#[tokio::test]
async fn an_answer_of_another_shape_is_a_protocol_error() {
    let fake = Fake::start(|_| Reply::Json(json!({}))).await;
    let c = client(&fake);
    let errors = [
        c.list().await.unwrap_err(),
        c.status(id(1000)).await.unwrap_err(),
        c.config(id(1000)).await.unwrap_err(),
        c.pending(id(1000)).await.unwrap_err(),
        c.snapshots(id(1000)).await.unwrap_err(),
        c.nodes().await.unwrap_err(),
        c.node_status().await.unwrap_err(),
        c.cluster_status().await.unwrap_err(),
        c.next_id().await.unwrap_err(),
        c.resources().await.unwrap_err(),
        c.pools().await.unwrap_err(),
        c.permissions().await.unwrap_err(),
        c.storages().await.unwrap_err(),
        c.storage_status("x").await.unwrap_err(),
        c.storage_content("x", None).await.unwrap_err(),
        c.version().await.unwrap_err(),
        c.tasks(&TaskFilter::default()).await.unwrap_err(),
        c.terminal(id(1000)).await.unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(error, Error::Protocol { status: 200, .. }), "{error:?}");
    }
}

fn task_of(name: &str) -> Upid {
    recorded(name).data().as_str().unwrap().parse().unwrap()
}

#[tokio::test]
async fn only_the_end_of_a_long_log_is_read() {
    let fake = Fake::start(|seen| {
        if seen.path.ends_with("/status") {
            return Reply::data(json!({"status": "stopped", "exitstatus": "it broke"}));
        }
        let query = seen.path.split_once('?').unwrap().1;
        let field = |name: &str| -> u64 {
            let mut fields = form_urlencoded::parse(query.as_bytes());
            fields.find(|(key, _)| key == name).unwrap().1.parse().unwrap()
        };
        let (start, limit) = (field("start"), field("limit"));
        let lines: Vec<_> = (start..(start + limit).min(3000))
            .map(|n| if n == 2999 { "TASK ERROR: it broke".into() } else { format!("line {n}") })
            .zip(start + 1..)
            .map(|(t, n)| json!({"n": n, "t": t}))
            .collect();
        Reply::Json(json!({"data": lines, "total": 3000}))
    })
    .await;
    let error = client(&fake).wait(&task_of("lxc-start"), soon()).await.unwrap_err();
    let Error::TaskFailed { log, .. } = error else { panic!("{error:?}") };
    assert_eq!((log.len(), log[0].as_str(), log[9].as_str()), (10, "line 2989", "line 2998"));
    assert_eq!(fake.seen().len(), 3);
}

#[tokio::test]
async fn a_task_is_stopped_at_its_deadline() {
    let fake = Fake::start(|seen| match (seen.method.as_str(), seen.number) {
        ("DELETE", _) => Reply::recorded("task-delete-running"),
        (_, n) if n < 4 => Reply::recorded("task-status-running"),
        _ if seen.path.ends_with("/status") => Reply::recorded("task-status-aborted"),
        _ => Reply::recorded("task-log-running"),
    })
    .await;
    let deadline = Instant::now() + Duration::from_millis(20);
    let error = client(&fake).wait_or_stop(&task_of("lxc-start"), deadline).await.unwrap_err();
    assert!(matches!(error, Error::TaskTimeout { stopped: true, .. }), "{error:?}");
    assert!(error.to_string().contains("and was stopped"), "{error}");
    assert_eq!(changes(&fake), 1);

    // One that ends in time is let alone; one that ends just then is a success.
    let fake = Fake::start(|_| Reply::recorded("task-status-create-ok")).await;
    client(&fake).wait_or_stop(&task_of("lxc-start"), soon()).await.unwrap();
    assert_eq!(changes(&fake), 0);
    let fake = Fake::start(|seen| match seen.method.as_str() {
        "DELETE" => Reply::recorded("task-delete-finished"),
        _ if seen.number < 2 => Reply::recorded("task-status-running"),
        _ => Reply::recorded("task-status-create-ok"),
    })
    .await;
    let deadline = Instant::now() + Duration::from_millis(5);
    client(&fake).wait_or_stop(&task_of("lxc-start"), deadline).await.unwrap();

    // If it cannot be stopped, it has just not ended.
    let fake = Fake::start(|seen| match seen.method.as_str() {
        "DELETE" => Reply::recorded("err-no-permission-config"),
        _ => Reply::recorded("task-status-running"),
    })
    .await;
    let deadline = Instant::now() + Duration::from_millis(20);
    let error = client(&fake).wait_or_stop(&task_of("lxc-start"), deadline).await.unwrap_err();
    assert!(matches!(error, Error::TaskTimeout { stopped: false, .. }), "{error:?}");
}

#[tokio::test]
async fn a_lost_creation_is_its_task_or_stays_unclear() {
    let now = unix_time();
    let fake = after_loss(|| Reply::Close, vec![upid("vzcreate", 110, now)], STOPPED, EXISTS).await;
    let found = client(&fake).create(id(110), "local:vztmpl/x", &[]).await.unwrap();
    assert_eq!(found.to_string(), upid("vzcreate", 110, now));
    assert_eq!(changes(&fake), 1);
    // A CT is there, but who made it?
    let fake = after_loss(|| Reply::Close, vec![], STOPPED, EXISTS).await;
    let error = client(&fake).create(id(110), "local:vztmpl/x", &[]).await.unwrap_err();
    assert!(error.is_unclear(), "{error:?}");
    assert_eq!(changes(&fake), 1);
}
