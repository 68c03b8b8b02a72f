//! A circuit breaker: a gateway that does not answer is left alone for a while, so that buyers are
//! told at once and keep the time that their hold has left.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::future::BoxFuture;
use reqwest::header::HeaderMap;
use tokio::time::Instant;

use super::{Answer, Found, Gateway, Notice, Refund, Trouble, Unverified};
use crate::domain::payment::Charge;

/// Calls in a row without an answer after which nobody calls any more.
const FAILURES_MAX: u32 = 5;
/// How long it is left alone at first, and at most; doubled each time the trial fails.
const PAUSE_MS: u64 = 1_000;
const PAUSE_MS_MAX: u64 = 30_000;

/// Whether a gateway may be called. Time is milliseconds of any clock that does not go back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Breaker {
    /// It answers; so many calls in a row had no answer.
    Closed {
        /// In a row.
        failures: u32,
    },
    /// It is left alone until then.
    Open {
        /// When one call may try.
        until_ms: u64,
        /// How long it is left alone this time.
        pause_ms: u64,
    },
    /// One call tries; the others wait for what becomes of it, but not for ever.
    Trying {
        /// When it is taken for lost.
        until_ms: u64,
        /// How long it was left alone.
        pause_ms: u64,
    },
}

impl Default for Breaker {
    fn default() -> Self {
        Self::Closed { failures: 0 }
    }
}

impl Breaker {
    /// Whether to call now; else how many milliseconds to wait.
    ///
    /// # Errors
    /// The milliseconds.
    pub fn admit(&mut self, now_ms: u64) -> Result<(), u64> {
        match *self {
            Self::Closed { .. } => Ok(()),
            Self::Open { until_ms, .. } | Self::Trying { until_ms, .. } if now_ms < until_ms => {
                Err(until_ms - now_ms)
            }
            Self::Open { pause_ms, .. } | Self::Trying { pause_ms, .. } => {
                let lost = u64::try_from(super::CALL_MAX.as_millis()).unwrap_or(u64::MAX);
                *self = Self::Trying {
                    until_ms: now_ms.saturating_add(lost),
                    pause_ms,
                };
                Ok(())
            }
        }
    }

    /// What became of a call.
    pub fn note(&mut self, answered: bool, now_ms: u64) {
        *self = match (*self, answered) {
            (_, true) => Self::default(),
            (Self::Closed { failures }, false) if failures + 1 < FAILURES_MAX => Self::Closed {
                failures: failures + 1,
            },
            (Self::Closed { .. }, false) => Self::open(now_ms, PAUSE_MS),
            (Self::Trying { pause_ms, .. }, false) => {
                Self::open(now_ms, (pause_ms * 2).min(PAUSE_MS_MAX))
            }
            // One of those that were under way when it opened.
            (open @ Self::Open { .. }, false) => open,
        };
    }

    fn open(now_ms: u64, pause_ms: u64) -> Self {
        Self::Open {
            until_ms: now_ms.saturating_add(pause_ms),
            pause_ms,
        }
    }
}

/// A gateway behind its breaker.
#[derive(Debug)]
pub struct Guarded {
    gateway: Arc<dyn Gateway>,
    breaker: Mutex<Breaker>,
    since: Instant,
}

impl Guarded {
    pub(super) fn new(gateway: Arc<dyn Gateway>) -> Self {
        Self {
            gateway,
            breaker: Mutex::default(),
            since: Instant::now(),
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn guard<'a, T: Send + 'a>(
        &'a self,
        call: impl FnOnce() -> Answer<'a, T> + Send + 'a,
    ) -> Answer<'a, T> {
        Box::pin(async move {
            let breaker = || self.breaker.lock().unwrap_or_else(PoisonError::into_inner);
            let admitted = breaker().admit(self.now_ms());
            if let Err(wait_ms) = admitted {
                return Err(Trouble::Unavailable {
                    reason: "it has not answered for a while".to_owned(),
                    after: Duration::from_millis(wait_ms),
                });
            }
            let answer = call().await;
            let answered = !matches!(
                answer,
                Err(Trouble::Unknown(_) | Trouble::Unavailable { .. })
            );
            breaker().note(answered, self.now_ms());
            answer
        })
    }
}

impl Gateway for Guarded {
    fn open<'a>(&'a self, charge: &'a Charge) -> Answer<'a, String> {
        self.guard(|| self.gateway.open(charge))
    }

    fn authorise<'a>(&'a self, charge: &'a Charge) -> Answer<'a, Found> {
        self.guard(|| self.gateway.authorise(charge))
    }

    fn look<'a>(&'a self, charge: &'a Charge) -> Answer<'a, Found> {
        self.guard(|| self.gateway.look(charge))
    }

    fn capture<'a>(&'a self, charge: &'a Charge, amount: i64) -> Answer<'a, Found> {
        self.guard(move || self.gateway.capture(charge, amount))
    }

    fn void<'a>(&'a self, charge: &'a Charge) -> Answer<'a, Found> {
        self.guard(|| self.gateway.void(charge))
    }

    fn refund<'a>(&'a self, charge: &'a Charge, refund: &'a Refund) -> Answer<'a, ()> {
        self.guard(|| self.gateway.refund(charge, refund))
    }

    /// Not guarded: it is the gateway that calls.
    fn webhook<'a>(
        &'a self,
        headers: &'a HeaderMap,
        body: &'a [u8],
        now: i64,
    ) -> BoxFuture<'a, Result<Notice, Unverified>> {
        self.gateway.webhook(headers, body, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_opens_after_failures_in_a_row_and_closes_with_the_first_answer() {
        let mut breaker = Breaker::default();
        for _ in 0..FAILURES_MAX - 1 {
            breaker.note(false, 0);
        }
        // An answer starts the count again.
        breaker.note(true, 0);
        for _ in 0..FAILURES_MAX - 1 {
            assert_eq!(breaker.admit(0), Ok(()));
            breaker.note(false, 0);
        }
        assert_eq!(breaker.admit(0), Ok(()));
        breaker.note(false, 10);
        assert_eq!(breaker.admit(10), Err(PAUSE_MS));
        assert_eq!(breaker.admit(9 + PAUSE_MS), Err(1));
        // Exactly one tries.
        assert_eq!(breaker.admit(10 + PAUSE_MS), Ok(()));
        assert!(breaker.admit(10 + PAUSE_MS).is_err());
        breaker.note(true, 11 + PAUSE_MS);
        assert_eq!(breaker, Breaker::default());
    }

    #[test]
    fn each_trial_that_fails_doubles_the_pause_up_to_a_bound() {
        let mut breaker = Breaker::open(0, PAUSE_MS);
        let mut now = PAUSE_MS;
        let mut pauses = Vec::new();
        for _ in 0..8 {
            assert_eq!(breaker.admit(now), Ok(()));
            breaker.note(false, now);
            // Latecomers do not prolong it.
            breaker.note(false, now + 1);
            let pause = breaker.admit(now).unwrap_err();
            pauses.push(pause);
            now += pause;
        }
        assert_eq!(pauses[0], 2 * PAUSE_MS);
        assert_eq!(*pauses.last().unwrap(), PAUSE_MS_MAX);
    }

    #[test]
    fn a_trial_that_nobody_reports_back_from_blocks_nobody_for_ever() {
        let mut breaker = Breaker::open(0, PAUSE_MS);
        assert_eq!(breaker.admit(PAUSE_MS), Ok(()));
        let wait = breaker.admit(PAUSE_MS).unwrap_err();
        assert_eq!(breaker.admit(PAUSE_MS + wait), Ok(()));
    }
}
