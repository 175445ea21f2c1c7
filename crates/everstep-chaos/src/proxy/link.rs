//! What a bad link does to datagrams: a pure, seeded function of what goes in and when.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use everstep_protocol::random::{Purpose, Stream};
use serde::{Deserialize, Serialize};

/// How long a datagram that is reordered waits, so that later ones overtake it.
const REORDER: Duration = Duration::from_millis(15);

/// The faults of one direction of a link; the default has none. Shares are 0 to 1, per datagram.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LinkFault {
    /// Share that is lost.
    pub loss: f64,
    /// Time that every datagram takes.
    pub delay_ms: u64,
    /// Up to this much more, at random.
    pub jitter_ms: u64,
    /// Share that is held back, so that later ones overtake it.
    pub reorder: f64,
    /// Share that arrives twice.
    pub duplicate: f64,
    /// Share in which a byte is changed.
    pub corrupt: f64,
    /// Bits per second that get through.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_bits: Option<u64>,
    /// Bytes that wait for the rate; what does not fit is dropped.
    pub queue_bytes: u64,
    /// Nothing gets through.
    pub cut: bool,
    /// Nothing gets through in the second half of each such period.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flap_ms: Option<u64>,
}

impl Default for LinkFault {
    fn default() -> Self {
        Self {
            loss: 0.0,
            delay_ms: 0,
            jitter_ms: 0,
            reorder: 0.0,
            duplicate: 0.0,
            corrupt: 0.0,
            rate_bits: None,
            queue_bytes: 256 << 10,
            cut: false,
            flap_ms: None,
        }
    }
}

impl LinkFault {
    /// Nothing gets through.
    #[must_use]
    pub fn cut() -> Self {
        Self {
            cut: true,
            ..Self::default()
        }
    }

    /// What of the fault cannot be, as one line.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        let shares = [
            ("loss", self.loss),
            ("reorder", self.reorder),
            ("duplicate", self.duplicate),
            ("corrupt", self.corrupt),
        ];
        for (name, share) in shares {
            if !(0.0..=1.0).contains(&share) {
                return Some(format!("{name} = {share} is not allowed; use 0 to 1"));
            }
        }
        if self.rate_bits == Some(0) || self.flap_ms == Some(0) {
            return Some(
                "rate_bits and flap_ms must not be 0; leave them out, or use cut".to_owned(),
            );
        }
        None
    }
}

/// What was done to the datagrams of a direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(
    missing_docs,
    reason = "each counts what happened to that many datagrams"
)]
pub struct LinkCounts {
    pub datagrams: u64,
    pub bytes: u64,
    pub lost: u64,
    pub delayed: u64,
    pub reordered: u64,
    pub duplicated: u64,
    pub corrupted: u64,
    /// Waited for the rate.
    pub queued: u64,
    /// Dropped since the queue before the rate was full.
    pub overflowed: u64,
    /// Dropped since the direction was cut.
    pub cut: u64,
}

impl LinkCounts {
    /// Adds another direction's counts.
    pub fn add(&mut self, other: &Self) {
        self.datagrams += other.datagrams;
        self.bytes += other.bytes;
        self.lost += other.lost;
        self.delayed += other.delayed;
        self.reordered += other.reordered;
        self.duplicated += other.duplicated;
        self.corrupted += other.corrupted;
        self.queued += other.queued;
        self.overflowed += other.overflowed;
        self.cut += other.cut;
    }

    /// What was done since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            datagrams: self.datagrams.saturating_sub(earlier.datagrams),
            bytes: self.bytes.saturating_sub(earlier.bytes),
            lost: self.lost.saturating_sub(earlier.lost),
            delayed: self.delayed.saturating_sub(earlier.delayed),
            reordered: self.reordered.saturating_sub(earlier.reordered),
            duplicated: self.duplicated.saturating_sub(earlier.duplicated),
            corrupted: self.corrupted.saturating_sub(earlier.corrupted),
            queued: self.queued.saturating_sub(earlier.queued),
            overflowed: self.overflowed.saturating_sub(earlier.overflowed),
            cut: self.cut.saturating_sub(earlier.cut),
        }
    }
}

/// When the last byte that was let in has left; directions that share a line share it.
#[derive(Clone, Debug, Default)]
pub struct Line(Arc<Mutex<Duration>>);

impl Line {
    /// When `bytes` that arrive now have left at `rate_bits`, and whether they had to wait; none if the queue before them is full.
    fn pass(
        &self,
        now: Duration,
        bytes: u64,
        rate_bits: u64,
        queue_bytes: u64,
    ) -> Option<(Duration, bool)> {
        let seconds = |bytes: u64| 8.0 * bytes as f64 / rate_bits as f64;
        // A time is whole whatever happened to the thread that held it.
        let mut busy_until = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let start = (*busy_until).max(now);
        if (start - now).as_secs_f64() > seconds(queue_bytes) {
            return None;
        }
        *busy_until = start + Duration::from_secs_f64(seconds(bytes));
        Some((*busy_until, start > now))
    }
}

/// One direction of a link. Times are since an origin that the caller chooses.
#[derive(Debug)]
pub struct Direction {
    fault: LinkFault,
    /// When the fault began, for flapping.
    since: Duration,
    random: Stream,
    line: Line,
    counts: LinkCounts,
}

impl Direction {
    /// A good direction; `seed` and `number` decide what chance does to it.
    #[must_use]
    pub fn new(seed: u64, number: u64) -> Self {
        Self {
            fault: LinkFault::default(),
            since: Duration::ZERO,
            random: Stream::new(seed, Purpose::Fault, &[number]),
            line: Line::default(),
            counts: LinkCounts::default(),
        }
    }

    /// Misbehaves like this from now on, on a line of its own.
    pub fn set(&mut self, now: Duration, fault: LinkFault) {
        self.set_on(now, fault, Line::default());
    }

    /// Misbehaves like this from now on; a rate is shared by all directions on the same line.
    pub fn set_on(&mut self, now: Duration, fault: LinkFault, line: Line) {
        self.fault = fault;
        self.since = now;
        self.line = line;
    }

    /// What was done so far.
    #[must_use]
    pub fn counts(&self) -> LinkCounts {
        self.counts
    }

    /// Takes a datagram, which may be changed, and says when it is to be delivered: never, once or twice.
    pub fn pass(&mut self, now: Duration, datagram: &mut [u8]) -> Vec<Duration> {
        self.counts.datagrams += 1;
        self.counts.bytes += datagram.len() as u64;
        if self.is_cut(now) {
            self.counts.cut += 1;
            return Vec::new();
        }
        if self.chance(self.fault.loss) {
            self.counts.lost += 1;
            return Vec::new();
        }
        let Some(mut due) = self.through_rate(now, datagram.len() as u64) else {
            self.counts.overflowed += 1;
            return Vec::new();
        };
        if self.fault.delay_ms > 0 || self.fault.jitter_ms > 0 {
            self.counts.delayed += 1;
            let jitter_ms = self.random.below(self.fault.jitter_ms + 1);
            due += Duration::from_millis(self.fault.delay_ms + jitter_ms);
        }
        if self.chance(self.fault.reorder) {
            self.counts.reordered += 1;
            due += REORDER;
        }
        if !datagram.is_empty() && self.chance(self.fault.corrupt) {
            self.counts.corrupted += 1;
            let place = self.random.below(datagram.len() as u64) as usize;
            let change = 1 + self.random.below(255) as u8;
            if let Some(byte) = datagram.get_mut(place) {
                *byte ^= change;
            }
        }
        if self.chance(self.fault.duplicate) {
            self.counts.duplicated += 1;
            return vec![due, due + Duration::from_millis(1)];
        }
        vec![due]
    }

    fn is_cut(&self, now: Duration) -> bool {
        let flapped = self.fault.flap_ms.is_some_and(|period_ms| {
            let at_ms = now.saturating_sub(self.since).as_millis() % u128::from(period_ms.max(1));
            2 * at_ms >= u128::from(period_ms)
        });
        self.fault.cut || flapped
    }

    /// When a datagram has left through the rate; none if the queue before it is full.
    fn through_rate(&mut self, now: Duration, bytes: u64) -> Option<Duration> {
        let Some(rate_bits) = self.fault.rate_bits else {
            return Some(now);
        };
        let queue_bytes = self.fault.queue_bytes;
        let (due, waited) = self.line.pass(now, bytes, rate_bits, queue_bytes)?;
        self.counts.queued += u64::from(waited);
        Some(due)
    }

    fn chance(&mut self, share: f64) -> bool {
        // No draw where there is no fault, so that one fault's dice do not depend on another's.
        share > 0.0 && self.random.unit_f64() < share
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn direction(fault: LinkFault) -> Direction {
        let mut direction = Direction::new(7, 0);
        direction.set(Duration::ZERO, fault);
        direction
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_good_link_changes_nothing() {
        let mut direction = direction(LinkFault::default());
        let mut datagram = *b"abc";
        assert_eq!(direction.pass(ms(5), &mut datagram), [ms(5)]);
        assert_eq!(datagram, *b"abc");
    }

    #[test]
    fn shares_are_met_and_counted() {
        let mut direction = direction(LinkFault {
            loss: 0.1,
            reorder: 0.2,
            duplicate: 0.3,
            corrupt: 0.4,
            ..LinkFault::default()
        });
        let (mut delivered, mut changed, mut late) = (0, 0, 0);
        for _ in 0..10_000 {
            let mut datagram = [0; 16];
            let times = direction.pass(ms(0), &mut datagram);
            delivered += times.len();
            late += u64::from(times.first().is_some_and(|due| *due >= REORDER));
            changed += u64::from(datagram != [0; 16]);
        }
        let counts = direction.counts();
        assert_eq!((counts.datagrams, counts.bytes), (10_000, 160_000));
        assert!((900..1100).contains(&counts.lost), "{counts:?}");
        assert_eq!(delivered as u64, 10_000 - counts.lost + counts.duplicated);
        assert_eq!((late, changed), (counts.reordered, counts.corrupted));
        assert!((1700..1900).contains(&counts.reordered), "{counts:?}");
        assert!((3500..3700).contains(&counts.corrupted), "{counts:?}");
        assert!((2600..2800).contains(&counts.duplicated), "{counts:?}");
    }

    #[test]
    fn a_rate_spaces_datagrams_and_its_queue_is_bounded() {
        let mut direction = direction(LinkFault {
            rate_bits: Some(8_000_000),
            queue_bytes: 3000,
            ..LinkFault::default()
        });
        let due: Vec<Vec<Duration>> = (0..6)
            .map(|_| direction.pass(ms(0), &mut [0; 1000]))
            .collect();
        // A byte takes a microsecond.
        assert_eq!(due[..4].concat(), [ms(1), ms(2), ms(3), ms(4)]);
        assert!(due[4..].concat().is_empty());
        let counts = direction.counts();
        assert_eq!((counts.queued, counts.overflowed), (3, 2));
        assert_eq!(direction.pass(ms(100), &mut [0; 1000]), [ms(101)]);
    }

    #[test]
    fn directions_on_one_line_share_its_rate() {
        let fault = LinkFault {
            rate_bits: Some(8_000_000),
            ..LinkFault::default()
        };
        let line = Line::default();
        let mut one = Direction::new(7, 0);
        let mut other = Direction::new(7, 1);
        one.set_on(ms(0), fault.clone(), line.clone());
        other.set_on(ms(0), fault, line);
        assert_eq!(one.pass(ms(0), &mut [0; 1000]), [ms(1)]);
        assert_eq!(other.pass(ms(0), &mut [0; 1000]), [ms(2)]);
        assert_eq!(one.pass(ms(1), &mut [0; 1000]), [ms(3)]);
    }

    #[test]
    fn cuts_and_flaps_let_nothing_through() {
        let mut direction = direction(LinkFault {
            flap_ms: Some(100),
            ..LinkFault::default()
        });
        let mut passes = |at| !direction.pass(ms(at), &mut [0]).is_empty();
        assert!(passes(0) && passes(49) && !passes(50) && !passes(99) && passes(100));
        direction.set(ms(200), LinkFault::cut());
        assert!(direction.pass(ms(200), &mut [0]).is_empty());
        direction.set(ms(300), LinkFault::default());
        assert_eq!(direction.pass(ms(300), &mut [0]).len(), 1);
        assert_eq!(direction.counts().cut, 3);
    }

    #[test]
    fn the_same_seed_does_the_same() {
        let run = |seed| {
            let mut direction = Direction::new(seed, 3);
            let fault = LinkFault {
                loss: 0.5,
                jitter_ms: 9,
                ..LinkFault::default()
            };
            direction.set(ms(0), fault);
            (0..100)
                .map(|_| direction.pass(ms(0), &mut [0; 4]))
                .collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }

    #[test]
    fn impossible_faults_are_named() {
        let fault = LinkFault {
            loss: 1.5,
            ..LinkFault::default()
        };
        assert!(
            fault
                .problem()
                .is_some_and(|line| line.contains("loss = 1.5"))
        );
        assert_eq!(LinkFault::cut().problem(), None);
    }
}
