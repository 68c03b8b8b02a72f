//! Ends holds when their time is over, and serves the lines of those who wait for their units.
//!
//! Redis' clock decides, inside the script; this only sees to it that the script is called in time.
//! Every node does so, and whoever comes second finds nothing left to do.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use tokio::time::{MissedTickBehavior, interval, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::{
    domain::{
        id::{Partition, RoundId},
        limits::{SWEEP_HOLDS_MAX, SWEEP_OFFERS_MAX},
        order::Mode,
        round::State,
    },
    engine::{Engine, EngineError, Engines},
    metrics::HoldMetrics,
    store::rounds::Rounds,
};

/// The time between two looks at a round that sells, at most: the line is served, and a hold that
/// another node gave is found, within it. No hold is shorter.
const PERIOD: Duration = Duration::from_secs(1);
/// The same for a round that is closed and has no hold left.
const AT_REST: Duration = Duration::from_secs(30);
/// How long a round is left alone after a call that did not answer.
const LATER: Duration = Duration::from_millis(500);
/// The pause between two calls for a round that has more to do: purchases go first.
const PAUSE: Duration = Duration::from_millis(1);

/// Ends holds.
#[derive(Debug)]
pub struct Sweeper {
    /// Where rounds live.
    pub engines: Engines,
    /// Which of them have holds.
    pub rounds: Rounds,
    /// Counts what it does.
    pub metrics: HoldMetrics,
}

/// A round that has holds.
#[derive(Clone, Copy, Debug)]
struct Watched {
    partition: Partition,
    mode: Mode,
    /// When it is looked at next.
    due: Instant,
}

impl Sweeper {
    /// Sweeps until `stop`, also while a store does not answer: each call is whole by itself.
    pub async fn run(self, stop: CancellationToken) {
        stop.run_until_cancelled(self.sweep_on()).await;
    }

    async fn sweep_on(&self) {
        let mut period = interval(PERIOD);
        period.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut watched: HashMap<RoundId, Watched> = HashMap::new();
        loop {
            let next = watched.values().map(|round| round.due).min();
            let due = async {
                match next {
                    Some(due) => sleep_until(due.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = period.tick() => self.list(&mut watched).await,
                () = due => self.sweep_due(&mut watched).await,
            }
        }
    }

    /// Learns which rounds have holds. While PostgreSQL is away, those that were known are: new ones
    /// need it.
    async fn list(&self, watched: &mut HashMap<RoundId, Watched>) {
        match self.rounds.with_holds().await {
            Ok(rounds) => {
                let before = std::mem::take(watched);
                watched.extend(rounds.into_iter().map(|(round, partition, mode)| {
                    let due = before
                        .get(&round)
                        .map_or_else(Instant::now, |known| known.due);
                    let known = Watched {
                        partition,
                        mode,
                        due,
                    };
                    (round, known)
                }));
            }
            Err(error) => tracing::debug!(%error, "rounds with holds cannot be listed"),
        }
    }

    async fn sweep_due(&self, watched: &mut HashMap<RoundId, Watched>) {
        let now = Instant::now();
        for (round, known) in watched.iter_mut().filter(|(_, known)| known.due <= now) {
            let Some(engine) = self.engines.of(known.partition) else {
                known.due = now + AT_REST;
                continue;
            };
            let after = match self.sweep(engine, *round, known.mode).await {
                Ok(after) => after,
                Err(error) => {
                    tracing::debug!(%round, %error, "holds cannot be swept");
                    LATER
                }
            };
            known.due = Instant::now() + after;
        }
    }

    /// Sweeps a round; how long until it must be looked at again.
    async fn sweep(
        &self,
        engine: &Engine,
        round: RoundId,
        mode: Mode,
    ) -> Result<Duration, EngineError> {
        let durability = engine.gives(mode).ok();
        let (swept, standing) = engine
            .sweep(round, SWEEP_HOLDS_MAX, SWEEP_OFFERS_MAX, durability)
            .await?;
        self.metrics.expired.inc_by(swept.expired);
        self.metrics.offered.inc_by(swept.offered);
        let serves = swept.offered > 0 && standing.waiting > 0 && standing.counters.remaining > 0;
        if swept.expired == SWEEP_HOLDS_MAX || serves {
            return Ok(PAUSE);
        }
        let at_rest = standing.state == State::Closed && standing.counters.held == 0;
        let longest = if at_rest { AT_REST } else { PERIOD };
        // Behind the millisecond of the deadline.
        let until = swept.next_ms.map(|until| until - standing.now_ms + 1);
        let until = until.map(|ms| Duration::from_millis(u64::try_from(ms).unwrap_or(0)));
        Ok(until.map_or(longest, |until| until.clamp(PAUSE, longest)))
    }
}
