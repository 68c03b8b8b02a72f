//! Where the units of a round are now: many rounds in one call of `snapshot.lua`.

use std::{collections::HashSet, sync::Arc};

use bytes::Bytes;
use fred::types::Value;
use uuid::Uuid;

use super::{
    Engine, Shared,
    coalescer::Lane,
    connection::Connection,
    error::EngineError,
    memory::{Known, PROOF_ORDERS_MAX, Proof},
    packed::{Standing, Unpack},
};
use crate::domain::{
    id::{OrderId, RoundId},
    limits::CALL_ITEMS_MAX,
};

/// Entries of a hash that one step of a scan asks for.
const SCAN_COUNT: &str = "1000";

/// The lane of snapshots: a read is never older than its request, and reads that wait together
/// travel together.
pub(super) struct SnapshotLane {
    pub(super) shared: Arc<Shared>,
    pub(super) connection: Arc<Connection>,
}

impl Lane for SnapshotLane {
    type Item = RoundId;
    type Answer = Result<Standing, EngineError>;
    type Room = HashSet<RoundId>;

    fn fits(rounds: &mut Self::Room, round: &RoundId) -> bool {
        if rounds.len() == CALL_ITEMS_MAX {
            return rounds.contains(round);
        }
        rounds.insert(*round);
        true
    }

    async fn call(&self, items: Vec<RoundId>) -> Result<Vec<Self::Answer>, EngineError> {
        let Shared { keys, scripts, .. } = &*self.shared;
        let mut rounds = items.clone();
        rounds.sort_unstable();
        rounds.dedup();
        let names = rounds
            .iter()
            .flat_map(|round| [keys.round(*round), keys.sale(round.sale)]);
        let names = [keys.meta()].into_iter().chain(names);
        let mut called = self
            .shared
            .call(&self.connection, &scripts.snapshot, names.collect(), vec![])
            .await?;
        let mut standings = Vec::with_capacity(rounds.len());
        for _ in &rounds {
            let standing = called.reply.standing(called.epoch, called.head.now_ms)?;
            if let Some(standing) = &standing {
                self.shared.learn(standing, called.sent_at);
            }
            standings.push(standing);
        }
        let of = |round| {
            rounds
                .binary_search(round)
                .ok()
                .and_then(|at| standings[at])
        };
        let missing = || EngineError::Damaged("missing or not whole".to_owned());
        Ok(items
            .iter()
            .map(|round| of(round).ok_or_else(missing))
            .collect())
    }
}

impl Engine {
    /// Where the units of a round are; never older than the request.
    ///
    /// # Errors
    /// [`EngineError`]; nothing is ever changed.
    pub async fn snapshot(&self, round: RoundId) -> Result<Standing, EngineError> {
        self.snapshots.submit(round).await.flatten()
    }

    /// Loads in the background which orders exist, so that new ones can be refused from memory.
    pub(super) fn load_proof(&self, round: RoundId) {
        let shared = Arc::clone(&self.shared);
        let snapshots = Arc::clone(&self.snapshots);
        tokio::spawn(async move {
            let load = async {
                let before = snapshots.submit(round).await.flatten()?;
                let connection = &snapshots.lane().connection;
                let known = scan(connection, shared.keys.orders(round.sale)).await?;
                let after = snapshots.submit(round).await.flatten()?;
                Ok::<_, EngineError>((before, known, after))
            };
            let proof = match load.await {
                // No order in between: nothing is missing. Orders are taken out only with archived
                // rounds.
                Ok((before, Some(known), after))
                    if (before.epoch, before.orders) == (after.epoch, after.orders)
                        && after.archived_rounds == 0 =>
                {
                    Some(Proof::new(&after, known))
                }
                Ok(_) => None,
                Err(error) => {
                    tracing::debug!(%round, %error, "proof of absence not loaded");
                    None
                }
            };
            shared.memory.prove(round, proof);
        });
    }
}

/// The orders of a sale and their buyers; `None` when there are too many.
async fn scan(connection: &Connection, key: String) -> Result<Option<Known>, EngineError> {
    let key = Bytes::from(key);
    let unexpected = || EngineError::Protocol("HSCAN".to_owned());
    let count = connection
        .command("HLEN", vec![key.clone()])
        .await?
        .as_u64();
    if count.ok_or_else(unexpected)? > PROOF_ORDERS_MAX {
        return Ok(None);
    }
    let mut known = Known::default();
    let mut cursor = Bytes::from_static(b"0");
    loop {
        let arguments = vec![
            key.clone(),
            cursor,
            Bytes::from_static(b"COUNT"),
            Bytes::from(SCAN_COUNT),
        ];
        let Value::Array(step) = connection.command("HSCAN", arguments).await? else {
            return Err(unexpected());
        };
        let mut step = step.into_iter();
        cursor = step
            .next()
            .and_then(Value::into_bytes)
            .ok_or_else(unexpected)?;
        let mut fields = step.next().ok_or_else(unexpected)?.into_array().into_iter();
        while let (Some(id), Some(record)) = (fields.next(), fields.next()) {
            let id = id.into_bytes().ok_or_else(unexpected)?;
            let id = OrderId(Uuid::from_slice(&id).map_err(|_| unexpected())?);
            let record = record.into_bytes().ok_or_else(unexpected)?;
            let order = Unpack(&record).order(id).ok_or_else(unexpected)?;
            known.add(id, order.buyer);
        }
        if cursor == b"0"[..] {
            return Ok(Some(known));
        }
    }
}
