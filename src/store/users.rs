//! Users: who has registered here.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::{Database, StoreError, audit_log::begin, sessions::end_all};

/// A registered user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// The subject of the user's tokens.
    pub id: Uuid,
    /// Normalised.
    pub email: String,
    /// What to call the user.
    pub name: String,
    /// `buyer`, `operator` or `admin`.
    pub role: String,
    /// When the user registered.
    pub created_at: DateTime<Utc>,
}

/// A user and what proves to be that user.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// The user.
    pub user: User,
    /// bcrypt, with its cost and salt.
    pub password_hash: String,
    /// When the user chose it, if that was after registering.
    pub password_changed_at: Option<DateTime<Utc>>,
    /// Since when the user may do nothing.
    pub disabled_at: Option<DateTime<Utc>>,
}

/// A row with all that it takes to log in.
struct CredentialsRow {
    id: Uuid,
    email: String,
    name: String,
    role: String,
    created_at: DateTime<Utc>,
    password_hash: String,
    password_changed_at: Option<DateTime<Utc>>,
    disabled_at: Option<DateTime<Utc>>,
}

impl From<CredentialsRow> for Credentials {
    fn from(row: CredentialsRow) -> Self {
        Self {
            user: User {
                id: row.id,
                email: row.email,
                name: row.name,
                role: row.role,
                created_at: row.created_at,
            },
            password_hash: row.password_hash,
            password_changed_at: row.password_changed_at,
            disabled_at: row.disabled_at,
        }
    }
}

/// A user as admins see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManagedUser {
    /// The subject of the user's tokens.
    pub id: Uuid,
    /// Normalised.
    pub email: String,
    /// What to call the user.
    pub name: String,
    /// `buyer`, `operator` or `admin`.
    pub role: String,
    /// When the user registered.
    pub created_at: DateTime<Utc>,
    /// Since when the user may do nothing.
    pub disabled_at: Option<DateTime<Utc>>,
}

/// What admins change; what is `None` stays.
#[derive(Clone, Copy, Debug, Default)]
pub struct UserChange {
    /// `buyer`, `operator` or `admin`.
    pub role: Option<&'static str>,
    /// Whether the user may do nothing from now on.
    pub disabled: Option<bool>,
}

/// Which users to list.
#[derive(Clone, Debug, Default)]
pub struct UserFilter {
    /// Those with this normalised address.
    pub email: Option<String>,
    /// Those with this role.
    pub role: Option<&'static str>,
}

/// The table `users`.
#[derive(Clone, Debug)]
pub struct Users {
    database: Database,
}

impl Users {
    /// The users in `database`.
    pub fn new(database: Database) -> Self {
        Self { database }
    }

    /// Adds a user; `false` when the address is taken.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn add(&self, user: &User, password_hash: &str) -> Result<bool, StoreError> {
        let (user, password_hash) = (user.clone(), password_hash.to_owned());
        self.database
            .run(async move |pool| {
                let mut transaction = begin(&pool).await?;
                let done = sqlx::query!(
                    "INSERT INTO users (id, email, name, password_hash, role, created_at)
                     VALUES ($1, $2, $3, $4, $5, $6)
                     ON CONFLICT (email) DO NOTHING",
                    user.id,
                    user.email,
                    user.name,
                    password_hash,
                    user.role,
                    user.created_at,
                )
                .execute(&mut *transaction)
                .await?;
                transaction.commit().await?;
                Ok(done.rows_affected() == 1)
            })
            .await
    }

    /// The user with this id.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn by_id(&self, id: Uuid) -> Result<Option<User>, StoreError> {
        self.database
            .run(async move |pool| {
                Ok(sqlx::query_as!(
                    User,
                    "SELECT id, email, name, role, created_at FROM users WHERE id = $1",
                    id
                )
                .fetch_optional(&pool)
                .await?)
            })
            .await
    }

    /// The user with this normalised address, and what proves to be that user.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn by_email(&self, email: &str) -> Result<Option<Credentials>, StoreError> {
        let email = email.to_owned();
        self.database
            .run(async move |pool| {
                let row = sqlx::query_as!(
                    CredentialsRow,
                    "SELECT id, email, name, role, created_at, password_hash, password_changed_at,
                            disabled_at
                     FROM users WHERE email = $1",
                    email
                )
                .fetch_optional(&pool)
                .await?;
                Ok(row.map(Credentials::from))
            })
            .await
    }

    /// The user with this id, and what proves to be that user.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn credentials(&self, id: Uuid) -> Result<Option<Credentials>, StoreError> {
        self.database
            .run(async move |pool| {
                let row = sqlx::query_as!(
                    CredentialsRow,
                    "SELECT id, email, name, role, created_at, password_hash, password_changed_at,
                            disabled_at
                     FROM users WHERE id = $1",
                    id
                )
                .fetch_optional(&pool)
                .await?;
                Ok(row.map(Credentials::from))
            })
            .await
    }

    /// Sets another password and ends all sessions of the user but `kept`. Gives those that ended;
    /// `None` when the password is not the one of `since` any more.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn change_password(
        &self,
        id: Uuid,
        since: Option<DateTime<Utc>>,
        new: String,
        kept: Option<Uuid>,
        now: DateTime<Utc>,
    ) -> Result<Option<Vec<Uuid>>, StoreError> {
        self.database
            .run(async move |pool| {
                let mut transaction = begin(&pool).await?;
                let done = sqlx::query!(
                    "UPDATE users SET password_hash = $3, password_changed_at = $4
                     WHERE id = $1 AND password_changed_at IS NOT DISTINCT FROM $2",
                    id,
                    since,
                    new,
                    now
                )
                .execute(&mut *transaction)
                .await?;
                if done.rows_affected() == 0 {
                    return Ok(None);
                }
                let ended = end_all(&mut transaction, id, kept, now).await?;
                transaction.commit().await?;
                Ok(Some(ended))
            })
            .await
    }

    /// Replaces the hash of a password, if it still is `old`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn rehash(&self, id: Uuid, old: &str, new: &str) -> Result<(), StoreError> {
        let (old, new) = (old.to_owned(), new.to_owned());
        self.database
            .run(async move |pool| {
                sqlx::query!(
                    "UPDATE users SET password_hash = $3 WHERE id = $1 AND password_hash = $2",
                    id,
                    old,
                    new
                )
                .execute(&pool)
                .await?;
                Ok(())
            })
            .await
    }

    /// Users, the newest first, behind `after`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn list(
        &self,
        filter: UserFilter,
        after: Option<Uuid>,
        rows: i64,
    ) -> Result<Vec<ManagedUser>, StoreError> {
        self.database
            .run(async move |pool| {
                Ok(sqlx::query_as!(
                    ManagedUser,
                    "SELECT id, email, name, role, created_at, disabled_at FROM users
                     WHERE ($1::text IS NULL OR email = $1)
                       AND ($2::text IS NULL OR role = $2)
                       AND ($3::uuid IS NULL OR id < $3)
                     ORDER BY id DESC LIMIT $4",
                    filter.email,
                    filter.role,
                    after,
                    rows,
                )
                .fetch_all(&pool)
                .await?)
            })
            .await
    }

    /// Changes a user. Another role ends the sessions, since their tokens say the old one; to be
    /// disabled ends the API keys, too. Gives the user as it is then and the sessions that ended;
    /// `None` when there is no such user.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn change(
        &self,
        id: Uuid,
        change: UserChange,
        now: DateTime<Utc>,
    ) -> Result<Option<(ManagedUser, Vec<Uuid>)>, StoreError> {
        self.database
            .run(async move |pool| {
                let mut transaction = begin(&pool).await?;
                // Locked, so that a login sees the change, or is seen by what follows.
                let before = sqlx::query!(
                    "SELECT role, disabled_at FROM users WHERE id = $1 FOR UPDATE",
                    id
                )
                .fetch_optional(&mut *transaction)
                .await?;
                let Some(before) = before else {
                    return Ok(None);
                };
                let disabled_at = match change.disabled {
                    Some(true) => before.disabled_at.or(Some(now)),
                    Some(false) => None,
                    None => before.disabled_at,
                };
                let user = sqlx::query_as!(
                    ManagedUser,
                    "UPDATE users SET role = coalesce($2, role), disabled_at = $3 WHERE id = $1
                     RETURNING id, email, name, role, created_at, disabled_at",
                    id,
                    change.role,
                    disabled_at
                )
                .fetch_one(&mut *transaction)
                .await?;
                let mut ended = Vec::new();
                if user.role != before.role || user.disabled_at.is_some() {
                    ended = end_all(&mut transaction, id, None, now).await?;
                }
                if user.disabled_at.is_some() {
                    sqlx::query!("DELETE FROM api_keys WHERE user_id = $1", id)
                        .execute(&mut *transaction)
                        .await?;
                }
                transaction.commit().await?;
                Ok(Some((user, ended)))
            })
            .await
    }

    /// Whether somebody can operate sales.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn has_operator(&self) -> Result<bool, StoreError> {
        self.database
            .run(async |pool| {
                Ok(sqlx::query_scalar!(
                    r#"SELECT EXISTS (SELECT 1 FROM users WHERE role <> 'buyer') AS "exists!""#
                )
                .fetch_one(&pool)
                .await?)
            })
            .await
    }
}
