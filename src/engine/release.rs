//! What becomes of an accepted order: `release.lua`, `confirm.lua`, `extend.lua`.

use bytes::Bytes;
use uuid::Uuid;

use super::{
    Engine, Shared, call::Called, error::EngineError, packed, packed::Standing, script::Script,
};
use crate::{
    domain::{
        id::{OrderId, RoundId},
        model::{Confirmed, Extended, Operation, Release, Released},
        order::{Durability, Order},
    },
    faults,
};

impl Engine {
    /// Gives an order, or some units of it, back: `None` for all that are left. With an operation it
    /// happens once, however often it is asked for; without one, asking twice gives all back.
    ///
    /// Units that go back on sale are offered to those in line first; `durability` is what those
    /// acceptances survive, and without it nothing is offered now.
    ///
    /// # Errors
    /// [`EngineError`] when there is no answer.
    #[expect(clippy::too_many_arguments, reason = "each says another thing")]
    pub async fn release(
        &self,
        round: RoundId,
        order: OrderId,
        release: Release,
        units: Option<u64>,
        operation: Option<Operation>,
        durability: Option<Durability>,
        actor: Uuid,
    ) -> Result<(Released, Standing), EngineError> {
        let operation_id = operation.map(|operation| *operation.id.0.as_bytes());
        let fingerprint = operation.map(|operation| operation.fingerprint.0);
        let arguments = vec![
            Bytes::copy_from_slice(order.0.as_bytes()),
            Bytes::copy_from_slice(actor.as_bytes()),
            Bytes::from_static(release.event().as_str().as_bytes()),
            Bytes::from(units.unwrap_or(0).to_string()),
            Bytes::copy_from_slice(operation_id.as_ref().map_or(&[], |id| id.as_slice())),
            Bytes::copy_from_slice(&fingerprint.unwrap_or_default()),
            packed::durability(durability),
        ];
        let release = &self.shared.scripts.release;
        let Changed {
            called,
            standing,
            word,
            record,
        } = self.change_order(release, round, order, arguments).await?;
        let outcome = match (word.as_str(), record) {
            ("done", Some(order)) => Released::Done(order),
            ("replayed", Some(order)) => Released::Replayed(order),
            ("mismatch", _) => Released::Mismatch,
            ("already", Some(order)) => Released::Already(order),
            ("held", Some(order)) => Released::Held(order),
            ("too_many", Some(order)) => Released::TooMany(order),
            ("unknown", None) => Released::Unknown,
            // An operation on an order that has left is one of a settled round.
            ("settled", _) | ("replayed", None) => Released::Settled,
            _ => return Err(called.reply.unexpected(&word)),
        };
        Ok((outcome, standing))
    }

    /// A held order is paid, and bought from now on, unless its deadline has passed. Doing so twice
    /// is doing it once.
    ///
    /// # Errors
    /// [`EngineError`] when there is no answer.
    pub async fn confirm(
        &self,
        round: RoundId,
        order: OrderId,
        actor: Uuid,
    ) -> Result<(Confirmed, Standing), EngineError> {
        let confirm = &self.shared.scripts.confirm;
        let arguments = by(order, actor);
        faults::point("confirm.before_script");
        let Changed {
            called,
            standing,
            word,
            record,
        } = self.change_order(confirm, round, order, arguments).await?;
        faults::point("confirm.after_script");
        let outcome = match (word.as_str(), record) {
            ("done", Some(order)) => Confirmed::Done(order),
            ("already", Some(order)) => Confirmed::Already(order),
            ("late", Some(order)) => Confirmed::Late(order),
            ("unknown", None) => Confirmed::Unknown,
            _ => return Err(called.reply.unexpected(&word)),
        };
        Ok((outcome, standing))
    }

    /// Gives a held order its time once more, counted from now; once in its life.
    ///
    /// # Errors
    /// [`EngineError`] when there is no answer.
    pub async fn extend(
        &self,
        round: RoundId,
        order: OrderId,
        actor: Uuid,
    ) -> Result<(Extended, Standing), EngineError> {
        let extend = &self.shared.scripts.extend;
        let arguments = by(order, actor);
        let Changed {
            called,
            standing,
            word,
            record,
        } = self.change_order(extend, round, order, arguments).await?;
        let outcome = match (word.as_str(), record) {
            ("done", Some(order)) => Extended::Done(order),
            ("extended", Some(order)) => Extended::Before(order),
            ("already", Some(order)) => Extended::Already(order),
            ("late", Some(order)) => Extended::Late(order),
            ("unknown", None) => Extended::Unknown,
            _ => return Err(called.reply.unexpected(&word)),
        };
        Ok((outcome, standing))
    }

    /// Calls a script that answers with a word and the order's record.
    async fn change_order(
        &self,
        script: &Script,
        round: RoundId,
        order: OrderId,
        arguments: Vec<Bytes>,
    ) -> Result<Changed, EngineError> {
        let Shared { keys, .. } = &*self.shared;
        let mut called = self
            .shared
            .call(&self.operations, script, keys.change(round), arguments)
            .await?;
        let standing = self.shared.learn_next(&mut called)?;
        let word = called.reply.text()?;
        let record = called.reply.record(order)?;
        Ok(Changed {
            called,
            standing,
            word,
            record,
        })
    }
}

/// The reply of a script that changes an order.
struct Changed {
    called: Called,
    standing: Standing,
    word: String,
    /// The order as it is now.
    record: Option<Order>,
}

fn by(order: OrderId, actor: Uuid) -> Vec<Bytes> {
    vec![
        Bytes::copy_from_slice(order.0.as_bytes()),
        Bytes::copy_from_slice(actor.as_bytes()),
    ]
}
