//! `stockade serve` as a process of its own: what can be killed, stopped for a while and started
//! again, as an operator or a kernel would.

use std::{
    fs::{self, File},
    process::{ExitStatus, Output, Stdio},
};

use reqwest::{Client, RequestBuilder};
use rustix::process::{Pid, Signal, kill_process};
use secrecy::ExposeSecret;
use tempfile::NamedTempFile;
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    sync::watch,
    time::timeout,
};

use super::app::{App, PATIENCE, redirected};

/// Lines of its log that a failed test shows.
const LAST_LINES: usize = 60;

/// A node on the stores of an [`App`], in its own process. Killed when dropped, and when the test
/// binary dies.
pub(crate) struct Served {
    child: Child,
    /// Standard output: closed with the process.
    said: Lines<BufReader<ChildStdout>>,
    /// Where it answers: another port after each start.
    door: watch::Sender<String>,
    environment: Vec<(String, String)>,
    open_files: Option<u32>,
    log: NamedTempFile,
}

/// Runs another subcommand on the stores of an [`App`] to its end. `settings` come on top of the
/// application's own.
pub(crate) async fn stockade(app: &App, settings: &[(&str, &str)], words: &[&str]) -> Output {
    let endpoints = app.endpoints();
    let running = Command::new(env!("CARGO_BIN_EXE_stockade"))
        .args(words)
        .current_dir("/")
        .env_clear()
        .envs(app.environment())
        .envs(settings.iter().copied())
        .env("REDIS_URL", endpoints.redis_url.expose_secret())
        .env("DATABASE_URL", endpoints.database_url.expose_secret())
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    timeout(PATIENCE, running).await.unwrap().unwrap()
}

/// What a node's machine has that others have not.
#[derive(Default)]
pub(crate) struct Machine {
    /// Variables of its environment.
    pub(crate) environment: Vec<(String, String)>,
    /// The most files that it may have open.
    pub(crate) open_files: Option<u32>,
}

impl Served {
    /// Starts one and waits until it wants traffic.
    pub(crate) async fn start(app: &App) -> Self {
        Self::start_on(app, Machine::default()).await
    }

    /// Starts one on a machine of its own, and waits until it wants traffic.
    pub(crate) async fn start_on(app: &App, machine: Machine) -> Self {
        let mut environment = app.environment();
        environment.extend(machine.environment);
        let endpoints = app.endpoints();
        for (name, url) in [
            ("REDIS_URL", endpoints.redis_url),
            ("DATABASE_URL", endpoints.database_url),
        ] {
            environment.push((name.to_owned(), url.expose_secret().to_owned()));
        }
        let log = NamedTempFile::new().unwrap();
        let (child, said) = spawn(&environment, machine.open_files, log.reopen().unwrap());
        let mut served = Self {
            open_files: machine.open_files,
            child,
            said,
            door: watch::Sender::default(),
            environment,
            log,
        };
        served.ready().await;
        served
    }

    /// Its process id; none once it has been found dead.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// All that it has logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.log.path()).unwrap()
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        // As long as it has an id it is not reaped, and the id nobody else's.
        let pid = self.child.id().unwrap();
        kill_process(Pid::from_raw(pid.try_into().unwrap()).unwrap(), signal).unwrap();
    }

    /// Ends it as a crash would (SIGKILL), and waits until it is gone.
    pub(crate) async fn kill(&mut self) {
        self.child.kill().await.unwrap();
    }

    /// Stops it in order (SIGTERM), and waits until it is gone.
    pub(crate) async fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.ended().await
    }

    /// Waits until it is gone.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        let ended = timeout(PATIENCE, self.child.wait()).await;
        ended.unwrap_or_else(|_| panic!("it does not end")).unwrap()
    }

    /// Starts it again after its end, at another port, and waits until it wants traffic.
    pub(crate) async fn start_again(&mut self) {
        self.spawn_again();
        self.ready().await;
    }

    /// Sets a variable of its environment from the next start on, or takes it away.
    #[cfg(feature = "faults")]
    pub(crate) fn set(&mut self, name: &str, value: Option<&str>) {
        self.environment.retain(|(known, _)| known != name);
        let variable = value.map(|value| (name.to_owned(), value.to_owned()));
        self.environment.extend(variable);
    }

    /// Starts it again, to die by itself sooner or later.
    #[cfg(feature = "faults")]
    pub(crate) async fn start_to_die(&mut self) {
        use std::os::unix::process::ExitStatusExt;
        self.spawn_again();
        let dying = async {
            // Until it is gone it may say where it answers.
            while let Some(line) = self.said.next_line().await.unwrap() {
                if let Some(url) = url_said(&line) {
                    self.door.send_replace(url);
                }
            }
        };
        timeout(PATIENCE, dying)
            .await
            .unwrap_or_else(|_| panic!("it does not die"));
        assert_eq!(self.ended().await.signal(), Some(9));
    }

    /// Starts it again, to stand still sooner or later.
    #[cfg(feature = "faults")]
    pub(crate) async fn start_to_stall(&mut self) {
        self.spawn_again();
        let stat = format!("/proc/{}/stat", self.child.id().unwrap());
        let standing_still = async {
            loop {
                // The state follows the name, which is in parentheses.
                let text = fs::read_to_string(&stat).unwrap();
                if text
                    .rsplit(')')
                    .next()
                    .unwrap()
                    .trim_start()
                    .starts_with('T')
                {
                    return;
                }
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, standing_still)
            .await
            .unwrap_or_else(|_| panic!("it does not stand still"));
    }

    fn spawn_again(&mut self) {
        assert!(self.child.try_wait().unwrap().is_some(), "it still runs");
        let log = File::options().append(true).open(self.log.path()).unwrap();
        (self.child, self.said) = spawn(&self.environment, self.open_files, log);
    }

    /// Where it answers, also after the next start.
    pub(crate) fn door(&self) -> watch::Receiver<String> {
        self.door.subscribe()
    }

    /// Where it answers now.
    pub(crate) fn url(&self) -> String {
        self.door.borrow().clone()
    }

    /// The same request, to this node.
    pub(crate) fn ask(&self, request: RequestBuilder) -> RequestBuilder {
        redirected(request, &self.url())
    }

    /// Waits until it says where it answers, then until it wants traffic.
    async fn ready(&mut self) {
        let getting_ready = async {
            let url = loop {
                let line = self.said.next_line().await.unwrap();
                let line = line.unwrap_or_else(|| panic!("it ended instead of getting ready"));
                if let Some(url) = url_said(&line) {
                    break url;
                }
            };
            let asking = Client::new();
            let wants_traffic = async || {
                let answer = asking.get(format!("{url}/readyz")).send().await;
                answer.is_ok_and(|answer| answer.status() == 200)
            };
            while !wants_traffic().await {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
            self.door.send_replace(url);
        };
        timeout(PATIENCE, getting_ready)
            .await
            .unwrap_or_else(|_| panic!("it does not get ready"));
    }
}

/// Where it answers, if this line of its output says so.
fn url_said(line: &str) -> Option<String> {
    let said = line.strip_prefix("stockade serves ")?;
    said.split(' ').next().map(str::to_owned)
}

fn spawn(
    environment: &[(String, String)],
    open_files: Option<u32>,
    log: File,
) -> (Child, Lines<BufReader<ChildStdout>>) {
    // It dies when the thread dies that started it: a test's own, or one of its runtime.
    let mut child = Command::new("setpriv")
        .args(["--pdeathsig=KILL", "--"])
        .args(open_files.iter().flat_map(|most| {
            let limit = format!("--nofile={most}:{most}");
            ["prlimit".to_owned(), limit, "--".to_owned()]
        }))
        .arg(env!("CARGO_BIN_EXE_stockade"))
        .arg("serve")
        .current_dir("/")
        .env_clear()
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .env("PATH", std::env::var_os("PATH").unwrap())
        // Of a test build: the bug that is switched on is in its processes, too.
        .envs(
            std::env::vars()
                .filter(|(name, _)| stockade::faults::VARIABLES.contains(&name.as_str())),
        )
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let said = child.stdout.take().unwrap();
    (child, BufReader::new(said).lines())
}

impl Drop for Served {
    #[expect(
        clippy::print_stderr,
        reason = "a failed test shows what the node said"
    )]
    fn drop(&mut self) {
        if std::thread::panicking() {
            let text = fs::read_to_string(self.log.path()).unwrap_or_default();
            let lines: Vec<_> = text.lines().collect();
            let last = &lines[lines.len().saturating_sub(LAST_LINES)..];
            eprintln!(
                "the last lines of the node at {}:\n{}",
                self.url(),
                last.join("\n")
            );
        }
    }
}
