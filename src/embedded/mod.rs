//! The services that `serve` runs by itself when nobody gives it any: the Redis that decides, a small Redis
//! for what may be lost, and PostgreSQL, each on a loopback port of its own, all data below one directory.
//!
//! One living process owns the directory, by a lock that dies with it. It starts the services, starts one
//! again that exits, never kills one that is merely slow or stopped, and stops them in order. What a killed
//! owner left running is stopped, gracefully, before anything new is started on the same data.
//!
//! [`RedisServer`] and [`PostgresServer`] can also be started alone, unsupervised, as tests do.

mod binaries;
mod endpoints;
mod lock;
mod orphans;
mod ports;
mod postgres;
mod process;
mod redis;
mod secrets;
mod server;
mod supervisor;
mod user;

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;

use secrecy::SecretString;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub use endpoints::running;
pub use postgres::{PostgresOptions, PostgresServer};
pub use redis::{RedisOptions, RedisRole, RedisServer};

use crate::config::Endpoints;
use lock::Lock;
use supervisor::Supervised;
use user::User;

/// Memory of the cache Redis; what does not fit is evicted.
const CACHE_MEMORY_MIB: u32 = 64;
/// Connections that PostgreSQL takes besides the pool: writer, migrations, an operator's psql.
const CONNECTIONS_BESIDES_POOL: u32 = 30;
/// Where clusters go whose data directory the unprivileged user cannot reach.
const REACHABLE_HOME: &str = "/var/lib/stockade";

/// What [`Services::start`] needs to know.
#[derive(Clone, Debug)]
pub struct EmbeddedConfig {
    /// Directory of all data; created if absent.
    pub data_dir: PathBuf,
    /// Connections to PostgreSQL that the application will open at most.
    pub database_pool: u32,
}

/// Why the services could not be started; each is one line that says what to do where something can be done.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    /// Another process serves this directory.
    #[error("{} is in use by another `stockade serve`{}: stop that one, or set STOCKADE_DATA_DIR", .data_dir.display(), .pid.as_ref().map(|pid| format!(" (pid {pid})")).unwrap_or_default())]
    Locked {
        /// The directory.
        data_dir: PathBuf,
        /// The process that holds the lock, if it said so.
        pid: Option<String>,
    },
    /// No server has run on this directory.
    #[error("no server runs on {}: start one with `stockade serve`, or set REDIS_URL and DATABASE_URL", .data_dir.display())]
    NotServed {
        /// The directory.
        data_dir: PathBuf,
    },
    /// A program is not installed.
    #[error(
        "{program} was not found: install it (Debian: `apt-get install {package}`), or set REDIS_URL and DATABASE_URL"
    )]
    Missing {
        /// What was looked for.
        program: String,
        /// Debian's package that has it.
        package: String,
    },
    /// A file or process operation failed.
    #[error("cannot {doing} {}: {source}", .path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// PostgreSQL refuses to run as root and its user cannot get to its files.
    #[error("user {user} cannot reach {}, and PostgreSQL does not run as root: choose a directory whose parents that user may enter", .path.display())]
    Unreachable {
        /// The unprivileged user.
        user: String,
        /// The directory.
        path: PathBuf,
    },
    /// A new cluster could not be made.
    #[error("{program} failed: {said}")]
    Initialise {
        /// The program that made it.
        program: &'static str,
        /// Its last words.
        said: String,
    },
    /// A service ended instead of getting ready.
    #[error("{service} ended at once ({status}): {said} (log: {})", .log.display())]
    Exited {
        /// Which one.
        service: &'static str,
        /// How it ended.
        status: ExitStatus,
        /// The last lines of its log.
        said: String,
        /// Its log.
        log: PathBuf,
    },
    /// A service runs but did not get ready in time.
    #[error("{service} was not ready after {seconds} s: {said} (log: {})", .log.display())]
    NotReady {
        /// Which one.
        service: &'static str,
        /// How long it was waited for.
        seconds: u64,
        /// The last lines of its log.
        said: String,
        /// Its log.
        log: PathBuf,
    },
    /// What a killed server left running does not end, even when killed.
    #[error("{name} (pid {pid}) still runs on this data directory and cannot be stopped")]
    Orphan {
        /// The program.
        name: String,
        /// Its process id.
        pid: i32,
    },
}

/// Names a failed operation on a path.
fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> EmbeddedError {
    let path = path.to_owned();
    move |source| EmbeddedError::Io {
        doing,
        path,
        source,
    }
}

/// The running services of one data directory.
#[derive(Debug)]
pub struct Services {
    endpoints: Endpoints,
    journal: Supervised,
    cache: Supervised,
    postgres: Supervised,
}

impl Services {
    /// Takes the directory, stops what a killed owner left running in it, and starts the services.
    ///
    /// Returns when all three answer. Dropping the future, or the services, asks them to stop.
    pub async fn start(config: &EmbeddedConfig) -> Result<Self, EmbeddedError> {
        let user = user::unprivileged()?;
        let data_dir = data_dir(&config.data_dir, user.as_ref())?;
        let lock = Arc::new(Lock::take(&data_dir)?);
        let logs = directory(&data_dir.join("log"), 0o700)?;
        let journal_dir = directory(&data_dir.join("redis"), 0o700)?;
        let cache_dir = directory(&data_dir.join("cache"), 0o700)?;
        let postgres_home = postgres_home(&data_dir, user.as_ref()).await?;
        let cluster = postgres_home.join("cluster");

        orphans::stop(&[journal_dir.clone(), cache_dir.clone(), postgres_home]).await?;
        postgres::forget_dead_postmaster(&cluster)?;

        let ports = endpoints::last_ports(&data_dir);
        let redis_password = secrets::kept(&data_dir, "redis_password")?;
        let postgres_password = secrets::kept(&data_dir, "postgres_password")?;
        let journal = RedisServer::start(RedisOptions {
            port: ports.redis,
            log: Some(logs.join("redis.log")),
            password: redis_password.clone(),
            ..RedisOptions::new(journal_dir, RedisRole::Journal)
        });
        let cache = RedisServer::start(RedisOptions {
            port: ports.cache_redis,
            log: Some(logs.join("cache.log")),
            password: redis_password,
            ..RedisOptions::new(
                cache_dir,
                RedisRole::Cache {
                    memory_mib: CACHE_MEMORY_MIB,
                },
            )
        });
        let connections = (config.database_pool + CONNECTIONS_BESIDES_POOL).to_string();
        let postgres = PostgresServer::start(PostgresOptions {
            port: ports.database,
            log: Some(logs.join("postgres.log")),
            password: postgres_password,
            settings: vec![("max_connections".to_owned(), connections)],
            ..PostgresOptions::new(cluster)
        });
        let (journal, cache, postgres) = tokio::try_join!(journal, cache, postgres)?;
        let endpoints = Endpoints {
            redis_url: journal.url().clone(),
            cache_redis_url: Some(cache.url().clone()),
            database_url: postgres.url().clone(),
        };
        endpoints::write(&data_dir, &endpoints)?;
        Ok(Self {
            endpoints,
            journal: Supervised::start(journal.into_server(), Arc::clone(&lock)),
            cache: Supervised::start(cache.into_server(), Arc::clone(&lock)),
            postgres: Supervised::start(postgres.into_server(), lock),
        })
    }

    /// Where the services are; the same for as long as they are supervised.
    pub fn endpoints(&self) -> &Endpoints {
        &self.endpoints
    }

    /// The process id of the Redis that decides; `None` while it is down.
    pub fn journal_pid(&self) -> watch::Receiver<Option<u32>> {
        self.journal.pid()
    }

    /// The process id of the cache Redis; `None` while it is down.
    pub fn cache_pid(&self) -> watch::Receiver<Option<u32>> {
        self.cache.pid()
    }

    /// The process id of PostgreSQL; `None` while it is down.
    pub fn postgres_pid(&self) -> watch::Receiver<Option<u32>> {
        self.postgres.pid()
    }

    /// Stops the services in order: the journal, whose last entries PostgreSQL may not have yet, is already
    /// on disk; then the cache; then PostgreSQL, by its fast shutdown. Call it when the application is done.
    ///
    /// When `now` is cancelled it stops waiting; the services then end by themselves.
    pub async fn shutdown(self, now: CancellationToken) {
        let in_order = async {
            self.journal.stop().await;
            self.cache.stop().await;
            self.postgres.stop().await;
        };
        tokio::select! {
            () = in_order => {}
            () = now.cancelled() => tracing::warn!("not waiting for the embedded services to end"),
        }
    }
}

/// The key that signs access tokens when the operator gave none: made once, kept in the data directory.
pub fn jwt_secret(data_dir: &Path) -> Result<SecretString, EmbeddedError> {
    secrets::kept(data_dir, "jwt_secret")
}

/// Creates the data directory if it is absent and gives its real path. Only its owner may look into it; if
/// PostgreSQL runs as another user, that one may pass through, and every file in it is closed by itself.
fn data_dir(path: &Path, user: Option<&User>) -> Result<PathBuf, EmbeddedError> {
    let mode = if user.is_some() { 0o711 } else { 0o700 };
    directory(path, mode)?;
    fs::canonicalize(path).map_err(io_error("open", path))
}

/// Creates a directory, and those above it, unless it exists.
fn directory(path: &Path, mode: u32) -> Result<PathBuf, EmbeddedError> {
    if !path.is_dir() {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(io_error("create the directory", parent))?;
        }
        fs::DirBuilder::new()
            .mode(mode)
            .create(path)
            .map_err(io_error("create the directory", path))?;
    }
    Ok(path.to_owned())
}

/// The directory that holds the cluster: `postgres` in the data directory. Below a home that is closed to
/// others (root's own always is) PostgreSQL's user cannot get there; then it is a link to a place that it can.
async fn postgres_home(data_dir: &Path, user: Option<&User>) -> Result<PathBuf, EmbeddedError> {
    let path = data_dir.join("postgres");
    if !path.exists() {
        match user {
            Some(user) if !user.can_enter(data_dir).await? => {
                let home = Path::new(REACHABLE_HOME).join(secrets::random_name());
                let home = directory(&home, 0o711)?;
                symlink(&home, &path).map_err(io_error("create the link", &path))?;
                tracing::warn!(
                    user = user.name,
                    data_dir = %data_dir.display(),
                    home = %home.display(),
                    "PostgreSQL's user cannot enter the data directory; PostgreSQL's files are kept at home"
                );
            }
            Some(_) => drop(directory(&path, 0o711)?),
            None => drop(directory(&path, 0o700)?),
        }
    }
    fs::canonicalize(&path).map_err(io_error("open", &path))
}
