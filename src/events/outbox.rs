//! The queue between those who hand events in and the one task that delivers them.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::shim::event::Envelope;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout_at};

use super::Event;
use super::forward::{Connection, Error, Fate};
use super::order::{Order, Stamped};

/// How events reach containerd.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Socket of containerd's ttrpc services, a path with or without `unix://`. `None`: events only
    /// go to the log, at debug level.
    pub address: Option<String>,
    /// containerd's namespace, put on each event.
    pub namespace: String,
    /// How long one call may take. After it the event's fate is unknown and it is sent again, so
    /// this is much longer than containerd ever needs: a daemon that was only suspended or starved
    /// for a while has the request in its socket and will act on it.
    pub call_deadline: Duration,
    /// First pause after a failed call; doubled up to `max_backoff`.
    pub min_backoff: Duration,
    /// Longest pause, and so the longest time until events flow again when containerd is back.
    pub max_backoff: Duration,
    /// Events that may wait. When it is reached (containerd was away for very long), only exits and
    /// deletes are still taken, up to twice as many: the others tell a daemon that comes back nothing
    /// it would not ask for itself. What is not taken is counted and logged as an error.
    pub capacity: usize,
}

impl Settings {
    /// The usual values.
    pub fn new(address: Option<String>, namespace: impl Into<String>) -> Settings {
        Settings {
            address: address.filter(|address| !address.is_empty()),
            namespace: namespace.into(),
            call_deadline: Duration::from_secs(30),
            min_backoff: Duration::from_millis(10),
            max_backoff: Duration::from_secs(1),
            capacity: 8192,
        }
    }
}

/// Publishes events to containerd: in order, none lost, none knowingly twice.
///
/// Publishing never waits and does not depend on the caller's life: an RPC whose client went away
/// has published what it published. One task delivers one event at a time and repeats the *same*
/// event until containerd has it, so a retry can neither reorder nor overtake. While containerd is
/// away events wait here.
///
/// containerd offers no way to recognise a repeated event. So one is repeated only after a failure
/// that proves it did not arrive, with one exception: if containerd dies (or is silent for
/// [`Settings::call_deadline`]) between reading the request and answering it, nobody can know, and the
/// event is sent again: who acts on events handles a second exit of a task that has exited, but
/// would wait for ever for one that was lost.
///
/// Clones share the queue. The delivering task ends with the last clone.
#[derive(Clone)]
pub struct Outbox {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    consumer: Option<JoinHandle<()>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(consumer) = &self.consumer {
            consumer.abort();
        }
    }
}

struct Shared {
    settings: Settings,
    state: Mutex<State>,
    /// Wakes the consumer.
    queued: Notify,
    /// Wakes those who flush.
    emptied: Notify,
}

#[derive(Default)]
struct State {
    order: Order,
    /// The front one stays here until containerd has it.
    queue: VecDeque<Envelope>,
    refused: u64,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // No code that holds the lock can leave it half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Outbox {
    /// Starts the delivering task; must be called inside a Tokio runtime.
    pub fn new(settings: Settings) -> Outbox {
        let address = settings.address.clone();
        let shared = Arc::new(Shared {
            settings,
            state: Mutex::default(),
            queued: Notify::new(),
            emptied: Notify::new(),
        });
        let consumer = address.map(|address| tokio::spawn(deliver(shared.clone(), address)));
        Outbox { inner: Arc::new(Inner { shared, consumer }) }
    }

    /// Hands an event in. It carries this moment as its time, also if it is held back until its
    /// precondition is met (see [`order`](super::order)) or containerd is away.
    pub fn publish(&self, event: Event) {
        let at = SystemTime::now();
        let shared = &self.inner.shared;
        let mut state = shared.state();
        for Stamped { event, at } in state.order.push(event, at) {
            let topic = event.topic();
            log::debug!(topic, container = event.container_id(), exec = event.exec_id(); "event");
            if self.inner.consumer.is_none() {
                continue;
            }
            let essential = matches!(event, Event::Exit { .. } | Event::Delete { .. });
            let limit = shared.settings.capacity * if essential { 2 } else { 1 };
            if state.queue.len() >= limit {
                state.refused += 1;
                log::error!(topic, container = event.container_id(), refused = state.refused;
                    "too many events wait for containerd, one was dropped");
                continue;
            }
            let envelope = event.envelope(&shared.settings.namespace, at);
            state.queue.push_back(envelope);
            shared.queued.notify_one();
        }
    }

    /// Waits until containerd has everything that was handed in, at most for `limit`. Returns how
    /// many events it does not have; events still held for their precondition do not count.
    pub async fn flush(&self, limit: Duration) -> usize {
        let until = Instant::now() + limit;
        loop {
            let emptied = self.inner.shared.emptied.notified();
            let waiting = self.inner.shared.state().queue.len();
            if waiting == 0 || timeout_at(until, emptied).await.is_err() {
                return self.inner.shared.state().queue.len();
            }
        }
    }
}

/// Delivers the queue's front, again and again until containerd has it, then the next.
async fn deliver(shared: Arc<Shared>, address: String) {
    let mut connection = None;
    let mut backoff = shared.settings.min_backoff;
    let mut failures = 0u64;
    loop {
        let front = shared.state().queue.front().cloned();
        let Some(envelope) = front else {
            shared.queued.notified().await;
            continue;
        };
        match attempt(&mut connection, &address, &envelope, shared.settings.call_deadline).await {
            Ok(()) => {
                if failures > 0 {
                    log::info!(topic = envelope.topic.as_str(), failures; "containerd takes events again");
                }
            }
            Err(error) if error.fate() == Fate::Refused => {
                // Repeating it would hold up all that follow, for ever.
                log::error!(topic = envelope.topic.as_str(); "containerd refused an event: {error}");
            }
            Err(error) => {
                if !matches!(error, Error::Status { .. }) {
                    connection = None;
                }
                failures += 1;
                // Once per outage loud, then quiet.
                let level = if failures == 1 { log::Level::Warn } else { log::Level::Debug };
                log::log!(level, topic = envelope.topic.as_str(), failures;
                    "cannot publish an event, trying again: {error}");
                if error.fate() == Fate::Unknown {
                    log::warn!(topic = envelope.topic.as_str();
                        "containerd may have got this event before it failed; it will see it again");
                }
                sleep(backoff).await;
                backoff = (backoff * 2).min(shared.settings.max_backoff);
                continue;
            }
        }
        failures = 0;
        backoff = shared.settings.min_backoff;
        let mut state = shared.state();
        state.queue.pop_front();
        if state.queue.is_empty() {
            shared.emptied.notify_waiters();
        }
    }
}

async fn attempt(
    connection: &mut Option<Connection>,
    address: &str,
    envelope: &Envelope,
    deadline: Duration,
) -> Result<(), Error> {
    let open = match connection {
        Some(open) => open,
        None => connection.insert(Connection::open(address, deadline).await?),
    };
    open.forward(envelope, deadline).await
}

#[cfg(test)]
mod tests;
