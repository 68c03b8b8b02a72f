//! Refused purchases, as each process has counted them.

use chrono::DateTime;
use uuid::Uuid;

use super::{Database, StoreError};
use crate::domain::{demand::Reason, id::RoundId};

/// What one process has refused in a minute, for one reason, in all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Of which round.
    pub round: RoundId,
    /// Where the minute begins, milliseconds since the Unix epoch.
    pub minute_ms: i64,
    /// Why.
    pub reason: Reason,
    /// Which process.
    pub node: Uuid,
    /// How many purchases.
    pub requests: u64,
    /// Units that they asked for.
    pub units: u64,
}

/// The table `refusals`.
#[derive(Clone, Debug)]
pub struct Refusals {
    database: Database,
}

impl Refusals {
    /// The refusals in `database`.
    pub fn new(database: Database) -> Self {
        Self { database }
    }

    /// Puts counts there, each in the place of an earlier one of the same process. Counts only grow,
    /// so doing it again, or in another order, changes nothing.
    ///
    /// # Errors
    /// [`StoreError`]; then it may have happened.
    pub async fn put(&self, rows: Vec<Refused>) -> Result<(), StoreError> {
        self.database
            .run(async move |pool| {
                let sales: Vec<i32> = of(&rows, |row| row.round.sale.0.cast_signed());
                let rounds: Vec<i32> = of(&rows, |row| row.round.round.cast_signed());
                let minutes = of(&rows, |row| {
                    DateTime::from_timestamp_millis(row.minute_ms).unwrap_or_default()
                });
                let reasons: Vec<String> = of(&rows, |row| row.reason.as_str().to_owned());
                let nodes: Vec<Uuid> = of(&rows, |row| row.node);
                let requests: Vec<i64> = of(&rows, |row| row.requests.cast_signed());
                let units: Vec<i64> = of(&rows, |row| row.units.cast_signed());
                sqlx::query!(
                    "INSERT INTO refusals (sale, round, minute, reason, node, requests, units)
                     SELECT * FROM unnest($1::int[], $2::int[], $3::timestamptz[], $4::text[],
                                          $5::uuid[], $6::bigint[], $7::bigint[])
                     ON CONFLICT (sale, round, minute, reason, node) DO UPDATE
                     SET requests = greatest(refusals.requests, excluded.requests),
                         units = greatest(refusals.units, excluded.units)",
                    &sales,
                    &rounds,
                    &minutes,
                    &reasons,
                    &nodes,
                    &requests,
                    &units
                )
                .execute(&pool)
                .await?;
                Ok(())
            })
            .await
    }
}

fn of<T>(rows: &[Refused], member: impl Fn(&Refused) -> T) -> Vec<T> {
    rows.iter().map(member).collect()
}
