//! Schedules: which of their windows are rounds, and which were missed.

use chrono::{DateTime, Utc};
use sqlx::{PgConnection, PgPool, Postgres, Transaction};
use uuid::Uuid;

use super::{
    Database, StoreError,
    audit_log::begin,
    rounds::{intent, money, policy, window},
    sales::schedule,
    unreadable,
};
use crate::domain::{
    id::{Partition, SaleId, SaleNumber},
    money::Money,
    round::{Counters, Intent, Terms, Window},
    schedule::Turn,
};

/// When something is to be done for a sale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Due {
    /// Which sale.
    pub sale: SaleNumber,
    /// What it is called in the API.
    pub id: SaleId,
    /// Where it lives: the clock there decides.
    pub partition: Partition,
    /// When, milliseconds since the Unix epoch.
    pub at_ms: i64,
}

/// What was done for a sale.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Planned {
    /// Rounds that were made. Redis does not have them yet.
    pub rounds: usize,
    /// Windows that were noted as missed.
    pub missed: usize,
}

/// What a round of a sale is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Making {
    /// The price of one unit.
    pub unit_price: Money,
    /// Units that it starts with.
    pub allocation: u64,
    /// Units that one buyer may have.
    pub per_buyer_limit: u64,
    /// Units that one order may ask for.
    pub per_order_limit: u64,
}

/// A window that is a round, or passed without one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PastWindow {
    /// When it opens and closes.
    pub window: Window,
    /// Its round, if it has one.
    pub round: Option<StoredRound>,
}

/// A round as PostgreSQL has it: as old as the writer is behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredRound {
    /// 1, 2, 3 ….
    pub round: u32,
    /// What it was made from.
    pub rules: Making,
    /// Whether Redis has it.
    pub provisioned: bool,
    /// Whether a node saw it open, or need not.
    pub opened: bool,
    /// What the operator wants.
    pub intent: Intent,
    /// Where its units are.
    pub counters: Counters,
}

/// A sale whose rounds nobody else makes or changes, until it is dropped. Must not outlive the task
/// that took it: whoever is cancelled in the middle would leave a connection in doubt.
#[derive(Debug)]
pub struct SaleLock {
    transaction: Transaction<'static, Postgres>,
    sale: i32,
    /// The window behind the last round that is made, if the schedule has one.
    pub upcoming: Option<Window>,
}

impl SaleLock {
    /// A round that Redis has, as [`Schedules::round`].
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn round(&mut self, round: u32) -> Result<Option<(Terms, u64)>, StoreError> {
        stored_round(&mut self.transaction, self.sale, round).await
    }

    /// Ends it, and notes that `by` has changed a round: nodes look anew, and so does whoever makes
    /// rounds.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn changed(mut self, by: Uuid, now_ms: i64) -> Result<(), StoreError> {
        sqlx::query!(
            "UPDATE sales
             SET updated_at = now(), updated_by = $2,
                 plan_at = CASE WHEN schedule IS NOT NULL
                                THEN least(plan_at, $3::timestamptz) END
             WHERE number = $1",
            self.sale,
            by,
            instant(now_ms)?
        )
        .execute(&mut *self.transaction)
        .await?;
        self.transaction.commit().await?;
        Ok(())
    }
}

/// The schedules in PostgreSQL.
#[derive(Clone, Debug)]
pub struct Schedules {
    database: Database,
}

impl From<&Terms> for Making {
    fn from(terms: &Terms) -> Self {
        Self {
            unit_price: terms.unit_price,
            allocation: terms.allocation,
            per_buyer_limit: terms.per_buyer_limit,
            per_order_limit: terms.per_order_limit,
        }
    }
}

impl Schedules {
    /// Those in `database`.
    pub fn new(database: Database) -> Self {
        Self { database }
    }

    /// The sales for which something is to be done next, the first first.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn agenda(&self, limit: i64) -> Result<Vec<Due>, StoreError> {
        self.database
            .run(async move |pool| {
                let rows = sqlx::query!(
                    r#"SELECT number, id, partition, plan_at AS "plan_at!" FROM sales
                       WHERE plan_at IS NOT NULL ORDER BY plan_at LIMIT $1"#,
                    limit
                )
                .fetch_all(&pool)
                .await?;
                let due = rows.into_iter().map(|row| Due {
                    sale: SaleNumber(row.number.cast_unsigned()),
                    id: SaleId(row.id),
                    partition: Partition(row.partition.cast_unsigned()),
                    at_ms: row.plan_at.timestamp_millis(),
                });
                Ok(due.collect())
            })
            .await
    }

    /// Does what is to be done for a sale at `now_ms`, if nobody else has: whoever locks the sale's
    /// row first does it.
    ///
    /// # Errors
    /// [`StoreError`]; then nothing was done, or all of it.
    pub async fn plan(&self, sale: SaleNumber, now_ms: i64) -> Result<Planned, StoreError> {
        self.database
            .run(async move |pool| plan(pool, sale.0.cast_signed(), now_ms).await)
            .await
    }

    /// The rules of a round that Redis has, and the last event of it that is stored: rules that an
    /// operator has changed are as old as that.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn round(
        &self,
        sale: SaleNumber,
        round: u32,
    ) -> Result<Option<(Terms, u64)>, StoreError> {
        let sale = sale.0.cast_signed();
        self.database
            .run(async move |pool| {
                let mut connection = pool.acquire().await?;
                stored_round(&mut connection, sale, round).await
            })
            .await
    }

    /// Locks a sale: its rounds are changed one after the other, and none is made meanwhile.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn lock(&self, sale: SaleNumber) -> Result<SaleLock, StoreError> {
        let sale = sale.0.cast_signed();
        self.database
            .run(async move |pool| {
                let mut transaction = begin(&pool).await?;
                let row = sqlx::query!(
                    "SELECT schedule, planned_until, windows_planned FROM sales
                     WHERE number = $1 FOR NO KEY UPDATE",
                    sale
                )
                .fetch_one(&mut *transaction)
                .await?;
                let planned = schedule(row.schedule, row.planned_until, row.windows_planned)?;
                Ok(SaleLock {
                    transaction,
                    sale,
                    upcoming: planned.and_then(|(schedule, progress)| schedule.next(progress)),
                })
            })
            .await
    }

    /// What the next rounds of a sale are made from.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn making(&self, sale: SaleNumber) -> Result<Making, StoreError> {
        self.database
            .run(async move |pool| {
                let row = sqlx::query!(
                    "SELECT price_amount, price_currency, allocation, per_buyer_limit,
                            per_order_limit
                     FROM sales WHERE number = $1",
                    sale.0.cast_signed()
                )
                .fetch_one(&pool)
                .await?;
                Ok(Making {
                    unit_price: money(row.price_amount, &row.price_currency)?,
                    allocation: row.allocation.cast_unsigned(),
                    per_buyer_limit: row.per_buyer_limit.cast_unsigned(),
                    per_order_limit: row.per_order_limit.cast_unsigned(),
                })
            })
            .await
    }

    /// The windows of a sale that are rounds or were missed and that open after an instant, in
    /// order.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn windows(
        &self,
        sale: SaleNumber,
        after_ms: i64,
        limit: i64,
    ) -> Result<Vec<PastWindow>, StoreError> {
        let after = instant(after_ms)?;
        self.database
            .run(async move |pool| {
                sqlx::query!(
                    r#"SELECT opens_at AS "opens_at!", closes_at, round AS "round?",
                              unit_price AS "unit_price?", currency AS "currency?",
                              per_buyer_limit AS "per_buyer_limit?",
                              per_order_limit AS "per_order_limit?", provisioned AS "provisioned?",
                              opened AS "opened?", intent AS "intent?",
                              initial_allocation AS "initial_allocation?",
                              allocation AS "allocation?", remaining AS "remaining?", held AS "held?",
                              sold AS "sold?", seq AS "seq?"
                       FROM (
                           SELECT opens_at, closes_at, round, unit_price, currency, per_buyer_limit,
                                  per_order_limit, provisioned_at IS NOT NULL AS provisioned,
                                  opened_at IS NOT NULL AS opened, intent,
                                  initial_allocation, allocation, remaining, held, sold, seq
                           FROM rounds WHERE sale = $1
                           UNION ALL
                           SELECT opens_at, closes_at, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
                                  NULL, NULL, NULL, NULL, NULL, NULL, NULL
                           FROM missed_windows WHERE sale = $1
                       ) AS windows
                       WHERE opens_at > $2
                       ORDER BY opens_at
                       LIMIT $3"#,
                    sale.0.cast_signed(),
                    after,
                    limit
                )
                .fetch_all(&pool)
                .await?
                .into_iter()
                .map(|row| {
                    let window = window(row.opens_at, row.closes_at);
                    let (Some(round), Some(amount), Some(currency), Some(word)) =
                        (row.round, row.unit_price, row.currency, row.intent)
                    else {
                        return Ok(PastWindow {
                            window,
                            round: None,
                        });
                    };
                    let units = |column: Option<i64>| column.unwrap_or(0).cast_unsigned();
                    let round = StoredRound {
                        round: round.cast_unsigned(),
                        rules: Making {
                            unit_price: money(amount, &currency)?,
                            allocation: units(row.initial_allocation),
                            per_buyer_limit: units(row.per_buyer_limit),
                            per_order_limit: units(row.per_order_limit),
                        },
                        provisioned: row.provisioned == Some(true),
                        opened: row.opened == Some(true),
                        intent: intent(&word)?,
                        counters: Counters {
                            allocation: units(row.allocation),
                            remaining: units(row.remaining),
                            held: units(row.held),
                            sold: units(row.sold),
                            seq: units(row.seq),
                        },
                    };
                    Ok(PastWindow {
                        window,
                        round: Some(round),
                    })
                })
                .collect()
            })
            .await
    }
}

async fn stored_round(
    connection: &mut PgConnection,
    sale: i32,
    round: u32,
) -> Result<Option<(Terms, u64)>, StoreError> {
    let row = sqlx::query!(
        "SELECT unit_price, currency, initial_allocation, per_buyer_limit, per_order_limit,
                opens_at, closes_at, hold_ms, limit_scope, ends, waitlist, seq
         FROM rounds WHERE sale = $1 AND round = $2 AND provisioned_at IS NOT NULL",
        sale,
        i32::try_from(round).unwrap_or(i32::MAX)
    )
    .fetch_optional(connection)
    .await?;
    row.map(|row| {
        let terms = Terms {
            window: window(row.opens_at, row.closes_at),
            per_buyer_limit: row.per_buyer_limit.cast_unsigned(),
            per_order_limit: row.per_order_limit.cast_unsigned(),
            unit_price: money(row.unit_price, &row.currency)?,
            allocation: row.initial_allocation.cast_unsigned(),
            policy: policy(row.hold_ms, &row.limit_scope, &row.ends, row.waitlist)?,
        };
        Ok((terms, row.seq.cast_unsigned()))
    })
    .transpose()
}

async fn plan(pool: PgPool, sale: i32, now_ms: i64) -> Result<Planned, StoreError> {
    let now = instant(now_ms)?;
    let mut transaction = pool.begin().await?;
    // Nobody else plans while we hold the row.
    let row = sqlx::query!(
        "SELECT schedule, planned_until, windows_planned FROM sales
         WHERE number = $1 AND plan_at <= $2
         FOR NO KEY UPDATE",
        sale,
        now
    )
    .fetch_optional(&mut *transaction)
    .await?;
    let Some(row) = row else {
        return Ok(Planned::default());
    };
    let Some((schedule, progress)) =
        schedule(row.schedule, row.planned_until, row.windows_planned)?
    else {
        return Ok(Planned::default());
    };
    see_open(&mut transaction, sale, now).await?;
    let rounds = sqlx::query!(
        "SELECT opens_at, closes_at, provisioned_at IS NOT NULL AS provisioned FROM rounds
         WHERE sale = $1 AND round >= (SELECT round FROM sales WHERE number = $1)
         ORDER BY round",
        sale
    )
    .fetch_all(&mut *transaction)
    .await?;
    let windows: Vec<_> = rounds
        .iter()
        .map(|row| window(row.opens_at, row.closes_at))
        .collect();
    let turn = Turn::at(&schedule, progress, &windows, now_ms);
    miss(&mut transaction, sale, &turn.missed, now).await?;
    make(&mut transaction, sale, &turn.made).await?;
    // One that Redis does not have yet cannot be seen open: look again soon.
    let waits = rounds.iter().any(|row| row.provisioned == Some(false))
        || turn.made.iter().any(|made| made.opens_at_ms <= now_ms);
    let soon = waits.then_some(now_ms + PROVISIONED_WITHIN_MS);
    let again_at = [turn.again_at_ms, soon].into_iter().flatten().min();
    sqlx::query!(
        "UPDATE sales
         SET planned_until = $2, windows_planned = $3, plan_at = $4,
             round = greatest(round, current_round(number, round, $5))
         WHERE number = $1",
        sale,
        instant(turn.progress.until_ms)?,
        i32::try_from(turn.progress.windows).unwrap_or(i32::MAX),
        again_at.map(instant).transpose()?,
        now
    )
    .execute(&mut *transaction)
    .await?;
    transaction.commit().await?;
    Ok(Planned {
        rounds: turn.made.len(),
        missed: turn.missed.len(),
    })
}

/// How soon Redis has a round that was just made, if all is well.
const PROVISIONED_WITHIN_MS: i64 = 200;

/// Notes that the round that is open now was seen so.
async fn see_open(
    connection: &mut PgConnection,
    sale: i32,
    now: DateTime<Utc>,
) -> Result<(), StoreError> {
    sqlx::query!(
        "UPDATE rounds SET opened_at = $2
         WHERE sale = $1 AND round >= (SELECT round FROM sales WHERE number = $1)
           AND opened_at IS NULL AND provisioned_at IS NOT NULL
           AND opens_at <= $2 AND closes_at > $2",
        sale,
        now
    )
    .execute(connection)
    .await?;
    Ok(())
}

async fn miss(
    connection: &mut PgConnection,
    sale: i32,
    windows: &[Window],
    now: DateTime<Utc>,
) -> Result<(), StoreError> {
    let (opens, closes) = instants(windows)?;
    sqlx::query!(
        "INSERT INTO missed_windows (sale, opens_at, closes_at, noticed_at)
         SELECT $1, opens_at, closes_at, $4
         FROM unnest($2::timestamptz[], $3::timestamptz[]) AS missed (opens_at, closes_at)",
        sale,
        &opens,
        &closes,
        now
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Makes rounds of windows, by what the sale says now.
async fn make(
    connection: &mut PgConnection,
    sale: i32,
    windows: &[Window],
) -> Result<(), StoreError> {
    let (opens, closes) = instants(windows)?;
    sqlx::query!(
        "INSERT INTO rounds (sale, round, unit_price, currency, initial_allocation,
                             per_buyer_limit, per_order_limit, opens_at, closes_at, allocation,
                             remaining, hold_ms, limit_scope, ends, waitlist)
         SELECT number, last.round + made.place, price_amount, price_currency, sales.allocation,
                per_buyer_limit, per_order_limit, made.opens_at, made.closes_at, sales.allocation,
                sales.allocation, hold_ms, limit_scope, ends, waitlist
         FROM sales
         CROSS JOIN (SELECT max(round) AS round FROM rounds WHERE sale = $1) AS last
         CROSS JOIN unnest($2::timestamptz[], $3::timestamptz[])
             WITH ORDINALITY AS made (opens_at, closes_at, place)
         WHERE number = $1",
        sale,
        &opens,
        &closes
    )
    .execute(connection)
    .await?;
    Ok(())
}

type Instants = Vec<DateTime<Utc>>;

/// When windows of a schedule open and close: all have an end.
fn instants(windows: &[Window]) -> Result<(Instants, Instants), StoreError> {
    let opens = windows.iter().map(|window| instant(window.opens_at_ms));
    let closes = windows
        .iter()
        .map(|window| instant(window.closes_at_ms.unwrap_or(window.opens_at_ms)));
    Ok((
        opens.collect::<Result<_, _>>()?,
        closes.collect::<Result<_, _>>()?,
    ))
}

fn instant(ms: i64) -> Result<DateTime<Utc>, StoreError> {
    // Before the epoch nothing opens.
    DateTime::from_timestamp_millis(ms.max(0))
        .ok_or_else(|| unreadable(format!("instant {ms} ms after the epoch")))
}
