//! Everything gets SIGKILL while a checkpoint is on its way to a real S3 server, again and again.

use std::collections::BTreeSet;
use std::fs;

use everstep_chaos::proxy::http::{HttpFault, HttpProxy, HttpRule};
use everstep_protocol::random::{Purpose, Stream};
use everstep_store::{Retention, RunStore};
use futures::TryStreamExt as _;

use crate::s3::servers::{Moto, environment};
use crate::support::{Running, Workbench, wait_for};

/// Kills of everything, each while a checkpoint was due and not committed. Each takes six seconds; `EVERSTEP_POWER_LOSSES=50` has more.
fn num_kills() -> u32 {
    let given = std::env::var("EVERSTEP_POWER_LOSSES");
    given.map_or(8, |given| given.parse().unwrap())
}

/// Steps between checkpoints: enough for one to be uploaded before the next.
const EVERY: u64 = 15;
/// Each answer of the store takes so much longer, so that an upload lasts for some steps.
const DELAY_MS: u64 = 15;
/// More than 50 losses can use.
const STEPS: &str = "run.steps=6000";

/// The run's store, as it is without the proxy.
struct Bucket {
    store: RunStore,
    runtime: tokio::runtime::Runtime,
}

impl Bucket {
    fn new(server: &Moto) -> Self {
        let options = server.environment().into_iter().collect();
        Self {
            store: RunStore::open_with("s3://runs/team", "it", &options).unwrap(),
            runtime: tokio::runtime::Runtime::new().unwrap(),
        }
    }

    fn newest(&self) -> u64 {
        let steps = self.runtime.block_on(self.store.checkpoints());
        steps.unwrap().last().copied().unwrap_or(0)
    }

    /// Whether a checkpoint that is not committed has left something.
    fn has_objects_of(&self, step: u64) -> bool {
        let folder = format!("checkpoints/{step}").into();
        let list = self.store.objects().list(Some(&folder));
        let keys: Vec<String> = self
            .runtime
            .block_on(
                list.map_ok(|object| object.location.to_string())
                    .try_collect(),
            )
            .unwrap();
        !keys.is_empty() && !keys.iter().any(|key| key.ends_with("MANIFEST.json"))
    }

    /// Objects that no manifest names.
    fn orphans(&self) -> BTreeSet<String> {
        let listing = async {
            let list = self.store.objects().list(Some(&"checkpoints".into()));
            let mut keys: BTreeSet<String> = list
                .map_ok(|object| object.location.to_string())
                .try_collect()
                .await
                .unwrap();
            for step in self.store.checkpoints().await.unwrap() {
                let manifest = self.store.load_manifest(step).await.unwrap();
                keys.remove(&format!("checkpoints/{step}/MANIFEST.json"));
                for object in manifest.objects {
                    keys.remove(&object.key);
                }
            }
            keys
        };
        self.runtime.block_on(listing)
    }

    fn collect(&self) {
        let prune = async {
            let plan = self.store.plan_prune(&Retention::last(3)).await.unwrap();
            self.store.carry_out(&plan).await.unwrap()
        };
        self.runtime.block_on(prune);
    }
}

/// Waits until a run has committed a checkpoint and made the version of the next one.
fn wait_for_the_second_checkpoint(running: &Running, newest: u64) -> u64 {
    let first = newest + EVERY;
    running.wait_for_event("checkpoint_committed", |event| {
        event["step"].as_u64().unwrap() >= first
    });
    let text = || fs::read_to_string(running.run_dir().join("metrics.jsonl")).unwrap();
    let made = text().lines().count() as u64;
    let due = made.next_multiple_of(EVERY).max(first + EVERY);
    running.wait_for_step(due);
    due
}

#[test]
fn power_losses_during_uploads_cost_nothing_that_was_committed() {
    let bench = Workbench::new();
    let server = Moto::start();
    server.create_bucket("runs");
    let bucket = Bucket::new(&server);
    let proxy = HttpProxy::start(([127, 0, 0, 1], server.port).into(), 5).unwrap();
    let fault = HttpFault::Slow { delay_ms: DELAY_MS };
    proxy.set(&[HttpRule { fault, share: 1.0 }]);
    let topology = bench.cluster(1, 2, 2);
    let train = |stop_at: Option<u64>| {
        let mut train = bench.train("lost", Some(&topology));
        train
            .args(["--set", STEPS, "--set", "evaluation.every=0"])
            .arg("--set")
            .arg(format!("checkpoint.every={EVERY}"))
            .args(["--set", "run.store=\"s3://runs/team\""])
            .envs(environment(proxy.address().port()));
        if let Some(step) = stop_at {
            train.arg("--set").arg(format!("run.stop_at={step}"));
        }
        bench.start_command("lost", train)
    };

    let kills = num_kills();
    let mut stream = Stream::new(3, Purpose::Fault, &[]);
    let (mut during, mut with_objects, mut newest) = (0, 0, 0);
    let mut upload_requests = 8;
    for round in 0..2 * kills {
        if during == kills {
            break;
        }
        let running = train(None);
        let due = wait_for_the_second_checkpoint(&running, newest);
        if newest > 0 {
            let rollbacks = bench.events("lost", "rollback");
            assert_eq!(rollbacks.len() as u32, round, "{}", bench.logs("lost"));
            assert_eq!(rollbacks.last().unwrap()["to_step"], newest);
        }
        // Half of them strike once something is there, the others at any moment: that of a request, somewhere in the upload.
        if round % 2 == 1 {
            wait_for("an object of the upload", || {
                (bucket.has_objects_of(due) || bucket.newest() >= due).then_some(())
            });
        }
        let begin = proxy.num_requests();
        let moment = begin + stream.below(if round % 2 == 1 { 3 } else { upload_requests });
        wait_for("requests of the upload", || {
            (proxy.num_requests() >= moment).then_some(())
        });
        running.power_loss();
        newest = bucket.newest();
        // The last requests of an upload commit it: such a loss does not count, and the next one comes earlier.
        if newest >= due {
            upload_requests = (upload_requests - 2).max(4);
            continue;
        }
        during += 1;
        if bucket.has_objects_of(due) {
            with_objects += 1;
        } else {
            upload_requests += 1;
        }
    }
    assert_eq!(during, kills, "too many losses hit no upload");
    // Many of them left something behind.
    assert!(with_objects >= kills / 5, "{with_objects}");
    eprintln!("{during} losses during uploads, {with_objects} left objects behind");

    let stop_at = newest + 2 * EVERY;
    train(Some(stop_at)).finish(&bench, "lost");
    bucket.collect();
    assert_eq!(bucket.orphans(), BTreeSet::new());
    let undisturbed = bench
        .train("laptop", None)
        .args(["--set", STEPS, "--set", "evaluation.every=0"])
        .arg("--set")
        .arg(format!("run.stop_at={stop_at}"))
        .output()
        .unwrap();
    assert!(undisturbed.status.success(), "{undisturbed:?}");
    let digest = bucket.runtime.block_on(bucket.store.digest(stop_at));
    let digest = serde_json::to_value(digest.unwrap()).unwrap();
    let expected = bench.digest("laptop", None);
    assert_eq!(expected["step"], stop_at);
    for part in ["parameters", "optimizer"] {
        assert_eq!(digest[part], expected[part], "{part}");
    }
    assert_eq!(bench.numbers("lost"), bench.numbers("laptop"));
}
