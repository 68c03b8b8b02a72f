//! Live stock: what a crowd sees of a sale, at a cost that does not grow with what is sold.
//!
//! Each node samples the rounds that somebody watches and listens to what its own calls bring
//! (`sampler`). At most one frame per sale and interval (`latest`, `pace`) is encoded once
//! (`frame`) and put on a page that all its subscribers share (`page`, `feeds`, `board`); each of
//! them is only a place on that page (`events`).
//!
//! What is only one buyer's is in `own`.

mod board;
mod events;
mod feeds;
mod frame;
mod latest;
mod own;
mod pace;
mod page;
mod sampler;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures::future::join_all;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use self::{board::Board, events::View, feeds::Feeds};
pub use self::{
    events::Events,
    frame::{FrameId, Piece, Stock},
    own::{Desks, Holder, OwnLimits, news::OwnNews},
};
use crate::{
    domain::id::SaleId,
    engine::{EngineError, Engines},
    metrics::RealtimeMetrics,
    store::{StoreError, directory::Directory, sales::Sales},
};

/// How often a silent stream shows that it is alive: proxies cut connections after a minute.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(15);

/// A snapshot for somebody who connects is this old at most.
const SNAPSHOT_AGE_MAX: Duration = Duration::from_millis(100);

/// Why there is nothing to see.
#[derive(Clone, Debug, thiserror::Error)]
pub enum WatchError {
    /// There is no such sale.
    #[error("there is no sale with this id")]
    NotFound,
    /// The sale's round could not be read.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The sale could not be looked up.
    #[error(transparent)]
    Store(#[from] Arc<StoreError>),
    /// The stores do not say in time where anything is.
    #[error("nothing fresh to show")]
    Stale,
    /// As many look already as this node can serve.
    #[error("no seat left")]
    Full,
    /// The user has as many personal streams as anybody may.
    #[error("too many streams of one user")]
    TooMany,
    /// The node stops.
    #[error("shutting down")]
    Stopping,
}

/// Live stock on one node.
#[derive(Clone, Debug)]
pub struct Hub {
    engines: Engines,
    directory: Directory,
    /// Of each partition, in order.
    feeds: Arc<[Arc<Feeds>]>,
    board: Arc<Board>,
    seats: Arc<Semaphore>,
    metrics: RealtimeMetrics,
}

impl Hub {
    /// Live stock of what `engines` sell, for so many at once. Nothing moves until [`Hub::run`].
    pub fn new(
        engines: Engines,
        directory: Directory,
        sales: Sales,
        seats: usize,
        metrics: RealtimeMetrics,
    ) -> Self {
        let feeds: Arc<[_]> = engines
            .all()
            .iter()
            .map(|_| Arc::new(Feeds::new(metrics.clone())))
            .collect();
        let board = Board::new(sales, Arc::clone(&feeds), metrics.clone());
        Self {
            engines,
            directory,
            feeds,
            board: Arc::new(board),
            seats: Arc::new(Semaphore::new(seats.min(Semaphore::MAX_PERMITS))),
            metrics,
        }
    }

    /// Keeps everything that is watched up to date, until `stop`; then shows the last of it and
    /// ends all streams, whatever they are doing.
    pub async fn run(&self, stop: CancellationToken) {
        let closing = Closing(self);
        let partitions = self.engines.all().iter().zip(&*self.feeds);
        let samplers = partitions
            .map(|(engine, feeds)| sampler::run(engine, feeds, &self.directory, &self.metrics));
        tokio::select! {
            () = stop.cancelled() => {}
            _ = join_all(samplers) => {}
            () = self.board.run() => {}
            () = self.beat() => {}
        }
        drop(closing);
    }

    async fn beat(&self) {
        let mut heartbeats = tokio::time::interval(HEARTBEAT_INTERVAL);
        loop {
            heartbeats.tick().await;
            self.board.beat();
            for feeds in &*self.feeds {
                feeds.beat();
            }
        }
    }

    /// The events of one sale. `last_seen` is what the client saw before it lost its connection:
    /// the snapshot is not older than that.
    ///
    /// # Errors
    /// [`WatchError`].
    pub async fn sale(&self, id: SaleId, last_seen: Option<FrameId>) -> Result<Events, WatchError> {
        let sale = self.directory.by_id(id).await?;
        let sale = sale
            .filter(|sale| sale.provisioned)
            .ok_or(WatchError::NotFound)?;
        let index = usize::from(sale.partition.0);
        let feeds = self.feeds.get(index).ok_or(WatchError::Stale)?;
        let engine = self.engines.of(sale.partition).ok_or(WatchError::Stale)?;
        let sale = match engine.redis_ms() {
            Some(now_ms) => sale.at(now_ms),
            None => sale,
        };
        let seat = self.seat()?;
        let watching = feeds.join(sale.id, sale.round_id());
        let mut watching = watching.ok_or(WatchError::Stopping)?;
        if !watching.is_fresh(Instant::now(), SNAPSHOT_AGE_MAX, last_seen) {
            // The round that those who watch are still in.
            let standing = engine.snapshot(feeds.round_of(&watching)).await?;
            let id = FrameId::of(&standing);
            let interval = pace::interval(0, self.metrics.open_streams());
            feeds.offer([standing], Instant::now(), interval);
            // It has to wait for its turn, like every frame.
            let shown = watching.page.wait_for(|page| page.newest_id() >= Some(id));
            shown.await.map_err(|_| WatchError::Stopping)?;
        }
        Ok(Events::new(View::Sale(watching), seat, &self.metrics))
    }

    /// The events of all sales that are not closed, those to come included.
    ///
    /// # Errors
    /// [`WatchError`].
    pub async fn all(&self) -> Result<Events, WatchError> {
        let seat = self.seat()?;
        let view = self.board.join().await.ok_or(WatchError::Stale)?;
        Ok(Events::new(View::All(view), seat, &self.metrics))
    }

    fn seat(&self) -> Result<OwnedSemaphorePermit, WatchError> {
        let seat = Arc::clone(&self.seats).try_acquire_owned();
        seat.map_err(|_| WatchError::Full)
    }
}

/// Ends all streams when dropped, so that none outlives what keeps it up to date.
struct Closing<'a>(&'a Hub);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        let now = Instant::now();
        for feeds in &*self.0.feeds {
            feeds.close(now);
        }
        self.0.board.close();
    }
}
