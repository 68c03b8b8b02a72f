//! What became of a round, out of what is stored of it: all of it as of one instant.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;

use super::{Database, StoreError, rounds::money};
use crate::domain::{id::RoundId, money::Money, round::Counters};

/// Buckets of a series at most.
const BUCKETS_MAX: i64 = 120;

/// The lengths that a bucket may have, in seconds; beyond the last whole days.
const BUCKET_SECONDS: [i64; 11] = [1, 2, 5, 10, 30, 60, 300, 900, 3_600, 14_400, 86_400];

/// Changes of supply in a report; more have to be looked for in the events.
const SUPPLIES_MAX: i64 = 200;

/// Instants at which nothing was left in a report.
const SOLD_OUT_MAX: i64 = 1_000;

/// A round's report.
#[derive(Clone, Debug)]
pub struct Report {
    /// When the round could sell first: its opening, or when Redis had it.
    pub opened_at: DateTime<Utc>,
    /// The end of its window.
    pub closes_at: Option<DateTime<Utc>>,
    /// Units that it began with.
    pub initial_allocation: u64,
    /// Where its units are.
    pub counters: Counters,
    /// The price of one.
    pub unit_price: Money,
    /// Different buyers with an order.
    pub buyers: u64,
    /// Orders by how they began and how they stand.
    pub orders: Vec<Standing>,
    /// The first and the last acceptance.
    pub accepted: Option<(DateTime<Utc>, DateTime<Utc>)>,
    /// Units of the largest order.
    pub largest_order: u64,
    /// Holds that were paid, whatever became of them.
    pub paid: i64,
    /// The second with the most orders.
    pub busiest: Option<Bucket>,
    /// The length of a bucket of `sold`, in seconds.
    pub bucket_seconds: i64,
    /// Acceptances over time; empty buckets are left out.
    pub sold: Vec<Bucket>,
    /// The length of a bucket of `refused`, in seconds.
    pub refused_seconds: i64,
    /// Refusals over time, by reason.
    pub refused: Vec<RefusedBucket>,
    /// The instants from which on nothing was left, each with its place; the first thousand.
    pub sold_out: Vec<(DateTime<Utc>, i64)>,
    /// What operators added and took away; the first two hundred.
    pub supplies: Vec<Supply>,
}

/// Orders that began and stand alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// `held` or `confirmed`.
    pub accepted_as: String,
    /// How they stand.
    pub status: String,
    /// How many.
    pub orders: i64,
    /// Their units.
    pub units: i64,
}

/// What was accepted in a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// Where it begins.
    pub at: DateTime<Utc>,
    /// Orders.
    pub orders: i64,
    /// Their units.
    pub units: i64,
}

/// What was refused in a while, for one reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedBucket {
    /// Where it begins.
    pub at: DateTime<Utc>,
    /// The code of the problem.
    pub reason: String,
    /// Purchases.
    pub requests: i64,
    /// Units that they asked for.
    pub units: i64,
}

/// A change of what there is to sell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Supply {
    /// When.
    pub at: DateTime<Utc>,
    /// Its place among the events of the round.
    pub seq: i64,
    /// `restock` or `reduce`.
    pub kind: String,
    /// Units that it added or took away.
    pub units: i64,
    /// Units accepted between it and the next one.
    pub sold_until_next: i64,
}

/// Reports out of many tables.
#[derive(Clone, Debug)]
pub struct Reports {
    database: Database,
}

impl Reports {
    /// The reports of `database`.
    pub fn new(database: Database) -> Self {
        Self { database }
    }

    /// The report of a round; `None` when there is no such round.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn of(&self, round: RoundId) -> Result<Option<Report>, StoreError> {
        self.database
            .run(async move |pool| {
                let mut snapshot = pool
                    .begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                    .await?;
                let report = read(&mut snapshot, round).await?;
                snapshot.commit().await?;
                Ok(report)
            })
            .await
    }
}

async fn read(sql: &mut PgConnection, round: RoundId) -> Result<Option<Report>, StoreError> {
    let (sale, number) = (round.sale.0.cast_signed(), round.round.cast_signed());
    let facts = sqlx::query!(
        r#"SELECT initial_allocation, allocation, remaining, held, sold, seq, unit_price, currency,
                  greatest(opens_at, provisioned_at) AS "opened_at!", closes_at
           FROM rounds WHERE sale = $1 AND round = $2"#,
        sale,
        number
    )
    .fetch_optional(&mut *sql)
    .await?;
    let Some(facts) = facts else { return Ok(None) };

    let orders = sqlx::query_as!(
        Standing,
        r#"SELECT accepted_as, status, count(*) AS "orders!", sum(quantity)::bigint AS "units!"
           FROM orders WHERE sale = $1 AND round = $2
           GROUP BY accepted_as, status ORDER BY accepted_as, status"#,
        sale,
        number
    )
    .fetch_all(&mut *sql)
    .await?;
    let whole = sqlx::query!(
        r#"SELECT count(DISTINCT buyer_id) AS "buyers!", min(accepted_at) AS first,
                  max(accepted_at) AS last, coalesce(max(quantity), 0) AS "largest!",
                  (SELECT count(*) FROM round_events
                   WHERE sale = $1 AND round = $2 AND kind = 'confirm') AS "paid!"
           FROM orders WHERE sale = $1 AND round = $2"#,
        sale,
        number
    )
    .fetch_one(&mut *sql)
    .await?;
    let accepted = whole.first.zip(whole.last);

    let from = facts.opened_at;
    let span = accepted.map_or(0, |(_, last)| (last - from).num_seconds());
    let bucket_seconds = bucket(span, 1);
    let sold = series(&mut *sql, round, bucket_seconds, from).await?;
    let busiest = sqlx::query_as!(
        Bucket,
        r#"SELECT date_trunc('second', accepted_at) AS "at!", count(*) AS "orders!",
                  sum(quantity)::bigint AS "units!"
           FROM orders WHERE sale = $1 AND round = $2
           GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 1"#,
        sale,
        number
    )
    .fetch_optional(&mut *sql)
    .await?;

    let minutes = sqlx::query!(
        "SELECT min(minute) AS first, max(minute) AS last FROM refusals
         WHERE sale = $1 AND round = $2",
        sale,
        number
    )
    .fetch_one(&mut *sql)
    .await?;
    let span = minutes
        .first
        .zip(minutes.last)
        .map_or(0, |(first, last)| (last - first).num_seconds());
    let refused_seconds = bucket(span, 60);
    let refused = sqlx::query_as!(
        RefusedBucket,
        r#"SELECT date_bin(make_interval(secs => $3), minute, $4) AS "at!", reason,
                  sum(requests)::bigint AS "requests!", sum(units)::bigint AS "units!"
           FROM refusals WHERE sale = $1 AND round = $2
           GROUP BY 1, 2 ORDER BY 1, 2"#,
        sale,
        number,
        seconds(refused_seconds),
        minutes.first.unwrap_or(from)
    )
    .fetch_all(&mut *sql)
    .await?;

    let sold_out = sqlx::query!(
        r#"WITH moves AS (
               SELECT epoch, seq, accepted_at AS at, -quantity AS units
               FROM orders WHERE sale = $1 AND round = $2
               UNION ALL
               SELECT epoch, seq, at,
                      CASE WHEN kind = 'reduce' THEN -units ELSE units END
               FROM round_events
               WHERE sale = $1 AND round = $2
                 AND kind IN ('cancel', 'expire', 'withdraw', 'return', 'restock', 'reduce')
           ), stock AS (
               SELECT at, seq, units, $3::bigint + sum(units) OVER (ORDER BY epoch, seq) AS remaining
               FROM moves
           )
           SELECT at AS "at!", seq AS "seq!" FROM stock
           WHERE remaining = 0 AND units < 0
           ORDER BY seq LIMIT $4"#,
        sale,
        number,
        facts.initial_allocation,
        SOLD_OUT_MAX
    )
    .fetch_all(&mut *sql)
    .await?;
    let supplies = sqlx::query_as!(
        Supply,
        r#"WITH supply AS (
               SELECT epoch, seq, at, kind, units,
                      lead(epoch) OVER (ORDER BY epoch, seq) AS next_epoch,
                      lead(seq) OVER (ORDER BY epoch, seq) AS next_seq
               FROM round_events
               WHERE sale = $1 AND round = $2 AND kind IN ('restock', 'reduce')
               ORDER BY epoch, seq LIMIT $3
           )
           SELECT at AS "at!", seq AS "seq!", kind AS "kind!", units AS "units!", (
               SELECT coalesce(sum(quantity), 0)::bigint FROM orders
               WHERE sale = $1 AND round = $2
                 AND (orders.epoch, orders.seq) > (supply.epoch, supply.seq)
                 AND (next_seq IS NULL OR (orders.epoch, orders.seq) < (next_epoch, next_seq))
           ) AS "sold_until_next!"
           FROM supply ORDER BY epoch, seq"#,
        sale,
        number,
        SUPPLIES_MAX
    )
    .fetch_all(&mut *sql)
    .await?;

    Ok(Some(Report {
        opened_at: from,
        closes_at: facts.closes_at,
        initial_allocation: facts.initial_allocation.cast_unsigned(),
        counters: Counters {
            allocation: facts.allocation.cast_unsigned(),
            remaining: facts.remaining.cast_unsigned(),
            held: facts.held.cast_unsigned(),
            sold: facts.sold.cast_unsigned(),
            seq: facts.seq.cast_unsigned(),
        },
        unit_price: money(facts.unit_price, &facts.currency)?,
        buyers: whole.buyers.cast_unsigned(),
        orders,
        accepted,
        largest_order: whole.largest.cast_unsigned(),
        paid: whole.paid,
        busiest,
        bucket_seconds,
        sold,
        refused_seconds,
        refused,
        sold_out: sold_out.into_iter().map(|row| (row.at, row.seq)).collect(),
        supplies,
    }))
}

async fn series(
    sql: &mut PgConnection,
    round: RoundId,
    bucket_seconds: i64,
    from: DateTime<Utc>,
) -> Result<Vec<Bucket>, StoreError> {
    let buckets = sqlx::query_as!(
        Bucket,
        r#"SELECT date_bin(make_interval(secs => $3), accepted_at, $4) AS "at!",
                  count(*) AS "orders!", sum(quantity)::bigint AS "units!"
           FROM orders WHERE sale = $1 AND round = $2
           GROUP BY 1 ORDER BY 1"#,
        round.sale.0.cast_signed(),
        round.round.cast_signed(),
        seconds(bucket_seconds),
        from
    )
    .fetch_all(sql)
    .await?;
    Ok(buckets)
}

/// The shortest bucket of at least `least` seconds of which no more than [`BUCKETS_MAX`] cover
/// `span`.
fn bucket(span: i64, least: i64) -> i64 {
    let needed = span / BUCKETS_MAX + 1;
    let fits = |length: &&i64| **length >= needed.max(least);
    let known = BUCKET_SECONDS.iter().find(fits).copied();
    known.unwrap_or_else(|| 86_400 * (needed / 86_400 + 1))
}

#[expect(clippy::cast_precision_loss, reason = "seconds of some years")]
fn seconds(seconds: i64) -> f64 {
    seconds as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_has_as_many_buckets_as_a_page_can_show() {
        for span in [
            0,
            1,
            119,
            120,
            121,
            3_600,
            86_400,
            30 * 86_400,
            3_650 * 86_400,
        ] {
            for least in [1, 60] {
                let length = bucket(span, least);
                assert!(
                    length >= least && span / length < BUCKETS_MAX,
                    "{span} {length}"
                );
            }
        }
        assert_eq!((bucket(5, 1), bucket(5, 60), bucket(200, 1)), (1, 60, 2));
    }
}
