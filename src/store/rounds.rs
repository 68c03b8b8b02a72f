//! Rounds: their rules, and whether Redis has them.

use super::{Database, StoreError, unreadable};
use crate::domain::{
    id::{Partition, RoundId, SaleNumber},
    money::{Currency, Money},
    order::Mode,
    round::{Ends, Intent, LimitScope, Policy, Terms, Window},
};
use chrono::{DateTime, Utc};

/// A round that Redis has not confirmed yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unprovisioned {
    /// Which.
    pub round: RoundId,
    /// Where it lives.
    pub partition: Partition,
    /// Its rules.
    pub terms: Terms,
}

/// The table `rounds`, but for the writer's part of it.
#[derive(Clone, Debug)]
pub struct Rounds {
    database: Database,
}

impl Rounds {
    /// The rounds in `database`.
    pub fn new(database: Database) -> Self {
        Self { database }
    }

    /// Notes that Redis has the round. `false` when that was noted before.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn set_provisioned(
        &self,
        round: RoundId,
        now: DateTime<Utc>,
    ) -> Result<bool, StoreError> {
        self.database
            .run(async move |pool| {
                let done = sqlx::query!(
                    "UPDATE rounds SET provisioned_at = $3
                     WHERE sale = $1 AND round = $2 AND provisioned_at IS NULL",
                    round.sale.0.cast_signed(),
                    round.round.cast_signed(),
                    now
                )
                .execute(&pool)
                .await?;
                Ok(done.rows_affected() == 1)
            })
            .await
    }

    /// The price of one unit of a round; `None` when there is no such round.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn unit_price(&self, round: RoundId) -> Result<Option<Money>, StoreError> {
        self.database
            .run(async move |pool| {
                let row = sqlx::query!(
                    "SELECT unit_price, currency FROM rounds WHERE sale = $1 AND round = $2",
                    round.sale.0.cast_signed(),
                    round.round.cast_signed()
                )
                .fetch_optional(&pool)
                .await?;
                row.map(|row| money(row.unit_price, &row.currency))
                    .transpose()
            })
            .await
    }

    /// Rounds of a partition that Redis must have.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn provisioned(&self, partition: Partition) -> Result<Vec<RoundId>, StoreError> {
        self.database
            .run(async move |pool| {
                let rows = sqlx::query!(
                    "SELECT rounds.sale, rounds.round
                     FROM rounds JOIN sales ON sales.number = rounds.sale
                     WHERE sales.partition = $1 AND provisioned_at IS NOT NULL
                     ORDER BY rounds.sale, rounds.round",
                    partition.0.cast_signed()
                )
                .fetch_all(&pool)
                .await?;
                let id = |sale: i32, round: i32| RoundId {
                    sale: SaleNumber(sale.cast_unsigned()),
                    round: round.cast_unsigned(),
                };
                Ok(rows
                    .into_iter()
                    .map(|row| id(row.sale, row.round))
                    .collect())
            })
            .await
    }

    /// Rounds that Redis has and whose orders may wait for their payment, until they are settled: where
    /// each lives, and what its sale asks of acceptances.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn with_holds(&self) -> Result<Vec<(RoundId, Partition, Mode)>, StoreError> {
        self.database
            .run(async move |pool| {
                sqlx::query!(
                    "SELECT rounds.sale, rounds.round, partition, durability
                     FROM rounds JOIN sales ON sales.number = rounds.sale
                     WHERE rounds.hold_ms IS NOT NULL AND provisioned_at IS NOT NULL
                       AND intent IN ('live', 'paused', 'closed')"
                )
                .fetch_all(&pool)
                .await?
                .into_iter()
                .map(|row| {
                    let round = RoundId {
                        sale: SaleNumber(row.sale.cast_unsigned()),
                        round: row.round.cast_unsigned(),
                    };
                    let mode = Mode::parse(&row.durability)
                        .ok_or_else(|| unreadable(format!("durability of sale {}", row.sale)))?;
                    Ok((round, Partition(row.partition.cast_unsigned()), mode))
                })
                .collect()
            })
            .await
    }

    /// Of the holds of a round that have ended as far as this is stored: how many there were, and how
    /// many of them gave their units back.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn ended_holds(&self, round: RoundId) -> Result<(u64, u64), StoreError> {
        self.database
            .run(async move |pool| {
                let row = sqlx::query!(
                    r#"SELECT count(*) FILTER (WHERE status <> 'held') AS "ended!",
                              count(*) FILTER (WHERE status IN ('expired', 'cancelled', 'withdrawn'))
                                  AS "returned!"
                       FROM orders WHERE sale = $1 AND round = $2 AND accepted_as = 'held'"#,
                    round.sale.0.cast_signed(),
                    round.round.cast_signed()
                )
                .fetch_one(&pool)
                .await?;
                Ok((row.ended.cast_unsigned(), row.returned.cast_unsigned()))
            })
            .await
    }

    /// Rounds that Redis has not confirmed, oldest first, at most `limit`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn unprovisioned(&self, limit: i64) -> Result<Vec<Unprovisioned>, StoreError> {
        self.database
            .run(async move |pool| {
                sqlx::query!(
                    "SELECT rounds.sale, rounds.round, sales.partition, unit_price, currency,
                            initial_allocation, rounds.per_buyer_limit, rounds.per_order_limit,
                            rounds.opens_at, rounds.closes_at, rounds.hold_ms,
                            rounds.limit_scope, rounds.ends, rounds.waitlist
                     FROM rounds JOIN sales ON sales.number = rounds.sale
                     WHERE provisioned_at IS NULL
                     ORDER BY rounds.sale, rounds.round
                     LIMIT $1",
                    limit
                )
                .fetch_all(&pool)
                .await?
                .into_iter()
                .map(|row| {
                    Ok(Unprovisioned {
                        round: RoundId {
                            sale: SaleNumber(row.sale.cast_unsigned()),
                            round: row.round.cast_unsigned(),
                        },
                        partition: Partition(row.partition.cast_unsigned()),
                        terms: Terms {
                            window: window(row.opens_at, row.closes_at),
                            per_buyer_limit: row.per_buyer_limit.cast_unsigned(),
                            per_order_limit: row.per_order_limit.cast_unsigned(),
                            unit_price: money(row.unit_price, &row.currency)?,
                            allocation: row.initial_allocation.cast_unsigned(),
                            policy: policy(row.hold_ms, &row.limit_scope, &row.ends, row.waitlist)?,
                        },
                    })
                })
                .collect()
            })
            .await
    }
}

pub(super) fn money(amount: i64, currency: &str) -> Result<Money, StoreError> {
    Currency::parse(currency)
        .and_then(|currency| Money::new(amount, currency))
        .map_err(|error| unreadable(error.to_string()))
}

pub(super) fn window(opens_at: DateTime<Utc>, closes_at: Option<DateTime<Utc>>) -> Window {
    Window {
        opens_at_ms: opens_at.timestamp_millis(),
        closes_at_ms: closes_at.map(|at| at.timestamp_millis()),
    }
}

/// Reads what a round does beyond selling at once.
pub(super) fn policy(
    hold_ms: Option<i64>,
    limit_scope: &str,
    ends: &str,
    waitlist: bool,
) -> Result<Policy, StoreError> {
    Ok(Policy {
        hold_ms: hold_ms.map(i64::cast_unsigned),
        limit_scope: LimitScope::parse(limit_scope)
            .ok_or_else(|| unreadable(format!("scope {limit_scope} of a limit")))?,
        ends: Ends::parse(ends).ok_or_else(|| unreadable(format!("end {ends}")))?,
        waitlist,
    })
}

/// Reads the word of an intent.
pub(super) fn intent(word: &str) -> Result<Intent, StoreError> {
    Intent::ALL
        .into_iter()
        .find(|intent| intent.as_str() == word)
        .ok_or_else(|| unreadable(format!("intent {word}")))
}
