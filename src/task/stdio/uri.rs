//! The forms a stream can have in a request: empty, a path, or a URI.

use std::path::PathBuf;

use super::Error;

/// Where a stream goes to, or comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Stream {
    /// Discarded.
    Null,
    /// A FIFO, or another file that exists.
    Path(PathBuf),
    /// `file://`: appended to, created if missing.
    File(PathBuf),
    /// `binary://` and `binary-v2://`.
    Logger(Program),
}

/// A logging program (containerd `core/runtime/v2/README.md`, "Logging").
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Program {
    pub path: PathBuf,
    /// Each key of the query and its first value, in turn.
    pub args: Vec<String>,
    /// It must say that it is ready, where the first version needs only close the descriptor.
    pub must_confirm: bool,
}

impl Stream {
    pub(super) fn parse(text: &str) -> Result<Self, Error> {
        let invalid = |reason| Error::Uri { uri: text.to_owned(), reason };
        if text.contains('\0') {
            return Err(invalid("contains a NUL"));
        }
        if text.is_empty() {
            return Ok(Self::Null);
        }
        let Some((scheme, rest)) = text.split_once(':').filter(|_| !text.starts_with('/')) else {
            return Ok(Self::Path(text.into()));
        };
        if !matches!(scheme, "fifo" | "file" | "binary" | "binary-v2") {
            return Err(invalid(
                "has an unknown scheme (fifo, file, binary and binary-v2 are known)",
            ));
        }
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = path.strip_prefix("//").unwrap_or(path);
        if !path.starts_with('/') {
            return Err(invalid("has no absolute path"));
        }
        let path = decode(path, false).ok_or_else(|| invalid("has a bad % escape"))?;
        Ok(match scheme {
            "fifo" => Self::Path(path.into()),
            "file" => Self::File(path.into()),
            _ => Self::Logger(Program {
                path: path.into(),
                args: arguments(query).ok_or_else(|| invalid("has a bad % escape"))?,
                must_confirm: scheme == "binary-v2",
            }),
        })
    }
}

/// `a=1&b=2` as `a 1 b 2`; of several values of a key only the first, as containerd's shim does.
fn arguments(query: &str) -> Option<Vec<String>> {
    let mut pairs: Vec<(String, String)> = Vec::new();
    for part in query.split('&').filter(|part| !part.is_empty()) {
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        let key = decode(key, true)?;
        if pairs.iter().all(|(known, _)| *known != key) {
            pairs.push((key, decode(value, true)?));
        }
    }
    Some(pairs.into_iter().flat_map(|(key, value)| [key, value]).collect())
}

fn decode(text: &str, plus_is_space: bool) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'%' => {
                let digits = [bytes.next()?, bytes.next()?];
                if !digits.iter().all(u8::is_ascii_hexdigit) {
                    return None;
                }
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            b'+' if plus_is_space => b' ',
            other => other,
        });
    }
    String::from_utf8(out).ok().filter(|s| !s.contains('\0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logger(path: &str, args: &[&str], must_confirm: bool) -> Stream {
        Stream::Logger(Program {
            path: path.into(),
            args: args.iter().map(|a| (*a).to_owned()).collect(),
            must_confirm,
        })
    }

    #[test]
    fn all_forms_are_understood() {
        for (text, expected) in [
            ("", Stream::Null),
            ("/run/a:b/stdout", Stream::Path("/run/a:b/stdout".into())),
            ("fifo:///run/x%20y", Stream::Path("/run/x y".into())),
            ("file:///var/log/a+b", Stream::File("/var/log/a+b".into())),
            ("file:/var/log/a", Stream::File("/var/log/a".into())),
            ("binary:///bin/log", logger("/bin/log", &[], false)),
            (
                "binary:///bin/log?b=1+2&a=%2Fx&b=3&c",
                logger("/bin/log", &["b", "1 2", "a", "/x", "c", ""], false),
            ),
            ("binary-v2:///bin/log?k=v", logger("/bin/log", &["k", "v"], true)),
        ] {
            assert_eq!(Stream::parse(text).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn others_are_refused_with_the_uri() {
        for text in [
            "npipe:///x",
            "binary://host/x",
            "file://",
            "fifo:///a%0",
            "binary:///x?a=%zz",
            "/a\0b",
            "file:///%00",
        ] {
            let error = Stream::parse(text).unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
    }
}
