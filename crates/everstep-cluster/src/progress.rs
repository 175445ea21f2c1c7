//! How far the compute threads are: written by them, read beside them, so that a hung thread can be told from a slow one.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Instant;

use crate::control::DevicePulse;
use crate::proc;

/// CPU time is read only of tasks that take longer than this: reading it costs a little.
const LONG_MS: u64 = 1_000;
/// Threads that compute for a device thread: its own children have its name, libtorch's backward threads this one.
const HELPERS: [&str; 2] = ["device", "pt_autograd"];

/// One compute thread.
#[derive(Debug)]
pub(crate) struct DeviceProgress {
    thread: u32,
    accelerated: bool,
    born: Instant,
    /// When the task began, in milliseconds after `born` and counted from 1; 0 between tasks.
    since_ms: AtomicU64,
    finished: AtomicU64,
}

impl DeviceProgress {
    /// A task begins, and ends when the guard is dropped.
    pub(crate) fn task(&self) -> TaskGuard<'_> {
        self.since_ms.store(
            self.born.elapsed().as_millis() as u64 + 1,
            Ordering::Relaxed,
        );
        TaskGuard(self)
    }

    fn busy_ms(&self) -> Option<u64> {
        match self.since_ms.load(Ordering::Relaxed) {
            0 => None,
            since => Some((self.born.elapsed().as_millis() as u64 + 1).saturating_sub(since)),
        }
    }
}

/// A task in work.
#[derive(Debug)]
pub(crate) struct TaskGuard<'a>(&'a DeviceProgress);

impl Drop for TaskGuard<'_> {
    fn drop(&mut self) {
        self.0.since_ms.store(0, Ordering::Relaxed);
        self.0.finished.fetch_add(1, Ordering::Relaxed);
    }
}

/// The compute threads of a process.
#[derive(Debug, Default)]
pub(crate) struct Devices(Mutex<Vec<Weak<DeviceProgress>>>);

impl Devices {
    /// Registers the calling thread; it is forgotten when what is returned is dropped.
    pub(crate) fn register(&self, accelerated: bool) -> Arc<DeviceProgress> {
        let progress = Arc::new(DeviceProgress {
            thread: proc::own_thread(),
            accelerated,
            born: Instant::now(),
            since_ms: AtomicU64::new(0),
            finished: AtomicU64::new(0),
        });
        let mut devices = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        devices.retain(|device| device.strong_count() > 0);
        devices.push(Arc::downgrade(&progress));
        progress
    }

    /// How far they are now.
    pub(crate) fn pulses(&self) -> Vec<DevicePulse> {
        let devices: Vec<Arc<DeviceProgress>> = {
            let devices = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            devices.iter().filter_map(Weak::upgrade).collect()
        };
        let threads: Vec<u32> = devices.iter().map(|device| device.thread).collect();
        let pulse = |device: &Arc<DeviceProgress>| {
            let busy_ms = device.busy_ms();
            let is_long = busy_ms.is_some_and(|ms| ms >= LONG_MS);
            DevicePulse {
                finished: device.finished.load(Ordering::Relaxed),
                busy_ms,
                cpu_ticks: is_long.then(|| {
                    let works = |thread: u32, name: &str| {
                        let is_helper = HELPERS.iter().any(|helper| name.starts_with(helper));
                        thread == device.thread || (is_helper && !threads.contains(&thread))
                    };
                    proc::own_threads_cpu_ticks(works)
                }),
                accelerated: device.accelerated,
            }
        };
        devices.iter().map(pulse).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_busy_within_tasks_only_and_forgotten_when_it_ends() {
        let devices = Devices::default();
        let device = devices.register(false);
        let task = device.task();
        let pulse = devices.pulses()[0];
        assert!(pulse.busy_ms.is_some() && pulse.finished == 0);
        drop(task);
        let pulse = devices.pulses()[0];
        assert!(pulse.busy_ms.is_none() && pulse.finished == 1);
        drop(device);
        assert!(devices.pulses().is_empty());
    }
}
