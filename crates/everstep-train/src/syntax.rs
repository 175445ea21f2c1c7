//! From the text of a run file to its sections, with errors in one line.

use std::path::Path;

use serde::Deserialize;
use toml::{Table, Value};

use crate::error::RunFileError;
use crate::sections::RunFile;

/// Parses TOML.
pub(crate) fn parse(file: &Path, text: &str) -> Result<Table, RunFileError> {
    toml::from_str(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start).min(text.len());
        let before = &text.as_bytes()[..at];
        let line_start = before
            .iter()
            .rposition(|&byte| byte == b'\n')
            .map_or(0, |newline| newline + 1);
        RunFileError::Syntax {
            file: file.to_owned(),
            line: 1 + before.iter().filter(|&&byte| byte == b'\n').count(),
            column: 1 + String::from_utf8_lossy(&before[line_start..])
                .chars()
                .count(),
            reason: one_line(error.message()),
        }
    })
}

/// Understands a parsed run file.
pub(crate) fn understand(file: &Path, table: Table) -> Result<RunFile, RunFileError> {
    RunFile::deserialize(Value::Table(table)).map_err(|error| {
        let (field, reason) = explain(error.message(), &keys(&error));
        RunFileError::Field {
            file: file.to_owned(),
            field,
            reason,
        }
    })
}

/// The dotted path that an error belongs to. The toml crate only tells it in its text, after the message.
fn keys(error: &toml::de::Error) -> String {
    let text = error.to_string();
    let rest = text.strip_prefix(error.message()).unwrap_or_default();
    rest.trim()
        .strip_prefix("in `")
        .and_then(|rest| rest.strip_suffix('`'))
        .unwrap_or_default()
        .to_owned()
}

/// Rewrites what serde says: the field, and the reason with what is allowed.
fn explain(message: &str, path: &str) -> (String, String) {
    let below = |name: &str| {
        if path.is_empty() {
            name.to_owned()
        } else {
            format!("{path}.{name}")
        }
    };
    let named = |prefix: &str| {
        message
            .strip_prefix(prefix)
            .and_then(|rest| rest.split_once('`'))
    };
    if let Some((name, rest)) = named("unknown field `") {
        return (below(name), format!("unknown field{}", allowed(rest)));
    }
    if let Some((name, _)) = named("missing field `") {
        return (below(name), "is missing; it has no default".into());
    }
    if let Some((value, rest)) = named("unknown variant `") {
        return (
            path.to_owned(),
            format!("unknown value `{value}`{}", allowed(rest)),
        );
    }
    match message.split_once(", expected ") {
        Some((found, expected)) => (
            path.to_owned(),
            format!("{}; allowed: {}", one_line(found), human(expected)),
        ),
        None => (path.to_owned(), one_line(message)),
    }
}

fn allowed(rest: &str) -> String {
    let rest = rest.trim_start_matches(", ");
    let names = rest
        .strip_prefix("expected one of ")
        .or_else(|| rest.strip_prefix("expected "))
        .unwrap_or(rest);
    if names.is_empty() {
        String::new()
    } else {
        format!("; allowed: {}", one_line(names))
    }
}

fn human(expected: &str) -> String {
    match expected {
        "u64" | "usize" | "u32" => "a whole number, 0 or more".into(),
        "f64" => "a number".into(),
        "a sequence" => "a list, such as [\"text.txt\"]".into(),
        "a boolean" => "true or false".into(),
        other if other.starts_with("struct ") => "a table of fields".into(),
        other => one_line(other),
    }
}

fn one_line(text: &str) -> String {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect::<Vec<_>>()
        .join(", ")
}
