//! What the auditor asks PostgreSQL: everything about a round as of one snapshot.

use sqlx::{AssertSqlSafe, Postgres, Transaction};

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::{
    Database, StoreError,
    orders::{OrderColumns, Place},
    rounds::intent,
    unreadable,
};
use crate::domain::{
    id::{BuyerId, Epoch, JournalId, Partition, RoundId, SaleId, SaleNumber},
    journal::Delta,
    order::{Mode, Order},
    round::{Counters, Intent, LimitScope},
};

/// What the writer has stored of a round, and up to where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Up to where the partition's journal is stored.
    pub position: JournalId,
    /// The entry that brought the counters.
    pub counted_at: JournalId,
    /// The counters that the writer stored with the position.
    pub counters: Counters,
    /// What the operator wants.
    pub intent: Intent,
    /// Whether Redis has confirmed that it has the round.
    pub provisioned: bool,
}

/// What the payments of a round come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoundMoney {
    /// Payments of its orders.
    pub payments: u64,
    /// Sold orders that no payment pays for, although the sale takes money.
    pub unpaid: u64,
    /// Payments that are over and keep another amount than their sold orders are worth.
    pub differing: u64,
    /// Payments that took money or confirmed an order and have come no further for ten minutes.
    pub stuck: u64,
}

/// What PostgreSQL has of a round, counted in full.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoundSums {
    /// Up to where the partition's journal is stored.
    pub position: JournalId,
    /// The entry that brought the counters.
    pub counted_at: JournalId,
    /// The counters that the writer stored with the position.
    pub counters: Counters,
    /// What the operator wants.
    pub intent: Intent,
    /// Whether Redis has confirmed that it has the round.
    pub provisioned: bool,
    /// Units that one buyer may have.
    pub per_buyer_limit: u64,
    /// What that limit counts over.
    pub limit_scope: LimitScope,
    /// Units that the round started with.
    pub initial_allocation: u64,
    /// Units of all restocks without those that were taken out, dead letters included.
    pub restocked: i64,
    /// Units of held orders.
    pub held: u64,
    /// Held orders.
    pub held_orders: u64,
    /// Units of orders that count as sold.
    pub sold: u64,
    /// Confirmed orders.
    pub confirmed_orders: u64,
    /// Dead letters that are not resolved.
    pub dead_letters: u64,
    /// What dead letters add to where the units are.
    pub dead: Delta,
    /// Events: orders, other events and dead letters.
    pub events: u64,
    /// The highest seq of one of them.
    pub last_seq: u64,
    /// The first seq that is missing.
    pub gap: Option<u64>,
    /// Seqs that more than one of them has.
    pub duplicates: u64,
    /// Buyers who have more than they may.
    pub buyers_above: u64,
    /// The most units that one buyer has.
    pub most_units: u64,
    /// What the sale asks of its acceptances.
    pub mode: Mode,
    /// Orders that were accepted in another way.
    pub otherwise: u64,
    /// Orders, whatever their status.
    pub orders: u64,
    /// Orders that were given back.
    pub cancelled_orders: u64,
    /// Buyers that wait in line.
    pub waiting: u64,
    /// Orders whose status no event explains, and events without their order.
    pub unexplained: u64,
    /// Orders of the sale, all rounds together.
    pub sale_orders: u64,
    /// Operations of the sale that were carried out.
    pub sale_operations: u64,
    /// Dead letters of the sale that are not resolved.
    pub sale_letters: u64,
    /// Whether nothing can happen to the other rounds of the sale any more.
    pub others_final: bool,
    /// The hash over all orders in the round's certificate, if it has one.
    pub certified: Option<String>,
    /// What its payments come to.
    pub money: RoundMoney,
}

/// What PostgreSQL says of a buyer of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BuyerSum {
    /// Who.
    pub buyer: BuyerId,
    /// Units of held and confirmed orders.
    pub units: u64,
    /// Orders, whatever their status.
    pub orders: u64,
}

impl RoundSums {
    /// What the writer has stored, without the sums.
    pub fn stored(&self) -> Stored {
        Stored {
            position: self.position,
            counted_at: self.counted_at,
            counters: self.counters,
            intent: self.intent,
            provisioned: self.provisioned,
        }
    }

    /// The counters as the rows say, to be equal to [`Self::counters`].
    pub fn counted(&self) -> Counters {
        let allocation = self
            .initial_allocation
            .saturating_add_signed(self.restocked);
        let sold = self.sold.saturating_add_signed(self.dead.sold);
        let held = self.held.saturating_add_signed(self.dead.held);
        Counters {
            allocation,
            remaining: allocation.saturating_sub(sold + held),
            held,
            sold,
            seq: self.last_seq,
        }
    }
}

/// One snapshot of the database. Use it in a task that nobody drops half-way.
#[derive(Debug)]
pub struct Snapshot {
    pub(super) transaction: Transaction<'static, Postgres>,
}

impl Snapshot {
    /// Takes a snapshot.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn take(database: &Database) -> Result<Self, StoreError> {
        let transaction = database
            .run(async |pool| {
                Ok::<_, StoreError>(
                    pool.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                        .await?,
                )
            })
            .await?;
        Ok(Self { transaction })
    }

    /// Everything about a round; `None` when there is none.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn round(&mut self, round: RoundId) -> Result<Option<RoundSums>, StoreError> {
        let (sale, number) = (round.sale.0.cast_signed(), round.round.cast_signed());
        let row = sqlx::query!(
            r#"SELECT rounds.epoch, pseq, rounds.allocation, remaining, held, sold, seq, intent,
                      rounds.per_buyer_limit, rounds.limit_scope, initial_allocation,
                      sales.durability,
                      provisioned_at IS NOT NULL AS "provisioned!",
                      coalesce(position, 0) AS "position!",
                      coalesce(position_epoch, 0) AS "position_epoch!"
               FROM rounds
               JOIN sales ON sales.number = rounds.sale
               LEFT JOIN journal_positions USING (partition)
               WHERE rounds.sale = $1 AND rounds.round = $2"#,
            sale,
            number
        )
        .fetch_optional(&mut *self.transaction)
        .await?;
        let Some(stored) = row else { return Ok(None) };
        let orders = sqlx::query!(
            r#"SELECT coalesce(sum(quantity - returned) FILTER (WHERE status <> 'held'), 0)::bigint
                          AS "sold!",
                      coalesce(sum(quantity - returned) FILTER (WHERE status = 'held'), 0)::bigint
                          AS "held!",
                      count(*) FILTER (WHERE status = 'held') AS "held_orders!",
                      count(*) FILTER (WHERE status = 'confirmed') AS "confirmed_orders!",
                      count(*) FILTER (WHERE status = 'cancelled') AS "cancelled_orders!",
                      count(*) AS "orders!",
                      count(*) FILTER (WHERE NOT CASE $3 WHEN 'default'
                                                 THEN durability IN ('fsync', 'fast')
                                                 ELSE durability = $3 END) AS "otherwise!"
               FROM orders WHERE sale = $1 AND round = $2"#,
            sale,
            number,
            stored.durability
        )
        .fetch_one(&mut *self.transaction)
        .await?;
        let letters = sqlx::query!(
            r#"SELECT count(*) AS "letters!",
                      coalesce(sum(units), 0)::bigint AS "sold!",
                      coalesce(sum(held), 0)::bigint AS "held!",
                      coalesce(sum(allocated), 0)::bigint AS "allocated!",
                      (SELECT coalesce(sum(CASE kind WHEN 'reduce' THEN -units ELSE units END),
                                       0)::bigint FROM round_events
                       WHERE sale = $1 AND round = $2 AND kind IN ('restock', 'reduce'))
                          AS "restocked!"
               FROM dead_letters WHERE sale = $1 AND round = $2 AND resolved_at IS NULL"#,
            sale,
            number
        )
        .fetch_one(&mut *self.transaction)
        .await?;
        // In order of (epoch, seq) each number must be one more than the one before it.
        let seqs = sqlx::query!(
            r#"WITH events AS (
                   SELECT epoch, seq FROM orders WHERE sale = $1 AND round = $2
                   UNION ALL
                   SELECT epoch, seq FROM round_events
                   WHERE sale = $1 AND round = $2 AND seq > 0
                   UNION ALL
                   SELECT epoch, generate_series(greatest(seq_from, 1), seq_to)
                   FROM dead_letters WHERE sale = $1 AND round = $2 AND resolved_at IS NULL
               ), steps AS (
                   SELECT seq, lag(seq, 1, 0::bigint) OVER (ORDER BY epoch, seq) AS before
                   FROM events
               )
               SELECT count(*) AS "events!", coalesce(max(seq), 0) AS "last_seq!",
                      min(before + 1) FILTER (WHERE seq > before + 1) AS gap,
                      count(*) FILTER (WHERE seq <= before) AS "duplicates!"
               FROM steps"#,
            sale,
            number
        )
        .fetch_one(&mut *self.transaction)
        .await?;
        let buyers = sqlx::query!(
            r#"SELECT count(*) FILTER (WHERE units > $3) AS "above!",
                      coalesce(max(units), 0) AS "most!"
               FROM (SELECT sum(quantity - returned)::bigint AS units FROM orders
                     WHERE sale = $1 AND (round = $2 OR $4)
                     GROUP BY buyer_id) AS buyers"#,
            sale,
            number,
            stored.per_buyer_limit,
            stored.limit_scope == LimitScope::Sale.as_str()
        )
        .fetch_one(&mut *self.transaction)
        .await?;
        // The last event of an order explains its status, and all of them what is left of it.
        let explained = sqlx::query!(
            r#"WITH changes AS (
                   SELECT order_id,
                          coalesce(sum(units) FILTER (WHERE kind IN ('cancel', 'withdraw', 'expire',
                                                                     'return')), 0) AS returned,
                          coalesce(sum(units) FILTER (WHERE kind = 'refund'), 0) AS refunded,
                          coalesce(sum(units) FILTER (WHERE kind = 'extend'), 0) AS extended_ms,
                          count(*) FILTER (WHERE from_held AND kind IN ('confirm', 'expire'))
                              AS ends,
                          max(seq) AS last_seq,
                          (array_agg(kind ORDER BY seq DESC))[1] AS last_kind
                   FROM round_events
                   WHERE sale = $1 AND round = $2 AND order_id IS NOT NULL
                     AND kind NOT IN ('join', 'leave')
                   GROUP BY order_id
               )
               SELECT count(*) FILTER (WHERE orders.id IS NULL
                          OR orders.last_seq <> coalesce(changes.last_seq, orders.seq)
                          OR orders.returned <> coalesce(changes.returned, 0)
                          OR orders.refunded <> coalesce(changes.refunded, 0)
                          OR orders.extended_ms <> coalesce(changes.extended_ms, 0)
                          -- A hold ends once: paid, run out, or given back as a whole.
                          OR coalesce(changes.ends, 0) <> CASE
                                 WHEN orders.accepted_as <> 'held' THEN 0
                                 WHEN orders.status IN ('confirmed', 'expired', 'refunded') THEN 1
                                 WHEN orders.status = 'held' THEN 0
                                 ELSE least(coalesce(changes.ends, 0), 1) END
                          OR CASE orders.status
                                 WHEN 'held' THEN orders.accepted_as <> 'held'
                                 WHEN 'confirmed' THEN changes.ends IS NULL
                                      AND orders.accepted_as <> 'confirmed'
                                 ELSE CASE changes.last_kind WHEN 'cancel' THEN 'cancelled'
                                                             WHEN 'withdraw' THEN 'withdrawn'
                                                             WHEN 'expire' THEN 'expired'
                                                             WHEN 'return' THEN 'refunded'
                                                             WHEN 'refund' THEN 'refunded' END
                                      IS DISTINCT FROM orders.status END) AS "unexplained!"
               FROM (SELECT * FROM orders WHERE sale = $1 AND round = $2) AS orders
               FULL JOIN changes ON changes.order_id = orders.id"#,
            sale,
            number
        )
        .fetch_one(&mut *self.transaction)
        .await?;
        let of_sale = sqlx::query!(
            r#"SELECT (SELECT count(*) FROM orders WHERE sale = $1) AS "orders!",
                      (SELECT count(*) FROM round_events
                       WHERE sale = $1 AND operation_id IS NOT NULL) AS "operations!",
                      (SELECT count(*) FROM dead_letters
                       WHERE sale = $1 AND resolved_at IS NULL) AS "letters!",
                      NOT EXISTS (SELECT FROM rounds
                                  WHERE sale = $1 AND round <> $2 AND provisioned_at IS NOT NULL
                                    AND intent NOT IN ('settled', 'archived')) AS "others_final!",
                      (SELECT count(*) FILTER (WHERE kind = 'join')
                              - count(*) FILTER (WHERE kind = 'leave') FROM round_events
                       WHERE sale = $1 AND round = $2 AND kind IN ('join', 'leave')) AS "waiting!",
                      (SELECT body ->> 'orders_sha256' FROM certificates
                       WHERE sale = $1 AND round = $2) AS certified"#,
            sale,
            number
        )
        .fetch_one(&mut *self.transaction)
        .await?;
        Ok(Some(RoundSums {
            position: journal_id(stored.position_epoch, stored.position),
            counted_at: journal_id(stored.epoch, stored.pseq),
            counters: Counters {
                allocation: stored.allocation.cast_unsigned(),
                remaining: stored.remaining.cast_unsigned(),
                held: stored.held.cast_unsigned(),
                sold: stored.sold.cast_unsigned(),
                seq: stored.seq.cast_unsigned(),
            },
            intent: intent(&stored.intent)?,
            provisioned: stored.provisioned,
            per_buyer_limit: stored.per_buyer_limit.cast_unsigned(),
            initial_allocation: stored.initial_allocation.cast_unsigned(),
            limit_scope: LimitScope::parse(&stored.limit_scope)
                .ok_or_else(|| unreadable(format!("scope of the limit of {round}")))?,
            restocked: letters.restocked + letters.allocated,
            held: orders.held.cast_unsigned(),
            held_orders: orders.held_orders.cast_unsigned(),
            sold: orders.sold.cast_unsigned(),
            confirmed_orders: orders.confirmed_orders.cast_unsigned(),
            dead_letters: letters.letters.cast_unsigned(),
            dead: Delta {
                allocated: letters.allocated,
                held: letters.held,
                sold: letters.sold,
            },
            events: seqs.events.cast_unsigned(),
            last_seq: seqs.last_seq.cast_unsigned(),
            gap: seqs.gap.map(i64::cast_unsigned),
            duplicates: seqs.duplicates.cast_unsigned(),
            buyers_above: buyers.above.cast_unsigned(),
            most_units: buyers.most.cast_unsigned(),
            mode: Mode::parse(&stored.durability)
                .ok_or_else(|| unreadable(format!("durability of sale {}", round.sale.0)))?,
            otherwise: orders.otherwise.cast_unsigned(),
            orders: orders.orders.cast_unsigned(),
            cancelled_orders: orders.cancelled_orders.cast_unsigned(),
            waiting: of_sale.waiting.cast_unsigned(),
            unexplained: explained.unexplained.cast_unsigned(),
            sale_orders: of_sale.orders.cast_unsigned(),
            sale_operations: of_sale.operations.cast_unsigned(),
            sale_letters: of_sale.letters.cast_unsigned(),
            others_final: of_sale.others_final,
            certified: of_sale.certified,
            money: self.money(round).await?,
        }))
    }

    /// What the payments of a round come to. A payment may pay for orders of other rounds, too.
    async fn money(&mut self, round: RoundId) -> Result<RoundMoney, StoreError> {
        let row = sqlx::query!(
            r#"WITH touched AS (
                   SELECT payment.id, payment.state, payment.updated_at, payment.captured,
                          payment.captured - payment.refunded - payment.refund_due AS kept,
                          (SELECT coalesce(sum((orders.quantity - orders.returned - orders.refunded)
                                               * orders.unit_price), 0)
                           FROM payment_orders AS paid JOIN orders ON orders.id = paid.order_id
                           WHERE paid.payment_id = payment.id AND paid.fate = 'confirmed'
                             AND orders.status = 'confirmed') AS worth,
                          EXISTS (SELECT FROM refunds AS refund
                                  WHERE refund.payment_id = payment.id
                                    AND refund.state = 'asked') AS asked
                   FROM payments AS payment
                   WHERE payment.id IN (SELECT payment_id FROM payment_orders
                                        WHERE sale = $1 AND round = $2)
               )
               SELECT count(*) AS "payments!",
                      count(*) FILTER (WHERE state IN ('captured', 'refunded') AND NOT asked
                                         AND kept <> worth) AS "differing!",
                      count(*) FILTER (WHERE (state IN ('capturing', 'revoking')
                                              OR state IN ('releasing', 'authorised') AND captured > 0
                                              OR asked)
                                         AND updated_at < now() - interval '10 minutes') AS "stuck!",
                      (SELECT count(*)
                       FROM orders JOIN sales ON sales.number = orders.sale
                       WHERE orders.sale = $1 AND orders.round = $2 AND sales.payment <> 'none'
                         AND orders.status = 'confirmed' AND orders.unit_price > 0
                         AND NOT EXISTS (SELECT FROM payment_orders AS paid
                                         WHERE paid.order_id = orders.id AND paid.live)) AS "unpaid!"
               FROM touched"#,
            round.sale.0.cast_signed(),
            round.round.cast_signed()
        )
        .fetch_one(&mut *self.transaction)
        .await?;
        Ok(RoundMoney {
            payments: row.payments.cast_unsigned(),
            unpaid: row.unpaid.cast_unsigned(),
            differing: row.differing.cast_unsigned(),
            stuck: row.stuck.cast_unsigned(),
        })
    }

    /// Orders behind `after`, whatever their status, in order of acceptance.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn orders(
        &mut self,
        round: RoundId,
        after: Place,
        limit: i64,
    ) -> Result<Vec<Order>, StoreError> {
        sqlx::query_as!(
            OrderColumns,
            "SELECT id, buyer_id, seq, pseq, quantity, unit_price, accepted_at, sale, round,
                    epoch, currency, status, accepted_as, durability, fingerprint,
                    receipt_key, hold_ms, extended_ms, returned, refunded, last_seq, updated_at
             FROM orders
             WHERE sale = $1 AND round = $2 AND (epoch, seq) > ($3, $4)
             ORDER BY epoch, seq
             LIMIT $5",
            round.sale.0.cast_signed(),
            round.round.cast_signed(),
            after.epoch.0.cast_signed(),
            after.seq.cast_signed(),
            limit
        )
        .fetch_all(&mut *self.transaction)
        .await?
        .into_iter()
        .map(Order::try_from)
        .collect()
    }

    /// Begins to count the buyers of a round, or of its sale: [`Snapshot::next_buyers`] gives them in pages.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn count_buyers(
        &mut self,
        round: RoundId,
        scope: LimitScope,
    ) -> Result<(), StoreError> {
        let of_round = match scope {
            LimitScope::Round => format!("AND round = {}", round.round),
            LimitScope::Sale => String::new(),
        };
        // A cursor takes no parameters; these are numbers.
        let statement = format!(
            "DECLARE buyers NO SCROLL CURSOR FOR
             SELECT buyer_id,
                    coalesce(sum(quantity - returned), 0)::bigint,
                    count(*)
             FROM orders WHERE sale = {} {of_round} GROUP BY buyer_id",
            round.sale.0
        );
        sqlx::raw_sql(AssertSqlSafe(statement))
            .execute(&mut *self.transaction)
            .await?;
        Ok(())
    }

    /// Some hundred buyers more; none at the end.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn next_buyers(&mut self) -> Result<Vec<BuyerSum>, StoreError> {
        let rows: Vec<(Uuid, i64, i64)> = sqlx::query_as("FETCH 500 FROM buyers")
            .fetch_all(&mut *self.transaction)
            .await?;
        Ok(rows
            .into_iter()
            .map(|(buyer, units, orders)| BuyerSum {
                buyer: BuyerId(buyer),
                units: units.cast_unsigned(),
                orders: orders.cast_unsigned(),
            })
            .collect())
    }

    /// The timelines that a round has orders or events of, in order.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn epochs(&mut self, round: RoundId) -> Result<Vec<u32>, StoreError> {
        let rows = sqlx::query_scalar!(
            r#"SELECT epoch AS "epoch!" FROM orders WHERE sale = $1 AND round = $2
               UNION SELECT epoch FROM round_events WHERE sale = $1 AND round = $2
               ORDER BY 1"#,
            round.sale.0.cast_signed(),
            round.round.cast_signed(),
        )
        .fetch_all(&mut *self.transaction)
        .await?;
        Ok(rows.into_iter().map(i32::cast_unsigned).collect())
    }
}

/// A round with what the writer has stored of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Glance {
    /// Whose running.
    pub sale: SaleId,
    /// Where it lives.
    pub partition: Partition,
    /// Which.
    pub round: RoundId,
    /// What is stored.
    pub stored: Stored,
}

/// Which rounds to look at, in order of sale and round.
#[derive(Clone, Debug)]
pub struct Glances {
    /// Those that sell at this instant, and [`Self::also`]; `None` takes all.
    pub open_at: Option<DateTime<Utc>>,
    /// These, open or not.
    pub also: Vec<RoundId>,
    /// Behind this round: the last of the page before.
    pub after: Option<RoundId>,
    /// So many at most.
    pub limit: i64,
}

impl Database {
    /// What the writer has stored of rounds that Redis has.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn glances(&self, which: Glances) -> Result<Vec<Glance>, StoreError> {
        let after = which.after.unwrap_or(RoundId {
            sale: SaleNumber(0),
            round: 0,
        });
        let (sales, rounds): (Vec<_>, Vec<_>) = which
            .also
            .iter()
            .map(|id| (id.sale.0.cast_signed(), id.round.cast_signed()))
            .unzip();
        self.run(async move |pool| {
            sqlx::query!(
                r#"SELECT sales.id, partition, rounds.sale, rounds.round, rounds.epoch, pseq,
                          rounds.allocation, remaining, held, sold, seq, intent,
                          coalesce(position, 0) AS "position!",
                          coalesce(position_epoch, 0) AS "position_epoch!"
                   FROM rounds
                   JOIN sales ON sales.number = rounds.sale
                   LEFT JOIN journal_positions USING (partition)
                   WHERE provisioned_at IS NOT NULL
                     AND (rounds.sale, rounds.round) > ($1, $2)
                     AND ($3::timestamptz IS NULL
                          OR (intent <> 'closed' AND rounds.opens_at <= $3
                              AND (rounds.closes_at IS NULL OR rounds.closes_at > $3))
                          OR (rounds.sale, rounds.round)
                             IN (SELECT * FROM unnest($4::int[], $5::int[])))
                   ORDER BY rounds.sale, rounds.round
                   LIMIT $6"#,
                after.sale.0.cast_signed(),
                after.round.cast_signed(),
                which.open_at,
                &sales,
                &rounds,
                which.limit
            )
            .fetch_all(&pool)
            .await?
            .into_iter()
            .map(|row| {
                Ok(Glance {
                    sale: SaleId(row.id),
                    partition: Partition(row.partition.cast_unsigned()),
                    round: RoundId {
                        sale: SaleNumber(row.sale.cast_unsigned()),
                        round: row.round.cast_unsigned(),
                    },
                    stored: Stored {
                        position: journal_id(row.position_epoch, row.position),
                        counted_at: journal_id(row.epoch, row.pseq),
                        counters: Counters {
                            allocation: row.allocation.cast_unsigned(),
                            remaining: row.remaining.cast_unsigned(),
                            held: row.held.cast_unsigned(),
                            sold: row.sold.cast_unsigned(),
                            seq: row.seq.cast_unsigned(),
                        },
                        intent: intent(&row.intent)?,
                        provisioned: true,
                    },
                })
            })
            .collect()
        })
        .await
    }
}

fn journal_id(epoch: i32, pseq: i64) -> JournalId {
    JournalId {
        epoch: Epoch(epoch.cast_unsigned()),
        pseq: pseq.cast_unsigned(),
    }
}
