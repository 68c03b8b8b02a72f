//! What operators change of a round that is made: everything before it opens, its end later.

use std::{sync::Arc, time::Duration};

use tokio::time::sleep;
use uuid::Uuid;

use super::{RoundState, RoundView, SaleError, Shop};
use crate::{
    domain::{
        id::{Fingerprint, OperationId, RoundId, SaleId},
        model::{Allocated, Amended, Operation},
        money::Money,
        round::{Amendment, State, Terms, Window},
    },
    engine::{Engine, Standing},
    store::{
        audit_log::carried,
        schedules::{Making, SaleLock},
    },
};

/// The time between two looks whether PostgreSQL has what Redis has, and how often at most: about two
/// seconds.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
const LOOKS_MAX: usize = 100;

/// What to change of a round; `None` stays.
#[derive(Clone, Copy, Debug, Default)]
pub struct RoundChange {
    /// When it opens, milliseconds since the Unix epoch.
    pub opens_at_ms: Option<i64>,
    /// When it closes.
    pub closes_at_ms: Option<i64>,
    /// The price of one unit.
    pub unit_price: Option<Money>,
    /// Units that one buyer may have.
    pub per_buyer_limit: Option<u64>,
    /// Units that one order may ask for.
    pub per_order_limit: Option<u64>,
    /// How long an order may wait for its payment, in milliseconds.
    pub hold_ms: Option<u64>,
    /// Units of the round.
    pub allocation: Option<u64>,
}

impl Shop {
    /// A round that is made, as it stands. Its version is its seq.
    ///
    /// # Errors
    /// [`SaleError`].
    pub async fn made_round(&self, id: SaleId, round: u32) -> Result<RoundView, SaleError> {
        let facts = self.facts(id).await?;
        let stored = self.schedules.round(facts.number, round).await?;
        let (terms, _) = stored.ok_or(SaleError::NotFound)?;
        let round = RoundId {
            round,
            ..facts.round_id()
        };
        let standing = self.engine(facts.partition)?.snapshot(round).await?;
        Ok(view(&standing, &terms))
    }

    /// Changes a round that has not opened, if its last event is still `seq`.
    ///
    /// # Errors
    /// [`SaleError`].
    pub async fn change_round(
        self: Arc<Self>,
        id: SaleId,
        round: u32,
        seq: u64,
        change: RoundChange,
        actor: Uuid,
    ) -> Result<RoundView, SaleError> {
        // To its end, whoever waits for it: it holds a lock.
        let work = async move {
            let facts = self.facts(id).await?;
            let engine = self.engine(facts.partition)?;
            let mut lock = self.schedules.lock(facts.number).await?;
            let round = RoundId {
                round,
                ..facts.round_id()
            };
            let (mut terms, standing) = caught_up(&mut lock, engine, round).await?;
            if standing.counters.seq != seq {
                return Err(SaleError::Stale);
            }
            merge(&mut terms, change);
            terms.check().map_err(SaleError::Terms)?;
            fits(&mut lock, engine, round, terms.window).await?;
            let mut standing = amend(engine, round, &terms, actor).await?;
            if let Some(units) = change.allocation {
                let operation = OperationId::derive(&format!("amend {round} {seq}"), actor, "");
                standing = allocate(engine, round, &standing, units, operation, actor).await?;
            }
            // Everybody is to read what is new.
            let (terms, _) = caught_up(&mut lock, engine, round).await?;
            lock.changed(actor, self.now_ms(facts.partition)).await?;
            self.directory.invalidate(id);
            Ok(view(&standing, &terms))
        };
        finish(work).await
    }

    /// Puts the end of the present round off.
    ///
    /// # Errors
    /// [`SaleError`].
    pub async fn extend(
        self: Arc<Self>,
        id: SaleId,
        closes_at_ms: i64,
        actor: Uuid,
    ) -> Result<RoundView, SaleError> {
        let work = async move {
            let facts = self.facts(id).await?;
            let engine = self.engine(facts.partition)?;
            let mut lock = self.schedules.lock(facts.number).await?;
            let round = facts.round_id();
            let standing = engine.snapshot(round).await?;
            match standing.window.closes_at_ms {
                _ if standing.state == State::Closed => {
                    return Err(SaleError::Conflict("The round is over."));
                }
                None => return Err(SaleError::Conflict("The round has no end to put off.")),
                Some(end) if closes_at_ms < end => {
                    let detail = "must not be earlier than the present closes_at";
                    return Err(SaleError::Range("#/closes_at", detail));
                }
                Some(_) => {}
            }
            let window = Window {
                closes_at_ms: Some(closes_at_ms),
                ..standing.window
            };
            fits(&mut lock, engine, round, window).await?;
            let mut tries = 0;
            let standing = loop {
                let stored = lock.round(round.round).await?;
                let (mut terms, _) = stored.ok_or(SaleError::NotFound)?;
                terms.window = window;
                match amend(engine, round, &terms, actor).await {
                    // Its other rules are not those that are stored: an operator has just changed
                    // them.
                    Err(SaleError::Conflict(_)) if tries < LOOKS_MAX => tries += 1,
                    amended => break amended?,
                }
                sleep(LOOK_AGAIN).await;
            };
            let mut tries = 0;
            let terms = loop {
                let stored = lock.round(round.round).await?;
                let (terms, _) = stored.ok_or(SaleError::NotFound)?;
                if terms.window == window || tries == LOOKS_MAX {
                    break terms;
                }
                tries += 1;
                sleep(LOOK_AGAIN).await;
            };
            lock.changed(actor, self.now_ms(facts.partition)).await?;
            self.directory.invalidate(id);
            Ok(view(&standing, &terms))
        };
        finish(work).await
    }
}

/// Runs `work` to its end, whoever waits for it.
async fn finish(
    work: impl Future<Output = Result<RoundView, SaleError>> + Send + 'static,
) -> Result<RoundView, SaleError> {
    match tokio::spawn(carried(work)).await {
        Ok(done) => done,
        // Nobody aborts the task, so it panicked; the panic goes on where it is awaited.
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// The rules of a round as they are now: PostgreSQL has every event that Redis has.
async fn caught_up(
    lock: &mut SaleLock,
    engine: &Engine,
    round: RoundId,
) -> Result<(Terms, Standing), SaleError> {
    for _ in 0..LOOKS_MAX {
        let (terms, seq) = lock.round(round.round).await?.ok_or(SaleError::NotFound)?;
        let standing = engine.snapshot(round).await?;
        if standing.state != State::Scheduled {
            return Err(SaleError::Conflict(
                "The round has opened: only its end can be put off, with extend.",
            ));
        }
        if standing.counters.seq == seq {
            return Ok((terms, standing));
        }
        sleep(LOOK_AGAIN).await;
    }
    Err(SaleError::Behind)
}

fn merge(terms: &mut Terms, change: RoundChange) {
    if let Some(at) = change.opens_at_ms {
        terms.window.opens_at_ms = at;
    }
    terms.window.closes_at_ms = change.closes_at_ms.or(terms.window.closes_at_ms);
    terms.unit_price = change.unit_price.unwrap_or(terms.unit_price);
    terms.per_buyer_limit = change.per_buyer_limit.unwrap_or(terms.per_buyer_limit);
    terms.per_order_limit = change.per_order_limit.unwrap_or(terms.per_order_limit);
    terms.policy.hold_ms = change.hold_ms.or(terms.policy.hold_ms);
}

/// Two rounds of a sale never sell at once.
async fn fits(
    lock: &mut SaleLock,
    engine: &Engine,
    round: RoundId,
    window: Window,
) -> Result<(), SaleError> {
    let mut next = lock.upcoming;
    for number in [round.round.saturating_sub(1), round.round + 1] {
        if lock.round(number).await?.is_none() {
            continue;
        }
        let other = RoundId {
            round: number,
            ..round
        };
        let other = engine.snapshot(other).await?;
        if number > round.round {
            next = Some(other.window);
        } else if other.state != State::Closed
            && other
                .window
                .closes_at_ms
                .is_none_or(|end| end > window.opens_at_ms)
        {
            let detail = "must not be earlier than the end of the round before it";
            return Err(SaleError::Range("#/opens_at", detail));
        }
    }
    match (window.closes_at_ms, next) {
        (Some(end), Some(next)) if end > next.opens_at_ms => {
            let detail = "must not be later than the opening of the round after it";
            Err(SaleError::Range("#/closes_at", detail))
        }
        (None, Some(_)) => {
            let detail = "is needed: there is a round after it";
            Err(SaleError::Range("#/closes_at", detail))
        }
        _ => Ok(()),
    }
}

async fn amend(
    engine: &Engine,
    round: RoundId,
    terms: &Terms,
    actor: Uuid,
) -> Result<Standing, SaleError> {
    let (amended, standing) = engine.amend(round, &Amendment::from(terms), actor).await?;
    match amended {
        Amended::Done | Amended::Already => Ok(standing),
        Amended::Closed => Err(SaleError::Conflict("The round is over.")),
        Amended::Open => Err(SaleError::Conflict(
            "The round has opened: only its end can be put off, with extend.",
        )),
        Amended::Past => Err(SaleError::Range("#/closes_at", "has passed")),
    }
}

/// Adds or takes units, so that the round has so many.
async fn allocate(
    engine: &Engine,
    round: RoundId,
    standing: &Standing,
    units: u64,
    operation: OperationId,
    actor: Uuid,
) -> Result<Standing, SaleError> {
    let has = standing.counters.allocation;
    if units == has {
        return Ok(*standing);
    }
    let (reduce, word) = if units < has {
        (true, "reduce")
    } else {
        (false, "restock")
    };
    let moved = units.abs_diff(has);
    let operation = Operation {
        id: operation,
        fingerprint: Fingerprint::units(word, moved),
    };
    // Nobody is in line before a round opens, so nothing is accepted by this.
    let (allocated, standing) = engine
        .allocate(round, reduce, moved, operation, None, actor)
        .await?;
    match allocated {
        Allocated::Done | Allocated::Replayed => Ok(standing),
        Allocated::Mismatch => Err(SaleError::Mismatch),
        Allocated::Closed => Err(SaleError::Conflict("The round is over.")),
        Allocated::TooMany => Err(SaleError::Range("#/allocation", "cannot be reached")),
    }
}

fn view(standing: &Standing, terms: &Terms) -> RoundView {
    RoundView {
        window: standing.window,
        state: RoundState::Made(standing.state),
        round: Some(standing.round.round),
        rules: Some(Making::from(terms)),
        counters: Some(standing.counters),
    }
}
