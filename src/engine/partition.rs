//! A node's view of a partition: the timeline, how far it has seen, Redis' clock, and the fence.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::sync::watch;

use super::{
    error::EngineError,
    packed,
    reply::{Head, Reply},
};
use crate::domain::{
    id::{Epoch, JournalId, Partition},
    limits::{CALL_DEADLINE_MS, CLOCK_JUMP_MS},
};

/// An estimate of Redis' clock older than this is replaced whatever the new one says.
const CLOCK_ANCHOR_AGE: Duration = Duration::from_secs(2);

// A clock that stands still, because it was set back, must not look like a jump.
const _: () = assert!(CLOCK_ANCHOR_AGE.as_millis() * 2 < CLOCK_JUMP_MS as u128);

/// Whether purchases are let through to Redis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fence {
    /// Nothing is in the way.
    Open(Epoch),
    /// Redis may have lost something: nothing is sold until recovery has looked at it.
    Fenced(String),
}

/// A node's view of one partition.
#[derive(Debug)]
pub(super) struct PartitionView {
    partition: Partition,
    seen: Mutex<Seen>,
    fence: watch::Sender<Fence>,
}

#[derive(Debug, Default)]
struct Seen {
    /// The last timeline that was open.
    epoch: Epoch,
    /// The highest pseq in any reply of it.
    pseq: u64,
    /// Redis' clock at an instant of ours.
    clock: Option<(i64, Instant)>,
    /// The latest instant of Redis' clock that anybody has been told.
    told_ms: i64,
}

impl Seen {
    fn redis_ms(&self, at: Instant) -> Option<i64> {
        let (ms, anchor) = self.clock?;
        let elapsed = at.saturating_duration_since(anchor).as_millis();
        Some(ms.saturating_add(i64::try_from(elapsed).unwrap_or(i64::MAX)))
    }

    /// The estimate as a buyer may be told it: news that came late takes no time back, or the wait
    /// for a start would grow from one answer to the next.
    fn tell_ms(&mut self, at: Instant) -> Option<i64> {
        self.told_ms = self.told_ms.max(self.redis_ms(at)?);
        Some(self.told_ms)
    }

    /// Every reply is late by its way back, so the highest estimate is the best one.
    fn learn_clock(&mut self, now_ms: i64, at: Instant) {
        let stale = self
            .clock
            .is_none_or(|(_, anchor)| at.saturating_duration_since(anchor) > CLOCK_ANCHOR_AGE);
        if stale || self.redis_ms(at).is_none_or(|estimate| now_ms > estimate) {
            self.clock = Some((now_ms, at));
        }
        self.told_ms = self.told_ms.max(now_ms);
    }
}

impl PartitionView {
    pub(super) fn new(partition: Partition) -> Self {
        let (fence, _) = watch::channel(Fence::Fenced("not checked yet".to_owned()));
        Self {
            partition,
            seen: Mutex::default(),
            fence,
        }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state of the fence, and its changes.
    pub(super) fn fence(&self) -> watch::Receiver<Fence> {
        self.fence.subscribe()
    }

    /// The timeline, unless the partition is fenced.
    pub(super) fn epoch(&self) -> Result<Epoch, EngineError> {
        match &*self.fence.borrow() {
            Fence::Open(epoch) => Ok(*epoch),
            Fence::Fenced(reason) => Err(EngineError::Fenced(reason.clone())),
        }
    }

    /// The last timeline that was open, and the highest pseq that any reply of it has shown: Redis
    /// must never be behind it.
    pub(super) fn floor(&self) -> JournalId {
        let seen = self.seen();
        JournalId {
            epoch: seen.epoch,
            pseq: seen.pseq,
        }
    }

    /// Redis' clock now, for whom no script answers: never less than anybody was told before.
    pub(super) fn tell_ms(&self, at: Instant) -> Option<i64> {
        self.seen().tell_ms(at)
    }

    /// Redis' clock now, as far as this node can tell.
    pub(super) fn redis_ms(&self, at: Instant) -> Option<i64> {
        self.seen().redis_ms(at)
    }

    /// Lets purchases through, in a timeline that recovery has checked.
    ///
    /// Redis' clock showed `now_ms` at our instant `at`.
    pub(super) fn open(&self, epoch: Epoch, pseq: u64, now_ms: i64, at: Instant) {
        let mut seen = self.seen();
        // A later timeline may begin below what an older one had reached.
        seen.pseq = if epoch > seen.epoch {
            pseq
        } else {
            seen.pseq.max(pseq)
        };
        seen.epoch = epoch;
        seen.clock = Some((now_ms, at));
        // Recovery may have looked at a clock that was set anew.
        seen.told_ms = now_ms;
        drop(seen);
        self.fence.send_replace(Fence::Open(epoch));
    }

    /// Stops purchases until recovery has looked.
    pub(super) fn close(&self, reason: &str) {
        let changed = self.fence.send_if_modified(|fence| {
            let closes = matches!(fence, Fence::Open(_));
            if closes {
                *fence = Fence::Fenced(reason.to_owned());
            }
            closes
        });
        if changed {
            tracing::error!(
                partition = %self.partition,
                reason,
                "partition fenced: nothing is sold until it has been verified"
            );
        }
    }

    /// The argument with which a script decides whether to let this node in.
    pub(super) fn caller(&self) -> Result<(Epoch, Bytes), EngineError> {
        let epoch = self.epoch()?;
        let seen = self.seen();
        let expected_ms = seen
            .redis_ms(Instant::now())
            .ok_or(EngineError::Disconnected)?;
        let not_after_ms = expected_ms.saturating_add(CALL_DEADLINE_MS);
        let caller = packed::caller(epoch, seen.pseq, expected_ms, not_after_ms);
        Ok((epoch, caller.into()))
    }

    /// Reads the head of a reply, and learns from it.
    pub(super) fn admit(&self, epoch: Epoch, reply: &mut Reply) -> Result<Head, EngineError> {
        let at = Instant::now();
        match reply.text()?.as_str() {
            "ok" => {
                let head = Head {
                    now_ms: reply.number()?,
                    pseq: reply.number()?,
                };
                let mut seen = self.seen();
                if epoch == seen.epoch {
                    seen.pseq = seen.pseq.max(head.pseq);
                }
                seen.learn_clock(head.now_ms, at);
                Ok(head)
            }
            "fenced" => {
                let reason = reply.text()?;
                // A call from before a new epoch says nothing about the present one.
                if self.epoch() == Ok(epoch) {
                    self.close(&reason);
                }
                Err(EngineError::Fenced(reason))
            }
            "damaged" => Err(EngineError::Damaged(reply.text()?)),
            "expired" => {
                let now_ms: i64 = reply.number()?;
                let mut seen = self.seen();
                let ahead_ms = now_ms - seen.redis_ms(at).unwrap_or(now_ms);
                // A small step is believed; otherwise every further call would be late, too.
                if ahead_ms <= CLOCK_JUMP_MS {
                    seen.learn_clock(now_ms, at);
                }
                drop(seen);
                if ahead_ms > CLOCK_JUMP_MS {
                    self.close("Redis' clock jumped ahead");
                }
                Err(EngineError::Expired)
            }
            word => Err(reply.unexpected(word)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_estimate_keeps_the_earliest_news_and_forgets_old_ones() {
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        let mut seen = Seen::default();
        assert_eq!(seen.redis_ms(start), None);
        seen.learn_clock(1_000, start);
        assert_eq!(seen.redis_ms(after(50)), Some(1_050));
        // Late news: this reply was 40 ms on its way.
        seen.learn_clock(1_060, after(100));
        assert_eq!(seen.redis_ms(after(100)), Some(1_100));
        // Fresher news.
        seen.learn_clock(1_205, after(200));
        assert_eq!(seen.redis_ms(after(200)), Some(1_205));
        // Redis' clock is slow: after a while that is believed.
        seen.learn_clock(11_000, after(11_000));
        assert_eq!(seen.redis_ms(after(11_000)), Some(11_000));
    }

    #[test]
    fn what_is_told_of_the_clock_never_goes_back() {
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        let mut seen = Seen::default();
        assert_eq!(seen.tell_ms(start), None);
        seen.learn_clock(1_000, start);
        assert_eq!(seen.tell_ms(after(3_000)), Some(4_000));
        // The old news is given up for this, which was 70 ms on its way.
        seen.learn_clock(3_940, after(3_010));
        assert_eq!(seen.redis_ms(after(3_010)), Some(3_940));
        assert_eq!(seen.tell_ms(after(3_010)), Some(4_000));
        assert_eq!(seen.tell_ms(after(3_110)), Some(4_040));
        // Two replies that overtook each other.
        seen.learn_clock(7_200, after(6_200));
        seen.learn_clock(7_190, after(8_300));
        assert_eq!(seen.tell_ms(after(8_300)), Some(7_200));
    }

    #[test]
    fn a_partition_starts_fenced_and_tells_the_first_reason() {
        let view = PartitionView::new(Partition(0));
        assert!(matches!(view.caller(), Err(EngineError::Fenced(_))));
        view.open(Epoch(3), 7, 1_000, Instant::now());
        assert_eq!(view.epoch(), Ok(Epoch(3)));
        let floor = |epoch, pseq| JournalId {
            epoch: Epoch(epoch),
            pseq,
        };
        assert_eq!(view.floor(), floor(3, 7));
        view.open(Epoch(3), 5, 1_000, Instant::now());
        assert_eq!(view.floor(), floor(3, 7));
        view.close("first");
        view.close("second");
        assert_eq!(view.epoch(), Err(EngineError::Fenced("first".to_owned())));
        view.open(Epoch(4), 2, 1_000, Instant::now());
        assert_eq!(view.floor(), floor(4, 2));
    }
}
