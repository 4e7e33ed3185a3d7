//! Device rules of cgroup v1. Those of cgroup2 are a program, which LXC attaches.

use super::{Cgroup, Error, write};
use crate::lxc::device_access::Change;

impl Cgroup {
    /// Changes the exceptions from what holds for all devices.
    ///
    /// # Errors
    /// [`Error`] naming the file and the value; changes before the failing one have been made.
    pub fn change_devices(&self, allows_all: bool, changes: &[Change]) -> Result<(), Error> {
        let (place, _) = self.require("devices", "devices", "a device rule")?;
        let (except, forget) = match allows_all {
            true => ("devices.deny", "devices.allow"),
            false => ("devices.allow", "devices.deny"),
        };
        let set = |file: &str, change: &Change, access: String| {
            if access.is_empty() {
                return Ok(());
            }
            let value = format!("{} {access}", change.devices);
            // The kernel hands down what is denied, but not what is allowed.
            write(&place.limit.join(file), &value)?;
            write(&place.inner.join(file), &value)
        };
        changes.iter().try_for_each(|change| set(except, change, change.added()))?;
        changes.iter().try_for_each(|change| set(forget, change, change.removed()))
    }
}
