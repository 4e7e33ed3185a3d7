//! The life of a CT: its unit (the supervised `lxc-start`), its lock, and the tasks that start,
//! stop and destroy it.
//!
//! A unit is what `pve-container@VMID.service` is on a node: `lxc-start -F` as its main process,
//! and active until that has ended. This is longer than the API says `running`, and a start in
//! between fails, as on a real node. The cgroups of the CT are not those of the unit: what a killed
//! `lxc-start` leaves stays, and the next start fails on it unless the pre-start hook removes it.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::unix::AsyncFd;
use tokio::process::Command as Process;
use tokio::sync::{Mutex, OwnedMutexGuard, watch};
use tokio::time::{sleep, timeout};

use crate::conf::Config;
use crate::generate::{Generated, generate};
use crate::lxc::{self, Command, State};
use crate::mounts;
use crate::node::Node;
use crate::profile::Step;
use crate::storage::VolumeId;
use crate::sys;
use crate::task::Task;
use crate::unit::Main;

/// How long a task waits for the pid of a CT: as long as a busy machine may need.
const PID_WAIT: Duration = Duration::from_secs(5);

/// A unit's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum UnitState {
    /// No main process. `ran` tells whether the last one had got its container to run.
    Inactive { ran: bool },
    /// The pid of the child that stands for it.
    Active { pid: u32 },
}

/// A child process whose end can be awaited.
#[derive(Debug)]
struct Child {
    pid: u32,
    pidfd: AsyncFd<OwnedFd>,
}

impl Child {
    fn new(pid: u32) -> io::Result<Self> {
        let pidfd = sys::pidfd(pid)?;
        Ok(Self { pid, pidfd })
    }

    /// Waits for the end: whether the status was 0.
    async fn wait(&self) -> bool {
        loop {
            let ready = self.pidfd.readable().await;
            match sys::try_wait(self.pid) {
                Ok(Some(success)) => return success,
                // Nobody else reaps it, so this cannot be.
                Err(_) => return false,
                Ok(None) => {}
            }
            match ready {
                Ok(mut guard) => guard.clear_ready(),
                Err(_) => sleep(Duration::from_millis(10)).await,
            }
        }
    }
}

/// The state of one CT that is not in its file.
#[derive(Debug)]
pub struct Ct {
    vmid: u32,
    lock: Arc<Mutex<()>>,
    unit: watch::Sender<UnitState>,
}

impl Ct {
    /// A CT at rest.
    pub fn new(vmid: u32) -> Self {
        let unit = watch::Sender::new(UnitState::Inactive { ran: false });
        Self { vmid, lock: Arc::default(), unit }
    }

    async fn inactive(&self) -> bool {
        let mut unit = self.unit.subscribe();
        let state = unit.wait_for(|u| matches!(u, UnitState::Inactive { .. })).await;
        // The sender lives as long as `self`, so there always is a state.
        state.is_ok_and(|s| *s == UnitState::Inactive { ran: true })
    }

    fn is_active(&self) -> bool {
        matches!(*self.unit.borrow(), UnitState::Active { .. })
    }
}

/// How a shutdown is to be done.
#[derive(Debug, Clone, Copy)]
pub struct Shutdown {
    /// Seconds that init gets.
    pub timeout: u32,
    /// Whether to kill it after that.
    pub force: bool,
}

/// How a CT is to be destroyed.
#[derive(Debug, Clone, Copy)]
pub struct Destroy {
    /// Whether to kill it first.
    pub force: bool,
    /// Whether to forget it everywhere.
    pub purge: bool,
    /// Whether to remove volumes that its configuration does not name.
    pub unreferenced: bool,
}

impl Node {
    /// Takes the lock of a CT's configuration.
    pub async fn lock_ct(&self, vmid: u32) -> Result<OwnedMutexGuard<()>, String> {
        let lock = self.ct(vmid).lock.clone();
        timeout(self.profile.lock_timeout(), lock.lock_owned()).await.map_err(|_| {
            format!("can't lock file '/run/lock/lxc/pve-config-{vmid}.lock' - got timeout")
        })
    }

    /// Whether the API calls the CT running.
    pub fn is_running(&self, vmid: u32) -> bool {
        lxc::active(&self.paths.lxc).contains(&vmid)
    }

    /// The pid of a CT's init on the host.
    pub async fn init_pid(&self, vmid: u32) -> Option<u32> {
        lxc::init_pid(&self.paths.lxc, vmid, PID_WAIT).await
    }

    fn ct_dir(&self, vmid: u32) -> PathBuf {
        self.paths.lxc.join(vmid.to_string())
    }

    /// Writes the files that `lxc-start` reads.
    fn write_lxc_config(
        &self,
        vmid: u32,
        config: &Config,
        generated: &Generated,
    ) -> io::Result<()> {
        let dir = self.ct_dir(vmid);
        fs::create_dir_all(dir.join("rootfs"))?;
        if let Some(rules) = &generated.seccomp {
            let common = fs::read_to_string("/usr/share/lxc/config/common.seccomp")
                .unwrap_or_else(|_| "2\ndenylist\n[all]\n".into());
            fs::write(dir.join("rules.seccomp"), common + rules)?;
        }
        fs::write(dir.join("mounts"), self.mount_list(&config.current))?;
        fs::write(dir.join("config"), &generated.config)
    }

    /// Makes pending changes current, as a start does.
    fn apply_pending(&self, vmid: u32, config: &mut Config) -> Result<(), String> {
        let before = config.clone();
        if config.apply_pending() {
            self.settle_volumes(&before, config)?;
            self.store(vmid, config)?;
        }
        Ok(())
    }

    /// The body of a start task. `skiplock` disregards the `lock` property, and
    /// `posted` is when the call came in.
    pub async fn start_ct(
        self: Arc<Self>,
        task: Arc<Task>,
        vmid: u32,
        skiplock: bool,
        posted: Instant,
    ) -> Result<(), String> {
        let _lock = self.lock_ct(vmid).await?;
        task.reach("locked")?;
        let mut config = self.load(vmid)?;
        if config.current.flag("template") {
            return Err("you can't start a CT if it's a template".into());
        }
        if !skiplock {
            check_lock(&config)?;
        }
        self.apply_pending(vmid, &mut config)?;
        let generated = generate(&config, vmid, &self.host)?;
        generated.warnings.iter().for_each(|w| task.log(w));
        let ct = self.ct(vmid);
        let fresh = !ct.is_active();
        if fresh {
            // An active unit still reads the old files in its hooks.
            self.write_lxc_config(vmid, &config, &generated)
                .map_err(|e| format!("unable to write the configuration of CT {vmid} - {e}"))?;
        }
        task.running(Some(format!("systemctl start pve-container@{vmid}")));
        sleep_until(posted, self.profile.step(Step::StartBefore)).await;
        if fresh {
            self.clone().start_unit(&ct)?;
        }
        task.reach("spawned")?;
        self.wait_running(&task, &ct, fresh).await?;
        task.running(None);
        sleep(self.profile.step(Step::StartAfter)).await;
        match self.init_pid(vmid).await {
            Some(_) => Ok(()),
            None => Err(no_pid(vmid)),
        }
    }

    async fn wait_running(&self, task: &Task, ct: &Ct, fresh: bool) -> Result<(), String> {
        let vmid = ct.vmid;
        if !fresh {
            // systemd does nothing for an active unit, so no state is ever reported.
            sleep(self.profile.lock_timeout()).await;
            task.log("problem with monitor socket, but continuing anyway: got timeout\n");
            return Ok(());
        }
        let answer = async {
            loop {
                match Command::connect(&self.paths.lxc, vmid) {
                    Ok(mut command) => return command.state().await,
                    // lxc-start has not made its socket yet.
                    Err(_) => sleep(Duration::from_millis(1)).await,
                }
            }
        };
        tokio::select! {
            biased;
            ran = ct.inactive() => return self.ended_early(task, vmid, ran),
            state = timeout(self.profile.running_timeout(), answer) => match state {
                Ok(Ok(State::Running)) => return Ok(()),
                Ok(_) => {}
                Err(_) => {
                    task.log("problem with monitor socket, but continuing anyway: got timeout\n");
                    return Ok(());
                }
            }
        }
        // It ended, or is about to: whether it ever ran is known when lxc-start is gone.
        match timeout(self.profile.running_timeout(), ct.inactive()).await {
            Ok(ran) => self.ended_early(task, vmid, ran),
            Err(_) => Err(no_pid(vmid)),
        }
    }

    fn ended_early(&self, task: &Task, vmid: u32, ran: bool) -> Result<(), String> {
        if ran {
            return Err(no_pid(vmid));
        }
        let text = fs::read_to_string(self.stderr_path(vmid)).unwrap_or_default();
        for line in text.lines() {
            // `lxc-start: VMID: ../src/lxc/FILE.c: function: 12 text` is logged from the function.
            task.log(line.split_once(".c: ").map_or(line, |(_, rest)| rest));
        }
        Err(format!("startup for container '{vmid}' failed"))
    }

    fn stderr_path(&self, vmid: u32) -> PathBuf {
        self.paths.log.join(format!("ct-{vmid}.stderr"))
    }

    /// Starts the main process of a unit and its supervision.
    fn start_unit(self: Arc<Self>, ct: &Arc<Ct>) -> Result<(), String> {
        let child = self.spawn(ct.vmid).map_err(|e| format!("unable to run lxc-start - {e}"))?;
        self.set_active(ct, &child);
        let ct = ct.clone();
        tokio::spawn(async move { self.supervise(ct, child).await });
        Ok(())
    }

    fn set_active(&self, ct: &Ct, child: &Child) {
        let pid = child.pid;
        ct.unit.send_replace(UnitState::Active { pid });
        self.record_unit(&ct.vmid.to_string(), pid);
    }

    /// Runs `lxc-start`: nothing inherited but a log for its errors.
    fn spawn(&self, vmid: u32) -> io::Result<Child> {
        let (vmid_text, path) = (vmid.to_string(), self.paths.lxc.display().to_string());
        let main = Main {
            vmid,
            command: &["lxc-start", "-F", "-n", &vmid_text, "-P", &path],
            stderr: &self.stderr_path(vmid),
        };
        Child::new(self.supervisor.start(&main)?)
    }

    async fn supervise(self: Arc<Self>, ct: Arc<Ct>, mut child: Child) {
        let vmid = ct.vmid;
        loop {
            // lxc-start ends with 0 if its container ran, whatever became of it, and a failed
            // post-stop hook does not change that.
            let ran = child.wait().await;
            if fs::remove_file(self.ct_dir(vmid).join("reboot")).is_ok()
                && let Ok(again) = self.restart(vmid)
            {
                child = again;
                self.set_active(&ct, &child);
                continue;
            }
            let _ = fs::remove_file(self.paths.units.join(vmid.to_string()));
            ct.unit.send_replace(UnitState::Inactive { ran });
            return;
        }
    }

    /// Starts a rebooted CT again, with its pending changes.
    fn restart(&self, vmid: u32) -> Result<Child, String> {
        let mut config = self.load(vmid)?;
        self.apply_pending(vmid, &mut config)?;
        let generated = generate(&config, vmid, &self.host)?;
        self.write_lxc_config(vmid, &config, &generated).map_err(|e| e.to_string())?;
        self.spawn(vmid).map_err(|e| e.to_string())
    }

    /// The body of a stop task.
    pub async fn stop_ct(
        self: Arc<Self>,
        task: Arc<Task>,
        vmid: u32,
        skiplock: bool,
        posted: Instant,
    ) -> Result<(), String> {
        let _lock = self.lock_ct(vmid).await?;
        task.reach("locked")?;
        let config = self.load(vmid)?;
        if !skiplock {
            check_lock(&config)?;
        }
        sleep_until(posted, self.profile.step(Step::StopBefore)).await;
        self.kill_ct(vmid).await
    }

    /// Kills a CT and waits until its unit is inactive.
    async fn kill_ct(&self, vmid: u32) -> Result<(), String> {
        let mut command = match Command::connect(&self.paths.lxc, vmid) {
            Ok(command) => command,
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => return Ok(()),
            Err(e) => return Err(format!("failed to open container {vmid}'s command socket: {e}")),
        };
        command.stop().map_err(|e| format!("unable to stop CT {vmid} - {e}"))?;
        command.closed().await;
        self.ct(vmid).inactive().await;
        Ok(())
    }

    /// The body of a shutdown task.
    pub async fn shutdown_ct(
        self: Arc<Self>,
        task: Arc<Task>,
        vmid: u32,
        how: Shutdown,
    ) -> Result<(), String> {
        let _lock = self.lock_ct(vmid).await?;
        task.reach("locked")?;
        check_lock(&self.load(vmid)?)?;
        self.lxc_stop(&task, vmid, how).await?;
        self.ct(vmid).inactive().await;
        Ok(())
    }

    /// Asks init to end, and waits until `lxc-start` has.
    async fn lxc_stop(&self, task: &Task, vmid: u32, how: Shutdown) -> Result<(), String> {
        let Ok(mut command) = Command::connect(&self.paths.lxc, vmid) else { return Ok(()) };
        let no_kill = if how.force { "" } else { " --nokill" };
        let text = format!("lxc-stop -n {vmid}{no_kill} --timeout {}", how.timeout);
        task.running(Some(text.clone()));
        let mut process = Process::new("lxc-stop");
        process.args(["-n", &vmid.to_string(), "--timeout", &how.timeout.to_string()]);
        if !how.force {
            process.arg("--nokill");
        }
        let status = process
            .arg("-P")
            .arg(&self.paths.lxc)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .status()
            .await;
        task.running(None);
        let code = status.ok().and_then(|s| s.code()).unwrap_or(255);
        if code != 0 {
            task.log(&format!("command '{text}' failed: exit code {code}"));
            return timeout(self.profile.stop_grace(), command.closed())
                .await
                .map_err(|_| "container did not stop".into());
        }
        command.closed().await;
        Ok(())
    }

    /// The body of a reboot task.
    pub async fn reboot_ct(
        self: Arc<Self>,
        task: Arc<Task>,
        vmid: u32,
        timeout_s: u32,
    ) -> Result<(), String> {
        let _lock = self.lock_ct(vmid).await?;
        task.reach("locked")?;
        check_lock(&self.load(vmid)?)?;
        let trigger = self.ct_dir(vmid).join("reboot");
        fs::write(&trigger, "")
            .map_err(|e| format!("unable to write {}: {e}", trigger.display()))?;
        let before = self.init_pid(vmid).await;
        let how = Shutdown { timeout: timeout_s, force: true };
        if let Err(error) = self.lxc_stop(&task, vmid, how).await {
            let _ = fs::remove_file(&trigger);
            return Err(error);
        }
        let again = async {
            loop {
                let pid = self.init_pid(vmid).await;
                if pid.is_some() && pid != before {
                    return;
                }
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(self.profile.running_timeout(), again)
            .await
            .map_err(|_| format!("startup for container '{vmid}' failed"))
    }

    /// What is checked before a destroy task starts, and again in it.
    pub fn check_destroy(&self, vmid: u32, force: bool) -> Result<(), String> {
        let config = self.load(vmid)?;
        check_lock(&config)?;
        if config.current.flag("protection") {
            return Err(format!("can't remove CT {vmid} - protection mode enabled"));
        }
        if !force && self.is_running(vmid) {
            return Err(format!("unable to destroy CT {vmid} - container is running"));
        }
        Ok(())
    }

    /// The body of a destroy task.
    pub async fn destroy_ct(
        self: Arc<Self>,
        task: Arc<Task>,
        vmid: u32,
        how: Destroy,
        posted: Instant,
    ) -> Result<(), String> {
        let _lock = self.lock_ct(vmid).await?;
        task.reach("locked")?;
        self.check_destroy(vmid, how.force)?;
        sleep_until(posted, self.profile.step(Step::DestroyBefore)).await;
        if self.is_running(vmid) {
            task.log(&format!("forced to stop CT {vmid} before destroying!"));
            self.kill_ct(vmid).await?;
        }
        let mut volumes = mounts::volumes(&self.load(vmid)?);
        if how.unreferenced {
            for storage in &self.storages {
                let owned =
                    storage.backend().entries().into_iter().filter(|e| e.vmid == Some(vmid));
                volumes.extend(
                    owned.map(|e| VolumeId { storage: storage.name.clone(), name: e.name }),
                );
            }
        }
        for volume in volumes.iter().filter(|v| v.name.starts_with(&format!("{vmid}/"))) {
            if let Err(error) = self.free_volume(volume) {
                task.log(&error);
            }
        }
        // Only what the simulator itself has made: never below the rootfs, which may be anything.
        let dir = self.ct_dir(vmid);
        let _ = fs::remove_dir(dir.join("rootfs"));
        for file in ["config", "mounts", "rules.seccomp", "reboot"] {
            let _ = fs::remove_file(dir.join(file));
        }
        let _ = fs::remove_dir(&dir);
        let _ = fs::remove_file(self.stderr_path(vmid));
        if how.purge {
            task.log(&format!("purging CT {vmid} from related configurations.."));
        }
        self.remove_conf(vmid)?;
        self.dc.acl_mut().forget_guest(vmid);
        Ok(())
    }

    /// Ends all CTs and removes what they left on the host.
    pub async fn shut_down(self: &Arc<Self>) {
        self.end_terminals();
        let active: Vec<_> = self.cts().into_iter().filter(|ct| ct.is_active()).collect();
        for ct in &active {
            let _ = fs::remove_file(self.ct_dir(ct.vmid).join("reboot"));
            if let Some(pid) = self.init_pid(ct.vmid).await {
                let _ = sys::kill(pid, libc::SIGKILL);
            }
        }
        for ct in &active {
            // Long enough for the CT's own stop hooks.
            if timeout(Duration::from_secs(3), ct.inactive()).await.is_ok() {
                continue;
            }
            if let UnitState::Active { pid } = *ct.unit.borrow() {
                self.supervisor.kill(ct.vmid, pid);
            }
            let _ = timeout(Duration::from_secs(3), ct.inactive()).await;
        }
        let node = self.clone();
        let cgroups = self.cgroups.clone();
        let vmids: Vec<u32> = self.cts().iter().map(|ct| ct.vmid).collect();
        let removal = move || {
            node.stop_monitord();
            vmids.into_iter().for_each(|vmid| cgroups.remove(vmid));
            cgroups.remove_parents();
        };
        // It waits for processes to go, which may take a while.
        let _ = tokio::task::spawn_blocking(removal).await;
    }
}

fn no_pid(vmid: u32) -> String {
    format!("unable to get PID for CT {vmid} (not running?)")
}

/// Fails if the `lock` property is set.
pub fn check_lock(config: &Config) -> Result<(), String> {
    match config.lock() {
        Some(lock) => Err(format!("CT is locked ({lock})")),
        None => Ok(()),
    }
}

async fn sleep_until(start: Instant, delay: Duration) {
    if !delay.is_zero() {
        sleep(delay.saturating_sub(start.elapsed())).await;
    }
}
