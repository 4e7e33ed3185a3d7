//! containerd's CRI plugin and a client of it, in place of the kubelet.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use containerd_client::tonic::transport::Channel;
use containerd_client::tonic::{Response, Status as GrpcStatus};
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::security_profile::ProfileType;
use k8s_cri::v1::{
    AttachRequest, Capability, CdiDevice, ContainerConfig, ContainerMetadata, ContainerState,
    ContainerStats, ContainerStatsRequest, ContainerStatus, ContainerStatusRequest, CpuUsage,
    CreateContainerRequest, Device, DnsConfig, ExecRequest, ExecSyncRequest, IdMapping, ImageSpec,
    Int64Value, LinuxContainerConfig, LinuxContainerResources, LinuxContainerSecurityContext,
    LinuxPodSandboxConfig, LinuxSandboxSecurityContext, ListContainerStatsRequest,
    ListPodSandboxRequest, ListPodSandboxStatsRequest, MemoryUsage, Mount, MountPropagation,
    NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PodSandboxState,
    PodSandboxStats, PodSandboxStatsRequest, PodSandboxStatusRequest, PortForwardRequest,
    PortMapping, RemoveContainerRequest, RemovePodSandboxRequest, ReopenContainerLogRequest,
    RunPodSandboxRequest, SecurityProfile, StartContainerRequest, StatusRequest,
    StopContainerRequest, StopPodSandboxRequest, SupplementalGroupsPolicy, UInt64Value,
    UpdateContainerResourcesRequest, UserNamespace, VersionRequest,
};
use prost::Message as _;

use super::grpc::{self, Failure, RuntimeOptions};
use super::image::{IMAGE, PAUSE_IMAGE};
use super::node::Node;

/// The size of a pod's user namespace, which is the kubelet's.
pub const IDS: u32 = 65_536;

const PROXMOX_TYPE: &str = "runtime_type = \"io.containerd.proxmox.v2\"";

/// The configuration of a containerd that serves CRI: the shipped file, and what belongs to this node.
pub fn containerd_config(node: &Node, sandboxer: &str) -> String {
    let root = node.root.display();
    let (major, _) = node.setting.version();
    let shipped = shipped(&format!("containerd-{}.toml", major.min(2)));
    // What is offered as a comment must work too.
    let has_options = sandboxer != "shim" && !node.cri_without_options();
    let as_runc = node.cri_without_options() && major > 1 && sandboxer != "shim";
    let mut runtime = String::new();
    for line in shipped.lines() {
        let line = match line.trim_start().strip_prefix('#') {
            Some(option) if option.starts_with('[') && has_options => option,
            Some(option) if option.starts_with("ConfigPath") && has_options => {
                &format!("ConfigPath = \"{}\"", node.shim_config().display())
            }
            Some(option) if option.starts_with("sandboxer") && sandboxer == "shim" => option,
            Some(option) if option.starts_with("runtime_type") && as_runc => option,
            Some(option) if option.starts_with("runtime_path") && as_runc => {
                &format!("runtime_path = \"{}\"", wrapper(node).display())
            }
            _ if line == PROXMOX_TYPE && as_runc => "",
            _ if line.starts_with("version") => "",
            _ => line,
        };
        runtime.push_str(line);
        runtime.push('\n');
    }
    if !has_options {
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
    // From 1.7 on.
    let cdi = match node.setting.version() >= (1, 7) {
        true => format!("enable_cdi = true\ncdi_spec_dirs = [\"{root}/cdi\"]\n"),
        false => String::new(),
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
         enable_unprivileged_ports = true\n{cdi}\
         [{cri}.cni]\nbin_dir = \"/usr/lib/cni\"\nconf_dir = \"{cni}\"\n\n{runtime}"
    )
}

/// With the sandboxer `shim`, and for pods with a user namespace, containerd 2.1 takes the options of any
/// runtime for runc's and fails to create containers, so there can be none. Instead of a configuration in `/etc`, which belongs to the host, a
/// program of the shim's name hands them to it.
fn write_wrapper(node: &Node) {
    let wrapper = wrapper(node);
    let directory = wrapper.parent().expect("it is in a directory");
    fs::create_dir_all(directory).expect("create a directory");
    let config_path = node.shim_config().display().to_string();
    let options = RuntimeOptions { config_path, ..RuntimeOptions::default() };
    let options = prost_types::Any {
        type_url: "runtimeoptions.v1.Options".to_owned(),
        value: options.encode_to_vec(),
    };
    let file = directory.join("options.pb");
    fs::write(&file, options.encode_to_vec()).expect("write the options");
    let shim = node.setting.shim_binary(&node.setting.runtime);
    let script = format!(
        "#!/bin/sh\nfor last; do :; done\ntest \"$last\" = start && exec {shim} \"$@\" < {file}\n\
         exec {shim} \"$@\"\n",
        shim = shim.display(),
        file = file.display(),
    );
    fs::write(&wrapper, script).expect("write the wrapper");
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).expect("make it executable");
}

fn wrapper(node: &Node) -> PathBuf {
    let shim = node.setting.shim_binary(&node.setting.runtime);
    node.root.join("bin").join(shim.file_name().expect("it has a name"))
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

/// What a pod is made of; the rest is as the kubelet has it by default.
#[derive(Clone)]
pub struct Pod {
    pub name: String,
    /// Of network, pid and ipc.
    pub namespaces: [NamespaceMode; 3],
    /// `(container's, host's)`.
    pub host_port: Option<(i32, i32)>,
    pub sysctls: Vec<(&'static str, &'static str)>,
    pub privileged: bool,
    /// `resolv.conf` of its containers, if it is not the node's: name servers, search domains, options.
    pub dns: Option<[Vec<&'static str>; 3]>,
    /// The node's id of its root, if it has a user namespace, of [`IDS`] ids.
    pub users: Option<u32>,
    pub annotations: Vec<(String, String)>,
    pub cgroup: String,
    logs: String,
}

impl Pod {
    /// Network, pid and ipc namespaces as Kubernetes has them by default: pid of the containers.
    pub fn new(node: &Node, name: &str) -> Pod {
        let logs = node.root.join("logs").join(name);
        fs::create_dir_all(&logs).expect("create the pod's log directory");
        Pod {
            name: name.to_owned(),
            namespaces: [NamespaceMode::Pod, NamespaceMode::Container, NamespaceMode::Pod],
            host_port: None,
            sysctls: Vec::new(),
            privileged: false,
            dns: None,
            users: None,
            annotations: Vec::new(),
            cgroup: format!("/{}/{name}", node.tag),
            logs: logs.display().to_string(),
        }
    }

    pub fn logs(&self) -> &str {
        &self.logs
    }

    fn is_on_host_network(&self) -> bool {
        self.namespaces[0] == NamespaceMode::Node
    }

    fn namespace_options(&self) -> NamespaceOption {
        let [network, pid, ipc] = self.namespaces.map(i32::from);
        let userns_options = self.users.map(|_| UserNamespace {
            mode: NamespaceMode::Pod.into(),
            uids: self.id_mappings(),
            gids: self.id_mappings(),
        });
        NamespaceOption { network, pid, ipc, userns_options, ..NamespaceOption::default() }
    }

    fn id_mappings(&self) -> Vec<IdMapping> {
        let mapping = |host_id| IdMapping { host_id, container_id: 0, length: IDS };
        self.users.map(mapping).into_iter().collect()
    }

    fn config(&self) -> PodSandboxConfig {
        let owned = |(key, value): (&str, &str)| (key.to_owned(), value.to_owned());
        let port = |(container_port, host_port)| PortMapping {
            container_port,
            host_port,
            ..PortMapping::default()
        };
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: self.name.clone(),
                uid: format!("uid-{}", self.name),
                namespace: "shop".to_owned(),
                attempt: 0,
            }),
            hostname: if self.is_on_host_network() { String::new() } else { self.name.clone() },
            log_directory: self.logs.clone(),
            dns_config: self.dns.as_ref().map(|[servers, searches, options]| DnsConfig {
                servers: words(servers),
                searches: words(searches),
                options: words(options),
            }),
            port_mappings: self.host_port.into_iter().map(port).collect(),
            annotations: self.annotations.iter().cloned().collect(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: self.cgroup.clone(),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(self.namespace_options()),
                    privileged: self.privileged,
                    ..LinuxSandboxSecurityContext::default()
                }),
                sysctls: self.sysctls.iter().copied().map(owned).collect(),
                ..LinuxPodSandboxConfig::default()
            }),
            ..PodSandboxConfig::default()
        }
    }
}

/// A directory or file of the node in a container.
#[derive(Clone)]
pub struct Volume {
    pub container_path: &'static str,
    pub host_path: String,
    pub read_only: bool,
    pub propagation: MountPropagation,
}

impl Volume {
    /// Writable, and with private propagation.
    pub fn new(container_path: &'static str, host_path: &str) -> Volume {
        Volume {
            container_path,
            host_path: host_path.to_owned(),
            read_only: false,
            propagation: MountPropagation::PropagationPrivate,
        }
    }
}

/// What a container is made of.
#[derive(Clone, Default)]
pub struct Container {
    pub name: String,
    pub command: Vec<String>,
    pub image: Option<String>,
    pub mounts: Vec<Volume>,
    /// Read-only mounts are so with all below them.
    pub recursive_read_only: bool,
    /// `(container path, image)`.
    pub image_volumes: Vec<(&'static str, &'static str)>,
    /// `(container path, host path, permissions)`.
    pub devices: Vec<(&'static str, &'static str, &'static str)>,
    /// Qualified names.
    pub cdi_devices: Vec<&'static str>,
    pub tty: bool,
    pub stdin: bool,
    pub stdin_once: bool,
    pub memory: Option<i64>,
    pub cpu_quota: Option<i64>,
    pub cpu_shares: Option<i64>,
    /// Of processors.
    pub cpuset: &'static str,
    pub user: Option<(i64, i64)>,
    pub groups: Vec<i64>,
    /// Not those that the image gives the user.
    pub strict_groups: bool,
    pub privileged: bool,
    pub read_only: bool,
    pub no_new_privileges: bool,
    pub added: Vec<&'static str>,
    pub dropped: Vec<&'static str>,
    /// The container whose pid namespace it joins.
    pub target: Option<String>,
    /// RuntimeDefault.
    pub seccomp: bool,
    /// Localhost, in the place of `seccomp`.
    pub seccomp_profile: Option<String>,
    /// Unconfined, or a name.
    pub apparmor: Option<&'static str>,
}

impl Container {
    pub fn new(name: &str, command: &[&str]) -> Container {
        Container { name: name.to_owned(), command: words(command), ..Container::default() }
    }

    /// A container that only sleeps and dies at once of SIGTERM.
    pub fn idle(name: &str) -> Container {
        let script = "trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done";
        Container::new(name, &["sh", "-c", script])
    }

    fn resources(&self) -> LinuxContainerResources {
        LinuxContainerResources {
            cpu_period: self.cpu_quota.map_or(0, |_| 100_000),
            cpu_quota: self.cpu_quota.unwrap_or_default(),
            cpu_shares: self.cpu_shares.unwrap_or_default(),
            memory_limit_in_bytes: self.memory.unwrap_or_default(),
            cpuset_cpus: self.cpuset.to_owned(),
            ..LinuxContainerResources::default()
        }
    }

    fn security(&self, pod: &Pod) -> LinuxContainerSecurityContext {
        let mut options = pod.namespace_options();
        if let Some(target) = &self.target {
            options.pid = NamespaceMode::Target.into();
            options.target_id.clone_from(target);
        }
        let unless_privileged =
            |paths: &[&str]| if self.privileged { Vec::new() } else { words(paths) };
        let profile = match &self.seccomp_profile {
            Some(_) => ProfileType::Localhost,
            None if self.seccomp => ProfileType::RuntimeDefault,
            None => ProfileType::Unconfined,
        };
        LinuxContainerSecurityContext {
            capabilities: Some(Capability {
                add_capabilities: words(&self.added),
                drop_capabilities: words(&self.dropped),
                ..Capability::default()
            }),
            privileged: self.privileged,
            namespace_options: Some(options),
            run_as_user: self.user.map(|(uid, _)| Int64Value { value: uid }),
            run_as_group: self.user.map(|(_, gid)| Int64Value { value: gid }),
            readonly_rootfs: self.read_only,
            supplemental_groups: self.groups.clone(),
            supplemental_groups_policy: match self.strict_groups {
                true => SupplementalGroupsPolicy::Strict.into(),
                false => SupplementalGroupsPolicy::Merge.into(),
            },
            no_new_privs: self.no_new_privileges,
            masked_paths: unless_privileged(&["/proc/kcore", "/proc/keys"]),
            readonly_paths: unless_privileged(&["/proc/sys", "/proc/bus"]),
            seccomp: Some(SecurityProfile {
                profile_type: profile.into(),
                localhost_ref: self.seccomp_profile.clone().unwrap_or_default(),
            }),
            apparmor: self.apparmor.map(|profile| match profile {
                "unconfined" => SecurityProfile {
                    profile_type: ProfileType::Unconfined.into(),
                    localhost_ref: String::new(),
                },
                name => SecurityProfile {
                    profile_type: ProfileType::Localhost.into(),
                    localhost_ref: name.to_owned(),
                },
            }),
            ..LinuxContainerSecurityContext::default()
        }
    }

    fn config(&self, pod: &Pod) -> ContainerConfig {
        let mount = |volume: &Volume| Mount {
            container_path: volume.container_path.to_owned(),
            host_path: volume.host_path.clone(),
            readonly: volume.read_only,
            propagation: volume.propagation.into(),
            uid_mappings: pod.id_mappings(),
            gid_mappings: pod.id_mappings(),
            recursive_read_only: volume.read_only && self.recursive_read_only,
            ..Mount::default()
        };
        let image_volume = |(container_path, image): &(&str, &str)| Mount {
            container_path: (*container_path).to_owned(),
            readonly: true,
            image: Some(ImageSpec { image: (*image).to_owned(), ..ImageSpec::default() }),
            ..Mount::default()
        };
        let volumes = self.image_volumes.iter().map(image_volume);
        let device = |(container, host, permissions): &(&str, &str, &str)| Device {
            container_path: (*container).to_owned(),
            host_path: (*host).to_owned(),
            permissions: (*permissions).to_owned(),
        };
        let image = self.image.clone().unwrap_or_else(|| IMAGE.to_owned());
        ContainerConfig {
            metadata: Some(ContainerMetadata { name: self.name.clone(), attempt: 0 }),
            image: Some(ImageSpec { image, ..ImageSpec::default() }),
            command: self.command.clone(),
            mounts: self.mounts.iter().map(mount).chain(volumes).collect(),
            devices: self.devices.iter().map(device).collect(),
            cdi_devices: words(&self.cdi_devices)
                .into_iter()
                .map(|name| CdiDevice { name })
                .collect(),
            log_path: self.log(),
            stdin: self.stdin,
            stdin_once: self.stdin_once,
            tty: self.tty,
            linux: Some(LinuxContainerConfig {
                resources: Some(self.resources()),
                security_context: Some(self.security(pod)),
            }),
            ..ContainerConfig::default()
        }
    }

    /// The log's name in the pod's directory.
    pub fn log(&self) -> String {
        format!("{}.log", self.name)
    }
}

pub fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// A file of `shim-config/`: part of the program, which may run where the source is not.
pub fn shipped(name: &str) -> &'static str {
    macro_rules! files {
        ($($name:literal),* $(,)?) => {
            match name {
                $($name => include_str!(concat!("../../../shim-config/", $name)),)*
                _ => panic!("shim-config/{name} is not among the files that are tested"),
            }
        };
    }
    files!(
        "containerd-1.toml",
        "containerd-2.toml",
        "deployment.yaml",
        "kubernetes.md",
        "pod.yaml",
        "runtimeclass.yaml",
    )
}

/// What the kubelet would ask for because of the shipped RuntimeClass.
fn handler() -> String {
    let class = shipped("runtimeclass.yaml");
    let handler = class.lines().find_map(|line| line.strip_prefix("handler: "));
    handler.expect("a RuntimeClass has a handler").to_owned()
}

/// The result of ExecSync.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Executed {
    pub stdout: String,
    pub stderr: String,
    pub status: i32,
}

/// A service that CRI names by a URL, over a WebSocket.
pub enum Stream {
    Exec(ExecRequest),
    Attach(AttachRequest),
    PortForward(PortForwardRequest),
}

/// A client of one node.
pub struct Cri<'a> {
    pub node: &'a Node,
}

impl Cri<'_> {
    fn call<T>(
        &self,
        call: impl AsyncFnOnce(RuntimeServiceClient<Channel>) -> Result<Response<T>, GrpcStatus>,
    ) -> Result<T, Failure> {
        let socket = self.node.socket();
        grpc::call(&socket, async |channel| call(RuntimeServiceClient::new(channel)).await)
    }

    #[track_caller]
    fn ok<T>(
        &self,
        call: impl AsyncFnOnce(RuntimeServiceClient<Channel>) -> Result<Response<T>, GrpcStatus>,
    ) -> T {
        self.call(call).unwrap_or_else(|failure| panic!("{failure:?}"))
    }

    /// Whether CRI answers.
    pub fn is_up(&self) -> bool {
        self.call(async |mut cri| cri.version(VersionRequest::default()).await).is_ok()
    }

    pub fn try_run_pod(&self, pod: &Pod) -> Result<String, Failure> {
        self.try_run_pod_of(pod, handler())
    }

    /// A pod of another RuntimeClass.
    pub fn try_run_pod_of(&self, pod: &Pod, runtime_handler: String) -> Result<String, Failure> {
        let request = RunPodSandboxRequest { config: Some(pod.config()), runtime_handler };
        let reply = self.call(async |mut cri| cri.run_pod_sandbox(request).await);
        reply.map(|reply| reply.pod_sandbox_id)
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
        let request = CreateContainerRequest {
            pod_sandbox_id: id.to_owned(),
            config: Some(container.config(pod)),
            sandbox_config: Some(pod.config()),
        };
        let reply = self.call(async |mut cri| cri.create_container(request).await);
        reply.map(|reply| reply.container_id)
    }

    /// Creates and starts a container.
    #[track_caller]
    pub fn run(&self, id: &str, pod: &Pod, container: &Container) -> String {
        let created = self.try_create(id, pod, container);
        let created = created.unwrap_or_else(|failure| panic!("CreateContainer: {failure:?}"));
        let started = self.try_start(&created);
        started.unwrap_or_else(|failure| panic!("StartContainer: {failure:?}"));
        created
    }

    pub fn try_start(&self, id: &str) -> Result<(), Failure> {
        let request = StartContainerRequest { container_id: id.to_owned() };
        self.call(async |mut cri| cri.start_container(request).await).map(|_| ())
    }

    #[track_caller]
    pub fn stop(&self, id: &str, seconds: i64) {
        let request = StopContainerRequest { container_id: id.to_owned(), timeout: seconds };
        self.ok(async |mut cri| cri.stop_container(request).await);
    }

    #[track_caller]
    pub fn remove(&self, id: &str) {
        let request = RemoveContainerRequest { container_id: id.to_owned() };
        self.ok(async |mut cri| cri.remove_container(request).await);
    }

    #[track_caller]
    pub fn stop_pod(&self, id: &str) {
        let request = StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.ok(async |mut cri| cri.stop_pod_sandbox(request).await);
    }

    #[track_caller]
    pub fn remove_pod(&self, id: &str) {
        self.stop_pod(id);
        let request = RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.ok(async |mut cri| cri.remove_pod_sandbox(request).await);
    }

    /// The ids of all pods.
    pub fn pods(&self) -> Vec<String> {
        let all = ListPodSandboxRequest::default();
        let reply = self.ok(async |mut cri| cri.list_pod_sandbox(all).await);
        reply.items.into_iter().map(|pod| pod.id).collect()
    }

    #[track_caller]
    pub fn status(&self, id: &str) -> ContainerStatus {
        let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        let reply = self.ok(async |mut cri| cri.container_status(request).await);
        reply.status.expect("a status")
    }

    #[track_caller]
    pub fn has_exited(&self, id: &str) -> bool {
        self.status(id).state() == ContainerState::ContainerExited
    }

    #[track_caller]
    pub fn is_running(&self, id: &str) -> bool {
        self.status(id).state() == ContainerState::ContainerRunning
    }

    /// Whether the pod is ready, and its address.
    #[track_caller]
    pub fn pod_status(&self, id: &str) -> (bool, String) {
        let request = PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false };
        let reply = self.ok(async |mut cri| cri.pod_sandbox_status(request).await);
        let status = reply.status.expect("a status");
        let ready = status.state() == PodSandboxState::SandboxReady;
        (ready, status.network.map(|network| network.ip).unwrap_or_default())
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

    /// The host's pids of all processes of a container.
    #[track_caller]
    pub fn pids(&self, id: &str) -> Vec<u32> {
        let list = self.node.ctr(&["tasks", "ps", id]).ok().text();
        list.lines().filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect()
    }

    pub fn try_exec(&self, id: &str, command: &[&str], seconds: i64) -> Result<Executed, Failure> {
        let request =
            ExecSyncRequest { container_id: id.to_owned(), cmd: words(command), timeout: seconds };
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        self.call(async |mut cri| cri.exec_sync(request).await).map(|reply| Executed {
            stdout: text(reply.stdout),
            stderr: text(reply.stderr),
            status: reply.exit_code,
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
        self.try_update(id, resources).unwrap_or_else(|failure| panic!("update: {failure:?}"));
    }

    pub fn try_update(&self, id: &str, resources: &Container) -> Result<(), Failure> {
        let request = UpdateContainerResourcesRequest {
            container_id: id.to_owned(),
            linux: Some(resources.resources()),
            ..UpdateContainerResourcesRequest::default()
        };
        self.call(async |mut cri| cri.update_container_resources(request).await).map(drop)
    }

    #[track_caller]
    pub fn reopen_log(&self, id: &str) {
        let request = ReopenContainerLogRequest { container_id: id.to_owned() };
        self.ok(async |mut cri| cri.reopen_container_log(request).await);
    }

    #[track_caller]
    pub fn stats(&self, id: &str) -> Figures {
        let request = ContainerStatsRequest { container_id: id.to_owned() };
        let reply = self.ok(async |mut cri| cri.container_stats(request).await);
        let stats = reply.stats.expect("figures");
        Figures::of(stats.cpu, stats.memory)
    }

    /// Those of all containers, by their ids.
    #[track_caller]
    pub fn all_stats(&self) -> BTreeMap<String, Figures> {
        let request = ListContainerStatsRequest::default();
        let reply = self.ok(async |mut cri| cri.list_container_stats(request).await);
        by_container(reply.stats)
    }

    #[track_caller]
    pub fn pod_stats(&self, id: &str) -> PodFigures {
        let request = PodSandboxStatsRequest { pod_sandbox_id: id.to_owned() };
        let reply = self.ok(async |mut cri| cri.pod_sandbox_stats(request).await);
        let listed = self.ok(async |mut cri| {
            cri.list_pod_sandbox_stats(ListPodSandboxStatsRequest::default()).await
        });
        let is_this = |stats: &PodSandboxStats| {
            stats.attributes.as_ref().is_some_and(|attributes| attributes.id == id)
        };
        assert!(listed.stats.iter().any(is_this), "it is not among all pods");
        let linux = reply.stats.and_then(|stats| stats.linux).expect("figures of Linux");
        let interface = linux.network.and_then(|network| network.default_interface);
        let interface = interface.unwrap_or_default();
        PodFigures {
            all: Figures::of(linux.cpu, linux.memory),
            processes: value(linux.process.and_then(|process| process.process_count)),
            received: (interface.name, value(interface.rx_bytes)),
            containers: by_container(linux.containers),
        }
    }

    /// Whether CRI tells the kubelet of recursive read-only mounts and user namespaces.
    #[track_caller]
    pub fn features(&self) -> [bool; 2] {
        let reply = self.ok(async |mut cri| cri.status(StatusRequest::default()).await);
        let ours = reply.runtime_handlers.into_iter().find(|found| found.name == handler());
        let features = ours.and_then(|handler| handler.features).unwrap_or_default();
        [features.recursive_read_only_mounts, features.user_namespaces]
    }

    /// The URL of a stream.
    #[track_caller]
    pub fn stream(&self, stream: Stream) -> String {
        self.ok(async |mut cri| {
            let url = match stream {
                Stream::Exec(request) => cri.exec(request).await?.into_inner().url,
                Stream::Attach(request) => cri.attach(request).await?.into_inner().url,
                Stream::PortForward(request) => cri.port_forward(request).await?.into_inner().url,
            };
            Ok(Response::new(url))
        })
    }
}

/// What a container or pod uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Figures {
    /// Nanoseconds of processor time.
    pub cpu: u64,
    /// Bytes of the working set, by which the kubelet evicts.
    pub memory: u64,
}

/// What a pod uses.
#[derive(Debug)]
pub struct PodFigures {
    pub all: Figures,
    pub processes: u64,
    /// The name of its interface, and bytes.
    pub received: (String, u64),
    pub containers: BTreeMap<String, Figures>,
}

impl Figures {
    fn of(cpu: Option<CpuUsage>, memory: Option<MemoryUsage>) -> Figures {
        Figures {
            cpu: value(cpu.and_then(|cpu| cpu.usage_core_nano_seconds)),
            memory: value(memory.and_then(|memory| memory.working_set_bytes)),
        }
    }
}

fn value(figure: Option<UInt64Value>) -> u64 {
    figure.map_or(0, |figure| figure.value)
}

fn by_container(all: Vec<ContainerStats>) -> BTreeMap<String, Figures> {
    let figures = |stats: ContainerStats| {
        let id = stats.attributes.map(|attributes| attributes.id).unwrap_or_default();
        (id, Figures::of(stats.cpu, stats.memory))
    };
    all.into_iter().map(figures).collect()
}
