//! Looks at a fenced partition, and lets it sell again when nothing can be missing.
//!
//! The epoch is raised in PostgreSQL first, so that no writer stores anything of an older
//! timeline; then Redis' meta is written, if Redis is still exactly as it was inspected.

use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use crate::{
    domain::{
        id::{JournalId, RoundId},
        limits::CLOCK_JUMP_MS,
    },
    engine::{Engine, Engines, Fence, Inspection},
    faults,
    store::{
        journal::{Position, Positions},
        rounds::Rounds,
    },
};

/// The time between two looks at a partition that stays fenced.
const PERIOD: Duration = Duration::from_millis(250);

/// Verifies partitions whenever they are fenced.
#[derive(Clone, Debug)]
pub struct Recovery {
    /// The engines of all partitions.
    pub engines: Engines,
    /// Where the epochs live.
    pub positions: Positions,
    /// Which rounds Redis must have.
    pub rounds: Rounds,
}

/// What came of looking at a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verified {
    /// Another node, or an earlier run of this one, has begun the epoch on this very server.
    Adopted,
    /// Everything matched, and a new epoch has begun.
    Begun(JournalId),
}

/// Why a partition stays fenced.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StaysFenced {
    /// A store does not answer, or the partition changed meanwhile: the next look may do.
    #[error("{0}")]
    Passing(String),
    /// Something is missing, or may be: a human has to look.
    #[error("{0}")]
    Lost(String),
}

impl Recovery {
    /// Watches every partition until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let recovery = Arc::new(self);
        let watches = (0..recovery.engines.all().len()).map(|index| {
            let recovery = Arc::clone(&recovery);
            let stop = stop.clone();
            async move {
                if let Some(engine) = recovery.engines.all().get(index) {
                    stop.run_until_cancelled(recovery.watch(engine)).await;
                }
            }
        });
        futures::future::join_all(watches).await;
    }

    async fn watch(&self, engine: &Engine) {
        let partition = engine.partition();
        let mut fence = engine.fence();
        let mut told = None;
        loop {
            if fence
                .wait_for(|fence| matches!(fence, Fence::Fenced(_)))
                .await
                .is_err()
            {
                return;
            }
            match self.verify(engine).await {
                Ok(Verified::Adopted) => {
                    told = None;
                    tracing::info!(%partition, "partition verified: it sells");
                }
                Ok(Verified::Begun(entry)) => {
                    told = None;
                    tracing::info!(%partition, %entry, "partition verified: a new epoch begins");
                }
                Err(reason) => {
                    // Once for each reason: this goes on for as long as it takes.
                    if told.as_ref() != Some(&reason) {
                        match &reason {
                            StaysFenced::Passing(_) => {
                                tracing::warn!(%partition, %reason, "partition stays fenced");
                            }
                            StaysFenced::Lost(_) => tracing::error!(
                                %partition,
                                %reason,
                                "partition stays fenced: Redis may have lost accepted orders"
                            ),
                        }
                        told = Some(reason);
                    }
                }
            }
            // Also after a success, so that a fence that closes again at once does not spin.
            tokio::time::sleep(PERIOD).await;
        }
    }

    /// Looks at one partition; lets it sell if nothing can be missing.
    ///
    /// # Errors
    /// [`StaysFenced`].
    pub async fn verify(&self, engine: &Engine) -> Result<Verified, StaysFenced> {
        let passing = |error: &dyn std::fmt::Display| StaysFenced::Passing(error.to_string());
        let partition = engine.partition();
        let position = self
            .positions
            .of(partition)
            .await
            .map_err(|error| passing(&error))?;
        let inspection = engine.inspect().await.map_err(|error| passing(&error))?;
        let estimate_ms = engine.redis_ms();
        if let Some(ahead_ms) = estimate_ms.map(|estimate| inspection.now_ms - estimate)
            && inspection.same_incarnation
            && ahead_ms.abs() > CLOCK_JUMP_MS
        {
            // In words that do not change from look to look, so that they are said once.
            let direction = if ahead_ms > 0 { "ahead" } else { "back" };
            return Err(StaysFenced::Lost(format!(
                "the clock of Redis jumped {direction} by more than {} s; if it is right now, \
                 restart this node",
                CLOCK_JUMP_MS / 1000
            )));
        }
        // A new server may have other settings, and acceptances say what they survive.
        engine
            .read_settings()
            .await
            .map_err(|error| passing(&error))?;
        let provisioned = self
            .rounds
            .provisioned(partition)
            .await
            .map_err(|error| passing(&error))?;
        matches(&inspection, &position, engine.floor(), &provisioned).map_err(StaysFenced::Lost)?;
        if inspection.same_incarnation && inspection.epoch == Some(position.epoch) {
            engine.adopt(position.epoch, &inspection);
            return Ok(Verified::Adopted);
        }
        let incomplete = engine
            .incomplete(&inspection, &provisioned)
            .await
            .map_err(|error| passing(&error))?;
        if let Some(first) = incomplete.first() {
            return Err(StaysFenced::Lost(format!(
                "{} of {} rounds are missing or not whole in Redis, the first is {first}",
                incomplete.len(),
                provisioned.len()
            )));
        }
        let raised = self
            .positions
            .raise_epoch(partition, position.epoch)
            .await
            .map_err(|error| passing(&error))?
            .ok_or_else(|| StaysFenced::Passing("another node is at work".to_owned()))?;
        faults::point("recovery.after_raise");
        let entry = engine
            .install(raised.epoch, &inspection)
            .await
            .map_err(|error| passing(&error))?;
        faults::point("recovery.after_install");
        match self.positions.set_installed(partition, raised.epoch).await {
            Ok(true) => {}
            // Another node has raised the epoch meanwhile: nobody would store what is sold in ours.
            Ok(false) => {
                engine.fence_again("another epoch has begun");
                return Err(StaysFenced::Passing("another epoch has begun".to_owned()));
            }
            // Not noted: the next look only knows less, never something wrong.
            Err(error) => {
                tracing::warn!(%partition, %error, "the new epoch could not be noted as installed");
            }
        }
        Ok(Verified::Begun(entry))
    }
}

/// Whether Redis has everything that it must have. Pure.
fn matches(
    redis: &Inspection,
    position: &Position,
    floor: u64,
    provisioned: &[RoundId],
) -> Result<(), String> {
    if faults::bug("redis_believed") {
        return Ok(());
    }
    let stored = position.stored;
    let Some(epoch) = redis.epoch else {
        let fresh = position.installed.0 == 0
            && stored.pseq == 0
            && floor == 0
            && provisioned.is_empty()
            && redis.journal_length == Some(0);
        return if fresh {
            Ok(())
        } else {
            Err(format!(
                "Redis does not know the partition, but PostgreSQL has {} rounds of it and its \
                 journal up to entry {}",
                provisioned.len(),
                stored.pseq
            ))
        };
    };
    if epoch > position.epoch || epoch < position.installed || epoch < stored.epoch {
        return Err(format!(
            "Redis is in epoch {}, PostgreSQL in {} (last installed {}, last stored {})",
            epoch.0, position.epoch.0, position.installed.0, stored.epoch.0
        ));
    }
    if redis.pseq < stored.pseq.max(floor) {
        return Err(format!(
            "Redis has {} journal entries, but {} were seen and {} are stored",
            redis.pseq, floor, stored.pseq
        ));
    }
    let journal = (
        redis.journal_length,
        redis.journal_first,
        redis.journal_last,
    );
    let whole = match journal {
        (Some(0), None, None) => redis.pseq == stored.pseq,
        (Some(length), Some(first), Some(last)) => {
            last.pseq == redis.pseq
                && first.pseq <= stored.pseq + 1
                && length == last.pseq - first.pseq + 1
        }
        _ => false,
    };
    if whole {
        Ok(())
    } else {
        Err(format!(
            "the journal has {:?} entries from {} to {}; entries {} to {} are needed",
            redis.journal_length,
            redis.journal_first.map_or(0, |id| id.pseq),
            redis.journal_last.map_or(0, |id| id.pseq),
            stored.pseq + 1,
            redis.pseq
        ))
    }
}
