//! Who the client is to Proxmox: an API token, or a user with a password and the tickets that
//! Proxmox gives for it.
//!
//! A ticket lives for 2 h and is renewed by sending it instead of the password. That happens with
//! the first call that finds it older than [`RENEW_AFTER`]; one that is too old to be taken is
//! replaced by a new login. No task does it in the background: most shims sleep for days between
//! two calls.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper::header::{AUTHORIZATION, COOKIE, HeaderMap, HeaderName, HeaderValue};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use tokio::time::Instant;

use super::error::Error;
use super::types::Loose;
use crate::config::{ApiToken, Login, Password};

const CSRF: HeaderName = HeaderName::from_static("csrfpreventiontoken");
/// Half of a ticket's life.
const RENEW_AFTER: Duration = Duration::from_secs(3600);
/// Proxmox takes no older ticket; a little less, for the time on the way.
const TICKET_LIFE: Duration = Duration::from_secs(2 * 3600 - 60);

/// The secret's only copy in this process is in here, in values marked sensitive.
pub(super) struct Credentials {
    who: String,
    file: PathBuf,
    kind: Kind,
}

enum Kind {
    Token { authorization: HeaderValue },
    User { password: SecretString, ticket: Mutex<Option<Arc<Ticket>>> },
}

struct Ticket {
    text: SecretString,
    cookie: HeaderValue,
    csrf: HeaderValue,
    /// From then on it is renewed before use.
    old: Instant,
    /// From then on it is no longer taken.
    dead: Instant,
}

/// What a call can be sent with, or what must be asked for first.
pub(super) enum Ready {
    Yes(Proof),
    /// Log in with this: the password, or the ticket that is to be renewed.
    LogIn {
        secret: SecretString,
        renewal: bool,
    },
}

/// The headers that prove who asks.
pub(super) struct Proof {
    headers: HeaderMap,
    ticket: Option<Arc<Ticket>>,
}

impl Proof {
    /// Whether it could be replaced by logging in.
    pub(super) fn is_ticket(&self) -> bool {
        self.ticket.is_some()
    }

    /// For a call with this method: one that changes something needs more of a ticket.
    pub(super) fn headers(&self, method: &str) -> HeaderMap {
        let mut headers = self.headers.clone();
        if let (Some(ticket), false) = (&self.ticket, method == "GET") {
            headers.insert(CSRF, ticket.csrf.clone());
        }
        headers
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Credentials").field(&self.who).finish()
    }
}

impl Credentials {
    /// Reads the file that the configuration names.
    pub(super) fn load(login: &Login) -> Result<Credentials, Error> {
        match login {
            Login::Token(path) => Credentials::token(&ApiToken::load(path)?),
            Login::Password(path) => Ok(Credentials::password(&Password::load(path)?)),
        }
    }

    fn token(token: &ApiToken) -> Result<Credentials, Error> {
        let unfit = || Error::Setup { reason: "the API token is no header value".into() };
        let header = token.authorization();
        let authorization = sensitive(header.expose_secret()).ok_or_else(unfit)?;
        let kind = Kind::Token { authorization };
        Ok(Credentials { who: token.id().to_owned(), file: token.path().to_owned(), kind })
    }

    fn password(password: &Password) -> Credentials {
        let kind = Kind::User { password: password.secret().clone(), ticket: Mutex::new(None) };
        Credentials { who: password.user().to_owned(), file: password.path().to_owned(), kind }
    }

    /// `USER@REALM!TOKENID` or `USER@REALM`, as tasks name their user.
    pub(super) fn who(&self) -> &str {
        &self.who
    }

    /// The secret's file, for messages.
    pub(super) fn file(&self) -> &Path {
        &self.file
    }

    pub(super) fn ready(&self) -> Ready {
        let (password, held) = match &self.kind {
            Kind::Token { authorization } => {
                let headers = HeaderMap::from_iter([(AUTHORIZATION, authorization.clone())]);
                return Ready::Yes(Proof { headers, ticket: None });
            }
            Kind::User { password, ticket } => (password, lock(ticket).clone()),
        };
        match held {
            Some(ticket) if Instant::now() < ticket.old => {
                let headers = HeaderMap::from_iter([(COOKIE, ticket.cookie.clone())]);
                Ready::Yes(Proof { headers, ticket: Some(ticket) })
            }
            Some(ticket) if Instant::now() < ticket.dead => {
                Ready::LogIn { secret: ticket.text.clone(), renewal: true }
            }
            _ => Ready::LogIn { secret: password.clone(), renewal: false },
        }
    }

    /// Keeps the ticket of a login's answer; why not, if there is none in it.
    pub(super) fn logged_in(&self, data: &Value, asked: Instant) -> Result<(), &'static str> {
        let Kind::User { ticket, .. } = &self.kind else { return Ok(()) };
        let data = Loose(data);
        // The ticket of a login that is half done opens nothing.
        if data.flag("NeedTFA") {
            return Err("the user has a second factor; use an API token");
        }
        let (Some(text), Some(csrf)) = (data.text("ticket"), data.text("CSRFPreventionToken"))
        else {
            return Err("no ticket in the answer");
        };
        let values = (sensitive(&format!("PVEAuthCookie={text}")), sensitive(&csrf));
        let (Some(cookie), Some(csrf)) = values else {
            return Err("the ticket in the answer is no header value");
        };
        let (old, dead) = (asked + RENEW_AFTER, asked + TICKET_LIFE);
        *lock(ticket) = Some(Arc::new(Ticket { text: text.into(), cookie, csrf, old, dead }));
        Ok(())
    }

    /// Forgets the ticket, because Proxmox no longer takes it.
    pub(super) fn forget_ticket(&self) {
        if let Kind::User { ticket, .. } = &self.kind {
            *lock(ticket) = None;
        }
    }
}

#[cfg(test)]
impl Credentials {
    /// Makes the ticket so much older.
    pub(super) fn age(&self, by: Duration) {
        let Kind::User { ticket, .. } = &self.kind else { panic!("a token does not age") };
        let mut held = lock(ticket);
        let ticket = Arc::get_mut(held.as_mut().unwrap()).unwrap();
        ticket.old = ticket.old.checked_sub(by).unwrap();
        ticket.dead = ticket.dead.checked_sub(by).unwrap();
    }
}

/// Never held across an await: two calls may log in at once, which is harmless.
fn lock(ticket: &Mutex<Option<Arc<Ticket>>>) -> MutexGuard<'_, Option<Arc<Ticket>>> {
    ticket.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A header's value that no debug output shows.
fn sensitive(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}
