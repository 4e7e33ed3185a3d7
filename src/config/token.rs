//! The API token's file.

use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use secrecy::zeroize::Zeroizing;
use secrecy::{ExposeSecret, SecretString};

/// A Proxmox API token, `USER@REALM!TOKENID=SECRET`.
///
/// The secret never appears in `Debug`, in an error, or in a log line; the id may.
pub struct ApiToken {
    id: String,
    secret: SecretString,
    path: PathBuf,
}

/// Why a token file cannot be used. Never holds any of the file's content.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// There is no such file.
    #[error(
        "token file {}: does not exist; create a token with 'pveum user token add' and write \
         USER@REALM!TOKENID=UUID into it with mode 0600", path.display()
    )]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// It exists but cannot be read.
    #[error("token file {}: cannot be read: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is a directory, a FIFO or a device.
    #[error("token file {}: is not a regular file; write USER@REALM!TOKENID=UUID into a file", path.display())]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// Group or others can read or write it.
    #[error(
        "token file {}: mode {mode:04o} lets others than its owner use it; \
         run 'chmod 0600 {}'", path.display(), path.display()
    )]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It belongs to another user.
    #[error("token file {}: belongs to uid {owner}; run 'chown root:root {}'", path.display(), path.display())]
    Owner {
        /// The file.
        path: PathBuf,
        /// The owner's uid.
        owner: u32,
    },
    /// The content is not a token.
    #[error(
        "token file {}: {problem}; it must hold the one line USER@REALM!TOKENID=UUID \
         (see 'pveum user token add')", path.display()
    )]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// Longer than any token; a wrong path to a large file is noticed without reading it all.
const MAX_SIZE: u64 = 4096;

impl ApiToken {
    /// Reads and checks a token file.
    ///
    /// A symbolic link is followed, because secret managers place files that way; what counts is
    /// the file that was opened: a regular one, owned by root (or the user the shim runs as), with
    /// no permission for group and others.
    pub fn load(path: &Path) -> Result<ApiToken, TokenError> {
        let unreadable = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => TokenError::Missing { path: path.to_owned() },
            _ => TokenError::Unreadable { path: path.to_owned(), source },
        };
        // O_NONBLOCK: opening a FIFO must not hang `start`.
        let flags = nix::fcntl::OFlag::O_NONBLOCK | nix::fcntl::OFlag::O_NOCTTY;
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(flags.bits())
            .open(path)
            .map_err(unreadable)?;
        // Checked on the open file: nothing can be exchanged between check and use.
        let meta = file.metadata().map_err(unreadable)?;
        if !meta.is_file() {
            return Err(TokenError::NotAFile { path: path.to_owned() });
        }
        let owner = meta.uid();
        if owner != 0 && owner != nix::unistd::geteuid().as_raw() {
            return Err(TokenError::Owner { path: path.to_owned(), owner });
        }
        let mode = meta.mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(TokenError::Mode { path: path.to_owned(), mode });
        }
        // Allocated once at full size, so that no copy is left behind by a growing buffer.
        let mut text = Zeroizing::new(String::with_capacity(MAX_SIZE as usize + 1));
        match file.take(MAX_SIZE + 1).read_to_string(&mut text) {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::InvalidData => {
                return Err(TokenError::Syntax { path: path.to_owned(), problem: "is not text" });
            }
            Err(e) => return Err(unreadable(e)),
        }
        Self::parse(&text, path)
    }

    /// Checks the content of a token file; `path` is for messages.
    pub fn parse(text: &str, path: &Path) -> Result<ApiToken, TokenError> {
        let syntax = |problem| TokenError::Syntax { path: path.to_owned(), problem };
        let text = text.trim();
        if text.is_empty() {
            return Err(syntax("is empty"));
        }
        if text.len() as u64 > MAX_SIZE || text.lines().count() > 1 {
            return Err(syntax("has more than one line"));
        }
        if text.starts_with("PVEAPIToken") || text.starts_with("Authorization") {
            return Err(syntax("begins with the name of an HTTP header"));
        }
        let (id, secret) = text.split_once('=').ok_or_else(|| syntax("has no '='"))?;
        let (user, token) =
            id.split_once('!').ok_or_else(|| syntax("has no '!' in the token's id"))?;
        let (user, realm) =
            user.rsplit_once('@').ok_or_else(|| syntax("has no '@REALM' in the token's id"))?;
        let user_ok =
            !user.is_empty() && user.chars().all(|c| c.is_ascii_graphic() && !":/!".contains(c));
        if !user_ok || !is_name(realm) || !is_name(token) {
            return Err(syntax("has a token id that Proxmox would not accept"));
        }
        if !is_uuid(secret) {
            return Err(syntax("has a secret that is not a UUID"));
        }
        Ok(ApiToken { id: id.to_owned(), secret: secret.to_owned().into(), path: path.to_owned() })
    }

    /// `USER@REALM!TOKENID`, without the secret.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The file it came from, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The value of the `Authorization` header.
    pub(crate) fn authorization(&self) -> SecretString {
        format!("PVEAPIToken={}={}", self.id, self.secret.expose_secret()).into()
    }
}

impl fmt::Debug for ApiToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiToken")
            .field("id", &self.id)
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

/// The pattern of realms and token ids: `[A-Za-z][A-Za-z0-9.\-_]+`.
fn is_name(s: &str) -> bool {
    s.len() > 1
        && s.starts_with(|c: char| c.is_ascii_alphabetic())
        && s.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_".contains(&b))
}

fn is_uuid(s: &str) -> bool {
    s.len() == 36
        && s.bytes().enumerate().all(|(i, b)| match i {
            8 | 13 | 18 | 23 => b == b'-',
            _ => b.is_ascii_hexdigit(),
        })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const SECRET: &str = "01234567-89ab-cdef-0123-456789abcdef";

    fn write(dir: &Path, content: &str, mode: u32) -> PathBuf {
        let path = dir.join(format!("token-{mode:o}"));
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn reads_a_token_also_through_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let path = write(dir.path(), &format!("shim@pve!t1={SECRET}\n"), 0o600);
        let token = ApiToken::load(&path).unwrap();
        assert_eq!(token.id(), "shim@pve!t1");
        assert_eq!(
            token.authorization().expose_secret(),
            format!("PVEAPIToken=shim@pve!t1={SECRET}")
        );
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert_eq!(ApiToken::load(&link).unwrap().id(), "shim@pve!t1");
    }

    #[test]
    fn debug_never_shows_the_secret() {
        let token = ApiToken::parse(&format!("a@pam!bc={SECRET}"), Path::new("/t")).unwrap();
        let shown = format!("{token:?} {token:#?} {:?}", token.authorization());
        assert!(!shown.contains("0123"), "{shown}");
        assert!(shown.contains("a@pam!bc"), "{shown}");
    }

    #[test]
    fn refuses_what_others_can_read_or_own() {
        let dir = tempfile::tempdir().unwrap();
        for mode in [0o644, 0o640, 0o660, 0o601, 0o620] {
            let path = write(dir.path(), &format!("shim@pve!t1={SECRET}"), mode);
            let error = ApiToken::load(&path).unwrap_err();
            assert!(matches!(error, TokenError::Mode { .. }), "{error:?}");
            let text = error.to_string();
            assert!(text.contains(&format!("chmod 0600 {}", path.display())), "{text}");
            // A link to it changes nothing.
            let link = dir.path().join(format!("link-{mode:o}"));
            std::os::unix::fs::symlink(&path, &link).unwrap();
            assert!(matches!(ApiToken::load(&link), Err(TokenError::Mode { .. })));
        }
        if nix::unistd::geteuid().is_root() {
            let path = write(dir.path(), &format!("shim@pve!t1={SECRET}"), 0o600);
            std::os::unix::fs::chown(&path, Some(65534), None).unwrap();
            let error = ApiToken::load(&path).unwrap_err();
            assert!(matches!(error, TokenError::Owner { owner: 65534, .. }), "{error:?}");
        }
    }

    #[test]
    fn refuses_missing_files_directories_and_fifos() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(
            ApiToken::load(&dir.path().join("none")),
            Err(TokenError::Missing { .. })
        ));
        assert!(matches!(ApiToken::load(dir.path()), Err(TokenError::NotAFile { .. })));
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert!(matches!(ApiToken::load(&fifo), Err(TokenError::NotAFile { .. })));
    }

    #[test]
    fn refuses_wrong_content_without_repeating_it() {
        let long = "x".repeat(10_000);
        let cases = [
            "",
            "\n",
            "a@pam!bc",
            SECRET,
            &format!("PVEAPIToken=a@pam!bc={SECRET}"),
            &format!("a@pam={SECRET}"),
            &format!("a!bc={SECRET}"),
            &format!("a@pam!bc={SECRET}\nmore"),
            &format!("a@pam!bc={SECRET}0"),
            "a@pam!bc=secretsecret",
            &format!("a b@pam!bc={SECRET}"),
            &format!("a@pam!b c={SECRET}"),
            long.as_str(),
        ];
        for case in cases {
            let error = ApiToken::parse(case, Path::new("/etc/t")).unwrap_err();
            let text = format!("{error} {error:?}");
            assert!(text.contains("/etc/t: "), "{case}: {text}");
            assert!(!text.contains("0123") && !text.contains("secretsecret"), "{text}");
            assert!(!error.to_string().contains('\n'));
        }
    }
}
