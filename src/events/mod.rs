//! Events to containerd: what happened, in an order its clients can rely on.
//!
//! [`Event`] is what the task service hands in. [`order`] decides what may be published when,
//! [`Outbox`] queues it, and `forward` delivers it. Protobuf appears only in this directory.

mod forward;
pub mod order;
mod outbox;

use std::time::{SystemTime, UNIX_EPOCH};

use containerd_shim_protos::events::task as pb;
use containerd_shim_protos::protobuf::well_known_types::{any::Any, timestamp::Timestamp};
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::event::Envelope;

use crate::lxc::rootfs::RootfsMount;

pub use outbox::{Outbox, Settings};

/// What happened to a task or to one of its execs. An empty `id` is the task's own process.
///
/// Source: the messages of containerd's `api/events/task.proto`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The task exists and can be started.
    Create {
        /// The task.
        container_id: String,
        /// Its bundle directory.
        bundle: String,
        /// What was mounted at `<bundle>/rootfs`.
        rootfs: Vec<RootfsMount>,
        /// The client's path or URI, or empty.
        stdin: String,
        /// The client's path or URI, or empty.
        stdout: String,
        /// The client's path or URI, or empty.
        stderr: String,
        /// Whether the process has a terminal.
        terminal: bool,
        /// Host id of the process.
        pid: u32,
    },
    /// The user's process runs.
    Start {
        /// The task.
        container_id: String,
        /// Host id of the process.
        pid: u32,
    },
    /// A process ended.
    Exit {
        /// The task.
        container_id: String,
        /// The exec, or empty.
        id: String,
        /// Host id the process had.
        pid: u32,
        /// 0..255; 128 + n for a signal.
        exit_status: u32,
        /// When it ended.
        exited_at: SystemTime,
    },
    /// A process's record was deleted; for an empty `id` the task with everything in it.
    Delete {
        /// The task.
        container_id: String,
        /// The exec, or empty.
        id: String,
        /// Host id the process had.
        pid: u32,
        /// 0..255; 128 + n for a signal.
        exit_status: u32,
        /// When it ended.
        exited_at: SystemTime,
    },
    /// The kernel killed a process of the container for lack of memory.
    Oom {
        /// The task.
        container_id: String,
    },
    /// All processes are frozen.
    Paused {
        /// The task.
        container_id: String,
    },
    /// The processes run again.
    Resumed {
        /// The task.
        container_id: String,
    },
    /// An exec exists and can be started.
    ExecAdded {
        /// The task.
        container_id: String,
        /// The exec.
        exec_id: String,
    },
    /// An exec's process runs.
    ExecStarted {
        /// The task.
        container_id: String,
        /// The exec.
        exec_id: String,
        /// Host id of the process.
        pid: u32,
    },
}

impl Event {
    /// The task the event is about.
    pub fn container_id(&self) -> &str {
        match self {
            Event::Create { container_id, .. }
            | Event::Start { container_id, .. }
            | Event::Exit { container_id, .. }
            | Event::Delete { container_id, .. }
            | Event::Oom { container_id }
            | Event::Paused { container_id }
            | Event::Resumed { container_id }
            | Event::ExecAdded { container_id, .. }
            | Event::ExecStarted { container_id, .. } => container_id,
        }
    }

    /// The exec the event is about; empty for the task's own process.
    pub fn exec_id(&self) -> &str {
        match self {
            Event::Exit { id, .. } | Event::Delete { id, .. } => id,
            Event::ExecAdded { exec_id, .. } | Event::ExecStarted { exec_id, .. } => exec_id,
            Event::Create { .. }
            | Event::Start { .. }
            | Event::Oom { .. }
            | Event::Paused { .. }
            | Event::Resumed { .. } => "",
        }
    }

    /// containerd's topic, as in its `core/runtime/events.go`.
    pub fn topic(&self) -> &'static str {
        match self {
            Event::Create { .. } => "/tasks/create",
            Event::Start { .. } => "/tasks/start",
            Event::Exit { .. } => "/tasks/exit",
            Event::Delete { .. } => "/tasks/delete",
            Event::Oom { .. } => "/tasks/oom",
            Event::Paused { .. } => "/tasks/paused",
            Event::Resumed { .. } => "/tasks/resumed",
            Event::ExecAdded { .. } => "/tasks/exec-added",
            Event::ExecStarted { .. } => "/tasks/exec-started",
        }
    }

    /// The message containerd forwards to its subscribers.
    fn envelope(&self, namespace: &str, at: SystemTime) -> Envelope {
        let mut envelope = Envelope::new();
        envelope.timestamp = MessageField::some(timestamp(at));
        envelope.namespace = namespace.to_string();
        envelope.topic = self.topic().to_string();
        envelope.event = MessageField::some(self.message());
        envelope
    }

    fn message(&self) -> Any {
        match self.clone() {
            Event::Create {
                container_id,
                bundle,
                rootfs,
                stdin,
                stdout,
                stderr,
                terminal,
                pid,
            } => {
                let mut io = pb::TaskIO::new();
                io.stdin = stdin;
                io.stdout = stdout;
                io.stderr = stderr;
                io.terminal = terminal;
                let mut event = pb::TaskCreate::new();
                event.container_id = container_id;
                event.bundle = bundle;
                // The library does not export this message's type by name.
                event.rootfs.resize_with(rootfs.len(), Default::default);
                for (to, from) in event.rootfs.iter_mut().zip(rootfs) {
                    to.type_ = from.fstype;
                    to.source = from.source;
                    to.target = from.target;
                    to.options = from.options;
                }
                event.io = MessageField::some(io);
                event.pid = pid;
                any(&event)
            }
            Event::Start { container_id, pid } => {
                let mut event = pb::TaskStart::new();
                event.container_id = container_id;
                event.pid = pid;
                any(&event)
            }
            Event::Exit { container_id, id, pid, exit_status, exited_at } => {
                let mut event = pb::TaskExit::new();
                // Clients recognise the task's own process by an id equal to the container's.
                event.id = if id.is_empty() { container_id.clone() } else { id };
                event.container_id = container_id;
                event.pid = pid;
                event.exit_status = exit_status;
                event.exited_at = MessageField::some(timestamp(exited_at));
                any(&event)
            }
            Event::Delete { container_id, id, pid, exit_status, exited_at } => {
                let mut event = pb::TaskDelete::new();
                event.container_id = container_id;
                event.id = id;
                event.pid = pid;
                event.exit_status = exit_status;
                event.exited_at = MessageField::some(timestamp(exited_at));
                any(&event)
            }
            Event::Oom { container_id } => {
                let mut event = pb::TaskOOM::new();
                event.container_id = container_id;
                any(&event)
            }
            Event::Paused { container_id } => {
                let mut event = pb::TaskPaused::new();
                event.container_id = container_id;
                any(&event)
            }
            Event::Resumed { container_id } => {
                let mut event = pb::TaskResumed::new();
                event.container_id = container_id;
                any(&event)
            }
            Event::ExecAdded { container_id, exec_id } => {
                let mut event = pb::TaskExecAdded::new();
                event.container_id = container_id;
                event.exec_id = exec_id;
                any(&event)
            }
            Event::ExecStarted { container_id, exec_id, pid } => {
                let mut event = pb::TaskExecStarted::new();
                event.container_id = container_id;
                event.exec_id = exec_id;
                event.pid = pid;
                any(&event)
            }
        }
    }
}

/// Packs a message of `containerd.events` as containerd's `typeurl` does: the bare name without a host,
/// which is what its clients compare.
fn any<M: Message>(message: &M) -> Any {
    let mut any = Any::new();
    // The descriptor would tell it as well, and stay in memory with those of all messages.
    any.type_url = format!("containerd.events.{}", M::NAME);
    // Writing to memory fails only for a message without its required fields; proto3 has none.
    any.value = message.write_to_bytes().unwrap_or_default();
    any
}

pub(crate) fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut timestamp = Timestamp::new();
    timestamp.seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    timestamp.nanos = since.subsec_nanos() as i32;
    timestamp
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::protobuf::MessageFull;
    use std::time::Duration;

    fn at() -> SystemTime {
        UNIX_EPOCH + Duration::new(7, 9)
    }

    fn stamp() -> MessageField<Timestamp> {
        let mut stamp = Timestamp::new();
        stamp.seconds = 7;
        stamp.nanos = 9;
        MessageField::some(stamp)
    }

    fn parsed<M: MessageFull>(event: &Event) -> M {
        let any = event.message();
        assert_eq!(any.type_url, M::descriptor().full_name());
        M::parse_from_bytes(&any.value).unwrap()
    }

    #[test]
    fn every_field_reaches_its_message() {
        let create: pb::TaskCreate = parsed(&Event::Create {
            container_id: "c".into(),
            bundle: "/b".into(),
            rootfs: vec![RootfsMount {
                fstype: "overlay".into(),
                source: "s".into(),
                target: "t".into(),
                options: vec!["ro".into(), "x=y".into()],
            }],
            stdin: "i".into(),
            stdout: "o".into(),
            stderr: "e".into(),
            terminal: true,
            pid: 5,
        });
        assert_eq!((create.container_id.as_str(), create.bundle.as_str()), ("c", "/b"));
        assert_eq!((create.pid, create.checkpoint.as_str()), (5, ""));
        let io = create.io.unwrap();
        assert_eq!((io.stdin.as_str(), io.stdout.as_str()), ("i", "o"));
        assert_eq!((io.stderr.as_str(), io.terminal), ("e", true));
        let mount = &create.rootfs[0];
        assert_eq!((mount.type_.as_str(), mount.source.as_str()), ("overlay", "s"));
        assert_eq!((mount.target.as_str(), mount.options.len()), ("t", 2));

        let exit: pb::TaskExit = parsed(&Event::Exit {
            container_id: "c".into(),
            id: "x".into(),
            pid: 5,
            exit_status: 137,
            exited_at: at(),
        });
        assert_eq!((exit.container_id.as_str(), exit.id.as_str()), ("c", "x"));
        assert_eq!((exit.pid, exit.exit_status, &exit.exited_at), (5, 137, &stamp()));

        let delete: pb::TaskDelete = parsed(&Event::Delete {
            container_id: "c".into(),
            id: "x".into(),
            pid: 5,
            exit_status: 1,
            exited_at: at(),
        });
        assert_eq!((delete.container_id.as_str(), delete.id.as_str()), ("c", "x"));
        assert_eq!((delete.pid, delete.exit_status, &delete.exited_at), (5, 1, &stamp()));

        let start: pb::TaskStart = parsed(&Event::Start { container_id: "c".into(), pid: 5 });
        assert_eq!((start.container_id.as_str(), start.pid), ("c", 5));
        let added: pb::TaskExecAdded =
            parsed(&Event::ExecAdded { container_id: "c".into(), exec_id: "x".into() });
        assert_eq!((added.container_id.as_str(), added.exec_id.as_str()), ("c", "x"));
        let started: pb::TaskExecStarted =
            parsed(&Event::ExecStarted { container_id: "c".into(), exec_id: "x".into(), pid: 6 });
        assert_eq!((started.container_id.as_str(), started.exec_id.as_str()), ("c", "x"));
        assert_eq!(started.pid, 6);
        let oom: pb::TaskOOM = parsed(&Event::Oom { container_id: "c".into() });
        assert_eq!(oom.container_id, "c");
        let paused: pb::TaskPaused = parsed(&Event::Paused { container_id: "c".into() });
        assert_eq!(paused.container_id, "c");
        let resumed: pb::TaskResumed = parsed(&Event::Resumed { container_id: "c".into() });
        assert_eq!(resumed.container_id, "c");
    }

    #[test]
    fn the_exit_of_a_task_carries_the_containers_id() {
        let exit: pb::TaskExit = parsed(&Event::Exit {
            container_id: "c".into(),
            id: String::new(),
            pid: 1,
            exit_status: 0,
            exited_at: at(),
        });
        assert_eq!(exit.id, "c");
    }

    #[test]
    fn the_envelope_has_namespace_topic_time_and_a_bare_type() {
        let envelope = Event::Start { container_id: "c".into(), pid: 1 }.envelope("k8s.io", at());
        assert_eq!(
            (envelope.namespace.as_str(), envelope.topic.as_str()),
            ("k8s.io", "/tasks/start")
        );
        assert_eq!(envelope.timestamp, stamp());
        assert_eq!(envelope.event.unwrap().type_url, "containerd.events.TaskStart");
    }
}
