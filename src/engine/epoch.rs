//! Looking at a partition before it may sell, and beginning an epoch: `inspect.lua`,
//! `install.lua`. Only recovery uses these.

use std::time::Instant;

use bytes::Bytes;

use super::{Engine, Shared, error::EngineError, packed::Unpack, reply::Reply};
use crate::domain::{
    id::RoundId,
    id::{Epoch, JournalId},
};

/// What a partition says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspection {
    /// The timeline in Redis; `None` when the partition never was, or is lost.
    pub epoch: Option<Epoch>,
    /// The number of the last journal entry by Redis' own count.
    pub pseq: u64,
    /// Whether the epoch was installed on this very run of the server.
    pub same_incarnation: bool,
    /// Redis' clock, milliseconds since the Unix epoch; never before what was stamped last.
    pub now_ms: i64,
    /// The same, as the server's clock shows it, whatever was stamped.
    pub clock_ms: i64,
    /// Entries in the journal; `None` when the key is of another type.
    pub journal_length: Option<u64>,
    /// The oldest entry.
    pub journal_first: Option<JournalId>,
    /// The newest entry.
    pub journal_last: Option<JournalId>,
    /// Whether it has been a replica: then it may lack what its primary had answered.
    pub promoted: bool,
    /// Our instant just after the clock was read.
    at: Instant,
    incarnation: String,
    raw_epoch: String,
}

impl Inspection {
    pub(super) fn incarnation(&self) -> &str {
        &self.incarnation
    }

    /// The latest timeline of which Redis has anything.
    pub fn last_epoch(&self) -> Epoch {
        let last = self.journal_last.map(|id| id.epoch);
        self.epoch.max(last).unwrap_or_default()
    }

    pub(super) fn raw_epoch(&self) -> &str {
        &self.raw_epoch
    }
}

/// Why an epoch could not begin.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InstallError {
    /// The partition is not as it was inspected.
    #[error("the partition changed while it was being verified")]
    Changed,
    /// No answer.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

impl Engine {
    /// Reads what a partition says of itself. Works on a fenced partition.
    ///
    /// # Errors
    /// [`EngineError`]; nothing is ever changed. [`EngineError::Refused`] when scripts would be
    /// stopped half-way.
    pub async fn inspect(&self) -> Result<Inspection, EngineError> {
        let Shared { keys, scripts, .. } = &*self.shared;
        let names = vec![keys.meta(), keys.journal()];
        let reply = self
            .operations
            .call(&scripts.inspect, names, vec![])
            .await?;
        // After the answer: an estimate of Redis' clock may be late, never ahead.
        let at = Instant::now();
        let mut reply = Reply::new("inspect", reply);
        let raw_epoch = reply.text()?;
        let stored = reply.text()?;
        let pseq = reply.text()?;
        let _last_ms = reply.text()?;
        let incarnation = reply.text()?;
        let now_ms = reply.number()?;
        let clock_ms = reply.number()?;
        let length: i64 = reply.number()?;
        let (first, last) = (reply.text()?, reply.text()?);
        let promoted = reply.text()? == "1";
        let denied = reply.text()?;
        if !denied.is_empty() {
            return Err(EngineError::denied(&format!(
                "this user may not run {denied}"
            )));
        }
        Ok(Inspection {
            epoch: raw_epoch.parse().ok().map(Epoch),
            pseq: pseq.parse().unwrap_or(0),
            same_incarnation: stored == incarnation,
            now_ms,
            clock_ms,
            journal_length: length.try_into().ok(),
            journal_first: journal_id(&first),
            journal_last: journal_id(&last),
            promoted,
            at,
            incarnation,
            raw_epoch,
        })
    }

    /// Which of these rounds are missing in Redis, or are not whole. Works on a fenced partition,
    /// and says nothing about the partition itself.
    ///
    /// # Errors
    /// [`EngineError`]; nothing is ever changed.
    pub async fn incomplete(
        &self,
        inspection: &Inspection,
        rounds: &[RoundId],
    ) -> Result<Vec<RoundId>, EngineError> {
        let Shared { keys, scripts, .. } = &*self.shared;
        let mut incomplete = Vec::new();
        for round in rounds {
            let names = keys.change(*round);
            let reply = self.operations.call(&scripts.whole, names, vec![]).await?;
            let mut reply = Reply::new("whole", reply);
            let standing = reply.bytes()?;
            let epoch = inspection.epoch.unwrap_or_default();
            if Unpack(&standing)
                .standing(epoch, inspection.now_ms)
                .is_none()
            {
                incomplete.push(*round);
            }
        }
        Ok(incomplete)
    }

    /// Begins `epoch` on the partition as it was inspected. Nothing is let through before
    /// [`Engine::open`].
    ///
    /// # Errors
    /// [`InstallError`]; the partition stays fenced then.
    pub async fn install(
        &self,
        epoch: Epoch,
        inspection: &Inspection,
    ) -> Result<JournalId, InstallError> {
        let Shared { keys, scripts, .. } = &*self.shared;
        let names = vec![keys.meta(), keys.journal()];
        let arguments = vec![
            Bytes::from(epoch.0.to_string()),
            Bytes::from(inspection.raw_epoch.clone()),
            Bytes::from(inspection.pseq.to_string()),
            Bytes::from(inspection.incarnation.clone()),
        ];
        let reply = self
            .operations
            .call(&scripts.install, names, arguments)
            .await?;
        let mut reply = Reply::new("install", reply);
        match reply.text()?.as_str() {
            "ok" => {
                let pseq = reply.number()?;
                Ok(JournalId { epoch, pseq })
            }
            "changed" => Err(InstallError::Changed),
            word => Err(reply.unexpected(word).into()),
        }
    }

    /// Lets purchases through in the epoch that `begun` has begun, which PostgreSQL knows.
    pub fn open(&self, begun: JournalId, inspection: &Inspection) {
        self.shared
            .view
            .open(begun.epoch, begun.pseq, inspection.now_ms, inspection.at);
    }

    /// Takes over how far Redis is, if it is in the timeline that this node sells in; whether it is.
    pub fn learn_floor(&self, inspection: &Inspection) -> bool {
        let at = inspection.epoch.map(|epoch| JournalId {
            epoch,
            pseq: inspection.pseq,
        });
        at.is_some_and(|at| self.shared.view.learn_floor(at))
    }

    /// Lets purchases through in the epoch that another node has installed.
    pub fn adopt(&self, epoch: Epoch, inspection: &Inspection) {
        let pseq = inspection.pseq;
        self.open(JournalId { epoch, pseq }, inspection);
    }
}

/// Reads `<epoch>-<pseq>`.
pub(super) fn journal_id(text: &str) -> Option<JournalId> {
    let (epoch, pseq) = text.split_once('-')?;
    Some(JournalId {
        epoch: Epoch(epoch.parse().ok()?),
        pseq: pseq.parse().ok()?,
    })
}
