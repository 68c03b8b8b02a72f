//! Compares Redis, its journal and PostgreSQL, and says whether every invariant holds.
//!
//! [`Auditor`] looks at one round in full; [`Patrol`] looks at all of them, all the time.

mod compare;
mod judge;
mod patrol;

use std::{sync::Arc, time::Duration};

use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Serialize, Serializer};
use tokio::{
    sync::Semaphore,
    time::{Instant, sleep},
};
use utoipa::ToSchema;

pub(super) use self::patrol::kept_run;
pub use self::{
    compare::OrdersHash,
    judge::{
        Check, CheckName, Journal, Pair, Sides, Status, judge, judge_counters, judge_journal,
        level, verdict,
    },
    patrol::Patrol,
};
use crate::{
    clock,
    domain::{
        id::{Partition, RoundId, SaleId},
        round::Intent,
    },
    engine::{Engine, EngineError, Engines},
    store::{
        Database, StoreError,
        audit::{RoundSums, Snapshot},
        journal::Positions,
        sales::{SaleFacts, Sales},
    },
};

/// Looks in full at the same time: each has a connection to PostgreSQL, which others need too.
const LOOKS_MAX: usize = 2;
/// Looks at a round whose last entry is just being stored, and the pause between two of them.
const TRIES_MAX: u32 = 8;
/// A commit of the writer takes a few of these at most.
const TRY_AGAIN: Duration = Duration::from_millis(40);
/// An audit that has taken this long says what it has.
const PATIENCE: Duration = Duration::from_secs(1);

/// What came of auditing a round.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct RoundReport {
    /// The sale.
    #[schema(value_type = uuid::Uuid)]
    pub sale_id: SaleId,
    /// Which of its rounds: 1, 2, 3 ….
    #[schema(example = 1)]
    pub round: u32,
    /// The worst of all checks.
    pub verdict: Status,
    /// When the stores were read.
    #[serde(serialize_with = "to_the_millisecond")]
    #[schema(value_type = String, format = DateTime, example = "2026-11-21T10:00:00.000Z")]
    pub checked_at: DateTime<Utc>,
    /// Every check with both numbers.
    pub checks: Vec<Check>,
}

/// Why there is no verdict.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// PostgreSQL does not answer.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Redis does not answer, or is fenced.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// This process has no engine of the partition.
    #[error("partition {0} is not served here")]
    Elsewhere(Partition),
}

/// Audits rounds. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Auditor {
    database: Database,
    positions: Positions,
    sales: Sales,
    engines: Engines,
    looks: Arc<Semaphore>,
}

/// Everything that a full look at a round saw.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    /// What came of it.
    pub(super) report: RoundReport,
    /// What PostgreSQL has.
    pub(super) sums: RoundSums,
    /// The hash over all orders of PostgreSQL; `None` when nobody read them.
    pub(super) orders: Option<String>,
    /// The timelines of the round.
    pub(super) epochs: Vec<u32>,
    /// Something that PostgreSQL has and Redis lacks, proved: selling on could oversell.
    pub(super) lacking: Option<String>,
    /// How long it took, milliseconds.
    pub(super) took_ms: i64,
}

/// Which round, and where it lives.
#[derive(Clone, Copy, Debug)]
pub(super) struct Subject {
    pub(super) sale: SaleId,
    pub(super) partition: Partition,
    pub(super) round: RoundId,
}

impl Auditor {
    /// An auditor of the rounds of these stores.
    pub fn new(database: Database, engines: Engines) -> Self {
        Self {
            positions: Positions::new(database.clone()),
            sales: Sales::new(database.clone()),
            database,
            engines,
            looks: Arc::new(Semaphore::new(LOOKS_MAX)),
        }
    }

    /// Audits a round of a sale, the current one when `round` is `None`. `None` when there is no
    /// such sale or round.
    ///
    /// # Errors
    /// [`AuditError`]: no store, no verdict.
    pub async fn sale(
        &self,
        sale: SaleId,
        round: Option<u32>,
    ) -> Result<Option<RoundReport>, AuditError> {
        let Some(sale) = self.sales.by_id(sale).await? else {
            return Ok(None);
        };
        let mut facts = sale.facts;
        if let Some(now_ms) = self.engine(facts.partition)?.redis_ms() {
            facts = facts.at(now_ms);
        }
        self.round(&facts, round.unwrap_or(facts.round)).await
    }

    /// Audits a round. Looks again, for about a second, while its last entry is being stored.
    /// `None` when there is no such round.
    ///
    /// # Errors
    /// [`AuditError`]: no store, no verdict.
    pub async fn round(
        &self,
        sale: &SaleFacts,
        round: u32,
    ) -> Result<Option<RoundReport>, AuditError> {
        let subject = Subject {
            sale: sale.id,
            partition: sale.partition,
            round: RoundId {
                sale: sale.number,
                round,
            },
        };
        Ok(self.watch(subject).await?.map(|seen| seen.report))
    }

    /// Looks until there is a verdict, for about a second.
    pub(super) async fn watch(&self, subject: Subject) -> Result<Option<Seen>, AuditError> {
        let begun = Instant::now();
        let mut tries = 1;
        loop {
            let seen = self.look(subject).await?;
            let pending = seen
                .as_ref()
                .is_some_and(|seen| seen.report.verdict == Status::Pending);
            if !pending || tries == TRIES_MAX || begun.elapsed() >= PATIENCE {
                return Ok(seen);
            }
            tries += 1;
            sleep(TRY_AGAIN).await;
        }
    }

    /// Looks at a round once, in full.
    async fn look(&self, subject: Subject) -> Result<Option<Seen>, AuditError> {
        // The semaphore is never closed.
        let Ok(turn) = Arc::clone(&self.looks).acquire_owned().await else {
            return Ok(None);
        };
        let this = self.clone();
        // To its end, whoever waits for it: it has a snapshot open.
        let looking = tokio::spawn(async move {
            let _turn = turn;
            this.compare(subject).await
        });
        match looking.await {
            Ok(seen) => seen,
            // Nobody aborts the task, so it panicked; the panic goes on where it is awaited.
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    /// Reads PostgreSQL as of one instant, then Redis, and judges.
    async fn compare(&self, subject: Subject) -> Result<Option<Seen>, AuditError> {
        let Subject {
            sale,
            partition,
            round,
        } = subject;
        let begun = Instant::now();
        let engine = self.engine(partition)?;
        let checked_at = clock::now();
        let mut snapshot = Snapshot::take(&self.database).await?;
        let Some(sums) = snapshot.round(round).await? else {
            return Ok(None);
        };
        let mut redis = engine.audit(round).await?;
        let mut sides = Sides::Unread;
        let mut orders = None;
        let archived = matches!(&redis.keys, Ok(keys) if keys.standing.intent == Intent::Archived);
        if level(&redis, &sums.stored()) {
            let mut hash = OrdersHash::default();
            sides = if archived {
                compare::read_stored(&mut snapshot, round, &mut hash).await?;
                Sides::Archived
            } else {
                compare::read_both(&mut snapshot, engine, round, &sums, &mut hash).await?
            };
            orders = Some(hash.digest());
            // If the round has not moved since the snapshot, it had not while it was compared.
            redis = engine.audit(round).await?;
        }
        let epochs = snapshot.epochs(round).await?;
        drop(snapshot);
        let mut checks = judge(&redis, &sums, &sides, orders.as_deref());
        checks.extend(self.journal(engine).await?);
        let lacking = match sides {
            Sides::Read { lacking, .. } if level(&redis, &sums.stored()) => lacking,
            _ => None,
        };
        Ok(Some(Seen {
            report: RoundReport {
                sale_id: sale,
                round: round.round,
                verdict: verdict(&checks),
                checked_at,
                checks,
            },
            sums,
            orders,
            epochs,
            lacking,
            took_ms: i64::try_from(begun.elapsed().as_millis()).unwrap_or(i64::MAX),
        }))
    }

    /// The checks of a partition: Redis is read between two looks at the position.
    async fn journal(&self, engine: &Engine) -> Result<Vec<Check>, AuditError> {
        let before = self.positions.of(engine.partition()).await?;
        let inspection = engine.inspect().await?;
        let after = self.positions.of(engine.partition()).await?;
        Ok(judge_journal(&Journal {
            before,
            after,
            epoch: inspection.epoch.unwrap_or_default(),
            pseq: inspection.pseq,
            length: inspection.journal_length,
            first: inspection.journal_first,
            last: inspection.journal_last,
            danger: engine.settings().danger(),
        }))
    }

    fn engine(&self, partition: Partition) -> Result<&Engine, AuditError> {
        self.engines
            .of(partition)
            .ok_or(AuditError::Elsewhere(partition))
    }
}

/// As the API writes instants: RFC 3339, three decimals, `Z`.
fn to_the_millisecond<S: Serializer>(at: &DateTime<Utc>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&at.to_rfc3339_opts(SecondsFormat::Millis, true))
}
