//! A user's mistake: one line that names file and field, exit code 2, nothing half-written.

use std::fs;
use std::path::Path;

use crate::support::{Workbench, error_line, everstep};

/// Trains and demands exit 2 with one line that contains all of `parts`; nothing may be left in the run directory's place.
fn refused(bench: &Workbench, arguments: &[&str], parts: &[&str]) {
    let output = bench
        .train("refused", None)
        .args(arguments)
        .output()
        .unwrap();
    let error = error_line(&output);
    for part in parts {
        assert!(error.contains(part), "`{part}` is not in: {error}");
    }
    assert!(!bench.path().join("refused").join("metrics.jsonl").exists());
    assert!(!bench.path().join("refused").join("run.toml").exists());
}

#[test]
fn mistakes_in_the_run_file_are_named() {
    let bench = Workbench::new();
    refused(&bench, &["--set", "model.hight=3"], &["run.toml", "hight"]);
    refused(
        &bench,
        &["--set", "data.train=[\"nothing-here/*.txt\"]"],
        &["run.toml", "nothing-here/*.txt"],
    );
    refused(
        &bench,
        &["--set", "data.context=64"],
        &["run.toml", "data.context", "64", "32"],
    );
    refused(
        &bench,
        &["--set", "batch.rows=20"],
        &["run.toml", "batch.rows", "8"],
    );
    refused(
        &bench,
        &["--set", "optimizer.lr=-1"],
        &["run.toml", "optimizer.lr"],
    );
    fs::write(bench.path().join("empty.txt"), "").unwrap();
    refused(&bench, &["--set", "data.train=[\"empty.txt\"]"], &["empty"]);
}

#[test]
fn a_missing_run_file_and_a_run_file_that_is_none_are_named() {
    let bench = Workbench::new();
    let output = everstep()
        .arg("train")
        .arg(bench.path().join("none.toml"))
        .output()
        .unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("none.toml"), "{error}");
    fs::write(bench.path().join("none.toml"), "[run\n").unwrap();
    let output = everstep()
        .arg("train")
        .arg(bench.path().join("none.toml"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn another_model_in_the_same_run_directory_is_refused() {
    let bench = Workbench::new();
    let short = ["--set", "run.stop_at=3"];
    let output = bench.train("run", None).args(short).output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let before = fs::read(bench.path().join("run/run.toml")).unwrap();
    let output = bench
        .train("run", None)
        .args(short)
        .args(["--set", "model.width=64"])
        .output()
        .unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(
        error.contains("model.width") && error.contains("32") && error.contains("64"),
        "{error}"
    );
    assert_eq!(fs::read(bench.path().join("run/run.toml")).unwrap(), before);
}

#[test]
fn a_store_that_refuses_writes_is_named() {
    let bench = Workbench::new();
    let file = bench.path().join("file");
    fs::write(&file, "").unwrap();
    let url = format!("run.store=\"file://{}/store\"", file.display());
    refused(&bench, &["--set", &url], &["file://"]);
    refused(&bench, &["--set", "run.store=\"ftp://x/y\""], &["ftp"]);
}

#[test]
fn a_port_in_use_is_named() {
    let bench = Workbench::new();
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    let topology = bench.cluster(1, 1, 1);
    let text = fs::read_to_string(&topology).unwrap();
    fs::write(
        &topology,
        text.replacen(
            "roles = [\"coordinator\"]",
            &format!("roles = [\"coordinator\"]\nport = {port}"),
            1,
        ),
    )
    .unwrap();
    let path: &Path = &topology;
    refused(
        &bench,
        &["--topology", path.to_str().unwrap()],
        &["process.port of \"coordinator\"", &port.to_string()],
    );
}

#[test]
fn a_certificate_of_another_authority_is_named() {
    let bench = Workbench::new();
    let topology = bench.cluster(1, 1, 1);
    let output = bench
        .train("run", Some(&topology))
        .args(["--set", "run.stop_at=2"])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let other = bench.path().join("other");
    let made = everstep()
        .arg("certs")
        .arg("--topology")
        .arg(&topology)
        .arg("--out")
        .arg(&other)
        .output()
        .unwrap();
    assert!(
        made.status.success(),
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
    for file in ["worker-0.pem", "worker-0.key"] {
        fs::copy(other.join(file), bench.path().join("run/tls").join(file)).unwrap();
    }
    let output = bench
        .train("run", Some(&topology))
        .args(["--set", "run.stop_at=4"])
        .output()
        .unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(
        error.contains("worker-0.pem") && error.contains("ca.pem"),
        "{error}"
    );
}
