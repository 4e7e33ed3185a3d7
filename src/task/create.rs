//! Makes a container: from containerd's request to an init that waits for its start.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::libc;
use proxmox_shim_init::protocol::{
    ContainerHooks, ContainerSetup, Hook, Mount, MountSource, TimeNamespace, VERSION,
};
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::config::{Config, Vmid};
use crate::images::{self, Image};
use crate::ledger::{self, Poststop, ProcessId, Record, RunDir, Stat};
use crate::lxc::cgroup::{Cgroup, OomWatch};
use crate::lxc::detached::DetachedMount;
use crate::lxc::device_access::DeviceAccess;
use crate::lxc::device_control::DeviceControl;
use crate::lxc::exit::{self, Exit};
use crate::lxc::rootfs::RootfsMount;
use crate::lxc::{self, cgroup, detached, init, rootfs};
use crate::oci::plan::{IdMappings, Namespace, Plan, PlannedMount, Resources};
use crate::oci::{self, Host};
use crate::pve::conf::ClaimError;
use crate::pve::identity::{self, Id128, Identity};
use crate::pve::{self, Upid};
use crate::sandbox::member::State;
use crate::sandbox::namespace::Joined;
use crate::sandbox::{member, pod};
use crate::sys;
use crate::task::error::{Error, Result};
use crate::task::stdio::{Stdio, StdioRequest};
use crate::task::{Environment, blocking, describe, hooks, teardown, user_namespace};

/// When Proxmox is first asked what became of a start whose init has not connected.
const START_POLL: Duration = Duration::from_millis(100);
/// The stop hook's record is waited for no longer when only the OOM count is of interest.
const OOM_RECORD_TIMEOUT: Duration = Duration::from_millis(500);

/// How often an update is tried while others change the configuration.
const UPDATE_ATTEMPTS: u32 = 5;

/// containerd's request, in the words of this project.
#[derive(Debug, Clone)]
pub struct CreateRequest {
    pub id: String,
    pub bundle: PathBuf,
    pub rootfs: Vec<RootfsMount>,
    pub stdio: StdioRequest,
    /// The configuration of this container.
    pub config: Arc<Config>,
    pub pve: Arc<pve::Client>,
    /// What the container is to Kubernetes.
    pub role: oci::Role,
}

/// A container whose init waits for its start.
pub struct Created {
    pub ct: RunningCt,
    pub session: init::Session,
    pub stdio: Stdio,
}

/// What the shim knows of a CT that was started.
pub struct RunningCt {
    pub vmid: Vmid,
    pub id: String,
    pub bundle: PathBuf,
    pub dir: RunDir,
    pub record: Record,
    pub identity: Identity,
    pub pve: Arc<pve::Client>,
    pub config: Arc<Config>,
    pub plan: Plan,
    pub host: Arc<Host>,
    /// The host's pid of PID 1.
    pub pid: i32,
    pub pidfd: Arc<AsyncFd<OwnedFd>>,
    pub cgroup: Arc<Cgroup>,
    pub devices: Arc<DeviceControl>,
    /// `CLONE_NEW*` flags of the namespaces that an exec has to enter.
    pub exec_namespaces: u32,
    oom: tokio::sync::Mutex<Option<OomWatch>>,
}

/// Creates the container, or undoes everything and says why not. `cancel` ends the waiting for
/// the CT.
///
/// # Errors
/// The first failure, with that of the undoing beside it.
pub async fn create(
    env: Arc<Environment>,
    request: Arc<CreateRequest>,
    cancel: CancellationToken,
) -> Result<Created> {
    let dir =
        make_run_dir(&request.pve, &request.config, &env.namespace, &request.id, &request.bundle)
            .await?;
    let mut building =
        Building { record: env.record(request.bundle.clone()), dir, env, request, cancel };
    match building.build().await {
        Ok(created) => Ok(created),
        Err(error) => {
            let cleanup = teardown::teardown(
                &building.request.pve,
                &building.dir,
                &building.record,
                &building.request.id,
                building.request.config.proxmox.task_timeout,
            )
            .await;
            Err(error.and_cleanup(cleanup))
        }
    }
}

/// Makes the run directory, in the place of that of an earlier container of this id that was left
/// behind.
///
/// # Errors
/// Not to be undone: what exists under this name belongs to another container.
pub(crate) async fn make_run_dir(
    pve: &pve::Client,
    config: &Config,
    namespace: &str,
    id: &str,
    bundle: &Path,
) -> Result<RunDir> {
    let dir = RunDir::new(&config.paths.run_dir, namespace, id);
    let make = || {
        let dir = dir.clone();
        blocking(move || Ok(dir.create()?))
    };
    match make().await {
        Err(exists @ Error::Ledger(ledger::Error::Exists { .. })) => {
            let limit = config.proxmox.task_timeout;
            if !teardown::remove_orphan(pve, &dir, id, bundle, limit).await? {
                return Err(exists);
            }
            make().await?;
        }
        result => result?,
    }
    Ok(dir)
}

/// What has been made so far.
struct Building {
    env: Arc<Environment>,
    request: Arc<CreateRequest>,
    cancel: CancellationToken,
    dir: RunDir,
    record: Record,
}

impl Building {
    async fn build(&mut self) -> Result<Created> {
        let request = self.request.clone();
        let plan = self.plan().await?;
        for warning in &plan.warnings {
            log::warn!(container = request.id.as_str(); "{warning}");
        }
        self.save().await?;
        let image = self.ask_for_image(&plan);
        let (namespaces, user) = (plan.namespaces.clone(), plan.user_namespace.clone());
        let joined = blocking(move || {
            Ok(Joined::open(&namespaces, user.as_ref()).map_err(pod::Error::from)?)
        });
        let joined = joined.await?;
        let (mounts, target) = (request.rootfs.clone(), self.record.rootfs());
        let stdio_context = self.env.stdio_context(&request.id, None, &request.bundle);
        let (planned, dir) = (plan.clone(), self.dir.clone());
        let (bundle, init) = (request.bundle.clone(), self.env.init_path.clone());
        let devices = blocking(move || {
            make_mount_point(&mounts, &target)?;
            let Some(user) = &planned.user_namespace else {
                rootfs::mount(&mounts, &target, None)?;
                lxc::image::check(&planned.root_path)?;
                return Ok(Vec::new());
            };
            let prepared = user_namespace::prepare(user, &planned, &dir, &bundle, &init)?;
            let mounts = user_namespace::rootfs(mounts, &planned.root_path, &target)?;
            rootfs::mount(&mounts, &target, Some(&prepared.ids))?;
            lxc::image::check(&target)?;
            Ok(prepared.devices)
        })
        .await?;
        let mut stdio = Stdio::open(&request.stdio, &stdio_context).await?;
        let binds = plan.mounts.clone();
        let mounts = blocking(move || open_binds(&binds)).await?;
        let listener = init::Listener::bind(&self.dir.ctl())?;

        let image = image.await.map_err(|_| Error::ShuttingDown)?;
        let identity = self.claim(&plan, image).await?;
        let vmid = identity.vmid;
        self.prepare(vmid, &plan).await?;
        let connected = self.start(vmid, listener).await?;

        let pid = connected.pid;
        self.record.poststop = poststop(&plan);
        self.record.shares_pids = plan.namespaces.pid != Namespace::New;
        self.record.init = Some(ProcessId::of(pid)?);
        // A monitor that has just died has left its init to the node's.
        let monitor = Stat::read(pid)?.parent;
        self.record.monitor = (monitor > 1).then(|| ProcessId::of(monitor)).transpose()?;
        self.save().await?;
        if let Some(user) = plan.user_namespace.clone() {
            blocking(move || user_namespace::verify(&user, pid)).await?;
        }
        let (cgroup, namespaces) = {
            let (dir, resources) = (self.dir.clone(), plan.resources.clone());
            // Init enters it only later.
            let time = match plan.namespaces.time {
                Namespace::Host => 0,
                Namespace::New | Namespace::Path(_) => libc::CLONE_NEWTIME.unsigned_abs(),
            };
            blocking(move || {
                joined.verify(pid).map_err(pod::Error::from)?;
                let cgroup = Cgroup::of_process(pid)?;
                if let Some(memory) = cgroup.memory_dir() {
                    dir.write(&dir.cgroup(), memory.as_os_str().as_encoded_bytes())?;
                }
                cgroup.apply(&resources, true)?;
                Ok((cgroup, foreign_namespaces(pid)? | time))
            })
            .await?
        };
        let oom = cgroup.watch_oom().inspect_err(|e| log::warn!("OOM kills go unseen: {e}")).ok();
        let cgroup = Arc::new(cgroup);
        let access = DeviceAccess::of(&plan.device_rules, (&self.env.host.cgroups).into())
            .map_err(lxc::config::Error::from)?;
        let device_control = DeviceControl {
            vmid: vmid.get(),
            monitor,
            cgroup: cgroup.clone(),
            access: std::sync::Mutex::new(access),
        };
        let ct = RunningCt {
            vmid,
            id: request.id.clone(),
            bundle: request.bundle.clone(),
            dir: self.dir.clone(),
            record: self.record.clone(),
            identity,
            pve: request.pve.clone(),
            config: request.config.clone(),
            host: self.env.host.clone(),
            pid,
            pidfd: Arc::new(
                sys::watch(connected.pidfd)
                    .map_err(|source| Error::Io { action: "watch the CT's init", source })?,
            ),
            cgroup,
            devices: Arc::new(device_control),
            exec_namespaces: namespaces,
            oom: tokio::sync::Mutex::new(oom),
            plan,
        };
        let time_namespace = match &ct.plan.namespaces.time {
            Namespace::Path(path) => {
                let path = path.clone();
                let open = move || std::fs::File::open(path).map(OwnedFd::from);
                let failed = |source| Error::Io { action: "open the time namespace", source };
                Some(blocking(move || open().map_err(failed)).await?)
            }
            Namespace::Host | Namespace::New => None,
        };
        let setup = ct.setup(mounts.iter().map(|bind| bind.directory))?;
        let mounts = ct.descriptors(mounts, devices).await?;
        if let Some(user) = &ct.plan.user_namespace {
            stdio.give(user_namespace::host_uid(user, ct.plan.process.uid)?);
        }
        let session = &connected.session;
        self.or_given_up(session.set_up(&setup, time_namespace, stdio.child_fds(), mounts))
            .await??;
        if ct.plan.user_namespace.is_some() {
            user_namespace::set_from_outside(&ct.plan.process, pid)?;
        }
        let state = ct.state("creating");
        self.or_given_up(async {
            hooks::run("prestart", &ct.plan.hooks.prestart, &state).await?;
            hooks::run("createRuntime", &ct.plan.hooks.create_runtime, &state).await
        })
        .await??;
        let host = match ct.plan.hooks.create_container.is_empty() {
            true => None,
            false => Some(blocking(|| Ok(detached::host_tree()?)).await?),
        };
        if let Some(master) = self.or_given_up(connected.session.finish(host)).await?? {
            stdio.attach_terminal(master)?;
        }
        Ok(Created { ct, session: connected.session, stdio })
    }

    async fn plan(&self) -> Result<Plan> {
        let bundle = self.request.bundle.clone();
        let programs = programs(&self.request);
        let sandbox = self.env.sandbox.get();
        let is_member = sandbox != State::Absent || self.request.role == oci::Role::Member;
        let unprivileged = self.request.config.ct.unprivileged;
        let mut plan = blocking(move || match is_member {
            true => Ok(oci::load_member(&bundle, unprivileged, &programs)?),
            false => Ok(oci::load(&bundle, unprivileged, &programs)?),
        })
        .await?;
        match sandbox {
            State::Running(shared) => shared.join(&mut plan)?,
            State::NotRunning => return Err(member::Error::NotRunning.into()),
            State::Absent if is_member => member::refuse_placeholders(&plan)?,
            State::Absent => {}
        }
        let wish = self.request.config.ct.abstract_sockets;
        let is_own = self.env.host.is_own_namespace;
        blocking(move || {
            let abi = sys::landlock::abi();
            let exposed =
                lxc::command_socket::guard(&mut plan, wish, abi, |path| is_own("net", path));
            plan.warnings.extend(exposed.map(str::to_owned));
            Ok(plan)
        })
        .await
    }

    /// Asks containerd, beside other work, which image this is. Without an answer the CT is made all the same.
    fn ask_for_image(&self, plan: &Plan) -> JoinHandle<Option<Image>> {
        let (env, id, name) = (self.env.clone(), self.request.id.clone(), plan.image.clone());
        tokio::spawn(async move {
            let name = name.as_deref();
            let image = images::of_container(&env.containerd, &env.namespace, &id, name).await;
            image.unwrap_or_else(|error| {
                log::info!(container = id.as_str(); "the notes have no digest of the image: {error}");
                None
            })
        })
    }

    async fn save(&self) -> Result<()> {
        let (dir, record) = (self.dir.clone(), self.record.clone());
        blocking(move || Ok(dir.save(&record)?)).await
    }
}

impl Building {
    /// Takes a VMID by creating its configuration file. The record is written before each try, so
    /// that a crash in between leaves no CT that nobody remembers.
    async fn claim(&mut self, plan: &Plan, image: Option<Image>) -> Result<Identity> {
        let config = self.request.config.clone();
        let (namespace, id) = (self.env.namespace.clone(), self.request.id.clone());
        let (dir, mut record, plan) = (self.dir.clone(), self.record.clone(), plan.clone());
        let (record, claimed) = blocking(move || {
            let mut claim = || {
                let (install_id, boot_id) =
                    (identity::install_id(&config.paths.state_dir)?, identity::boot_id()?);
                let range = config.ct.vmid_range;
                for _ in 0..range.len() {
                    let vmid = pve::conf::next_vmid(range, &config.paths.run_dir)?;
                    let identity = Identity {
                        install_id,
                        vmid,
                        namespace: namespace.clone(),
                        container_id: id.clone(),
                        nonce: Id128::random()
                            .map_err(|source| Error::Io { action: "get random bytes", source })?,
                        boot_id,
                    };
                    record.identity = Some(identity.to_string());
                    record.cgroups = lxc::config::cgroups(&plan, vmid.get()).to_vec();
                    dir.save(&record)?;
                    let text = describe::ct(&config, &plan, image.as_ref(), &identity, &dir)
                        .render()
                        .map_err(ClaimError::from)?;
                    match pve::conf::claim(&config.proxmox.pmxcfs, vmid, &text) {
                        Ok(_) => return Ok(identity),
                        // Nothing was written, so nothing needs to be undone.
                        Err(error) if !error.may_have_written() => {
                            (record.identity, record.cgroups) = (None, Vec::new());
                            match error {
                                ClaimError::Exists { .. } => {}
                                error => return Err(error.into()),
                            }
                        }
                        Err(error) => return Err(error.into()),
                    }
                }
                Err(ClaimError::RangeFull { range }.into())
            };
            let claimed = claim();
            Ok((record, claimed))
        })
        .await?;
        self.record = record;
        claimed
    }

    /// Everything that lxc-start will read.
    async fn prepare(&self, vmid: Vmid, plan: &Plan) -> Result<()> {
        let layout = lxc::config::Layout {
            vmid: vmid.get(),
            rootfs: rootfs_of(plan, &self.record),
            run_dir: self.dir.path().to_owned(),
            init: self.env.init_path.clone(),
            keeps_exit_status: sys::pidfd::keeps_exit_status(),
            cgroups: (&self.env.host.cgroups).into(),
            apparmor: self.env.host.apparmor,
        };
        let text = lxc::config::render(plan, &layout)?;
        let dir = self.dir.clone();
        let cgroups = self.record.cgroups.clone();
        blocking(move || {
            dir.write(&dir.lxc_conf(), text.as_bytes())?;
            if let Some(container) = cgroups.first() {
                cgroup::pass_cpuset_on(container)?;
            }
            // Proxmox's pre-start hook would do it, but the include clears that hook.
            Ok(cgroup::remove_stale(&cgroups.iter().map(String::as_str).collect::<Vec<_>>())?)
        })
        .await
    }

    /// Has Proxmox start the CT and waits for its init.
    ///
    /// Proxmox's task is still running when init connects, and fails for a workload that ends at
    /// once. So it only counts until init has connected.
    async fn start(&self, vmid: Vmid, listener: init::Listener) -> Result<init::Connected> {
        let seconds = self.request.config.ct.start_timeout;
        let connected = listener.accept();
        let connected_or_given_up = CancellationToken::new();
        let guard = connected_or_given_up.clone().drop_guard();
        let mut task = {
            let (pve, config) = (self.request.pve.clone(), self.request.config.clone());
            tokio::spawn(async move {
                // Not broken off in any case: Proxmox would not stop working on it.
                let upid: Upid = pve.start(vmid).await?;
                let deadline = tokio::time::Instant::now() + config.proxmox.task_timeout;
                let end = async {
                    // Init is faster than any useful answer.
                    tokio::time::sleep(START_POLL).await;
                    pve.wait(&upid, deadline).await
                };
                tokio::select! {
                    biased;
                    () = connected_or_given_up.cancelled() => Ok(()),
                    result = end => result,
                }
            })
        };
        let timeout = tokio::time::sleep(seconds);
        tokio::pin!(connected, timeout);
        let mut started = false;
        let result = loop {
            tokio::select! {
                biased;
                connected = &mut connected => break Ok(connected?),
                result = &mut task, if !started => match result {
                    Ok(Ok(())) => started = true,
                    Ok(Err(error)) => break Err(error.into()),
                    Err(_) => break Err(Error::ShuttingDown),
                },
                () = &mut timeout => break Err(Error::StartTimeout {
                    vmid: vmid.get(),
                    seconds: seconds.as_secs(),
                    log: self.dir.lxc_log(),
                }),
                () = self.cancel.cancelled() => {
                    break Err(Error::Cancelled { id: self.request.id.clone() });
                }
            }
        };
        drop(guard);
        result
    }

    /// Awaits `work` unless the client gives up.
    async fn or_given_up<T>(&self, work: impl Future<Output = T>) -> Result<T> {
        tokio::select! {
            result = work => Ok(result),
            () = self.cancel.cancelled() => Err(Error::Cancelled { id: self.request.id.clone() }),
        }
    }
}

impl RunningCt {
    /// The OCI state for hooks.
    #[must_use]
    pub fn state<'a>(&'a self, status: &'a str) -> hooks::State<'a> {
        hooks::State {
            oci_version: &self.plan.oci_version,
            id: &self.id,
            status,
            pid: Some(self.pid),
            bundle: &self.bundle,
            annotations: &self.plan.annotations,
        }
    }

    /// Whether other processes outlive the container's init.
    #[must_use]
    pub fn shares_pids(&self) -> bool {
        self.plan.namespaces.pid != Namespace::New
    }

    /// The OOM kills when init has ended. The cgroup disappears soon after that, so the stop
    /// hook's count is asked for when a kill is likely.
    pub async fn oom_kills_at_exit(&self, exit: Option<&Exit>) -> u64 {
        let cgroup = self.cgroup.clone();
        if let Ok(kills) = blocking(move || Ok(cgroup.oom_kills()?)).await {
            return kills;
        }
        let killed = 128 + libc::SIGKILL.unsigned_abs();
        if exit.is_some_and(|exit| exit.status.0 != killed) {
            return 0;
        }
        let deadline = tokio::time::Instant::now() + OOM_RECORD_TIMEOUT;
        while tokio::time::Instant::now() < deadline {
            match exit::read_record(&self.dir.exit()) {
                Ok(Some(record)) => return record.oom_kills,
                Ok(None) => tokio::time::sleep(Duration::from_millis(2)).await,
                Err(_) => break,
            }
        }
        0
    }

    /// Waits for the next OOM kill and returns how many there were; `None` if there can't be one.
    pub async fn next_oom(&self) -> Option<u64> {
        let mut watch = self.oom.lock().await;
        watch.as_mut()?.next().await
    }

    /// Shows changed limits in Proxmox's configuration.
    ///
    /// Returns what was shown before.
    ///
    /// # Errors
    /// Proxmox's; nothing has been changed then.
    pub async fn show_limits(&self, resources: &Resources) -> Result<Vec<describe::Shown>> {
        let changes = describe::changes(resources);
        let changes: Vec<_> = changes.into_iter().map(|(key, value)| (key, Some(value))).collect();
        self.show(&changes).await
    }

    /// Changes what Proxmox shows; see [`Self::show_limits`].
    pub async fn show(&self, changes: &[describe::Shown]) -> Result<Vec<describe::Shown>> {
        if changes.is_empty() {
            return Ok(Vec::new());
        }
        let removed: Vec<&str> =
            changes.iter().filter(|(_, value)| value.is_none()).map(|(key, _)| *key).collect();
        let removed = removed.join(",");
        let mut form: Vec<(&str, &str)> =
            changes.iter().filter_map(|(key, value)| Some((*key, value.as_deref()?))).collect();
        if !removed.is_empty() {
            form.push(("delete", &removed));
        }
        let mut attempt = 1;
        loop {
            let shown = self.pve.config(self.vmid).await?;
            self.identity
                .verify(&shown)
                .map_err(|reason| pve::Error::NotOurs { vmid: self.vmid, reason })?;
            match self.pve.put_config(self.vmid, &form, Some(&shown.digest)).await {
                // Another update, or an administrator, was faster.
                Err(error)
                    if error.failure() == Some(&pve::Failure::DigestMismatch)
                        && attempt < UPDATE_ATTEMPTS =>
                {
                    attempt += 1;
                }
                result => {
                    result?;
                    return Ok(describe::shown(&shown, changes.iter().map(|(key, _)| *key)));
                }
            }
        }
    }

    /// What init is told to do.
    fn setup(&self, directories: impl Iterator<Item = bool>) -> Result<ContainerSetup> {
        let plan = &self.plan;
        let mut directories = directories;
        let mounts = plan.mounts.iter().filter_map(|mount| match mount {
            PlannedMount::Init(mount) => Some(mount.clone()),
            PlannedMount::Bind { destination, .. } => {
                // The propagation is set on the detached mount already.
                Some(detached_mount(destination, directories.next()?, &[]))
            }
            PlannedMount::OfNamespace { destination, propagation, .. } => {
                Some(detached_mount(destination, true, propagation))
            }
        });
        let mut mounts: Vec<_> = mounts.collect();
        let (mut devices, mut process) = (plan.devices.clone(), plan.process.clone());
        if plan.user_namespace.is_some() {
            let nodes = user_namespace::nodes(&plan.devices);
            mounts.extend(nodes.map(|node| detached_mount(&node.path, false, &[])));
            devices.retain(|device| device.mode & libc::S_IFMT == libc::S_IFIFO);
            process = user_namespace::rest(&process);
        }
        let hooks = |hooks: &[Hook], status| -> Result<ContainerHooks> {
            let state = hooks::State { pid: None, ..self.state(status) };
            let state_json = serde_json::to_string(&state).map_err(|error| Error::Io {
                action: "render the OCI state",
                source: error.into(),
            })?;
            Ok(ContainerHooks { hooks: hooks.to_vec(), state_json })
        };
        let io = |source| Error::Io { action: "resolve the path of the rootfs", source };
        let rootfs = rootfs_of(plan, &self.record).canonicalize().map_err(io)?;
        Ok(ContainerSetup {
            version: VERSION,
            hostname: plan.hostname.clone(),
            domainname: plan.domainname.clone(),
            time_namespace: match &plan.namespaces.time {
                Namespace::Host => TimeNamespace::Host,
                Namespace::New => TimeNamespace::New { offsets: plan.time_offsets.clone() },
                Namespace::Path(_) => TimeNamespace::Join,
            },
            loopback_up: plan.namespaces.network == Namespace::New,
            mounts,
            root_propagation: plan.root_propagation,
            root_readonly: plan.root_readonly,
            devices,
            links: plan.links.clone(),
            sysctls: plan.sysctls.clone(),
            masked_paths: plan.masked_paths.clone(),
            readonly_paths: plan.readonly_paths.clone(),
            create_container: hooks(&plan.hooks.create_container, "creating")?,
            rootfs: rootfs.to_string_lossy().into_owned(),
            start_container: hooks(&plan.hooks.start_container, "created")?,
            process,
        })
    }

    /// The detached mounts of [`Self::setup`], in its order.
    async fn descriptors(
        &self,
        binds: Vec<DetachedMount>,
        devices: Vec<OwnedFd>,
    ) -> Result<Vec<OwnedFd>> {
        let (pidfd, mounts) = (self.pidfd.clone(), self.plan.mounts.clone());
        blocking(move || {
            let mut binds = binds.into_iter().map(|bind| bind.fd);
            let mut descriptors = Vec::new();
            for mount in &mounts {
                match mount {
                    PlannedMount::Bind { .. } => descriptors.extend(binds.next()),
                    PlannedMount::OfNamespace { filesystem, attributes, .. } => {
                        let process = pidfd.get_ref().as_fd();
                        let mount = detached::of_namespace(*filesystem, process, *attributes)?;
                        descriptors.push(mount);
                    }
                    PlannedMount::Init(_) => {}
                }
            }
            descriptors.extend(devices);
            Ok(descriptors)
        })
        .await
    }
}

/// Where LXC finds the root of the container: with a user namespace it is always mounted.
fn rootfs_of(plan: &Plan, record: &Record) -> PathBuf {
    match plan.user_namespace {
        None => plan.root_path.clone(),
        Some(_) => record.rootfs(),
    }
}

fn detached_mount(destination: &str, directory: bool, propagation: &[u64]) -> Mount {
    Mount {
        destination: destination.to_owned(),
        source: MountSource::Detached { directory },
        copy_up: false,
        propagation: propagation.to_vec(),
    }
}

/// Where compiled seccomp filters are kept.
pub(super) fn programs(request: &CreateRequest) -> oci::Programs {
    // No namespace of containerd has a name that begins like this.
    oci::Programs::at(request.config.paths.run_dir.join(".seccomp"))
}

/// A bundle need not hold the directory that the mounts are for; runc's shim makes it, too.
fn make_mount_point(mounts: &[RootfsMount], target: &Path) -> Result<()> {
    if mounts.is_empty() {
        return Ok(());
    }
    match std::fs::DirBuilder::new().mode(0o711).create(target) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(Error::Io { action: "make the directory of the rootfs", source: error })
        }
        _ => Ok(()),
    }
}

/// What the ledger keeps of the plan for the container's end.
pub(super) fn poststop(plan: &Plan) -> Option<Poststop> {
    let hooks = plan.hooks.poststop.clone();
    (!hooks.is_empty()).then(|| Poststop {
        hooks,
        oci_version: plan.oci_version.clone(),
        annotations: plan.annotations.clone(),
    })
}

fn open_binds(mounts: &[PlannedMount]) -> Result<Vec<DetachedMount>> {
    let mut opened = Vec::new();
    for mount in mounts {
        let PlannedMount::Bind { source, destination, recursive, attributes, propagation, ids } =
            mount
        else {
            continue;
        };
        let carrier = ids.as_ref().map(|ids| carrier(&ids.mappings)).transpose()?;
        let ids = ids.as_ref().zip(carrier.as_ref()).map(|(ids, carrier)| detached::IdMap {
            user_namespace: carrier.as_fd(),
            recursive: ids.recursive,
        });
        let mount = detached::open(source, destination, *recursive, *attributes, propagation, ids)?;
        opened.push(mount);
    }
    Ok(opened)
}

/// A user namespace that only carries mappings.
fn carrier(mappings: &IdMappings) -> Result<OwnedFd> {
    sys::user_namespace::with_mappings(&mappings.uid_map(), &mappings.gid_map())
        .map_err(|source| Error::Io { action: "make a user namespace for id mappings", source })
}

/// The `CLONE_NEW*` flags of the namespaces in which a process differs from the shim.
fn foreign_namespaces(pid: i32) -> Result<u32> {
    const KINDS: [(&str, i32); 7] = [
        ("user", libc::CLONE_NEWUSER),
        ("mnt", libc::CLONE_NEWNS),
        ("pid", libc::CLONE_NEWPID),
        ("net", libc::CLONE_NEWNET),
        ("ipc", libc::CLONE_NEWIPC),
        ("uts", libc::CLONE_NEWUTS),
        ("cgroup", libc::CLONE_NEWCGROUP),
    ];
    let id = |process: &str, kind: &str| {
        std::fs::read_link(format!("/proc/{process}/ns/{kind}"))
            .map_err(|source| Error::Io { action: "read a namespace of the CT's init", source })
    };
    let mut flags = 0;
    for (kind, flag) in KINDS {
        if id("self", kind)? != id(&pid.to_string(), kind)? {
            flags |= flag.unsigned_abs();
        }
    }
    Ok(flags)
}
