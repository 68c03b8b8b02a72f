//! Drains the journal of a partition into PostgreSQL.
//!
//! Entries and position are stored in one transaction, so that each entry takes effect once
//! whatever dies when. When something is not as it must be, the writer stops the partition,
//! says so, and tries again slowly: it never skips an entry and never overwrites a row.

mod apply;
mod fold;
mod redrive;

use std::{collections::VecDeque, mem, time::Duration};

use rand::Rng;
use tokio::{
    select,
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use self::apply::{Applied, apply};
pub use self::redrive::{Redriven, redrive};
use crate::{
    domain::id::{Epoch, JournalId, OrderId, Partition, RoundId},
    engine::{JournalError, JournalReader, RawEntry},
    store::journal::{Ledger, Position},
};

/// Entries that one script call reads: at 128 orders each about 1.4 MB, so that reading keeps the
/// purchases waiting no longer than one of their own calls does.
const ENTRIES_MAX: usize = 128;
/// Orders in one transaction: it stays far below the statement timeout, and a larger one is hardly
/// cheaper per order.
const ORDERS_MAX: usize = 10_000;
/// How long a transaction may take before the connection counts as dead.
const BATCH_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the writer lets entries gather after a small batch, because a commit costs the same
/// for one order as for a hundred.
const GATHER: Duration = Duration::from_millis(10);
/// A batch with this many entries is not small.
const SMALL_BATCH: usize = 64;
/// How long a writer that is told to stop goes on draining.
const DRAIN: Duration = Duration::from_secs(5);
/// The first and the longest pause before the next attempt while a service is away.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// The pause while something is wrong that time does not heal.
const RETRY_SLOWLY: Duration = Duration::from_secs(3);

/// Why a partition is not drained.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Halt {
    /// PostgreSQL is away, too slow, full, or has not the schema of this build.
    #[error("{0}")]
    Store(String),
    /// Redis is away.
    #[error("Redis is unavailable: {0}")]
    Redis(String),
    /// Redis is not in the epoch of the position, or not the server that began it.
    #[error("the journal is fenced: {0}")]
    Fenced(String),
    /// The entries after the position are gone from the journal.
    #[error("entries after {position} are missing, the oldest one left is {oldest}")]
    Missing {
        /// Up to where PostgreSQL has the journal.
        position: JournalId,
        /// The oldest entry in Redis.
        oldest: u64,
    },
    /// An entry does not have the number that comes next.
    #[error("entry {found} does not follow {position}")]
    Gap {
        /// The entry before.
        position: JournalId,
        /// The entry.
        found: JournalId,
    },
    /// An entry was written by a build that this one does not understand.
    #[error("entry {entry} has the unknown version {version}")]
    UnknownVersion {
        /// The entry.
        entry: JournalId,
        /// Its version.
        version: u8,
    },
    /// An entry that cannot be read and does not say what it was about.
    #[error("entry {entry} cannot be read: {reason}")]
    Unreadable {
        /// The entry.
        entry: JournalId,
        /// Why not.
        reason: String,
    },
    /// The counters of a round did not move as the entry's orders and events say.
    #[error("entry {entry} is wrong about round {round}: {detail}")]
    Step {
        /// The entry.
        entry: JournalId,
        /// The round.
        round: RoundId,
        /// What is wrong.
        detail: String,
    },
    /// A round that PostgreSQL does not have.
    #[error("entry {entry} is about round {round}, which PostgreSQL does not have")]
    UnknownRound {
        /// The entry.
        entry: JournalId,
        /// The round.
        round: RoundId,
    },
    /// An event of an order that was never stored.
    #[error("entry {entry} changes order {order}, which PostgreSQL does not have")]
    UnknownOrder {
        /// The entry.
        entry: JournalId,
        /// The order.
        order: OrderId,
    },
    /// Something else is stored under an id or a seq of the journal.
    #[error("the journal contradicts PostgreSQL: {0}")]
    Conflict(String),
    /// So many rows in a row are refused that the schema is wrong, not the rows.
    #[error("too many dead letters in a row, the last one: {last}")]
    TooManyDead {
        /// Why the last of them was refused.
        last: String,
    },
    /// PostgreSQL refuses the batch, but none of its rows by itself.
    #[error("PostgreSQL refuses the batch: {0}")]
    Refused(String),
}

impl Halt {
    /// Whether it goes away once a service is back.
    pub fn passing(&self) -> bool {
        matches!(self, Self::Store(_) | Self::Redis(_) | Self::Fenced(_))
    }
}

/// What a writer is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// It has not learnt its position yet.
    #[default]
    Starting,
    /// It drains.
    Running,
    /// Everything is drained.
    Waiting,
    /// It cannot go on, and tries again.
    Halted(Halt),
    /// It was told to stop, and did.
    Stopped,
}

/// How a writer is doing.
#[derive(Clone, Debug, Default)]
pub struct WriterStatus {
    /// What it is doing.
    pub state: State,
    /// Up to where PostgreSQL has the journal.
    pub position: JournalId,
    /// Entries of the journal that are not stored, as of the last look at it.
    pub lag_entries: u64,
    /// When the oldest entry that is not stored was written, milliseconds since the Unix epoch by Redis' clock.
    pub oldest_at_ms: Option<i64>,
    /// When it last committed.
    pub last_commit: Option<Instant>,
    /// Transactions since the process started.
    pub batches_total: u64,
    /// Orders stored since the process started.
    pub orders_total: u64,
    /// Dead letters since the process started.
    pub letters_total: u64,
}

impl WriterStatus {
    /// The age of the oldest entry that is not stored, in seconds; 0 when drained.
    pub fn lag_seconds(&self, now_ms: i64) -> f64 {
        let age = self
            .oldest_at_ms
            .map_or(0, |at| now_ms.saturating_sub(at).max(0));
        Duration::from_millis(age.cast_unsigned()).as_secs_f64()
    }
}

/// Up to where PostgreSQL has the journal of a partition, as this process knows it.
#[derive(Clone, Debug)]
pub struct StoredPosition(watch::Receiver<JournalId>);

impl StoredPosition {
    /// Now.
    pub fn get(&self) -> JournalId {
        *self.0.borrow()
    }

    /// Returns once it is certain whether `id` is stored: `false` when the writer stopped before,
    /// or a later epoch has begun, which may have begun without it.
    pub async fn reached(&mut self, id: JournalId) -> bool {
        let passed = |stored: &JournalId| {
            stored.epoch > id.epoch || (stored.epoch == id.epoch && stored.pseq >= id.pseq)
        };
        let reached = self.0.wait_for(passed).await;
        reached.is_ok_and(|stored| stored.epoch == id.epoch)
    }
}

/// The writer of one partition.
#[derive(Debug)]
pub struct Writer {
    ledger: Ledger,
    reader: JournalReader,
    /// What was learnt from PostgreSQL; `None` when it must be learnt anew.
    position: Option<Position>,
    /// The highest epoch ever learnt.
    epoch: Epoch,
    /// Read and not stored.
    pending: VecDeque<RawEntry>,
    /// The last entry that the journal had when it was read.
    last_pseq: u64,
    /// Dead letters in a row at the end of the last batch.
    dead_in_a_row: u32,
    status: watch::Sender<WriterStatus>,
    stored: watch::Sender<JournalId>,
}

enum Turn {
    Stored { small: bool },
    Drained,
    Moved,
}

impl Writer {
    /// A writer that has not begun.
    pub fn new(ledger: Ledger, reader: JournalReader) -> Self {
        Self {
            ledger,
            reader,
            position: None,
            epoch: Epoch::default(),
            pending: VecDeque::new(),
            last_pseq: 0,
            dead_in_a_row: 0,
            status: watch::Sender::default(),
            stored: watch::Sender::default(),
        }
    }

    /// Whose journal it drains.
    pub fn partition(&self) -> Partition {
        self.ledger.partition()
    }

    /// How it is doing, from now on.
    pub fn status(&self) -> watch::Receiver<WriterStatus> {
        self.status.subscribe()
    }

    /// Up to where it has come, from now on.
    pub fn stored(&self) -> StoredPosition {
        StoredPosition(self.stored.subscribe())
    }

    /// Drains until `stop`, then what is left for up to five seconds. `abort` ends it at once; the
    /// transaction under way is then stored whole or not at all.
    pub async fn run(mut self, stop: CancellationToken, abort: CancellationToken) {
        select! {
            biased;
            () = abort.cancelled() => warn!(partition = %self.partition(), "writer aborted"),
            () = self.work(&stop) => info!(
                partition = %self.partition(),
                position = %self.status.borrow().position,
                "writer stopped"
            ),
        }
        self.status
            .send_modify(|status| status.state = State::Stopped);
    }

    async fn work(&mut self, stop: &CancellationToken) {
        let mut failures = 0;
        let mut drain_until = None;
        loop {
            let stopping = stop.is_cancelled();
            if stopping
                && Instant::now() >= *drain_until.get_or_insert_with(|| Instant::now() + DRAIN)
            {
                return;
            }
            let turn = self.turn().await;
            self.report(&turn);
            match turn {
                Ok(Turn::Stored { small }) => {
                    failures = 0;
                    if small && !stopping {
                        pause(GATHER, stop).await;
                    }
                }
                Ok(Turn::Drained) => {
                    failures = 0;
                    if stopping {
                        return;
                    }
                    let after = self
                        .position
                        .map(|position| position.stored)
                        .unwrap_or_default();
                    let waited = select! {
                        waited = self.reader.wait(after) => waited,
                        () = stop.cancelled() => Ok(true),
                    };
                    match waited {
                        Ok(true) => {}
                        // PostgreSQL may have been set back, by a failover or by hand, and nobody
                        // may ever buy again.
                        Ok(false) => self.forget(),
                        // The next read says what is wrong.
                        Err(_) => pause(backoff(0), stop).await,
                    }
                }
                // Another writer is at work: let it.
                Ok(Turn::Moved) => pause(backoff(0), stop).await,
                Err(halt) if stopping => {
                    let partition = self.partition();
                    error!(%partition, %halt, "writer stops before the journal is drained");
                    return;
                }
                Err(halt) => {
                    let delay = if halt.passing() {
                        backoff(failures)
                    } else {
                        slowly()
                    };
                    failures = failures.saturating_add(1);
                    pause(delay, stop).await;
                }
            }
        }
    }

    /// Reads and stores one batch.
    async fn turn(&mut self) -> Result<Turn, Halt> {
        let position = match self.position {
            Some(position) => position,
            None => self.learn().await?,
        };
        if self.pending.is_empty() {
            let page = self
                .reader
                .read(position.epoch, position.stored, ENTRIES_MAX)
                .await
                .map_err(|error| self.unread(error, position.stored))?;
            self.pending = page.entries.into();
            self.last_pseq = page.last_pseq;
            self.show_lag();
        }
        if self.pending.is_empty() {
            return Ok(Turn::Drained);
        }
        let len = batch_len(&self.pending);
        let pending = self.pending.make_contiguous();
        let batch = pending.get(..len).unwrap_or_default();
        // While PostgreSQL works on the last of what was read, Redis can give the next. While it
        // does not work, Redis still says how far behind it is.
        let behind = |last: JournalId| {
            self.last_pseq > last.pseq || matches!(self.status.borrow().state, State::Halted(_))
        };
        let ahead = match pending.last() {
            Some(raw) if len == pending.len() && behind(raw.id) => Some(raw.id),
            _ => None,
        };
        let storing = timeout(
            BATCH_TIMEOUT,
            apply(&mut self.ledger, position, batch, self.dead_in_a_row),
        );
        let reading = async {
            match ahead {
                Some(after) => self
                    .reader
                    .read(position.epoch, after, ENTRIES_MAX)
                    .await
                    .ok(),
                None => None,
            }
        };
        let (applied, next) = tokio::join!(storing, reading);
        let next = next.map(|page| {
            self.last_pseq = page.last_pseq;
            page.entries
        });
        let late = || Halt::Store(format!("no commit within {} s", BATCH_TIMEOUT.as_secs()));
        match applied.map_err(|_| late()).flatten() {
            Ok(Applied::Stored(batch)) => {
                self.pending.drain(..len);
                self.pending.extend(next.into_iter().flatten());
                self.dead_in_a_row = batch.dead_in_a_row;
                self.position = Some(Position {
                    stored: batch.to,
                    ..position
                });
                self.stored.send_replace(batch.to);
                for letter in &batch.letters {
                    error!(
                        partition = %self.partition(),
                        entry = %letter.id,
                        round = %letter.round,
                        seq_from = letter.seq_from,
                        seq_to = letter.seq_to,
                        units = letter.delta.held + letter.delta.sold,
                        reason = letter.error.reason,
                        "dead letter"
                    );
                }
                self.status.send_modify(|status| {
                    status.position = batch.to;
                    status.last_commit = Some(Instant::now());
                    status.batches_total += 1;
                    status.orders_total += batch.orders.len() as u64;
                    status.letters_total += batch.letters.len() as u64;
                });
                self.show_lag();
                Ok(Turn::Stored {
                    small: len < SMALL_BATCH,
                })
            }
            Ok(Applied::Moved) => {
                self.forget();
                Ok(Turn::Moved)
            }
            Err(halt) => {
                self.show_lag();
                if matches!(halt, Halt::Store(_)) {
                    self.ledger.disconnect();
                } else {
                    // Somebody may repair what is wrong, on either side.
                    self.forget();
                }
                Err(halt)
            }
        }
    }

    async fn learn(&mut self) -> Result<Position, Halt> {
        let learnt = timeout(BATCH_TIMEOUT, self.ledger.position(self.epoch)).await;
        let position = match learnt {
            Ok(Ok(position)) => position,
            Ok(Err(error)) => {
                self.ledger.disconnect();
                return Err(error.into());
            }
            Err(_) => {
                self.ledger.disconnect();
                return Err(Halt::Store("no answer".to_owned()));
            }
        };
        self.position = Some(position);
        self.epoch = self.epoch.max(position.epoch);
        self.stored.send_replace(position.stored);
        self.status
            .send_modify(|status| status.position = position.stored);
        Ok(position)
    }

    fn unread(&mut self, error: JournalError, position: JournalId) -> Halt {
        match error {
            JournalError::Fenced(reason) => {
                self.forget();
                Halt::Fenced(reason)
            }
            JournalError::Missing { oldest } => {
                self.forget();
                Halt::Missing { position, oldest }
            }
            JournalError::Unavailable(reason) => Halt::Redis(reason),
        }
    }

    /// What was read and learnt may be no longer so.
    fn forget(&mut self) {
        self.position = None;
        self.pending.clear();
    }

    fn show_lag(&self) {
        self.status.send_modify(|status| {
            status.lag_entries = self.last_pseq.saturating_sub(status.position.pseq);
            status.oldest_at_ms = self.pending.front().and_then(|entry| entry.at_ms);
        });
    }

    /// Shows what came of a turn. Says it aloud only when it is new.
    fn report(&self, turn: &Result<Turn, Halt>) {
        let partition = self.partition();
        let state = match turn {
            Ok(Turn::Stored { .. } | Turn::Moved) => State::Running,
            Ok(Turn::Drained) => State::Waiting,
            Err(halt) => State::Halted(halt.clone()),
        };
        self.status.send_if_modified(|status| {
            match (&status.state, &state) {
                (State::Halted(before), State::Halted(now))
                    if mem::discriminant(before) == mem::discriminant(now) => {}
                (_, State::Halted(halt)) => {
                    let position = status.position;
                    error!(%partition, %position, %halt, "writer halted; it tries again");
                }
                (State::Halted(_), _) => info!(%partition, "writer goes on"),
                _ => {}
            }
            let changed = status.state != state;
            status.state = state;
            changed
        });
    }
}

/// How many of the pending entries go into one transaction: at least one.
fn batch_len(pending: &VecDeque<RawEntry>) -> usize {
    let mut orders = 0;
    let fitting = pending.iter().take_while(|raw| {
        orders += raw.entry.as_ref().map_or(0, |entry| entry.orders.len());
        orders <= ORDERS_MAX
    });
    fitting.count().max(1)
}

/// Twice as long after each failure, up to a bound, and never the same for two writers.
fn backoff(failures: u32) -> Duration {
    let (first, longest) = RETRY;
    let most = first.saturating_mul(1 << failures.min(16)).min(longest);
    most.mul_f64(rand::rng().random_range(0.5..1.0))
}

fn slowly() -> Duration {
    RETRY_SLOWLY.mul_f64(rand::rng().random_range(0.5..1.0))
}

async fn pause(duration: Duration, stop: &CancellationToken) {
    select! {
        () = sleep(duration) => {}
        () = stop.cancelled() => {}
    }
}
