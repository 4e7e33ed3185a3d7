//! `-info` and `-v`: what this runtime is and what it can do, without any configuration.

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use serde_json::{Value, json};

use super::{Error, input};

/// The type under which Go's `typeurl` registers the OCI features; the value is JSON.
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// The versions of the OCI runtime specification whose bundles are understood.
const OCI_VERSION_MIN: &str = "1.0.0";
const OCI_VERSION_MAX: &str = "1.2.1";

const HOOKS: [&str; 5] = ["prestart", "createRuntime", "startContainer", "poststart", "poststop"];

const NAMESPACES: [&str; 7] = ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"];

#[rustfmt::skip]
const MOUNT_OPTIONS: [&str; 59] = [
    "async", "atime", "bind", "defaults", "dev", "diratime", "dirsync", "exec", "idmap", "iversion",
    "lazytime", "loud", "mand", "noatime", "nodev", "nodiratime", "noexec", "noiversion", "nolazytime", "nomand",
    "norelatime", "nostrictatime", "nosuid", "nosymfollow", "private", "ratime", "rbind", "rdev",
    "rdiratime", "relatime", "remount", "rexec", "ridmap", "rnoatime", "rnodev", "rnodiratime", "rnoexec",
    "rnorelatime", "rnostrictatime", "rnosuid", "rnosymfollow", "ro", "rprivate", "rrelatime", "rro",
    "rrw", "rshared", "rslave", "rstrictatime", "rsuid", "rsymfollow", "runbindable", "rw", "shared",
    "silent", "slave", "strictatime", "suid", "symfollow",
];

#[rustfmt::skip]
const CAPABILITIES: [&str; 41] = [
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL",
    "CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST", "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER",
    "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE", "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE", "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
];

#[rustfmt::skip]
const SECCOMP_ACTIONS: [&str; 8] = [
    "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL_THREAD", "SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP",
];

#[rustfmt::skip]
const SECCOMP_OPERATORS: [&str; 7] = [
    "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT", "SCMP_CMP_MASKED_EQ",
    "SCMP_CMP_NE",
];

#[rustfmt::skip]
const SECCOMP_ARCHITECTURES: [&str; 8] = [
    "SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM", "SCMP_ARCH_PPC64LE", "SCMP_ARCH_RISCV64", "SCMP_ARCH_S390X",
    "SCMP_ARCH_X32", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64",
];

const SECCOMP_FLAGS: [&str; 3] =
    ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC"];

/// Returns the encoded `RuntimeInfo`. containerd puts its own message for the runtime's options on
/// stdin and gets it back.
pub(super) fn run() -> Result<Vec<u8>, Error> {
    let input = input::read()?;
    Ok(runtime_info(&input).write_to_bytes()?)
}

fn runtime_info(input: &[u8]) -> RuntimeInfo {
    let mut version = RuntimeVersion::new();
    version.version = env!("CARGO_PKG_VERSION").to_string();
    version.revision = option_env!("SHIM_REVISION").unwrap_or_default().to_string();
    let mut features = Any::new();
    features.type_url = FEATURES_TYPE.to_string();
    features.value = self::features().to_string().into_bytes();
    let mut info = RuntimeInfo::new();
    info.name = super::RUNTIME.to_string();
    info.version = MessageField::some(version);
    info.features = MessageField::some(features);
    info.options = input::runtime_options(input)
        .map(|options| {
            let mut any = Any::new();
            any.type_url = options.type_url;
            any.value = options.value;
            any
        })
        .into();
    info
}

/// What containerd's CRI decides by: without `rro` no recursive read-only mounts are asked for,
/// without id-mapped mounts no user namespaces.
///
/// Source: the OCI runtime specification, `features.md` and `features-linux.md`.
fn features() -> Value {
    json!({
        "ociVersionMin": OCI_VERSION_MIN,
        "ociVersionMax": OCI_VERSION_MAX,
        "hooks": HOOKS,
        "mountOptions": MOUNT_OPTIONS.as_slice(),
        "linux": {
            "namespaces": NAMESPACES,
            "capabilities": CAPABILITIES.as_slice(),
            "cgroup": {
                "v1": true,
                "v2": true,
                "systemd": false,
                "systemdUser": false,
                "rdma": false,
            },
            "seccomp": {
                "enabled": true,
                "actions": SECCOMP_ACTIONS,
                "operators": SECCOMP_OPERATORS,
                "archs": SECCOMP_ARCHITECTURES,
                "knownFlags": SECCOMP_FLAGS,
                "supportedFlags": SECCOMP_FLAGS,
            },
            "apparmor": { "enabled": true },
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": true } },
        },
    })
}

/// `-v`, in the form of containerd's own shims.
pub(super) fn version() -> String {
    let revision = option_env!("SHIM_REVISION").unwrap_or("unknown");
    let rust = option_env!("SHIM_RUSTC_VERSION").unwrap_or("unknown");
    format!(
        "{}:\n  Version:  {}\n  Revision: {revision}\n  Rust version: {rust}\n",
        super::NAME,
        env!("CARGO_PKG_VERSION"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lists_are_sorted_or_complete_and_without_repetition() {
        for list in [
            MOUNT_OPTIONS.as_slice(),
            &CAPABILITIES,
            &SECCOMP_ACTIONS,
            &SECCOMP_OPERATORS,
            &NAMESPACES,
        ] {
            let mut unique = list.to_vec();
            unique.sort_unstable();
            unique.dedup();
            assert_eq!(unique.len(), list.len());
        }
        // CAP_CHECKPOINT_RESTORE is number 40 in linux/capability.h.
        assert_eq!(CAPABILITIES[40], "CAP_CHECKPOINT_RESTORE");
        assert_eq!(CAPABILITIES[21], "CAP_SYS_ADMIN");
    }

    #[test]
    fn the_options_come_back() {
        let mut any = Any::new();
        any.type_url = "runtimeoptions.v1.Options".into();
        any.value = vec![1];
        let info = runtime_info(&any.write_to_bytes().unwrap());
        assert_eq!(info.options.as_ref(), Some(&any));
        assert!(runtime_info(b"").options.is_none());
    }
}
