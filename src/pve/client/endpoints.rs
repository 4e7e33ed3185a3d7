//! The nodes of the cluster that can be asked, and which one first.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use super::{REST, Server};

pub(super) struct Endpoints {
    servers: Vec<Arc<Server>>,
    /// When each failed last.
    failed: Mutex<Vec<Option<Instant>>>,
}

impl Endpoints {
    pub(super) fn new(servers: Vec<Arc<Server>>) -> Endpoints {
        let failed = Mutex::new(vec![None; servers.len()]);
        Endpoints { servers, failed }
    }

    /// In the configured order, but for those that failed not long ago: they come last.
    pub(super) fn in_order(&self, now: Instant) -> Vec<Arc<Server>> {
        let rests = |at: &Option<Instant>| at.is_some_and(|at| now < at + REST);
        let resting: Vec<bool> = self.times().iter().map(rests).collect();
        let with = |rests: bool| {
            let pairs = self.servers.iter().zip(&resting);
            pairs.filter(move |(_, resting)| **resting == rests).map(|(server, _)| server.clone())
        };
        with(false).chain(with(true)).collect()
    }

    pub(super) fn failed(&self, server: &Arc<Server>, now: Instant) {
        for (known, failed) in self.servers.iter().zip(self.times().iter_mut()) {
            if Arc::ptr_eq(known, server) {
                *failed = Some(now);
            }
        }
    }

    /// The URL of the one that would be asked now.
    pub(super) fn preferred(&self) -> String {
        self.in_order(Instant::now())
            .first()
            .map(|server| server.url().to_owned())
            .unwrap_or_default()
    }

    fn times(&self) -> MutexGuard<'_, Vec<Option<Instant>>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
