//! Losses: what was accepted and is gone, as far as anybody can say.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use uuid::Uuid;

use super::{Database, StoreError, unreadable};
use crate::domain::{
    id::{BuyerId, Epoch, JournalId, OrderId, Partition, RoundId, SaleId, SaleNumber},
    order::{Acceptance, Durability},
};

/// Acceptances that one statement writes.
const CHUNK: usize = 1_000;

/// How a loss became known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = IncidentKind)]
pub enum Kind {
    /// An operator decided to go on without what is missing.
    Accepted,
    /// Nobody lives to say whether anything is missing.
    Possible,
    /// A node reported acceptances that nobody had known of.
    Late,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Accepted, Self::Possible, Self::Late];

    /// The word that PostgreSQL and the API use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Possible => "possible",
            Self::Late => "late",
        }
    }
}

/// A loss that comes with a new epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loss {
    /// The name of the incident.
    pub id: Uuid,
    /// How it became known.
    pub kind: Kind,
    /// The last entry that any node is known to have seen.
    pub seen_to: u64,
    /// Nodes that were gone without a last word.
    pub silent_nodes: u32,
    /// What was wrong with Redis.
    pub reason: String,
    /// Until when the rounds concerned only redeem receipts, by Redis' clock.
    pub grace_until: Option<DateTime<Utc>>,
}

/// A loss as it is remembered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incident {
    /// Its name.
    pub id: Uuid,
    /// Where.
    pub partition: Partition,
    /// The epoch that began without something.
    pub epoch: Epoch,
    /// How it became known.
    pub kind: Kind,
    /// The last entry that the epoch has of the ones before.
    pub recovered_to: u64,
    /// The last entry that any node is known to have seen.
    pub seen_to: u64,
    /// Nodes that were gone without a last word.
    pub silent_nodes: u32,
    /// What was wrong with Redis.
    pub reason: String,
    /// Until when the rounds concerned only redeem receipts.
    pub grace_until: Option<DateTime<Utc>>,
    /// When it was noted.
    pub created_at: DateTime<Utc>,
    /// Acceptances on its list.
    pub listed: u64,
    /// Those of them that came back.
    pub came_back: u64,
}

/// A lost acceptance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lost {
    /// What was accepted.
    pub acceptance: Acceptance,
    /// The sale by its name in the API, if PostgreSQL has it.
    pub sale: Option<SaleId>,
    /// Its new seq, if it came back: with its receipt, or with the retry of its key.
    pub came_back: Option<(u64, DateTime<Utc>)>,
}

/// How many losses there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Incidents.
    pub incidents: i64,
    /// Lost acceptances that have not come back.
    pub lost: i64,
}

/// The tables `incidents` and `lost_acceptances`.
#[derive(Clone, Debug)]
pub struct Incidents {
    database: Database,
}

impl Incidents {
    /// The incidents in `database`.
    pub fn new(database: Database) -> Self {
        Self { database }
    }

    /// Keeps acceptances that Redis may have lost, until somebody decides. Doing it again is safe.
    ///
    /// # Errors
    /// [`StoreError`]; those that are not kept must be said again.
    pub async fn endanger(
        &self,
        partition: Partition,
        node: Uuid,
        acceptances: &[Acceptance],
    ) -> Result<(), StoreError> {
        for chunk in acceptances.chunks(CHUNK) {
            let chunk = chunk.to_vec();
            self.database
                .run(async move |pool| {
                    let mut connection = pool.acquire().await?;
                    insert(&mut connection, partition, node, None, &chunk).await
                })
                .await?;
        }
        Ok(())
    }

    /// Reports acceptances that `epoch` began without, `recovered_to` being its last entry of the
    /// ones before. Gives the incident and how many of them nobody had reported.
    ///
    /// # Errors
    /// [`StoreError`]; saying it again is safe.
    pub async fn report(
        &self,
        partition: Partition,
        node: Uuid,
        (epoch, recovered_to): (Epoch, u64),
        acceptances: Vec<Acceptance>,
        new_id: Uuid,
    ) -> Result<(Uuid, u64), StoreError> {
        let seen_to = acceptances.iter().map(|lost| lost.at.pseq).max();
        self.database
            .run(async move |pool| {
                let mut transaction = pool.begin().await?;
                let id = sqlx::query_scalar!(
                    "INSERT INTO incidents (id, partition, epoch, kind, recovered_to, seen_to, reason)
                     VALUES ($1, $2, $3, 'late', $4, $5,
                             'a node had answered acceptances that this epoch began without')
                     ON CONFLICT (partition, epoch)
                     DO UPDATE SET seen_to = greatest(incidents.seen_to, excluded.seen_to)
                     RETURNING id",
                    new_id,
                    partition.0.cast_signed(),
                    epoch.0.cast_signed(),
                    recovered_to.cast_signed(),
                    seen_to.unwrap_or(0).cast_signed()
                )
                .fetch_one(&mut *transaction)
                .await?;
                let known = count(&mut transaction, id).await?;
                for chunk in acceptances.chunks(CHUNK) {
                    insert(&mut transaction, partition, node, Some(id), chunk).await?;
                }
                let new = count(&mut transaction, id).await? - known;
                transaction.commit().await?;
                Ok((id, new.cast_unsigned()))
            })
            .await
    }

    /// What is in danger behind `end`: nobody has decided about it yet. At most `limit`, in order.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn in_danger(
        &self,
        partition: Partition,
        end: u64,
        limit: i64,
    ) -> Result<Vec<Acceptance>, StoreError> {
        self.database
            .run(async move |pool| {
                sqlx::query_as!(
                    LostColumns,
                    r#"SELECT order_id, epoch, sale, round, buyer_id, quantity, seq, pseq, durability,
                              accepted_at, NULL::uuid AS sale_id, NULL::bigint AS back_seq,
                              NULL::timestamptz AS back_at
                       FROM lost_acceptances
                       WHERE partition = $1 AND incident IS NULL AND pseq > $2
                       ORDER BY pseq, order_id LIMIT $3"#,
                    partition.0.cast_signed(),
                    end.cast_signed(),
                    limit
                )
                .fetch_all(&pool)
                .await?
                .into_iter()
                .map(|row| Lost::try_from(row).map(|lost| lost.acceptance))
                .collect()
            })
            .await
    }

    /// The losses that operators have decided to go on with: what any epoch before had behind
    /// `recovered_to` is settled.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn settled(&self, partition: Partition) -> Result<Vec<(Epoch, u64)>, StoreError> {
        self.database
            .run(async move |pool| {
                let rows = sqlx::query!(
                    "SELECT epoch, recovered_to FROM incidents
                     WHERE partition = $1 AND kind = 'accepted'",
                    partition.0.cast_signed()
                )
                .fetch_all(&pool)
                .await?;
                Ok(rows
                    .into_iter()
                    .map(|row| {
                        let epoch = Epoch(row.epoch.cast_unsigned());
                        (epoch, row.recovered_to.cast_unsigned())
                    })
                    .collect())
            })
            .await
    }

    /// How many losses a partition has.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn counts(&self, partition: Partition) -> Result<Counts, StoreError> {
        self.database
            .run(async move |pool| {
                let counts = sqlx::query_as!(
                    Counts,
                    r#"SELECT (SELECT count(*) FROM incidents WHERE partition = $1) AS "incidents!",
                              (SELECT count(*) FROM lost_acceptances AS lost
                               JOIN incidents ON incidents.id = lost.incident
                               WHERE incidents.partition = $1
                                 AND NOT EXISTS (SELECT 1 FROM orders
                                                 WHERE orders.id = lost.order_id)) AS "lost!""#,
                    partition.0.cast_signed()
                )
                .fetch_one(&pool)
                .await?;
                Ok(counts)
            })
            .await
    }

    /// A page of incidents, newest first, behind this one.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn list(
        &self,
        after: Option<(DateTime<Utc>, Uuid)>,
        limit: i64,
    ) -> Result<Vec<Incident>, StoreError> {
        let (at, id) = after.unzip();
        self.select(None, at, id, limit).await
    }

    /// The incident with this id.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn by_id(&self, id: Uuid) -> Result<Option<Incident>, StoreError> {
        Ok(self.select(Some(id), None, None, 1).await?.pop())
    }

    async fn select(
        &self,
        only: Option<Uuid>,
        after_at: Option<DateTime<Utc>>,
        after_id: Option<Uuid>,
        limit: i64,
    ) -> Result<Vec<Incident>, StoreError> {
        self.database
            .run(async move |pool| {
                sqlx::query!(
                    r#"SELECT incidents.*,
                              (SELECT count(*) FROM lost_acceptances
                               WHERE incident = incidents.id) AS "listed!",
                              (SELECT count(*) FROM lost_acceptances AS lost
                               JOIN orders ON orders.id = lost.order_id
                               WHERE incident = incidents.id) AS "came_back!"
                       FROM incidents
                       WHERE ($1::uuid IS NULL OR incidents.id = $1)
                         AND ($2::timestamptz IS NULL OR (created_at, incidents.id) < ($2, $3))
                       ORDER BY created_at DESC, incidents.id DESC
                       LIMIT $4"#,
                    only,
                    after_at,
                    after_id,
                    limit
                )
                .fetch_all(&pool)
                .await?
                .into_iter()
                .map(|row| {
                    let kind = Kind::ALL
                        .into_iter()
                        .find(|kind| kind.as_str() == row.kind)
                        .ok_or_else(|| unreadable(format!("incident of kind {}", row.kind)))?;
                    Ok(Incident {
                        id: row.id,
                        partition: Partition(row.partition.cast_unsigned()),
                        epoch: Epoch(row.epoch.cast_unsigned()),
                        kind,
                        recovered_to: row.recovered_to.cast_unsigned(),
                        seen_to: row.seen_to.cast_unsigned(),
                        silent_nodes: row.silent_nodes.cast_unsigned(),
                        reason: row.reason,
                        grace_until: row.grace_until,
                        created_at: row.created_at,
                        listed: row.listed.cast_unsigned(),
                        came_back: row.came_back.cast_unsigned(),
                    })
                })
                .collect()
            })
            .await
    }

    /// A page of an incident's list, in order of the journal, behind this one.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn lost(
        &self,
        incident: Uuid,
        after: Option<(u64, OrderId)>,
        limit: i64,
    ) -> Result<Vec<Lost>, StoreError> {
        let (pseq, order) = after.map_or((0, Uuid::nil()), |(pseq, order)| (pseq, order.0));
        self.database
            .run(async move |pool| {
                sqlx::query_as!(
                    LostColumns,
                    r#"SELECT order_id, lost.epoch, lost.sale, lost.round, lost.buyer_id,
                              lost.quantity, lost.seq, lost.pseq, lost.durability,
                              lost.accepted_at, sales.id AS "sale_id?",
                              back.seq AS "back_seq?", back.accepted_at AS "back_at?"
                       FROM lost_acceptances AS lost
                       LEFT JOIN orders AS back ON back.id = lost.order_id
                       LEFT JOIN sales ON sales.number = lost.sale
                       WHERE incident = $1 AND (lost.pseq, order_id) > ($2, $3)
                       ORDER BY lost.pseq, order_id
                       LIMIT $4"#,
                    incident,
                    pseq.cast_signed(),
                    order,
                    limit
                )
                .fetch_all(&pool)
                .await?
                .into_iter()
                .map(Lost::try_from)
                .collect()
            })
            .await
    }
}

async fn count(connection: &mut PgConnection, incident: Uuid) -> Result<i64, StoreError> {
    let count = sqlx::query_scalar!(
        r#"SELECT count(*) AS "count!" FROM lost_acceptances WHERE incident = $1"#,
        incident
    );
    Ok(count.fetch_one(connection).await?)
}

async fn insert(
    connection: &mut PgConnection,
    partition: Partition,
    node: Uuid,
    incident: Option<Uuid>,
    acceptances: &[Acceptance],
) -> Result<(), StoreError> {
    let column =
        |value: fn(&Acceptance) -> i64| -> Vec<i64> { acceptances.iter().map(value).collect() };
    let narrow = |value: fn(&Acceptance) -> u32| -> Vec<i32> {
        acceptances
            .iter()
            .map(|lost| value(lost).cast_signed())
            .collect()
    };
    let orders: Vec<Uuid> = acceptances.iter().map(|lost| lost.order.0).collect();
    let buyers: Vec<Uuid> = acceptances.iter().map(|lost| lost.buyer.0).collect();
    let durabilities: Vec<&str> = acceptances
        .iter()
        .map(|lost| lost.durability.as_str())
        .collect();
    let at: Vec<_> = acceptances
        .iter()
        .map(|lost| DateTime::from_timestamp_millis(lost.accepted_at_ms).unwrap_or_default())
        .collect();
    sqlx::query!(
        "INSERT INTO lost_acceptances (order_id, epoch, partition, incident, node, sale, round,
                                       buyer_id, quantity, seq, pseq, durability, accepted_at)
         SELECT new.order_id, new.epoch, $1, $2, $3, new.sale, new.round, new.buyer, new.quantity,
                new.seq, new.pseq, new.durability, new.at
         FROM unnest($4::uuid[], $5::int[], $6::int[], $7::int[], $8::uuid[], $9::bigint[],
                     $10::bigint[], $11::bigint[], $12::text[], $13::timestamptz[])
              AS new (order_id, epoch, sale, round, buyer, quantity, seq, pseq, durability, at)
         ON CONFLICT (order_id, epoch)
         DO UPDATE SET incident = coalesce(lost_acceptances.incident, excluded.incident)",
        partition.0.cast_signed(),
        incident,
        node,
        &orders,
        &narrow(|lost| lost.at.epoch.0),
        &narrow(|lost| lost.round.sale.0),
        &narrow(|lost| lost.round.round),
        &buyers,
        &column(|lost| lost.quantity.cast_signed()),
        &column(|lost| lost.seq.cast_signed()),
        &column(|lost| lost.at.pseq.cast_signed()),
        &durabilities as &[&str],
        &at,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Notes a loss beside the epoch that has just been raised, in its transaction: what is in danger
/// behind its end is lost, and the rounds concerned have their time of grace.
pub(super) async fn note(
    connection: &mut PgConnection,
    partition: Partition,
    epoch: Epoch,
    recovered_to: u64,
    loss: &Loss,
) -> Result<(), StoreError> {
    let id = sqlx::query_scalar!(
        "INSERT INTO incidents (id, partition, epoch, kind, recovered_to, seen_to, silent_nodes,
                                reason, grace_until)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
         ON CONFLICT (partition, epoch) DO UPDATE SET kind = excluded.kind
         RETURNING id",
        loss.id,
        partition.0.cast_signed(),
        epoch.0.cast_signed(),
        loss.kind.as_str(),
        recovered_to.cast_signed(),
        loss.seen_to.cast_signed(),
        loss.silent_nodes.cast_signed(),
        loss.reason,
        loss.grace_until
    )
    .fetch_one(&mut *connection)
    .await?;
    sqlx::query!(
        "UPDATE lost_acceptances SET incident = $2
         WHERE partition = $1 AND incident IS NULL AND pseq > $3",
        partition.0.cast_signed(),
        id,
        recovered_to.cast_signed()
    )
    .execute(&mut *connection)
    .await?;
    // Only if every entry that is missing is on the list is it certain which rounds it was about.
    sqlx::query!(
        "UPDATE rounds SET grace_until = $2
         FROM sales
         WHERE $2::timestamptz IS NOT NULL AND sales.number = rounds.sale
           AND sales.partition = $1 AND rounds.intent <> 'closed'
           AND (EXISTS (SELECT 1 FROM lost_acceptances AS lost
                        WHERE lost.incident = $3 AND lost.sale = rounds.sale
                          AND lost.round = rounds.round)
                OR $4::int > 0
                OR (SELECT count(DISTINCT pseq) FROM lost_acceptances AS lost
                    WHERE lost.incident = $3) < $5::bigint - $6::bigint)",
        partition.0.cast_signed(),
        loss.grace_until,
        id,
        loss.silent_nodes.cast_signed(),
        loss.seen_to.cast_signed(),
        recovered_to.cast_signed()
    )
    .execute(connection)
    .await?;
    Ok(())
}

struct LostColumns {
    order_id: Uuid,
    epoch: i32,
    sale: i32,
    round: i32,
    buyer_id: Uuid,
    quantity: i64,
    seq: i64,
    pseq: i64,
    durability: String,
    accepted_at: DateTime<Utc>,
    sale_id: Option<Uuid>,
    back_seq: Option<i64>,
    back_at: Option<DateTime<Utc>>,
}

impl TryFrom<LostColumns> for Lost {
    type Error = StoreError;

    fn try_from(row: LostColumns) -> Result<Self, StoreError> {
        let durability = Durability::parse(&row.durability)
            .ok_or_else(|| unreadable(format!("durability of {}", row.order_id)))?;
        let acceptance = Acceptance {
            order: OrderId(row.order_id),
            round: RoundId {
                sale: SaleNumber(row.sale.cast_unsigned()),
                round: row.round.cast_unsigned(),
            },
            buyer: BuyerId(row.buyer_id),
            quantity: row.quantity.cast_unsigned(),
            at: JournalId {
                epoch: Epoch(row.epoch.cast_unsigned()),
                pseq: row.pseq.cast_unsigned(),
            },
            seq: row.seq.cast_unsigned(),
            durability,
            accepted_at_ms: row.accepted_at.timestamp_millis(),
        };
        Ok(Self {
            acceptance,
            sale: row.sale_id.map(SaleId),
            came_back: row.back_seq.map(i64::cast_unsigned).zip(row.back_at),
        })
    }
}
