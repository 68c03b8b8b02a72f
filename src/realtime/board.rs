//! All open sales on one page.

use std::{
    collections::HashMap,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures::future::{Fuse, FusedFuture, FutureExt};
use tokio::{
    sync::watch,
    time::{sleep_until, timeout},
};

use super::{
    feeds::{Feeds, Watching},
    pace,
    page::Page,
};
use crate::{
    clock,
    domain::{id::SaleId, limits::CLOCK_JUMP_MS},
    metrics::RealtimeMetrics,
    store::{
        StoreError,
        sales::{SaleFacts, Sales},
    },
};

/// How soon a sale that another node made appears.
const LIST_INTERVAL: Duration = Duration::from_secs(1);

/// How often to look for the first frames: somebody waits for them.
const FILL_INTERVAL: Duration = Duration::from_millis(10);

/// Sales on the page: beyond that the oldest have to be followed one by one.
const SALES_MAX: i64 = 4_096;

/// How long a closed sale stays for those who are slow to take its last frame.
const RETIRED_FOR: Duration = Duration::from_mins(1);

/// What is shown must be younger than this for somebody to join, and how long to wait for that.
const FRESH: Duration = Duration::from_secs(1);

/// The page of all open sales. While nobody looks at it, it is empty and costs nothing.
#[derive(Debug)]
pub(super) struct Board {
    sales: Sales,
    /// Of each partition, in order.
    feeds: Arc<[Arc<Feeds>]>,
    metrics: RealtimeMetrics,
    /// Gone when the node stops.
    page: Mutex<Option<watch::Sender<Page>>>,
    /// How many look at it.
    seats: watch::Sender<usize>,
    /// When what is shown was last known to be so.
    fresh_at: watch::Sender<Option<Instant>>,
}

/// Keeps the page going until it is dropped.
#[derive(Debug)]
pub(super) struct Seat {
    /// What is shown. Its sender goes when the node stops.
    pub(super) page: watch::Receiver<Page>,
    board: Arc<Board>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.board.seats.send_modify(|seats| *seats -= 1);
    }
}

/// What the page is made from, for as long as somebody looks at it.
#[derive(Default)]
struct Sources {
    /// Each with what the last list said of it.
    open: HashMap<SaleId, (Watching, Arc<SaleFacts>)>,
    /// Sales that have closed: in which round, and when this node learnt of it.
    closed: HashMap<SaleId, (u32, Instant)>,
    listed_at: Option<Instant>,
}

impl Board {
    pub(super) fn new(sales: Sales, feeds: Arc<[Arc<Feeds>]>, metrics: RealtimeMetrics) -> Self {
        Self {
            sales,
            feeds,
            metrics,
            page: Mutex::new(Some(watch::Sender::default())),
            seats: watch::Sender::default(),
            fresh_at: watch::Sender::default(),
        }
    }

    fn page(&self) -> MutexGuard<'_, Option<watch::Sender<Page>>> {
        self.page.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the page, as soon as what it shows is fresh. `None` when that does not happen
    /// soon, or the node stops.
    pub(super) async fn join(self: &Arc<Self>) -> Option<Seat> {
        let page = self.page().as_ref()?.subscribe();
        self.seats.send_modify(|seats| *seats += 1);
        let board = Arc::clone(self);
        let seat = Seat { page, board };
        let mut fresh_at = self.fresh_at.subscribe();
        let fresh = fresh_at.wait_for(|at| at.is_some_and(|at| at.elapsed() < FRESH));
        timeout(FRESH, fresh).await.ok()?.ok()?;
        Some(seat)
    }

    /// Keeps the page up to date for ever, but only while somebody looks at it.
    pub(super) async fn run(&self) {
        let mut seats = self.seats.subscribe();
        // The sender is ours, so there is always one.
        while seats.wait_for(|seats| *seats > 0).await.is_ok() {
            self.follow().await;
        }
    }

    /// Keeps the page up to date until nobody looks at it any more.
    async fn follow(&self) {
        let mut sources = Sources::default();
        let mut listing = pin!(Fuse::terminated());
        let mut list_at = Instant::now();
        let mut gather_at = Instant::now();
        loop {
            tokio::select! {
                listed = &mut listing => sources.take(listed, &self.feeds),
                () = sleep_until(list_at.into()), if listing.is_terminated() => {
                    list_at = Instant::now() + LIST_INTERVAL;
                    listing.set(self.list().fuse());
                }
                () = sleep_until(gather_at.into()) => {
                    let seats = *self.seats.borrow();
                    if seats == 0 {
                        break;
                    }
                    let frames = self.metrics.open_streams().max(seats * sources.open.len());
                    let pause = if self.gather(&mut sources) {
                        pace::interval(0, frames)
                    } else {
                        FILL_INTERVAL
                    };
                    gather_at = Instant::now() + pause;
                }
            }
        }
        self.fresh_at.send_replace(None);
        if let Some(page) = &*self.page() {
            page.send_modify(Page::clear);
        }
    }

    /// The open sales. PostgreSQL's view of time may be ahead of Redis', which decides.
    async fn list(&self) -> Result<Vec<Arc<SaleFacts>>, StoreError> {
        let now = clock::now() - chrono::TimeDelta::milliseconds(CLOCK_JUMP_MS);
        self.sales.unclosed(now, SALES_MAX).await
    }

    /// Puts on the page what has changed since the last time. Returns whether it shows anything
    /// fresh.
    fn gather(&self, sources: &mut Sources) -> bool {
        let now = Instant::now();
        if let Some(page) = &*self.page() {
            page.send_if_modified(|page| sources.show(page, now));
        }
        let fresh_at = sources.fresh_at();
        if fresh_at.is_some() {
            self.fresh_at.send_replace(fresh_at);
        }
        fresh_at.is_some()
    }

    /// Tells everybody who looks that the connection is alive.
    pub(super) fn beat(&self) {
        if let Some(page) = &*self.page() {
            page.send_modify(Page::beat);
        }
    }

    /// Ends it: nobody joins any more.
    pub(super) fn close(&self) {
        *self.page() = None;
    }
}

impl Sources {
    /// Watches what is newly listed.
    fn take(&mut self, listed: Result<Vec<Arc<SaleFacts>>, StoreError>, feeds: &[Arc<Feeds>]) {
        let listed = match listed {
            Ok(listed) => listed,
            // What is watched goes on; new sales have to wait.
            Err(error) => {
                tracing::warn!(%error, "live stock: open sales not listed");
                return;
            }
        };
        let now = Instant::now();
        self.listed_at = Some(now);
        for sale in &listed {
            if let Some((_, facts)) = self.open.get_mut(&sale.id) {
                *facts = Arc::clone(sale);
                continue;
            }
            let over = self.closed.get(&sale.id);
            if over.is_some_and(|(round, _)| *round >= sale.round) {
                continue;
            }
            let feeds = feeds.get(usize::from(sale.partition.0));
            if let Some(watching) = feeds.and_then(|feeds| feeds.join(sale.id, sale.round_id())) {
                self.closed.remove(&sale.id);
                self.open.insert(sale.id, (watching, Arc::clone(sale)));
            }
        }
        // PostgreSQL lists a closed sale until the writer has stored its end.
        self.closed.retain(|id, (_, at)| {
            now.duration_since(*at) < RETIRED_FOR * 2 || listed.iter().any(|sale| sale.id == *id)
        });
    }

    /// Shows the latest of every open sale. Returns whether subscribers must be told.
    fn show(&mut self, page: &mut Page, now: Instant) -> bool {
        let mut changed = false;
        self.open.retain(|sale, (watching, facts)| {
            let Some(frame) = watching.page.borrow().newest().cloned() else {
                return true;
            };
            // The end of one round of many is a change like any other.
            let round = frame.look.0;
            let goes_on = facts.last().round > round || facts.last().upcoming.is_some();
            let closed = frame.is_closed() && !goes_on;
            if !closed || page.has(*sale) {
                changed |= page.show(frame);
            }
            if closed {
                page.retire(*sale);
                self.closed.insert(*sale, (round, now));
            }
            !closed
        });
        for (sale, (_, at)) in &self.closed {
            if now.duration_since(*at) >= RETIRED_FOR {
                page.remove(*sale);
            }
        }
        changed
    }

    /// When something on the page was last known to be so; with no sale open, that there is none.
    fn fresh_at(&self) -> Option<Instant> {
        if self.open.is_empty() {
            return self.listed_at;
        }
        let pages = self
            .open
            .values()
            .map(|(watching, _)| watching.page.borrow());
        pages.filter_map(|page| Some(page.newest()?.made_at)).max()
    }
}
