//! Source files: finding them, reading them as documents, holding some of the text out.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::{DataError, IoContext};
use crate::shard::Split;

/// Which splits a source file feeds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Role {
    /// All of it is validation text.
    Validation,
    /// The last `held_out` of it is validation text, the rest is training text.
    Train { held_out: f64 },
}

/// One file of text.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    /// Where it lies.
    pub(crate) path: PathBuf,
    /// The path as it follows from the configuration: relative where the configuration is.
    pub(crate) name: String,
    /// Which splits it feeds.
    pub(crate) role: Role,
}

/// The content of a source file.
#[derive(Debug)]
pub(crate) struct Content {
    /// Size of the file in bytes.
    pub(crate) bytes: u64,
    /// BLAKE3 of the file.
    pub(crate) digest: blake3::Hash,
    /// Its documents that are not empty, in order, each with its split.
    pub(crate) documents: Vec<(Split, String)>,
}

impl Source {
    /// Reads the file and splits its text.
    ///
    /// # Errors
    /// [`DataError::BadSource`] names the file, and the line where there is one, that is not as promised.
    pub(crate) fn read(&self) -> Result<Content, DataError> {
        let raw = std::fs::read(&self.path).at("read", &self.path)?;
        let (bytes, digest) = (raw.len() as u64, blake3::hash(&raw));
        let text = String::from_utf8(raw).map_err(|error| {
            let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
            let line = 1 + valid.iter().filter(|&&byte| byte == b'\n').count();
            self.bad(
                Some(line),
                "is not UTF-8 text; allowed: UTF-8 text files and .jsonl files".into(),
            )
        })?;
        let mut documents = match self
            .path
            .extension()
            .is_some_and(|extension| extension == "jsonl")
        {
            true => {
                let texts = self.json_lines(&text)?;
                let kept = kept(texts.len(), self.role);
                let split = |index| {
                    if index < kept {
                        Split::Train
                    } else {
                        Split::Validation
                    }
                };
                texts
                    .into_iter()
                    .enumerate()
                    .map(|(index, text)| (split(index), text))
                    .collect()
            }
            false => split_text(text, self.role),
        };
        documents.retain(|(_, text)| !text.is_empty());
        Ok(Content {
            bytes,
            digest,
            documents,
        })
    }

    fn json_lines(&self, text: &str) -> Result<Vec<String>, DataError> {
        #[derive(Deserialize)]
        struct Line {
            text: String,
        }
        let lines = text
            .lines()
            .enumerate()
            .filter(|(_, line)| !line.trim().is_empty());
        lines
            .map(|(index, line)| match serde_json::from_str::<Line>(line) {
                Ok(line) => Ok(line.text),
                Err(error) => Err(self.bad(
                    Some(index + 1),
                    format!(
                        "needs a JSON object with a string field `text` on each line ({error})"
                    ),
                )),
            })
            .collect()
    }

    fn bad(&self, line: Option<usize>, reason: String) -> DataError {
        DataError::BadSource {
            file: self.path.clone(),
            line,
            reason,
        }
    }
}

/// How many of `total` things stay in the training split.
fn kept(total: usize, role: Role) -> usize {
    match role {
        Role::Validation => 0,
        Role::Train { held_out } => (total as f64 * (1.0 - held_out)) as usize,
    }
}

fn split_text(mut text: String, role: Role) -> Vec<(Split, String)> {
    let total = text.chars().count();
    let kept = kept(total, role);
    let cut = match text.len() == total {
        true => kept,
        false => text
            .char_indices()
            .nth(kept)
            .map_or(text.len(), |(at, _)| at),
    };
    let tail = text.split_off(cut);
    vec![(Split::Train, text), (Split::Validation, tail)]
}

/// The files that `patterns` name, in the order of the patterns, sorted inside each, every file once.
///
/// # Errors
/// [`DataError::NoMatch`] names the first pattern that no file matches.
pub(crate) fn find(
    field: &'static str,
    patterns: &[String],
    base: &Path,
    role: Role,
) -> Result<Vec<Source>, DataError> {
    let mut seen = BTreeSet::new();
    let mut sources = Vec::new();
    for pattern in patterns {
        let mut files = matches(field, pattern, base)?;
        files.sort();
        if files.is_empty() {
            return Err(DataError::NoMatch {
                field,
                pattern: pattern.clone(),
                base: base.to_owned(),
            });
        }
        for path in files {
            if seen.insert(path.clone()) {
                let relative = if Path::new(pattern).is_absolute() {
                    &path
                } else {
                    path.strip_prefix(base).unwrap_or(&path)
                };
                sources.push(Source {
                    name: relative.to_string_lossy().into_owned(),
                    path,
                    role,
                });
            }
        }
    }
    Ok(sources)
}

/// Refuses a file that is training and validation text at once.
pub(crate) fn check_disjoint(sources: &[Source]) -> Result<(), DataError> {
    let identity = |source: &Source| {
        source
            .path
            .canonicalize()
            .unwrap_or_else(|_| source.path.clone())
    };
    let training: BTreeSet<PathBuf> = sources
        .iter()
        .filter(|source| source.role != Role::Validation)
        .map(identity)
        .collect();
    match sources
        .iter()
        .find(|source| source.role == Role::Validation && training.contains(&identity(source)))
    {
        Some(both) => Err(DataError::config(
            "data.validation",
            format!(
                "names `{}`, which data.train names too; allowed: text that is not trained on",
                both.name
            ),
        )),
        None => Ok(()),
    }
}

fn matches(field: &'static str, pattern: &str, base: &Path) -> Result<Vec<PathBuf>, DataError> {
    let path = base.join(pattern);
    let mut files = Vec::new();
    if path.is_dir() {
        walk(&path, &mut files)?;
    } else if path.is_file() {
        files.push(path);
    } else if pattern.contains(['*', '?', '[']) {
        let escaped = match Path::new(pattern).is_absolute() {
            true => pattern.to_owned(),
            false => format!(
                "{}/{pattern}",
                glob::Pattern::escape(&base.to_string_lossy())
            ),
        };
        let paths = glob::glob(&escaped).map_err(|error| {
            DataError::config(field, format!("`{pattern}` is not a glob: {error}"))
        })?;
        for path in paths {
            let path = path.map_err(|error| DataError::Io {
                action: "list",
                file: error.path().to_owned(),
                source: error.into(),
            })?;
            if path.is_file() {
                files.push(path);
            }
        }
    }
    Ok(files)
}

/// Collects the files below `dir`; hidden ones are skipped, links to folders are not followed since they may loop.
fn walk(dir: &Path, files: &mut Vec<PathBuf>) -> Result<(), DataError> {
    for entry in std::fs::read_dir(dir).at("list", dir)? {
        let entry = entry.at("list", dir)?;
        let path = entry.path();
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        let kind = entry.file_type().at("list", &path)?;
        if kind.is_dir() {
            walk(&path, files)?;
        } else if path.is_file() {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(path: &Path, held_out: f64) -> Source {
        Source {
            path: path.to_owned(),
            name: String::new(),
            role: Role::Train { held_out },
        }
    }

    fn texts(content: &Content, split: Split) -> Vec<&str> {
        content
            .documents
            .iter()
            .filter(|(of, _)| *of == split)
            .map(|(_, text)| text.as_str())
            .collect()
    }

    #[test]
    fn a_text_file_loses_its_last_characters_and_a_json_file_its_last_lines() {
        let dir = tempfile::tempdir().unwrap();
        let text = dir.path().join("a.txt");
        std::fs::write(&text, "äöü456789ß").unwrap();
        let content = source(&text, 0.1).read().unwrap();
        assert_eq!(
            (
                texts(&content, Split::Train),
                texts(&content, Split::Validation)
            ),
            (vec!["äöü456789"], vec!["ß"])
        );
        let content = source(&text, 0.0).read().unwrap();
        assert_eq!(content.documents.len(), 1);

        let lines = dir.path().join("a.jsonl");
        std::fs::write(
            &lines,
            "{\"text\":\"a\\n\",\"id\":1}\n\n{\"text\":\"\"}\n{\"text\":\"b\"}\n",
        )
        .unwrap();
        let content = source(&lines, 0.4).read().unwrap();
        assert_eq!(
            (
                texts(&content, Split::Train),
                texts(&content, Split::Validation)
            ),
            (vec!["a\n"], vec!["b"])
        );
    }

    #[test]
    fn bad_files_are_named_with_their_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("b.jsonl");
        for (bytes, line, part) in [
            (
                &b"{\"text\":\"a\"}\n{\"txt\":\"b\"}\n"[..],
                2,
                "missing field `text`",
            ),
            (b"{\"text\":3}", 1, "string field `text`"),
            (b"\n\n{", 3, "EOF"),
            (b"{\"text\":\"a\"}\n\xff", 2, "is not UTF-8 text"),
        ] {
            std::fs::write(&path, bytes).unwrap();
            let error = source(&path, 0.0).read().unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("`{}`:{line}: ", path.display())),
                "{error}"
            );
            assert!(error.contains(part), "{error}");
            assert!(!error.contains('\n'));
        }
    }

    #[test]
    fn folders_globs_and_paths_are_found_in_a_fixed_order() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("with [brackets]");
        for file in ["b/2.md", "b/1.md", "b/.git/x.md", "a.txt"] {
            let path = base.join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, file).unwrap();
        }
        let find = |patterns: &[&str]| {
            let patterns: Vec<String> = patterns.iter().map(|&pattern| pattern.into()).collect();
            let found = find("data.train", &patterns, &base, Role::Validation);
            found.map(|sources| {
                sources
                    .into_iter()
                    .map(|source| source.name)
                    .collect::<Vec<_>>()
            })
        };
        assert_eq!(
            find(&["b", "a.txt"]).unwrap(),
            ["b/1.md", "b/2.md", "a.txt"]
        );
        assert_eq!(
            find(&["*.txt", "**/*.md", "b/1.md"]).unwrap(),
            ["a.txt", "b/.git/x.md", "b/1.md", "b/2.md"]
        );
        let error = find(&["a.txt", "c/*.txt"]).unwrap_err().to_string();
        assert_eq!(
            error,
            format!(
                "data.train: no file matches `c/*.txt` (looked in `{}`)",
                base.display()
            )
        );
        assert!(
            find(&["a***b"])
                .unwrap_err()
                .to_string()
                .contains("is not a glob")
        );
    }
}
