//! A run whose S3 server has bad days: it answers with errors, late, not at all, with old lists and wrong bytes, and the result is the same.

use std::collections::BTreeMap;

use everstep_chaos::proxy::http::{HttpFault, HttpProxy, HttpRule};

use crate::s3::servers::{Moto, S3rver, environment};
use crate::support::{Workbench, undisturbed};

/// Long enough for an outage that is noticed.
const STEPS: &str = "run.steps=600";

fn rules(faults: &[(HttpFault, f64)]) -> Vec<HttpRule> {
    let rule = |(fault, share): &(HttpFault, f64)| HttpRule {
        fault: *fault,
        share: *share,
    };
    faults.iter().map(rule).collect()
}

#[test]
fn a_store_that_fails_in_every_way_changes_no_bit() {
    let server = Moto::start();
    server.create_bucket("runs");
    fails_in_every_way(server.port, environment, "store");
}

/// Another server, which ignores the conditions of writes and so can elect nobody.
#[test]
fn another_store_that_fails_in_every_way_changes_no_bit() {
    let folder = tempfile::tempdir().unwrap();
    let server = S3rver::start(folder.path(), "runs");
    fails_in_every_way(server.port, S3rver::environment_at, "static");
}

fn fails_in_every_way(
    server: u16,
    environment: fn(u16) -> BTreeMap<String, String>,
    election: &str,
) {
    let bench = Workbench::new();
    let proxy = HttpProxy::start(([127, 0, 0, 1], server).into(), 11).unwrap();
    let topology = bench.cluster(2, 2, 2);
    let mut train = bench.train("run", Some(&topology));
    train
        .args(["--set", STEPS, "--set", "checkpoint.every=20"])
        .args(["--set", "checkpoint.memory_bytes=0"])
        .args(["--set", "run.store=\"s3://runs/team\""])
        .args(["--set", &format!("cluster.election={election:?}")])
        .envs(environment(proxy.address().port()));
    let running = bench.start_command("run", train);
    let mut steps = running.steps();
    let happened = |kind: &str| bench.count("run", kind) > 0;

    // Bursts of errors, slow answers, answers that are lost after the work was done, uploads that are cut.
    assert!(steps.any(|step| step >= 25), "the run ended early");
    proxy.set(&rules(&[
        (HttpFault::Refuse { status: 500 }, 0.15),
        (HttpFault::Refuse { status: 503 }, 0.15),
        (HttpFault::Refuse { status: 429 }, 0.15),
        (HttpFault::LoseAnswer { hold_ms: 50 }, 0.2),
        (HttpFault::CutUpload, 0.3),
        (HttpFault::Slow { delay_ms: 50 }, 0.5),
    ]));
    let bursts = [
        "refuse_500",
        "refuse_503",
        "refuse_429",
        "lose_answer",
        "cut_upload",
        "slow",
    ];
    let has_all = |names: &[&str]| {
        let counts = proxy.counts();
        names.iter().all(|name| counts.contains_key(*name))
    };
    assert!(steps.any(|_| has_all(&bursts)), "{:?}", proxy.counts());

    // Credentials expire: training goes on, and says that the store is away.
    proxy.set(&rules(&[(HttpFault::Refuse { status: 403 }, 1.0)]));
    let away = steps.find(|_| happened("store_unreachable"));
    let away = away.expect("nobody noticed that the store is away");
    assert!(steps.any(|step| step >= away + 20), "training stopped");
    proxy.set(&[]);
    assert!(steps.any(|_| happened("store_back")), "the run ended early");

    // Both replicas of everything are lost while the store lies.
    proxy.set(&rules(&[
        (HttpFault::StaleList, 0.7),
        (HttpFault::WrongBytes, 0.25),
        (HttpFault::Missing, 0.25),
    ]));
    let lost = ["shard-0", "shard-1"].map(|shard| running.kill(shard));
    assert_eq!(
        lost,
        [true, true],
        "the run ended before its shards were killed"
    );
    let lies = ["stale_list", "wrong_bytes", "missing"];
    let restored = steps.any(|_| happened("rollback") && has_all(&lies));
    assert!(restored, "{:?}", proxy.counts());
    proxy.set(&[]);
    drop(steps);
    running.finish(&bench, "run");

    let counts = proxy.counts();
    assert!(has_all(&bursts) && has_all(&lies), "{counts:?}");
    assert!(counts.contains_key("refuse_403"), "{counts:?}");
    let mut digest = crate::support::everstep();
    digest
        .args(["digest", "--json", "--run-dir"])
        .arg(bench.path().join("run"))
        .envs(environment(server));
    let digest = digest.output().unwrap();
    let found: serde_json::Value = serde_json::from_slice(&digest.stdout).unwrap();
    let undisturbed = undisturbed(&[STEPS]);
    assert_eq!(found, undisturbed.digest);
    assert_eq!(bench.numbers("run"), undisturbed.numbers);
}
