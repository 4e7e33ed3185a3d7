//! The shim's configuration: one TOML file, read strictly.
//!
//! An unknown key, a wrong type or an impossible value is an error, and each error is one sentence
//! that names the file, the key and the remedy, because `start` can show an administrator no more
//! than that. Every key is documented in the shipped file, [`SHIPPED`].
//!
//! Which configuration applies, highest first:
//!
//! 1. `config_body` of `runtimeoptions.v1.Options`: a whole configuration by itself. It is not
//!    merged over any file, so that reading it tells everything that applies.
//! 2. `config_path` of the same message.
//! 3. [`DEFAULT_PATH`].
//!
//! What belongs here: files that an administrator writes. State of the shim does not.

mod options;
mod password;
mod reader;
mod secret_file;
mod token;
mod vmid;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

pub use options::{OptionsError, RuntimeOptions};
pub use password::Password;
pub use secret_file::SecretFileError;
pub use token::ApiToken;
pub use vmid::{InvalidVmid, Vmid, VmidRange};

use reader::Section;
pub(crate) use reader::unusable_path;

/// Read when the runtime options name no other file.
pub const DEFAULT_PATH: &str = "/etc/containerd-shim-proxmox/config.toml";

/// The shipped configuration file, which documents every key.
pub const SHIPPED: &str = include_str!("../../shim-config/config.toml");

/// Where packages install init.
const INSTALLED_INIT: &str = "/usr/libexec/containerd-shim-proxmox/proxmox-shim-init";
const INIT_NAME: &str = "proxmox-shim-init";

/// The whole configuration, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// How to reach Proxmox.
    pub proxmox: Proxmox,
    /// What CTs look like.
    pub ct: Ct,
    /// Directories and files of the shim.
    pub paths: Paths,
    /// Logging.
    pub log: Log,
    /// Where this came from, for messages: the file's path or "config_body of the runtime options".
    pub origin: String,
}

/// `[proxmox]`
#[derive(Debug, Clone, PartialEq)]
pub struct Proxmox {
    /// `https://HOST:PORT` each, without a trailing slash; the port is always there. Never empty;
    /// the first is preferred, the others are further nodes of its cluster.
    pub endpoints: Vec<String>,
    /// The local node's name, whichever endpoint is asked.
    pub node: String,
    /// Who the shim is to Proxmox.
    pub login: Login,
    /// How the server's certificate is judged.
    pub trust: Trust,
    /// Where pmxcfs is mounted.
    pub pmxcfs: PathBuf,
    /// Limit for TCP and TLS connection set-up.
    pub connect_timeout: Duration,
    /// Limit for one whole request.
    pub request_timeout: Duration,
    /// Limit for one Proxmox task (start, stop, destroy).
    pub task_timeout: Duration,
}

/// Who the shim is to Proxmox, and where the secret is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Login {
    /// File with an API token; see [`ApiToken::load`].
    Token(PathBuf),
    /// File with a user's name and password, for tickets; see [`Password::load`].
    Password(PathBuf),
}

/// How the server's certificate is judged. There is no way of not judging it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trust {
    /// The certificate itself has one of these fingerprints. Never empty.
    Fingerprints(Vec<Fingerprint>),
    /// It is issued by a certificate of this PEM file.
    CaFile(PathBuf),
    /// It is issued by one of the system's roots.
    SystemRoots,
}

/// The SHA-256 of a DER certificate; displayed as `AA:BB:…`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint(pub [u8; 32]);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            write!(f, "{}{byte:02X}", if i == 0 { "" } else { ":" })?;
        }
        Ok(())
    }
}

/// The text is not a SHA-256 fingerprint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected 32 hexadecimal pairs such as AA:BB:…")]
pub struct InvalidFingerprint;

impl FromStr for Fingerprint {
    type Err = InvalidFingerprint;

    /// 32 pairs of hexadecimal digits with colons between them.
    fn from_str(s: &str) -> Result<Fingerprint, InvalidFingerprint> {
        let mut bytes = [0; 32];
        let mut parts = s.split(':');
        for byte in &mut bytes {
            let pair = parts.next().ok_or(InvalidFingerprint)?;
            if pair.len() != 2 || !pair.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(InvalidFingerprint);
            }
            *byte = u8::from_str_radix(pair, 16).map_err(|_| InvalidFingerprint)?;
        }
        if parts.next().is_some() { Err(InvalidFingerprint) } else { Ok(Fingerprint(bytes)) }
    }
}

/// `[ct]`
#[derive(Debug, Clone, PartialEq)]
pub struct Ct {
    /// The VMIDs the shim may claim.
    pub vmid_range: VmidRange,
    /// Tags of every CT, in Proxmox's syntax.
    pub tags: Vec<String>,
    /// What the CT's rootfs is.
    pub rootfs: Rootfs,
    /// Which network the CT has.
    pub network: Network,
    /// On which node the CT runs.
    pub placement: Placement,
    /// Which abstract Unix sockets a container on the node's network reaches.
    pub abstract_sockets: AbstractSockets,
    /// Every container has a user namespace, Proxmox's if its specification has none.
    pub unprivileged: bool,
    /// How long init may take to connect.
    pub start_timeout: Duration,
}

/// `ct.abstract_sockets`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AbstractSockets {
    /// Those of its own processes.
    Isolated,
    /// All of the node's, as with runc.
    Shared,
}

/// `ct.rootfs`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rootfs {
    /// containerd's snapshot is the rootfs.
    Snapshot,
}

/// `ct.network`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// The network namespace that the OCI bundle names.
    Namespace,
}

/// `ct.placement`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// The node the shim runs on.
    Local,
}

/// `[paths]`
#[derive(Debug, Clone, PartialEq)]
pub struct Paths {
    /// Run directories of containers; on a tmpfs.
    pub run_dir: PathBuf,
    /// What must survive a reboot: the install id.
    pub state_dir: PathBuf,
    /// Configured path of init; use [`Config::init_path`].
    pub init: Option<PathBuf>,
}

/// `[log]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// The lowest level that is logged.
    pub level: log::LevelFilter,
}

/// Why there is no configuration. Each is one sentence with file, key and remedy.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error(
        "{}: cannot be read: {source}; install the shipped config.toml there, or name another \
         file with config_path in the runtime options", path.display()
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is no TOML.
    #[error("{origin}: line {line}: {message}; correct the TOML syntax")]
    Syntax {
        /// The file.
        origin: String,
        /// Counted from 1.
        line: usize,
        /// The parser's words.
        message: String,
    },
    /// A key is unknown, missing or has a wrong value.
    #[error("{origin}: {key}: {problem}")]
    Key {
        /// The file.
        origin: String,
        /// Table and key.
        key: String,
        /// What is wrong and what to write instead.
        problem: String,
    },
    /// The runtime options can't be decoded.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// init is nowhere.
    #[error(
        "{origin}: paths.init: no executable proxmox-shim-init at {tried}; install it, or set the \
         key to its path"
    )]
    InitMissing {
        /// The file.
        origin: String,
        /// Every path that was tried, with commas.
        tried: String,
    },
}

impl Config {
    /// The configuration that applies for these runtime options; see the module's documentation.
    pub fn resolve(options: Option<&RuntimeOptions>) -> Result<Config, ConfigError> {
        match options {
            Some(RuntimeOptions { config_body: Some(body), .. }) => {
                Config::from_toml(body, "config_body of the runtime options")
            }
            Some(RuntimeOptions { config_path: Some(path), .. }) => Config::load(path),
            _ => Config::load(Path::new(DEFAULT_PATH)),
        }
    }

    /// As [`Config::resolve`], for options as a client packed them (type URL and bytes). Options of
    /// another runtime are ignored with a warning: some clients send runc's to every shim.
    pub fn for_options(packed: Option<(&str, &[u8])>) -> Result<Config, ConfigError> {
        let options = match packed {
            Some((type_url, value)) => {
                let options = RuntimeOptions::from_any(type_url, value)?;
                if options.is_none() && !type_url.is_empty() {
                    log::warn!("runtime options of type {type_url} are ignored");
                }
                options
            }
            None => None,
        };
        Config::resolve(options.as_ref())
    }

    /// Reads a configuration file.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
        Config::from_toml(&text, &path.display().to_string())
    }

    /// Reads a configuration; `origin` is what messages call it.
    pub fn from_toml(text: &str, origin: &str) -> Result<Config, ConfigError> {
        let table: toml::Table = text.parse().map_err(|e| syntax_error(text, origin, &e))?;
        let mut root = Section::root(origin, table);
        let proxmox = proxmox(root.section("proxmox")?)?;
        let ct = ct(root.section("ct")?)?;
        let paths = paths(root.section("paths")?)?;
        let log = log(root.section("log")?)?;
        root.finish()?;
        Ok(Config { proxmox, ct, paths, log, origin: origin.to_owned() })
    }

    /// Where init is: as configured; else beside the shim's executable, so that a build tree works
    /// as it is; else where packages install it.
    pub fn init_path(&self) -> Result<PathBuf, ConfigError> {
        let exe = std::env::current_exe().ok();
        self.init_path_beside(exe.as_deref())
    }

    fn init_path_beside(&self, exe: Option<&Path>) -> Result<PathBuf, ConfigError> {
        let candidates: Vec<PathBuf> = match &self.paths.init {
            // Never another one than asked for.
            Some(path) => vec![path.clone()],
            None => exe
                .and_then(Path::parent)
                .map(|dir| dir.join(INIT_NAME))
                .into_iter()
                .chain([PathBuf::from(INSTALLED_INIT)])
                .collect(),
        };
        if let Some(path) = candidates.iter().find(|path| is_executable(path)) {
            return Ok(path.clone());
        }
        let tried =
            candidates.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ");
        Err(ConfigError::InitMissing { origin: self.origin.clone(), tried })
    }
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

fn syntax_error(text: &str, origin: &str, error: &toml::de::Error) -> ConfigError {
    let at = error.span().map_or(0, |span| span.start.min(text.len()));
    let line = text.as_bytes()[..at].iter().filter(|b| **b == b'\n').count() + 1;
    let message = error.message().split_whitespace().collect::<Vec<_>>().join(" ");
    ConfigError::Syntax { origin: origin.to_owned(), line, message }
}

fn proxmox(mut s: Section<'_>) -> Result<Proxmox, ConfigError> {
    const ENDPOINT: &str = "https://127.0.0.1:8006";
    const TOKEN_FILE: &str = "/etc/containerd-shim-proxmox/token";
    let mut endpoints = Vec::new();
    for text in s.one_or_more("endpoint", ENDPOINT)?.unwrap_or_default() {
        let endpoint = endpoint(&text).map_err(|problem| s.error("endpoint", problem))?;
        if endpoints.contains(&endpoint) {
            return Err(
                s.error("endpoint", format!("names '{endpoint}' twice; remove one of the two"))
            );
        }
        endpoints.push(endpoint);
    }
    if endpoints.is_empty() {
        let problem = format!(
            "is missing; write endpoint = \"{ENDPOINT}\" under [proxmox] for the local node"
        );
        return Err(s.error("endpoint", problem));
    }
    let node = match s.text("node", "pve1")? {
        Some(node) if is_dns_label(&node) => node,
        Some(node) => {
            let problem = format!("'{node}' is not a node name; write one as in 'ls /etc/pve/nodes', such as \"pve1\"");
            return Err(s.error("node", problem));
        }
        None => local_node().ok_or_else(|| {
            s.error("node", "is missing and the host's name is not a node name; write node = \"…\" under [proxmox]")
        })?,
    };
    let token_file = s.path("token_file", TOKEN_FILE)?;
    let password_file = s.path("password_file", "/etc/containerd-shim-proxmox/password")?;
    let login = match (token_file, password_file) {
        (Some(_), Some(_)) => {
            return Err(s.error(
                "password_file",
                "cannot be set together with proxmox.token_file; remove one of the two",
            ));
        }
        (None, Some(path)) => Login::Password(path),
        (path, None) => Login::Token(path.unwrap_or_else(|| TOKEN_FILE.into())),
    };
    let mut fingerprints = Vec::new();
    for text in s.one_or_more("fingerprint", "AA:BB:…")?.unwrap_or_default() {
        fingerprints.push(text.parse::<Fingerprint>().map_err(|e| {
            s.error("fingerprint", format!("{e}; print it with 'pvenode cert info' (the one of pve-ssl.pem or pveproxy-ssl.pem)"))
        })?);
    }
    let ca_file = s.path("ca_file", "/etc/pve/pve-root-ca.pem")?;
    let trust = match ca_file {
        Some(_) if !fingerprints.is_empty() => {
            return Err(s.error(
                "ca_file",
                "cannot be set together with proxmox.fingerprint; remove one of the two",
            ));
        }
        Some(path) => Trust::CaFile(path),
        None if fingerprints.is_empty() => Trust::SystemRoots,
        None => Trust::Fingerprints(fingerprints),
    };
    let pmxcfs = s.path("pmxcfs", "/etc/pve")?.unwrap_or_else(|| "/etc/pve".into());
    let connect_timeout = s.seconds("connect_timeout", 5, 300)?;
    let request_timeout = s.seconds("request_timeout", 30, 3600)?;
    let task_timeout = s.seconds("task_timeout", 60, 3600)?;
    s.finish()?;
    Ok(Proxmox {
        endpoints,
        node,
        login,
        trust,
        pmxcfs,
        connect_timeout,
        request_timeout,
        task_timeout,
    })
}

fn ct(mut s: Section<'_>) -> Result<Ct, ConfigError> {
    let range = s.text("vmid_range", "90000-99999")?.unwrap_or_else(|| "90000-99999".to_owned());
    let vmid_range = range.parse().map_err(|_| {
        let problem = format!(
            "'{range}' is not a range of VMIDs; write FIRST-LAST with 100 <= FIRST <= LAST <= 999999999, such as \
             \"90000-99999\""
        );
        s.error("vmid_range", problem)
    })?;
    let tags =
        s.texts("tags", "[\"containerd\"]")?.unwrap_or_else(|| vec!["containerd".to_owned()]);
    if let Some(tag) = tags.iter().find(|tag| !is_tag(tag)) {
        let shown: String = tag.escape_debug().collect();
        let problem = format!(
            "'{shown}' is not a Proxmox tag; use letters, digits, '_', '-', '+' and '.', beginning with a letter, a digit or '_'"
        );
        return Err(s.error("tags", problem));
    }
    // Only one value each can be had today; `choice` refuses the rest by name.
    s.choice("rootfs", &["snapshot"], &["volume"])?;
    s.choice("network", &["namespace"], &["bridge"])?;
    s.choice("placement", &["local"], &["remote"])?;
    let (rootfs, network, placement) = (Rootfs::Snapshot, Network::Namespace, Placement::Local);
    let unprivileged = s.flag("unprivileged", false)?;
    let abstract_sockets = match s.choice("abstract_sockets", &["isolated", "shared"], &[])? {
        "shared" => AbstractSockets::Shared,
        _ => AbstractSockets::Isolated,
    };
    let start_timeout = s.seconds("start_timeout", 30, 3600)?;
    s.finish()?;
    Ok(Ct {
        vmid_range,
        tags,
        rootfs,
        network,
        placement,
        abstract_sockets,
        unprivileged,
        start_timeout,
    })
}

fn paths(mut s: Section<'_>) -> Result<Paths, ConfigError> {
    const RUN: &str = "/run/containerd-shim-proxmox";
    const STATE: &str = "/var/lib/containerd-shim-proxmox";
    let run_dir = s.path("run_dir", RUN)?.unwrap_or_else(|| RUN.into());
    let state_dir = s.path("state_dir", STATE)?.unwrap_or_else(|| STATE.into());
    let init = s.path("init", INSTALLED_INIT)?;
    s.finish()?;
    Ok(Paths { run_dir, state_dir, init })
}

fn log(mut s: Section<'_>) -> Result<Log, ConfigError> {
    let level = s.choice("level", &["info", "error", "warn", "debug", "trace"], &[])?;
    let level =
        level.parse().map_err(|_| s.error("level", "is not a log level; write \"info\""))?;
    s.finish()?;
    Ok(Log { level })
}

/// `https://HOST[:PORT]`, nothing else; answers with the port and without a slash.
fn endpoint(text: &str) -> Result<String, String> {
    const REMEDY: &str = "write https://HOST:8006 and nothing after it";
    // Looked for before anything else, because the other messages repeat the text.
    if text.contains('@') {
        return Err(format!(
            "must not contain a user name or password; {REMEDY} and put the token into proxmox.token_file"
        ));
    }
    let uri: hyper::Uri =
        text.parse().map_err(|e| format!("'{text}' is not a URL ({e}); {REMEDY}"))?;
    if uri.scheme_str() != Some("https") {
        return Err(format!("'{text}' is not an https URL; {REMEDY}"));
    }
    // The parser forgets a fragment.
    if !matches!(uri.path_and_query().map(|p| p.as_str()), None | Some("/")) || text.contains('#') {
        return Err(format!("'{text}' has something after the host and port; {REMEDY}"));
    }
    let authority = uri.authority().map(|a| a.as_str()).unwrap_or_default().to_ascii_lowercase();
    let (host, port) = match (uri.port_u16(), authority.rsplit_once(':')) {
        (Some(port), Some((host, _))) => (host, port),
        (_, Some((_, port))) if !port.ends_with(']') => {
            return Err(format!("'{text}' has no port after its last colon; {REMEDY}"));
        }
        _ => (authority.as_str(), 8006),
    };
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    if rustls_pki_types::ServerName::try_from(bare).is_err() {
        return Err(format!("'{text}' has no host that could have a certificate; {REMEDY}"));
    }
    Ok(format!("https://{host}:{port}"))
}

fn local_node() -> Option<String> {
    let name = nix::unistd::gethostname().ok()?.into_string().ok()?;
    let node = name.split('.').next()?.to_owned();
    is_dns_label(&node).then_some(node)
}

fn is_dns_label(s: &str) -> bool {
    (1..=63).contains(&s.len())
        && !s.starts_with('-')
        && !s.ends_with('-')
        && s.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

/// Proxmox's `pve-tag` format: `[a-z0-9_][a-z0-9_\-+.]*`, letters of either case.
pub(crate) fn is_tag(s: &str) -> bool {
    s.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        && s.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-+.".contains(&b))
}

#[cfg(test)]
mod tests;
