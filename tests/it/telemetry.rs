//! Spans of one step, from several processes, in one trace: seen by a real OTLP collector.

use std::collections::BTreeSet;
use std::time::Duration;

use everstep_telemetry::testing::{OtlpReceiver, ReceivedSpan};

use crate::support::Workbench;

#[test]
fn one_trace_spans_coordinator_worker_loader_and_shard() {
    let collector = OtlpReceiver::start().unwrap();
    let bench = Workbench::new();
    let topology = bench.cluster(2, 2, 2);
    let mut train = bench.train("run", Some(&topology));
    train
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint())
        .args(["--set", "run.stop_at=20"]);
    let output = train.output().unwrap();
    assert!(
        output.status.success(),
        "{}\n{}",
        String::from_utf8_lossy(&output.stderr),
        bench.logs("run")
    );

    let wanted = [
        "step",
        "lease",
        "batch",
        "forward_backward",
        "push",
        "reduce",
        "decide",
        "apply",
        "publish",
    ];
    let whole = |spans: &[ReceivedSpan]| {
        let steps = spans.iter().filter(|span| span.name == "step");
        steps.map(|step| step.trace_id.clone()).find(|trace| {
            let of_trace: Vec<&ReceivedSpan> = spans
                .iter()
                .filter(|span| span.trace_id == *trace)
                .collect();
            let names: BTreeSet<&str> = of_trace.iter().map(|span| span.name.as_str()).collect();
            wanted.iter().all(|name| names.contains(name))
        })
    };
    let received = collector.wait_for(Duration::from_secs(20), |spans| whole(spans).is_some());
    let spans = received.unwrap_or_else(|error| {
        let spans = collector.spans();
        let names: BTreeSet<(&str, &str)> = spans
            .iter()
            .map(|span| (span.process(), span.name.as_str()))
            .collect();
        panic!("no trace has all of {wanted:?} ({error}); there are {names:?}")
    });
    let trace = whole(&spans).unwrap();
    let processes: BTreeSet<&str> = spans
        .iter()
        .filter(|span| span.trace_id == trace)
        .map(ReceivedSpan::process)
        .collect();
    for process in ["coordinator", "loader"] {
        assert!(processes.contains(process), "{processes:?}");
    }
    assert!(
        processes
            .iter()
            .any(|process| process.starts_with("worker")),
        "{processes:?}"
    );
    assert!(
        processes.iter().any(|process| process.starts_with("shard")),
        "{processes:?}"
    );
}
