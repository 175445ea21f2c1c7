//! The network: delays, order, loss, duplication, damage, thin links, cuts.

use std::collections::BTreeMap;

use everstep_protocol::{Member, Message};

use crate::fault::Fault;
use crate::toy::Toy;
use crate::weather::LinkWeather;
use crate::world::{Happening, World};

/// Which directions are cut, and when the last message of a link arrives.
#[derive(Debug)]
pub(crate) struct Network {
    num_hosts: usize,
    /// Cuts by number: directed pairs of hosts.
    cuts: BTreeMap<u64, Vec<(usize, usize)>>,
    next_cut: u64,
    /// Number of cuts on each directed pair.
    cut: Vec<u32>,
    last_ms: Vec<u64>,
    /// When the last tensor of a thin link is through.
    busy_ms: Vec<u64>,
}

/// Times that a whole block takes longer than a gradient on a thin link.
const SEED_FACTOR: u64 = 4;
/// A thin link that has this much ahead of it takes no more: the sender waits, and says it again.
const BACKLOG_MAX_MS: u64 = 3_000;
/// One in so many damaged messages tears the connection.
const TEAR_ONE_IN: u64 = 6;

impl Network {
    pub(crate) fn new(num_hosts: usize) -> Self {
        Self {
            num_hosts,
            cuts: BTreeMap::new(),
            next_cut: 0,
            cut: vec![0; num_hosts * num_hosts],
            last_ms: vec![0; num_hosts * num_hosts],
            busy_ms: vec![0; num_hosts * num_hosts],
        }
    }

    fn link(&self, from: usize, to: usize) -> usize {
        from * self.num_hosts + to
    }

    pub(crate) fn is_cut(&self, from: usize, to: usize) -> bool {
        self.cut[self.link(from, to)] > 0
    }

    /// Cuts directed pairs; returns the cut's number.
    pub(crate) fn sever(&mut self, pairs: Vec<(usize, usize)>) -> u64 {
        for (from, to) in &pairs {
            let link = self.link(*from, *to);
            self.cut[link] += 1;
        }
        self.next_cut += 1;
        self.cuts.insert(self.next_cut, pairs);
        self.next_cut
    }

    pub(crate) fn mend(&mut self, number: u64) {
        for (from, to) in self.cuts.remove(&number).unwrap_or_default() {
            let link = self.link(from, to);
            self.cut[link] -= 1;
        }
    }

    pub(crate) fn mend_all(&mut self) {
        self.cuts.clear();
        self.cut.fill(0);
    }
}

impl World<'_> {
    /// Sends a message as the network's weather allows.
    pub(crate) fn transmit(&mut self, from: usize, to: Member, message: Message<Toy>) {
        let Some(target) = self.actor_of(to) else {
            return;
        };
        let sender = self.actors[from].member;
        let (source, sink) = (self.actors[from].host, self.actors[target].host);
        self.observe(from, target, &message);
        if source == sink {
            let at_ms = self.now_ms;
            return self.schedule(
                at_ms,
                Happening::Deliver {
                    from: sender,
                    to,
                    message,
                },
            );
        }
        let weather = if self.is_chaos {
            self.weather.of_link(source, sink, self.now_ms)
        } else {
            LinkWeather::default()
        };
        let mut happens = |permille: u64| permille > 0 && self.random.below(1000) < permille;
        let drops = happens(weather.drop_permille);
        let damages = happens(weather.corrupt_permille);
        let doubles = happens(weather.duplicate_permille);
        let delays = happens(weather.delay_permille);
        if self.network.is_cut(source, sink) {
            return;
        }
        if drops {
            self.count_fault(Fault::Drop);
            self.say(|| format!("dropped {sender} > {to} {message:?}"));
            return;
        }
        if damages {
            // The receiver's checksum refuses it.
            self.count_fault(Fault::Corrupt);
            self.say(|| format!("damaged {sender} > {to} {message:?}"));
            if self.random.below(TEAR_ONE_IN) == 0 {
                self.tear(source, sink);
            }
            return;
        }
        let mut at_ms = self.after(1, self.plan.timing.latency_max_ms);
        let is_seed = matches!(message, Message::Seed { .. });
        if is_seed {
            at_ms += self.random.below(self.plan.timing.seed_max_ms + 1);
        }
        let link = self.network.link(source, sink);
        let is_tensor = is_seed
            || matches!(
                message,
                Message::Partial { .. } | Message::Replicate { .. } | Message::Parameters { .. }
            );
        if weather.tensor_ms > 0 && is_tensor {
            let factor = if is_seed { SEED_FACTOR } else { 1 };
            let begin_ms = self.network.busy_ms[link].max(self.now_ms);
            if begin_ms > self.now_ms + BACKLOG_MAX_MS {
                return;
            }
            self.count_fault(Fault::SlowLink);
            let end_ms = begin_ms + weather.tensor_ms * factor;
            self.network.busy_ms[link] = end_ms;
            at_ms += end_ms - self.now_ms;
        }
        if delays {
            self.count_fault(Fault::Delay);
            at_ms = self.after(50, 900);
        }
        // Whole blocks travel beside the other messages, and so do tensors where they take long.
        let is_beside = is_seed || (weather.tensor_ms > 0 && is_tensor);
        // A late message of an ordered link holds back those behind it.
        if !(weather.reorders || is_beside) {
            at_ms = at_ms.max(self.network.last_ms[link]);
            self.network.last_ms[link] = at_ms;
        }
        if doubles {
            self.count_fault(Fault::Duplicate);
            let again_ms = self.after(1, 400);
            self.schedule(
                again_ms,
                Happening::Deliver {
                    from: sender,
                    to,
                    message: message.clone(),
                },
            );
        }
        self.schedule(
            at_ms,
            Happening::Deliver {
                from: sender,
                to,
                message,
            },
        );
    }

    /// A connection breaks: what is on its way, both ways, is lost.
    fn tear(&mut self, one: usize, other: usize) {
        self.count_fault(Fault::Tear);
        self.say(|| format!("the connection of processes {one} and {other} breaks"));
        let host = |member: Member| self.actor_of(member).map(|actor| self.actors[actor].host);
        let lost: Vec<(u64, u64)> = self
            .queue
            .iter()
            .filter(|(_, happening)| match happening {
                Happening::Deliver { from, to, .. } => {
                    let ends = (host(*from), host(*to));
                    ends == (Some(one), Some(other)) || ends == (Some(other), Some(one))
                }
                _ => false,
            })
            .map(|(key, _)| *key)
            .collect();
        for key in lost {
            self.queue.remove(&key);
        }
    }
}
