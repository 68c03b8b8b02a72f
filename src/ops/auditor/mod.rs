//! Compares Redis, its journal and PostgreSQL, and says whether every invariant holds.
//!
//! [`Auditor`] looks at one round in full; [`Patrol`] looks at all of them, all the time.

mod judge;
mod patrol;

use std::{collections::VecDeque, fmt::Write, sync::Arc, time::Duration};

use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Serialize, Serializer};
use sha2::{Digest, Sha256};
use tokio::{
    sync::Semaphore,
    time::{Instant, sleep},
};
use utoipa::ToSchema;

pub use self::{
    judge::{Board, Boards, Check, CheckName, Status, judge, judge_counters, level, verdict},
    patrol::Patrol,
};
use crate::{
    clock,
    domain::{
        id::{Partition, RoundId, SaleId},
        order::Order,
    },
    engine::{Engine, EngineError, Engines},
    store::{
        Database, StoreError,
        audit::Snapshot,
        orders::Place,
        sales::{SaleFacts, Sales},
    },
};

/// Looks in full at the same time: each has a connection to PostgreSQL, which others need too.
const LOOKS_MAX: usize = 2;
/// Orders of a page of the leaderboard: half a millisecond of Redis.
const PAGE: usize = 500;
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
    sales: Sales,
    engines: Engines,
    looks: Arc<Semaphore>,
}

/// Which round, and where it lives.
#[derive(Clone, Copy, Debug)]
struct Subject {
    sale: SaleId,
    partition: Partition,
    round: RoundId,
}

impl Auditor {
    /// An auditor of the rounds of these stores.
    pub fn new(database: Database, engines: Engines) -> Self {
        Self {
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
        self.round(&sale.facts, round.unwrap_or(sale.facts.round))
            .await
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
        let begun = Instant::now();
        let mut tries = 1;
        loop {
            let report = self.look(subject).await?;
            let pending = report
                .as_ref()
                .is_some_and(|report| report.verdict == Status::Pending);
            if !pending || tries == TRIES_MAX || begun.elapsed() >= PATIENCE {
                return Ok(report);
            }
            tries += 1;
            sleep(TRY_AGAIN).await;
        }
    }

    /// Looks at a round once, in full.
    async fn look(&self, subject: Subject) -> Result<Option<RoundReport>, AuditError> {
        // The semaphore is never closed.
        let Ok(turn) = Arc::clone(&self.looks).acquire_owned().await else {
            return Ok(None);
        };
        let this = self.clone();
        // To its end, whoever waits for it: it has a snapshot open.
        self.database
            .run(async move |_| {
                let _turn = turn;
                this.compare(subject).await
            })
            .await
    }

    /// Reads PostgreSQL as of one instant, then Redis, and judges.
    async fn compare(&self, subject: Subject) -> Result<Option<RoundReport>, AuditError> {
        let Subject {
            sale,
            partition,
            round,
        } = subject;
        let engine = self.engine(partition)?;
        let checked_at = clock::now();
        let mut snapshot = Snapshot::take(&self.database).await?;
        let Some(sums) = snapshot.round(round).await? else {
            return Ok(None);
        };
        let mut redis = engine.audit(round).await?;
        let mut boards = Boards::Unread;
        if level(&redis, &sums.stored()) {
            boards = read_boards(&mut snapshot, engine, round).await?;
            // If the round has not moved since the snapshot, it had not when the leaderboard was
            // read.
            redis = engine.audit(round).await?;
        }
        let checks = judge(&redis, &sums, &boards);
        Ok(Some(RoundReport {
            sale_id: sale,
            round: round.round,
            verdict: verdict(&checks),
            checked_at,
            checks,
        }))
    }

    fn engine(&self, partition: Partition) -> Result<&Engine, AuditError> {
        self.engines
            .of(partition)
            .ok_or(AuditError::Elsewhere(partition))
    }
}

/// Reads the confirmed orders of both sides, page by page.
async fn read_boards(
    snapshot: &mut Snapshot,
    engine: &Engine,
    round: RoundId,
) -> Result<Boards, AuditError> {
    let (mut redis, mut postgres) = (Side::default(), Side::default());
    let mut places = 0;
    let mut difference = None;
    while !(redis.ended && postgres.ended) {
        if redis.waiting.is_empty() && !redis.ended {
            match engine.leaderboard(round, redis.last.seq, PAGE).await {
                Ok(page) => {
                    let mut seq = redis.last.seq;
                    for order in &page.orders {
                        if order.seq <= seq {
                            let what = format!("seq {} stands behind seq {seq}", order.seq);
                            return Ok(Boards::Damaged(what));
                        }
                        seq = order.seq;
                    }
                    redis.take(page.orders);
                }
                // Redis answers, but what it has is no leaderboard.
                Err(EngineError::Damaged(what) | EngineError::Protocol(what)) => {
                    return Ok(Boards::Damaged(what));
                }
                Err(error) => return Err(error.into()),
            }
        }
        if postgres.waiting.is_empty() && !postgres.ended {
            let limit = i64::try_from(PAGE).unwrap_or(i64::MAX);
            let page = snapshot.confirmed(round, postgres.last, limit).await?;
            postgres.take(page);
        }
        while difference.is_none() && !redis.waiting.is_empty() && !postgres.waiting.is_empty() {
            let pair = (redis.waiting.pop_front(), postgres.waiting.pop_front());
            places += 1;
            difference = differ(places, pair);
        }
        if difference.is_none() {
            // One side is through: what the other still has is too much.
            let longer = if redis.is_through() {
                (None, postgres.waiting.pop_front())
            } else if postgres.is_through() {
                (redis.waiting.pop_front(), None)
            } else {
                (None, None)
            };
            difference = differ(places + 1, longer);
        }
        if difference.is_some() {
            redis.waiting.clear();
            postgres.waiting.clear();
        }
    }
    Ok(Boards::Read {
        redis: redis.board(),
        postgres: postgres.board(),
        difference,
    })
}

/// What differs at a place, if anything does.
fn differ(place: u64, orders: (Option<Order>, Option<Order>)) -> Option<String> {
    let name = |order: Order| format!("order {} with seq {}", order.id, order.seq);
    match orders {
        (Some(redis), Some(postgres)) if redis == postgres => None,
        (Some(redis), Some(postgres)) if redis.id == postgres.id => Some(format!(
            "place {place}: {} is not the same in both",
            name(redis)
        )),
        (Some(redis), Some(postgres)) => Some(format!(
            "place {place}: {} in Redis, {} in PostgreSQL",
            name(redis),
            name(postgres)
        )),
        (Some(redis), None) => Some(format!("place {place}: {} is only in Redis", name(redis))),
        (None, Some(postgres)) => Some(format!(
            "place {place}: {} is only in PostgreSQL",
            name(postgres)
        )),
        (None, None) => None,
    }
}

/// The leaderboard of one side, as far as it has been read.
#[derive(Default)]
struct Side {
    /// Read and not compared: a page at most.
    waiting: VecDeque<Order>,
    last: Place,
    ended: bool,
    orders: u64,
    hash: Sha256,
}

impl Side {
    fn is_through(&self) -> bool {
        self.ended && self.waiting.is_empty()
    }

    fn take(&mut self, page: Vec<Order>) {
        self.ended = page.len() < PAGE;
        if let Some(last) = page.last() {
            self.last = Place {
                epoch: last.epoch,
                seq: last.seq,
            };
        }
        for order in &page {
            self.orders += 1;
            self.hash.update(order.id.0.as_bytes());
            self.hash.update(order.buyer.0.as_bytes());
            for number in [
                u64::from(order.epoch.0),
                order.seq,
                order.pseq,
                order.quantity,
                order.unit_price.amount.cast_unsigned(),
                order.accepted_at_ms.cast_unsigned(),
            ] {
                self.hash.update(number.to_be_bytes());
            }
            self.hash.update(order.unit_price.currency.as_str());
            self.hash.update(order.status.as_str());
            self.hash.update(order.accepted_as.as_str());
            self.hash.update(order.durability.as_str());
            self.hash.update(order.fingerprint.0);
        }
        self.waiting.extend(page);
    }

    fn board(self) -> Board {
        let mut digest = String::new();
        for byte in self.hash.finalize().iter().take(4) {
            // Writing into a string cannot fail.
            let _ = write!(digest, "{byte:02x}");
        }
        Board {
            orders: self.orders,
            digest,
        }
    }
}

/// As the API writes instants: RFC 3339, three decimals, `Z`.
fn to_the_millisecond<S: Serializer>(at: &DateTime<Utc>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&at.to_rfc3339_opts(SecondsFormat::Millis, true))
}
