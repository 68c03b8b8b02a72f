//! Which sales of a partition somebody watches, and what they are shown.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::{Notify, watch};

use super::{
    frame::{Frame, FrameId},
    latest::Latest,
    pace,
    page::Page,
};
use crate::{
    domain::{
        id::{RoundId, SaleId, SaleNumber},
        round::State as RoundState,
    },
    engine::Standing,
    metrics::RealtimeMetrics,
};

/// Watchers who sit in one row.
const ROW_SEATS: usize = 1_000;

/// The watched sales of one partition. One that nobody watches is not in it and costs nothing.
#[derive(Debug)]
pub(super) struct Feeds {
    metrics: RealtimeMetrics,
    state: Mutex<State>,
    joined: Notify,
}

#[derive(Debug, Default)]
struct State {
    feeds: HashMap<SaleNumber, Feed>,
    closed: bool,
}

/// A watched sale. Its watchers sit in rows, and the rows are told one after the other: to wake
/// everybody at once would keep everything else waiting, and the last of them would get what is
/// old by then.
#[derive(Debug)]
struct Feed {
    sale: SaleId,
    round: RoundId,
    /// Whether the round was seen closed.
    over: bool,
    rows: Vec<Row>,
    /// When the next row may be told something new.
    clear_at: Option<Instant>,
}

/// Watchers who are told together.
#[derive(Debug)]
struct Row {
    latest: Latest,
    page: watch::Sender<Page>,
    watchers: usize,
}

impl Row {
    fn show(&self, frame: Frame, metrics: &RealtimeMetrics) {
        metrics.frames.inc();
        self.page.send_if_modified(|page| page.show(frame));
    }
}

impl Feed {
    /// A seat: the number of its row, and what is shown there.
    fn seat(&mut self) -> (usize, watch::Receiver<Page>) {
        let free = self.rows.iter().position(|row| row.watchers < ROW_SEATS);
        let number = free.unwrap_or_else(|| {
            self.rows.push(Row {
                latest: Latest::new(self.sale),
                page: watch::Sender::default(),
                watchers: 0,
            });
            self.rows.len() - 1
        });
        let row = &mut self.rows[number];
        row.watchers += 1;
        (number, row.page.subscribe())
    }

    fn offer(
        &mut self,
        standing: &Standing,
        now: Instant,
        interval: Duration,
        metrics: &RealtimeMetrics,
    ) {
        for row in &mut self.rows {
            if let Some(frame) = row.latest.offer(standing, now, interval) {
                row.show(frame, metrics);
            }
        }
    }

    /// Whether the round is over and the last of it is shown.
    fn is_done(&self) -> bool {
        let waits = |row: &Row| row.latest.due(Duration::ZERO).is_some();
        self.over && !self.rows.iter().any(waits)
    }

    /// Shows each row whose turn it is what waits for it, those first who have waited longest.
    /// Returns when the next turn is.
    fn flush(
        &mut self,
        now: Instant,
        interval: Duration,
        metrics: &RealtimeMetrics,
    ) -> Option<Instant> {
        loop {
            let due = |row: &Row| row.latest.due(interval);
            let rows = self.rows.iter_mut().filter(|row| due(row).is_some());
            let row = rows.min_by_key(|row| due(row))?;
            let turn = due(row).max(self.clear_at);
            if turn > Some(now) {
                return turn;
            }
            // The build with seeded bugs may lose it.
            let frame = row.latest.flush(now, interval)?;
            row.show(frame, metrics);
            self.clear_at = Some(now + pace::spread(row.watchers));
        }
    }
}

/// Keeps a sale watched until it is dropped.
#[derive(Debug)]
pub(super) struct Watching {
    /// What is shown of it. Its sender goes when the node stops.
    pub(super) page: watch::Receiver<Page>,
    feeds: Arc<Feeds>,
    /// The round in which it was joined.
    round: RoundId,
    row: usize,
}

impl Watching {
    /// Whether what is shown is younger than `age_max` and not before `after`.
    pub(super) fn is_fresh(&self, now: Instant, age_max: Duration, after: Option<FrameId>) -> bool {
        let page = self.page.borrow();
        page.newest().is_some_and(|frame| {
            now.saturating_duration_since(frame.made_at) <= age_max && Some(frame.id) >= after
        })
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.feeds.leave(self.round.sale, self.row);
    }
}

impl Feeds {
    pub(super) fn new(metrics: RealtimeMetrics) -> Self {
        Self {
            metrics,
            state: Mutex::default(),
            joined: Notify::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches a sale. If nobody does yet, it is in this round. `None` when the node stops.
    pub(super) fn join(self: &Arc<Self>, sale: SaleId, round: RoundId) -> Option<Watching> {
        let mut state = self.state();
        if state.closed {
            return None;
        }
        let feed = state.feeds.entry(round.sale).or_insert_with(|| {
            self.metrics.watched_sales.inc();
            Feed {
                sale,
                round,
                over: false,
                rows: Vec::new(),
                clear_at: None,
            }
        });
        let (row, page) = feed.seat();
        drop(state);
        self.joined.notify_one();
        Some(Watching {
            page,
            feeds: Arc::clone(self),
            round,
            row,
        })
    }

    /// The round that a sale is in for those who watch it.
    pub(super) fn round_of(&self, watching: &Watching) -> RoundId {
        let state = self.state();
        // Whoever watches keeps it there until the node stops.
        let feed = state.feeds.get(&watching.round.sale);
        feed.map_or(watching.round, |feed| feed.round)
    }

    fn leave(&self, sale: SaleNumber, row: usize) {
        if let Entry::Occupied(mut feed) = self.state().feeds.entry(sale) {
            let rows = &mut feed.get_mut().rows;
            if let Some(row) = rows.get_mut(row) {
                row.watchers -= 1;
            }
            // Rows in the middle stay: others know theirs by its number.
            while rows.pop_if(|row| row.watchers == 0).is_some() {}
            if rows.is_empty() {
                feed.remove();
                self.metrics.watched_sales.dec();
            }
        }
    }

    /// Done as soon as something is watched.
    pub(super) async fn occupied(&self) {
        while self.state().feeds.is_empty() {
            self.joined.notified().await;
        }
    }

    /// Turns each sale to the round that `next` gives, once its own is over and the last of it is
    /// shown. Returns whether any turned.
    pub(super) fn turn(&self, next: impl Fn(SaleId, RoundId) -> Option<RoundId>) -> bool {
        let mut turned = false;
        for feed in self.state().feeds.values_mut() {
            if feed.is_done()
                && let Some(next) = next(feed.sale, feed.round)
            {
                feed.round = next;
                feed.over = false;
                turned = true;
            }
        }
        turned
    }

    /// The rounds to sample.
    pub(super) fn rounds(&self) -> Vec<RoundId> {
        self.state().feeds.values().map(|feed| feed.round).collect()
    }

    /// Takes what replies said, and shows what may be shown now.
    pub(super) fn offer(
        &self,
        standings: impl IntoIterator<Item = Standing>,
        now: Instant,
        interval: Duration,
    ) {
        let mut state = self.state();
        for standing in standings {
            let Some(feed) = state.feeds.get_mut(&standing.round.sale) else {
                continue;
            };
            // An old round lives on for cancels and refunds, and those to come are looked at
            // before their time.
            if standing.round != feed.round {
                continue;
            }
            feed.over |= standing.state == RoundState::Closed;
            feed.offer(&standing, now, interval, &self.metrics);
        }
        for feed in state.feeds.values_mut() {
            feed.flush(now, interval, &self.metrics);
        }
    }

    /// Shows what has waited long enough. Returns when the next one will have.
    pub(super) fn flush(&self, now: Instant, interval: Duration) -> Option<Instant> {
        let mut state = self.state();
        let feeds = state.feeds.values_mut();
        feeds
            .filter_map(|feed| feed.flush(now, interval, &self.metrics))
            .min()
    }

    /// Tells all watchers that their connection is alive.
    pub(super) fn beat(&self) {
        for feed in self.state().feeds.values() {
            for row in &feed.rows {
                row.page.send_modify(Page::beat);
            }
        }
    }

    /// Shows the last of everything, waiting or not, and ends it: nobody joins any more.
    pub(super) fn close(&self, now: Instant) {
        let mut state = self.state();
        state.closed = true;
        for row in state.feeds.values_mut().flat_map(|feed| &mut feed.rows) {
            if let Some(frame) = row.latest.flush(now, Duration::ZERO) {
                row.show(frame, &self.metrics);
            }
        }
        self.metrics
            .watched_sales
            .dec_by(state.feeds.len().try_into().unwrap_or(i64::MAX));
        state.feeds.clear();
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::realtime::{
        frame::tests::{SALE, standing},
        pace::FRAME_INTERVAL_MIN as INTERVAL,
    };

    pub(in crate::realtime) fn feeds() -> (Arc<Feeds>, RealtimeMetrics) {
        let metrics = RealtimeMetrics::default();
        (Arc::new(Feeds::new(metrics.clone())), metrics)
    }

    #[tokio::test]
    async fn a_sale_is_sampled_from_the_first_watcher_to_the_last() {
        let (feeds, metrics) = feeds();
        let round = standing(1, 1, 0).round;
        let first = feeds.join(SALE, round).unwrap();
        feeds.occupied().await;
        let second = feeds.join(SALE, round).unwrap();
        assert_eq!(
            (feeds.rounds(), metrics.watched_sales.get()),
            (vec![round], 1)
        );
        feeds.offer([standing(1, 1, 1)], Instant::now(), INTERVAL);
        assert_eq!(
            first.page.borrow().newest_id(),
            second.page.borrow().newest_id()
        );
        assert_eq!(metrics.frames.get(), 1, "one frame for both");
        drop(first);
        assert_eq!(feeds.rounds(), [round]);
        drop(second);
        let watched = metrics.watched_sales.get();
        assert_eq!((feeds.rounds(), watched), (vec![], 0));
        // Who comes later does not get what an earlier audience saw.
        let third = feeds.join(SALE, round).unwrap();
        assert!(!third.is_fresh(Instant::now(), INTERVAL, None));
    }

    #[test]
    fn news_of_other_sales_and_of_other_rounds_are_not_shown() {
        let (feeds, metrics) = feeds();
        feeds.offer([standing(1, 1, 1)], Instant::now(), INTERVAL);
        let watching = feeds.join(SALE, standing(1, 2, 0).round).unwrap();
        feeds.offer([standing(2, 1, 1)], Instant::now(), INTERVAL);
        feeds.offer([standing(1, 3, 0)], Instant::now(), INTERVAL);
        assert_eq!(metrics.frames.get(), 0);
        feeds.offer([standing(1, 2, 0)], Instant::now(), INTERVAL);
        assert!(watching.page.borrow().newest().is_some());
    }

    #[test]
    fn a_sale_turns_once_its_round_is_over_and_the_last_of_it_is_shown() {
        let (feeds, _) = feeds();
        let round = |round| standing(1, round, 0).round;
        let watching = feeds.join(SALE, round(1)).unwrap();
        let turn = || feeds.turn(|_, at| (at == round(1)).then_some(round(2)));
        let now = Instant::now();
        feeds.offer([standing(1, 1, 0)], now, INTERVAL);
        assert!(!turn(), "not over");
        let last = Standing {
            state: RoundState::Closed,
            ..standing(1, 1, 9)
        };
        feeds.offer([last], now, INTERVAL);
        assert!(!turn(), "the last of it is not shown");
        feeds.flush(now + INTERVAL, INTERVAL);
        assert_eq!(watching.page.borrow().newest_id(), Some(FrameId::of(&last)));
        assert!(turn());
        assert_eq!(feeds.rounds(), [round(2)]);
        feeds.offer([standing(1, 2, 0)], now + INTERVAL * 2, INTERVAL);
        let shown = watching.page.borrow().newest_id();
        assert_eq!(shown, Some(FrameId::of(&standing(1, 2, 0))));
    }

    #[test]
    fn freshness_is_young_and_not_before_what_the_client_has_seen() {
        let (feeds, _) = feeds();
        let watching = feeds.join(SALE, standing(1, 1, 0).round).unwrap();
        let now = Instant::now();
        assert!(!watching.is_fresh(now, INTERVAL, None));
        feeds.offer([standing(1, 1, 3)], now, INTERVAL);
        let id = |seq| Some(FrameId::of(&standing(1, 1, seq)));
        assert!(watching.is_fresh(now, INTERVAL, None));
        assert!(watching.is_fresh(now + INTERVAL, INTERVAL, id(3)));
        assert!(!watching.is_fresh(now, INTERVAL, id(4)));
        assert!(!watching.is_fresh(now + INTERVAL * 2, INTERVAL, None));
    }

    #[test]
    fn rows_are_told_one_after_the_other_and_each_gets_what_is_newest_then() {
        let (feeds, metrics) = feeds();
        let seats: Vec<_> = (0..=2 * ROW_SEATS)
            .map(|_| feeds.join(SALE, standing(1, 1, 0).round).unwrap())
            .collect();
        let start = Instant::now();
        let seq = |seq| Some(FrameId::of(&standing(1, 1, seq)));
        let shown = || [0, ROW_SEATS, 2 * ROW_SEATS].map(|n| seats[n].page.borrow().newest_id());
        feeds.offer([standing(1, 1, 0)], start, INTERVAL);
        assert_eq!(shown(), [seq(0); 3], "the first of all is for everybody");
        let now = start + INTERVAL;
        feeds.offer([standing(1, 1, 1)], now, INTERVAL);
        assert_eq!(shown(), [seq(1), seq(0), seq(0)]);
        let turn = now + pace::spread(ROW_SEATS);
        assert_eq!(feeds.flush(now, INTERVAL), Some(turn));
        feeds.offer([standing(1, 1, 2)], turn, INTERVAL);
        assert_eq!(shown(), [seq(1), seq(2), seq(0)]);
        let turn = turn + pace::spread(ROW_SEATS);
        assert_eq!(feeds.flush(turn, INTERVAL), Some(now + INTERVAL));
        assert_eq!(shown(), [seq(1), seq(2), seq(2)]);
        assert_eq!(feeds.flush(now + INTERVAL, INTERVAL), None);
        assert_eq!(shown(), [seq(2); 3], "the last value reaches every row");
        // The last row goes with its last watcher, and nobody misses a place.
        feeds.offer([standing(1, 1, 3)], now + INTERVAL, INTERVAL);
        let mut seats = seats;
        seats.truncate(ROW_SEATS);
        feeds.close(now + INTERVAL);
        assert_eq!(seats[0].page.borrow().newest_id(), seq(3));
        drop(seats);
        assert_eq!(metrics.watched_sales.get(), 0);
    }

    #[test]
    fn closing_shows_the_last_value_and_lets_nobody_in() {
        let (feeds, metrics) = feeds();
        let watching = feeds.join(SALE, standing(1, 1, 0).round).unwrap();
        let now = Instant::now();
        feeds.offer([standing(1, 1, 0), standing(1, 1, 9)], now, INTERVAL);
        feeds.close(now);
        let last = watching.page.borrow().newest_id();
        assert_eq!(last, Some(FrameId::of(&standing(1, 1, 9))));
        assert!(watching.page.has_changed().is_err(), "the sender has gone");
        assert!(feeds.join(SALE, standing(1, 1, 0).round).is_none());
        drop(watching);
        assert_eq!(metrics.watched_sales.get(), 0);
    }
}
