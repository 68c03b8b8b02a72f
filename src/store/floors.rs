//! How far each node has seen the journal: what must be there before a Redis that has lost
//! something is made anew unasked.

use std::time::Duration;

use uuid::Uuid;

use super::{Database, StoreError};
use crate::domain::id::{Epoch, JournalId, Partition};

/// What a node has said of a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeFloor {
    /// The process.
    pub node: Uuid,
    /// The timeline that it sold in, and the highest entry that it saw there.
    pub floor: JournalId,
    /// Whether it has stopped selling in that epoch.
    pub last_word: bool,
    /// Since its last sign of life.
    pub age: Duration,
}

/// The table `node_floors`.
#[derive(Clone, Debug)]
pub struct Floors {
    database: Database,
}

impl Floors {
    /// The floors in `database`.
    pub fn new(database: Database) -> Self {
        Self { database }
    }

    /// Says how far `node` has seen.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn report(
        &self,
        partition: Partition,
        node: Uuid,
        floor: JournalId,
        last_word: bool,
    ) -> Result<(), StoreError> {
        self.database
            .run(async move |pool| {
                sqlx::query!(
                    "INSERT INTO node_floors (partition, node, epoch, floor, last_word)
                     VALUES ($1, $2, $3, $4, $5)
                     ON CONFLICT (partition, node) DO UPDATE
                     SET epoch = excluded.epoch, floor = excluded.floor,
                         last_word = excluded.last_word, seen_at = now()",
                    partition.0.cast_signed(),
                    node,
                    floor.epoch.0.cast_signed(),
                    floor.pseq.cast_signed(),
                    last_word
                )
                .execute(&pool)
                .await?;
                Ok(())
            })
            .await
    }

    /// What all nodes have said of a partition.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn of(&self, partition: Partition) -> Result<Vec<NodeFloor>, StoreError> {
        self.database
            .run(async move |pool| {
                let rows = sqlx::query!(
                    r#"SELECT node, epoch, floor, last_word,
                              extract(epoch FROM now() - seen_at)::float8 AS "age!"
                       FROM node_floors WHERE partition = $1"#,
                    partition.0.cast_signed()
                )
                .fetch_all(&pool)
                .await?;
                Ok(rows
                    .into_iter()
                    .map(|row| NodeFloor {
                        node: row.node,
                        floor: JournalId {
                            epoch: Epoch(row.epoch.cast_unsigned()),
                            pseq: row.floor.cast_unsigned(),
                        },
                        last_word: row.last_word,
                        age: Duration::try_from_secs_f64(row.age.max(0.0)).unwrap_or_default(),
                    })
                    .collect())
            })
            .await
    }

    /// Forgets nodes that are gone.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn forget(&self, partition: Partition, nodes: Vec<Uuid>) -> Result<(), StoreError> {
        self.database
            .run(async move |pool| {
                sqlx::query!(
                    "DELETE FROM node_floors WHERE partition = $1 AND node = ANY ($2)",
                    partition.0.cast_signed(),
                    &nodes
                )
                .execute(&pool)
                .await?;
                Ok(())
            })
            .await
    }
}
