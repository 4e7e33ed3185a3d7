//! A simulator with a CT of ours on it, and a client of it.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use shim_proxmox::config::{Config, Vmid};
use shim_proxmox::pve::conf::{CtDescription, Hostname};
use shim_proxmox::pve::identity::{Id128, Identity};
use shim_proxmox::pve::{Client, TaskFilter, Upid};
use tokio::time::Instant;

use crate::simulator::{Simulator, own_vmid};

/// A node, a CT of ours on it, and a client.
pub struct World {
    pub simulator: Arc<Simulator>,
    pub client: Client,
    pub ours: Identity,
}

/// Another one for each caller.
pub fn vmid() -> Vmid {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    Vmid::new(own_vmid(n)).unwrap()
}

pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

/// A client with this `[proxmox]`, and less patience.
pub fn client(configuration: &str) -> Client {
    let text = format!("{configuration}request_timeout = 1\n");
    Client::new(&Config::from_toml(&text, "test").unwrap()).unwrap()
}

impl World {
    pub async fn new() -> World {
        World::of(&[])
    }

    /// With more arguments for the simulator.
    pub fn of(arguments: &[&str]) -> World {
        let simulator = Simulator::start(&[&["--time-scale", "0.02"], arguments].concat());
        let client = client(&simulator.configuration());
        let ours = Identity {
            install_id: Id128::random().unwrap(),
            vmid: vmid(),
            namespace: "default".into(),
            container_id: "web".into(),
            nonce: Id128::random().unwrap(),
            boot_id: Id128::random().unwrap(),
        };
        let world = World { simulator: simulator.into(), client, ours };
        world.write_ct(&world.ours);
        world
    }

    /// Writes a CT as the shim does, with busybox's sleep as its init.
    pub fn write_ct(&self, identity: &Identity) {
        let include = self.simulator.dir.path().join(&identity.namespace);
        let include = include.join(&identity.container_id).join("lxc.conf");
        self.simulator.write_include(&include);
        let description = CtDescription {
            id_map: Vec::new(),
            hostname: Hostname::from_name(&identity.container_id),
            memory_mib: 256,
            swap_mib: 0,
            cpulimit: None,
            cpuunits: None,
            tags: Vec::new(),
            notes: identity.notes(&[]),
            rootfs: self.simulator.rootfs(),
            include,
        };
        fs::write(self.conf(), description.render().unwrap()).unwrap();
    }

    pub fn vmid(&self) -> Vmid {
        self.ours.vmid
    }

    pub fn conf(&self) -> PathBuf {
        self.simulator.confs().join(format!("{}.conf", self.vmid()))
    }

    pub fn path(&self, below: &str) -> String {
        format!("/nodes/pve1/lxc/{}{below}", self.vmid())
    }

    pub async fn control(&self, command: Value) -> Value {
        let (simulator, text) = (self.simulator.clone(), command.to_string());
        let answer = tokio::task::spawn_blocking(move || simulator.try_control(&command)).await;
        answer.unwrap().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    /// The next request with this method about the CT.
    pub async fn fault(&self, method: &str, below: &str, effect: Value) {
        let fault = json!({"method": method, "path": self.path(below), "effect": effect});
        self.control(json!({ "fault": fault })).await;
    }

    /// A call that an administrator makes.
    pub fn administrator(&self, method: &str, below: &str, params: Value) -> Value {
        json!({"method": method, "path": self.path(below), "params": params})
    }

    /// Counts the requests with this method about the CT from now on.
    pub async fn count(&self, method: &str, below: &str) -> impl AsyncFn() -> u64 {
        let listed = async || self.control(json!({"faults": {}})).await["requests"].clone();
        let place = listed().await.as_array().unwrap().len();
        // A fault that hits none of them.
        let (path, never) = (self.path(below), 1_000_000);
        let fault =
            json!({"method": method, "path": path, "skip": never, "effect": "lose-request"});
        self.control(json!({ "fault": fault })).await;
        async move || listed().await[place]["seen"].as_u64().unwrap()
    }

    pub async fn started(&self) -> Upid {
        let upid = self.client.start(self.vmid()).await.unwrap();
        self.client.wait(&upid, soon()).await.unwrap();
        upid
    }

    pub async fn running(&self) -> bool {
        self.client.status(self.vmid()).await.unwrap().running
    }

    /// How many tasks of this type the client has started.
    pub async fn tasks(&self, kind: &str) -> usize {
        let filter = TaskFilter { vmid: Some(self.vmid()), kind: Some(kind), ..Default::default() };
        self.client.tasks(&filter).await.unwrap().len()
    }
}
