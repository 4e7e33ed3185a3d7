//! What can be made to go wrong, and that only this does.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pve_sim::cluster::{Cluster, Options};
use pve_sim::control;
use pve_sim::profile::{Kind, Profile};
use serde_json::{Value as Json, json};

mod client;
use client::{Answer, exchange};

struct World {
    cluster: Arc<Cluster>,
    token: String,
    _dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = Options {
            supervisor: pve_sim::unit::Supervisor::Simulator,
            root: dir.path().join("node"),
            nodes: vec!["pve1".into()],
            addresses: Vec::new(),
            profile: Profile { kind: Kind::Instant, scale: 0.02 },
        };
        let cluster = Cluster::open(&options).unwrap();
        let token = std::fs::read_to_string(cluster.dc.root.join("admin-token")).unwrap();
        Self { cluster, token: token.trim().to_owned(), _dir: dir }
    }

    fn ct(&self, vmid: u32) {
        let conf = "arch: amd64\nostype: unmanaged\nrootfs: /nowhere\n";
        std::fs::write(self.cluster.first().paths.confs.join(format!("{vmid}.conf")), conf)
            .unwrap();
    }

    async fn control(&self, command: Json) -> Json {
        control::command(&self.cluster, &command.to_string()).await.unwrap()
    }

    async fn fault(&self, path: &str, effect: Json) {
        self.control(json!({"fault": {"path": path, "effect": effect}})).await;
    }

    fn request(&self, method: &str, path: &str, form: &str) -> String {
        format!(
            "{method} /api2/json{path} HTTP/1.1\r\nAuthorization: PVEAPIToken={}\r\n\
             Content-Length: {}\r\n\r\n{form}",
            self.token,
            form.len()
        )
    }

    /// The bytes of an answer; none if the connection ended without.
    async fn bytes(&self, method: &str, path: &str, form: &str) -> Vec<u8> {
        exchange(&self.cluster, self.request(method, path, form)).await
    }

    async fn call(&self, method: &str, path: &str, form: &str) -> Answer {
        Answer::read(&self.cluster, &self.request(method, path, form)).await
    }

    fn tags(&self, vmid: u32) -> Option<String> {
        self.cluster.first().load(vmid).unwrap().current.text("tags")
    }
}

const CONFIG: &str = "/nodes/pve1/lxc/100/config";

#[tokio::test]
async fn a_lost_request_does_nothing_and_a_lost_answer_all() {
    let world = World::new();
    world.ct(100);
    world.fault("/nodes/*/lxc/*/config", json!("lose-request")).await;
    assert!(world.bytes("PUT", CONFIG, "tags=a").await.is_empty());
    assert_eq!(world.tags(100), None);
    world.fault(CONFIG, json!("lose-answer")).await;
    assert!(world.bytes("PUT", CONFIG, "tags=b").await.is_empty());
    assert_eq!(world.tags(100).as_deref(), Some("b"));
    // Each is used up.
    assert_eq!(world.call("PUT", CONFIG, "tags=c").await.status, 200);
}

#[tokio::test]
async fn a_delay_comes_before_or_after_the_effect() {
    let world = World::new();
    world.ct(100);
    for (effect, early) in [("delay-request", false), ("delay-answer", true)] {
        world.fault(CONFIG, json!({effect: {"ms": 300}})).await;
        let start = Instant::now();
        let form = format!("tags={effect}");
        let call = world.call("PUT", CONFIG, &form);
        let look = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            world.tags(100).as_deref() == Some(effect)
        };
        let (answer, done) = tokio::join!(call, look);
        assert_eq!((answer.status, done), (200, early), "{effect}");
        assert!(start.elapsed() >= Duration::from_millis(300));
    }
}

#[tokio::test]
async fn a_body_is_cut_with_and_without_notice() {
    let world = World::new();
    world.fault("/version", json!({"truncate": {"bytes": 10}})).await;
    let text = String::from_utf8(world.bytes("GET", "/version", "").await).unwrap();
    assert!(text.ends_with("\r\n\r\n{\"data\":{\""), "{text}");
    assert!(!text.contains("Content-Length: 10\r\n"), "{text}");
    world.fault("/version", json!({"garble": {"bytes": 10}})).await;
    let text = String::from_utf8(world.bytes("GET", "/version", "").await).unwrap();
    assert!(text.ends_with("\r\n\r\n{\"data\":{\""), "{text}");
    assert!(text.contains("Content-Length: 10\r\n"), "{text}");
}

#[tokio::test]
async fn the_front_end_reports_a_node_it_cannot_reach() {
    let world = World::new();
    world.ct(100);
    let status = json!({"status": {"code": 596, "reason": "Connection timed out"}});
    world.fault(CONFIG, status).await;
    let answer = world.call("PUT", CONFIG, "tags=a").await;
    assert_eq!((answer.status, answer.reason.as_str()), (596, "Connection timed out"));
    assert_eq!(answer.body, json!(""));
    assert_eq!(world.tags(100), None);
}

#[tokio::test]
async fn a_duplicate_acts_twice() {
    let world = World::new();
    world.ct(100);
    world.fault("/nodes/pve1/lxc/100", json!("duplicate")).await;
    // The second removal finds what the first has left, or its task does.
    let answer = world.call("DELETE", "/nodes/pve1/lxc/100", "").await;
    let tasks = world.call("GET", "/nodes/pve1/tasks?source=all", "").await;
    let started = tasks.body["data"].as_array().unwrap().len();
    assert!(answer.status == 500 || started == 2, "{} {started}", answer.status);
}

#[tokio::test]
async fn a_task_fails_at_its_step() {
    let world = World::new();
    for (step, gone) in [("begin", false), ("locked", false), ("end", true)] {
        world.ct(100);
        let text = format!("broken at {step}");
        world
            .control(json!({"fail-task": {"type": "vzdestroy", "step": step, "text": text}}))
            .await;
        let status = world
            .control(json!({"call": {"method": "DELETE", "path": "/nodes/pve1/lxc/100"}}))
            .await;
        assert_eq!(status["exitstatus"], json!(text));
        assert_eq!(world.cluster.first().load(100).is_err(), gone, "{step}");
    }
}

#[tokio::test]
async fn an_administrator_interferes_before_and_after() {
    let world = World::new();
    world.ct(100);
    let put = |tags: &str| json!({"method": "PUT", "path": CONFIG, "params": {"tags": tags}});
    let effect = json!({"call-before": put("theirs")});
    world.fault(CONFIG, effect).await;
    let answer = world.call("GET", CONFIG, "").await;
    assert_eq!(answer.body["data"]["tags"], json!("theirs"));
    world.fault(CONFIG, json!({"call-after": put("later")})).await;
    let answer = world.call("GET", CONFIG, "").await;
    assert_eq!(answer.body["data"]["tags"], json!("theirs"));
    assert_eq!(world.tags(100).as_deref(), Some("later"));
}

#[tokio::test]
async fn a_held_lock_blocks_until_it_is_released() {
    let world = World::new();
    world.ct(100);
    world.control(json!({"hold-lock": {"vmid": 100}})).await;
    let answer = world.call("PUT", CONFIG, "tags=a").await;
    assert!(answer.reason.ends_with("got timeout"), "{}", answer.reason);
    world.control(json!({"release-lock": {"vmid": 100}})).await;
    assert_eq!(world.call("PUT", CONFIG, "tags=a").await.status, 200);
    let twice = json!({"release-lock": {"vmid": 100}}).to_string();
    assert!(control::command(&world.cluster, &twice).await.unwrap_err().contains("not held"));
}

#[tokio::test]
async fn a_revoked_token_is_unknown_at_once() {
    let world = World::new();
    world.control(json!({"revoke-token": {"token": "root@pam!admin"}})).await;
    let answer = world.call("GET", "/version", "").await;
    assert_eq!((answer.status, answer.reason.as_str()), (401, "Authentication failed!"));
}

#[tokio::test]
async fn faults_are_listed_with_their_counts_and_forgotten() {
    let world = World::new();
    world.control(json!({"fault": {"path": "/version", "times": 0, "effect": "duplicate"}})).await;
    for _ in 0..3 {
        world.call("GET", "/version", "").await;
    }
    let list = world.control(json!({"faults": {}})).await;
    assert_eq!(list["requests"][0]["hits"], json!(3));
    world.control(json!({"clear": {}})).await;
    assert_eq!(world.control(json!({"faults": {}})).await["requests"], json!([]));
}

#[tokio::test]
async fn a_command_that_cannot_be_understood_is_refused() {
    let world = World::new();
    for line in [
        "",
        "x",
        "{}",
        r#"{"nope":{}}"#,
        r#"{"fault":{"path":"/x"}}"#,
        r#"{"fault":{"path":"/x","effect":"nope"}}"#,
        r#"{"fault":{"path":"/x","effect":"duplicate","extra":1}}"#,
    ] {
        assert!(control::command(&world.cluster, line).await.is_err(), "{line}");
    }
}

#[tokio::test]
async fn the_socket_answers_line_by_line() {
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    let world = World::new();
    let path = world.cluster.dc.root.join("control");
    tokio::spawn(control::serve(world.cluster.clone(), control::listen(&path).unwrap()));
    let stream = tokio::net::UnixStream::connect(&path).await.unwrap();
    let (read, mut write) = stream.into_split();
    write.write_all(b"nonsense\n{\"faults\":{}}\n").await.unwrap();
    let mut lines = BufReader::new(read).lines();
    let first: Json = serde_json::from_str(&lines.next_line().await.unwrap().unwrap()).unwrap();
    let second: Json = serde_json::from_str(&lines.next_line().await.unwrap().unwrap()).unwrap();
    assert!(first["error"].is_string(), "{first}");
    assert_eq!(second["ok"], json!({"requests": [], "tasks": []}));
}
