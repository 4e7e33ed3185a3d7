//! The file with a user's name and password.

use std::fmt;
use std::path::{Path, PathBuf};

use secrecy::SecretString;

use super::secret_file::{self, Kind, SecretFileError, is_name, is_user};

const KIND: Kind = Kind {
    what: "password file",
    line: "USER@REALM:PASSWORD",
    remedy: "take a user that 'pveum user list' shows",
};

/// A user and password, `USER@REALM:PASSWORD`, for which Proxmox gives tickets.
///
/// The password never appears in `Debug`, in an error, or in a log line; the user may.
pub struct Password {
    user: String,
    secret: SecretString,
    path: PathBuf,
}

impl Password {
    /// Reads and checks a password file.
    ///
    /// It must belong to root, or the user the shim runs as, and nobody else may use it.
    pub fn load(path: &Path) -> Result<Password, SecretFileError> {
        Self::parse(&secret_file::read(KIND, path)?, path)
    }

    /// Checks the content of a password file; `path` is for messages.
    ///
    /// Blanks belong to the password; only the line feed at the end does not.
    pub fn parse(text: &str, path: &Path) -> Result<Password, SecretFileError> {
        let syntax =
            |problem| SecretFileError::Syntax { kind: KIND, path: path.to_owned(), problem };
        let text = secret_file::one_line(KIND, text, path)?;
        let (user, secret) = text.split_once(':').ok_or_else(|| syntax("has no ':'"))?;
        let (name, realm) =
            user.rsplit_once('@').ok_or_else(|| syntax("has no '@REALM' in the user's name"))?;
        if !is_user(name) || !is_name(realm) {
            return Err(syntax("has a user's name that Proxmox would not accept"));
        }
        if secret.is_empty() {
            return Err(syntax("has no password"));
        }
        Ok(Password {
            user: user.to_owned(),
            secret: secret.to_owned().into(),
            path: path.to_owned(),
        })
    }

    /// `USER@REALM`
    pub fn user(&self) -> &str {
        &self.user
    }

    /// The file it came from, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn secret(&self) -> &SecretString {
        &self.secret
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Password")
            .field("user", &self.user)
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret;

    use super::*;

    fn parse(text: &str) -> Result<Password, SecretFileError> {
        Password::parse(text, Path::new("/etc/p"))
    }

    #[test]
    fn the_password_may_hold_anything_but_a_line_feed() {
        let password = parse("root@pam: a:b@c!d=e \r\n").unwrap();
        assert_eq!(password.user(), "root@pam");
        assert_eq!(password.secret().expose_secret(), " a:b@c!d=e ");
    }

    #[test]
    fn neither_debug_nor_errors_show_it() {
        let shown = format!("{:?}", parse("a@pam:planted").unwrap());
        assert!(shown.contains("a@pam") && !shown.contains("planted"), "{shown}");
        for text in [
            "",
            "\n",
            "planted",
            "a:planted",
            "a@p:planted",
            "@pam:planted",
            "a@pam:",
            "a b@pam:planted",
            "a@pam:planted\nplanted",
            "a@pve!t=planted",
        ] {
            let error = parse(text).unwrap_err();
            let shown = format!("{error} {error:?}");
            assert!(!shown.contains("planted"), "{text}: {shown}");
            assert!(shown.contains("password file /etc/p: "), "{shown}");
        }
    }
}
