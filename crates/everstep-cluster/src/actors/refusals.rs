//! What was refused, told once for each who said it: leaders that are deposed, lives that were declared lost.

use std::collections::BTreeSet;

use everstep_protocol::{Epoch, Member};
use everstep_telemetry::Event;

use crate::process::ProcessContext;
use crate::topology::ActorAddress;

/// Those whose messages one actor has refused.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    told: BTreeSet<(Member, Option<Epoch>)>,
}

impl Refusals {
    /// `from` spoke as the leader of `stale`; this actor knows that `epoch` is led by another one.
    pub(super) fn leader(
        &mut self,
        context: &ProcessContext,
        from: Member,
        stale: Epoch,
        epoch: Epoch,
    ) {
        let reason = format!("{from} leads no more: epoch {} is over", stale.0);
        self.tell(context, (from, Some(stale)), epoch, reason);
    }

    /// `from` was declared lost by the leader of `epoch`, which this actor is.
    pub(super) fn lost(&mut self, context: &ProcessContext, from: Member, epoch: Epoch) {
        let reason = format!("{from} was declared lost and must start anew");
        self.tell(context, (from, None), epoch, reason);
    }

    fn tell(
        &mut self,
        context: &ProcessContext,
        refused: (Member, Option<Epoch>),
        epoch: Epoch,
        reason: String,
    ) {
        if !self.told.insert(refused) {
            return;
        }
        let (member, _) = refused;
        let (from, _) = context.whereabouts(ActorAddress {
            role: member.role.into(),
            index: member.index,
        });
        tracing::warn!(from, reason, "refused");
        context.event(&Event::StaleRefused {
            process: context.name().to_owned(),
            node: context.node().to_owned(),
            from,
            epoch: epoch.0,
            reason,
        });
    }
}
