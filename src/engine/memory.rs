//! What a node may refuse by itself, without asking Redis.
//!
//! A refusal from memory must not hit a retry of an accepted order. So it is allowed only for an
//! order id that provably does not exist at the (epoch, seq) that is remembered, and what is
//! remembered lives at most [`MEMORY_MS`]. Acceptances always come from Redis.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::packed::Standing;
use crate::domain::{
    id::{Epoch, RoundId},
    limits::MEMORY_MS,
    order::{Purchase, Refusal},
    round::State,
};

/// Orders of a sale above which no proof is loaded: 8 MB of ids per round is enough.
pub(super) const PROOF_ORDERS_MAX: u64 = 1_000_000;

/// How long a reply is believed.
const MEMORY: Duration = Duration::from_millis(MEMORY_MS.unsigned_abs());

/// The time between two attempts to load a proof for one round.
const PROOF_INTERVAL: Duration = Duration::from_millis(250);

/// The ids of all orders of a sale, as of one event of one of its rounds.
#[derive(Debug)]
pub(super) struct Proof {
    epoch: Epoch,
    seq: u64,
    ids: HashSet<u64>,
}

impl Proof {
    pub(super) fn new(standing: &Standing, ids: HashSet<u64>) -> Self {
        Self {
            epoch: standing.epoch,
            seq: standing.counters.seq,
            ids,
        }
    }

    fn covers(&self, standing: &Standing) -> bool {
        (self.epoch, self.seq) == (standing.epoch, standing.counters.seq)
    }
}

#[derive(Debug)]
struct Remembered {
    standing: Standing,
    at: Instant,
    proof: Option<Arc<Proof>>,
    proof_asked_at: Option<Instant>,
}

/// What a node remembers of the rounds that it sells.
#[derive(Debug, Default)]
pub(super) struct Memory(Mutex<HashMap<RoundId, Remembered>>);

impl Memory {
    fn rounds(&self) -> MutexGuard<'_, HashMap<RoundId, Remembered>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers what a reply said, if it is newer than what is remembered.
    pub(super) fn learn(&self, standing: &Standing, at: Instant) {
        let mut rounds = self.rounds();
        match rounds.get_mut(&standing.round) {
            Some(known) => {
                // Replies of several calls arrive in any order.
                let age = |s: &Standing| (s.epoch, s.counters.seq, s.now_ms);
                if age(standing) >= age(&known.standing) {
                    known.standing = *standing;
                    known.at = at;
                }
            }
            None => {
                let remembered = Remembered {
                    standing: *standing,
                    at,
                    proof: None,
                    proof_asked_at: None,
                };
                rounds.insert(standing.round, remembered);
            }
        }
    }

    /// The latest standing of a round that this node saw, however old.
    pub(super) fn latest(&self, round: RoundId) -> Option<Standing> {
        self.rounds().get(&round).map(|known| known.standing)
    }

    /// Whether a proof is due for the round; the caller must load it then.
    pub(super) fn wants_proof(&self, round: RoundId, at: Instant) -> bool {
        let mut rounds = self.rounds();
        let Some(known) = rounds.get_mut(&round) else {
            return false;
        };
        let refuses = match known.standing.state {
            State::Open => known.standing.sold_out(),
            State::Closed => true,
            State::Scheduled | State::Paused => false,
        };
        let proved = known
            .proof
            .as_ref()
            .is_some_and(|proof| proof.covers(&known.standing));
        let asked = known
            .proof_asked_at
            .is_some_and(|asked| at.saturating_duration_since(asked) < PROOF_INTERVAL);
        if !refuses || proved || asked {
            return false;
        }
        known.proof_asked_at = Some(at);
        true
    }

    /// Keeps a proof.
    pub(super) fn prove(&self, round: RoundId, proof: Proof) {
        if let Some(known) = self.rounds().get_mut(&round) {
            known.proof = Some(Arc::new(proof));
        }
    }

    /// Refuses a purchase, if it is certain that Redis would.
    ///
    /// `redis_ms` is the node's estimate of Redis' clock, which is never ahead of it by more than
    /// the drift of two clocks within seconds.
    pub(super) fn refuse(
        &self,
        purchase: &Purchase,
        epoch: Epoch,
        at: Instant,
        redis_ms: i64,
    ) -> Option<Refusal> {
        let (standing, proof) = {
            let rounds = self.rounds();
            let known = rounds.get(&purchase.round)?;
            let age = at.saturating_duration_since(known.at);
            if age > MEMORY || known.standing.epoch != epoch {
                return None;
            }
            (known.standing, known.proof.clone())
        };
        let refusal = match standing.state {
            // Before the first opening of a sale it has no orders: nothing to prove.
            State::Scheduled if purchase.round.round == 1 => {
                let opens_at_ms = standing.window.opens_at_ms;
                let certain = redis_ms + 2 * MEMORY_MS < opens_at_ms;
                return certain.then_some(Refusal::NotOpen { opens_at_ms });
            }
            State::Closed => Refusal::Closed,
            State::Open if standing.sold_out() => Refusal::SoldOut,
            State::Scheduled | State::Paused | State::Open => return None,
        };
        let proof = proof.filter(|proof| proof.covers(&standing))?;
        (!proof.ids.contains(&purchase.order.prefix())).then_some(refusal)
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::domain::{
        id::{BuyerId, Fingerprint, OrderId, SaleNumber},
        round::{Counters, Intent, Window},
    };

    const EPOCH: Epoch = Epoch(1);

    fn standing(state: State, remaining: u64, seq: u64) -> Standing {
        let window = Window {
            opens_at_ms: 10_000,
            closes_at_ms: None,
        };
        let counters = Counters {
            allocation: 5,
            remaining,
            held: 0,
            sold: 5 - remaining,
            seq,
        };
        let round = RoundId {
            sale: SaleNumber(1),
            round: 1,
        };
        let intent = Intent::Live;
        Standing {
            round,
            epoch: EPOCH,
            counters,
            intent,
            state,
            window,
            now_ms: 1,
        }
    }

    fn purchase(key: &str) -> Purchase {
        let buyer = BuyerId(Uuid::from_u128(9));
        Purchase {
            round: RoundId {
                sale: SaleNumber(1),
                round: 1,
            },
            order: OrderId::derive(SaleNumber(1), buyer, key),
            buyer,
            quantity: 1,
            fingerprint: Fingerprint([0; 8]),
        }
    }

    #[test]
    fn sold_out_needs_a_proof_and_a_fresh_memory() {
        let (memory, at) = (Memory::default(), Instant::now());
        let sold_out = standing(State::Open, 0, 5);
        memory.learn(&sold_out, at);
        let refuse = |key, at| memory.refuse(&purchase(key), EPOCH, at, 20_000);
        assert_eq!(refuse("new", at), None);
        assert!(memory.wants_proof(sold_out.round, at));
        assert!(!memory.wants_proof(sold_out.round, at), "asked twice");

        let ids = HashSet::from([purchase("accepted").order.prefix()]);
        memory.prove(sold_out.round, Proof::new(&sold_out, ids));
        assert_eq!(refuse("new", at), Some(Refusal::SoldOut));
        assert_eq!(refuse("accepted", at), None, "a retry must reach Redis");
        assert_eq!(refuse("new", at + MEMORY + Duration::from_millis(1)), None);
        assert_eq!(memory.refuse(&purchase("new"), Epoch(2), at, 20_000), None);

        // A cancelled order came back and was sold again: the proof is not about that.
        memory.learn(&standing(State::Open, 0, 7), at);
        assert_eq!(refuse("new", at), None);
    }

    #[test]
    fn something_left_is_never_refused_from_memory() {
        let (memory, at) = (Memory::default(), Instant::now());
        let left = standing(State::Open, 2, 3);
        memory.learn(&left, at);
        memory.prove(left.round, Proof::new(&left, HashSet::new()));
        let asks_for_more = Purchase {
            quantity: 3,
            ..purchase("new")
        };
        assert_eq!(memory.refuse(&asks_for_more, EPOCH, at, 20_000), None);
    }

    #[test]
    fn before_the_start_only_while_it_is_certain() {
        let (memory, at) = (Memory::default(), Instant::now());
        memory.learn(&standing(State::Scheduled, 5, 0), at);
        let refuse = |redis_ms| memory.refuse(&purchase("new"), EPOCH, at, redis_ms);
        assert_eq!(
            refuse(9_000),
            Some(Refusal::NotOpen {
                opens_at_ms: 10_000
            })
        );
        assert_eq!(refuse(9_900), None);
        assert_eq!(refuse(10_001), None);
    }

    #[test]
    fn late_news_does_not_replace_newer() {
        let (memory, at) = (Memory::default(), Instant::now());
        memory.learn(&standing(State::Open, 0, 5), at);
        memory.learn(&standing(State::Open, 2, 3), at);
        let round = RoundId {
            sale: SaleNumber(1),
            round: 1,
        };
        assert_eq!(memory.latest(round).unwrap().counters.seq, 5);
    }
}
