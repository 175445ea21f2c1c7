//! The two programs: `everstep`, and `everstep-compute`, which lies beside it and is linked with libtorch.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, io};

use anyhow::Context as _;
use everstep_cluster::{ActorRole, RunDir, Topology};

use crate::args::ProcessArgs;
use crate::user;

/// What libraries read from the environment before `main`, and the values with which they serve training.
///
/// - OpenMP's threads wait for each other by spinning shortly, then sleep. Spinning as long as they do by default, two threads that share
///   their cores with other processes ran ten times slower than one: each spins at every barrier while the other does not get to
///   run. Sleeping at once cost a third of the small example's speed on an idle machine (75 ms a step; 45 ms with this).
/// - MKL adds up a product in the same order whatever the number of threads. By default it divides the inner dimension among them where it is
///   long, on some processors from 1,024 on. It costs nothing that could be measured.
/// - glibc keeps freed memory. By default every buffer of gradients is mapped, zeroed by page faults and unmapped again: a
///   step's overhead outside the model was 9 ms that way on a busy machine, and 2.5 ms with memory that is kept.
const RUNTIME: [(&str, &str); 5] = [
    ("OMP_WAIT_POLICY", "passive"),
    ("GOMP_SPINCOUNT", "10000"),
    ("MKL_CBWR", "AUTO,STRICT"),
    ("MALLOC_MMAP_THRESHOLD_", "4294967296"),
    ("MALLOC_TRIM_THRESHOLD_", "4294967296"),
];

/// Whether this program runs with all of [`RUNTIME`]. What the environment has already may have other values.
fn is_tuned() -> bool {
    RUNTIME.iter().all(|(name, _)| env::var_os(name).is_some())
}

/// Makes this process another program, or the same again, with its arguments, so that it runs with [`RUNTIME`]. What the environment has already
/// stays as it is. Returns only if the program cannot be started.
fn start_tuned(program: &Path) -> io::Error {
    let mut arguments = env::args_os();
    let mut command = Command::new(program);
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    for (name, value) in RUNTIME {
        if env::var_os(name).is_none() {
            command.env(name, value);
        }
    }
    command.args(arguments).exec()
}

/// Whether a worker lives in the process.
pub fn computes(args: &ProcessArgs) -> bool {
    // What cannot be read is reported by whoever goes on.
    let topology = Topology::of_run(&RunDir::new(&args.run_dir));
    topology.is_ok_and(|topology| {
        let roles = |process: u32| &topology.processes[process as usize].roles;
        let process = topology.process_named(&args.name);
        process.is_some_and(|process| roles(process).contains(&ActorRole::Worker))
    })
}

/// Becomes `everstep-compute`, with the same process id and arguments; returns if that is impossible.
pub fn hand_over() -> anyhow::Error {
    match beside("everstep-compute") {
        Ok(program) => {
            let error = start_tuned(&program);
            user(format!(
                "{}: {error}; it belongs to everstep, beside which it must lie",
                program.display()
            ))
        }
        Err(error) => error,
    }
}

/// Starts this program again if it was not [handed over](hand_over) to.
///
/// # Errors
/// It cannot be started.
pub fn tune() -> anyhow::Result<()> {
    if is_tuned() {
        return Ok(());
    }
    Err(start_tuned(&env::current_exe()?).into())
}

/// The program `everstep`, for processes and runs that are started by this one.
///
/// # Errors
/// The system does not tell where this one lies.
pub fn everstep() -> anyhow::Result<PathBuf> {
    beside("everstep")
}

fn beside(name: &str) -> anyhow::Result<PathBuf> {
    let program = env::current_exe().context("the everstep binary cannot be found")?;
    Ok(program.with_file_name(name))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Does nothing in an ordinary run: it is what the next test starts.
    #[test]
    fn restarted_child() {
        if env::var_os("EVERSTEP_TEST_RESTART").is_some() && !is_tuned() {
            panic!("{}", start_tuned(&env::current_exe().unwrap()));
        }
    }

    #[test]
    fn a_program_restarts_in_place_with_its_arguments() {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "programs::tests::restarted_child"])
            .env("EVERSTEP_TEST_RESTART", "1")
            .env_remove(RUNTIME[0].0)
            .env_remove(RUNTIME[1].0)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        assert!(child.wait().unwrap().success());
        let printed = io::read_to_string(child.stdout.unwrap()).unwrap();
        assert!(printed.contains("1 passed"), "{printed}");
    }
}
