//! Passwords: rules, and hashing that cannot take the machine away from the sale.

use std::{
    collections::HashSet,
    io,
    num::NonZeroUsize,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, LazyLock, Mutex, PoisonError, mpsc},
    thread,
};

use rustix::process::setpriority_process;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::metrics::PasswordMetrics;

/// The shortest password, in characters.
pub const CHARACTERS_MIN: usize = 8;

/// The longest password, in bytes: bcrypt ignores what is behind them.
pub const BYTES_MAX: usize = 72;

/// How much the threads that hash stand back, on the system's scale from 0 to 19: where both want the
/// same core, a purchase gets nine tenths of it.
const NICE: i32 = 10;

/// The passwords that guessers try first, in lower case, one a line.
static GUESSED_FIRST: LazyLock<HashSet<&'static str>> =
    LazyLock::new(|| include_str!("guessed_first.txt").lines().collect());

/// Why a password cannot be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Weakness {
    /// Too short.
    #[error("a password has at least {CHARACTERS_MIN} characters")]
    Short,
    /// Too long.
    #[error("a password has at most {BYTES_MAX} bytes")]
    Long,
    /// Among the first that anybody would try.
    #[error("this password is among the first that anybody would guess")]
    Guessable,
}

/// Checks that `password` may be chosen. Which characters it is made of does not matter.
///
/// # Errors
/// The [`Weakness`].
pub fn check(password: &str) -> Result<(), Weakness> {
    if password.chars().count() < CHARACTERS_MIN {
        Err(Weakness::Short)
    } else if password.len() > BYTES_MAX {
        Err(Weakness::Long)
    } else if GUESSED_FIRST.contains(password.to_lowercase().as_str()) {
        Err(Weakness::Guessable)
    } else {
        Ok(())
    }
}

/// Why a password was not hashed or compared.
#[derive(Debug, thiserror::Error)]
pub enum HashError {
    /// So many are waiting that one more would only wait longer.
    #[error("too many passwords are waiting to be hashed")]
    Busy,
    /// A mistake of ours.
    #[error("bcrypt: {0}")]
    Bcrypt(#[from] bcrypt::BcryptError),
    /// A thread could not be started, or died.
    #[error("a thread that hashes: {0}")]
    Thread(#[from] io::Error),
}

/// Hashes and compares on a few threads, with a bounded queue before them.
///
/// A hash takes tens of milliseconds of a core by design; without the bound a flood of logins
/// would starve the purchases. The threads stand back behind all others for the same reason.
#[derive(Clone)]
pub struct PasswordHasher {
    cost: u32,
    /// One permit for each that works or waits.
    places: Arc<Semaphore>,
    jobs: mpsc::Sender<Job>,
    /// The hash of a password that nobody has, compared where there is no user, so that the time
    /// does not tell.
    nobody: Arc<str>,
    metrics: PasswordMetrics,
}

impl PasswordHasher {
    /// A hasher with bcrypt's `cost` (4 … 31), `workers` threads, and a queue of `queue_max`
    /// behind them.
    ///
    /// # Errors
    /// [`HashError::Bcrypt`] when the cost is out of range, [`HashError::Thread`] when the system has
    /// no thread left.
    pub fn new(
        cost: u32,
        workers: NonZeroUsize,
        queue_max: usize,
        metrics: PasswordMetrics,
    ) -> Result<Self, HashError> {
        let nobody = bcrypt::hash(b"nobody has this password", cost)?;
        Ok(Self {
            cost,
            places: Arc::new(Semaphore::new(workers.get() + queue_max)),
            jobs: start(workers)?,
            nobody: nobody.into(),
            metrics,
        })
    }

    /// Hashes a password that passed [`check`].
    ///
    /// # Errors
    /// [`HashError`].
    pub async fn hash(&self, password: String) -> Result<String, HashError> {
        let cost = self.cost;
        self.work(move || {
            // bcrypt's own check would also refuse 72 bytes, all of which it uses.
            if password.len() > BYTES_MAX {
                return Err(bcrypt::BcryptError::Truncation(password.len()).into());
            }
            Ok(bcrypt::hash(password, cost)?)
        })
        .await
    }

    /// Whether `password` belongs to `hash`. Without a hash it takes as long, and does not.
    ///
    /// # Errors
    /// [`HashError`].
    pub async fn verify(&self, password: String, hash: Option<&str>) -> Result<bool, HashError> {
        let known = hash.is_some();
        let hash = hash.unwrap_or(&self.nobody).to_owned();
        self.work(move || {
            // One that is too long was never chosen; it is cut so that its time does not tell.
            let fits = password.len() <= BYTES_MAX;
            Ok(bcrypt::verify(password, &hash)? && fits && known)
        })
        .await
    }

    /// Whether `hash` was made at another cost than new ones are.
    pub fn outdated(&self, hash: &str) -> bool {
        hash.parse::<bcrypt::HashParts>()
            .is_ok_and(|parts| parts.get_cost() != self.cost)
    }

    async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, HashError> + Send + 'static,
    ) -> Result<T, HashError> {
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
            self.metrics.refused.inc();
            return Err(HashError::Busy);
        };
        let place = Place::take(place, self.metrics.clone());
        let (answer, answered) = oneshot::channel();
        let job = move || {
            // The place goes with the work: a caller that leaves does not make room before it ends.
            let _held = place;
            // Nobody waits for it any more.
            if !answer.is_closed() {
                let _ = answer.send(work());
            }
        };
        let died = || io::Error::from(io::ErrorKind::BrokenPipe);
        self.jobs.send(Box::new(job)).map_err(|_| died())?;
        answered.await.map_err(|_| died())?
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// Starts the threads, which end with the last sender.
fn start(workers: NonZeroUsize) -> io::Result<mpsc::Sender<Job>> {
    let (jobs, waiting) = mpsc::channel::<Job>();
    let waiting = Arc::new(Mutex::new(waiting));
    for _ in 0..workers.get() {
        let waiting = Arc::clone(&waiting);
        thread::Builder::new()
            .name("passwords".to_owned())
            .spawn(move || {
                // To Linux it is this thread, not the process. Without it they hash all the same.
                if let Err(error) = setpriority_process(None, NICE) {
                    tracing::warn!(%error, "the threads that hash passwords do not stand back");
                }
                loop {
                    let next = waiting
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .recv();
                    let Ok(job) = next else { return };
                    // Its caller hears of a panic, since there is no answer; the thread goes on.
                    let _ = catch_unwind(AssertUnwindSafe(job));
                }
            })?;
    }
    Ok(jobs)
}

/// A place in the queue, counted while it is held.
struct Place {
    _permit: OwnedSemaphorePermit,
    metrics: PasswordMetrics,
}

impl Place {
    fn take(permit: OwnedSemaphorePermit, metrics: PasswordMetrics) -> Self {
        metrics.queue.inc();
        Self {
            _permit: permit,
            metrics,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.metrics.queue.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// bcrypt's lowest cost: these tests are about the rules around it.
    const COST: u32 = 4;

    fn hasher(workers: usize, queue_max: usize) -> PasswordHasher {
        let workers = NonZeroUsize::new(workers).unwrap();
        PasswordHasher::new(COST, workers, queue_max, PasswordMetrics::default()).unwrap()
    }

    #[test]
    fn the_rules_are_about_length_and_guessability_only() {
        for (password, expected) in [
            ("", Err(Weakness::Short)),
            ("1234567", Err(Weakness::Short)),
            ("ääääääää", Ok(())),
            ("password", Err(Weakness::Guessable)),
            ("PassWord", Err(Weakness::Guessable)),
            ("12345678", Err(Weakness::Guessable)),
            ("correct horse battery staple", Ok(())),
            ("zqkvmxwp", Ok(())),
            (&"x".repeat(72), Ok(())),
            (&"x".repeat(73), Err(Weakness::Long)),
            (&"ä".repeat(37), Err(Weakness::Long)),
        ] {
            assert_eq!(check(password), expected, "{password:?}");
        }
    }

    #[test]
    fn the_list_can_match() {
        for line in GUESSED_FIRST.iter() {
            assert_eq!(line.to_lowercase(), *line);
            assert!(
                line.chars().count() >= CHARACTERS_MIN,
                "{line} is refused as short anyway"
            );
        }
    }

    #[tokio::test]
    async fn only_the_password_itself_matches_its_hash() {
        let hasher = hasher(1, 8);
        let long = "x".repeat(BYTES_MAX);
        let hash = hasher.hash(long.clone()).await.unwrap();
        assert!(hasher.verify(long.clone(), Some(&hash)).await.unwrap());
        assert!(
            !hasher
                .verify(format!("{long}y"), Some(&hash))
                .await
                .unwrap()
        );
        assert!(!hasher.verify("x".into(), Some(&hash)).await.unwrap());
        assert!(
            !hasher
                .verify("nobody has this password".into(), None)
                .await
                .unwrap()
        );
        assert!(hasher.hash(format!("{long}y")).await.is_err());
        assert!(!hasher.outdated(&hash));
        assert!(hasher.outdated(&bcrypt::hash("x", COST + 1).unwrap()));
    }

    #[tokio::test]
    async fn a_full_queue_refuses_at_once_and_empties_even_if_callers_leave() {
        let hasher = hasher(1, 1);
        // The only thread is busy until it is told otherwise.
        let (go, wait) = mpsc::channel::<()>();
        let busy = tokio::spawn({
            let hasher = hasher.clone();
            async move {
                let work = move || Ok(wait.recv().is_ok());
                hasher.work(work).await
            }
        });
        while hasher.metrics.queue.get() < 1 {
            tokio::task::yield_now().await;
        }
        let mut waiting = Box::pin(hasher.hash("b".into()));
        assert!(futures::poll!(&mut waiting).is_pending());
        assert!(matches!(
            hasher.hash("c".into()).await,
            Err(HashError::Busy)
        ));
        assert_eq!(hasher.metrics.queue.get(), 2);
        assert_eq!(hasher.metrics.refused.get(), 1);
        drop(waiting);
        go.send(()).unwrap();
        assert!(busy.await.unwrap().unwrap());
        // Places are given back behind the answers.
        while hasher.metrics.queue.get() > 0 {
            tokio::task::yield_now().await;
        }
        hasher.hash("d".into()).await.unwrap();
    }

    #[tokio::test]
    async fn a_thread_outlives_a_panic() {
        let hasher = hasher(1, 1);
        let dead = hasher.work(|| -> Result<(), HashError> { panic!("on purpose") });
        assert!(matches!(dead.await, Err(HashError::Thread(_))));
        hasher.hash("a".into()).await.unwrap();
    }
}
