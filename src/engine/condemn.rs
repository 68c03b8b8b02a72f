//! Stopping a round that the audit has found incomplete, on every node: `condemn.lua`.

use bytes::Bytes;

use super::{Engine, Shared, error::EngineError};
use crate::domain::id::RoundId;

impl Engine {
    /// Nothing of the round is sold until recovery has written it anew; `missing` says what Redis
    /// lacks.
    ///
    /// # Errors
    /// [`EngineError`] when there is no answer. Asking again is safe.
    pub async fn condemn(&self, round: RoundId, missing: &str) -> Result<(), EngineError> {
        let Shared { keys, scripts, .. } = &*self.shared;
        let names = vec![keys.meta(), keys.round(round)];
        let arguments = vec![Bytes::copy_from_slice(missing.as_bytes())];
        self.shared
            .call(&self.operations, &scripts.condemn, names, arguments)
            .await?;
        self.shared.note_damage(round, true);
        Ok(())
    }
}
