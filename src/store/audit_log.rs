//! The audit log in PostgreSQL: who acts, what was done, and the chain that it stands in.

use std::{future::Future, net::IpAddr, sync::Arc, sync::OnceLock};

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;
use sqlx::{PgPool, Postgres, Transaction};
use uuid::Uuid;

use super::{Database, StoreError, unreadable};
use crate::domain::audit_log::{Chained, Hash, Link};

/// Who does something.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Actor {
    /// The user, if it is one.
    #[serde(rename = "actor")]
    pub user: Option<Uuid>,
    /// What the user acts as.
    pub role: &'static str,
    /// The session or the API key.
    pub credential: Option<Uuid>,
}

/// What something is done to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// A noun of the API.
    pub kind: String,
    /// Its id.
    pub id: String,
}

/// Where changes come from: a request, or a command.
///
/// It is with the task that works for it, as the request's span would be, because what a request
/// changes is written down by triggers in the transaction that changes it: each of them learns it
/// from [`begin`], and nothing in between has to know.
#[derive(Debug, Default)]
pub struct Origin {
    /// The request's id.
    pub request_id: Option<String>,
    /// The client's address.
    pub client: Option<IpAddr>,
    actor: OnceLock<Actor>,
    target: OnceLock<Target>,
}

tokio::task_local! {
    static ORIGIN: Arc<Origin>;
}

impl Origin {
    /// A request of nobody known so far.
    pub fn request(id: &str, client: Option<IpAddr>) -> Self {
        Self {
            request_id: Some(id.to_owned()),
            client,
            ..Self::default()
        }
    }

    /// Somebody who may run `stockade` beside the server.
    pub fn command() -> Self {
        let origin = Self::default();
        let _ = origin.actor.set(Actor {
            user: None,
            role: "command",
            credential: None,
        });
        origin
    }

    /// Who acts, once it is known.
    pub fn actor(&self) -> Option<&Actor> {
        self.actor.get()
    }

    /// What is acted on, if somebody said so.
    pub fn target(&self) -> Option<&Target> {
        self.target.get()
    }

    /// Runs `work` for it.
    pub fn scope<F: Future>(self: Arc<Self>, work: F) -> impl Future<Output = F::Output> {
        ORIGIN.scope(self, work)
    }

    fn current() -> Option<Arc<Self>> {
        ORIGIN.try_with(Arc::clone).ok()
    }

    /// Says who acts in the task at hand. The first one stays.
    pub fn acts(actor: impl FnOnce() -> Actor) {
        let _ = ORIGIN.try_with(|origin| {
            let _ = origin.actor.get_or_init(actor);
        });
    }

    /// Says what is acted on in the task at hand.
    pub fn concerns(target: impl FnOnce() -> Option<Target>) {
        let _ = ORIGIN.try_with(|origin| target().map(|target| origin.target.set(target)));
    }
}

/// `work` that is about to run in a task of its own, for whoever this task works for.
pub fn carried<F: Future>(work: F) -> impl Future<Output = F::Output> {
    let origin = Origin::current();
    async move {
        match origin {
            Some(origin) => origin.scope(work).await,
            None => work.await,
        }
    }
}

#[derive(Serialize)]
struct Settings<'a> {
    #[serde(flatten)]
    actor: Option<&'a Actor>,
    client: Option<IpAddr>,
    request_id: Option<&'a str>,
}

/// Begins a transaction whose changes the audit log ascribes to whoever the task works for.
///
/// # Errors
/// [`StoreError`].
pub(super) async fn begin(pool: &PgPool) -> Result<Transaction<'static, Postgres>, StoreError> {
    let mut transaction = pool.begin().await?;
    if let Some(origin) = Origin::current() {
        let settings = serde_json::to_string(&Settings {
            actor: origin.actor(),
            client: origin.client,
            request_id: origin.request_id.as_deref(),
        });
        sqlx::query("SELECT set_config('stockade.origin', $1, true)")
            .bind(settings.map_err(|error| unreadable(error.to_string()))?)
            .execute(&mut *transaction)
            .await?;
    }
    Ok(transaction)
}

/// What somebody asked for, and what came of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Entry {
    /// When.
    pub at: DateTime<Utc>,
    /// The operation of the OpenAPI document.
    pub action: Arc<str>,
    /// Who, if it is known.
    pub actor: Option<Actor>,
    /// From where; a prefix where nobody is known.
    pub client: Option<String>,
    /// The request, or the first of them.
    pub request_id: Option<String>,
    /// What it was about.
    pub target: Option<Target>,
    /// `done`, the code of a problem, or `abandoned`.
    pub outcome: &'static str,
    /// How often.
    pub times: u64,
}

/// A row as people read it.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Its id: larger is later.
    pub id: i64,
    /// Its place in the chain; `None` until it has one.
    pub number: Option<i64>,
    /// When.
    pub at: DateTime<Utc>,
    /// What was asked for or changed.
    pub action: String,
    /// Who.
    pub actor: Option<Uuid>,
    /// As what.
    pub role: Option<String>,
    /// The session or the API key.
    pub credential: Option<Uuid>,
    /// From where.
    pub client: Option<String>,
    /// In which request.
    pub request_id: Option<String>,
    /// What kind of thing.
    pub target_kind: Option<String>,
    /// Which one.
    pub target: Option<String>,
    /// What came of it.
    pub outcome: String,
    /// How often.
    pub times: i64,
    /// What was there.
    pub before: Option<Value>,
    /// What is there now.
    pub after: Option<Value>,
}

/// Which rows to list; what is `None` does not matter.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// This action.
    pub action: Option<String>,
    /// Of this user.
    pub actor: Option<Uuid>,
    /// About this id, or something of it.
    pub target: Option<String>,
    /// Of this request.
    pub request_id: Option<String>,
    /// With this outcome.
    pub outcome: Option<String>,
    /// From this instant on.
    pub since: Option<DateTime<Utc>>,
    /// Before this instant.
    pub until: Option<DateTime<Utc>>,
    /// Only older ones than this id.
    pub before: Option<i64>,
    /// So many at most.
    pub limit: i64,
}

/// Rows that have no place in the chain yet.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unchained {
    /// How many.
    pub rows: i64,
    /// When the oldest of them was written.
    pub since: Option<DateTime<Utc>>,
}

/// A statement that gives rows with what their hash is made of: `…` + the columns + `…`. The text is
/// made here, not by a function in PostgreSQL: whoever can change rows could change that, too.
macro_rules! with_content {
    ($before:tt, $after:tt $(, $argument:expr)*) => {
        sqlx::query_as!(
            ContentRow,
            $before + r#" id, number, previous, hash,
                jsonb_build_array(id, (extract(epoch FROM at) * 1000)::bigint, action, actor, role,
                    credential, client, request_id, target_kind, target, outcome, times, before,
                    after)::text AS "content!" FROM audit_log "# + $after
            $(, $argument)*
        )
    };
}

struct ContentRow {
    id: i64,
    number: Option<i64>,
    previous: Option<Vec<u8>>,
    hash: Option<Vec<u8>>,
    content: String,
}

impl TryFrom<ContentRow> for Chained {
    type Error = StoreError;

    fn try_from(row: ContentRow) -> Result<Self, StoreError> {
        let number = row.number.unwrap_or_default();
        Ok(Self {
            id: row.id,
            link: link(number, &row.hash.unwrap_or_default())?,
            previous: read_hash(&row.previous.unwrap_or_default())?,
            content: row.content,
        })
    }
}

/// The table `audit_log`.
#[derive(Clone, Debug)]
pub struct AuditLog {
    database: Database,
}

impl AuditLog {
    /// The audit log in `database`.
    pub fn new(database: Database) -> Self {
        Self { database }
    }

    /// Adds what was asked for.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn add(&self, entries: Vec<Entry>) -> Result<(), StoreError> {
        self.database
            .run(async move |pool| {
                let at: Vec<_> = entries.iter().map(|entry| entry.at).collect();
                let actions: Vec<_> = entries.iter().map(|e| e.action.to_string()).collect();
                let user = |entry: &Entry| entry.actor.as_ref()?.user;
                let role = |entry: &Entry| entry.actor.as_ref().map(|actor| actor.role.to_owned());
                let credential = |entry: &Entry| entry.actor.as_ref()?.credential;
                let kind = |entry: &Entry| entry.target.as_ref().map(|target| target.kind.clone());
                let target = |entry: &Entry| entry.target.as_ref().map(|target| target.id.clone());
                let outcomes: Vec<_> = entries.iter().map(|e| e.outcome.to_owned()).collect();
                let times: Vec<_> = entries.iter().map(|e| e.times.cast_signed()).collect();
                sqlx::query!(
                    "INSERT INTO audit_log (at, action, actor, role, credential, client, request_id,
                                            target_kind, target, outcome, times)
                     SELECT * FROM unnest($1::timestamptz[], $2::text[], $3::uuid[], $4::text[],
                         $5::uuid[], $6::text[], $7::text[], $8::text[], $9::text[], $10::text[],
                         $11::bigint[])",
                    &at,
                    &actions,
                    &entries.iter().map(user).collect::<Vec<_>>() as &[Option<Uuid>],
                    &entries.iter().map(role).collect::<Vec<_>>() as &[Option<String>],
                    &entries.iter().map(credential).collect::<Vec<_>>() as &[Option<Uuid>],
                    &entries.iter().map(|e| e.client.clone()).collect::<Vec<_>>()
                        as &[Option<String>],
                    &entries.iter().map(|e| e.request_id.clone()).collect::<Vec<_>>()
                        as &[Option<String>],
                    &entries.iter().map(kind).collect::<Vec<_>>() as &[Option<String>],
                    &entries.iter().map(target).collect::<Vec<_>>() as &[Option<String>],
                    &outcomes,
                    &times,
                )
                .execute(&pool)
                .await?;
                Ok(())
            })
            .await
    }

    /// Gives up to `limit` rows their places in the chain, and says how many. Several processes may
    /// do so at once: they take turns.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn chain(&self, limit: i64) -> Result<usize, StoreError> {
        self.database
            .run(async move |pool| {
                let waiting =
                    with_content!("SELECT", "WHERE number IS NULL ORDER BY id LIMIT $1", 1_i64);
                if waiting.fetch_optional(&pool).await?.is_none() {
                    return Ok(0);
                }
                let mut transaction = pool.begin().await?;
                let head = sqlx::query!("SELECT number, hash FROM audit_log_head FOR UPDATE")
                    .fetch_one(&mut *transaction)
                    .await?;
                let mut at = link(head.number, &head.hash)?;
                // What another process has chained meanwhile is seen now that the lock is held.
                let rows =
                    with_content!("SELECT", "WHERE number IS NULL ORDER BY id LIMIT $1", limit)
                        .fetch_all(&mut *transaction)
                        .await?;
                let (mut ids, mut numbers) = (Vec::new(), Vec::new());
                let (mut previous, mut hashes) = (Vec::new(), Vec::new());
                for row in rows {
                    previous.push(at.hash.to_vec());
                    at = at.next(&row.content);
                    ids.push(row.id);
                    numbers.push(at.number.cast_signed());
                    hashes.push(at.hash.to_vec());
                }
                sqlx::query!(
                    "UPDATE audit_log SET number = new.number, previous = new.previous,
                                          hash = new.hash
                     FROM unnest($1::bigint[], $2::bigint[], $3::bytea[], $4::bytea[])
                          AS new (id, number, previous, hash)
                     WHERE audit_log.id = new.id",
                    &ids,
                    &numbers,
                    &previous,
                    &hashes
                )
                .execute(&mut *transaction)
                .await?;
                sqlx::query!(
                    "UPDATE audit_log_head SET number = $1, hash = $2",
                    at.number.cast_signed(),
                    &at.hash[..]
                )
                .execute(&mut *transaction)
                .await?;
                transaction.commit().await?;
                Ok(ids.len())
            })
            .await
    }

    /// The end of the chain.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn head(&self) -> Result<Link, StoreError> {
        self.database
            .run(async move |pool| {
                let head = sqlx::query!("SELECT number, hash FROM audit_log_head")
                    .fetch_one(&pool)
                    .await?;
                link(head.number, &head.hash)
            })
            .await
    }

    /// Up to `limit` rows of the chain behind place `after`, in its order.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn chained(&self, after: u64, limit: i64) -> Result<Vec<Chained>, StoreError> {
        self.database
            .run(async move |pool| {
                let rows = with_content!(
                    "SELECT",
                    "WHERE number > $1 ORDER BY number LIMIT $2",
                    after.cast_signed(),
                    limit
                )
                .fetch_all(&pool)
                .await?;
                rows.into_iter().map(Chained::try_from).collect()
            })
            .await
    }

    /// The first row that stands behind the end of the chain, as of one instant: nobody has put it
    /// there who holds the lock.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn beyond(&self) -> Result<Option<Chained>, StoreError> {
        self.database
            .run(async move |pool| {
                with_content!(
                    "SELECT",
                    "WHERE number > (SELECT number FROM audit_log_head) ORDER BY number LIMIT 1"
                )
                .fetch_optional(&pool)
                .await?
                .map(Chained::try_from)
                .transpose()
            })
            .await
    }

    /// What waits for its place.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn unchained(&self) -> Result<Unchained, StoreError> {
        self.database
            .run(async move |pool| {
                Ok(sqlx::query_as!(
                    Unchained,
                    r#"SELECT count(*) AS "rows!", min(at) AS since FROM audit_log
                       WHERE number IS NULL"#
                )
                .fetch_one(&pool)
                .await?)
            })
            .await
    }

    /// The rows that a filter lets through, the latest first.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn list(&self, filter: Filter) -> Result<Vec<Row>, StoreError> {
        self.database
            .run(async move |pool| {
                Ok(sqlx::query_as!(
                    Row,
                    "SELECT id, number, at, action, actor, role, credential, client, request_id,
                            target_kind, target, outcome, times, before, after
                     FROM audit_log
                     WHERE ($1::text IS NULL OR action = $1)
                       AND ($2::uuid IS NULL OR actor = $2)
                       AND ($3::text IS NULL OR target = $3 OR starts_with(target, $3 || '/'))
                       AND ($4::text IS NULL OR request_id = $4)
                       AND ($5::text IS NULL OR outcome = $5)
                       AND ($6::timestamptz IS NULL OR at >= $6)
                       AND ($7::timestamptz IS NULL OR at < $7)
                       AND ($8::bigint IS NULL OR id < $8)
                     ORDER BY id DESC LIMIT $9",
                    filter.action,
                    filter.actor,
                    filter.target,
                    filter.request_id,
                    filter.outcome,
                    filter.since,
                    filter.until,
                    filter.before,
                    filter.limit
                )
                .fetch_all(&pool)
                .await?)
            })
            .await
    }
}

fn link(number: i64, hash: &[u8]) -> Result<Link, StoreError> {
    Ok(Link {
        number: number.cast_unsigned(),
        hash: read_hash(hash)?,
    })
}

fn read_hash(bytes: &[u8]) -> Result<Hash, StoreError> {
    bytes
        .try_into()
        .map_err(|_| unreadable("a hash of the audit log".to_owned()))
}
