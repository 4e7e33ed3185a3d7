//! Stopping and destroying, only what is ours.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use super::Client;
use crate::config::Vmid;
use crate::pve::error::{Error, Failure};
use crate::pve::identity::Identity;
use crate::pve::upid::Upid;

/// How long a CT may read as running after its init was seen to end.
const STOPPING: Duration = Duration::from_secs(2);

/// What a call on a CT of ours found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It did it.
    Done,
    /// There was nothing left to do.
    AlreadySo,
}

impl Client {
    /// Whether the CT of `identity` exists and is ours.
    pub async fn is_ours(&self, identity: &Identity) -> Result<bool, Error> {
        match self.config(identity.vmid).await {
            Ok(config) => Ok(identity.verify(&config).is_ok()),
            Err(error) if error.failure() == Some(&Failure::NotFound) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Stops the CT of `identity` and waits for the task, until `deadline`.
    ///
    /// Verifies the identity right before the call, so that no other CT is stopped: then the error
    /// is [`Error::NotOurs`]. Locks are waited for, never forced. A CT that is gone or stopped is
    /// [`Outcome::AlreadySo`].
    pub async fn stop_ours(
        &self,
        identity: &Identity,
        deadline: Instant,
    ) -> Result<Outcome, Error> {
        let done = |failure: &Failure| matches!(failure, Failure::NotFound | Failure::NotRunning);
        self.on_ours("POST", identity, deadline, done, |vmid| self.stop(vmid)).await
    }

    /// Destroys the stopped CT of `identity` and waits for the task, until `deadline`.
    ///
    /// Verifies the identity right before the call. The API has no digest for this call, so a CT
    /// that takes the VMID within the milliseconds between the two is not recognised; a running one
    /// is safe even then. Locks are waited for; a CT that still reads as running is, for a moment,
    /// because that is what a stopping one does. A CT that is gone is [`Outcome::AlreadySo`].
    pub async fn destroy_ours(
        &self,
        identity: &Identity,
        deadline: Instant,
    ) -> Result<Outcome, Error> {
        let done = |failure: &Failure| matches!(failure, Failure::NotFound);
        self.on_ours("DELETE", identity, deadline, done, |vmid| self.destroy(vmid)).await
    }

    async fn on_ours<F>(
        &self,
        method: &'static str,
        identity: &Identity,
        deadline: Instant,
        done: impl Fn(&Failure) -> bool,
        act: impl Fn(Vmid) -> F,
    ) -> Result<Outcome, Error>
    where
        F: Future<Output = Result<Upid, Error>>,
    {
        let vmid = identity.vmid;
        let begun = Instant::now();
        let mut pause = Duration::from_millis(50);
        loop {
            let attempt = async {
                let asked = timeout_at(deadline, async {
                    let config = self.config(vmid).await?;
                    identity.verify(&config).map_err(|reason| Error::NotOurs { vmid, reason })?;
                    act(vmid).await
                });
                // A request that is cut off may still be carried out; it was meant to be.
                let late = |_| Error::Timeout {
                    endpoint: self.endpoint(),
                    call: Box::new(self.ct_call(method, vmid, "")),
                    sent: true,
                    after: begun.elapsed(),
                };
                let upid = asked.await.map_err(late)??;
                self.wait(&upid, deadline).await
            };
            let error = match attempt.await {
                Ok(()) => return Ok(Outcome::Done),
                Err(error) => error,
            };
            let again = match (&error, error.failure()) {
                (_, Some(failure)) if done(failure) => return Ok(Outcome::AlreadySo),
                (_, Some(Failure::Locked { .. } | Failure::LockTimeout)) => true,
                (_, Some(Failure::Running)) => begun.elapsed() < STOPPING,
                // Nothing was found to have happened, and the identity is verified again.
                (Error::TaskTimeout { .. }, _) => false,
                _ => error.is_unclear(),
            };
            if !again || Instant::now() + pause >= deadline {
                return Err(error);
            }
            log::debug!(vmid = vmid.get(), error = error.to_string().as_str(); "trying again");
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }
}
