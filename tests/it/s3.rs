//! A whole run with its store on a real S3 server, and with the node's local state lost on the way.

#[path = "../../crates/everstep-store/tests/support/servers.rs"]
pub(crate) mod servers;

use crate::support::{Workbench, everstep, undisturbed};
use servers::Moto;

#[test]
fn a_run_on_s3_has_the_bits_of_one_on_disk() {
    let bench = Workbench::new();
    let server = Moto::start();
    server.create_bucket("runs");
    let topology = bench.cluster(2, 2, 2);
    let set = ["--set", "run.store=\"s3://runs/team\""];
    let train = |stop_at: &str| {
        let mut command = bench.train("s3", Some(&topology));
        command
            .args(set)
            .args(["--set", stop_at])
            .envs(server.environment());
        let output = command.output().unwrap();
        assert!(
            output.status.success(),
            "{}\n{}",
            String::from_utf8_lossy(&output.stderr),
            bench.logs("s3")
        );
    };
    train("run.stop_at=100");
    train("run.stop_at=200");
    let mut digest = everstep();
    digest
        .args(["digest", "--json", "--run-dir"])
        .arg(bench.path().join("s3"))
        .envs(server.environment());
    let output = digest.output().unwrap();
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found, undisturbed(&[]).digest, "{output:?}");
    bench.demand_undisturbed_numbers(&bench.numbers("s3"));
    assert!(bench.count("s3", "checkpoint_committed") >= 4);
}
