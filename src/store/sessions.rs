//! Sessions: one per login, each a family of refresh tokens of which the newest is live.

use chrono::{DateTime, Duration, Utc};
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

/// Whose session it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The session.
    pub session: Uuid,
    /// Its user.
    pub user: Uuid,
    /// The role that the user has now.
    pub role: String,
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

    /// Begins a session of `user` with its first token.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn begin(
        &self,
        session: Uuid,
        user: Uuid,
        token: TokenHash,
        now: DateTime<Utc>,
        expires_at: DateTime<Utc>,
    ) -> Result<(), StoreError> {
        self.database
            .run(async move |pool| {
                // One statement, so one transaction; what has long ended goes with it.
                sqlx::query!(
                    "WITH ended AS (
                         DELETE FROM sessions WHERE user_id = $2 AND expires_at < $3
                     ), session AS (
                         INSERT INTO sessions (id, user_id, created_at, last_used_at, expires_at)
                         VALUES ($1, $2, $3, $3, $4) RETURNING id
                     )
                     INSERT INTO refresh_tokens (hash, session_id) SELECT $5, id FROM session",
                    session,
                    user,
                    now,
                    expires_at,
                    &token[..],
                )
                .execute(&pool)
                .await?;
                Ok(())
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
                    "SELECT s.id, s.user_id, s.last_used_at, s.expires_at, s.revoked_at, u.role
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
                }))
            })
            .await
    }

    /// Ends the session that `token` belongs to, if there is one.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn revoke(&self, token: TokenHash, now: DateTime<Utc>) -> Result<(), StoreError> {
        self.database
            .run(async move |pool| {
                sqlx::query!(
                    "UPDATE sessions SET revoked_at = $2
                     WHERE id = (SELECT session_id FROM refresh_tokens WHERE hash = $1)
                       AND revoked_at IS NULL",
                    &token[..],
                    now
                )
                .execute(&pool)
                .await?;
                Ok(())
            })
            .await
    }
}
