//! A page of the leaderboard: `leaderboard.lua`.

use bytes::Bytes;

use super::{Engine, Shared, error::EngineError, reply::Reply};
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
    /// At most `limit` confirmed orders accepted after the event `after_seq`.
    ///
    /// # Errors
    /// [`EngineError`]; nothing is ever changed.
    pub async fn leaderboard(
        &self,
        round: RoundId,
        after_seq: u64,
        limit: usize,
    ) -> Result<LeaderboardPage, EngineError> {
        let Shared {
            keys,
            scripts,
            view,
            ..
        } = &*self.shared;
        let (epoch, caller) = view.caller()?;
        let names = vec![
            keys.meta(),
            keys.round(round),
            keys.buyers(round),
            keys.board(round),
            keys.orders(round.sale),
        ];
        let arguments = vec![
            caller,
            Bytes::from(after_seq.to_string()),
            Bytes::from(limit.to_string()),
        ];
        let reply = self
            .reads
            .call(&scripts.leaderboard, names, arguments)
            .await?;
        let mut reply = Reply::new("leaderboard", reply);
        view.admit(epoch, &mut reply)?;
        let before = reply.number()?;
        let mut orders = Vec::new();
        while !reply.is_empty() {
            let id = reply.order_id()?;
            orders.push(
                reply
                    .record(id)?
                    .ok_or_else(|| reply.unexpected("record"))?,
            );
        }
        Ok(LeaderboardPage { before, orders })
    }
}
