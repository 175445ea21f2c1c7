//! The demo's text: sources and Markdown of the crates that this workspace is built from.
//!
//! Cargo has them on the machine anyway, they are real Rust and real English, and `Cargo.lock` fixes them, so
//! everybody's demo trains on the same bytes.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::process;
use crate::workspace::Workspace;

/// Files outside these sizes are stubs or tables.
const FILE_BYTES: std::ops::RangeInclusive<usize> = 400..=96 * 1024;

/// A line longer than this was not written by a person.
const LINE_BYTES_MAX: usize = 300;

/// Crates whose sources are almost all generated, by how their names begin or end.
const GENERATED: &[&str] = &[
    "windows",
    "winapi",
    "web-sys",
    "js-sys",
    "linux-raw-sys",
    "libc",
    "protoc-bin",
    "unicode-",
];

/// What was gathered.
#[derive(Debug)]
pub(crate) struct Corpus {
    /// JSON lines, one document each.
    pub(crate) file: PathBuf,
    pub(crate) documents: usize,
    pub(crate) text_bytes: usize,
    pub(crate) crates: usize,
}

/// A file of a crate that may become a document.
#[derive(Debug)]
struct Candidate {
    crate_name: String,
    path: PathBuf,
    /// Decides who is taken when there is too much: by digest of the name, so that no crate comes first.
    order: [u8; 32],
}

/// Gathers at most `bytes_max` of text into `file`.
///
/// # Errors
/// If cargo cannot fetch the crates or the text cannot be written.
pub(crate) fn gather(workspace: &Workspace, file: &Path, bytes_max: usize) -> Result<Corpus> {
    let mut candidates = Vec::new();
    for (name, folder) in crates(workspace)? {
        collect(&name, &folder, &mut candidates)?;
    }
    candidates.sort_by_key(|candidate| candidate.order);
    if let Some(folder) = file.parent() {
        fs::create_dir_all(folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
    }
    let sink =
        fs::File::create(file).with_context(|| format!("cannot create {}", file.display()))?;
    let mut sink = BufWriter::new(sink);
    let (mut corpus, mut seen, mut taken) = (
        Corpus {
            file: file.to_path_buf(),
            documents: 0,
            text_bytes: 0,
            crates: 0,
        },
        BTreeSet::new(),
        BTreeSet::new(),
    );
    for candidate in candidates {
        let Ok(text) = fs::read_to_string(&candidate.path) else {
            continue;
        };
        if !is_written_by_people(&text) {
            continue;
        }
        if corpus.text_bytes + text.len() > bytes_max {
            break;
        }
        // Versions of one crate and licences repeat each other.
        if seen.insert(blake3::hash(text.as_bytes()).to_hex().to_string()) {
            corpus.documents += 1;
            corpus.text_bytes += text.len();
            taken.insert(candidate.crate_name);
            writeln!(sink, "{}", json!({ "text": text }))?;
        }
    }
    sink.flush()?;
    corpus.crates = taken.len();
    ensure!(
        corpus.documents > 0,
        "cargo's registry holds no text; does `cargo fetch` work on this machine?"
    );
    Ok(corpus)
}

/// Name and folder of every registry crate that is built on this machine.
fn crates(workspace: &Workspace) -> Result<Vec<(String, PathBuf)>> {
    let version = process::output(Command::new("rustc").arg("-vV"))?;
    let host = version
        .lines()
        .find_map(|line| line.strip_prefix("host: "))
        .context("`rustc -vV` names no host")?;
    let text = process::output(process::cargo(workspace).args([
        "metadata",
        "--format-version",
        "1",
        "--locked",
        "--filter-platform",
        host,
    ]))?;
    let metadata: Value = serde_json::from_str(&text).context("cargo metadata gave no JSON")?;
    let packages = metadata["packages"]
        .as_array()
        .context("cargo metadata lists no packages")?;
    let from_registry = packages
        .iter()
        .filter(|package| package["source"].is_string());
    Ok(from_registry
        .filter_map(|package| {
            let name = package["name"].as_str()?;
            let folder = Path::new(package["manifest_path"].as_str()?).parent()?;
            let generated =
                name.ends_with("-sys") || GENERATED.iter().any(|prefix| name.starts_with(prefix));
            (!generated).then(|| {
                (
                    format!("{name}-{}", package["version"].as_str().unwrap_or("")),
                    folder.to_path_buf(),
                )
            })
        })
        .collect())
}

/// Adds the Rust and Markdown files under `folder`.
fn collect(crate_name: &str, folder: &Path, candidates: &mut Vec<Candidate>) -> Result<()> {
    let mut open = vec![folder.to_path_buf()];
    while let Some(current) = open.pop() {
        for entry in
            fs::read_dir(&current).with_context(|| format!("cannot read {}", current.display()))?
        {
            let path = entry?.path();
            if path.is_symlink() {
                continue;
            }
            if path.is_dir() {
                open.push(path);
            } else if path
                .extension()
                .is_some_and(|extension| extension == "rs" || extension == "md")
            {
                let relative = path
                    .strip_prefix(folder)
                    .unwrap_or(&path)
                    .to_string_lossy()
                    .into_owned();
                let order = *blake3::hash(format!("{crate_name}/{relative}").as_bytes()).as_bytes();
                candidates.push(Candidate {
                    crate_name: crate_name.to_owned(),
                    path,
                    order,
                });
            }
        }
    }
    Ok(())
}

/// Whether a text is neither generated nor a table.
fn is_written_by_people(text: &str) -> bool {
    if !FILE_BYTES.contains(&text.len()) || text.lines().any(|line| line.len() > LINE_BYTES_MAX) {
        return false;
    }
    // `cargo expand` and the like leave their own marks: fully qualified names and no comments at all.
    if text.contains("::core::clone::Clone for") || text.contains("#[automatically_derived]") {
        return false;
    }
    let head: String = text
        .chars()
        .take(1_000)
        .collect::<String>()
        .to_ascii_lowercase();
    if [
        "@generated",
        "generated by",
        "do not edit",
        "autogenerated",
        "auto-generated",
    ]
    .iter()
    .any(|mark| head.contains(mark))
    {
        return false;
    }
    let digits = text.bytes().filter(u8::is_ascii_digit).count();
    let foreign = text.bytes().filter(|byte| !byte.is_ascii()).count();
    digits * 8 < text.len() && foreign * 20 < text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_files_and_tables_are_left_out() {
        let prose = "fn main() { println!(\"a sentence\"); }\n".repeat(20);
        assert!(is_written_by_people(&prose));
        assert!(!is_written_by_people(&format!("// @generated\n{prose}")));
        assert!(!is_written_by_people(
            &"0x1234, 0x5678, "
                .repeat(10)
                .lines()
                .collect::<Vec<_>>()
                .join("\n")
                .repeat(9)
        ));
        assert!(!is_written_by_people(&"x".repeat(LINE_BYTES_MAX + 500)));
        assert!(!is_written_by_people("short"));
    }
}
