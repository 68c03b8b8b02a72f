//! API keys: machines that act for a user.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::{Database, StoreError, audit_log::begin, sessions::TokenHash};

/// A key as its user sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiKeyRow {
    /// Its id, which is no secret.
    pub id: Uuid,
    /// What its user calls it.
    pub name: String,
    /// `read`, `buy`, `operate`.
    pub scopes: Vec<String>,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it ends, if it does by itself.
    pub expires_at: Option<DateTime<Utc>>,
    /// The last use, to the minute.
    pub last_used_at: Option<DateTime<Utc>>,
}

/// What stands behind a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyHolder {
    /// The key.
    pub id: Uuid,
    /// Its user.
    pub user: Uuid,
    /// The role that the user has now.
    pub role: String,
    /// When the user registered.
    pub registered_at: DateTime<Utc>,
    /// `read`, `buy`, `operate`.
    pub scopes: Vec<String>,
    /// When it ends, if it does by itself.
    pub expires_at: Option<DateTime<Utc>>,
}

/// What became of a new key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Added {
    /// It is there.
    Added,
    /// The user has as many as a user may have.
    Full,
    /// No such user is registered here, or the user is disabled.
    NoUser,
}

/// The table `api_keys`.
#[derive(Clone, Debug)]
pub struct ApiKeyTable {
    database: Database,
}

impl ApiKeyTable {
    /// The keys in `database`.
    pub fn new(database: Database) -> Self {
        Self { database }
    }

    /// Adds a key of `user`, who then has `most` at most; those that have expired make room.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn add(
        &self,
        user: Uuid,
        key: ApiKeyRow,
        hash: TokenHash,
        most: i64,
    ) -> Result<Added, StoreError> {
        self.database
            .run(async move |pool| {
                let mut transaction = begin(&pool).await?;
                // The user's row is the lock: of many at once none is counted before it is there.
                let known = sqlx::query_scalar!(
                    "SELECT id FROM users WHERE id = $1 AND disabled_at IS NULL FOR UPDATE",
                    user
                )
                .fetch_optional(&mut *transaction)
                .await?;
                if known.is_none() {
                    return Ok(Added::NoUser);
                }
                sqlx::query!(
                    "DELETE FROM api_keys WHERE user_id = $1 AND expires_at <= $2",
                    user,
                    key.created_at
                )
                .execute(&mut *transaction)
                .await?;
                let done = sqlx::query!(
                    "INSERT INTO api_keys (id, user_id, name, hash, scopes, created_at, expires_at)
                     SELECT $1, $2, $3, $4, $5, $6, $7
                     WHERE (SELECT count(*) FROM api_keys WHERE user_id = $2) < $8",
                    key.id,
                    user,
                    key.name,
                    &hash[..],
                    &key.scopes,
                    key.created_at,
                    key.expires_at,
                    most,
                )
                .execute(&mut *transaction)
                .await?;
                transaction.commit().await?;
                Ok(if done.rows_affected() == 1 {
                    Added::Added
                } else {
                    Added::Full
                })
            })
            .await
    }

    /// The keys of `user`, newest first.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn of_user(&self, user: Uuid) -> Result<Vec<ApiKeyRow>, StoreError> {
        self.database
            .run(async move |pool| {
                Ok(sqlx::query_as!(
                    ApiKeyRow,
                    "SELECT id, name, scopes, created_at, expires_at, last_used_at
                     FROM api_keys WHERE user_id = $1 ORDER BY id DESC",
                    user
                )
                .fetch_all(&pool)
                .await?)
            })
            .await
    }

    /// Deletes a key of `user`; `false` when there is no such one.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn delete(&self, user: Uuid, id: Uuid) -> Result<bool, StoreError> {
        self.database
            .run(async move |pool| {
                let mut transaction = begin(&pool).await?;
                let done = sqlx::query!(
                    "DELETE FROM api_keys WHERE id = $1 AND user_id = $2",
                    id,
                    user
                )
                .execute(&mut *transaction)
                .await?;
                transaction.commit().await?;
                Ok(done.rows_affected() == 1)
            })
            .await
    }

    /// Who holds the key with this hash, which is used now.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn holder(
        &self,
        hash: TokenHash,
        now: DateTime<Utc>,
    ) -> Result<Option<KeyHolder>, StoreError> {
        self.database
            .run(async move |pool| {
                Ok(sqlx::query_as!(
                    KeyHolder,
                    r#"WITH used AS (
                           UPDATE api_keys SET last_used_at = $2
                           WHERE hash = $1
                             AND (last_used_at IS NULL OR last_used_at < $2::timestamptz - interval '1 minute')
                       )
                       SELECT k.id, k.user_id AS "user", u.role, u.created_at AS registered_at,
                              k.scopes, k.expires_at
                       FROM api_keys k JOIN users u ON u.id = k.user_id
                       WHERE k.hash = $1 AND u.disabled_at IS NULL
                         AND (k.expires_at IS NULL OR k.expires_at > $2)"#,
                    &hash[..],
                    now
                )
                .fetch_optional(&pool)
                .await?)
            })
            .await
    }
}
