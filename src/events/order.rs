//! What may be published when: a pure state machine without clock, threads or protobuf.
//!
//! containerd's clients take events literally: one that sees an exit before the start waits for an
//! exit that already came, one that sees a start after the delete believes in a task that is gone.
//! The processes behind the events are less orderly: a short-lived one is gone before `Start` has
//! returned. So each event has a precondition, and one whose precondition is not met yet is held
//! until it is. Source of the rules: the table of task events in containerd's `docs/runtime-v2.md`.
//!
//! | event | may be published when |
//! | --- | --- |
//! | create | the task is not known, or was deleted (a pod may reuse an id) |
//! | start | created |
//! | exit | started; else held: a task or exec that never starts publishes no exit |
//! | delete | exited, or never started; held from start to exit |
//! | oom, paused, resumed | created; any number of times |
//! | exec added | created |
//! | exec started | exec added |
//!
//! Create, start, exit and delete come at most once. Nothing of a task follows its delete, nothing
//! of an exec follows the exec's. The delete of the task ends its execs, whatever their state: an
//! exit that has not been seen by then will not be waited for.

use std::collections::{HashMap, VecDeque};
use std::time::SystemTime;

use super::Event;

/// Deleted tasks that are remembered to recognise their late events; more are not needed, a late
/// event is late by milliseconds.
const REMEMBERED: usize = 256;

/// An event and the moment it was handed in, which stays its time however long it is held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stamped {
    /// What happened.
    pub event: Event,
    /// When it was handed in.
    pub at: SystemTime,
}

/// How far a process has come, as published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Created,
    Started,
    Exited,
}

#[derive(Debug, Default)]
struct Task {
    /// `None`: create was not published yet.
    phase: Option<Phase>,
    execs: HashMap<String, Phase>,
    held: Vec<Stamped>,
}

/// What to do with an event now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Publish,
    Hold,
    Drop,
}

/// Puts the events of all tasks of one shim into their order.
#[derive(Debug, Default)]
pub struct Order {
    tasks: HashMap<String, Task>,
    deleted: VecDeque<String>,
}

impl Order {
    /// Takes an event in and returns what is to be published now, in this order: often the event
    /// itself, sometimes nothing, sometimes also events that had been held for it.
    pub fn push(&mut self, event: Event, at: SystemTime) -> Vec<Stamped> {
        let id = event.container_id().to_string();
        if self.deleted.contains(&id) {
            if !matches!(event, Event::Create { .. }) {
                return Vec::new();
            }
            self.deleted.retain(|deleted| *deleted != id);
        }
        let task = self.tasks.entry(id.clone()).or_default();
        if task.held.iter().any(|held| same_kind(&held.event, &event)) {
            return Vec::new();
        }
        // In the order of a life, so that a start that waits for the create goes before a delete that
        // came earlier and does too.
        let place = task.held.partition_point(|held| rank(&held.event) <= rank(&event));
        task.held.insert(place, Stamped { event, at });

        let mut publish = Vec::new();
        // Each published event can make another one possible, so the scan starts over.
        let mut next = 0;
        while next < task.held.len() {
            match task.verdict(&task.held[next].event) {
                Verdict::Hold => next += 1,
                Verdict::Drop => {
                    task.held.remove(next);
                }
                Verdict::Publish => {
                    let stamped = task.held.remove(next);
                    let ends = matches!(&stamped.event, Event::Delete { id, .. } if id.is_empty());
                    task.advance(&stamped.event);
                    publish.push(stamped);
                    if ends {
                        self.forget(id);
                        return publish;
                    }
                    next = 0;
                }
            }
        }
        if task.phase.is_none() && task.held.is_empty() {
            self.tasks.remove(&id);
        }
        publish
    }

    fn forget(&mut self, id: String) {
        self.tasks.remove(&id);
        if self.deleted.len() == REMEMBERED {
            self.deleted.pop_front();
        }
        self.deleted.push_back(id);
    }
}

impl Task {
    fn verdict(&self, event: &Event) -> Verdict {
        use Verdict::{Drop, Hold, Publish};
        let Some(phase) = self.phase else {
            return match event {
                Event::Create { .. } => Publish,
                // The process can be gone before its create is published.
                Event::Start { .. } | Event::Exit { .. } | Event::Delete { .. } => Hold,
                // These need a task somebody knows; before that there is nothing to tell.
                Event::Oom { .. }
                | Event::Paused { .. }
                | Event::Resumed { .. }
                | Event::ExecAdded { .. }
                | Event::ExecStarted { .. } => Drop,
            };
        };
        match event {
            Event::Create { .. } => Drop,
            Event::Start { .. } => when(phase == Phase::Created, Drop),
            Event::Exit { id, .. } | Event::Delete { id, .. } => {
                let phase = if id.is_empty() { Some(phase) } else { self.execs.get(id).copied() };
                match (event, phase) {
                    // An exec nobody knows is one that was deleted: its add comes before all else.
                    (_, None) => Drop,
                    (Event::Exit { .. }, Some(Phase::Created)) => Hold,
                    (Event::Exit { .. }, Some(Phase::Exited)) => Drop,
                    (Event::Delete { .. }, Some(Phase::Started)) => Hold,
                    (_, Some(_)) => Publish,
                }
            }
            Event::Oom { .. } | Event::Paused { .. } | Event::Resumed { .. } => Publish,
            Event::ExecAdded { exec_id, .. } => when(!self.execs.contains_key(exec_id), Drop),
            Event::ExecStarted { exec_id, .. } => {
                when(self.execs.get(exec_id) == Some(&Phase::Created), Drop)
            }
        }
    }

    fn advance(&mut self, event: &Event) {
        match event {
            Event::Create { .. } => self.phase = Some(Phase::Created),
            Event::Start { .. } => self.phase = Some(Phase::Started),
            Event::Exit { id, .. } if id.is_empty() => self.phase = Some(Phase::Exited),
            Event::Exit { id, .. } => {
                self.execs.insert(id.clone(), Phase::Exited);
            }
            Event::Delete { id, .. } => {
                self.execs.remove(id);
                // An exit held for an exec that never started would otherwise stay for ever.
                self.held.retain(|held| held.event.exec_id() != id);
            }
            Event::ExecAdded { exec_id, .. } => {
                self.execs.insert(exec_id.clone(), Phase::Created);
            }
            Event::ExecStarted { exec_id, .. } => {
                self.execs.insert(exec_id.clone(), Phase::Started);
            }
            Event::Oom { .. } | Event::Paused { .. } | Event::Resumed { .. } => {}
        }
    }
}

fn when(possible: bool, otherwise: Verdict) -> Verdict {
    if possible { Verdict::Publish } else { otherwise }
}

fn rank(event: &Event) -> u8 {
    match event {
        Event::Create { .. } | Event::ExecAdded { .. } => 0,
        Event::Start { .. } | Event::ExecStarted { .. } => 1,
        // Never held.
        Event::Oom { .. } | Event::Paused { .. } | Event::Resumed { .. } => 2,
        Event::Exit { .. } => 3,
        Event::Delete { .. } => 4,
    }
}

fn same_kind(a: &Event, b: &Event) -> bool {
    std::mem::discriminant(a) == std::mem::discriminant(b) && a.exec_id() == b.exec_id()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::UNIX_EPOCH;

    /// Short notation: `c s e d` create, start, exit, delete; `o p r` oom, paused, resumed; with a
    /// digit for the exec `a1 s1 e1 d1`; a leading `B` is another container.
    fn event(word: &str) -> Event {
        let (container, word) = match word.strip_prefix('B') {
            Some(rest) => ("B", rest),
            None => ("A", word),
        };
        let container_id = container.to_string();
        let (kind, id) = word.split_at(1);
        let exec_id = id.to_string();
        let (pid, exit_status, exited_at) = (1, 0, UNIX_EPOCH);
        match (kind, id.is_empty()) {
            ("c", _) => Event::Create {
                container_id,
                bundle: String::new(),
                rootfs: Vec::new(),
                stdin: String::new(),
                stdout: String::new(),
                stderr: String::new(),
                terminal: false,
                pid,
            },
            ("s", true) => Event::Start { container_id, pid },
            ("s", false) => Event::ExecStarted { container_id, exec_id, pid },
            ("e", _) => Event::Exit { container_id, id: exec_id, pid, exit_status, exited_at },
            ("d", _) => Event::Delete { container_id, id: exec_id, pid, exit_status, exited_at },
            ("a", _) => Event::ExecAdded { container_id, exec_id },
            ("o", _) => Event::Oom { container_id },
            ("p", _) => Event::Paused { container_id },
            ("r", _) => Event::Resumed { container_id },
            _ => panic!("unknown word {word}"),
        }
    }

    fn word(event: &Event) -> String {
        let prefix = if event.container_id() == "B" { "B" } else { "" };
        let kind = match event {
            Event::Create { .. } => "c",
            Event::Start { .. } | Event::ExecStarted { .. } => "s",
            Event::Exit { .. } => "e",
            Event::Delete { .. } => "d",
            Event::Oom { .. } => "o",
            Event::Paused { .. } => "p",
            Event::Resumed { .. } => "r",
            Event::ExecAdded { .. } => "a",
        };
        format!("{prefix}{kind}{}", event.exec_id())
    }

    fn run<'a>(words: impl IntoIterator<Item = &'a str>) -> Vec<String> {
        let mut order = Order::default();
        words
            .into_iter()
            .flat_map(|w| order.push(event(w), UNIX_EPOCH))
            .map(|s| word(&s.event))
            .collect()
    }

    #[test]
    fn events_come_out_in_the_order_clients_rely_on() {
        for (why, handed_in, published) in [
            ("the usual life", "c s o p r e d", "c s o p r e d"),
            ("an exit before the start is published waits for it", "c e s d", "c s e d"),
            ("also before the create", "e s c d", "c s e d"),
            ("a task that never started publishes no exit", "c e d", "c d"),
            ("a delete waits for the exit of a started task", "c s d e", "c s e d"),
            ("start, exit and delete all early", "d e s c", "c s e d"),
            ("a created task is deleted", "c d", "c d"),
            ("each at most once", "c c s s e e d d", "c s e d"),
            ("held ones at most once too", "c e e s d", "c s e d"),
            (
                "oom and pauses as often as they happen",
                "c s o o p r p r e d",
                "c s o o p r p r e d",
            ),
            ("nothing follows the delete", "c s e d e o s p a1 d", "c s e d"),
            ("nothing but a create precedes it", "o p r a1 c", "c"),
            ("an id may be used again after its delete", "c s e d c s e d", "c s e d c s e d"),
            ("nothing of the first life is held into the second", "c e d c s", "c d c s"),
            ("an exec's life", "c s a1 s1 e1 d1 e d", "c s a1 s1 e1 d1 e d"),
            ("an exec's exit waits for its start", "c s a1 e1 s1 d1", "c s a1 s1 e1 d1"),
            ("an exec that never started publishes no exit", "c s a1 e1 d1", "c s a1 d1"),
            ("an exec's delete waits for its exit", "c s a1 s1 d1 e1", "c s a1 s1 e1 d1"),
            (
                "nothing of an exec follows its delete",
                "c s a1 s1 e1 d1 e1 s1 d1",
                "c s a1 s1 e1 d1",
            ),
            ("an exec's id may be used again", "c s a1 d1 a1 s1 e1", "c s a1 d1 a1 s1 e1"),
            ("a second add is dropped", "c s a1 a1 s1", "c s a1 s1"),
            ("execs do not wait for each other", "c s a1 a2 s2 e2 e1 s1", "c s a1 a2 s2 e2 s1 e1"),
            ("the task's delete ends its execs", "c s a1 s1 e d e1 d1", "c s a1 s1 e d"),
            ("an exec's held exit dies with the task", "c s a1 e1 e d s1", "c s a1 e d"),
            ("containers do not wait for each other", "c e Bc Bs Be s Bd d", "c Bc Bs Be s e Bd d"),
        ] {
            let got = run(handed_in.split(' ')).join(" ");
            assert_eq!(got, published, "{why}: {handed_in}");
        }
    }

    #[test]
    fn deleted_tasks_leave_nothing_but_a_bounded_memory() {
        let mut order = Order::default();
        for n in 0..3 * REMEMBERED {
            let container_id = n.to_string();
            let mut create = event("c");
            if let Event::Create { container_id: id, .. } = &mut create {
                *id = container_id.clone();
            }
            order.push(create, UNIX_EPOCH);
            let mut delete = event("d");
            if let Event::Delete { container_id: id, .. } = &mut delete {
                *id = container_id;
            }
            order.push(delete, UNIX_EPOCH);
        }
        assert!(order.tasks.is_empty());
        assert_eq!(order.deleted.len(), REMEMBERED);
    }

    #[test]
    fn a_held_event_keeps_the_time_it_was_handed_in() {
        let mut order = Order::default();
        let at = |second| UNIX_EPOCH + std::time::Duration::from_secs(second);
        order.push(event("c"), at(1));
        assert!(order.push(event("e"), at(2)).is_empty());
        let published = order.push(event("s"), at(3));
        assert_eq!(published.iter().map(|s| s.at).collect::<Vec<_>>(), [at(3), at(2)]);
    }

    proptest! {
        /// Whatever is handed in, in whatever order: no rule of the table is broken.
        #[test]
        fn no_sequence_breaks_a_rule(words in proptest::collection::vec(
            prop::sample::select(vec![
                "c", "s", "e", "d", "o", "p", "a1", "s1", "e1", "d1", "a2", "s2", "e2", "d2",
            ]), 0..40)
        ) {
            let published = run(words);
            let mut life: Vec<String> = Vec::new();
            for word in published {
                let seen = |w: &str| life.iter().any(|l| l == w);
                let (kind, id) = word.split_at(1);
                if kind == "c" {
                    prop_assert!(!seen("c"), "second create in {life:?}");
                    life.clear();
                } else {
                    prop_assert!(seen("c"), "{word} without create in {life:?}");
                    let own = |k: &str| seen(&format!("{k}{id}"));
                    let added = id.is_empty() || own("a");
                    match kind {
                        "s" => prop_assert!(added && !own("s")),
                        "e" => prop_assert!(own("s") && !own("e")),
                        "d" => prop_assert!(added && !own("s") || own("e")),
                        "a" => prop_assert!(!own("a")),
                        _ => {}
                    }
                }
                match word.as_str() {
                    "d" => life.clear(),
                    w if w.starts_with('d') => life.retain(|l| &l[1..] != id || id.is_empty()),
                    _ => life.push(word),
                }
            }
        }
    }
}
