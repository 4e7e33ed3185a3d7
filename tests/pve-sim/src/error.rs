//! Errors as the API reports them.
//!
//! The texts are a contract: clients of Proxmox VE tell the cases apart by them. Whatever is
//! not listed here answers 500 with its text, as the real server does for every domain error.

use std::collections::BTreeMap;

/// Why a request was refused. [`ApiError::status`] gives the HTTP status.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// 400: parameters that do not match the schema, with one text per parameter.
    #[error("Parameter verification failed.")]
    Params(BTreeMap<String, String>),
    /// 400: the HTTP request itself could not be understood.
    #[error("{0}")]
    BadRequest(String),
    /// 401: no usable credentials. The body stays empty, the text is only in the reason phrase.
    #[error("{0}")]
    Unauthorized(&'static str),
    /// 401 of a login, with a body.
    #[error("{0}")]
    LoginFailed(&'static str),
    /// 403: a privilege is missing; what is in parentheses may be absent.
    #[error("Permission check failed{}", .0.as_ref().map(|s| format!(" ({s})")).unwrap_or_default())]
    Forbidden(Option<String>),
    /// 500: every domain error: not found, locked, running, digest.
    #[error("{0}")]
    Failed(String),
    /// 501: unknown path or method.
    #[error("Method '{method} {path}' not implemented")]
    NotImplemented {
        /// The request method.
        method: String,
        /// The path below `/api2/json`.
        path: String,
    },
    /// What the front end makes of a node it cannot reach: 595 to 599, without a body.
    #[error("{reason}")]
    Gateway {
        /// The status code.
        code: u16,
        /// The reason phrase.
        reason: String,
    },
    /// 501 as plain text: the body is longer than 512 KiB.
    #[error("for data too large")]
    TooLarge,
}

impl ApiError {
    /// A 400 about one parameter.
    pub fn param(name: &str, text: impl Into<String>) -> Self {
        Self::Params(BTreeMap::from([(name.to_owned(), text.into())]))
    }

    /// A 403 that names the path and the privileges (joined with `|` if any of them suffices).
    pub fn denied(path: &str, privileges: &str) -> Self {
        Self::Forbidden(Some(format!("{path}, {privileges}")))
    }

    /// A 403 for what only the user root@pam may do.
    pub fn root_only(what: &str) -> Self {
        Self::Forbidden(Some(format!("{what} is only allowed for root@pam")))
    }

    /// The text with those about the parameters.
    pub fn detail(&self) -> String {
        match self {
            Self::Params(errors) => {
                let list: Vec<_> =
                    errors.iter().map(|(k, v)| format!("{k}: {}", v.trim_end())).collect();
                format!("{self} {}", list.join("; "))
            }
            _ => self.to_string(),
        }
    }

    /// The HTTP status code.
    pub fn status(&self) -> u16 {
        match self {
            Self::Params(_) | Self::BadRequest(_) => 400,
            Self::Unauthorized(_) | Self::LoginFailed(_) => 401,
            Self::Forbidden(_) => 403,
            Self::Failed(_) => 500,
            Self::Gateway { code, .. } => *code,
            Self::NotImplemented { .. } | Self::TooLarge => 501,
        }
    }
}

impl From<String> for ApiError {
    fn from(text: String) -> Self {
        Self::Failed(text)
    }
}
