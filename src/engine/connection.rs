//! A connection to Redis with the settings that the rules need. The only user of the client
//! library.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use fred::{
    clients::Client,
    interfaces::{ClientLike, EventInterface, LuaInterface},
    types::{
        Builder, ClusterHash, ConnectHandle, CustomCommand, Value,
        config::{Config, ReconnectPolicy, UnresponsiveConfig},
    },
};
use secrecy::{ExposeSecret, SecretString};

use super::{error::EngineError, script::Script};
use crate::domain::limits::CALL_DEADLINE_MS;

/// How long a call may take before its outcome is given up as unknown: the deadline that Redis
/// enforces, and a little for the way back.
const CALL_TIMEOUT: Duration = Duration::from_millis(CALL_DEADLINE_MS.unsigned_abs() + 300);

/// Commands in a row without an answer after which a connection is given up.
const SILENT_MAX: u32 = 3;

/// Commands that may wait inside the client library.
///
/// Lanes send a handful of calls at a time; more than this is a fault.
const BUFFER_MAX: usize = 1024;

/// Where Redis is; may contain a password.
#[derive(Clone, Debug)]
pub struct RedisUrl(pub SecretString);

/// What the server says of its own settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerSettings {
    /// Whether every write is in the file before it is answered.
    pub synced: bool,
    /// The settings that matter, as `name=value`.
    pub facts: Vec<String>,
    /// Settings under which Redis may drop what it must keep.
    pub dangers: Vec<String>,
}

/// One connection, with its own reconnecting and no blind re-sending.
pub(super) struct Connection {
    client: Client,
    task: ConnectHandle,
    /// Commands in a row that got no answer in time.
    silent: AtomicU32,
    /// How often we have given up the socket.
    given_up: AtomicU64,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("id", &self.client.id())
            .finish_non_exhaustive()
    }
}

impl Connection {
    /// Connects, and goes on connecting for ever after the first time.
    ///
    /// `timeout` bounds every command of this connection.
    pub(super) async fn open(url: &RedisUrl, timeout: Duration) -> Result<Arc<Self>, EngineError> {
        let config = Config::from_url(url.0.expose_secret())
            .map_err(|error| EngineError::Refused(format!("REDIS_URL: {error}")))?;
        let client = Builder::from_config(config)
            .with_performance_config(|performance| {
                performance.default_command_timeout = timeout;
            })
            .with_connection_config(|connection| {
                connection.connection_timeout = Duration::from_secs(2);
                connection.internal_command_timeout = Duration::from_secs(2);
                // A write that is sent again might run twice.
                connection.max_command_attempts = 1;
                // These would end the connection, and be the answer to every call under way.
                connection.reconnect_errors.clear();
                connection.max_command_buffer_len = BUFFER_MAX;
                connection.tcp.nodelay = Some(true);
                connection.unresponsive = UnresponsiveConfig {
                    max_timeout: Some(timeout * 2),
                    interval: Duration::from_millis(500),
                };
            })
            .set_policy(ReconnectPolicy::new_exponential(0, 20, 1_000, 2))
            .build()
            .map_err(|error| EngineError::Refused(error.to_string()))?;
        let mut errors = client.error_rx();
        tokio::spawn(async move {
            while let Ok((error, _)) = errors.recv().await {
                tracing::debug!(%error, "connection to Redis");
            }
        });
        let task = client.init().await.map_err(|_| EngineError::Disconnected)?;
        Ok(Arc::new(Self {
            client,
            task,
            silent: AtomicU32::new(0),
            given_up: AtomicU64::new(0),
        }))
    }

    /// Connects with the timeout of script calls.
    pub(super) async fn open_for_calls(url: &RedisUrl) -> Result<Arc<Self>, EngineError> {
        Self::open(url, CALL_TIMEOUT).await
    }

    /// Runs a script by its hash, or by its text when Redis does not know it.
    pub(super) async fn call(
        &self,
        script: &Script,
        keys: Vec<String>,
        arguments: Vec<Bytes>,
    ) -> Result<Vec<Value>, EngineError> {
        // Nothing has been sent when there is no connection, and the answer can say so at once.
        if !self.client.is_connected() {
            return Err(EngineError::Disconnected);
        }
        let arguments: Vec<_> = arguments.into_iter().map(Value::Bytes).collect();
        let (sha, names) = (script.sha.as_str(), keys.clone());
        let socket = self.given_up.load(Ordering::Relaxed);
        let reply = match self.client.evalsha(sha, names, arguments.clone()).await {
            // Redis keeps what it runs. Loading it first would leave room to forget it again.
            Err(error) if error.details().starts_with("NOSCRIPT") => {
                self.client.eval(script.text, keys, arguments).await
            }
            reply => reply,
        };
        self.note(socket, &reply);
        match reply {
            Ok(Value::Array(values)) => Ok(values),
            Ok(other) => Err(EngineError::Protocol(format!(
                "{} gave {other:?}",
                script.name
            ))),
            Err(error) => Err(failure(&error)),
        }
    }

    /// Notes what a reply says of the socket that its command was sent to. One whose other end is
    /// gone without a word looks alive to the client library as long as something is written to it;
    /// and whoever only reads by now was a primary, whose place another has taken.
    fn note<T>(&self, socket: u64, reply: &Result<T, fred::error::Error>) {
        let timed_out = reply
            .as_ref()
            .is_err_and(|error| *error.kind() == fred::error::ErrorKind::Timeout);
        if !timed_out {
            self.silent.store(0, Ordering::Relaxed);
        } else if self.silent.fetch_add(1, Ordering::Relaxed) + 1 >= SILENT_MAX {
            self.silent.store(0, Ordering::Relaxed);
            self.give_up(socket, "Redis does not answer on a connection");
        }
        if reply
            .as_ref()
            .is_err_and(|error| error.details().starts_with("READONLY"))
        {
            self.give_up(socket, "Redis is a replica by now");
        }
    }

    /// Connects anew, unless another command has seen to that since. What is under way gets no
    /// answer.
    fn give_up(&self, socket: u64, reason: &'static str) {
        if self
            .given_up
            .compare_exchange(socket, socket + 1, Ordering::Relaxed, Ordering::Relaxed)
            .is_err()
        {
            return;
        }
        tracing::warn!("{reason}: connecting anew");
        let client = self.client.clone();
        // It ends with the next connection, which may take as long as it likes.
        tokio::spawn(async move {
            if let Err(error) = client.force_reconnection().await {
                tracing::debug!(%error, "connecting anew");
            }
        });
    }

    /// Runs a plain command.
    pub(super) async fn command(
        &self,
        name: &'static str,
        arguments: Vec<Bytes>,
    ) -> Result<Value, EngineError> {
        self.custom(
            CustomCommand::new_static(name, ClusterHash::FirstKey, false),
            arguments,
        )
        .await
    }

    /// Runs a plain command that waits inside Redis, and stalls this connection meanwhile.
    pub(super) async fn blocking_command(
        &self,
        name: &'static str,
        arguments: Vec<Bytes>,
    ) -> Result<Value, EngineError> {
        self.custom(
            CustomCommand::new_static(name, ClusterHash::FirstKey, true),
            arguments,
        )
        .await
    }

    async fn custom(
        &self,
        command: CustomCommand,
        arguments: Vec<Bytes>,
    ) -> Result<Value, EngineError> {
        if !self.client.is_connected() {
            return Err(EngineError::Disconnected);
        }
        let arguments = arguments.into_iter().map(Value::Bytes).collect();
        let socket = self.given_up.load(Ordering::Relaxed);
        let reply = self.client.custom::<Value, Value>(command, arguments).await;
        self.note(socket, &reply);
        reply.map_err(|error| failure(&error))
    }

    /// Reads the settings that decide what an acceptance survives.
    pub(super) async fn settings(&self) -> Result<ServerSettings, EngineError> {
        let mut facts = Vec::new();
        let mut dangers = Vec::new();
        let mut synced = true;
        for (name, wanted) in [
            ("appendonly", "yes"),
            ("appendfsync", "always"),
            ("no-appendfsync-on-rewrite", "no"),
            ("maxmemory-policy", "noeviction"),
        ] {
            let arguments = vec![
                Bytes::from_static(b"GET"),
                Bytes::from_static(name.as_bytes()),
            ];
            let value = match self.command("CONFIG", arguments).await? {
                Value::Array(pair) => pair.get(1).and_then(Value::as_string).unwrap_or_default(),
                Value::Map(map) => map
                    .inner()
                    .values()
                    .next()
                    .and_then(Value::as_string)
                    .unwrap_or_default(),
                _ => String::new(),
            };
            if value != wanted {
                if name == "maxmemory-policy" {
                    dangers.push(format!("{name} is {value}, must be {wanted}"));
                } else {
                    synced = false;
                }
            }
            facts.push(format!("{name}={value}"));
        }
        Ok(ServerSettings {
            synced,
            facts,
            dangers,
        })
    }
}

impl Drop for Connection {
    /// Closes the socket: the task owns it.
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What an error of the client library says about the effect of a command.
fn failure(error: &fred::error::Error) -> EngineError {
    let details = error.details();
    let code = details.split_whitespace().next().unwrap_or_default();
    match code {
        // Redis answers these instead of running the script, or at its first write. CLUSTERDOWN is
        // not one of them: the client library gives one call's to every call under way.
        "OOM" | "MISCONF" | "LOADING" | "READONLY" | "BUSY" | "NOREPLICAS" | "NOSCRIPT"
        | "MASTERDOWN" | "MOVED" | "ASK" | "TRYAGAIN" | "NOAUTH" | "NOPERM" | "WRONGPASS" => {
            EngineError::Refused(details.to_owned())
        }
        _ if *error.kind() == fred::error::ErrorKind::Backpressure => EngineError::Disconnected,
        _ => EngineError::Unknown(error.to_string()),
    }
}
