//! How many workers compute on this machine where no topology says so, and with how many threads each.

use std::fs;

use everstep_train::{Backend, RunConfig};

use super::RunError;

/// Most intra-op threads for which gradients have the bits of one thread.
pub(super) const THREADS_OF_EQUAL_BITS: usize = 2;

/// Bytes that a worker holds for each parameter: its copy, and the gradient of a slot on its way to the shards.
const BYTES_PER_PARAMETER: u64 = 8;

/// Workers of a run without a topology. A GPU has one. Of a CPU each core has one, with one thread: threads of a single worker meet at a barrier
/// after every operation, workers only at the end of a step (README, "Figures"). Fewer, each with more threads, where slots or memory do not go
/// round.
///
/// # Errors
/// The device is not there.
pub(super) fn num_workers(config: &RunConfig, backend: &dyn Backend) -> Result<usize, RunError> {
    let is_accelerated = backend.is_accelerated(config);
    if is_accelerated.map_err(|error| RunError::User(error.to_string()))? {
        return Ok(1);
    }
    let cores = cores() / config.compute.threads.unwrap_or(1).max(1);
    let affordable = available_bytes().map_or(usize::MAX, |bytes| {
        let parameters = everstep_spec::parameters(&config.model);
        let parameters: u64 = parameters
            .iter()
            .map(|spec| spec.num_elements() as u64)
            .sum();
        (bytes / 4 / (BYTES_PER_PARAMETER * parameters).max(1)) as usize
    });
    Ok(busy(config.batch.slots, cores.min(affordable)))
}

/// Threads of each of so many workers.
pub(super) fn threads(num_workers: usize) -> usize {
    (cores() / num_workers.max(1)).clamp(1, THREADS_OF_EQUAL_BITS)
}

/// The fewest workers that are done with the slots of a step as early as `most` are; at least one.
fn busy(slots: usize, most: usize) -> usize {
    let rounds = slots.div_ceil(most.clamp(1, slots.max(1)));
    slots.div_ceil(rounds.max(1)).max(1)
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// What the system can give away; none if it does not say.
fn available_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_worker_waits_for_others_that_have_more_slots() {
        assert_eq!(busy(8, 2), 2);
        assert_eq!(busy(4, 3), 2);
        assert_eq!(busy(3, 2), 2);
        assert_eq!(busy(1, 16), 1);
        assert_eq!(busy(64, 48), 32);
        assert_eq!(busy(8, 0), 1);
    }
}
