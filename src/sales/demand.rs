//! How many purchases were refused, why and when: counted in memory, put into PostgreSQL every few
//! seconds.
//!
//! A refusal costs a lock that its thread has for itself almost always, and a place in a small map.
//! What is put away is how many there were in all, by this process: doing it twice is doing it once.

use std::{
    cell::Cell,
    collections::{BTreeSet, HashMap},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::SaleError;
use crate::{
    clock,
    domain::{demand::Reason, id::RoundId, order::Decision},
    engine::Answer,
    store::refusals::{Refusals, Refused},
};

/// The time between two puttings away: what a process that is killed loses.
const PUT_AWAY: Duration = Duration::from_secs(3);

/// Threads share a tray only beyond so many.
const TRAYS: usize = 64;

/// Rounds times minutes in memory; what is beyond that is not counted.
const SLOTS_MAX: usize = 16_384;

/// Minutes that are over are forgotten so much later, once they are put away.
const MINUTES_KEPT: i64 = 10;

const MINUTE_MS: i64 = 60_000;

/// A round's minute: minutes since the Unix epoch.
type Slot = (RoundId, i64);

/// Requests and units for each of [`Reason::ALL`].
type Counts = [(u64, u64); Reason::ALL.len()];

type Tray = Mutex<HashMap<Slot, Counts>>;

/// The refusals of this process. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Demand {
    node: Uuid,
    trays: Arc<[Tray]>,
    /// Everything counted that may still grow or is not put away.
    totals: Arc<tokio::sync::Mutex<Totals>>,
    refusals: Refusals,
}

#[derive(Debug, Default)]
struct Totals {
    counts: HashMap<Slot, Counts>,
    /// What has grown since it was put away.
    grown: BTreeSet<(u32, u32, i64)>,
}

thread_local! {
    static TRAY: Cell<Option<usize>> = const { Cell::new(None) };
}

/// The tray of this thread.
fn tray() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    TRAY.with(|tray| {
        let mine = tray.get();
        mine.unwrap_or_else(|| {
            let next = NEXT.fetch_add(1, Ordering::Relaxed) % TRAYS;
            tray.set(Some(next));
            next
        })
    })
}

impl Demand {
    /// Nothing refused yet.
    pub fn new(refusals: Refusals) -> Self {
        Self {
            node: clock::new_id(),
            trays: (0..TRAYS).map(|_| Tray::default()).collect(),
            totals: Arc::default(),
            refusals,
        }
    }

    /// Counts what became of a purchase of so many units, if it was refused.
    pub fn note(&self, round: RoundId, units: u64, outcome: &Result<Answer, SaleError>) {
        let (reason, now_ms) = match outcome {
            Ok(answer) => match &answer.decision {
                Decision::Accepted(_) | Decision::Replayed(_) => return,
                Decision::Refused(refusal) => match Reason::of(refusal) {
                    // What PostgreSQL answered may be without Redis' clock.
                    Some(reason) if answer.now_ms == 0 => (reason, clock::now_ms()),
                    Some(reason) => (reason, answer.now_ms),
                    None => return,
                },
            },
            Err(SaleError::Lack(_) | SaleError::Behind) => (Reason::NotDurable, clock::now_ms()),
            Err(_) => (Reason::Unavailable, clock::now_ms()),
        };
        let slot = (round, now_ms.div_euclid(MINUTE_MS));
        let mut tray = self.trays[tray()]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if tray.len() >= SLOTS_MAX && !tray.contains_key(&slot) {
            return;
        }
        let (requests, asked) = &mut tray.entry(slot).or_default()[reason.index()];
        *requests += 1;
        *asked += units;
    }

    /// Puts everything counted so far into PostgreSQL.
    pub async fn put_away(&self) {
        let mut totals = self.totals.lock().await;
        for tray in &*self.trays {
            let counted = std::mem::take(&mut *tray.lock().unwrap_or_else(PoisonError::into_inner));
            for (slot, counts) in counted {
                totals.add(slot, counts);
            }
        }
        if totals.grown.is_empty() {
            return;
        }
        let rows = totals.rows(self.node);
        match self.refusals.put(rows).await {
            Ok(()) => totals.forget(clock::now_ms().div_euclid(MINUTE_MS) - MINUTES_KEPT),
            // The next time has all of it, too.
            Err(error) => tracing::debug!(%error, "refusals are not put away yet"),
        }
    }

    /// Puts everything away again and again, and once more at the end.
    pub async fn run(&self, stop: CancellationToken) {
        let mut turns = tokio::time::interval(PUT_AWAY);
        while stop.run_until_cancelled(turns.tick()).await.is_some() {
            self.put_away().await;
        }
        self.put_away().await;
    }
}

impl Totals {
    fn add(&mut self, slot: Slot, counts: Counts) {
        if self.counts.len() >= SLOTS_MAX && !self.counts.contains_key(&slot) {
            return;
        }
        let total = self.counts.entry(slot).or_default();
        for (total, more) in total.iter_mut().zip(counts) {
            total.0 += more.0;
            total.1 += more.1;
        }
        self.grown.insert((slot.0.sale.0, slot.0.round, slot.1));
    }

    fn rows(&self, node: Uuid) -> Vec<Refused> {
        let grown = self.counts.iter().filter(|((round, minute), _)| {
            self.grown.contains(&(round.sale.0, round.round, *minute))
        });
        let rows = grown.flat_map(|((round, minute), counts)| {
            let counted = Reason::ALL.iter().zip(counts).filter(|(_, (n, _))| *n > 0);
            counted.map(move |(reason, (requests, units))| Refused {
                round: *round,
                minute_ms: minute * MINUTE_MS,
                reason: *reason,
                node,
                requests: *requests,
                units: *units,
            })
        });
        rows.collect()
    }

    /// Everything is put away, and nothing before this minute grows any more.
    fn forget(&mut self, before: i64) {
        self.grown.clear();
        self.counts.retain(|(_, minute), _| *minute >= before);
    }
}
