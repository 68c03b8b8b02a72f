//! The line of those who wait for units to come back: `join.lua`, `leave.lua`, `place.lua`.

use bytes::Bytes;

use super::{Engine, Shared, error::EngineError, packed::Standing, packed::Unpack};
use crate::domain::{
    id::{BuyerId, RoundId},
    model::{Joined, Wish},
    order::Refusal,
};

impl Engine {
    /// Joins the line of a round. A buyer has one place in it: joining twice is joining once.
    /// PostgreSQL does not have the order in the first `archive` archived rounds of the sale.
    ///
    /// # Errors
    /// [`EngineError`] when there is no answer.
    pub async fn join(
        &self,
        round: RoundId,
        wish: &Wish,
        archive: u32,
    ) -> Result<(Joined, Standing), EngineError> {
        let Shared { keys, scripts, .. } = &*self.shared;
        let arguments = vec![
            Bytes::copy_from_slice(wish.order.0.as_bytes()),
            Bytes::copy_from_slice(wish.buyer.0.as_bytes()),
            Bytes::copy_from_slice(&wish.fingerprint.0),
            Bytes::from(wish.units.to_string()),
            Bytes::from(archive.to_string()),
        ];
        let names = keys.change(round);
        let mut called = self
            .shared
            .call(&self.operations, &scripts.join, names, arguments)
            .await?;
        let standing = self.shared.learn_next(&mut called)?;
        let reply = &mut called.reply;
        let word = reply.text()?;
        let facts = reply.bytes()?;
        let place = reply.text()?;
        let limit = || Unpack(&facts).pair();
        let joined =
            match word.as_str() {
                "done" => place.parse().ok().map(Joined::Done),
                "already" => place.parse().ok().map(Joined::Already),
                "replayed" => Unpack(&facts).order(wish.order).map(Joined::Replayed),
                "no_line" => Some(Joined::NoLine),
                "available" => Some(Joined::Available),
                "full" => Some(Joined::Full),
                "not_open" => Some(Joined::Refused(Refusal::NotOpen {
                    opens_at_ms: standing.window.opens_at_ms,
                })),
                "archived" => Some(Joined::Refused(Refusal::Archived {
                    rounds: standing.archived_rounds,
                })),
                "paused" => Some(Joined::Refused(Refusal::Paused)),
                "closed" => Some(Joined::Refused(Refusal::Closed)),
                "order_limit" => limit()
                    .map(|(limit, held)| Joined::Refused(Refusal::OrderLimit { limit, held })),
                "buyer_limit" => limit()
                    .map(|(limit, held)| Joined::Refused(Refusal::BuyerLimit { limit, held })),
                _ => None,
            };
        let joined = joined.ok_or_else(|| reply.unexpected(&word))?;
        Ok((joined, standing))
    }

    /// Where a buyer is in the line of a round, from 1 on, and how many units the buyer waits for at
    /// most; `None` outside the line.
    ///
    /// # Errors
    /// [`EngineError`] when there is no answer.
    pub async fn place(
        &self,
        round: RoundId,
        buyer: BuyerId,
    ) -> Result<(Option<(u64, u64)>, Standing), EngineError> {
        let Shared { keys, scripts, .. } = &*self.shared;
        let arguments = vec![Bytes::copy_from_slice(buyer.0.as_bytes())];
        let names = keys.change(round);
        let mut called = self
            .shared
            .call(&self.reads, &scripts.place, names, arguments)
            .await?;
        let standing = self.shared.learn_next(&mut called)?;
        let reply = &mut called.reply;
        let (place, units) = (reply.text()?, reply.text()?);
        if place.is_empty() {
            return Ok((None, standing));
        }
        match (place.parse(), units.parse()) {
            (Ok(place), Ok(units)) => Ok((Some((place, units)), standing)),
            _ => Err(reply.unexpected(&place)),
        }
    }

    /// Leaves the line of a round; whether the buyer was in it.
    ///
    /// # Errors
    /// [`EngineError`] when there is no answer.
    pub async fn leave(
        &self,
        round: RoundId,
        buyer: BuyerId,
    ) -> Result<(bool, Standing), EngineError> {
        let Shared { keys, scripts, .. } = &*self.shared;
        let arguments = vec![Bytes::copy_from_slice(buyer.0.as_bytes())];
        let names = keys.change(round);
        let mut called = self
            .shared
            .call(&self.operations, &scripts.leave, names, arguments)
            .await?;
        let standing = self.shared.learn_next(&mut called)?;
        match called.reply.text()?.as_str() {
            "done" => Ok((true, standing)),
            "already" => Ok((false, standing)),
            word => Err(called.reply.unexpected(word)),
        }
    }
}
