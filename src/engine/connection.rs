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
    error::{Error, ErrorKind},
    interfaces::{ClientLike, EventInterface, LuaInterface},
    types::{
        Builder, ClusterHash, ConnectHandle, CustomCommand, Value,
        config::{Config, ReconnectPolicy, UnresponsiveConfig},
    },
};
use secrecy::{ExposeSecret, SecretString};

use super::{error::EngineError, script::Script};
use crate::domain::{
    durability::{File, RedisConfig, RedisSettings},
    limits::{CALL_DEADLINE_MS, REPLICAS_WAIT_MS},
};

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
        let client = client(url, timeout, true)?;
        match client.init().await {
            Ok(task) => Ok(Self::of(client, task)),
            Err(error) if *error.kind() == ErrorKind::Auth => Err(failure(&error)),
            Err(_) => Err(EngineError::Disconnected),
        }
    }

    /// Goes on connecting for ever, and waits for nothing: to a server that may be away.
    pub(super) fn open_in_time(
        url: &RedisUrl,
        timeout: Duration,
    ) -> Result<Arc<Self>, EngineError> {
        let client = client(url, timeout, false)?;
        let task = client.connect();
        Ok(Self::of(client, task))
    }

    fn of(client: Client, task: ConnectHandle) -> Arc<Self> {
        Arc::new(Self {
            client,
            task,
            silent: AtomicU32::new(0),
            given_up: AtomicU64::new(0),
        })
    }

    /// Connects with the timeout of script calls.
    pub(super) async fn open_for_calls(url: &RedisUrl) -> Result<Arc<Self>, EngineError> {
        Self::open(url, CALL_TIMEOUT).await
    }

    /// Connects with the timeout of script calls that wait for replicas.
    pub(super) async fn open_for_replicated_calls(
        url: &RedisUrl,
    ) -> Result<Arc<Self>, EngineError> {
        Self::open(url, CALL_TIMEOUT + Duration::from_millis(REPLICAS_WAIT_MS)).await
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

    /// Runs a script, and gives how many of `replicas` have what it answered from: all of it in one
    /// go on one connection, since WAIT speaks of its own connection's writes.
    ///
    /// A script that only read has written nothing to wait for, and newer servers would answer at
    /// once; so something is published on `channel`, which replicas get after all that was before.
    pub(super) async fn call_replicated(
        &self,
        script: &Script,
        keys: &[String],
        arguments: &[Bytes],
        replicas: u32,
        channel: String,
    ) -> Result<(Vec<Value>, u32), EngineError> {
        if !self.client.is_connected() {
            return Err(EngineError::Disconnected);
        }
        let script_name = script.name;
        let run = async |name: &'static str, text: &str| {
            let pipeline = self.client.pipeline();
            let mut script = vec![Value::from(text), Value::from(keys.len().to_string())];
            script.extend(keys.iter().map(|key| Value::from(key.as_str())));
            script.extend(arguments.iter().cloned().map(Value::Bytes));
            let publish = vec![Value::from(channel.as_str()), Value::from_static_str("")];
            let wait = vec![
                Value::from(replicas.to_string()),
                Value::from(REPLICAS_WAIT_MS.to_string()),
            ];
            for (name, arguments) in [(name, script), ("PUBLISH", publish), ("WAIT", wait)] {
                let command = CustomCommand::new_static(name, ClusterHash::FirstKey, false);
                // Nothing is sent yet.
                let queued = pipeline.custom::<Value, Value>(command, arguments).await;
                queued.map_err(|error| EngineError::Refused(error.to_string()))?;
            }
            let socket = self.given_up.load(Ordering::Relaxed);
            let results = pipeline.try_all::<Value>().await;
            for result in &results {
                self.note(socket, result);
            }
            replicated(script_name, results)
        };
        match run("EVALSHA", &script.sha).await? {
            Some(done) => Ok(done),
            None => run("EVAL", script.text)
                .await?
                .ok_or_else(|| EngineError::Protocol(format!("{} is unknown", script.name))),
        }
    }

    /// Notes what a reply says of the socket that its command was sent to. One whose other end is
    /// gone without a word looks alive to the client library as long as something is written to it;
    /// and whoever only reads by now was a primary, whose place another has taken.
    fn note<T>(&self, socket: u64, reply: &Result<T, Error>) {
        let timed_out = reply
            .as_ref()
            .is_err_and(|error| *error.kind() == ErrorKind::Timeout);
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
    pub(super) async fn settings(&self) -> Result<RedisSettings, EngineError> {
        let sections = ["memory", "persistence", "replication"];
        let info = self.command("INFO", words(&sections)).await?;
        let info = info.as_string().unwrap_or_default();
        let file = match field(&info, "aof_enabled") {
            "1" => File::On {
                rewriting: field(&info, "aof_rewrite_in_progress") != "0"
                    || field(&info, "aof_rewrite_scheduled") != "0",
            },
            _ => File::Off,
        };
        Ok(RedisSettings {
            file,
            policy: field(&info, "maxmemory_policy").to_owned(),
            // Redis counts them only if it refuses to write without them.
            replicas: field(&info, "min_slaves_good_slaves").parse().unwrap_or(0),
            config: self.config().await?,
        })
    }

    /// What only `CONFIG` says; `None` when this caller may not ask.
    async fn config(&self) -> Result<Option<RedisConfig>, EngineError> {
        let names = [
            "GET",
            "appendfsync",
            "no-appendfsync-on-rewrite",
            "min-replicas-to-write",
            "min-replicas-max-lag",
        ];
        let pairs: Vec<_> = match self.command("CONFIG", words(&names)).await {
            Ok(Value::Array(values)) => values
                .chunks(2)
                .filter_map(|pair| Some((pair.first()?.as_string()?, pair.get(1)?.as_string()?)))
                .collect(),
            Ok(Value::Map(map)) => map
                .inner()
                .into_iter()
                .filter_map(|(name, value)| Some((name.into_string()?, value.into_string()?)))
                .collect(),
            Ok(other) => return Err(EngineError::Protocol(format!("CONFIG gave {other:?}"))),
            Err(EngineError::Refused(reason)) if reason.starts_with("NOPERM") => return Ok(None),
            Err(EngineError::Unknown(reason)) if reason.contains("unknown command") => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let value = |name| {
            let found = pairs.iter().find(|(known, _)| known == name);
            found.map(|(_, value)| value.clone())
        };
        // A managed server may show only some of them.
        Ok(value("appendfsync").map(|sync| RedisConfig {
            sync,
            no_sync_on_rewrite: value("no-appendfsync-on-rewrite").unwrap_or_default(),
            replicas_min: number(value("min-replicas-to-write")),
            lag_max: number(value("min-replicas-max-lag")),
        }))
    }
}

/// A client that is not connected yet; `fail_fast` gives up if the first attempt fails.
fn client(url: &RedisUrl, timeout: Duration, fail_fast: bool) -> Result<Client, EngineError> {
    let mut config = Config::from_url(url.0.expose_secret())
        .map_err(|error| EngineError::Refused(format!("the address of Redis: {error}")))?;
    config.fail_fast = fail_fast;
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
    Ok(client)
}

fn number(text: Option<String>) -> u32 {
    text.and_then(|text| text.parse().ok()).unwrap_or(0)
}

fn words(words: &[&'static str]) -> Vec<Bytes> {
    let bytes = |word: &&'static str| Bytes::from_static(word.as_bytes());
    words.iter().map(bytes).collect()
}

/// The value of a line of `INFO`; empty when there is no such line.
fn field<'a>(info: &'a str, name: &str) -> &'a str {
    info.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .unwrap_or_default()
}

/// What came of a script, a PUBLISH and a WAIT that were sent together: the script's reply and how
/// many replicas have it; `None` when Redis does not know the script.
fn replicated(
    name: &str,
    results: Vec<Result<Value, Error>>,
) -> Result<Option<(Vec<Value>, u32)>, EngineError> {
    let [script, published, waited] = match <[_; 3]>::try_from(results) {
        Ok(results) => results,
        // One error for all three: nobody knows which of them Redis has got. What an error of a
        // single command would say about its effect, this one does not.
        Err(results) => {
            return Err(match results.into_iter().find_map(Result::err) {
                Some(error) if *error.kind() == ErrorKind::Backpressure => {
                    EngineError::Disconnected
                }
                Some(error) => EngineError::Unknown(error.to_string()),
                None => EngineError::Protocol(format!("{name}: not three replies")),
            });
        }
    };
    let reply = match script {
        Ok(Value::Array(values)) => values,
        Ok(other) => return Err(EngineError::Protocol(format!("{name} gave {other:?}"))),
        Err(error) if error.details().starts_with("NOSCRIPT") => return Ok(None),
        Err(error) => return Err(failure(&error)),
    };
    // Without the PUBLISH there is nothing that the WAIT could speak of.
    let acks = match (published, waited) {
        (Ok(_), Ok(acks)) => acks.as_u64().and_then(|acks| acks.try_into().ok()),
        (Err(error), _) | (_, Err(error)) => {
            tracing::warn!(%error, "replicas could not be waited for");
            None
        }
    };
    Ok(Some((reply, acks.unwrap_or(0))))
}

impl Drop for Connection {
    /// Closes the socket: the task owns it.
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What an error of the client library says about the effect of a command.
fn failure(error: &Error) -> EngineError {
    let details = error.details();
    let code = details.split_whitespace().next().unwrap_or_default();
    match code {
        // Redis answers these instead of running the script, or at its first write. CLUSTERDOWN is
        // not one of them: the client library gives one call's to every call under way.
        "OOM" | "MISCONF" | "LOADING" | "READONLY" | "BUSY" | "NOREPLICAS" | "NOSCRIPT"
        | "MASTERDOWN" | "MOVED" | "ASK" | "TRYAGAIN" => EngineError::Refused(details.to_owned()),
        // Before a script begins. What is denied inside of one begins with ERR, like its own errors.
        "NOAUTH" | "NOPERM" | "WRONGPASS" => EngineError::denied(details),
        _ if *error.kind() == ErrorKind::Backpressure => EngineError::Disconnected,
        _ => EngineError::Unknown(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Reply = Result<Value, Error>;

    fn refused(details: &'static str) -> Error {
        Error::new(ErrorKind::Unknown, details)
    }

    fn said() -> Value {
        Value::Array(vec![Value::from("ok")])
    }

    /// Three replies, each an error or a value.
    fn three(script: Reply, published: Reply, acks: Reply) -> Vec<Reply> {
        vec![script, published, acks]
    }

    #[test]
    fn replies_of_a_script_and_its_wait_are_told_apart() {
        let done = |acks| Ok(Some((vec![Value::from("ok")], acks)));
        let (no, yes) = (
            |details| Err(refused(details)),
            |number: i64| Ok(Value::Integer(number)),
        );
        for (results, expected) in [
            (three(Ok(said()), yes(0), yes(2)), done(2)),
            (three(Ok(said()), yes(3), yes(0)), done(0)),
            // Whatever WAIT says: nothing was published, so it speaks of something older.
            (three(Ok(said()), no("NOPERM channel"), yes(2)), done(0)),
            (three(Ok(said()), yes(0), no("ERR")), done(0)),
            (three(Ok(said()), yes(0), yes(-1)), done(0)),
            (three(no("NOSCRIPT x"), yes(0), yes(2)), Ok(None)),
        ] {
            assert_eq!(replicated("purchase", results), expected);
        }
    }

    #[test]
    fn only_a_refusal_of_the_script_itself_says_that_it_did_not_run() {
        let alone = |error| replicated("purchase", vec![Err(error)]).unwrap_err();
        let first = |details| {
            let (published, acks) = (Ok(Value::Integer(0)), Ok(Value::Integer(1)));
            replicated("purchase", three(Err(refused(details)), published, acks)).unwrap_err()
        };
        assert!(!first("NOREPLICAS Not enough good replicas").may_have_run());
        assert!(!first("OOM command not allowed").may_have_run());
        assert!(first("ERR user_script:1").may_have_run());
        let inside = "ERR The user executing the script can't run this command script: 9f, on @user_script:1.";
        assert!(first(inside).may_have_run());
        assert!(
            !first("NOPERM this user has no permissions to run the 'evalsha' command")
                .may_have_run()
        );
        // Alone, the same words may be about the second or third command.
        for details in ["NOREPLICAS", "LOADING", "READONLY", "NOSCRIPT", "anything"] {
            assert!(alone(refused(details)).may_have_run(), "{details}");
        }
        assert!(alone(Error::new(ErrorKind::Timeout, "late")).may_have_run());
        assert!(alone(Error::new(ErrorKind::Canceled, "closed")).may_have_run());
        let full = Error::new(ErrorKind::Backpressure, "full");
        assert_eq!(alone(full), EngineError::Disconnected);
        for results in [vec![], vec![Ok(said()), Ok(Value::Integer(0))]] {
            assert!(replicated("purchase", results).unwrap_err().may_have_run());
        }
    }
}
