//! Bringing rounds into Redis.
//!
//! A round is in PostgreSQL first, and its `provisioned_at` is set once Redis has confirmed it.
//! Nothing is sold before that, so a round without it may be created any number of times: a crash
//! between the two steps heals here.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::SaleError;
use crate::{
    clock,
    domain::{id::RoundId, model::Provisioned, round::Terms},
    engine::{Engine, EngineError, Engines},
    faults,
    store::rounds::Rounds,
};

/// The time between two looks for rounds that Redis has not confirmed.
const PERIOD: Duration = Duration::from_secs(5);

/// Rounds that one look takes on.
const ROUNDS_MAX: i64 = 100;

/// Brings one round into Redis, and notes that it is there.
pub(super) async fn provision(
    engine: &Engine,
    rounds: &Rounds,
    round: RoundId,
    terms: &Terms,
) -> Result<(), SaleError> {
    faults::point("provision.before_redis");
    match engine.provision(round, terms).await? {
        Provisioned::Created | Provisioned::Exists => {
            faults::point("provision.after_redis");
            rounds.set_provisioned(round, clock::now()).await?;
            Ok(())
        }
        Provisioned::Conflict => {
            tracing::error!(%round, "Redis has this round with other rules; it is not sold");
            Err(SaleError::Engine(EngineError::Damaged(
                "other rules in Redis".to_owned(),
            )))
        }
    }
}

/// Brings into Redis what an interrupted request or a crash left behind, until `stop`.
pub async fn provision_rounds(engines: Engines, rounds: Rounds, stop: CancellationToken) {
    stop.run_until_cancelled(async {
        loop {
            tokio::time::sleep(PERIOD).await;
            bring(&engines, &rounds).await;
        }
    })
    .await;
}

async fn bring(engines: &Engines, rounds: &Rounds) {
    let waiting = rounds.unprovisioned(ROUNDS_MAX).await.unwrap_or_default();
    // A request that is under way right now is not interrupted: doing it twice is safe.
    for waiting in waiting {
        let Some(engine) = engines.of(waiting.partition) else {
            continue;
        };
        match provision(engine, rounds, waiting.round, &waiting.terms).await {
            Ok(()) => tracing::info!(round = %waiting.round, "round provisioned"),
            Err(error) => {
                tracing::debug!(round = %waiting.round, %error, "round not provisioned yet");
            }
        }
    }
}
