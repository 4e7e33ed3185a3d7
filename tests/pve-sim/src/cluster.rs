//! The cluster: its nodes, and what they share.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::acl::{Acl, Identity};
use crate::conf;
use crate::control::Held;
use crate::error::ApiError;
use crate::fault::Faults;
use crate::http::Request;
use crate::node::{Node, StartError, lock, make_dir, vmids_in, write_error, write_file};
use crate::profile::Profile;
use crate::storage::Storage;
use crate::sys;
use crate::task::Task;
use crate::ticket::Tickets;
use crate::tls::Certificate;
use crate::unit::Supervisor;

/// What to start a cluster with.
#[derive(Debug, Clone)]
pub struct Options {
    /// Directory for everything; made if missing.
    pub root: PathBuf,
    /// The names of the nodes, at least one.
    pub nodes: Vec<String>,
    /// Addresses for the certificate, beside the loopback and the names of the nodes.
    pub addresses: Vec<String>,
    /// Durations.
    pub profile: Profile,
    /// Who runs the CTs.
    pub supervisor: Supervisor,
}

/// What all nodes of a cluster know.
pub struct Datacenter {
    /// Directory for everything.
    pub root: PathBuf,
    /// Stands for `/etc/pve`.
    pub pve: PathBuf,
    /// Durations.
    pub profile: Profile,
    /// Who runs the CTs.
    pub supervisor: Supervisor,
    /// The key of logins.
    pub tickets: Tickets,
    /// What is to go wrong.
    pub faults: Arc<Faults>,
    acl: RwLock<Acl>,
    quorate: AtomicBool,
    claims: Mutex<()>,
}

impl Datacenter {
    /// The access control, for reading.
    pub fn acl(&self) -> RwLockReadGuard<'_, Acl> {
        self.acl.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The access control, for changes.
    pub fn acl_mut(&self) -> RwLockWriteGuard<'_, Acl> {
        self.acl.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether enough nodes are there, so that `/etc/pve` can be written.
    pub fn is_quorate(&self) -> bool {
        self.quorate.load(Ordering::Relaxed)
    }

    /// Gains or loses quorum, without which nobody at all can write to the directory that stands for
    /// `/etc/pve`.
    pub fn set_quorate(&self, quorate: bool) -> io::Result<()> {
        let _claims = self.claims();
        if quorate == self.is_quorate() {
            return Ok(());
        }
        if quorate {
            sys::uncover(&self.pve)?
        } else {
            sys::cover_read_only(&self.pve)?
        }
        self.quorate.store(quorate, Ordering::Relaxed);
        Ok(())
    }

    /// Fails without quorum, as calls do that are about to change something.
    pub fn check_quorum(&self) -> Result<(), String> {
        if self.is_quorate() { Ok(()) } else { Err("cluster not ready - no quorum?".into()) }
    }

    /// Keeps others from claiming a VMID meanwhile.
    pub fn claims(&self) -> MutexGuard<'_, ()> {
        lock(&self.claims)
    }

    /// The VMIDs in use on any node, by CTs or virtual machines.
    pub fn used_vmids(&self) -> BTreeSet<u32> {
        self.guest_dirs().into_iter().flat_map(|(_, _, dir)| vmids_in(&dir)).collect()
    }

    /// Where a VMID is in use: the node, and `CT` or `VM`.
    pub fn owner(&self, vmid: u32) -> Option<(String, &'static str)> {
        let name = format!("{vmid}.conf");
        let mut dirs = self.guest_dirs().into_iter();
        dirs.find(|(_, _, dir)| dir.join(&name).exists()).map(|(node, kind, _)| (node, kind))
    }

    fn guest_dirs(&self) -> Vec<(String, &'static str, PathBuf)> {
        let nodes = fs::read_dir(self.pve.join("nodes")).into_iter().flatten().flatten();
        nodes
            .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
            .flat_map(|(node, path)| {
                [("CT", "lxc"), ("VM", "qemu-server")]
                    .map(|(kind, dir)| (node.clone(), kind, path.join(dir)))
            })
            .collect()
    }

    /// Who sends a request.
    pub fn authenticate(&self, request: &Request) -> Result<Identity, ApiError> {
        let failed = ApiError::Unauthorized("Authentication failed!");
        let acl = self.acl();
        if let Some(header) = &request.authorization {
            return acl.by_token(header).ok_or(failed);
        }
        let ticket = request.ticket().ok_or(ApiError::Unauthorized("No ticket"))?;
        let user = self.tickets.user(&ticket).ok_or(failed.clone())?;
        acl.users.get(user).filter(|u| !u.disabled).ok_or(failed)?;
        let csrf = request.csrf.as_deref().unwrap_or_default();
        if request.method != "GET" && !self.tickets.csrf_is_valid(csrf, user) {
            return Err(ApiError::Unauthorized("Permission denied - invalid csrf token"));
        }
        Ok(Identity::user(user))
    }
}

impl Drop for Datacenter {
    fn drop(&mut self) {
        // Whoever removes the directory must be able to.
        if let Err(error) = self.set_quorate(true) {
            eprintln!("pve-sim: {} stays read-only: {error}", self.pve.display());
        }
    }
}

/// A cluster of Proxmox VE nodes. One node is the ordinary case.
pub struct Cluster {
    /// What the nodes share.
    pub dc: Arc<Datacenter>,
    /// The certificate of all nodes.
    pub certificate: Certificate,
    /// Locks that a test holds.
    pub(crate) held: Held,
    nodes: Vec<Arc<Node>>,
    _lock: File,
}

impl Cluster {
    /// Makes the directories, ends what an earlier simulator left there, and reads or makes the
    /// tokens and the password.
    pub fn open(options: &Options) -> Result<Arc<Self>, StartError> {
        for (n, name) in options.nodes.iter().enumerate() {
            check_name(name)?;
            if options.nodes[..n].contains(name) {
                return Err(StartError::BadName(name.clone()));
            }
        }
        let root = check_root(&options.root)?;
        let lock_path = root.join("lock");
        let file = File::create(&lock_path).map_err(|e| write_error(&lock_path, e))?;
        sys::try_flock(&file).map_err(|_| StartError::InUse(root.clone()))?;
        let first = options.nodes.first().ok_or(StartError::NoNodes)?;

        let mut acl = Acl::with_tokens(
            &secret(&root.join("admin-token"), "root@pam!admin")?,
            &secret(&root.join("shim-token"), "containerd@pve!shim")?,
        );
        let password = secret(&root.join("root-password"), "root@pam")?;
        acl.users.entry("root@pam".into()).or_default().password = Some(password);

        let pve = root.join("pve");
        make_dir(&pve)?;
        // One that was killed while it had no quorum may have left it covered.
        sys::uncover(&pve).map_err(|e| write_error(&pve, e))?;
        let dc = Arc::new(Datacenter {
            root,
            pve,
            profile: options.profile,
            supervisor: options.supervisor,
            tickets: Tickets::default(),
            faults: Arc::default(),
            acl: RwLock::new(acl),
            quorate: AtomicBool::new(true),
            claims: Mutex::default(),
        });
        let mut shared = Vec::new();
        if options.nodes.len() > 1 {
            let dir = dc.root.join("shared");
            make_dir(&dir.join("template/cache"))?;
            shared.push(Arc::new(Storage::dir("shared", &dir, true)));
        }
        let mut nodes = Vec::new();
        for (n, name) in options.nodes.iter().enumerate() {
            nodes.push(Node::open(dc.clone(), name, n, &shared)?);
        }
        let link = dc.pve.join("lxc");
        let _ = fs::remove_file(&link);
        symlink(Path::new("nodes").join(first).join("lxc"), &link)
            .map_err(|e| write_error(&link, e))?;
        let names = options.nodes.iter().chain(&options.addresses).map(String::as_str);
        let names: Vec<&str> = ["127.0.0.1", "localhost"].into_iter().chain(names).collect();
        let certificate = Certificate::new(&names)?;
        Ok(Arc::new(Self { dc, certificate, held: Held::default(), nodes, _lock: file }))
    }

    /// The nodes, in the order of their names on the command line.
    pub fn nodes(&self) -> &[Arc<Node>] {
        &self.nodes
    }

    /// The node that clients reach first.
    pub fn first(&self) -> &Arc<Node> {
        // `open` has refused an empty list.
        &self.nodes[0]
    }

    /// A node by its name.
    pub fn node(&self, name: &str) -> Option<&Arc<Node>> {
        self.nodes.iter().find(|n| n.name == name)
    }

    /// A task of any node.
    pub fn task(&self, upid: &str) -> Option<Arc<Task>> {
        self.nodes.iter().find_map(|n| n.tasks.get(upid))
    }

    /// The node on which a CT is; the first one if it is on none.
    pub fn node_of(&self, vmid: u32) -> &Arc<Node> {
        let owner = self.dc.owner(vmid);
        owner.and_then(|(name, _)| self.node(&name)).unwrap_or(self.first())
    }

    /// Writes a file for those who wait for the simulator; atomically, as they poll for it.
    pub fn announce(&self, text: &str) -> Result<(), StartError> {
        let path = self.dc.root.join("ready.json");
        let temporary = self.dc.root.join("ready.json.tmp");
        write_file(&temporary, text, 0o644)?;
        fs::rename(&temporary, &path).map_err(|e| write_error(&path, e))
    }

    /// Ends all CTs and removes what they left on the host.
    pub async fn shut_down(&self) {
        if let Err(error) = self.dc.set_quorate(true) {
            self.first().note(&format!("{} stays read-only: {error}", self.dc.pve.display()));
        }
        for node in &self.nodes {
            node.shut_down().await;
        }
    }
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

/// Reads a secret from its file `ID=SECRET`, or makes both.
fn secret(path: &Path, id: &str) -> Result<String, StartError> {
    match fs::read_to_string(path) {
        Ok(text) => {
            let secret = text.trim().strip_prefix(id).and_then(|t| t.strip_prefix('='));
            secret.map(str::to_owned).ok_or_else(|| StartError::BadToken(path.to_owned()))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let secret = uuid();
            write_file(path, &format!("{id}={secret}\n"), 0o600)?;
            Ok(secret)
        }
        Err(e) => Err(write_error(path, e)),
    }
}

/// A random UUID.
pub fn uuid() -> String {
    let mut bytes: [u8; 16] = rand::random();
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex = conf::hex(&bytes);
    let parts = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
    parts.join("-")
}
