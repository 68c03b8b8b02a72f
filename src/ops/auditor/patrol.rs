//! All rounds, all the time: what one script and one row tell every second, everything now and
//! then. Findings are gauges, and one line in the log when they begin and when they end.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use tokio::{
    select,
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use super::{AuditError, Auditor, Check, CheckName, Status, Subject, judge_counters, verdict};
use crate::{
    clock,
    domain::{
        id::{JournalId, RoundId},
        round::State,
    },
    metrics::{AuditMetrics, CheckLabels, VerdictLabels},
    store::audit::{Glance, Glances},
};

/// The time between two looks at a round that is open or was changed lately.
const PERIOD: Duration = Duration::from_secs(1);
/// All other rounds have their turn every so many periods.
const OTHERS_EVERY: u64 = 10;
/// A change was lately for so long.
const LATELY: Duration = Duration::from_mins(1);
/// The time between two full looks at a round that changes.
const FULL_EVERY: Duration = Duration::from_mins(1);
/// The time between two full looks at a round that is closed and not all stored, or that failed.
const UNSETTLED_EVERY: Duration = Duration::from_secs(5);
/// The time between two full looks at a round that does not change.
const AT_REST_EVERY: Duration = Duration::from_mins(10);
/// Rounds of one period, so that thousands of rounds cost no more than these: what is left out
/// has its turn in the next.
const ROUNDS_MAX: i64 = 200;

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
    full: Option<Full>,
    failing: BTreeSet<CheckName>,
}

/// The last full look at a round.
#[derive(Clone, Copy, Debug)]
struct Full {
    at: Instant,
    entry: JournalId,
    /// The round was over and everything was stored: nothing is left to change but by a cancel.
    settled: bool,
}

impl Watched {
    /// Whether it is time for a full look.
    fn is_due(&self, now: Instant) -> bool {
        self.full.is_none_or(|full| {
            let age = now.duration_since(full.at);
            let unsettled = (self.closed && !full.settled) || !self.failing.is_empty();
            age >= AT_REST_EVERY
                || (full.entry != self.entry && age >= FULL_EVERY)
                || (unsettled && age >= UNSETTLED_EVERY)
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
            // Nothing here writes, so it may be dropped anywhere.
            select! {
                () = stop.cancelled() => return,
                () = self.walk(periods.is_multiple_of(OTHERS_EVERY)) => {}
            }
            periods = periods.wrapping_add(1);
        }
    }

    /// One period: a page of rounds at a glance, one round in full.
    async fn walk(&mut self, all: bool) {
        let mut failed = None;
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
        let (entry, closed) = match &redis.keys {
            Ok(keys) => (keys.entry, keys.standing.state == State::Closed),
            Err(_) => (stored.counted_at, false),
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
            full: None,
            failing: BTreeSet::new(),
        });
        if watched.entry != entry || watched.closed != closed {
            watched.changed_at = now;
        }
        watched.entry = entry;
        watched.closed = closed;
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
        // Also when it cannot be done: others have their turn first.
        watched.full = Some(Full {
            at: now,
            entry: watched
                .full
                .map_or_else(JournalId::default, |full| full.entry),
            settled: false,
        });
        let Some(report) = self.auditor.look(subject).await? else {
            return Ok(());
        };
        if let Some(watched) = self.rounds.get_mut(&subject.round) {
            watched.full = Some(Full {
                at: now,
                entry,
                settled: closed && report.verdict != Status::Pending,
            });
        }
        self.note(subject.round, &report.checks);
        Ok(())
    }

    /// Tells what has begun to fail and what has stopped to. What is pending stays as it was.
    fn note(&mut self, round: RoundId, checks: &[Check]) {
        let Some(watched) = self.rounds.get_mut(&round) else {
            return;
        };
        let sale = watched.subject.sale;
        for check in checks {
            let name = check.name.as_str();
            let changed = match check.status {
                Status::Fail => watched.failing.insert(check.name),
                Status::Pass => watched.failing.remove(&check.name),
                Status::Pending => false,
            };
            if !changed {
                continue;
            }
            let failing = self.metrics.failing.get_or_create(&label(check.name));
            let Check {
                expected, actual, ..
            } = check;
            if check.status == Status::Fail {
                failing.inc();
                tracing::error!(%sale, %round, check = name, expected, actual, "audit fails");
            } else {
                failing.dec();
                tracing::info!(%sale, %round, check = name, expected, actual, "audit passes again");
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

fn label(check: CheckName) -> CheckLabels {
    CheckLabels {
        check: check.as_str(),
    }
}
