//! What this node remembers of who did how much, in a memory of fixed size.

use std::{
    collections::{HashMap, hash_map::RandomState},
    hash::BuildHasher,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use tokio::sync::mpsc;

use super::sharing::Share;
use crate::domain::allowance::{Allowance, Rule, Short};

/// Parts of the table, so that requests seldom wait for each other.
const SHARDS: usize = 64;

/// Entries of one part: 262,144 in all, some 20 MiB.
const SHARD_MAX: usize = 4_096;

/// What part of an allowance may be spent before the other nodes hear of it.
const UNTOLD: u64 = 8;

/// Whose allowance, and of what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) rule: Rule,
    pub(super) who: u128,
}

/// What was spent of an allowance; microseconds.
#[derive(Default)]
struct Spending {
    /// When it is whole again.
    whole_at: u64,
    /// What of it the other nodes have not heard of.
    untold_us: u64,
}

pub(super) struct Table {
    born: Instant,
    hasher: RandomState,
    shards: Vec<Mutex<HashMap<Key, Spending>>>,
    shares: Option<mpsc::Sender<Share>>,
}

impl Table {
    /// An empty one that tells `shares` what adds up.
    pub(super) fn new(shares: Option<mpsc::Sender<Share>>) -> Self {
        Self {
            born: Instant::now(),
            hasher: RandomState::new(),
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            shares,
        }
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.born.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    fn shard(&self, key: &Key) -> Option<MutexGuard<'_, HashMap<Key, Spending>>> {
        let place = usize::try_from(self.hasher.hash_one(key) % SHARDS as u64).unwrap_or(0);
        let shard = self.shards.get(place)?;
        Some(shard.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Spends `cost`, if there is so much.
    pub(super) fn spend(&self, key: Key, allowance: Allowance, cost: u32) -> Result<(), Short> {
        let now = self.now_us();
        let Some(mut shard) = self.shard(&key) else {
            return Ok(());
        };
        if shard.len() >= SHARD_MAX && !shard.contains_key(&key) {
            forget(&mut shard, now);
        }
        let spending = shard.entry(key).or_default();
        let whole_at = allowance.spend(spending.whole_at, now, cost)?;
        spending.untold_us += whole_at - spending.whole_at.max(now);
        spending.whole_at = whole_at;
        if let Some(shares) = &self.shares
            && spending.untold_us * UNTOLD >= allowance.whole_us()
        {
            let share = Share {
                key,
                spent_us: spending.untold_us,
                whole_us: allowance.whole_us(),
            };
            // If there is no room, it is told with the next.
            if shares.try_send(share).is_ok() {
                spending.untold_us = 0;
            }
        }
        Ok(())
    }

    /// Takes over what all nodes have spent: what this one has told is in it.
    pub(super) fn learn(&self, share: &Share, gone_us: u64) {
        let now = self.now_us();
        if let Some(spending) = self
            .shard(&share.key)
            .as_mut()
            .and_then(|shard| shard.get_mut(&share.key))
        {
            let whole_at = now + gone_us + spending.untold_us;
            spending.whole_at = spending.whole_at.max(whole_at);
        }
    }

    /// Takes back what could not be told.
    pub(super) fn untold(&self, share: &Share) {
        if let Some(spending) = self
            .shard(&share.key)
            .as_mut()
            .and_then(|shard| shard.get_mut(&share.key))
        {
            // What has come back meanwhile need not be told any more.
            spending.untold_us = (spending.untold_us + share.spent_us).min(share.whole_us);
        }
    }
}

/// Makes room: who has all of his allowance is as good as unknown, and of the others those go who
/// have most of it. Whoever is refused stays.
fn forget(shard: &mut HashMap<Key, Spending>, now: u64) {
    shard.retain(|_, spending| spending.whole_at > now);
    if shard.len() > SHARD_MAX / 2 {
        let mut instants: Vec<_> = shard.values().map(|spending| spending.whole_at).collect();
        let (_, &mut middle, _) = instants.select_nth_unstable(SHARD_MAX / 2);
        shard.retain(|_, spending| spending.whole_at > middle);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(who: u128) -> Key {
        Key {
            rule: Rule::UserRead,
            who,
        }
    }

    #[test]
    fn a_flood_of_strangers_takes_no_more_memory_and_frees_no_offender() {
        let table = Table::new(None);
        let allowance: Allowance = "3+1/h".parse().unwrap();
        for _ in 0..3 {
            table.spend(key(0), allowance, 1).unwrap();
        }
        for who in 1..(SHARDS * SHARD_MAX * 2) as u128 {
            table.spend(key(who), allowance, 1).unwrap();
        }
        let len = |shard: &Mutex<HashMap<_, _>>| shard.lock().unwrap().len();
        assert!(table.shards.iter().all(|shard| len(shard) <= SHARD_MAX));
        table.spend(key(0), allowance, 1).unwrap_err();
    }

    #[test]
    fn only_what_adds_up_is_told_and_all_of_it() {
        let (shares, mut told) = mpsc::channel(4);
        let table = Table::new(Some(shares));
        let allowance: Allowance = "16+1/h".parse().unwrap();
        let hour = 3_600_000_000;
        table.spend(key(1), allowance, 1).unwrap();
        assert!(told.try_recv().is_err());
        table.spend(key(1), allowance, 1).unwrap();
        let share = told.try_recv().unwrap();
        assert_eq!((share.spent_us, share.whole_us), (2 * hour, 16 * hour));

        // The others have spent all but one.
        table.spend(key(1), allowance, 1).unwrap();
        table.learn(&share, 14 * hour);
        table.spend(key(1), allowance, 1).unwrap();
        table.spend(key(1), allowance, 1).unwrap_err();

        // What could not be told is told with the next.
        assert_eq!(told.try_recv().unwrap().spent_us, 2 * hour);
        table.untold(&share);
        table.spend(key(2), allowance, 2).unwrap();
        assert_eq!(told.try_recv().unwrap().key, key(2));
        table.learn(&share, 0);
        table.spend(key(1), allowance, 1).unwrap_err();
    }
}
