//! What the tests share: real services and a whole application, each test its own.

pub(crate) mod app;
pub(crate) mod history;
pub(crate) mod link;
pub(crate) mod market;
pub(crate) mod process;
pub(crate) mod proxy;
pub(crate) mod shim;
pub(crate) mod wire;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use secrecy::{ExposeSecret, SecretString};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use stockade::{
    clock,
    domain::{
        durability::Said,
        id::{Epoch, Fingerprint, OperationId, OrderId, Partition, RoundId},
        model::{Allocated, Operation, Release, Released},
        order::Durability,
    },
    embedded::{PostgresOptions, PostgresServer, RedisOptions, RedisRole, RedisServer},
    engine::{Engine, EngineError, EngineOptions, RedisUrl},
    metrics::EngineMetrics,
    store::{Database, DatabaseSettings},
};
use tempfile::TempDir;
use tokio::sync::{Mutex, OnceCell};
use uuid::Uuid;

/// A number from the environment.
pub(crate) fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// What a test's random choices come from; another one each time unless `STOCKADE_TEST_SEED` says.
pub(crate) fn seed() -> u64 {
    variable("STOCKADE_TEST_SEED").unwrap_or_else(|| clock::new_id().as_u64_pair().1)
}

/// A Redis of one's own, as durable as in production.
pub(crate) struct Redis {
    pub(crate) server: RedisServer,
    /// Where an application finds it.
    pub(crate) address: SecretString,
    dir: TempDir,
}

impl Redis {
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| ()).await
    }

    /// Starts one with options of its own.
    pub(crate) async fn start_with(change: impl FnOnce(&mut RedisOptions)) -> Self {
        Self::start_in(TempDir::new().unwrap(), change).await
    }

    /// One for what may be lost.
    pub(crate) async fn start_cache() -> Self {
        Self::start_with(|options| {
            options.role = RedisRole::Cache { memory_mib: 16 };
            options.settings.clear();
        })
        .await
    }

    /// Another server with what this one has by now, as a replica that is promoted.
    pub(crate) async fn copy(&self) -> Self {
        let dir = TempDir::new().unwrap();
        let (from, to) = (self.dir(), dir.path().join("redis"));
        fs::create_dir_all(to.join("appendonlydir")).unwrap();
        // Every write is in the file before it is answered.
        for file in fs::read_dir(from.join("appendonlydir")).unwrap() {
            let file = file.unwrap();
            let copy = to.join("appendonlydir").join(file.file_name());
            fs::copy(file.path(), copy).unwrap();
        }
        Self::start_in(dir, |_| ()).await
    }

    async fn start_in(dir: TempDir, change: impl FnOnce(&mut RedisOptions)) -> Self {
        let mut options = RedisOptions::new(dir.path().join("redis"), RedisRole::Journal);
        options.throwaway = true;
        options
            .settings
            .push(("appendfsync".to_owned(), "always".to_owned()));
        change(&mut options);
        let server = RedisServer::start(options).await.unwrap();
        Self {
            address: server.url().clone(),
            server,
            dir,
        }
    }

    /// Where it keeps its data.
    pub(crate) fn dir(&self) -> PathBuf {
        self.dir.path().join("redis")
    }

    pub(crate) fn url(&self) -> RedisUrl {
        RedisUrl(self.address.clone())
    }
}

/// The key of receipts that an engine of the tests notes in its orders.
pub(crate) const RECEIPT_KEY: u8 = 7;

/// An engine on a fresh partition, in its first epoch.
pub(crate) async fn engine(redis: &Redis, partition: Partition) -> Engine {
    let engine = connect(redis, partition).await;
    let inspection = engine.inspect().await.unwrap();
    let begun = engine.install(Epoch(1), &inspection).await.unwrap();
    engine.open(begun, &inspection);
    engine
}

/// An engine that nobody has let in yet.
pub(crate) async fn connect(redis: &Redis, partition: Partition) -> Engine {
    let options = EngineOptions {
        url: redis.url(),
        queue_capacity: 16_384,
        said: Said::default(),
        receipt_key: RECEIPT_KEY,
    };
    Engine::connect(&options, partition, EngineMetrics::default())
        .await
        .unwrap()
}

/// A directory that PostgreSQL may enter: it runs as another user when we are root.
pub(crate) fn open_dir() -> TempDir {
    let open = fs::Permissions::from_mode(0o711);
    tempfile::Builder::new()
        .permissions(open)
        .tempdir()
        .unwrap()
}

/// A PostgreSQL with a migrated database.
pub(crate) struct Postgres {
    pub(crate) server: PostgresServer,
    dir: TempDir,
}

impl Postgres {
    pub(crate) async fn start(settings: &[(&str, &str)]) -> Self {
        let dir = open_dir();
        let options = PostgresOptions {
            throwaway: true,
            settings: settings
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect(),
            ..PostgresOptions::new(dir.path().join("postgres"))
        };
        let server = PostgresServer::start(options).await.unwrap();
        let url = server.url().expose_secret();
        let database = Database::new(url, DatabaseSettings::default()).unwrap();
        database.migrate().await.unwrap();
        database.close().await;
        Self { server, dir }
    }
}

/// The PostgreSQL of this test binary, whose database is there to be copied.
struct Cluster {
    postgres: Postgres,
    /// Only one copy at a time: the original must have no connections.
    copying: Mutex<()>,
    _sweeper: Child,
}

/// Removes a directory when this process is gone, however it ended: what is static is never
/// dropped, and the databases of one run take more than a gigabyte.
fn sweep_after_us(dir: &Path) -> Child {
    // Its input ends with us. Whatever still writes there ends at the same moment.
    let script = "trap '' HUP INT TERM; cat; for _ in 1 2 3 4 5; do
        rm -rf -- \"$0\" && break; sleep 1; done";
    Command::new("sh")
        .args(["-c", script])
        .arg(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

static CLUSTER: OnceCell<Cluster> = OnceCell::const_new();

/// A migrated database of one's own, in a cluster that the tests of this binary share.
pub(crate) async fn database() -> SecretString {
    let cluster = CLUSTER
        .get_or_init(|| async {
            let postgres = Postgres::start(&[("max_connections", "400")]).await;
            Cluster {
                _sweeper: sweep_after_us(postgres.dir.path()),
                postgres,
                copying: Mutex::default(),
            }
        })
        .await;
    let url = cluster.postgres.server.url().expose_secret();
    let (base, original) = url.rsplit_once('/').unwrap();
    let name = format!("test_{}", clock::new_id().simple());
    let copying = cluster.copying.lock().await;
    let mut sql = PgConnection::connect(&format!("{base}/postgres"))
        .await
        .unwrap();
    let copy = format!("CREATE DATABASE {name} TEMPLATE {original}");
    sqlx::query(AssertSqlSafe(copy))
        .execute(&mut sql)
        .await
        .unwrap();
    drop(copying);
    format!("{base}/{name}").into()
}

/// Gives an order back, all of it.
pub(crate) async fn cancel(
    engine: &Engine,
    round: RoundId,
    order: OrderId,
    actor: Uuid,
) -> Result<Released, EngineError> {
    let release = Release::Cancel;
    let durability = Some(Durability::Fsync);
    let released = engine.release(round, order, release, None, None, durability, actor);
    released.await.map(|(released, _)| released)
}

/// Adds units to a round.
pub(crate) async fn restock(
    engine: &Engine,
    round: RoundId,
    units: u64,
    operation: OperationId,
    fingerprint: Fingerprint,
    actor: Uuid,
) -> Result<Allocated, EngineError> {
    let operation = Operation {
        id: operation,
        fingerprint,
    };
    let durability = Some(Durability::Fsync);
    let allocated = engine.allocate(round, false, units, operation, durability, actor);
    allocated.await.map(|(allocated, _)| allocated)
}
