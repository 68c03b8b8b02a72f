//! Passwords: rules, and hashing that cannot take the machine away from the sale.

use std::{
    collections::HashSet,
    num::NonZeroUsize,
    sync::{Arc, LazyLock},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::metrics::PasswordMetrics;

/// The shortest password, in characters.
pub const CHARACTERS_MIN: usize = 8;

/// The longest password, in bytes: bcrypt ignores what is behind them.
pub const BYTES_MAX: usize = 72;

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
}

/// Hashes and compares on a few threads, with a bounded queue before them.
///
/// A hash takes tens of milliseconds of a core by design; without the bound a flood of logins
/// would starve the purchases.
#[derive(Clone)]
pub struct PasswordHasher {
    cost: u32,
    /// One permit for each that works or waits.
    places: Arc<Semaphore>,
    /// One permit for each that works.
    workers: Arc<Semaphore>,
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
    /// [`HashError::Bcrypt`] when the cost is out of range.
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
            workers: Arc::new(Semaphore::new(workers.get())),
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
        let Ok(worker) = Arc::clone(&self.workers).acquire_owned().await else {
            return Err(HashError::Busy);
        };
        // Both permits go with the work: a caller that leaves does not make room before it ends.
        let task = tokio::task::spawn_blocking(move || {
            let _held = (place, worker);
            work()
        });
        match task.await {
            Ok(result) => result,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
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
        let busy = hasher.workers.clone().acquire_owned().await.unwrap();
        let mut waiting = [
            Box::pin(hasher.hash("a".into())),
            Box::pin(hasher.hash("b".into())),
        ];
        for future in &mut waiting {
            assert!(futures::poll!(future).is_pending());
        }
        assert!(matches!(
            hasher.hash("c".into()).await,
            Err(HashError::Busy)
        ));
        assert_eq!(hasher.metrics.queue.get(), 2);
        assert_eq!(hasher.metrics.refused.get(), 1);
        drop(waiting);
        drop(busy);
        hasher.hash("d".into()).await.unwrap();
        assert_eq!(hasher.metrics.queue.get(), 0);
    }
}
