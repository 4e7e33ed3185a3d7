//! The configuration file of a CT: parser, writer, and its form in the API.
//!
//! The parser is as lenient as Proxmox VE's: a line of the wrong form is reported and lost at the
//! next write, a value of the wrong type is reported, kept and used. The golden pairs in
//! `fixtures/lxc-config` are the specification.

use std::collections::BTreeMap;

use serde_json::{Map, Value as Json, json};
use sha1::{Digest, Sha1};

use crate::params::{Kind, Spec, opt, parse_bool, req};

const MAX: i64 = i64::MAX;

/// Architectures of a CT.
pub const ARCHS: &[&str] = &["amd64", "i386", "arm64", "armhf", "riscv32", "riscv64"];
/// Kinds of operating system that Proxmox VE knows how to set up.
pub const OSTYPES: &[&str] = &[
    "debian",
    "devuan",
    "ubuntu",
    "centos",
    "fedora",
    "opensuse",
    "archlinux",
    "alpine",
    "gentoo",
    "nixos",
    "unmanaged",
];
/// Values of the `lock` property.
pub const LOCKS: &[&str] = &[
    "backup",
    "create",
    "destroyed",
    "disk",
    "fstrim",
    "migrate",
    "mounted",
    "rollback",
    "snapshot",
    "snapshot-delete",
];

const FEATURES: &[Spec] = &[
    opt("force_rw_sys", Kind::Bool),
    opt("fuse", Kind::Bool),
    opt("keyctl", Kind::Bool),
    opt("mknod", Kind::Bool),
    opt("mount", Kind::Text(1024)),
    opt("nesting", Kind::Bool),
];

const NET: &[Spec] = &[
    req("name", Kind::Pattern(is_word)),
    opt("bridge", Kind::Pattern(is_word)),
    opt("firewall", Kind::Bool),
    opt("gw", Kind::Text(64)),
    opt("gw6", Kind::Text(64)),
    opt("host-managed", Kind::Bool),
    opt("hwaddr", Kind::Text(17)),
    opt("ip", Kind::Text(64)),
    opt("ip6", Kind::Text(64)),
    opt("link_down", Kind::Bool),
    opt("mtu", Kind::Int(64, 65535)),
    opt("rate", Kind::Number(0.0, f64::MAX)),
    opt("tag", Kind::Int(1, 4094)),
    opt("trunks", Kind::Text(1024)),
    opt("type", Kind::Enum(&["veth"])),
];

const ROOTFS: &[Spec] = &[
    req("volume", Kind::Text(4096)),
    opt("acl", Kind::Bool),
    opt("idmap", Kind::Text(4096)),
    opt("mountoptions", Kind::Text(255)),
    opt("quota", Kind::Bool),
    opt("replicate", Kind::Bool),
    opt("ro", Kind::Bool),
    opt("shared", Kind::Bool),
    opt("size", Kind::Pattern(is_size)),
];

const MOUNT_POINT: &[Spec] = &[
    req("volume", Kind::Text(4096)),
    opt("acl", Kind::Bool),
    opt("backup", Kind::Bool),
    opt("idmap", Kind::Text(4096)),
    opt("mountoptions", Kind::Text(255)),
    req("mp", Kind::Format(check_mount_path)),
    opt("quota", Kind::Bool),
    opt("replicate", Kind::Bool),
    opt("ro", Kind::Bool),
    opt("shared", Kind::Bool),
    opt("size", Kind::Pattern(is_size)),
];

fn is_size(text: &str) -> bool {
    crate::storage::parse_size(text).is_some()
}

/// A directory inside a CT.
fn check_mount_path(text: &str) -> Result<(), String> {
    let inside = text.starts_with('/')
        && text.len() > 1
        && !text.split('/').any(|part| matches!(part, "." | ".."))
        && !text.chars().any(char::is_control);
    if inside { Ok(()) } else { Err(format!("'{text}' is no path inside the container")) }
}

/// The options of a CT that the API can set.
pub const OPTIONS: &[Spec] = &[
    opt("arch", Kind::Enum(ARCHS)),
    opt("cmode", Kind::Enum(&["shell", "console", "tty"])),
    opt("console", Kind::Bool),
    opt("cores", Kind::Int(1, 8192)),
    opt("cpulimit", Kind::Number(0.0, 8192.0)),
    opt("cpuunits", Kind::Int(0, 500_000)),
    opt("debug", Kind::Bool),
    opt("description", Kind::Text(8192)),
    opt("dev[n]", Kind::Text(4096)),
    opt("entrypoint", Kind::Pattern(is_printable)),
    opt("env", Kind::Pattern(is_env)),
    opt("features", Kind::Props(FEATURES)),
    opt("hookscript", Kind::Text(4096)),
    opt("hostname", Kind::Format(check_dns_name)),
    opt("lock", Kind::Enum(LOCKS)),
    opt("memory", Kind::Int(16, MAX)),
    opt("mp[n]", Kind::Props(MOUNT_POINT)),
    opt("nameserver", Kind::Text(4096)),
    opt("net[n]", Kind::Props(NET)),
    opt("onboot", Kind::Bool),
    opt("ostype", Kind::Enum(OSTYPES)),
    opt("protection", Kind::Bool),
    opt("rootfs", Kind::Props(ROOTFS)),
    opt("searchdomain", Kind::Text(4096)),
    opt("startup", Kind::Text(4096)),
    opt("swap", Kind::Int(0, MAX)),
    opt("tags", Kind::Format(check_tags)),
    opt("template", Kind::Bool),
    opt("timezone", Kind::Text(255)),
    opt("tty", Kind::Int(0, 6)),
    opt("unprivileged", Kind::Bool),
    opt("unused[n]", Kind::Text(4096)),
];

/// Keys that only files have.
const FILE_ONLY: &[Spec] = &[
    opt("parent", Kind::Text(64)),
    opt("snapstate", Kind::Text(64)),
    opt("snaptime", Kind::Int(0, MAX)),
];

fn is_word(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_alphanumeric() || matches!(c, '-' | '_' | '.'))
}

fn is_printable(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c == '\t' || !c.is_ascii_control())
}

fn is_env(text: &str) -> bool {
    text.split('\0').all(|entry| match entry.split_once('=') {
        Some((name, value)) => {
            !name.is_empty()
                && name.chars().all(|c| c.is_alphanumeric() || c == '_')
                && value.chars().all(|c| c == '\t' || !c.is_ascii_control())
        }
        None => false,
    })
}

/// Whether the text is a DNS name.
pub fn check_dns_name(text: &str) -> Result<(), String> {
    let label = |l: &str| {
        !l.is_empty()
            && l.len() <= 63
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    if text.len() <= 255 && text.split('.').all(label) {
        Ok(())
    } else {
        Err("value does not look like a valid DNS name".into())
    }
}

fn check_tags(text: &str) -> Result<(), String> {
    let tag = |t: &str| {
        let mut chars = t.chars();
        chars.next().is_some_and(|c| c.is_ascii_alphanumeric() || c == '_')
            && chars.all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '+' | '.'))
    };
    if crate::params::split_list(text).iter().all(|t| tag(t)) && !text.contains('!') {
        Ok(())
    } else {
        Err("invalid characters in tag".into())
    }
}

/// Whether `name` can be named in `delete` or `revert`.
pub fn is_option(name: &str) -> bool {
    OPTIONS.iter().any(|s| s.matches(name))
}

/// The value of a key: whole numbers are numbers in the API, all else is text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// A value of type integer or boolean.
    Int(i64),
    /// Anything else, also a value that failed the check of its type.
    Text(String),
}

impl Value {
    /// The value as it stands in the file.
    pub fn to_text(&self) -> String {
        match self {
            Self::Int(n) => n.to_string(),
            Self::Text(s) => s.clone(),
        }
    }

    fn json(&self) -> Json {
        match self {
            Self::Int(n) => json!(n),
            Self::Text(s) => json!(s),
        }
    }
}

/// Types a value as the parser does; the error is the reason for a warning.
pub fn check_type(key: &str, value: &str) -> (Value, Option<String>) {
    let text = || Value::Text(value.to_owned());
    let failed = |kind: &str| Some(format!("type check ('{kind}') failed - got '{value}'"));
    let Some(spec) = OPTIONS.iter().chain(FILE_ONLY).find(|s| s.matches(key)) else {
        return (text(), Some(format!("unknown setting '{key}'")));
    };
    match spec.kind {
        Kind::Bool => match parse_bool(value) {
            Some(b) => (Value::Int(i64::from(b)), None),
            None => (text(), failed("boolean")),
        },
        Kind::Int(..) => match value.parse::<i64>().ok().filter(|n| *n >= 0) {
            Some(n) => (Value::Int(n), None),
            None => (text(), failed("integer")),
        },
        Kind::Number(..) => {
            let ok = value.parse::<f64>().is_ok_and(|n| n >= 0.0);
            (text(), if ok { None } else { failed("number") })
        }
        _ => (text(), None),
    }
}

/// One section of the file: the current configuration, the pending changes, or a snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Section {
    /// The notes, decoded, each comment line ending in a newline.
    pub description: Option<String>,
    /// Keys by name. `env` holds the runtime environment, its entries separated by NUL.
    pub values: BTreeMap<String, Value>,
    /// Raw `lxc.*` lines in file order.
    pub raw: Vec<(String, String)>,
}

impl Section {
    /// The text of a key.
    pub fn text(&self, key: &str) -> Option<String> {
        if key == "description" {
            return self.description.clone();
        }
        self.values.get(key).map(Value::to_text)
    }

    /// A whole number; `None` if absent or of the wrong type.
    pub fn int(&self, key: &str) -> Option<i64> {
        match self.values.get(key)? {
            Value::Int(n) => Some(*n),
            Value::Text(_) => None,
        }
    }

    /// A flag; absent is false.
    pub fn flag(&self, key: &str) -> bool {
        self.int(key) == Some(1)
    }

    /// Sets a key from its text, typed by the schema.
    pub fn set(&mut self, key: &str, text: &str) {
        if key == "description" {
            self.description = Some(text.to_owned());
        } else {
            self.values.insert(key.to_owned(), check_type(key, text).0);
        }
    }

    /// Removes a key; whether it was there.
    pub fn remove(&mut self, key: &str) -> bool {
        if key == "description" {
            return self.description.take().is_some();
        }
        self.values.remove(key).is_some()
    }

    /// Whether the key is set.
    pub fn has(&self, key: &str) -> bool {
        if key == "description" {
            self.description.is_some()
        } else {
            self.values.contains_key(key)
        }
    }

    /// All keys with their API values, the notes among them; without raw lines.
    pub fn entries(&self) -> Vec<(String, Json)> {
        let mut list: Vec<_> = self.values.iter().map(|(k, v)| (k.clone(), v.json())).collect();
        if let Some(text) = &self.description {
            list.push(("description".into(), json!(text)));
        }
        list
    }

    /// The values of a raw key in file order.
    pub fn raw_values<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.raw.iter().filter(move |(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    fn render(&self, out: &mut String) {
        if let Some(text) = &self.description {
            for line in text.trim_end_matches('\n').split('\n') {
                out.push('#');
                out.push_str(&encode_text(line));
                out.push('\n');
            }
        }
        for (key, value) in self.values.iter().filter(|(k, _)| *k != "env") {
            out.push_str(&format!("{key}: {}\n", value.to_text()));
        }
        if let Some(Value::Text(env)) = self.values.get("env") {
            for entry in env.split('\0') {
                out.push_str(&format!("lxc.environment.runtime: {entry}\n"));
            }
        }
        for (key, value) in &self.raw {
            out.push_str(&format!("{key}: {value}\n"));
        }
    }

    fn json(&self, digest: &str) -> Map<String, Json> {
        let mut map: Map<String, Json> = self.entries().into_iter().collect();
        map.insert("digest".into(), json!(digest));
        if !self.raw.is_empty() {
            map.insert("lxc".into(), self.raw.iter().map(|(k, v)| json!([k, v])).collect());
        }
        map
    }
}

/// A parsed configuration file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    /// What is in force.
    pub current: Section,
    /// What the next start applies; the key `delete` lists the keys to remove.
    pub pending: Section,
    /// Snapshots by name.
    pub snapshots: BTreeMap<String, Section>,
    /// SHA-1 of the file's bytes, in hexadecimal.
    pub digest: String,
}

enum Target {
    Current,
    Pending,
    Snapshot(String),
}

/// Parses a file. Never fails: what cannot be used is reported, in file order.
pub fn parse(text: &str, vmid: u32) -> (Config, Vec<String>) {
    let mut config = Config { digest: hex(&Sha1::digest(text.as_bytes())), ..Config::default() };
    let mut warnings = Vec::new();
    let mut target = Target::Current;
    for line in text.split('\n') {
        if line.trim().is_empty() {
            continue;
        }
        if let Some(next) = parse_section(line) {
            target = next;
            if let Target::Snapshot(name) = &target {
                config.snapshots.entry(name.clone()).or_default();
            }
            continue;
        }
        let in_pending = matches!(target, Target::Pending);
        let section = match &target {
            Target::Current => &mut config.current,
            Target::Pending => &mut config.pending,
            Target::Snapshot(name) => config.snapshots.entry(name.clone()).or_default(),
        };
        parse_line(line, vmid, in_pending, section, &mut warnings);
    }
    (config, warnings)
}

fn parse_section(line: &str) -> Option<Target> {
    let name = line.trim_end().strip_prefix('[')?.strip_suffix(']')?;
    if name.eq_ignore_ascii_case("pve:pending") {
        return Some(Target::Pending);
    }
    let mut bytes = name.bytes();
    let valid = bytes.next().is_some_and(|b| b.is_ascii_alphabetic())
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
    valid.then(|| Target::Snapshot(name.to_owned()))
}

fn parse_line(
    line: &str,
    vmid: u32,
    in_pending: bool,
    section: &mut Section,
    warnings: &mut Vec<String>,
) {
    let mut unparsed = || warnings.push(format!("vm {vmid} - unable to parse config: {line}"));
    if let Some(comment) = line.strip_prefix('#') {
        let notes = section.description.get_or_insert_default();
        notes.push_str(&percent_decode(comment));
        notes.push('\n');
        return;
    }
    if let Some((key, value)) = split_raw(line) {
        if key == "lxc.environment.runtime" {
            match section.values.get_mut("env") {
                Some(Value::Text(env)) => {
                    env.push('\0');
                    env.push_str(value);
                }
                _ => {
                    section.values.insert("env".into(), Value::Text(value.to_owned()));
                }
            }
            return;
        }
        match raw_key(key) {
            RawKey::Allowed => section.raw.push((key.to_owned(), value.to_owned())),
            RawKey::Deprecated(text) => {
                warnings.push(format!("vm {vmid} - {key}{text}"));
                section.raw.push((key.to_owned(), value.to_owned()));
            }
            RawKey::Refused(text) => warnings.push(format!("vm {vmid} - {key}: {text}")),
            RawKey::Unknown => unparsed(),
        }
        return;
    }
    let Some((key, value)) = split_plain(line) else {
        unparsed();
        return;
    };
    match key {
        "description" => {
            section.description.get_or_insert_default().push_str(&percent_decode(value))
        }
        "delete" if in_pending => {
            section.values.insert("delete".into(), Value::Text(value.to_owned()));
        }
        "delete" => {
            warnings.push(format!("vm {vmid} - property 'delete' is only allowed in [pve:pending]"))
        }
        _ => {
            let (typed, warning) = check_type(key, value);
            if let Some(warning) = warning {
                warnings.push(format!("vm {vmid} - unable to parse value of '{key}' - {warning}"));
            }
            section.values.insert(key.to_owned(), typed);
        }
    }
}

/// `lxc.key: value` or `lxc.key = value`; the value may be empty.
fn split_raw(line: &str) -> Option<(&str, &str)> {
    if !line.starts_with("lxc.") {
        return None;
    }
    let end =
        line.find(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit() || "_-.".contains(c)))?;
    if end <= "lxc.".len() {
        return None;
    }
    let (key, rest) = line.split_at(end);
    let rest = match rest.strip_prefix(':') {
        Some(rest) => rest,
        None => rest.trim_start().strip_prefix('=')?,
    };
    Some((key, rest.trim()))
}

/// `key: value` with a lower-case key that may end in digits, and a value.
fn split_plain(line: &str) -> Option<(&str, &str)> {
    let (key, value) = line.split_once(':')?;
    let value = value.trim();
    let stem = key.trim_end_matches(|c: char| c.is_ascii_digit());
    let valid = stem.starts_with(|c: char| c.is_ascii_lowercase())
        && stem.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
    (valid && !value.is_empty()).then_some((key, value))
}

enum RawKey {
    Allowed,
    Deprecated(String),
    Refused(&'static str),
    Unknown,
}

const RAW_KEYS: &[&str] = &[
    "lxc.apparmor.allow_incomplete",
    "lxc.apparmor.allow_nesting",
    "lxc.apparmor.profile",
    "lxc.apparmor.raw",
    "lxc.arch",
    "lxc.autodev",
    "lxc.cap.drop",
    "lxc.cap.keep",
    "lxc.console.logfile",
    "lxc.console.path",
    "lxc.devtty.dir",
    "lxc.environment",
    "lxc.environment.hooks",
    "lxc.group",
    "lxc.hook.autodev",
    "lxc.hook.clone",
    "lxc.hook.destroy",
    "lxc.hook.mount",
    "lxc.hook.post-stop",
    "lxc.hook.pre-mount",
    "lxc.hook.pre-start",
    "lxc.hook.start",
    "lxc.hook.stop",
    "lxc.hook.version",
    "lxc.idmap",
    "lxc.include",
    "lxc.init.cmd",
    "lxc.init.cwd",
    "lxc.init.gid",
    "lxc.init.groups",
    "lxc.init.uid",
    "lxc.kmsg",
    "lxc.log.file",
    "lxc.log.level",
    "lxc.mount.auto",
    "lxc.mount.entry",
    "lxc.mount.fstab",
    "lxc.pty.max",
    "lxc.rootfs.mount",
    "lxc.seccomp.notify.cookie",
    "lxc.seccomp.notify.proxy",
    "lxc.seccomp.profile",
    "lxc.selinux.context",
    "lxc.signal.halt",
    "lxc.signal.reboot",
    "lxc.signal.stop",
    "lxc.start.auto",
    "lxc.start.delay",
    "lxc.start.order",
    "lxc.sysctl.fs.mqueue",
    "lxc.sysctl.kernel.msgmax",
    "lxc.sysctl.kernel.msgmnb",
    "lxc.sysctl.kernel.msgmni",
    "lxc.sysctl.kernel.sem",
    "lxc.sysctl.kernel.shm_rmid_forced",
    "lxc.sysctl.kernel.shmall",
    "lxc.sysctl.kernel.shmmax",
    "lxc.sysctl.kernel.shmmni",
    "lxc.tty.max",
    "lxc.uts.name",
];

const RENAMED: &[(&str, &str)] = &[
    ("lxc.aa_allow_incomplete", "lxc.apparmor.allow_incomplete"),
    ("lxc.aa_profile", "lxc.apparmor.profile"),
    ("lxc.console", "lxc.console.path"),
    ("lxc.devttydir", "lxc.tty.dir"),
    ("lxc.haltsignal", "lxc.signal.halt"),
    ("lxc.id_map", "lxc.idmap"),
    ("lxc.init_cmd", "lxc.init.cmd"),
    ("lxc.init_gid", "lxc.init.gid"),
    ("lxc.init_uid", "lxc.init.uid"),
    ("lxc.logfile", "lxc.log.file"),
    ("lxc.loglevel", "lxc.log.level"),
    ("lxc.mount", "lxc.mount.fstab"),
    ("lxc.pts", "lxc.pty.max"),
    ("lxc.rebootsignal", "lxc.signal.reboot"),
    ("lxc.se_context", "lxc.selinux.context"),
    ("lxc.seccomp", "lxc.seccomp.profile"),
    ("lxc.stopsignal", "lxc.signal.stop"),
    ("lxc.tty", "lxc.tty.max"),
    ("lxc.utsname", "lxc.uts.name"),
];

fn raw_key(key: &str) -> RawKey {
    if RAW_KEYS.contains(&key)
        || ["lxc.cgroup2.", "lxc.prlimit.", "lxc.net."].iter().any(|p| key.starts_with(p))
    {
        return RawKey::Allowed;
    }
    if let Some((_, new)) = RENAMED.iter().find(|(old, _)| *old == key) {
        return RawKey::Deprecated(format!(" is deprecated and was renamed to {new}"));
    }
    if key.starts_with("lxc.limit.") {
        return RawKey::Deprecated(": lxc.limit.* was renamed to lxc.prlimit.*".into());
    }
    if key.starts_with("lxc.cgroup.") {
        return RawKey::Deprecated(
            " is deprecated, this will be a hard error in the future!".into(),
        );
    }
    match key {
        "lxc.rootfs.path" => RawKey::Refused("lxc.rootfs.path is auto generated from rootfs"),
        "lxc.rootfs.options" => RawKey::Refused(
            "lxc.rootfs.options is not supported, please use mount point options in the \
             \"rootfs\" key",
        ),
        _ => RawKey::Unknown,
    }
}

impl Config {
    /// The file as Proxmox VE writes it.
    pub fn render(&self) -> String {
        let mut out = String::new();
        self.current.render(&mut out);
        if self.pending != Section::default() {
            out.push_str("\n[pve:pending]\n");
            self.pending.render(&mut out);
        }
        for (name, section) in &self.snapshots {
            out.push_str(&format!("\n[{name}]\n"));
            section.render(&mut out);
        }
        out
    }

    /// The `data` of `GET …/config`: pending changes merged in, unless `current` is asked for.
    pub fn api(&self, current: bool) -> Json {
        let mut section = self.current.clone();
        if !current {
            for key in self.pending_deletes() {
                section.remove(&key);
            }
            for (key, value) in &self.pending.values {
                if key != "delete" {
                    section.values.insert(key.clone(), value.clone());
                }
            }
            if let Some(text) = &self.pending.description {
                section.description = Some(text.clone());
            }
        }
        Json::Object(section.json(&self.digest))
    }

    /// The `data` of `GET …/config?snapshot=NAME`.
    pub fn api_snapshot(&self, name: &str) -> Option<Json> {
        self.snapshots.get(name).map(|s| Json::Object(s.json(&self.digest)))
    }

    /// The `data` of `GET …/snapshot`.
    pub fn api_snapshots(&self, running: bool) -> Json {
        let parent = |section: &Section, row: &mut Json| {
            if let Some(parent) = section.text("parent") {
                row["parent"] = json!(parent);
            }
        };
        let mut rows = Vec::new();
        for (name, section) in &self.snapshots {
            let notes = section.description.clone().unwrap_or_default();
            let mut row = json!({"name": name, "description": notes});
            if let Some(time) = section.int("snaptime") {
                row["snaptime"] = json!(time);
            }
            parent(section, &mut row);
            rows.push(row);
        }
        let mut current = json!({
            "name": "current", "description": "You are here!", "digest": self.digest,
            "running": i32::from(running),
        });
        parent(&self.current, &mut current);
        rows.push(current);
        Json::Array(rows)
    }

    /// The `data` of `GET …/pending`.
    pub fn api_pending(&self) -> Json {
        let mut rows: BTreeMap<String, Map<String, Json>> = BTreeMap::new();
        let mut put = |key: String, field: &str, value: Json| {
            rows.entry(key).or_default().insert(field.to_owned(), value);
        };
        put("digest".into(), "value", json!(self.digest));
        for (key, value) in self.current.entries() {
            put(key, "value", value);
        }
        for (key, value) in self.pending.entries().into_iter().filter(|(k, _)| k != "delete") {
            put(key, "pending", value);
        }
        for key in self.pending_deletes() {
            put(key, "delete", json!(1));
        }
        rows.into_iter()
            .map(|(key, mut row)| {
                row.insert("key".into(), json!(key));
                Json::Object(row)
            })
            .collect()
    }

    /// The keys that the pending section removes.
    pub fn pending_deletes(&self) -> Vec<String> {
        let list = self.pending.text("delete").unwrap_or_default();
        list.split([',', ';', ' '])
            .map(|k| k.trim_start_matches('!'))
            .filter(|k| !k.is_empty())
            .map(str::to_owned)
            .collect()
    }

    /// Notes that a key is to be removed; a pending value of it is dropped.
    pub fn add_pending_delete(&mut self, key: &str) {
        self.pending.remove(key);
        let mut keys = self.pending_deletes();
        if !keys.iter().any(|k| k == key) {
            keys.push(key.to_owned());
            keys.sort();
        }
        self.pending.values.insert("delete".into(), Value::Text(keys.join(",")));
    }

    /// Drops whatever is pending for a key.
    pub fn revert(&mut self, key: &str) {
        self.pending.remove(key);
        let keys: Vec<_> = self.pending_deletes().into_iter().filter(|k| k != key).collect();
        if keys.is_empty() {
            self.pending.values.remove("delete");
        } else {
            self.pending.values.insert("delete".into(), Value::Text(keys.join(",")));
        }
    }

    /// Makes the pending changes current, as a start does. Whether there were any.
    pub fn apply_pending(&mut self) -> bool {
        if self.pending == Section::default() {
            return false;
        }
        for key in self.pending_deletes() {
            self.current.remove(&key);
        }
        let pending = std::mem::take(&mut self.pending);
        for (key, value) in pending.values.into_iter().filter(|(k, _)| k != "delete") {
            self.current.values.insert(key, value);
        }
        if pending.description.is_some() {
            self.current.description = pending.description;
        }
        true
    }

    /// The `lock` property, which blocks start, stop, changes and removal.
    pub fn lock(&self) -> Option<String> {
        self.current.text("lock")
    }
}

/// Decodes percent escapes, as in notes and in paths. What is no escape stays as it is.
pub fn percent_decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let escape = (bytes[i] == b'%')
            .then(|| bytes.get(i + 1..i + 3))
            .flatten()
            .and_then(|h| std::str::from_utf8(h).ok())
            .filter(|h| h.bytes().all(|b| b.is_ascii_hexdigit()))
            .and_then(|h| u8::from_str_radix(h, 16).ok());
        match escape {
            Some(byte) => {
                out.push(byte);
                i += 3;
            }
            None => {
                out.push(bytes[i]);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Encodes a line of notes: control characters, `%`, `:` and all that is not ASCII.
fn encode_text(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'%' | b':' => out.push_str(&format!("%{byte:02X}")),
            b'\t' | b' '..=b'~' => out.push(char::from(byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::golden;

    #[test]
    fn every_golden_file_gives_the_recorded_config_answer() {
        for case in golden::cases() {
            let (config, _) = parse(&case.conf, 500);
            let expected = case.json("api.json").unwrap();
            assert_eq!(config.api(false), expected["data"], "{}", case.name);
        }
    }

    #[test]
    fn every_golden_file_is_rewritten_as_recorded() {
        for case in golden::cases() {
            let (config, _) = parse(&case.conf, 500);
            let expected = case.text("rewritten.conf").unwrap_or_else(|| case.conf.clone());
            assert_eq!(config.render(), expected, "{}", case.name);
        }
    }

    #[test]
    fn every_golden_parser_warning_is_given() {
        for case in golden::cases() {
            let (_, warnings) = parse(&case.conf, 500);
            // The generator and Perl itself add warnings of their own to the recordings.
            let expected: Vec<_> = case
                .text("warn")
                .unwrap_or_default()
                .lines()
                .filter(|l| l.starts_with("vm 500 - "))
                .map(str::to_owned)
                .collect();
            assert_eq!(warnings, expected, "{}", case.name);
        }
    }

    #[test]
    fn escapes_are_decoded_once() {
        assert_eq!(percent_decode("UPID%3Apve1%3Aroot%40pam%21x%3A"), "UPID:pve1:root@pam!x:");
        assert_eq!(percent_decode("a+b"), "a+b");
        assert_eq!(percent_decode("%2541"), "%41");
        assert_eq!(percent_decode("%zz%4"), "%zz%4");
        assert_eq!(percent_decode("a=b&c%3D="), "a=b&c==");
    }

    #[test]
    fn pending_and_snapshot_answers_match() {
        let case = golden::case("pending");
        let (config, _) = parse(&case.conf, 500);
        assert_eq!(config.api(true), case.json("api-current.json").unwrap()["data"]);
        let mut rows = case.json("api-pending.json").unwrap()["data"].as_array().unwrap().clone();
        rows.sort_by_key(|r| r["key"].as_str().unwrap().to_owned());
        assert_eq!(config.api_pending(), Json::Array(rows));

        let case = golden::case("snapshots");
        let (config, _) = parse(&case.conf, 500);
        assert_eq!(
            config.api_snapshot("snap1").unwrap(),
            case.json("api-snap1.json").unwrap()["data"]
        );
        assert_eq!(config.api_snapshot("nope"), None);
    }

    #[test]
    fn applying_pending_changes_moves_them() {
        let (mut config, _) = parse(&golden::case("pending").conf, 500);
        assert!(config.apply_pending());
        assert_eq!(config.current.text("entrypoint").unwrap(), "/bin/sleep 2000");
        assert_eq!(config.current.text("env").unwrap(), "A=2");
        assert!(!config.current.has("swap"));
        assert_eq!(config.pending, Section::default());
        assert!(!config.apply_pending());
    }

    #[test]
    fn hostile_input_never_panics_and_settles_after_one_write() {
        let odd = [
            "",
            "\n\n",
            "[",
            "[]",
            "[pve:pending]",
            "[a]\n[a]\nx: 1",
            "%",
            "#%",
            "#%zz%4",
            "lxc.",
            "lxc.=",
            "lxc.cap.drop",
            "lxc.cap.drop=",
            "a:",
            ":",
            "memory: -1",
            "memory: 99999999999999999999",
            "\u{0}: 1",
            "net: x",
            "delete: x",
            "[pve:pending]\ndelete: !memory,,x",
            "#\u{e4}\nä: 1\n",
            "description: a%0Ab\n#c",
            "cpulimit: NaN",
            "lxc.environment.runtime: ",
            "#\n#\n",
        ];
        for text in odd {
            let once = parse(text, 100).0.render();
            let twice = parse(&once, 100).0.render();
            assert_eq!(once, twice, "{text:?}");
        }
    }

    /// What may stand in a file: lines of every kind, well and badly formed.
    fn any_line() -> impl Strategy<Value = String> {
        let key = prop_oneof![
            "[a-z_]{1,8}[0-9]{0,2}",
            Just("memory".to_owned()),
            Just("description".to_owned()),
            Just("delete".to_owned()),
            Just("lxc.environment.runtime".to_owned()),
            Just("lxc.cap.drop".to_owned()),
            "lxc\\.[a-z.]{0,12}",
        ];
        let value = prop_oneof!["[ -~]{0,12}", "[0-9]{1,20}", any::<String>()];
        let separator = prop_oneof![Just(": "), Just(":"), Just(" = "), Just("=")];
        prop_oneof![
            (key, separator, value).prop_map(|(k, s, v)| format!("{k}{s}{v}")),
            any::<String>().prop_map(|text| format!("#{text}")),
            Just("[pve:pending]".to_owned()),
            "\\[[a-z0-9-]{0,6}\\]",
            any::<String>(),
        ]
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(lines in prop::collection::vec(any_line(), 0..20)) {
            let (before, _) = parse(&lines.join("\n"), 100);
            let (after, _) = parse(&before.render(), 100);
            // Empty lines at the end of notes are lost, as with Proxmox VE.
            let comparable = |config: &Config| {
                let mut config = Config { digest: String::new(), ..config.clone() };
                let sections = [&mut config.current, &mut config.pending];
                for section in sections.into_iter().chain(config.snapshots.values_mut()) {
                    let notes = section.description.take();
                    section.description = notes.map(|text| text.trim_end_matches('\n').to_owned());
                }
                config
            };
            prop_assert_eq!(comparable(&before), comparable(&after));
            prop_assert_eq!(parse(&after.render(), 100).0, after);
        }

        #[test]
        fn no_value_of_an_option_adds_a_key(
            options in prop::collection::btree_map(
                prop::sample::select(OPTIONS.iter().map(|s| s.name.replace("[n]", "3")).collect::<Vec<_>>()),
                prop_oneof!["[ -~]{1,20}", "[a-z]{1,8}", "[0-9]{1,3}", any::<String>()],
                1..6,
            ),
        ) {
            let params = crate::params::Params(options);
            let mut section = Section::default();
            for (key, value) in &params.0 {
                let one = crate::params::Params(BTreeMap::from([(key.clone(), value.clone())]));
                let valid = crate::params::verify(&[OPTIONS], &one).is_ok();
                if valid && (key == "description" || !value.contains('\n')) {
                    section.set(key, value);
                }
            }
            let config = Config { current: section, ..Config::default() };
            let (after, _) = parse(&config.render(), 100);
            prop_assert!(after.pending == Section::default() && after.snapshots.is_empty());
            prop_assert!(after.current.raw.is_empty());
            for key in after.current.values.keys() {
                prop_assert!(config.current.has(key), "{} appeared", key);
            }
        }
    }
}
