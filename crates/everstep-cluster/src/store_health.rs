//! What this process knows of the object store: whether it answers, since when not, and how far the checkpoints are behind.
//!
//! Training never waits for the store; this is where one can see that it is away. A process that leads, or wants to, logs each outage
//! once and keeps `DIR/status/store.json`.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use everstep_store::StoreError;
use everstep_telemetry::Event;

use crate::process::ProcessContext;
use crate::status::{CadenceStatus, StoreState, StoreStatus};

/// A store that has failed us for this long is away. Single requests fail every day, and were repeated before they come here.
const OUTAGE_AFTER: Duration = Duration::from_millis(1_500);
/// A single request that took so long to fail is enough.
const HANG: Duration = Duration::from_secs(4);
const BACKOFF_FIRST: Duration = Duration::from_millis(300);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
const WATCH: Duration = Duration::from_millis(500);
/// Who leads looks for the store this often when nothing else is asked of it.
const PING: Duration = Duration::from_secs(2);
/// A checkpoint that is not committed after so long is reason to see whether the store takes writes.
const OVERDUE: Duration = Duration::from_secs(5);

/// What is asked of a store; one that is full or read-only still answers reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
}

#[derive(Debug, Default)]
struct Track {
    failing: Option<Failing>,
}

#[derive(Debug, Clone)]
struct Failing {
    first: Instant,
    since: SystemTime,
    failures: u32,
    reason: String,
}

#[derive(Debug)]
struct State {
    read: Track,
    write: Track,
    /// When the outage that is going on began.
    outage: Option<Failing>,
    heard: Instant,
    /// What cannot go on without the store.
    waiting: Option<String>,
    cadence: CadenceStatus,
    written: Option<StoreStatus>,
}

/// What this process knows of the store.
#[derive(Debug)]
pub(crate) struct StoreHealth {
    /// Whether this process leads or wants to, and so tells of outages.
    speaks: AtomicBool,
    step: AtomicU64,
    committed: AtomicU64,
    /// Step of the newest checkpoint that is due.
    due: AtomicU64,
    due_at: Mutex<Instant>,
    newest_damaged: AtomicBool,
    state: Mutex<State>,
}

impl StoreHealth {
    pub(crate) fn new() -> Self {
        Self {
            speaks: AtomicBool::new(false),
            step: AtomicU64::new(0),
            committed: AtomicU64::new(0),
            due: AtomicU64::new(0),
            due_at: Mutex::new(Instant::now()),
            newest_damaged: AtomicBool::new(false),
            state: Mutex::new(State {
                read: Track::default(),
                write: Track::default(),
                outage: None,
                heard: Instant::now(),
                waiting: None,
                cadence: CadenceStatus::default(),
                written: None,
            }),
        }
    }

    /// This process leads now, or wants to.
    pub(crate) fn speak(&self, speaks: bool) {
        self.speaks.store(speaks, Ordering::Relaxed);
    }

    /// Whether this process leads, or wants to.
    pub(crate) fn speaks(&self) -> bool {
        self.speaks.load(Ordering::Relaxed)
    }

    /// The newest committed checkpoint, as far as this process knows.
    pub(crate) fn committed(&self) -> u64 {
        self.committed.load(Ordering::Relaxed)
    }

    /// The newest checkpoint turned out damaged.
    pub(crate) fn newest_is_damaged(&self) {
        self.newest_damaged.store(true, Ordering::Relaxed);
    }

    /// Whether the newest checkpoint turned out damaged since this was last asked.
    pub(crate) fn take_newest_damaged(&self) -> bool {
        self.newest_damaged.swap(false, Ordering::Relaxed)
    }

    /// Where training and checkpoints are; `due` is the newest step that should have a checkpoint.
    pub(crate) fn progress(&self, step: u64, committed: u64, due: u64, cadence: CadenceStatus) {
        self.step.store(step, Ordering::Relaxed);
        self.committed.store(committed, Ordering::Relaxed);
        self.state().cadence = cadence;
        if self.due.swap(due, Ordering::Relaxed) != due {
            *self.due_at.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        }
    }

    fn is_overdue(&self) -> bool {
        let due_at = *self.due_at.lock().unwrap_or_else(PoisonError::into_inner);
        self.due.load(Ordering::Relaxed) > self.committed.load(Ordering::Relaxed)
            && due_at.elapsed() > OVERDUE
    }

    /// What waits for the store, for the status; none when nothing does.
    pub(crate) fn waiting(&self, what: Option<String>) {
        self.state().waiting = what;
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lag_steps(&self) -> u64 {
        let step = self.step.load(Ordering::Relaxed);
        step.saturating_sub(self.committed.load(Ordering::Relaxed))
    }

    /// Notes how a request ended, and logs when an outage begins or is over.
    pub(crate) fn note<T>(
        &self,
        context: &ProcessContext,
        access: Access,
        started: Instant,
        result: &Result<T, StoreError>,
    ) {
        let mut state = self.state();
        let track = match access {
            Access::Read => &mut state.read,
            Access::Write => &mut state.write,
        };
        let event = match result {
            Err(error) if error.is_outage() => {
                let failing = track.failing.get_or_insert_with(|| Failing {
                    first: started,
                    since: SystemTime::now() - started.elapsed(),
                    failures: 0,
                    reason: String::new(),
                });
                failing.failures += 1;
                failing.reason = error.to_string();
                let failing = failing.clone();
                let lasted = failing.first.elapsed();
                let is_new = state.outage.is_none()
                    && (lasted >= HANG || (failing.failures > 1 && lasted >= OUTAGE_AFTER));
                is_new.then(|| {
                    tracing::warn!(
                        reason = failing.reason,
                        "the store does not answer; training goes on without it"
                    );
                    let event = Event::StoreUnreachable {
                        process: context.name().to_owned(),
                        since: everstep_telemetry::timestamp(failing.since),
                        reason: failing.reason.clone(),
                    };
                    state.outage = Some(failing);
                    event
                })
            }
            // A damaged object is an answer too.
            _ => {
                track.failing = None;
                state.heard = Instant::now();
                let whole = state.read.failing.is_none() && state.write.failing.is_none();
                let over = if whole { state.outage.take() } else { None };
                over.map(|outage| {
                    let seconds = outage.first.elapsed().as_secs_f64();
                    tracing::info!(seconds, "the store is back");
                    Event::StoreBack {
                        process: context.name().to_owned(),
                        seconds,
                        lag_steps: self.lag_steps(),
                    }
                })
            }
        };
        drop(state);
        if let (Some(event), true) = (event, self.speaks()) {
            context.event(&event);
        }
    }

    fn status(&self, context: &ProcessContext) -> StoreStatus {
        let (step, committed) = (
            self.step.load(Ordering::Relaxed),
            self.committed.load(Ordering::Relaxed),
        );
        let state = self.state();
        StoreStatus {
            process: context.name().to_owned(),
            state: match state.outage {
                None => StoreState::Reachable,
                Some(_) => StoreState::Unreachable,
            },
            since: state
                .outage
                .as_ref()
                .map(|outage| everstep_telemetry::timestamp(outage.since)),
            reason: state.outage.as_ref().map(|outage| outage.reason.clone()),
            checkpoint: committed,
            lag_steps: step.saturating_sub(committed),
            waiting: state.waiting.clone(),
            cadence: state.cadence.clone(),
        }
    }

    fn write_status(&self, context: &ProcessContext) {
        let status = self.status(context);
        if self.state().written.as_ref() == Some(&status) {
            return;
        }
        match status.write(&context.run_dir) {
            Ok(()) => self.state().written = Some(status),
            Err(error) => tracing::debug!(%error, "the store's status cannot be written"),
        }
    }
}

/// Looks after the store for as long as the process lives, while this process leads or wants to.
pub(crate) async fn watch(context: std::sync::Arc<ProcessContext>) {
    let health = &context.store_health;
    loop {
        tokio::time::sleep(WATCH).await;
        if !health.speaks() {
            continue;
        }
        let (silent, failing, write_failing) = {
            let state = health.state();
            (
                state.heard.elapsed() > PING,
                state.read.failing.is_some(),
                state.write.failing.is_some(),
            )
        };
        if silent || failing {
            let started = Instant::now();
            let result = context.store.ping().await;
            health.note(&context, Access::Read, started, &result);
        }
        if write_failing || (silent && health.is_overdue()) {
            let started = Instant::now();
            let result = context.store.check_writable().await;
            health.note(&context, Access::Write, started, &result);
        }
        health.write_status(&context);
    }
}

/// Repeats a request until the store answers: its result, or an error that is not the store's absence.
pub(crate) async fn patiently<T, F>(
    context: &ProcessContext,
    access: Access,
    mut request: impl FnMut() -> F,
) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, StoreError>>,
{
    let mut backoff = Backoff::default();
    loop {
        let started = Instant::now();
        let result = request().await;
        context.store_health.note(context, access, started, &result);
        match result {
            Err(error) if error.is_outage() => {
                tracing::debug!(%error, "the store does not answer now; trying again");
                backoff.wait().await;
            }
            other => return other,
        }
    }
}

/// Waits that double up to a bound, with jitter: many processes must not come back to a sick store at once.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    attempts: u32,
}

impl Backoff {
    /// Waits before the next attempt.
    pub(crate) async fn wait(&mut self) {
        let longest = BACKOFF_FIRST
            .saturating_mul(1 << self.attempts.min(10))
            .min(BACKOFF_MAX);
        self.attempts += 1;
        // The standard library seeds its hash maps with the system's randomness.
        let share = RandomState::new().hash_one(self.attempts) as f64 / u64::MAX as f64;
        tokio::time::sleep(longest.mul_f64(0.5 + share / 2.0)).await;
    }
}
