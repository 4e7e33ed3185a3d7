//! Whose CT it is.
//!
//! A CT is ours only if its notes carry the marker that was written when it was created: this
//! installation's id, the VMID, containerd's namespace and container id, and a random number made
//! for that one creation. The VMID is part of it because a clone, or a backup restored under
//! another VMID, carries the same notes. The raw `lxc.include` must name the same container too.
//!
//! Functions that touch files block; they are called from `spawn_blocking`.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::types::CtConfig;
use crate::config::Vmid;

/// 128 bits: an installation, a creation or a boot. Displays as 32 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Id128(u128);

impl Id128 {
    /// A random one.
    pub fn random() -> io::Result<Id128> {
        let mut bytes = [0; 16];
        File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        Ok(Id128(u128::from_be_bytes(bytes)))
    }
}

impl fmt::Display for Id128 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// The text is not an [`Id128`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected 32 hexadecimal digits")]
pub struct InvalidId;

impl FromStr for Id128 {
    type Err = InvalidId;

    fn from_str(s: &str) -> Result<Id128, InvalidId> {
        if s.len() != 32 || !s.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            return Err(InvalidId);
        }
        u128::from_str_radix(s, 16).map(Id128).map_err(|_| InvalidId)
    }
}

/// What makes a CT ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// This installation; see [`install_id`].
    pub install_id: Id128,
    /// The CT.
    pub vmid: Vmid,
    /// containerd's namespace.
    pub namespace: String,
    /// containerd's container id.
    pub container_id: String,
    /// Made for this creation alone.
    pub nonce: Id128,
    /// The node's boot in which it was created; see [`boot_id`].
    pub boot_id: Id128,
}

/// Begins the line in the notes.
const MARK: &str = "containerd-shim-proxmox:";
const VERSION: &str = "v1";
/// For names from annotations, which anybody may write.
const MAX_VALUE: usize = 512;

/// Why a CT is not ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotOurs {
    /// The notes have no marker.
    #[error("its notes have no line of this shim")]
    NoMarker,
    /// The notes have several.
    #[error("its notes have several lines of this shim")]
    SeveralMarkers,
    /// The marker cannot be read.
    #[error("the line of this shim in its notes cannot be read")]
    BadMarker,
    /// The marker names something else.
    #[error("the {field} in its notes is {found}, not {expected}")]
    Differs {
        /// Which part of the identity.
        field: &'static str,
        /// As in the identity.
        expected: String,
        /// As in the notes.
        found: String,
    },
    /// The raw keys do not name the container's run directory.
    #[error("its lxc.include is not that of the container")]
    Include,
}

impl fmt::Display for Identity {
    /// The marker: one line, without white space inside its values.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{MARK} {VERSION} install={} vmid={} namespace={} id={} nonce={} boot={}",
            self.install_id,
            self.vmid,
            escape(&self.namespace),
            escape(&self.container_id),
            self.nonce,
            self.boot_id
        )
    }
}

impl Identity {
    /// The CT's notes: words for people, then the marker. `about` are names and values, which may come
    /// from anybody: they are bounded and stay on their lines.
    pub fn notes(&self, about: &[(&str, &str)]) -> String {
        let words = |text: &str, max: usize| -> String {
            text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).take(max).collect()
        };
        let mut notes = format!(
            "containerd: {}/{}\n",
            words(&self.namespace, 256),
            words(&self.container_id, 256)
        );
        for (name, value) in about {
            notes.push_str(&format!("{name}: {}\n", words(value, MAX_VALUE)));
        }
        notes.push_str("\nManaged by containerd. Stop and remove it there.\n\n");
        notes.push_str(&self.to_string());
        notes
    }

    /// Finds the marker in a CT's notes. Other lines may have been edited by people.
    pub fn find(description: &str) -> Result<Identity, NotOurs> {
        let mut lines = description.lines().map(str::trim).filter(|line| line.starts_with(MARK));
        let line = lines.next().ok_or(NotOurs::NoMarker)?;
        if lines.next().is_some() {
            return Err(NotOurs::SeveralMarkers);
        }
        parse(line).ok_or(NotOurs::BadMarker)
    }

    /// Whether `config` is the CT of this identity. To be asked right before each call that could
    /// destroy somebody's CT.
    pub fn verify(&self, config: &CtConfig) -> Result<(), NotOurs> {
        let found = Identity::find(&config.description)?;
        let fields = [
            ("installation", self.install_id.to_string(), found.install_id.to_string()),
            ("VMID", self.vmid.to_string(), found.vmid.to_string()),
            ("namespace", escape(&self.namespace), escape(&found.namespace)),
            ("container id", escape(&self.container_id), escape(&found.container_id)),
            ("nonce", self.nonce.to_string(), found.nonce.to_string()),
            ("boot id", self.boot_id.to_string(), found.boot_id.to_string()),
        ];
        for (field, expected, found) in fields {
            if expected != found {
                return Err(NotOurs::Differs { field, expected, found });
            }
        }
        // The notes can be edited through the API, raw keys cannot.
        let tail = Path::new(&self.namespace).join(&self.container_id).join("lxc.conf");
        let mut includes = config.lxc.iter().filter(|(key, _)| key == "lxc.include");
        let ours = includes.next().is_some_and(|(_, path)| Path::new(path).ends_with(&tail));
        if ours && includes.next().is_none() { Ok(()) } else { Err(NotOurs::Include) }
    }
}

fn parse(line: &str) -> Option<Identity> {
    let mut words = line.split_ascii_whitespace();
    if words.next() != Some(MARK) || words.next() != Some(VERSION) {
        return None;
    }
    let mut value = |key: &str| words.next()?.strip_prefix(key)?.strip_prefix('=');
    let identity = Identity {
        install_id: value("install")?.parse().ok()?,
        vmid: value("vmid")?.parse().ok()?,
        namespace: unescape(value("namespace")?)?,
        container_id: unescape(value("id")?)?,
        nonce: value("nonce")?.parse().ok()?,
        boot_id: value("boot")?.parse().ok()?,
    };
    words.next().is_none().then_some(identity)
}

/// containerd's names need no escaping (`[A-Za-z0-9._-]`); anything else must not end the word.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"._-".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

fn unescape(text: &str) -> Option<String> {
    let mut parts = text.split('%');
    let mut out = parts.next()?.as_bytes().to_vec();
    for part in parts {
        let (code, rest) = part.split_at_checked(2)?;
        let good = code.bytes().all(|b| b.is_ascii_hexdigit());
        out.push(good.then(|| u8::from_str_radix(code, 16).ok()).flatten()?);
        out.extend_from_slice(rest.as_bytes());
    }
    String::from_utf8(out).ok()
}

/// Why the ids of this installation or boot cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum IdError {
    /// A file cannot be read or made.
    #[error("{}: cannot be used: {source}; check paths.state_dir", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The install id's file holds something else.
    #[error(
        "{}: is not an installation id; restore it, or remove it if no CT of this shim is left on \
         the node", path.display()
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
    },
}

/// This installation's id, made at the first call and kept in `<state_dir>/install-id`.
///
/// A corrupt file is an error and never replaced: with another id the shim would no longer know
/// its own CTs.
pub fn install_id(state_dir: &Path) -> Result<Id128, IdError> {
    let path = state_dir.join("install-id");
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| IdError::Io { path, source }
    };
    match fs::read_to_string(&path) {
        Ok(text) => return text.trim_end().parse().map_err(|_| IdError::Corrupt { path }),
        Err(e) if e.kind() == io::ErrorKind::InvalidData => return Err(IdError::Corrupt { path }),
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io(&path)(e)),
        Err(_) => {}
    }
    fs::DirBuilder::new().recursive(true).mode(0o700).create(state_dir).map_err(io(state_dir))?;
    let id = Id128::random().map_err(io(Path::new("/dev/urandom")))?;
    let temporary = state_dir
        .join(format!(".install-id.{}", Id128::random().map_err(io(Path::new("/dev/urandom")))?));
    let made = (|| {
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(&temporary)?;
        writeln!(file, "{id}")?;
        file.sync_all()?;
        // A link, not a rename: of several first shims one wins, and the others take its id.
        fs::hard_link(&temporary, &path)?;
        File::open(state_dir)?.sync_all()
    })();
    let _ = fs::remove_file(&temporary);
    match made {
        Ok(()) => Ok(id),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            let text = fs::read_to_string(&path).map_err(io(&path))?;
            text.trim_end().parse().map_err(|_| IdError::Corrupt { path })
        }
        Err(e) => Err(io(&path)(e)),
    }
}

/// The id of the node's current boot (`random(4)`, `/proc/sys/kernel/random/boot_id`).
pub fn boot_id() -> Result<Id128, IdError> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text =
        fs::read_to_string(path).map_err(|source| IdError::Io { path: path.to_owned(), source })?;
    text.trim().replace('-', "").parse().map_err(|_| IdError::Corrupt { path: path.to_owned() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ours() -> Identity {
        Identity {
            install_id: Id128(1),
            vmid: Vmid::new(90_001).unwrap(),
            namespace: "default".into(),
            container_id: "web".into(),
            nonce: Id128(2),
            boot_id: Id128(3),
        }
    }

    fn config(identity: &Identity) -> CtConfig {
        let include = format!("/run/x/{}/{}/lxc.conf", identity.namespace, identity.container_id);
        CtConfig {
            description: identity.notes(&[("image", "docker.io/library/busybox:latest")]) + "\n",
            lxc: vec![
                ("lxc.apparmor.profile".into(), "unconfined".into()),
                ("lxc.include".into(), include),
            ],
            ..CtConfig::default()
        }
    }

    #[test]
    fn the_marker_survives_edits_of_other_lines() {
        let notes = ours().notes(&[("image", "busybox")]);
        assert!(notes.starts_with("containerd: default/web\nimage: busybox\n"), "{notes}");
        let marker = "containerd-shim-proxmox: v1 install=00000000000000000000000000000001 vmid=90001 \
                      namespace=default id=web nonce=00000000000000000000000000000002 \
                      boot=00000000000000000000000000000003";
        assert!(notes.ends_with(&format!("\n{marker}")), "{notes}");
        let edited = format!("My server\n\n  {marker}  \nmore\r\n");
        assert_eq!(Identity::find(&edited), Ok(ours()));
    }

    #[test]
    fn our_own_ct_is_verified() {
        assert_eq!(ours().verify(&config(&ours())), Ok(()));
    }

    #[test]
    fn each_difference_is_refused_and_named() {
        type Change = fn(&mut Identity);
        let changes: [(&str, Change); 6] = [
            ("installation", |i| i.install_id = Id128(9)),
            ("VMID", |i| i.vmid = Vmid::new(90_002).unwrap()),
            ("namespace", |i| i.namespace = "k8s.io".into()),
            ("container id", |i| i.container_id = "db".into()),
            ("nonce", |i| i.nonce = Id128(9)),
            ("boot id", |i| i.boot_id = Id128(9)),
        ];
        for (name, change) in changes {
            let mut other = ours();
            change(&mut other);
            let refused = ours().verify(&config(&other)).unwrap_err();
            assert!(
                matches!(&refused, NotOurs::Differs { field, .. } if *field == name),
                "{refused:?}"
            );
            assert!(refused.to_string().contains(name));
        }
    }

    #[test]
    fn missing_double_or_broken_markers_and_other_includes_are_refused() {
        let with = |description: &str| {
            let config = CtConfig { description: description.into(), ..config(&ours()) };
            ours().verify(&config)
        };
        let marker = ours().to_string();
        assert_eq!(with(""), Err(NotOurs::NoMarker));
        assert_eq!(with("somebody's database"), Err(NotOurs::NoMarker));
        assert_eq!(with(&format!("x {marker}")), Err(NotOurs::NoMarker));
        assert_eq!(with(&format!("{marker}\n{marker}")), Err(NotOurs::SeveralMarkers));
        for broken in [
            &marker[..marker.len() - 1],
            &marker.replace("v1", "v2"),
            &format!("{marker} x=1"),
            MARK,
        ] {
            assert_eq!(with(broken), Err(NotOurs::BadMarker), "{broken}");
        }
        let mut without = config(&ours());
        without.lxc.clear();
        assert_eq!(ours().verify(&without), Err(NotOurs::Include));
        let mut other = config(&ours());
        other.lxc[1].1 = "/run/x/default/web2/lxc.conf".into();
        assert_eq!(ours().verify(&other), Err(NotOurs::Include));
        let mut two = config(&ours());
        two.lxc.push(two.lxc[1].clone());
        assert_eq!(ours().verify(&two), Err(NotOurs::Include));
    }

    #[test]
    fn a_hostile_image_name_adds_no_line() {
        let image = format!("x\n{}\n{}", ours(), "y".repeat(10_000));
        let notes = ours().notes(&[("image", &image)]);
        assert_eq!(Identity::find(&notes), Ok(ours()));
        assert!(notes.len() < 4096);
    }

    #[test]
    fn the_install_id_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("a/b");
        let ids: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..8).map(|_| scope.spawn(|| install_id(&state).unwrap())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(ids.iter().all(|id| *id == ids[0]));
        assert_eq!(install_id(&state).unwrap(), ids[0]);
        let files: Vec<_> = fs::read_dir(&state).unwrap().map(|f| f.unwrap().file_name()).collect();
        assert_eq!(files, ["install-id"]);
        for corrupt in ["", "abc", "not\nit"] {
            fs::write(state.join("install-id"), corrupt).unwrap();
            assert!(matches!(install_id(&state), Err(IdError::Corrupt { .. })));
            assert_eq!(fs::read_to_string(state.join("install-id")).unwrap(), corrupt);
        }
    }

    #[test]
    fn boot_and_random_ids_can_be_had() {
        assert_eq!(boot_id().unwrap(), boot_id().unwrap());
        assert_ne!(Id128::random().unwrap(), Id128::random().unwrap());
    }

    proptest! {
        #[test]
        fn any_identity_comes_back_from_the_notes(
            install: u128, vmid in 100u32..=999_999_999, nonce: u128, boot: u128,
            namespace in any::<String>(), container_id in any::<String>(), image in any::<String>(),
        ) {
            let identity = Identity {
                install_id: Id128(install),
                vmid: Vmid::new(vmid).unwrap(),
                namespace,
                container_id,
                nonce: Id128(nonce),
                boot_id: Id128(boot),
            };
            prop_assert_eq!(Identity::find(&identity.notes(&[("image", &image)])), Ok(identity));
        }

        #[test]
        fn no_notes_make_it_panic(notes in "(\\PC|\n|containerd-shim-proxmox: v1 |[a-z]{1,9}=|%){0,40}") {
            let _ = Identity::find(&notes);
        }
    }
}
