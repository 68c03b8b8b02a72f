//! The line of those who wait for units of a sale to come back.

use std::sync::Arc;

use super::{ARCHIVED_MEANWHILE_MAX, SaleError, Shop, leaving, receipts::StoredReplay};
use crate::{
    clock,
    domain::{
        hurdles::Candidate,
        id::{BuyerId, Fingerprint, OrderId, RoundId, SaleId},
        model::{Joined, Wish},
        order::{Order, Refusal},
        proof::Purpose,
    },
    engine::{Engine, Standing},
    store::sales::SaleFacts,
};

/// Holds that must have ended before anything is said of how they end.
const ENDED_MIN: u64 = 10;

/// A buyer's place in line, and what it is worth.
#[derive(Clone, Debug)]
pub struct LineView {
    /// The sale in the round that the line is of.
    pub facts: Arc<SaleFacts>,
    /// Where its units are.
    pub standing: Standing,
    /// The place, from 1 on, and the units waited for at most.
    pub place: Option<(u64, u64)>,
    /// Whether units may come back for this place.
    pub odds: Odds,
}

/// What a place in line is worth, from numbers alone.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Odds {
    /// More than twice as many units are expected back as buyers wait up to this place.
    Good,
    /// About as many.
    Fair,
    /// Fewer than half as many.
    Poor,
    /// Nothing is held: units come back only when somebody cancels, or an operator adds some.
    None,
    /// Too few holds have ended to say.
    Unknown,
}

/// What a place is worth while `held` units are held, when of `ended` holds `returned` gave their
/// units back.
fn odds(place: u64, held: u64, (ended, returned): (u64, u64)) -> Odds {
    if held == 0 {
        Odds::None
    } else if ended < ENDED_MIN {
        Odds::Unknown
    } else {
        // Units expected back, times `ended`.
        let expected = held * returned;
        match expected {
            some if some > 2 * place * ended => Odds::Good,
            some if 2 * some >= place * ended => Odds::Fair,
            _ => Odds::Poor,
        }
    }
}

impl Shop {
    /// Joins the line of the current round for at most `quantity` units. Joining twice is joining
    /// once: the first wish stays. Gives the order instead, if this key's wish has become one.
    ///
    /// # Errors
    /// [`SaleError`].
    pub async fn join_line(
        &self,
        id: SaleId,
        candidate: Candidate<'_>,
        key: Option<&str>,
        quantity: u64,
    ) -> Result<Result<LineView, (Order, Arc<SaleFacts>)>, SaleError> {
        let facts = self.facts(id).await?;
        let engine = self.engine(facts.partition)?;
        engine.gives(facts.durability)?;
        let buyer = candidate.buyer;
        // No key of a purchase has such a beginning.
        let wished = match key {
            Some(key) => format!("\u{1}waitlist {key}"),
            None => format!("\u{1}waitlist {}", clock::new_id()),
        };
        let wish = Wish {
            buyer,
            order: OrderId::derive(facts.number, buyer, &wished),
            fingerprint: Fingerprint::units("waitlist", quantity),
            units: quantity,
        };
        if facts.hurdles.any()
            && let Some(hurdle) = self.stops(
                &facts,
                &candidate,
                Purpose::Waitlist,
                key.unwrap_or_default(),
            )
        {
            self.admit_known(&facts, wish.order, hurdle).await?;
        }
        let (joined, standing) = match self.join(engine, facts.round_id(), &wish).await? {
            Ok(joined) => joined,
            Err(order) => return Ok(Err((order, facts))),
        };
        let place = match joined {
            Joined::Done(place) => Some((place, quantity)),
            Joined::Already(_) => engine.place(facts.round_id(), buyer).await?.0,
            Joined::Replayed(order) if order.fingerprint != wish.fingerprint => {
                return Err(SaleError::Mismatch);
            }
            Joined::Replayed(order) => return Ok(Err((order, facts))),
            Joined::NoLine => {
                return Err(SaleError::Conflict("This sale has no waitlist."));
            }
            Joined::Available => {
                return Err(SaleError::Conflict(
                    "Units are for sale: there is nothing to wait for.",
                ));
            }
            Joined::Full => return Err(SaleError::Conflict("As many wait as may.")),
            Joined::Refused(refusal) => {
                return Err(SaleError::Refused(refusal, standing.now_ms));
            }
        };
        self.line_view(facts, standing, place).await.map(Ok)
    }

    /// Joins the line, once it is known that no archived round has the order; gives that order
    /// otherwise.
    async fn join(
        &self,
        engine: &Engine,
        round: RoundId,
        wish: &Wish,
    ) -> Result<Result<(Joined, Standing), Order>, SaleError> {
        let mut archive = engine.archived_rounds(round);
        // Each further turn means that one more round was archived meanwhile.
        for _ in 0..ARCHIVED_MEANWHILE_MAX {
            let left = self.left(wish.order, wish.buyer, wish.fingerprint, archive);
            let (rounds, stored) = left.await?;
            match stored {
                StoredReplay::Replay(order) => return Ok(Err(order)),
                StoredReplay::Mismatch => return Err(SaleError::Mismatch),
                StoredReplay::None => {}
            }
            match engine.join(round, wish, rounds).await? {
                (Joined::Refused(Refusal::Archived { rounds }), _) => archive = rounds,
                joined => return Ok(Ok(joined)),
            }
        }
        Err(leaving())
    }

    /// Leaves the line of the current round; doing it twice is doing it once.
    ///
    /// # Errors
    /// [`SaleError`].
    pub async fn leave_line(&self, id: SaleId, buyer: BuyerId) -> Result<(), SaleError> {
        let facts = self.facts(id).await?;
        let engine = self.engine(facts.partition)?;
        engine.leave(facts.round_id(), buyer).await?;
        Ok(())
    }

    /// Takes a buyer who is forgotten out of every line, also if the caller leaves. Where Redis does
    /// not answer the place stays; what comes of it is a hold at most, which nobody pays.
    pub async fn leave_all_lines(self: &Arc<Self>, buyer: BuyerId) {
        let shop = Arc::clone(self);
        let leaving = tokio::spawn(async move {
            // Lines are of rounds with holds alone.
            let rounds = shop.rounds.with_holds().await?;
            for (round, partition, _) in rounds {
                if let Err(error) = shop.engine(partition)?.leave(round, buyer).await {
                    tracing::warn!(%round, %error, "somebody who was forgotten may wait in line");
                }
            }
            Ok::<_, SaleError>(())
        });
        if let Ok(Err(error)) = leaving.await {
            tracing::warn!(?error, "somebody who was forgotten may wait in line");
        }
    }

    /// A buyer's place in the line of the current round.
    ///
    /// # Errors
    /// [`SaleError`]; who is not in line is not found.
    pub async fn line(&self, id: SaleId, buyer: BuyerId) -> Result<LineView, SaleError> {
        let facts = self.facts(id).await?;
        let engine = self.engine(facts.partition)?;
        let (place, standing) = engine.place(facts.round_id(), buyer).await?;
        if place.is_none() {
            return Err(SaleError::NotFound);
        }
        self.line_view(facts, standing, place).await
    }

    async fn line_view(
        &self,
        facts: Arc<SaleFacts>,
        standing: Standing,
        place: Option<(u64, u64)>,
    ) -> Result<LineView, SaleError> {
        // The place is what counts; without PostgreSQL nothing is said of what it is worth.
        let ended = self.rounds.ended_holds(facts.round_id()).await;
        let odds = match place {
            Some((place, _)) => odds(place, standing.counters.held, ended.unwrap_or_default()),
            None => Odds::Unknown,
        };
        Ok(LineView {
            facts,
            standing,
            place,
            odds,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odds_follow_from_what_is_held_and_how_holds_end() {
        for (place, held, ended, expected) in [
            (1, 0, (100, 50), Odds::None),
            (1, 100, (9, 9), Odds::Unknown),
            // 50 of 100 come back.
            (24, 100, (100, 50), Odds::Good),
            (25, 100, (100, 50), Odds::Fair),
            (100, 100, (100, 50), Odds::Fair),
            (101, 100, (100, 50), Odds::Poor),
            (1, 100, (100, 0), Odds::Poor),
        ] {
            assert_eq!(
                odds(place, held, ended),
                expected,
                "{place} {held} {ended:?}"
            );
        }
    }
}
