//! Walks the OCI crate's types: every field that they know must have a verdict.
//!
//! A derived `Deserialize` tells its deserializer the names of all fields of a struct. The one here
//! records them and answers with values that let the walk go on.

use std::cell::RefCell;
use std::collections::BTreeSet;

use serde::de::value::{Error, StrDeserializer};
use serde::de::{self, Deserialize, DeserializeSeed, IntoDeserializer, Visitor};

use super::{FIELDS, Field, Verdict};

struct Walk<'a> {
    path: String,
    seen: &'a RefCell<BTreeSet<String>>,
}

impl Walk<'_> {
    fn below(&self, name: &str) -> Self {
        Self { path: format!("{}{name}", self.path), seen: self.seen }
    }

    fn text(&self) -> &'static str {
        if self.path.starts_with("process.capabilities") { "CAP_KILL" } else { "0" }
    }
}

/// One visit per field of a struct, or of one invented key.
struct Members<'a> {
    walk: Walk<'a>,
    names: std::slice::Iter<'static, &'static str>,
    current: &'static str,
}

impl<'de> de::MapAccess<'de> for Members<'_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Error> {
        let Some(name) = self.names.next() else { return Ok(None) };
        self.current = name;
        let key: StrDeserializer<'_, Error> = (*name).into_deserializer();
        seed.deserialize(key).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let separator = if self.walk.path.is_empty() { "" } else { "." };
        let value = self.walk.below(&format!("{separator}{}", self.current));
        value.seen.borrow_mut().insert(value.path.clone());
        seed.deserialize(value)
    }
}

/// One element.
struct Elements<'a>(Option<Walk<'a>>);

impl<'de> de::SeqAccess<'de> for Elements<'_> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Error> {
        self.0.take().map(|walk| seed.deserialize(walk)).transpose()
    }
}

impl<'de> de::Deserializer<'de> for Walk<'_> {
    type Error = Error;

    /// A value without a fixed type.
    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_bool(true)
    }

    fn deserialize_u16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_u16(1)
    }

    fn deserialize_u32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_u32(1)
    }

    fn deserialize_u64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_u64(1)
    }

    fn deserialize_i32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_i32(1)
    }

    fn deserialize_i64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_i64(1)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_str(self.text())
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_str(self.text())
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_seq(Elements(Some(self.below("[]"))))
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_map(Members { walk: self, names: ["key"].iter(), current: "" })
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_map(Members { walk: self, names: fields.iter(), current: "" })
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let variant: StrDeserializer<'_, Error> = variants[0].into_deserializer();
        visitor.visit_enum(variant)
    }

    serde::forward_to_deserialize_any! {
        i8 i16 i128 u8 u128 f32 f64 char bytes byte_buf unit unit_struct newtype_struct tuple
        tuple_struct identifier ignored_any
    }
}

fn fields_of_the_crate() -> BTreeSet<String> {
    let seen = RefCell::default();
    oci_spec::runtime::Spec::deserialize(Walk { path: String::new(), seen: &seen }).unwrap();
    seen.into_inner()
}

/// The verdict of a field or of the field it is part of.
fn verdict(path: &str) -> Option<Verdict> {
    let find = |path: &str| FIELDS.iter().find(|field| field.path == path);
    if let Some(Field { verdict, .. }) = find(path) {
        return Some(*verdict);
    }
    path.match_indices(['.', '['])
        .filter_map(|(end, _)| find(&path[..end]))
        .map(|field| field.verdict)
        .find(|verdict| *verdict != Verdict::Section)
}

#[test]
fn every_field_of_the_specification_has_a_verdict() {
    let fields = fields_of_the_crate();
    assert!(fields.len() > 200, "the walk found only {}", fields.len());
    let missing: Vec<&String> = fields
        .iter()
        // Mistakes of the crate, which it has marked so: the specification has them below `linux`.
        .filter(|path| {
            !matches!(path.split(['.', '[']).next(), Some("uidMappings" | "gidMappings"))
        })
        .filter(|path| verdict(path).is_none())
        .collect();
    assert!(missing.is_empty(), "without a verdict: {missing:#?}");
}

#[test]
fn every_verdict_is_about_a_field_of_the_specification() {
    let fields = fields_of_the_crate();
    let unknown: Vec<&str> =
        FIELDS.iter().map(|field| field.path).filter(|path| !fields.contains(*path)).collect();
    assert!(unknown.is_empty(), "not in the specification: {unknown:?}");
}
