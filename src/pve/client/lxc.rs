//! `/nodes/{node}/lxc`: CTs.

use std::time::Duration;

use super::change::{Change, State};
use super::{Client, Payload, segment};
use crate::config::Vmid;
use crate::pve::error::Error;
use crate::pve::types::{CtConfig, CtStatus, Interface, PendingValue, Snapshot, interfaces, list};
use crate::pve::upid::Upid;

/// What a clone is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloneOptions<'a> {
    /// Its VMID.
    pub vmid: Vmid,
    /// Its name; Proxmox makes one if there is none.
    pub hostname: Option<&'a str>,
    /// Copy all volumes, also where the storage could share them.
    pub full: bool,
    /// Where the copies go; the original's storage if there is none.
    pub storage: Option<&'a str>,
    /// The state to clone; the current one if there is none.
    pub snapshot: Option<&'a str>,
}

impl Client {
    /// The node's CTs that the token may see (`VM.Audit`), with live states. 66 ms on a real node.
    pub async fn list(&self) -> Result<Vec<CtStatus>, Error> {
        let call = self.call("GET", self.node_path("lxc"), None);
        let data = self.get(&call).await?;
        let cts = list(&data, |entry| CtStatus::from_json(entry, None));
        cts.ok_or_else(|| self.unlike(call, "the list of CTs is not a list"))
    }

    /// A CT's state. 41 ms on a real node.
    pub async fn status(&self, vmid: Vmid) -> Result<CtStatus, Error> {
        let call = self.ct_call("GET", vmid, "/status/current");
        let data = self.get(&call).await?;
        let status = CtStatus::from_json(&data, Some(vmid));
        status.ok_or_else(|| self.unlike(call, "no state in the answer"))
    }

    /// A CT's configuration, pending changes merged. 7 ms on a real node.
    pub async fn config(&self, vmid: Vmid) -> Result<CtConfig, Error> {
        let call = self.ct_call("GET", vmid, "/config");
        let data = self.get(&call).await?;
        let config = CtConfig::from_json(&data);
        config.ok_or_else(|| self.unlike(call, "no configuration in the answer"))
    }

    /// Sets keys of a CT's configuration; with `digest`, only if the file is still that one. The
    /// key `delete` removes those that it lists, with commas.
    ///
    /// After any error some of the changes may be stored: read the configuration again. Success
    /// does not say that a running CT has them: see [`Client::pending`].
    pub async fn put_config(
        &self,
        vmid: Vmid,
        changes: &[(&str, &str)],
        digest: Option<&str>,
    ) -> Result<(), Error> {
        let call = self.ct_call("PUT", vmid, "/config");
        let mut form = changes.to_vec();
        form.extend(digest.map(|digest| ("digest", digest)));
        self.send(&call, &Payload::form(&form)).await.map(drop)
    }

    /// A CT's configuration key by key, with what waits for its next start.
    pub async fn pending(&self, vmid: Vmid) -> Result<Vec<PendingValue>, Error> {
        let call = self.ct_call("GET", vmid, "/pending");
        let data = self.get(&call).await?;
        let values = list(&data, PendingValue::from_json);
        values.ok_or_else(|| self.unlike(call, "no list in the answer"))
    }

    /// Creates a CT from a template, with these keys of its configuration; answers with the task.
    ///
    /// If it is unclear whether the request took effect, looks for the task. Without one the first
    /// error is the answer, even if there is a CT of this VMID by now: it may be anybody's.
    pub async fn create(
        &self,
        vmid: Vmid,
        template: &str,
        config: &[(&str, &str)],
    ) -> Result<Upid, Error> {
        let id = vmid.to_string();
        let form = [&[("vmid", id.as_str()), ("ostemplate", template)], config].concat();
        let call = self.call("POST", self.node_path("lxc"), Some(vmid));
        self.change(Change { call, form: &form, vmid, task: "vzcreate", leaves: State::Other })
            .await
    }

    /// Copies a CT; answers with the task. Unclear requests: as [`Client::create`].
    pub async fn clone_ct(&self, vmid: Vmid, clone: &CloneOptions<'_>) -> Result<Upid, Error> {
        let id = clone.vmid.to_string();
        let mut form = vec![("newid", id.as_str()), ("full", if clone.full { "1" } else { "0" })];
        form.extend(clone.hostname.map(|name| ("hostname", name)));
        form.extend(clone.storage.map(|storage| ("storage", storage)));
        form.extend(clone.snapshot.map(|snapshot| ("snapname", snapshot)));
        let call = self.ct_call("POST", vmid, "/clone");
        self.change(Change { call, form: &form, vmid, task: "vzclone", leaves: State::Other }).await
    }

    /// Starts a CT; answers with the task.
    ///
    /// If it is unclear whether the request took effect, looks for the task; without one, a CT that
    /// runs gives [`Failure::AlreadyRunning`]. Never asks twice.
    ///
    /// [`Failure::AlreadyRunning`]: crate::pve::Failure::AlreadyRunning
    pub async fn start(&self, vmid: Vmid) -> Result<Upid, Error> {
        let call = self.ct_call("POST", vmid, "/status/start");
        self.change(Change { call, form: &[], vmid, task: "vzstart", leaves: State::Running }).await
    }

    /// Kills a CT's processes; answers with the task. Use [`Client::stop_ours`].
    ///
    /// If it is unclear whether the request took effect, looks for the task; without one, a CT that
    /// does not run gives [`Failure::NotRunning`].
    ///
    /// [`Failure::NotRunning`]: crate::pve::Failure::NotRunning
    pub async fn stop(&self, vmid: Vmid) -> Result<Upid, Error> {
        let call = self.ct_call("POST", vmid, "/status/stop");
        self.change(Change { call, form: &[], vmid, task: "vzstop", leaves: State::Stopped }).await
    }

    /// Asks a CT's init to end; answers with the task, which waits for it. What still runs after
    /// `timeout` is killed with `force`; without, the task fails with `container did not stop`.
    ///
    /// Unclear requests: as [`Client::stop`].
    pub async fn shutdown(
        &self,
        vmid: Vmid,
        timeout: Duration,
        force: bool,
    ) -> Result<Upid, Error> {
        let timeout = timeout.as_secs().to_string();
        let form = [("timeout", timeout.as_str()), ("forceStop", if force { "1" } else { "0" })];
        let call = self.ct_call("POST", vmid, "/status/shutdown");
        let (task, leaves) = ("vzshutdown", State::Stopped);
        self.change(Change { call, form: &form, vmid, task, leaves }).await
    }

    /// Shuts a CT down and starts it again, with pending changes applied; answers with the task.
    /// What still runs after `timeout` is killed.
    pub async fn reboot(&self, vmid: Vmid, timeout: Duration) -> Result<Upid, Error> {
        let timeout = timeout.as_secs().to_string();
        let form = [("timeout", timeout.as_str())];
        let call = self.ct_call("POST", vmid, "/status/reboot");
        self.change(Change { call, form: &form, vmid, task: "vzreboot", leaves: State::Other })
            .await
    }

    /// Destroys a stopped CT; answers with the task. Use [`Client::destroy_ours`].
    ///
    /// Without `force`, so that Proxmox refuses a running CT. If it is unclear whether the request
    /// took effect, looks for the task; without one, a missing CT gives [`Failure::NotFound`].
    ///
    /// [`Failure::NotFound`]: crate::pve::Failure::NotFound
    pub async fn destroy(&self, vmid: Vmid) -> Result<Upid, Error> {
        let call = self.ct_call("DELETE", vmid, "");
        self.change(Change { call, form: &[], vmid, task: "vzdestroy", leaves: State::Gone }).await
    }

    /// Sets or, with a leading `+`, adds to the size of a volume, such as `rootfs` and `+1G`; answers
    /// with the task.
    pub async fn resize(&self, vmid: Vmid, disk: &str, size: &str) -> Result<Upid, Error> {
        let form = [("disk", disk), ("size", size)];
        let call = self.ct_call("PUT", vmid, "/resize");
        self.change(Change { call, form: &form, vmid, task: "resize", leaves: State::Other }).await
    }

    /// A CT's snapshots; the entry `current`, which is none, is left out.
    pub async fn snapshots(&self, vmid: Vmid) -> Result<Vec<Snapshot>, Error> {
        let call = self.ct_call("GET", vmid, "/snapshot");
        let data = self.get(&call).await?;
        let snapshots = list(&data, Snapshot::from_json);
        snapshots.ok_or_else(|| self.unlike(call, "no list in the answer"))
    }

    /// Takes a snapshot; answers with the task.
    pub async fn snapshot(
        &self,
        vmid: Vmid,
        name: &str,
        description: Option<&str>,
    ) -> Result<Upid, Error> {
        let mut form = vec![("snapname", name)];
        form.extend(description.map(|text| ("description", text)));
        let call = self.ct_call("POST", vmid, "/snapshot");
        self.change(Change { call, form: &form, vmid, task: "vzsnapshot", leaves: State::Other })
            .await
    }

    /// Puts a CT back to a snapshot; answers with the task. A running CT is stopped for it.
    pub async fn rollback(&self, vmid: Vmid, name: &str) -> Result<Upid, Error> {
        let call = self.ct_call("POST", vmid, &format!("/snapshot/{}/rollback", segment(name)));
        self.change(Change { call, form: &[], vmid, task: "vzrollback", leaves: State::Other })
            .await
    }

    /// Removes a snapshot; answers with the task.
    pub async fn delete_snapshot(&self, vmid: Vmid, name: &str) -> Result<Upid, Error> {
        let call = self.ct_call("DELETE", vmid, &format!("/snapshot/{}", segment(name)));
        self.change(Change { call, form: &[], vmid, task: "vzdelsnapshot", leaves: State::Other })
            .await
    }

    /// The network interfaces in a running CT; `None` if it does not run or does not exist.
    pub async fn interfaces(&self, vmid: Vmid) -> Result<Option<Vec<Interface>>, Error> {
        let call = self.ct_call("GET", vmid, "/interfaces");
        let data = self.get(&call).await?;
        interfaces(&data).ok_or_else(|| self.unlike(call, "no list in the answer"))
    }
}
