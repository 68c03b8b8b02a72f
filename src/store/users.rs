//! Users: who has registered here.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use rand::{TryRngCore, rngs::OsRng};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::{Database, StoreError, audit_log::begin, sessions::end_all, unreadable};
use crate::domain::sealed::{DataKeys, Fresh, Place};

/// What an address is bound to when it is sealed.
const EMAIL: &str = "users.email";
/// The same of a name.
const NAME: &str = "users.name";

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

/// A row as PostgreSQL has it: address and name plain, or sealed.
struct Row {
    id: Uuid,
    email: Option<String>,
    name: Option<String>,
    role: String,
    created_at: DateTime<Utc>,
    password_hash: String,
    password_changed_at: Option<DateTime<Utc>>,
    disabled_at: Option<DateTime<Utc>>,
    data_key: Option<i16>,
    email_sealed: Option<Vec<u8>>,
    name_sealed: Option<Vec<u8>>,
}

/// A statement that gives rows: the columns of [`Row`] + `…`.
macro_rules! select {
    ($tail:tt $(, $argument:expr)*) => {
        sqlx::query_as!(
            Row,
            "SELECT id, email, name, role, created_at, password_hash, password_changed_at,
                    disabled_at, data_key, email_sealed, name_sealed FROM users " + $tail
            $(, $argument)*
        )
    };
}

impl Row {
    fn read(self, keys: &DataKeys) -> Result<Credentials, StoreError> {
        let open = |plain: Option<String>, column, sealed: Option<Vec<u8>>| {
            if let Some(plain) = plain {
                return Ok(plain);
            }
            let number = self.data_key.and_then(|key| u8::try_from(key).ok());
            let place = Place {
                column,
                row: self.id,
            };
            keys.open(
                number.unwrap_or_default(),
                place,
                &sealed.unwrap_or_default(),
            )
            .map_err(|error| unreadable(format!("user {}: {error}", self.id)))
        };
        Ok(Credentials {
            user: User {
                email: open(self.email, EMAIL, self.email_sealed)?,
                name: open(self.name, NAME, self.name_sealed)?,
                id: self.id,
                role: self.role,
                created_at: self.created_at,
            },
            password_hash: self.password_hash,
            password_changed_at: self.password_changed_at,
            disabled_at: self.disabled_at,
        })
    }

    fn managed(self, keys: &DataKeys) -> Result<ManagedUser, StoreError> {
        let known = self.read(keys)?;
        Ok(ManagedUser {
            id: known.user.id,
            email: known.user.email,
            name: known.user.name,
            role: known.user.role,
            created_at: known.user.created_at,
            disabled_at: known.disabled_at,
        })
    }
}

/// Address and name as they are stored.
struct Stored {
    email: Option<String>,
    name: Option<String>,
    data_key: Option<i16>,
    email_sealed: Option<Vec<u8>>,
    name_sealed: Option<Vec<u8>>,
    email_index: Option<Vec<u8>>,
}

impl Stored {
    fn of(keys: &DataKeys, user: &User) -> Result<Self, StoreError> {
        let Some(number) = keys.sealing() else {
            return Ok(Self {
                email: Some(user.email.clone()),
                name: Some(user.name.clone()),
                data_key: None,
                email_sealed: None,
                name_sealed: None,
                email_index: None,
            });
        };
        let seal = |column, text| {
            let mut fresh = Fresh::default();
            OsRng
                .try_fill_bytes(&mut fresh)
                .map_err(|error| StoreError::Unexpected(sqlx::Error::Encode(error.into())))?;
            let place = Place {
                column,
                row: user.id,
            };
            Ok::<_, StoreError>(keys.seal(place, fresh, text))
        };
        Ok(Self {
            email: None,
            name: None,
            data_key: Some(number.into()),
            email_sealed: seal(EMAIL, &user.email)?,
            name_sealed: seal(NAME, &user.name)?,
            email_index: keys.indexes(&user.email).into_iter().next(),
        })
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
    keys: Arc<DataKeys>,
}

impl Users {
    /// The users in `database`, sealed with `keys` if there are any.
    pub fn new(database: Database, keys: Arc<DataKeys>) -> Self {
        Self { database, keys }
    }

    /// Adds a user; `false` when the address is taken.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn add(&self, user: &User, password_hash: &str) -> Result<bool, StoreError> {
        let (user, password_hash) = (user.clone(), password_hash.to_owned());
        let keys = Arc::clone(&self.keys);
        self.database
            .run(async move |pool| {
                let mut transaction = begin(&pool).await?;
                // One after the other for the same address: while keys change, rows with it need not
                // have the same index.
                let digest: [u8; 32] = Sha256::digest(&user.email).into();
                let lock = digest.first_chunk().map_or(0, |part| i64::from_be_bytes(*part));
                sqlx::query!("SELECT pg_advisory_xact_lock($1)", lock)
                    .execute(&mut *transaction)
                    .await?;
                let stored = Stored::of(&keys, &user)?;
                let done = sqlx::query!(
                    "INSERT INTO users (id, email, name, password_hash, role, created_at, data_key,
                                        email_sealed, name_sealed, email_index)
                     SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9, $10
                     WHERE NOT EXISTS (SELECT FROM users WHERE email = $11 OR email_index = ANY ($12))
                     ON CONFLICT DO NOTHING",
                    user.id,
                    stored.email,
                    stored.name,
                    password_hash,
                    user.role,
                    user.created_at,
                    stored.data_key,
                    stored.email_sealed,
                    stored.name_sealed,
                    stored.email_index,
                    user.email,
                    &keys.indexes(&user.email),
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
        Ok(self.credentials(id).await?.map(|known| known.user))
    }

    /// The user with this normalised address, and what proves to be that user.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn by_email(&self, email: &str) -> Result<Option<Credentials>, StoreError> {
        let (email, keys) = (email.to_owned(), Arc::clone(&self.keys));
        self.database
            .run(async move |pool| {
                let row = select!(
                    "WHERE email = $1 OR email_index = ANY ($2)",
                    email,
                    &keys.indexes(&email)
                )
                .fetch_optional(&pool)
                .await?;
                row.map(|row| row.read(&keys)).transpose()
            })
            .await
    }

    /// The user with this id, and what proves to be that user.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn credentials(&self, id: Uuid) -> Result<Option<Credentials>, StoreError> {
        let keys = Arc::clone(&self.keys);
        self.database
            .run(async move |pool| {
                let row = select!("WHERE id = $1", id).fetch_optional(&pool).await?;
                row.map(|row| row.read(&keys)).transpose()
            })
            .await
    }

    /// The keys that stored users need and that are missing, or have another secret than before.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn missing_keys(&self) -> Result<Vec<i16>, StoreError> {
        let keys = Arc::clone(&self.keys);
        self.database
            .run(async move |pool| {
                let one_of_each = select!(
                    "WHERE id IN (SELECT DISTINCT ON (data_key) id FROM users
                                  WHERE data_key IS NOT NULL ORDER BY data_key, id)"
                );
                let rows = one_of_each.fetch_all(&pool).await?;
                let missing = rows.into_iter().filter_map(|row| {
                    let key = row.data_key;
                    row.read(&keys).err().and(key)
                });
                Ok(missing.collect())
            })
            .await
    }

    /// Stores up to `limit` users behind `after` as the keys say now: sealed with the first, or
    /// plain. Gives the last of them and how many; `None` when there is none left.
    ///
    /// # Errors
    /// [`StoreError`], with a user that cannot be opened.
    pub async fn reseal(
        &self,
        after: Uuid,
        limit: i64,
    ) -> Result<Option<(Uuid, usize)>, StoreError> {
        let keys = Arc::clone(&self.keys);
        self.database
            .run(async move |pool| {
                let mut transaction = pool.begin().await?;
                let rows = select!(
                    "WHERE id > $1 AND data_key IS DISTINCT FROM $2 ORDER BY id LIMIT $3 FOR UPDATE",
                    after,
                    keys.sealing().map(i16::from),
                    limit
                )
                .fetch_all(&mut *transaction)
                .await?;
                let Some(last) = rows.last().map(|row| row.id) else {
                    return Ok(None);
                };
                let count = rows.len();
                for row in rows {
                    let user = row.read(&keys)?.user;
                    let stored = Stored::of(&keys, &user)?;
                    sqlx::query!(
                        "UPDATE users SET email = $2, name = $3, data_key = $4, email_sealed = $5,
                                          name_sealed = $6, email_index = $7
                         WHERE id = $1",
                        user.id,
                        stored.email,
                        stored.name,
                        stored.data_key,
                        stored.email_sealed,
                        stored.name_sealed,
                        stored.email_index,
                    )
                    .execute(&mut *transaction)
                    .await?;
                }
                transaction.commit().await?;
                Ok(Some((last, count)))
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
        let keys = Arc::clone(&self.keys);
        self.database
            .run(async move |pool| {
                let rows = select!(
                    "WHERE ($1::text IS NULL OR email = $1 OR email_index = ANY ($2))
                       AND ($3::text IS NULL OR role = $3)
                       AND ($4::uuid IS NULL OR id < $4)
                     ORDER BY id DESC LIMIT $5",
                    filter.email,
                    &filter
                        .email
                        .as_ref()
                        .map_or_else(Vec::new, |email| keys.indexes(email)),
                    filter.role,
                    after,
                    rows
                )
                .fetch_all(&pool)
                .await?;
                rows.into_iter().map(|row| row.managed(&keys)).collect()
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
        let keys = Arc::clone(&self.keys);
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
                sqlx::query!(
                    "UPDATE users SET role = coalesce($2, role), disabled_at = $3 WHERE id = $1",
                    id,
                    change.role,
                    disabled_at
                )
                .execute(&mut *transaction)
                .await?;
                let user = select!("WHERE id = $1", id)
                    .fetch_one(&mut *transaction)
                    .await?
                    .managed(&keys)?;
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
