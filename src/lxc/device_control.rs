//! Changes which devices a running CT may use.
//!
//! On cgroup v1 that is written to the CT's cgroup. On cgroup2 a program decides, which belongs to the
//! CT's lxc-start: only that one can replace it without a moment in which nothing is denied. It is asked
//! by LXC's own lxc-cgroup, because what goes to it is a C struct that is not the same in all releases.

use std::fs;
use std::io;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::lxc::cgroup::{self, Cgroup, Mode};
use crate::lxc::device_access::{self, Change, DeviceAccess};

/// LXC's program, which every installation of LXC has.
const PROGRAM: &str = "lxc-cgroup";
/// It asks lxc-start, which answers at once unless something is very wrong.
const LIMIT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(1);

/// Why the devices stay as they were.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The rules cannot be kept.
    #[error(transparent)]
    Access(#[from] device_access::Error),
    /// The kernel refused them.
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    /// The CT's lxc-start was not found.
    #[error("find the command socket of the lxc-start of CT {vmid}: {reason}")]
    CommandSocket { vmid: u32, reason: String },
    /// LXC's program could not be run.
    #[error("run {PROGRAM}, which belongs to LXC, to change the devices of CT {vmid}")]
    Run { vmid: u32, source: io::Error },
    /// LXC refused them.
    #[error("{PROGRAM} could not change the devices of CT {vmid}: {reason}")]
    Refused { vmid: u32, reason: String },
}

/// The devices of one running CT.
#[derive(Debug)]
pub struct DeviceControl {
    pub vmid: u32,
    /// The host's pid of its lxc-start.
    pub monitor: i32,
    pub cgroup: Arc<Cgroup>,
    /// What holds now. Held while it is being changed, so that one change comes after the other.
    pub access: Mutex<DeviceAccess>,
}

/// A change that can be taken back.
#[derive(Debug)]
pub struct Changed {
    former: DeviceAccess,
    now: DeviceAccess,
}

impl DeviceControl {
    /// Allows what `wanted` does and no other device. Blocks.
    ///
    /// # Errors
    /// [`Error`]; everything is as it was.
    pub fn change(&self, wanted: &DeviceAccess) -> Result<Changed, Error> {
        let mut access = self.access.lock().unwrap_or_else(PoisonError::into_inner);
        let now = wanted.with_default(access.allows_all)?;
        let changes = access.changes(&now);
        if let Err(error) = self.carry_out(access.allows_all, &changes) {
            let back: Vec<_> = changes.into_iter().map(Change::reversed).collect();
            if let Err(undo) = self.carry_out(access.allows_all, &back) {
                log::warn!("the former devices of CT {}: {undo}", self.vmid);
            }
            return Err(error);
        }
        let former = std::mem::replace(&mut *access, now.clone());
        Ok(Changed { former, now })
    }

    /// Takes a change back, unless another one came after it. Blocks.
    ///
    /// # Errors
    /// [`Error`]; the change holds.
    pub fn take_back(&self, changed: &Changed) -> Result<(), Error> {
        let mut access = self.access.lock().unwrap_or_else(PoisonError::into_inner);
        if *access == changed.now {
            self.carry_out(access.allows_all, &access.changes(&changed.former))?;
            access.clone_from(&changed.former);
        }
        Ok(())
    }

    /// Carrying out the same twice does no harm.
    fn carry_out(&self, allows_all: bool, changes: &[Change]) -> Result<(), Error> {
        if changes.is_empty() {
            return Ok(());
        }
        if self.cgroup.mode() != Mode::V2 {
            return Ok(self.cgroup.change_devices(allows_all, changes)?);
        }
        let lxc_path = self.lxc_path()?;
        let (except, forget) = match allows_all {
            true => ("devices.deny", "devices.allow"),
            false => ("devices.allow", "devices.deny"),
        };
        let ask = |key: &str, change: &Change, access: &str| match access {
            "" => Ok(()),
            _ => self.ask_lxc(&lxc_path, key, &format!("{} {access}", change.devices)),
        };
        // In this order what was and will be allowed is so all the time, and what was and will be
        // denied too. LXC forgets an exception if it is told the opposite in the same words.
        changes.iter().try_for_each(|change| ask(except, change, &change.wanted))?;
        changes.iter().try_for_each(|change| ask(forget, change, &change.former))
    }

    /// Below which LXC keeps its containers. The socket at which the CT's lxc-start listens has it in
    /// its name.
    fn lxc_path(&self) -> Result<String, Error> {
        let refuse = |reason| Error::CommandSocket { vmid: self.vmid, reason };
        let monitor = self.monitor;
        let table = fs::read_to_string(format!("/proc/{monitor}/net/unix"))
            .map_err(|error| refuse(format!("read the sockets of {monitor}: {error}")))?;
        let open: Vec<_> = fs::read_dir(format!("/proc/{monitor}/fd"))
            .map_err(|error| refuse(format!("list the descriptors of {monitor}: {error}")))?
            .flatten()
            .filter_map(|entry| entry.path().read_link().ok())
            .collect();
        command_sockets(&table, self.vmid)
            .find(|(inode, _)| open.iter().any(|link| link.as_os_str() == inode.as_str()))
            .map(|(_, lxc_path)| lxc_path.to_owned())
            .ok_or_else(|| refuse(format!("process {monitor} has none")))
    }

    fn ask_lxc(&self, lxc_path: &str, key: &str, value: &str) -> Result<(), Error> {
        let vmid = self.vmid;
        let run = |source| Error::Run { vmid, source };
        let mut child = Command::new(PROGRAM)
            .args(["-P", lxc_path, "-n", &vmid.to_string(), key, value])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(run)?;
        let deadline = Instant::now() + LIMIT;
        while child.try_wait().map_err(run)?.is_none() {
            if Instant::now() >= deadline {
                let _ = child.kill();
                let _ = child.wait();
                let reason = format!("no answer within {} s", LIMIT.as_secs());
                return Err(Error::Refused { vmid, reason });
            }
            thread::sleep(POLL);
        }
        let output = child.wait_with_output().map_err(run)?;
        if output.status.success() {
            return Ok(());
        }
        let told = String::from_utf8_lossy(&output.stderr);
        let reason = format!("{key} = {value}: {} ({})", told.trim(), output.status);
        Err(Error::Refused { vmid, reason })
    }
}

/// The sockets of LXC for a CT in `/proc/net/unix`: what a descriptor of one links to, and LXC's path.
fn command_sockets(table: &str, vmid: u32) -> impl Iterator<Item = (String, &str)> {
    table.lines().filter_map(move |line| {
        let mut fields = line.split_ascii_whitespace().skip(6);
        let (inode, name) = (fields.next()?, line.split_once(" @")?.1);
        let lxc_path = name.strip_suffix("/command")?.strip_suffix(&vmid.to_string())?;
        Some((format!("socket:[{inode}]"), lxc_path.strip_suffix('/')?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_sockets_of_a_ct() {
        let table = "Num       RefCount Protocol Flags    Type St Inode Path\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 101 /run/dbus/socket\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 102 @/var/lib/lxc/700/command\n\
            0000000000000000: 00000003 00000000 00000000 0001 03 103\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 104 @/a b/700/command\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 105 @/var/lib/lxc/1700/command\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 106 @/var/lib/lxc/70/command\n";
        let found: Vec<_> = command_sockets(table, 700).collect();
        let expected = [("socket:[102]", "/var/lib/lxc"), ("socket:[104]", "/a b")];
        assert_eq!(found, expected.map(|(inode, path)| (inode.to_owned(), path)));
    }
}
