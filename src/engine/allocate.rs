//! What operators do to a round's units and rules: `allocate.lua`, `amend.lua`.

use bytes::Bytes;
use uuid::Uuid;

use super::{Engine, Shared, error::EngineError, packed, packed::Standing};
use crate::domain::{
    id::RoundId,
    model::{Allocated, Amended, Operation},
    order::Durability,
    round::Amendment,
};

impl Engine {
    /// Adds `units` to a round, or with `reduce` takes so many of those that remain, once for each
    /// operation. Units that are added are offered to those in line first; `durability` is what
    /// those acceptances survive, and without it nothing is offered now.
    ///
    /// # Errors
    /// [`EngineError`] when there is no answer. Asking again with the same operation is safe.
    pub async fn allocate(
        &self,
        round: RoundId,
        reduce: bool,
        units: u64,
        operation: Operation,
        durability: Option<Durability>,
        actor: Uuid,
    ) -> Result<(Allocated, Standing), EngineError> {
        let Shared { keys, scripts, .. } = &*self.shared;
        let arguments = vec![
            Bytes::from_static(if reduce { b"reduce" } else { b"restock" }),
            Bytes::from(units.to_string()),
            Bytes::copy_from_slice(operation.id.0.as_bytes()),
            Bytes::copy_from_slice(&operation.fingerprint.0),
            Bytes::copy_from_slice(actor.as_bytes()),
            packed::durability(durability),
        ];
        let names = keys.change(round);
        let mut called = self
            .shared
            .call(&self.operations, &scripts.allocate, names, arguments)
            .await?;
        let standing = self.shared.learn_next(&mut called)?;
        let word = called.reply.text()?;
        let allocated = match word.as_str() {
            "done" => Allocated::Done,
            "replayed" => Allocated::Replayed,
            "mismatch" => Allocated::Mismatch,
            "closed" => Allocated::Closed,
            "too_many" => Allocated::TooMany,
            _ => return Err(called.reply.unexpected(&word)),
        };
        Ok((allocated, standing))
    }

    /// Changes the rules of a round: all of them before it opens, only its end after that. Doing so
    /// twice is doing it once.
    ///
    /// # Errors
    /// [`EngineError`] when there is no answer.
    pub async fn amend(
        &self,
        round: RoundId,
        amendment: &Amendment,
        actor: Uuid,
    ) -> Result<(Amended, Standing), EngineError> {
        let Shared { keys, scripts, .. } = &*self.shared;
        let number = |number: u64| Bytes::from(number.to_string());
        let instant = |ms: i64| number(ms.max(0).unsigned_abs());
        let arguments = vec![
            Bytes::copy_from_slice(actor.as_bytes()),
            instant(amendment.window.opens_at_ms),
            instant(amendment.window.closes_at_ms.unwrap_or(0)),
            number(amendment.per_buyer_limit),
            number(amendment.per_order_limit),
            Bytes::copy_from_slice(&packed::price(amendment.unit_price)),
            number(amendment.hold_ms.unwrap_or(0)),
        ];
        let names = keys.change(round);
        let mut called = self
            .shared
            .call(&self.operations, &scripts.amend, names, arguments)
            .await?;
        let standing = self.shared.learn_next(&mut called)?;
        let word = called.reply.text()?;
        let amended = match word.as_str() {
            "done" => Amended::Done,
            "already" => Amended::Already,
            "closed" => Amended::Closed,
            "open" => Amended::Open,
            "past" => Amended::Past,
            _ => return Err(called.reply.unexpected(&word)),
        };
        Ok((amended, standing))
    }
}
