//! Which call a method and a path are.

use super::status::Action;

/// A call that exists. Path parameters are not checked yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call<'a> {
    Version,
    Login,
    Permissions,
    Roles,
    RoleCreate,
    Acl,
    AclChange,
    Users,
    UserCreate,
    User(&'a str),
    UserDelete(&'a str),
    Tokens(&'a str),
    TokenCreate(&'a str, &'a str),
    TokenDelete(&'a str, &'a str),
    NextId,
    Resources,
    ClusterStatus,
    ClusterTasks,
    Nodes,
    Pools,
    PoolCreate,
    PoolChange,
    PoolDelete,
    StorageConfig,
    Node(&'a str, NodeCall<'a>),
}

/// A call about a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeCall<'a> {
    Status,
    Network,
    Tasks,
    TaskStatus(&'a str),
    TaskLog(&'a str),
    TaskStop(&'a str),
    OciTags,
    Backup,
    Storages,
    StorageStatus(&'a str),
    Content(&'a str),
    /// A volume's name goes on to the end of the path, slashes and all.
    Volume(&'a str, &'a [&'a str]),
    VolumeDelete(&'a str, &'a [&'a str]),
    Upload(&'a str),
    Download(&'a str),
    OciPull(&'a str),
    Cts,
    CtCreate,
    Ct(&'a str, CtCall<'a>),
}

/// A call about a CT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CtCall<'a> {
    Index,
    Destroy,
    Config,
    ConfigChange,
    Pending,
    StatusIndex,
    StatusCurrent,
    Act(Action),
    Clone,
    Resize,
    MoveVolume,
    Template,
    Feature,
    Snapshots,
    SnapshotCreate,
    SnapshotConfig(&'a str),
    SnapshotDelete(&'a str),
    Rollback(&'a str),
    Migrate,
    Interfaces,
    TermProxy,
    VncProxy,
    VncWebsocket,
}

/// The call of a method and the segments of a path below `/api2/json`.
pub fn parse<'a>(method: &str, path: &'a [&'a str]) -> Option<Call<'a>> {
    use Call::*;
    Some(match (method, path) {
        ("GET", ["version"]) => Version,
        ("POST", ["access", "ticket"]) => Login,
        ("GET", ["access", "permissions"]) => Permissions,
        ("GET", ["access", "roles"]) => Roles,
        ("POST", ["access", "roles"]) => RoleCreate,
        ("GET", ["access", "acl"]) => Acl,
        ("PUT", ["access", "acl"]) => AclChange,
        ("GET", ["access", "users"]) => Users,
        ("POST", ["access", "users"]) => UserCreate,
        ("GET", ["access", "users", user]) => User(user),
        ("DELETE", ["access", "users", user]) => UserDelete(user),
        ("GET", ["access", "users", user, "token"]) => Tokens(user),
        ("POST", ["access", "users", user, "token", token]) => TokenCreate(user, token),
        ("DELETE", ["access", "users", user, "token", token]) => TokenDelete(user, token),
        ("GET", ["cluster", "nextid"]) => NextId,
        ("GET", ["cluster", "resources"]) => Resources,
        ("GET", ["cluster", "status"]) => ClusterStatus,
        ("GET", ["cluster", "tasks"]) => ClusterTasks,
        ("GET", ["nodes"]) => Nodes,
        ("GET", ["pools"]) => Pools,
        ("POST", ["pools"]) => PoolCreate,
        ("PUT", ["pools"]) => PoolChange,
        ("DELETE", ["pools"]) => PoolDelete,
        ("GET", ["storage"]) => StorageConfig,
        (_, ["nodes", name, rest @ ..]) => Node(name, parse_node(method, rest)?),
        _ => return None,
    })
}

fn parse_node<'a>(method: &str, path: &'a [&'a str]) -> Option<NodeCall<'a>> {
    use NodeCall::*;
    Some(match (method, path) {
        ("GET", ["status"]) => Status,
        ("GET", ["network"]) => Network,
        ("GET", ["tasks"]) => Tasks,
        ("GET", ["tasks", upid, "status"]) => TaskStatus(upid),
        ("GET", ["tasks", upid, "log"]) => TaskLog(upid),
        ("DELETE", ["tasks", upid]) => TaskStop(upid),
        ("GET", ["query-oci-repo-tags"]) => OciTags,
        ("POST", ["vzdump"]) => Backup,
        ("GET", ["storage"]) => Storages,
        ("GET", ["storage", storage, "status"]) => StorageStatus(storage),
        ("GET", ["storage", storage, "content"]) => Content(storage),
        ("GET", ["storage", storage, "content", volume @ ..]) => Volume(storage, volume),
        ("DELETE", ["storage", storage, "content", volume @ ..]) => VolumeDelete(storage, volume),
        ("POST", ["storage", storage, "upload"]) => Upload(storage),
        ("POST", ["storage", storage, "download-url"]) => Download(storage),
        ("POST", ["storage", storage, "oci-registry-pull"]) => OciPull(storage),
        ("GET", ["lxc"]) => Cts,
        ("POST", ["lxc"]) => CtCreate,
        (_, ["lxc", vmid, rest @ ..]) => Ct(vmid, parse_ct(method, rest)?),
        _ => return None,
    })
}

fn parse_ct<'a>(method: &str, path: &'a [&'a str]) -> Option<CtCall<'a>> {
    use CtCall::*;
    Some(match (method, path) {
        ("GET", []) => Index,
        ("DELETE", []) => Destroy,
        ("GET", ["config"]) => Config,
        ("PUT", ["config"]) => ConfigChange,
        ("GET", ["pending"]) => Pending,
        ("GET", ["status"]) => StatusIndex,
        ("GET", ["status", "current"]) => StatusCurrent,
        ("POST", ["status", action]) => Act(Action::parse(action)?),
        ("POST", ["clone"]) => Clone,
        ("PUT", ["resize"]) => Resize,
        ("POST", ["move_volume"]) => MoveVolume,
        ("POST", ["template"]) => Template,
        ("GET", ["feature"]) => Feature,
        ("GET", ["snapshot"]) => Snapshots,
        ("POST", ["snapshot"]) => SnapshotCreate,
        ("GET", ["snapshot", name, "config"]) => SnapshotConfig(name),
        ("DELETE", ["snapshot", name]) => SnapshotDelete(name),
        ("POST", ["snapshot", name, "rollback"]) => Rollback(name),
        ("POST", ["migrate"]) => Migrate,
        ("GET", ["interfaces"]) => Interfaces,
        ("POST", ["termproxy"]) => TermProxy,
        ("POST", ["vncproxy"]) => VncProxy,
        ("GET", ["vncwebsocket"]) => VncWebsocket,
        _ => return None,
    })
}
