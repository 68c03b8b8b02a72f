//! Adding units to a round: `restock.lua`.

use bytes::Bytes;
use uuid::Uuid;

use super::{Engine, Shared, error::EngineError, packed::Standing};
use crate::domain::{
    id::{Fingerprint, OperationId, RoundId},
    model::Restocked,
};

impl Engine {
    /// Adds `units` to a round, once for each operation id.
    ///
    /// # Errors
    /// [`EngineError`] when there is no answer. Asking again with the same operation is safe.
    pub async fn restock(
        &self,
        round: RoundId,
        units: u64,
        operation: OperationId,
        fingerprint: Fingerprint,
        actor: Uuid,
    ) -> Result<(Restocked, Standing), EngineError> {
        let Shared { keys, scripts, .. } = &*self.shared;
        let names = vec![
            keys.meta(),
            keys.journal(),
            keys.round(round),
            keys.sale(round.sale),
            keys.ops(round.sale),
        ];
        let arguments = vec![
            Bytes::from(units.to_string()),
            Bytes::copy_from_slice(operation.0.as_bytes()),
            Bytes::copy_from_slice(&fingerprint.0),
            Bytes::copy_from_slice(actor.as_bytes()),
        ];
        let mut called = self
            .shared
            .call(&self.operations, &scripts.restock, names, arguments)
            .await?;
        let standing = self.shared.learn_next(&mut called)?;
        let word = called.reply.text()?;
        let restocked = match word.as_str() {
            "done" => Restocked::Done,
            "replayed" => Restocked::Replayed,
            "mismatch" => Restocked::Mismatch,
            "closed" => Restocked::Closed,
            "too_many" => Restocked::TooMany,
            _ => return Err(called.reply.unexpected(&word)),
        };
        Ok((restocked, standing))
    }
}
