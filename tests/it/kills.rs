//! SIGKILL changes nothing: same digest, same numbers, as the undisturbed run and as runs with other numbers of workers and shards.

use std::collections::BTreeSet;
use std::path::Path;

use everstep_protocol::random::{Purpose, Stream};
use serde_json::Value;

use crate::support::{STEPS, Workbench};

const KILLS: u64 = 20;

#[test]
fn twenty_random_kills_change_no_bit() {
    let bench = Workbench::new();
    let topology = bench.cluster(3, 2, 2);
    random_kills_change_no_bit(&bench, &topology);
}

/// Routing decides by bits of float32, and its biases are state that only the shards have.
#[test]
fn twenty_random_kills_of_a_run_with_experts_change_no_bit() {
    let bench = Workbench::of_experts();
    let topology = bench.cluster(4, 3, 2);
    random_kills_change_no_bit(&bench, &topology);
}

fn random_kills_change_no_bit(bench: &Workbench, topology: &Path) {
    bench.train_to_the_end("laptop", None);
    let undisturbed = bench.digest("laptop", None);
    assert_eq!(undisturbed["step"], STEPS);

    let running = bench.start("killed", Some(topology));
    let victims = ["worker-0", "worker-1", "worker-2", "shard-0", "shard-1"];
    let mut stream = Stream::new(1, Purpose::Fault, &[]);
    let (mut killed, mut killed_shards) = (0, 0);
    // One kill is due after every seventh step, of a random process or, if it is not alive right then, of the next one that is.
    for step in running.steps() {
        if killed < KILLS && step >= (killed + 1) * 7 {
            let first = stream.below(victims.len() as u64) as usize;
            let order: Vec<&str> = victims
                .iter()
                .cycle()
                .skip(first)
                .take(victims.len())
                .copied()
                .collect();
            if let Some(victim) = running.kill_first_alive(&order) {
                killed += 1;
                killed_shards += u64::from(victim.starts_with("shard"));
            }
        }
    }
    running.finish(bench, "killed");
    assert_eq!(killed, KILLS, "the run ended before all kills had happened");
    assert!(killed_shards > 0);
    // The agent saw each of them, and each came back or the run was over first.
    assert!(
        bench.count("killed", "process_lost") as u64 >= KILLS,
        "{}",
        bench.logs("killed")
    );
    let restarted = bench.count("killed", "process_restarted") as u64;
    assert!(
        restarted + 3 >= KILLS,
        "{restarted} restarts after {KILLS} kills"
    );
    assert!(bench.count("killed", "slot_reassigned") > 0);
    assert!(bench.count("killed", "shard_promoted") + bench.count("killed", "rollback") > 0);

    assert_eq!(bench.digest("killed", None), undisturbed);
    assert_eq!(bench.numbers("killed"), bench.numbers("laptop"));
    // A version may be evaluated again after a rollback: to the same numbers, the loads of experts among them.
    let evaluations = |run_dir| -> BTreeSet<String> {
        let fields = |event: &Value| {
            let [step, loss, loads] = ["step", "loss", "expert_loads"].map(|field| &event[field]);
            format!("{step}: {loss} {loads}")
        };
        bench
            .events(run_dir, "evaluation")
            .iter()
            .map(fields)
            .collect()
    };
    assert_eq!(evaluations("killed"), evaluations("laptop"));
    assert_eq!(evaluations("killed").len() as u64, STEPS / 50 + 1);
}

#[test]
fn numbers_of_workers_and_shards_change_no_bit() {
    let bench = Workbench::new();
    for (workers, shards, replication) in [(1, 1, 1), (2, 2, 1), (4, 3, 2)] {
        let run_dir = format!("cluster-{workers}-{shards}-{replication}");
        let topology = bench.cluster(workers, shards, replication);
        bench.train_to_the_end(&run_dir, Some(&topology));
        bench.demand_undisturbed(&run_dir);
    }
}

/// Those pairs that neither the standard run nor that of experts is. In one process a worker computes on each core.
#[test]
fn every_architecture_and_optimizer_gives_the_same_bits_on_any_cluster_and_after_kills() {
    const MUON: &str = "[optimizer.muon]";
    let gpt2 = "architecture = \"gpt2\"\nlayers = 1\nheads = 4\nwidth = 32\ncontext = 32\n";
    let llama = Workbench::LLAMA.to_owned() + MUON;
    let gpt2_muon = gpt2.to_owned() + MUON;
    for model in [gpt2, &gpt2_muon, &llama, Workbench::DEEPSEEK_V3] {
        let bench = Workbench::with_model(model, 1, "");
        let train = |run_dir: &str, topology: Option<&Path>| {
            let mut train = bench.train(run_dir, topology);
            train.args(["--set", "run.steps=20"]);
            bench.start_command(run_dir, train)
        };
        train("laptop", None).finish(&bench, "laptop");
        for workers in [1, 4] {
            let run_dir = format!("cluster-{workers}");
            let running = train(&run_dir, Some(&bench.cluster(workers, 2, 2)));
            let planned: &[&str] = if workers == 4 {
                &["shard-0", "worker-1"]
            } else {
                &[]
            };
            let mut victims = planned.to_vec();
            for step in running.steps() {
                if step >= 5 && victims.last().is_some_and(|victim| running.kill(victim)) {
                    victims.pop();
                }
            }
            running.finish(&bench, &run_dir);
            let lost = bench.events(&run_dir, "process_lost");
            let lost = lost.iter().map(|event| event["process"].as_str().unwrap());
            assert_eq!(
                lost.collect::<BTreeSet<_>>(),
                planned.iter().copied().collect()
            );
            let equal =
                [&run_dir, "laptop"].map(|run| (bench.digest(run, None), bench.numbers(run)));
            assert_eq!(equal[0], equal[1], "{model} on {workers} workers");
        }
    }
}

#[test]
fn a_killed_coordinator_comes_back_in_a_new_epoch() {
    let bench = Workbench::new();
    let topology = bench.cluster(2, 2, 2);
    let running = bench.start("killed", Some(&topology));
    let mut killed = 0;
    for step in running.steps() {
        if killed < 3 && step >= (killed + 1) * 40 && running.kill("coordinator") {
            killed += 1;
        }
    }
    running.finish(&bench, "killed");
    assert_eq!(killed, 3);
    assert_eq!(bench.count("killed", "leader_elected"), 4);
    bench.demand_undisturbed("killed");
}
