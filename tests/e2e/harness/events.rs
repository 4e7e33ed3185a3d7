//! containerd's event stream as `ctr events` prints it.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::process;

/// One event of the stream.
#[derive(Debug, Clone)]
pub struct Event {
    /// Such as `/tasks/start`.
    pub topic: String,
    pub namespace: String,
    pub body: Value,
}

impl Event {
    fn parse(line: &str) -> Option<Event> {
        // 2006-01-02 15:04:05.999999999 +0000 UTC NAMESPACE TOPIC JSON
        let at = line.find(" /")?;
        let namespace = line[..at].rsplit(' ').next()?.to_owned();
        let (topic, body) = line[at + 1..].split_once(' ').unwrap_or((&line[at + 1..], "null"));
        Some(Event {
            topic: topic.to_owned(),
            namespace,
            body: serde_json::from_str(body).unwrap_or(Value::Null),
        })
    }

    pub fn container(&self) -> &str {
        self.body["container_id"].as_str().unwrap_or_default()
    }

    /// The exec's id; empty for the container's own process, for which containerd repeats the
    /// container's id in exit events.
    pub fn exec(&self) -> &str {
        if let Some(exec) = self.body["exec_id"].as_str() {
            return exec;
        }
        match self.body["id"].as_str() {
            Some(id) if id != self.container() => id,
            _ => "",
        }
    }

    /// Zero is left out of the JSON by containerd.
    pub fn exit_status(&self) -> u32 {
        self.body["exit_status"].as_u64().unwrap_or(0) as u32
    }

    pub fn pid(&self) -> u32 {
        self.body["pid"].as_u64().unwrap_or(0) as u32
    }
}

#[derive(Default)]
struct Log {
    events: Mutex<VecDeque<Event>>,
    arrived: Condvar,
}

/// A subscription that lives as long as its containerd.
#[derive(Clone, Default)]
pub struct Events(Arc<Log>);

impl Events {
    /// Starts `ctr events` and collects what it prints until it ends.
    pub fn follow(&self, command: &mut Command) -> Child {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("cannot run ctr events");
        let stdout = child.stdout.take().expect("stdout is piped");
        let log = self.0.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Some(event) = Event::parse(&line) {
                    log.events.lock().expect("no panic under this lock").push_back(event);
                    log.arrived.notify_all();
                }
            }
        });
        child
    }

    /// All events of one container so far, in order.
    pub fn of(&self, container: &str) -> Vec<Event> {
        let events = self.0.events.lock().expect("no panic under this lock");
        events
            .iter()
            .filter(|e| e.topic.starts_with("/tasks/") && e.container() == container)
            .cloned()
            .collect()
    }

    /// The topics of one container without their prefix, as `["create", "start", …]`.
    pub fn topics(&self, container: &str) -> Vec<String> {
        self.of(container).iter().map(|e| e.topic.replace("/tasks/", "")).collect()
    }

    /// The first event that satisfies `matches`, which may have arrived already.
    pub fn find(&self, limit: Duration, matches: impl Fn(&Event) -> bool) -> Option<Event> {
        let end = Instant::now() + limit;
        let mut events = self.0.events.lock().expect("no panic under this lock");
        loop {
            if let Some(event) = events.iter().find(|e| matches(e)) {
                return Some(event.clone());
            }
            let left = end.checked_duration_since(Instant::now())?;
            events = self.0.arrived.wait_timeout(events, left).expect("not poisoned").0;
        }
    }

    /// Waits for the event of a container, or fails the test with what did arrive.
    #[track_caller]
    pub fn wait(&self, container: &str, topic: &str, exec: &str) -> Event {
        let full = format!("/tasks/{topic}");
        let wanted = |e: &Event| e.topic == full && e.container() == container && e.exec() == exec;
        self.find(process::scaled(process::DEADLINE / 2), wanted).unwrap_or_else(|| {
            panic!("no {full} event of {container} {exec}; there were {:?}", self.topics(container))
        })
    }
}
