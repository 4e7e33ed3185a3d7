//! Calls that start a task, each sent at most once; and what became of one whose answer was lost.

use std::collections::VecDeque;
use std::sync::PoisonError;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use super::{Client, Payload, TaskFilter};
use crate::config::Vmid;
use crate::pve::error::{Call, Error, Failure};
use crate::pve::types::Loose;
use crate::pve::upid::Upid;

/// The pauses before looking for a task: the daemon may still be at work on a request whose
/// connection is gone.
const LOOKS: [Duration; 4] = [
    Duration::ZERO,
    Duration::from_millis(100),
    Duration::from_millis(400),
    Duration::from_millis(1000),
];

/// One request that changes something, and how to find out whether it did.
pub(super) struct Change<'a> {
    pub(super) call: Call,
    pub(super) form: &'a [(&'a str, &'a str)],
    /// The CT that the task is about.
    pub(super) vmid: Vmid,
    /// The task's type.
    pub(super) task: &'static str,
    pub(super) leaves: State,
}

/// What a change leaves behind, if that alone shows that there is nothing more to do.
#[derive(Clone, Copy)]
pub(super) enum State {
    Running,
    Stopped,
    Gone,
    /// Nothing that could not be somebody else's.
    Other,
}

impl Client {
    pub(super) async fn change(&self, change: Change<'_>) -> Result<Upid, Error> {
        let since = unix_time();
        let payload = match change.form {
            [] => Payload::Nothing,
            fields => Payload::form(fields),
        };
        let answer = self.send(&change.call, &payload).await.and_then(|reply| {
            let upid = Loose(&reply.data).as_text().and_then(|text| text.parse::<Upid>().ok());
            upid.ok_or_else(|| self.unlike(change.call.clone(), "no task id in the answer"))
        });
        let error = match answer {
            Err(error) if error.is_unclear() => error,
            Ok(upid) => {
                self.inner.told.lock().unwrap_or_else(PoisonError::into_inner).add(upid.clone());
                return Ok(upid);
            }
            refused => return refused,
        };
        log::warn!(
            vmid = change.vmid.get(), task = change.task, error = error.to_string().as_str();
            "answer lost, reading back"
        );
        let pauses: Duration = LOOKS.iter().sum();
        let limit = Instant::now() + pauses + self.inner.settings.request_timeout;
        match timeout_at(limit, self.read_back(&change, since)).await {
            Ok(Some(Ok(upid))) => Ok(upid),
            Ok(Some(Err(failure))) => Err(Error::Api { call: Box::new(change.call), failure }),
            // It cannot be told: the first error says more.
            Ok(None) | Err(_) => Err(error),
        }
    }

    /// Finds out what became of a request whose answer was lost: its task, or the state that leaves
    /// nothing to do.
    async fn read_back(&self, change: &Change<'_>, since: u64) -> Option<Result<Upid, Failure>> {
        for pause in LOOKS {
            sleep(pause).await;
            if let Some(upid) = self.find_task(change, since).await.ok()? {
                return Some(Ok(upid));
            }
        }
        let running = async || self.status(change.vmid).await.ok().map(|status| status.running);
        let failure = match change.leaves {
            State::Running => running().await?.then_some(Failure::AlreadyRunning),
            State::Stopped => (!running().await?).then_some(Failure::NotRunning),
            State::Gone => {
                let error = self.config(change.vmid).await.err()?;
                (error.failure() == Some(&Failure::NotFound)).then_some(Failure::NotFound)
            }
            State::Other => None,
        };
        failure.map(Err)
    }

    /// The newest task that `change` can have started. A token sees its own tasks.
    async fn find_task(&self, change: &Change<'_>, since: u64) -> Result<Option<Upid>, Error> {
        // The clocks are one, as the node is local; the seconds may just have been rounded apart.
        let since = since.saturating_sub(1);
        let Change { vmid, task, .. } = change;
        let filter = TaskFilter {
            vmid: Some(*vmid),
            kind: Some(task),
            since: Some(since),
            limit: 20,
            ..TaskFilter::default()
        };
        let id = vmid.to_string();
        // Checked here as well: not every release honours every filter.
        let ours = |upid: &Upid| {
            upid.kind() == *task
                && upid.id() == id
                && upid.starttime() >= since
                && upid.user() == self.inner.credentials.who()
        };
        let upids = self.tasks(&filter).await?.into_iter().map(|task| task.upid);
        let mut told = self.inner.told.lock().unwrap_or_else(PoisonError::into_inner);
        let new = upids.filter(|upid| ours(upid) && !told.0.contains(upid));
        let newest = new.max_by_key(|upid| (upid.starttime(), upid.pstart()));
        newest.iter().for_each(|upid| told.add(upid.clone()));
        Ok(newest)
    }
}

/// The last tasks that were answered or found: none of them is that of a request whose answer is lost,
/// though it may be of the same kind, CT and second.
#[derive(Default)]
pub(super) struct Told(VecDeque<Upid>);

impl Told {
    /// Far more than there can be in two seconds.
    const MOST: usize = 256;

    fn add(&mut self, upid: Upid) {
        if self.0.len() == Told::MOST {
            self.0.pop_front();
        }
        self.0.push_back(upid);
    }
}

pub(super) fn unix_time() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map(|now| now.as_secs()).unwrap_or_default()
}
