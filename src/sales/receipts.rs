//! Getting a lost acceptance back with its receipt, and replaying a purchase that only PostgreSQL
//! remembers.

use std::sync::Arc;

use super::{OrderView, SaleError, Shop};
use crate::{
    domain::{
        id::{BuyerId, Fingerprint, JournalId, OrderId},
        order::{Decision, Order, Purchase, Refusal},
        receipt::Receipt,
    },
    engine::Answer,
    faults,
    store::sales::SaleFacts,
};

/// What became of a receipt.
#[derive(Clone, Debug)]
pub enum Redemption {
    /// Its order is there: as it is now, no unit was taken.
    Known(OrderView),
    /// It was lost, and a script has decided on it anew: accepted or refused.
    Decided(Answer, Arc<SaleFacts>),
    /// Nobody has its order, and nobody has reported it lost.
    NotLost,
}

/// What PostgreSQL says to a purchase whose order Redis does not have any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoredReplay {
    /// The order that an earlier attempt with the same key made.
    Replay(Order),
    /// The key made an order from another request.
    Mismatch,
    /// The key has no stored order.
    None,
}

impl StoredReplay {
    /// What it decides; `None` leaves it to Redis.
    pub(super) fn decision(self) -> Option<Decision> {
        match self {
            Self::Replay(order) => Some(Decision::Replayed(order)),
            Self::Mismatch => Some(Decision::Refused(Refusal::Mismatch)),
            Self::None => None,
        }
    }
}

impl Shop {
    /// Gets the order of a receipt back. It must have been verified: everything in it is believed.
    ///
    /// # Errors
    /// [`SaleError`]; [`EngineError::may_have_run`](crate::engine::EngineError::may_have_run) says
    /// whether it may have been redeemed nevertheless. Asking again is safe.
    pub async fn redeem(&self, receipt: &Receipt) -> Result<Redemption, SaleError> {
        let lost = &receipt.order;
        let at = JournalId {
            epoch: lost.epoch,
            pseq: lost.pseq,
        };
        let sale = self.directory.by_number(lost.round.sale).await?;
        let Some(sale) = sale.filter(|sale| sale.id == receipt.sale) else {
            tracing::error!(order = %lost.id, sale = %receipt.sale, "a receipt names an unknown sale");
            return Ok(Redemption::NotLost);
        };
        match self.order(lost.id, Some(lost.buyer)).await {
            Ok(view) => return Ok(Redemption::Known(view)),
            Err(SaleError::NotFound) => {}
            Err(error) => return Err(error),
        }
        let end = self
            .epochs
            .recovered_end(sale.partition, lost.epoch)
            .await?;
        let price = self.rounds.unit_price(lost.round).await?;
        let is_lost = match end {
            Some(end) => lost.pseq > end || faults::bug("redeem_of_what_was_kept"),
            // Of the present epoch, or nobody noted what the next one began with.
            None => faults::bug("redeem_of_present_epoch"),
        };
        if !is_lost || price != Some(lost.unit_price) {
            tracing::error!(
                order = %lost.id,
                round = %lost.round,
                entry = %at,
                recovered_end = end,
                "a receipt proves an acceptance that nobody has, and no recovery has reported lost"
            );
            return Ok(Redemption::NotLost);
        }
        let engine = self.engine(sale.partition)?;
        let purchase = Purchase {
            round: lost.round,
            order: lost.id,
            buyer: lost.buyer,
            quantity: lost.quantity,
            fingerprint: lost.fingerprint,
            durability: engine.gives(sale.durability)?,
            redeem: true,
            archive: engine.archived_rounds(lost.round),
        };
        let answer = self.decide(engine, purchase).await?;
        match answer.decision {
            // Another device was faster.
            Decision::Replayed(_) => {
                let view = self.order(lost.id, Some(lost.buyer)).await?;
                return Ok(Redemption::Known(view));
            }
            Decision::Accepted(order) => {
                tracing::info!(order = %order.id, lost = %at, seq = order.seq, "receipt redeemed");
            }
            Decision::Refused(refusal) => {
                tracing::warn!(order = %lost.id, lost = %at, ?refusal, "receipt not redeemed");
            }
        }
        Ok(Redemption::Decided(answer, sale))
    }

    /// What PostgreSQL says to a purchase: for a round that has left Redis, whose orders are all
    /// stored.
    ///
    /// # Errors
    /// [`SaleError::Store`].
    pub async fn replay_stored(
        &self,
        id: OrderId,
        buyer: BuyerId,
        fingerprint: Fingerprint,
    ) -> Result<StoredReplay, SaleError> {
        Ok(match self.orders.by_id(id).await? {
            Some(order) if (order.buyer, order.fingerprint) == (buyer, fingerprint) => {
                StoredReplay::Replay(order)
            }
            Some(_) => StoredReplay::Mismatch,
            None => StoredReplay::None,
        })
    }
}
