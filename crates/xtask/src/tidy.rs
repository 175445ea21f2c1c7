//! House rules that neither rustfmt nor clippy knows.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::process;
use crate::workspace::Workspace;

/// Longest source file, in lines. Past it, a second concern has usually moved in.
const LINES_MAX: usize = 700;

/// What must not be written in a test, and what to do instead. Written in two halves, or this file would break them.
const IN_TESTS: &[(&str, &str)] = &[
    (
        concat!("sleep", "("),
        "wait for an event, or step virtual time",
    ),
    (concat!("#[", "ignore"), "fix or delete it"),
];

/// Paths that exist on one machine only.
const MACHINE_PATHS: &[&str] = &[
    concat!("/wo", "rk/"),
    concat!("/ro", "ot/"),
    concat!("/Us", "ers/"),
    concat!("/ho", "me/"),
];

/// What marks unfinished work.
const UNFINISHED: &[&str] = &[
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("XX", "X:"),
];

/// Kinds of files that are read as text.
const TEXT: &[&str] = &["rs", "toml", "md", "py", "sh", "service", "yml", "yaml"];

/// Checks every file that git knows, or would add.
///
/// # Errors
/// All findings, one a line.
pub(crate) fn check(workspace: &Workspace) -> Result<()> {
    let files = files(workspace)?;
    let mut findings = Vec::new();
    for file in &files {
        let path = workspace.root().join(file);
        let Ok(text) = fs::read_to_string(&path) else {
            continue;
        };
        findings.extend(findings_in(file, &text));
    }
    if !findings.is_empty() {
        bail!("{} findings:\n{}", findings.len(), findings.join("\n"));
    }
    println!("{} files, all tidy", files.len());
    Ok(())
}

/// The text files of the checkout, relative to its root, in order.
fn files(workspace: &Workspace) -> Result<Vec<PathBuf>> {
    let listed = process::output(
        std::process::Command::new("git")
            .current_dir(workspace.root())
            .args(["ls-files", "--cached", "--others", "--exclude-standard"]),
    );
    let mut files: Vec<PathBuf> = match listed {
        Ok(text) => text.lines().map(PathBuf::from).collect(),
        // An unpacked archive has no git; then everything but what set-up and cargo make is looked at.
        Err(_) => walk(workspace.root())?,
    };
    files.retain(|file| {
        file.extension()
            .is_some_and(|extension| TEXT.iter().any(|text| extension == *text))
    });
    files.sort();
    files.dedup();
    Ok(files)
}

fn walk(root: &Path) -> Result<Vec<PathBuf>> {
    let (mut found, mut open) = (Vec::new(), vec![root.to_path_buf()]);
    while let Some(folder) = open.pop() {
        for entry in
            fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?
        {
            let path = entry?.path();
            let relative = path
                .strip_prefix(root)
                .context("a folder holds what is in it")?
                .to_path_buf();
            let made = ["target", "third_party", "runs", ".git"]
                .iter()
                .any(|name| relative == Path::new(name));
            if path.is_dir() && !path.is_symlink() && !made {
                open.push(path);
            } else if path.is_file() {
                found.push(relative);
            }
        }
    }
    Ok(found)
}

fn findings_in(file: &Path, text: &str) -> Vec<String> {
    let mut findings = Vec::new();
    let is_rust = file.extension().is_some_and(|extension| extension == "rs");
    let mut in_tests = is_rust && is_test_file(file);
    let mut report =
        |line: usize, what: String| findings.push(format!("{}:{line}: {what}", file.display()));
    for (index, line) in text.lines().enumerate() {
        // Tests inside a source file come last in it.
        in_tests |= is_rust && line.trim_start().starts_with("#[cfg(test)]");
        if in_tests {
            for (word, instead) in IN_TESTS.iter().filter(|(word, _)| line.contains(word)) {
                report(index + 1, format!("`{word}` in a test: {instead}"));
            }
        }
        for path in MACHINE_PATHS.iter().filter(|path| line.contains(**path)) {
            report(index + 1, format!("`{path}` exists on one machine only"));
        }
        for word in UNFINISHED
            .iter()
            .filter(|word| is_rust && line.contains(**word))
        {
            report(index + 1, format!("`{word}` belongs in an issue"));
        }
    }
    let lines = text.lines().count();
    if is_rust && lines > LINES_MAX {
        report(1, format!("{lines} lines; split files past {LINES_MAX}"));
    }
    findings
}

/// Whether a whole file is test code.
fn is_test_file(file: &Path) -> bool {
    file.file_name().is_some_and(|name| name == "tests.rs")
        || file.components().any(|part| part.as_os_str() == "tests")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleeping_is_found_in_tests_and_allowed_elsewhere() {
        let code = format!("fn wait() {{ {}1) }}\n", IN_TESTS[0].0);
        assert!(findings_in(Path::new("src/lib.rs"), &code).is_empty());
        assert_eq!(findings_in(Path::new("tests/it/main.rs"), &code).len(), 1);
        let with_tests = format!("{code}#[cfg(test)]\nmod tests {{\n{code}}}\n");
        let findings = findings_in(Path::new("src/lib.rs"), &with_tests);
        assert_eq!(findings.len(), 1);
        assert!(findings[0].starts_with("src/lib.rs:4: "), "{findings:?}");
    }

    #[test]
    fn long_files_and_machine_paths_are_found() {
        assert_eq!(
            findings_in(Path::new("src/lib.rs"), &"\n".repeat(LINES_MAX + 1)).len(),
            1
        );
        assert!(findings_in(Path::new("notes.md"), &"\n".repeat(LINES_MAX + 1)).is_empty());
        assert_eq!(
            findings_in(Path::new("notes.md"), MACHINE_PATHS[0]).len(),
            1
        );
    }
}
