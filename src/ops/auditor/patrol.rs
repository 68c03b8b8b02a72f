//! All rounds, all the time: what one script and one row tell every second, everything now and
//! then, every full look a row. Findings are gauges, and one line in the log when they begin and when they end.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use tokio::{
    select,
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use super::{
    AuditError, Auditor, Check, CheckName, Seen, Status, Subject, judge_counters, verdict,
};
use crate::{
    clock,
    domain::{
        id::{JournalId, Partition, RoundId},
        round::{Intent, State},
    },
    engine::Standing,
    metrics::{AuditMetrics, CheckLabels, PartitionLabels, VerdictLabels},
    store::{
        audit::{Glance, Glances},
        endings::{AuditRun, Endings},
    },
};

/// The time between two looks at a round that is open or was changed lately.
const PERIOD: Duration = Duration::from_secs(1);
/// All other rounds have their turn every so many periods.
const OTHERS_EVERY: u64 = 10;
/// A change was lately for so long.
const LATELY: Duration = Duration::from_mins(1);
/// The time between two full looks at a round that changes; a hundred times what one takes, if that
/// is more.
const FULL_EVERY: Duration = Duration::from_mins(1);
/// The time between two full looks at a round that is closed and not all stored, that failed, or at
/// which a store did not answer; four times what one takes, if that is more.
const UNSETTLED_EVERY: Duration = Duration::from_secs(5);
/// The time between two full looks at a round that does not change.
const AT_REST_EVERY: Duration = Duration::from_mins(10);
/// The same of one that has left Redis: only somebody's hand changes its rows.
const ARCHIVED_EVERY: Duration = Duration::from_hours(24);
/// Rounds of one period, so that thousands of rounds cost no more than these: what is left out
/// has its turn in the next.
const ROUNDS_MAX: i64 = 200;
/// Partitions of one period.
const PARTITIONS_MAX: usize = 64;
/// A difference between this node's clock and Redis' that an operator should know about. Redis' own
/// decides, so nothing is wrong with what is sold.
const CLOCK_SKEW_MS: i64 = 250;

/// Audits all rounds, as long as it runs.
#[derive(Debug)]
pub struct Patrol {
    auditor: Auditor,
    metrics: AuditMetrics,
    /// Every round that was ever met: about a hundred bytes each.
    rounds: HashMap<RoundId, Watched>,
    /// Where the next page of open rounds begins.
    open_after: Option<RoundId>,
    /// Where the next page of all rounds begins.
    all_after: Option<RoundId>,
    /// Where the next page of partitions begins.
    next_partition: usize,
    /// What fails of partitions.
    partitions: HashMap<Partition, BTreeSet<CheckName>>,
    /// Partitions whose clock is off.
    skewed: BTreeSet<Partition>,
    endings: Endings,
    /// Whether the last look failed for want of a store, which is told once.
    blind: bool,
}

/// What is remembered of a round.
#[derive(Debug)]
struct Watched {
    subject: Subject,
    /// The entry that brought its counters, when last seen.
    entry: JournalId,
    /// Since when that is so.
    changed_at: Instant,
    /// Whether it was over, when last seen.
    closed: bool,
    /// Whether it had left Redis, when last seen.
    archived: bool,
    full: Option<Full>,
    failing: BTreeSet<CheckName>,
    /// Whether the last full look proved that Redis lacks something: said twice, it is believed.
    lacking: bool,
}

/// The last full look at a round.
#[derive(Clone, Copy, Debug)]
struct Full {
    at: Instant,
    /// The round's last entry then, if there was a verdict on it.
    entry: JournalId,
    /// There was an answer.
    seen: bool,
    took: Duration,
    /// The round was over and everything was stored: nothing is left to change but by a cancel.
    settled: bool,
}

impl Watched {
    /// Whether it is time for a full look.
    fn is_due(&self, now: Instant) -> bool {
        self.full.is_none_or(|full| {
            let age = now.duration_since(full.at);
            let unsettled =
                !full.seen || (self.closed && !full.settled) || !self.failing.is_empty();
            let at_rest = if self.archived {
                ARCHIVED_EVERY
            } else {
                AT_REST_EVERY
            };
            age >= at_rest
                || (full.entry != self.entry && age >= FULL_EVERY.max(100 * full.took))
                || (unsettled && age >= UNSETTLED_EVERY.max(4 * full.took))
        })
    }
}

impl Patrol {
    /// A patrol that has seen nothing yet.
    pub fn new(auditor: Auditor, metrics: AuditMetrics) -> Self {
        for check in CheckName::ALL {
            metrics.failing.get_or_create(&label(check)).set(0);
        }
        Self {
            endings: Endings::new(auditor.database.clone()),
            next_partition: 0,
            partitions: HashMap::new(),
            skewed: BTreeSet::new(),
            auditor,
            metrics,
            rounds: HashMap::new(),
            open_after: None,
            all_after: None,
            blind: false,
        }
    }

    /// Looks until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut period = interval(PERIOD);
        period.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut periods = 0_u64;
        loop {
            select! {
                () = stop.cancelled() => return,
                _ = period.tick() => {}
            }
            // It may be dropped anywhere: what it writes, it writes in one go.
            select! {
                () = stop.cancelled() => return,
                () = self.walk(periods.is_multiple_of(OTHERS_EVERY)) => {}
            }
            periods = periods.wrapping_add(1);
        }
    }

    /// One period: partitions, a page of rounds at a glance, one round in full.
    async fn walk(&mut self, all: bool) {
        let mut failed = None;
        if let Err(error) = self.journals().await {
            self.metrics.errors.inc();
            failed = Some(error);
        }
        match self.page(all).await {
            Ok(page) => {
                for glance in page {
                    if let Err(error) = self.glance(&glance).await {
                        self.metrics.errors.inc();
                        failed = Some(error);
                    }
                }
                if let Err(error) = self.full().await {
                    self.metrics.errors.inc();
                    failed = Some(error);
                }
            }
            Err(error) => {
                self.metrics.errors.inc();
                failed = Some(error);
            }
        }
        match &failed {
            Some(error) if !self.blind => {
                tracing::warn!(%error, "the audit cannot look at every round");
            }
            None if self.blind => tracing::info!("the audit looks at every round again"),
            _ => {}
        }
        self.blind = failed.is_some();
    }

    async fn page(&mut self, all: bool) -> Result<Vec<Glance>, AuditError> {
        let now = Instant::now();
        let also = if all {
            Vec::new()
        } else {
            self.rounds
                .iter()
                .filter(|(_, watched)| {
                    !watched.failing.is_empty() || now.duration_since(watched.changed_at) < LATELY
                })
                .map(|(round, _)| *round)
                .collect()
        };
        let after = if all { self.all_after } else { self.open_after };
        let page = self
            .auditor
            .database
            .glances(Glances {
                open_at: (!all).then(clock::now),
                also,
                after,
                limit: ROUNDS_MAX,
            })
            .await?;
        let is_last = i64::try_from(page.len()).is_ok_and(|rounds| rounds < ROUNDS_MAX);
        let after = page.last().map(|glance| glance.round).filter(|_| !is_last);
        if all {
            self.all_after = after;
        } else {
            self.open_after = after;
        }
        Ok(page)
    }

    /// What one script and one row tell.
    async fn glance(&mut self, glance: &Glance) -> Result<(), AuditError> {
        let Glance {
            sale,
            partition,
            round,
            stored,
        } = *glance;
        let redis = self.auditor.engine(partition)?.audit(round).await?;
        let now = Instant::now();
        let (entry, closed, archived) = match &redis.keys {
            Ok(keys) => {
                let Standing { state, intent, .. } = keys.standing;
                let (closed, archived) = (state == State::Closed, intent == Intent::Archived);
                (keys.entry, closed, archived)
            }
            Err(_) => (stored.counted_at, false, false),
        };
        let watched = self.rounds.entry(round).or_insert_with(|| Watched {
            subject: Subject {
                sale,
                partition,
                round,
            },
            entry,
            changed_at: now,
            closed,
            archived,
            full: None,
            failing: BTreeSet::new(),
            lacking: false,
        });
        if watched.entry != entry || watched.closed != closed {
            watched.changed_at = now;
        }
        watched.entry = entry;
        watched.closed = closed;
        watched.archived = archived;
        self.note(round, &judge_counters(&redis, &stored));
        Ok(())
    }

    /// Everything, of the round that has waited longest for it.
    async fn full(&mut self) -> Result<(), AuditError> {
        let now = Instant::now();
        let due = self
            .rounds
            .values_mut()
            .filter(|watched| watched.is_due(now))
            .min_by_key(|watched| watched.full.map(|full| full.at));
        let Some(watched) = due else { return Ok(()) };
        let (subject, entry, closed) = (watched.subject, watched.entry, watched.closed);
        let before = watched.full.map(|full| full.entry).unwrap_or_default();
        // Also when it cannot be done: others have their turn first.
        watched.full = Some(Full {
            at: now,
            entry: before,
            seen: false,
            took: Duration::ZERO,
            settled: false,
        });
        let Some(seen) = self.auditor.look(subject).await? else {
            return Ok(());
        };
        let mut proved = None;
        if let Some(watched) = self.rounds.get_mut(&subject.round) {
            let verdict = seen.report.verdict != Status::Pending;
            watched.full = Some(Full {
                at: now,
                // Without a verdict it is looked at again, also if nothing more happens.
                entry: if verdict { entry } else { before },
                seen: true,
                took: now.elapsed(),
                settled: closed && verdict,
            });
            proved = seen.lacking.clone().filter(|_| watched.lacking);
            watched.lacking = seen.lacking.is_some();
        }
        self.note(subject.round, &seen.report.checks);
        if let Some(run) = kept_run(&seen, subject.round, "patrol") {
            self.endings.note(run).await?;
        }
        if let Some(missing) = proved {
            // Selling on could sell a unit or serve a key twice. Recovery writes the round anew.
            tracing::error!(sale = %subject.sale, round = %subject.round, missing,
                "Redis lacks what PostgreSQL has: nothing of the round is sold");
            let engine = self.auditor.engine(subject.partition)?;
            engine.condemn(subject.round, &missing).await?;
        }
        Ok(())
    }

    /// Journals, epochs, settings and clocks of a page of partitions.
    async fn journals(&mut self) -> Result<(), AuditError> {
        let engines = self.auditor.engines.clone();
        let all = engines.all();
        for at in 0..all.len().min(PARTITIONS_MAX) {
            let Some(engine) = all.get((self.next_partition + at) % all.len()) else {
                continue;
            };
            let partition = engine.partition();
            let asked_ms = clock::now().timestamp_millis();
            let checks = self.auditor.journal(engine).await?;
            if let Some(redis_ms) = engine.redis_ms() {
                self.note_clock(partition, asked_ms, redis_ms);
            }
            let failing = self.partitions.entry(partition).or_default();
            for check in &checks {
                tell(&self.metrics, failing, check, &partition);
            }
        }
        self.next_partition = (self.next_partition + PARTITIONS_MAX) % all.len().max(1);
        Ok(())
    }

    /// Says once when Redis' clock and this node's are too far apart, and when they agree again.
    fn note_clock(&mut self, partition: Partition, asked_ms: i64, redis_ms: i64) {
        let now_ms = clock::now().timestamp_millis();
        // What lies between asking and now is the time it took.
        let skew_ms = (redis_ms - now_ms).max(0) + (redis_ms - asked_ms).min(0);
        let seconds = Duration::from_millis(skew_ms.unsigned_abs()).as_secs_f64();
        self.metrics
            .clock_skew
            .get_or_create(&PartitionLabels {
                partition: partition.0,
            })
            .set(seconds);
        if skew_ms.abs() <= CLOCK_SKEW_MS {
            if self.skewed.remove(&partition) {
                tracing::info!(%partition, "the clocks agree again");
            }
        } else if self.skewed.insert(partition) {
            tracing::warn!(%partition, skew_ms, "Redis' clock and this node's are apart");
        }
    }

    /// Tells what has begun to fail and what has stopped to. What is pending stays as it was.
    fn note(&mut self, round: RoundId, checks: &[Check]) {
        let Some(watched) = self.rounds.get_mut(&round) else {
            return;
        };
        let whose = format!("sale {} round {round}", watched.subject.sale);
        for check in checks {
            if !check.name.is_of_partition() {
                tell(&self.metrics, &mut watched.failing, check, &whose);
            }
        }
        self.metrics
            .looks
            .get_or_create(&VerdictLabels {
                verdict: verdict(checks).as_str(),
            })
            .inc();
    }
}

/// Tells a check that has begun to fail, or has stopped to.
fn tell(
    metrics: &AuditMetrics,
    failing: &mut BTreeSet<CheckName>,
    check: &Check,
    whose: &dyn std::fmt::Display,
) {
    let name = check.name.as_str();
    let changed = match check.status {
        Status::Fail => failing.insert(check.name),
        Status::Pass => failing.remove(&check.name),
        Status::Pending => false,
    };
    if !changed {
        return;
    }
    let gauge = metrics.failing.get_or_create(&label(check.name));
    let Check {
        expected, actual, ..
    } = check;
    if check.status == Status::Fail {
        gauge.inc();
        tracing::error!(%whose, check = name, expected, actual, "audit fails");
    } else {
        gauge.dec();
        tracing::info!(%whose, check = name, expected, actual, "audit passes again");
    }
}

/// A look as it is kept; `None` for one without a verdict.
pub(in crate::ops) fn kept_run(seen: &Seen, round: RoundId, cause: &str) -> Option<AuditRun> {
    let report = &seen.report;
    let failing: Vec<_> = report
        .checks
        .iter()
        .filter(|check| check.status == Status::Fail)
        .collect();
    (report.verdict != Status::Pending).then(|| AuditRun {
        id: 0,
        round,
        checked_at: report.checked_at,
        took_ms: seen.took_ms,
        verdict: report.verdict.as_str().to_owned(),
        cause: cause.to_owned(),
        failing: serde_json::to_value(failing).unwrap_or_default(),
    })
}

fn label(check: CheckName) -> CheckLabels {
    CheckLabels {
        check: check.as_str(),
    }
}
