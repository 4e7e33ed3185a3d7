//! The verdict of every field of the OCI runtime specification, in one table.
//!
//! Paths are those of the JSON document; `[]` stands for each element of a list. A field that is
//! applied can still be refused for a particular value by the module that reads it.
//!
//! The manual page `containerd-shim-proxmox-oci(7)` is made of this table.

use std::fmt;

use serde_json::Value;

use super::Error;
use super::document::Document;

/// What becomes of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Holds further fields, which have their own verdicts.
    Section,
    /// Honoured as it is, and where. For objects and lists without a fixed set of fields this
    /// includes all that is below.
    Applied(Place),
    /// Honoured in another form: how.
    Translated(&'static str),
    /// Without effect, as with runc: why.
    Ignored(&'static str),
    /// Without effect, and the log says so.
    Warned(&'static str),
    /// A bundle that sets it is refused: what to do instead.
    Refused(&'static str),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Section => f.write_str("each field has its own verdict"),
            Applied(place) => write!(f, "applied {place}"),
            Translated(how) => write!(f, "translated: {how}"),
            Ignored(why) => write!(f, "ignored: {why}"),
            Warned(why) => write!(f, "without effect, with a warning: {why}"),
            Refused(remedy) => write!(f, "refused: {remedy}"),
        }
    }
}

/// Who applies a field, and so where its effect can be looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// By init, which then becomes the workload.
    Init,
    /// In the file that the CT's configuration includes.
    Lxc,
    /// In the files of the CT's cgroup.
    Cgroup,
    /// In a mount: the shim opens what is the host's, init attaches it.
    Mount,
    /// By the shim, outside of the container.
    Shim,
    /// In the JSON that hooks read.
    State,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Init => "by init, in the container",
            Self::Lxc => "in LXC's configuration of the CT",
            Self::Cgroup => "in the CT's cgroup",
            Self::Mount => "in the mount, which init attaches in the container",
            Self::Shim => "by the shim, on the node",
            Self::State => "in the state that hooks read",
        })
    }
}

/// A line of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field {
    pub path: &'static str,
    pub verdict: Verdict,
}

const fn field(path: &'static str, verdict: Verdict) -> Field {
    Field { path, verdict }
}

use Place::{Cgroup, Init, Lxc, Mount, Shim, State};
use Verdict::{Applied, Ignored, Refused, Section, Translated, Warned};

const OTHER_PLATFORM: Verdict = Ignored("for another operating system");

/// All fields, in the order of the specification.
pub const FIELDS: &[Field] = &[
    field("ociVersion", Applied(State)),
    field("hostname", Applied(Init)),
    field("domainname", Applied(Init)),
    field("annotations", Applied(State)),
    field("root", Section),
    field("root.path", Applied(Lxc)),
    field("root.readonly", Applied(Init)),
    field("mounts", Section),
    field("mounts[].destination", Applied(Mount)),
    field("mounts[].type", Applied(Mount)),
    field("mounts[].source", Applied(Mount)),
    field("mounts[].options", Applied(Mount)),
    field("mounts[].uidMappings", Applied(Mount)),
    field("mounts[].gidMappings", Applied(Mount)),
    field("process", Section),
    field("process.terminal", Applied(Init)),
    field("process.consoleSize", Applied(Init)),
    field("process.user", Section),
    field("process.user.uid", Applied(Init)),
    field("process.user.gid", Applied(Init)),
    field("process.user.umask", Applied(Init)),
    field("process.user.additionalGids", Applied(Init)),
    field("process.user.username", OTHER_PLATFORM),
    field("process.args", Applied(Init)),
    field("process.commandLine", OTHER_PLATFORM),
    field("process.env", Applied(Init)),
    field("process.cwd", Applied(Init)),
    field("process.capabilities", Section),
    field("process.capabilities.bounding", Applied(Init)),
    field("process.capabilities.effective", Applied(Init)),
    field("process.capabilities.inheritable", Applied(Init)),
    field("process.capabilities.permitted", Applied(Init)),
    field("process.capabilities.ambient", Applied(Init)),
    field("process.rlimits", Applied(Init)),
    field("process.noNewPrivileges", Applied(Init)),
    field("process.apparmorProfile", Applied(Init)),
    field("process.oomScoreAdj", Applied(Init)),
    field("process.selinuxLabel", Refused("Proxmox VE has no SELinux; use an AppArmor profile")),
    field("process.ioPriority", Section),
    field("process.ioPriority.class", Applied(Init)),
    field("process.ioPriority.priority", Applied(Init)),
    field("process.scheduler", Section),
    field("process.scheduler.policy", Applied(Init)),
    field("process.scheduler.nice", Applied(Init)),
    field("process.scheduler.priority", Applied(Init)),
    field("process.scheduler.flags", Applied(Init)),
    field("process.scheduler.runtime", Applied(Init)),
    field("process.scheduler.deadline", Applied(Init)),
    field("process.scheduler.period", Applied(Init)),
    field("process.execCPUAffinity", Section),
    field("process.execCPUAffinity.initial", Applied(Init)),
    field("process.execCPUAffinity.final", Applied(Init)),
    field("hooks", Section),
    field("hooks.prestart", Applied(Shim)),
    field("hooks.createRuntime", Applied(Shim)),
    field("hooks.createContainer", Applied(Init)),
    field("hooks.startContainer", Applied(Init)),
    field("hooks.poststart", Applied(Shim)),
    field("hooks.poststop", Applied(Shim)),
    field("linux", Section),
    field("linux.namespaces", Applied(Lxc)),
    field("linux.uidMappings", Applied(Lxc)),
    field("linux.gidMappings", Applied(Lxc)),
    field("linux.timeOffsets", Applied(Init)),
    field("linux.devices", Applied(Init)),
    field(
        "linux.netDevices",
        Refused("move the devices into the network namespace before, or in a createRuntime hook"),
    ),
    field("linux.cgroupsPath", Translated("systemd's form becomes the path that systemd uses")),
    field("linux.rootfsPropagation", Applied(Init)),
    field("linux.maskedPaths", Applied(Init)),
    field("linux.readonlyPaths", Applied(Init)),
    field("linux.mountLabel", Refused("Proxmox VE has no SELinux")),
    field("linux.sysctl", Applied(Init)),
    field(
        "linux.intelRdt",
        Refused("write the pid to the class's tasks file of resctrl in a createRuntime hook"),
    ),
    field("linux.memoryPolicy", Section),
    field("linux.memoryPolicy.mode", Applied(Init)),
    field("linux.memoryPolicy.nodes", Applied(Init)),
    field("linux.memoryPolicy.flags", Applied(Init)),
    field("linux.personality", Section),
    field("linux.personality.domain", Applied(Init)),
    field("linux.personality.flags", Warned("no personality flag is defined")),
    field("linux.seccomp", Section),
    field("linux.seccomp.defaultAction", Applied(Init)),
    field("linux.seccomp.defaultErrnoRet", Applied(Init)),
    field("linux.seccomp.architectures", Applied(Init)),
    field("linux.seccomp.flags", Applied(Init)),
    field("linux.seccomp.listenerPath", Applied(Shim)),
    field("linux.seccomp.listenerMetadata", Applied(Shim)),
    field("linux.seccomp.syscalls", Section),
    field("linux.seccomp.syscalls[].names", Applied(Init)),
    field("linux.seccomp.syscalls[].action", Applied(Init)),
    field("linux.seccomp.syscalls[].errnoRet", Applied(Init)),
    field("linux.seccomp.syscalls[].args", Applied(Init)),
    field("linux.resources", Section),
    field("linux.resources.devices", Applied(Lxc)),
    field("linux.resources.memory", Section),
    field("linux.resources.memory.limit", Applied(Cgroup)),
    field("linux.resources.memory.reservation", Applied(Cgroup)),
    field("linux.resources.memory.swap", Applied(Cgroup)),
    field("linux.resources.memory.kernel", Warned("the kernel has no such limit any more")),
    field("linux.resources.memory.kernelTCP", Warned("the kernel has no such limit any more")),
    field("linux.resources.memory.swappiness", Translated("cgroup v1 only")),
    field(
        "linux.resources.memory.disableOOMKiller",
        Refused("cgroup2 has no such switch; raise the memory limit"),
    ),
    field("linux.resources.memory.useHierarchy", Ignored("always so in today's kernels")),
    field("linux.resources.memory.checkBeforeUpdate", Applied(Cgroup)),
    field("linux.resources.cpu", Section),
    field("linux.resources.cpu.shares", Translated("to cpu.weight on cgroup2")),
    field("linux.resources.cpu.quota", Applied(Cgroup)),
    field("linux.resources.cpu.burst", Applied(Cgroup)),
    field("linux.resources.cpu.period", Applied(Cgroup)),
    field("linux.resources.cpu.realtimeRuntime", Refused("cgroup2 has no realtime limits")),
    field("linux.resources.cpu.realtimePeriod", Refused("cgroup2 has no realtime limits")),
    field("linux.resources.cpu.cpus", Applied(Cgroup)),
    field("linux.resources.cpu.mems", Applied(Cgroup)),
    field("linux.resources.cpu.idle", Applied(Cgroup)),
    field("linux.resources.pids", Section),
    field("linux.resources.pids.limit", Applied(Cgroup)),
    field("linux.resources.blockIO", Section),
    field("linux.resources.blockIO.weight", Translated("to io.weight on cgroup2")),
    field("linux.resources.blockIO.leafWeight", Refused("set weight instead")),
    field("linux.resources.blockIO.weightDevice", Refused("set weight instead")),
    field("linux.resources.blockIO.throttleReadBpsDevice", Applied(Cgroup)),
    field("linux.resources.blockIO.throttleWriteBpsDevice", Applied(Cgroup)),
    field("linux.resources.blockIO.throttleReadIOPSDevice", Applied(Cgroup)),
    field("linux.resources.blockIO.throttleWriteIOPSDevice", Applied(Cgroup)),
    field("linux.resources.hugepageLimits", Applied(Cgroup)),
    field("linux.resources.network", Section),
    field("linux.resources.network.classID", Refused("cgroup2 has no network classes")),
    field("linux.resources.network.priorities", Refused("cgroup2 has no network priorities")),
    field("linux.resources.rdma", Refused("limit the device on the node")),
    field("linux.resources.unified", Applied(Cgroup)),
    field("solaris", OTHER_PLATFORM),
    field("windows", OTHER_PLATFORM),
    field("zos", OTHER_PLATFORM),
    field("vm", Ignored("a CT is not a virtual machine")),
];

/// Unknown fields named in the log; the rest is only counted, so that a bundle cannot flood it.
const UNKNOWN_NAMED: usize = 16;

/// A field that a document sets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetField {
    /// With the indexes of lists.
    pub path: String,
    /// `None` for a field that the specification does not have.
    pub field: Option<Field>,
}

/// Refuses a document that sets a refused field; returns the warnings of all others.
///
/// # Errors
/// [`Error::Unsupported`] for the first refused field.
pub(super) fn check(document: &Document) -> Result<Vec<String>, Error> {
    let mut warnings = Vec::new();
    let mut unknown = 0;
    for SetField { path, field } in set_by(document) {
        match field.map(|field| field.verdict) {
            Some(Refused(remedy)) => return Err(Error::unsupported(path, remedy)),
            Some(Warned(why)) => warnings.push(format!("{path} has no effect: {why}")),
            Some(Section | Applied(_) | Translated(_) | Ignored(_)) => {}
            None => {
                unknown += 1;
                if unknown <= UNKNOWN_NAMED {
                    warnings.push(format!("{path:?} is not a known field and has no effect"));
                }
            }
        }
    }
    if unknown > UNKNOWN_NAMED {
        warnings.push(format!("{} more unknown fields", unknown - UNKNOWN_NAMED));
    }
    Ok(warnings)
}

/// What a document sets, down to the fields that have a verdict of their own, sections left out.
pub(super) fn set_by(document: &Document) -> Vec<SetField> {
    let mut set = Vec::new();
    members(document.root(), "", "", &mut set);
    set
}

/// `concrete` is the path with list indexes, `pattern` the one of the table.
fn value(value: &Value, concrete: String, pattern: &str, set: &mut Vec<SetField>) {
    let field = FIELDS.iter().find(|field| field.path == pattern).copied();
    match (field.map(|field| field.verdict), value) {
        // Whatever value it has, it is not known.
        (None, _) => set.push(SetField { path: concrete, field }),
        (Some(_), value) if !is_set(value) => {}
        (Some(Section), Value::Array(elements)) => {
            for (index, element) in elements.iter().enumerate() {
                members(element, &format!("{concrete}[{index}]."), &format!("{pattern}[]."), set);
            }
        }
        (Some(Section), value) => {
            members(value, &format!("{concrete}."), &format!("{pattern}."), set);
        }
        (Some(_), _) => set.push(SetField { path: concrete, field }),
    }
}

fn members(object: &Value, concrete: &str, pattern: &str, set: &mut Vec<SetField>) {
    // A wrong type here is reported by whoever reads the field.
    for (key, member) in object.as_object().into_iter().flatten() {
        value(member, format!("{concrete}{key}"), &format!("{pattern}{key}"), set);
    }
}

/// Go's clients write zero values for what they do not set.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Bool(true) => true,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(elements) => !elements.is_empty(),
        Value::Object(members) => !members.is_empty(),
    }
}

#[cfg(test)]
mod completeness;
#[cfg(test)]
mod manual;

#[cfg(test)]
mod tests {
    use super::*;

    fn check_json(json: &str) -> Result<Vec<String>, Error> {
        check(&Document::parse(json.as_bytes()).unwrap())
    }

    #[test]
    fn every_refused_field_is_refused_by_its_path() {
        for field in FIELDS {
            let Refused(remedy) = field.verdict else { continue };
            let mut value = serde_json::json!("x");
            for key in field.path.rsplit('.') {
                value = match key.strip_suffix("[]") {
                    Some(key) => serde_json::json!({ key: [{}, value] }),
                    None => serde_json::json!({ key: value }),
                };
            }
            let error = check_json(&value.to_string()).unwrap_err().to_string();
            let path = field.path.replace("[]", "[1]");
            assert_eq!(error, format!("{path} is not supported: {remedy}"));
        }
    }

    #[test]
    fn zero_values_of_refused_fields_pass() {
        let json = r#"{"process":{"selinuxLabel":"","scheduler":null},
            "linux":{"uidMappings":[],"intelRdt":{},"resources":{"memory":{"disableOOMKiller":false},
            "cpu":{"realtimeRuntime":0}}}}"#;
        assert_eq!(check_json(json).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn unknown_fields_are_named_up_to_a_bound() {
        assert_eq!(
            check_json(r#"{"linux":{"newThing":{"a":1}}}"#).unwrap(),
            ["\"linux.newThing\" is not a known field and has no effect"]
        );
        let many: serde_json::Map<_, _> =
            (0..100).map(|n| (format!("k{n}"), Value::from(1))).collect();
        let warnings = check_json(&Value::from(many).to_string()).unwrap();
        assert_eq!(warnings.len(), UNKNOWN_NAMED + 1);
        assert_eq!(warnings.last().unwrap(), "84 more unknown fields");
    }

    #[test]
    fn warned_fields_give_the_reason() {
        assert_eq!(
            check_json(r#"{"linux":{"resources":{"memory":{"kernel":5}}}}"#).unwrap(),
            ["linux.resources.memory.kernel has no effect: the kernel has no such limit any more"]
        );
    }

    #[test]
    fn paths_are_unique() {
        for (index, field) in FIELDS.iter().enumerate() {
            assert!(FIELDS[..index].iter().all(|other| other.path != field.path), "{}", field.path);
        }
    }
}
