//! One child process: started so that it dies with us, signalled only while it is ours, always reaped.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use tokio::sync::{oneshot, watch};

use super::user::User;
use super::{EmbeddedError, binaries, io_error};

/// Bytes at the end of a log that can hold its last lines.
const TAIL_BYTES: u64 = 4096;
/// Lines that say why a service ended.
const TAIL_LINES: usize = 3;

/// How to start a process.
#[derive(Debug)]
pub(super) struct Recipe {
    /// The program.
    pub(super) program: PathBuf,
    /// Its arguments.
    pub(super) arguments: Vec<OsString>,
    /// Its working directory; it also tells later whose process it is.
    pub(super) directory: PathBuf,
    /// Whom it runs as, if not as we do.
    pub(super) user: Option<User>,
    /// Variables of its environment, besides ours.
    pub(super) environment: Vec<(String, String)>,
    /// What its output is appended to.
    pub(super) log: PathBuf,
    /// What the kernel sends it when we die, however we die.
    pub(super) orphaned: Signal,
}

/// A running, or ended, child. Dropped while it runs it gets the signal of an orphan.
#[derive(Debug)]
pub(super) struct Process {
    pid: Pid,
    /// Held while a signal is sent and while the child is reaped: a reaped pid may be anybody's.
    reaped: Arc<Mutex<bool>>,
    ended: watch::Receiver<Option<ExitStatus>>,
    reaper: Option<thread::JoinHandle<()>>,
    orphaned: Signal,
    log: PathBuf,
    log_begins_at: u64,
}

impl Process {
    /// Starts it.
    pub(super) async fn spawn(recipe: &Recipe) -> Result<Self, EmbeddedError> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&recipe.log)
            .map_err(io_error("open", &recipe.log))?;
        let log_begins_at = log.metadata().map_err(io_error("read", &recipe.log))?.len();
        let mut command = Command::new(binaries::setpriv()?);
        command.arg(format!("--pdeathsig={}", signal_name(recipe.orphaned)));
        if let Some(user) = &recipe.user {
            command.args(user.setpriv_arguments());
        }
        command
            .arg("--")
            .arg(&recipe.program)
            .args(&recipe.arguments)
            .current_dir(&recipe.directory)
            // Our environment holds secrets, and another user's process shows its own to that user.
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin")
            .env("LC_ALL", "C.UTF-8")
            .envs(recipe.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(io_error("open", &recipe.log))?)
            .stderr(log)
            // Ctrl-C in a terminal is for us; we then stop the services in order.
            .process_group(0);
        let child = spawn_on_lasting_thread(command)
            .await
            .map_err(io_error("start", &recipe.program))?;
        Self::watch(child, recipe.orphaned, &recipe.log, log_begins_at)
            .map_err(io_error("watch", &recipe.program))
    }

    fn watch(
        mut child: Child,
        orphaned: Signal,
        log: &Path,
        log_begins_at: u64,
    ) -> io::Result<Self> {
        let pid = Pid::from_child(&child);
        let reaped = Arc::new(Mutex::new(false));
        let (tell, ended) = watch::channel(None);
        let waiting = thread::Builder::new()
            .name("stockade-reaper".to_owned())
            .spawn({
                let is_reaped = Arc::clone(&reaped);
                move || {
                    let dead_but_not_reaped = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
                    while rustix::process::waitid(WaitId::Pid(pid), dead_but_not_reaped)
                        .is_err_and(|error| error == rustix::io::Errno::INTR)
                    {}
                    let mut done = is_reaped.lock().unwrap_or_else(PoisonError::into_inner);
                    let status = child.wait().unwrap_or_default();
                    *done = true;
                    drop(done);
                    tell.send_replace(Some(status));
                }
            })?;
        Ok(Self {
            pid,
            reaped,
            ended,
            reaper: Some(waiting),
            orphaned,
            log: log.to_owned(),
            log_begins_at,
        })
    }

    /// Its process id.
    pub(super) fn pid(&self) -> Pid {
        self.pid
    }

    /// Sends it a signal; one that has ended gets none.
    pub(super) fn signal(&self, signal: Signal) {
        let is_reaped = self.reaped.lock().unwrap_or_else(PoisonError::into_inner);
        if !*is_reaped && let Err(error) = rustix::process::kill_process(self.pid, signal) {
            tracing::warn!(pid = self.pid.as_raw_nonzero(), ?signal, %error, "signal not delivered");
        }
    }

    /// How it ended, if it did.
    pub(super) fn status(&self) -> Option<ExitStatus> {
        *self.ended.borrow()
    }

    /// Waits until it ends.
    pub(super) async fn ended(&self) -> ExitStatus {
        let mut ended = self.ended.clone();
        // The reaper always tells before it goes; the default only satisfies the type.
        let status = ended.wait_for(Option::is_some).await.map(|status| *status);
        status.ok().flatten().unwrap_or_default()
    }

    /// The last lines that it wrote to its log, on one line.
    pub(super) fn last_words(&self) -> String {
        last_lines(&self.log, self.log_begins_at)
            .unwrap_or_else(|error| format!("its log is unreadable: {error}"))
    }

    /// Its log.
    pub(super) fn log(&self) -> &Path {
        &self.log
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.status().is_some() {
            return;
        }
        self.signal(self.orphaned);
        // One that is killed is gone at once; then its directory may be removed right after this.
        if self.orphaned == Signal::KILL
            && let Some(reaper) = self.reaper.take()
        {
            // A reaper that panicked has nothing to say here.
            let _reaped = reaper.join();
        }
    }
}

/// Starts a command from a thread that lives as long as the process: the kernel sends the parent-death signal
/// when the *thread* that started the child ends, and an async runtime's threads come and go.
async fn spawn_on_lasting_thread(command: Command) -> io::Result<Child> {
    type Job = (Command, oneshot::Sender<io::Result<Child>>);
    static SPAWNER: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (jobs, queue) = mpsc::channel::<Job>();
        // If the thread cannot be made, the queue is dropped and every start fails with the error below.
        let _lasting = thread::Builder::new()
            .name("stockade-spawner".to_owned())
            .spawn(move || {
                for (mut command, answer) in queue {
                    // Nobody waits any more: then the child is dropped here, unwatched, so do not leave it alive.
                    if let Err(Ok(mut child)) = answer.send(command.spawn()) {
                        let _gone = child.kill().and_then(|()| child.wait());
                    }
                }
            });
        jobs
    });
    let gone = || io::Error::other("the thread that starts services is gone");
    let (answer, child) = oneshot::channel();
    spawner.send((command, answer)).map_err(|_| gone())?;
    child.await.map_err(|_| gone())?
}

/// As `setpriv` wants it.
fn signal_name(signal: Signal) -> &'static str {
    match signal {
        Signal::INT => "INT",
        Signal::QUIT => "QUIT",
        Signal::KILL => "KILL",
        _ => "TERM",
    }
}

fn last_lines(log: &Path, begins_at: u64) -> io::Result<String> {
    let mut file = std::fs::File::open(log)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(
        begins_at.max(length.saturating_sub(TAIL_BYTES)),
    ))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    if lines.is_empty() {
        return Ok("it said nothing".to_owned());
    }
    Ok(lines[lines.len().saturating_sub(TAIL_LINES)..].join(" | "))
}
