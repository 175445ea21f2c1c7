//! The network: delays, order, loss, duplication, cuts.

use std::collections::BTreeMap;

use everstep_protocol::{Member, Message};

use crate::scenario::Fault;
use crate::toy::Toy;
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
}

impl Network {
    pub(crate) fn new(num_hosts: usize) -> Self {
        Self {
            num_hosts,
            cuts: BTreeMap::new(),
            next_cut: 0,
            cut: vec![0; num_hosts * num_hosts],
            last_ms: vec![0; num_hosts * num_hosts],
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
        if source == sink {
            let at_ms = self.now_ms;
            self.schedule(
                at_ms,
                Happening::Deliver {
                    from: sender,
                    to,
                    message,
                },
            );
            return;
        }
        let mut happens =
            |permille: u64| self.is_chaos && permille > 0 && self.random.below(1000) < permille;
        let drops = happens(self.scenario.drop_permille);
        let doubles = happens(self.scenario.duplicate_permille);
        let delays = self.scenario.faults.contains(&Fault::Delay) && happens(15);
        if self.network.is_cut(source, sink) {
            return;
        }
        if drops {
            self.count_fault(Fault::Drop);
            self.say(|| format!("dropped {sender} > {to} {message:?}"));
            return;
        }
        let mut at_ms = self.after(1, self.scenario.latency_max_ms);
        if matches!(message, Message::Seed { .. }) {
            at_ms += self.random.below(self.scenario.seed_max_ms + 1);
        }
        if delays {
            self.count_fault(Fault::Delay);
            at_ms = self.after(50, 900);
        }
        let link = self.network.link(source, sink);
        let reorders = self.is_chaos && self.scenario.faults.contains(&Fault::Reorder);
        // Whole blocks travel beside the other messages.
        let is_seed = matches!(message, Message::Seed { .. });
        // A late message of an ordered link holds back those behind it.
        if !(reorders || is_seed) {
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
}
