use std::collections::BTreeMap;

use everstep_protocol::random::Purpose;
use everstep_store::{BlockState, CheckpointManifest, Digest, RunIdentity};

use super::*;

fn scenario(kind: &str) -> Scenario {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../chaos/fast/spoilt.toml");
    let text = format!(
        r#"
name = "spoilt"
workload = {{ run = "examples/demo.toml", topology = "topology/local-cluster.toml" }}
fault = [
    {{ kind = "damage", after_step = 1 }},
    {{ kind = "{kind}", seconds = 2, after_step = 1 }},
]
check = {{}}
"#
    );
    Scenario::parse(&text, &path).unwrap()
}

fn store(url: &str, variables: &[(&str, &str)]) -> WorkloadStore {
    let variables: BTreeMap<&str, &str> = variables.iter().copied().collect();
    let find = |name: &str| variables.get(name).map(|value| (*value).to_owned());
    WorkloadStore::new(url, "demo", find).unwrap()
}

#[test]
fn what_a_store_cannot_suffer_is_refused_before_anything_starts() {
    let https = ("AWS_ENDPOINT_URL", "https://127.0.0.1:1");
    for (kind, url, variables, part) in [
        ("store_slow", "file:///tmp/x", &[][..], "file:///tmp/x"),
        ("store_errors", "file:///tmp/x", &[], "file:///tmp/x"),
        ("store_slow", "s3://b", &[], "AWS_ENDPOINT_URL is not set"),
        ("store_outage", "s3://b", &[https], "is not plain http"),
    ] {
        let error = store(url, variables).check(&scenario(kind)).unwrap_err();
        let error = error.to_string();
        for part in [
            "spoilt.toml",
            "fault 2: kind",
            kind,
            part,
            "s3://",
            "--simulate",
        ] {
            assert!(error.contains(part), "`{part}` is not in: {error}");
        }
        assert!(!error.contains('\n'), "{error}");
    }
    store("file:///tmp/x", &[])
        .check(&scenario("store_outage"))
        .unwrap();
}

#[test]
fn requests_of_the_run_are_led_through_the_proxy() {
    let variables = [
        ("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9/minio/"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:8"),
    ];
    let mut store = store("s3://b/p", &variables);
    let scenario = scenario("store_slow");
    store.check(&scenario).unwrap();
    assert!(store.environment().is_empty());
    store.start_proxy(&scenario, 1).unwrap();
    let address = store.proxy().unwrap().address();
    let url = format!("http://{address}/minio");
    let expected = variables.map(|(name, _)| (name.to_owned(), url.clone()));
    assert_eq!(store.environment(), expected);
    let endpoint = store.endpoint.as_ref().unwrap();
    assert_eq!(endpoint.server, SocketAddr::from(([127, 0, 0, 1], 9)));
}

/// A store in `folder` with two checkpoints of two objects each.
fn two_checkpoints(folder: &Path) -> WorkloadStore {
    let url = format!("file://{}", folder.display());
    let identity = RunIdentity {
        run: "demo".to_owned(),
        seed: 7,
        configuration: Digest::of(b"configuration"),
        layout: Digest::of(b"layout"),
        dataset: Digest::of(b"dataset"),
        tokenizer: Digest::of(b"tokenizer"),
        determinism: "strict".to_owned(),
        environment: BTreeMap::new(),
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let store = RunStore::open(&url, "demo").unwrap();
        store.put_run("", &identity).await.unwrap();
        for step in [10, 20] {
            let mut objects = Vec::new();
            for block in 0..2 {
                let state = BlockState {
                    block,
                    param: vec![step as f32; 8],
                    m: vec![0.5; 8],
                    v: vec![0.25; 8],
                    ..BlockState::default()
                };
                objects.push(store.put_blocks(step, "w", &[state]).await.unwrap());
            }
            let manifest = CheckpointManifest::new(step, &identity, 2, objects, BTreeMap::new());
            store.commit(&manifest.unwrap()).await.unwrap();
        }
    });
    store(&url, &[])
}

#[test]
fn damage_is_done_to_the_newest_checkpoint_and_found() {
    for how in [Damage::Flip, Damage::Truncate, Damage::Remove] {
        let folder = tempfile::tempdir().unwrap();
        let store = two_checkpoints(folder.path());
        let mut random = Stream::new(7, Purpose::Fault, &[1]);
        let damaged = store.damage_newest(how, &mut random).unwrap();
        assert!(damaged.starts_with("checkpoints/"), "{damaged}");
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let found = runtime.block_on(async {
            let store = RunStore::open(&store.url, "demo").unwrap();
            store.latest_intact(&[]).await.unwrap()
        });
        assert_eq!(found.checkpoint.unwrap().step, 10);
        let objects: Vec<&str> = found
            .damaged
            .iter()
            .map(|one| one.object.as_str())
            .collect();
        assert_eq!(objects, [damaged.as_str()]);
        // The other object is still there to be damaged; then there is nothing left.
        let results: Vec<bool> = (0..32)
            .map(|_| store.damage_newest(how, &mut random).is_ok())
            .collect();
        assert_eq!(results.iter().filter(|done| **done).count(), 1);
    }
}
