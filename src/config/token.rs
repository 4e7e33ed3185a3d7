//! The API token's file.

use std::fmt;
use std::path::{Path, PathBuf};

use secrecy::{ExposeSecret, SecretString};

use super::secret_file::{self, Kind, SecretFileError, is_name, is_user};

const KIND: Kind = Kind {
    what: "token file",
    line: "USER@REALM!TOKENID=UUID",
    remedy: "create a token with 'pveum user token add'",
};

/// A Proxmox API token, `USER@REALM!TOKENID=SECRET`.
///
/// The secret never appears in `Debug`, in an error, or in a log line; the id may.
pub struct ApiToken {
    id: String,
    secret: SecretString,
    path: PathBuf,
}

impl ApiToken {
    /// Reads and checks a token file.
    ///
    /// It must belong to root, or the user the shim runs as, and nobody else may use it.
    pub fn load(path: &Path) -> Result<ApiToken, SecretFileError> {
        Self::parse(&secret_file::read(KIND, path)?, path)
    }

    /// Checks the content of a token file; `path` is for messages.
    pub fn parse(text: &str, path: &Path) -> Result<ApiToken, SecretFileError> {
        let syntax =
            |problem| SecretFileError::Syntax { kind: KIND, path: path.to_owned(), problem };
        let text = secret_file::one_line(KIND, text, path)?.trim();
        if text.starts_with("PVEAPIToken") || text.starts_with("Authorization") {
            return Err(syntax("begins with the name of an HTTP header"));
        }
        let (id, secret) = text.split_once('=').ok_or_else(|| syntax("has no '='"))?;
        let (user, token) =
            id.split_once('!').ok_or_else(|| syntax("has no '!' in the token's id"))?;
        let (user, realm) =
            user.rsplit_once('@').ok_or_else(|| syntax("has no '@REALM' in the token's id"))?;
        if !is_user(user) || !is_name(realm) || !is_name(token) {
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
            assert!(matches!(error, SecretFileError::Mode { .. }), "{error:?}");
            let text = error.to_string();
            assert!(text.contains(&format!("chmod 0600 {}", path.display())), "{text}");
            // A link to it changes nothing.
            let link = dir.path().join(format!("link-{mode:o}"));
            std::os::unix::fs::symlink(&path, &link).unwrap();
            assert!(matches!(ApiToken::load(&link), Err(SecretFileError::Mode { .. })));
        }
        if nix::unistd::geteuid().is_root() {
            let path = write(dir.path(), &format!("shim@pve!t1={SECRET}"), 0o600);
            std::os::unix::fs::chown(&path, Some(65534), None).unwrap();
            let error = ApiToken::load(&path).unwrap_err();
            assert!(matches!(error, SecretFileError::Owner { owner: 65534, .. }), "{error:?}");
        }
    }

    #[test]
    fn refuses_missing_files_directories_and_fifos() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(
            ApiToken::load(&dir.path().join("none")),
            Err(SecretFileError::Missing { .. })
        ));
        assert!(matches!(ApiToken::load(dir.path()), Err(SecretFileError::NotAFile { .. })));
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert!(matches!(ApiToken::load(&fifo), Err(SecretFileError::NotAFile { .. })));
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
