//! Accounts: registering, logging in, staying logged in, leaving.

use std::sync::Arc;

use chrono::SubsecRound;
use uuid::Uuid;

use crate::{
    clock,
    store::{
        StoreError,
        personal::{Erased, Personal},
        sessions::{Holder, NewSession, Rotation, Session, Sessions},
        users::{Credentials, ManagedUser, User, UserChange, Users},
    },
};

use super::{
    Role,
    api_key::ApiKeys,
    barred::Barred,
    email::Email,
    password::{HashError, PasswordHasher},
    session::{LIFETIME, LIMITS, RefreshToken, Successors},
    token::{Identity, TokenKeys},
};

/// Everything that accounts need.
#[derive(Clone)]
pub struct Accounts {
    /// Who has registered.
    pub users: Users,
    /// Who is logged in.
    pub sessions: Sessions,
    /// Hashes passwords.
    pub passwords: PasswordHasher,
    /// Signs access tokens.
    pub tokens: Arc<TokenKeys>,
    /// Derives refresh tokens.
    pub successors: Arc<Successors>,
    /// Whose tokens are believed no longer.
    pub barred: Arc<Barred>,
    /// Keys of machines.
    pub api_keys: Arc<ApiKeys>,
    /// What is kept about users.
    pub personal: Personal,
}

/// What a client gets when it has logged in.
pub struct Grant {
    /// Who the tokens speak for.
    pub identity: Identity,
    /// Lets its bearer act.
    pub access_token: String,
    /// How long, in seconds.
    pub expires_in: u32,
    /// Gets the next grant, once.
    pub refresh_token: String,
}

/// Why nothing was granted.
#[derive(Debug, thiserror::Error)]
pub enum AccountError {
    /// Somebody has registered with the address.
    #[error("the e-mail address is taken")]
    EmailTaken,
    /// Unknown user, wrong password, bad or used refresh token: nobody learns which.
    #[error("the credentials are not valid")]
    InvalidCredentials,
    /// Too many passwords are waiting.
    #[error(transparent)]
    Hash(#[from] HashError),
    /// PostgreSQL did not do it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The token could not be signed: a mistake of ours.
    #[error("signing failed: {0}")]
    Sign(#[from] jsonwebtoken::errors::Error),
    /// The operating system has no randomness.
    #[error("no randomness: {0}")]
    Random(#[from] rand::rand_core::OsError),
    /// A row that no version of this program writes.
    #[error("user {0} has an unknown role")]
    Role(Uuid),
}

/// Adds a user whose password passed [`check`](super::password::check).
///
/// # Errors
/// [`AccountError`].
pub async fn register(
    users: &Users,
    passwords: &PasswordHasher,
    email: Email,
    name: String,
    password: String,
    role: Role,
) -> Result<User, AccountError> {
    let password_hash = passwords.hash(password).await?;
    let user = User {
        id: clock::new_id(),
        email: email.as_str().to_owned(),
        name,
        role: role.as_str().to_owned(),
        // As it will be stored, so that this answer and later ones agree.
        created_at: clock::now().trunc_subsecs(3),
    };
    if users.add(&user, &password_hash).await? {
        Ok(user)
    } else {
        Err(AccountError::EmailTaken)
    }
}

impl Accounts {
    /// Adds a user whose password passed [`check`](super::password::check).
    ///
    /// # Errors
    /// [`AccountError`].
    pub async fn register(
        &self,
        email: Email,
        name: String,
        password: String,
        role: Role,
    ) -> Result<User, AccountError> {
        register(&self.users, &self.passwords, email, name, password, role).await
    }

    /// Changes what a user may do. What ends by that ends at once on this node.
    ///
    /// # Errors
    /// [`StoreError`]; `None` when there is no such user.
    pub async fn manage(
        &self,
        user: Uuid,
        change: UserChange,
    ) -> Result<Option<ManagedUser>, StoreError> {
        let changed = self.users.change(user, change, clock::now()).await;
        self.api_keys.forget_user(user);
        Ok(changed?.map(|(user, ended)| {
            self.barred.end(ended);
            user
        }))
    }

    /// Begins a session of a client that calls itself `user_agent`. Takes as long for an unknown
    /// user as for a wrong password, or a disabled one.
    ///
    /// # Errors
    /// [`AccountError`].
    pub async fn login(
        &self,
        email: &str,
        password: String,
        user_agent: Option<String>,
    ) -> Result<Grant, AccountError> {
        let known = match Email::parse(email) {
            Some(email) => self.users.by_email(email.as_str()).await?,
            None => None,
        };
        let known = self.prove(known, password.clone()).await?;
        if self.passwords.outdated(&known.password_hash) {
            let hash = self.passwords.hash(password).await?;
            self.users
                .rehash(known.user.id, &known.password_hash, &hash)
                .await?;
        }
        let (session, now) = (clock::new_id(), clock::now());
        let token = RefreshToken::random()?;
        let new = NewSession {
            id: session,
            user: known.user.id,
            password_changed_at: known.password_changed_at,
            token: token.hash(),
            user_agent,
            now,
            expires_at: now + LIFETIME,
        };
        if !self.sessions.begin(new).await? {
            return Err(AccountError::InvalidCredentials);
        }
        let holder = Holder {
            session,
            user: known.user.id,
            role: known.user.role,
            registered_at: known.user.created_at,
        };
        self.grant(&holder, &token)
    }

    /// The user, if the password proves to be the user's and the user may come in.
    async fn prove(
        &self,
        known: Option<Credentials>,
        password: String,
    ) -> Result<Credentials, AccountError> {
        let hash = known.as_ref().map(|known| known.password_hash.as_str());
        let matches = self.passwords.verify(password, hash).await?;
        known
            .filter(|known| matches && known.disabled_at.is_none())
            .ok_or(AccountError::InvalidCredentials)
    }

    /// Exchanges a refresh token for the next grant.
    ///
    /// # Errors
    /// [`AccountError`].
    pub async fn refresh(&self, refresh_token: &str) -> Result<Grant, AccountError> {
        let Some(used) = RefreshToken::parse(refresh_token) else {
            return Err(AccountError::InvalidCredentials);
        };
        let successor = self.successors.of(&used);
        match self
            .sessions
            .rotate(used.hash(), successor.hash(), clock::now(), LIMITS)
            .await?
        {
            Rotation::Rotated(holder) => self.grant(&holder, &successor),
            Rotation::Reused(session) => {
                self.barred.end([session]);
                tracing::warn!(%session, "a used refresh token came again: its session is revoked");
                Err(AccountError::InvalidCredentials)
            }
            Rotation::Refused => Err(AccountError::InvalidCredentials),
        }
    }

    /// Ends the session of a refresh token. One that is not known has no session to end.
    ///
    /// # Errors
    /// [`AccountError`].
    pub async fn logout(&self, refresh_token: &str) -> Result<(), AccountError> {
        if let Some(token) = RefreshToken::parse(refresh_token) {
            let ended = self.sessions.revoke(token.hash(), clock::now()).await?;
            self.barred.end(ended);
        }
        Ok(())
    }

    /// The user's sessions that last, newest first, behind `after`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn sessions(
        &self,
        user: Uuid,
        after: Option<Uuid>,
        rows: i64,
    ) -> Result<Vec<Session>, StoreError> {
        let now = clock::now();
        self.sessions.of_user(user, LIMITS, now, after, rows).await
    }

    /// Ends one session of the user; `false` when there is no such one.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn end_session(&self, user: Uuid, session: Uuid) -> Result<bool, StoreError> {
        let now = clock::now();
        let ended = self.sessions.end(user, session, LIMITS, now).await?;
        if ended {
            self.barred.end([session]);
        }
        Ok(ended)
    }

    /// Ends all sessions of the user.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn logout_all(&self, user: Uuid) -> Result<(), StoreError> {
        let ended = self.sessions.end_all(user, clock::now()).await?;
        self.barred.end(ended);
        Ok(())
    }

    /// Changes the password of a user who knows the old one, to one that passed
    /// [`check`](super::password::check), and ends all other sessions.
    ///
    /// # Errors
    /// [`AccountError`]; [`AccountError::InvalidCredentials`] also for a user who has no password
    /// here, or another one meanwhile.
    pub async fn change_password(
        &self,
        identity: Identity,
        old: String,
        new: String,
    ) -> Result<(), AccountError> {
        let known = self.users.credentials(identity.user).await?;
        let known = self.prove(known, old).await?;
        let hash = self.passwords.hash(new).await?;
        let ended = self
            .users
            .change_password(
                known.user.id,
                known.password_changed_at,
                hash,
                identity.session,
                clock::now(),
            )
            .await?;
        self.barred
            .end(ended.ok_or(AccountError::InvalidCredentials)?);
        Ok(())
    }

    /// Forgets who somebody was, who proves it with the password that there is.
    ///
    /// # Errors
    /// [`AccountError`].
    pub async fn erase_oneself(
        &self,
        user: Uuid,
        password: Option<String>,
    ) -> Result<Erased, AccountError> {
        // A user of another identity provider has none here.
        if let Some(known) = self.users.credentials(user).await? {
            self.prove(Some(known), password.unwrap_or_default())
                .await?;
        }
        Ok(self.erase(user).await?)
    }

    /// Forgets who a user was, and ends the user's sessions.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn erase(&self, user: Uuid) -> Result<Erased, StoreError> {
        let erased = self.personal.erase(user).await?;
        self.api_keys.forget_user(user);
        if let Erased::Done(sessions) = &erased {
            self.barred.end(sessions.iter().copied());
        }
        Ok(erased)
    }

    fn grant(&self, holder: &Holder, refresh_token: &RefreshToken) -> Result<Grant, AccountError> {
        let user = holder.user;
        let identity = Identity {
            user,
            role: Role::parse(&holder.role).ok_or(AccountError::Role(user))?,
            session: Some(holder.session),
            registered_at: Some(holder.registered_at.timestamp()),
        };
        Ok(Grant {
            identity,
            access_token: self.tokens.mint(identity, clock::new_id(), clock::now())?,
            expires_in: self.tokens.lifetime_seconds(),
            refresh_token: refresh_token.text(),
        })
    }
}
