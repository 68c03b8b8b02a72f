//! Tells the cache Redis what this node has allowed, and hears what all have.

use std::{fmt, sync::Arc};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{Inner, table::Key};
use crate::engine::Spent;

/// What may wait to be told; more is told later.
pub(super) const SHARES_MAX: usize = 8_192;

/// What travels in one call: about a tenth of a millisecond of Redis.
const CALL_MAX: usize = 128;

/// Something that has added up.
pub(super) struct Share {
    pub(super) key: Key,
    pub(super) spent_us: u64,
    pub(super) whole_us: u64,
}

/// Lets what has added up travel together: in each call whatever came while the last was under way.
pub struct Sharing {
    shares: mpsc::Receiver<Share>,
    inner: Arc<Inner>,
    /// Whether the cache Redis has answered last.
    answered: bool,
}

impl fmt::Debug for Sharing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sharing").finish_non_exhaustive()
    }
}

impl Sharing {
    pub(super) fn new(shares: mpsc::Receiver<Share>, inner: Arc<Inner>) -> Self {
        Self {
            shares,
            inner,
            answered: true,
        }
    }

    /// Shares until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        if !self.inner.cache.is_configured() {
            tracing::warn!("CACHE_REDIS_URL is not set: each node counts limits alone");
            self.inner.metrics.alone.set(1);
        }
        let mut batch = Vec::with_capacity(CALL_MAX);
        while let Some(1..) = stop
            .run_until_cancelled(self.shares.recv_many(&mut batch, CALL_MAX))
            .await
        {
            let spent: Vec<_> = batch.iter().map(spent).collect();
            let answer = self.inner.cache.spend(&spent).await;
            self.hear(answer.is_some());
            match answer {
                Some(gone) => {
                    for (share, gone_us) in batch.drain(..).zip(gone) {
                        self.inner.table.learn(&share, gone_us);
                    }
                }
                None => batch
                    .drain(..)
                    .for_each(|share| self.inner.table.untold(&share)),
            }
        }
        // Without a cache Redis nothing is ever told, but this ends only when it is asked to.
        stop.cancelled().await;
    }

    /// Says once when the cache Redis goes away and when it is back.
    fn hear(&mut self, answered: bool) {
        match (self.answered, answered) {
            (true, false) => tracing::warn!(
                "the cache Redis does not answer: each node counts limits alone until it does"
            ),
            (false, true) => tracing::info!("the cache Redis is back: nodes count limits together"),
            _ => {}
        }
        self.answered = answered;
        self.inner.metrics.alone.set((!answered).into());
    }
}

fn spent(share: &Share) -> Spent {
    Spent {
        key: share.name(),
        spent_us: share.spent_us,
        whole_us: share.whole_us,
    }
}
