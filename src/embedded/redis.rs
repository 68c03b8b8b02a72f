//! A `redis-server` of our own.

use std::fmt::Write;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::{Pid, Signal};
use secrecy::{ExposeSecret, SecretString};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use super::process::Recipe;
use super::server::{Readiness, Server, Service};
use super::{EmbeddedError, binaries, directory, io_error, ports, secrets};

/// Ports tried when others keep taking the one just picked.
const PORT_TRIES: usize = 5;
/// What one look at a starting server may take.
const PROBE_WITHIN: Duration = Duration::from_secs(1);

/// What a Redis is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RedisRole {
    /// It decides: every write is on disk before its answer, nothing is ever evicted.
    Journal,
    /// It holds what may be lost: nothing is on disk, the least used is evicted.
    Cache {
        /// Memory in MiB.
        memory_mib: u32,
    },
}

/// How to start a [`RedisServer`].
#[derive(Clone, Debug)]
pub struct RedisOptions {
    /// Its directory, created if absent; no other server's.
    pub dir: PathBuf,
    /// What it is for.
    pub role: RedisRole,
    /// The port to take if it is free; otherwise one is picked.
    pub port: Option<u16>,
    /// The password of its user `default`.
    pub password: SecretString,
    /// Its log; `redis.log` in its directory if unset.
    pub log: Option<PathBuf>,
    /// Lines of `redis.conf` after ours, so they win: `("maxmemory", "1mb")`.
    pub settings: Vec<(String, String)>,
    /// Variables of its environment, which is empty otherwise: for tests.
    pub environment: Vec<(String, String)>,
    /// Nobody needs its data once we are gone: it is killed when dropped, and when we die.
    pub throwaway: bool,
}

impl RedisOptions {
    /// A server in a directory, with a random password.
    pub fn new(dir: impl Into<PathBuf>, role: RedisRole) -> Self {
        Self {
            dir: dir.into(),
            role,
            port: None,
            password: secrets::random(),
            log: None,
            settings: Vec::new(),
            environment: Vec::new(),
            throwaway: false,
        }
    }
}

/// A running Redis (or Valkey) on a loopback port of its own. Nothing supervises it.
#[derive(Debug)]
pub struct RedisServer {
    server: Server<Redis>,
    url: SecretString,
}

impl RedisServer {
    /// Starts it and waits until it answers.
    pub async fn start(options: RedisOptions) -> Result<Self, EmbeddedError> {
        let program = binaries::redis_server()?;
        directory(&options.dir, 0o700)?;
        // The server's working directory is how it is recognised later, and the kernel knows only real paths.
        let dir = options
            .dir
            .canonicalize()
            .map_err(io_error("open", &options.dir))?;
        let mut last_port = options.port;
        let mut tries = 1;
        loop {
            let port = ports::pick(last_port).map_err(io_error("pick a port for", &dir))?;
            let redis = Redis {
                program: program.clone(),
                dir: dir.clone(),
                port,
                options: options.clone(),
            };
            let url = format!(
                "redis://default:{}@127.0.0.1:{port}",
                options.password.expose_secret()
            );
            match Server::start(redis).await {
                Ok(server) => {
                    return Ok(Self {
                        server,
                        url: SecretString::from(url),
                    });
                }
                Err(EmbeddedError::Exited { .. })
                    if tries < PORT_TRIES && !ports::is_free(port) =>
                {
                    last_port = None;
                    tries += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Its address with its password; the same after a restart.
    pub fn url(&self) -> &SecretString {
        &self.url
    }

    /// Its port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.server.service().port
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.server.pid()
    }

    /// Sends its process a signal.
    pub fn signal(&self, signal: Signal) {
        self.server.signal(signal);
    }

    /// Ends it as a crash would (SIGKILL), and waits until it is gone.
    pub async fn kill(&self) {
        self.server.kill().await;
    }

    /// Stops it in order, and waits until it is gone.
    pub async fn stop(&self) {
        self.server.stop().await;
    }

    /// Starts it again on the same port and data, after stopping it if it still runs.
    pub async fn restart(&mut self) -> Result<(), EmbeddedError> {
        self.server.stop().await;
        self.server.start_again().await
    }

    pub(super) fn into_server(self) -> Server<Redis> {
        self.server
    }
}

/// How large the append-only file becomes before Redis rewrites it: a rewrite takes a core for
/// seconds, in the middle of a drop. This much, over a million orders, is read in some seconds at a
/// start; Redis' own default of 64 MiB is reached, and doubled, several times in one drop.
const REWRITE_MIN_MIB: u32 = 512;

#[derive(Debug)]
pub(super) struct Redis {
    program: PathBuf,
    dir: PathBuf,
    port: u16,
    options: RedisOptions,
}

impl Redis {
    fn configuration(&self) -> String {
        let mut text = format!(
            "bind 127.0.0.1\nport {}\ndir {}\nrequirepass {}\ndatabases 1\ndaemonize no\nsave \"\"\n",
            self.port,
            quoted(&self.dir.to_string_lossy()),
            self.options.password.expose_secret(),
        );
        // Writing into a String cannot fail.
        let _written = match self.options.role {
            RedisRole::Journal => writeln!(
                text,
                "appendonly yes\nappendfsync always\nno-appendfsync-on-rewrite no\n\
                 auto-aof-rewrite-min-size {REWRITE_MIN_MIB}mb\nmaxmemory-policy noeviction"
            ),
            RedisRole::Cache { memory_mib } => {
                writeln!(
                    text,
                    "appendonly no\nmaxmemory {memory_mib}mb\nmaxmemory-policy allkeys-lru"
                )
            }
        };
        for (name, value) in &self.options.settings {
            let _written = writeln!(text, "{name} {}", quoted(value));
        }
        text
    }
}

impl Service for Redis {
    const NAME: &'static str = "redis-server";
    const STOP: Signal = Signal::TERM;
    const FORCE: Signal = Signal::KILL;

    /// The password goes by a file: arguments are everybody's to read.
    fn recipe(&self) -> Result<Recipe, EmbeddedError> {
        let file = self.dir.join("redis.conf");
        let configuration = self.configuration();
        // Left alone if it is right: a restart on a full disk must not need room.
        if std::fs::read_to_string(&file).ok().as_ref() != Some(&configuration) {
            secrets::write_closed(&file, &configuration)?;
        }
        Ok(Recipe {
            program: self.program.clone(),
            arguments: vec![file.into_os_string()],
            directory: self.dir.clone(),
            user: None,
            environment: self.options.environment.clone(),
            log: self
                .options
                .log
                .clone()
                .unwrap_or_else(|| self.dir.join("redis.log")),
            orphaned: if self.options.throwaway {
                Signal::KILL
            } else {
                Signal::TERM
            },
        })
    }

    async fn probe(&self, _pid: Pid) -> Readiness {
        let ping = ping(self.port, self.options.password.expose_secret());
        match tokio::time::timeout(PROBE_WITHIN, ping).await {
            Ok(Ok(readiness)) => readiness,
            Ok(Err(_)) | Err(_) => Readiness::Silent,
        }
    }
}

/// Asks for a PONG by the protocol's inline commands. A wrong password means that somebody else has the port.
async fn ping(port: u16, password: &str) -> std::io::Result<Readiness> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
    stream
        .write_all(format!("AUTH {password}\r\nPING\r\n").as_bytes())
        .await?;
    let mut replies = BufReader::new(stream).lines();
    let auth = replies.next_line().await?.unwrap_or_default();
    if !auth.starts_with("+OK") {
        return Ok(Readiness::Silent);
    }
    let pong = replies.next_line().await?.unwrap_or_default();
    Ok(if pong.starts_with("+PONG") {
        Readiness::Ready
    } else if pong.starts_with("-LOADING") {
        Readiness::Loading
    } else {
        Readiness::Silent
    })
}

/// As `redis.conf` quotes a value.
fn quoted(value: &str) -> String {
    format!("\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""))
}
