//! A server that can be started, known ready, stopped, killed and started again on the same port and data.

use std::time::Duration;

use rustix::process::{Pid, Signal};
use tokio::time::{Instant, sleep, timeout};

use super::EmbeddedError;
use super::process::{Process, Recipe};

/// How long a server that says nothing is waited for.
const READY_WITHIN: Duration = Duration::from_mins(1);
/// How long one is waited for that says it is loading its data: a long journal takes its time.
const LOADED_WITHIN: Duration = Duration::from_mins(15);
/// Between two looks at a server that is starting.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// What an orderly stop may take.
const STOP_WITHIN: Duration = Duration::from_secs(20);
/// What a stop by force may take.
const FORCE_WITHIN: Duration = Duration::from_secs(5);

/// What a server says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Readiness {
    Ready,
    Loading,
    Silent,
}

/// What differs between the servers.
pub(super) trait Service: Send + Sync + 'static {
    /// Its name in logs and errors.
    const NAME: &'static str;
    /// Asks it to end in order.
    const STOP: Signal;
    /// Makes it end now.
    const FORCE: Signal;

    /// How to start it, now.
    fn recipe(&self) -> Result<Recipe, EmbeddedError>;

    /// Whether the process of that id answers.
    fn probe(&self, pid: Pid) -> impl Future<Output = Readiness> + Send;
}

/// A service and its process.
#[derive(Debug)]
pub(super) struct Server<S> {
    service: S,
    process: Process,
}

impl<S: Service> Server<S> {
    /// Starts it and waits, not for ever, until it is ready.
    pub(super) async fn start(service: S) -> Result<Self, EmbeddedError> {
        let process = Process::spawn(&service.recipe()?).await?;
        let server = Self { service, process };
        match server.ready(Some(READY_WITHIN)).await {
            Ok(()) => Ok(server),
            Err(error) => {
                server.stop().await;
                Err(error)
            }
        }
    }

    /// Starts it again after it ended, and waits until it is ready for as long as it lives.
    pub(super) async fn start_again(&mut self) -> Result<(), EmbeddedError> {
        self.process = Process::spawn(&self.service.recipe()?).await?;
        self.ready(None).await
    }

    pub(super) fn service(&self) -> &S {
        &self.service
    }

    pub(super) fn pid(&self) -> u32 {
        self.process.pid().as_raw_nonzero().get().unsigned_abs()
    }

    pub(super) fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    pub(super) async fn ended(&self) -> std::process::ExitStatus {
        self.process.ended().await
    }

    pub(super) fn last_words(&self) -> String {
        self.process.last_words()
    }

    /// Stops it in order; by force if it does not obey in time.
    pub(super) async fn stop(&self) {
        for (signal, within) in [
            (S::STOP, STOP_WITHIN),
            (S::FORCE, FORCE_WITHIN),
            (Signal::KILL, FORCE_WITHIN),
        ] {
            if self.process.status().is_some() {
                return;
            }
            self.process.signal(signal);
            // A stopped process obeys only once it runs again.
            self.process.signal(Signal::CONT);
            if timeout(within, self.process.ended()).await.is_err() {
                tracing::warn!(
                    service = S::NAME,
                    pid = self.pid(),
                    ?signal,
                    "did not end in time"
                );
            }
        }
    }

    /// Ends it as a crash would, and waits until it is gone.
    pub(super) async fn kill(&self) {
        self.process.signal(Signal::KILL);
        self.process.ended().await;
    }

    async fn ready(&self, within: Option<Duration>) -> Result<(), EmbeddedError> {
        let begun = Instant::now();
        let mut loading = false;
        loop {
            if let Some(status) = self.process.status() {
                return Err(EmbeddedError::Exited {
                    service: S::NAME,
                    status,
                    said: self.process.last_words(),
                    log: self.process.log().to_owned(),
                });
            }
            match self.service.probe(self.process.pid()).await {
                Readiness::Ready => return Ok(()),
                Readiness::Loading if !loading => {
                    loading = true;
                    tracing::debug!(service = S::NAME, pid = self.pid(), "loading its data");
                }
                Readiness::Loading | Readiness::Silent => {}
            }
            let patience = within.map(|within| if loading { LOADED_WITHIN } else { within });
            if patience.is_some_and(|patience| begun.elapsed() >= patience) {
                return Err(EmbeddedError::NotReady {
                    service: S::NAME,
                    seconds: begun.elapsed().as_secs(),
                    said: self.process.last_words(),
                    log: self.process.log().to_owned(),
                });
            }
            sleep(LOOK_AGAIN).await;
        }
    }
}
