//! The node: its files, its tasks, its CTs, and what the API calls share.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use serde_json::Value as Json;

use crate::acl::Acl;
use crate::cgroup::Cgroups;
use crate::conf::{self, Config};
use crate::control::Held;
use crate::ct::Ct;
use crate::fault::Faults;
use crate::generate::Host;
use crate::profile::{Profile, Step};
use crate::task::Tasks;
use crate::{proc, sys};

/// Where LXC's own files are.
const SYSTEM_LXC_CONFIG: &str = "/usr/share/lxc/config";

/// What to start a node with.
#[derive(Debug, Clone)]
pub struct Options {
    /// Directory for everything; made if missing.
    pub root: PathBuf,
    /// The node's name.
    pub name: String,
    /// Durations.
    pub profile: Profile,
}

/// Why a node cannot start.
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
    /// The node's name is no host name.
    #[error("--node {0} is no host name")]
    BadName(String),
    /// Another simulator uses the directory.
    #[error("{0} is in use by another pve-sim; choose another --root")]
    InUse(PathBuf),
    /// A token file is there but has another form.
    #[error("{0} does not have the form USER@REALM!TOKEN=UUID; remove it")]
    BadToken(PathBuf),
}

/// The directories of a node.
#[derive(Debug, Clone)]
pub struct Paths {
    /// All of it.
    pub root: PathBuf,
    /// Stands for `/etc/pve`.
    pub pve: PathBuf,
    /// The CT configurations of this node, below `pve`.
    pub confs: PathBuf,
    /// Stands for `/var/lib/lxc`.
    pub lxc: PathBuf,
    /// Logs.
    pub log: PathBuf,
    /// Stands for `/usr/share/lxc`.
    share: PathBuf,
    /// Pids of the running units, to end what a killed simulator left behind.
    pub units: PathBuf,
}

impl Paths {
    fn new(root: &Path, node: &str) -> Self {
        let pve = root.join("pve");
        Self {
            root: root.to_owned(),
            confs: pve.join("nodes").join(node).join("lxc"),
            pve,
            lxc: root.join("lxc"),
            log: root.join("log"),
            share: root.join("share/lxc"),
            units: root.join("units"),
        }
    }
}

/// A Proxmox VE node.
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its directories.
    pub paths: Paths,
    /// Its durations.
    pub profile: Profile,
    /// Its users and rights.
    pub acl: RwLock<Acl>,
    /// Its tasks.
    pub tasks: Tasks,
    /// The cgroups of its CTs.
    pub cgroups: Cgroups,
    /// What the generator of LXC configurations needs.
    pub host: Host,
    /// What is to go wrong.
    pub faults: Arc<Faults>,
    /// Locks that a test holds.
    pub held: Held,
    /// Fingerprint of the certificate, as shown by the API.
    pub fingerprint: String,
    cts: Mutex<HashMap<u32, Arc<Ct>>>,
    resources: Mutex<Option<(Instant, Json)>>,
    cpu_samples: Mutex<HashMap<u32, (Instant, Duration)>>,
    _lock: File,
}

/// Locks, also after a panic elsewhere: what these mutexes guard is never half changed.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Node {
    /// Makes the directories, ends what an earlier simulator left there, and reads or makes the
    /// tokens.
    pub fn open(options: &Options, fingerprint: String) -> Result<Arc<Self>, StartError> {
        let root = check_root(&options.root)?;
        check_name(&options.name)?;
        let paths = Paths::new(&root, &options.name);
        for dir in [&paths.root, &paths.confs, &paths.lxc, &paths.log, &paths.units] {
            make_dir(dir)?;
        }
        let lock_path = root.join("lock");
        let file = File::create(&lock_path).map_err(|e| write_error(&lock_path, e))?;
        sys::try_flock(&file).map_err(|_| StartError::InUse(root.clone()))?;

        let link = paths.pve.join("lxc");
        let _ = fs::remove_file(&link);
        symlink(Path::new("nodes").join(&options.name).join("lxc"), &link)
            .map_err(|e| write_error(&link, e))?;
        write_share(&paths, &options.profile)?;

        let acl = Acl::with_tokens(
            &secret(&root.join("admin-token"), "root@pam!admin")?,
            &secret(&root.join("shim-token"), "containerd@pve!shim")?,
        );
        let cgroups = Cgroups::discover();
        let host = host(&paths, &cgroups);
        let faults = Arc::<Faults>::default();
        let node = Self {
            name: options.name.clone(),
            paths,
            profile: options.profile,
            acl: RwLock::new(acl),
            tasks: Tasks::new(faults.clone()),
            faults,
            held: Held::default(),
            cgroups,
            host,
            fingerprint,
            cts: Mutex::default(),
            resources: Mutex::default(),
            cpu_samples: Mutex::default(),
            _lock: file,
        };
        node.end_leftovers();
        Ok(Arc::new(node))
    }

    /// The running state of a CT; made on first use.
    pub fn ct(&self, vmid: u32) -> Arc<Ct> {
        lock(&self.cts).entry(vmid).or_insert_with(|| Arc::new(Ct::new(vmid))).clone()
    }

    /// All CTs that were used so far.
    pub fn cts(&self) -> Vec<Arc<Ct>> {
        lock(&self.cts).values().cloned().collect()
    }

    /// The access control, for reading.
    pub fn acl(&self) -> std::sync::RwLockReadGuard<'_, Acl> {
        self.acl.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The access control, for changes.
    pub fn acl_mut(&self) -> std::sync::RwLockWriteGuard<'_, Acl> {
        self.acl.write().unwrap_or_else(PoisonError::into_inner)
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

    /// Removes a configuration.
    pub fn remove_conf(&self, vmid: u32) -> Result<(), String> {
        fs::remove_file(self.conf_path(vmid)).map_err(|_| self.missing(vmid))
    }

    /// The CTs of this node: whatever is a file of the right name.
    pub fn vmids(&self) -> BTreeSet<u32> {
        vmids_in(&self.paths.confs)
    }

    /// The VMIDs in use on any node, by CTs or virtual machines.
    pub fn used_vmids(&self) -> BTreeSet<u32> {
        let nodes = fs::read_dir(self.paths.pve.join("nodes")).into_iter().flatten().flatten();
        nodes
            .flat_map(|n| [n.path().join("lxc"), n.path().join("qemu-server")])
            .flat_map(|dir| vmids_in(&dir))
            .collect()
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
            if let (Some(pid), Some(start)) = (numbers.next(), numbers.next()) {
                let pid = u32::try_from(pid).unwrap_or(0);
                // The start time tells the recorded process from another with its pid.
                if proc::start_ticks(pid) == Some(start) {
                    let _ = sys::kill(pid, libc::SIGKILL);
                }
            }
            if let Some(vmid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) {
                self.cgroups.remove(vmid);
            }
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn vmids_in(dir: &Path) -> BTreeSet<u32> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter_map(|e| {
            let name = e.file_name();
            let digits = name.to_str()?.strip_suffix(".conf")?;
            digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
        })
        .collect()
}

fn write_error(path: &Path, source: io::Error) -> StartError {
    StartError::Write { path: path.to_owned(), source }
}

fn make_dir(dir: &Path) -> Result<(), StartError> {
    fs::create_dir_all(dir).map_err(|e| write_error(dir, e))
}

fn check_root(root: &Path) -> Result<PathBuf, StartError> {
    let bad = || StartError::BadRoot(root.to_owned());
    make_dir(root)?;
    let root = fs::canonicalize(root).map_err(|e| write_error(root, e))?;
    let text = root.to_str().ok_or_else(bad)?;
    let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"./_-".contains(&b));
    if plain && text.len() <= 70 { Ok(root) } else { Err(bad()) }
}

fn check_name(name: &str) -> Result<(), StartError> {
    let valid = !name.is_empty()
        && name.len() <= 63
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && !name.starts_with('-');
    if valid { Ok(()) } else { Err(StartError::BadName(name.to_owned())) }
}

/// Reads the secret of a token from its file, or makes both.
fn secret(path: &Path, id: &str) -> Result<String, StartError> {
    if let Ok(text) = fs::read_to_string(path) {
        let secret = text.trim().strip_prefix(id).and_then(|t| t.strip_prefix('='));
        return secret.map(str::to_owned).ok_or_else(|| StartError::BadToken(path.to_owned()));
    }
    let secret = uuid();
    write_file(path, &format!("{id}={secret}\n"), 0o600)?;
    Ok(secret)
}

/// A random UUID.
fn uuid() -> String {
    let mut bytes: [u8; 16] = rand::random();
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex = conf::hex(&bytes);
    let parts = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
    parts.join("-")
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

/// Writes what stands for `/usr/share/lxc`: the system's files with Proxmox VE's hooks added, so
/// that liblxc itself decides whether an include of the CT has cleared them.
fn write_share(paths: &Paths, profile: &Profile) -> Result<(), StartError> {
    let config = paths.share.join("config");
    let hooks = paths.share.join("hooks");
    make_dir(&config)?;
    make_dir(&hooks)?;
    for name in ["common.conf", "userns.conf"] {
        let system = Path::new(SYSTEM_LXC_CONFIG).join(name);
        let mut text = String::new();
        if system.exists() {
            text.push_str(&format!("lxc.include = {}\n", system.display()));
        }
        if name == "common.conf" {
            for hook in ["pre-start", "post-stop"] {
                text.push_str(&format!("lxc.hook.{hook} = {}\n", hooks.join(hook).display()));
            }
        }
        write_file(&config.join(name), &text, 0o644)?;
    }
    let pause = |step: Step| match profile.step(step).as_secs_f64() {
        0.0 => ":".to_owned(),
        seconds => format!("sleep {seconds:.3}"),
    };
    let pre_start = format!(
        "#!/bin/sh\n\
         # Mounts the CT's rootfs, as Proxmox VE's hook of this name does.\n\
         # Only directories are known; other kinds of rootfs are left alone.\n\
         {pause}\n\
         line=$(sed -n '/^\\[/q; s/^rootfs: *//p' '{confs}'/\"$LXC_NAME\".conf) || exit 1\n\
         source=${{line%%,*}}\n\
         source=${{source#volume=}}\n\
         case $source in /*) ;; *) exit 0 ;; esac\n\
         [ -d \"$source\" ] || exit 2\n\
         target='{lxc}'/\"$LXC_NAME\"/rootfs\n\
         mount --bind \"$source\" \"$target\" || exit 2\n\
         case ,$line, in *,ro=1,*) mount -o remount,bind,ro \"$target\" || exit 2 ;; esac\n",
        pause = pause(Step::HookPreStart),
        confs = paths.confs.display(),
        lxc = paths.lxc.display(),
    );
    let post_stop = format!(
        "#!/bin/sh\n\
         # Asks for a restart if the CT rebooted itself, as Proxmox VE's hook of this name does.\n\
         {pause}\n\
         [ \"$LXC_TARGET\" != reboot ] || {{ : >'{lxc}'/\"$LXC_NAME\"/reboot; exit 1; }}\n",
        pause = pause(Step::HookPostStop),
        lxc = paths.lxc.display(),
    );
    write_file(&hooks.join("pre-start"), &pre_start, 0o755)?;
    write_file(&hooks.join("post-stop"), &post_stop, 0o755)
}

fn host(paths: &Paths, cgroups: &Cgroups) -> Host {
    let config_dir = paths.share.join("config");
    let files = fs::read_dir(&config_dir).into_iter().flatten().flatten();
    let controllers = cgroups.v2_controllers();
    let has = |name: &str| controllers.iter().any(|c| c == name);
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    Host {
        lxc_path: paths.lxc.clone(),
        config_files: files.filter_map(|f| f.file_name().into_string().ok()).collect(),
        config_dir,
        memory: has("memory"),
        cpu: has("cpu"),
        cpus: if has("cpuset") { (0..cpus).collect() } else { Vec::new() },
        bridge_mtu: |bridge| {
            let plain = !bridge.contains('/') && !bridge.starts_with('.');
            let path = Path::new("/sys/class/net").join(bridge).join("mtu");
            plain.then(|| fs::read_to_string(path).ok()?.trim().parse().ok()).flatten()
        },
        device: |path| {
            let meta = fs::metadata(path).ok()?;
            let block = meta.mode() & libc::S_IFMT == libc::S_IFBLK;
            let character = meta.mode() & libc::S_IFMT == libc::S_IFCHR;
            (block || character)
                .then(|| (block, libc::major(meta.rdev()), libc::minor(meta.rdev())))
        },
    }
}
