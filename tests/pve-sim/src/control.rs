//! The control socket, by which a test makes things go wrong.
//!
//! A Unix socket of the simulator's directory, `DIR/control`, with one JSON object per line in each
//! direction. A request has one key, the command; the answer is `{"ok": …}` or `{"error": "…"}`.
//! The README lists the commands.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value as Json, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::OwnedMutexGuard;
use tokio::time::{sleep, timeout};

use crate::acl::Identity;
use crate::api;
use crate::cluster::Cluster;
use crate::fault::{Call, Fault, TaskFault};
use crate::http::Request;
use crate::node::lock;
use crate::params::Params;

/// How long an administrator's call waits for its task.
const TASK_WAIT: Duration = Duration::from_secs(60);
/// The longest line.
const MAX_LINE: u64 = 64 * 1024;

/// A command.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Command {
    /// Adds a fault of requests.
    Fault(Fault),
    /// Adds a failure of tasks.
    FailTask(TaskFault),
    /// Lists the faults and how often they have hit.
    Faults {},
    /// Forgets all faults and releases all held locks.
    Clear {},
    /// Makes a call as root@pam and waits for its task.
    Call(Call),
    /// Takes the lock of a CT's configuration and keeps it.
    HoldLock { vmid: u32 },
    /// Gives the lock back.
    ReleaseLock { vmid: u32 },
    /// Makes a token unknown.
    RevokeToken { token: String },
    /// Gains or loses quorum.
    Quorum { quorate: bool },
    /// Lets a node go away, with its CTs, or come back.
    Node { node: String, online: bool },
    /// Fills a storage of all nodes up, or makes room again.
    FillStorage { storage: String, full: bool },
    /// Replaces the certificate by another of the same authority.
    RotateCertificate {},
}

/// Locks that are held until they are released.
#[derive(Debug, Default)]
pub(crate) struct Held(Mutex<HashMap<u32, OwnedMutexGuard<()>>>);

/// Serves the socket for ever.
pub async fn serve(cluster: Arc<Cluster>, listener: UnixListener) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(connection(cluster.clone(), stream));
            }
            Err(_) => sleep(Duration::from_millis(100)).await,
        }
    }
}

/// Makes the socket, for root alone.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt;
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

async fn connection(cluster: Arc<Cluster>, stream: UnixStream) {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(tokio::io::AsyncReadExt::take(read, MAX_LINE));
    let mut line = String::new();
    while matches!(read.read_line(&mut line).await, Ok(n) if n > 0) {
        let answer = match command(&cluster, &line).await {
            Ok(value) => json!({"ok": value}),
            Err(text) => json!({"error": text}),
        };
        if write.write_all(format!("{answer}\n").as_bytes()).await.is_err() {
            return;
        }
        line.clear();
        read.get_mut().set_limit(MAX_LINE);
    }
}

/// Carries out one command.
pub async fn command(cluster: &Arc<Cluster>, line: &str) -> Result<Json, String> {
    let faults = &cluster.dc.faults;
    match serde_json::from_str(line).map_err(|e| e.to_string())? {
        Command::Fault(fault) => faults.add(fault),
        Command::FailTask(fault) => faults.add_task(fault)?,
        Command::Faults {} => {
            let (requests, tasks) = faults.list();
            return Ok(json!({"requests": requests, "tasks": tasks}));
        }
        Command::Clear {} => {
            faults.clear();
            lock(&cluster.held.0).clear();
        }
        Command::Call(call) => return administrate(cluster, &call).await,
        Command::HoldLock { vmid } => {
            let guard = cluster.node_of(vmid).lock_ct(vmid).await?;
            lock(&cluster.held.0).insert(vmid, guard);
        }
        Command::ReleaseLock { vmid } => {
            let held = lock(&cluster.held.0).remove(&vmid);
            held.ok_or_else(|| format!("the lock of CT {vmid} is not held"))?;
        }
        Command::RevokeToken { token } => {
            if !cluster.dc.acl_mut().remove_token(&token) {
                return Err(format!("no such token '{token}'"));
            }
        }
        Command::Quorum { quorate } => {
            let pve = cluster.dc.pve.display();
            cluster.dc.set_quorate(quorate).map_err(|e| format!("cannot mount over {pve}: {e}"))?;
        }
        Command::Node { node, online } => {
            let node = cluster.node(&node).ok_or_else(|| format!("no such node '{node}'"))?;
            node.set_online(online).await.map_err(|e| e.to_string())?;
        }
        Command::FillStorage { storage, full } => {
            for node in cluster.nodes() {
                node.storage(&storage)?.set_full(full);
            }
        }
        Command::RotateCertificate {} => {
            cluster.certificate.rotate().map_err(|e| e.to_string())?;
            return Ok(json!({"fingerprint": cluster.certificate.fingerprint()}));
        }
    }
    Ok(Json::Null)
}

/// Makes a call as root@pam at the console, and waits for the end of its task. Gives the data, or
/// the status of the task.
pub async fn administrate(cluster: &Arc<Cluster>, call: &Call) -> Result<Json, String> {
    let request = Request {
        method: call.method.clone(),
        path: format!("/api2/json{}", call.path),
        params: Params(call.params.clone()),
        ..Request::default()
    };
    // Boxed, as the call may itself be a part of answering a request.
    let answer =
        Box::pin(api::handle(cluster, cluster.first(), &Identity::administrator(), &request)).await;
    let data = answer.map_err(|e| e.detail())?.data;
    let Some(task) = data.as_str().and_then(|upid| cluster.task(upid)) else { return Ok(data) };
    let ended = async {
        while !task.ended() {
            sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(TASK_WAIT, ended).await.map_err(|_| format!("{data} does not end"))?;
    Ok(task.status())
}
