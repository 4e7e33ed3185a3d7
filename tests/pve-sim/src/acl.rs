//! Users, API tokens, roles and access control entries.
//!
//! The rules are those of Proxmox VE: an entry on a path replaces what was inherited from above
//! it, and a privilege-separated token has the intersection of its own and its user's rights.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::ApiError;

/// Every privilege that Proxmox VE 9.2 knows.
pub const PRIVILEGES: &[&str] = &[
    "Datastore.Allocate",
    "Datastore.AllocateSpace",
    "Datastore.AllocateTemplate",
    "Datastore.Audit",
    "Group.Allocate",
    "Mapping.Audit",
    "Mapping.Modify",
    "Mapping.Use",
    "Permissions.Modify",
    "Pool.Allocate",
    "Pool.Audit",
    "Realm.Allocate",
    "Realm.AllocateUser",
    "SDN.Allocate",
    "SDN.Audit",
    "SDN.Use",
    "Sys.AccessNetwork",
    "Sys.Audit",
    "Sys.Console",
    "Sys.Incoming",
    "Sys.Modify",
    "Sys.PowerMgmt",
    "Sys.Syslog",
    "User.Modify",
    "VM.Allocate",
    "VM.Audit",
    "VM.Backup",
    "VM.Clone",
    "VM.Config.CDROM",
    "VM.Config.CPU",
    "VM.Config.Cloudinit",
    "VM.Config.Disk",
    "VM.Config.HWType",
    "VM.Config.Memory",
    "VM.Config.Network",
    "VM.Config.Options",
    "VM.Console",
    "VM.GuestAgent.Audit",
    "VM.GuestAgent.FileRead",
    "VM.GuestAgent.FileSystemMgmt",
    "VM.GuestAgent.FileWrite",
    "VM.GuestAgent.Unrestricted",
    "VM.Migrate",
    "VM.PowerMgmt",
    "VM.Replicate",
    "VM.Snapshot",
    "VM.Snapshot.Rollback",
];

/// What the built-in role `PVEAdmin` lacks.
const NOT_PVE_ADMIN: &[&str] = &[
    "Mapping.Modify",
    "Permissions.Modify",
    "Realm.Allocate",
    "Sys.AccessNetwork",
    "Sys.Incoming",
    "Sys.Modify",
    "Sys.PowerMgmt",
];

/// The role that the shim's token gets on `/vms`.
pub const SHIM_ROLE: &str = "ContainerdShim";
/// The role that the shim's token gets on `/nodes`.
pub const SHIM_NODE_ROLE: &str = "ContainerdShimNode";

const SHIM_PRIVILEGES: &[&str] = &[
    "VM.Allocate",
    "VM.Audit",
    "VM.Config.CPU",
    "VM.Config.Disk",
    "VM.Config.Memory",
    "VM.Config.Network",
    "VM.Config.Options",
    "VM.PowerMgmt",
];

/// The paths that `GET /access/permissions` always looks at.
const LISTED: &[&str] =
    &["/", "/access", "/access/groups", "/nodes", "/pool", "/sdn", "/storage", "/vms"];

/// Who sent a request: a user by a ticket or by an API token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// `NAME@REALM`.
    pub user: String,
    /// The token's name; `None` for a ticket.
    pub token: Option<String>,
    /// Whether the token has rights of its own instead of its user's.
    pub privsep: bool,
}

impl Identity {
    /// The user root@pam, who may do what no token may.
    pub fn administrator() -> Self {
        Self { user: "root@pam".into(), token: None, privsep: false }
    }

    /// An API token.
    pub fn token(user: &str, name: &str, privsep: bool) -> Self {
        Self { user: user.into(), token: Some(name.into()), privsep }
    }

    /// Whether this is root@pam with a ticket.
    pub fn is_root(&self) -> bool {
        self.user == "root@pam" && self.token.is_none()
    }

    /// The form in UPIDs: `NAME@REALM` or `NAME@REALM!TOKEN`.
    pub fn auth_id(&self) -> String {
        match &self.token {
            Some(token) => format!("{}!{token}", self.user),
            None => self.user.clone(),
        }
    }
}

#[derive(Debug, Clone)]
struct Entry {
    path: String,
    propagate: bool,
    /// A user, or a token as `NAME@REALM!TOKEN`.
    subject: String,
    role: String,
}

#[derive(Debug, Clone)]
struct Token {
    secret: String,
    privsep: bool,
}

/// The access control of a node.
#[derive(Debug, Clone)]
pub struct Acl {
    roles: BTreeMap<String, BTreeSet<&'static str>>,
    entries: Vec<Entry>,
    tokens: BTreeMap<String, Token>,
}

impl Default for Acl {
    fn default() -> Self {
        let all = || PRIVILEGES.iter().copied();
        let admin = all().filter(|p| !NOT_PVE_ADMIN.contains(p)).collect();
        let auditor = all().filter(|p| p.ends_with(".Audit")).collect();
        let vm_admin = all().filter(|p| p.starts_with("VM.")).collect();
        let roles = BTreeMap::from([
            ("Administrator".to_owned(), all().collect()),
            ("NoAccess".to_owned(), BTreeSet::new()),
            ("PVEAdmin".to_owned(), admin),
            ("PVEAuditor".to_owned(), auditor),
            ("PVEVMAdmin".to_owned(), vm_admin),
            (SHIM_ROLE.to_owned(), SHIM_PRIVILEGES.iter().copied().collect()),
            (SHIM_NODE_ROLE.to_owned(), BTreeSet::from(["Sys.Audit"])),
        ]);
        Self { roles, entries: Vec::new(), tokens: BTreeMap::new() }
    }
}

impl Acl {
    /// The access control of a fresh simulator: `root@pam!admin` may do everything, and
    /// `containerd@pve!shim` what the shim needs.
    pub fn with_tokens(admin_secret: &str, shim_secret: &str) -> Self {
        let mut acl = Self::default();
        acl.add_token("root@pam", "admin", admin_secret, false);
        acl.add_token("containerd@pve", "shim", shim_secret, true);
        for subject in ["containerd@pve", "containerd@pve!shim"] {
            acl.grant("/vms", subject, SHIM_ROLE);
            acl.grant("/nodes", subject, SHIM_NODE_ROLE);
        }
        acl
    }

    /// Adds a token.
    pub fn add_token(&mut self, user: &str, name: &str, secret: &str, privsep: bool) {
        let token = Token { secret: secret.to_owned(), privsep };
        self.tokens.insert(format!("{user}!{name}"), token);
    }

    /// Removes a token by its full name; whether it was there.
    pub fn remove_token(&mut self, id: &str) -> bool {
        self.tokens.remove(id).is_some()
    }

    /// Gives a user or token a role on a path and all below it.
    pub fn grant(&mut self, path: &str, subject: &str, role: &str) {
        self.entries.push(Entry {
            path: path.to_owned(),
            propagate: true,
            subject: subject.to_owned(),
            role: role.to_owned(),
        });
    }

    /// Authenticates a request by its `Authorization` and `Cookie` headers.
    pub fn authenticate(
        &self,
        authorization: Option<&str>,
        cookie: Option<&str>,
    ) -> Result<Identity, ApiError> {
        let failed = ApiError::Unauthorized("Authentication failed!");
        let Some(header) = authorization else {
            let ticket = cookie.is_some_and(|c| c.contains("PVEAuthCookie="));
            return Err(if ticket { failed } else { ApiError::Unauthorized("No ticket") });
        };
        let found = header.strip_prefix("PVEAPIToken=").and_then(|t| t.rsplit_once('=')).and_then(
            |(id, secret)| {
                let token = self.tokens.get(id).filter(|t| same(&t.secret, secret))?;
                let (user, name) = id.split_once('!')?;
                Some(Identity::token(user, name, token.privsep))
            },
        );
        found.ok_or(failed)
    }

    /// The privileges of an identity on a path.
    pub fn privileges(&self, who: &Identity, path: &str) -> BTreeSet<&'static str> {
        let user = if who.user == "root@pam" {
            PRIVILEGES.iter().copied().collect()
        } else {
            self.granted(&who.user, path)
        };
        if who.privsep {
            let own = self.granted(&who.auth_id(), path);
            user.intersection(&own).copied().collect()
        } else {
            user
        }
    }

    fn granted(&self, subject: &str, path: &str) -> BTreeSet<&'static str> {
        let mut result = BTreeSet::new();
        for prefix in prefixes(path) {
            let here = self
                .entries
                .iter()
                .filter(|e| e.subject == subject && e.path == prefix)
                .filter(|e| e.propagate || prefix == path);
            let roles: Vec<_> = here.map(|e| e.role.as_str()).collect();
            if roles.is_empty() {
                continue;
            }
            result = roles.iter().filter_map(|r| self.roles.get(*r)).flatten().copied().collect();
        }
        result
    }

    /// Whether the identity has one privilege on a path.
    pub fn may(&self, who: &Identity, path: &str, privilege: &str) -> bool {
        self.privileges(who, path).contains(privilege)
    }

    /// Requires one privilege.
    pub fn require(&self, who: &Identity, path: &str, privilege: &str) -> Result<(), ApiError> {
        self.require_any(who, path, &[privilege])
    }

    /// Requires any of some privileges.
    pub fn require_any(
        &self,
        who: &Identity,
        path: &str,
        privileges: &[&str],
    ) -> Result<(), ApiError> {
        let have = self.privileges(who, path);
        if privileges.iter().any(|p| have.contains(p)) {
            Ok(())
        } else {
            Err(ApiError::denied(path, &privileges.join("|")))
        }
    }

    /// The paths to show in `GET /access/permissions`.
    pub fn listed_paths(&self) -> BTreeSet<String> {
        let own = self.entries.iter().map(|e| e.path.clone());
        LISTED.iter().map(|p| (*p).to_owned()).chain(own).collect()
    }
}

/// `/`, `/a`, `/a/b` for `/a/b`.
fn prefixes(path: &str) -> Vec<&str> {
    let mut list = vec!["/"];
    list.extend(path.match_indices('/').skip(1).map(|(i, _)| &path[..i]));
    if path != "/" {
        list.push(path);
    }
    list
}

/// Compares in a time that does not depend on where the difference is.
fn same(a: &str, b: &str) -> bool {
    a.len() == b.len() && a.bytes().zip(b.bytes()).fold(0, |d, (x, y)| d | (x ^ y)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(user: &str, token: &str, privsep: bool) -> Identity {
        Identity::token(user, token, privsep)
    }

    #[test]
    fn a_privsep_token_has_the_intersection_of_both_rights() {
        let mut acl = Acl::default();
        acl.grant("/", "root@pam!ps", "PVEAdmin");
        acl.grant("/", "a@pve!t", "Administrator");
        acl.grant("/vms", "a@pve", "PVEAuditor");
        let ps = id("root@pam", "ps", true);
        assert!(acl.may(&ps, "/vms/100", "VM.Audit"));
        assert!(!acl.may(&ps, "/", "Sys.Modify"));
        let t = id("a@pve", "t", true);
        assert!(acl.may(&t, "/vms/100", "VM.Audit"));
        assert!(!acl.may(&t, "/vms/100", "VM.PowerMgmt"));
        assert!(!acl.may(&t, "/nodes/x", "Sys.Audit"));
    }

    #[test]
    fn a_deeper_entry_replaces_what_was_inherited() {
        let mut acl = Acl::default();
        acl.grant("/", "a@pve", "PVEAdmin");
        acl.grant("/vms/100", "a@pve", "NoAccess");
        let a = id("a@pve", "t", false);
        assert!(acl.may(&a, "/vms/101", "VM.Audit"));
        assert!(!acl.may(&a, "/vms/100", "VM.Audit"));
    }

    #[test]
    fn authentication_tells_no_ticket_from_a_wrong_one() {
        let acl = Acl::with_tokens("s1", "s2");
        let auth = |h: Option<&str>, c: Option<&str>| acl.authenticate(h, c).map(|i| i.auth_id());
        assert_eq!(auth(Some("PVEAPIToken=root@pam!admin=s1"), None).unwrap(), "root@pam!admin");
        let failed = Err(ApiError::Unauthorized("Authentication failed!"));
        assert_eq!(auth(Some("PVEAPIToken=root@pam!admin=s2"), None), failed);
        assert_eq!(auth(Some("PVEAPIToken=root@pam!nope=s1"), None), failed);
        assert_eq!(auth(Some("PVEAPIToken root@pam!admin=s1"), None), failed);
        assert_eq!(auth(None, Some("PVEAuthCookie=x")), failed);
        assert_eq!(auth(None, None), Err(ApiError::Unauthorized("No ticket")));
    }

    #[test]
    fn the_shim_token_may_do_its_work_and_no_more() {
        let acl = Acl::with_tokens("a", "b");
        let shim = id("containerd@pve", "shim", true);
        for privilege in SHIM_PRIVILEGES {
            acl.require(&shim, "/vms/90000", privilege).unwrap();
        }
        acl.require(&shim, "/nodes/pve1", "Sys.Audit").unwrap();
        let denied = acl.require(&shim, "/", "Sys.Modify").unwrap_err();
        assert_eq!(denied.to_string(), "Permission check failed (/, Sys.Modify)");
        assert!(!acl.may(&shim, "/vms/90000", "VM.Console"));
        assert!(!acl.may(&shim, "/nodes/pve1", "Sys.Modify"));
    }
}
