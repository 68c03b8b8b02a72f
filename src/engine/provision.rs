//! Creating a round with its stock: `provision.lua`.

use bytes::Bytes;

use super::{Engine, Shared, error::EngineError, packed};
use crate::domain::{id::RoundId, model::Provisioned, round::Terms};

impl Engine {
    /// Creates a round. Asking again with the same terms is safe.
    ///
    /// # Errors
    /// [`EngineError`] when there is no answer.
    pub async fn provision(
        &self,
        round: RoundId,
        terms: &Terms,
    ) -> Result<Provisioned, EngineError> {
        let Shared { keys, scripts, .. } = &*self.shared;
        let names = keys.change(round);
        let number = |number: u64| Bytes::from(number.to_string());
        let instant = |ms: i64| number(ms.max(0).unsigned_abs());
        let arguments = vec![
            number(round.sale.0.into()),
            number(round.round.into()),
            instant(terms.window.opens_at_ms),
            instant(terms.window.closes_at_ms.unwrap_or(0)),
            number(terms.per_buyer_limit),
            number(terms.per_order_limit),
            Bytes::copy_from_slice(&packed::price(terms.unit_price)),
            number(terms.policy.hold_ms.unwrap_or(0)),
            number(packed::policy(&terms.policy).into()),
            number(terms.allocation),
        ];
        let mut called = self
            .shared
            .call(&self.operations, &scripts.provision, names, arguments)
            .await?;
        match called.reply.text()?.as_str() {
            "created" => Ok(Provisioned::Created),
            "exists" => Ok(Provisioned::Exists),
            "conflict" => Ok(Provisioned::Conflict),
            word => Err(called.reply.unexpected(word)),
        }
    }
}
