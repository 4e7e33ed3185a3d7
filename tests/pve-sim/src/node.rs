//! The node: its files, its tasks, its CTs, and what the API calls share.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value as Json;

use crate::cgroup::Cgroups;
use crate::cluster::Datacenter;
use crate::conf::{self, Config};
use crate::console::Terminals;
use crate::ct::Ct;
use crate::generate::Host;
use crate::monitord::Monitord;
use crate::profile::Profile;
use crate::share::{host, write_share};
use crate::storage::Storage;
use crate::task::Tasks;
use crate::unit::Supervisor;
use crate::{proc, sys};

/// Why a cluster cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A file or directory could not be made.
    #[error("cannot write {path}: {source}")]
    Write {
        /// What could not be written.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The directory's name would break liblxc's configuration or socket names.
    #[error(
        "--root {0} does not work: use an absolute path of at most 70 letters, digits and ./_- \
         (liblxc's socket names and configuration allow no more)"
    )]
    BadRoot(PathBuf),
    /// The node's name is no host name, or another node has it.
    #[error("--nodes: {0} is no host name, or there twice")]
    BadName(String),
    /// There is no node.
    #[error("--nodes: at least one name is needed")]
    NoNodes,
    /// There is no certificate.
    #[error(transparent)]
    Certificate(#[from] crate::tls::TlsError),
    /// Another simulator uses the directory.
    #[error("{0} is in use by another pve-sim; choose another --root")]
    InUse(PathBuf),
    /// The node's lxc-monitord does not run.
    #[error("cannot run lxc-monitord: {0}; it is in the package lxc (Debian: liblxc-common)")]
    Monitord(io::Error),
    /// A token file is there but has another form.
    #[error("{0} does not have the form ID=SECRET; remove it")]
    BadToken(PathBuf),
}

/// The directories of a node.
#[derive(Debug, Clone)]
pub struct Paths {
    /// The CT configurations of this node, below `/etc/pve`.
    pub confs: PathBuf,
    /// Stands for `/var/lib/lxc`.
    pub lxc: PathBuf,
    /// Logs.
    pub log: PathBuf,
    /// Stands for `/usr/share/lxc`.
    pub share: PathBuf,
    /// Stands for `/var/lib/vz`.
    pub vz: PathBuf,
    /// Files that clients are sending.
    pub uploads: PathBuf,
    /// Pids of the running units, to end what a killed simulator left behind.
    pub units: PathBuf,
}

impl Paths {
    /// The first node's directories lie directly in the cluster's, those of the others in one of
    /// their own with a short name, as liblxc's socket names have room for little.
    fn new(dc: &Datacenter, node: &str, n: usize) -> Self {
        let base = if n == 0 { dc.root.clone() } else { dc.root.join(format!("n{n}")) };
        Self {
            confs: dc.pve.join("nodes").join(node).join("lxc"),
            lxc: base.join("lxc"),
            log: base.join("log"),
            share: base.join("share/lxc"),
            vz: base.join("vz"),
            uploads: base.join("uploads"),
            units: base.join("units"),
        }
    }
}

/// A Proxmox VE node.
pub struct Node {
    /// Its name.
    pub name: String,
    /// What it shares with the other nodes.
    pub dc: Arc<Datacenter>,
    /// Its directories.
    pub paths: Paths,
    /// Its durations.
    pub profile: Profile,
    /// Who runs its CTs.
    pub supervisor: Supervisor,
    /// Its tasks.
    pub tasks: Tasks,
    /// The cgroups of its CTs.
    pub cgroups: Cgroups,
    /// What the generator of LXC configurations needs.
    pub host: Host,
    /// The terminals of its CTs.
    pub terminals: Terminals,
    /// Its storages.
    pub storages: Vec<Arc<Storage>>,
    online: AtomicBool,
    cts: Mutex<HashMap<u32, Arc<Ct>>>,
    resources: Mutex<Option<(Instant, Json)>>,
    cpu_samples: Mutex<HashMap<u32, (Instant, Duration)>>,
    monitord: Mutex<Option<Monitord>>,
}

/// Locks, also after a panic elsewhere: what these mutexes guard is never half changed.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Node {
    /// Makes the directories and ends what an earlier simulator left there. `n` is the node's
    /// place in the cluster, `shared` the storages that it has in common with the others.
    pub fn open(
        dc: Arc<Datacenter>,
        name: &str,
        n: usize,
        shared: &[Arc<Storage>],
    ) -> Result<Arc<Self>, StartError> {
        let paths = Paths::new(&dc, name, n);
        let dirs = [&paths.confs, &paths.lxc, &paths.log, &paths.vz, &paths.uploads, &paths.units];
        for dir in dirs {
            make_dir(dir)?;
        }
        make_dir(&paths.vz.join("template/cache"))?;
        let cgroups = Cgroups::discover();
        write_share(&paths, &dc.profile, &cgroups)?;
        let host = host(&paths, &cgroups);
        let local = Arc::new(Storage::dir("local", &paths.vz, false));
        let storages = [local].into_iter().chain(shared.iter().cloned()).collect();
        let node = Self {
            name: name.to_owned(),
            paths,
            profile: dc.profile,
            supervisor: dc.supervisor,
            tasks: Tasks::new(dc.faults.clone()),
            cgroups,
            host,
            terminals: Terminals::default(),
            storages,
            online: AtomicBool::new(true),
            cts: Mutex::default(),
            resources: Mutex::default(),
            cpu_samples: Mutex::default(),
            monitord: Mutex::default(),
            dc,
        };
        node.end_leftovers();
        node.start_monitord()?;
        Ok(Arc::new(node))
    }

    fn start_monitord(&self) -> Result<(), StartError> {
        let stderr = self.paths.log.join("lxc-monitord.stderr");
        let monitord = Monitord::start(&self.paths.lxc, &stderr).map_err(StartError::Monitord)?;
        self.record_unit("lxc-monitord", monitord.pid());
        *lock(&self.monitord) = Some(monitord);
        Ok(())
    }

    /// Ends the node's lxc-monitord.
    pub(crate) fn stop_monitord(&self) {
        drop(lock(&self.monitord).take());
        let _ = fs::remove_file(self.paths.units.join("lxc-monitord"));
    }

    /// Notes the main process of a unit for [`Self::end_leftovers`].
    pub(crate) fn record_unit(&self, name: &str, pid: u32) {
        let start = proc::start_ticks(pid).unwrap_or(0);
        let _ = fs::write(self.paths.units.join(name), format!("{pid} {start}\n"));
    }

    /// Whether it can be reached.
    pub fn is_online(&self) -> bool {
        self.online.load(Ordering::Relaxed)
    }

    /// Goes away with its CTs and tasks, or comes back without them.
    pub async fn set_online(self: &Arc<Self>, online: bool) -> Result<(), StartError> {
        if online == self.is_online() {
            return Ok(());
        }
        if online {
            let node = self.clone();
            let start = tokio::task::spawn_blocking(move || node.start_monitord());
            start.await.map_err(|e| StartError::Monitord(io::Error::other(e)))??;
            self.online.store(true, Ordering::Relaxed);
        } else {
            self.online.store(false, Ordering::Relaxed);
            self.tasks.list().iter().for_each(|task| task.interrupt());
            self.shut_down().await;
        }
        Ok(())
    }

    /// The running state of a CT; made on first use.
    pub fn ct(&self, vmid: u32) -> Arc<Ct> {
        lock(&self.cts).entry(vmid).or_insert_with(|| Arc::new(Ct::new(vmid))).clone()
    }

    /// All CTs that were used so far.
    pub fn cts(&self) -> Vec<Arc<Ct>> {
        lock(&self.cts).values().cloned().collect()
    }

    fn conf_path(&self, vmid: u32) -> PathBuf {
        self.paths.confs.join(format!("{vmid}.conf"))
    }

    /// The text for a CT that has no configuration on this node.
    pub fn missing(&self, vmid: u32) -> String {
        format!("Configuration file 'nodes/{}/lxc/{vmid}.conf' does not exist", self.name)
    }

    /// Reads a configuration from the disk, where anybody may have written it a moment ago.
    pub fn load(&self, vmid: u32) -> Result<Config, String> {
        let bytes = fs::read(self.conf_path(vmid)).map_err(|_| self.missing(vmid))?;
        let (config, warnings) = conf::parse(&String::from_utf8_lossy(&bytes), vmid);
        for warning in warnings {
            self.note(&warning);
        }
        Ok(config)
    }

    /// Writes a configuration, by a temporary file in the same directory.
    pub fn store(&self, vmid: u32, config: &Config) -> Result<(), String> {
        let path = self.conf_path(vmid);
        if !self.dc.is_quorate() {
            return Err(format!("unable to open file '{}' - Permission denied", path.display()));
        }
        let temporary = self.paths.confs.join(format!("{vmid}.conf.tmp.{}", std::process::id()));
        let write = || {
            let mut file = fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o640)
                .open(&temporary)?;
            file.write_all(config.render().as_bytes())?;
            fs::rename(&temporary, &path)
        };
        write().map_err(|e: io::Error| format!("unable to write '{}' - {e}", path.display()))
    }

    /// Writes a configuration and gives it to another node.
    pub fn move_conf(&self, vmid: u32, config: &Config, target: &Node) -> Result<(), String> {
        self.store(vmid, config)?;
        fs::rename(self.conf_path(vmid), target.conf_path(vmid))
            .map_err(|e| format!("failed to move config to node '{}' - {e}", target.name))
    }

    /// Removes a configuration.
    pub fn remove_conf(&self, vmid: u32) -> Result<(), String> {
        self.dc.check_quorum()?;
        fs::remove_file(self.conf_path(vmid)).map_err(|_| self.missing(vmid))
    }

    /// The CTs of this node: whatever is a file of the right name.
    pub fn vmids(&self) -> BTreeSet<u32> {
        vmids_in(&self.paths.confs)
    }

    /// The cached list for `/cluster/resources`, if it is young enough.
    pub fn cached_resources(&self) -> Option<Json> {
        let cache = lock(&self.resources);
        let (at, list) = cache.as_ref()?;
        (at.elapsed() < self.profile.resources_age()).then(|| list.clone())
    }

    /// Renews the list for `/cluster/resources`.
    pub fn cache_resources(&self, list: &Json) {
        *lock(&self.resources) = Some((Instant::now(), list.clone()));
    }

    /// CPUs' worth of time that a CT used since the last question.
    pub fn cpu_load(&self, vmid: u32, pid: u32) -> f64 {
        let Some(used) = self.cgroups.cpu_usage(pid) else { return 0.0 };
        let now = Instant::now();
        match lock(&self.cpu_samples).insert(vmid, (now, used)) {
            Some((at, before)) if now > at => {
                used.saturating_sub(before).as_secs_f64() / (now - at).as_secs_f64()
            }
            _ => 0.0,
        }
    }

    /// Adds a line to the simulator's own log.
    pub fn note(&self, text: &str) {
        let path = self.paths.log.join("pve-sim.log");
        if let Ok(mut file) = fs::OpenOptions::new().create(true).append(true).open(path) {
            let _ = writeln!(file, "{text}");
        }
    }

    /// Ends the CTs of a simulator that was killed.
    fn end_leftovers(&self) {
        for entry in fs::read_dir(&self.paths.units).into_iter().flatten().flatten() {
            let text = fs::read_to_string(entry.path()).unwrap_or_default();
            let mut numbers = text.split_whitespace().filter_map(|n| n.parse::<u64>().ok());
            let vmid = entry.file_name().to_str().and_then(|n| n.parse().ok());
            if let (Some(pid), Some(start)) = (numbers.next(), numbers.next()) {
                let pid = u32::try_from(pid).unwrap_or(0);
                // The start time tells the recorded process from another with its pid.
                if proc::start_ticks(pid) == Some(start) {
                    match vmid {
                        Some(vmid) => self.supervisor.kill(vmid, pid),
                        None => drop(sys::kill(pid, libc::SIGKILL)),
                    }
                }
            }
            if let Some(vmid) = vmid {
                self.cgroups.remove(vmid);
            }
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// The VMIDs of the configurations in a directory.
pub(crate) fn vmids_in(dir: &Path) -> BTreeSet<u32> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter_map(|e| {
            let name = e.file_name();
            let digits = name.to_str()?.strip_suffix(".conf")?;
            digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
        })
        .collect()
}

pub(crate) fn write_error(path: &Path, source: io::Error) -> StartError {
    StartError::Write { path: path.to_owned(), source }
}

pub(crate) fn make_dir(dir: &Path) -> Result<(), StartError> {
    fs::create_dir_all(dir).map_err(|e| write_error(dir, e))
}

/// Writes a file with this mode from the beginning.
pub fn write_file(path: &Path, text: &str, mode: u32) -> Result<(), StartError> {
    let write = || {
        let _ = fs::remove_file(path);
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        // The umask may have taken bits away.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(text.as_bytes())
    };
    write().map_err(|e| write_error(path, e))
}
