//! The journal of a partition, as the writer reads it.

use crate::domain::{
    id::{Epoch, JournalId, RoundId},
    journal::Entry,
    round::Counters,
};

/// Reads the journal of one partition.
#[derive(Debug)]
pub struct JournalReader {
    entries: tokio::sync::watch::Receiver<Result<Vec<RawEntry>, JournalError>>,
}

impl JournalReader {
    /// Reads what the other side has put there.
    pub fn new(entries: tokio::sync::watch::Receiver<Result<Vec<RawEntry>, JournalError>>) -> Self {
        Self { entries }
    }

    /// Entries after `after`, at most `entries_max`, read in one script that also checks that
    /// Redis is in `epoch` and is the server that epoch was installed on.
    pub async fn read(
        &self,
        epoch: Epoch,
        after: u64,
        entries_max: usize,
    ) -> Result<Vec<RawEntry>, JournalError> {
        let all = self.entries.borrow().clone()?;
        if let Some(last) = all.last().filter(|last| last.id.epoch != epoch) {
            return Err(JournalError::Fenced(format!(
                "Redis is in epoch {}",
                last.id.epoch.0
            )));
        }
        Ok(all
            .into_iter()
            .filter(|entry| entry.id.pseq > after)
            .take(entries_max)
            .collect())
    }

    /// Returns when there is an entry after `after`, or after about a second.
    pub async fn wait(&self, after: JournalId) -> Result<(), JournalError> {
        let there = self.entries.clone();
        let mut there = there;
        let arrived = there.wait_for(|entries| {
            entries.as_ref().map_or(true, |all| {
                all.iter().any(|entry| entry.id.pseq > after.pseq)
            })
        });
        let _ = tokio::time::timeout(std::time::Duration::from_secs(1), arrived).await;
        Ok(())
    }
}

/// One entry as it stood in Redis.
#[derive(Clone, Debug)]
pub struct RawEntry {
    /// Its place.
    pub id: JournalId,
    /// When, milliseconds since the Unix epoch by Redis' clock.
    pub at_ms: Option<i64>,
    /// The counters of every round that it touched, after it; `None` when unreadable.
    pub rounds: Option<Vec<(RoundId, Counters)>>,
    /// What it says.
    pub entry: Result<Entry, EntryError>,
    /// Its bytes.
    pub payload: Vec<u8>,
}

/// Why an entry cannot be read.
#[derive(Clone, Debug, thiserror::Error)]
pub enum EntryError {
    /// From another build.
    #[error("unknown version {0}")]
    UnknownVersion(u8),
    /// Not an entry.
    #[error("malformed: {0}")]
    Malformed(String),
}

/// Why the journal cannot be read.
#[derive(Clone, Debug, thiserror::Error)]
pub enum JournalError {
    /// Redis is in another epoch, or lost it: nothing may be inserted from it.
    #[error("fenced: {0}")]
    Fenced(String),
    /// The entries after the position are gone.
    #[error("the oldest entry left is {oldest}")]
    Missing {
        /// The oldest entry that is left.
        oldest: u64,
    },
    /// Redis is away.
    #[error("Redis is unavailable: {0}")]
    Unavailable(String),
}
