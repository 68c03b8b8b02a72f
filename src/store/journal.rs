//! What the writer does to PostgreSQL: rows of a batch and the position, in one transaction.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use sqlx::{
    Connection, PgConnection, Postgres, Transaction,
    postgres::{PgConnectOptions, PgDatabaseError},
};
use uuid::Uuid;

use super::{
    Database, StoreError, audit_log,
    incidents::{self, Loss},
};
use crate::{
    domain::{
        id::{Epoch, Fingerprint, JournalId, OrderId, Partition, RoundId, SaleNumber},
        journal::{Delta, Event, EventKind},
        order::Order,
        round::{Amendment, Counters, Intent},
    },
    faults,
};

/// Up to where PostgreSQL has the journal of a partition, and in which epoch Redis must be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// The timeline that Redis must be in: the fence.
    pub epoch: Epoch,
    /// The last timeline that was seen written into Redis.
    pub installed: Epoch,
    /// The last entry that is stored.
    pub stored: JournalId,
}

/// What PostgreSQL has of a journal, for those who wait for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// The last entry that is stored.
    pub stored: JournalId,
    /// The last entry of which something is a dead letter.
    pub dead: Option<u64>,
}

/// What a round has, as of the last entry that touched it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundState {
    /// Where its units are.
    pub counters: Counters,
    /// The number of that entry; 0 before its first.
    pub pseq: u64,
}

/// What PostgreSQL has of an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Its row.
    Stored(OrderRow),
    /// A dead letter, its own or that of an entry that may have held it.
    Dead,
    /// Nothing.
    Missing,
}

/// An order as a batch leaves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OrderRow {
    /// The order; `status` is its last.
    pub order: Order,
    /// The event that gave it that status.
    pub last_seq: u64,
    /// When that was, milliseconds since the Unix epoch.
    pub updated_at_ms: i64,
}

/// An event of a round that is not an acceptance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventRow {
    /// Of which round.
    pub round: RoundId,
    /// The entry that carried it.
    pub id: JournalId,
    /// When, milliseconds since the Unix epoch.
    pub at_ms: i64,
    /// The event.
    pub event: Event,
}

/// A round as a batch leaves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundRow {
    /// Which round.
    pub round: RoundId,
    /// Where its units are.
    pub counters: Counters,
    /// The entry that brought them.
    pub id: JournalId,
    /// What the operator wants, if the batch says so.
    pub intent: Option<Intent>,
    /// Its rules, if the batch changes them.
    pub amendment: Option<Amendment>,
}

/// Something that the journal has and no table takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Letter {
    /// The entry.
    pub id: JournalId,
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
    pub error: DataError,
}

/// Why a row is not stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataError {
    /// What PostgreSQL called it; `None` when it was never asked.
    pub sqlstate: Option<String>,
    /// In words.
    pub reason: String,
}

/// Why a statement of the writer failed.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The rows are to blame: a check or a value (SQLSTATE classes 22 and 23).
    #[error("the data was refused: {}", .0.reason)]
    Data(DataError),
    /// A row with the same id or the same place is there already.
    #[error("a row is there already: {0}")]
    Duplicate(String),
    /// The rows are not to blame.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<sqlx::Error> for WriteError {
    fn from(error: sqlx::Error) -> Self {
        let database = error
            .as_database_error()
            .and_then(|error| error.try_downcast_ref::<PgDatabaseError>());
        if let Some(refusal) = database {
            let reason = refusal.message().to_owned();
            match refusal.code() {
                "23505" => return Self::Duplicate(reason),
                code if code.starts_with("22") || code.starts_with("23") => {
                    return Self::Data(DataError {
                        sqlstate: Some(code.to_owned()),
                        reason,
                    });
                }
                _ => {}
            }
        }
        Self::Store(error.into())
    }
}

/// The positions, as everything but the writer uses them.
#[derive(Clone, Debug)]
pub struct Positions {
    database: Database,
}

impl Positions {
    /// The positions in `database`.
    pub fn new(database: Database) -> Self {
        Self { database }
    }

    /// The position of `partition` as it stands; `None` where there is none yet. Changes nothing.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn find(&self, partition: Partition) -> Result<Option<Position>, StoreError> {
        self.database
            .run(async move |pool| {
                let mut connection = pool.acquire().await?;
                read(&mut connection, partition).await
            })
            .await
    }

    /// The position of `partition`; it is made where there is none, from what the rounds prove.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn of(&self, partition: Partition) -> Result<Position, StoreError> {
        self.database
            .run(async move |pool| {
                let mut connection = pool.acquire().await?;
                if let Some(position) = read(&mut connection, partition).await? {
                    return Ok(position);
                }
                restore(&mut connection, partition, Epoch::default()).await
            })
            .await
    }

    /// What PostgreSQL has of the journal of `partition`, as of one instant. Changes nothing.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn progress(&self, partition: Partition) -> Result<Progress, StoreError> {
        self.database
            .run(async move |pool| {
                let row = sqlx::query!(
                    r#"SELECT position, position_epoch,
                              (SELECT max(pseq) FROM dead_letters
                               WHERE partition = $1 AND resolved_at IS NULL) AS dead
                       FROM journal_positions WHERE partition = $1"#,
                    partition.0.cast_signed()
                )
                .fetch_optional(&pool)
                .await?;
                Ok(row.map_or_else(Progress::default, |row| Progress {
                    stored: JournalId {
                        epoch: Epoch(row.position_epoch.cast_unsigned()),
                        pseq: row.position.cast_unsigned(),
                    },
                    dead: row.dead.map(i64::cast_unsigned),
                }))
            })
            .await
    }

    /// Begins the epoch after `present`, and after `beyond`: from now on no writer inserts what an
    /// older one left. `recovered_to` is the last entry of all earlier epochs that it has; `loss`
    /// says that some behind it were acknowledged, or may have been. `None` when another node was
    /// faster.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn raise_epoch(
        &self,
        partition: Partition,
        present: Epoch,
        beyond: Epoch,
        recovered_to: u64,
        loss: Option<Loss>,
    ) -> Result<Option<Position>, StoreError> {
        self.of(partition).await?;
        self.database
            .run(async move |pool| {
                let mut transaction = audit_log::begin(&pool).await?;
                let row = sqlx::query_as!(
                    PositionColumns,
                    "UPDATE journal_positions
                     SET epoch = greatest(epoch, $3) + 1, updated_at = now()
                     WHERE partition = $1 AND epoch = $2
                     RETURNING epoch, installed_epoch, position, position_epoch",
                    partition.0.cast_signed(),
                    present.0.cast_signed(),
                    beyond.0.cast_signed()
                )
                .fetch_optional(&mut *transaction)
                .await?;
                let Some(position) = row.map(Position::from) else {
                    return Ok(None);
                };
                // An epoch that was raised and never installed has lost nothing.
                sqlx::query!(
                    "DELETE FROM epochs WHERE partition = $1 AND epoch > $2",
                    partition.0.cast_signed(),
                    position.installed.0.cast_signed()
                )
                .execute(&mut *transaction)
                .await?;
                sqlx::query!(
                    "INSERT INTO epochs (partition, epoch, recovered_to) VALUES ($1, $2, $3)",
                    partition.0.cast_signed(),
                    position.epoch.0.cast_signed(),
                    recovered_to.cast_signed()
                )
                .execute(&mut *transaction)
                .await?;
                // What somebody feared for is there.
                sqlx::query!(
                    "DELETE FROM lost_acceptances
                     WHERE partition = $1 AND incident IS NULL AND pseq <= $2",
                    partition.0.cast_signed(),
                    recovered_to.cast_signed()
                )
                .execute(&mut *transaction)
                .await?;
                if let Some(loss) = loss {
                    let epoch = position.epoch;
                    incidents::note(&mut transaction, partition, epoch, recovered_to, &loss)
                        .await?;
                }
                transaction.commit().await?;
                Ok(Some(position))
            })
            .await
    }

    /// Notes that Redis was seen in `epoch`. `false` when another epoch has begun meanwhile.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn set_installed(
        &self,
        partition: Partition,
        epoch: Epoch,
    ) -> Result<bool, StoreError> {
        self.database
            .run(async move |pool| {
                let done = sqlx::query!(
                    "UPDATE journal_positions SET installed_epoch = $2, updated_at = now()
                     WHERE partition = $1 AND epoch = $2",
                    partition.0.cast_signed(),
                    epoch.0.cast_signed()
                )
                .execute(&pool)
                .await?;
                Ok(done.rows_affected() == 1)
            })
            .await
    }
}

struct PositionColumns {
    epoch: i32,
    installed_epoch: i32,
    position: i64,
    position_epoch: i32,
}

impl From<PositionColumns> for Position {
    fn from(row: PositionColumns) -> Self {
        Self {
            epoch: Epoch(row.epoch.cast_unsigned()),
            installed: Epoch(row.installed_epoch.cast_unsigned()),
            stored: JournalId {
                epoch: Epoch(row.position_epoch.cast_unsigned()),
                pseq: row.position.cast_unsigned(),
            },
        }
    }
}

async fn read(
    connection: &mut PgConnection,
    partition: Partition,
) -> Result<Option<Position>, StoreError> {
    let row = sqlx::query_as!(
        PositionColumns,
        "SELECT epoch, installed_epoch, position, position_epoch
         FROM journal_positions WHERE partition = $1",
        partition.0.cast_signed()
    )
    .fetch_optional(connection)
    .await?;
    Ok(row.map(Into::into))
}

/// Makes a missing row anew. The last entry that any round of the partition shows is stored, and
/// so is everything before it; what came after it and changed no round is read once more.
async fn restore(
    connection: &mut PgConnection,
    partition: Partition,
    epoch_at_least: Epoch,
) -> Result<Position, StoreError> {
    sqlx::query!(
        "INSERT INTO journal_positions (partition, epoch, installed_epoch, position, position_epoch)
         SELECT $1, greatest($2, last.epoch), 0, last.pseq, last.epoch
         FROM (SELECT coalesce(max(rounds.pseq), 0) AS pseq, coalesce(max(rounds.epoch), 0) AS epoch
               FROM rounds JOIN sales ON sales.number = rounds.sale
               WHERE sales.partition = $1) AS last
         ON CONFLICT (partition) DO NOTHING",
        partition.0.cast_signed(),
        epoch_at_least.0.cast_signed()
    )
    .execute(&mut *connection)
    .await?;
    read(connection, partition)
        .await?
        .ok_or(StoreError::Unexpected(sqlx::Error::RowNotFound))
}

/// The writer's own connection. It is not from the pool, so that a crowd of readers cannot keep
/// the writer waiting, and it connects anew after every error.
#[derive(Debug)]
pub struct Ledger {
    options: PgConnectOptions,
    partition: Partition,
    connection: Option<PgConnection>,
}

impl Ledger {
    /// The ledger of `partition`; it connects when it is first used.
    pub fn new(database: &Database, partition: Partition) -> Self {
        let options = PgConnectOptions::clone(&database.pool.connect_options())
            .application_name(&format!("stockade-writer-{partition}"))
            .options([
                ("statement_timeout", "10s"),
                ("lock_timeout", "5s"),
                // A writer that stops inside its transaction gives the row lock back.
                ("idle_in_transaction_session_timeout", "5s"),
                ("tcp_keepalives_idle", "10"),
                ("tcp_keepalives_interval", "5"),
                ("tcp_keepalives_count", "4"),
                ("synchronous_commit", "on"),
            ]);
        Self {
            options,
            partition,
            connection: None,
        }
    }

    /// Whose it is.
    pub fn partition(&self) -> Partition {
        self.partition
    }

    async fn connection(&mut self) -> Result<&mut PgConnection, StoreError> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => PgConnection::connect_with(&self.options).await?,
        };
        Ok(self.connection.insert(connection))
    }

    /// Forgets the connection: after an error nobody knows what state it is in.
    pub fn disconnect(&mut self) {
        self.connection = None;
    }

    /// The position; `epoch_at_least` is the highest epoch the writer has ever learnt, for the
    /// case that the row is gone and must be made anew.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn position(&mut self, epoch_at_least: Epoch) -> Result<Position, StoreError> {
        let partition = self.partition;
        let connection = self.connection().await?;
        match read(connection, partition).await? {
            Some(position) => Ok(position),
            None => restore(connection, partition, epoch_at_least).await,
        }
    }

    /// Begins a batch: locks the position row, and says what is in it; `None` when it is gone.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn begin(&mut self) -> Result<(BatchTransaction<'_>, Option<Position>), StoreError> {
        let partition = self.partition;
        let mut transaction = self.connection().await?.begin().await?;
        let row = sqlx::query_as!(
            PositionColumns,
            "SELECT epoch, installed_epoch, position, position_epoch
             FROM journal_positions WHERE partition = $1 FOR UPDATE",
            partition.0.cast_signed()
        )
        .fetch_optional(&mut *transaction)
        .await?;
        Ok((
            BatchTransaction {
                transaction,
                partition,
            },
            row.map(Into::into),
        ))
    }
}

/// Rows that one statement inserts.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a> {
    /// Orders.
    Orders(&'a [OrderRow]),
    /// Events.
    Events(&'a [EventRow]),
}

impl Rows<'_> {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Self::Orders(rows) => rows.len(),
            Self::Events(rows) => rows.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Some of them, from `from` on and before `to`.
    #[must_use]
    pub fn slice(&self, from: usize, to: usize) -> Self {
        match self {
            Self::Orders(rows) => Self::Orders(rows.get(from..to).unwrap_or_default()),
            Self::Events(rows) => Self::Events(rows.get(from..to).unwrap_or_default()),
        }
    }
}

/// What is stored of a batch that is read once more.
#[derive(Debug, Default)]
pub struct Known {
    /// Orders with the id or the place of one in the batch.
    pub orders: Vec<Order>,
    /// Events with the place of one in the batch.
    pub events: Vec<EventRow>,
    /// Dead letters of its entries: entry, round, first and last seq, and whether unresolved.
    pub letters: Vec<(u64, RoundId, u64, u64, bool)>,
}

/// The transaction that stores a batch. It has the position row's lock; dropped, it changes
/// nothing.
#[derive(Debug)]
pub struct BatchTransaction<'c> {
    transaction: Transaction<'c, Postgres>,
    partition: Partition,
}

impl BatchTransaction<'_> {
    /// The state of those of `rounds` that exist.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn rounds(
        &mut self,
        rounds: &[RoundId],
    ) -> Result<HashMap<RoundId, RoundState>, StoreError> {
        let (sales, numbers) = columns(rounds);
        let rows = sqlx::query!(
            "SELECT sale, round, allocation, remaining, held, sold, seq, pseq
             FROM rounds
             WHERE (sale, round) IN (SELECT * FROM unnest($1::int[], $2::int[]))",
            &sales,
            &numbers
        )
        .fetch_all(&mut *self.transaction)
        .await?;
        Ok(rows
            .into_iter()
            .map(|row| {
                let counters = Counters {
                    allocation: row.allocation.cast_unsigned(),
                    remaining: row.remaining.cast_unsigned(),
                    held: row.held.cast_unsigned(),
                    sold: row.sold.cast_unsigned(),
                    seq: row.seq.cast_unsigned(),
                };
                let state = RoundState {
                    counters,
                    pseq: row.pseq.cast_unsigned(),
                };
                (round_id(row.sale, row.round), state)
            })
            .collect())
    }

    /// What became of each of these orders.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn fates(
        &mut self,
        orders: &[(OrderId, RoundId)],
    ) -> Result<HashMap<OrderId, Fate>, StoreError> {
        let ids: Vec<Uuid> = orders.iter().map(|(id, _)| id.0).collect();
        let rounds: Vec<RoundId> = orders.iter().map(|(_, round)| *round).collect();
        let (sales, numbers) = columns(&rounds);
        // A letter without an order is an entry that nobody could read: it may have held the
        // order, but only if the order has no row.
        let rows = sqlx::query!(
            r#"SELECT asked.id AS "id!",
                      EXISTS (SELECT 1 FROM dead_letters
                              WHERE order_id = asked.id AND resolved_at IS NULL) AS "dead!",
                      EXISTS (SELECT 1 FROM dead_letters
                              WHERE dead_letters.sale = asked.sale
                                AND dead_letters.round = asked.round
                                AND order_id IS NULL AND resolved_at IS NULL) AS "perhaps!"
               FROM unnest($1::uuid[], $2::int[], $3::int[]) AS asked (id, sale, round)"#,
            &ids,
            &sales,
            &numbers
        )
        .fetch_all(&mut *self.transaction)
        .await?;
        let stored = sqlx::query_as!(
            super::orders::OrderColumns,
            "SELECT id, buyer_id, seq, pseq, quantity, unit_price, accepted_at, sale, round, epoch,
                    currency, status, accepted_as, durability, fingerprint, receipt_key, hold_ms,
                    extended_ms, returned, refunded, last_seq, updated_at
             FROM orders WHERE id = ANY($1)",
            &ids
        )
        .fetch_all(&mut *self.transaction)
        .await?
        .into_iter()
        .map(|row| {
            let (last_seq, updated_at) = (row.last_seq, row.updated_at);
            Ok(OrderRow {
                order: row.try_into()?,
                last_seq: last_seq.cast_unsigned(),
                updated_at_ms: updated_at.timestamp_millis(),
            })
        })
        .collect::<Result<Vec<_>, StoreError>>()?;
        let stored: HashMap<_, _> = stored.into_iter().map(|row| (row.order.id, row)).collect();
        Ok(rows
            .into_iter()
            .map(|row| {
                let id = OrderId(row.id);
                let fate = match (row.dead, stored.get(&id), row.perhaps) {
                    (true, _, _) | (false, None, true) => Fate::Dead,
                    (false, Some(row), _) => Fate::Stored(*row),
                    (false, None, false) => Fate::Missing,
                };
                (id, fate)
            })
            .collect())
    }

    /// What is stored already of these rows, and of the entries after `from` up to `to`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn known(
        &mut self,
        orders: &[OrderRow],
        events: &[EventRow],
        from: JournalId,
        to: JournalId,
    ) -> Result<Known, StoreError> {
        let ids: Vec<Uuid> = orders.iter().map(|row| row.order.id.0).collect();
        let (sales, rounds, epochs, seqs) = places(
            orders
                .iter()
                .map(|row| (row.order.round, row.order.epoch, row.order.seq)),
        );
        let same_place = sqlx::query_as!(
            super::orders::OrderColumns,
            "SELECT id, buyer_id, seq, pseq, quantity, unit_price, accepted_at, sale, round, epoch,
                    currency, status, accepted_as, durability, fingerprint, receipt_key, hold_ms,
                    extended_ms, returned, refunded, last_seq, updated_at
             FROM orders
             WHERE id IN (SELECT unnest($1::uuid[])
                          UNION
                          SELECT id FROM orders
                          WHERE (sale, round, epoch, seq) IN
                                (SELECT * FROM unnest($2::int[], $3::int[], $4::int[],
                                                      $5::bigint[])))",
            &ids,
            &sales,
            &rounds,
            &epochs,
            &seqs
        )
        .fetch_all(&mut *self.transaction)
        .await?;
        let stored_orders = same_place
            .into_iter()
            .map(Order::try_from)
            .collect::<Result<Vec<_>, _>>()?;

        let (sales, rounds, epochs, seqs) = places(
            events
                .iter()
                .map(|row| (row.round, row.id.epoch, row.event.seq)),
        );
        let stored_events = sqlx::query_as!(
            EventColumns,
            "SELECT sale, round, epoch, seq, pseq, units, at, order_id, actor, operation_id, kind,
                    fingerprint, from_held
             FROM round_events
             WHERE (sale, round, epoch, seq) IN
                   (SELECT * FROM unnest($1::int[], $2::int[], $3::int[], $4::bigint[]))",
            &sales,
            &rounds,
            &epochs,
            &seqs
        )
        .fetch_all(&mut *self.transaction)
        .await?
        .into_iter()
        .map(EventRow::try_from)
        .collect::<Result<Vec<_>, _>>()?;

        let letters = sqlx::query!(
            r#"SELECT pseq, sale, round, seq_from, seq_to, resolved_at IS NULL AS "unresolved!"
               FROM dead_letters
               WHERE partition = $1 AND pseq > $2 AND pseq <= $3"#,
            self.partition.0.cast_signed(),
            from.pseq.cast_signed(),
            to.pseq.cast_signed()
        )
        .fetch_all(&mut *self.transaction)
        .await?
        .into_iter()
        .map(|row| {
            let round = round_id(row.sale, row.round);
            let (first, last) = (row.seq_from.cast_unsigned(), row.seq_to.cast_unsigned());
            (row.pseq.cast_unsigned(), round, first, last, row.unresolved)
        })
        .collect();
        Ok(Known {
            orders: stored_orders,
            events: stored_events,
            letters,
        })
    }

    /// Inserts rows, all or none. After an error the transaction is good for nothing, unless a
    /// savepoint was set.
    ///
    /// # Errors
    /// [`WriteError`].
    pub async fn insert(&mut self, rows: Rows<'_>) -> Result<(), WriteError> {
        match rows {
            Rows::Orders([]) | Rows::Events([]) => Ok(()),
            Rows::Orders(rows) => self.insert_orders(rows).await,
            Rows::Events(rows) => self.insert_events(rows).await,
        }
    }

    /// Tries to insert rows and goes on behind a savepoint when they are refused.
    ///
    /// # Errors
    /// [`WriteError`], of which only `Store` ends the transaction.
    pub async fn attempt(&mut self, rows: Rows<'_>) -> Result<(), WriteError> {
        self.execute("SAVEPOINT attempt").await?;
        let result = self.insert(rows).await;
        if let Err(WriteError::Data(_) | WriteError::Duplicate(_)) = &result {
            self.execute("ROLLBACK TO SAVEPOINT attempt").await?;
        }
        if !matches!(&result, Err(WriteError::Store(_))) {
            self.execute("RELEASE SAVEPOINT attempt").await?;
        }
        result
    }

    async fn execute(&mut self, statement: &'static str) -> Result<(), StoreError> {
        sqlx::raw_sql(statement)
            .execute(&mut *self.transaction)
            .await?;
        Ok(())
    }

    async fn insert_orders(&mut self, rows: &[OrderRow]) -> Result<(), WriteError> {
        let orders = || rows.iter().map(|row| &row.order);
        let ids: Vec<Uuid> = orders().map(|order| order.id.0).collect();
        let buyers: Vec<Uuid> = orders().map(|order| order.buyer.0).collect();
        let (sales, rounds, epochs, seqs) =
            places(orders().map(|order| (order.round, order.epoch, order.seq)));
        let pseqs: Vec<i64> = orders().map(|order| order.pseq.cast_signed()).collect();
        let last_seqs: Vec<i64> = rows.iter().map(|row| row.last_seq.cast_signed()).collect();
        let quantities: Vec<i64> = orders().map(|order| order.quantity.cast_signed()).collect();
        let prices: Vec<i64> = orders().map(|order| order.unit_price.amount).collect();
        let accepted_at: Vec<_> = orders()
            .map(|order| instant(order.accepted_at_ms))
            .collect();
        let updated_at: Vec<_> = rows.iter().map(|row| instant(row.updated_at_ms)).collect();
        let currencies: Vec<&str> = orders()
            .map(|order| order.unit_price.currency.as_str())
            .collect();
        let holds = Holds::of(rows);
        let statuses: Vec<&str> = orders().map(|order| order.status.as_str()).collect();
        let first_statuses: Vec<&str> = orders().map(|order| order.accepted_as.as_str()).collect();
        let durabilities: Vec<&str> = orders().map(|order| order.durability.as_str()).collect();
        let fingerprints: Vec<&[u8]> = orders()
            .map(|order| order.fingerprint.0.as_slice())
            .collect();
        let keys: Vec<i16> = orders()
            .map(|order| match order.receipt_key {
                _ if faults::bug("receipt_key_not_stored") => 0,
                key => key.into(),
            })
            .collect();
        sqlx::query!(
            "INSERT INTO orders (id, buyer_id, seq, pseq, last_seq, quantity, unit_price,
                                 accepted_at, updated_at, sale, round, epoch, currency, status,
                                 accepted_as, durability, fingerprint, receipt_key, hold_ms,
                                 extended_ms, returned, refunded, sale_id, body_version)
             SELECT new.*, sales.id, CASE WHEN new.receipt_key = 0 THEN 1 ELSE 2 END
             FROM unnest($1::uuid[], $2::uuid[], $3::bigint[], $4::bigint[], $5::bigint[],
                         $6::bigint[], $7::bigint[], $8::timestamptz[], $9::timestamptz[],
                         $10::int[], $11::int[], $12::int[], $13::text[], $14::text[],
                         $15::text[], $16::text[], $17::bytea[], $18::smallint[], $19::bigint[],
                         $20::bigint[], $21::bigint[], $22::bigint[])
                  AS new (id, buyer_id, seq, pseq, last_seq, quantity, unit_price, accepted_at,
                          updated_at, sale, round, epoch, currency, status, accepted_as,
                          durability, fingerprint, receipt_key, hold_ms, extended_ms, returned,
                          refunded)
             JOIN sales ON sales.number = new.sale",
            &ids,
            &buyers,
            &seqs,
            &pseqs,
            &last_seqs,
            &quantities,
            &prices,
            &accepted_at as &[Option<DateTime<Utc>>],
            &updated_at as &[Option<DateTime<Utc>>],
            &sales,
            &rounds,
            &epochs,
            &currencies as &[&str],
            &statuses as &[&str],
            &first_statuses as &[&str],
            &durabilities as &[&str],
            &fingerprints as &[&[u8]],
            &keys,
            &holds.hold_ms,
            &holds.extended_ms,
            &holds.returned,
            &holds.refunded,
        )
        .execute(&mut *self.transaction)
        .await?;
        Ok(())
    }

    async fn insert_events(&mut self, rows: &[EventRow]) -> Result<(), WriteError> {
        let (sales, rounds, epochs, seqs) = places(
            rows.iter()
                .map(|row| (row.round, row.id.epoch, row.event.seq)),
        );
        let pseqs: Vec<i64> = rows.iter().map(|row| row.id.pseq.cast_signed()).collect();
        let units: Vec<i64> = rows
            .iter()
            .map(|row| row.event.units.cast_signed())
            .collect();
        let at: Vec<_> = rows.iter().map(|row| instant(row.at_ms)).collect();
        let orders: Vec<_> = rows
            .iter()
            .map(|row| row.event.order.map(|id| id.0))
            .collect();
        let actors: Vec<_> = rows.iter().map(|row| row.event.actor).collect();
        let operations: Vec<_> = rows
            .iter()
            .map(|row| row.event.operation.map(|id| id.0))
            .collect();
        let kinds: Vec<&str> = rows.iter().map(|row| row.event.kind.as_str()).collect();
        let fingerprints: Vec<_> = rows
            .iter()
            .map(|row| row.event.fingerprint.map(|print| print.0.to_vec()))
            .collect();
        let from_held: Vec<bool> = rows.iter().map(|row| row.event.from_held).collect();
        let amendments: Vec<_> = rows
            .iter()
            .map(|row| row.event.amendment.map(|amendment| json(&amendment)))
            .collect();
        sqlx::query!(
            "INSERT INTO round_events (sale, round, epoch, seq, pseq, units, at, order_id, actor,
                                       operation_id, kind, fingerprint, from_held, amendment)
             SELECT * FROM unnest($1::int[], $2::int[], $3::int[], $4::bigint[], $5::bigint[],
                                  $6::bigint[], $7::timestamptz[], $8::uuid[], $9::uuid[],
                                  $10::uuid[], $11::text[], $12::bytea[], $13::boolean[],
                                  $14::jsonb[])",
            &sales,
            &rounds,
            &epochs,
            &seqs,
            &pseqs,
            &units,
            &at as &[Option<DateTime<Utc>>],
            &orders as &[Option<Uuid>],
            &actors as &[Option<Uuid>],
            &operations as &[Option<Uuid>],
            &kinds as &[&str],
            &fingerprints as &[Option<Vec<u8>>],
            &from_held,
            &amendments as &[Option<serde_json::Value>],
        )
        .execute(&mut *self.transaction)
        .await?;
        Ok(())
    }

    /// Stores what became of stored orders.
    ///
    /// # Errors
    /// [`WriteError`].
    pub async fn update_orders(&mut self, rows: &[OrderRow]) -> Result<(), WriteError> {
        if rows.is_empty() {
            return Ok(());
        }
        let ids: Vec<Uuid> = rows.iter().map(|row| row.order.id.0).collect();
        let statuses: Vec<&str> = rows.iter().map(|row| row.order.status.as_str()).collect();
        let last_seqs: Vec<i64> = rows.iter().map(|row| row.last_seq.cast_signed()).collect();
        let updated_at: Vec<_> = rows.iter().map(|row| instant(row.updated_at_ms)).collect();
        let holds = Holds::of(rows);
        sqlx::query!(
            "UPDATE orders
             SET status = new.status, last_seq = new.last_seq, updated_at = new.updated_at,
                 extended_ms = new.extended_ms, returned = new.returned, refunded = new.refunded
             FROM unnest($1::uuid[], $2::text[], $3::bigint[], $4::timestamptz[], $5::bigint[],
                         $6::bigint[], $7::bigint[])
                  AS new (id, status, last_seq, updated_at, extended_ms, returned, refunded)
             WHERE orders.id = new.id AND orders.last_seq < new.last_seq",
            &ids,
            &statuses as &[&str],
            &last_seqs,
            &updated_at as &[Option<DateTime<Utc>>],
            &holds.extended_ms,
            &holds.returned,
            &holds.refunded,
        )
        .execute(&mut *self.transaction)
        .await?;
        Ok(())
    }

    /// Moves rounds on.
    ///
    /// # Errors
    /// [`WriteError`].
    pub async fn update_rounds(&mut self, rows: &[RoundRow]) -> Result<(), WriteError> {
        if rows.is_empty() {
            return Ok(());
        }
        let ids: Vec<RoundId> = rows.iter().map(|row| row.round).collect();
        let (sales, rounds) = columns(&ids);
        let of = |value: fn(&Counters) -> u64| -> Vec<i64> {
            rows.iter()
                .map(|row| value(&row.counters).cast_signed())
                .collect()
        };
        let epochs: Vec<i32> = rows
            .iter()
            .map(|row| row.id.epoch.0.cast_signed())
            .collect();
        let pseqs: Vec<i64> = rows.iter().map(|row| row.id.pseq.cast_signed()).collect();
        let intents: Vec<_> = rows
            .iter()
            .map(|row| row.intent.map(Intent::as_str))
            .collect();
        let currencies: Vec<_> = rows
            .iter()
            .map(|row| {
                let amendment = row.amendment.as_ref();
                amendment.map(|new| new.unit_price.currency.as_str())
            })
            .collect();
        let amended = |value: fn(&Amendment) -> Option<i64>| -> Vec<Option<i64>> {
            let amendments = rows.iter().map(|row| row.amendment.as_ref());
            amendments.map(|row| row.and_then(value)).collect()
        };
        let opens_at: Vec<_> = amended(|new| Some(new.window.opens_at_ms));
        let opens_at: Vec<_> = opens_at
            .into_iter()
            .map(|ms| ms.and_then(instant))
            .collect();
        let closes_at: Vec<_> = amended(|new| new.window.closes_at_ms);
        let closes_at: Vec<_> = closes_at
            .into_iter()
            .map(|ms| ms.and_then(instant))
            .collect();
        sqlx::query!(
            "UPDATE rounds
             SET allocation = new.allocation, remaining = new.remaining, held = new.held,
                 sold = new.sold, seq = new.seq, epoch = new.epoch, pseq = new.pseq,
                 intent = coalesce(new.intent, rounds.intent),
                 opens_at = coalesce(new.opens_at, rounds.opens_at),
                 closes_at = CASE WHEN new.opens_at IS NULL THEN rounds.closes_at
                             ELSE new.closes_at END,
                 per_buyer_limit = coalesce(new.per_buyer_limit, rounds.per_buyer_limit),
                 per_order_limit = coalesce(new.per_order_limit, rounds.per_order_limit),
                 unit_price = coalesce(new.unit_price, rounds.unit_price),
                 currency = coalesce(new.currency, rounds.currency),
                 hold_ms = CASE WHEN new.opens_at IS NULL THEN rounds.hold_ms
                           ELSE new.hold_ms END
             FROM unnest($1::int[], $2::int[], $3::bigint[], $4::bigint[], $5::bigint[],
                         $6::bigint[], $7::bigint[], $8::int[], $9::bigint[], $10::text[],
                         $11::timestamptz[], $12::timestamptz[], $13::bigint[], $14::bigint[],
                         $15::bigint[], $16::text[], $17::bigint[])
                  AS new (sale, round, allocation, remaining, held, sold, seq, epoch, pseq, intent,
                          opens_at, closes_at, per_buyer_limit, per_order_limit, unit_price,
                          currency, hold_ms)
             WHERE rounds.sale = new.sale AND rounds.round = new.round",
            &sales,
            &rounds,
            &of(|counters| counters.allocation),
            &of(|counters| counters.remaining),
            &of(|counters| counters.held),
            &of(|counters| counters.sold),
            &of(|counters| counters.seq),
            &epochs,
            &pseqs,
            &intents as &[Option<&str>],
            &opens_at as &[Option<DateTime<Utc>>],
            &closes_at as &[Option<DateTime<Utc>>],
            &amended(|new| Some(new.per_buyer_limit.cast_signed())) as &[Option<i64>],
            &amended(|new| Some(new.per_order_limit.cast_signed())) as &[Option<i64>],
            &amended(|new| Some(new.unit_price.amount)) as &[Option<i64>],
            &currencies as &[Option<&str>],
            &amended(|new| new.hold_ms.map(u64::cast_signed)) as &[Option<i64>],
        )
        .execute(&mut *self.transaction)
        .await?;
        Ok(())
    }

    /// Keeps what no table takes, with the entry's bytes and its instant, milliseconds since the
    /// Unix epoch.
    ///
    /// # Errors
    /// [`WriteError`].
    pub async fn insert_letter(
        &mut self,
        letter: &Letter,
        payload: &[u8],
        at_ms: Option<i64>,
    ) -> Result<(), WriteError> {
        sqlx::query!(
            "INSERT INTO dead_letters (partition, epoch, pseq, sale, round, seq_from, seq_to, units,
                                       allocated, order_id, sqlstate, reason, payload, at, held)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)",
            self.partition.0.cast_signed(),
            letter.id.epoch.0.cast_signed(),
            letter.id.pseq.cast_signed(),
            letter.round.sale.0.cast_signed(),
            letter.round.round.cast_signed(),
            letter.seq_from.cast_signed(),
            letter.seq_to.cast_signed(),
            letter.delta.sold,
            letter.delta.allocated,
            letter.order.map(|id| id.0),
            letter.error.sqlstate,
            letter.error.reason,
            payload,
            at_ms.and_then(instant),
            letter.delta.held,
        )
        .execute(&mut *self.transaction)
        .await?;
        Ok(())
    }

    /// Resolves a dead letter; `false` when somebody has done so before.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn resolve(&mut self, letter: i64) -> Result<bool, StoreError> {
        let done = sqlx::query!(
            "UPDATE dead_letters SET resolved_at = greatest(now(), created_at)
             WHERE id = $1 AND resolved_at IS NULL",
            letter
        )
        .execute(&mut *self.transaction)
        .await?;
        Ok(done.rows_affected() == 1)
    }

    /// Moves the position and commits.
    ///
    /// # Errors
    /// [`StoreError`]; the batch is stored or not, and the position says which.
    pub async fn commit(mut self, stored: JournalId) -> Result<(), StoreError> {
        sqlx::query!(
            "UPDATE journal_positions
             SET position = $2, position_epoch = $3, updated_at = now()
             WHERE partition = $1",
            self.partition.0.cast_signed(),
            stored.pseq.cast_signed() + i64::from(faults::bug("position_too_far")),
            stored.epoch.0.cast_signed()
        )
        .execute(&mut *self.transaction)
        .await?;
        faults::point("writer.before_commit");
        Ok(self.transaction.commit().await?)
    }

    /// Leaves everything as it was.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn rollback(self) -> Result<(), StoreError> {
        Ok(self.transaction.rollback().await?)
    }
}

struct EventColumns {
    sale: i32,
    round: i32,
    epoch: i32,
    seq: i64,
    pseq: i64,
    units: i64,
    at: DateTime<Utc>,
    order_id: Option<Uuid>,
    actor: Option<Uuid>,
    operation_id: Option<Uuid>,
    kind: String,
    fingerprint: Option<Vec<u8>>,
    from_held: bool,
}

impl TryFrom<EventColumns> for EventRow {
    type Error = StoreError;

    fn try_from(row: EventColumns) -> Result<Self, StoreError> {
        let kind = EventKind::ALL
            .into_iter()
            .find(|kind| kind.as_str() == row.kind)
            .ok_or_else(|| super::unreadable(format!("event of kind {}", row.kind)))?;
        let round = round_id(row.sale, row.round);
        Ok(Self {
            round,
            id: JournalId {
                epoch: Epoch(row.epoch.cast_unsigned()),
                pseq: row.pseq.cast_unsigned(),
            },
            at_ms: row.at.timestamp_millis(),
            event: Event {
                round: Some(round),
                seq: row.seq.cast_unsigned(),
                kind,
                order: row.order_id.map(OrderId),
                units: row.units.cast_unsigned(),
                fingerprint: row
                    .fingerprint
                    .and_then(|bytes| Some(Fingerprint(bytes.try_into().ok()?))),
                from_held: row.from_held,
                // Its effect stands in the round; what it was is kept for people.
                amendment: None,
                actor: row.actor,
                operation: row.operation_id.map(Into::into),
            },
        })
    }
}

/// An instant as PostgreSQL takes it. One outside the calendar becomes NULL, which the column
/// refuses: the row is then a dead letter like any other that cannot be stored.
fn instant(ms: i64) -> Option<DateTime<Utc>> {
    DateTime::from_timestamp_millis(ms)
}

fn round_id(sale: i32, round: i32) -> RoundId {
    RoundId {
        sale: SaleNumber(sale.cast_unsigned()),
        round: round.cast_unsigned(),
    }
}

/// Ids of rounds as two columns. A number beyond what PostgreSQL holds turns negative, and the
/// check constraints refuse it.
fn columns(rounds: &[RoundId]) -> (Vec<i32>, Vec<i32>) {
    rounds
        .iter()
        .map(|id| (id.sale.0.cast_signed(), id.round.cast_signed()))
        .unzip()
}

/// Places of orders or events as columns.
fn places(
    places: impl Iterator<Item = (RoundId, Epoch, u64)>,
) -> (Vec<i32>, Vec<i32>, Vec<i32>, Vec<i64>) {
    let mut columns = (vec![], vec![], vec![], vec![]);
    for (round, epoch, seq) in places {
        columns.0.push(round.sale.0.cast_signed());
        columns.1.push(round.round.cast_signed());
        columns.2.push(epoch.0.cast_signed());
        columns.3.push(seq.cast_signed());
    }
    columns
}

/// What became of orders, as columns.
struct Holds {
    hold_ms: Vec<i64>,
    extended_ms: Vec<i64>,
    returned: Vec<i64>,
    refunded: Vec<i64>,
}

impl Holds {
    fn of(rows: &[OrderRow]) -> Self {
        let column = |value: fn(&Order) -> u64| {
            rows.iter()
                .map(|row| value(&row.order).cast_signed())
                .collect()
        };
        Self {
            hold_ms: column(|order| order.hold_ms),
            extended_ms: column(|order| order.extended_ms),
            returned: column(|order| order.returned),
            refunded: column(|order| order.refunded),
        }
    }
}

/// An amendment as people read it in SQL.
fn json(amendment: &Amendment) -> serde_json::Value {
    serde_json::json!({
        "opens_at": instant(amendment.window.opens_at_ms),
        "closes_at": amendment.window.closes_at_ms.and_then(instant),
        "per_buyer_limit": amendment.per_buyer_limit,
        "per_order_limit": amendment.per_order_limit,
        "price": amendment.unit_price,
        "hold_ms": amendment.hold_ms,
    })
}
