//! What the API answers, in this project's types.
//!
//! Proxmox's JSON is loosely typed: numbers come as strings and the reverse, booleans as 0 and 1 or
//! `"0"` and `"1"`, and a key without a value is left out. All of that is read leniently here and
//! nowhere else; unknown fields are ignored.

use serde_json::Value;

use super::upid::Upid;
use crate::config::Vmid;

/// A JSON value read leniently.
#[derive(Clone, Copy)]
pub(super) struct Loose<'a>(pub(super) &'a Value);

impl<'a> Loose<'a> {
    /// The field `key`; absent and null are the same.
    pub(super) fn get(self, key: &str) -> Option<Loose<'a>> {
        self.0.get(key).filter(|v| !v.is_null()).map(Loose)
    }

    pub(super) fn text(self, key: &str) -> Option<String> {
        self.get(key)?.as_text()
    }

    pub(super) fn number(self, key: &str) -> Option<u64> {
        self.get(key)?.as_number()
    }

    pub(super) fn flag(self, key: &str) -> bool {
        self.get(key).is_some_and(Loose::as_flag)
    }

    pub(super) fn items(self) -> impl Iterator<Item = Loose<'a>> {
        self.0.as_array().into_iter().flatten().map(Loose)
    }

    pub(super) fn as_text(self) -> Option<String> {
        match self.0 {
            Value::String(s) => Some(s.clone()),
            Value::Number(n) => Some(n.to_string()),
            Value::Bool(b) => Some(u8::from(*b).to_string()),
            _ => None,
        }
    }

    pub(super) fn as_number(self) -> Option<u64> {
        // A fraction is cut off: no figure that the shim uses has a meaning below 1.
        let float = |f: f64| (f >= 0.0 && f < 2f64.powi(63)).then_some(f as u64);
        match self.0 {
            Value::Number(n) => n.as_u64().or_else(|| n.as_f64().and_then(float)),
            Value::String(s) => {
                let s = s.trim();
                s.parse().ok().or_else(|| s.parse().ok().and_then(float))
            }
            Value::Bool(b) => Some(u64::from(*b)),
            _ => None,
        }
    }

    pub(super) fn as_flag(self) -> bool {
        match self.0 {
            Value::Bool(b) => *b,
            Value::Number(n) => n.as_f64() != Some(0.0),
            Value::String(s) => !matches!(s.trim(), "" | "0" | "no" | "off" | "false"),
            _ => false,
        }
    }

    fn vmid(self, key: &str) -> Option<Vmid> {
        self.number(key).and_then(|n| u32::try_from(n).ok()).and_then(Vmid::new)
    }
}

/// `GET /version`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// Such as `9.2.11`.
    pub version: String,
    /// Such as `9.2`.
    pub release: String,
}

impl Version {
    pub(super) fn from_json(data: &Value) -> Option<Version> {
        let data = Loose(data);
        let version = data.text("version")?;
        let release = data.text("release").unwrap_or_default();
        Some(Version { version, release })
    }
}

/// A CT's state: `GET /nodes/{node}/lxc/{vmid}/status/current`, or an entry of the CT list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CtStatus {
    /// The CT.
    pub vmid: Vmid,
    /// Whether LXC's monitor of the CT exists. It turns false 25 to 40 ms after init's death, and
    /// before the stop hooks have run.
    pub running: bool,
    /// Host pid of init; absent when stopped.
    pub pid: Option<u32>,
    /// The configuration's `lock`, such as `backup`.
    pub lock: Option<String>,
    /// Hostname as Proxmox shows it.
    pub name: String,
    /// As stored, separated by semicolons; empty if there are none.
    pub tags: String,
    /// Memory limit in bytes.
    pub max_memory: Option<u64>,
}

impl CtStatus {
    /// `vmid` is what was asked for, where the answer need not repeat it.
    pub(super) fn from_json(data: &Value, vmid: Option<Vmid>) -> Option<CtStatus> {
        let data = Loose(data);
        let running = match data.text("status")?.as_str() {
            "running" => true,
            "stopped" => false,
            _ => return None,
        };
        Some(CtStatus {
            vmid: data.vmid("vmid").or(vmid)?,
            running,
            pid: data.number("pid").and_then(|n| u32::try_from(n).ok()).filter(|pid| *pid != 0),
            lock: data.text("lock").filter(|lock| !lock.is_empty()),
            name: data.text("name").unwrap_or_default(),
            tags: data.text("tags").unwrap_or_default(),
            max_memory: data.number("maxmem"),
        })
    }
}

/// A CT's configuration: `GET /nodes/{node}/lxc/{vmid}/config`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CtConfig {
    /// SHA-1 of the file, for changes that must not meet another's.
    pub digest: String,
    /// The notes, decoded; empty if there are none.
    pub description: String,
    /// Raw keys and values in their order.
    pub lxc: Vec<(String, String)>,
    /// `hostname`
    pub hostname: Option<String>,
    /// `tags`, separated by semicolons.
    pub tags: Option<String>,
    /// `lock`, such as `backup`.
    pub lock: Option<String>,
    /// `memory` in MiB.
    pub memory_mib: Option<u64>,
    /// `swap` in MiB.
    pub swap_mib: Option<u64>,
    /// `cpulimit`, a decimal number of CPUs.
    pub cpulimit: Option<String>,
    /// `cpuunits`
    pub cpuunits: Option<u64>,
    /// `rootfs`
    pub rootfs: Option<String>,
    /// `protection`: Proxmox refuses to destroy the CT.
    pub protection: bool,
}

impl CtConfig {
    pub(super) fn from_json(data: &Value) -> Option<CtConfig> {
        if !data.is_object() {
            return None;
        }
        let data = Loose(data);
        let pair = |entry: Loose<'_>| {
            let mut items = entry.items();
            Some((items.next()?.as_text()?, items.next()?.as_text().unwrap_or_default()))
        };
        let lxc = data.get("lxc").map(|list| list.items().filter_map(pair).collect());
        Some(CtConfig {
            digest: data.text("digest").unwrap_or_default(),
            description: data.text("description").unwrap_or_default(),
            lxc: lxc.unwrap_or_default(),
            hostname: data.text("hostname"),
            tags: data.text("tags"),
            lock: data.text("lock"),
            memory_mib: data.number("memory"),
            swap_mib: data.number("swap"),
            cpulimit: data.text("cpulimit"),
            cpuunits: data.number("cpuunits"),
            rootfs: data.text("rootfs"),
            protection: data.flag("protection"),
        })
    }
}

/// `GET /nodes/{node}/tasks/{upid}/status`
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TaskStatus {
    /// The worker is at work.
    Running,
    /// It ended.
    Stopped {
        /// `OK`, `WARNINGS: n`, or the error's first line.
        exitstatus: String,
    },
}

impl TaskStatus {
    pub(super) fn from_json(data: &Value) -> Option<TaskStatus> {
        let data = Loose(data);
        match data.text("status")?.as_str() {
            "running" => Some(TaskStatus::Running),
            // Absent when the worker died without a last word.
            "stopped" => Some(TaskStatus::Stopped {
                exitstatus: data.text("exitstatus").unwrap_or_else(|| "unexpected status".into()),
            }),
            _ => None,
        }
    }
}

/// The lines of a task's log; none if it is empty.
pub(super) fn log_lines(data: &Value) -> Vec<String> {
    let lines: Vec<String> = Loose(data).items().filter_map(|line| line.text("t")).collect();
    // Proxmox's way of saying that there is no line.
    if lines == ["no content"] { Vec::new() } else { lines }
}

/// The UPIDs of a task list.
pub(super) fn upids(data: &Value) -> Vec<Upid> {
    Loose(data).items().filter_map(|task| task.text("upid")?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::pve::fixtures::{golden, recorded};

    #[test]
    fn numbers_strings_and_flags_are_interchangeable() {
        let v = json!({"a": "12", "b": 12, "c": 12.7, "d": "12.7", "e": true, "f": "abc", "g": -1, "n": null});
        let numbers: Vec<_> =
            "abcdefgn".chars().map(|k| Loose(&v).number(&k.to_string())).collect();
        assert_eq!(numbers, [Some(12), Some(12), Some(12), Some(12), Some(1), None, None, None]);
        let v = json!({"a": "0", "b": 0, "c": false, "d": "1", "e": 1, "f": true});
        let flags: Vec<_> = "abcdefx".chars().map(|k| Loose(&v).flag(&k.to_string())).collect();
        assert_eq!(flags, [false, false, false, true, true, true, false]);
        let v = json!({"a": 0.5, "b": "0.5"});
        assert_eq!(
            (Loose(&v).text("a"), Loose(&v).text("b")),
            (Some("0.5".into()), Some("0.5".into()))
        );
    }

    #[test]
    fn reads_recorded_states() {
        let status = |name| CtStatus::from_json(recorded(name).data(), None).unwrap();
        let running = status("lxc-status-current-running-full");
        assert!(running.running);
        assert_eq!((running.vmid.get(), running.pid), (110, Some(1294)));
        assert_eq!((running.name.as_str(), running.tags.as_str()), ("ct110", "containerd;k8s"));
        assert_eq!(running.max_memory, Some(256 << 20));
        let stopped = status("lxc-status-current-stopped");
        assert_eq!((stopped.running, stopped.pid, stopped.lock), (false, None, None));
        assert_eq!(status("lxc-status-current-locked").lock.as_deref(), Some("backup"));
    }

    #[test]
    fn reads_recorded_configurations() {
        let full = CtConfig::from_json(recorded("lxc-config-full").data()).unwrap();
        assert_eq!(full.description, "hello world\nline2\n");
        assert_eq!(
            (full.memory_mib, full.swap_mib, full.cpuunits),
            (Some(256), Some(128), Some(200))
        );
        assert_eq!(full.cpulimit.as_deref(), Some("0.5"));
        assert_eq!(full.digest.len(), 40);
        let shape = CtConfig::from_json(&golden("shim-shape.api.json")["data"]).unwrap();
        let lxc: Vec<_> = shape.lxc.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        let include = "/run/containerd-shim-proxmox/default/web/lxc.conf";
        assert_eq!(lxc, [("lxc.apparmor.profile", "unconfined"), ("lxc.include", include)]);
    }

    #[test]
    fn reads_recorded_tasks() {
        let status = |name| TaskStatus::from_json(recorded(name).data()).unwrap();
        assert_eq!(status("task-status-running"), TaskStatus::Running);
        assert_eq!(
            status("task-status-create-ok"),
            TaskStatus::Stopped { exitstatus: "OK".into() }
        );
        let TaskStatus::Stopped { exitstatus } = status("task-status-aborted") else { panic!() };
        assert!(exitstatus.ends_with("received interrupt"), "{exitstatus}");
        assert!(log_lines(recorded("task-log-running").data()).is_empty());
        assert_eq!(log_lines(recorded("task-log-create-ok").data()).last().unwrap(), "TASK OK");
        assert_eq!(upids(recorded("tasks-list").data()).len(), 3);
        assert_eq!(upids(recorded("tasks-list-active").data())[0].kind(), "vzstart");
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "\\PC{0,10}|running|stopped".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 24, 6, |inner| {
            let key = "[a-z]{1,3}|vmid|status|pid|lock|lxc|memory|exitstatus|upid|t";
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::hash_map(key, inner, 0..6)
                    .prop_map(|m| m.into_iter().collect()),
            ]
        })
    }

    proptest! {
        #[test]
        fn no_answer_makes_it_panic(data in any_json()) {
            let _ = CtStatus::from_json(&data, None);
            let _ = CtConfig::from_json(&data);
            let _ = TaskStatus::from_json(&data);
            let _ = Version::from_json(&data);
            let _ = (log_lines(&data), upids(&data));
        }
    }
}
