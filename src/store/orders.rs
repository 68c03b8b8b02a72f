//! Orders as they are stored: they follow Redis by as much as the writer is behind.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::{Database, StoreError, rounds::money, unreadable};
use crate::domain::{
    id::{BuyerId, Epoch, Fingerprint, JournalId, OrderId, Partition, RoundId, SaleNumber},
    order::{Durability, Order, Status},
};

/// Which orders to list, newest first. `None` leaves a filter out.
#[derive(Clone, Copy, Debug)]
pub struct Filter {
    /// Of this buyer.
    pub buyer: Option<BuyerId>,
    /// Of this sale.
    pub sale: Option<SaleNumber>,
    /// With this status.
    pub status: Option<Status>,
    /// Behind this order: the last of the page before.
    pub after: Option<OrderId>,
    /// So many at most.
    pub limit: i64,
}

/// A place among the events of a round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The timeline.
    pub epoch: Epoch,
    /// The number.
    pub seq: u64,
}

/// What PostgreSQL has of some buyers, as of one instant.
#[derive(Clone, Debug, Default)]
pub struct Newest {
    /// Their newest orders, in no particular order.
    pub orders: Vec<Order>,
    /// How much of each journal they show: the number of its last entry, in this timeline.
    pub positions: Vec<(Partition, JournalId)>,
}

/// A row as PostgreSQL has it.
pub(super) struct OrderColumns {
    pub(super) id: Uuid,
    pub(super) buyer_id: Uuid,
    pub(super) seq: i64,
    pub(super) pseq: i64,
    pub(super) quantity: i64,
    pub(super) unit_price: i64,
    pub(super) accepted_at: DateTime<Utc>,
    pub(super) sale: i32,
    pub(super) round: i32,
    pub(super) epoch: i32,
    pub(super) currency: String,
    pub(super) status: String,
    pub(super) accepted_as: String,
    pub(super) durability: String,
    pub(super) receipt_key: i16,
    pub(super) fingerprint: Vec<u8>,
    pub(super) hold_ms: i64,
    pub(super) extended_ms: i64,
    pub(super) returned: i64,
    pub(super) refunded: i64,
    pub(super) last_seq: i64,
    pub(super) updated_at: DateTime<Utc>,
}

impl TryFrom<OrderColumns> for Order {
    type Error = StoreError;

    fn try_from(row: OrderColumns) -> Result<Self, StoreError> {
        let status = |word: &str| {
            Status::parse(word).ok_or_else(|| unreadable(format!("status {word} of {}", row.id)))
        };
        let fingerprint = <[u8; 8]>::try_from(row.fingerprint.as_slice())
            .map_err(|_| unreadable(format!("fingerprint of {}", row.id)))?;
        Ok(Self {
            id: OrderId(row.id),
            round: RoundId {
                sale: SaleNumber(row.sale.cast_unsigned()),
                round: row.round.cast_unsigned(),
            },
            buyer: BuyerId(row.buyer_id),
            quantity: row.quantity.cast_unsigned(),
            unit_price: money(row.unit_price, &row.currency)?,
            status: status(&row.status)?,
            accepted_as: status(&row.accepted_as)?,
            durability: Durability::parse(&row.durability)
                .ok_or_else(|| unreadable(format!("durability of {}", row.id)))?,
            receipt_key: u8::try_from(row.receipt_key)
                .map_err(|_| unreadable(format!("key of the receipt of {}", row.id)))?,
            epoch: Epoch(row.epoch.cast_unsigned()),
            seq: row.seq.cast_unsigned(),
            pseq: row.pseq.cast_unsigned(),
            accepted_at_ms: row.accepted_at.timestamp_millis(),
            fingerprint: Fingerprint(fingerprint),
            hold_ms: row.hold_ms.cast_unsigned(),
            extended_ms: row.extended_ms.cast_unsigned(),
            returned: row.returned.cast_unsigned(),
            refunded: row.refunded.cast_unsigned(),
        })
    }
}

/// The table `orders`, but for the writer's part of it.
#[derive(Clone, Debug)]
pub struct Orders {
    database: Database,
}

impl Orders {
    /// The orders in `database`.
    pub fn new(database: Database) -> Self {
        Self { database }
    }

    /// The order with this id.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn by_id(&self, id: OrderId) -> Result<Option<Order>, StoreError> {
        Ok(self.by_ids(vec![id]).await?.pop())
    }

    /// Those of `ids` that are stored, in no particular order. Ask for a thousand at a time.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn by_ids(&self, ids: Vec<OrderId>) -> Result<Vec<Order>, StoreError> {
        let ids: Vec<Uuid> = ids.into_iter().map(|id| id.0).collect();
        self.database
            .run(async move |pool| {
                sqlx::query_as!(
                    OrderColumns,
                    "SELECT id, buyer_id, seq, pseq, quantity, unit_price, accepted_at, sale, round,
                            epoch, currency, status, accepted_as, durability, fingerprint,
                            receipt_key, hold_ms, extended_ms, returned, refunded, last_seq,
                            updated_at
                     FROM orders WHERE id = ANY ($1)",
                    &ids
                )
                .fetch_all(&pool)
                .await?
                .into_iter()
                .map(Order::try_from)
                .collect()
            })
            .await
    }

    /// A page of orders. A buyer's: newest first. Else: the newest sale first, and in it the
    /// newest order first, because that is how they lie in an index.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn list(&self, filter: Filter) -> Result<Vec<Order>, StoreError> {
        let sale = filter.sale.map(|number| number.0.cast_signed());
        let status = filter.status.map(Status::as_str);
        let after = filter.after.map(|id| id.0);
        self.database
            .run(async move |pool| {
                let rows = match filter.buyer {
                    Some(buyer) => {
                        sqlx::query_as!(
                            OrderColumns,
                            "SELECT id, buyer_id, seq, pseq, quantity, unit_price, accepted_at,
                                    sale, round, epoch, currency, status, accepted_as, durability,
                                    fingerprint,
                            receipt_key, hold_ms, extended_ms, returned, refunded, last_seq,
                            updated_at
                             FROM orders
                             WHERE buyer_id = $1
                               AND ($2::int IS NULL OR sale = $2)
                               AND ($3::text IS NULL OR status = $3)
                               AND ($4::uuid IS NULL OR (accepted_at, id)
                                    < (SELECT accepted_at, id FROM orders WHERE id = $4))
                             ORDER BY accepted_at DESC, id DESC
                             LIMIT $5",
                            buyer.0,
                            sale,
                            status,
                            after,
                            filter.limit
                        )
                        .fetch_all(&pool)
                        .await?
                    }
                    None => {
                        sqlx::query_as!(
                            OrderColumns,
                            "SELECT id, buyer_id, seq, pseq, quantity, unit_price, accepted_at,
                                    sale, round, epoch, currency, status, accepted_as, durability,
                                    fingerprint,
                            receipt_key, hold_ms, extended_ms, returned, refunded, last_seq,
                            updated_at
                             FROM orders
                             WHERE ($1::int IS NULL OR sale = $1)
                               AND ($2::text IS NULL OR status = $2)
                               AND ($3::uuid IS NULL OR (sale, round, epoch, seq)
                                    < (SELECT sale, round, epoch, seq FROM orders WHERE id = $3))
                             ORDER BY sale DESC, round DESC, epoch DESC, seq DESC
                             LIMIT $4",
                            sale,
                            status,
                            after,
                            filter.limit
                        )
                        .fetch_all(&pool)
                        .await?
                    }
                };
                rows.into_iter().map(Order::try_from).collect()
            })
            .await
    }

    /// The newest orders of each of these buyers, at most `each`, and how much of the journals they
    /// show: one look for all of them.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn newest(&self, buyers: Vec<BuyerId>, each: i64) -> Result<Newest, StoreError> {
        let buyers: Vec<Uuid> = buyers.into_iter().map(|buyer| buyer.0).collect();
        self.database
            .run(async move |pool| {
                let mut instant = pool
                    .begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                    .await?;
                let positions = sqlx::query!(
                    "SELECT partition, epoch, position FROM journal_positions ORDER BY partition"
                )
                .fetch_all(&mut *instant)
                .await?;
                let orders = sqlx::query_as!(
                    OrderColumns,
                    r#"SELECT own.id AS "id!", own.buyer_id AS "buyer_id!", own.seq AS "seq!",
                              own.pseq AS "pseq!", own.quantity AS "quantity!",
                              own.unit_price AS "unit_price!", own.accepted_at AS "accepted_at!",
                              own.sale AS "sale!", own.round AS "round!", own.epoch AS "epoch!",
                              own.currency AS "currency!", own.status AS "status!",
                              own.accepted_as AS "accepted_as!", own.durability AS "durability!",
                              own.fingerprint AS "fingerprint!",
                              own.receipt_key AS "receipt_key!", own.hold_ms AS "hold_ms!",
                              own.extended_ms AS "extended_ms!", own.returned AS "returned!",
                              own.refunded AS "refunded!", own.last_seq AS "last_seq!",
                              own.updated_at AS "updated_at!"
                       FROM unnest($1::uuid[]) AS wanted (buyer)
                       CROSS JOIN LATERAL (
                           SELECT * FROM orders WHERE buyer_id = wanted.buyer
                           ORDER BY accepted_at DESC, id DESC LIMIT $2
                       ) AS own"#,
                    &buyers,
                    each
                )
                .fetch_all(&mut *instant)
                .await?;
                instant.commit().await?;
                let positions = positions.into_iter().map(|row| {
                    let at = JournalId {
                        epoch: Epoch(row.epoch.cast_unsigned()),
                        pseq: row.position.cast_unsigned(),
                    };
                    (Partition(row.partition.cast_unsigned()), at)
                });
                Ok(Newest {
                    positions: positions.collect(),
                    orders: orders
                        .into_iter()
                        .map(Order::try_from)
                        .collect::<Result<_, _>>()?,
                })
            })
            .await
    }

    /// A page of a round's leaderboard as PostgreSQL has it: how many confirmed orders stand before
    /// it, up to `back` of those accepted until the event `after_seq`, and those accepted after it.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn leaderboard(
        &self,
        round: RoundId,
        after_seq: u64,
        back: i64,
        limit: i64,
    ) -> Result<(u64, Vec<Order>), StoreError> {
        let (sale, number) = (round.sale.0.cast_signed(), round.round.cast_signed());
        let after = after_seq.cast_signed();
        self.database
            .run(async move |pool| {
                let before = sqlx::query_scalar!(
                    r#"SELECT count(*) AS "before!" FROM orders
                       WHERE sale = $1 AND round = $2 AND seq <= $3 AND status = 'confirmed'"#,
                    sale,
                    number,
                    after
                )
                .fetch_one(&pool)
                .await?;
                let mut earlier = sqlx::query_as!(
                    OrderColumns,
                    "SELECT id, buyer_id, seq, pseq, quantity, unit_price, accepted_at, sale, round,
                            epoch, currency, status, accepted_as, durability, fingerprint,
                            receipt_key, hold_ms, extended_ms, returned, refunded, last_seq, updated_at
                     FROM orders
                     WHERE sale = $1 AND round = $2 AND seq <= $3 AND status = 'confirmed'
                     ORDER BY epoch DESC, seq DESC
                     LIMIT $4",
                    sale,
                    number,
                    after,
                    back.min(limit)
                )
                .fetch_all(&pool)
                .await?;
                earlier.reverse();
                let shown = i64::try_from(earlier.len()).unwrap_or(i64::MAX);
                let (before, limit) = (before - shown, limit - shown);
                let orders = sqlx::query_as!(
                    OrderColumns,
                    "SELECT id, buyer_id, seq, pseq, quantity, unit_price, accepted_at, sale, round,
                            epoch, currency, status, accepted_as, durability, fingerprint,
                            receipt_key, hold_ms, extended_ms, returned, refunded, last_seq,
                            updated_at
                     FROM orders
                     WHERE sale = $1 AND round = $2 AND seq > $3 AND status = 'confirmed'
                     ORDER BY epoch, seq
                     LIMIT $4",
                    sale,
                    number,
                    after,
                    limit
                )
                .fetch_all(&pool)
                .await?;
                let orders = earlier.into_iter().chain(orders).map(Order::try_from);
                Ok((before.cast_unsigned(), orders.collect::<Result<_, _>>()?))
            })
            .await
    }

    /// The place of a buyer's first confirmed order in a round, if there is one.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn first_of(
        &self,
        round: RoundId,
        buyer: BuyerId,
    ) -> Result<Option<Place>, StoreError> {
        self.database
            .run(async move |pool| {
                let row = sqlx::query!(
                    "SELECT epoch, seq FROM orders
                     WHERE buyer_id = $1 AND sale = $2 AND round = $3 AND status = 'confirmed'
                     ORDER BY epoch, seq
                     LIMIT 1",
                    buyer.0,
                    round.sale.0.cast_signed(),
                    round.round.cast_signed()
                )
                .fetch_optional(&pool)
                .await?;
                Ok(row.map(|row| Place {
                    epoch: Epoch(row.epoch.cast_unsigned()),
                    seq: row.seq.cast_unsigned(),
                }))
            })
            .await
    }

    /// Orders of a sale, or of one round of it, behind `after`, in order of acceptance.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn export(
        &self,
        sale: SaleNumber,
        round: Option<u32>,
        after: (u32, Place),
        limit: i64,
    ) -> Result<Vec<Order>, StoreError> {
        let (behind, place) = after;
        self.database
            .run(async move |pool| {
                sqlx::query_as!(
                    OrderColumns,
                    "SELECT id, buyer_id, seq, pseq, quantity, unit_price, accepted_at, sale, round,
                            epoch, currency, status, accepted_as, durability, fingerprint,
                            receipt_key, hold_ms, extended_ms, returned, refunded, last_seq, updated_at
                     FROM orders
                     WHERE sale = $1 AND ($2::int IS NULL OR round = $2)
                       AND (round, epoch, seq) > ($3, $4, $5)
                     ORDER BY round, epoch, seq
                     LIMIT $6",
                    sale.0.cast_signed(),
                    round.map(u32::cast_signed),
                    behind.cast_signed(),
                    place.epoch.0.cast_signed(),
                    place.seq.cast_signed(),
                    limit
                )
                .fetch_all(&pool)
                .await?
                .into_iter()
                .map(Order::try_from)
                .collect()
            })
            .await
    }

    /// How many rounds of a sale are archived, and the ids of at least all of their orders; `None`
    /// when those are more than `max`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn archived(
        &self,
        sale: SaleNumber,
        max: usize,
    ) -> Result<(u32, Option<Vec<OrderId>>), StoreError> {
        let number = sale.0.cast_signed();
        self.database
            .run(async move |pool| {
                // The rounds first: one that is archived meanwhile has its orders in the answer, and
                // is not counted.
                let rounds = sqlx::query_scalar!(
                    r#"SELECT count(*) AS "rounds!" FROM rounds
                       WHERE sale = $1 AND intent = 'archived'"#,
                    number
                )
                .fetch_one(&pool)
                .await?;
                let ids = sqlx::query_scalar!(
                    "SELECT orders.id FROM orders
                     JOIN rounds ON rounds.sale = orders.sale AND rounds.round = orders.round
                     WHERE orders.sale = $1 AND intent = 'archived'
                     LIMIT $2",
                    number,
                    i64::try_from(max).unwrap_or(i64::MAX).saturating_add(1)
                )
                .fetch_all(&pool)
                .await?;
                let rounds = u32::try_from(rounds).unwrap_or(u32::MAX);
                let ids = (ids.len() <= max).then(|| ids.into_iter().map(OrderId).collect());
                Ok((rounds, ids))
            })
            .await
    }

    /// Orders of a round behind `after`, whatever their status, in order of acceptance: only their
    /// ids.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn ids(
        &self,
        round: RoundId,
        after: Place,
        limit: i64,
    ) -> Result<Vec<(OrderId, Place)>, StoreError> {
        self.database
            .run(async move |pool| {
                let rows = sqlx::query!(
                    "SELECT id, epoch, seq FROM orders
                     WHERE sale = $1 AND round = $2 AND (epoch, seq) > ($3, $4)
                     ORDER BY epoch, seq
                     LIMIT $5",
                    round.sale.0.cast_signed(),
                    round.round.cast_signed(),
                    after.epoch.0.cast_signed(),
                    after.seq.cast_signed(),
                    limit
                )
                .fetch_all(&pool)
                .await?;
                Ok(rows
                    .into_iter()
                    .map(|row| {
                        let place = Place {
                            epoch: Epoch(row.epoch.cast_unsigned()),
                            seq: row.seq.cast_unsigned(),
                        };
                        (OrderId(row.id), place)
                    })
                    .collect())
            })
            .await
    }
}
