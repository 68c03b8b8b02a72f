//! What there is of a partition, what there must be, and what that allows. Pure.

use std::{collections::BTreeSet, time::Duration};

use crate::{
    domain::{
        id::{Epoch, Partition, RoundId, SaleNumber},
        limits::CLOCK_JUMP_MS,
    },
    engine::Inspection,
    faults,
    store::{floors::NodeFloor, journal::Position},
};

/// A node that has said nothing for so long is dead.
pub(super) const DEAD: Duration = Duration::from_secs(10);

/// Everything that recovery knows of a partition, as of one look.
#[derive(Clone, Debug)]
pub struct Assessment {
    /// Which.
    pub partition: Partition,
    /// What PostgreSQL has.
    pub position: Position,
    /// What Redis says of itself.
    pub redis: Inspection,
    /// Whether Redis has on its disk what it answers.
    pub synced: bool,
    /// What nodes have seen in an epoch that still counts; ours is not among them.
    pub others: Vec<NodeFloor>,
    /// The highest entry that we have seen ourselves; `None` when we have not sold.
    pub own: Option<u64>,
    /// What of the journal there still is, in PostgreSQL and in Redis together.
    pub survives: Survives,
    /// Why Redis is not as it must be; `None` when it is.
    pub damage: Option<String>,
    /// The sales that must be made anew.
    pub sales: BTreeSet<SaleNumber>,
    /// Redis' clock less our estimate of it, if we have one of this server.
    pub clock_ahead_ms: Option<i64>,
}

/// What may be done with a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is as it must be, in the epoch that it must be in.
    Adopt,
    /// Nothing is missing: a new epoch may begin. `doubt`: nobody lives to say so.
    Begin {
        /// Nodes that are gone without a last word, while Redis may have lost what it answered.
        doubt: usize,
    },
    /// It is not whole, and PostgreSQL and the journal have everything that was acknowledged.
    Rebuild,
    /// Something else has to happen first.
    Wait(String),
    /// Something that was acknowledged is missing, or may be: a human has to decide.
    Lost(Loss),
    /// A human has to look, and no rebuild would help.
    Stop(String),
}

/// What is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loss {
    /// In words that do not change from look to look.
    pub reason: String,
    /// The last entry that any node is known to have seen.
    pub seen_to: u64,
    /// Nodes that are gone without a last word.
    pub silent: usize,
}

impl Assessment {
    /// What may be done.
    pub fn verdict(&self) -> Verdict {
        if let Some(ahead_ms) = self.clock_ahead_ms
            && ahead_ms.abs() > CLOCK_JUMP_MS
        {
            let direction = if ahead_ms > 0 { "ahead" } else { "back" };
            return Verdict::Stop(format!(
                "the clock of Redis jumped {direction} by more than {} s; if it is right now, \
                 restart this node",
                CLOCK_JUMP_MS / 1000
            ));
        }
        match &self.damage {
            Some(damage) => self.rebuild(damage),
            None if self.is_adoptable() => Verdict::Adopt,
            None => self.begin(),
        }
    }

    /// Whether Redis is in the very epoch that it must be in, on the server that it began on.
    pub fn is_adoptable(&self) -> bool {
        self.damage.is_none()
            && self.redis.same_incarnation
            && self.redis.epoch == Some(self.position.epoch)
    }

    /// Nodes that sold and have not said that they stopped: alive, and gone.
    fn unfinished(&self) -> (usize, usize) {
        let open = self.others.iter().filter(|other| !other.last_word);
        let silent = open.clone().filter(|other| other.age >= DEAD).count();
        (open.count() - silent, silent)
    }

    /// Another run of the server is as far as anybody has said. That is everything if what Redis
    /// answered was on its disk; otherwise everybody has to say how far he has seen.
    fn begin(&self) -> Verdict {
        let may_lack = !self.redis.same_incarnation
            && (!self.synced || self.redis.promoted)
            && self.redis.epoch.is_some();
        match self.unfinished() {
            (1.., _) if may_lack => {
                Verdict::Wait("another node has not said yet how far it has seen".to_owned())
            }
            (_, silent) if may_lack && !faults::bug("doubt_ignored") => {
                Verdict::Begin { doubt: silent }
            }
            _ => Verdict::Begin { doubt: 0 },
        }
    }

    fn rebuild(&self, damage: &str) -> Verdict {
        let end = self.survives.end;
        let (alive, silent) = self.unfinished();
        let seen_to = self.seen_to();
        if alive > 0 {
            return Verdict::Wait("another node has not said yet how far it has seen".to_owned());
        }
        if seen_to > end && !faults::bug("rebuild_without_floor") {
            let first = end + 1;
            return Verdict::Lost(Loss {
                reason: format!(
                    "{damage}; entries {first} to {seen_to} of the journal were acknowledged, and \
                     neither PostgreSQL nor the journal has them"
                ),
                seen_to,
                silent,
            });
        }
        // A journal that goes to the end that Redis itself counted has everything.
        let journal_says = self.survives.journal && self.redis.epoch.is_some();
        let all_said = self.own.is_some() || self.others.iter().any(|node| node.last_word);
        if journal_says || (silent == 0 && all_said) {
            return Verdict::Rebuild;
        }
        Verdict::Lost(Loss {
            reason: format!(
                "{damage}; nobody who sold lives to say whether entries after {end} were \
                 acknowledged"
            ),
            seen_to,
            silent,
        })
    }

    /// The last entry that anybody is known to have seen.
    pub fn seen_to(&self) -> u64 {
        let redis = self.redis.epoch.map_or(0, |_| self.redis.pseq);
        let others = self.others.iter().map(|other| other.floor.pseq);
        others.chain(self.own).fold(redis, u64::max)
    }
}

/// What there still is of the journal, in PostgreSQL and in Redis together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Survives {
    /// The number of the last entry.
    pub end: u64,
    /// Whether Redis has the journal from the position on; otherwise it begins anew.
    pub journal: bool,
}

impl Survives {
    pub(super) fn of(redis: &Inspection, position: &Position) -> Self {
        let stored = position.stored;
        match (
            redis.journal_length,
            redis.journal_first,
            redis.journal_last,
        ) {
            (Some(length), Some(first), Some(last))
                if first.pseq <= stored.pseq + 1
                    && last >= stored
                    && last.epoch <= position.epoch
                    && length == last.pseq - first.pseq + 1 =>
            {
                Self {
                    end: last.pseq,
                    journal: true,
                }
            }
            _ => Self::without_journal(position),
        }
    }

    pub(super) fn without_journal(position: &Position) -> Self {
        Self {
            end: position.stored.pseq,
            journal: false,
        }
    }
}

/// How far a node has seen of what still counts: an operator may have decided to go on without the
/// rest.
pub(super) fn capped(epoch: Epoch, seen: u64, settled: &[(Epoch, u64)]) -> u64 {
    settled
        .iter()
        .filter(|(began, _)| *began > epoch)
        .fold(seen, |seen, (_, end)| seen.min(*end))
}

/// Whether Redis has everything that it must have.
pub(super) fn matches(
    redis: &Inspection,
    position: &Position,
    floor: u64,
    provisioned: &[RoundId],
) -> Result<(), String> {
    if faults::bug("redis_believed") {
        return Ok(());
    }
    let stored = position.stored;
    let Some(epoch) = redis.epoch else {
        let fresh = position.installed.0 == 0
            && stored.pseq == 0
            && floor == 0
            && provisioned.is_empty()
            && redis.journal_length == Some(0);
        return if fresh {
            Ok(())
        } else {
            Err(format!(
                "Redis does not know the partition, but PostgreSQL has {} rounds of it and its \
                 journal up to entry {}",
                provisioned.len(),
                stored.pseq
            ))
        };
    };
    // A server that has lost nothing since its epoch began may be ahead: then PostgreSQL has been
    // set back, and the journal has what it forgot.
    let ahead = epoch > position.epoch && !redis.same_incarnation;
    if ahead || epoch < position.installed || epoch < stored.epoch {
        return Err(format!(
            "Redis is in epoch {}, PostgreSQL in {} (last installed {}, last stored {})",
            epoch.0, position.epoch.0, position.installed.0, stored.epoch.0
        ));
    }
    if redis.pseq < stored.pseq.max(floor) {
        return Err(format!(
            "Redis has {} journal entries, but {} were seen and {} are stored",
            redis.pseq, floor, stored.pseq
        ));
    }
    let journal = (
        redis.journal_length,
        redis.journal_first,
        redis.journal_last,
    );
    let whole = match journal {
        (Some(0), None, None) => redis.pseq == stored.pseq,
        (Some(length), Some(first), Some(last)) => {
            last.pseq == redis.pseq
                && first.pseq <= stored.pseq + 1
                && length == last.pseq - first.pseq + 1
        }
        _ => false,
    };
    if whole {
        Ok(())
    } else {
        Err(format!(
            "the journal has {:?} entries from {} to {}; entries {} to {} are needed",
            redis.journal_length,
            redis.journal_first.map_or(0, |id| id.pseq),
            redis.journal_last.map_or(0, |id| id.pseq),
            stored.pseq + 1,
            redis.pseq
        ))
    }
}
