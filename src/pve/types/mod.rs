//! What the API answers, in this project's types.
//!
//! Proxmox's JSON is loosely typed: numbers come as strings and the reverse, booleans as 0 and 1 or
//! `"0"` and `"1"`, and a key without a value is left out. All of that is read leniently here and
//! nowhere else; unknown fields are ignored.

mod cluster;
mod lxc;
mod storage;
mod task;

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::config::Vmid;
pub use cluster::{ClusterStatus, Member, NodeStatus, NodeSummary, Pool, Resource, Version};
pub use lxc::{CtConfig, CtStatus, Interface, PendingValue, Snapshot};
pub(super) use lxc::{TerminalTicket, interfaces};
pub use storage::{Storage, Volume};
pub(super) use task::log_lines;
pub use task::{Task, TaskStatus};

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

    pub(super) fn as_fraction(self) -> Option<f64> {
        let fraction = match self.0 {
            Value::Number(n) => n.as_f64(),
            Value::String(s) => s.trim().parse().ok(),
            Value::Bool(b) => Some(f64::from(u8::from(*b))),
            _ => None,
        };
        fraction.filter(|f| f.is_finite())
    }

    pub(super) fn as_vmid(self) -> Option<Vmid> {
        self.as_number().and_then(|n| u32::try_from(n).ok()).and_then(Vmid::new)
    }
}

/// The entries of a list that can be read; others are passed over, as what a newer release adds.
/// `None` if it is no list.
pub(super) fn list<T>(data: &Value, entry: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
    Some(data.as_array()?.iter().filter_map(entry).collect())
}

/// A text that lists words, such as `images,rootdir`.
fn words(text: &str) -> BTreeSet<String> {
    text.split([',', ';', ' ']).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

/// `GET /access/permissions`: the privileges at each ACL path.
pub(super) fn permissions(data: &Value) -> Option<BTreeMap<String, BTreeSet<String>>> {
    // The value tells whether the privilege propagates. It holds on this path either way.
    let of = |privileges: &Value| {
        privileges.as_object().into_iter().flatten().map(|(p, _)| p.clone()).collect()
    };
    Some(
        data.as_object()?.iter().map(|(path, privileges)| (path.clone(), of(privileges))).collect(),
    )
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
        let tasks = |name| list(recorded(name).data(), Task::from_json).unwrap();
        let ended = tasks("tasks-list");
        assert_eq!(ended.len(), 3);
        assert_eq!(ended[0].status, TaskStatus::Stopped { exitstatus: "OK".into() });
        assert_eq!(ended[0].ended, Some(1_795_289_498));
        let active = tasks("tasks-list-active");
        assert_eq!((active[0].upid.kind(), active[0].ended), ("vzstart", None));
        assert_eq!(active[0].status, TaskStatus::Running);
    }

    #[test]
    fn env_is_separated_by_nul() {
        let full = CtConfig::from_json(recorded("lxc-config-full").data()).unwrap();
        assert_eq!(full.env, ["A=1", "B=two words"]);
        assert_eq!(full.entrypoint.as_deref(), Some("/bin/sh -c \"echo hi; sleep 1000\""));
        let none = CtConfig::from_json(&json!({})).unwrap();
        assert!(none.env.is_empty() && none.entrypoint.is_none());
    }

    #[test]
    fn reads_recorded_pending_values() {
        let values =
            list(recorded("lxc-pending-after-put").data(), PendingValue::from_json).unwrap();
        let of = |key: &str| values.iter().find(|value| value.key == key).unwrap();
        assert_eq!(of("env").pending.as_deref(), Some("Z=1"));
        assert_eq!(of("env").current.as_deref(), Some("A=1\0B=two words"));
        assert_eq!((&of("tty").pending, of("tty").delete), (&None, false));
        let gone = PendingValue::from_json(&json!({"key": "net0", "value": "x", "delete": 1}));
        assert!(gone.unwrap().delete);
    }

    #[test]
    fn reads_recorded_snapshots_and_interfaces() {
        // The only entry is no snapshot.
        assert_eq!(list(recorded("lxc-snapshot-list").data(), Snapshot::from_json).unwrap(), []);
        let taken = json!({"name": "s1", "snaptime": "17", "description": "x\n", "parent": "s0"});
        let taken = Snapshot::from_json(&taken).unwrap();
        assert_eq!((taken.name.as_str(), taken.taken), ("s1", Some(17)));
        assert_eq!(taken.parent.as_deref(), Some("s0"));
        let found = interfaces(recorded("lxc-interfaces-net").data()).unwrap().unwrap();
        assert_eq!((found[1].name.as_str(), found[1].mac.as_str()), ("eth0", "bc:24:11:cf:4c:52"));
        assert_eq!(found[1].addresses[0], ("192.0.2.50".parse().unwrap(), 24));
        assert_eq!(found[1].addresses[1].1, 64);
        assert_eq!(interfaces(&Value::Null), Some(None));
        let old = json!([{"name": "eth0", "hwaddr": "a", "inet": "192.0.2.1/8"}]);
        assert_eq!(interfaces(&old).unwrap().unwrap()[0].addresses.len(), 1);
    }

    #[test]
    fn reads_recorded_cluster_nodes_and_rights() {
        let node = NodeStatus::from_json(recorded("node-status").data()).unwrap();
        assert_eq!(node.pve_version, "pve-manager/9.2.11/14a22df3");
        assert_eq!((node.uptime, node.cpus), (3192, Some(2)));
        assert_eq!(node.memory, Some((3_500_257_280, 25_276_514_304)));
        assert_eq!(node.load, [3.38, 3.41, 2.99]);
        let cluster = ClusterStatus::from_json(recorded("cluster-status").data()).unwrap();
        assert!(cluster.quorate && cluster.name.is_none());
        assert!(cluster.members[0].online && cluster.members[0].local);
        let lost = json!([{"type": "cluster", "name": "c", "quorate": 0},
                          {"type": "node", "name": "a", "online": "1"}]);
        let lost = ClusterStatus::from_json(&lost).unwrap();
        assert!(!lost.quorate && lost.members[0].online && !lost.members[0].local);
        let resources =
            list(recorded("cluster-resources-all").data(), Resource::from_json).unwrap();
        assert_eq!((resources[0].kind.as_str(), resources[0].vmid.unwrap().get()), ("lxc", 100));
        assert_eq!(resources.len(), 4);
        let rights = permissions(recorded("access-permissions").data()).unwrap();
        assert!(rights["/"].contains("VM.Allocate"));
        let none = permissions(recorded("access-permissions-none").data()).unwrap();
        assert!(none.values().all(BTreeSet::is_empty), "{none:?}");
    }

    #[test]
    fn reads_recorded_storages() {
        let storages =
            list(recorded("storage-list").data(), |entry| Storage::from_json(entry, None)).unwrap();
        let local = &storages[0];
        assert_eq!((local.name.as_str(), local.kind.as_str()), ("local", "dir"));
        assert!(local.active && local.enabled && !local.shared);
        assert!(local.content.contains("vztmpl") && local.content.contains("rootdir"));
        let status = Storage::from_json(recorded("storage-status").data(), Some("local")).unwrap();
        assert_eq!((&status.name, status.available), (&local.name, local.available));
        let volumes = list(recorded("storage-content-vztmpl").data(), Volume::from_json).unwrap();
        assert_eq!(volumes[0].id, "local:vztmpl/bb_1.0_amd64.tar.gz");
        assert_eq!((volumes[0].size, volumes[0].vmid), (Some(1_036_602), None));
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
            let _ = (Version::from_json(&data), NodeStatus::from_json(&data));
            let _ = (log_lines(&data), permissions(&data), interfaces(&data));
            let _ = (list(&data, Task::from_json), list(&data, PendingValue::from_json));
            let _ = (list(&data, Snapshot::from_json), list(&data, Resource::from_json));
            let _ = (list(&data, NodeSummary::from_json), ClusterStatus::from_json(&data));
            let _ = (list(&data, Volume::from_json), Storage::from_json(&data, None));
            let _ = (list(&data, Pool::from_json), TerminalTicket::from_json(&data).is_some());
        }
    }
}
