//! What buyers want to be called on leaderboards, if anything. In doubt nobody has a name.

use std::{collections::HashMap, sync::Arc, time::Duration};

use super::remembered::Remembered;
use crate::{
    domain::id::BuyerId,
    store::{
        StoreError,
        profiles::{Profile, Profiles},
    },
};

/// How long a leaderboard waits for names.
const PATIENCE: Duration = Duration::from_millis(500);

/// The names of buyers. Cheap to clone.
#[derive(Clone, Debug)]
pub struct BuyerNames {
    profiles: Profiles,
    known: Arc<Remembered<BuyerId, Option<Arc<str>>>>,
}

impl BuyerNames {
    /// One that knows nobody yet.
    pub fn new(profiles: Profiles) -> Self {
        Self {
            profiles,
            known: Arc::default(),
        }
    }

    /// The names of those of `buyers` who want them to be shown.
    pub async fn of(&self, buyers: &[BuyerId]) -> HashMap<BuyerId, Arc<str>> {
        let ask = async |buyers| {
            let shown = self.profiles.shown(buyers).await?.into_iter();
            Ok(shown
                .map(|(buyer, name)| (buyer, Some(name.into())))
                .collect())
        };
        // What is not fresh is not shown: its buyer may have changed their mind.
        let learnt = tokio::time::timeout(PATIENCE, self.known.learn(buyers, ask)).await;
        let Ok(Ok(since)) = learnt else {
            return HashMap::new();
        };
        let named = buyers.iter().filter_map(|buyer| {
            let name = self.known.fresh(*buyer, since)??;
            Some((*buyer, name))
        });
        named.collect()
    }

    /// What this buyer has said.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn profile(&self, buyer: BuyerId) -> Result<Profile, StoreError> {
        self.profiles.of(buyer).await
    }

    /// Changes what is `Some`, at once for whoever asks this node. `None` when that would show a
    /// name that is not there.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn change(
        &self,
        buyer: BuyerId,
        display_name: Option<String>,
        show: Option<bool>,
    ) -> Result<Option<Profile>, StoreError> {
        let changed = self.profiles.change(buyer, display_name, show).await;
        self.known.forget(buyer);
        changed
    }
}
