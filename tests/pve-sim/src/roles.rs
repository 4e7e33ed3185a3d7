//! Privileges, and the roles that every Proxmox VE has.

use std::collections::{BTreeMap, BTreeSet};

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

/// A set of privileges.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Role {
    /// What it allows.
    pub privileges: BTreeSet<&'static str>,
    /// Whether it comes with Proxmox VE and cannot be changed.
    pub special: bool,
}

/// What `PVEAdmin` lacks.
const NOT_PVE_ADMIN: &[&str] = &[
    "Mapping.Modify",
    "Permissions.Modify",
    "Realm.Allocate",
    "Sys.AccessNetwork",
    "Sys.Incoming",
    "Sys.Modify",
    "Sys.PowerMgmt",
];

const VM_USER: &[&str] = &[
    "VM.Audit",
    "VM.Backup",
    "VM.Config.CDROM",
    "VM.Config.Cloudinit",
    "VM.Console",
    "VM.GuestAgent.Audit",
    "VM.GuestAgent.FileRead",
    "VM.GuestAgent.FileSystemMgmt",
    "VM.GuestAgent.FileWrite",
    "VM.PowerMgmt",
];

/// The privilege of this name, if there is one.
pub fn privilege(name: &str) -> Option<&'static str> {
    PRIVILEGES.iter().copied().find(|p| *p == name)
}

/// The roles of a fresh installation.
pub fn built_in() -> BTreeMap<String, Role> {
    let all = || PRIVILEGES.iter().copied();
    let prefixed = |prefix: &'static str| all().filter(move |p| p.starts_with(prefix));
    let some = |list: &[&'static str]| -> BTreeSet<&'static str> { list.iter().copied().collect() };
    let roles: [(&str, BTreeSet<&'static str>); 17] = [
        ("Administrator", all().collect()),
        ("NoAccess", BTreeSet::new()),
        ("PVEAdmin", all().filter(|p| !NOT_PVE_ADMIN.contains(p)).collect()),
        ("PVEAuditor", all().filter(|p| p.ends_with(".Audit")).collect()),
        ("PVEDatastoreAdmin", prefixed("Datastore.").collect()),
        ("PVEDatastoreUser", some(&["Datastore.AllocateSpace", "Datastore.Audit"])),
        ("PVEMappingAdmin", prefixed("Mapping.").collect()),
        ("PVEMappingUser", some(&["Mapping.Audit", "Mapping.Use"])),
        ("PVEPoolAdmin", prefixed("Pool.").collect()),
        ("PVEPoolUser", some(&["Pool.Audit"])),
        ("PVESDNAdmin", prefixed("SDN.").collect()),
        ("PVESDNUser", some(&["SDN.Audit", "SDN.Use"])),
        ("PVESysAdmin", some(&["Sys.Audit", "Sys.Console", "Sys.Syslog"])),
        ("PVETemplateUser", some(&["VM.Audit", "VM.Clone"])),
        ("PVEUserAdmin", some(&["Group.Allocate", "Realm.AllocateUser", "User.Modify"])),
        ("PVEVMAdmin", prefixed("VM.").collect()),
        ("PVEVMUser", some(VM_USER)),
    ];
    roles
        .into_iter()
        .map(|(name, privileges)| (name.to_owned(), Role { privileges, special: true }))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_roles_have_the_recorded_privileges() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/transcripts/access-roles.json");
        let text = std::fs::read_to_string(path).unwrap();
        let recording: serde_json::Value = serde_json::from_str(&text).unwrap();
        let rows = recording["response"]["body"]["data"].as_array().unwrap();
        let roles = built_in();
        assert_eq!(rows.len(), roles.len());
        for row in rows {
            let role = &roles[row["roleid"].as_str().unwrap()];
            let expected: BTreeSet<_> =
                row["privs"].as_str().unwrap().split(',').filter(|p| !p.is_empty()).collect();
            assert_eq!(role.privileges, expected, "{row}");
        }
    }
}
