//! The log file and the event log, with real processes.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "the parts talk to the test on standard output"
)]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use everstep_telemetry::{Event, EventLog, Options, TelemetryError, init, log_path};

const PART: &str = "EVERSTEP_TEST_PART";
/// What is ours is told by the beginning of its target.
const TARGET: &str = "everstep_test";

fn part(part: &str, folder: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "parts", "--nocapture"])
        .env(PART, part)
        .env("EVERSTEP_TEST_FOLDER", folder)
        // Stricter than the spans' level: lines must tell their step all the same.
        .env("EVERSTEP_LOG", "warn")
        .env_remove("RUST_LOG")
        .env_remove("OTEL_EXPORTER_OTLP_ENDPOINT");
    command
}

/// Not a test by itself: the parts that the tests give to other processes.
#[test]
fn parts() {
    let Ok(part) = std::env::var(PART) else {
        return;
    };
    let folder = PathBuf::from(std::env::var("EVERSTEP_TEST_FOLDER").unwrap());
    let options = || Options {
        process: part.clone(),
        log_file: Some(log_path(&folder, &part)),
        ..Options::default()
    };
    match part.as_str() {
        "victim" => {
            let _telemetry = init(options()).unwrap();
            assert!(matches!(init(options()), Err(TelemetryError::AlreadySetUp)));
            let _step = tracing::info_span!(target: TARGET, "step", epoch = 1, step = 9).entered();
            let _lease = tracing::info_span!(target: TARGET, "lease", step = 9, slot = 2).entered();
            for number in 0..1000 {
                tracing::warn!(target: TARGET, number, "working");
            }
            tracing::debug!(target: TARGET, "not shown");
            let _ = std::panic::catch_unwind(|| panic!("a test's panic"));
            println!("ready");
            // Until it is killed.
            let _ = std::io::stdin().read_line(&mut String::new());
        }
        "writer" => {
            let log = EventLog::open(folder.join("events.jsonl")).unwrap();
            for step in 0..500 {
                log.append(&Event::CheckpointStarted {
                    step,
                    epoch: u64::from(std::process::id()),
                })
                .unwrap();
            }
        }
        "mistaken" => {
            let error = init(options()).unwrap_err().to_string();
            println!("said {error}");
        }
        other => panic!("no such part: {other}"),
    }
}

#[test]
fn sigkill_loses_no_line_of_the_log() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = part("victim", folder.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(
        lines
            .map(Result::unwrap)
            .any(|line| line.ends_with("ready"))
    );
    child.kill().unwrap();
    child.wait().unwrap();
    let log = std::fs::read_to_string(log_path(folder.path(), "victim")).unwrap();
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(lines.len(), 1001, "{log}");
    for (number, line) in lines[..1000].iter().enumerate() {
        let (time, rest) = line.split_at(24);
        assert!(time.starts_with("20") && time.ends_with('Z'), "{line}");
        assert_eq!(
            rest,
            format!("  WARN epoch=1 step=9 slot=2 test: working number={number}")
        );
    }
    assert!(
        lines[1000].contains("ERROR epoch=1 step=9 slot=2 telemetry::init: panic: a test's panic"),
        "{}",
        lines[1000]
    );
}

#[test]
fn processes_that_append_at_once_tear_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let children: Vec<Child> = (0..4)
        .map(|_| {
            part("writer", folder.path())
                .stdout(Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    let ids: Vec<u64> = children.iter().map(|child| u64::from(child.id())).collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let events = EventLog::read(folder.path().join("events.jsonl")).unwrap();
    assert_eq!(events.len(), 2000);
    for id in ids {
        let steps = events.iter().filter_map(|record| match record.event {
            Event::CheckpointStarted { step, epoch } if epoch == id => Some(step),
            _ => None,
        });
        assert!(steps.eq(0..500), "process {id}");
    }
}

#[test]
fn a_wrong_variable_is_one_clear_line() {
    let cases = [
        (
            "EVERSTEP_LOG",
            "everstep=loud",
            "EVERSTEP_LOG=\"everstep=loud\" is not valid",
        ),
        (
            "OTEL_EXPORTER_OTLP_ENDPOINT",
            "localhost:4317",
            "it must be http://HOST:PORT",
        ),
        (
            "OTEL_EXPORTER_OTLP_PROTOCOL",
            "http/protobuf",
            "only `grpc` is built in",
        ),
    ];
    for (variable, value, expected) in cases {
        let folder = tempfile::tempdir().unwrap();
        let output = part("mistaken", folder.path())
            .env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
            .env(variable, value)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{text}");
        assert!(
            text.lines()
                .any(|line| line.contains(&format!("said {variable}=")) && line.contains(expected)),
            "{text}"
        );
    }
}
