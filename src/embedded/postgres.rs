//! A PostgreSQL cluster of our own.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal};
use secrecy::{ExposeSecret, SecretString};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::process::Recipe;
use super::server::{Readiness, Server, Service};
use super::user::{self, User};
use super::{EmbeddedError, binaries, directory, io_error, orphans, ports, secrets};

/// Ports tried when others keep taking the one just picked.
const PORT_TRIES: usize = 5;
/// What PostgreSQL's children may take to notice that their postmaster died.
const CHILDREN_GONE_WITHIN: Duration = Duration::from_secs(10);
/// The superuser, and the database.
const NAME: &str = "stockade";
/// Who may come in: only over loopback, only with the password, since other users share the machine.
const HBA: &str = "host all all 127.0.0.1/32 scram-sha-256\n";

/// How to start a [`PostgresServer`].
#[derive(Clone, Debug)]
pub struct PostgresOptions {
    /// The cluster's directory, made by `initdb` if absent; its parent must be one that the user may enter
    /// that PostgreSQL runs as when we are root.
    pub dir: PathBuf,
    /// The port to take if it is free; otherwise one is picked.
    pub port: Option<u16>,
    /// The superuser's password, fixed when the cluster is made.
    pub password: SecretString,
    /// Its log; `<dir>.log` if unset.
    pub log: Option<PathBuf>,
    /// Settings after ours, so they win: `("max_connections", "300")`.
    pub settings: Vec<(String, String)>,
    /// Variables of its environment, which is empty otherwise: for tests.
    pub environment: Vec<(String, String)>,
    /// Nobody needs its data once we are gone: nothing is synced to disk, and it ends at once when dropped
    /// and when we die.
    pub throwaway: bool,
}

impl PostgresOptions {
    /// A cluster in a directory, with a random password.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            port: None,
            password: secrets::random(),
            log: None,
            settings: Vec::new(),
            environment: Vec::new(),
            throwaway: false,
        }
    }
}

/// A running PostgreSQL on a loopback port of its own. Nothing supervises it.
#[derive(Debug)]
pub struct PostgresServer {
    server: Server<Postgres>,
    url: SecretString,
}

impl PostgresServer {
    /// Makes the cluster if there is none, starts it and waits until it takes connections.
    pub async fn start(options: PostgresOptions) -> Result<Self, EmbeddedError> {
        let user = user::unprivileged()?;
        let parent = options.dir.parent().unwrap_or(Path::new("/"));
        directory(parent, 0o711)?;
        let parent = parent.canonicalize().map_err(io_error("open", parent))?;
        if let Some(user) = &user
            && !user.can_enter(&parent).await?
        {
            return Err(EmbeddedError::Unreachable {
                user: user.name.clone(),
                path: parent,
            });
        }
        let dir = parent.join(options.dir.file_name().unwrap_or_default());
        let made_by = fs::read_to_string(dir.join("PG_VERSION")).ok();
        let programs = binaries::postgres(made_by.as_deref().map(str::trim))?;
        if made_by.is_none() {
            initialise(&programs, &dir, user.as_ref(), &options).await?;
        }
        let mut last_port = options.port;
        let mut tries = 1;
        loop {
            let port = ports::pick(last_port).map_err(io_error("pick a port for", &dir))?;
            let postgres = Postgres {
                program: programs.postgres.clone(),
                dir: dir.clone(),
                user: user.clone(),
                port,
                options: options.clone(),
            };
            let password = options.password.expose_secret();
            let url = format!("postgres://{NAME}:{password}@127.0.0.1:{port}/{NAME}");
            match Server::start(postgres).await {
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

    /// The address of its database, as superuser, with the password; the same after a restart.
    pub fn url(&self) -> &SecretString {
        &self.url
    }

    /// Its port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.server.service().port
    }

    /// The process id of its postmaster.
    pub fn pid(&self) -> u32 {
        self.server.pid()
    }

    /// Sends its postmaster a signal.
    pub fn signal(&self, signal: Signal) {
        self.server.signal(signal);
    }

    /// Ends its postmaster as a crash would (SIGKILL), and waits until it and its children are gone: while one
    /// of them lives, another postmaster refuses to start.
    pub async fn kill(&self) {
        self.server.kill().await;
        orphans::gone(&[self.server.service().dir.clone()], CHILDREN_GONE_WITHIN).await;
    }

    /// Stops it by its fast shutdown, and waits until it is gone.
    pub async fn stop(&self) {
        self.server.stop().await;
    }

    /// Starts it again on the same port and data, after stopping it if it still runs.
    pub async fn restart(&mut self) -> Result<(), EmbeddedError> {
        self.server.stop().await;
        self.server.start_again().await
    }

    pub(super) fn into_server(self) -> Server<Postgres> {
        self.server
    }
}

#[derive(Debug)]
pub(super) struct Postgres {
    program: PathBuf,
    dir: PathBuf,
    user: Option<User>,
    port: u16,
    options: PostgresOptions,
}

impl Service for Postgres {
    const NAME: &'static str = "postgres";
    /// Fast: sessions are ended, everything is written.
    const STOP: Signal = Signal::INT;
    /// Immediate: the next start recovers from the log.
    const FORCE: Signal = Signal::QUIT;

    fn recipe(&self) -> Result<Recipe, EmbeddedError> {
        let mut settings = vec![
            "listen_addresses=127.0.0.1".to_owned(),
            format!("port={}", self.port),
            "unix_socket_directories=".to_owned(),
            "timezone=UTC".to_owned(),
            "log_timezone=UTC".to_owned(),
            "log_checkpoints=off".to_owned(),
        ];
        if self.options.throwaway {
            settings.extend(
                [
                    "fsync=off",
                    "synchronous_commit=off",
                    "full_page_writes=off",
                ]
                .map(str::to_owned),
            );
        }
        settings.extend(
            self.options
                .settings
                .iter()
                .map(|(name, value)| format!("{name}={value}")),
        );
        let mut arguments: Vec<OsString> = vec!["-D".into(), self.dir.clone().into_os_string()];
        for setting in settings {
            arguments.extend(["-c".into(), setting.into()]);
        }
        Ok(Recipe {
            program: self.program.clone(),
            arguments,
            directory: self.dir.clone(),
            user: self.user.clone(),
            environment: self.options.environment.clone(),
            log: self
                .options
                .log
                .clone()
                .unwrap_or_else(|| self.dir.with_added_extension("log")),
            orphaned: if self.options.throwaway {
                Signal::QUIT
            } else {
                Signal::INT
            },
        })
    }

    /// The postmaster writes its state into its pid file, as `pg_ctl` reads it too.
    async fn probe(&self, pid: Pid) -> Readiness {
        let Ok(text) = fs::read_to_string(self.dir.join("postmaster.pid")) else {
            return Readiness::Silent;
        };
        let mut lines = text.lines().map(str::trim);
        if lines.next().and_then(|line| line.parse().ok()) != Some(pid.as_raw_nonzero().get()) {
            return Readiness::Silent;
        }
        match lines.nth(6) {
            Some("ready") => Readiness::Ready,
            Some("starting") => Readiness::Loading,
            _ => Readiness::Silent,
        }
    }
}

/// Removes the pid file of a postmaster that is dead for certain: its number may be another process's by now,
/// and PostgreSQL would then refuse to start. Call it only when nothing runs in the cluster.
pub(super) fn forget_dead_postmaster(dir: &Path) -> Result<(), EmbeddedError> {
    let path = dir.join("postmaster.pid");
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(io_error("remove", &path)(error))
        }
        _ => Ok(()),
    }
}

/// Makes a cluster beside its place and moves it there when it is whole, so that a crash leaves none or all.
///
/// User and database are made by PostgreSQL's single-user mode: no server runs before the password is set.
async fn initialise(
    programs: &binaries::Postgres,
    dir: &Path,
    user: Option<&User>,
    options: &PostgresOptions,
) -> Result<(), EmbeddedError> {
    let unfinished = dir.with_added_extension("new");
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished).map_err(io_error("remove", &unfinished))?;
    }
    directory(&unfinished, 0o700)?;
    if let Some(user) = user {
        user.own(&unfinished)?;
    }
    let mut initdb = as_user(&programs.initdb, user)?;
    initdb.arg("-D").arg(&unfinished).args([
        "--username",
        NAME,
        "--auth=trust",
        "--encoding=UTF8",
        "--locale=C.UTF-8",
        "--no-instructions",
    ]);
    if options.throwaway {
        initdb.arg("--no-sync");
    }
    run("initdb", initdb, "").await?;

    let mut single = as_user(&programs.postgres, user)?;
    single.args(["--single", "-D"]).arg(&unfinished).args([
        "-c",
        "exit_on_error=on",
        "-c",
        "log_statement=none",
        "-c",
        "password_encryption=scram-sha-256",
        "template1",
    ]);
    let password = options.password.expose_secret();
    let statements = format!("ALTER ROLE {NAME} PASSWORD '{password}'\nCREATE DATABASE {NAME}\n");
    run("postgres --single", single, &statements).await?;

    let hba = unfinished.join("pg_hba.conf");
    fs::write(&hba, HBA).map_err(io_error("write", &hba))?;
    fs::rename(&unfinished, dir).map_err(io_error("move into place", dir))
}

fn as_user(program: &Path, user: Option<&User>) -> Result<Command, EmbeddedError> {
    let mut command = Command::new(binaries::setpriv()?);
    if let Some(user) = user {
        command.args(user.setpriv_arguments());
    }
    command
        .arg("--")
        .arg(program)
        .current_dir("/")
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .env("LC_ALL", "C.UTF-8")
        .kill_on_drop(true);
    Ok(command)
}

async fn run(
    program: &'static str,
    mut command: Command,
    input: &str,
) -> Result<(), EmbeddedError> {
    let failed = |said: String| EmbeddedError::Initialise { program, said };
    let work = async {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes()).await?;
        }
        child.wait_with_output().await
    };
    let output = work.await.map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = said
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    Err(failed(lines[lines.len().saturating_sub(3)..].join(" | ")))
}
