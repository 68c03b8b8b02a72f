//! What the sandbox would have in a bank's own books.

use std::time::Duration;

use uuid::Uuid;

use super::{Database, StoreError, unreadable};
use crate::domain::{
    id::PaymentId,
    money::{Currency, Money},
    payment::Decline,
};

/// A payment as the sandbox has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToyCharge {
    /// Its name.
    pub reference: String,
    /// Our name of it.
    pub payment: PaymentId,
    /// What is to be paid.
    pub money: Money,
    /// How far it has come, as the table says it.
    pub state: String,
    /// The magic word that it was paid with.
    pub method: Option<String>,
    /// Why it was declined.
    pub decline: Option<Decline>,
    /// What was taken.
    pub captured: i64,
    /// What of that was given back.
    pub refunded: i64,
    /// Whether an answer about it has been lost already.
    pub lost: bool,
    /// Whether a pending one is to be decided by now.
    pub ripe: bool,
}

/// What to write down about a charge.
#[derive(Clone, Debug)]
pub struct ToyChange {
    /// Only if it is in one of these states still.
    pub from: &'static [&'static str],
    /// How far it is then.
    pub state: &'static str,
    /// The magic word; the present one if absent.
    pub method: Option<String>,
    /// Why it was declined.
    pub decline: Option<Decline>,
    /// What was taken.
    pub captured: i64,
    /// When it is decided, if it is pending.
    pub ripe_in: Option<Duration>,
    /// The webhooks that tell of it: kind, how long from now, and how many of the same.
    pub notices: Vec<(&'static str, Duration, u32)>,
}

/// A webhook to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToyNotice {
    /// The event's name.
    pub event: Uuid,
    /// Which payment.
    pub reference: String,
    /// What happened.
    pub kind: String,
}

/// The sandbox' tables.
#[derive(Clone, Debug)]
pub struct ToyBank {
    database: Database,
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

impl ToyBank {
    /// That in `database`.
    pub fn new(database: Database) -> Self {
        Self { database }
    }

    /// Opens an account of a payment, once; gives its name.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn open(
        &self,
        payment: PaymentId,
        money: Money,
        reference: String,
    ) -> Result<String, StoreError> {
        self.database
            .run(async move |pool| {
                Ok(sqlx::query_scalar!(
                    "INSERT INTO sandbox_charges (reference, payment_id, amount, currency)
                     VALUES ($1, $2, $3, $4)
                     ON CONFLICT (payment_id) DO UPDATE SET payment_id = excluded.payment_id
                     RETURNING reference",
                    reference,
                    payment.0,
                    money.amount,
                    money.currency.as_str()
                )
                .fetch_one(&pool)
                .await?)
            })
            .await
    }

    /// The charge with this name.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn charge(&self, reference: String) -> Result<Option<ToyCharge>, StoreError> {
        self.database
            .run(async move |pool| {
                let row = sqlx::query!(
                    r#"SELECT payment_id, amount, currency, state, method, decline, captured, lost,
                              coalesce(ripe_at <= now(), false) AS "ripe!",
                              (SELECT coalesce(sum(refund.amount), 0)::bigint
                               FROM sandbox_refunds AS refund
                               WHERE refund.reference = charge.reference) AS "refunded!"
                       FROM sandbox_charges AS charge WHERE reference = $1"#,
                    reference
                )
                .fetch_optional(&pool)
                .await?;
                let Some(row) = row else { return Ok(None) };
                let currency = Currency::parse(&row.currency)
                    .map_err(|_| unreadable(format!("currency of {reference}")))?;
                Ok(Some(ToyCharge {
                    payment: PaymentId(row.payment_id),
                    money: Money {
                        amount: row.amount,
                        currency,
                    },
                    state: row.state,
                    method: row.method,
                    decline: row.decline.as_deref().and_then(Decline::parse),
                    captured: row.captured,
                    refunded: row.refunded,
                    lost: row.lost,
                    ripe: row.ripe,
                    reference,
                }))
            })
            .await
    }

    /// Changes a charge, and has webhooks tell of it, both or neither; `false` if it is in another
    /// state by now.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn change(&self, reference: String, change: ToyChange) -> Result<bool, StoreError> {
        self.database
            .run(async move |pool| {
                let from: Vec<String> = change.from.iter().map(|&state| state.into()).collect();
                let mut transaction = pool.begin().await?;
                let done = sqlx::query!(
                    "UPDATE sandbox_charges
                     SET state = $3, method = coalesce($4, method), decline = $5, captured = $6,
                         ripe_at = now() + $7 * interval '1 millisecond'
                     WHERE reference = $1 AND state = ANY ($2)",
                    reference,
                    &from,
                    change.state,
                    change.method,
                    change.decline.map(Decline::as_str),
                    change.captured,
                    change.ripe_in.map(milliseconds)
                )
                .execute(&mut *transaction)
                .await?;
                if done.rows_affected() == 0 {
                    return Ok(false);
                }
                for (kind, delay, copies) in change.notices {
                    sqlx::query!(
                        "INSERT INTO sandbox_notices (event, reference, kind, due_at)
                         SELECT event, $1, $2, now() + $3 * interval '1 millisecond'
                         FROM (SELECT gen_random_uuid() AS event) AS one,
                              generate_series(1, $4::int)",
                        reference,
                        kind,
                        milliseconds(delay),
                        copies.cast_signed()
                    )
                    .execute(&mut *transaction)
                    .await?;
                }
                transaction.commit().await?;
                Ok(true)
            })
            .await
    }

    /// Notes that an answer is lost on purpose; `false` if one was before.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn lose(&self, reference: String) -> Result<bool, StoreError> {
        self.database
            .run(async move |pool| {
                let done = sqlx::query!(
                    "UPDATE sandbox_charges SET lost = true WHERE reference = $1 AND NOT lost",
                    reference
                )
                .execute(&pool)
                .await?;
                Ok(done.rows_affected() == 1)
            })
            .await
    }

    /// Gives money back, once for each key, if so much is left; `false` if not.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn refund(
        &self,
        reference: String,
        key: String,
        amount: i64,
    ) -> Result<bool, StoreError> {
        self.database
            .run(async move |pool| {
                let mut transaction = pool.begin().await?;
                // One after the other.
                let captured = sqlx::query_scalar!(
                    "SELECT captured FROM sandbox_charges WHERE reference = $1 FOR UPDATE",
                    reference
                )
                .fetch_optional(&mut *transaction)
                .await?;
                let done = sqlx::query!(
                    r#"SELECT coalesce(sum(amount), 0)::bigint AS "sum!",
                              coalesce(bool_or(key = $2), false) AS "known!"
                       FROM sandbox_refunds WHERE reference = $1"#,
                    reference,
                    key
                )
                .fetch_one(&mut *transaction)
                .await?;
                if !done.known {
                    if done.sum + amount > captured.unwrap_or(0) {
                        return Ok(false);
                    }
                    sqlx::query!(
                        "INSERT INTO sandbox_refunds (key, reference, amount) VALUES ($1, $2, $3)",
                        key,
                        reference,
                        amount
                    )
                    .execute(&mut *transaction)
                    .await?;
                }
                transaction.commit().await?;
                Ok(true)
            })
            .await
    }

    /// Takes webhooks that are to be sent now, at most `limit`, the latest first: order proves
    /// nothing.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn notices(&self, limit: i64) -> Result<Vec<ToyNotice>, StoreError> {
        self.database
            .run(async move |pool| {
                let rows = sqlx::query!(
                    "WITH gone AS (
                         DELETE FROM sandbox_notices
                         WHERE id IN (SELECT id FROM sandbox_notices WHERE due_at <= now()
                                      ORDER BY due_at LIMIT $1 FOR UPDATE SKIP LOCKED)
                         RETURNING id, event, reference, kind
                     )
                     SELECT event, reference, kind FROM gone ORDER BY id DESC",
                    limit
                )
                .fetch_all(&pool)
                .await?;
                Ok(rows
                    .into_iter()
                    .map(|row| ToyNotice {
                        event: row.event,
                        reference: row.reference,
                        kind: row.kind,
                    })
                    .collect())
            })
            .await
    }
}
