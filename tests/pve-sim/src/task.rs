//! Tasks: what a call starts in the background, named by its UPID.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::future::Future;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value as Json, json};
use tokio::sync::watch;

use crate::acl::Identity;
use crate::fault::Faults;
use crate::node::lock;

/// How many finished tasks are kept.
const KEPT: usize = 2000;

/// `UPID:NODE:PID:PSTART:STARTTIME:TYPE:ID:USER:`, the numbers in hexadecimal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upid {
    /// The node that runs the task.
    pub node: String,
    /// The worker's pid. Workers are not processes here, so the number is only unique.
    pub pid: u32,
    /// The worker's start, in clock ticks since the boot.
    pub pstart: u64,
    /// Seconds since the epoch.
    pub starttime: u64,
    /// For example `vzstart`.
    pub kind: String,
    /// The VMID, or empty.
    pub id: String,
    /// `NAME@REALM!TOKEN`.
    pub user: String,
}

impl fmt::Display for Upid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { node, pid, pstart, starttime, kind, id, user } = self;
        write!(f, "UPID:{node}:{pid:08X}:{pstart:08X}:{starttime:08X}:{kind}:{id}:{user}:")
    }
}

/// The text is not a UPID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("unable to parse worker upid")]
pub struct NotAUpid;

impl FromStr for Upid {
    type Err = NotAUpid;

    fn from_str(text: &str) -> Result<Self, NotAUpid> {
        let parts: Vec<&str> = text.split(':').collect();
        let ["UPID", node, pid, pstart, starttime, kind, id, user, ""] = parts[..] else {
            return Err(NotAUpid);
        };
        let hex = |text: &str, longest: usize| {
            let valid =
                (8..=longest).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
            valid.then(|| u64::from_str_radix(text, 16).ok()).flatten().ok_or(NotAUpid)
        };
        let word = |text: &str| !text.is_empty() && !text.contains(char::is_whitespace);
        let name =
            |text: &str| word(text) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        if !name(node) || !word(kind) || !word(user) || id.contains(char::is_whitespace) {
            return Err(NotAUpid);
        }
        Ok(Self {
            node: node.into(),
            pid: hex(pid, 8)? as u32,
            pstart: hex(pstart, 9)?,
            starttime: hex(starttime, 8)?,
            kind: kind.into(),
            id: id.into(),
            user: user.into(),
        })
    }
}

#[derive(Debug, Default)]
struct Inner {
    log: Vec<String>,
    command: Option<String>,
    end: Option<(String, u64)>,
    /// The step at which it is to fail, and the text.
    fault: Option<(String, String)>,
}

/// One task.
#[derive(Debug)]
pub struct Task {
    /// Its name, with all that is known at its start.
    pub upid: Upid,
    inner: Mutex<Inner>,
    interrupt: watch::Sender<bool>,
    listed: AtomicBool,
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

impl Task {
    /// Adds lines to the log.
    pub fn log(&self, text: &str) {
        lock(&self.inner).log.extend(text.split('\n').map(str::to_owned));
    }

    /// Tells that a step is reached; fails if it is to fail there.
    pub fn reach(&self, step: &str) -> Result<(), String> {
        match &lock(&self.inner).fault {
            Some((at, text)) if at == step => Err(text.clone()),
            _ => Ok(()),
        }
    }

    /// Names the command that an interrupt would hit now.
    pub fn running(&self, command: Option<String>) {
        lock(&self.inner).command = command;
    }

    /// Whether the task has ended.
    pub fn ended(&self) -> bool {
        lock(&self.inner).end.is_some()
    }

    /// Ends a running task; nothing happens to one that has ended.
    pub fn interrupt(&self) {
        self.interrupt.send_replace(true);
    }

    fn end(&self, result: Result<(), String>) {
        let mut inner = lock(&self.inner);
        let status = match result {
            Ok(()) => {
                inner.log.push("TASK OK".into());
                "OK".to_owned()
            }
            Err(text) => {
                inner.log.extend(format!("TASK ERROR: {text}").split('\n').map(str::to_owned));
                text.lines().next().unwrap_or_default().to_owned()
            }
        };
        inner.end = Some((status, now()));
    }

    fn owner(&self) -> (&str, Option<&str>) {
        match self.upid.user.split_once('!') {
            Some((user, token)) => (user, Some(token)),
            None => (&self.upid.user, None),
        }
    }

    /// Whether the task was started with this very token; another of the same user does not count.
    pub fn belongs_to(&self, who: &Identity) -> bool {
        self.upid.user == who.auth_id()
    }

    fn base(&self) -> Json {
        let u = &self.upid;
        json!({
            "upid": u.to_string(), "node": u.node, "pid": u.pid, "pstart": u.pstart,
            "starttime": u.starttime, "type": u.kind, "id": u.id,
        })
    }

    fn with_owner(&self) -> Json {
        let mut row = self.base();
        let (user, token) = self.owner();
        row["user"] = json!(user);
        if let Some(token) = token {
            row["tokenid"] = json!(token);
        }
        row
    }

    /// The `data` of `…/status`.
    pub fn status(&self) -> Json {
        let mut row = self.with_owner();
        match &lock(&self.inner).end {
            Some((status, _)) => {
                row["status"] = json!("stopped");
                row["exitstatus"] = json!(status);
            }
            None => row["status"] = json!("running"),
        }
        row
    }

    /// An entry of the task list; running tasks look different there.
    pub fn entry(&self) -> Json {
        match &lock(&self.inner).end {
            Some((status, end)) => {
                let mut row = self.with_owner();
                row["status"] = json!(status);
                row["endtime"] = json!(end);
                row
            }
            None => {
                let mut row = self.base();
                row["status"] = json!("RUNNING");
                row["saved"] = json!("0");
                row["user"] = json!(self.upid.user);
                row
            }
        }
    }

    /// An entry of the cluster's list. Whether an ended task is on disk is a number when it is
    /// listed for the first time, and a text from then on.
    pub fn cluster_entry(&self) -> Json {
        let mut row = self.entry();
        if self.ended() {
            let before = self.listed.swap(true, Ordering::Relaxed);
            row["saved"] = if before { json!("1") } else { json!(1) };
        }
        if let Some(row) = row.as_object_mut() {
            row.remove("pid");
            row.remove("pstart");
        }
        row
    }

    /// Whether the task ended with an error.
    pub fn failed(&self) -> bool {
        lock(&self.inner).end.as_ref().is_some_and(|(status, _)| status != "OK")
    }

    /// The `total` and `data` of `…/log`.
    pub fn page(&self, start: usize, limit: usize) -> (usize, Json) {
        let inner = lock(&self.inner);
        if inner.log.is_empty() {
            return (1, json!([{"n": 1, "t": "no content"}]));
        }
        let limit = if limit == 0 { usize::MAX } else { limit };
        let lines = inner.log.iter().enumerate().skip(start).take(limit);
        (inner.log.len(), lines.map(|(i, t)| json!({"n": i + 1, "t": t})).collect())
    }
}

#[derive(Debug, Default)]
struct Registry {
    by_upid: HashMap<String, Arc<Task>>,
    order: VecDeque<Arc<Task>>,
}

/// All tasks of a node.
#[derive(Debug)]
pub struct Tasks {
    registry: Mutex<Registry>,
    next_pid: AtomicU32,
    faults: Arc<Faults>,
}

impl Tasks {
    /// No tasks yet.
    pub fn new(faults: Arc<Faults>) -> Self {
        let next_pid = AtomicU32::new(std::process::id());
        Self { registry: Mutex::default(), next_pid, faults }
    }

    /// Starts a task and returns its UPID at once.
    pub fn spawn<W, F>(&self, node: &str, kind: &str, id: &str, who: &Identity, work: W) -> String
    where
        W: FnOnce(Arc<Task>) -> F,
        F: Future<Output = Result<(), String>> + Send + 'static,
    {
        let (interrupt, mut interrupted) = watch::channel(false);
        let task = Arc::new(Task {
            upid: Upid {
                node: node.to_owned(),
                pid: self.next_pid.fetch_add(1, Ordering::Relaxed),
                pstart: crate::proc::uptime_ticks(),
                starttime: now(),
                kind: kind.to_owned(),
                id: id.to_owned(),
                user: who.auth_id(),
            },
            inner: Mutex::new(Inner { fault: self.faults.of_task(kind), ..Inner::default() }),
            interrupt,
            listed: AtomicBool::new(false),
        });
        let upid = task.upid.to_string();
        self.insert(upid.clone(), task.clone());
        let work = work(task.clone());
        let steps = task.clone();
        let work = tokio::spawn(async move {
            steps.reach("begin")?;
            work.await?;
            steps.reach("end")
        });
        tokio::spawn(async move {
            let abort = work.abort_handle();
            let result = tokio::select! {
                joined = work => {
                    joined.unwrap_or_else(|e| Err(format!("internal error: {e}")))
                }
                _ = interrupted.wait_for(|i| *i) => {
                    abort.abort();
                    let command = lock(&task.inner).command.clone();
                    Err(command.map_or("received interrupt".into(), |c| {
                        format!("command '{c}' failed: received interrupt")
                    }))
                }
            };
            task.end(result);
        });
        upid
    }

    fn insert(&self, upid: String, task: Arc<Task>) {
        let mut registry = lock(&self.registry);
        registry.by_upid.insert(upid, task.clone());
        registry.order.push_front(task);
        while registry.order.len() > KEPT {
            let Some(oldest) = registry.order.pop_back() else { break };
            registry.by_upid.remove(&oldest.upid.to_string());
        }
    }

    /// A task by its UPID.
    pub fn get(&self, upid: &str) -> Option<Arc<Task>> {
        lock(&self.registry).by_upid.get(upid).cloned()
    }

    /// All tasks, the newest first.
    pub fn list(&self) -> Vec<Arc<Task>> {
        lock(&self.registry).order.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn upids_survive_a_round_trip() {
        for text in [
            "UPID:pve1:000004EA:000500BC:6B01F13F:vzcreate:110:root@pam!full:",
            "UPID:pve1:000004EA:1000500BC:6B01F13F:imgcopy::root@pam:",
        ] {
            assert_eq!(text.parse::<Upid>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_upid_is_refused() {
        for text in [
            "",
            "garbage",
            "UPID:",
            "UPID:pve1:4EA:000500BC:6B01F13F:a:1:u:",
            "UPID:pve1:000004EA:000500BC:6B01F13F:a:1:u",
            "UPID:pve1:000004EA:000500BC:6B01F13F::1:u:",
            "UPID:p e:000004EA:000500BC:6B01F13F:a:1:u:",
            "UPID:pve1:000004EZ:000500BC:6B01F13F:a:1:u:",
            "UPID:../x:000004EA:000500BC:6B01F13F:a:1:u:",
        ] {
            assert_eq!(text.parse::<Upid>(), Err(NotAUpid), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_upid_that_is_understood_says_what_it_was(text in "UPID:[!-~]{0,80}") {
            if let Ok(upid) = text.parse::<Upid>() {
                prop_assert_eq!(upid.to_string().to_ascii_uppercase(), text.to_ascii_uppercase());
            }
        }

        #[test]
        fn every_upid_is_understood(
            node in "[a-z][a-z0-9-]{0,10}",
            numbers in (any::<u32>(), any::<u32>(), any::<u32>()),
            kind in "[a-z]{1,12}",
            id in "[a-z0-9_.@-]{0,10}",
            user in "[a-z]{1,8}@[a-z]{2,4}(![a-z]{2,6})?",
        ) {
            let (pid, pstart, starttime) = numbers;
            let (pstart, starttime) = (u64::from(pstart), u64::from(starttime));
            let upid = Upid { node, pid, pstart, starttime, kind, id, user };
            prop_assert_eq!(upid.to_string().parse::<Upid>(), Ok(upid));
        }
    }
}
