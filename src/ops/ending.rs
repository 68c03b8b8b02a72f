//! The end of a round, step by step: settled, certified, archived.
//!
//! Each step needs everything before it stored and a full audit that passes; each may be taken by
//! several nodes at once and has one effect.

use std::{collections::HashMap, time::Duration};

use chrono::TimeDelta;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;

use super::{
    auditor::{AuditError, Auditor, Seen, Status, Subject, kept_run},
    certificate::{self, CertificateKey},
};
use crate::{
    clock,
    domain::{
        id::RoundId,
        limits::ARCHIVE_ORDERS_MAX,
        model::{Archived, Settled},
        round::Intent,
    },
    engine::{Engine, Engines},
    faults,
    store::{
        endings::{Ending, Endings},
        orders::{Orders, Place},
        payments::Payments,
    },
};

/// The time between two looks for rounds that have a step left.
const PERIOD: Duration = Duration::from_secs(1);
/// Rounds of one look.
const ROUNDS_MAX: i64 = 100;
/// How long a round is left alone after a step that could not be taken.
const LATER: Duration = Duration::from_secs(5);
/// The pause after each call that takes orders out of Redis: purchases go first.
const PAUSE: Duration = Duration::from_millis(5);

/// Brings rounds to their end.
#[derive(Debug)]
pub struct RoundEnds {
    /// Proves that a round is sound before each step.
    pub auditor: Auditor,
    /// Where rounds live.
    pub engines: Engines,
    /// How far they have come.
    pub endings: Endings,
    /// Their orders in PostgreSQL.
    pub orders: Orders,
    /// Their payments.
    pub payments: Payments,
    /// Signs certificates; without one nothing is archived.
    pub key: Option<CertificateKey>,
    /// How long after its close a round settles.
    pub settle_after: TimeDelta,
    /// How long after its close it leaves Redis.
    pub archive_after: TimeDelta,
}

/// What became of a step.
enum Step {
    Done,
    /// The writer is on its way, or the clock of Redis is not there yet.
    Soon,
    /// Not before something has changed, and why.
    Later(String),
}

impl RoundEnds {
    /// Looks until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let mut period = interval(PERIOD);
        period.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut left_alone = HashMap::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = period.tick() => {}
            }
            // It may be dropped anywhere: the next run takes the step again.
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.once(&mut left_alone) => {}
            }
        }
    }

    /// One step of every round that has one left.
    async fn once(&self, left_alone: &mut HashMap<RoundId, (Instant, String)>) {
        left_alone.retain(|_, (since, _)| since.elapsed() < 2 * LATER);
        let mut after = None;
        loop {
            let now = clock::now();
            let due = self
                .endings
                .due(
                    now - self.settle_after,
                    now - self.archive_after,
                    after,
                    ROUNDS_MAX,
                )
                .await;
            let due = match due {
                Ok(due) => due,
                Err(error) => {
                    tracing::debug!(%error, "the ends of rounds cannot be looked for");
                    return;
                }
            };
            after = due.last().map(|ending| ending.round);
            let is_last = i64::try_from(due.len()).is_ok_and(|rounds| rounds < ROUNDS_MAX);
            for ending in due {
                let waits = left_alone
                    .get(&ending.round)
                    .is_some_and(|(since, _)| since.elapsed() < LATER);
                if waits {
                    continue;
                }
                let reason = match self.step(&ending).await {
                    Ok(Step::Done | Step::Soon) => {
                        left_alone.remove(&ending.round);
                        continue;
                    }
                    Ok(Step::Later(reason)) => reason,
                    Err(error) => error.to_string(),
                };
                let told = left_alone.insert(ending.round, (Instant::now(), reason.clone()));
                // Once for each reason: this goes on for as long as it takes.
                if told.is_none_or(|(_, before)| before != reason) {
                    let intent = ending.intent.as_str();
                    tracing::warn!(sale = %ending.sale, round = %ending.round, intent, reason,
                        "the end of a round has to wait");
                }
            }
            if is_last {
                return;
            }
        }
    }

    /// The next step of a round.
    async fn step(&self, ending: &Ending) -> Result<Step, AuditError> {
        let engine = self
            .engines
            .of(ending.partition)
            .ok_or(AuditError::Elsewhere(ending.partition))?;
        match ending.intent {
            Intent::Live | Intent::Paused | Intent::Closed => self.settle(engine, ending).await,
            Intent::Settled if !ending.certified => self.certify(ending).await,
            Intent::Settled => self.archive(engine, ending).await,
            Intent::Archived => self.leave(engine, ending).await,
        }
    }

    /// A full audit that passed; else what to do instead of the step.
    async fn sound(&self, ending: &Ending, cause: &str) -> Result<Result<Seen, Step>, AuditError> {
        let subject = Subject {
            sale: ending.sale,
            partition: ending.partition,
            round: ending.round,
        };
        let Some(seen) = self.auditor.watch(subject).await? else {
            return Ok(Err(Step::Soon));
        };
        if let Some(run) = kept_run(&seen, ending.round, cause) {
            self.endings.note(run).await?;
        }
        Ok(match seen.report.verdict {
            Status::Pass => Ok(seen),
            Status::Pending => Err(Step::Soon),
            Status::Fail => {
                let checks = seen.report.checks.iter();
                let failing: Vec<_> = checks
                    .filter(|check| check.status == Status::Fail)
                    .map(|check| check.name.as_str())
                    .collect();
                Err(Step::Later(format!("audit fails: {}", failing.join(", "))))
            }
        })
    }

    async fn settle(&self, engine: &Engine, ending: &Ending) -> Result<Step, AuditError> {
        // After it no order is confirmed and no unit goes back.
        if self.payments.pending(ending.round).await? {
            return Ok(Step::Later("payments are under way".to_owned()));
        }
        if let Err(step) = self.sound(ending, "settle").await? {
            return Ok(step);
        }
        let (settled, standing) = engine.settle(ending.round).await?;
        faults::point("end.after_settle");
        Ok(match settled {
            Settled::Done => {
                tracing::info!(sale = %ending.sale, round = %ending.round,
                    sold = standing.counters.sold, "round settled");
                Step::Done
            }
            Settled::Already => Step::Done,
            // This node's clock is ahead of Redis'.
            Settled::Open => Step::Soon,
            Settled::Held => Step::Later("orders wait for their payment".to_owned()),
        })
    }

    async fn certify(&self, ending: &Ending) -> Result<Step, AuditError> {
        let Some(key) = &self.key else {
            let reason = "no key signs certificates: STOCKADE_JWT_SECRET is not set";
            return Ok(Step::Later(reason.to_owned()));
        };
        let seen = match self.sound(ending, "certify").await? {
            Ok(seen) => seen,
            Err(step) => return Ok(step),
        };
        // Whoever is faster: the first certificate stays.
        if seen.sums.intent != Intent::Settled {
            return Ok(Step::Soon);
        }
        match certificate::issue(key, ending, &seen) {
            Ok(Some(certificate)) => {
                let first = self.endings.certify(ending.round, certificate).await?;
                faults::point("end.after_certificate");
                if first {
                    tracing::info!(sale = %ending.sale, round = %ending.round, key = key.id(),
                        "round certified");
                }
                Ok(Step::Done)
            }
            Ok(None) => Ok(Step::Soon),
            Err(error) => Ok(Step::Later(error.to_string())),
        }
    }

    async fn archive(&self, engine: &Engine, ending: &Ending) -> Result<Step, AuditError> {
        if let Err(step) = self.sound(ending, "archive").await? {
            return Ok(step);
        }
        let archived = engine.archive(ending.round, &[]).await?;
        faults::point("end.after_archive");
        Ok(match archived {
            (Archived::Done(_), _) => Step::Done,
            (Archived::Unsettled, _) => {
                Step::Later("Redis does not know that it is settled".to_owned())
            }
        })
    }

    /// Takes the orders of an archived round out of Redis. PostgreSQL knows by now that it is
    /// archived, so whoever rebuilds Redis does not put them back.
    async fn leave(&self, engine: &Engine, ending: &Ending) -> Result<Step, AuditError> {
        let mut after = Place::default();
        let mut gone = 0;
        loop {
            let limit = i64::try_from(ARCHIVE_ORDERS_MAX).unwrap_or(i64::MAX);
            let page = self.orders.ids(ending.round, after, limit).await?;
            let Some((_, last)) = page.last() else { break };
            after = *last;
            let ids: Vec<_> = page.iter().map(|(id, _)| *id).collect();
            match engine.archive(ending.round, &ids).await? {
                (Archived::Done(orders), _) => gone += orders,
                (Archived::Unsettled, _) => {
                    let reason = "Redis does not know that it is archived";
                    return Ok(Step::Later(reason.to_owned()));
                }
            }
            faults::point("end.after_some_left");
            sleep(PAUSE).await;
        }
        faults::point("end.after_all_left");
        self.endings
            .set_archived(ending.round, clock::now())
            .await?;
        tracing::info!(sale = %ending.sale, round = %ending.round, orders = gone, "round archived");
        Ok(Step::Done)
    }
}
