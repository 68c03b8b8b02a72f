//! Who a bearer is: what stands behind `Authorization: Bearer`, understood.

use std::sync::Arc;

use super::{
    api_key::{ApiKeys, Machine, PREFIX},
    barred::Barred,
    outside::Outside,
    token::{Identity, Invalid, TokenKeys},
};
use crate::store::StoreError;

/// Somebody who may come in.
#[derive(Clone, Debug)]
pub enum Bearer {
    /// With an access token.
    Person(Identity),
    /// With an API key, which may do less than its user.
    Machine(Arc<Machine>),
}

/// Why it is not known who somebody is.
#[derive(Debug, thiserror::Error)]
pub enum BearerError {
    /// Neither a token nor a key to believe. There is one such answer, whatever is wrong.
    #[error("neither an access token nor an API key to believe")]
    Invalid,
    /// So many unknown keys come that one more would only wait longer.
    #[error("too many keys are being looked up")]
    Busy,
    /// The identity provider has not given its keys yet.
    #[error("the keys of the identity provider are not known")]
    Provider,
    /// PostgreSQL did not say whose key it is.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<Invalid> for BearerError {
    fn from(Invalid: Invalid) -> Self {
        Self::Invalid
    }
}

/// Knows who bearers are. Every purchase asks, so it looks into memory, mostly.
#[derive(Debug)]
pub struct Bearers {
    tokens: Arc<TokenKeys>,
    keys: Arc<ApiKeys>,
    outside: Option<Arc<Outside>>,
    barred: Arc<Barred>,
}

impl Bearers {
    /// Those of these tokens and keys, and of another identity provider if there is one, who are not
    /// barred.
    pub fn new(
        tokens: Arc<TokenKeys>,
        keys: Arc<ApiKeys>,
        outside: Option<Arc<Outside>>,
        barred: Arc<Barred>,
    ) -> Self {
        Self {
            tokens,
            keys,
            outside,
            barred,
        }
    }

    /// Who this is.
    ///
    /// # Errors
    /// [`BearerError`].
    pub async fn identify(&self, text: &str) -> Result<Bearer, BearerError> {
        let (bearer, identity) = if text.starts_with(PREFIX) {
            let machine = self.keys.identify(text).await?;
            let identity = machine.identity();
            (Bearer::Machine(machine), identity)
        } else {
            let identity = match (self.tokens.verify(text), &self.outside) {
                (Err(Invalid), Some(outside)) => outside.verify(text).await?,
                (ours, _) => ours?,
            };
            (Bearer::Person(identity), identity)
        };
        if self.barred.bars(&identity) {
            return Err(BearerError::Invalid);
        }
        Ok(bearer)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::{super::token::tests::keys, *};
    use crate::{
        metrics::IdentityMetrics,
        store::{Database, DatabaseSettings, api_keys::ApiKeyTable, sessions::Sessions},
    };

    /// Bearers of the tests' tokens, whose database does not answer.
    pub(crate) fn bearers() -> Arc<Bearers> {
        let url = "postgres://nobody@127.0.0.1:9/none";
        let database = Database::new(url, DatabaseSettings::default()).unwrap();
        let metrics = IdentityMetrics::default();
        let barred = Barred::new(Sessions::new(database.clone()), metrics.clone());
        let api_keys = ApiKeys::new(ApiKeyTable::new(database), metrics);
        let tokens = Arc::new(keys());
        let bearers = Bearers::new(tokens, Arc::new(api_keys), None, Arc::new(barred));
        Arc::new(bearers)
    }
}
