//! The containers of this shim, and when it may end.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

use crate::task::container::Handle;
use crate::task::error::{Error, Result};

/// Which containers there are. An entry lives as long as its container's actor has something to
/// do, whoever may have asked for it: a Task call may be dropped at any moment.
#[derive(Debug, Default)]
pub struct Registry {
    state: Mutex<State>,
    finished: CancellationToken,
}

#[derive(Debug, Default)]
struct State {
    containers: HashMap<String, Handle>,
    /// There is a pod sandbox, which needs the shim although it is no task.
    sandbox: bool,
    /// containerd asked the shim to end while the last containers were being removed. It does not
    /// ask again.
    ending: bool,
}

/// Removes a container from the registry when it is dropped.
#[derive(Debug)]
pub struct Registration {
    registry: Arc<Registry>,
    id: String,
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut state = self.registry.state();
        state.containers.remove(&self.id);
        if state.ending && state.containers.is_empty() && !state.sandbox {
            self.registry.finished.cancel();
        }
    }
}

impl Registry {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// # Errors
    /// [`Error::NotFound`].
    pub fn get(&self, id: &str) -> Result<Handle> {
        let handle = self.state().containers.get(id).cloned();
        handle.ok_or_else(|| Error::NotFound { id: id.to_owned() })
    }

    /// Adds the container that `make` starts. The registration is its actor's to keep.
    ///
    /// # Errors
    /// [`Error::Exists`], or [`Error::ShuttingDown`] when nobody would watch the container.
    pub fn add<T>(
        self: &Arc<Self>,
        id: &str,
        make: impl FnOnce(Registration) -> (Handle, T),
    ) -> Result<T> {
        let mut state = self.state();
        if self.finished.is_cancelled() {
            return Err(Error::ShuttingDown);
        }
        if state.containers.contains_key(id) {
            return Err(Error::Exists { what: "container", id: id.to_owned() });
        }
        let (handle, made) = make(Registration { registry: self.clone(), id: id.to_owned() });
        state.containers.insert(id.to_owned(), handle);
        state.ending = false;
        Ok(made)
    }

    /// Ends the shim if no container is left, or as soon as those that are being removed are gone.
    /// A shim with any other container stays: ending would leave a CT that nobody watches.
    pub fn shut_down(&self) {
        let mut state = self.state();
        if state.sandbox {
            return;
        }
        if state.containers.is_empty() {
            self.finished.cancel();
        } else if state.containers.values().all(|handle| handle.view.borrow().leaving) {
            state.ending = true;
        }
    }

    /// Keeps the shim for a pod sandbox, until [`Self::release`].
    ///
    /// # Errors
    /// [`Error::ShuttingDown`].
    pub fn hold(&self) -> Result<()> {
        let mut state = self.state();
        if self.finished.is_cancelled() {
            return Err(Error::ShuttingDown);
        }
        state.sandbox = true;
        Ok(())
    }

    /// There is no pod sandbox any more.
    pub fn release(&self) {
        self.state().sandbox = false;
    }

    /// All containers.
    #[must_use]
    pub fn all(&self) -> Vec<Handle> {
        self.state().containers.values().cloned().collect()
    }

    /// Resolves when the shim may end.
    pub async fn finished(&self) {
        self.finished.cancelled().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::view::View;
    use tokio::sync::watch;

    fn add(registry: &Arc<Registry>, id: &str) -> (watch::Sender<View>, Registration) {
        registry
            .add(id, |registration| {
                let (view, viewer) = watch::channel(View::default());
                (Handle::for_test(viewer), (view, registration))
            })
            .unwrap()
    }

    #[test]
    fn a_shim_ends_when_the_last_container_that_leaves_is_gone() {
        let registry = Arc::new(Registry::default());
        let (leaving, gone) = add(&registry, "leaving");
        let (staying, stays) = add(&registry, "staying");
        leaving.send_modify(|view| view.leaving = true);
        registry.shut_down();
        drop(gone);
        assert!(registry.get("leaving").is_err());
        staying.send_modify(|view| view.leaving = true);
        assert!(!registry.finished.is_cancelled(), "asked while a container stayed");
        registry.shut_down();
        assert!(!registry.finished.is_cancelled(), "it has not left yet");
        drop(stays);
        assert!(registry.finished.is_cancelled());
    }

    #[test]
    fn a_pod_sandbox_keeps_the_shim() {
        let registry = Arc::new(Registry::default());
        registry.hold().unwrap();
        registry.shut_down();
        assert!(!registry.finished.is_cancelled());
        let (view, container) = add(&registry, "member");
        view.send_modify(|view| view.leaving = true);
        registry.release();
        registry.shut_down();
        assert!(!registry.finished.is_cancelled(), "the member has not left yet");
        drop(container);
        assert!(registry.finished.is_cancelled());
        assert!(matches!(registry.hold(), Err(Error::ShuttingDown)));
    }

    #[test]
    fn nothing_is_created_twice_nor_in_a_shim_that_ends() {
        let registry = Arc::new(Registry::default());
        let (view, one) = add(&registry, "one");
        let again = registry.add("one", |_| -> (Handle, ()) { unreachable!() });
        assert!(matches!(again, Err(Error::Exists { .. })));
        view.send_modify(|view| view.leaving = true);
        registry.shut_down();
        let (_view, two) = add(&registry, "two");
        drop(one);
        drop(two);
        assert!(!registry.finished.is_cancelled(), "a new container came in between");
        registry.shut_down();
        let late = registry.add("late", |_| -> (Handle, ()) { unreachable!() });
        assert!(matches!(late, Err(Error::ShuttingDown)));
    }
}
