//! Reading the fields of a `config.json`.

use serde_json::{Map, Value};

use super::HuggingFaceError;

pub(super) fn unusable(field: &str, value: &str, allowed: &str) -> HuggingFaceError {
    HuggingFaceError {
        field: field.to_owned(),
        value: Some(value.to_owned()),
        allowed: allowed.to_owned(),
    }
}

pub(super) fn missing(field: &str, allowed: &str) -> HuggingFaceError {
    HuggingFaceError {
        field: field.to_owned(),
        value: None,
        allowed: allowed.to_owned(),
    }
}

/// A JSON object whose `null`s count as left out.
pub(super) struct Fields<'a>(pub(super) &'a Map<String, Value>);

impl<'a> Fields<'a> {
    fn value(&self, field: &str) -> Option<&'a Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    pub(super) fn text(
        &self,
        field: &'static str,
        default: &'a str,
    ) -> Result<&'a str, HuggingFaceError> {
        match self.value(field) {
            None => Ok(default),
            Some(value) => value
                .as_str()
                .ok_or_else(|| unusable(field, &value.to_string(), "a text")),
        }
    }

    pub(super) fn table(
        &self,
        field: &'static str,
    ) -> Result<Option<&'a Map<String, Value>>, HuggingFaceError> {
        match self.value(field) {
            None => Ok(None),
            Some(Value::Object(table)) => Ok(Some(table)),
            Some(value) => Err(unusable(field, &value.to_string(), "an object")),
        }
    }

    /// Demands that a field, if it is given, holds the one thing that has a counterpart.
    pub(super) fn only(
        &self,
        field: &'static str,
        allowed: &str,
        holds: impl Fn(&Value) -> bool,
    ) -> Result<(), HuggingFaceError> {
        match self.value(field) {
            Some(value) if !holds(value) => Err(unusable(field, &value.to_string(), allowed)),
            _ => Ok(()),
        }
    }

    pub(super) fn count(
        &self,
        field: &'static str,
        default: Option<usize>,
    ) -> Result<usize, HuggingFaceError> {
        match (self.value(field), default) {
            (Some(value), _) => value
                .as_u64()
                .and_then(|count| usize::try_from(count).ok())
                .ok_or_else(|| unusable(field, &value.to_string(), "a whole number")),
            (None, Some(default)) => Ok(default),
            (None, None) => Err(missing(field, "a whole number")),
        }
    }

    pub(super) fn number(
        &self,
        field: &'static str,
        default: f64,
    ) -> Result<f64, HuggingFaceError> {
        match self.value(field) {
            None => Ok(default),
            Some(value) => value
                .as_f64()
                .ok_or_else(|| unusable(field, &value.to_string(), "a number")),
        }
    }

    pub(super) fn flag(
        &self,
        field: &'static str,
        default: bool,
    ) -> Result<bool, HuggingFaceError> {
        match self.value(field) {
            None => Ok(default),
            Some(value) => value
                .as_bool()
                .ok_or_else(|| unusable(field, &value.to_string(), "true, false")),
        }
    }
}
