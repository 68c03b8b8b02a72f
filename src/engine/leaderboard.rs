//! A page of the leaderboard: `leaderboard.lua`.

use bytes::Bytes;

use super::{Engine, Shared, error::EngineError};
use crate::domain::{id::RoundId, order::Order};

/// Some confirmed orders of a round, in order of purchase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaderboardPage {
    /// Confirmed orders before this page: the first order here has rank `before + 1`.
    pub before: u64,
    /// The orders.
    pub orders: Vec<Order>,
}

impl Engine {
    /// At most `limit` confirmed orders: up to `back` of those accepted until the event `after_seq`,
    /// then those accepted after it. `None` when the round is archived.
    ///
    /// # Errors
    /// [`EngineError`]; nothing is ever changed.
    pub async fn leaderboard(
        &self,
        round: RoundId,
        after_seq: u64,
        back: usize,
        limit: usize,
    ) -> Result<Option<LeaderboardPage>, EngineError> {
        let Shared { keys, scripts, .. } = &*self.shared;
        let names = vec![
            keys.meta(),
            keys.round(round),
            keys.buyers(round),
            keys.board(round),
            keys.orders(round.sale),
            keys.holds(round),
        ];
        let arguments = vec![
            Bytes::from(after_seq.to_string()),
            Bytes::from(limit.to_string()),
            Bytes::from(back.to_string()),
        ];
        let mut called = self
            .shared
            .call(&self.reads, &scripts.leaderboard, names, arguments)
            .await?;
        let before = called.reply.text()?;
        if before == "archived" {
            return Ok(None);
        }
        let before = before
            .parse()
            .map_err(|_| called.reply.unexpected(&before))?;
        let mut orders = Vec::new();
        while !called.reply.is_empty() {
            let id = called.reply.order_id()?;
            orders.push(
                called
                    .reply
                    .record(id)?
                    .ok_or_else(|| called.reply.unexpected("record"))?,
            );
        }
        Ok(Some(LeaderboardPage { before, orders }))
    }
}
