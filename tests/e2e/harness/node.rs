//! A private containerd, its simulator and its image: everything below one temporary directory,
//! nothing shared with the host's own containerd or LXC.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use super::events::Events;
use super::image;
use super::process::{self, Output, Running};
use super::pve::Pve;
use super::{grpc, sys};

use containerd_client::services::v1::tasks_client::TasksClient;
use containerd_client::tonic::transport::Channel;
use containerd_client::tonic::{Request, Response, Status};
use containerd_client::with_namespace;

/// What the environment chooses.
#[derive(Debug, Clone)]
pub struct Setting {
    /// `E2E_RUNTIME`: the runtime under test.
    pub runtime: String,
    /// `E2E_CONTAINERD`: a directory with `containerd` and `ctr`; otherwise those of `PATH`.
    pub containerd: Option<PathBuf>,
    /// `E2E_BIN`: the directory with the shim, init and simulator.
    pub bin: PathBuf,
    /// `E2E_UNITS`: who runs the simulated node's containers, `simulator`, or `systemd` on a machine that
    /// serves nothing else.
    pub units: String,
    /// `E2E_ROOT`: the directory for temporary directories; it must be short, for socket paths.
    pub root: PathBuf,
    /// `E2E_LOGS`: where the logs of a failed run are kept.
    pub logs: PathBuf,
    /// `E2E_ONLY`: words of which one must be in a test's name, if there are any.
    pub only: Vec<String>,
    /// `E2E_VMIDS`: the VMIDs all nodes of this run may use.
    pub vmids: (u32, u32),
}

impl Setting {
    pub fn from_environment() -> Setting {
        let path = |name: &str| {
            std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
        };
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("target");
        // `cargo test` builds the shim next to the test; the other binaries come from `make build`.
        let bin = path("E2E_BIN").unwrap_or_else(|| {
            let release = target.join("release");
            if release.join("pve-sim").exists() { release } else { target.join("debug") }
        });
        let vmids = std::env::var("E2E_VMIDS").unwrap_or_else(|_| "74000-74999".to_owned());
        let vmids = vmids
            .split_once('-')
            .and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)))
            .expect("E2E_VMIDS must be FIRST-LAST");
        Setting {
            runtime: std::env::var("E2E_RUNTIME")
                .unwrap_or_else(|_| "io.containerd.proxmox.v2".to_owned()),
            containerd: path("E2E_CONTAINERD"),
            bin,
            units: std::env::var("E2E_UNITS").unwrap_or_else(|_| "simulator".to_owned()),
            root: path("E2E_ROOT").unwrap_or_else(|| PathBuf::from("/tmp")),
            logs: path("E2E_LOGS").unwrap_or_else(|| target.join("e2e-logs")),
            only: std::env::var("E2E_ONLY")
                .unwrap_or_default()
                .split_whitespace()
                .map(str::to_owned)
                .collect(),
            vmids,
        }
    }

    /// Is it this project's shim?
    pub fn is_proxmox(&self) -> bool {
        self.runtime == "io.containerd.proxmox.v2"
    }

    /// PATH of everything that is started: our binaries, the chosen containerd, the system.
    pub fn path(&self) -> String {
        let mut parts = vec![self.bin.display().to_string()];
        parts.extend(self.containerd.iter().map(|d| d.display().to_string()));
        parts.push(std::env::var("PATH").unwrap_or_default());
        parts.push("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned());
        parts.join(":")
    }

    /// A program found in [`Setting::path`].
    pub fn program(&self, name: &str) -> PathBuf {
        self.path()
            .split(':')
            .map(|directory| Path::new(directory).join(name))
            .find(|candidate| candidate.exists())
            .unwrap_or_else(|| panic!("{name} is not in {}", self.path()))
    }

    /// containerd's version.
    pub fn version(&self) -> (u32, u32) {
        let mut command = Command::new(self.program("containerd"));
        let text = process::run(command.arg("--version")).ok().text();
        // "containerd REPOSITORY 1.7.24 COMMIT", with a letter before the number in some builds.
        let version = text.split_whitespace().nth(2).unwrap_or_default().trim_start_matches('v');
        let mut numbers = version.split('.').map(|number| number.parse());
        match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => (major, minor),
            _ => panic!("containerd's version: {text:?}"),
        }
    }

    /// The shim's binary by containerd's rule: `io.containerd.NAME.vN` is
    /// `containerd-shim-NAME-vN`.
    pub fn shim_binary(&self, runtime: &str) -> PathBuf {
        let mut parts = runtime.rsplit('.');
        let (version, name) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""));
        self.program(&format!("containerd-shim-{name}-{version}"))
    }
}

/// How a node differs from the usual one.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The kernel pretends not to know `PIDFD_GET_INFO`.
    pub without_pidfd_info: bool,
    /// The simulator's `--profile`; `instant` if empty.
    pub profile: String,
    /// Lines appended to the shim's configuration.
    pub shim_config: String,
    /// Serves CRI, with this sandboxer.
    pub cri: Option<&'static str>,
    /// CRI's runtime has no options.
    pub cri_without_options: bool,
}

/// A running containerd with all that belongs to it.
pub struct Node {
    pub setting: Setting,
    pub root: PathBuf,
    /// The containerd namespace; unique on the machine, because cgroup paths contain it.
    pub namespace: String,
    /// Unique on the machine too, for what is not named after the namespace.
    pub tag: String,
    pub events: Events,
    pub vmids: (u32, u32),
    pve: OnceLock<Mutex<Pve>>,
    options: Options,
    daemons: Mutex<Daemons>,
    stopped: Mutex<bool>,
    /// Directories of the host that did not exist before.
    created: Vec<PathBuf>,
}

#[derive(Default)]
struct Daemons {
    containerd: Option<Child>,
    events: Option<Child>,
}

/// VMIDs per node: enough for 32 containers at once beside others.
const VMIDS_PER_NODE: u32 = 100;

/// Which slices of the VMID range are in use.
static SLICES: Mutex<Vec<bool>> = Mutex::new(Vec::new());

/// Counts all nodes of this process.
static NODES: AtomicU32 = AtomicU32::new(0);

/// All nodes that were started, for the clean-up after a signal.
static STARTED: Mutex<Vec<Weak<Node>>> = Mutex::new(Vec::new());

fn take_slice(range: (u32, u32)) -> (u32, u32) {
    let mut slices = SLICES.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    slices.resize(((range.1 - range.0 + 1) / VMIDS_PER_NODE) as usize, false);
    let free = slices.iter().position(|used| !used).expect("E2E_VMIDS is too small");
    slices[free] = true;
    let first = range.0 + free as u32 * VMIDS_PER_NODE;
    (first, first + VMIDS_PER_NODE - 1)
}

/// Tears down every node of this process, which is about to end.
pub fn tear_down_all() {
    process::start_no_more();
    let nodes = STARTED.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
    let nodes: Vec<_> = nodes.iter().filter_map(Weak::upgrade).collect();
    for node in &nodes {
        node.tear_down(false);
    }
    for node in &nodes {
        // A node that was just being made may have written a file meanwhile.
        let _ = fs::remove_dir_all(&node.root);
    }
}

impl Node {
    pub fn start(setting: &Setting, options: Options) -> Arc<Node> {
        let number = NODES.fetch_add(1, Ordering::Relaxed);
        let tag = format!("e2e-{}-{number}", std::process::id());
        let root = setting.root.join(&tag);
        let vmids = take_slice(setting.vmids);
        let created = ["/run/containerd/s", "/run/containerd/fifo", "/run/containerd"]
            .iter()
            .map(PathBuf::from)
            .filter(|path| !path.exists())
            .collect();
        fs::create_dir_all(&root).expect("create the temporary directory");
        // Every user must reach it, which is not so in a source tree below /root.
        let init = setting.bin.join("proxmox-shim-init");
        fs::copy(&init, root.join("proxmox-shim-init")).expect("copy init");
        let node = Arc::new(Node {
            setting: setting.clone(),
            root,
            // CRI's own is fixed.
            namespace: if options.cri.is_some() { "k8s.io".to_owned() } else { tag.clone() },
            tag,
            events: Events::default(),
            vmids,
            pve: OnceLock::new(),
            options,
            daemons: Mutex::default(),
            stopped: Mutex::new(false),
            created,
        });
        // First of all: a signal may come while the rest is under way.
        STARTED.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(Arc::downgrade(&node));
        image::write(&node.root, &node.root.join("image.tar"), &node.root.join("rootfs"));
        node.write_containerd_config();
        if setting.is_proxmox() {
            let profile =
                if node.options.profile.is_empty() { "instant" } else { &node.options.profile };
            let limited = node.options.without_pidfd_info;
            let pve =
                Pve::start(&setting.program("pve-sim"), &node.root.join("sim"), profile, |c| {
                    c.env("PATH", setting.path()).args(["--units", &setting.units]);
                    if limited {
                        sys::without_pidfd_info(c);
                    }
                });
            let _ = node.pve.set(Mutex::new(pve));
            let text = node.shim_config_text() + &node.options.shim_config;
            fs::write(node.shim_config(), text).expect("write the shim's configuration");
        }
        node.start_containerd();
        node.ctr(&["images", "import", &node.root.join("image.tar").display().to_string()]).ok();
        if node.options.cri.is_some() {
            let pause = node.root.join("pause.tar");
            image::write_pause(&pause);
            node.ctr(&["images", "import", &pause.display().to_string()]).ok();
        }
        node
    }

    fn path_text(&self, name: &str) -> String {
        self.root.join(name).display().to_string()
    }

    pub fn socket(&self) -> PathBuf {
        self.root.join("c.sock")
    }

    pub fn shim_config(&self) -> PathBuf {
        self.root.join("shim.toml")
    }

    pub fn run_dir(&self) -> PathBuf {
        self.root.join("run")
    }

    pub fn cri_without_options(&self) -> bool {
        self.options.cri_without_options
    }

    /// containerd's bundle of a container.
    pub fn bundle(&self, id: &str) -> PathBuf {
        self.root.join("state/io.containerd.runtime.v2.task").join(&self.namespace).join(id)
    }

    /// The administrator's view of Proxmox.
    pub fn pve(&self) -> std::sync::MutexGuard<'_, Pve> {
        let pve = self.pve.get().expect("this test needs the Proxmox runtime");
        // A test that failed while holding the lock leaves nothing half done here.
        pve.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub fn has_pve(&self) -> bool {
        self.pve.get().is_some()
    }

    fn write_containerd_config(&self) {
        if let Some(sandboxer) = self.options.cri {
            let text = super::cri::containerd_config(self, sandboxer);
            fs::write(self.root.join("containerd.toml"), text).expect("write containerd.toml");
            return;
        }
        let root = self.root.display();
        // CRI and NRI listen on fixed places of the host, opt writes to /opt.
        let disabled = [
            "io.containerd.grpc.v1.cri",
            "io.containerd.cri.v1.images",
            "io.containerd.cri.v1.runtime",
            "io.containerd.nri.v1.nri",
            "io.containerd.internal.v1.opt",
            "io.containerd.snapshotter.v1.aufs",
            "io.containerd.snapshotter.v1.blockfile",
            "io.containerd.snapshotter.v1.btrfs",
            "io.containerd.snapshotter.v1.devmapper",
            "io.containerd.snapshotter.v1.erofs",
            "io.containerd.snapshotter.v1.zfs",
        ];
        let config = format!(
            "version = 2\nroot = \"{root}/root\"\nstate = \"{root}/state\"\n\
             disabled_plugins = {disabled:?}\n\n\
             [grpc]\naddress = \"{root}/c.sock\"\n\n\
             [debug]\naddress = \"{root}/d.sock\"\nlevel = \"debug\"\n"
        );
        fs::write(self.root.join("containerd.toml"), config).expect("write containerd.toml");
    }

    /// The shim's configuration for this node.
    pub fn shim_config_text(&self) -> String {
        let pve = self.pve();
        let root = self.root.display();
        format!(
            "[proxmox]\nconnect_timeout = {}\nendpoint = \"{}\"\nnode = \"{}\"\ntoken_file = \"{}\"\nca_file = \"{}\"\n\
             pmxcfs = \"{}\"\n\n\
             [ct]\nvmid_range = \"{}-{}\"\ntags = [\"containerd\", \"e2e\"]\n\n\
             [paths]\nrun_dir = \"{root}/run\"\nstate_dir = \"{root}/var\"\n\
             init = \"{root}/proxmox-shim-init\"\n\n[log]\nlevel = \"debug\"\n",
            // The default, at this machine's pace.
            process::scaled(Duration::from_secs(5)).as_secs(),
            pve.get("endpoint"),
            pve.node(),
            pve.get("token_file"),
            pve.get("ca_file"),
            pve.get("pmxcfs"),
            self.vmids.0,
            self.vmids.1,
        )
    }

    /// Starts containerd and the event subscription; used again after [`Node::stop_containerd`].
    pub fn start_containerd(&self) {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.root.join("containerd.log"))
            .expect("open containerd's log");
        let mut command = Command::new(self.setting.program("containerd"));
        command.arg("--config").arg(self.root.join("containerd.toml"));
        let path = format!("{}:{}", self.path_text("bin"), self.setting.path());
        command.env("PATH", path).current_dir(&self.root).process_group(0);
        // A test may depend on these only if it sets them itself.
        for variable in ["CONTAINERD_NAMESPACE", "CONTAINERD_ADDRESS", "NOTIFY_SOCKET"] {
            command.env_remove(variable);
        }
        sys::as_a_service(&mut command);
        command.stdin(Stdio::null());
        command.stdout(log.try_clone().expect("clone the log")).stderr(log);
        if self.options.without_pidfd_info {
            sys::without_pidfd_info(&mut command);
        }
        let child = command.spawn().expect("cannot run containerd");
        self.lock_daemons().containerd = Some(child);
        process::eventually("containerd answers", Duration::from_secs(30), || {
            assert!(!process::is_ending(), "the run was asked to end");
            let ended = self.lock_daemons().containerd.as_mut().map(Child::try_wait);
            if let Some(Ok(Some(status))) = ended {
                let log = fs::read_to_string(self.root.join("containerd.log")).unwrap_or_default();
                let tail: Vec<_> = log.lines().rev().take(5).collect();
                panic!("containerd ended at once: {status}: {tail:?}");
            }
            (self.socket().exists() && self.ctr(&["version"]).code == 0).then_some(())
        });
        let events = self.events.follow(self.ctr_command().arg("events"));
        self.lock_daemons().events = Some(events);
        // The subscription is there once an event that we cause arrives.
        let mut tries = 0;
        process::eventually("ctr events is subscribed", Duration::from_secs(20), || {
            tries += 1;
            let mark = format!("subscribed={}-{tries}", std::process::id());
            self.ctr(&["namespaces", "label", &self.namespace, &mark]);
            self.ctr(&["namespaces", "create", &self.namespace, &mark]);
            self.events
                .find(Duration::from_millis(100), |e| {
                    e.topic.starts_with("/namespaces/")
                        && e.body["labels"]["subscribed"].as_str()
                            == mark.split_once('=').map(|(_, v)| v)
                })
                .map(|_| ())
        });
    }

    fn lock_daemons(&self) -> std::sync::MutexGuard<'_, Daemons> {
        self.daemons.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Stops containerd with a signal; shims and containers stay.
    pub fn stop_containerd(&self, signal: i32) {
        let (containerd, events) = {
            let mut daemons = self.lock_daemons();
            (daemons.containerd.take(), daemons.events.take())
        };
        if let Some(mut child) = containerd {
            sys::kill(child.id(), signal);
            if process::wait_child(&mut child, Duration::from_secs(15)).is_none() {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
        if let Some(mut child) = events {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// `ctr` with this node's address and namespace.
    pub fn ctr_command(&self) -> Command {
        let mut command = Command::new(self.setting.program("ctr"));
        command.arg("--address").arg(self.socket()).args(["--namespace", &self.namespace]);
        command.env("PATH", self.setting.path()).env_remove("CONTAINERD_NAMESPACE");
        command
    }

    #[track_caller]
    pub fn ctr(&self, arguments: &[&str]) -> Output {
        Running::spawn(self.ctr_command().args(arguments), None).wait()
    }

    /// The flags that select the runtime under test for `ctr run` and `ctr containers create`.
    pub fn runtime_flags(&self) -> Vec<String> {
        self.flags_for(&self.setting.runtime)
    }

    /// The same for any runtime.
    pub fn flags_for(&self, runtime: &str) -> Vec<String> {
        let mut flags = vec!["--runtime".to_owned(), runtime.to_owned()];
        if runtime.contains("runc") {
            flags.extend(["--runc-root".to_owned(), self.path_text("runc")]);
        } else {
            flags.extend(["--runtime-config-path".to_owned(), self.path_text("shim.toml")]);
        }
        flags
    }

    /// One call of containerd's Tasks service.
    pub fn tasks<M, T>(
        &self,
        message: M,
        call: impl AsyncFnOnce(TasksClient<Channel>, Request<M>) -> Result<Response<T>, Status>,
    ) -> Result<T, grpc::Failure> {
        let request = with_namespace!(message, self.namespace);
        grpc::call(&self.socket(), async |channel| call(TasksClient::new(channel), request).await)
    }

    /// The pids of shims of this node; `id` narrows to one container.
    pub fn shims(&self, id: &str) -> Vec<u32> {
        let root = format!("{}/", self.root.display());
        process::processes()
            .into_iter()
            .filter(|(_, line)| {
                let mut words = line.split(' ');
                words.next().is_some_and(|program| program.contains("containerd-shim-"))
                    && line.contains(&root)
                    && (id.is_empty() || words.any(|word| word == id))
            })
            .map(|(pid, _)| pid)
            .collect()
    }

    /// Everything that still exists of containers whose id begins with `prefix`; empty if all is
    /// clean. An empty prefix means any container of this node.
    pub fn remains(&self, prefix: &str, ids: &[String]) -> Vec<String> {
        let mut found = Vec::new();
        let mut note = |what: &str, detail: &str| found.push(format!("{what} {detail}"));
        for (what, arguments) in [
            ("container", &["containers", "ls", "-q"][..]),
            ("task", &["tasks", "ls", "-q"]),
            ("snapshot", &["snapshots", "ls"]),
        ] {
            for line in self.ctr(arguments).text().lines() {
                let name = line.split_whitespace().next().unwrap_or_default();
                if !name.starts_with("sha256:") && name != "KEY" && name.starts_with(prefix) {
                    note(what, name);
                }
            }
        }
        for directory in [self.run_dir().join(&self.namespace), self.bundle("")] {
            for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
                if entry.file_name().to_string_lossy().starts_with(prefix) {
                    note("directory", &entry.path().display().to_string());
                }
            }
        }
        let root = format!("{}/", self.root.display());
        let mine = format!("/{}/{prefix}", self.namespace);
        for line in fs::read_to_string("/proc/self/mountinfo").unwrap_or_default().lines() {
            let target = line.split(' ').nth(4).unwrap_or_default();
            if target.starts_with(&root) && target.contains(&mine) {
                note("mount", target);
            }
        }
        for (pid, line) in process::processes() {
            let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
            let is_shim = line.contains("containerd-shim-")
                && line.contains(&root)
                && line.split(' ').any(|word| word.starts_with(prefix));
            let is_hook = line.contains("proxmox-shim-init hook ") && line.contains(&mine);
            if (is_shim || is_hook || cgroup.contains(&mine)) && process::is_alive(pid) {
                note("process", &format!("{pid} {line}"));
            }
        }
        for directory in process::cgroup_directories(&self.namespace) {
            let text = directory.display().to_string();
            if text.contains(&mine) {
                note("cgroup", &text);
            }
        }
        for id in ids {
            for socket in self.shim_sockets(id) {
                if socket.exists() {
                    note("socket", &socket.display().to_string());
                }
            }
        }
        if self.has_pve() {
            let (configurations, lxc_path) = {
                let pve = self.pve();
                (pve.configurations(), pve.lxc_path())
            };
            for (vmid, text) in configurations {
                let ours = (self.vmids.0..=self.vmids.1).contains(&vmid);
                if ours && text.contains(prefix) {
                    note("CT", &vmid.to_string());
                }
            }
            for entry in fs::read_dir(lxc_path).into_iter().flatten().flatten() {
                let config = fs::read_to_string(entry.path().join("config")).unwrap_or_default();
                if config.contains(&mine) {
                    note("LXC directory", &entry.path().display().to_string());
                }
            }
            if prefix.is_empty() {
                for directory in self.ct_cgroups() {
                    note("cgroup", &directory.display().to_string());
                }
            }
        }
        found
    }

    /// The cgroups that LXC itself names after VMIDs of this node.
    fn ct_cgroups(&self) -> Vec<PathBuf> {
        ["lxc", "lxc.monitor", "lxc.pivot"]
            .iter()
            .flat_map(|parent| process::cgroup_directories(parent))
            .filter(|path| {
                path.components().any(|part| {
                    part.as_os_str()
                        .to_str()
                        .and_then(|name| name.parse::<u32>().ok())
                        .is_some_and(|vmid| (self.vmids.0..=self.vmids.1).contains(&vmid))
                })
            })
            .collect()
    }

    /// Where a shim of this container may have its socket (containerd's SocketAddress).
    pub fn shim_sockets(&self, id: &str) -> Vec<PathBuf> {
        use sha2::{Digest, Sha256};
        let text = format!("{}/{}/{id}", self.socket().display(), self.namespace);
        let name: String =
            Sha256::digest(text.as_bytes()).iter().map(|b| format!("{b:02x}")).collect();
        vec![Path::new("/run/containerd/s").join(&name), self.root.join("state/s").join(&name)]
    }

    /// Stops and removes everything, whatever state it is in. Safe to call twice and from another
    /// thread.
    pub fn tear_down(&self, keep_logs: bool) {
        let mut stopped = self.stopped.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if std::mem::replace(&mut *stopped, true) {
            return;
        }
        if keep_logs {
            self.save_logs();
        }
        self.kill_clients();
        self.kill_workloads();
        self.stop_containerd(libc::SIGTERM);
        for pid in self.shims("") {
            sys::kill(pid, libc::SIGKILL);
        }
        for id in self.bundles() {
            for socket in self.shim_sockets(&id) {
                let _ = fs::remove_file(socket);
            }
        }
        if let Some(pve) = self.pve.get() {
            pve.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).stop();
        }
        self.kill_workloads();
        self.unmount();
        let mut groups = process::cgroup_directories(&self.tag);
        groups.extend(self.ct_cgroups());
        for directory in groups {
            for _ in 0..50 {
                if !directory.exists() || fs::remove_dir(&directory).is_ok() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        if std::env::var_os("E2E_KEEP").is_none() {
            let _ = fs::remove_dir_all(&self.root);
        }
        let slice = (self.vmids.0 - self.setting.vmids.0) / VMIDS_PER_NODE;
        SLICES.lock().unwrap_or_else(|poisoned| poisoned.into_inner())[slice as usize] = false;
        for directory in &self.created {
            // Only if nobody else has put something there meanwhile.
            let _ = fs::remove_dir(directory);
        }
    }

    /// The containers that have a bundle.
    fn bundles(&self) -> Vec<String> {
        let entries = fs::read_dir(self.bundle("")).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }

    /// After a signal, tests that are cut short leave their `ctr` running.
    fn kill_clients(&self) {
        let socket = self.socket().display().to_string();
        let own = std::process::id().to_string();
        for (pid, line) in process::processes() {
            let is_client = line.split(' ').any(|word| word == socket);
            if is_client && process::status_field(pid, "PPid").as_deref() == Some(own.as_str()) {
                sys::kill(pid, libc::SIGKILL);
            }
        }
    }

    fn kill_workloads(&self) {
        for directory in process::cgroup_directories(&self.tag) {
            // A frozen process dies only when it is thawed. Each file is of one cgroup version.
            let _ = write_existing(&directory.join("freezer.state"), "THAWED");
            let _ = write_existing(&directory.join("cgroup.freeze"), "0");
        }
        for pid in self.workloads() {
            sys::kill(pid, libc::SIGKILL);
        }
    }

    /// Processes inside cgroups of this node's containers.
    fn workloads(&self) -> Vec<u32> {
        let mine = format!("/{}/", self.tag);
        process::processes()
            .into_iter()
            .map(|(pid, _)| pid)
            .filter(|pid| {
                fs::read_to_string(format!("/proc/{pid}/cgroup"))
                    .is_ok_and(|groups| groups.contains(&mine))
            })
            .collect()
    }

    fn unmount(&self) {
        let root = format!("{}/", self.root.display());
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let targets = table.lines().filter_map(|line| line.split(' ').nth(4));
        let mut targets: Vec<_> = targets.filter(|target| target.starts_with(&root)).collect();
        targets.reverse();
        for target in targets {
            sys::detach(Path::new(target));
        }
    }

    fn save_logs(&self) {
        let target = self.setting.logs.join(&self.tag);
        let _ = fs::create_dir_all(&target);
        for name in ["containerd.log", "sim.log", "shim.toml", "containerd.toml"] {
            let _ = fs::copy(self.root.join(name), target.join(name));
        }
        for (from, to) in [("run", "run"), ("sim/log", "sim-log"), ("sim/pve", "sim-pve")] {
            copy_files(&self.root.join(from), &target.join(to));
        }
        eprintln!("logs of this run: {}", target.display());
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.tear_down(false);
    }
}

/// Copies regular files only: run directories hold sockets too.
fn copy_files(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).into_iter().flatten().flatten() {
        let target = to.join(entry.file_name());
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => copy_files(&entry.path(), &target),
            Ok(kind) if kind.is_file() => {
                let _ = fs::create_dir_all(to);
                let _ = fs::copy(entry.path(), target);
            }
            _ => {}
        }
    }
}

fn write_existing(path: &Path, text: &str) -> std::io::Result<()> {
    use std::io::Write;
    fs::OpenOptions::new().write(true).open(path)?.write_all(text.as_bytes())
}
