//! What Redis and its journal say of a round: `audit.lua`.

use super::{
    Engine, Shared,
    epoch::journal_id,
    error::EngineError,
    packed::{COUNTERS_BYTES, Standing, Unpack},
};
use crate::domain::{
    id::{JournalId, RoundId},
    round::Counters,
};

/// Redis' side of an audit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoundAudit {
    /// The round's keys; what is left of them when they are missing or not whole.
    pub keys: Result<RoundKeys, Remains>,
    /// The last journal entry of the partition.
    pub pseq: u64,
}

/// The keys of a round that is there, counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoundKeys {
    /// Where the units are.
    pub standing: Standing,
    /// Buyers as the round, or the sale whose limit is over all rounds, counts them, and as there are; −1 for a key of another type.
    pub buyers: (i64, i64),
    /// Places on the leaderboard, likewise.
    pub board: (i64, i64),
    /// Orders of the sale, likewise, without those that have left with archived rounds.
    pub orders: (i64, i64),
    /// Operations of the sale, likewise.
    pub operations: (i64, i64),
    /// Held orders, likewise.
    pub holds: (i64, i64),
    /// Buyers in the line, likewise.
    pub line: (i64, i64),
    /// The earliest deadline of a held order, milliseconds since the Unix epoch.
    pub next_hold_ms: Option<i64>,
    /// The journal entry that last touched the round.
    pub entry: JournalId,
    /// What that entry says; `None` when the journal has it no more.
    pub journal: Option<Counters>,
}

/// The counters of a round that is missing or not whole, as they stand in Redis; `None` where
/// there is no number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Remains {
    /// Units given to the round.
    pub allocation: Option<i64>,
    /// Units to be had.
    pub remaining: Option<i64>,
    /// Units of held orders.
    pub held: Option<i64>,
    /// Units of confirmed orders.
    pub sold: Option<i64>,
    /// The number of its last event.
    pub seq: Option<i64>,
}

impl Engine {
    /// Reads what an audit compares.
    ///
    /// # Errors
    /// [`EngineError`]; nothing is ever changed.
    pub async fn audit(&self, round: RoundId) -> Result<RoundAudit, EngineError> {
        let Shared { keys, scripts, .. } = &*self.shared;
        let names = keys.change(round);
        let mut called = self
            .shared
            .call(&self.reads, &scripts.audit, names, vec![])
            .await?;
        let Some(standing) = called.reply.standing(called.epoch, called.head.now_ms)? else {
            let mut field = || called.reply.text().map(|text| text.parse().ok());
            let remains = Remains {
                allocation: field()?,
                remaining: field()?,
                held: field()?,
                sold: field()?,
                seq: field()?,
            };
            return Ok(RoundAudit {
                keys: Err(remains),
                pseq: called.head.pseq,
            });
        };
        let keys = RoundKeys {
            standing,
            buyers: (called.reply.number()?, called.reply.number()?),
            board: (called.reply.number()?, called.reply.number()?),
            orders: (called.reply.number()?, called.reply.number()?),
            operations: (called.reply.number()?, called.reply.number()?),
            holds: (called.reply.number()?, called.reply.number()?),
            line: (called.reply.number()?, called.reply.number()?),
            next_hold_ms: called.reply.text()?.parse().ok(),
            entry: journal_id(&called.reply.text()?).unwrap_or_default(),
            journal: called
                .reply
                .bytes()?
                .chunks(COUNTERS_BYTES)
                .filter_map(|bytes| Unpack(bytes).counters())
                .find_map(|(id, counters)| (id == round).then_some(counters)),
        };
        Ok(RoundAudit {
            keys: Ok(keys),
            pseq: called.head.pseq,
        })
    }
}
