//! The only SQL code: one file per noun, each a handle on the shared [`Database`].

pub mod api_keys;
pub mod audit;
pub mod audit_log;
pub mod carts;
pub mod directory;
pub mod endings;
pub mod epochs;
pub mod floors;
pub mod images;
pub mod incidents;
pub mod journal;
pub mod lock;
pub mod orders;
pub mod payments;
pub mod personal;
pub mod products;
pub mod profiles;
pub mod rebuild;
pub mod receipt_keys;
pub mod refusals;
pub mod reports;
pub mod rounds;
pub mod sales;
pub mod sandbox;
pub mod schedules;
pub mod sessions;
pub mod users;

use std::{future::Future, panic, time::Duration};

use sqlx::{
    PgPool,
    migrate::{MigrateError, Migrator},
    postgres::{PgConnectOptions, PgPoolOptions},
};

use crate::domain::durability::PostgresSettings;

/// Every migration there is, in the binary.
static MIGRATIONS: Migrator = sqlx::migrate!();

/// How long anybody waits for PostgreSQL: longer than a connection and a statement may take.
const WAIT_MAX: Duration = Duration::from_secs(15);

/// How a [`Database`] is reached.
#[derive(Clone, Copy, Debug)]
pub struct DatabaseSettings {
    /// Connections of this process at most.
    pub connections_max: u32,
    /// How long a request waits for a free connection.
    pub acquire_timeout: Duration,
    /// How long PostgreSQL works on one statement.
    pub statement_timeout: Duration,
}

impl Default for DatabaseSettings {
    fn default() -> Self {
        Self {
            connections_max: 10,
            acquire_timeout: Duration::from_secs(3),
            statement_timeout: Duration::from_secs(5),
        }
    }
}

/// PostgreSQL, as everything but the writer uses it.
#[derive(Clone, Debug)]
pub struct Database {
    pool: PgPool,
}

impl Database {
    /// A database that connects when it is first used, so that starting does not depend on it.
    ///
    /// # Errors
    /// [`StoreError::Unexpected`] when `url` cannot be read.
    pub fn new(url: &str, settings: DatabaseSettings) -> Result<Self, StoreError> {
        let statement_timeout_ms = settings.statement_timeout.as_millis().to_string();
        let options = url
            .parse::<PgConnectOptions>()?
            .application_name("stockade")
            .options([
                ("statement_timeout", statement_timeout_ms.as_str()),
                // A handler that hangs inside a transaction must not hold its locks for ever.
                ("idle_in_transaction_session_timeout", "5000"),
                // PostgreSQL notices a client whose machine has gone within half a minute.
                ("tcp_keepalives_idle", "10"),
                ("tcp_keepalives_interval", "5"),
                ("tcp_keepalives_count", "4"),
            ]);
        let pool = PgPoolOptions::new()
            .max_connections(settings.connections_max)
            .acquire_timeout(settings.acquire_timeout)
            .connect_lazy_with(options);
        Ok(Self { pool })
    }

    /// Runs `work` to its end, even when the caller's future is dropped.
    ///
    /// A handler's future goes when its client leaves, and dropping a query half-way can poison
    /// the pooled connection that it ran on. So all work on the pool goes through here.
    ///
    /// # Errors
    /// What `work` refuses.
    pub(crate) async fn run<T, E, W, F>(&self, work: W) -> Result<T, E>
    where
        W: FnOnce(PgPool) -> F,
        F: Future<Output = Result<T, E>> + Send + 'static,
        T: Send + 'static,
        E: From<StoreError> + Send + 'static,
    {
        // PostgreSQL's own limits do not help when its host is gone without a word: whoever waits
        // is told, and the work is left to end when the connection does.
        let waited = tokio::time::timeout(WAIT_MAX, self.finish(work)).await;
        waited.unwrap_or_else(|_| Err(StoreError::Unavailable(sqlx::Error::PoolTimedOut).into()))
    }

    /// Runs `work` to its end, however long it takes.
    async fn finish<T, E, W, F>(&self, work: W) -> Result<T, E>
    where
        W: FnOnce(PgPool) -> F,
        F: Future<Output = Result<T, E>> + Send + 'static,
        T: Send + 'static,
        E: Send + 'static,
    {
        match tokio::spawn(audit_log::carried(work(self.pool.clone()))).await {
            Ok(result) => result,
            // Nobody aborts the task, so it panicked; the panic goes on where it is awaited.
            Err(error) => panic::resume_unwind(error.into_panic()),
        }
    }

    /// Applies the migrations that are missing. Several processes may do so at once. Whoever may
    /// not change the schema is content if none is missing.
    ///
    /// # Errors
    /// [`StoreError::Unexpected`] when the schema is not one that this binary's migrations lead
    /// to, [`StoreError::Unavailable`] when PostgreSQL is.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        let may = self.run(async |pool| {
            let may: bool =
                sqlx::query_scalar("SELECT has_schema_privilege(current_schema()::text, 'CREATE')")
                    .fetch_one(&pool)
                    .await?;
            Ok::<_, StoreError>(may)
        });
        if may.await? {
            self.apply().await
        } else if self.migrated().await? {
            Ok(())
        } else {
            let refused =
                "migrations are missing: run `stockade migrate` as the owner of the schema";
            Err(StoreError::Unexpected(sqlx::Error::Configuration(
                refused.into(),
            )))
        }
    }

    async fn apply(&self) -> Result<(), StoreError> {
        self.finish(async |pool| {
            MIGRATIONS.run(&pool).await.map_err(|error| match error {
                MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => {
                    error.into()
                }
                other => StoreError::Unexpected(sqlx::Error::Migrate(Box::new(other))),
            })
        })
        .await
    }

    /// Whether PostgreSQL answers and has every migration of this binary.
    ///
    /// # Errors
    /// [`StoreError`] when it does not answer.
    pub async fn migrated(&self) -> Result<bool, StoreError> {
        let expected = MIGRATIONS
            .iter()
            .filter(|migration| !migration.migration_type.is_down_migration())
            .count();
        self.run(async move |pool| {
            let exists: bool =
                sqlx::query_scalar("SELECT to_regclass('_sqlx_migrations') IS NOT NULL")
                    .fetch_one(&pool)
                    .await?;
            if !exists {
                return Ok(false);
            }
            let applied: i64 =
                sqlx::query_scalar("SELECT count(*) FROM _sqlx_migrations WHERE success")
                    .fetch_one(&pool)
                    .await?;
            Ok(usize::try_from(applied).is_ok_and(|applied| applied >= expected))
        })
        .await
    }

    /// The settings that decide what a commit survives.
    ///
    /// # Errors
    /// [`StoreError`] when it does not answer.
    pub async fn settings(&self) -> Result<PostgresSettings, StoreError> {
        self.run(async move |pool| {
            let (fsync, full_page_writes, synchronous_commit) = sqlx::query_as(
                "SELECT current_setting('fsync'), current_setting('full_page_writes'),
                        current_setting('synchronous_commit')",
            )
            .fetch_one(&pool)
            .await?;
            Ok(PostgresSettings {
                fsync,
                full_page_writes,
                synchronous_commit,
            })
        })
        .await
    }

    /// Closes the pool once the work under way has ended.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}

/// Why PostgreSQL did not do what was asked, when the request is not to blame.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It could not be reached, was too busy, or did not answer in time. What was asked may have
    /// happened.
    #[error("PostgreSQL is unavailable: {0}")]
    Unavailable(#[source] sqlx::Error),
    /// A mistake of ours: the statement or the data is wrong.
    #[error("PostgreSQL refused: {0}")]
    Unexpected(#[source] sqlx::Error),
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        use sqlx::Error as E;
        let passing = match &error {
            E::Io(_)
            | E::Tls(_)
            | E::PoolTimedOut
            | E::PoolClosed
            | E::WorkerCrashed
            | E::BeginFailed
            | E::Protocol(_) => true,
            // Connection, resources, operator intervention (also the statement timeout), system
            // errors, serialisation and lock failures: the same statement may succeed later.
            E::Database(error) => error.code().is_some_and(|code| {
                ["08", "53", "57", "58", "40"]
                    .iter()
                    .any(|class| code.starts_with(class))
                    || code == "55P03"
                    || code == "25006"
            }),
            _ => false,
        };
        if passing {
            Self::Unavailable(error)
        } else {
            Self::Unexpected(error)
        }
    }
}

/// A row that this build cannot read.
fn unreadable(what: String) -> StoreError {
    StoreError::Unexpected(sqlx::Error::Decode(what.into()))
}
