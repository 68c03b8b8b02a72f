//! The rounds of sales: made when their schedule says so, and brought into Redis.
//!
//! A round is in PostgreSQL first, and its `provisioned_at` is set once Redis has confirmed it.
//! Nothing is sold before that, so a round without it may be created any number of times: a crash
//! between the two steps heals here.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::SaleError;
use crate::{
    clock,
    domain::{id::RoundId, model::Provisioned, round::Terms},
    engine::{Engine, EngineError, Engines},
    faults,
    store::{
        directory::Directory,
        rounds::Rounds,
        schedules::{Due, Planned, Schedules},
    },
};

/// The time between two looks for rounds that Redis has not confirmed.
const BRING_PERIOD: Duration = Duration::from_secs(2);

/// The longest time between two looks at what schedules say: another node may have made a sale.
const PLAN_PERIOD: Duration = Duration::from_millis(500);

/// The shortest.
const REST: Duration = Duration::from_millis(10);

/// Rounds, or sales, that one look takes on.
const LOOK_MAX: i64 = 100;

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

/// Sees to it that every round is there when it opens.
#[derive(Clone, Debug)]
pub struct RoundKeeper {
    /// Where rounds live.
    pub engines: Engines,
    /// Rounds in PostgreSQL.
    pub rounds: Rounds,
    /// When they open.
    pub schedules: Schedules,
    /// What this node knows of sales.
    pub directory: Directory,
}

impl RoundKeeper {
    /// Makes rounds, and brings into Redis what is not there: also what an interrupted request or a
    /// crash left behind. Until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        stop.run_until_cancelled(async {
            let mut brought_at = Instant::now();
            loop {
                let (planned, pause) = self.plan().await;
                if planned.rounds > 0 || brought_at.elapsed() >= BRING_PERIOD {
                    brought_at = Instant::now();
                    self.bring().await;
                }
                sleep(pause).await;
            }
        })
        .await;
    }

    /// Does what schedules ask for now. Gives what that was, and how long nothing is to be done.
    async fn plan(&self) -> (Planned, Duration) {
        let mut all = Planned::default();
        let agenda = match self.schedules.agenda(LOOK_MAX).await {
            Ok(agenda) => agenda,
            Err(error) => {
                tracing::debug!(%error, "schedules cannot be read");
                return (all, PLAN_PERIOD);
            }
        };
        let mut pause = PLAN_PERIOD;
        for due in agenda {
            // Without its clock nobody can say what time it is; nothing is sold there either.
            let engine = self.engines.of(due.partition);
            let Some(now_ms) = engine.and_then(Engine::redis_ms) else {
                continue;
            };
            if due.at_ms > now_ms {
                let wait = u64::try_from(due.at_ms - now_ms).unwrap_or(0);
                pause = pause.min(Duration::from_millis(wait));
                continue;
            }
            match self.turn(due, now_ms).await {
                Ok(planned) => {
                    all.rounds += planned.rounds;
                    all.missed += planned.missed;
                    pause = REST;
                }
                Err(error) => tracing::warn!(sale = %due.id, %error, "no round could be made"),
            }
        }
        (all, pause.max(REST))
    }

    async fn turn(&self, due: Due, now_ms: i64) -> Result<Planned, SaleError> {
        let planned = self.schedules.plan(due.sale, now_ms).await?;
        faults::point("rounds.after_plan");
        if planned.rounds > 0 {
            tracing::debug!(sale = %due.id, rounds = planned.rounds, "rounds made");
        }
        if planned.missed > 0 {
            tracing::warn!(sale = %due.id, windows = planned.missed,
                "windows passed while nothing was running: they are missed, not run late");
        }
        Ok(planned)
    }

    async fn bring(&self) {
        let waiting = self.rounds.unprovisioned(LOOK_MAX).await;
        // A request that is under way right now is not interrupted: doing it twice is safe.
        for waiting in waiting.unwrap_or_default() {
            let Some(engine) = self.engines.of(waiting.partition) else {
                continue;
            };
            match provision(engine, &self.rounds, waiting.round, &waiting.terms).await {
                Ok(()) => {
                    tracing::info!(round = %waiting.round, "round provisioned");
                    self.directory.refresh(waiting.round.sale);
                }
                Err(error) => {
                    tracing::debug!(round = %waiting.round, %error, "round not provisioned yet");
                }
            }
        }
    }
}
