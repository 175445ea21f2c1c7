//! Threads for what may take its time: checkpoints are hashed, written and scrubbed here, and training comes first wherever it has a use
//! for the processor.

use std::io;

use rustix::process::setpriority_process;
use tokio::runtime::{Builder, Handle, Runtime};

/// Against a thread that trains, one of these gets a seventieth of a core: nothing waits for it, and in the end it must get done.
const NICE: i32 = 19;
/// Hashing is what keeps a thread busy.
const THREADS: usize = 2;
/// Threads that wait for the disk.
const BLOCKING_THREADS_MAX: usize = 8;

/// A runtime of low priority.
#[derive(Debug)]
pub(crate) struct Background {
    /// There until it is dropped.
    runtime: Option<Runtime>,
    handle: Handle,
}

impl Background {
    /// # Errors
    /// The system starts no more threads.
    pub(crate) fn start() -> io::Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(THREADS)
            .max_blocking_threads(BLOCKING_THREADS_MAX)
            .thread_name("everstep-background")
            .enable_all()
            .on_thread_start(|| {
                // On Linux that is the thread. Without it checkpoints cost a little more.
                if let Err(error) = setpriority_process(None, NICE) {
                    tracing::debug!(%error, "a background thread keeps its priority");
                }
            })
            .build()?;
        let handle = runtime.handle().clone();
        Ok(Self {
            runtime: Some(runtime),
            handle,
        })
    }

    /// Where its tasks go.
    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // The context may go in a task, which must not wait for other threads.
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::process::getpriority_process;

    use super::*;

    #[tokio::test]
    async fn its_threads_stand_back_and_others_do_not() {
        let own = getpriority_process(None).unwrap();
        let background = Background::start().unwrap();
        let task = async { getpriority_process(None).unwrap() };
        assert_eq!(background.handle().spawn(task).await.unwrap(), NICE);
        let blocking = || getpriority_process(None).unwrap();
        let blocking = background.handle().spawn_blocking(blocking);
        assert_eq!(blocking.await.unwrap(), NICE);
        assert_eq!(getpriority_process(None).unwrap(), own);
    }
}
