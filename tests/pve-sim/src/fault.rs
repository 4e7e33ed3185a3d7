//! Faults: what goes wrong with chosen requests and tasks.
//!
//! A fault names the requests it concerns and what happens to them. It is used up after a number of
//! requests, one unless said otherwise. They are set through the control socket (see
//! [`crate::control`]) or directly by tests in the same process.

use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use crate::node::lock;

/// A call that is made in the name of root@pam, as an administrator at the console would.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Call {
    /// `GET`, `POST`, `PUT` or `DELETE`.
    pub method: String,
    /// The path below `/api2/json`.
    pub path: String,
    /// Its parameters.
    #[serde(default)]
    pub params: std::collections::BTreeMap<String, String>,
}

/// What happens to a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Effect {
    /// The connection ends before anything is done.
    LoseRequest,
    /// The request is carried out, then the connection ends without an answer.
    LoseAnswer,
    /// The request is carried out only after this time.
    DelayRequest {
        /// Milliseconds; never scaled.
        ms: u64,
    },
    /// The request is carried out at once and answered only after this time.
    DelayAnswer {
        /// Milliseconds; never scaled.
        ms: u64,
    },
    /// The connection ends after these many bytes of the answer's body.
    Truncate {
        /// Bytes of the body that are sent.
        bytes: usize,
    },
    /// The body is cut after these many bytes, but is complete by its `Content-Length`.
    Garble {
        /// Bytes of the body that are left.
        bytes: usize,
    },
    /// The request is carried out twice, and the second answer sent.
    Duplicate,
    /// Nothing is done, and this is the answer: 596 for a node that cannot be reached, 599 for one
    /// that took too long.
    Status {
        /// The status code.
        code: u16,
        /// The reason phrase.
        reason: String,
    },
    /// An administrator makes another call first, and waits for its task.
    CallBefore(Call),
    /// An administrator makes another call after the request was carried out and before it is
    /// answered, and waits for its task.
    CallAfter(Call),
}

const fn once() -> u32 {
    1
}

/// A fault of requests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// The method; any if absent.
    #[serde(default)]
    pub method: Option<String>,
    /// The path below `/api2/json`; `*` stands for one segment, a last `**` for any rest.
    pub path: String,
    /// Requests that are left alone first.
    #[serde(default)]
    pub skip: u32,
    /// Requests that it hits; 0 for all.
    #[serde(default = "once")]
    pub times: u32,
    /// What happens.
    pub effect: Effect,
}

/// A failure of a task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskFault {
    /// The type of the task, for example `vzstart`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The point at which it fails: one of [`STEPS`].
    pub step: String,
    /// The error, as it will be in the task's status and log.
    pub text: String,
    /// Tasks that are left alone first.
    #[serde(default)]
    pub skip: u32,
    /// Tasks that it hits; 0 for all.
    #[serde(default = "once")]
    pub times: u32,
}

/// The points of a task at which it can fail, in their order. Each task has `begin` and `end`.
///
/// - `begin`: before anything;
/// - `locked`: once the CT's lock is held;
/// - `allocated`: `vzcreate` only, when the volumes are made;
/// - `extracted`: `vzcreate` only, when the template is unpacked;
/// - `spawned`: `vzstart` only, when `lxc-start` has been started;
/// - `end`: when all is done.
pub const STEPS: [&str; 6] = ["begin", "locked", "allocated", "extracted", "spawned", "end"];

/// A fault, and how often it has hit.
#[derive(Debug, Clone, Serialize)]
pub struct Entry<T> {
    /// What was asked for.
    pub fault: T,
    /// Requests or tasks that matched, the skipped ones among them.
    pub seen: u32,
    /// Requests or tasks that were hit.
    pub hits: u32,
}

impl<T> Entry<T> {
    /// Whether the next one that matches is hit; counts it.
    fn count(&mut self, skip: u32, times: u32) -> bool {
        self.seen += 1;
        let hit = self.seen > skip && (times == 0 || self.hits < times);
        self.hits += u32::from(hit);
        hit
    }
}

#[derive(Debug, Default)]
struct Inner {
    requests: Vec<Entry<Fault>>,
    tasks: Vec<Entry<TaskFault>>,
}

/// All faults of a node.
#[derive(Debug, Default)]
pub struct Faults(Mutex<Inner>);

impl Faults {
    /// Adds a fault of requests.
    pub fn add(&self, fault: Fault) {
        lock(&self.0).requests.push(Entry { fault, seen: 0, hits: 0 });
    }

    /// Adds a failure of tasks. The error names a step that does not exist.
    pub fn add_task(&self, fault: TaskFault) -> Result<(), String> {
        if !STEPS.contains(&fault.step.as_str()) {
            return Err(format!("no step '{}'; steps are {}", fault.step, STEPS.join(", ")));
        }
        lock(&self.0).tasks.push(Entry { fault, seen: 0, hits: 0 });
        Ok(())
    }

    /// Forgets all of them.
    pub fn clear(&self) {
        *lock(&self.0) = Inner::default();
    }

    /// All of them with their counts.
    pub fn list(&self) -> (Vec<Entry<Fault>>, Vec<Entry<TaskFault>>) {
        let inner = lock(&self.0);
        (inner.requests.clone(), inner.tasks.clone())
    }

    /// What happens to a request, in the order in which the faults were added. Counts it.
    pub fn of_request(&self, method: &str, path: &str) -> Vec<Effect> {
        let mut inner = lock(&self.0);
        let matching = inner.requests.iter_mut().filter(|e| {
            e.fault.method.as_deref().is_none_or(|m| m == method) && matches(&e.fault.path, path)
        });
        matching
            .filter_map(|e| {
                let (skip, times) = (e.fault.skip, e.fault.times);
                e.count(skip, times).then(|| e.fault.effect.clone())
            })
            .collect()
    }

    /// How a task of this type fails: the step and the text. Counts it.
    pub fn of_task(&self, kind: &str) -> Option<(String, String)> {
        let mut inner = lock(&self.0);
        inner.tasks.iter_mut().filter(|e| e.fault.kind == kind).find_map(|e| {
            let (skip, times) = (e.fault.skip, e.fault.times);
            e.count(skip, times).then(|| (e.fault.step.clone(), e.fault.text.clone()))
        })
    }
}

/// Whether a path matches a pattern, segment by segment.
fn matches(pattern: &str, path: &str) -> bool {
    let mut wanted = pattern.split('/').filter(|s| !s.is_empty());
    let mut got = path.split('/').filter(|s| !s.is_empty());
    loop {
        match (wanted.next(), got.next()) {
            (Some("**"), _) => return true,
            (None, None) => return true,
            (Some(w), Some(g)) if w == "*" || w == g => {}
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_segments() {
        for (pattern, path, expected) in [
            ("/version", "/version", true),
            ("/nodes/*/lxc", "/nodes/pve1/lxc", true),
            ("/nodes/*/lxc", "/nodes/pve1/lxc/100", false),
            ("/nodes/**", "/nodes/pve1/lxc/100", true),
            ("/**", "/version", true),
            ("/nodes/*", "/nodes", false),
            ("/ver", "/version", false),
        ] {
            assert_eq!(matches(pattern, path), expected, "{pattern} {path}");
        }
    }

    #[test]
    fn a_fault_hits_as_often_as_it_says() {
        let faults = Faults::default();
        faults.add(Fault {
            method: Some("GET".into()),
            path: "/version".into(),
            skip: 1,
            times: 2,
            effect: Effect::LoseAnswer,
        });
        let hits: Vec<_> = (0..5).map(|_| faults.of_request("GET", "/version").len()).collect();
        assert_eq!(hits, [0, 1, 1, 0, 0]);
        assert!(faults.of_request("POST", "/version").is_empty());
        assert_eq!((faults.list().0[0].seen, faults.list().0[0].hits), (5, 2));
    }

    #[test]
    fn a_step_that_does_not_exist_is_named() {
        let json = r#"{"type":"vzstart","step":"nowhere","text":"x"}"#;
        let error = Faults::default().add_task(serde_json::from_str(json).unwrap()).unwrap_err();
        assert!(error.contains("nowhere") && error.contains("begin"), "{error}");
    }
}
