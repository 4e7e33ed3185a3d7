//! Parameters of a call and their verification against a small schema.
//!
//! Values arrive as text (query, form) or as JSON scalars and are kept as text. The texts of the
//! verification errors are those that Proxmox VE's JSON schema code produces.

use std::collections::BTreeMap;

use crate::error::ApiError;

const UNKNOWN: &str =
    "property is not defined in schema and the schema does not allow additional properties";
const MISSING: &str = "property is missing and it is not optional";

/// Parameters by name. A later value replaces an earlier one of the same name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Params(pub BTreeMap<String, String>);

impl Params {
    /// Parses `a=1&b=2`.
    pub fn from_form(text: &[u8]) -> Self {
        Self(form_urlencoded::parse(text).into_owned().collect())
    }

    /// Takes the scalars of a JSON object; `null` counts as absent.
    pub fn from_json(text: &[u8]) -> Result<Self, ApiError> {
        let value: serde_json::Value = serde_json::from_slice(text)
            .map_err(|e| ApiError::BadRequest(format!("malformed JSON in the body: {e}")))?;
        let serde_json::Value::Object(map) = value else {
            return Err(ApiError::BadRequest("the JSON body is not an object".into()));
        };
        let mut params = BTreeMap::new();
        for (key, value) in map {
            let text = match value {
                serde_json::Value::Null => continue,
                serde_json::Value::Bool(b) => u8::from(b).to_string(),
                serde_json::Value::Number(n) => n.to_string(),
                serde_json::Value::String(s) => s,
                serde_json::Value::Array(_) | serde_json::Value::Object(_) => {
                    return Err(ApiError::param(&key, "type check ('string') failed"));
                }
            };
            params.insert(key, text);
        }
        Ok(Self(params))
    }

    /// The value of a parameter.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// A boolean parameter, already verified; absent is false.
    pub fn flag(&self, name: &str) -> bool {
        self.get(name).and_then(parse_bool).unwrap_or(false)
    }

    /// A number, already verified.
    pub fn number<T: std::str::FromStr>(&self, name: &str) -> Option<T> {
        self.get(name).and_then(|v| v.parse().ok())
    }

    /// Adds the parameters of another source; they win.
    pub fn merge(&mut self, other: Params) {
        self.0.extend(other.0);
    }
}

/// Perl's notion of the schema type `boolean`.
pub fn parse_bool(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "on" | "yes" | "true" => Some(true),
        "0" | "off" | "no" | "false" => Some(false),
        _ => None,
    }
}

/// The type of a parameter.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// A whole number with an inclusive range.
    Int(i64, i64),
    /// A decimal number with an inclusive range.
    Number(f64, f64),
    /// 0/1 and their spellings.
    Bool,
    /// Any text of at most this many characters.
    Text(usize),
    /// One of a list.
    Enum(&'static [&'static str]),
    /// Text that a function accepts, or says why not (the text is followed by a newline).
    Format(fn(&str) -> Result<(), String>),
    /// Text that matches a pattern.
    Pattern(fn(&str) -> bool),
    /// `key=value,…` with its own properties; the first one is the default key.
    Props(&'static [Spec]),
}

/// One parameter of a schema. A name ending in `[n]` stands for the name followed by a number.
#[derive(Debug, Clone, Copy)]
pub struct Spec {
    /// Name, possibly ending in `[n]`.
    pub name: &'static str,
    /// Type.
    pub kind: Kind,
    /// Whether it may be left out.
    pub optional: bool,
}

/// An optional parameter.
pub const fn opt(name: &'static str, kind: Kind) -> Spec {
    Spec { name, kind, optional: true }
}

/// A required parameter.
pub const fn req(name: &'static str, kind: Kind) -> Spec {
    Spec { name, kind, optional: false }
}

/// A VMID in a path or as a parameter.
pub const VMID: Spec = req("vmid", Kind::Format(check_vmid));

fn check_vmid(text: &str) -> Result<(), String> {
    // The type is checked before the format, with a text of its own (see `verify_value`).
    match text.parse::<u32>() {
        Ok(n) if (100..=999_999_999).contains(&n) && !text.starts_with('0') => Ok(()),
        _ => Err("value does not look like a valid VM ID".into()),
    }
}

impl Spec {
    /// Whether `name` is this parameter.
    pub fn matches(&self, name: &str) -> bool {
        match self.name.strip_suffix("[n]") {
            Some(prefix) => name.strip_prefix(prefix).is_some_and(|n| {
                !n.is_empty() && n.len() <= 3 && n.bytes().all(|b| b.is_ascii_digit())
            }),
            None => self.name == name,
        }
    }
}

/// Checks all parameters; the error has one text per offending parameter.
pub fn verify(specs: &[&[Spec]], params: &Params) -> Result<(), ApiError> {
    let mut errors = BTreeMap::new();
    for (name, value) in &params.0 {
        match specs.iter().flat_map(|s| s.iter()).find(|s| s.matches(name)) {
            None => {
                errors.insert(name.clone(), UNKNOWN.to_owned());
            }
            Some(spec) => {
                if let Err(text) = verify_value(spec, name, value) {
                    errors.insert(name.clone(), text);
                }
            }
        }
    }
    for spec in specs.iter().flat_map(|s| s.iter()) {
        if !spec.optional && params.get(spec.name).is_none() {
            errors.insert(spec.name.to_owned(), MISSING.to_owned());
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(ApiError::Params(errors)) }
}

/// Checks one value; `name` appears in the text of a nested error.
pub fn verify_value(spec: &Spec, name: &str, value: &str) -> Result<(), String> {
    let type_error = |kind: &str| format!("type check ('{kind}') failed - got '{value}'");
    match spec.kind {
        Kind::Int(min, max) => {
            let digits = value.strip_prefix('-').unwrap_or(value);
            if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
                return Err(type_error("integer"));
            }
            let n = value.parse::<i64>().unwrap_or(i64::MAX);
            if n < min {
                return Err(format!("value must have a minimum value of {min}"));
            }
            if n > max {
                return Err(format!("value must have a maximum value of {max}"));
            }
            Ok(())
        }
        Kind::Number(min, max) => {
            let plain = !value.is_empty()
                && value.bytes().all(|b| b.is_ascii_digit() || b == b'.' || b == b'-');
            let Some(n) = value.parse::<f64>().ok().filter(|_| plain) else {
                return Err(type_error("number"));
            };
            if n < min {
                return Err(format!("value must have a minimum value of {min}"));
            }
            if n > max {
                return Err(format!("value must have a maximum value of {max}"));
            }
            Ok(())
        }
        Kind::Bool => parse_bool(value).map(|_| ()).ok_or_else(|| type_error("boolean")),
        Kind::Text(max) => {
            if value.chars().count() > max {
                return Err(format!("value may only be {max} characters long"));
            }
            Ok(())
        }
        Kind::Enum(values) => {
            if values.contains(&value) {
                return Ok(());
            }
            Err(format!(
                "value '{value}' does not have a value in the enumeration '{}'",
                values.join(", ")
            ))
        }
        Kind::Format(check) => {
            if spec.name == "vmid" && !value.bytes().all(|b| b.is_ascii_digit()) {
                return Err(type_error("integer"));
            }
            check(value).map_err(|e| format!("invalid format - {e}\n"))
        }
        Kind::Pattern(matches) => {
            if matches(value) {
                Ok(())
            } else {
                Err("value does not match the regex pattern".into())
            }
        }
        Kind::Props(specs) => verify_props(specs, name, value),
    }
}

/// Splits `a,b=1` into pairs; a part without `=` belongs to `default_key`.
pub fn split_props(default_key: &str, value: &str) -> Vec<(String, String)> {
    value
        .split(',')
        .filter(|part| !part.is_empty())
        .map(|part| match part.split_once('=') {
            Some((k, v)) => (k.to_owned(), v.to_owned()),
            None => (default_key.to_owned(), part.to_owned()),
        })
        .collect()
}

fn verify_props(specs: &'static [Spec], name: &str, value: &str) -> Result<(), String> {
    let default_key = specs.first().map_or("", |s| s.name);
    let pairs = split_props(default_key, value);
    let mut text = String::new();
    for (key, value) in &pairs {
        let error = match specs.iter().find(|s| s.matches(key)) {
            None => Some(UNKNOWN.to_owned()),
            Some(spec) => verify_value(spec, key, value).err(),
        };
        if let Some(error) = error {
            text.push_str(&format!("{name}.{key}: {}\n", error.trim_end_matches('\n')));
        }
    }
    for spec in specs.iter().filter(|s| !s.optional) {
        if !pairs.iter().any(|(k, _)| k == spec.name) {
            text.push_str(&format!("{name}.{}: {MISSING}\n", spec.name));
        }
    }
    if text.is_empty() { Ok(()) } else { Err(format!("invalid format - format error\n{text}")) }
}

/// Splits a list parameter at commas, semicolons, NULs and white space.
pub fn split_list(text: &str) -> Vec<&str> {
    text.split([',', ';', '\0', ' ', '\t', '\n']).filter(|s| !s.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_each_offending_parameter_with_the_recorded_text() {
        let specs = [opt("memory", Kind::Int(16, i64::MAX)), VMID];
        let params = Params::from_form(b"memory=abc&bogus=1");
        let Err(ApiError::Params(errors)) = verify(&[&specs], &params) else { panic!("accepted") };
        assert_eq!(errors["memory"], "type check ('integer') failed - got 'abc'");
        assert_eq!(errors["bogus"], UNKNOWN);
        assert_eq!(errors["vmid"], MISSING);
    }

    #[test]
    fn vmids_are_checked_by_type_then_format() {
        let bad = |v: &str| verify_value(&VMID, "vmid", v).unwrap_err();
        assert_eq!(bad("abc"), "type check ('integer') failed - got 'abc'");
        assert_eq!(bad("99"), "invalid format - value does not look like a valid VM ID\n");
        assert_eq!(bad("0100"), "invalid format - value does not look like a valid VM ID\n");
        assert_eq!(bad("../100"), "type check ('integer') failed - got '../100'");
        assert!(verify_value(&VMID, "vmid", "999999999").is_ok());
    }

    #[test]
    fn json_bodies_keep_numbers_as_text() {
        let params =
            Params::from_json(br#"{"cores":1,"description":"json","x":null,"b":true}"#).unwrap();
        assert_eq!(params.get("cores"), Some("1"));
        assert_eq!(params.get("b"), Some("1"));
        assert_eq!(params.get("x"), None);
        assert!(Params::from_json(b"[1]").is_err());
        assert!(Params::from_json(b"{\"a\":[1]}").is_err());
    }
}
