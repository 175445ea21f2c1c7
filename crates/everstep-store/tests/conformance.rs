//! One suite for every kind of store: a folder, and a bucket on a real S3 server process.

#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

mod suite;
mod support;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

use everstep_store::{ErrorKind, RunStore, StoreError};
use support::servers::{Azurite, Moto, S3rver, environment};
use support::{Fixture, blocks, checkpoint, identity};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn folder() {
    let dir = tempfile::tempdir().unwrap();
    suite::all(&Fixture::file(dir.path())).await;
    killed_writer(&Fixture::file(dir.path())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bucket() {
    let moto = Moto::start();
    moto.create_bucket("models");
    let fixture = Fixture::s3("models", moto.environment());
    suite::all(&fixture).await;
    killed_writer(&fixture).await;
    a_prefix_is_kept(&moto).await;
    refusals_are_quick(&moto).await;
    let dir = tempfile::tempdir().unwrap();
    let file = Fixture::file(dir.path());
    suite::between(&file, &fixture, "up").await;
    suite::between(&fixture, &file, "down").await;
    suite::copied(&file, &fixture, "up-shared").await;
    suite::copied(&fixture, &file, "down-shared").await;
}

async fn a_prefix_is_kept(moto: &Moto) {
    let below = RunStore::open_with("s3://models/team/a", "r", &moto.environment()).unwrap();
    below.put_run("", &identity("r")).await.unwrap();
    checkpoint(&below, 5).await;
    assert_eq!(below.checkpoints().await.unwrap(), [5]);
    let keys = Fixture::s3("models", moto.environment()).keys("team").await;
    assert_eq!(keys.len(), 5);
    assert!(
        keys.contains(&"team/a/r/checkpoints/5/MANIFEST.json".to_owned()),
        "{keys:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn azure_container() {
    let dir = tempfile::tempdir().unwrap();
    let azurite = Azurite::start(dir.path());
    azurite.create_container("models");
    let fixture = Fixture::azure("models", azurite.environment());
    suite::all(&fixture).await;
    killed_writer(&fixture).await;

    let no_container = Fixture::azure("nobodys", azurite.environment()).open("r");
    let error = no_container.check_writable().await.unwrap_err();
    assert!(
        error.to_string().ends_with(
            "refuses writes: the container does not exist; create it, or correct the name in the URL (the store says ContainerNotFound)"
        ),
        "{error}"
    );
    let mut stranger = azurite.environment();
    stranger.insert(
        "AZURE_STORAGE_ACCOUNT_KEY".to_owned(),
        "b3RoZXI=".to_owned(),
    );
    let stranger = Fixture::azure("models", stranger).open("r");
    let error = stranger.check_writable().await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("or correct AZURE_STORAGE_ACCOUNT_KEY (the store says"),
        "{error}"
    );
}

/// By the other S3 server: what it holds is right, and what it decides is not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bucket_without_create_if_absent() {
    let dir = tempfile::tempdir().unwrap();
    let server = S3rver::start(dir.path(), "models");
    let fixture = Fixture::s3("models", server.environment());
    suite::for_one_writer(&fixture).await;
    let report = fixture
        .open("ignored")
        .probe_create_if_absent()
        .await
        .unwrap();
    assert_eq!(report.winners, [16; 8]);
    let error = report.require().unwrap_err().to_string();
    assert!(
        error.starts_with(
            "election = \"store\" is refused: an existing object was created a second time"
        ),
        "{error}"
    );
}

/// By a server that looks at keys.
#[tokio::test]
async fn strangers_are_told_what_is_wrong() {
    let strict = Moto::start_strict();
    strict.create_bucket("models");
    let stranger = Fixture::s3("models", strict.environment()).open("r");
    let error = stranger.check_writable().await.unwrap_err();
    assert!(
        error.to_string().contains(
            "refuses writes: the store does not know this AWS_ACCESS_KEY_ID (the store says InvalidAccessKeyId)"
        ),
        "{error}"
    );
}

async fn refusals_are_quick(moto: &Moto) {
    let start = Instant::now();
    let no_bucket = Fixture::s3("nobodys", moto.environment()).open("r");
    let error = no_bucket.check_writable().await.unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("refuses writes: the bucket does not exist; create it, or correct the name in the URL (the store says NoSuchBucket)"),
        "{error}"
    );

    // A port that nobody listens on.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let away = Fixture::s3("models", environment(port)).open("r");
    let error = away.check_writable().await.unwrap_err();
    assert!(
        matches!(error, StoreError::NotWritable { .. }) && error.kind() == ErrorKind::Invalid,
        "{error}"
    );
    assert!(!error.to_string().contains('\n'), "{error}");
    // TLS is really spoken: this server answers in plain text.
    let mut tls = moto.environment();
    let endpoint = format!("https://127.0.0.1:{}", moto.port);
    tls.insert("AWS_ENDPOINT_URL".to_owned(), endpoint);
    let error = Fixture::s3("models", tls)
        .open("r")
        .check_writable()
        .await
        .unwrap_err();
    assert!(error.to_string().contains("corrupt message"), "{error}");
    // No keys, and no machine that hands some out.
    // A machine whose own environment has keys cannot show that.
    if std::env::var_os("AWS_ACCESS_KEY_ID").is_none() {
        let mut keyless = environment(port);
        keyless.remove("AWS_ACCESS_KEY_ID");
        keyless.remove("AWS_SECRET_ACCESS_KEY");
        let metadata = format!("http://127.0.0.1:{port}");
        keyless.insert("AWS_METADATA_ENDPOINT".to_owned(), metadata);
        let error = Fixture::s3("models", keyless)
            .open("r")
            .check_writable()
            .await
            .unwrap_err();
        assert!(
            error
                .to_string()
                .contains("refuses writes: neither AWS_ACCESS_KEY_ID"),
            "{error}"
        );
    }

    println!("refusals took {:?}", start.elapsed());
    assert!(start.elapsed().as_secs() < 30, "{:?}", start.elapsed());

    let mut plain = moto.environment();
    plain.remove("AWS_ALLOW_HTTP");
    let error = RunStore::open_with("s3://models", "r", &plain)
        .unwrap_err()
        .to_string();
    assert!(
        error.ends_with("plain http://, which needs AWS_ALLOW_HTTP=true"),
        "{error}"
    );
}

#[test]
fn urls_and_names_are_checked() {
    let error = |url: &str| RunStore::open(url, "r").unwrap_err().to_string();
    assert_eq!(
        error("ftp://x/y"),
        "store url `ftp://x/y`: scheme `ftp` is unknown, allowed are `file:///folder`, `s3://bucket/prefix`, `gs://bucket/prefix` and `az://container/prefix`"
    );
    assert!(error("runs").contains("allowed are `file:///folder`, `s3://bucket/prefix`"));
    assert!(error("az://container").contains("AZURE_STORAGE_ACCOUNT_NAME is not set"));
    assert!(error("file://runs/a").contains("three slashes"));
    assert!(error("s3:///a").contains("bucket is missing"));
    assert!(error("s3://key:secret@bucket").contains("credentials and ports do not belong here"));
    assert!(error("s3://bucket?region=x").contains("not allowed"));
    let unknown = BTreeMap::from([("AWS_NONSENSE".to_owned(), "1".to_owned())]);
    assert!(
        RunStore::open_with("s3://b", "r", &unknown)
            .unwrap_err()
            .to_string()
            .contains("`AWS_NONSENSE` is unknown")
    );
    for run in ["", "..", "a/b", "Run", "a b", "-x", "é", &"x".repeat(65)] {
        let error = RunStore::open("file:///tmp", run).unwrap_err();
        assert!(
            matches!(error, StoreError::BadName { .. }),
            "{run}: {error}"
        );
    }
}

#[tokio::test]
async fn a_folder_that_cannot_be_written_gives_one_clear_error() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    for url in [
        format!("file://{}/under", file.display()),
        "file:///proc/everstep".to_owned(),
    ] {
        let store = RunStore::open(&url, "r").unwrap();
        let error = store.check_writable().await.unwrap_err();
        assert!(matches!(error, StoreError::NotWritable { .. }), "{error}");
        let text = error.to_string();
        assert!(
            text.starts_with(&format!("store `{url}` refuses writes: ")) && !text.contains('\n'),
            "{text}"
        );
    }

    // A folder that goes away after it was opened: the runner is often root, so permissions would stop nothing.
    let store = RunStore::open(&format!("file://{}/store", dir.path().display()), "r").unwrap();
    store.check_writable().await.unwrap();
    std::fs::remove_dir_all(dir.path().join("store")).unwrap();
    std::fs::write(dir.path().join("store"), "x").unwrap();
    let error = store.check_writable().await.unwrap_err();
    assert!(matches!(error, StoreError::NotWritable { .. }), "{error}");
    assert!(!error.to_string().contains('\n'), "{error}");
}

/// A process that is killed while it uploads leaves no checkpoint, and its successor commits the same step.
async fn killed_writer(fixture: &Fixture) {
    let store = fixture.run("killed").await;
    checkpoint(&store, 10).await;
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_writer", "--nocapture"])
        .env("EVERSTEP_TEST_STORE", &fixture.url)
        .envs(&fixture.options)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap())
        .lines()
        .map_while(Result::ok);
    assert!(lines.any(|line| line.contains("wrote the first object")));
    child.kill().unwrap();
    child.wait().unwrap();

    assert_eq!(store.checkpoints().await.unwrap(), [10]);
    assert_eq!(
        store
            .latest_intact(&[])
            .await
            .unwrap()
            .checkpoint
            .unwrap()
            .step,
        10
    );
    checkpoint(&store, 20).await;
    checkpoint(&store, 30).await;
    let report = store.prune(2).await.unwrap();
    assert_eq!((report.removed, report.garbage), (vec![10], vec![20]));
    assert_eq!(
        store
            .latest_intact(&[])
            .await
            .unwrap()
            .checkpoint
            .unwrap()
            .step,
        30
    );
    assert_eq!(store.verify(20).await.unwrap(), []);
}

/// Not a test by itself: what [`killed_writer`] starts and kills. It takes its settings from the environment.
#[tokio::test]
async fn child_writer() {
    let Ok(url) = std::env::var("EVERSTEP_TEST_STORE") else {
        return;
    };
    let store = RunStore::open(&url, "killed").unwrap();
    store
        .put_blocks(20, "old", &blocks(20, 0..1, 100))
        .await
        .unwrap();
    println!("wrote the first object");
    for block in 1.. {
        store
            .put_blocks(20, "old", &blocks(20, block..block + 1, 2 << 20))
            .await
            .unwrap();
    }
}
