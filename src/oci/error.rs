//! What can be wrong with a bundle.

use std::io;
use std::path::PathBuf;

/// Why a bundle cannot become a [`super::plan::Plan`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `config.json` is missing or unreadable.
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    /// `config.json` is larger than [`super::MAX_SPEC_BYTES`].
    #[error("{} is larger than {limit} bytes", path.display())]
    TooLarge { path: PathBuf, limit: u64 },
    /// The host could not be asked what it offers.
    #[error("cannot determine the host's cgroups and capabilities: {source}")]
    Probe { source: io::Error },
    /// Not JSON, or not an object.
    #[error("the OCI specification is not valid JSON: {source}")]
    Json { source: serde_json::Error },
    /// A field has the wrong type or an unknown value.
    #[error("{field}: {source}")]
    Type { field: String, source: serde_json::Error },
    /// A field's value contradicts the specification or itself. `problem` completes the sentence
    /// that starts with the field.
    #[error("{field} {problem}")]
    Invalid { field: String, problem: String },
    /// A field that the specification allows but this shim does not honour.
    #[error("{field} is not supported: {remedy}")]
    Unsupported { field: String, remedy: &'static str },
    /// The filter could not be compiled.
    #[error("{field} cannot be compiled: {source}")]
    Seccomp { field: String, source: libseccomp::error::SeccompError },
    /// The compiled filter could not be read back: the node's trouble, not the specification's.
    #[error("cannot export the seccomp filter: {source}")]
    Export { source: io::Error },
}

impl Error {
    pub(super) fn invalid(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), problem: problem.into() }
    }

    pub(super) fn unsupported(field: impl Into<String>, remedy: &'static str) -> Self {
        Self::Unsupported { field: field.into(), remedy }
    }
}
