//! Sales and their current round, in the form that everything else reads them.

use std::{collections::HashMap, sync::Arc};

use chrono::{DateTime, Utc};
use sqlx::PgPool;
use uuid::Uuid;

use super::{
    Database, StoreError,
    audit_log::begin,
    rounds::{intent, money, policy, window},
    unreadable,
};
use crate::domain::{
    hurdles::Hurdles,
    id::{Fingerprint, Partition, ProductId, RoundId, SaleId, SaleNumber},
    money::Money,
    order::Mode,
    payment::Gateway,
    round::{Counters, Ends, Intent, State, Terms, TermsError, Window},
    schedule::{Progress, Schedule},
};

/// A sale in one of its rounds: what does not change while the round runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SaleFacts {
    /// Its name in the API.
    pub id: SaleId,
    /// Its short name.
    pub number: SaleNumber,
    /// Where its rounds live.
    pub partition: Partition,
    /// What it sells.
    pub product: ProductId,
    /// What it is called.
    pub name: String,
    /// The small print, if it has any.
    pub small_print: Option<String>,
    /// What it asks of its acceptances; fixed when it is made.
    pub durability: Mode,
    /// Who takes the money; `None` confirms held orders without any.
    pub payment: Option<Gateway>,
    /// Whether the units of a refunded order are for sale again.
    pub refund_returns_units: bool,
    /// What it asks of whoever buys.
    pub hurdles: Hurdles,
    /// The round: 1, 2, 3 ….
    pub round: u32,
    /// The rules of the round.
    pub terms: Terms,
    /// Whether Redis has the round. Until then nothing is sold.
    pub provisioned: bool,
    /// When its rounds open, if it opens more than once.
    pub schedule: Option<Arc<Schedule>>,
    /// How far that has been carried out.
    pub progress: Progress,
    /// The same sale in the round that comes after this one, if Redis has it.
    pub next: Option<Arc<SaleFacts>>,
    /// The window behind the last round that Redis has, if the schedule has one.
    pub upcoming: Option<Window>,
    /// Counts changes; the `ETag`.
    pub version: i64,
    /// Which operator made it.
    pub created_by: Uuid,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it was last changed.
    pub updated_at: DateTime<Utc>,
}

impl SaleFacts {
    /// The round.
    pub fn round_id(&self) -> RoundId {
        RoundId {
            sale: self.number,
            round: self.round,
        }
    }

    /// The same sale in the round that it is in at `now_ms`, by Redis' clock: the first whose window
    /// has not passed, else the last.
    pub fn at(self: Arc<Self>, now_ms: i64) -> Arc<Self> {
        let mut facts = self;
        while let Some(next) = &facts.next
            && facts
                .terms
                .window
                .closes_at_ms
                .is_some_and(|end| now_ms >= end)
        {
            facts = Arc::clone(next);
        }
        facts
    }

    /// Whether there is a round after this one, or will be.
    pub fn goes_on(&self) -> bool {
        self.next.is_some() || self.upcoming.is_some()
    }

    /// The last round that Redis has.
    pub fn last(&self) -> &Self {
        let mut facts = self;
        while let Some(next) = &facts.next {
            facts = next;
        }
        facts
    }
}

/// A sale with what PostgreSQL knows of its current round: as old as the writer is behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sale {
    /// What does not change.
    pub facts: Arc<SaleFacts>,
    /// What the operator wants.
    pub intent: Intent,
    /// Where the units are.
    pub counters: Counters,
}

/// A sale to be made.
#[derive(Clone, Debug)]
pub struct NewSale {
    /// Derived from operator and key, so that it is made once.
    pub id: SaleId,
    /// What the request asked for.
    pub fingerprint: Fingerprint,
    /// Where its rounds shall live.
    pub partition: Partition,
    /// What it sells.
    pub product: ProductId,
    /// 1 … 200 characters.
    pub name: String,
    /// 1 … 10,000 characters.
    pub small_print: Option<String>,
    /// What it asks of its acceptances.
    pub durability: Mode,
    /// Who takes the money, if anybody.
    pub payment: Option<Gateway>,
    /// Whether the units of a refunded order are for sale again.
    pub refund_returns_units: bool,
    /// What it asks of whoever buys, in range.
    pub hurdles: Hurdles,
    /// The rules of its first round, checked.
    pub terms: Terms,
    /// When its rounds open, if it opens more than once: the first one in the window of `terms`.
    pub schedule: Option<Schedule>,
    /// Which operator makes it.
    pub created_by: Uuid,
}

/// What became of making a sale.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Inserted {
    /// It is there now, with a first round that Redis does not have yet.
    New(Sale),
    /// An earlier attempt with the same key made it. It may still have to be provisioned.
    Replayed(Sale),
    /// The same key made another sale.
    Mismatch,
    /// There is no such product.
    NoProduct,
}

/// What to change of a sale; `None` stays. What a round obeys that is made does not change.
#[derive(Clone, Debug, Default)]
pub struct SaleChange {
    /// 1 … 200 characters.
    pub name: Option<String>,
    /// 1 … 10,000 characters.
    pub small_print: Option<String>,
    /// How old the buyers' accounts must be, in seconds; `Some(None)` asks for nothing. In every round.
    pub min_account_age_seconds: Option<Option<u32>>,
    /// How much work each order takes, in bits; `Some(None)` asks for none. In every round.
    pub proof_of_work_bits: Option<Option<u8>>,
    /// Of one unit of the next rounds.
    pub unit_price: Option<Money>,
    /// Units of each of the next rounds.
    pub allocation: Option<u64>,
    /// Units that one buyer may have of each of them.
    pub per_buyer_limit: Option<u64>,
    /// Units that one order may ask for.
    pub per_order_limit: Option<u64>,
    /// How long their orders may wait for their payment, in milliseconds.
    pub hold_ms: Option<u64>,
    /// What ends them, beside their window and the operator.
    pub ends: Option<Ends>,
    /// Whether buyers may wait in line.
    pub waitlist: Option<bool>,
    /// When they open; `Some(None)` makes no more of them.
    pub schedule: Option<Option<Schedule>>,
    /// Who asks.
    pub by: Uuid,
}

impl SaleChange {
    /// Whether it says anything about rounds but when they open.
    fn changes_terms(&self) -> bool {
        self.unit_price.is_some()
            || self.allocation.is_some()
            || self.per_buyer_limit.is_some()
            || self.per_order_limit.is_some()
            || self.hold_ms.is_some()
            || self.ends.is_some()
            || self.waitlist.is_some()
    }
}

/// What became of changing a sale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaleChanged {
    /// It has a new version.
    Done,
    /// It has another version than the one that was to be changed.
    Stale,
    /// There is no such sale.
    Missing,
    /// The rules would contradict each other.
    Terms(TermsError),
    /// No round will be made from it, and rules of rounds were to be changed.
    Final,
    /// The last round that is made has no end, so no other can follow it.
    Endless,
    /// No window opens behind the last round that is made.
    Over,
}

/// Which sales to list, newest first.
#[derive(Clone, Copy, Debug)]
pub struct Filter {
    /// In this state at `now`.
    pub state: Option<State>,
    /// The instant that decides.
    pub now: DateTime<Utc>,
    /// Of this product.
    pub product: Option<ProductId>,
    /// Behind this sale: the last of the page before.
    pub after: Option<SaleNumber>,
    /// So many at most.
    pub limit: i64,
}

/// A row as PostgreSQL has it.
struct Columns {
    id: Uuid,
    number: i32,
    partition: i16,
    product_id: Uuid,
    name: String,
    terms: Option<String>,
    durability: String,
    payment: String,
    refund_returns_units: bool,
    min_account_age_seconds: Option<i32>,
    proof_of_work_bits: Option<i16>,
    round: i32,
    version: i64,
    created_by: Uuid,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
    request_fingerprint: Vec<u8>,
    unit_price: i64,
    currency: String,
    initial_allocation: i64,
    per_buyer_limit: i64,
    per_order_limit: i64,
    opens_at: DateTime<Utc>,
    closes_at: Option<DateTime<Utc>>,
    hold_ms: Option<i64>,
    limit_scope: String,
    ends: String,
    waitlist: bool,
    provisioned_at: Option<DateTime<Utc>>,
    intent: String,
    allocation: i64,
    remaining: i64,
    held: i64,
    sold: i64,
    seq: i64,
    schedule: Option<serde_json::Value>,
    planned_until: Option<DateTime<Utc>>,
    windows_planned: Option<i32>,
}

/// Reads a schedule and how far it has been carried out.
pub(super) fn schedule(
    schedule: Option<serde_json::Value>,
    planned_until: Option<DateTime<Utc>>,
    windows_planned: Option<i32>,
) -> Result<Option<(Schedule, Progress)>, StoreError> {
    let (Some(schedule), Some(until), Some(windows)) = (schedule, planned_until, windows_planned)
    else {
        return Ok(None);
    };
    let schedule = serde_json::from_value(schedule)
        .map_err(|error| unreadable(format!("schedule: {error}")))?;
    let progress = Progress {
        until_ms: until.timestamp_millis(),
        windows: windows.cast_unsigned(),
    };
    Ok(Some((schedule, progress)))
}

/// Puts the rounds of each sale behind its first one. Rows come in order of sale and round.
fn chain(rows: Vec<Columns>) -> Result<Vec<Sale>, StoreError> {
    let mut chains: Vec<Vec<Sale>> = Vec::new();
    for row in rows {
        let sale = Sale::try_from(row)?;
        match chains.last_mut() {
            // What Redis does not have yet is no round to turn to.
            Some(chain) if chain[0].facts.number == sale.facts.number => {
                if sale.facts.provisioned {
                    chain.push(sale);
                }
            }
            _ => chains.push(vec![sale]),
        }
    }
    let linked = chains.into_iter().filter_map(|chain| {
        chain.into_iter().rev().reduce(|later, mut sale| {
            let facts = Arc::make_mut(&mut sale.facts);
            facts.next = Some(later.facts);
            facts.upcoming = None;
            sale
        })
    });
    Ok(linked.collect())
}

impl TryFrom<Columns> for Sale {
    type Error = StoreError;

    fn try_from(row: Columns) -> Result<Self, StoreError> {
        let planned = schedule(row.schedule, row.planned_until, row.windows_planned)?;
        let facts = SaleFacts {
            id: SaleId(row.id),
            number: SaleNumber(row.number.cast_unsigned()),
            partition: Partition(row.partition.cast_unsigned()),
            product: ProductId(row.product_id),
            name: row.name,
            small_print: row.terms,
            durability: Mode::parse(&row.durability)
                .ok_or_else(|| unreadable(format!("durability of sale {}", row.id)))?,
            payment: match row.payment.as_str() {
                "none" => None,
                word => Some(
                    Gateway::parse(word)
                        .ok_or_else(|| unreadable(format!("payment of sale {}", row.id)))?,
                ),
            },
            refund_returns_units: row.refund_returns_units,
            hurdles: Hurdles {
                min_account_age_seconds: row.min_account_age_seconds.map(i32::cast_unsigned),
                proof_of_work_bits: row
                    .proof_of_work_bits
                    .map(u8::try_from)
                    .transpose()
                    .map_err(|_| unreadable(format!("proof of work of sale {}", row.id)))?,
            },
            round: row.round.cast_unsigned(),
            terms: Terms {
                window: window(row.opens_at, row.closes_at),
                per_buyer_limit: row.per_buyer_limit.cast_unsigned(),
                per_order_limit: row.per_order_limit.cast_unsigned(),
                unit_price: money(row.unit_price, &row.currency)?,
                allocation: row.initial_allocation.cast_unsigned(),
                policy: policy(row.hold_ms, &row.limit_scope, &row.ends, row.waitlist)?,
            },
            provisioned: row.provisioned_at.is_some(),
            next: None,
            upcoming: planned
                .as_ref()
                .and_then(|(schedule, progress)| schedule.next(*progress)),
            progress: planned
                .as_ref()
                .map_or_else(Progress::default, |plan| plan.1),
            schedule: planned.map(|(schedule, _)| Arc::new(schedule)),
            version: row.version,
            created_by: row.created_by,
            created_at: row.created_at,
            updated_at: row.updated_at,
        };
        Ok(Self {
            facts: Arc::new(facts),
            intent: intent(&row.intent)?,
            counters: Counters {
                allocation: row.allocation.cast_unsigned(),
                remaining: row.remaining.cast_unsigned(),
                held: row.held.cast_unsigned(),
                sold: row.sold.cast_unsigned(),
                seq: row.seq.cast_unsigned(),
            },
        })
    }
}

/// Selects sales with the rounds from which on they may not be over; the macro keeps each one checked
/// against the schema.
macro_rules! select {
    ($tail:literal, $($argument:expr),* $(,)?) => {
        sqlx::query_as!(
            Columns,
            "SELECT sales.id, sales.number, sales.partition, sales.product_id, sales.name,
                    sales.terms, sales.durability, sales.payment,
                    sales.refund_returns_units, sales.min_account_age_seconds,
                    sales.proof_of_work_bits, rounds.round, sales.version, sales.created_by, sales.created_at,
                    sales.updated_at, sales.request_fingerprint, rounds.unit_price, rounds.currency,
                    rounds.initial_allocation, rounds.per_buyer_limit, rounds.per_order_limit,
                    rounds.opens_at, rounds.closes_at, rounds.hold_ms, rounds.limit_scope,
                    rounds.ends, rounds.waitlist, rounds.provisioned_at, rounds.intent,
                    rounds.allocation, rounds.remaining, rounds.held, rounds.sold, rounds.seq,
                    sales.schedule, sales.planned_until, sales.windows_planned
             FROM sales
             JOIN rounds ON rounds.sale = sales.number AND rounds.round >= sales.round "
            + $tail
            + " ORDER BY sales.number, rounds.round",
            $($argument),*
        )
    };
}

/// The table `sales`.
#[derive(Clone, Debug)]
pub struct Sales {
    database: Database,
}

impl Sales {
    /// The sales in `database`.
    pub fn new(database: Database) -> Self {
        Self { database }
    }

    /// Makes a sale and its first round, both or none, once.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn insert(&self, sale: NewSale) -> Result<Inserted, StoreError> {
        self.database
            .run(async move |pool| {
                let terms = sale.terms;
                let schedule = sale.schedule.as_ref().map(serde_json::to_value).transpose();
                let schedule = schedule.map_err(|error| unreadable(error.to_string()))?;
                let opens_at = DateTime::from_timestamp_millis(terms.window.opens_at_ms);
                let closes_at = terms
                    .window
                    .closes_at_ms
                    .and_then(DateTime::from_timestamp_millis);
                let mut transaction = begin(&pool).await?;
                let inserted = sqlx::query!(
                    "WITH new AS (
                         INSERT INTO sales (id, partition, product_id, name, terms, price_amount,
                                            price_currency, allocation, per_buyer_limit,
                                            per_order_limit, opens_at, closes_at, durability,
                                            payment, refund_returns_units, created_by,
                                            request_fingerprint, schedule,
                                            planned_until, windows_planned, plan_at, hold_ms,
                                            limit_scope, ends, waitlist,
                                            min_account_age_seconds, proof_of_work_bits)
                         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13,
                                 $14, $15, $16, $17, $18,
                                 CASE WHEN $18::jsonb IS NOT NULL THEN $11::timestamptz END,
                                 CASE WHEN $18::jsonb IS NOT NULL THEN 1 END,
                                 CASE WHEN $18::jsonb IS NOT NULL THEN $11::timestamptz END,
                                 $19, $20, $21, $22, $23, $24)
                         ON CONFLICT (id) DO NOTHING
                         RETURNING number, round
                     )
                     INSERT INTO rounds (sale, round, unit_price, currency, initial_allocation,
                                         per_buyer_limit, per_order_limit, opens_at, closes_at,
                                         allocation, remaining, hold_ms, limit_scope, ends,
                                         waitlist)
                     SELECT number, round, $6, $7, $8, $9, $10, $11, $12, $8, $8, $19, $20, $21, $22
                     FROM new",
                    sale.id.0,
                    sale.partition.0.cast_signed(),
                    sale.product.0,
                    sale.name,
                    sale.small_print,
                    terms.unit_price.amount,
                    terms.unit_price.currency.as_str(),
                    terms.allocation.cast_signed(),
                    terms.per_buyer_limit.cast_signed(),
                    terms.per_order_limit.cast_signed(),
                    opens_at,
                    closes_at,
                    sale.durability.as_str(),
                    sale.payment.map_or("none", Gateway::as_str),
                    sale.refund_returns_units,
                    sale.created_by,
                    sale.fingerprint.0.as_slice(),
                    schedule,
                    terms.policy.hold_ms.map(u64::cast_signed),
                    terms.policy.limit_scope.as_str(),
                    terms.policy.ends.as_str(),
                    terms.policy.waitlist,
                    sale.hurdles.min_account_age_seconds.map(u32::cast_signed),
                    sale.hurdles.proof_of_work_bits.map(i16::from),
                )
                .execute(&mut *transaction)
                .await;
                let new = match inserted {
                    Ok(done) => {
                        transaction.commit().await?;
                        done.rows_affected() == 1
                    }
                    Err(error)
                        if error
                            .as_database_error()
                            .and_then(|error| error.constraint())
                            == Some("sales_product_id_fkey") =>
                    {
                        return Ok(Inserted::NoProduct);
                    }
                    Err(error) => return Err(error.into()),
                };
                let rows = select!("WHERE sales.id = $1", sale.id.0)
                    .fetch_all(&pool)
                    .await?;
                let asked_before = rows
                    .first()
                    .is_some_and(|row| row.request_fingerprint == sale.fingerprint.0);
                let stored = chain(rows)?
                    .pop()
                    .ok_or_else(|| unreadable(format!("sale {} without a round", sale.id)))?;
                Ok(match (new, asked_before) {
                    (true, _) => Inserted::New(stored),
                    (false, true) => Inserted::Replayed(stored),
                    (false, false) => Inserted::Mismatch,
                })
            })
            .await
    }

    /// The sale with this id.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn by_id(&self, id: SaleId) -> Result<Option<Sale>, StoreError> {
        Ok(self.by_ids_or_numbers(vec![id], vec![]).await?.pop())
    }

    /// The sale with this number.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn by_number(&self, number: SaleNumber) -> Result<Option<Sale>, StoreError> {
        Ok(self.by_ids_or_numbers(vec![], vec![number]).await?.pop())
    }

    /// Those that exist, each once, in no particular order.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn by_ids_or_numbers(
        &self,
        ids: Vec<SaleId>,
        numbers: Vec<SaleNumber>,
    ) -> Result<Vec<Sale>, StoreError> {
        let ids: Vec<Uuid> = ids.into_iter().map(|id| id.0).collect();
        let numbers: Vec<i32> = numbers
            .into_iter()
            .map(|number| number.0.cast_signed())
            .collect();
        self.database
            .run(async move |pool| {
                let rows = select!(
                    "WHERE sales.id = ANY ($1) OR sales.number = ANY ($2)",
                    &ids,
                    &numbers
                );
                chain(rows.fetch_all(&pool).await?)
            })
            .await
    }

    /// These sales as they are at `now`, in this order.
    async fn in_order(
        &self,
        numbers: Vec<i32>,
        now: DateTime<Utc>,
    ) -> Result<Vec<Arc<SaleFacts>>, StoreError> {
        let number = |number: &i32| SaleNumber(number.cast_unsigned());
        let asked = numbers.iter().map(number).collect();
        let found = self.by_ids_or_numbers(vec![], asked).await?;
        let mut found: HashMap<_, _> = found
            .into_iter()
            .map(|sale| (sale.facts.number, sale.facts.at(now.timestamp_millis())))
            .collect();
        let facts = numbers.iter().filter_map(|n| found.remove(&number(n)));
        Ok(facts.collect())
    }

    /// The sales that were changed since an instant, and the instant of this look, both by
    /// PostgreSQL's clock. A few that were changed before are among them: a transaction ends later
    /// than it begins.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn changed(
        &self,
        since: Option<DateTime<Utc>>,
    ) -> Result<(Vec<SaleId>, DateTime<Utc>), StoreError> {
        self.database
            .run(async move |pool| {
                let looked_at = sqlx::query_scalar!(r#"SELECT now() AS "now!""#);
                let looked_at = looked_at.fetch_one(&pool).await?;
                let ids = sqlx::query_scalar!(
                    "SELECT id FROM sales WHERE updated_at > $1::timestamptz - interval '10 seconds'",
                    since.unwrap_or(looked_at)
                );
                let ids = ids.fetch_all(&pool).await?;
                Ok((ids.into_iter().map(SaleId).collect(), looked_at))
            })
            .await
    }

    /// Changes what is said about a sale, if it has this version. A schedule holds for what comes
    /// behind the rounds that are made.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn change(
        &self,
        id: SaleId,
        version: i64,
        change: SaleChange,
        now_ms: i64,
    ) -> Result<SaleChanged, StoreError> {
        self.database
            .run(async move |pool| change_sale(pool, id, version, change, now_ms).await)
            .await
    }

    /// A page of sales, newest first, by what PostgreSQL knows: it may be behind.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn list(&self, filter: Filter) -> Result<Vec<Arc<SaleFacts>>, StoreError> {
        let numbers = self
            .database
            .run(async move |pool| {
                // The same order of questions as in domain::round::state.
                Ok::<_, StoreError>(
                    sqlx::query_scalar!(
                        "SELECT sales.number FROM sales
                         JOIN rounds ON rounds.sale = sales.number
                          AND rounds.round = current_round(sales.number, sales.round, $2)
                         WHERE ($1::text IS NULL OR $1 =
                                CASE WHEN rounds.intent IN ('closed', 'settled', 'archived')
                                       OR rounds.closes_at <= $2 THEN 'closed'
                                     WHEN rounds.opens_at > $2 THEN 'scheduled'
                                     WHEN rounds.intent = 'paused' OR rounds.grace_until > $2
                                     THEN 'paused'
                                     ELSE 'open' END)
                           AND ($3::uuid IS NULL OR sales.product_id = $3)
                           AND ($4::int IS NULL OR sales.number < $4)
                         ORDER BY sales.number DESC
                         LIMIT $5",
                        filter.state.map(State::as_str),
                        filter.now,
                        filter.product.map(|id| id.0),
                        filter.after.map(|number| number.0.cast_signed()),
                        filter.limit
                    )
                    .fetch_all(&pool)
                    .await?,
                )
            })
            .await?;
        self.in_order(numbers, filter.now).await
    }

    /// The sales that are not closed at `now` and that Redis has, newest first, at most `limit`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn unclosed(
        &self,
        now: DateTime<Utc>,
        limit: i64,
    ) -> Result<Vec<Arc<SaleFacts>>, StoreError> {
        let numbers = self
            .database
            .run(async move |pool| {
                Ok::<_, StoreError>(
                    sqlx::query_scalar!(
                        "SELECT sales.number FROM sales
                         JOIN rounds ON rounds.sale = sales.number
                          AND rounds.round = current_round(sales.number, sales.round, $1)
                         WHERE rounds.intent IN ('live', 'paused')
                           AND (rounds.closes_at IS NULL OR rounds.closes_at > $1)
                         ORDER BY sales.number DESC
                         LIMIT $2",
                        now,
                        limit
                    )
                    .fetch_all(&pool)
                    .await?,
                )
            })
            .await?;
        self.in_order(numbers, now).await
    }

    /// The sales of these products whose window, as far as PostgreSQL knows it, begins before
    /// `until` and has not ended at `now`: newest first.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn open_of(
        &self,
        products: Vec<ProductId>,
        now: DateTime<Utc>,
        until: DateTime<Utc>,
    ) -> Result<Vec<Arc<SaleFacts>>, StoreError> {
        let products: Vec<Uuid> = products.into_iter().map(|id| id.0).collect();
        let numbers = self
            .database
            .run(async move |pool| {
                Ok::<_, StoreError>(
                    sqlx::query_scalar!(
                        "SELECT DISTINCT sales.number FROM sales
                         JOIN rounds ON rounds.sale = sales.number
                          AND rounds.round >= sales.round
                         WHERE sales.product_id = ANY ($1)
                           AND rounds.provisioned_at IS NOT NULL
                           AND rounds.intent IN ('live', 'paused')
                           AND rounds.opens_at <= $3
                           AND (rounds.closes_at IS NULL OR rounds.closes_at > $2)
                         ORDER BY sales.number DESC",
                        &products,
                        now,
                        until
                    )
                    .fetch_all(&pool)
                    .await?,
                )
            })
            .await?;
        self.in_order(numbers, now).await
    }
}

async fn change_sale(
    pool: PgPool,
    id: SaleId,
    version: i64,
    change: SaleChange,
    now_ms: i64,
) -> Result<SaleChanged, StoreError> {
    let now = DateTime::from_timestamp_millis(now_ms)
        .ok_or_else(|| unreadable(format!("instant {now_ms}")))?;
    let mut transaction = begin(&pool).await?;
    // Nobody makes rounds of it meanwhile.
    let row = sqlx::query!(
        "SELECT number, version, price_amount, price_currency, allocation, per_buyer_limit,
                per_order_limit, schedule, planned_until, windows_planned, plan_at, hold_ms,
                limit_scope, ends, waitlist
         FROM sales WHERE id = $1 FOR NO KEY UPDATE",
        id.0
    )
    .fetch_optional(&mut *transaction)
    .await?;
    let Some(mut row) = row else {
        return Ok(SaleChanged::Missing);
    };
    if row.version != version {
        return Ok(SaleChanged::Stale);
    }
    match &change.schedule {
        None => {}
        Some(None) => {
            (row.schedule, row.planned_until) = (None, None);
            (row.windows_planned, row.plan_at) = (None, None);
        }
        Some(Some(schedule)) => {
            // A round that an operator has closed is over, whatever its window says.
            let last = sqlx::query!(
                r#"SELECT bool_or(ends IS NULL) AS "endless!", max(ends) AS ends
                   FROM (SELECT CASE WHEN intent IN ('live', 'paused') THEN closes_at
                                     ELSE least(closes_at, $2) END AS ends
                         FROM rounds WHERE sale = $1) AS windows"#,
                row.number,
                now
            )
            .fetch_one(&mut *transaction)
            .await?;
            let Some(ends) = last.ends.filter(|_| !last.endless) else {
                return Ok(SaleChanged::Endless);
            };
            let progress = Progress {
                until_ms: ends.timestamp_millis().max(now_ms) - 1,
                windows: 0,
            };
            if schedule.next(progress).is_none() {
                return Ok(SaleChanged::Over);
            }
            let form = serde_json::to_value(schedule);
            row.schedule = Some(form.map_err(|error| unreadable(error.to_string()))?);
            row.planned_until = DateTime::from_timestamp_millis(progress.until_ms);
            (row.windows_planned, row.plan_at) = (Some(0), Some(now));
        }
    }
    if change.changes_terms() {
        if row.schedule.is_none() {
            return Ok(SaleChanged::Final);
        }
        let unit_price = match change.unit_price {
            Some(price) => price,
            None => money(row.price_amount, &row.price_currency)?,
        };
        row.price_amount = unit_price.amount;
        unit_price
            .currency
            .as_str()
            .clone_into(&mut row.price_currency);
        let given = |units: Option<u64>, stays: i64| units.map_or(stays, u64::cast_signed);
        row.allocation = given(change.allocation, row.allocation);
        row.per_buyer_limit = given(change.per_buyer_limit, row.per_buyer_limit);
        row.per_order_limit = given(change.per_order_limit, row.per_order_limit);
        row.hold_ms = change.hold_ms.map(u64::cast_signed).or(row.hold_ms);
        if let Some(ends) = change.ends {
            ends.as_str().clone_into(&mut row.ends);
        }
        row.waitlist = change.waitlist.unwrap_or(row.waitlist);
        let terms = Terms {
            window: Window {
                opens_at_ms: now_ms,
                closes_at_ms: None,
            },
            per_buyer_limit: row.per_buyer_limit.cast_unsigned(),
            per_order_limit: row.per_order_limit.cast_unsigned(),
            unit_price,
            allocation: row.allocation.cast_unsigned(),
            policy: policy(row.hold_ms, &row.limit_scope, &row.ends, row.waitlist)?,
        };
        if let Err(error) = terms.check() {
            return Ok(SaleChanged::Terms(error));
        }
    }
    sqlx::query!(
        "UPDATE sales
         SET name = coalesce($2, name), terms = coalesce($3, terms), price_amount = $4,
             price_currency = $5, allocation = $6, per_buyer_limit = $7, per_order_limit = $8,
             schedule = $9, planned_until = $10, windows_planned = $11, plan_at = $12,
             hold_ms = $14, ends = $15, waitlist = $16,
             min_account_age_seconds =
                 CASE WHEN $17 THEN $18 ELSE min_account_age_seconds END,
             proof_of_work_bits = CASE WHEN $19 THEN $20 ELSE proof_of_work_bits END,
             version = version + 1, updated_at = now(), updated_by = $13
         WHERE id = $1",
        id.0,
        change.name,
        change.small_print,
        row.price_amount,
        row.price_currency,
        row.allocation,
        row.per_buyer_limit,
        row.per_order_limit,
        row.schedule,
        row.planned_until,
        row.windows_planned,
        row.plan_at,
        change.by,
        row.hold_ms,
        row.ends,
        row.waitlist,
        change.min_account_age_seconds.is_some(),
        change
            .min_account_age_seconds
            .flatten()
            .map(u32::cast_signed),
        change.proof_of_work_bits.is_some(),
        change.proof_of_work_bits.flatten().map(i16::from)
    )
    .execute(&mut *transaction)
    .await?;
    transaction.commit().await?;
    Ok(SaleChanged::Done)
}
