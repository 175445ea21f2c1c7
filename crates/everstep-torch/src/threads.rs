//! Thread counts of libtorch, which are process state.

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Once;
use std::{env, io};

use crate::TorchError;

/// What libraries read from the environment before `main`, and the values with which they serve training.
///
/// - OpenMP's threads wait for each other by spinning shortly, then sleep. Spinning as long as they do by default, two threads that share
///   their cores with other processes ran ten times slower than one: each spins at every barrier while the other does not get to
///   run. Sleeping at once cost a third of the small example's speed on an idle machine (75 ms a step; 45 ms with this).
/// - MKL adds up a product in the same order whatever the number of threads. By default it divides the inner dimension among them where it is
///   long, on some processors from 1,024 on. It costs nothing that could be measured.
/// - glibc keeps freed memory. By default every buffer of gradients is mapped, zeroed by page faults and unmapped again: a
///   step's overhead outside the model was 9 ms that way on a busy machine, and 2.5 ms with memory that is kept.
pub const RUNTIME: [(&str, &str); 5] = [
    ("OMP_WAIT_POLICY", "passive"),
    ("GOMP_SPINCOUNT", "10000"),
    ("MKL_CBWR", "AUTO,STRICT"),
    ("MALLOC_MMAP_THRESHOLD_", "4294967296"),
    ("MALLOC_TRIM_THRESHOLD_", "4294967296"),
];

/// Starts this program again in its place, with the same process id and arguments, so that it runs with [`RUNTIME`]; returns
/// at once if the environment has them all. What it has already stays as it is. Call it first in `main`.
///
/// # Errors
/// If the program cannot be started again; the caller can go on without.
pub fn restart_with_tuned_runtime() -> io::Result<()> {
    let missing = RUNTIME
        .iter()
        .filter(|(name, _)| env::var_os(name).is_none());
    let missing: Vec<&(&str, &str)> = missing.collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut arguments = env::args_os();
    let mut command = Command::new(env::current_exe()?);
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    for (name, value) in missing {
        command.env(name, value);
    }
    Err(command.args(arguments).exec())
}

/// Pins the number of threads that one operation may use on this thread and on threads that start to compute later.
///
/// Call it on every thread that computes, before its first operation: the setting of a thread that has already
/// computed does not follow the others. The pool for independent operations, which this product does not use, is
/// pinned to one thread by the first call in the process.
///
/// The number belongs to the [`crate::Platform`]: some kernels divide their sums by it, so that bits can depend on it.
///
/// # Errors
/// [`TorchError::NoThreads`] for 0.
pub fn pin_threads(intra_op: usize) -> Result<(), TorchError> {
    static INTER_OP: Once = Once::new();
    if intra_op == 0 {
        return Err(TorchError::NoThreads);
    }
    // libtorch throws if the second pool is set twice or after it has run, hence once and only if needed.
    INTER_OP.call_once(|| {
        if tch::get_num_interop_threads() != 1 {
            tch::set_num_interop_threads(1);
        }
    });
    tch::set_num_threads(i32::try_from(intra_op).unwrap_or(i32::MAX));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    // One test, for the setting belongs to the whole process.
    #[test]
    fn threads_are_pinned_again_and_again_and_later_threads_follow() {
        for threads in [2, 1, 3] {
            pin_threads(threads).unwrap();
            assert_eq!(tch::get_num_threads(), threads as i32);
            assert_eq!(tch::get_num_interop_threads(), 1);
            let later = std::thread::spawn(tch::get_num_threads);
            assert_eq!(later.join().unwrap(), threads as i32);
        }
        assert!(pin_threads(0).is_err());
    }

    /// Does nothing in an ordinary run: it is what the next test starts.
    #[test]
    fn restarted_child() {
        if env::var_os("EVERSTEP_TEST_RESTART").is_some() {
            restart_with_tuned_runtime().unwrap();
            for (name, value) in RUNTIME {
                assert_eq!(env::var(name).unwrap(), value);
            }
        }
    }

    #[test]
    fn a_program_restarts_in_place_with_its_arguments() {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "threads::tests::restarted_child"])
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
