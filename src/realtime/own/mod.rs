//! Personal streams: what happens to a buyer's own orders and places in line, while it looks.
//!
//! While somebody looks, a node reads the journals once for everybody (`tail`), at a pace that does
//! not depend on what is sold, and puts what concerns a buyer who looks on that buyer's desk
//! (`desk`). What was there before comes from PostgreSQL and the end of the journal, which together
//! leave no gap (`fill`, `recent`). A stream is only a place on its buyer's desk.

mod desk;
mod fill;
pub(super) mod news;
mod recent;
mod tail;

use std::{
    collections::{BTreeSet, HashMap, hash_map::Entry},
    ops::RangeInclusive,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures::future::join_all;
use rand::Rng;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, watch},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::{
    desk::{Cursor, Desk, Said},
    news::Ending,
    recent::Recent,
};
use super::{Events, HEARTBEAT_INTERVAL, Hub, WatchError, events::View, frame::Piece};
use crate::{
    domain::id::{BuyerId, OrderId},
    engine::{Engine, Engines},
    metrics::RealtimeMetrics,
    store::{directory::Directory, orders::Orders},
};

/// How long a stream lasts, in seconds: no longer than an access token may, so that whoever looks has
/// shown lately that it may. Each gets its own, so that a crowd does not come back together.
const LIFE_SECONDS: RangeInclusive<u64> = 480..=600;

/// How often to look for streams that have lasted long enough.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// How long a stream waits for its snapshot before it says what it knows.
const PATIENCE: Duration = Duration::from_secs(1);

/// Who looks, and by what right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The user.
    pub user: Uuid,
    /// The session that the right came from, if it came from one.
    pub session: Option<Uuid>,
}

/// How much there may be of it on one node.
#[derive(Clone, Copy, Debug)]
pub struct OwnLimits {
    /// Streams in all.
    pub streams: usize,
    /// Streams of one user.
    pub per_user: usize,
}

/// Personal streams on one node. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Desks(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    engines: Engines,
    directory: Directory,
    orders: Orders,
    hub: Hub,
    seats: Arc<Semaphore>,
    per_user: usize,
    metrics: RealtimeMetrics,
    state: Mutex<State>,
    /// Somebody looks.
    joined: Notify,
    /// Somebody waits for a snapshot.
    wanted: Notify,
    /// Changes with each read of a journal.
    read: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct State {
    closed: bool,
    /// Counts streams.
    number: u64,
    desks: HashMap<BuyerId, Open>,
    /// Whose an order is that is on a desk.
    owners: HashMap<OrderId, BuyerId>,
    /// Buyers whose desks are to be filled, and since when.
    wanted: HashMap<BuyerId, Instant>,
    /// Of each partition, in order.
    parts: Vec<Part>,
}

/// A desk that somebody looks at.
#[derive(Debug, Default)]
struct Open {
    desk: watch::Sender<Desk>,
    streams: HashMap<u64, (Holder, Instant)>,
}

/// What is known of a partition.
#[derive(Debug, Default)]
struct Part {
    /// The end of its journal; `None` while it is not read.
    recent: Option<Recent>,
    /// When it was last asked for more of the journal, and had no more than that.
    read_at: Option<Instant>,
    /// Held orders by the instant at which their time is nearly over.
    holds: BTreeSet<(i64, OrderId)>,
}

impl Desks {
    /// Personal streams of what `engines` sell. They share the seats of `hub`. Nothing moves until
    /// [`Desks::run`].
    pub fn new(
        engines: Engines,
        directory: Directory,
        orders: Orders,
        hub: Hub,
        limits: OwnLimits,
    ) -> Self {
        let parts = engines.all().iter().map(|_| Part::default()).collect();
        Self(Arc::new(Inner {
            engines,
            directory,
            orders,
            seats: Arc::new(Semaphore::new(limits.streams.min(Semaphore::MAX_PERMITS))),
            per_user: limits.per_user,
            metrics: hub.metrics.clone(),
            hub,
            state: Mutex::new(State {
                parts,
                ..State::default()
            }),
            joined: Notify::new(),
            wanted: Notify::new(),
            read: watch::Sender::default(),
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps all desks up to date, until `stop`; then ends all streams.
    pub async fn run(&self, stop: CancellationToken) {
        let tails = self.0.engines.all().iter().map(|engine| self.tail(engine));
        tokio::select! {
            () = stop.cancelled() => {}
            _ = join_all(tails) => {}
            () = self.fill() => {}
            () = self.beat() => {}
            () = self.retire() => {}
        }
        let mut state = self.state();
        state.closed = true;
        state.desks.clear();
    }

    async fn beat(&self) {
        let mut heartbeats = tokio::time::interval(HEARTBEAT_INTERVAL);
        loop {
            heartbeats.tick().await;
            for open in self.state().desks.values() {
                open.desk.send_modify(Desk::beat);
            }
        }
    }

    /// Ends streams that have lasted long enough.
    async fn retire(&self) {
        let mut look = tokio::time::interval(LOOK_INTERVAL);
        loop {
            look.tick().await;
            let now = Instant::now();
            self.end_those(Ending::Expired, |_, until| until <= now);
        }
    }

    /// Ends the streams of those who may not look any more.
    pub fn log_out(&self, is_out: impl Fn(&Holder) -> bool) {
        self.end_those(Ending::LoggedOut, |holder, _| is_out(holder));
    }

    fn end_those(&self, why: Ending, over: impl Fn(&Holder, Instant) -> bool) {
        for open in self.state().desks.values() {
            let streams = open.streams.iter();
            let ended: Vec<_> = streams
                .filter(|(_, (holder, until))| over(holder, *until))
                .map(|(number, _)| *number)
                .collect();
            if !ended.is_empty() {
                open.desk.send_modify(|desk| {
                    for number in ended {
                        desk.end(number, why);
                    }
                });
            }
        }
    }

    /// The events of a buyer's own orders and places in line.
    ///
    /// # Errors
    /// [`WatchError::Full`], [`WatchError::TooMany`], [`WatchError::Stopping`].
    pub fn watch(&self, holder: Holder) -> Result<Events, WatchError> {
        let seat = self.0.hub.seat()?;
        let own = Arc::clone(&self.0.seats).try_acquire_owned();
        let own = own.map_err(|_| WatchError::Full)?;
        let buyer = BuyerId(holder.user);
        let life = Duration::from_secs(rand::rng().random_range(LIFE_SECONDS));
        let mut state = self.state();
        if state.closed {
            return Err(WatchError::Stopping);
        }
        state.number += 1;
        let number = state.number;
        let State { desks, wanted, .. } = &mut *state;
        let open = desks.entry(buyer).or_default();
        if open.streams.len() >= self.0.per_user {
            return Err(WatchError::TooMany);
        }
        let now = Instant::now();
        if !open.desk.borrow().is_filled() {
            wanted.entry(buyer).or_insert(now);
        }
        open.streams.insert(number, (holder, now + life));
        let desk = open.desk.subscribe();
        drop(state);
        self.0.joined.notify_waiters();
        self.0.wanted.notify_one();
        self.0.metrics.own_subscribers.inc();
        let cursor = desk.borrow().start();
        let look = Look {
            desk,
            cursor,
            buyer,
            number,
            joined: Some(now),
            desks: self.clone(),
            _seat: own,
        };
        Ok(Events::new(
            View::Own(Box::new(look)),
            seat,
            &self.0.metrics,
        ))
    }

    /// Redis' clock now, as far as this node can tell.
    fn now_ms(&self) -> Option<i64> {
        let engines = self.0.engines.all().iter();
        engines.filter_map(Engine::redis_ms).max()
    }

    /// Done as soon as somebody looks.
    async fn occupied(&self) {
        loop {
            let joined = self.0.joined.notified();
            if !self.state().desks.is_empty() {
                return;
            }
            joined.await;
        }
    }

    /// Done as soon as everything is read that there was at `instant`.
    async fn caught_up(&self, instant: Instant) {
        let mut read = self.0.read.subscribe();
        // The sender is ours, so there is always one.
        let _ = read.wait_for(|()| self.state().has_read(instant)).await;
    }

    fn leave(&self, buyer: BuyerId, number: u64) {
        let mut state = self.state();
        let State { desks, owners, .. } = &mut *state;
        if let Entry::Occupied(mut open) = desks.entry(buyer) {
            open.get_mut().streams.remove(&number);
            if open.get().streams.is_empty() {
                for order in open.get().desk.borrow().orders() {
                    owners.remove(&order.id);
                }
                open.remove();
            } else {
                open.get().desk.send_modify(|desk| desk.forget(number));
            }
        }
    }
}

impl State {
    /// Whether everything is read that there was at `instant`.
    fn has_read(&self, instant: Instant) -> bool {
        let mut parts = self.parts.iter();
        parts.all(|part| part.recent.is_some() && part.read_at >= Some(instant))
    }
}

/// One stream's place at its buyer's desk.
#[derive(Debug)]
pub(super) struct Look {
    /// Its sender goes when the node stops.
    desk: watch::Receiver<Desk>,
    cursor: Cursor,
    buyer: BuyerId,
    number: u64,
    /// When it began, until something was said.
    joined: Option<Instant>,
    desks: Desks,
    _seat: OwnedSemaphorePermit,
}

impl Look {
    /// The next piece, and whether it is the last.
    pub(super) async fn next(&mut self) -> (Piece, bool) {
        if let Some(joined) = self.joined {
            // What is at the desk may be a moment older, and a snapshot should come first.
            let number = self.number;
            let ready = async {
                self.desks.caught_up(joined).await;
                let shown = |desk: &Desk| desk.is_filled() || desk.has_ended(number);
                let _ = self.desk.wait_for(shown).await;
            };
            let _ = timeout(PATIENCE, ready).await;
            self.joined = None;
        }
        loop {
            let now_ms = self.desks.now_ms();
            let said = self
                .desk
                .borrow_and_update()
                .next(&mut self.cursor, self.number, now_ms);
            match said {
                Said::Piece(piece) => return (piece, false),
                Said::End(piece) => return (piece, true),
                Said::Nothing => {}
            }
            if self.desk.changed().await.is_err() {
                return (news::end(Ending::Restart), true);
            }
        }
    }
}

impl Drop for Look {
    fn drop(&mut self) {
        self.desks.0.metrics.own_subscribers.dec();
        self.desks.leave(self.buyer, self.number);
    }
}
