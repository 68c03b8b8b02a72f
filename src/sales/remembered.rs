//! Answers of PostgreSQL that hold for a second, so that a crowd that asks the same costs it a
//! question a second.

use std::{
    collections::HashMap,
    future::Future,
    hash::Hash,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::store::StoreError;

/// How long an answer holds: what another node changes shows up so late at most.
pub(super) const FRESH: Duration = Duration::from_secs(1);

/// How often a question is asked again because the answer was overtaken.
const TRIES: usize = 3;

/// Answers in memory.
const ANSWERS_MAX: usize = 16_384;

/// The instant at which answers had to be fresh.
#[derive(Clone, Copy, Debug)]
pub(super) struct Since(Instant);

impl Since {
    fn includes(self, asked_at: Instant) -> bool {
        asked_at + FRESH > self.0
    }
}

/// What is known of some keys, and since when.
#[derive(Debug)]
pub(super) struct Remembered<K, V> {
    known: Mutex<HashMap<K, (Instant, V)>>,
    /// How often something was forgotten: what was asked before that is not kept after it.
    forgotten: AtomicU64,
    /// One asks, the others wait for what it learns.
    turn: tokio::sync::Mutex<()>,
}

impl<K, V> Default for Remembered<K, V> {
    fn default() -> Self {
        Self {
            known: Mutex::default(),
            forgotten: AtomicU64::new(0),
            turn: tokio::sync::Mutex::default(),
        }
    }
}

impl<K: Copy + Eq + Hash, V: Clone + Default> Remembered<K, V> {
    /// Makes sure that what is known of `keys` was fresh when this was called; `ask` is asked about
    /// the others. What it does not mention is the default. Gives since when answers are fresh.
    pub(super) async fn learn<F>(
        &self,
        keys: &[K],
        ask: impl Fn(Vec<K>) -> F,
    ) -> Result<Since, StoreError>
    where
        F: Future<Output = Result<HashMap<K, V>, StoreError>>,
    {
        let since = Since(Instant::now());
        if self.unknown(keys, since).is_empty() {
            return Ok(since);
        }
        let _turn = self.turn.lock().await;
        for _ in 0..TRIES {
            let unknown = self.unknown(keys, since);
            if unknown.is_empty() {
                break;
            }
            let forgotten = self.forgotten.load(Ordering::Acquire);
            let asked_at = Instant::now();
            let found = ask(unknown.clone()).await?;
            let mut known = self.lock();
            if self.forgotten.load(Ordering::Acquire) != forgotten {
                continue;
            }
            if known.len() + unknown.len() > ANSWERS_MAX {
                known.clear();
            }
            for key in unknown {
                // One may be there twice.
                let answer = found.get(&key).cloned().unwrap_or_default();
                known.insert(key, (asked_at, answer));
            }
        }
        Ok(since)
    }

    /// What was known last, however long ago.
    pub(super) fn get(&self, key: K) -> Option<V> {
        self.lock().get(&key).map(|(_, value)| value.clone())
    }

    /// What is known, if it was fresh then.
    pub(super) fn fresh(&self, key: K, since: Since) -> Option<V> {
        let known = self.lock();
        let (asked_at, value) = known.get(&key)?;
        since.includes(*asked_at).then(|| value.clone())
    }

    /// It has changed: whoever asks from now on learns it anew.
    pub(super) fn forget(&self, key: K) {
        let mut known = self.lock();
        self.forgotten.fetch_add(1, Ordering::Release);
        known.remove(&key);
    }

    fn unknown(&self, keys: &[K], since: Since) -> Vec<K> {
        let known = self.lock();
        let fresh = |key: &K| {
            let answer = known.get(key);
            answer.is_some_and(|(asked_at, _)| since.includes(*asked_at))
        };
        keys.iter().filter(|key| !fresh(key)).copied().collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<K, (Instant, V)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
