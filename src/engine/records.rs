//! What Redis has of orders and buyers that PostgreSQL names, read with plain commands: the audit
//! asks for all of them, some at a time, and checks before and after that nothing has moved.

use bytes::Bytes;
use fred::types::Value;

use super::{Engine, error::EngineError, packed::Unpack};
use crate::domain::{
    id::{BuyerId, OrderId, RoundId},
    order::Order,
    round::LimitScope,
};

/// What Redis has of an order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Its record; `None` when there is none, or none that can be read.
    pub order: Option<Order>,
    /// Its place on the leaderboard.
    pub place: Option<u64>,
    /// The first instant at which it is held no more, milliseconds since the Unix epoch.
    pub hold_until_ms: Option<i64>,
}

impl Engine {
    /// What Redis has of these orders of a round, in their order. Ask for some hundreds.
    ///
    /// # Errors
    /// [`EngineError`]; keys of another type are [`EngineError::Damaged`].
    pub async fn records(
        &self,
        round: RoundId,
        orders: &[OrderId],
    ) -> Result<Vec<Kept>, EngineError> {
        let keys = self.shared.keys;
        let ids = || {
            orders
                .iter()
                .map(|id| Bytes::copy_from_slice(id.0.as_bytes()))
        };
        let records = self
            .values("HMGET", keys.orders(round.sale), ids().collect())
            .await?;
        let places = self
            .values("ZMSCORE", keys.board(round), ids().collect())
            .await?;
        let holds = self
            .values("ZMSCORE", keys.holds(round), ids().collect())
            .await?;
        Ok(orders
            .iter()
            .zip(records.into_iter().zip(places.into_iter().zip(holds)))
            .map(|(id, (record, (place, hold)))| Kept {
                order: record
                    .into_bytes()
                    .and_then(|bytes| Unpack(&bytes).order(*id)),
                place: place.as_u64(),
                hold_until_ms: hold.as_i64(),
            })
            .collect())
    }

    /// Units and acceptances of these buyers of a round, or of its sale, in their order. Ask for some
    /// hundreds.
    ///
    /// # Errors
    /// [`EngineError`]; a key of another type is [`EngineError::Damaged`].
    pub async fn buyers(
        &self,
        round: RoundId,
        scope: LimitScope,
        buyers: &[BuyerId],
    ) -> Result<Vec<Option<(u64, u64)>>, EngineError> {
        let ids = buyers
            .iter()
            .map(|id| Bytes::copy_from_slice(id.0.as_bytes()));
        let key = match scope {
            LimitScope::Round => self.shared.keys.buyers(round),
            LimitScope::Sale => self.shared.keys.sale_buyers(round.sale),
        };
        let packed = self.values("HMGET", key, ids.collect()).await?;
        Ok(packed
            .into_iter()
            .map(|value| Unpack(&value.into_bytes()?).buyer())
            .collect())
    }

    async fn values(
        &self,
        command: &'static str,
        key: String,
        mut ids: Vec<Bytes>,
    ) -> Result<Vec<Value>, EngineError> {
        let asked = ids.len();
        ids.insert(0, Bytes::from(key));
        match self.reads.command(command, ids).await {
            Ok(Value::Array(values)) if values.len() == asked => Ok(values),
            Ok(other) => Err(EngineError::Protocol(format!("{command} gave {other:?}"))),
            Err(EngineError::Unknown(what)) if what.contains("WRONGTYPE") => {
                Err(EngineError::Damaged(what))
            }
            Err(error) => Err(error),
        }
    }
}
