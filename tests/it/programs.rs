//! Which program a process runs: only what computes pays for libtorch.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use crate::support::{Workbench, error_line};

#[test]
fn only_workers_load_libtorch() {
    let bench = Workbench::new();
    let running = bench.start("run", Some(&bench.cluster(1, 1, 1)));
    running.wait_for_step(1);
    let processes = running.processes();
    assert_eq!(processes.len(), 4, "{processes:?}");
    for (name, pid) in processes {
        let pid = pid.unwrap();
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let computes = name.starts_with("worker");
        assert_eq!(maps.contains("libtorch"), computes, "{name}");
        let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
        let expected = if computes {
            "everstep-compute"
        } else {
            "everstep"
        };
        assert_eq!(program.file_name().unwrap(), expected, "{name}");
    }
    running.power_loss();
}

#[test]
fn a_program_that_was_installed_alone_says_what_is_missing() {
    let bench = Workbench::new();
    // A link would be followed to the folder where both lie.
    let alone = bench.path().join("everstep");
    fs::copy(env!("CARGO_BIN_EXE_everstep"), &alone).unwrap();
    let train = || {
        let mut command = Command::new(&alone);
        command.arg("train").arg(bench.run_file());
        command.arg("--run-dir").arg(bench.path().join("run"));
        command.output().unwrap()
    };
    let line = error_line(&train());
    assert!(
        line.contains("everstep-compute: No such file") && line.contains("beside"),
        "{line}"
    );
    let compute = Path::new(env!("CARGO_BIN_EXE_everstep-compute"));
    symlink(compute, bench.path().join("everstep-compute")).unwrap();
    assert!(train().status.success());
}
