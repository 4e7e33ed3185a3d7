//! `process.capabilities`: names to bit masks.

use proxmox_shim_init::protocol::Capabilities;

use super::document::Document;
use super::{Error, Host};

/// Index is the number in `capabilities(7)`, `linux/capability.h`.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// `None` if the object is missing. Names that this kernel does not know are left out with a
/// warning, as runc does: a client may be newer than the node.
pub(super) fn read(
    spec: &Document,
    host: &Host,
    warnings: &mut Vec<String>,
) -> Result<Option<Capabilities>, Error> {
    if spec.get("process.capabilities").is_none() {
        return Ok(None);
    }
    let mut unknown: Vec<String> = Vec::new();
    let mut set = |name: &str| -> Result<u64, Error> {
        let mut mask = 0;
        for item in spec.list::<String>(&format!("process.capabilities.{name}"))? {
            match number(&item.value).filter(|number| *number <= host.last_capability) {
                Some(number) => mask |= 1 << number,
                None if unknown.contains(&item.value) => {}
                None => unknown.push(item.value),
            }
        }
        Ok(mask)
    };
    let capabilities = Capabilities {
        bounding: set("bounding")?,
        effective: set("effective")?,
        inheritable: set("inheritable")?,
        permitted: set("permitted")?,
        ambient: set("ambient")?,
    };
    if !unknown.is_empty() {
        unknown.sort();
        warnings.push(format!(
            "process.capabilities: ignoring unknown or unavailable capabilities {unknown:?}"
        ));
    }
    Ok(Some(capabilities))
}

fn number(name: &str) -> Option<u32> {
    let name = name.strip_prefix("CAP_")?;
    (0..).zip(NAMES).find_map(|(number, known)| (known == name).then_some(number))
}

#[cfg(test)]
mod tests {
    use super::super::tests::host;
    use super::*;

    fn read_json(json: &str) -> (Option<Capabilities>, Vec<String>) {
        let mut warnings = Vec::new();
        let spec = Document::parse(json.as_bytes()).unwrap();
        (read(&spec, &host(), &mut warnings).unwrap(), warnings)
    }

    #[test]
    fn names_have_the_kernel_s_numbers() {
        for (name, expected) in
            [("CHOWN", 0), ("NET_ADMIN", 12), ("SYS_ADMIN", 21), ("MKNOD", 27), ("SETFCAP", 31)]
        {
            assert_eq!(number(&format!("CAP_{name}")), Some(expected));
        }
        assert_eq!(number("CAP_CHECKPOINT_RESTORE"), Some(40));
        assert_eq!(number("SYS_ADMIN"), None, "runc wants the prefix");
    }

    #[test]
    fn each_set_has_its_own_mask() {
        let (capabilities, warnings) = read_json(
            r#"{"process":{"capabilities":{"bounding":["CAP_CHOWN","CAP_KILL"],
            "effective":["CAP_KILL"],"inheritable":null,"permitted":["CAP_FOWNER"],
            "ambient":["CAP_BPF"]}}}"#,
        );
        assert_eq!(
            capabilities.unwrap(),
            Capabilities {
                bounding: 1 | 1 << 5,
                effective: 1 << 5,
                inheritable: 0,
                permitted: 1 << 3,
                ambient: 1 << 39,
            }
        );
        assert!(warnings.is_empty());
    }

    #[test]
    fn unknown_names_are_skipped_and_named_once() {
        let (capabilities, warnings) = read_json(
            r#"{"process":{"capabilities":{"bounding":["CAP_FUTURE","CAP_KILL","kill"],
            "effective":["CAP_FUTURE"]}}}"#,
        );
        assert_eq!(capabilities.unwrap().bounding, 1 << 5);
        assert_eq!(
            warnings,
            ["process.capabilities: ignoring unknown or unavailable capabilities \
              [\"CAP_FUTURE\", \"kill\"]"]
        );
    }

    #[test]
    fn missing_is_not_empty() {
        assert_eq!(read_json(r#"{"process":{}}"#).0, None);
        assert_eq!(
            read_json(r#"{"process":{"capabilities":{}}}"#).0,
            Some(Capabilities::default())
        );
    }
}
