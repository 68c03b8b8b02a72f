//! Giving an order back: `release.lua`.

use std::time::Instant;

use bytes::Bytes;
use uuid::Uuid;

use super::{Engine, Shared, error::EngineError, reply::Reply};
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
        let Shared {
            keys,
            scripts,
            view,
            ..
        } = &*self.shared;
        let (epoch, caller) = view.caller()?;
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
            caller,
            Bytes::copy_from_slice(order.0.as_bytes()),
            Bytes::copy_from_slice(actor.as_bytes()),
        ];
        let sent_at = Instant::now();
        let reply = self
            .operations
            .call(&scripts.release, names, arguments)
            .await?;
        let mut reply = Reply::new("release", reply);
        let head = view.admit(epoch, &mut reply)?;
        self.learn(&mut reply, epoch, head.now_ms, sent_at)?;
        let word = reply.text()?;
        match (word.as_str(), reply.record(order)?) {
            ("done", Some(order)) => Ok(Cancelled::Done(order)),
            ("already", Some(order)) => Ok(Cancelled::Already(order)),
            ("unknown", None) => Ok(Cancelled::Unknown),
            _ => Err(reply.unexpected(&word)),
        }
    }
}
