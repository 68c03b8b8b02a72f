//! API keys: what they are made of, and who they speak for. Asked of PostgreSQL now and then, not
//! with every request.

use std::{
    collections::HashMap,
    fmt::Write,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use chrono::{DateTime, SubsecRound, Utc};
use rand::{TryRngCore, rngs::OsRng};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;
use uuid::Uuid;

use super::{Role, bearer::BearerError, token::Identity};
use crate::{
    clock, faults,
    metrics::IdentityMetrics,
    store::{
        StoreError,
        api_keys::{Added, ApiKeyRow, ApiKeyTable, KeyHolder},
        sessions::TokenHash,
    },
};

/// What every key begins with, so that people and scanners of secrets recognise one.
pub const PREFIX: &str = "sk_stockade_";

/// Keys of one user.
pub const PER_USER_MAX: i64 = 20;

/// How long an answer of PostgreSQL is believed without asking again.
const FRESH: Duration = Duration::from_secs(20);

/// How long it is believed by those who would have to wait for an answer. Together with the wait
/// for it a revoked key is refused within a minute.
const OVERDUE: Duration = Duration::from_secs(40);

/// How long it is believed while PostgreSQL does not answer: as long as an access token.
const SILENT_MAX: Duration = Duration::from_mins(10);

/// How long PostgreSQL is left alone after it did not answer.
const PAUSE: Duration = Duration::from_secs(5);

/// Keys in memory, and as many that there are not.
const KNOWN_MAX: usize = 10_000;

/// Questions to PostgreSQL at the same time: a flood of wrong keys leaves connections to others.
const ASKING_MAX: usize = 2;

/// Requests that wait for such a question.
const WAITING_MAX: usize = 64;

const BYTES: usize = 32;

/// Digits of the check sum, two for each byte.
const CHECK_BYTES: usize = 4;

/// What a key may do of what its user may.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Look at what the user sees.
    Read,
    /// Change what is the user's: orders, cart, places in lines.
    Buy,
    /// Whatever operators do.
    Operate,
}

impl Scope {
    /// The word in PostgreSQL and in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Buy => "buy",
            Self::Operate => "operate",
        }
    }

    /// Reads the word.
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Read, Self::Buy, Self::Operate]
            .into_iter()
            .find(|scope| scope.as_str() == word)
    }
}

/// A key: 256 bits that say nothing.
pub struct ApiKey([u8; BYTES]);

impl ApiKey {
    /// A new one.
    ///
    /// # Errors
    /// The operating system's, when it has no randomness.
    pub fn random() -> Result<Self, rand::rand_core::OsError> {
        let mut bytes = [0; BYTES];
        OsRng.try_fill_bytes(&mut bytes)?;
        Ok(Self(bytes))
    }

    /// Reads a key as a client sent it; `None` when it cannot be one, which its check sum shows.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix(PREFIX)?.as_bytes();
        if digits.len() != 2 * (BYTES + CHECK_BYTES) {
            return None;
        }
        let mut bytes = [0; BYTES];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let pair = str::from_utf8(pair).ok()?;
            *byte = u8::from_str_radix(pair, 16).ok()?;
        }
        // There is one spelling of each.
        let key = Self(bytes);
        (key.text() == text).then_some(key)
    }

    /// The key as a client gets it, once: 64 hexadecimal digits, and 8 of the SHA-256 of all before
    /// them.
    pub fn text(&self) -> String {
        let mut text = PREFIX.to_owned();
        push_hex(&mut text, &self.0);
        let check = Sha256::digest(&text);
        push_hex(&mut text, &check[..CHECK_BYTES]);
        text
    }

    /// What is stored of it.
    pub fn hash(&self) -> TokenHash {
        Sha256::digest(self.0).into()
    }
}

fn push_hex(text: &mut String, bytes: &[u8]) {
    for byte in bytes {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
    }
}

/// Who acts with a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    key: Uuid,
    user: Uuid,
    role: Role,
    registered_at: i64,
    scopes: Vec<Scope>,
    expires_at: Option<DateTime<Utc>>,
}

impl Machine {
    fn of(holder: &KeyHolder) -> Option<Self> {
        Some(Self {
            key: holder.id,
            user: holder.user,
            role: Role::parse(&holder.role)?,
            registered_at: holder.registered_at.timestamp(),
            scopes: holder
                .scopes
                .iter()
                .filter_map(|word| Scope::parse(word))
                .collect(),
            expires_at: holder.expires_at,
        })
    }

    /// The key, by its id.
    pub fn key(&self) -> Uuid {
        self.key
    }

    /// For whom the key speaks. A scope narrows its user's role and never widens it; no key is an
    /// admin.
    pub fn identity(&self) -> Identity {
        let operates = self.role.operates() && self.scopes.contains(&Scope::Operate);
        Identity {
            user: self.user,
            role: if operates {
                Role::Operator
            } else {
                Role::Buyer
            },
            session: None,
            registered_at: Some(self.registered_at),
        }
    }

    /// Whether the key may do something that takes this scope. Who operates may do the rest, too.
    pub fn may(&self, scope: Scope) -> bool {
        self.identity().role.operates()
            || self.scopes.contains(&scope)
            || faults::bug("scope_ignored")
    }
}

/// A key that was made, in the only moment in which its text is known.
pub struct NewKey {
    /// As it is listed.
    pub row: ApiKeyRow,
    /// What a client sends.
    pub text: String,
}

/// Why no key was made.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The user has as many as a user may have.
    #[error("there are {PER_USER_MAX} keys already: revoke one first")]
    Full,
    /// The user comes from somewhere else.
    #[error("API keys are for users who are registered here")]
    NoUser,
    /// PostgreSQL did not do it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The operating system has no randomness.
    #[error("no randomness: {0}")]
    Random(#[from] rand::rand_core::OsError),
}

/// The keys of all users.
#[derive(Debug)]
pub struct ApiKeys {
    table: ApiKeyTable,
    memory: Mutex<Memory>,
    places: Semaphore,
    asking: Semaphore,
    metrics: IdentityMetrics,
}

#[derive(Debug, Default)]
struct Memory {
    holders: HashMap<TokenHash, Known>,
    /// Keys that there are not, and until when that is believed. Apart from the others, so that a
    /// flood of them does not push one out.
    nobody: HashMap<TokenHash, Instant>,
    /// How often something was forgotten: what was asked before that is not kept after it.
    forgotten: u64,
}

#[derive(Clone, Debug)]
struct Known {
    machine: Arc<Machine>,
    asked_at: Instant,
    ask_at: Instant,
}

impl ApiKeys {
    /// The keys in this table.
    pub fn new(table: ApiKeyTable, metrics: IdentityMetrics) -> Self {
        Self {
            table,
            memory: Mutex::default(),
            places: Semaphore::new(WAITING_MAX),
            asking: Semaphore::new(ASKING_MAX),
            metrics,
        }
    }

    /// Makes a key of `user`.
    ///
    /// # Errors
    /// [`KeyError`].
    pub async fn make(
        &self,
        user: Uuid,
        name: String,
        scopes: &[Scope],
        expires_at: Option<DateTime<Utc>>,
    ) -> Result<NewKey, KeyError> {
        let key = ApiKey::random()?;
        let words = scopes.iter().map(|scope| scope.as_str().to_owned());
        let row = ApiKeyRow {
            id: clock::new_id(),
            name,
            scopes: words.collect(),
            // As it will be stored, so that this answer and later ones agree.
            created_at: clock::now().trunc_subsecs(3),
            expires_at,
            last_used_at: None,
        };
        let added = self.table.add(user, row.clone(), key.hash(), PER_USER_MAX);
        match added.await? {
            Added::Added => Ok(NewKey {
                row,
                text: key.text(),
            }),
            Added::Full => Err(KeyError::Full),
            Added::NoUser => Err(KeyError::NoUser),
        }
    }

    /// The keys of `user`, newest first.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn of_user(&self, user: Uuid) -> Result<Vec<ApiKeyRow>, StoreError> {
        self.table.of_user(user).await
    }

    /// Revokes a key of `user`; `false` when there is no such one. This node refuses it at once,
    /// others within a minute.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn revoke(&self, user: Uuid, id: Uuid) -> Result<bool, StoreError> {
        let done = self.table.delete(user, id).await;
        self.forget(|machine| machine.key == id);
        done
    }

    /// What is known of this user's keys does not hold any more.
    pub fn forget_user(&self, user: Uuid) {
        self.forget(|machine| machine.user == user);
    }

    /// Who acts with this key.
    ///
    /// # Errors
    /// [`BearerError`].
    pub async fn identify(&self, text: &str) -> Result<Arc<Machine>, BearerError> {
        let key = ApiKey::parse(text).ok_or(BearerError::Invalid)?;
        let machine = self.holder(key.hash()).await?;
        let expired = machine.expires_at.is_some_and(|at| at <= clock::now());
        if expired {
            return Err(BearerError::Invalid);
        }
        Ok(machine)
    }

    async fn holder(&self, hash: TokenHash) -> Result<Arc<Machine>, BearerError> {
        if let Some(answer) = self.remembered(&hash) {
            return answer;
        }
        let known = self.lock().holders.get(&hash).cloned();
        let _asking = match known {
            // If somebody else asks: nobody has to wait for that yet.
            Some(known) if known.asked_at.elapsed() < OVERDUE => match self.asking.try_acquire() {
                Ok(turn) => turn,
                Err(_) => return Ok(known.machine),
            },
            _ => {
                let busy = |_| BearerError::Busy;
                let _place = self.places.try_acquire().map_err(busy)?;
                self.asking.acquire().await.map_err(|_| BearerError::Busy)?
            }
        };
        // Perhaps somebody has asked meanwhile.
        if let Some(answer) = self.remembered(&hash) {
            return answer;
        }
        let (asked_at, forgotten) = (Instant::now(), self.lock().forgotten);
        self.metrics.keys_asked.inc();
        match self.table.holder(hash, clock::now()).await {
            Ok(found) => {
                let machine = found.as_ref().and_then(Machine::of).map(Arc::new);
                self.learn(hash, machine.clone(), asked_at, forgotten);
                machine.ok_or(BearerError::Invalid)
            }
            Err(error) => {
                self.metrics.questions_failed.inc();
                self.without_answer(hash, error)
            }
        }
    }

    /// What is known without asking.
    fn remembered(&self, hash: &TokenHash) -> Option<Result<Arc<Machine>, BearerError>> {
        let now = Instant::now();
        let memory = self.lock();
        if let Some(known) = memory.holders.get(hash) {
            return (now < known.ask_at).then(|| Ok(Arc::clone(&known.machine)));
        }
        let until = memory.nobody.get(hash)?;
        (now < *until).then_some(Err(BearerError::Invalid))
    }

    fn learn(
        &self,
        hash: TokenHash,
        machine: Option<Arc<Machine>>,
        asked_at: Instant,
        forgotten: u64,
    ) {
        let mut memory = self.lock();
        memory.holders.remove(&hash);
        // What changed while PostgreSQL was asked may be in the answer or not.
        if memory.forgotten != forgotten {
            return;
        }
        match machine {
            Some(machine) => {
                if memory.holders.len() >= KNOWN_MAX {
                    memory.holders.clear();
                }
                let known = Known {
                    machine,
                    asked_at,
                    ask_at: asked_at + FRESH,
                };
                memory.holders.insert(hash, known);
            }
            None => {
                if memory.nobody.len() >= KNOWN_MAX {
                    memory.nobody.clear();
                }
                memory.nobody.insert(hash, asked_at + FRESH);
            }
        }
    }

    /// PostgreSQL did not answer: what is known goes on for a while.
    fn without_answer(
        &self,
        hash: TokenHash,
        error: StoreError,
    ) -> Result<Arc<Machine>, BearerError> {
        let mut memory = self.lock();
        match memory.holders.get_mut(&hash) {
            Some(known) if known.asked_at.elapsed() < SILENT_MAX => {
                known.ask_at = Instant::now() + PAUSE;
                Ok(Arc::clone(&known.machine))
            }
            _ => Err(BearerError::Store(error)),
        }
    }

    fn forget(&self, which: impl Fn(&Machine) -> bool) {
        let mut memory = self.lock();
        memory.forgotten += 1;
        memory.holders.retain(|_, known| !which(&known.machine));
    }

    fn lock(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Database, DatabaseSettings};

    #[test]
    fn a_key_survives_its_text_and_nothing_else_is_one() {
        let key = ApiKey::random().unwrap();
        let text = key.text();
        assert!(text.starts_with(PREFIX) && text.len() == PREFIX.len() + 72);
        assert_eq!(ApiKey::parse(&text).unwrap().hash(), key.hash());
        let changed = text.replace(&text[20..21], if &text[20..21] == "0" { "1" } else { "0" });
        for bad in [
            "",
            PREFIX,
            &text[1..],
            &text[..text.len() - 1],
            &format!("{text}0"),
            &text.to_uppercase(),
            &text.replacen(PREFIX, "", 1),
            &changed,
            &format!("{PREFIX}{}", "+1".repeat(36)),
            &format!("{PREFIX}{}", "é".repeat(36)),
        ] {
            assert!(ApiKey::parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn a_scope_narrows_and_never_widens() {
        let machine = |role, scopes: &[Scope]| Machine {
            key: Uuid::nil(),
            user: Uuid::nil(),
            role,
            registered_at: 0,
            scopes: scopes.to_vec(),
            expires_at: None,
        };
        for (role, scopes, acts_as, may) in [
            (Role::Buyer, &[Scope::Read][..], Role::Buyer, [true, false]),
            (Role::Buyer, &[Scope::Buy], Role::Buyer, [false, true]),
            (Role::Buyer, &[Scope::Operate], Role::Buyer, [false, false]),
            (Role::Operator, &[Scope::Read], Role::Buyer, [true, false]),
            (
                Role::Operator,
                &[Scope::Operate],
                Role::Operator,
                [true, true],
            ),
            (Role::Admin, &[Scope::Operate], Role::Operator, [true, true]),
        ] {
            let machine = machine(role, scopes);
            assert_eq!(machine.identity().role, acts_as, "{role:?} {scopes:?}");
            let found = [Scope::Read, Scope::Buy].map(|scope| machine.may(scope));
            assert_eq!(found, may, "{role:?} {scopes:?}");
        }
    }

    #[tokio::test]
    async fn a_known_key_goes_on_for_a_while_without_postgresql() {
        let settings = DatabaseSettings {
            acquire_timeout: Duration::from_millis(50),
            ..DatabaseSettings::default()
        };
        let database = Database::new("postgres://nobody@127.0.0.1:9/none", settings).unwrap();
        let metrics = IdentityMetrics::default();
        let keys = ApiKeys::new(ApiKeyTable::new(database), metrics.clone());
        let machine = Arc::new(Machine {
            key: Uuid::from_u128(1),
            user: Uuid::from_u128(2),
            role: Role::Buyer,
            registered_at: 0,
            scopes: vec![Scope::Buy],
            expires_at: None,
        });
        let key = ApiKey::random().unwrap();
        let learnt = |age: Duration| {
            let asked_at = Instant::now().checked_sub(age).unwrap();
            let machine = Some(Arc::clone(&machine));
            let forgotten = keys.lock().forgotten;
            keys.learn(key.hash(), machine, asked_at, forgotten);
        };
        for (age, asked, known) in [
            (Duration::ZERO, 0, true),
            (FRESH, 1, true),
            (OVERDUE, 1, true),
            (SILENT_MAX, 1, false),
        ] {
            learnt(age);
            let before = metrics.keys_asked.get();
            let found = keys.identify(&key.text()).await;
            assert_eq!(found.is_ok(), known, "{age:?}");
            assert_eq!(metrics.keys_asked.get() - before, asked, "{age:?}");
            if known {
                // PostgreSQL is left alone for a moment.
                keys.identify(&key.text()).await.unwrap();
                assert_eq!(metrics.keys_asked.get() - before, asked, "{age:?}");
            }
        }
        learnt(Duration::ZERO);
        keys.forget_user(machine.user);
        let unknown = keys.identify(&key.text()).await;
        assert!(matches!(unknown, Err(BearerError::Store(_))));
    }
}
