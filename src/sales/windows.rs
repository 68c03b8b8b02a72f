//! All rounds of a sale: those that were, the one that is, those to come, and what was missed.

use super::{SaleError, Shop};
use crate::{
    domain::{
        id::{RoundId, SaleId},
        money::Money,
        round::{Counters, State, Window, state},
    },
    store::schedules::StoredRound,
};

/// Windows that a schedule shows ahead of its rounds: recurring ones have no end.
const PLANNED_MAX: usize = 100;

/// What a round is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RoundState {
    /// A round that Redis has.
    Made(State),
    /// Its window passed while nothing was running. It is not run late.
    Missed,
    /// Its window is in the schedule, and it is not made yet.
    Planned,
}

/// One round of a sale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundView {
    /// When it sells.
    pub window: Window,
    /// What it is.
    pub state: RoundState,
    /// Its number, price, limits and units, once it is made.
    pub made: Option<MadeRound>,
}

/// A round that is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MadeRound {
    /// 1, 2, 3 ….
    pub round: u32,
    /// The price of one unit.
    pub unit_price: Money,
    /// Units that one buyer may have.
    pub per_buyer_limit: u64,
    /// Units that one order may ask for.
    pub per_order_limit: u64,
    /// Where its units are.
    pub counters: Counters,
}

impl Shop {
    /// The rounds of a sale that open after an instant, in order, at most `limit`.
    ///
    /// # Errors
    /// [`SaleError`].
    pub async fn rounds(
        &self,
        id: SaleId,
        after_ms: i64,
        limit: usize,
    ) -> Result<Vec<RoundView>, SaleError> {
        let facts = self.facts(id).await?;
        let rows = i64::try_from(limit).unwrap_or(i64::MAX);
        let past = self.schedules.windows(facts.number, after_ms, rows).await?;
        let recurs = facts.schedule.is_some();
        let now_ms = self.now_ms(facts.partition);
        let engine = self.engine(facts.partition)?;
        let views = past.into_iter().map(async |past| {
            let Some(mut stored) = past.round else {
                return Ok(RoundView {
                    window: past.window,
                    state: RoundState::Missed,
                    made: None,
                });
            };
            let mut window = past.window;
            let mut stands = state(stored.intent, window, now_ms);
            // What is final does not change any more; and it may be a long list.
            if stored.provisioned && !stored.intent.is_final() {
                let round = RoundId {
                    round: stored.round,
                    ..facts.round_id()
                };
                let standing = engine.snapshot(round).await?;
                stored.counters = standing.counters;
                window = standing.window;
                stands = standing.state;
            }
            let missed =
                recurs && stands == State::Closed && !stored.opened && stored.counters.seq == 0;
            Ok::<_, SaleError>(RoundView {
                window,
                state: if missed {
                    RoundState::Missed
                } else if stored.provisioned {
                    RoundState::Made(stands)
                } else {
                    RoundState::Planned
                },
                made: Some(MadeRound::from(stored)),
            })
        });
        let mut views = futures::future::try_join_all(views).await?;
        if let Some(schedule) = &facts.schedule {
            // Behind the last one that is made: rounds may have been made since these facts.
            let made_ms = views
                .last()
                .map_or(after_ms, |view| view.window.opens_at_ms);
            let planned = schedule
                .following(facts.progress)
                .take(PLANNED_MAX)
                .filter(|window| window.opens_at_ms > made_ms)
                .take(limit.saturating_sub(views.len()));
            views.extend(planned.map(|window| RoundView {
                window,
                state: RoundState::Planned,
                made: None,
            }));
        }
        Ok(views)
    }
}

impl From<StoredRound> for MadeRound {
    fn from(stored: StoredRound) -> Self {
        Self {
            round: stored.round,
            unit_price: stored.unit_price,
            per_buyer_limit: stored.per_buyer_limit,
            per_order_limit: stored.per_order_limit,
            counters: stored.counters,
        }
    }
}
