//! The Redis that holds what may be lost: a connection of its own, so that nothing that sells ever
//! waits for it, and no error, because whoever asks can do without.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use fred::types::Value;

use super::{
    connection::{Connection, RedisUrl},
    error::EngineError,
    script::Script,
};

/// How long anybody waits for it. What it saves takes about as long.
const TIMEOUT: Duration = Duration::from_millis(100);

/// How long it is left alone after it has failed, so that one that hangs costs one wait.
const REST: Duration = Duration::from_secs(1);

/// The largest value, in bytes: larger ones would push everything else out.
const VALUE_BYTES_MAX: usize = 256 * 1024;

/// What may be lost. Cheap to clone.
#[derive(Clone, Default)]
pub struct Cache(Option<Arc<Inner>>);

/// What was spent of an allowance.
#[derive(Clone, Debug)]
pub struct Spent {
    /// Whose, and of which.
    pub key: String,
    /// The time that it takes to come back, in microseconds.
    pub spent_us: u64,
    /// The time in which all of the allowance comes back.
    pub whole_us: u64,
}

struct Inner {
    connection: Arc<Connection>,
    limit: Script,
    born: Instant,
    /// Until when it is left alone: milliseconds since `born`.
    rests_until: AtomicU64,
    /// Whether it has been told that the server does not let us in.
    told: AtomicBool,
}

/// As Redis knows it: all of ours begin alike, so that a user can be given nothing else.
fn name(key: &str) -> String {
    format!("stockade:{key}")
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() {
            "Cache"
        } else {
            "no Cache"
        })
    }
}

impl Cache {
    /// The cache there, or one that holds nothing without an address. Waits for nothing: it
    /// connects when the server is there, again and again.
    ///
    /// # Errors
    /// When the address cannot be read.
    pub fn connect(url: Option<&RedisUrl>) -> Result<Self, EngineError> {
        let Some(url) = url else {
            return Ok(Self(None));
        };
        Ok(Self(Some(Arc::new(Inner {
            connection: Connection::open_in_time(url, TIMEOUT)?,
            limit: Script::limit(),
            born: Instant::now(),
            rests_until: AtomicU64::new(0),
            told: AtomicBool::new(false),
        }))))
    }

    /// What was put there, if it is still there and the server answers.
    pub async fn get(&self, key: &str) -> Option<Bytes> {
        let key = Bytes::from(name(key));
        match self.ask("GET", vec![key]).await? {
            Value::Bytes(bytes) => Some(bytes),
            Value::String(text) => Some(text.into_inner()),
            _ => None,
        }
    }

    /// Puts something there for `life`, if the server takes it; whether it says so.
    pub async fn put(&self, key: &str, value: Bytes, life: Duration) -> bool {
        if value.len() > VALUE_BYTES_MAX {
            return false;
        }
        let key = Bytes::from(name(key));
        let seconds = Bytes::from(life.as_secs().max(1).to_string());
        self.ask("SET", vec![key, value, Bytes::from_static(b"EX"), seconds])
            .await
            .is_some()
    }

    /// Puts something there that can be taken once within `life`, under this very name; whether the
    /// server says so.
    pub async fn offer(&self, name: &str, life: Duration) -> bool {
        let seconds = Bytes::from(life.as_secs().max(1).to_string());
        let name = Bytes::copy_from_slice(name.as_bytes());
        let [there, expires] = [Bytes::from_static(b"1"), Bytes::from_static(b"EX")];
        self.ask("SET", vec![name, there, expires, seconds])
            .await
            .is_some()
    }

    /// Takes what was offered: whether it was still there, which is told once, whoever asks. `None`
    /// when the server does not say.
    pub async fn take(&self, name: &str) -> Option<bool> {
        let words: [&[u8]; 5] = [name.as_bytes(), b"0", b"XX", b"KEEPTTL", b"GET"];
        let words = words.map(Bytes::copy_from_slice).to_vec();
        let before = self.ask("SET", words).await?;
        Some(before.as_bytes() == Some(b"1"))
    }

    /// Adds to what all nodes have spent. For each of them: microseconds until it is whole again.
    pub async fn spend(&self, spent: &[Spent]) -> Option<Vec<u64>> {
        let inner = self.0.as_deref()?;
        let keys = spent.iter().map(|spent| name(&spent.key)).collect();
        let arguments = spent
            .iter()
            .flat_map(|spent| [spent.spent_us, spent.whole_us])
            .map(|number| Bytes::from(number.to_string()))
            .collect();
        let call = inner.connection.call(&inner.limit, keys, arguments);
        let gone = inner.in_time(call).await?;
        gone.iter().map(Value::as_u64).collect()
    }

    async fn ask(&self, name: &'static str, arguments: Vec<Bytes>) -> Option<Value> {
        let inner = self.0.as_deref()?;
        let asked = inner.connection.command(name, arguments);
        inner.in_time(asked).await
    }

    /// Whether there is a server to ask at all.
    pub fn is_configured(&self) -> bool {
        self.0.is_some()
    }
}

impl Inner {
    /// What the server answers, unless it is left alone or takes too long.
    async fn in_time<T>(&self, asked: impl Future<Output = Result<T, EngineError>>) -> Option<T> {
        let now = u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX);
        if now < self.rests_until.load(Ordering::Relaxed) {
            return None;
        }
        // The client's own timeout begins when it writes.
        match tokio::time::timeout(TIMEOUT, asked).await {
            Ok(Ok(value)) => {
                self.told.store(false, Ordering::Relaxed);
                Some(value)
            }
            failed => {
                let rest = now + u64::try_from(REST.as_millis()).unwrap_or(u64::MAX);
                self.rests_until.store(rest, Ordering::Relaxed);
                match failed {
                    Ok(Err(error @ EngineError::Refused(_)))
                        if !self.told.swap(true, Ordering::Relaxed) =>
                    {
                        tracing::warn!(%error, "the cache Redis, at CACHE_REDIS_URL");
                    }
                    Ok(Err(error)) => tracing::debug!(%error, "the cache"),
                    Ok(Ok(_)) | Err(_) => {}
                }
                None
            }
        }
    }
}
