//! `runtimeoptions.v1.Options`, by which containerd's clients name another configuration.
//!
//! The message is not part of the protocol crates, so its three fields are decoded by hand
//! (containerd, `api/types/runtimeoptions/v1/api.proto`).

use std::path::PathBuf;

/// What a client asked for. Both fields absent means the default configuration file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RuntimeOptions {
    /// `config_path`: a configuration file instead of the default one.
    pub config_path: Option<PathBuf>,
    /// `config_body`: a whole configuration; wins over `config_path`.
    pub config_body: Option<String>,
}

/// The options claim to be ours but cannot be decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// Not a valid protobuf message.
    #[error(
        "runtime options: the bytes are not a runtimeoptions.v1.Options message ({reason}); \
         check the runtime's options in containerd's configuration"
    )]
    Malformed {
        /// What was wrong with the bytes.
        reason: &'static str,
    },
    /// `config_path` is relative.
    #[error(
        "runtime options: config_path: '{path}' is not an absolute path; write a path such as \
         /etc/containerd-shim-proxmox/config.toml"
    )]
    RelativePath {
        /// As it was given.
        path: String,
    },
}

const TYPE: &str = "runtimeoptions.v1.Options";
/// Written by the CRI plugin of containerd 1.x while it was a package of its own.
const OLD_TYPE: &str = "cri.runtimeoptions.v1.Options";

const TRUNCATED: OptionsError = OptionsError::Malformed { reason: "it ends early" };

impl RuntimeOptions {
    /// Decodes an `Any`.
    ///
    /// Only the last path segment of `type_url` counts: containerd writes bare names, protobuf
    /// libraries put a host before them. `Ok(None)` for another type, such as runc's options; the
    /// caller warns and goes on.
    pub fn from_any(type_url: &str, value: &[u8]) -> Result<Option<RuntimeOptions>, OptionsError> {
        let name = type_url.rsplit('/').next().unwrap_or_default();
        if name == TYPE || name == OLD_TYPE { Self::decode(value).map(Some) } else { Ok(None) }
    }

    /// Decodes the bare message, as some versions of containerd hand it to `start` on stdin.
    pub fn decode(mut bytes: &[u8]) -> Result<RuntimeOptions, OptionsError> {
        let mut options = RuntimeOptions::default();
        while !bytes.is_empty() {
            let tag = varint(&mut bytes)?;
            let field = tag >> 3;
            if field == 0 {
                return Err(OptionsError::Malformed { reason: "field number 0" });
            }
            match (field, tag & 7) {
                (1..=3, 2) => {
                    let length = varint(&mut bytes)?;
                    let payload = take(&mut bytes, length)?;
                    let text = || {
                        let reason = "a field is not UTF-8";
                        std::str::from_utf8(payload).map_err(|_| OptionsError::Malformed { reason })
                    };
                    match field {
                        // type_url describes the body for runtimes that know several formats.
                        1 => drop(text()?),
                        2 => options.config_path = config_path(text()?)?,
                        _ => {
                            let body = text()?;
                            options.config_body = (!body.is_empty()).then(|| body.to_owned());
                        }
                    }
                }
                (1..=3, _) => {
                    return Err(OptionsError::Malformed { reason: "a field has the wrong type" });
                }
                (_, 0) => drop(varint(&mut bytes)?),
                (_, 1) => drop(take(&mut bytes, 8)?),
                (_, 2) => {
                    let length = varint(&mut bytes)?;
                    take(&mut bytes, length)?;
                }
                (_, 5) => drop(take(&mut bytes, 4)?),
                _ => return Err(OptionsError::Malformed { reason: "unknown wire type" }),
            }
        }
        Ok(options)
    }
}

/// Protobuf has no absent string, so an empty one means absent.
fn config_path(text: &str) -> Result<Option<PathBuf>, OptionsError> {
    match text {
        "" => Ok(None),
        path if path.starts_with('/') && !path.contains('\0') => Ok(Some(PathBuf::from(path))),
        path => Err(OptionsError::RelativePath { path: path.escape_debug().collect() }),
    }
}

fn varint(bytes: &mut &[u8]) -> Result<u64, OptionsError> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first().ok_or(TRUNCATED)?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(OptionsError::Malformed { reason: "a number is too long" })
}

fn take<'a>(bytes: &mut &'a [u8], length: u64) -> Result<&'a [u8], OptionsError> {
    let length = usize::try_from(length).map_err(|_| TRUNCATED)?;
    let (head, rest) = bytes.split_at_checked(length).ok_or(TRUNCATED)?;
    *bytes = rest;
    Ok(head)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn field(number: u8, text: &[u8]) -> Vec<u8> {
        let mut out = vec![number << 3 | 2];
        let mut length = text.len();
        while length >= 0x80 {
            out.push((length & 0x7f) as u8 | 0x80);
            length >>= 7;
        }
        out.push(length as u8);
        out.extend_from_slice(text);
        out
    }

    #[test]
    fn decodes_the_three_fields_and_skips_unknown_ones() {
        let body = "x".repeat(300);
        let bytes = [
            field(1, b"io.example.Config"),
            vec![4 << 3, 0x96, 0x01],
            field(2, b"/etc/x.toml"),
            vec![5 << 3 | 5, 1, 2, 3, 4, 6 << 3 | 1, 1, 2, 3, 4, 5, 6, 7, 8],
            field(3, body.as_bytes()),
            field(9, b"future"),
        ]
        .concat();
        for url in ["runtimeoptions.v1.Options", "types.googleapis.com/runtimeoptions.v1.Options"] {
            let options = RuntimeOptions::from_any(url, &bytes).unwrap().unwrap();
            assert_eq!(options.config_path.as_deref(), Some("/etc/x.toml".as_ref()));
            assert_eq!(options.config_body.as_deref(), Some(body.as_str()));
        }
    }

    #[test]
    fn empty_fields_mean_absent() {
        let bytes = [field(2, b""), field(3, b"")].concat();
        let options = RuntimeOptions::from_any(TYPE, &bytes).unwrap().unwrap();
        assert_eq!(options, RuntimeOptions::default());
    }

    #[test]
    fn foreign_types_are_not_ours() {
        for url in [
            "containerd.runc.v1.Options",
            "",
            "runtimeoptions.v1.Options/x",
            "x.runtimeoptions.v1.Options",
        ] {
            assert_eq!(RuntimeOptions::from_any(url, b"\xff\xff"), Ok(None), "{url}");
        }
    }

    #[test]
    fn malformed_options_of_our_type_are_refused() {
        let cases: [&[u8]; 7] = [
            b"\x12",
            b"\x12\x05ab",
            b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
            b"\x12\x02\xff\xfe",
            b"\x10\x01",
            b"\x02\x00",
            b"\x23",
        ];
        for bytes in cases {
            let error = RuntimeOptions::from_any(TYPE, bytes).unwrap_err();
            assert!(matches!(error, OptionsError::Malformed { .. }), "{bytes:x?}: {error}");
        }
        let error = RuntimeOptions::from_any(TYPE, &field(2, b"etc/x.toml")).unwrap_err();
        assert!(error.to_string().contains("config_path: 'etc/x.toml'"), "{error}");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = RuntimeOptions::decode(&bytes);
        }

        #[test]
        fn any_body_comes_back(body in "\\PC{1,300}") {
            let options = RuntimeOptions::decode(&field(3, body.as_bytes())).unwrap();
            prop_assert_eq!(options.config_body.as_deref(), Some(body.as_str()));
        }
    }
}
