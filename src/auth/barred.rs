//! Whose tokens are not believed any more, though their signatures are good: held in memory, and
//! asked of PostgreSQL every few seconds.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        PoisonError, RwLock, RwLockWriteGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::token::{Identity, LIFETIME_MAX_SECONDS};
use crate::{
    faults,
    metrics::IdentityMetrics,
    store::{
        StoreError,
        sessions::{Ended, Sessions},
    },
};

/// The time between two questions: what another node ended is believed for so long at most.
const PAUSE: Duration = Duration::from_secs(3);

/// How long an ended session is remembered: longer than a token that was minted before can live,
/// with the clocks of two nodes apart.
const REMEMBERED: Duration = Duration::from_secs(LIFETIME_MAX_SECONDS as u64 + 120);

/// Ended sessions and disabled users, as far as this node knows.
#[derive(Debug)]
pub struct Barred {
    sessions: Sessions,
    known: RwLock<Known>,
    /// Whether there is anything to look up: mostly there is not, and every purchase asks.
    anybody: AtomicBool,
    learnt: watch::Sender<()>,
    metrics: IdentityMetrics,
}

#[derive(Debug, Default)]
struct Known {
    /// Ended sessions, and when they may be forgotten.
    sessions: HashMap<Uuid, Instant>,
    users: HashSet<Uuid>,
}

impl Barred {
    /// One that knows of nobody yet.
    pub fn new(sessions: Sessions, metrics: IdentityMetrics) -> Self {
        Self {
            sessions,
            known: RwLock::default(),
            anybody: AtomicBool::new(false),
            learnt: watch::Sender::default(),
            metrics,
        }
    }

    /// Whether this one is not to be believed.
    pub fn bars(&self, identity: &Identity) -> bool {
        if !self.anybody.load(Ordering::Acquire) || faults::bug("ended_session_believed") {
            return false;
        }
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        match identity.session {
            Some(session) => known.sessions.contains_key(&session),
            // Signed elsewhere: there is no session that could have ended.
            None => known.users.contains(&identity.user),
        }
    }

    /// These sessions have ended: this node believes them no longer.
    pub fn end(&self, sessions: impl IntoIterator<Item = Uuid>) {
        let until = Instant::now() + REMEMBERED;
        let mut known = self.lock();
        let sessions = sessions.into_iter().map(|session| (session, until));
        known.sessions.extend(sessions);
        self.show(&known);
    }

    /// Changes whenever somebody may have been barred: for what goes on without asking.
    pub fn learnt(&self) -> watch::Receiver<()> {
        self.learnt.subscribe()
    }

    /// Learns what other nodes ended, until `stop`. A node that cannot ask goes on with what it
    /// knows.
    pub async fn run(&self, stop: CancellationToken) {
        let mut as_of = None;
        let mut silent = false;
        loop {
            match self.learn(as_of).await {
                Ok(told) => {
                    if silent {
                        tracing::info!("ended sessions are known again");
                    }
                    (as_of, silent) = (Some(told), false);
                }
                Err(error) => {
                    self.metrics.questions_failed.inc();
                    if !silent {
                        tracing::warn!(
                            %error,
                            "no news of ended sessions: this node goes on with those it knows"
                        );
                    }
                    silent = true;
                }
            }
            let pause = tokio::time::sleep(PAUSE);
            if stop.run_until_cancelled(pause).await.is_none() {
                return;
            }
        }
    }

    /// Learns what has ended since; gives up to where it knows now.
    async fn learn(&self, since: Option<DateTime<Utc>>) -> Result<DateTime<Utc>, StoreError> {
        let Ended {
            as_of,
            sessions,
            disabled,
        } = self.sessions.ended_since(since).await?;
        let now = Instant::now();
        let mut known = self.lock();
        for session in sessions {
            known.sessions.entry(session).or_insert(now + REMEMBERED);
        }
        known.sessions.retain(|_, until| *until > now);
        known.users = disabled.into_iter().collect();
        self.show(&known);
        Ok(as_of)
    }

    fn show(&self, known: &Known) {
        let count = known.sessions.len() + known.users.len();
        self.anybody.store(count > 0, Ordering::Release);
        self.learnt.send_replace(());
        self.metrics
            .barred
            .set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    fn lock(&self) -> RwLockWriteGuard<'_, Known> {
        self.known.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        auth::Role,
        store::{Database, DatabaseSettings},
    };

    #[tokio::test]
    async fn a_node_without_news_goes_on_with_what_it_knows() {
        let settings = DatabaseSettings {
            acquire_timeout: Duration::from_millis(50),
            ..DatabaseSettings::default()
        };
        let database = Database::new("postgres://nobody@127.0.0.1:9/none", settings).unwrap();
        let metrics = IdentityMetrics::default();
        let barred = Barred::new(Sessions::new(database), metrics.clone());
        let [ended, lasting] = [Uuid::from_u128(1), Uuid::from_u128(2)];
        let identity = |session| Identity {
            user: Uuid::from_u128(3),
            role: Role::Buyer,
            session,
            registered_at: None,
        };
        assert!(!barred.bars(&identity(Some(ended))));
        barred.end([ended]);

        let (stop, asked) = (CancellationToken::new(), metrics.questions_failed.clone());
        let run = barred.run(stop.clone());
        let heard = async {
            while asked.get() == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            stop.cancel();
        };
        tokio::join!(run, heard);
        assert!(barred.bars(&identity(Some(ended))));
        assert!(!barred.bars(&identity(Some(lasting))));
        assert!(!barred.bars(&identity(None)));
        barred.lock().users.insert(identity(None).user);
        assert!(barred.bars(&identity(None)));
        assert!(!barred.bars(&identity(Some(lasting))));
        assert_eq!(metrics.barred.get(), 1);
    }
}
