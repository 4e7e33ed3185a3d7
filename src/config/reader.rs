//! A strict reader of TOML tables whose every complaint names the file, the key and the remedy.
//!
//! Written by hand instead of derived, because a derived deserializer knows neither the path of
//! the key nor what an administrator should write there instead.

use std::path::{Path, PathBuf};

use toml::Value;

use super::ConfigError;

/// One table of the file. Taking a key removes it; [`Section::finish`] refuses what is left.
pub(super) struct Section<'a> {
    origin: &'a str,
    name: &'static str,
    table: toml::Table,
    known: Vec<&'static str>,
}

impl<'a> Section<'a> {
    /// The whole file.
    pub(super) fn root(origin: &'a str, table: toml::Table) -> Self {
        Section { origin, name: "", table, known: Vec::new() }
    }

    /// The table `[name]`; an absent one is an empty one.
    pub(super) fn section(&mut self, name: &'static str) -> Result<Section<'a>, ConfigError> {
        self.known.push(name);
        let table = match self.table.remove(name) {
            None => toml::Table::new(),
            Some(Value::Table(table)) => table,
            Some(other) => {
                let problem = format!("expected a table, written [{name}]; got {}", kind(&other));
                return Err(self.error(name, problem));
            }
        };
        Ok(Section { origin: self.origin, name, table, known: Vec::new() })
    }

    /// An error about `key` of this table.
    pub(super) fn error(&self, key: &str, problem: impl Into<String>) -> ConfigError {
        let key =
            if self.name.is_empty() { key.to_owned() } else { format!("{}.{key}", self.name) };
        ConfigError::Key { origin: self.origin.to_owned(), key, problem: problem.into() }
    }

    fn take(&mut self, key: &'static str) -> Option<Value> {
        self.known.push(key);
        self.table.remove(key)
    }

    /// A string without control characters, not empty. `like` is an example for the message.
    pub(super) fn text(
        &mut self,
        key: &'static str,
        like: &str,
    ) -> Result<Option<String>, ConfigError> {
        self.take(key).map(|value| self.string(key, like, value)).transpose()
    }

    /// One such string, or a list of at least one.
    pub(super) fn one_or_more(
        &mut self,
        key: &'static str,
        like: &str,
    ) -> Result<Option<Vec<String>>, ConfigError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Array(items)) if items.is_empty() => {
                Err(self.error(key, format!("must not be empty; write a value such as \"{like}\"")))
            }
            Some(Value::Array(items)) => items
                .into_iter()
                .map(|item| self.string(key, like, item))
                .collect::<Result<_, _>>()
                .map(Some),
            Some(value) => Ok(Some(vec![self.string(key, like, value)?])),
        }
    }

    fn string(&self, key: &'static str, like: &str, value: Value) -> Result<String, ConfigError> {
        match value {
            Value::String(s) if s.is_empty() => {
                Err(self.error(key, format!("must not be empty; write a value such as \"{like}\"")))
            }
            Value::String(s) if s.chars().any(char::is_control) => Err(self.error(
                key,
                format!("must not contain control characters; write a value such as \"{like}\""),
            )),
            Value::String(s) => Ok(s),
            other => {
                let problem = format!("expected a string such as \"{like}\", got {}", kind(&other));
                Err(self.error(key, problem))
            }
        }
    }

    /// An absolute path that can stand in an LXC configuration without quoting.
    pub(super) fn path(
        &mut self,
        key: &'static str,
        like: &str,
    ) -> Result<Option<PathBuf>, ConfigError> {
        let Some(text) = self.text(key, like)? else { return Ok(None) };
        match unusable_path(&text) {
            None => Ok(Some(PathBuf::from(text))),
            Some(why) => {
                Err(self.error(key, format!("'{text}' {why}; write a path such as \"{like}\"")))
            }
        }
    }

    /// A whole number of seconds in `1..=max`.
    pub(super) fn seconds(
        &mut self,
        key: &'static str,
        default: u64,
        max: u64,
    ) -> Result<std::time::Duration, ConfigError> {
        let expected =
            format!("expected a whole number of seconds from 1 to {max}, such as {default}");
        let seconds = match self.take(key) {
            None => default,
            Some(Value::Integer(n)) => match u64::try_from(n) {
                Ok(n) if (1..=max).contains(&n) => n,
                _ => return Err(self.error(key, format!("{expected}, got {n}"))),
            },
            Some(other) => {
                return Err(self.error(key, format!("{expected}, got {}", kind(&other))));
            }
        };
        Ok(std::time::Duration::from_secs(seconds))
    }

    /// A list of strings.
    pub(super) fn flag(&mut self, key: &'static str, default: bool) -> Result<bool, ConfigError> {
        match self.take(key) {
            None => Ok(default),
            Some(Value::Boolean(value)) => Ok(value),
            Some(other) => {
                Err(self.error(key, format!("expected true or false, got {}", kind(&other))))
            }
        }
    }

    /// A list of strings; `like` is an example for the message.
    pub(super) fn texts(
        &mut self,
        key: &'static str,
        like: &str,
    ) -> Result<Option<Vec<String>>, ConfigError> {
        let expected = format!("expected a list of strings such as {like}");
        match self.take(key) {
            None => Ok(None),
            Some(Value::Array(items)) => {
                let mut out = Vec::with_capacity(items.len());
                for item in items {
                    match item {
                        Value::String(s) => out.push(s),
                        other => {
                            let problem = format!("{expected}, got {} in it", kind(&other));
                            return Err(self.error(key, problem));
                        }
                    }
                }
                Ok(Some(out))
            }
            Some(other) => Err(self.error(key, format!("{expected}, got {}", kind(&other)))),
        }
    }

    /// One of `values`, the first being the default. `later` are words that are understood but
    /// not available yet.
    pub(super) fn choice(
        &mut self,
        key: &'static str,
        values: &[&'static str],
        later: &[&str],
    ) -> Result<&'static str, ConfigError> {
        let Some(text) = self.text(key, values[0])? else { return Ok(values[0]) };
        if let Some(value) = values.iter().find(|value| **value == text) {
            return Ok(value);
        }
        let list = values.iter().map(|v| format!("\"{v}\"")).collect::<Vec<_>>().join(" or ");
        let problem = if later.contains(&text.as_str()) {
            format!("\"{text}\" is not supported yet; write {list} or remove the key")
        } else {
            format!("'{text}' is not a value it can have; write {list}")
        };
        Err(self.error(key, problem))
    }

    /// Refuses every key that nothing asked for.
    pub(super) fn finish(self) -> Result<(), ConfigError> {
        let Some(key) = self.table.keys().next() else { return Ok(()) };
        let (what, place) = match (self.name, &self.table[key]) {
            ("", Value::Table(_)) => ("tables", "the file".to_owned()),
            ("", _) => ("tables", "the file outside of a table".to_owned()),
            (name, _) => ("keys", format!("[{name}]")),
        };
        // The key is quoted by the debug form: it may hold anything.
        let shown: String = key.escape_debug().collect();
        let problem = format!("unknown key; the {what} of {place} are {}", self.known.join(", "));
        Err(self.error(&shown, problem))
    }
}

/// Why a path cannot be used in an LXC configuration, a mount entry or a CT's file.
pub(crate) fn unusable_path(text: &str) -> Option<&'static str> {
    // liblxc splits values at white space, strips quotes and, in mount entries, decodes
    // backslashes; there is no way of quoting that all of these places understand.
    let hostile =
        |c: char| c.is_whitespace() || c.is_control() || matches!(c, '"' | '\'' | '\\' | '#');
    if !text.starts_with('/') {
        Some("is not an absolute path")
    } else if text.contains(hostile) {
        Some(
            "contains white space, a quote, a backslash or '#', which an LXC configuration cannot carry",
        )
    } else if Path::new(text).components().any(|c| c == std::path::Component::ParentDir) {
        Some("contains '..'")
    } else {
        None
    }
}

/// A value's type for a message; never the value, which may be a misplaced secret.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "a string",
        Value::Integer(_) => "a number",
        Value::Float(_) => "a fraction",
        Value::Boolean(_) => "true or false",
        Value::Datetime(_) => "a date",
        Value::Array(_) => "a list",
        Value::Table(_) => "a table",
    }
}
