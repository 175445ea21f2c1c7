//! When to say something again that was not answered.

/// Longest wait between repeats, in units of the configured resend time.
const BACKOFF_MAX: u64 = 8;

/// A message that waits for its answer: repeated after a time that doubles up to a bound.
#[derive(Clone, Debug)]
pub(crate) struct Retry {
    due_ms: u64,
    wait_ms: u64,
    longest_ms: u64,
    /// How often it was said again.
    pub(crate) repeats: u32,
}

impl Retry {
    /// It was said just now.
    pub(crate) fn new(now_ms: u64, resend_ms: u64) -> Self {
        Self {
            due_ms: now_ms.saturating_add(resend_ms),
            wait_ms: resend_ms,
            longest_ms: resend_ms.saturating_mul(BACKOFF_MAX),
            repeats: 0,
        }
    }

    /// Whether it must be said again; if so the next repeat is scheduled.
    pub(crate) fn fires(&mut self, now_ms: u64) -> bool {
        if now_ms < self.due_ms {
            return false;
        }
        self.wait_ms = self.wait_ms.saturating_mul(2).min(self.longest_ms);
        self.due_ms = now_ms.saturating_add(self.wait_ms);
        self.repeats = self.repeats.saturating_add(1);
        true
    }

    /// Answers are flowing from the same peer: this one is probably queued behind them, and is given its full time again.
    pub(crate) fn postpone(&mut self, now_ms: u64) {
        self.due_ms = self.due_ms.max(now_ms.saturating_add(self.wait_ms));
    }

    /// Whether it must be said again, if it was postponed at `heard_ms` last; for many that are postponed together.
    pub(crate) fn fires_unless_heard(&mut self, now_ms: u64, heard_ms: u64) -> bool {
        self.postpone(heard_ms);
        self.fires(now_ms)
    }
}

/// The regular wake-up of a machine: half a resend time, so that nothing is repeated much later than it is due.
#[derive(Clone, Debug)]
pub(crate) struct Pulse {
    period_ms: u64,
    due_ms: Option<u64>,
}

impl Pulse {
    /// Stopped; `start` it.
    pub(crate) fn new(resend_ms: u64) -> Self {
        Self {
            period_ms: (resend_ms / 2).max(1),
            due_ms: None,
        }
    }

    /// Begins to beat.
    pub(crate) fn start(&mut self, now_ms: u64) {
        self.due_ms = Some(now_ms.saturating_add(self.period_ms));
    }

    /// Ends.
    pub(crate) fn stop(&mut self) {
        self.due_ms = None;
    }

    /// Whether it is time; if so the next beat is scheduled.
    pub(crate) fn beats(&mut self, now_ms: u64) -> bool {
        let beats = self.due_ms.is_some_and(|due_ms| due_ms <= now_ms);
        if beats {
            self.start(now_ms);
        }
        beats
    }

    /// When it beats next.
    pub(crate) fn due_ms(&self) -> Option<u64> {
        self.due_ms
    }
}
