//! The life of the process: what stops it, and in which order its tasks end.
//!
//! The first SIGTERM or SIGINT, or a task that ends unasked, begins the shutdown. The stages then end one
//! after the other in the order of [`Stage::ORDER`]; each is told only when the one before it is done, so
//! that the writer still stores what the last request bought. A second signal, or the deadline, cancels the
//! hard token: whoever is still at work drops it. The embedded services are stopped by the caller, last.

use std::collections::BTreeMap;
use std::io;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// From the first signal until whoever is still at work is cut off.
pub const DEADLINE: Duration = Duration::from_secs(10);
/// What a task cut off may take to notice.
const CUT_OFF: Duration = Duration::from_secs(1);

/// A group of tasks that ends together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Listeners, requests and streams: accept nothing new, end streams, answer what is in flight.
    Requests,
    /// Whatever works beside the requests: samplers, auditor, schedules.
    Background,
    /// The writer, which drains what the requests left in the journal.
    Writer,
}

impl Stage {
    /// The order of shutdown.
    pub const ORDER: [Self; 3] = [Self::Requests, Self::Background, Self::Writer];
}

/// How the process came to its end.
#[derive(Debug, thiserror::Error)]
pub enum Unclean {
    /// A task ended although nobody had asked it to; its error was logged then.
    #[error("{0} ended by itself, so the server stopped")]
    Crashed(&'static str),
    /// Tasks did not end within the deadline, or a second signal came first.
    #[error("stopped before these were done: {}", .0.join(", "))]
    CutOff(Vec<&'static str>),
}

/// Signals, tokens and tracked tasks of one process. Cheap to clone; all clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Lifecycle {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    begun: CancellationToken,
    hard: CancellationToken,
    requests: Tasks,
    background: Tasks,
    writer: Tasks,
    crashed: Mutex<Option<&'static str>>,
}

#[derive(Debug, Default)]
struct Tasks {
    stop: CancellationToken,
    tracker: TaskTracker,
    alive: Arc<Mutex<BTreeMap<&'static str, usize>>>,
}

impl Lifecycle {
    /// A life that no signal ends; [`Lifecycle::stop`] does.
    pub fn new() -> Self {
        Self::default()
    }

    /// Listens to SIGTERM and SIGINT from now on: the first begins the shutdown, the second cuts off.
    ///
    /// Fails if the handlers cannot be installed.
    pub fn listen_to_signals(&self) -> io::Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let shared = Arc::clone(&self.shared);
        tokio::spawn(async move {
            let mut next = async || {
                tokio::select! {
                    _ = terminate.recv() => "SIGTERM",
                    _ = interrupt.recv() => "SIGINT",
                }
            };
            let name = next().await;
            tracing::info!(signal = name, deadline_s = DEADLINE.as_secs(), "stopping");
            shared.begun.cancel();
            let name = next().await;
            tracing::warn!(signal = name, "second signal: stopping now");
            shared.hard.cancel();
        });
        Ok(())
    }

    /// Begins the shutdown.
    pub fn stop(&self) {
        self.shared.begun.cancel();
    }

    /// Whether the shutdown has begun: then this node is not ready.
    pub fn is_stopping(&self) -> bool {
        self.shared.begun.is_cancelled()
    }

    /// Done as soon as the shutdown begins.
    pub async fn stopping(&self) {
        self.shared.begun.cancelled().await;
    }

    /// Cancelled when the tasks of a stage shall come to their end.
    pub fn token(&self, stage: Stage) -> CancellationToken {
        self.tasks(stage).stop.clone()
    }

    /// Cancelled at the deadline or by a second signal: drop what you are doing.
    pub fn hard(&self) -> CancellationToken {
        self.shared.hard.clone()
    }

    /// Runs a task of a stage under a name. If it ends before its stage's token is cancelled, by an error,
    /// a panic or by itself, the whole process stops: half a server is worse than a restart.
    pub fn spawn<F>(&self, stage: Stage, name: &'static str, task: F)
    where
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let tasks = self.tasks(stage);
        let alive = Alive::enter(&tasks.alive, name);
        let stop = tasks.stop.clone();
        let shared = Arc::clone(&self.shared);
        tasks.tracker.spawn(async move {
            let outcome = AssertUnwindSafe(task).catch_unwind().await;
            let problem = match outcome {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(format!("{error:#}")),
                Err(_) => Some("it panicked".to_owned()),
            };
            let asked = stop.is_cancelled();
            match problem {
                Some(problem) => tracing::error!(task = name, problem, "task failed"),
                None if !asked => tracing::error!(task = name, "task ended by itself"),
                None => {}
            }
            if !asked {
                locked(&shared.crashed).get_or_insert(name);
                shared.begun.cancel();
            }
            drop(alive);
        });
    }

    /// Waits for the shutdown to begin, then ends the stages in their order.
    pub async fn run(&self) -> Result<(), Unclean> {
        self.run_within(DEADLINE, CUT_OFF).await
    }

    async fn run_within(&self, deadline: Duration, cut_off: Duration) -> Result<(), Unclean> {
        self.stopping().await;
        let cut_off_at = Instant::now() + deadline;
        for stage in Stage::ORDER {
            let tasks = self.tasks(stage);
            tasks.stop.cancel();
            tasks.tracker.close();
            tokio::select! {
                () = tasks.tracker.wait() => {}
                () = self.shared.hard.cancelled() => {}
                () = tokio::time::sleep_until(cut_off_at) => {
                    if !self.shared.hard.is_cancelled() {
                        tracing::warn!(alive = ?self.alive(), "shutdown deadline reached");
                        self.shared.hard.cancel();
                    }
                }
            }
        }
        if self.shared.hard.is_cancelled() {
            let all = async {
                for stage in Stage::ORDER {
                    self.tasks(stage).tracker.wait().await;
                }
            };
            // Whether it was in time shows in who is still alive.
            let _in_time = tokio::time::timeout(cut_off, all).await;
        }
        let alive = self.alive();
        if !alive.is_empty() {
            return Err(Unclean::CutOff(alive));
        }
        match *locked(&self.shared.crashed) {
            Some(name) => Err(Unclean::Crashed(name)),
            None => Ok(()),
        }
    }

    fn tasks(&self, stage: Stage) -> &Tasks {
        match stage {
            Stage::Requests => &self.shared.requests,
            Stage::Background => &self.shared.background,
            Stage::Writer => &self.shared.writer,
        }
    }

    fn alive(&self) -> Vec<&'static str> {
        Stage::ORDER
            .into_iter()
            .flat_map(|stage| {
                locked(&self.tasks(stage).alive)
                    .keys()
                    .copied()
                    .collect::<Vec<_>>()
            })
            .collect()
    }
}

/// A name in the list of the living, taken off when dropped.
struct Alive {
    names: Arc<Mutex<BTreeMap<&'static str, usize>>>,
    name: &'static str,
}

impl Alive {
    fn enter(names: &Arc<Mutex<BTreeMap<&'static str, usize>>>, name: &'static str) -> Self {
        *locked(names).entry(name).or_default() += 1;
        Self {
            names: Arc::clone(names),
            name,
        }
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        let mut names = locked(&self.names);
        if let Some(count) = names.get_mut(self.name) {
            *count -= 1;
            if *count == 0 {
                names.remove(self.name);
            }
        }
    }
}

/// Nothing that holds these locks can panic half-way, so a poisoned one is still whole.
fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::mpsc;

    #[tokio::test]
    async fn stages_end_one_after_the_other() {
        let life = Lifecycle::new();
        let (ended, mut order) = mpsc::unbounded_channel();
        for stage in Stage::ORDER {
            let (token, ended, life_inside) = (life.token(stage), ended.clone(), life.clone());
            life.spawn(stage, "task", async move {
                token.cancelled().await;
                for later in Stage::ORDER.into_iter().filter(|later| *later > stage) {
                    assert!(
                        !life_inside.token(later).is_cancelled(),
                        "{later:?} was told too early"
                    );
                }
                tokio::task::yield_now().await;
                ended.send(stage)?;
                Ok(())
            });
        }
        life.stop();
        life.run().await.unwrap();
        assert!(life.is_stopping() && !life.hard().is_cancelled());
        drop(ended);
        let mut seen = Vec::new();
        while let Some(stage) = order.recv().await {
            seen.push(stage);
        }
        assert_eq!(seen, Stage::ORDER);
    }

    #[tokio::test]
    async fn a_task_that_ends_by_itself_stops_the_process() {
        for fails in [true, false] {
            let life = Lifecycle::new();
            life.spawn(Stage::Background, "sampler", async move {
                anyhow::ensure!(!fails, "no route");
                Ok(())
            });
            assert!(matches!(life.run().await, Err(Unclean::Crashed("sampler"))));
        }
        let life = Lifecycle::new();
        life.spawn(Stage::Writer, "writer", async { panic!("on purpose") });
        assert!(matches!(life.run().await, Err(Unclean::Crashed("writer"))));
    }

    #[tokio::test]
    async fn the_deadline_cuts_off_and_names_who_was_left() {
        let life = Lifecycle::new();
        let hard = life.hard();
        life.spawn(Stage::Requests, "stubborn", std::future::pending());
        life.spawn(Stage::Writer, "obedient", async move {
            hard.cancelled().await;
            Ok(())
        });
        life.stop();
        let moment = Duration::from_millis(20);
        let Err(Unclean::CutOff(names)) = life.run_within(moment, moment).await else {
            panic!("it must be unclean");
        };
        assert_eq!(names, ["stubborn"]);
        assert!(life.hard().is_cancelled());
    }
}
