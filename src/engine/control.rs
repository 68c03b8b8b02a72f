//! Pausing, resuming and closing a round: `control.lua`.

use bytes::Bytes;
use uuid::Uuid;

use super::{Engine, Shared, error::EngineError, packed::Standing};
use crate::domain::{id::RoundId, model::Controlled, round::Intent};

impl Engine {
    /// Says what the operator wants of a round from now on.
    ///
    /// # Errors
    /// [`EngineError`] when there is no answer. Asking again is safe.
    pub async fn control(
        &self,
        round: RoundId,
        intent: Intent,
        actor: Uuid,
    ) -> Result<(Controlled, Standing), EngineError> {
        let Shared { keys, scripts, .. } = &*self.shared;
        let names = vec![
            keys.meta(),
            keys.journal(),
            keys.round(round),
            keys.sale(round.sale),
        ];
        let arguments = vec![
            Bytes::from_static(intent.as_str().as_bytes()),
            Bytes::copy_from_slice(actor.as_bytes()),
        ];
        let mut called = self
            .shared
            .call(&self.operations, &scripts.control, names, arguments)
            .await?;
        let standing = self.shared.learn_next(&mut called)?;
        let word = called.reply.text()?;
        let controlled = match word.as_str() {
            "done" => Controlled::Done,
            "already" => Controlled::Already,
            "closed" => Controlled::Closed,
            _ => return Err(called.reply.unexpected(&word)),
        };
        Ok((controlled, standing))
    }
}
