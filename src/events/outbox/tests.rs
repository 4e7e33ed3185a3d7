use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use async_trait::async_trait;
use containerd_shim_protos::api::{Empty, ForwardRequest};
use containerd_shim_protos::shim_async::{Events, create_events};
use ttrpc::r#async::transport::Listener;
use ttrpc::r#async::{Server, TtrpcContext};

use super::*;

/// What containerd's event service of all incarnations has taken.
#[derive(Clone, Default)]
struct Received(Arc<Mutex<Vec<Envelope>>>);

impl Received {
    fn pids(&self) -> Vec<u32> {
        use containerd_shim_protos::events::task::TaskStart;
        use containerd_shim_protos::protobuf::Message;
        let received = self.0.lock().unwrap();
        let pid = |e: &Envelope| TaskStart::parse_from_bytes(&e.event.value).unwrap().pid;
        received.iter().filter(|e| e.topic == "/tasks/start").map(pid).collect()
    }

    fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

#[async_trait]
impl Events for Received {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        self.0.lock().unwrap().push(request.envelope.unwrap());
        Ok(Empty::new())
    }
}

/// A containerd that can be killed: its runtime, with every connection in it, is thrown away.
struct Daemon {
    kill: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Daemon {
    fn start(path: &Path, received: &Received) -> Daemon {
        let _ = std::fs::remove_file(path);
        let listener = std::os::unix::net::UnixListener::bind(path).unwrap();
        let service = create_events(Arc::new(received.clone()));
        let (kill, killed) = tokio::sync::oneshot::channel();
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = Listener::try_from(listener).unwrap();
                let mut server = Server::new().add_listener(listener).register_service(service);
                server.start().await.unwrap();
                let _ = killed.await;
            });
        });
        Daemon { kill: Some(kill), thread: Some(thread) }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill.take().unwrap().send(()).unwrap();
        self.thread.take().unwrap().join().unwrap();
    }
}

fn socket() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ttrpc");
    (dir, path)
}

fn outbox(path: &Path) -> Outbox {
    let mut settings = Settings::new(Some(format!("unix://{}", path.display())), "ns");
    settings.max_backoff = Duration::from_millis(50);
    Outbox::new(settings)
}

/// Publishes the life of a container of its own, so that each event is one that may be published;
/// `n` is found again as the pid.
fn publish(outbox: &Outbox, n: u32) {
    let container_id = format!("c{n}");
    outbox.publish(Event::Create {
        container_id: container_id.clone(),
        bundle: String::new(),
        rootfs: Vec::new(),
        stdin: String::new(),
        stdout: String::new(),
        stderr: String::new(),
        terminal: false,
        pid: n,
    });
    outbox.publish(Event::Start { container_id, pid: n });
}

const LONG: Duration = Duration::from_secs(10);

#[tokio::test]
async fn events_arrive_in_order_with_namespace_and_the_time_they_were_handed_in() {
    let (_dir, path) = socket();
    let received = Received::default();
    let _daemon = Daemon::start(&path, &received);
    let outbox = outbox(&path);
    let before = SystemTime::now();
    publish(&outbox, 1);
    assert_eq!(outbox.flush(LONG).await, 0);
    let got = received.0.lock().unwrap().clone();
    assert_eq!(
        got.iter().map(|e| e.topic.as_str()).collect::<Vec<_>>(),
        ["/tasks/create", "/tasks/start"]
    );
    assert!(got.iter().all(|e| e.namespace == "ns"));
    let second = before.duration_since(UNIX_EPOCH).unwrap().as_secs() as i64;
    assert!((0..5).contains(&(got[0].timestamp.seconds - second)));
}

#[tokio::test]
async fn a_daemon_that_is_killed_and_restarted_gets_every_event_once_and_in_order() {
    let (_dir, path) = socket();
    let received = Received::default();
    let outbox = outbox(&path);
    let mut sent = 0;
    for outage in [0u64, 20, 400] {
        let daemon = Daemon::start(&path, &received);
        for _ in 0..20 {
            sent += 1;
            publish(&outbox, sent);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // A kill in the middle of a call is the case that nobody can decide; see below.
        assert_eq!(outbox.flush(LONG).await, 0);
        drop(daemon);
        for _ in 0..10 {
            sent += 1;
            publish(&outbox, sent);
        }
        tokio::time::sleep(Duration::from_millis(outage)).await;
    }
    assert_eq!(outbox.flush(Duration::from_millis(50)).await, 20, "the last outage's are kept");
    let _daemon = Daemon::start(&path, &received);
    assert_eq!(outbox.flush(LONG).await, 0);
    assert_eq!(received.pids(), (1..=sent).collect::<Vec<_>>());
    assert_eq!(received.len() as u32, 2 * sent);
}

#[tokio::test]
async fn a_daemon_killed_in_the_middle_of_calls_loses_nothing_and_reorders_nothing() {
    let (_dir, path) = socket();
    let received = Received::default();
    let outbox = outbox(&path);
    let total = 400;
    let publisher = {
        let outbox = outbox.clone();
        tokio::spawn(async move {
            for n in 1..=total {
                publish(&outbox, n);
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
    };
    let mut kills = 0;
    while !publisher.is_finished() {
        let daemon = Daemon::start(&path, &received);
        tokio::time::sleep(Duration::from_millis(37)).await;
        drop(daemon);
        kills += 1;
        tokio::time::sleep(Duration::from_millis(11)).await;
    }
    let _daemon = Daemon::start(&path, &received);
    assert_eq!(outbox.flush(LONG).await, 0);
    let mut pids = received.pids();
    let all = pids.len();
    // Only the call that a kill interrupted may be there twice, and then side by side.
    pids.dedup();
    assert_eq!(pids, (1..=total).collect::<Vec<_>>());
    assert!(all - pids.len() <= kills, "{} repeated in {kills} kills", all - pids.len());
}

#[tokio::test]
async fn a_slow_answer_is_waited_for_and_not_sent_again() {
    #[derive(Clone)]
    struct Slow(Received);
    #[async_trait]
    impl Events for Slow {
        async fn forward(&self, c: &TtrpcContext, r: ForwardRequest) -> ttrpc::Result<Empty> {
            tokio::time::sleep(Duration::from_millis(300)).await;
            self.0.forward(c, r).await
        }
    }
    let (_dir, path) = socket();
    let received = Received::default();
    let mut server = Server::new()
        .bind(&format!("unix://{}", path.display()))
        .unwrap()
        .register_service(create_events(Arc::new(Slow(received.clone()))));
    server.start().await.unwrap();
    let outbox = outbox(&path);
    publish(&outbox, 1);
    assert_eq!(outbox.flush(Duration::from_millis(50)).await, 2, "flush is bounded");
    assert_eq!(outbox.flush(LONG).await, 0);
    assert_eq!(received.len(), 2);
}

#[tokio::test]
async fn without_an_address_nothing_waits() {
    let outbox = Outbox::new(Settings::new(Some(String::new()), "ns"));
    publish(&outbox, 1);
    assert_eq!(outbox.flush(Duration::ZERO).await, 0);
}

#[tokio::test]
async fn a_full_queue_still_takes_exits_and_deletes() {
    let (_dir, path) = socket();
    let mut settings = Settings::new(Some(path.display().to_string()), "ns");
    settings.capacity = 4;
    let outbox = Outbox::new(settings);
    for n in 1..=3 {
        publish(&outbox, n);
    }
    let waiting = || outbox.inner.shared.state().queue.len();
    assert_eq!(waiting(), 4, "the fifth and sixth are not taken");
    for n in 1..=5 {
        outbox.publish(Event::Exit {
            container_id: format!("c{n}"),
            id: String::new(),
            pid: n,
            exit_status: 0,
            exited_at: UNIX_EPOCH,
        });
    }
    assert_eq!(waiting(), 7, "exits of the three started tasks are taken");
}
