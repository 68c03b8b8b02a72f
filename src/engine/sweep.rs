//! Ending holds whose time is over: `sweep.lua`.

use bytes::Bytes;

use super::{Engine, Shared, error::EngineError, packed, packed::Standing};
use crate::{
    domain::{id::RoundId, model::Swept, order::Durability},
    faults,
};

impl Engine {
    /// Ends at most `holds` holds of a round whose time is over, and offers what remains to at most
    /// `offers` buyers in line; `durability` is what those acceptances survive, and without it
    /// nothing is offered. Any number of nodes may do so at once.
    ///
    /// # Errors
    /// [`EngineError`] when there is no answer.
    pub async fn sweep(
        &self,
        round: RoundId,
        holds: u64,
        offers: u64,
        durability: Option<Durability>,
    ) -> Result<(Swept, Standing), EngineError> {
        let Shared { keys, scripts, .. } = &*self.shared;
        let arguments = vec![
            Bytes::from(holds.to_string()),
            Bytes::from(offers.to_string()),
            packed::durability(durability),
        ];
        let mut called = self
            .shared
            .call(
                &self.operations,
                &scripts.sweep,
                keys.change(round),
                arguments,
            )
            .await?;
        let standing = self.shared.learn_next(&mut called)?;
        let (expired, offered) = (called.reply.number()?, called.reply.number()?);
        if expired > 0 {
            faults::point("sweep.after_expiry");
        }
        if offered > 0 {
            faults::point("sweep.after_offer");
        }
        let swept = Swept {
            expired,
            offered,
            next_ms: match called.reply.text()?.as_str() {
                "" => None,
                text => Some(text.parse().map_err(|_| called.reply.unexpected(text))?),
            },
        };
        Ok((swept, standing))
    }
}
