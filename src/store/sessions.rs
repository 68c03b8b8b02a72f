//! Sessions: one per login, each a family of refresh tokens of which the newest is live.

use chrono::{DateTime, Duration, Utc};
use sqlx::PgConnection;
use uuid::Uuid;

use super::{Database, StoreError};

/// SHA-256 of a refresh token: all that is kept of it.
pub type TokenHash = [u8; 32];

/// How long a session lasts.
#[derive(Clone, Copy, Debug)]
pub struct SessionLimits {
    /// Without a use.
    pub idle: Duration,
    /// For so long after its use a token that comes again is a retry, not a theft.
    pub retry: Duration,
}

/// A session that begins.
#[derive(Clone, Debug)]
pub struct NewSession {
    /// Its id.
    pub id: Uuid,
    /// Whose it is.
    pub user: Uuid,
    /// When the user had chosen the password that was compared.
    pub password_changed_at: Option<DateTime<Utc>>,
    /// Its first token.
    pub token: TokenHash,
    /// What the client calls itself, 1 to 200 characters.
    pub user_agent: Option<String>,
    /// When it begins.
    pub now: DateTime<Utc>,
    /// When it ends, whatever its use.
    pub expires_at: DateTime<Utc>,
}

/// A session that lasts, as its user sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// Its id.
    pub id: Uuid,
    /// The login.
    pub created_at: DateTime<Utc>,
    /// The login, or the last refresh.
    pub last_used_at: DateTime<Utc>,
    /// The end, whatever its use.
    pub expires_at: DateTime<Utc>,
    /// What the client called itself.
    pub user_agent: Option<String>,
}

/// What nodes must not believe although its signature is good.
#[derive(Clone, Debug, Default)]
pub struct Ended {
    /// Up to here they have been told, by PostgreSQL's clock.
    pub as_of: DateTime<Utc>,
    /// Sessions that ended early.
    pub sessions: Vec<Uuid>,
    /// All users who are disabled, the latest first.
    pub disabled: Vec<Uuid>,
}

/// How many disabled users nodes hear of. Further ones have no session and no key either; only a
/// token that somebody else signed for them is still believed.
const DISABLED_MAX: i64 = 10_000;

/// Whose session it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The session.
    pub session: Uuid,
    /// Its user.
    pub user: Uuid,
    /// The role that the user has now.
    pub role: String,
    /// When the user registered.
    pub registered_at: DateTime<Utc>,
}

/// What became of a refresh token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rotation {
    /// Its successor is the live token now; it already was, if this is a retry.
    Rotated(Holder),
    /// It had been used before: its session, named here, is revoked.
    Reused(Uuid),
    /// Unknown, or its session has ended.
    Refused,
}

/// The tables `sessions` and `refresh_tokens`.
#[derive(Clone, Debug)]
pub struct Sessions {
    database: Database,
}

impl Sessions {
    /// The sessions in `database`.
    pub fn new(database: Database) -> Self {
        Self { database }
    }

    /// Begins a session. `false` when the user has been disabled, or has another password, since the
    /// password was compared.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn begin(&self, new: NewSession) -> Result<bool, StoreError> {
        self.database
            .run(async move |pool| {
                // One statement, so one transaction; what has long ended goes with it. The user's
                // row is locked against a change that would end a session it does not see yet.
                let done = sqlx::query!(
                    "WITH ended AS (
                         DELETE FROM sessions WHERE user_id = $2 AND expires_at < $3
                     ), holder AS (
                         SELECT id FROM users
                         WHERE id = $2 AND disabled_at IS NULL
                           AND password_changed_at IS NOT DISTINCT FROM $6
                         FOR SHARE
                     ), session AS (
                         INSERT INTO sessions
                             (id, user_id, created_at, last_used_at, expires_at, user_agent)
                         SELECT $1, id, $3, $3, $4, $7 FROM holder RETURNING id
                     )
                     INSERT INTO refresh_tokens (hash, session_id) SELECT $5, id FROM session",
                    new.id,
                    new.user,
                    new.now,
                    new.expires_at,
                    &new.token[..],
                    new.password_changed_at,
                    new.user_agent,
                )
                .execute(&pool)
                .await?;
                Ok(done.rows_affected() == 1)
            })
            .await
    }

    /// Exchanges the token `used` for `successor`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn rotate(
        &self,
        used: TokenHash,
        successor: TokenHash,
        now: DateTime<Utc>,
        limits: SessionLimits,
    ) -> Result<Rotation, StoreError> {
        self.database
            .run(async move |pool| {
                let mut transaction = pool.begin().await?;
                // The session's row is the lock: of many exchanges at once one is first, and the
                // others see what it did.
                let session = sqlx::query!(
                    "SELECT s.id, s.user_id, s.last_used_at, s.expires_at, s.revoked_at, u.role,
                            u.created_at AS registered_at
                     FROM sessions s JOIN users u ON u.id = s.user_id
                     WHERE s.id = (SELECT session_id FROM refresh_tokens WHERE hash = $1)
                     FOR UPDATE OF s",
                    &used[..],
                )
                .fetch_optional(&mut *transaction)
                .await?;
                let Some(session) = session else {
                    return Ok(Rotation::Refused);
                };
                if session.revoked_at.is_some()
                    || session.expires_at <= now
                    || session.last_used_at + limits.idle <= now
                {
                    return Ok(Rotation::Refused);
                }
                let rotated_at = sqlx::query_scalar!(
                    "SELECT rotated_at FROM refresh_tokens WHERE hash = $1",
                    &used[..],
                )
                .fetch_one(&mut *transaction)
                .await?;

                let fresh = rotated_at.is_none();
                let retry = match rotated_at {
                    // The client that lost the answer may ask again, while nobody has gone on.
                    Some(at) if now <= at + limits.retry => {
                        sqlx::query_scalar!(
                            r#"SELECT EXISTS (
                               SELECT 1 FROM refresh_tokens WHERE hash = $1 AND rotated_at IS NULL
                           ) AS "live!""#,
                            &successor[..],
                        )
                        .fetch_one(&mut *transaction)
                        .await?
                    }
                    _ => false,
                };
                if !fresh && !retry {
                    sqlx::query!(
                        "UPDATE sessions SET revoked_at = $2 WHERE id = $1",
                        session.id,
                        now
                    )
                    .execute(&mut *transaction)
                    .await?;
                    transaction.commit().await?;
                    return Ok(Rotation::Reused(session.id));
                }
                if fresh {
                    sqlx::query!(
                        "UPDATE refresh_tokens SET rotated_at = $2 WHERE hash = $1",
                        &used[..],
                        now
                    )
                    .execute(&mut *transaction)
                    .await?;
                    sqlx::query!(
                        "INSERT INTO refresh_tokens (hash, session_id) VALUES ($1, $2)",
                        &successor[..],
                        session.id
                    )
                    .execute(&mut *transaction)
                    .await?;
                    sqlx::query!(
                        "UPDATE sessions SET last_used_at = $2 WHERE id = $1",
                        session.id,
                        now
                    )
                    .execute(&mut *transaction)
                    .await?;
                    transaction.commit().await?;
                }
                Ok(Rotation::Rotated(Holder {
                    session: session.id,
                    user: session.user_id,
                    role: session.role,
                    registered_at: session.registered_at,
                }))
            })
            .await
    }

    /// Ends the session that `token` belongs to; gives it, if there was one.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn revoke(
        &self,
        token: TokenHash,
        now: DateTime<Utc>,
    ) -> Result<Option<Uuid>, StoreError> {
        self.database
            .run(async move |pool| {
                Ok(sqlx::query_scalar!(
                    "UPDATE sessions SET revoked_at = $2
                     WHERE id = (SELECT session_id FROM refresh_tokens WHERE hash = $1)
                       AND revoked_at IS NULL
                     RETURNING id",
                    &token[..],
                    now
                )
                .fetch_optional(&pool)
                .await?)
            })
            .await
    }

    /// The sessions of `user` that last, newest first, behind `after`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn of_user(
        &self,
        user: Uuid,
        limits: SessionLimits,
        now: DateTime<Utc>,
        after: Option<Uuid>,
        rows: i64,
    ) -> Result<Vec<Session>, StoreError> {
        self.database
            .run(async move |pool| {
                Ok(sqlx::query_as!(
                    Session,
                    "SELECT id, created_at, last_used_at, expires_at, user_agent FROM sessions
                     WHERE user_id = $1 AND revoked_at IS NULL
                       AND expires_at > $2 AND last_used_at > $3
                       AND ($4::uuid IS NULL OR id < $4)
                     ORDER BY id DESC LIMIT $5",
                    user,
                    now,
                    now - limits.idle,
                    after,
                    rows,
                )
                .fetch_all(&pool)
                .await?)
            })
            .await
    }

    /// Ends one session of `user`; `false` when it is not the user's, or has ended.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn end(
        &self,
        user: Uuid,
        session: Uuid,
        limits: SessionLimits,
        now: DateTime<Utc>,
    ) -> Result<bool, StoreError> {
        self.database
            .run(async move |pool| {
                let done = sqlx::query!(
                    "UPDATE sessions SET revoked_at = $3
                     WHERE id = $1 AND user_id = $2 AND revoked_at IS NULL
                       AND expires_at > $3 AND last_used_at > $4",
                    session,
                    user,
                    now,
                    now - limits.idle,
                )
                .execute(&pool)
                .await?;
                Ok(done.rows_affected() == 1)
            })
            .await
    }

    /// Ends all sessions of `user`, and gives them.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn end_all(&self, user: Uuid, now: DateTime<Utc>) -> Result<Vec<Uuid>, StoreError> {
        self.database
            .run(async move |pool| Ok(end_all(&mut *pool.acquire().await?, user, None, now).await?))
            .await
    }

    /// What has ended since a moment by PostgreSQL's clock, as [`Ended::as_of`] says it; without
    /// one, everything that could still be believed.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn ended_since(&self, since: Option<DateTime<Utc>>) -> Result<Ended, StoreError> {
        self.database
            .run(async move |pool| {
                // Whoever is late, by a transaction that took its time, is within the first
                // minute; whatever no token can speak for any more goes.
                let as_of = sqlx::query_scalar!(
                    r#"WITH gone AS (
                           DELETE FROM ended_sessions WHERE ended_at < now() - interval '1 hour'
                       )
                       SELECT now() AS "now!""#
                )
                .fetch_one(&pool)
                .await?;
                let sessions = sqlx::query_scalar!(
                    "SELECT session FROM ended_sessions
                     WHERE $1::timestamptz IS NULL OR ended_at > $1 - interval '1 minute'",
                    since
                )
                .fetch_all(&pool)
                .await?;
                let disabled = sqlx::query_scalar!(
                    "SELECT id FROM users WHERE disabled_at IS NOT NULL
                     ORDER BY disabled_at DESC LIMIT $1",
                    DISABLED_MAX
                )
                .fetch_all(&pool)
                .await?;
                Ok(Ended {
                    as_of,
                    sessions,
                    disabled,
                })
            })
            .await
    }
}

/// Ends all sessions of `user` but `kept`, and gives them. In a transaction: after the statement that
/// changed the user's row, so that it sees every session that began before.
pub(super) async fn end_all(
    connection: &mut PgConnection,
    user: Uuid,
    kept: Option<Uuid>,
    now: DateTime<Utc>,
) -> Result<Vec<Uuid>, sqlx::Error> {
    sqlx::query_scalar!(
        "UPDATE sessions SET revoked_at = $3
         WHERE user_id = $1 AND revoked_at IS NULL AND id IS DISTINCT FROM $2 RETURNING id",
        user,
        kept,
        now
    )
    .fetch_all(connection)
    .await
}
