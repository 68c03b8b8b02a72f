//! Keeps one server running: starts it again when it exits, and lets it be while it lives, however slow.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::lock::Lock;
use super::server::{Server, Service};

/// The first pause before a restart; it doubles up to the longest.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// A server that ran this long is restarted without having to pay for earlier failures.
const STEADY: Duration = Duration::from_secs(2);

/// A supervised server. Dropped, it is asked to stop.
#[derive(Debug)]
pub(super) struct Supervised {
    pid: watch::Receiver<Option<u32>>,
    stop: CancellationToken,
    task: Option<JoinHandle<()>>,
}

impl Supervised {
    /// Takes over a running server. The lock is held for as long as the server may live.
    pub(super) fn start<S: Service>(server: Server<S>, lock: Arc<Lock>) -> Self {
        let (tell, pid) = watch::channel(Some(server.pid()));
        let stop = CancellationToken::new();
        let stopping = stop.clone();
        let task = tokio::spawn(async move {
            supervise(server, &tell, &stopping).await;
            tell.send_replace(None);
            drop(lock);
        });
        Self {
            pid,
            stop,
            task: Some(task),
        }
    }

    /// The process id; `None` while it is down.
    pub(super) fn pid(&self) -> watch::Receiver<Option<u32>> {
        self.pid.clone()
    }

    /// Stops the server and waits until it is gone.
    pub(super) async fn stop(mut self) {
        self.stop.cancel();
        if let Some(task) = self.task.take()
            && let Err(error) = task.await
        {
            tracing::error!(%error, "a supervisor failed");
        }
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn supervise<S: Service>(
    mut server: Server<S>,
    tell: &watch::Sender<Option<u32>>,
    stop: &CancellationToken,
) {
    let mut pause = PAUSE_MIN;
    loop {
        let running_since = Instant::now();
        tokio::select! {
            status = server.ended() => {
                tell.send_replace(None);
                tracing::warn!(
                    service = S::NAME, %status, said = server.last_words(),
                    "service exited; starting it again"
                );
            }
            () = stop.cancelled() => return server.stop().await,
        }
        if running_since.elapsed() >= STEADY {
            pause = PAUSE_MIN;
        }
        loop {
            tokio::select! {
                () = sleep(pause) => {}
                () = stop.cancelled() => return,
            }
            pause = (pause * 2).min(PAUSE_MAX);
            let started = tokio::select! {
                started = server.start_again() => Some(started),
                () = stop.cancelled() => None,
            };
            match started {
                Some(Ok(())) => break,
                Some(Err(error)) => {
                    tracing::warn!(service = S::NAME, %error, again_in = ?pause, "service does not start");
                }
                None => return server.stop().await,
            }
        }
        tell.send_replace(Some(server.pid()));
        tracing::info!(service = S::NAME, pid = server.pid(), "service runs again");
    }
}
