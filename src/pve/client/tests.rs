mod calls;
mod failover;
mod faults;
mod login;
mod terminal;
mod upload;

use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;

use tokio::time::sleep;

use super::change::unix_time;
use super::tasks::pause;
use super::*;
use crate::config::{Fingerprint, Trust};
use crate::pve::fake::{Fake, Reply, Seen};
use crate::pve::fixtures::recorded;
use crate::pve::identity::{Id128, Identity, NotOurs};
use crate::pve::{Failure, TaskStatus, Upid};

const SECRET: &str = "5ec4e700-89ab-cdef-0123-456789abcdef";
const TOKEN: &str = "root@pam!full";

fn config(fake: &Fake, trust: Trust) -> Config {
    use std::os::unix::fs::OpenOptionsExt;
    let token_file = fake.dir.path().join("token");
    let _ = std::fs::remove_file(&token_file);
    let mut file = std::fs::File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&token_file)
        .unwrap();
    std::io::Write::write_all(&mut file, format!("{TOKEN}={SECRET}\n").as_bytes()).unwrap();
    let text = format!(
        "[proxmox]\nendpoint = \"https://{}\"\nnode = \"pve1\"\ntoken_file = \"{}\"\n\
         connect_timeout = 1\nrequest_timeout = 2\n",
        fake.address,
        token_file.display()
    );
    let mut config = Config::from_toml(&text, "/etc/x.toml").unwrap();
    config.proxmox.trust = trust;
    config
}

fn client(fake: &Fake) -> Client {
    Client::new(&config(fake, pin(fake))).unwrap()
}

fn pin(fake: &Fake) -> Trust {
    Trust::Fingerprints(vec![fake.fingerprint])
}

fn id(n: u32) -> Vmid {
    Vmid::new(n).unwrap()
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

/// The recorded answer whose request this is, or a failure of the test.
fn contract(seen: &Seen) -> Reply {
    let names = [
        "nodes",
        "version-token",
        "lxc-list",
        "lxc-config-full",
        "lxc-status-current-running-full",
        "lxc-start",
        "lxc-stop",
        "lxc-put-live-fastplug",
        "lxc-delete",
        "task-log-create-ok",
        "task-status-running",
    ];
    for name in names {
        let r = recorded(name);
        if r.method() == seen.method && r.path().split('?').next() == seen.path.split('?').next() {
            return Reply::Recorded(r);
        }
    }
    panic!("no recording of {} {}", seen.method, seen.path)
}

#[tokio::test]
async fn each_call_is_sent_as_recorded_and_understood() {
    let fake = Fake::start(contract).await;
    let c = client(&fake);
    c.check().await.unwrap();
    assert_eq!(c.version().await.unwrap().version, "9.2.11");
    assert_eq!(c.list().await.unwrap()[0].vmid, id(100));
    assert_eq!(c.config(id(110)).await.unwrap().tags.as_deref(), Some("containerd;k8s"));
    assert!(c.status(id(110)).await.unwrap().running);
    assert_eq!(c.start(id(110)).await.unwrap().kind(), "vzstart");
    assert_eq!(c.stop(id(110)).await.unwrap().kind(), "vzstop");
    assert_eq!(c.destroy(id(180)).await.unwrap().kind(), "vzdestroy");
    c.put_config(id(500), &[("tags", "a;b"), ("description", "x y")], Some("abc")).await.unwrap();
    let upid: Upid =
        recorded("task-status-running").data()["upid"].as_str().unwrap().parse().unwrap();
    assert_eq!(c.task_status(&upid).await.unwrap(), TaskStatus::Running);
    let seen = fake.seen();
    assert!(
        seen.iter().all(|s| s.header("authorization") == format!("PVEAPIToken={TOKEN}={SECRET}"))
    );
    let put = seen.iter().find(|s| s.method == "PUT").unwrap();
    assert_eq!(put.body, "tags=a%3Bb&description=x+y&digest=abc");
    // A UPID goes into the path as it is.
    assert!(seen.last().unwrap().path.contains(&upid.to_string()), "{:?}", seen.last());
    assert!(seen.iter().all(|s| s.method != "POST" || s.header("content-length") == "0"));
    // Nothing that changes anything has a body or query that could widen it.
    assert!(seen.iter().filter(|s| s.method != "PUT").all(|s| s.body.is_empty()));
    assert!(seen.iter().any(|s| s.method == "DELETE" && s.path == "/nodes/pve1/lxc/180"));
}

#[tokio::test]
async fn a_401_names_token_and_file_but_never_the_secret() {
    let fake = Fake::start(|_| Reply::recorded("err-bad-token")).await;
    let c = client(&fake);
    let error = c.check().await.unwrap_err();
    let text = error.to_string();
    for part in [TOKEN, "Authentication failed!", fake.dir.path().to_str().unwrap()] {
        assert!(text.contains(part), "{text}");
    }
    let all = format!("{text} {error:?} {c:?} {:?}", config(&fake, Trust::SystemRoots));
    assert!(!all.contains("5ec4e700"), "{all}");
    // Each costs 3 s at Proxmox: one is enough.
    assert_eq!(fake.seen().len(), 1);
}

#[tokio::test]
async fn the_configured_node_must_exist() {
    let fake = Fake::start(|_| Reply::data(json!([{"node": "a"}, {"node": "b"}]))).await;
    let error = client(&fake).check().await.unwrap_err();
    assert!(matches!(error, Error::NodeUnknown { .. }), "{error:?}");
    assert!(
        error.to_string().contains("no node 'pve1' (it has a, b); set proxmox.node"),
        "{error}"
    );
}

#[tokio::test]
async fn what_is_not_proxmox_is_told() {
    let html = "HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n<html></html>";
    let redirect =
        "HTTP/1.1 302 Found\r\nLocation: https://192.0.2.1/\r\nContent-Length: 0\r\n\r\n";
    let nothing = "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n";
    for raw in [html, redirect, nothing] {
        let fake = Fake::start(move |_| Reply::Raw(raw.into())).await;
        let error = client(&fake).check().await.unwrap_err();
        assert!(matches!(error, Error::Protocol { .. }), "{error:?}");
        assert!(error.to_string().contains("check proxmox.endpoint"), "{error}");
    }
    let fake = Fake::start(|_| Reply::recorded("err-path-unknown")).await;
    let error = client(&fake).check().await.unwrap_err();
    assert!(matches!(error, Error::Protocol { status: 501, .. }), "{error:?}");
    // Not even HTTP: speaks first, and no TLS.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut plain = config(&fake, pin(&fake));
    plain.proxmox.endpoints = vec![format!("https://{}", listener.local_addr().unwrap())];
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let _ = tokio::io::AsyncWriteExt::write_all(&mut socket, b"SSH-2.0-OpenSSH_9.2p1\r\n")
                .await;
            let _ = tokio::io::copy(&mut socket, &mut tokio::io::sink()).await;
        }
    });
    let error = Client::new(&plain).unwrap().check().await.unwrap_err();
    assert!(matches!(error, Error::Tls { .. }), "{error:?}");
}

#[tokio::test]
async fn a_wrong_fingerprint_shows_both() {
    let fake = Fake::start(contract).await;
    let wrong = Fingerprint([0xab; 32]);
    let error = Client::new(&config(&fake, Trust::Fingerprints(vec![wrong])))
        .unwrap()
        .check()
        .await
        .unwrap_err();
    let Error::FingerprintMismatch { presented, configured, .. } = &error else {
        panic!("{error:?}")
    };
    assert_eq!((*presented, configured.as_slice()), (fake.fingerprint, &[wrong][..]));
    let text = error.to_string();
    for part in [presented.to_string().as_str(), &wrong.to_string(), "pvenode cert info"] {
        assert!(text.contains(part), "{text}");
    }
    assert!(fake.seen().is_empty(), "the token was sent to an unknown server");
    // No change of theirs can be unclear.
    assert!(!error.is_unclear());
}

#[tokio::test]
async fn a_ca_file_vouches_for_its_certificates_and_names_only() {
    let fake = Fake::start(contract).await;
    Client::new(&config(&fake, Trust::CaFile(fake.ca_file.clone())))
        .unwrap()
        .check()
        .await
        .unwrap();
    let other = Fake::start(contract).await;
    let error = Client::new(&config(&fake, Trust::CaFile(other.ca_file.clone())))
        .unwrap()
        .check()
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Untrusted { .. }), "{error:?}");
    assert!(error.to_string().contains("proxmox.ca_file"), "{error}");
    let named = Fake::start_for("pve.example.com", contract).await;
    let error = Client::new(&config(&named, Trust::CaFile(named.ca_file.clone())))
        .unwrap()
        .check()
        .await
        .unwrap_err();
    assert!(error.to_string().contains("not made out to that host"), "{error}");
    // A pin needs no name.
    Client::new(&config(&named, pin(&named))).unwrap().check().await.unwrap();
    assert!(fake.seen().len() == 1);
}

#[tokio::test]
async fn system_roots_do_not_trust_a_private_authority() {
    let fake = Fake::start(contract).await;
    match Client::new(&config(&fake, Trust::SystemRoots)) {
        Ok(c) => {
            let error = c.check().await.unwrap_err();
            assert!(matches!(error, Error::Untrusted { .. }), "{error:?}");
        }
        Err(error) => assert!(error.to_string().contains("ca-certificates"), "{error}"),
    }
}

#[tokio::test]
async fn bad_ca_files_and_tokens_are_told_before_connecting() {
    let fake = Fake::start(contract).await;
    let empty = fake.dir.path().join("empty.pem");
    std::fs::write(&empty, "no certificate").unwrap();
    for path in [empty, fake.dir.path().join("none.pem")] {
        let error = Client::new(&config(&fake, Trust::CaFile(path.clone()))).unwrap_err();
        assert!(matches!(error, Error::CaFile { .. }), "{error:?}");
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
    let config = config(&fake, pin(&fake));
    std::fs::remove_file(fake.dir.path().join("token")).unwrap();
    assert!(matches!(Client::new(&config), Err(Error::SecretFile(_))));
}

#[tokio::test]
async fn an_unreachable_endpoint_is_not_sent_to() {
    let fake = Fake::start(contract).await;
    let mut config = config(&fake, pin(&fake));
    let port = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    config.proxmox.endpoints = vec![format!("https://127.0.0.1:{port}")];
    let error = Client::new(&config).unwrap().start(id(110)).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { sent: false, .. }), "{error:?}");
    let text = error.to_string();
    assert!(
        text.contains(&config.proxmox.endpoints[0]) && text.contains("Connection refused"),
        "{text}"
    );

    // Accepts connections, but is no TLS server: the connect time-out covers the handshake.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    config.proxmox.endpoints = vec![format!("https://{}", listener.local_addr().unwrap())];
    let error = Client::new(&config).unwrap().start(id(110)).await.unwrap_err();
    assert!(matches!(error, Error::Timeout { sent: false, .. }), "{error:?}");
}

#[tokio::test]
async fn a_silent_server_runs_into_the_deadline() {
    let fake = Fake::start(|_| Reply::Silence).await;
    let error = client(&fake).check().await.unwrap_err();
    assert!(matches!(error, Error::Timeout { sent: true, .. }), "{error:?}");
    // A time-out is not repeated.
    assert_eq!(fake.seen().len(), 1);
}

#[tokio::test]
async fn a_broken_get_is_repeated_and_gives_up_after_three() {
    let fake =
        Fake::start(|seen| if seen.number < 2 { Reply::Close } else { contract(seen) }).await;
    client(&fake).check().await.unwrap();
    assert_eq!(fake.seen().len(), 3);
    let half = "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{\"data\":";
    let fake = Fake::start(|_| Reply::Raw(half.into())).await;
    let error = client(&fake).check().await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { sent: true, .. }), "{error:?}");
    assert_eq!(fake.seen().len(), 3);
}

fn upid(task: &str, vmid: u32, starttime: u64) -> String {
    format!("UPID:pve1:00000500:000500F1:{starttime:08X}:{task}:{vmid}:{TOKEN}:")
}

/// `lost` for every POST and DELETE; then the given task list, state and configuration.
async fn after_loss(
    lost: fn() -> Reply,
    tasks: Vec<String>,
    status: &'static str,
    config: &'static str,
) -> Fake {
    Fake::start(move |seen| match seen.method.as_str() {
        "POST" | "DELETE" => lost(),
        _ if seen.is("GET", "/nodes/pve1/tasks") => {
            Reply::data(tasks.iter().map(|upid| json!({ "upid": upid })).collect())
        }
        _ if seen.path.ends_with("/status/current") => Reply::recorded(status),
        _ if seen.path.ends_with("/config") => Reply::recorded(config),
        _ => panic!("{seen:?}"),
    })
    .await
}

fn changes(fake: &Fake) -> usize {
    fake.seen().iter().filter(|s| s.method != "GET").count()
}

const RUNNING: &str = "lxc-status-current-running-full";
const STOPPED: &str = "lxc-status-current-stopped";
const EXISTS: &str = "lxc-config";
const MISSING: &str = "err-ct-missing-config";

#[tokio::test]
async fn a_lost_answer_is_found_again_as_its_task_and_nothing_is_sent_twice() {
    let losses: [fn() -> Reply; 4] = [
        || Reply::Close,
        || Reply::Silence,
        || Reply::Raw("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{\"da".into()),
        || Reply::Raw("HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n{\"data\":".into()),
    ];
    for lost in losses {
        let now = unix_time();
        let foreign = upid("vzstart", 110, now).replace(TOKEN, "root@pam");
        let tasks = vec![
            upid("vzstart", 110, now - 1000),
            upid("vzstop", 110, now),
            upid("vzstart", 111, now),
            foreign,
            upid("vzstart", 110, now),
        ];
        let fake = after_loss(lost, tasks, RUNNING, EXISTS).await;
        let found = client(&fake).start(id(110)).await.unwrap();
        assert_eq!(found.to_string(), upid("vzstart", 110, now));
        assert_eq!(changes(&fake), 1);
        let query = &fake.seen()[1].path;
        assert!(query.contains("vmid=110") && query.contains("typefilter=vzstart"), "{query}");
    }
}

#[tokio::test]
async fn the_task_of_an_earlier_request_is_not_that_of_a_lost_one() {
    let earlier = upid("vzstart", 110, unix_time());
    let answered = AtomicUsize::new(0);
    let tasks = earlier.clone();
    let fake = Fake::start(move |seen| match seen.method.as_str() {
        "POST" if answered.fetch_add(1, Ordering::SeqCst) == 0 => Reply::data(json!(tasks)),
        "POST" => Reply::Close,
        _ if seen.is("GET", "/nodes/pve1/tasks") => Reply::data(json!([{ "upid": tasks }])),
        _ => Reply::recorded(STOPPED),
    })
    .await;
    let client = client(&fake);
    assert_eq!(client.start(id(110)).await.unwrap().to_string(), earlier);
    // In the same second; the CT has ended meanwhile.
    let error = client.start(id(110)).await.unwrap_err();
    assert!(error.is_unclear(), "{error:?}");
}

#[tokio::test]
async fn without_a_task_the_state_tells_what_became_of_a_lost_request() {
    let lost = || Reply::Close;
    let fake = after_loss(lost, vec![], RUNNING, EXISTS).await;
    let error = client(&fake).start(id(110)).await.unwrap_err();
    assert_eq!(error.failure(), Some(&Failure::AlreadyRunning), "{error:?}");
    assert_eq!(changes(&fake), 1);

    let fake = after_loss(lost, vec![], STOPPED, EXISTS).await;
    let error = client(&fake).start(id(110)).await.unwrap_err();
    assert!(error.is_unclear(), "{error:?}");
    assert_eq!(changes(&fake), 1);
    let error = client(&fake).stop(id(110)).await.unwrap_err();
    assert_eq!(error.failure(), Some(&Failure::NotRunning), "{error:?}");

    let fake = after_loss(lost, vec![], STOPPED, MISSING).await;
    let error = client(&fake).destroy(id(110)).await.unwrap_err();
    assert_eq!(error.failure(), Some(&Failure::NotFound), "{error:?}");
    assert_eq!(changes(&fake), 1);
    let fake = after_loss(lost, vec![], STOPPED, EXISTS).await;
    let error = client(&fake).destroy(id(110)).await.unwrap_err();
    assert!(error.is_unclear(), "{error:?}");
    assert_eq!(changes(&fake), 1);
}

#[tokio::test]
async fn a_clear_refusal_is_not_read_back() {
    let fake = Fake::start(|_| Reply::recorded("err-start-running")).await;
    let error = client(&fake).start(id(100)).await.unwrap_err();
    assert_eq!(error.failure(), Some(&Failure::AlreadyRunning));
    assert_eq!(fake.seen().len(), 1);
}

#[tokio::test]
async fn a_post_on_a_pooled_connection_that_just_closed_arrives_once() {
    // Each answer says Keep-Alive, and the server closes while the connection is in the pool.
    let fake = Fake::start(|seen| match seen.method.as_str() {
        "GET" => {
            let body = recorded("nodes").body();
            let head = "HTTP/1.1 200 OK\r\nConnection: Keep-Alive\r\n";
            Reply::Raw(format!(
                "{head}Content-Length: {}\r\n\r\n{}",
                body.len(),
                String::from_utf8(body).unwrap()
            ))
        }
        _ => contract(seen),
    })
    .await;
    let c = client(&fake);
    for _ in 0..20 {
        c.check().await.unwrap();
        c.start(id(110)).await.unwrap();
    }
    assert_eq!(changes(&fake), 20);
}

fn task_reply(seen: &Seen, running: &AtomicUsize, name: &str) -> Reply {
    let r = recorded(name);
    if seen.path.ends_with("/status") {
        if running.fetch_sub(1, Ordering::SeqCst) > 1 {
            return Reply::recorded("task-status-running");
        }
        return Reply::data(r.task_status().clone());
    }
    let lines = r.task_log().into_iter().enumerate().map(|(n, t)| json!({"n": n + 1, "t": t}));
    Reply::data(lines.collect())
}

#[tokio::test]
async fn waiting_ends_with_the_task() {
    let running = AtomicUsize::new(5);
    let fake = Fake::start(move |seen| task_reply(seen, &running, "lxc-start")).await;
    let upid = recorded("lxc-start").data().as_str().unwrap().parse().unwrap();
    client(&fake).wait(&upid, soon()).await.unwrap();
    assert_eq!(fake.seen().len(), 5);
}

#[tokio::test]
async fn a_failed_task_gives_its_text_and_log() {
    let running = AtomicUsize::new(2);
    let fake =
        Fake::start(move |seen| task_reply(seen, &running, "err-start-during-poststop")).await;
    let upid = recorded("err-start-during-poststop").data().as_str().unwrap().parse().unwrap();
    let error = client(&fake).wait(&upid, soon()).await.unwrap_err();
    let Error::TaskFailed { text, log, .. } = &error else { panic!("{error:?}") };
    assert_eq!(text, "unable to get PID for CT 500 (not running?)");
    assert_eq!(log[0], "problem with monitor socket, but continuing anyway: got timeout");
    assert!(error.to_string().contains("(log: problem with monitor socket"), "{error}");

    let running = AtomicUsize::new(1);
    let fake = Fake::start(move |seen| task_reply(seen, &running, "err-locked-stop")).await;
    let upid = recorded("err-locked-stop").data().as_str().unwrap().parse().unwrap();
    let error = client(&fake).wait(&upid, soon()).await.unwrap_err();
    assert_eq!(error.failure(), Some(&Failure::Locked { by: "backup".into() }));
}

#[tokio::test]
async fn waiting_survives_broken_connections_and_ends_at_the_deadline() {
    let fake = Fake::start(|seen| {
        if seen.number < 4 { Reply::Close } else { Reply::recorded("task-status-running") }
    })
    .await;
    let upid = recorded("lxc-start").data().as_str().unwrap().parse().unwrap();
    let begun = Instant::now();
    let error = client(&fake).wait(&upid, begun + Duration::from_millis(1500)).await.unwrap_err();
    assert!(matches!(error, Error::TaskTimeout { .. }), "{error:?}");
    assert!(begun.elapsed() < Duration::from_millis(3000), "{:?}", begun.elapsed());
    // Silence is cut off at the deadline too.
    let fake = Fake::start(|_| Reply::Silence).await;
    let begun = Instant::now();
    client(&fake).wait(&upid, begun + Duration::from_millis(200)).await.unwrap_err();
    assert!(begun.elapsed() < Duration::from_millis(1900), "{:?}", begun.elapsed());
}

#[test]
fn polling_is_quick_at_first_and_rare_later() {
    // As if each question took 8 ms, as on a real node.
    let (mut now, mut asked) = (Duration::ZERO, Vec::new());
    while now < Duration::from_secs(60) {
        now += pause(now);
        asked.push(now);
        now += Duration::from_millis(8);
    }
    let between = |from: u64, to: u64| {
        let (from, to) = (Duration::from_millis(from), Duration::from_millis(to));
        asked.iter().filter(|t| (from..to).contains(*t)).count()
    };
    // A task of up to 80 ms is seen to end within 10 ms, not counting the question itself.
    let short = asked.iter().filter(|t| **t < Duration::from_millis(80));
    assert!(short.map(|t| pause(*t)).max().unwrap() <= Duration::from_millis(10));
    assert!(between(0, 1000) < 40, "{}", between(0, 1000));
    assert!(between(10_000, 20_000) <= 30, "{}", between(10_000, 20_000));
}

fn identity() -> Identity {
    Identity {
        install_id: Id128::random().unwrap(),
        vmid: id(500),
        namespace: "default".into(),
        container_id: "web".into(),
        nonce: Id128::random().unwrap(),
        boot_id: Id128::random().unwrap(),
    }
}

fn conf_of(identity: &Identity) -> serde_json::Value {
    json!({
        "digest": "0", "description": identity.notes(&[]),
        "lxc": [["lxc.include", "/run/containerd-shim-proxmox/default/web/lxc.conf"]],
    })
}

/// A CT with this configuration whose stop and destroy end as `act` says.
async fn node_with(
    conf: serde_json::Value,
    act: impl Fn(usize) -> Reply + Send + Sync + 'static,
    task: &'static str,
) -> Fake {
    let acted = AtomicUsize::new(0);
    Fake::start(move |seen| match seen.method.as_str() {
        "POST" | "DELETE" => act(acted.fetch_add(1, Ordering::SeqCst)),
        _ if seen.is("GET", "/nodes/pve1/lxc/500/config") => Reply::data(conf.clone()),
        _ if seen.is("GET", "/nodes/pve1/tasks") => Reply::data(json!([])),
        _ if seen.path.ends_with("/status/current") => Reply::recorded(RUNNING),
        _ => task_reply(seen, &AtomicUsize::new(1), task),
    })
    .await
}

#[tokio::test]
async fn our_ct_is_stopped_and_destroyed() {
    let ours = identity();
    let fake = node_with(conf_of(&ours), |_| Reply::recorded("lxc-stop"), "lxc-stop").await;
    assert_eq!(client(&fake).stop_ours(&ours, soon()).await.unwrap(), Outcome::Done);
    let calls = fake.calls();
    assert_eq!(
        calls[..2],
        ["GET /nodes/pve1/lxc/500/config", "POST /nodes/pve1/lxc/500/status/stop"]
    );
    let fake = node_with(conf_of(&ours), |_| Reply::recorded("lxc-delete"), "lxc-delete").await;
    assert_eq!(client(&fake).destroy_ours(&ours, soon()).await.unwrap(), Outcome::Done);
    assert_eq!(fake.calls()[1], "DELETE /nodes/pve1/lxc/500");
}

#[tokio::test]
async fn a_foreign_ct_is_never_touched() {
    let ours = identity();
    let theirs = Identity { nonce: Id128::random().unwrap(), ..ours.clone() };
    let clone = Identity { vmid: id(501), ..ours.clone() };
    let edited = json!({"digest": "0", "description": ours.to_string()});
    for conf in [
        conf_of(&theirs),
        conf_of(&clone),
        edited,
        json!({"digest": "0", "description": "my database"}),
        json!({}),
    ] {
        let fake = node_with(conf, |_| panic!("touched"), "lxc-stop").await;
        for result in [
            client(&fake).stop_ours(&ours, soon()).await,
            client(&fake).destroy_ours(&ours, soon()).await,
        ] {
            let error = result.unwrap_err();
            assert!(matches!(error, Error::NotOurs { .. }), "{error:?}");
            assert!(error.to_string().starts_with("CT 500 was left alone: "), "{error}");
        }
        assert_eq!(changes(&fake), 0);
    }
    let fake = node_with(conf_of(&theirs), |_| panic!("touched"), "lxc-stop").await;
    let error = client(&fake).destroy_ours(&ours, soon()).await.unwrap_err();
    assert!(
        matches!(error, Error::NotOurs { reason: NotOurs::Differs { field: "nonce", .. }, .. }),
        "{error:?}"
    );
}

#[tokio::test]
async fn the_identity_is_verified_again_before_each_repetition() {
    // The first destroy meets a lock; meanwhile somebody else takes the VMID.
    let ours = identity();
    let theirs = conf_of(&Identity { nonce: Id128::random().unwrap(), ..ours.clone() });
    let mine = conf_of(&ours);
    let fake = Fake::start(move |seen| match seen.method.as_str() {
        "GET" if seen.number == 0 => Reply::data(mine.clone()),
        "GET" => Reply::data(theirs.clone()),
        _ => Reply::recorded("err-locked-delete"),
    })
    .await;
    let error = client(&fake).destroy_ours(&ours, soon()).await.unwrap_err();
    assert!(matches!(error, Error::NotOurs { .. }), "{error:?}");
    assert_eq!(changes(&fake), 1);
}

#[tokio::test]
async fn gone_or_stopped_is_success() {
    let ours = identity();
    let fake = Fake::start(|_| Reply::recorded(MISSING)).await;
    assert_eq!(client(&fake).destroy_ours(&ours, soon()).await.unwrap(), Outcome::AlreadySo);
    assert_eq!(client(&fake).stop_ours(&ours, soon()).await.unwrap(), Outcome::AlreadySo);
    let fake = node_with(conf_of(&ours), |_| Reply::recorded("err-stop-stopped"), "lxc-stop").await;
    assert_eq!(client(&fake).stop_ours(&ours, soon()).await.unwrap(), Outcome::AlreadySo);
    let fake =
        node_with(conf_of(&ours), |_| Reply::recorded("err-ct-missing-delete"), "lxc-stop").await;
    assert_eq!(client(&fake).destroy_ours(&ours, soon()).await.unwrap(), Outcome::AlreadySo);
}

#[tokio::test]
async fn locks_and_a_stopping_ct_are_waited_for_but_not_for_ever() {
    let ours = identity();
    for refusal in ["err-locked-delete", "err-delete-running"] {
        let act = move |n| Reply::recorded(if n < 3 { refusal } else { "lxc-delete" });
        let fake = node_with(conf_of(&ours), act, "lxc-delete").await;
        assert_eq!(
            client(&fake).destroy_ours(&ours, soon()).await.unwrap(),
            Outcome::Done,
            "{refusal}"
        );
        assert_eq!(changes(&fake), 4);
    }
    let fake =
        node_with(conf_of(&ours), |_| Reply::recorded("err-locked-delete"), "lxc-delete").await;
    let deadline = Instant::now() + Duration::from_millis(400);
    let error = client(&fake).destroy_ours(&ours, deadline).await.unwrap_err();
    assert!(error.is_transient(), "{error:?}");
    // Silence is cut off at the deadline, not at the request's own time-out.
    let fake = node_with(conf_of(&ours), |_| Reply::Silence, "lxc-delete").await;
    let begun = Instant::now();
    let deadline = begun + Duration::from_millis(200);
    let error = client(&fake).destroy_ours(&ours, deadline).await.unwrap_err();
    assert!(matches!(error, Error::Timeout { sent: true, .. }), "{error:?}");
    assert!(begun.elapsed() < Duration::from_millis(1900), "{:?}", begun.elapsed());
    // A lost answer: nothing happened, so it is asked again, once verified.
    let act = |n| if n == 0 { Reply::Close } else { Reply::recorded("lxc-stop") };
    let fake = node_with(conf_of(&ours), act, "lxc-stop").await;
    assert_eq!(client(&fake).stop_ours(&ours, soon()).await.unwrap(), Outcome::Done);
    assert_eq!(changes(&fake), 2);
}

#[tokio::test]
async fn calls_share_a_connection_also_where_proxmox_says_close_and_keep_alive() {
    let fake = Fake::start(contract).await;
    let c = client(&fake);
    for _ in 0..5 {
        c.check().await.unwrap();
        // These answer with `Connection: close` and `Connection: Keep-Alive`.
        c.status(id(110)).await.unwrap();
        c.start(id(110)).await.unwrap();
    }
    assert_eq!(fake.handshakes(), (1, 0));
}

#[tokio::test]
async fn a_connection_that_the_server_does_close_is_replaced_with_tls_resumed() {
    // Each answer ends its connection, whatever it says.
    let fake = Fake::start(|seen| {
        let Reply::Recorded(r) = contract(seen) else { unreachable!() };
        let body = String::from_utf8(r.body()).unwrap();
        let length = body.len();
        Reply::Raw(format!(
            "HTTP/1.1 200 OK\r\nConnection: close\r\nConnection: Keep-Alive\r\n\
             Content-Length: {length}\r\n\r\n{body}"
        ))
    })
    .await;
    let c = client(&fake);
    for n in 1..=5 {
        c.status(id(110)).await.unwrap();
        // The end may still be on its way; a request that meets it is not lost.
        c.start(id(110)).await.unwrap();
        assert_eq!(fake.seen().len(), 2 * n);
    }
    let (all, resumed) = fake.handshakes();
    assert_eq!((all, resumed), (10, 9));
}

#[tokio::test]
async fn a_connection_is_left_before_the_server_has_counted_to_a_hundred() {
    let fake = Fake::start(contract).await;
    let c = client(&fake);
    for _ in 0..100 {
        c.check().await.unwrap();
    }
    assert_eq!(fake.handshakes(), (2, 1));
}

#[tokio::test]
async fn an_idle_connection_is_dropped_before_proxmox_closes_it() {
    let fake = Fake::start(contract).await;
    let c = client(&fake);
    c.check().await.unwrap();
    assert_eq!(fake.open_connections(), 1);
    let begun = Instant::now();
    while fake.open_connections() > 0 {
        assert!(begun.elapsed() < Duration::from_millis(7000));
        sleep(Duration::from_millis(20)).await;
    }
    eprintln!("dropped after {:?}", begun.elapsed());
}
