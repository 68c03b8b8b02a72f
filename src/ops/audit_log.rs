//! The audit log: requests go into it, rows get their places in its chain, and the chain is verified.

use std::{
    collections::{HashMap, hash_map},
    mem,
    sync::Arc,
    time::Duration,
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use chrono::DateTime;
use hmac::{Hmac, KeyInit, Mac, digest::InvalidLength};
use sha2::Sha256;
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{
    domain::audit_log::{Broken, Link, Verifier},
    metrics::AuditLogMetrics,
    store::{
        StoreError,
        audit_log::{AuditLog, Entry, Target},
    },
};

/// Entries that may wait for PostgreSQL; more are dropped and counted.
const QUEUE_MAX: usize = 8_192;
/// Entries in one statement.
const BATCH: usize = 512;
/// The time over which what changes nothing is counted.
const MINUTE: Duration = Duration::from_mins(1);
/// Different things that are counted at a time: with two rows for each, and a row of 300 bytes, a
/// flood of refusals takes at most 9 MB an hour of each node.
const COUNTED_MAX: usize = 256;
/// The pause after PostgreSQL did not take a batch, and before rows get their places.
const PAUSE: Duration = Duration::from_secs(1);
/// Rows that get their places in one transaction, and that are read at once to verify them.
const ROWS: i64 = 1_000;

/// Where entries go in. Never waits.
#[derive(Clone)]
pub struct AuditTrail {
    entries: Option<mpsc::Sender<(Entry, Weight)>>,
    metrics: AuditLogMetrics,
    /// Turns what somebody tried to log in with into something that says nothing without it.
    handles: Option<Arc<Hmac<Sha256>>>,
}

/// Whether an entry has a row of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    /// Something was changed.
    Whole,
    /// Nothing was: the first in a minute has a row, the rest of it are counted in one more.
    Counted,
}

impl AuditTrail {
    /// A trail that leads nowhere.
    pub fn off() -> Self {
        Self {
            entries: None,
            metrics: AuditLogMetrics::default(),
            handles: None,
        }
    }

    /// A trail, and what has to [run](AuditTrailWriter::run) for it.
    ///
    /// # Errors
    /// Never for a secret of any length; the library's signature says otherwise.
    pub fn new(
        log: AuditLog,
        secret: &[u8],
        metrics: AuditLogMetrics,
    ) -> Result<(Self, AuditTrailWriter), InvalidLength> {
        let (sender, entries) = mpsc::channel(QUEUE_MAX);
        let trail = Self {
            entries: Some(sender),
            metrics,
            handles: Some(Arc::new(Hmac::new_from_slice(secret)?)),
        };
        Ok((trail, AuditTrailWriter { entries, log }))
    }

    /// A trail into the hands of a test.
    #[cfg(test)]
    pub(crate) fn shown() -> (Self, mpsc::Receiver<(Entry, Weight)>) {
        let (sender, entries) = mpsc::channel(QUEUE_MAX);
        let trail = Self {
            entries: Some(sender),
            ..Self::off()
        };
        (trail, entries)
    }

    /// Stands for an e-mail address that somebody tried to log in with: the same for the same one,
    /// and nobody can tell which without the secret.
    pub fn account(&self, email: &str) -> Option<Target> {
        let mut handle = Hmac::clone(self.handles.as_ref()?);
        handle.update(b"audit log: account");
        handle.update(email.as_bytes());
        let handle = handle.finalize().into_bytes();
        Some(Target {
            kind: "accounts".to_owned(),
            id: BASE64_URL_SAFE_NO_PAD.encode(&handle[..9]),
        })
    }

    /// Adds an entry, as soon as PostgreSQL takes it.
    pub fn add(&self, entry: Entry, weight: Weight) {
        if let Some(entries) = &self.entries
            && entries.try_send((entry, weight)).is_err()
        {
            self.metrics.dropped.inc();
        }
    }
}

/// Where entries come out.
pub struct AuditTrailWriter {
    entries: mpsc::Receiver<(Entry, Weight)>,
    log: AuditLog,
}

impl AuditTrailWriter {
    /// Writes entries until `stop`, and what is there then.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut minute = interval(MINUTE);
        minute.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut counts = Counts::default();
        let mut came = Vec::with_capacity(BATCH);
        loop {
            let rows = tokio::select! {
                () = stop.cancelled() => break,
                _ = minute.tick() => counts.end(),
                entries = self.entries.recv_many(&mut came, BATCH) => {
                    if entries == 0 {
                        // Nobody is left to add any.
                        stop.cancelled().await;
                        break;
                    }
                    came.drain(..).filter_map(|(entry, weight)| counts.take(entry, weight)).collect()
                }
            };
            let rows: Vec<Entry> = rows;
            while let Err(error) = self.write(&rows).await {
                tracing::warn!(%error, rows = rows.len(), "the audit log waits for PostgreSQL");
                if stop.run_until_cancelled(sleep(PAUSE)).await.is_none() {
                    break;
                }
            }
        }
        self.entries.close();
        let mut rows = Vec::new();
        while let Ok((entry, weight)) = self.entries.try_recv() {
            rows.extend(counts.take(entry, weight));
        }
        rows.extend(counts.end());
        if let Err(error) = self.write(&rows).await {
            tracing::error!(%error, rows = rows.len(), "lost for the audit log");
        }
    }

    async fn write(&self, rows: &[Entry]) -> Result<(), StoreError> {
        if rows.is_empty() {
            return Ok(());
        }
        self.log.add(rows.to_vec()).await
    }
}

/// What was counted since the minute began, by everything but instant and request.
#[derive(Default)]
struct Counts(HashMap<Entry, Entry>);

impl Counts {
    /// The row that an entry has at once, if it has one.
    fn take(&mut self, entry: Entry, weight: Weight) -> Option<Entry> {
        if weight == Weight::Whole {
            return Some(entry);
        }
        let mut key = entry.clone();
        (key.at, key.request_id, key.times) = (DateTime::default(), None, 0);
        if self.0.len() >= COUNTED_MAX && !self.0.contains_key(&key) {
            // Of so many nobody is told apart any more.
            (key.actor, key.client, key.target) = (None, None, None);
        }
        match self.0.entry(key) {
            hash_map::Entry::Vacant(place) => {
                let mut rest = entry.clone();
                rest.times = 0;
                place.insert(rest);
                Some(entry)
            }
            hash_map::Entry::Occupied(mut counted) => {
                let counted = counted.get_mut();
                if counted.times == 0 {
                    (counted.at, counted.request_id) = (entry.at, entry.request_id);
                }
                counted.times += 1;
                None
            }
        }
    }

    /// Begins the next minute. Gives what was counted.
    fn end(&mut self) -> Vec<Entry> {
        let counted = mem::take(&mut self.0).into_iter();
        let rows = counted.map(|(key, first)| Entry {
            at: first.at,
            request_id: first.request_id,
            times: first.times,
            ..key
        });
        rows.filter(|row| row.times > 0).collect()
    }
}

/// Gives rows their places until `stop`.
pub async fn chain(log: AuditLog, stop: CancellationToken) {
    loop {
        match log.chain(ROWS).await {
            Ok(rows) if i64::try_from(rows).is_ok_and(|rows| rows == ROWS) => continue,
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "the audit log was not chained"),
        }
        if stop.run_until_cancelled(sleep(PAUSE)).await.is_none() {
            return;
        }
    }
}

/// What became of looking at a chain.
#[derive(Clone, Copy, Debug)]
pub struct Verified {
    /// The last row that is whole.
    pub at: Link,
    /// What is wrong behind it.
    pub broken: Option<Broken>,
}

/// Looks at the whole chain as it is now. `noted` is a place in it that was written down elsewhere:
/// only that shows a chain that somebody has made anew as a whole.
///
/// # Errors
/// [`StoreError`].
pub async fn verify(log: &AuditLog, noted: Option<Link>) -> Result<Verified, StoreError> {
    let head = log.head().await?;
    let mut verifier = Verifier::new(head);
    let broken = loop {
        let mut rows = log.chained(verifier.at().number, ROWS).await?;
        // What was chained since the head was read is for the next look.
        rows.retain(|row| row.link.number <= head.number);
        if rows.is_empty() {
            let beyond = log.beyond().await?;
            let beyond = beyond.and_then(|row| verifier.next(&row).err());
            break verifier.end().err().or(beyond);
        }
        let mut wrong = None;
        for row in &rows {
            wrong = verifier.next(row).err();
            let other = noted.filter(|noted| noted.number == row.link.number);
            if wrong.is_none() && other.is_some_and(|noted| noted.hash != row.link.hash) {
                wrong = Some(Broken::OtherHead {
                    number: row.link.number,
                });
            }
            if wrong.is_some() {
                break;
            }
        }
        if wrong.is_some() {
            break wrong;
        }
    };
    let cut = noted.filter(|noted| broken.is_none() && noted.number > verifier.at().number);
    Ok(Verified {
        at: verifier.at(),
        broken: broken.or(cut.map(|noted| Broken::Removed {
            from: verifier.at().number + 1,
            to: noted.number,
        })),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{clock, store::audit_log::Actor};

    fn entry(target: usize, outcome: &'static str) -> Entry {
        Entry {
            at: clock::now(),
            action: "accounts_login".into(),
            actor: Some(Actor {
                user: None,
                role: "buyer",
                credential: None,
            }),
            client: Some("192.0.2.0/24".to_owned()),
            request_id: Some(clock::new_id().to_string()),
            target: Some(Target {
                kind: "account".to_owned(),
                id: target.to_string(),
            }),
            outcome,
            times: 1,
        }
    }

    #[test]
    fn what_changes_nothing_has_two_rows_a_minute_at_most() {
        let mut counts = Counts::default();
        assert!(counts.take(entry(1, "done"), Weight::Whole).is_some());
        assert!(counts.take(entry(1, "done"), Weight::Whole).is_some());
        assert!(counts.end().is_empty());

        let refused = || entry(1, "invalid_credentials");
        let first = refused();
        assert_eq!(
            counts.take(first.clone(), Weight::Counted),
            Some(first),
            "the first is there at once"
        );
        let second = refused();
        assert_eq!(counts.take(second.clone(), Weight::Counted), None);
        for _ in 0..7 {
            assert_eq!(counts.take(refused(), Weight::Counted), None);
        }
        let rest = counts.end();
        assert_eq!(rest, [Entry { times: 8, ..second }]);
        assert!(counts.end().is_empty());
    }

    #[test]
    fn a_flood_fills_a_bounded_number_of_rows_and_all_are_counted() {
        let mut counts = Counts::default();
        let mut rows = Vec::new();
        for target in 0..10 * COUNTED_MAX {
            rows.extend(counts.take(entry(target, "invalid_credentials"), Weight::Counted));
        }
        rows.extend(counts.end());
        assert!(rows.len() <= 2 * COUNTED_MAX + 2, "{}", rows.len());
        let times: u64 = rows.iter().map(|row| row.times).sum();
        assert_eq!(times, 10 * COUNTED_MAX as u64);
    }
}
