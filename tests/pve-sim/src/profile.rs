//! How long things take: nothing at all, or as long as on a real node.
//!
//! The figures are measurements of a two-CPU node with Proxmox VE 9.2. Durations of what really
//! runs here (liblxc, the CT's own init) are not simulated; only the rest is added.

use std::time::Duration;

/// Which delays to add.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// None.
    Instant,
    /// Those of a real node.
    Node,
}

/// A kind of delay and the factor for all times, time-outs included.
#[derive(Debug, Clone, Copy)]
pub struct Profile {
    /// Which delays to add.
    pub kind: Kind,
    /// Factor; 1.0 is real time.
    pub scale: f64,
}

/// An API call, as far as its duration differs from others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// What the front end answers itself: version, nextid, config, lists of tasks.
    Plain,
    /// Status and log of a task.
    Task,
    /// Status of a CT, storages.
    Status,
    /// The CT list, with the number of CTs.
    List(usize),
    /// A change of the configuration.
    Put,
    /// The POST that makes or copies a CT.
    Create,
    /// The POST that starts a CT.
    Start,
    /// The POST that stops, shuts down or reboots a CT.
    Stop,
    /// The DELETE of a CT.
    Delete,
}

/// A part of a task that takes time on a real node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// From the POST to the exec of lxc-start.
    StartBefore,
    /// From RUNNING to the end of the start task.
    StartAfter,
    /// From the POST to the kill.
    StopBefore,
    /// From the POST to the removal of the configuration.
    DestroyBefore,
    /// The stock pre-start hook.
    HookPreStart,
    /// The stock post-stop hook.
    HookPostStop,
}

impl Profile {
    fn scaled(&self, ms: u64) -> Duration {
        Duration::from_secs_f64(ms as f64 / 1000.0 * self.scale)
    }

    /// The duration of an API call until its answer.
    pub fn call(&self, call: Call) -> Duration {
        let ms = match (self.kind, call) {
            (Kind::Instant, _) => return Duration::ZERO,
            (Kind::Node, Call::Plain) => 7,
            (Kind::Node, Call::Task) => 8,
            (Kind::Node, Call::Status) => 41,
            (Kind::Node, Call::List(n)) => 40 + 8 * n as u64,
            (Kind::Node, Call::Put) => 48,
            (Kind::Node, Call::Create) => 40,
            (Kind::Node, Call::Start) => 50,
            (Kind::Node, Call::Stop) => 30,
            (Kind::Node, Call::Delete) => 28,
        };
        self.scaled(ms)
    }

    /// The duration of a part of a task.
    pub fn step(&self, step: Step) -> Duration {
        let ms = match (self.kind, step) {
            (Kind::Instant, _) => return Duration::ZERO,
            (Kind::Node, Step::StartBefore) => 168,
            (Kind::Node, Step::StartAfter) => 172,
            (Kind::Node, Step::StopBefore) => 145,
            (Kind::Node, Step::DestroyBefore) => 92,
            (Kind::Node, Step::HookPreStart) => 627,
            (Kind::Node, Step::HookPostStop) => 1017,
        };
        self.scaled(ms)
    }

    /// How long a 401 is held back.
    pub fn unauthorized(&self) -> Duration {
        match self.kind {
            Kind::Instant => Duration::from_millis(10),
            Kind::Node => self.scaled(3000),
        }
    }

    /// How long the look-up of an unknown node takes to fail.
    pub fn unknown_node(&self) -> Duration {
        match self.kind {
            Kind::Instant => Duration::from_millis(10),
            Kind::Node => self.scaled(10_000),
        }
    }

    /// How long the DELETE of a running task takes.
    pub fn interrupt(&self) -> Duration {
        match self.kind {
            Kind::Instant => Duration::from_millis(10),
            Kind::Node => self.scaled(1000),
        }
    }

    /// The 10 s after which waiting for a lock, or for a CT in its post-stop window, fails.
    pub fn lock_timeout(&self) -> Duration {
        self.scaled(10_000)
    }

    /// The 10 s that a start waits for RUNNING. Real programs run meanwhile, so it does not
    /// shrink with the scale.
    pub fn running_timeout(&self) -> Duration {
        self.scaled(10_000).max(Duration::from_secs(10))
    }

    /// How long the container may take to end after `lxc-stop` gave up.
    pub fn stop_grace(&self) -> Duration {
        self.scaled(5000)
    }

    /// How long a terminal waits for its client.
    pub fn terminal_timeout(&self) -> Duration {
        self.scaled(10_000)
    }

    /// How long the wait for a VNC server takes to fail.
    pub fn vnc_timeout(&self) -> Duration {
        self.scaled(5600)
    }

    /// The age at which `/cluster/resources` is renewed.
    pub fn resources_age(&self) -> Duration {
        self.scaled(10_000)
    }
}
