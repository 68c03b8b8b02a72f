//! Who a bearer is: what stands behind `Authorization: Bearer`, understood.

use std::sync::Arc;

use super::{
    barred::Barred,
    token::{Identity, Invalid, TokenKeys},
};

/// Knows who bearers are. Every purchase asks, so it looks into memory only.
#[derive(Debug)]
pub struct Bearers {
    tokens: Arc<TokenKeys>,
    barred: Arc<Barred>,
}

impl Bearers {
    /// Those of these tokens who are not barred.
    pub fn new(tokens: Arc<TokenKeys>, barred: Arc<Barred>) -> Self {
        Self { tokens, barred }
    }

    /// Who this is.
    ///
    /// # Errors
    /// [`Invalid`], whatever is wrong.
    pub fn identify(&self, bearer: &str) -> Result<Identity, Invalid> {
        let identity = self.tokens.verify(bearer)?;
        if self.barred.bars(&identity) {
            return Err(Invalid);
        }
        Ok(identity)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::{super::token::tests::keys, *};
    use crate::{
        metrics::IdentityMetrics,
        store::{Database, DatabaseSettings, sessions::Sessions},
    };

    /// Bearers of the tests' tokens, whose database does not answer.
    pub(crate) fn bearers() -> Arc<Bearers> {
        let url = "postgres://nobody@127.0.0.1:9/none";
        let database = Database::new(url, DatabaseSettings::default()).unwrap();
        let barred = Barred::new(Sessions::new(database), IdentityMetrics::default());
        Arc::new(Bearers::new(Arc::new(keys()), Arc::new(barred)))
    }
}
