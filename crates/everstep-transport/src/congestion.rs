//! Congestion control towards this machine: a fixed window, until the path turns out to be a network after all.
//!
//! Plain loopback loses nothing, and a controller that probes it only wastes time. But a loopback address may be the near end of a
//! proxy, a tunnel or a shaped interface. There a fixed window fills every queue, and control messages wait behind it. So losses are
//! watched: after a few in a row Cubic, which has seen the same path all along, sets the window, for as long as losses go on.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory, CubicConfig};
use quinn_proto::RttEstimator;

/// Losses within [`WATCHED`] that one busy moment of this machine does not explain.
const LOSSES: usize = 3;
/// How far back losses count.
const WATCHED: Duration = Duration::from_secs(2);
/// A path that lost nothing for this long is trusted again.
const TRUSTED_AFTER: Duration = Duration::from_secs(20);

/// Makes controllers for paths that look like loopback.
#[derive(Clone, Debug)]
pub(crate) struct LoopbackWindow {
    /// Bytes in flight while nothing is lost.
    pub(crate) window_bytes: u64,
}

impl ControllerFactory for LoopbackWindow {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let cubic = Arc::new(CubicConfig::default()).build(now, current_mtu);
        Box::new(Loopback {
            window_bytes: self.window_bytes,
            cubic,
            losses: Vec::new(),
            lossy_until: None,
        })
    }
}

struct Loopback {
    window_bytes: u64,
    cubic: Box<dyn Controller>,
    /// The last losses.
    losses: Vec<Instant>,
    lossy_until: Option<Instant>,
}

impl Loopback {
    fn lost(&mut self, now: Instant) {
        self.losses
            .retain(|at| now.saturating_duration_since(*at) < WATCHED);
        self.losses.push(now);
        if self.losses.len() >= LOSSES || self.lossy_until.is_some() {
            if self.lossy_until.is_none() {
                tracing::debug!("a loopback path loses packets: congestion control is on");
            }
            self.lossy_until = Some(now + TRUSTED_AFTER);
        }
        // One more says no more than these.
        self.losses.truncate(LOSSES);
    }
}

impl Controller for Loopback {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.cubic.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        rtt: &RttEstimator,
    ) {
        self.cubic.on_ack(now, sent, bytes, app_limited, rtt);
        if self.lossy_until.is_some_and(|until| now >= until) {
            self.lossy_until = None;
            self.losses.clear();
        }
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
        largest_packet_num_acked: Option<u64>,
    ) {
        self.cubic
            .on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.cubic
            .on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
        self.lost(now);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.cubic.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        match self.lossy_until {
            Some(_) => self.cubic.window().min(self.window_bytes),
            None => self.window_bytes,
        }
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self {
            window_bytes: self.window_bytes,
            cubic: self.cubic.clone_box(),
            losses: self.losses.clone(),
            lossy_until: self.lossy_until,
        })
    }

    fn initial_window(&self) -> u64 {
        self.window_bytes
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW_BYTES: u64 = 1 << 20;

    fn controller(now: Instant) -> Box<dyn Controller> {
        let factory = LoopbackWindow {
            window_bytes: WINDOW_BYTES,
        };
        Arc::new(factory).build(now, 1200)
    }

    #[test]
    fn single_losses_change_nothing_and_a_row_of_them_does() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut controller = controller(start);
        for ms in [0, 3000, 6000, 9000] {
            controller.on_congestion_event(at(ms), at(ms), false, 1200);
            assert_eq!(controller.window(), WINDOW_BYTES);
        }
        controller.on_congestion_event(at(9100), at(9100), false, 1200);
        controller.on_congestion_event(at(9200), at(9200), false, 1200);
        assert!(controller.window() < WINDOW_BYTES / 8);
        // A copy has seen the same path.
        assert_eq!(controller.clone_box().window(), controller.window());
    }
}
