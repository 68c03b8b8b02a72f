//! What PostgreSQL has of a partition, as of one snapshot: enough to make its Redis anew.

use std::collections::BTreeMap;

use super::{
    StoreError,
    audit::Snapshot,
    rounds::{intent, money, policy, window},
    unreadable,
};
use crate::domain::{
    id::{
        BuyerId, Epoch, Fingerprint, JournalId, OperationId, OrderId, Partition, RoundId,
        SaleNumber,
    },
    journal::Delta,
    model::Wish,
    round::{Counters, Intent, Terms},
};

/// A round as it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredRound {
    /// Its rules.
    pub terms: Terms,
    /// What the operator wants.
    pub intent: Intent,
    /// Where its units are, dead letters included.
    pub counters: Counters,
    /// The last entry that touched it; number 0 before its first.
    pub entry: JournalId,
    /// Whether Redis has had it.
    pub provisioned: bool,
    /// What its dead letters add to where its units are.
    pub dead: Delta,
    /// Until when it only redeems receipts, milliseconds since the Unix epoch; 0 for none.
    pub grace_until_ms: i64,
}

/// A dead letter that is not resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredLetter {
    /// Which.
    pub id: i64,
    /// The entry.
    pub entry: JournalId,
    /// The round.
    pub round: RoundId,
    /// The first event that it stands for.
    pub seq_from: u64,
    /// The last; `seq_from - 1` when it stands for none.
    pub seq_to: u64,
    /// What it adds to where the round's units are.
    pub delta: Delta,
    /// The order, when it is about one.
    pub order: Option<OrderId>,
    /// Why.
    pub reason: String,
    /// What the entry was.
    pub payload: Vec<u8>,
    /// When it happened, by Redis' clock, milliseconds since the Unix epoch; when the writer kept
    /// it, if that is not known.
    pub at_ms: i64,
}

/// An operation that was carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredOperation {
    /// Of which sale.
    pub sale: SaleNumber,
    /// Which.
    pub operation: OperationId,
    /// What was asked for.
    pub fingerprint: Fingerprint,
    /// The seq that it took.
    pub seq: u64,
}

/// What the orders of an archived round add up to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ArchivedOrders {
    /// How many there are.
    pub orders: u64,
    /// Units of them that count as sold.
    pub sold: u64,
}

impl Snapshot {
    /// Up to where the journal of a partition is stored, and the epoch that Redis must be in.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn position(
        &mut self,
        partition: Partition,
    ) -> Result<(Epoch, JournalId), StoreError> {
        let row = sqlx::query!(
            "SELECT epoch, position, position_epoch FROM journal_positions WHERE partition = $1",
            partition.0.cast_signed()
        )
        .fetch_one(&mut *self.transaction)
        .await?;
        let stored = JournalId {
            epoch: Epoch(row.position_epoch.cast_unsigned()),
            pseq: row.position.cast_unsigned(),
        };
        Ok((Epoch(row.epoch.cast_unsigned()), stored))
    }

    /// All rounds of a partition.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn rounds_of(
        &mut self,
        partition: Partition,
    ) -> Result<BTreeMap<RoundId, StoredRound>, StoreError> {
        sqlx::query!(
            r#"SELECT rounds.sale, rounds.round, unit_price, currency, initial_allocation,
                      rounds.per_buyer_limit, rounds.per_order_limit, rounds.opens_at,
                      rounds.closes_at, intent, rounds.allocation, remaining, rounds.held, sold,
                      seq,
                      rounds.epoch, pseq, grace_until, provisioned_at IS NOT NULL AS "provisioned!",
                      rounds.hold_ms, rounds.limit_scope, rounds.ends, rounds.waitlist,
                      dead.allocated AS "dead_allocated!", dead.held AS "dead_held!",
                      dead.units AS "dead_units!"
               FROM rounds JOIN sales ON sales.number = rounds.sale
               CROSS JOIN LATERAL (
                   SELECT coalesce(sum(allocated), 0)::bigint AS allocated,
                          coalesce(sum(held), 0)::bigint AS held,
                          coalesce(sum(units), 0)::bigint AS units
                   FROM dead_letters
                   WHERE dead_letters.sale = rounds.sale AND dead_letters.round = rounds.round
                     AND resolved_at IS NULL) AS dead
               WHERE partition = $1"#,
            partition.0.cast_signed()
        )
        .fetch_all(&mut *self.transaction)
        .await?
        .into_iter()
        .map(|row| {
            let id = RoundId {
                sale: SaleNumber(row.sale.cast_unsigned()),
                round: row.round.cast_unsigned(),
            };
            let round = StoredRound {
                terms: Terms {
                    window: window(row.opens_at, row.closes_at),
                    per_buyer_limit: row.per_buyer_limit.cast_unsigned(),
                    per_order_limit: row.per_order_limit.cast_unsigned(),
                    unit_price: money(row.unit_price, &row.currency)?,
                    allocation: row.initial_allocation.cast_unsigned(),
                    policy: policy(row.hold_ms, &row.limit_scope, &row.ends, row.waitlist)?,
                },
                intent: intent(&row.intent)?,
                counters: Counters {
                    allocation: row.allocation.cast_unsigned(),
                    remaining: row.remaining.cast_unsigned(),
                    held: row.held.cast_unsigned(),
                    sold: row.sold.cast_unsigned(),
                    seq: row.seq.cast_unsigned(),
                },
                entry: JournalId {
                    epoch: Epoch(row.epoch.cast_unsigned()),
                    pseq: row.pseq.cast_unsigned(),
                },
                provisioned: row.provisioned || row.pseq > 0,
                dead: Delta {
                    allocated: row.dead_allocated,
                    held: row.dead_held,
                    sold: row.dead_units,
                },
                grace_until_ms: row.grace_until.map_or(0, |at| at.timestamp_millis()),
            };
            Ok((id, round))
        })
        .collect()
    }

    /// The dead letters of a partition that are not resolved, in order of the journal.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn letters(&mut self, partition: Partition) -> Result<Vec<StoredLetter>, StoreError> {
        let rows = sqlx::query!(
            r#"SELECT id, epoch, pseq, sale, round, seq_from, seq_to, units, allocated, held, order_id,
                      reason, payload, coalesce(at, created_at) AS "at!"
             FROM dead_letters
             WHERE partition = $1 AND resolved_at IS NULL
             ORDER BY pseq, seq_from, id"#,
            partition.0.cast_signed()
        )
        .fetch_all(&mut *self.transaction)
        .await?;
        Ok(rows
            .into_iter()
            .map(|row| StoredLetter {
                id: row.id,
                entry: JournalId {
                    epoch: Epoch(row.epoch.cast_unsigned()),
                    pseq: row.pseq.cast_unsigned(),
                },
                round: RoundId {
                    sale: SaleNumber(row.sale.cast_unsigned()),
                    round: row.round.cast_unsigned(),
                },
                seq_from: row.seq_from.cast_unsigned(),
                seq_to: row.seq_to.cast_unsigned(),
                delta: Delta {
                    allocated: row.allocated,
                    held: row.held,
                    sold: row.units,
                },
                order: row.order_id.map(OrderId),
                reason: row.reason,
                payload: row.payload,
                at_ms: row.at.timestamp_millis(),
            })
            .collect())
    }

    /// All operations of a partition that were carried out.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn operations(
        &mut self,
        partition: Partition,
    ) -> Result<Vec<StoredOperation>, StoreError> {
        let rows = sqlx::query!(
            r#"SELECT round_events.sale, operation_id AS "operation!", units, seq, fingerprint
               FROM round_events JOIN sales ON sales.number = round_events.sale
               WHERE partition = $1 AND operation_id IS NOT NULL"#,
            partition.0.cast_signed()
        )
        .fetch_all(&mut *self.transaction)
        .await?;
        Ok(rows
            .into_iter()
            .map(|row| StoredOperation {
                sale: SaleNumber(row.sale.cast_unsigned()),
                operation: row.operation.into(),
                fingerprint: row
                    .fingerprint
                    .and_then(|bytes| Some(Fingerprint(bytes.try_into().ok()?)))
                    // A restock from before this was kept.
                    .unwrap_or_else(|| Fingerprint::units("restock", row.units.cast_unsigned())),
                seq: row.seq.cast_unsigned(),
            })
            .collect())
    }

    /// The line of a round, in order: those who joined and have not left since.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn line(&mut self, round: RoundId) -> Result<BTreeMap<u64, Wish>, StoreError> {
        let rows = sqlx::query!(
            r#"SELECT seq, order_id AS "order_id!", actor AS "actor!", units, fingerprint AS "fingerprint!"
               FROM round_events AS joined
               WHERE sale = $1 AND round = $2 AND kind = 'join'
                 AND NOT EXISTS (SELECT FROM round_events AS gone
                                 WHERE gone.sale = $1 AND gone.round = $2 AND gone.kind = 'leave'
                                   AND gone.actor = joined.actor
                                   AND (gone.epoch, gone.seq) > (joined.epoch, joined.seq))"#,
            round.sale.0.cast_signed(),
            round.round.cast_signed()
        )
        .fetch_all(&mut *self.transaction)
        .await?;
        rows.into_iter()
            .map(|row| {
                let fingerprint = row.fingerprint.try_into();
                let wish = Wish {
                    buyer: BuyerId(row.actor),
                    order: OrderId(row.order_id),
                    fingerprint: Fingerprint(
                        fingerprint.map_err(|_| unreadable(format!("wish of {}", row.actor)))?,
                    ),
                    units: row.units.cast_unsigned(),
                };
                Ok((row.seq.cast_unsigned(), wish))
            })
            .collect()
    }

    /// What a limit over all rounds knows of the buyers of archived rounds, by sale: units, and
    /// acceptances ever.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn archived_buyers(
        &mut self,
        partition: Partition,
    ) -> Result<Vec<(SaleNumber, BuyerId, (u64, u64))>, StoreError> {
        let rows = sqlx::query!(
            r#"SELECT orders.sale, buyer_id, sum(quantity - returned)::bigint AS "units!",
                      count(*) AS "orders!"
               FROM orders
               JOIN rounds ON rounds.sale = orders.sale AND rounds.round = orders.round
               JOIN sales ON sales.number = orders.sale
               WHERE partition = $1 AND intent = 'archived' AND sales.limit_scope = 'sale'
               GROUP BY orders.sale, buyer_id"#,
            partition.0.cast_signed()
        )
        .fetch_all(&mut *self.transaction)
        .await?;
        Ok(rows
            .into_iter()
            .map(|row| {
                let counts = (row.units.cast_unsigned(), row.orders.cast_unsigned());
                (
                    SaleNumber(row.sale.cast_unsigned()),
                    BuyerId(row.buyer_id),
                    counts,
                )
            })
            .collect())
    }

    /// What the orders of each archived round of a partition add up to, in one query: they stay in
    /// PostgreSQL. A round without orders is not in it.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn archived(
        &mut self,
        partition: Partition,
    ) -> Result<BTreeMap<RoundId, ArchivedOrders>, StoreError> {
        let rows = sqlx::query!(
            r#"SELECT orders.sale, orders.round, count(*) AS "orders!",
                      coalesce(sum(quantity - returned), 0)::bigint AS "sold!"
               FROM orders
               JOIN rounds ON rounds.sale = orders.sale AND rounds.round = orders.round
               JOIN sales ON sales.number = orders.sale
               WHERE partition = $1 AND intent = 'archived'
               GROUP BY orders.sale, orders.round"#,
            partition.0.cast_signed()
        )
        .fetch_all(&mut *self.transaction)
        .await?;
        Ok(rows
            .into_iter()
            .map(|row| {
                let id = RoundId {
                    sale: SaleNumber(row.sale.cast_unsigned()),
                    round: row.round.cast_unsigned(),
                };
                let orders = ArchivedOrders {
                    orders: row.orders.cast_unsigned(),
                    sold: row.sold.cast_unsigned(),
                };
                (id, orders)
            })
            .collect())
    }
}
