//! Takes out of each journal what PostgreSQL has had for a while, and nothing else.

use std::time::Duration;

use chrono::TimeDelta;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::{
    engine::{Engine, Engines, Fence},
    store::journal::Positions,
};

/// The time between two looks, at most.
const PERIOD: Duration = Duration::from_secs(10);
/// Calls for one partition in a row, a thousand entries each: others have their turn, too.
const CALLS_MAX: u32 = 32;

/// Trims journals.
#[derive(Clone, Debug)]
pub struct Trimmer {
    /// Where the journals are.
    pub engines: Engines,
    /// Up to where they are stored.
    pub positions: Positions,
    /// How long an entry stays after it was written: longer than a failover of PostgreSQL may take
    /// back.
    pub retention: TimeDelta,
}

impl Trimmer {
    /// Looks until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let retention = self.retention.to_std().unwrap_or_default();
        let mut period = interval((retention / 4).clamp(Duration::from_millis(250), PERIOD));
        period.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = period.tick() => {}
            }
            let trimming = async {
                for engine in self.engines.all() {
                    if let Err(reason) = self.trim(engine).await {
                        tracing::debug!(partition = %engine.partition(), reason, "journal not trimmed");
                    }
                }
            };
            // It may be dropped anywhere: each call is whole by itself.
            tokio::select! {
                () = stop.cancelled() => return,
                () = trimming => {}
            }
        }
    }

    async fn trim(&self, engine: &Engine) -> Result<(), String> {
        let fence = engine.fence().borrow().clone();
        let position = self.positions.find(engine.partition()).await;
        let Some(position) = position.map_err(|error| error.to_string())? else {
            return Ok(());
        };
        // A position of another timeline says nothing about this journal.
        if !matches!(fence, Fence::Open(epoch) if epoch == position.epoch) {
            return Ok(());
        }
        let Some(now_ms) = engine.redis_ms() else {
            return Ok(());
        };
        let before_ms = now_ms - self.retention.num_milliseconds();
        let mut trimmed = 0;
        for _ in 0..CALLS_MAX {
            let entries = engine
                .trim(position.stored.pseq, before_ms)
                .await
                .map_err(|error| error.to_string())?;
            if entries == 0 {
                break;
            }
            trimmed += entries;
        }
        if trimmed > 0 {
            tracing::debug!(partition = %engine.partition(), trimmed, "journal trimmed");
        }
        Ok(())
    }
}
