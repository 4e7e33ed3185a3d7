//! The CT's own configuration file, `/etc/pve/lxc/<vmid>.conf`, and the claim of a VMID by
//! creating it.
//!
//! One typed writer makes the file's text. Every value is checked or encoded here, because one line
//! feed in a name would add an `lxc.*` line, and with it anything at all as root on the node. The
//! file holds only what Proxmox shows, and one `lxc.include`; nothing of the workload's arguments
//! or environment is ever written here, since the cluster replicates it to all nodes.
//!
//! The functions that touch files block; they are called from `spawn_blocking`.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use crate::config::{Vmid, VmidRange, is_tag, unusable_path};

/// A CT as Proxmox shows it.
#[derive(Debug, Clone, PartialEq)]
pub struct CtDescription {
    /// The CT's name in the UI, and its UTS name unless the include sets another.
    pub hostname: Hostname,
    /// Memory limit in MiB, at least 16. There is no "unlimited": absent would mean 512.
    pub memory_mib: u64,
    /// Swap limit in MiB.
    pub swap_mib: u64,
    /// Limit of CPU time; `None` is none.
    pub cpulimit: Option<CpuLimit>,
    /// CPU weight, 0 to 500000; `None` leaves Proxmox's default.
    pub cpuunits: Option<u32>,
    /// In this order.
    pub tags: Vec<Tag>,
    /// Which ids of the CT are which of the node; empty for a privileged CT.
    pub id_map: Vec<IdRange>,
    /// The notes: lines of text, without control characters.
    pub notes: String,
    /// Shown as the CT's root file system. For show only: the include sets the one that is used.
    pub rootfs: PathBuf,
    /// The node-local file with everything else, included as the last line.
    pub include: PathBuf,
}

/// A value cannot be written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the CT's {key} cannot be written into its Proxmox configuration: {problem}")]
pub struct RenderError {
    /// The key.
    pub key: &'static str,
    /// What is wrong with the value.
    pub problem: String,
}

impl CtDescription {
    /// The file's text, with the keys in the order in which Proxmox itself writes them.
    pub fn render(&self) -> Result<String, RenderError> {
        let error = |key, problem: &str| Err(RenderError { key, problem: problem.to_owned() });
        if self.notes.contains(|c: char| c.is_control() && c != '\n') {
            return error("notes", "they contain control characters");
        }
        if self.memory_mib < 16 {
            return error("memory", "it is below Proxmox's minimum of 16 MiB");
        }
        if self.cpuunits.is_some_and(|units| units > 500_000) {
            return error("cpuunits", "the value is above Proxmox's maximum of 500000");
        }
        let rootfs = rootfs_value(&self.rootfs).ok_or_else(|| RenderError {
            key: "rootfs",
            problem: format!("the path {:?} does not fit", self.rootfs),
        })?;
        let include = match self.include.to_str() {
            Some(path) if path.is_ascii() && unusable_path(path).is_none() => path,
            _ => return error("lxc.include", &format!("the path {:?} does not fit", self.include)),
        };

        let mut text = String::with_capacity(512 + self.notes.len());
        for line in self.notes.lines() {
            text.push('#');
            encode_into(&mut text, line);
            text.push('\n');
        }
        let mut line = |key: &str, value: &dyn fmt::Display| {
            use fmt::Write;
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{key}: {value}");
        };
        line("arch", &arch());
        line("console", &0);
        if let Some(limit) = &self.cpulimit {
            line("cpulimit", limit);
        }
        if let Some(units) = &self.cpuunits {
            line("cpuunits", units);
        }
        line("hostname", &self.hostname);
        line("memory", &self.memory_mib);
        line("onboot", &0);
        line("ostype", &"unmanaged");
        line("rootfs", &rootfs);
        line("swap", &self.swap_mib);
        if !self.tags.is_empty() {
            line("tags", &self.tags.iter().map(|tag| tag.0.as_str()).collect::<Vec<_>>().join(";"));
        }
        line("tty", &0);
        if !self.id_map.is_empty() {
            line("unprivileged", &1);
        }
        // Here and not in the include: a direct line keeps Proxmox from generating a profile that
        // would confine init while it still mounts.
        line("lxc.apparmor.profile", &"unconfined");
        // Here as well: Proxmox then writes no map of its own, which an include could replace only by
        // clearing it, and after that LXC 5 uses memory that it has freed.
        for range in &self.id_map {
            line("lxc.idmap", range);
        }
        // Last, so that it wins over every value that Proxmox generates.
        line("lxc.include", &include);
        Ok(text)
    }
}

/// Whose ids a range is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdKind {
    User,
    Group,
}

/// `size` ids of the CT, from `container` on, are those of the node from `host` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange {
    pub kind: IdKind,
    pub container: u32,
    pub host: u32,
    pub size: u32,
}

/// As the value of `lxc.idmap`.
impl fmt::Display for IdRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, container, host, size } = self;
        let kind = match kind {
            IdKind::User => 'u',
            IdKind::Group => 'g',
        };
        write!(f, "{kind} {container} {host} {size}")
    }
}

/// Proxmox's word for this machine's architecture.
fn arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "arm" => "armhf",
        "x86" => "i386",
        other => other,
    }
}

/// A path as the value of `rootfs`, which Proxmox reads as `VOLUME,KEY=VALUE…`.
fn rootfs_value(path: &Path) -> Option<&str> {
    let text = path.to_str()?;
    let plain = text.bytes().all(|b| b.is_ascii_graphic() && !b",=".contains(&b));
    let dots = text.split('/').any(|part| part == "." || part == "..");
    (plain && !dots && unusable_path(text).is_none()).then_some(text)
}

/// A DNS label: 1 to 63 letters, digits and inner hyphens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hostname(String);

impl Hostname {
    /// A readable name from any name or id of a container. Different ones may give the same: identity
    /// is never the hostname.
    pub fn from_name(name: &str) -> Hostname {
        let name = label(name, MAX_LABEL);
        Hostname(if name.is_empty() { "container".to_owned() } else { name })
    }

    /// A readable name for a container of a pod. Of a long pod's name the beginning stays, which is what
    /// its owner chose.
    pub fn from_pod(pod: &str, container: &str) -> Hostname {
        let container = label(container, MAX_LABEL / 2);
        let pod = label(pod, MAX_LABEL - 1 - container.len());
        match (pod.as_str(), container.as_str()) {
            ("", _) => Hostname::from_name(&container),
            (_, "") => Hostname(pod),
            _ => Hostname(format!("{pod}-{container}")),
        }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Hostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The longest label of a domain name (RFC 1035).
const MAX_LABEL: usize = 63;

/// A label of a domain name from any text, of at most `max` bytes; empty if nothing is left.
fn label(text: &str, max: usize) -> String {
    let allowed = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    let name: String = text.chars().map(allowed).skip_while(|c| *c == '-').take(max).collect();
    name.trim_end_matches('-').to_owned()
}

/// A tag in Proxmox's syntax.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tag(String);

impl Tag {
    /// A tag from any text: what Proxmox does not allow becomes `-`. `None` if nothing is left.
    pub fn sanitised(text: &str) -> Option<Tag> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "_-+.".contains(c);
        let tag: String = text
            .chars()
            .map(|c| if allowed(c) { c.to_ascii_lowercase() } else { '-' })
            .skip_while(|c| !c.is_ascii_alphanumeric() && *c != '_')
            .take(64)
            .collect();
        let tag = tag.trim_end_matches('-');
        is_tag(tag).then(|| Tag(tag.to_owned()))
    }

    /// A tag as it is; `None` if Proxmox would not take it.
    pub fn new(text: &str) -> Option<Tag> {
        is_tag(text).then(|| Tag(text.to_owned()))
    }

    /// The tag.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A number of CPUs whose time a CT may use at most.
///
/// Proxmox hands it to the kernel as a quota per 100 ms, and the kernel refuses less than 1 ms, so
/// smaller limits are shown as 0.01.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CpuLimit(f64);

impl CpuLimit {
    /// `None` if it is not a positive number; at most Proxmox's maximum of 8192.
    pub fn new(cpus: f64) -> Option<CpuLimit> {
        (cpus.is_finite() && cpus > 0.0).then(|| CpuLimit(cpus.clamp(0.01, 8192.0)))
    }
}

impl fmt::Display for CpuLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{:.3}", self.0);
        f.write_str(text.trim_end_matches('0').trim_end_matches('.'))
    }
}

/// Proxmox's encoding of notes: all but printable ASCII is percent-encoded, and `%` and `:` too.
fn encode_into(out: &mut String, text: &str) {
    for byte in text.bytes() {
        match byte {
            b' '..=b'~' if byte != b'%' && byte != b':' => out.push(char::from(byte)),
            _ => {
                use fmt::Write;
                let _ = write!(out, "%{byte:02X}");
            }
        }
    }
}

fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let code =
            text.get(at + 1..at + 3).filter(|code| code.bytes().all(|b| b.is_ascii_hexdigit()));
        match (bytes[at], code.and_then(|code| u8::from_str_radix(code, 16).ok())) {
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 3;
            }
            (byte, _) => {
                out.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// A CT's file as Proxmox reads it, without pending changes and snapshots.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ParsedConf {
    /// The notes; empty if there are none.
    pub description: String,
    /// Plain keys and values in their order.
    pub values: Vec<(String, String)>,
    /// Raw keys and values in their order.
    pub lxc: Vec<(String, String)>,
}

impl ParsedConf {
    /// Reads a file's text. As in Proxmox, a line that is none of the known kinds is ignored.
    pub fn parse(text: &str) -> ParsedConf {
        let mut conf = ParsedConf::default();
        for line in text.split('\n').take_while(|line| !is_section(line)) {
            if let Some(note) = line.strip_prefix('#') {
                conf.description.push_str(&decode(note));
                conf.description.push('\n');
            } else if let Some((key, value)) = raw_line(line) {
                conf.lxc.push((key.to_owned(), value.to_owned()));
            } else if let Some(("description", value)) = plain_line(line) {
                conf.description.push_str(&decode(value));
            } else if let Some((key, value)) = plain_line(line) {
                conf.values.push((key.to_owned(), value.to_owned()));
            }
        }
        conf
    }
}

/// `[pve:pending]` or `[SNAPSHOT]`.
fn is_section(line: &str) -> bool {
    let name = line.trim_end().strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    name.is_some_and(|name| {
        name.eq_ignore_ascii_case("pve:pending")
            || name.starts_with(|c: char| c.is_ascii_alphabetic())
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b))
    })
}

/// `lxc.KEY: VALUE` or `lxc.KEY = VALUE`.
fn raw_line(line: &str) -> Option<(&str, &str)> {
    let of_key = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_-.".contains(&b);
    let (key, rest) = line.split_at(line.bytes().position(|b| !of_key(b))?);
    key.strip_prefix("lxc.").filter(|name| !name.is_empty())?;
    let value = rest.strip_prefix(':').or_else(|| rest.trim_start().strip_prefix('='))?;
    Some((key, value.trim()))
}

/// `KEY: VALUE`, the key in letters and then digits.
fn plain_line(line: &str) -> Option<(&str, &str)> {
    let (key, value) = line.split_once(':')?;
    let (letters, value) = (key.trim_end_matches(|c: char| c.is_ascii_digit()), value.trim());
    let good = letters.starts_with(|c: char| c.is_ascii_lowercase())
        && letters.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
    (good && !value.is_empty()).then_some((key, value))
}

/// Why a VMID could not be claimed.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// A CT or VM with this VMID exists somewhere in the cluster.
    #[error("VMID {vmid} is in use")]
    Exists {
        /// The VMID.
        vmid: Vmid,
    },
    /// Every VMID of the range is in use.
    #[error(
        "all VMIDs of ct.vmid_range {range} are in use; widen the range or remove guests from it"
    )]
    RangeFull {
        /// The configured range.
        range: VmidRange,
    },
    /// pmxcfs takes no writes.
    #[error(
        "{} cannot be created: {source}; /etc/pve is read-only while the cluster has no quorum, see 'pvecm status'",
        path.display()
    )]
    NoQuorum {
        /// The CT's file.
        path: PathBuf,
        /// EACCES, EPERM or EROFS.
        source: io::Error,
    },
    /// pmxcfs is not mounted where the configuration says.
    #[error(
        "{} cannot be created: {source}; check proxmox.pmxcfs and 'systemctl status pve-cluster'",
        path.display()
    )]
    NotMounted {
        /// The CT's file.
        path: PathBuf,
        /// ENOENT, ENOTDIR or ENOTCONN.
        source: io::Error,
    },
    /// Anything else.
    #[error("{} cannot be written: {source}{}", path.display(), left(removal))]
    Write {
        /// The CT's file.
        path: PathBuf,
        /// Why.
        source: io::Error,
        /// Set if the half-written file could not be removed either.
        removal: Option<io::Error>,
    },
    /// The text could not be made.
    #[error(transparent)]
    Render(#[from] RenderError),
    /// The file with the next VMID cannot be used.
    #[error("{} cannot be used: {source}; check paths.run_dir", path.display())]
    Counter {
        /// `<run_dir>/vmid`
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl ClaimError {
    /// Whether the CT's file may exist because of the failed claim.
    pub fn may_have_written(&self) -> bool {
        matches!(self, ClaimError::Write { removal: Some(_), .. })
    }
}

fn left(removal: &Option<io::Error>) -> String {
    removal
        .as_ref()
        .map(|e| format!(", nor removed again: {e}; remove it by hand"))
        .unwrap_or_default()
}

/// The file of a CT of the local node.
pub fn conf_path(pmxcfs: &Path, vmid: Vmid) -> PathBuf {
    pmxcfs.join("lxc").join(format!("{vmid}.conf"))
}

/// Claims `vmid` by creating its file with `text`.
///
/// pmxcfs makes the exclusive creation atomic in the whole cluster and for CTs and VMs alike; it is
/// the only reservation of a VMID that there is. The text goes in with a single write, so nobody
/// ever reads half a configuration. No sync: pmxcfs commits each write to its database, and after a
/// crash of the node a CT without its run directory is swept anyway.
pub fn claim(pmxcfs: &Path, vmid: Vmid, text: &str) -> Result<PathBuf, ClaimError> {
    let path = conf_path(pmxcfs, vmid);
    let open = OpenOptions::new().write(true).create_new(true).mode(0o640).open(&path);
    let mut file = match open {
        Ok(file) => file,
        Err(source) => return Err(cannot_create(path, vmid, source)),
    };
    // Not write_all: a second write would be a second version of the file.
    let written = match file.write(text.as_bytes()) {
        Ok(n) if n == text.len() => Ok(()),
        Ok(n) => Err(io::Error::new(
            io::ErrorKind::WriteZero,
            format!("only {n} of {} bytes taken", text.len()),
        )),
        Err(e) => Err(e),
    };
    drop(file);
    match written {
        Ok(()) => Ok(path),
        Err(source) => {
            // The file is ours: the exclusive creation made it.
            let removal = std::fs::remove_file(&path).err();
            Err(ClaimError::Write { path, source, removal })
        }
    }
}

fn cannot_create(path: PathBuf, vmid: Vmid, source: io::Error) -> ClaimError {
    use nix::errno::Errno;
    match source.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EEXIST) => ClaimError::Exists { vmid },
        Some(Errno::EACCES | Errno::EPERM | Errno::EROFS) => ClaimError::NoQuorum { path, source },
        Some(Errno::ENOENT | Errno::ENOTDIR | Errno::ENOTCONN) => {
            ClaimError::NotMounted { path, source }
        }
        _ => ClaimError::Write { path, source, removal: None },
    }
}

/// The VMID to try next: a counter that all shims of the node share, so that parallel creates do not
/// race for the same VMID, and a VMID is used again as late as possible.
///
/// A hint only; [`claim`] decides. An unreadable counter starts over.
pub fn next_vmid(range: VmidRange, run_dir: &Path) -> Result<Vmid, ClaimError> {
    let path = run_dir.join("vmid");
    advance(range, run_dir, &path).map_err(|source| ClaimError::Counter { path, source })
}

fn advance(range: VmidRange, run_dir: &Path, path: &Path) -> io::Result<Vmid> {
    use std::os::unix::fs::{DirBuilderExt, FileExt};
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(run_dir)?;
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)?;
    // The lock goes with the descriptor, also when the process is killed.
    let file =
        Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| io::Error::from(errno))?;
    let mut buffer = [0; 16];
    let n = file.read_at(&mut buffer, 0)?;
    let last =
        std::str::from_utf8(&buffer[..n]).ok().and_then(|text| text.trim().parse::<Vmid>().ok());
    let next = last.map_or(range.first(), |last| range.after(last));
    // Fixed width: shorter numbers leave no rest of longer ones behind.
    file.write_at(format!("{next:<12}\n").as_bytes(), 0)?;
    file.set_len(13)?;
    Ok(next)
}

#[cfg(test)]
mod tests;
