//! All rounds of a sale: those that were, the one that is, those to come, and what was missed.

use super::{SaleError, Shop};
use crate::{
    domain::{
        id::{RoundId, SaleId},
        round::{Counters, State, Window, state},
    },
    store::schedules::Making,
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
    /// 1, 2, 3 …, once it is made.
    pub round: Option<u32>,
    /// Price, limits and units: of a planned one those that it would be made from now. A window
    /// that was missed has none.
    pub rules: Option<Making>,
    /// Where its units are, once it is made.
    pub counters: Option<Counters>,
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
                    round: None,
                    rules: None,
                    counters: None,
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
                round: Some(stored.round),
                rules: Some(stored.rules),
                counters: Some(stored.counters),
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
            let making = self.schedules.making(facts.number).await?;
            views.extend(planned.map(|window| RoundView {
                window,
                state: RoundState::Planned,
                round: None,
                rules: Some(making),
                counters: None,
            }));
        }
        Ok(views)
    }
}
