//! How far the end of each round has come, its certificate, and what the audit found.

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::Value;

use super::{Database, StoreError, rounds::intent};
use crate::domain::{
    id::{Partition, RoundId, SaleId, SaleNumber},
    round::Intent,
};

/// How long any run is kept.
const KEPT: TimeDelta = TimeDelta::days(30);

/// A round that has something left to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ending {
    /// Whose running.
    pub sale: SaleId,
    /// What the sale is called.
    pub name: String,
    /// Where it lives.
    pub partition: Partition,
    /// Which.
    pub round: RoundId,
    /// How far it has come.
    pub intent: Intent,
    /// First instant of selling.
    pub opens_at: DateTime<Utc>,
    /// First instant after selling, if it was planned.
    pub closes_at: Option<DateTime<Utc>>,
    /// When selling ended.
    pub closed_at: DateTime<Utc>,
    /// Whether it has its certificate.
    pub certified: bool,
}

/// What became of a settled round, signed.
#[derive(Clone, Debug, PartialEq)]
pub struct Certificate {
    /// When selling ended.
    pub closed_at: DateTime<Utc>,
    /// When it was signed.
    pub issued_at: DateTime<Utc>,
    /// Which key signed it.
    pub key_id: String,
    /// That key, base64url.
    pub public_key: String,
    /// What is certified.
    pub body: Value,
    /// The same, signed: a compact JWS.
    pub jws: String,
}

/// A full look at a round that came to a verdict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditRun {
    /// Counts up; 0 for one that is not stored yet.
    pub id: i64,
    /// Which round.
    pub round: RoundId,
    /// When the stores were read.
    pub checked_at: DateTime<Utc>,
    /// How long that took, milliseconds.
    pub took_ms: i64,
    /// `pass` or `fail`.
    pub verdict: String,
    /// Who looked: `patrol`, `settle`, `certify` or `archive`.
    pub cause: String,
    /// The checks that failed.
    pub failing: Value,
}

/// The ends of rounds in PostgreSQL.
#[derive(Clone, Debug)]
pub struct Endings {
    database: Database,
}

impl Endings {
    /// Those in `database`.
    pub fn new(database: Database) -> Self {
        Self { database }
    }

    /// Rounds behind `after` that have a step left: closed before `settle_before`, settled without a
    /// certificate, settled and closed before `archive_before`, or archived with orders left in
    /// Redis. At most `limit`, in order of sale and round.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn due(
        &self,
        settle_before: DateTime<Utc>,
        archive_before: DateTime<Utc>,
        after: Option<RoundId>,
        limit: i64,
    ) -> Result<Vec<Ending>, StoreError> {
        let after = after.unwrap_or(RoundId {
            sale: SaleNumber(0),
            round: 0,
        });
        self.database
            .run(async move |pool| {
                sqlx::query!(
                    r#"SELECT sales.id, sales.name, sales.partition, rounds.sale, rounds.round,
                              intent, rounds.opens_at, rounds.closes_at,
                              least(rounds.closes_at, close.at) AS "closed_at!",
                              certificate.sale IS NOT NULL AS "certified!"
                       FROM rounds
                       JOIN sales ON sales.number = rounds.sale
                       LEFT JOIN LATERAL (
                           SELECT at FROM round_events AS event
                           WHERE event.sale = rounds.sale AND event.round = rounds.round
                             AND event.kind = 'close'
                           ORDER BY epoch DESC, seq DESC LIMIT 1
                       ) AS close ON intent NOT IN ('live', 'paused')
                       LEFT JOIN certificates AS certificate
                           ON certificate.sale = rounds.sale AND certificate.round = rounds.round
                       WHERE provisioned_at IS NOT NULL AND archived_at IS NULL
                         AND (rounds.sale, rounds.round) > ($3, $4)
                         AND least(rounds.closes_at, close.at) IS NOT NULL
                         AND CASE intent
                             WHEN 'archived' THEN true
                             WHEN 'settled' THEN certificate.sale IS NULL
                                                 OR certificate.closed_at <= $2
                             ELSE least(rounds.closes_at, close.at) <= $1
                             END
                       ORDER BY rounds.sale, rounds.round
                       LIMIT $5"#,
                    settle_before,
                    archive_before,
                    after.sale.0.cast_signed(),
                    after.round.cast_signed(),
                    limit
                )
                .fetch_all(&pool)
                .await?
                .into_iter()
                .map(|row| {
                    Ok(Ending {
                        sale: SaleId(row.id),
                        name: row.name,
                        partition: Partition(row.partition.cast_unsigned()),
                        round: RoundId {
                            sale: SaleNumber(row.sale.cast_unsigned()),
                            round: row.round.cast_unsigned(),
                        },
                        intent: intent(&row.intent)?,
                        opens_at: row.opens_at,
                        closes_at: row.closes_at,
                        closed_at: row.closed_at,
                        certified: row.certified,
                    })
                })
                .collect()
            })
            .await
    }

    /// Notes that the last order of an archived round has left Redis.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn set_archived(&self, round: RoundId, now: DateTime<Utc>) -> Result<(), StoreError> {
        self.database
            .run(async move |pool| {
                sqlx::query!(
                    "UPDATE rounds SET archived_at = $3
                     WHERE sale = $1 AND round = $2 AND intent = 'archived' AND archived_at IS NULL",
                    round.sale.0.cast_signed(),
                    round.round.cast_signed(),
                    now
                )
                .execute(&pool)
                .await?;
                Ok(())
            })
            .await
    }

    /// Stores a certificate; `false` when the round has one already, which stays.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn certify(
        &self,
        round: RoundId,
        certificate: Certificate,
    ) -> Result<bool, StoreError> {
        self.database
            .run(async move |pool| {
                let done = sqlx::query!(
                    "INSERT INTO certificates (sale, round, closed_at, issued_at, key_id, public_key,
                                               body, jws)
                     VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
                     ON CONFLICT DO NOTHING",
                    round.sale.0.cast_signed(),
                    round.round.cast_signed(),
                    certificate.closed_at,
                    certificate.issued_at,
                    certificate.key_id,
                    certificate.public_key,
                    certificate.body,
                    certificate.jws
                )
                .execute(&pool)
                .await?;
                Ok(done.rows_affected() == 1)
            })
            .await
    }

    /// The certificate of a round, if it has one.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn certificate(
        &self,
        sale: SaleId,
        round: u32,
    ) -> Result<Option<Certificate>, StoreError> {
        self.database
            .run(async move |pool| {
                Ok(sqlx::query_as!(
                    Certificate,
                    "SELECT closed_at, issued_at, key_id, public_key, body, jws
                     FROM certificates JOIN sales ON sales.number = certificates.sale
                     WHERE sales.id = $1 AND certificates.round = $2",
                    sale.0,
                    i32::try_from(round).unwrap_or(i32::MAX)
                )
                .fetch_optional(&pool)
                .await?)
            })
            .await
    }

    /// The keys that signed certificates, each once, with their ids: `(id, key)`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn keys(&self) -> Result<Vec<(String, String)>, StoreError> {
        self.database
            .run(async move |pool| {
                let rows = sqlx::query!(
                    "SELECT DISTINCT key_id, public_key FROM certificates ORDER BY key_id LIMIT 100"
                )
                .fetch_all(&pool)
                .await?;
                Ok(rows
                    .into_iter()
                    .map(|row| (row.key_id, row.public_key))
                    .collect())
            })
            .await
    }

    /// Keeps what a look at a round found, and lets go of what is old.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn note(&self, run: AuditRun) -> Result<(), StoreError> {
        let (sale, round) = (
            run.round.sale.0.cast_signed(),
            run.round.round.cast_signed(),
        );
        self.database
            .run(async move |pool| {
                sqlx::query!(
                    "INSERT INTO audit_runs (sale, round, checked_at, took_ms, verdict, cause,
                                             failing)
                     VALUES ($1, $2, $3, $4, $5, $6, $7)",
                    sale,
                    round,
                    run.checked_at,
                    run.took_ms,
                    run.verdict,
                    run.cause,
                    run.failing
                )
                .execute(&pool)
                .await?;
                sqlx::query!(
                    "DELETE FROM audit_runs AS run
                     USING (SELECT id, checked_at,
                                   row_number() OVER (PARTITION BY verdict ORDER BY id DESC) AS age,
                                   CASE verdict WHEN 'pass' THEN 100 ELSE 1000 END AS kept
                            FROM audit_runs WHERE sale = $1 AND round = $2) AS old
                     WHERE run.id = old.id
                       AND (old.age > old.kept OR old.checked_at < $3)",
                    sale,
                    round,
                    run.checked_at - KEPT
                )
                .execute(&pool)
                .await?;
                Ok(())
            })
            .await
    }

    /// What looks at a sale's rounds found, the latest first: those before the run `before`, at
    /// most `limit`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn runs(
        &self,
        sale: SaleId,
        before: Option<i64>,
        limit: i64,
    ) -> Result<Vec<AuditRun>, StoreError> {
        self.database
            .run(async move |pool| {
                let rows = sqlx::query!(
                    "SELECT audit_runs.id, sale, audit_runs.round, checked_at, took_ms, verdict,
                            cause, failing
                     FROM audit_runs JOIN sales ON sales.number = audit_runs.sale
                     WHERE sales.id = $1 AND ($2::bigint IS NULL OR audit_runs.id < $2)
                     ORDER BY audit_runs.id DESC
                     LIMIT $3",
                    sale.0,
                    before,
                    limit
                )
                .fetch_all(&pool)
                .await?;
                Ok(rows
                    .into_iter()
                    .map(|row| AuditRun {
                        id: row.id,
                        round: RoundId {
                            sale: SaleNumber(row.sale.cast_unsigned()),
                            round: row.round.cast_unsigned(),
                        },
                        checked_at: row.checked_at,
                        took_ms: row.took_ms,
                        verdict: row.verdict,
                        cause: row.cause,
                        failing: row.failing,
                    })
                    .collect())
            })
            .await
    }
}
