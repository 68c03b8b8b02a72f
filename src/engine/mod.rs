//! The only Redis code: keys, scripts, replies, the coalescer and the journal.
//!
//! One operation is one script is one method of [`Engine`]. Nothing outside this folder names the
//! Redis client or a key.

mod allocate;
mod archive;
mod audit;
#[cfg(feature = "bench")]
pub mod bench;
mod cache;
mod call;
mod coalescer;
mod condemn;
mod connection;
mod control;
mod dump;
mod epoch;
mod error;
mod journal;
mod keys;
mod leaderboard;
mod line;
mod memory;
mod order;
mod packed;
mod partition;
mod provision;
mod purchase;
mod queue;
mod rebuild;
mod records;
mod release;
mod reply;
mod script;
mod settle;
mod snapshot;
mod sweep;
mod trim;
mod unstored;

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::Instant,
};

use tokio::sync::{broadcast, watch};

pub use self::{
    audit::{Remains, RoundAudit, RoundKeys},
    cache::{Cache, Spent},
    connection::RedisUrl,
    epoch::{Inspection, InstallError},
    error::EngineError,
    journal::{EntryError, JournalError, JournalPage, JournalReader, RawEntry, read_payload},
    leaderboard::LeaderboardPage,
    packed::Standing,
    partition::Fence,
    purchase::Answer,
    rebuild::SaleImage,
    records::Kept,
};
use self::{
    coalescer::Coalescer, connection::Connection, keys::Keys, memory::Memory,
    partition::PartitionView, purchase::PurchaseLane, script::Scripts, snapshot::SnapshotLane,
    unstored::Unstored,
};
use crate::{
    domain::{
        durability::{Lack, RedisSettings, Said},
        id::{JournalId, Partition, RoundId},
        order::{Acceptance, Durability, Mode},
    },
    faults,
    metrics::EngineMetrics,
};

/// Calls of purchases under way at a time. More would make each carry less.
const PURCHASE_CALLS_MAX: usize = 4;

/// Calls under way at a time that wait for replicas: Redis takes nothing else from a connection that
/// waits, so a second call would only wait behind the first.
const REPLICATED_CALLS_MAX: usize = 1;

/// Calls of snapshots under way at a time.
const SNAPSHOT_CALLS_MAX: usize = 2;

/// News that a slow listener may be behind before it misses some.
const NEWS_CAPACITY: usize = 1024;

/// How an engine is set up.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Where Redis is.
    pub url: RedisUrl,
    /// Purchases that may wait for a call.
    pub queue_capacity: usize,
    /// The key that signs the receipts of what it accepts; 0 for none.
    pub receipt_key: u8,
    /// What the operator says about Redis.
    pub said: Said,
}

/// What sells the rounds of one partition.
#[derive(Debug)]
pub struct Engine {
    partition: Partition,
    url: RedisUrl,
    shared: Arc<Shared>,
    purchases: Arc<Coalescer<PurchaseLane>>,
    /// Purchases that wait for replicas; `None` when there are none to wait for.
    replicated: Option<Arc<Coalescer<PurchaseLane>>>,
    snapshots: Arc<Coalescer<SnapshotLane>>,
    /// Operators' calls and cancels never wait behind the crowd.
    operations: Arc<Connection>,
    reads: Arc<Connection>,
}

/// What all operations of an engine share.
#[derive(Debug)]
struct Shared {
    keys: Keys,
    scripts: Scripts,
    view: PartitionView,
    memory: Memory,
    unstored: Unstored,
    metrics: EngineMetrics,
    news: broadcast::Sender<Standing>,
    /// Rounds whose keys are missing or not whole, as the last call saw them.
    damaged: Mutex<BTreeSet<RoundId>>,
    worth: RwLock<Worth>,
    said: Said,
}

/// What Redis said of its settings when it was last asked, and what that is worth.
#[derive(Debug)]
struct Worth {
    settings: RedisSettings,
    /// For each of [`Mode::ALL`]: judged when the settings are read, not at each purchase.
    modes: [Result<Durability, Lack>; 3],
}

impl Worth {
    fn of(settings: RedisSettings, said: Said) -> Self {
        let modes = Mode::ALL.map(|mode| settings.gives(mode, said));
        Self { settings, modes }
    }
}

impl Shared {
    /// Remembers what a reply said about a round, and tells whoever watches.
    fn learn(&self, standing: &Standing, at: Instant) {
        self.memory.learn(standing, at);
        // Nobody listens: nobody needs to know.
        let _ = self.news.send(*standing);
    }

    /// Takes over what Redis says of its settings, and says aloud what has changed.
    fn judge(&self, settings: RedisSettings) {
        let mut worth = self.worth.write().unwrap_or_else(PoisonError::into_inner);
        if worth.settings == settings {
            return;
        }
        let now = Worth::of(settings.after(Some(&worth.settings)), self.said);
        let partition = self.keys.0;
        for (mode, (before, now)) in Mode::ALL.iter().zip(worth.modes.iter().zip(&now.modes)) {
            let mode = mode.as_str();
            match (before, now) {
                (before, now) if before == now => {}
                (_, Ok(durability)) => {
                    let durability = durability.as_str();
                    tracing::info!(%partition, mode, durability, "Redis gives this durability");
                }
                (_, Err(lack)) => {
                    tracing::error!(%partition, mode, %lack, "sales with this durability stop");
                }
            }
        }
        *worth = now;
    }

    fn damaged(&self) -> MutexGuard<'_, BTreeSet<RoundId>> {
        self.damaged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says aloud when a round becomes damaged and when it is whole again, not at each purchase.
    fn note_damage(&self, round: RoundId, is_damaged: bool) {
        let mut damaged = self.damaged();
        if is_damaged && damaged.insert(round) {
            tracing::error!(%round, "round damaged: nothing of it is sold until it is rebuilt");
        } else if !is_damaged && damaged.remove(&round) {
            tracing::info!(%round, "round whole again");
        }
    }
}

impl Engine {
    /// Connects. The partition stays fenced until [`Engine::install`] or [`Engine::adopt`].
    ///
    /// # Errors
    /// [`EngineError`] when Redis is not there.
    pub async fn connect(
        options: &EngineOptions,
        partition: Partition,
        metrics: EngineMetrics,
    ) -> Result<Self, EngineError> {
        let url = options.url.clone();
        let crowd = Connection::open_for_calls(&url).await?;
        let operations = Connection::open_for_calls(&url).await?;
        let reads = Connection::open_for_calls(&url).await?;
        let settings = operations.settings().await?;
        let (news, _) = broadcast::channel(NEWS_CAPACITY);
        let shared = Arc::new(Shared {
            keys: Keys(partition),
            scripts: Scripts::new(),
            view: PartitionView::new(partition),
            memory: Memory::default(),
            unstored: Unstored::default(),
            metrics,
            news,
            damaged: Mutex::default(),
            worth: RwLock::new(Worth::of(settings, options.said)),
            said: options.said,
        });
        let purchases = PurchaseLane {
            shared: Arc::clone(&shared),
            connection: crowd,
            receipt_key: options.receipt_key,
            replicas: 0,
        };
        let replicated = match options.said.replicas {
            0 => None,
            replicas => {
                let lane = PurchaseLane {
                    shared: Arc::clone(&shared),
                    connection: Connection::open_for_replicated_calls(&url).await?,
                    receipt_key: options.receipt_key,
                    replicas,
                };
                let capacity = options.queue_capacity;
                Some(Coalescer::new(lane, capacity, REPLICATED_CALLS_MAX))
            }
        };
        let snapshots = SnapshotLane {
            shared: Arc::clone(&shared),
            connection: Arc::clone(&reads),
        };
        Ok(Self {
            partition,
            url,
            shared,
            purchases: Coalescer::new(purchases, options.queue_capacity, PURCHASE_CALLS_MAX),
            replicated,
            snapshots: Coalescer::new(snapshots, options.queue_capacity, SNAPSHOT_CALLS_MAX),
            operations,
            reads,
        })
    }

    /// Which partition this is.
    pub fn partition(&self) -> Partition {
        self.partition
    }

    /// What Redis said of its settings when it was last asked.
    pub fn settings(&self) -> RedisSettings {
        let worth = self.shared.worth.read();
        worth
            .unwrap_or_else(PoisonError::into_inner)
            .settings
            .clone()
    }

    /// Asks Redis for its settings: another server may have taken its place, or an operator may
    /// have changed them.
    ///
    /// # Errors
    /// [`EngineError`] when it does not say; then what it said before still counts.
    pub async fn read_settings(&self) -> Result<(), EngineError> {
        self.shared.judge(self.operations.settings().await?);
        Ok(())
    }

    /// What an acceptance survives in a sale that asks for `mode`, as far as Redis is concerned.
    ///
    /// # Errors
    /// [`Lack`]: nothing of such a sale may be sold.
    pub fn gives(&self, mode: Mode) -> Result<Durability, Lack> {
        let worth = self.shared.worth.read();
        let worth = worth.unwrap_or_else(PoisonError::into_inner);
        let [default, replicated, committed] = &worth.modes;
        let given = match mode {
            Mode::Default => default,
            Mode::Replicated => replicated,
            Mode::Committed => committed,
        };
        match given {
            Err(_) if faults::bug("lack_ignored") => Ok(Durability::Fsync),
            given => given.clone(),
        }
    }

    /// The state of the fence, and its changes.
    pub fn fence(&self) -> watch::Receiver<Fence> {
        self.shared.view.fence()
    }

    /// Stops selling until recovery has looked once more.
    pub fn fence_again(&self, reason: &str) {
        self.shared.view.close(reason);
    }

    /// Returns once the partition may sell.
    pub async fn verified(&self) {
        let mut fence = self.fence();
        // It ends only with the engine, which we hold.
        let _ = fence
            .wait_for(|fence| matches!(fence, Fence::Open(_)))
            .await;
    }

    /// The last timeline that this node sold in, and the highest pseq that any reply has shown it
    /// there.
    pub fn floor(&self) -> JournalId {
        self.shared.view.floor()
    }

    /// Acceptances that this node has got from Redis and that are not settled yet.
    pub fn unstored(&self) -> Vec<Acceptance> {
        self.shared.unstored.all()
    }

    /// Forgets the acceptances of the entries that `settled` names: they are stored, or reported as
    /// lost. PostgreSQL has the journal up to `stored`.
    pub fn forget_unstored(&self, stored: JournalId, settled: impl Fn(JournalId) -> bool) {
        self.shared.unstored.forget(stored, settled);
    }

    /// Whether keys of a round were missing or not whole when a call last saw them.
    pub fn is_damaged(&self) -> bool {
        !self.shared.damaged().is_empty()
    }

    /// Every round has been made whole.
    pub fn forget_damage(&self) {
        self.shared.damaged().clear();
    }

    /// Purchases that wait for a call.
    pub fn waiting(&self) -> usize {
        let replicated = self.replicated.as_ref().map_or(0, |lane| lane.waiting());
        self.purchases.waiting() + replicated
    }

    /// Every standing that a reply carries from now on. A listener that falls behind misses some,
    /// and must take a [`Engine::snapshot`].
    pub fn news(&self) -> broadcast::Receiver<Standing> {
        self.shared.news.subscribe()
    }

    /// Redis' clock now as far as this node can tell, milliseconds since the Unix epoch.
    pub fn redis_ms(&self) -> Option<i64> {
        self.shared.view.redis_ms(Instant::now())
    }
}

/// The engines of all partitions.
#[derive(Clone, Debug)]
pub struct Engines(Arc<Vec<Engine>>);

impl Engines {
    /// Puts engines together, in order of their partitions from 0 on.
    pub fn new(engines: Vec<Engine>) -> Self {
        Self(Arc::new(engines))
    }

    /// The engine of a partition; `None` when this node does not serve it.
    pub fn of(&self, partition: Partition) -> Option<&Engine> {
        self.0.get(usize::from(partition.0))
    }

    /// Returns once every partition may sell.
    pub async fn verified(&self) {
        for engine in self.all() {
            engine.verified().await;
        }
    }

    /// All engines.
    pub fn all(&self) -> &[Engine] {
        &self.0
    }
}
