//! Span export, against a real collector and against ones that do not answer.
//!
//! Telemetry is set up once per process, so every part of these tests that sets it up runs in a process of its own:
//! this test binary again, told by `EVERSTEP_TEST_PART` which part to play.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "the parts talk to the test on standard output"
)]

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use everstep_telemetry::testing::{OtlpReceiver, ReceivedSpan};
use everstep_telemetry::{Options, TraceContext, init, log_path, names};

const PART: &str = "EVERSTEP_TEST_PART";
/// What is ours is told by the beginning of its target.
const TARGET: &str = "everstep_test";

/// Plays `part` in a process of its own and returns the line that it said.
fn play(part: &str, folder: &Path, endpoint: &str, argument: &str) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "parts", "--nocapture"])
        .envs([
            (PART, part),
            ("EVERSTEP_TEST_ARGUMENT", argument),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint),
        ])
        .env("EVERSTEP_TEST_FOLDER", folder)
        .env_remove("EVERSTEP_TRACE")
        .env_remove("EVERSTEP_LOG")
        .env_remove("RUST_LOG")
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{part} failed:\n{text}");
    text.lines()
        .find_map(|line| line.split_once("said "))
        .unwrap_or(("", ""))
        .1
        .to_owned()
}

/// Not a test by itself: the parts that the tests give to other processes.
#[test]
fn parts() {
    let Ok(part) = std::env::var(PART) else {
        return;
    };
    let folder = std::env::var("EVERSTEP_TEST_FOLDER").unwrap();
    let argument = std::env::var("EVERSTEP_TEST_ARGUMENT").unwrap();
    // The coordinator and the worker are async programs; the crowd checks that a runtime is not needed.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let options = Options {
        process: part.clone(),
        run_id: "run-7".into(),
        log_file: Some(log_path(Path::new(&folder), &part)),
        node: "node-3".into(),
        ..Options::default()
    };
    match part.as_str() {
        "coordinator" => runtime.block_on(async {
            let telemetry = init(options).unwrap();
            let context = {
                let step = tracing::info_span!(target: TARGET, names::span::STEP, epoch = 2, step = 5);
                step.in_scope(TraceContext::current)
            };
            assert!(context.is_valid());
            telemetry.shutdown();
            let hex: String = context
                .to_bytes()
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect();
            println!("said {hex}");
        }),
        "worker" => runtime.block_on(async {
            let bytes: Vec<u8> = (0..argument.len())
                .step_by(2)
                .map(|i| u8::from_str_radix(&argument[i..i + 2], 16).unwrap())
                .collect();
            let telemetry = init(options).unwrap();
            {
                let lease = tracing::info_span!(target: TARGET, names::span::LEASE, epoch = 2, step = 5, slot = 1);
                TraceContext::from_bytes(&bytes.try_into().unwrap()).adopt(&lease);
                let _lease = lease.entered();
                let _pass = tracing::info_span!(target: TARGET, names::span::FORWARD_BACKWARD, micro = 0).entered();
                tracing::info!(target: TARGET, loss = 2.5, "slot done");
            }
            telemetry.shutdown();
        }),
        "crowd" => {
            let telemetry = init(options).unwrap();
            let spans = Instant::now();
            for step in 0..100_000 {
                let _span = tracing::info_span!(target: TARGET, names::span::STEP, step).entered();
            }
            let spans = spans.elapsed();
            let shutdown = Instant::now();
            telemetry.shutdown();
            println!(
                "said {} {}",
                spans.as_millis(),
                shutdown.elapsed().as_millis()
            );
        }
        other => panic!("no such part: {other}"),
    }
}

fn named<'a>(spans: &'a [ReceivedSpan], name: &str) -> &'a ReceivedSpan {
    spans
        .iter()
        .find(|span| span.name == name)
        .unwrap_or_else(|| panic!("no span {name}: {spans:#?}"))
}

#[test]
fn one_trace_spans_two_processes() {
    let receiver = OtlpReceiver::start().unwrap_or_else(|error| panic!("{error}"));
    let folder = tempfile::tempdir().unwrap();
    let context = play("coordinator", folder.path(), receiver.endpoint(), "");
    play("worker", folder.path(), receiver.endpoint(), &context);
    let is_there = |spans: &[ReceivedSpan], name: &str| spans.iter().any(|span| span.name == name);
    let spans = receiver
        .wait_for(Duration::from_secs(30), |spans| {
            ["step", "lease", "forward_backward"].iter().all(|name| is_there(spans, name))
                // The last line of the last span.
                && spans.iter().all(|span| !span.attributes.is_empty())
        })
        .unwrap_or_else(|error| panic!("{error}"));

    let [step, lease, pass] = ["step", "lease", "forward_backward"].map(|name| named(&spans, name));
    assert_eq!(
        (step.process(), lease.process(), pass.process()),
        ("coordinator", "worker", "worker")
    );
    assert_eq!(lease.trace_id, step.trace_id);
    assert_eq!(pass.trace_id, step.trace_id);
    assert_eq!(step.parent_id, "");
    assert_eq!(lease.parent_id, step.span_id);
    assert_eq!(pass.parent_id, lease.span_id);
    let resource = |key: &str| lease.resource.get(key).map(String::as_str);
    assert_eq!(resource(names::resource::SERVICE_NAME), Some("everstep"));
    assert_eq!(resource(names::resource::RUN), Some("run-7"));
    assert_eq!(resource(names::resource::HOST), Some("node-3"));
    assert_eq!(lease.attributes.get("slot").map(String::as_str), Some("1"));

    let log = std::fs::read_to_string(log_path(folder.path(), "worker")).unwrap();
    assert!(
        log.contains(" INFO epoch=2 step=5 slot=1 micro=0 test: slot done loss=2.5\n"),
        "{log}"
    );
}

/// 100,000 spans against a collector that does not take them: nobody waits, and the log stays short.
fn suffer(endpoint: &str) {
    let folder = tempfile::tempdir().unwrap();
    let times = play("crowd", folder.path(), endpoint, "");
    let (spans_ms, shutdown_ms) = times.split_once(' ').unwrap();
    // Both limits are far above what was seen (0.5 s and 2 s): the machine may be busy.
    assert!(
        spans_ms.parse::<u64>().unwrap() < 10_000,
        "spans took {spans_ms} ms"
    );
    assert!(
        shutdown_ms.parse::<u64>().unwrap() < 6_000,
        "shutdown took {shutdown_ms} ms"
    );
    let log = std::fs::read_to_string(log_path(folder.path(), "crowd")).unwrap();
    assert!((1..=2).contains(&log.lines().count()), "{log}");
    assert!(
        log.contains("spans cannot be exported") || log.contains("were not exported"),
        "{log}"
    );
}

#[test]
fn a_collector_that_refuses_does_not_matter() {
    // Bound and dropped: nobody listens.
    let address = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    suffer(&format!("http://{address}"));
}

#[test]
fn a_collector_that_is_silent_does_not_matter() {
    // Connections are queued by the kernel and never answered.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    suffer(&format!("http://{}", listener.local_addr().unwrap()));
}
