//! Bad links between processes, and what they did.

use super::Driver;
use super::ongoing::{Ongoing, Todo};
use crate::proxy::link::{LinkCounts, LinkFault};
use crate::proxy::udp::Links;
use crate::record::Victim;
use crate::scenario::{Direction, Fault, Target, Weather};

/// Links that a fault strikes.
#[derive(Debug)]
pub(super) struct BadLinks {
    links: Links,
    fault: LinkFault,
    /// What had been done on them before.
    before: LinkCounts,
}

/// What a partition does to a datagram of a link that it cuts.
pub(super) fn cut(flap_ms: Option<u64>) -> LinkFault {
    match flap_ms {
        None => LinkFault::cut(),
        // The proxy counts cut and pause as one period.
        Some(flap_ms) => LinkFault {
            flap_ms: Some(2 * flap_ms),
            ..LinkFault::default()
        },
    }
}

impl From<Weather> for LinkFault {
    fn from(weather: Weather) -> Self {
        Self {
            loss: weather.loss,
            delay_ms: weather.delay_ms,
            reorder: weather.reorder,
            duplicate: weather.duplicate,
            corrupt: weather.corrupt,
            rate_bits: (weather.bandwidth_mbit > 0.0)
                .then_some((weather.bandwidth_mbit * 1e6) as u64),
            ..Self::default()
        }
    }
}

/// What of a fault no datagram suffered, though it was asked for; none if it all happened.
fn missing(fault: &LinkFault, counts: &LinkCounts) -> Option<&'static str> {
    [
        ("cut", fault.cut || fault.flap_ms.is_some(), counts.cut),
        ("lost", fault.loss > 0.0, counts.lost),
        ("delayed", fault.delay_ms > 0, counts.delayed),
        ("reordered", fault.reorder > 0.0, counts.reordered),
        ("duplicated", fault.duplicate > 0.0, counts.duplicated),
        ("corrupted", fault.corrupt > 0.0, counts.corrupted),
        (
            "kept waiting by the rate",
            fault.rate_bits.is_some(),
            counts.queued + counts.overflowed,
        ),
    ]
    .into_iter()
    .find_map(|(what, is_asked_for, count)| (is_asked_for && count == 0).then_some(what))
}

impl Driver<'_> {
    /// The target's links suffer for so long.
    pub(super) fn spoil_links(
        &mut self,
        fault: &Fault,
        direction: Direction,
        link_fault: LinkFault,
        seconds: f64,
        now: f64,
    ) -> Result<(), String> {
        if self.ongoing.iter().any(Ongoing::holds_links) {
            // Faults of one link do not add up.
            return Err("another network fault is not over".to_owned());
        }
        let victims = match &fault.target {
            Target::All => self.observer.alive(),
            target => self.targets(target)?,
        };
        let inside = match &fault.target {
            // Links between processes of one node stay as they are.
            Target::Node(node) => vec![node.clone()],
            _ => victims.iter().map(|alive| alive.name.clone()).collect(),
        };
        let links = match &fault.target {
            Target::All => Links::All,
            _ => Links::Border {
                inside,
                out: direction != Direction::In,
                into: direction != Direction::Out,
            },
        };
        let proxies = self.proxies.as_ref().ok_or("there are no proxies")?;
        let before = proxies.counts(&links);
        if proxies.set(&links, &link_fault) == 0 {
            return Err(format!("{} has no links", fault.target.label()));
        }
        let victims = victims.into_iter().map(|alive| Victim {
            process: alive.name,
            node: alive.node,
            identity: alive.identity,
            at: now,
            was_alive: true,
            took_effect: false,
            replaced_at: None,
        });
        let todo = Todo::MendLinks {
            at: now + seconds,
            bad: Box::new(BadLinks {
                links,
                fault: link_fault,
                before,
            }),
        };
        self.note(fault, now, victims.collect(), todo);
        Ok(())
    }

    /// Mends all links and notes what happened on those of the fault.
    pub(super) fn mend_links(&mut self, record: usize, bad: &BadLinks, now: f64) {
        let Some(proxies) = &self.proxies else { return };
        let counts = proxies.counts(&bad.links).since(&bad.before);
        proxies.heal();
        let missing = missing(&bad.fault, &counts);
        let record = &mut self.faults[record];
        record.until = Some(now);
        record.network = Some(counts);
        record.happened = missing.is_none();
        record.note = missing.map(|what| format!("no datagram was {what}"));
        for victim in &mut record.victims {
            victim.took_effect = record.happened;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_happened_only_if_all_of_it_did() {
        let weather = Weather {
            loss: 0.1,
            bandwidth_mbit: 10.0,
            ..Weather::default()
        };
        let fault = LinkFault::from(weather);
        assert_eq!(fault.rate_bits, Some(10_000_000));
        let mut counts = LinkCounts {
            datagrams: 9,
            ..LinkCounts::default()
        };
        assert_eq!(missing(&fault, &counts), Some("lost"));
        counts.lost = 1;
        assert!(missing(&fault, &counts).is_some());
        counts.queued = 1;
        assert_eq!(missing(&fault, &counts), None);
        assert_eq!(missing(&cut(Some(300)), &counts), Some("cut"));
    }
}
