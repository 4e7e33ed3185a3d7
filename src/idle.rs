//! Gives back the memory of a shim for which nobody has had a question for a while: most of the time, it
//! only waits for a container to end.

use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::timeout;

use crate::sys::memory;

/// Longer than connections to Proxmox are kept (3 s), whose end is work as well; shorter than the pauses
/// between a kubelet's questions for statistics (10 s).
const QUIET: Duration = Duration::from_secs(5);

/// What tells that the shim is in use.
#[derive(Debug, Default)]
pub struct Idle(Notify);

impl Idle {
    /// A call was answered.
    pub fn used(&self) {
        self.0.notify_one();
    }

    /// Gives memory back after each time of use; never ends. A shim that nobody uses does not wake up.
    pub async fn give_back(&self) {
        loop {
            self.0.notified().await;
            while timeout(QUIET, self.0.notified()).await.is_ok() {}
            memory::give_back();
        }
    }
}
