//! Giving an order back: `release.lua`.

use bytes::Bytes;
use uuid::Uuid;

use super::{Engine, Shared, error::EngineError};
use crate::domain::{
    id::{OrderId, RoundId},
    model::Cancelled,
};

impl Engine {
    /// Cancels an order of `round`; its units are for sale again. Doing so twice is doing it once.
    ///
    /// # Errors
    /// [`EngineError`] when there is no answer.
    pub async fn cancel(
        &self,
        round: RoundId,
        order: OrderId,
        actor: Uuid,
    ) -> Result<Cancelled, EngineError> {
        let Shared { keys, scripts, .. } = &*self.shared;
        let names = vec![
            keys.meta(),
            keys.journal(),
            keys.round(round),
            keys.buyers(round),
            keys.board(round),
            keys.sale(round.sale),
            keys.orders(round.sale),
        ];
        let arguments = vec![
            Bytes::copy_from_slice(order.0.as_bytes()),
            Bytes::copy_from_slice(actor.as_bytes()),
        ];
        let mut called = self
            .shared
            .call(&self.operations, &scripts.release, names, arguments)
            .await?;
        self.shared.learn_next(&mut called)?;
        let word = called.reply.text()?;
        match (word.as_str(), called.reply.record(order)?) {
            ("done", Some(order)) => Ok(Cancelled::Done(order)),
            ("already", Some(order)) => Ok(Cancelled::Already(order)),
            ("unknown", None) => Ok(Cancelled::Unknown),
            ("settled", _) => Ok(Cancelled::Settled),
            _ => Err(called.reply.unexpected(&word)),
        }
    }
}
