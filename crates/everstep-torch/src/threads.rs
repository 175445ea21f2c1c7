//! Thread counts of libtorch, which are process state.

use std::sync::Once;

use crate::TorchError;

/// Pins the number of threads that one operation may use on this thread and on threads that start to compute later.
///
/// Call it on every thread that computes, before its first operation: the setting of a thread that has already
/// computed does not follow the others. The pool for independent operations, which this product does not use, is
/// pinned to one thread by the first call in the process.
///
/// Some kernels divide their sums by the number, so that bits can depend on it.
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
}
