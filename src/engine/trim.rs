//! Taking old entries out of the journal: `trim.lua`.

use bytes::Bytes;

use super::{Engine, Shared, error::EngineError};

impl Engine {
    /// Takes entries before `before_ms` (milliseconds since the Unix epoch, Redis' clock) and below
    /// the position out of the journal, at most a thousand. Gives how many; 0 when none may go.
    ///
    /// `position` is what PostgreSQL has just said in the epoch that this node is in.
    ///
    /// # Errors
    /// [`EngineError`] when there is no answer.
    pub async fn trim(&self, position: u64, before_ms: i64) -> Result<u64, EngineError> {
        let Shared { keys, scripts, .. } = &*self.shared;
        let arguments = vec![
            Bytes::from(position.to_string()),
            Bytes::from(before_ms.to_string()),
        ];
        let mut called = self
            .shared
            .call(
                &self.operations,
                &scripts.trim,
                vec![keys.meta(), keys.journal()],
                arguments,
            )
            .await?;
        called.reply.number()
    }
}
