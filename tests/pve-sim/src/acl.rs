//! Users, API tokens, access control entries and pools.
//!
//! The rules are those of Proxmox VE: an entry on a path replaces what was inherited from above
//! it, and a privilege-separated token has the intersection of its own and its user's rights.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::ApiError;
use crate::roles::{self, PRIVILEGES, Role};
use crate::ticket::same;

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
        Self::user("root@pam")
    }

    /// Somebody who is about to log in.
    pub fn nobody() -> Self {
        Self::user("")
    }

    /// A user who has logged in.
    pub fn user(name: &str) -> Self {
        Self { user: name.into(), token: None, privsep: false }
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

/// An access control entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// What it is about.
    pub path: String,
    /// Whether it holds below the path too.
    pub propagate: bool,
    /// A user, or a token as `NAME@REALM!TOKEN`.
    pub subject: String,
    /// The role.
    pub role: String,
}

/// A user.
#[derive(Debug, Clone, Default)]
pub struct User {
    /// Without one there is no login.
    pub password: Option<String>,
    /// Free text.
    pub comment: Option<String>,
    /// Whether it may do anything at all.
    pub disabled: bool,
    /// Its API tokens by name.
    pub tokens: BTreeMap<String, Token>,
}

/// An API token.
#[derive(Debug, Clone)]
pub struct Token {
    /// The UUID.
    pub secret: String,
    /// Whether it has rights of its own instead of its user's.
    pub privsep: bool,
    /// Free text.
    pub comment: Option<String>,
}

/// A pool: guests and storages with common rights.
#[derive(Debug, Clone, Default)]
pub struct Pool {
    /// Free text.
    pub comment: Option<String>,
    /// Its guests.
    pub vms: BTreeSet<u32>,
    /// Its storages.
    pub storages: BTreeSet<String>,
}

/// The access control of a datacenter.
#[derive(Debug, Clone)]
pub struct Acl {
    /// Roles by name.
    pub roles: BTreeMap<String, Role>,
    /// All entries.
    pub entries: Vec<Entry>,
    /// Users by `NAME@REALM`.
    pub users: BTreeMap<String, User>,
    /// Pools by name.
    pub pools: BTreeMap<String, Pool>,
}

impl Default for Acl {
    /// That of a fresh installation: root@pam, who cannot log in before it has a password.
    fn default() -> Self {
        Self {
            roles: roles::built_in(),
            entries: Vec::new(),
            users: BTreeMap::from([("root@pam".to_owned(), User::default())]),
            pools: BTreeMap::new(),
        }
    }
}

impl Acl {
    /// The access control of a fresh simulator: `root@pam!admin` may do everything, and
    /// `containerd@pve!shim` what the shim needs.
    pub fn with_tokens(admin_secret: &str, shim_secret: &str) -> Self {
        let mut acl = Self::default();
        for (name, privileges) in [(SHIM_ROLE, SHIM_PRIVILEGES), (SHIM_NODE_ROLE, &["Sys.Audit"])] {
            let privileges = privileges.iter().copied().collect();
            acl.roles.insert(name.to_owned(), Role { privileges, special: false });
        }
        acl.add_token("root@pam", "admin", admin_secret, false);
        acl.add_token("containerd@pve", "shim", shim_secret, true);
        for subject in ["containerd@pve", "containerd@pve!shim"] {
            acl.grant("/vms", subject, SHIM_ROLE);
            acl.grant("/nodes", subject, SHIM_NODE_ROLE);
        }
        acl
    }

    /// Adds a token, and its user if there is none.
    pub fn add_token(&mut self, user: &str, name: &str, secret: &str, privsep: bool) {
        let token = Token { secret: secret.to_owned(), privsep, comment: None };
        self.users.entry(user.to_owned()).or_default().tokens.insert(name.to_owned(), token);
    }

    /// Removes a token by its full name; whether it was there.
    pub fn remove_token(&mut self, id: &str) -> bool {
        let Some((user, name)) = id.split_once('!') else { return false };
        self.users.get_mut(user).is_some_and(|u| u.tokens.remove(name).is_some())
    }

    /// Gives a user or token a role on a path and all below it.
    pub fn grant(&mut self, path: &str, subject: &str, role: &str) {
        self.set_entry(path, subject, role, true, false);
    }

    /// Sets or deletes an entry.
    pub fn set_entry(
        &mut self,
        path: &str,
        subject: &str,
        role: &str,
        propagate: bool,
        delete: bool,
    ) {
        self.entries.retain(|e| {
            (e.path.as_str(), e.subject.as_str(), e.role.as_str()) != (path, subject, role)
        });
        if !delete {
            self.entries.push(Entry {
                path: path.to_owned(),
                propagate,
                subject: subject.to_owned(),
                role: role.to_owned(),
            });
        }
    }

    /// Forgets the rights on a guest and its place in a pool, as its removal does.
    pub fn forget_guest(&mut self, vmid: u32) {
        let path = format!("/vms/{vmid}");
        self.entries.retain(|e| e.path != path);
        for pool in self.pools.values_mut() {
            pool.vms.remove(&vmid);
        }
    }

    /// The pool of a guest.
    pub fn pool_of(&self, vmid: u32) -> Option<&str> {
        self.pools.iter().find(|(_, p)| p.vms.contains(&vmid)).map(|(name, _)| name.as_str())
    }

    /// The identity of an `Authorization` header.
    pub fn by_token(&self, header: &str) -> Option<Identity> {
        let (id, secret) = header.strip_prefix("PVEAPIToken=")?.rsplit_once('=')?;
        let (name, token_name) = id.split_once('!')?;
        let user = self.users.get(name).filter(|u| !u.disabled)?;
        let token = user.tokens.get(token_name).filter(|t| same(&t.secret, secret))?;
        Some(Identity::token(name, token_name, token.privsep))
    }

    /// The identity of a user or token by its full name.
    pub fn by_name(&self, id: &str) -> Option<Identity> {
        match id.split_once('!') {
            Some((user, token)) => {
                let privsep = self.users.get(user)?.tokens.get(token)?.privsep;
                Some(Identity::token(user, token, privsep))
            }
            None => self.users.contains_key(id).then(|| Identity::user(id)),
        }
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
        let mut roles: Vec<&str> = self.inherited_roles(subject, path);
        if roles.contains(&"NoAccess") {
            return BTreeSet::new();
        }
        for (name, _) in self.pools.iter().filter(|(_, pool)| match path.split_once("/vms/") {
            Some(("", vmid)) => vmid.parse().is_ok_and(|v| pool.vms.contains(&v)),
            _ => path.strip_prefix("/storage/").is_some_and(|s| pool.storages.contains(s)),
        }) {
            roles.extend(self.inherited_roles(subject, &format!("/pool/{name}")));
        }
        roles
            .iter()
            .filter_map(|r| self.roles.get(*r))
            .flat_map(|r| &r.privileges)
            .copied()
            .collect()
    }

    /// The roles of the deepest entries on the way to a path.
    fn inherited_roles(&self, subject: &str, path: &str) -> Vec<&str> {
        let mut roles = Vec::new();
        for prefix in prefixes(path) {
            let here: Vec<_> = self
                .entries
                .iter()
                .filter(|e| e.subject == subject && e.path == prefix)
                .filter(|e| e.propagate || prefix == path)
                .map(|e| e.role.as_str())
                .collect();
            if !here.is_empty() {
                roles = here;
            }
        }
        roles
    }

    /// Whether the identity has one privilege on a path.
    pub fn may(&self, who: &Identity, path: &str, privilege: &str) -> bool {
        // The common case, without making a set for each CT of a long list.
        let all = who.user == "root@pam" && !who.privsep;
        all || self.privileges(who, path).contains(privilege)
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
    fn a_token_is_known_by_its_whole_secret() {
        let acl = Acl::with_tokens("s1", "s2");
        let auth = |h: &str| acl.by_token(h).map(|i| i.auth_id());
        assert_eq!(auth("PVEAPIToken=root@pam!admin=s1").unwrap(), "root@pam!admin");
        assert_eq!(auth("PVEAPIToken=root@pam!admin=s2"), None);
        assert_eq!(auth("PVEAPIToken=root@pam!nope=s1"), None);
        assert_eq!(auth("PVEAPIToken=nobody@pam!admin=s1"), None);
        assert_eq!(auth("PVEAPIToken root@pam!admin=s1"), None);
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

    #[test]
    fn members_of_a_pool_have_the_rights_on_it() {
        let mut acl = Acl::default();
        acl.grant("/pool/p", "a@pve", "PVEVMUser");
        let pool = acl.pools.entry("p".into()).or_default();
        pool.vms.insert(100);
        let a = id("a@pve", "t", false);
        assert!(acl.may(&a, "/vms/100", "VM.PowerMgmt"));
        assert!(!acl.may(&a, "/vms/101", "VM.PowerMgmt"));
        acl.grant("/vms/100", "a@pve", "NoAccess");
        assert!(!acl.may(&a, "/vms/100", "VM.PowerMgmt"));
    }

    #[test]
    fn an_entry_that_does_not_propagate_stays_on_its_path() {
        let mut acl = Acl::default();
        acl.set_entry("/vms", "a@pve", "PVEVMUser", false, false);
        let a = id("a@pve", "t", false);
        assert!(acl.may(&a, "/vms", "VM.Audit"));
        assert!(!acl.may(&a, "/vms/100", "VM.Audit"));
        acl.set_entry("/vms", "a@pve", "PVEVMUser", false, true);
        assert!(!acl.may(&a, "/vms", "VM.Audit"));
    }
}
