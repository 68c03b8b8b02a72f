//! Acceptances that are told only once PostgreSQL has them: the durability `committed`.
//!
//! However many wait, one of them at a time asks PostgreSQL how far it is, and all learn from it.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    select,
    sync::{Mutex, watch},
    time::timeout,
};

use super::SaleError;
use crate::{
    domain::{
        durability::Lack,
        id::{JournalId, Partition},
        limits::{COMMIT_WAIT_MS, WRITER_STALL_MS},
        order::Order,
    },
    engine::{Engine, EngineError},
    faults,
    store::{
        journal::{Positions, Progress},
        orders::Orders,
    },
    writer::StoredPosition,
};

/// How long an acceptance waits.
const WAIT: Duration = Duration::from_millis(COMMIT_WAIT_MS);
/// How long PostgreSQL may be behind without moving.
const STALL: Duration = Duration::from_millis(WRITER_STALL_MS);
/// A look that is older says too little about whether to let a purchase in.
const FRESH: Duration = Duration::from_millis(500);
/// How long PostgreSQL may take to say how far it is.
const LOOK: Duration = Duration::from_secs(1);
/// The time between two looks, when no writer of this process says that there is something to see.
const PACE: Duration = Duration::from_millis(20);

/// Waits for PostgreSQL, for all partitions.
#[derive(Clone, Debug)]
pub struct Commits {
    positions: Positions,
    orders: Orders,
    /// Why a commit would not survive a power loss, if it would not.
    keeps: watch::Receiver<Result<(), Lack>>,
    partitions: Arc<HashMap<Partition, Watched>>,
}

#[derive(Debug)]
struct Watched {
    seen: watch::Sender<Seen>,
    /// Who looks at the moment.
    looking: Mutex<()>,
    /// What a writer of this process says.
    writer: Option<StoredPosition>,
}

/// What was seen of PostgreSQL.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    progress: Progress,
    /// When; `None` before the first look, and when the last one failed.
    at: Option<Instant>,
    /// Since when it is behind and has not moved.
    behind_since: Option<Instant>,
}

/// What is known about an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// PostgreSQL has it.
    Stored,
    /// Not yet.
    Pending,
    /// The position does not say: only the row does.
    Doubtful,
}

impl Seen {
    /// Takes a look into account, made at `at`, when Redis was known to have come to `end`.
    fn learn(&mut self, progress: Progress, end: JournalId, at: Instant) {
        let moved = progress.stored != self.progress.stored;
        self.behind_since = match self.behind_since {
            _ if progress.stored >= end => None,
            Some(since) if !moved => Some(since),
            _ => Some(at),
        };
        self.progress = progress;
        self.at = Some(at);
    }

    fn fresh(&self, now: Instant) -> bool {
        self.at
            .is_some_and(|at| now.saturating_duration_since(at) < FRESH)
    }

    /// Whether nothing has been stored for too long although there is something to store.
    fn stalled(&self, now: Instant) -> bool {
        let since = self
            .behind_since
            .filter(|_| !faults::bug("stall_not_noticed"));
        since.is_some_and(|since| now.saturating_duration_since(since) >= STALL)
    }
}

/// Whether PostgreSQL has what the entry `at` accepted.
fn verdict(progress: &Progress, at: JournalId) -> Verdict {
    let Progress { stored, dead } = *progress;
    if stored < at {
        return Verdict::Pending;
    }
    // A position of a newer epoch proves nothing about an older one: that may have lost its end.
    // Neither does one behind a dead letter: the order may be it.
    let same = stored.epoch == at.epoch || faults::bug("newer_epoch_believed");
    let alive = dead.is_none_or(|dead| dead < at.pseq) || faults::bug("dead_letter_believed");
    if same && alive {
        Verdict::Stored
    } else {
        Verdict::Doubtful
    }
}

impl Commits {
    /// For these partitions, with what the writers of this process say of theirs.
    pub fn new(
        positions: Positions,
        orders: Orders,
        keeps: watch::Receiver<Result<(), Lack>>,
        partitions: impl IntoIterator<Item = (Partition, Option<StoredPosition>)>,
    ) -> Self {
        let watched = |(partition, writer)| {
            let watched = Watched {
                seen: watch::Sender::default(),
                looking: Mutex::default(),
                writer,
            };
            (partition, watched)
        };
        Self {
            positions,
            orders,
            keeps,
            partitions: Arc::new(partitions.into_iter().map(watched).collect()),
        }
    }

    fn watched(&self, partition: Partition) -> Result<&Watched, SaleError> {
        self.partitions
            .get(&partition)
            .ok_or(SaleError::Engine(EngineError::Disconnected))
    }

    /// Whether what PostgreSQL commits survives a power loss.
    ///
    /// # Errors
    /// [`Lack`]
    pub(super) fn kept(&self) -> Result<(), Lack> {
        match &*self.keeps.borrow() {
            Err(_) if faults::bug("lack_ignored") => Ok(()),
            kept => kept.clone(),
        }
    }

    /// Lets a purchase in, if PostgreSQL stores what is accepted, and keeps it.
    ///
    /// # Errors
    /// [`SaleError::Lack`], [`SaleError::Behind`]; nothing was done.
    pub(super) async fn admit(&self, engine: &Engine) -> Result<(), SaleError> {
        self.kept()?;
        let watched = self.watched(engine.partition())?;
        if !watched.seen.borrow().fresh(Instant::now()) {
            let looking = match watched.looking.try_lock() {
                Ok(looking) => looking,
                // The last look failed, and the next is under way: a crowd does not wait for it.
                Err(_) if watched.failed() => return Err(SaleError::Behind),
                Err(_) => timeout(LOOK, watched.looking.lock())
                    .await
                    .map_err(|_| SaleError::Behind)?,
            };
            // Whoever looked while we waited looked for us, too.
            if !watched.seen.borrow().fresh(Instant::now()) {
                self.look(watched, engine).await;
            }
            drop(looking);
        }
        let seen = *watched.seen.borrow();
        if seen.at.is_none() || seen.stalled(Instant::now()) {
            return Err(SaleError::Behind);
        }
        Ok(())
    }

    /// Returns once PostgreSQL has the acceptance of an order.
    ///
    /// # Errors
    /// [`SaleError::NotStored`]: it is accepted, and may still be lost.
    pub(super) async fn wait(&self, engine: &Engine, order: &Order) -> Result<(), SaleError> {
        if faults::bug("committed_does_not_wait") {
            return Ok(());
        }
        let waited = timeout(WAIT, self.stored(engine, order)).await;
        waited.unwrap_or(Err(SaleError::NotStored))
    }

    async fn stored(&self, engine: &Engine, order: &Order) -> Result<(), SaleError> {
        let at = JournalId {
            epoch: order.epoch,
            pseq: order.pseq,
        };
        let watched = self.watched(engine.partition())?;
        let mut seen = watched.seen.subscribe();
        loop {
            let progress = seen.borrow_and_update().progress;
            match verdict(&progress, at) {
                Verdict::Stored => return Ok(()),
                Verdict::Pending => {}
                Verdict::Doubtful => return self.look_up(order).await,
            }
            select! {
                _ = seen.changed() => {}
                _looking = watched.looking.lock() => {
                    watched.pace(at).await;
                    self.look(watched, engine).await;
                }
            }
        }
    }

    /// Asks for the row of an order: the same acceptance, not one that came after it.
    async fn look_up(&self, order: &Order) -> Result<(), SaleError> {
        let row = self.orders.by_id(order.id).await;
        let place = |order: &Order| (order.epoch, order.pseq, order.seq);
        match row {
            Ok(Some(row)) if place(&row) == place(order) => Ok(()),
            Ok(_) | Err(_) => Err(SaleError::NotStored),
        }
    }

    /// Asks PostgreSQL how far it is. Only for the one who looks.
    async fn look(&self, watched: &Watched, engine: &Engine) {
        // Before: what comes meanwhile is not missing yet.
        let end = engine.floor();
        let progress = timeout(LOOK, self.positions.progress(engine.partition())).await;
        watched.seen.send_if_modified(|seen| match progress {
            Ok(Ok(progress)) => {
                let changed = seen.progress != progress;
                seen.learn(progress, end, Instant::now());
                changed
            }
            Ok(Err(_)) | Err(_) => {
                seen.at = None;
                false
            }
        });
    }
}

impl Watched {
    /// Whether the last look failed. Before the first, nothing has.
    fn failed(&self) -> bool {
        let seen = self.seen.borrow();
        seen.at.is_none() && seen.progress != Progress::default()
    }

    /// Waits until there may be something to see: not for long, because another writer than that of
    /// this process may be the one at work.
    async fn pace(&self, at: JournalId) {
        let told = async {
            let writer = self.writer.clone().filter(|_| !self.failed());
            if let Some(mut writer) = writer
                && writer.reached(at).await
            {
                return;
            }
            std::future::pending::<()>().await;
        };
        let _ = timeout(PACE, told).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::id::Epoch;

    fn id(epoch: u32, pseq: u64) -> JournalId {
        JournalId {
            epoch: Epoch(epoch),
            pseq,
        }
    }

    fn progress(epoch: u32, pseq: u64, dead: Option<u64>) -> Progress {
        Progress {
            stored: id(epoch, pseq),
            dead,
        }
    }

    #[test]
    fn only_a_position_of_the_same_epoch_proves_that_an_entry_is_stored() {
        for (stored, at, expected) in [
            (progress(2, 9, None), id(2, 9), Verdict::Stored),
            (progress(2, 9, None), id(2, 10), Verdict::Pending),
            (progress(2, 9, None), id(2, 1), Verdict::Stored),
            // What is before the end of an older epoch may be lost all the same.
            (progress(2, 9, None), id(1, 1), Verdict::Doubtful),
            (progress(2, 9, None), id(1, 20), Verdict::Doubtful),
            (progress(2, 9, None), id(3, 1), Verdict::Pending),
            // A dead letter before it is not the order, one at or after it may be.
            (progress(2, 9, Some(4)), id(2, 5), Verdict::Stored),
            (progress(2, 9, Some(5)), id(2, 5), Verdict::Doubtful),
            (progress(2, 9, Some(7)), id(2, 5), Verdict::Doubtful),
        ] {
            assert_eq!(verdict(&stored, at), expected, "{stored:?} {at}");
        }
    }

    #[test]
    fn a_writer_is_stalled_when_it_is_behind_and_has_not_moved() {
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        let mut seen = Seen::default();
        assert!(!seen.fresh(start));
        seen.learn(progress(1, 5, None), id(1, 5), start);
        assert!(seen.fresh(after(499)) && !seen.fresh(after(500)));
        assert!(!seen.stalled(after(60_000)), "there was nothing to store");
        // Behind only since this look, however long nobody looked.
        seen.learn(progress(1, 5, None), id(1, 6), after(60_000));
        assert!(!seen.stalled(after(61_999)) && seen.stalled(after(62_000)));
        seen.learn(progress(1, 5, None), id(1, 7), after(61_500));
        assert!(seen.stalled(after(62_000)), "still at the same entry");
        seen.learn(progress(1, 6, None), id(1, 7), after(62_000));
        assert!(!seen.stalled(after(63_999)), "it moves");
        seen.learn(progress(1, 7, None), id(1, 7), after(63_000));
        assert!(!seen.stalled(after(70_000)));
    }
}
