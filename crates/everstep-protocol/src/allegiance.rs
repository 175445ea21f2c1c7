//! A member's side of leadership: which epoch it follows, and whether that leader knows it.

use crate::ids::{Epoch, Member};

/// A member that has not heard from its leader as a member for this many resend times greets it again.
const SILENCE_RESENDS: u64 = 4;

/// Whether a leader's message counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Of an older epoch: refused.
    Fenced,
    /// Of the leader that is followed.
    Followed,
    /// Of a new leader, who is followed from now on and must be greeted.
    New,
}

/// Whom a member follows.
#[derive(Clone, Debug)]
pub(crate) struct Allegiance {
    epoch: Epoch,
    leader: Option<Member>,
    /// Whether the leader of this epoch has answered with a view.
    acknowledged: bool,
    heard_ms: u64,
    greeted_ms: u64,
    resend_ms: u64,
}

impl Allegiance {
    pub(crate) fn new(resend_ms: u64) -> Self {
        Self {
            epoch: Epoch::default(),
            leader: None,
            acknowledged: false,
            heard_ms: 0,
            greeted_ms: 0,
            resend_ms,
        }
    }

    pub(crate) fn epoch(&self) -> Epoch {
        self.epoch
    }

    pub(crate) fn leader(&self) -> Option<Member> {
        self.leader
    }

    /// Judges a leader's message by its epoch, and follows a new leader.
    pub(crate) fn judge(&mut self, from: Member, epoch: Epoch) -> Standing {
        if epoch < self.epoch {
            return Standing::Fenced;
        }
        if epoch > self.epoch || self.leader.is_none() {
            self.epoch = epoch;
            self.leader = Some(from);
            self.acknowledged = false;
            return Standing::New;
        }
        // A coordinator that won the same epoch twice (static election, restarted) is the same leader in a new life.
        self.leader = Some(from);
        Standing::Followed
    }

    /// The leader spoke to this member as one that it knows.
    pub(crate) fn heard(&mut self, now_ms: u64, acknowledged: bool) {
        self.heard_ms = now_ms;
        self.acknowledged |= acknowledged;
    }

    /// The member says hello now.
    pub(crate) fn greets(&mut self, now_ms: u64) {
        self.greeted_ms = now_ms;
    }

    /// Whether a leader's heartbeat is to be answered with a hello: it does not know this member, or seems to have forgotten it.
    pub(crate) fn must_answer_heartbeat(&self, now_ms: u64) -> bool {
        !self.acknowledged || now_ms >= self.heard_ms + SILENCE_RESENDS * self.resend_ms
    }

    /// Whether hello must be said again without being asked.
    pub(crate) fn must_greet(&self, now_ms: u64) -> bool {
        !self.acknowledged && now_ms >= self.greeted_ms + self.resend_ms
    }
}
