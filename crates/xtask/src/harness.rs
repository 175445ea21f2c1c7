//! Running a test harness: its output goes on to the terminal, and what it counted is kept.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result};

use crate::process;

/// How many tests ran, and how they ended.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
}

impl Counts {
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// Runs a harness and counts; a harness that fails without a failed test (a build error) counts as one failure.
pub(crate) fn run(command: &mut Command) -> Result<Counts> {
    let line = process::shown(command);
    println!("$ {line}");
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{line}`"))?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    // nextest counts on its standard error, cargo's own harness on its standard output: both are read.
    let errors = thread::spawn(move || {
        stderr.map_or_else(Counts::default, |pipe| tee(pipe, &mut std::io::stderr()))
    });
    let mut counts = stdout.map_or_else(Counts::default, |pipe| tee(pipe, &mut std::io::stdout()));
    counts.add(errors.join().unwrap_or_default());
    let status = child
        .wait()
        .with_context(|| format!("cannot wait for `{line}`"))?;
    if !status.success() && counts.failed == 0 {
        counts.failed = 1;
    }
    Ok(counts)
}

fn tee(pipe: impl std::io::Read, terminal: &mut impl Write) -> Counts {
    let mut counts = Counts::default();
    for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
        // A closed terminal must not end the tests.
        terminal
            .write_all(&line)
            .and_then(|()| terminal.write_all(b"\n"))
            .ok();
        counts.add(count(&String::from_utf8_lossy(&line)));
    }
    counts
}

/// What one line of a harness's output adds.
fn count(line: &str) -> Counts {
    let line = without_colours(line);
    let line = line.trim();
    let is_total = line.starts_with("test result:")
        || (line.starts_with("Summary [") && line.contains(" run: "));
    if !is_total {
        return Counts::default();
    }
    let total = line.split_once(" run: ").map_or(line, |(_, rest)| rest);
    let words: Vec<&str> = total
        .split(|c: char| !c.is_alphanumeric())
        .filter(|word| !word.is_empty())
        .collect();
    // "timed out" is two words; nextest prints it beside "failed".
    let number_before = |name: &str| -> u64 {
        words
            .windows(2)
            .filter(|pair| pair[1] == name)
            .filter_map(|pair| pair[0].parse::<u64>().ok())
            .sum()
    };
    Counts {
        passed: number_before("passed"),
        failed: number_before("failed") + number_before("timed"),
    }
}

/// `text` without terminal escapes.
fn without_colours(text: &str) -> String {
    let mut plain = String::new();
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        if character == '\u{1b}' {
            // An escape ends with the first letter.
            characters.find(char::is_ascii_alphabetic);
        } else {
            plain.push(character);
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_totals_of_both_harnesses_are_read() {
        let cargo = "test result: FAILED. 11 passed; 2 failed; 0 ignored; 0 measured; 3 filtered out; finished in 0.1s";
        assert_eq!(
            count(cargo),
            Counts {
                passed: 11,
                failed: 2
            }
        );
        let nextest = "     Summary [   1.234s] 21 tests run: 19 passed (2 slow, 1 leaky), 1 failed, 1 timed out, 4 skipped";
        assert_eq!(
            count(nextest),
            Counts {
                passed: 19,
                failed: 2
            }
        );
        let coloured =
            "\u{1b}[32;1m     Summary\u{1b}[0m [   0.010s] 1 test run: 1 passed, 0 skipped";
        assert_eq!(
            count(coloured),
            Counts {
                passed: 1,
                failed: 0
            }
        );
    }

    #[test]
    fn other_lines_count_nothing() {
        for line in ["test a ... ok", "5 passed", "running 3 tests", ""] {
            assert_eq!(count(line), Counts::default());
        }
    }

    #[test]
    fn output_goes_on_unchanged_while_it_is_counted() {
        let text = "running 3 tests\ntest result: ok. 3 passed; 0 failed;\nlast line\n";
        let mut terminal = Vec::new();
        assert_eq!(
            tee(text.as_bytes(), &mut terminal),
            Counts {
                passed: 3,
                failed: 0
            }
        );
        assert_eq!(terminal, text.as_bytes());
    }

    #[test]
    fn a_harness_that_does_not_start_its_tests_has_failed() {
        let counts = run(Command::new("sh").args(["-c", "exit 101"])).unwrap();
        assert_eq!(
            counts,
            Counts {
                passed: 0,
                failed: 1
            }
        );
        let counts = run(Command::new("sh").args(["-c", "exit 0"])).unwrap();
        assert_eq!(counts, Counts::default());
    }
}
