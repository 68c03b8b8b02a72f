//! Taking a settled round out of Redis: `archive.lua`.

use bytes::Bytes;

use super::{Engine, Shared, error::EngineError, packed::Standing};
use crate::domain::{
    id::{OrderId, RoundId},
    limits::ARCHIVE_ORDERS_MAX,
    model::Archived,
};

impl Engine {
    /// Archives a settled round, and takes these orders of it out of Redis: those beyond
    /// [`ARCHIVE_ORDERS_MAX`] stay. Asking again is safe.
    ///
    /// Everything about the round must be stored: Redis forgets it.
    ///
    /// # Errors
    /// [`EngineError`] when there is no answer.
    pub async fn archive(
        &self,
        round: RoundId,
        orders: &[OrderId],
    ) -> Result<(Archived, Standing), EngineError> {
        let Shared { keys, scripts, .. } = &*self.shared;
        let names = keys.change(round);
        let ids: Vec<u8> = orders
            .iter()
            .take(ARCHIVE_ORDERS_MAX)
            .flat_map(|id| *id.0.as_bytes())
            .collect();
        let mut called = self
            .shared
            .call(
                &self.operations,
                &scripts.archive,
                names,
                vec![Bytes::from(ids)],
            )
            .await?;
        let standing = self.shared.learn_next(&mut called)?;
        let word = called.reply.text()?;
        let gone = called.reply.number()?;
        let archived = match word.as_str() {
            "done" => Archived::Done(gone),
            "unsettled" => Archived::Unsettled,
            _ => return Err(called.reply.unexpected(&word)),
        };
        Ok((archived, standing))
    }
}
