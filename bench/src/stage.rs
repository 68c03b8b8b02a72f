//! A server for one run: `stockade serve` with stores of its own in a directory of its own, and the
//! writer beside it as a process that can be left away, started, and measured by itself.

use std::env;
use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

use crate::sale_run::Server;
use crate::target::{Backstage, Endpoints, Target};
use crate::usage::{Family, Roots};

/// How long the server may take to be there, with a new database.
const START_MAX: Duration = Duration::from_mins(1);

/// How long a process may take to end.
const END_MAX: Duration = Duration::from_mins(1);

/// Pause between two looks whether a process has ended.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// The name of the server's binary.
const SERVER: &str = "stockade";

/// What is not the server's default: for a benchmark there are no limits, the journal is trimmed
/// soon, so that Redis is as it will be and not as it is in its first hour, and what becomes of a
/// round a minute after its end does not fall into the next phase. The audit of a million orders
/// takes its time.
const ENVIRONMENT: [(&str, &str); 4] = [
    ("STOCKADE_RATE_LIMIT", "off"),
    ("STOCKADE_JOURNAL_RETENTION", "5"),
    ("STOCKADE_SETTLE_AFTER", "86400"),
    ("STOCKADE_REQUEST_TIMEOUT_MS", "60000"),
];

/// Where the server of a run is.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Where {
    /// A server that runs already, on this machine. Without it the run has one of its own.
    #[arg(long)]
    pub(crate) url: Option<String>,
    /// The data directory: of the server that runs, with its secret and the address of its
    /// database; or of the run's own server, which is kept then.
    #[arg(long)]
    pub(crate) data_dir: Option<PathBuf>,
    /// The binary of the run's own server [default: `stockade` beside this program].
    #[arg(long, conflicts_with = "url")]
    pub(crate) server_binary: Option<PathBuf>,
    /// Environment of the run's own server, such as `STOCKADE_QUEUE_CAPACITY=20000`.
    #[arg(long, value_name = "NAME=VALUE", conflicts_with = "url")]
    pub(crate) server_env: Vec<String>,
}

/// A server of a run's own. It is stopped when this is dropped.
pub(crate) struct Stage {
    pub(crate) server: Server,
    command: ServerCommand,
    // The order in which they end.
    writer: Option<Process>,
    serve: Process,
    /// Removed at the end, unless it was given.
    _dir: Option<TempDir>,
}

impl Where {
    /// The server that runs, or one of the run's own.
    ///
    /// # Errors
    ///
    /// There is no server, or it could not be started.
    pub(crate) async fn server(&self) -> Result<(Server, Option<Stage>)> {
        match &self.url {
            Some(url) => {
                let usual = Path::new(".stockade");
                let server = Server {
                    target: Target::parse(url)?,
                    backstage: Backstage::new(self.data_dir.as_deref().unwrap_or(usual)),
                };
                Ok((server, None))
            }
            None => {
                let mut stage = Stage::start(self).await?;
                stage.start_writer()?;
                Ok((stage.server.clone(), Some(stage)))
            }
        }
    }
}

impl Stage {
    /// Starts the stores and what answers requests; nothing drains the journal yet.
    async fn start(wanted: &Where) -> Result<Self> {
        let (data_dir, dir) = match &wanted.data_dir {
            Some(dir) => (dir.clone(), None),
            None => {
                let dir = TempDir::with_prefix("stockade-bench-")?;
                // PostgreSQL runs as another user when we are root, and must get through.
                fs::set_permissions(dir.path(), Permissions::from_mode(0o711))?;
                (dir.path().join("data"), Some(dir))
            }
        };
        fs::create_dir_all(&data_dir)
            .with_context(|| format!("{} cannot be made", data_dir.display()))?;
        let command = ServerCommand {
            binary: binary(wanted.server_binary.as_deref())?,
            data_dir: data_dir.canonicalize()?,
            environment: wanted.server_env.clone(),
        };
        let mut serve = Process::spawn(
            command
                .build(&["serve", "--with", "http"], "serve")?
                .env("STOCKADE_HTTP_ADDR", "127.0.0.1:0"),
        )?;
        let said = serve.said();
        let Ok(Ok(url)) = timeout(START_MAX, said).await else {
            bail!(
                "the server did not start; it said:\n{}",
                command.last_lines("serve")
            );
        };
        Ok(Self {
            server: Server {
                target: Target::parse(&url)?,
                // The environment may name another server's secret and database.
                backstage: Backstage {
                    data_dir: command.data_dir.clone(),
                    secret: None,
                    database: None,
                },
            },
            command,
            serve,
            writer: None,
            _dir: dir,
        })
    }

    /// Lets the journal be drained from now on.
    pub(crate) fn start_writer(&mut self) -> Result<()> {
        let endpoints = self.server.backstage.endpoints()?;
        let mut command = self.command.build(&["writer"], "writer")?;
        command
            .env("REDIS_URL", &endpoints.redis_url)
            .env("DATABASE_URL", &endpoints.database_url)
            .env("STOCKADE_JWT_SECRET", self.server.backstage.secret()?);
        self.writer = Some(Process::spawn(&mut command)?);
        Ok(())
    }

    /// Lets the journal grow from now on.
    pub(crate) async fn stop_writer(&mut self) -> Result<()> {
        match self.writer.take() {
            Some(mut writer) => writer.end().await,
            None => Ok(()),
        }
    }

    /// The processes that a run is measured by.
    pub(crate) fn roots(&self) -> Roots {
        let port = self.server.backstage.endpoints().ok();
        let port = port.and_then(|endpoints| endpoints.redis_port());
        Roots {
            families: [
                Some((Family::Application, self.serve.pid)),
                self.writer
                    .as_ref()
                    .map(|writer| (Family::Writer, writer.pid)),
            ]
            .into_iter()
            .flatten()
            .collect(),
            redis_port: port,
        }
    }

    /// Stops everything, in order.
    pub(crate) async fn stop(mut self) -> Result<()> {
        self.stop_writer().await?;
        self.serve.end().await
    }
}

/// How the server's processes are started.
struct ServerCommand {
    binary: PathBuf,
    data_dir: PathBuf,
    environment: Vec<String>,
}

impl ServerCommand {
    fn log(&self, name: &str) -> PathBuf {
        self.data_dir.join(format!("bench-{name}.log"))
    }

    fn build(&self, arguments: &[&str], name: &str) -> Result<Command> {
        let mut command = Command::new(&self.binary);
        // Nothing of the surroundings, so that a run can be repeated: no settings, no `.env`.
        for (name, _) in env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("STOCKADE_")
                || text.ends_with("REDIS_URL")
                || text == "DATABASE_URL"
            {
                command.env_remove(&name);
            }
        }
        command.envs(ENVIRONMENT);
        for pair in &self.environment {
            let Some((name, value)) = pair.split_once('=') else {
                bail!("--server-env takes NAME=VALUE, not {pair}");
            };
            command.env(name, value);
        }
        command
            .args(arguments)
            .current_dir(&self.data_dir)
            .env("STOCKADE_DATA_DIR", &self.data_dir)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(self.log(name))?);
        Ok(command)
    }

    fn last_lines(&self, name: &str) -> String {
        let log = fs::read_to_string(self.log(name)).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(10)..].join("\n")
    }
}

/// The server's binary: as given, or beside this program.
fn binary(given: Option<&Path>) -> Result<PathBuf> {
    let binary = match given {
        Some(given) => given.to_owned(),
        None => env::current_exe()?.with_file_name(SERVER),
    };
    binary.canonicalize().with_context(|| {
        format!(
            "no server at {}: build it with `cargo build --release`, name it with \
             --server-binary, or point --url at one that runs",
            binary.display()
        )
    })
}

/// A process of ours; it is asked to end when this is dropped.
pub(crate) struct Process {
    child: Child,
    pub(crate) pid: Pid,
    url: Option<oneshot::Receiver<String>>,
}

impl Process {
    pub(crate) fn spawn(command: &mut Command) -> Result<Self> {
        let mut child = command
            .spawn()
            .with_context(|| format!("{} cannot be run", command.get_program().display()))?;
        let (tell, url) = oneshot::channel();
        if let Some(stdout) = child.stdout.take() {
            let mut tell = Some(tell);
            // It reads to the end, lest the process is stopped by a full pipe.
            thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    let url = line.split(' ').find(|word| word.starts_with("http://"));
                    if let (Some(url), Some(tell)) = (url, tell.take_if(|_| url.is_some())) {
                        // Nobody waits any more only if the start was given up.
                        let _ = tell.send(url.to_owned());
                    }
                }
            });
        }
        Ok(Self {
            pid: Pid::from_child(&child),
            child,
            url: Some(url),
        })
    }

    /// The address that it says it serves.
    pub(crate) async fn said(&mut self) -> Result<String> {
        let url = self.url.take().context("it was asked before")?;
        Ok(url.await?)
    }

    /// Asks it to end, and waits for that.
    async fn end(&mut self) -> Result<()> {
        self.ask_to_end();
        let begun = Instant::now();
        while self.child.try_wait()?.is_none() {
            if begun.elapsed() > END_MAX {
                self.child.kill()?;
                bail!("a process of the server did not end, and was killed");
            }
            sleep(LOOK_AGAIN).await;
        }
        Ok(())
    }

    fn ask_to_end(&mut self) {
        // One that has ended and was waited for is nobody's to signal.
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = kill_process(self.pid, Signal::INT);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.ask_to_end();
        let begun = std::time::Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) {
            if begun.elapsed() > END_MAX {
                // It holds nothing that anybody will look at.
                let _ = self.child.kill();
                break;
            }
            thread::sleep(LOOK_AGAIN);
        }
    }
}

impl Endpoints {
    fn redis_port(&self) -> Option<u16> {
        let url = self.redis_url.trim_end_matches('/');
        let port = url.rsplit(':').next()?;
        port.split('/').next()?.parse().ok()
    }
}
