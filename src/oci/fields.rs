//! The verdict of every field of the OCI runtime specification, in one table.
//!
//! Paths are those of the JSON document; `[]` stands for each element of a list. A field that is
//! applied can still be refused for a particular value by the module that reads it.

use serde_json::Value;

use super::Error;
use super::document::Document;

/// What becomes of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Holds further fields, which have their own verdicts.
    Section,
    /// Honoured as it is. For objects and lists without a fixed set of fields this includes all
    /// that is below.
    Applied,
    /// Honoured in another form: how.
    Translated(&'static str),
    /// Without effect, as with runc: why.
    Ignored(&'static str),
    /// Without effect, and the log says so.
    Warned(&'static str),
    /// A bundle that sets it is refused: what to do instead.
    Refused(&'static str),
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

use Verdict::{Applied, Ignored, Refused, Section, Translated, Warned};

const OTHER_PLATFORM: Verdict = Ignored("for another operating system");
const FIRST_PROCESS: Verdict = Refused("start the container without it");

/// All fields, in the order of the specification.
pub const FIELDS: &[Field] = &[
    field("ociVersion", Applied),
    field("hostname", Applied),
    field("domainname", Applied),
    field("annotations", Applied),
    field("root", Section),
    field("root.path", Applied),
    field("root.readonly", Applied),
    field("mounts", Section),
    field("mounts[].destination", Applied),
    field("mounts[].type", Applied),
    field("mounts[].source", Applied),
    field("mounts[].options", Applied),
    field("mounts[].uidMappings", Refused("id-mapped mounts are not available yet")),
    field("mounts[].gidMappings", Refused("id-mapped mounts are not available yet")),
    field("process", Section),
    field("process.terminal", Applied),
    field("process.consoleSize", Applied),
    field("process.user", Section),
    field("process.user.uid", Applied),
    field("process.user.gid", Applied),
    field("process.user.umask", Applied),
    field("process.user.additionalGids", Applied),
    field("process.user.username", OTHER_PLATFORM),
    field("process.args", Applied),
    field("process.commandLine", OTHER_PLATFORM),
    field("process.env", Applied),
    field("process.cwd", Applied),
    field("process.capabilities", Section),
    field("process.capabilities.bounding", Applied),
    field("process.capabilities.effective", Applied),
    field("process.capabilities.inheritable", Applied),
    field("process.capabilities.permitted", Applied),
    field("process.capabilities.ambient", Applied),
    field("process.rlimits", Applied),
    field("process.noNewPrivileges", Applied),
    field("process.apparmorProfile", Applied),
    field("process.oomScoreAdj", Applied),
    field("process.selinuxLabel", Refused("Proxmox VE has no SELinux; use an AppArmor profile")),
    field("process.ioPriority", FIRST_PROCESS),
    field("process.scheduler", FIRST_PROCESS),
    field("process.execCPUAffinity", Refused("set linux.resources.cpu.cpus instead")),
    field("hooks", Section),
    field("hooks.prestart", Applied),
    field("hooks.createRuntime", Applied),
    field(
        "hooks.createContainer",
        Refused("use createRuntime (on the host) or startContainer (in the container)"),
    ),
    field("hooks.startContainer", Applied),
    field("hooks.poststart", Applied),
    field("hooks.poststop", Applied),
    field("linux", Section),
    field("linux.namespaces", Applied),
    field("linux.uidMappings", Refused("user namespaces are not available yet")),
    field("linux.gidMappings", Refused("user namespaces are not available yet")),
    field("linux.timeOffsets", Refused("time namespaces are not available yet")),
    field("linux.devices", Applied),
    field("linux.netDevices", Refused("prepare the network namespace before the start")),
    field("linux.cgroupsPath", Translated("systemd's form becomes the path that systemd uses")),
    field("linux.rootfsPropagation", Applied),
    field("linux.maskedPaths", Applied),
    field("linux.readonlyPaths", Applied),
    field("linux.mountLabel", Refused("Proxmox VE has no SELinux")),
    field("linux.sysctl", Applied),
    field("linux.intelRdt", Refused("assign the resource class on the node")),
    field("linux.memoryPolicy", Refused("set linux.resources.cpu.mems instead")),
    field("linux.personality", Section),
    field("linux.personality.domain", Applied),
    field("linux.personality.flags", Warned("no personality flag is defined")),
    field("linux.seccomp", Section),
    field("linux.seccomp.defaultAction", Applied),
    field("linux.seccomp.defaultErrnoRet", Applied),
    field("linux.seccomp.architectures", Applied),
    field("linux.seccomp.flags", Applied),
    field("linux.seccomp.listenerPath", Refused("seccomp notification is not available yet")),
    field("linux.seccomp.listenerMetadata", Refused("seccomp notification is not available yet")),
    field("linux.seccomp.syscalls", Section),
    field("linux.seccomp.syscalls[].names", Applied),
    field("linux.seccomp.syscalls[].action", Applied),
    field("linux.seccomp.syscalls[].errnoRet", Applied),
    field("linux.seccomp.syscalls[].args", Applied),
    field("linux.resources", Section),
    field("linux.resources.devices", Applied),
    field("linux.resources.memory", Section),
    field("linux.resources.memory.limit", Applied),
    field("linux.resources.memory.reservation", Applied),
    field("linux.resources.memory.swap", Applied),
    field("linux.resources.memory.kernel", Warned("the kernel has no such limit any more")),
    field("linux.resources.memory.kernelTCP", Warned("the kernel has no such limit any more")),
    field("linux.resources.memory.swappiness", Translated("cgroup v1 only")),
    field(
        "linux.resources.memory.disableOOMKiller",
        Refused("cgroup2 has no such switch; raise the memory limit"),
    ),
    field("linux.resources.memory.useHierarchy", Ignored("always so in today's kernels")),
    field("linux.resources.memory.checkBeforeUpdate", Ignored("a new container uses nothing yet")),
    field("linux.resources.cpu", Section),
    field("linux.resources.cpu.shares", Translated("to cpu.weight on cgroup2")),
    field("linux.resources.cpu.quota", Applied),
    field("linux.resources.cpu.burst", Applied),
    field("linux.resources.cpu.period", Applied),
    field("linux.resources.cpu.realtimeRuntime", Refused("cgroup2 has no realtime limits")),
    field("linux.resources.cpu.realtimePeriod", Refused("cgroup2 has no realtime limits")),
    field("linux.resources.cpu.cpus", Applied),
    field("linux.resources.cpu.mems", Applied),
    field("linux.resources.cpu.idle", Applied),
    field("linux.resources.pids", Section),
    field("linux.resources.pids.limit", Applied),
    field("linux.resources.blockIO", Section),
    field("linux.resources.blockIO.weight", Translated("to io.weight on cgroup2")),
    field("linux.resources.blockIO.leafWeight", Refused("set weight instead")),
    field("linux.resources.blockIO.weightDevice", Refused("set weight instead")),
    field("linux.resources.blockIO.throttleReadBpsDevice", Applied),
    field("linux.resources.blockIO.throttleWriteBpsDevice", Applied),
    field("linux.resources.blockIO.throttleReadIOPSDevice", Applied),
    field("linux.resources.blockIO.throttleWriteIOPSDevice", Applied),
    field("linux.resources.hugepageLimits", Applied),
    field("linux.resources.network", Section),
    field("linux.resources.network.classID", Refused("cgroup2 has no network classes")),
    field("linux.resources.network.priorities", Refused("cgroup2 has no network priorities")),
    field("linux.resources.rdma", Refused("limit the device on the node")),
    field("linux.resources.unified", Applied),
    field("solaris", OTHER_PLATFORM),
    field("windows", OTHER_PLATFORM),
    field("zos", OTHER_PLATFORM),
    field("vm", Ignored("a CT is not a virtual machine")),
];

/// Unknown fields named in the log; the rest is only counted, so that a bundle cannot flood it.
const UNKNOWN_NAMED: usize = 16;

/// Refuses a document that sets a refused field; returns the warnings of all others.
///
/// # Errors
/// [`Error::Unsupported`] for the first refused field.
pub(super) fn check(document: &Document) -> Result<Vec<String>, Error> {
    let mut walk = Walk::default();
    walk.object(document.root(), "", "")?;
    if walk.unknown > UNKNOWN_NAMED {
        walk.warnings.push(format!("{} more unknown fields", walk.unknown - UNKNOWN_NAMED));
    }
    Ok(walk.warnings)
}

#[derive(Default)]
struct Walk {
    warnings: Vec<String>,
    unknown: usize,
}

impl Walk {
    /// `concrete` is the path with list indexes, `pattern` the one of the table.
    fn value(&mut self, value: &Value, concrete: &str, pattern: &str) -> Result<(), Error> {
        let Some(field) = FIELDS.iter().find(|field| field.path == pattern) else {
            self.unknown += 1;
            if self.unknown <= UNKNOWN_NAMED {
                self.warnings.push(format!("{concrete:?} is not a known field and has no effect"));
            }
            return Ok(());
        };
        if !is_set(value) {
            return Ok(());
        }
        match field.verdict {
            Section => match value {
                Value::Array(elements) => {
                    elements.iter().enumerate().try_for_each(|(index, element)| {
                        self.object(
                            element,
                            &format!("{concrete}[{index}]."),
                            &format!("{pattern}[]."),
                        )
                    })
                }
                _ => self.object(value, &format!("{concrete}."), &format!("{pattern}.")),
            },
            Applied | Translated(_) | Ignored(_) => Ok(()),
            Warned(why) => {
                self.warnings.push(format!("{concrete} has no effect: {why}"));
                Ok(())
            }
            Refused(remedy) => Err(Error::unsupported(concrete, remedy)),
        }
    }

    fn object(&mut self, value: &Value, concrete: &str, pattern: &str) -> Result<(), Error> {
        // A wrong type here is reported by whoever reads the field.
        let Some(members) = value.as_object() else { return Ok(()) };
        members.iter().try_for_each(|(key, member)| {
            self.value(member, &format!("{concrete}{key}"), &format!("{pattern}{key}"))
        })
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
