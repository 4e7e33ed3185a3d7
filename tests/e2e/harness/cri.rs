//! containerd's CRI plugin and a client of it, in place of the kubelet.
//!
//! Source of the field numbers: Kubernetes' `cri-api/pkg/apis/runtime/v1/api.proto`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::grpc::{Failure, Message, find, number_in, strings_in};
use super::image::{IMAGE, PAUSE_IMAGE};
use super::node::Node;

/// Namespace modes.
pub const POD: u64 = 0;
pub const CONTAINER: u64 = 1;
pub const NODE: u64 = 2;
pub const TARGET: u64 = 3;

/// The configuration of a containerd that serves CRI: the shipped file, and what belongs to this node.
pub fn containerd_config(node: &Node, sandboxer: &str) -> String {
    let root = node.root.display();
    let (major, _) = node.setting.version();
    let shipped = shipped(&format!("containerd-{}.toml", major.min(2)));
    // What is offered as a comment must work too.
    let mut runtime = String::new();
    for line in shipped.lines() {
        let line = match line.trim_start().strip_prefix('#') {
            Some(option) if option.starts_with('[') && sandboxer != "shim" => option,
            Some(option) if option.starts_with("ConfigPath") && sandboxer != "shim" => {
                &format!("ConfigPath = \"{}\"", node.shim_config().display())
            }
            Some(option) if option.starts_with("sandboxer") && sandboxer == "shim" => option,
            _ if line.starts_with("version") => "",
            _ => line,
        };
        runtime.push_str(line);
        runtime.push('\n');
    }
    if sandboxer == "shim" {
        write_wrapper(node);
    }
    let cni = write_cni_config(node);
    let (cri, images) = match major {
        1 => {
            let cri = "plugins.\"io.containerd.grpc.v1.cri\"";
            let images = format!(
                "[{cri}]\nsandbox_image = \"{PAUSE_IMAGE}\"\nstream_server_address = \"127.0.0.1\"\n\
                 stream_server_port = \"0\"\ndisable_tcp_service = true\n"
            );
            (cri, images)
        }
        _ => {
            let images = format!(
                "[plugins.'io.containerd.cri.v1.images'.pinned_images]\nsandbox = '{PAUSE_IMAGE}'\n\
                 [plugins.'io.containerd.grpc.v1.cri']\nstream_server_address = '127.0.0.1'\n\
                 stream_server_port = '0'\ndisable_tcp_service = true\n\
                 [plugins.'io.containerd.cri.v1.runtime']\n"
            );
            ("plugins.'io.containerd.cri.v1.runtime'", images)
        }
    };
    let version = if major == 1 { 2 } else { 3 };
    let disabled = [
        "io.containerd.internal.v1.opt",
        "io.containerd.snapshotter.v1.aufs",
        "io.containerd.snapshotter.v1.blockfile",
        "io.containerd.snapshotter.v1.btrfs",
        "io.containerd.snapshotter.v1.devmapper",
        "io.containerd.snapshotter.v1.erofs",
        "io.containerd.snapshotter.v1.zfs",
    ];
    format!(
        "version = {version}\nroot = \"{root}/root\"\nstate = \"{root}/state\"\n\
         disabled_plugins = {disabled:?}\n\n\
         [grpc]\naddress = \"{root}/c.sock\"\n\n\
         [debug]\naddress = \"{root}/d.sock\"\nlevel = \"debug\"\n\n\
         [plugins.\"io.containerd.nri.v1.nri\"]\ndisable = true\n\n\
         {images}restrict_oom_score_adj = true\nnetns_mounts_under_state_dir = true\n\
         enable_unprivileged_ports = true\n\
         [{cri}.cni]\nbin_dir = \"/usr/lib/cni\"\nconf_dir = \"{cni}\"\n\n{runtime}"
    )
}

/// With this sandboxer, containerd 2.1 takes the options of any runtime for runc's and fails to create
/// containers, so there can be none. Instead of a configuration in `/etc`, which belongs to the host, a
/// program of the shim's name hands them to it.
fn write_wrapper(node: &Node) {
    let directory = node.root.join("bin");
    fs::create_dir_all(&directory).expect("create a directory");
    let config = node.shim_config().display().to_string();
    let options = Message::new()
        .bytes(1, "runtimeoptions.v1.Options")
        .bytes(2, Message::new().bytes(2, config).encode());
    let file = directory.join("options.pb");
    fs::write(&file, options.encode()).expect("write the options");
    let shim = node.setting.shim_binary(&node.setting.runtime);
    let script = format!(
        "#!/bin/sh\nfor last; do :; done\ntest \"$last\" = start && exec {shim} \"$@\" < {file}\n\
         exec {shim} \"$@\"\n",
        shim = shim.display(),
        file = file.display(),
    );
    let wrapper = directory.join(shim.file_name().expect("it has a name"));
    fs::write(&wrapper, script).expect("write the wrapper");
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).expect("make it executable");
}

fn write_cni_config(node: &Node) -> String {
    let directory = node.root.join("cni");
    fs::create_dir_all(&directory).expect("create CNI's directory");
    let config = serde_json::json!({
        "cniVersion": "0.4.0",
        "name": "e2e",
        "plugins": [
            {
                "type": "bridge",
                "bridge": bridge(node),
                "isGateway": true,
                "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "dataDir": node.root.join("cni-data"),
                    "ranges": [[{"subnet": subnet(node)}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    });
    fs::write(directory.join("10-e2e.conflist"), config.to_string()).expect("write CNI's file");
    directory.display().to_string()
}

/// Several nodes share the network namespace of the test process.
fn bridge(node: &Node) -> String {
    format!("e2e{}", node.vmids.0)
}

fn subnet(node: &Node) -> String {
    let number = node.vmids.0 / 100;
    format!("10.{}.{}.0/24", 64 + number / 256 % 64, number % 256)
}

/// A client of one node.
pub struct Cri<'a> {
    pub node: &'a Node,
}

/// What a pod is made of; the rest is as the kubelet has it by default.
#[derive(Clone, Default)]
pub struct Pod {
    pub name: String,
    pub namespaces: [u64; 3],
    pub host_port: Option<(u64, u64)>,
    pub sysctls: Vec<(&'static str, &'static str)>,
    pub privileged: bool,
    pub annotations: Vec<(String, String)>,
    cgroup: String,
    logs: String,
}

impl Pod {
    /// Network, pid and ipc namespaces as Kubernetes has them by default: pid of the containers.
    pub fn new(node: &Node, name: &str) -> Pod {
        let logs = node.root.join("logs").join(name);
        fs::create_dir_all(&logs).expect("create the pod's log directory");
        Pod {
            name: name.to_owned(),
            namespaces: [POD, CONTAINER, POD],
            cgroup: format!("/{}/{name}", node.tag),
            logs: logs.display().to_string(),
            ..Pod::default()
        }
    }

    pub fn logs(&self) -> &str {
        &self.logs
    }

    fn is_on_host_network(&self) -> bool {
        self.namespaces[0] == NODE
    }

    fn options(&self) -> Message {
        let [network, pid, ipc] = self.namespaces;
        Message::new().number(1, network).number(2, pid).number(3, ipc)
    }

    fn config(&self) -> Message {
        let metadata = Message::new()
            .bytes(1, &self.name)
            .bytes(2, format!("uid-{}", self.name))
            .bytes(3, "shop")
            .number(4, 0);
        let mut security = Message::new().message(1, &self.options());
        if self.privileged {
            security = security.number(6, 1);
        }
        let mut linux = Message::new().bytes(1, &self.cgroup).message(2, &security);
        for (key, value) in &self.sysctls {
            linux = linux.message(3, &pair(key, value));
        }
        let mut config = Message::new().message(1, &metadata).bytes(3, &self.logs);
        if !self.is_on_host_network() {
            config = config.bytes(2, &self.name);
        }
        if let Some((container, host)) = self.host_port {
            let port = Message::new().number(2, container).number(3, host);
            config = config.message(5, &port);
        }
        for (key, value) in &self.annotations {
            config = config.message(7, &pair(key, value));
        }
        config.message(8, &linux)
    }
}

/// What a container is made of.
#[derive(Clone, Default)]
pub struct Container {
    pub name: String,
    pub command: Vec<String>,
    /// `(container path, host path, read-only, propagation)`.
    pub mounts: Vec<(String, String, bool, u64)>,
    pub tty: bool,
    pub stdin: bool,
    pub stdin_once: bool,
    pub memory: Option<u64>,
    pub cpu_quota: Option<u64>,
    pub user: Option<(u64, u64)>,
    pub groups: Vec<u64>,
    pub privileged: bool,
    pub read_only: bool,
    pub no_new_privileges: bool,
    pub added: Vec<&'static str>,
    pub dropped: Vec<&'static str>,
    /// The container whose pid namespace it joins.
    pub target: Option<String>,
    /// RuntimeDefault.
    pub seccomp: bool,
}

impl Container {
    pub fn new(name: &str, command: &[&str]) -> Container {
        Container {
            name: name.to_owned(),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            ..Container::default()
        }
    }

    /// A container that only sleeps and dies at once of SIGTERM.
    pub fn idle(name: &str) -> Container {
        let script = "trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done";
        Container::new(name, &["sh", "-c", script])
    }

    fn resources(&self) -> Message {
        let mut resources = Message::new();
        if let Some(quota) = self.cpu_quota {
            resources = resources.number(1, 100_000).number(2, quota);
        }
        if let Some(memory) = self.memory {
            resources = resources.number(4, memory);
        }
        resources
    }

    fn config(&self, pod: &Pod) -> Message {
        let metadata = Message::new().bytes(1, &self.name);
        let mut config =
            Message::new().message(1, &metadata).message(2, &Message::new().bytes(1, IMAGE));
        for word in &self.command {
            config = config.bytes(3, word);
        }
        for (container, host, read_only, propagation) in &self.mounts {
            let mount = Message::new()
                .bytes(1, container)
                .bytes(2, host)
                .number(3, u64::from(*read_only))
                .number(5, *propagation);
            config = config.message(7, &mount);
        }
        config = config.bytes(11, self.log());
        for (field, set) in [(12, self.stdin), (13, self.stdin_once), (14, self.tty)] {
            config = config.number(field, u64::from(set));
        }
        let [network, pid, ipc] = pod.namespaces;
        let mut options = Message::new().number(1, network);
        options = match &self.target {
            Some(target) => options.number(2, TARGET).number(3, ipc).bytes(4, target),
            None => options.number(2, pid).number(3, ipc),
        };
        let mut capabilities = Message::new();
        for name in &self.added {
            capabilities = capabilities.bytes(1, name);
        }
        for name in &self.dropped {
            capabilities = capabilities.bytes(2, name);
        }
        let mut security = Message::new()
            .message(1, &capabilities)
            .number(2, u64::from(self.privileged))
            .message(3, &options)
            .number(7, u64::from(self.read_only))
            .number(11, u64::from(self.no_new_privileges));
        if let Some((uid, gid)) = self.user {
            security = security
                .message(5, &Message::new().number(1, uid))
                .message(12, &Message::new().number(1, gid));
        }
        for group in &self.groups {
            security = security.number(8, *group);
        }
        // 0 is RuntimeDefault, 1 Unconfined.
        security = security.message(15, &Message::new().number(1, u64::from(!self.seccomp)));
        for path in ["/proc/kcore", "/proc/keys"].iter().filter(|_| !self.privileged) {
            security = security.bytes(13, path);
        }
        for path in ["/proc/sys", "/proc/bus"].iter().filter(|_| !self.privileged) {
            security = security.bytes(14, path);
        }
        config.message(15, &Message::new().message(1, &self.resources()).message(2, &security))
    }

    /// The log's name in the pod's directory.
    pub fn log(&self) -> String {
        format!("{}.log", self.name)
    }
}

/// A file of `shim-config/`.
pub fn shipped(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("shim-config").join(name);
    fs::read_to_string(path).unwrap_or_else(|error| panic!("read shim-config/{name}: {error}"))
}

/// What the kubelet would ask for because of the shipped RuntimeClass.
fn handler() -> String {
    let class = shipped("runtimeclass.yaml");
    let handler = class.lines().find_map(|line| line.strip_prefix("handler: "));
    handler.expect("a RuntimeClass has a handler").to_owned()
}

fn pair(key: &str, value: &str) -> Message {
    Message::new().bytes(1, key).bytes(2, value)
}

/// What ContainerStatus says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// 0 created, 1 running, 2 exited, 3 unknown.
    pub state: u64,
    pub exit_code: u64,
    pub reason: String,
    pub message: String,
}

/// The result of ExecSync.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Executed {
    pub stdout: String,
    pub stderr: String,
    pub status: u64,
}

impl Cri<'_> {
    pub fn call(&self, method: &str, message: &Message) -> Result<Vec<u8>, Failure> {
        self.node.grpc(&format!("runtime.v1.RuntimeService/{method}"), message)
    }

    #[track_caller]
    fn ok(&self, method: &str, message: &Message) -> Vec<u8> {
        self.call(method, message).unwrap_or_else(|failure| panic!("{method}: {failure:?}"))
    }

    pub fn try_run_pod(&self, pod: &Pod) -> Result<String, Failure> {
        let request = Message::new().message(1, &pod.config()).bytes(2, handler());
        self.call("RunPodSandbox", &request).map(|reply| text(&reply, 1))
    }

    #[track_caller]
    pub fn run_pod(&self, pod: &Pod) -> String {
        self.try_run_pod(pod).unwrap_or_else(|failure| panic!("RunPodSandbox: {failure:?}"))
    }

    pub fn try_create(
        &self,
        id: &str,
        pod: &Pod,
        container: &Container,
    ) -> Result<String, Failure> {
        let request = Message::new()
            .bytes(1, id)
            .message(2, &container.config(pod))
            .message(3, &pod.config());
        self.call("CreateContainer", &request).map(|reply| text(&reply, 1))
    }

    /// Creates and starts a container.
    #[track_caller]
    pub fn run(&self, id: &str, pod: &Pod, container: &Container) -> String {
        let created = self.try_create(id, pod, container);
        let created = created.unwrap_or_else(|failure| panic!("CreateContainer: {failure:?}"));
        self.start(&created);
        created
    }

    #[track_caller]
    pub fn start(&self, id: &str) {
        self.ok("StartContainer", &Message::new().bytes(1, id));
    }

    #[track_caller]
    pub fn stop(&self, id: &str, seconds: u64) {
        self.ok("StopContainer", &Message::new().bytes(1, id).number(2, seconds));
    }

    #[track_caller]
    pub fn remove(&self, id: &str) {
        self.ok("RemoveContainer", &Message::new().bytes(1, id));
    }

    #[track_caller]
    pub fn stop_pod(&self, id: &str) {
        self.ok("StopPodSandbox", &Message::new().bytes(1, id));
    }

    #[track_caller]
    pub fn remove_pod(&self, id: &str) {
        self.stop_pod(id);
        self.ok("RemovePodSandbox", &Message::new().bytes(1, id));
    }

    /// The ids of all pods.
    pub fn pods(&self) -> Vec<String> {
        let reply = self.ok("ListPodSandbox", &Message::new());
        strings_in(&reply, 1).iter().map(|pod| text(pod, 1)).collect()
    }

    #[track_caller]
    pub fn status(&self, id: &str) -> Status {
        let reply = self.ok("ContainerStatus", &Message::new().bytes(1, id));
        let status = find(&reply, &[1]).expect("a status");
        Status {
            state: number_in(&status, 3).unwrap_or(0),
            exit_code: number_in(&status, 7).unwrap_or(0),
            reason: text(&status, 10),
            message: text(&status, 11),
        }
    }

    /// 0 ready, 1 not ready; and the address.
    #[track_caller]
    pub fn pod_status(&self, id: &str) -> (u64, String) {
        let reply = self.ok("PodSandboxStatus", &Message::new().bytes(1, id));
        let state = find(&reply, &[1]).and_then(|status| number_in(&status, 3)).unwrap_or(0);
        let address = find(&reply, &[1, 5, 1]).unwrap_or_default();
        (state, String::from_utf8_lossy(&address).into_owned())
    }

    /// The host's pid of a container or pod sandbox.
    #[track_caller]
    pub fn pid(&self, id: &str) -> u32 {
        let list = self.node.ctr(&["tasks", "ls"]).ok().text();
        list.lines()
            .filter_map(|line| line.strip_prefix(id)?.split_whitespace().next()?.parse().ok())
            .next()
            .unwrap_or_else(|| panic!("{id} has no task: {list}"))
    }

    pub fn try_exec(&self, id: &str, command: &[&str], seconds: u64) -> Result<Executed, Failure> {
        let mut request = Message::new().bytes(1, id);
        for word in command {
            request = request.bytes(2, word);
        }
        self.call("ExecSync", &request.number(3, seconds)).map(|reply| Executed {
            stdout: text(&reply, 1),
            stderr: text(&reply, 2),
            status: number_in(&reply, 3).unwrap_or(0),
        })
    }

    #[track_caller]
    pub fn exec(&self, id: &str, script: &str) -> Executed {
        let result = self.try_exec(id, &["sh", "-c", script], 20);
        result.unwrap_or_else(|failure| panic!("ExecSync: {failure:?}"))
    }

    /// The output of a command that must succeed.
    #[track_caller]
    pub fn output(&self, id: &str, script: &str) -> String {
        let executed = self.exec(id, script);
        assert_eq!(executed.status, 0, "{script}: {executed:?}");
        executed.stdout.trim_end().to_owned()
    }

    #[track_caller]
    pub fn update(&self, id: &str, resources: &Container) {
        self.ok(
            "UpdateContainerResources",
            &Message::new().bytes(1, id).message(2, &resources.resources()),
        );
    }

    #[track_caller]
    pub fn reopen_log(&self, id: &str) {
        self.ok("ReopenContainerLog", &Message::new().bytes(1, id));
    }

    /// Nanoseconds of CPU time, and bytes of the working set.
    #[track_caller]
    pub fn stats(&self, id: &str) -> (u64, u64) {
        figures(&self.ok("ContainerStats", &Message::new().bytes(1, id)), &[1])
    }

    /// The same of a pod.
    #[track_caller]
    pub fn pod_stats(&self, id: &str) -> (u64, u64) {
        let reply = self.ok("PodSandboxStats", &Message::new().bytes(1, id));
        let linux = find(&reply, &[1, 2]).expect("figures of Linux");
        let value = |path: &[u64]| find(&linux, path).and_then(|value| number_in(&value, 1));
        (value(&[1, 2]).unwrap_or(0), value(&[2, 2]).unwrap_or(0))
    }

    /// The URL of a stream.
    #[track_caller]
    pub fn stream(&self, method: &str, request: &Message) -> String {
        text(&self.ok(method, request), 1)
    }
}

fn figures(reply: &[u8], path: &[u64]) -> (u64, u64) {
    let stats = find(reply, path).expect("figures");
    let value = |path: &[u64]| find(&stats, path).and_then(|value| number_in(&value, 1));
    (value(&[2, 2]).unwrap_or(0), value(&[3, 2]).unwrap_or(0))
}

fn text(message: &[u8], field: u64) -> String {
    String::from_utf8_lossy(&find(message, &[field]).unwrap_or_default()).into_owned()
}
