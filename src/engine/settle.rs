//! Making the orders of a round that is over final: `settle.lua`.

use super::{Engine, Shared, error::EngineError, packed::Standing};
use crate::domain::{id::RoundId, model::Settled};

impl Engine {
    /// From now on no unit of the round goes back. Asking again is safe.
    ///
    /// # Errors
    /// [`EngineError`] when there is no answer.
    pub async fn settle(&self, round: RoundId) -> Result<(Settled, Standing), EngineError> {
        let Shared { keys, scripts, .. } = &*self.shared;
        let names = vec![
            keys.meta(),
            keys.journal(),
            keys.round(round),
            keys.sale(round.sale),
        ];
        let mut called = self
            .shared
            .call(&self.operations, &scripts.settle, names, vec![])
            .await?;
        let standing = self.shared.learn_next(&mut called)?;
        let word = called.reply.text()?;
        let settled = match word.as_str() {
            "done" => Settled::Done,
            "already" => Settled::Already,
            "open" => Settled::Open,
            "held" => Settled::Held,
            _ => return Err(called.reply.unexpected(&word)),
        };
        Ok((settled, standing))
    }
}
