//! The API: which call a request is, who may make it, and one module per kind of resource.

use std::sync::{Arc, RwLockReadGuard};

use serde_json::{Value as Json, json};
use tokio::time::sleep;

use crate::acl::{Acl, Identity};
use crate::cluster::Cluster;
use crate::conf::percent_decode;
use crate::console::Client;
use crate::error::ApiError;
use crate::http::Request;
use crate::node::Node;
use crate::params::{self, Kind, Params, Spec, VMID, opt};
use crate::profile::Call;

mod access;
mod clone;
mod cluster;
mod config;
mod console;

mod create;
mod lxc;
mod migrate;
mod nodes;
mod outside;
mod pools;
mod route;
mod snapshot;
mod status;
mod storage;
mod tasks;
mod volumes;

use route::{Call as Route, CtCall, NodeCall};

/// A successful answer.
#[derive(Debug)]
pub struct Answer {
    /// The `data` of the body.
    pub data: Json,
    /// The `total` beside it, in paged lists.
    pub total: Option<usize>,
    /// Whether the privileged daemon answers on a real node, which changes the headers.
    pub protected: bool,
    /// How long it takes.
    pub call: Call,
    /// Whether the connection ends with it.
    pub close: bool,
    /// What the connection becomes instead of an answer.
    pub websocket: Option<Client>,
}

impl Answer {
    /// An answer of the front end.
    fn plain(data: Json) -> Self {
        Self {
            data,
            total: None,
            protected: false,
            call: Call::Plain,
            close: false,
            websocket: None,
        }
    }

    /// An answer of the privileged daemon.
    fn protected(data: Json, call: Call) -> Self {
        Self { data, total: None, protected: true, call, close: false, websocket: None }
    }

    fn with_total(mut self, total: usize) -> Self {
        self.total = Some(total);
        self
    }
}

/// What a call works with.
struct Context<'a> {
    cluster: &'a Arc<Cluster>,
    /// The node that the call is about, or the one that was asked.
    node: &'a Arc<Node>,
    who: &'a Identity,
    request: &'a Request,
}

impl Context<'_> {
    fn params(&self) -> &Params {
        &self.request.params
    }

    fn acl(&self) -> RwLockReadGuard<'_, Acl> {
        self.cluster.dc.acl()
    }

    /// Requires a privilege.
    fn require(&self, path: &str, privilege: &str) -> Result<(), ApiError> {
        self.acl().require(self.who, path, privilege)
    }

    fn may(&self, path: &str, privilege: &str) -> bool {
        self.acl().may(self.who, path, privilege)
    }

    /// Checks the parameters of a call without a VMID.
    fn verify(&self, specs: &[Spec]) -> Result<(), ApiError> {
        params::verify(&[specs], self.params())
    }

    /// Checks the parameters of a call about a CT, the VMID of the path among them.
    fn verify_ct(&self, vmid: &str, specs: &[&[Spec]]) -> Result<u32, ApiError> {
        let mut all = self.params().clone();
        all.0.insert("vmid".into(), vmid.to_owned());
        let mut list = vec![&[VMID][..]];
        list.extend(specs);
        params::verify(&list, &all)?;
        all.number("vmid").ok_or_else(|| ApiError::param("vmid", "value is not a number"))
    }
}

/// Parameters that only the user root@pam may use, so no token at all.
const SKIPLOCK: Spec = opt("skiplock", Kind::Bool);

/// Answers a request.
pub async fn handle(
    cluster: &Arc<Cluster>,
    entry: &Arc<Node>,
    who: &Identity,
    request: &Request,
) -> Result<Answer, ApiError> {
    let unknown = || ApiError::NotImplemented {
        method: request.method.clone(),
        path: request.path.strip_prefix(PREFIX).unwrap_or(&request.path).to_owned(),
    };
    let segments = segments(&request.path).ok_or_else(unknown)?;
    let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
    let call = route::parse(&request.method, &segments).ok_or_else(unknown)?;
    let cx = &Context { cluster, node: entry, who, request };
    match call {
        Route::Version => cluster::version(cx),
        // Without credentials; the front end has sorted it out before.
        Route::Login => access::login(cx),
        Route::Permissions => access::permissions(cx),
        Route::Roles => access::roles(cx),
        Route::RoleCreate => access::create_role(cx),
        Route::Acl => access::acl(cx),
        Route::AclChange => access::change_acl(cx),
        Route::Users => access::users(cx),
        Route::UserCreate => access::create_user(cx),
        Route::User(user) => access::user(cx, user),
        Route::UserDelete(user) => access::delete_user(cx, user),
        Route::Tokens(user) => access::tokens(cx, user),
        Route::TokenCreate(user, token) => access::create_token(cx, user, token),
        Route::TokenDelete(user, token) => access::delete_token(cx, user, token),
        Route::NextId => cluster::nextid(cx),
        Route::Resources => cluster::resources(cx).await,
        Route::ClusterStatus => cluster::status(cx),
        Route::ClusterTasks => cluster::tasks(cx),
        Route::Nodes => nodes::list(cx),
        Route::Pools => pools::list(cx),
        Route::PoolCreate => pools::create(cx),
        Route::PoolChange => pools::change(cx),
        Route::PoolDelete => pools::delete(cx),
        Route::StorageConfig => storage::configuration(cx),
        Route::Node(name, call) => {
            let node = reach(cluster, entry, name).await?;
            node_call(&Context { node, ..*cx }, call).await
        }
    }
}

/// The node that a call is about, as far as the entry node can reach it.
async fn reach<'a>(
    cluster: &'a Cluster,
    entry: &Node,
    name: &str,
) -> Result<&'a Arc<Node>, ApiError> {
    let Some(node) = cluster.node(name) else {
        sleep(entry.profile.unknown_node()).await;
        return Err(ApiError::Failed(format!(
            "hostname lookup '{name}' failed - failed to get address info for: {name}: \
             Temporary failure in name resolution"
        )));
    };
    if !node.is_online() {
        let reason = "No route to host".to_owned();
        return Err(ApiError::Gateway { code: 595, reason });
    }
    Ok(node)
}

async fn node_call(cx: &Context<'_>, call: NodeCall<'_>) -> Result<Answer, ApiError> {
    match call {
        NodeCall::Status => nodes::status(cx),
        NodeCall::Network => nodes::network(cx),
        NodeCall::Tasks => tasks::list(cx),
        NodeCall::TaskStatus(upid) => tasks::status(cx, upid),
        NodeCall::TaskLog(upid) => tasks::log(cx, upid),
        NodeCall::TaskStop(upid) => tasks::stop(cx, upid).await,
        NodeCall::OciTags => outside::oci_tags(cx),
        NodeCall::Backup => outside::backup(cx),
        NodeCall::Storages => storage::list(cx),
        NodeCall::StorageStatus(name) => storage::status(cx, name),
        NodeCall::Content(name) => storage::content(cx, name),
        NodeCall::Volume(name, volume) => storage::volume(cx, name, &volume.join("/")),
        NodeCall::VolumeDelete(name, volume) => storage::delete_volume(cx, name, &volume.join("/")),
        NodeCall::Upload(name) => storage::upload(cx, name),
        NodeCall::Download(name) => outside::download(cx, name),
        NodeCall::OciPull(name) => outside::oci_pull(cx, name),
        NodeCall::Cts => lxc::list(cx).await,
        NodeCall::CtCreate => create::create(cx),
        NodeCall::Ct(vmid, call) => ct_call(cx, vmid, call).await,
    }
}

async fn ct_call(cx: &Context<'_>, vmid: &str, call: CtCall<'_>) -> Result<Answer, ApiError> {
    match call {
        CtCall::Index => lxc::index(cx, vmid),
        CtCall::Destroy => lxc::destroy(cx, vmid),
        CtCall::Config => config::get(cx, vmid),
        CtCall::ConfigChange => config::put(cx, vmid).await,
        CtCall::Pending => config::pending(cx, vmid),
        CtCall::StatusIndex => status::index(cx, vmid),
        CtCall::StatusCurrent => status::current(cx, vmid).await,
        CtCall::Act(action) => status::act(cx, vmid, action),
        CtCall::Clone => clone::clone(cx, vmid),
        CtCall::Resize => volumes::resize(cx, vmid),
        CtCall::MoveVolume => volumes::move_volume(cx, vmid),
        CtCall::Template => volumes::template(cx, vmid),
        CtCall::Feature => snapshot::feature(cx, vmid),
        CtCall::Snapshots => snapshot::list(cx, vmid),
        CtCall::SnapshotCreate => snapshot::create(cx, vmid),
        CtCall::SnapshotConfig(name) => snapshot::config(cx, vmid, name),
        CtCall::SnapshotDelete(name) => snapshot::delete(cx, vmid, name),
        CtCall::Rollback(name) => snapshot::rollback(cx, vmid, name),
        CtCall::Migrate => migrate::migrate(cx, vmid),
        CtCall::Interfaces => lxc::interfaces(cx, vmid).await,
        CtCall::TermProxy => console::term_proxy(cx, vmid),
        CtCall::VncProxy => console::vnc_proxy(cx, vmid).await,
        CtCall::VncWebsocket => console::websocket(cx, vmid).await,
    }
}

const PREFIX: &str = "/api2/json";

/// The decoded segments of a path below `/api2/json`.
fn segments(path: &str) -> Option<Vec<String>> {
    let path = path.strip_prefix(PREFIX)?;
    Some(path.split('/').filter(|s| !s.is_empty()).map(percent_decode).collect())
}

/// Whether a request may come without credentials.
pub fn is_public(request: &Request) -> bool {
    request.method == "POST" && request.path == "/api2/json/access/ticket"
}

/// Whether a request's body is a file.
pub fn is_upload(method: &str, path: &str) -> bool {
    let segments = segments(path).unwrap_or_default();
    let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
    matches!(route::parse(method, &segments), Some(Route::Node(_, NodeCall::Upload(_))))
}

/// A list of `{key: name}` objects.
fn names(key: &str, names: &[&str]) -> Json {
    names.iter().map(|n| json!({key: n})).collect()
}
