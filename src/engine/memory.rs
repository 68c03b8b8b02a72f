//! What a node may refuse by itself, without asking Redis.
//!
//! A refusal from memory must not hit a retry of an accepted order. So it is allowed only for an
//! order id that provably does not exist at the instant that is remembered, and what is
//! remembered lives at most [`MEMORY_MS`]: this node never refuses a key that it saw accepted, and a
//! key that another node accepted is refused `same_key` for that long at most. Acceptances always
//! come from Redis.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::packed::Standing;
use crate::{
    domain::{
        id::{BuyerId, Epoch, OrderId, RoundId},
        limits::MEMORY_MS,
        order::{Purchase, Refusal},
        round::State,
    },
    faults,
};

/// Orders of a sale above which no proof is loaded: 8 MB of ids per round is enough.
pub(super) const PROOF_ORDERS_MAX: u64 = 1_000_000;

/// How long a reply is believed.
const MEMORY: Duration = Duration::from_millis(MEMORY_MS.unsigned_abs());

/// A round that nobody has asked about for so long is forgotten, its proof too.
const FORGOTTEN_AFTER: Duration = Duration::from_mins(10);

/// The time between two attempts to load a proof for one round.
const PROOF_INTERVAL: Duration = Duration::from_millis(250);

/// Which orders a sale has, and of whom, at some number of orders. Orders are never taken out, so
/// the number says that nothing is missing.
#[derive(Debug)]
pub(super) struct Proof {
    epoch: Epoch,
    orders: u64,
    known: Known,
}

/// Eight bytes of each id are enough: a false hit only sends a purchase to Redis.
#[derive(Debug, Default)]
pub(super) struct Known {
    orders: HashSet<u64>,
    buyers: HashSet<u64>,
}

impl Known {
    pub(super) fn add(&mut self, order: OrderId, buyer: BuyerId) {
        self.orders.insert(order.prefix());
        self.buyers.insert(buyer.prefix());
    }
}

impl Proof {
    pub(super) fn new(standing: &Standing, known: Known) -> Self {
        Self {
            epoch: standing.epoch,
            orders: standing.orders,
            known,
        }
    }

    fn covers(&self, standing: &Standing) -> bool {
        (self.epoch, self.orders) == (standing.epoch, standing.orders)
    }
}

#[derive(Debug)]
struct Remembered {
    standing: Standing,
    at: Instant,
    proof: Option<Arc<Proof>>,
    proof_asked_at: Option<Instant>,
    /// Whether a proof is being loaded right now.
    proof_loading: bool,
}

/// What a node remembers of the rounds that it sells.
#[derive(Debug, Default)]
pub(super) struct Memory(Mutex<BTreeMap<RoundId, Remembered>>);

impl Memory {
    fn rounds(&self) -> MutexGuard<'_, BTreeMap<RoundId, Remembered>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers what a reply said, if it is newer than what is remembered.
    pub(super) fn learn(&self, standing: &Standing, at: Instant) {
        let mut rounds = self.rounds();
        if !rounds.contains_key(&standing.round) {
            // Rounds come and go for months; what nobody asks about any more is forgotten.
            rounds.retain(|_, known| at.saturating_duration_since(known.at) < FORGOTTEN_AFTER);
        }
        let known = rounds.entry(standing.round).or_insert_with(|| Remembered {
            standing: *standing,
            at,
            proof: None,
            proof_asked_at: None,
            proof_loading: false,
        });
        // Replies of several calls arrive in any order.
        let age = |s: &Standing| (s.epoch, s.counters.seq, s.now_ms);
        if age(standing) >= age(&known.standing) {
            known.standing = *standing;
            known.at = at;
        }
        // An order of another round of the sale may be the one that a retry is about.
        let first = RoundId {
            round: 0,
            ..standing.round
        };
        let last = RoundId {
            round: u32::MAX,
            ..standing.round
        };
        for (_, other) in rounds.range_mut(first..=last) {
            other.standing.orders = other.standing.orders.max(standing.orders);
            let archived = &mut other.standing.archived_rounds;
            *archived = standing.archived_rounds.max(*archived);
        }
    }

    /// Archived rounds of the round's sale, as far as this node knows.
    pub(super) fn archived_rounds(&self, round: RoundId) -> u32 {
        let rounds = self.rounds();
        rounds
            .get(&round)
            .map_or(0, |known| known.standing.archived_rounds)
    }

    /// The latest standing of a round that this node saw, however old.
    #[cfg(test)]
    fn latest(&self, round: RoundId) -> Option<Standing> {
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
            // Between two rounds everybody waits, and keys of earlier rounds are replayed.
            State::Scheduled => round.round > 1,
            State::Paused => false,
        };
        let proved = known
            .proof
            .as_ref()
            .is_some_and(|proof| proof.covers(&known.standing));
        let asked = known
            .proof_asked_at
            .is_some_and(|asked| at.saturating_duration_since(asked) < PROOF_INTERVAL);
        let archived = known.standing.archived_rounds > 0;
        if !refuses || proved || asked || archived || known.proof_loading {
            return false;
        }
        known.proof_asked_at = Some(at);
        known.proof_loading = true;
        true
    }

    /// Ends what [`Memory::wants_proof`] began; `None` keeps what was there.
    pub(super) fn prove(&self, round: RoundId, proof: Option<Proof>) {
        if let Some(known) = self.rounds().get_mut(&round) {
            known.proof_loading = false;
            if let Some(proof) = proof {
                known.proof = Some(Arc::new(proof));
            }
        }
    }

    /// Refuses a purchase, if it is certain that Redis would.
    ///
    /// `redis_ms` is the node's estimate of Redis' clock, which is never ahead of it by more than
    /// the drift of two clocks within seconds, unless Redis' clock was set back.
    pub(super) fn refuse(
        &self,
        purchase: &Purchase,
        epoch: Epoch,
        at: Instant,
        redis_ms: i64,
    ) -> Option<Refusal> {
        // Of lost acceptances there are few, and each deserves to be looked at.
        if purchase.redeem {
            return None;
        }
        let (standing, proof) = {
            let rounds = self.rounds();
            let known = rounds.get(&purchase.round)?;
            let age = at.saturating_duration_since(known.at);
            // Orders that have left Redis are in no proof.
            let archived = known.standing.archived_rounds > 0;
            let stale = age > MEMORY && !faults::bug("memory_for_ever");
            if stale || known.standing.epoch != epoch || archived {
                return None;
            }
            (known.standing, known.proof.clone())
        };
        let refusal = match standing.state {
            State::Scheduled => {
                let opens_at_ms = standing.window.opens_at_ms;
                if redis_ms + 2 * MEMORY_MS >= opens_at_ms {
                    return None;
                }
                let refusal = Refusal::NotOpen { opens_at_ms };
                // Before the first opening of a sale it has no orders: nothing to prove.
                if purchase.round.round == 1 {
                    return Some(refusal);
                }
                refusal
            }
            State::Closed => Refusal::Closed,
            // Past the end it would be closed, which only Redis' clock can say.
            State::Open
                if standing
                    .window
                    .closes_at_ms
                    .is_some_and(|end| redis_ms >= end) =>
            {
                return None;
            }
            State::Open if standing.sold_out() => Refusal::SoldOut,
            State::Paused | State::Open => return None,
        };
        if faults::bug("memory_without_proof") {
            return Some(refusal);
        }
        let proof = proof.filter(|proof| proof.covers(&standing))?;
        let Known { orders, buyers } = &proof.known;
        // The limits come before the stock: who could be at one gets to hear of it from Redis.
        let limits_pass = purchase.quantity <= standing.per_order_limit
            && !buyers.contains(&purchase.buyer.prefix());
        let certain = !orders.contains(&purchase.order.prefix())
            && (refusal != Refusal::SoldOut || limits_pass);
        certain.then_some(refusal)
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::domain::{
        id::{Fingerprint, SaleNumber},
        order::Durability,
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
        let (epoch, per_order_limit, orders, now_ms) = (EPOCH, 4, seq, 1);
        Standing {
            round,
            epoch,
            counters,
            intent,
            state,
            window,
            per_order_limit,
            orders,
            archived_rounds: 0,
            waiting: 0,
            now_ms,
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
            durability: Durability::Fsync,
            redeem: false,
            archive: 0,
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

        let mut known = Known::default();
        known.add(purchase("accepted").order, BuyerId(Uuid::from_u128(8)));
        memory.prove(sold_out.round, Some(Proof::new(&sold_out, known)));
        assert_eq!(refuse("new", at), Some(Refusal::SoldOut));
        let redeemed = Purchase {
            redeem: true,
            ..purchase("new")
        };
        assert_eq!(memory.refuse(&redeemed, EPOCH, at, 20_000), None);
        let limited = [
            Purchase {
                buyer: BuyerId(Uuid::from_u128(8)),
                ..purchase("new")
            },
            Purchase {
                quantity: 5,
                ..purchase("new")
            },
        ];
        for purchase in limited {
            assert_eq!(
                memory.refuse(&purchase, EPOCH, at, 20_000),
                None,
                "limits come first"
            );
        }
        assert_eq!(refuse("accepted", at), None, "a retry must reach Redis");
        assert_eq!(refuse("new", at + MEMORY + Duration::from_millis(1)), None);
        assert_eq!(memory.refuse(&purchase("new"), Epoch(2), at, 20_000), None);

        // A unit came back and was sold again: the proof does not know the new order.
        memory.learn(&standing(State::Open, 0, 7), at);
        assert_eq!(refuse("new", at), None);
    }

    #[test]
    fn something_left_is_never_refused_from_memory() {
        let (memory, at) = (Memory::default(), Instant::now());
        let left = standing(State::Open, 2, 3);
        memory.learn(&left, at);
        memory.prove(left.round, Some(Proof::new(&left, Known::default())));
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
    fn before_a_later_round_only_with_a_proof() {
        let (memory, at) = (Memory::default(), Instant::now());
        let second = |sale| RoundId { sale, round: 2 };
        let scheduled = Standing {
            round: second(SaleNumber(1)),
            orders: 3,
            ..standing(State::Scheduled, 5, 0)
        };
        let refuse = |key, redis_ms| {
            let purchase = Purchase {
                round: scheduled.round,
                quantity: 9,
                ..purchase(key)
            };
            memory.refuse(&purchase, EPOCH, at, redis_ms)
        };
        memory.learn(&scheduled, at);
        assert_eq!(
            refuse("new", 9_000),
            None,
            "it may have an order of the first round"
        );
        assert!(memory.wants_proof(scheduled.round, at));
        let mut known = Known::default();
        known.add(purchase("accepted").order, BuyerId(Uuid::from_u128(8)));
        memory.prove(scheduled.round, Some(Proof::new(&scheduled, known)));
        let opens_at_ms = 10_000;
        assert_eq!(refuse("new", 9_000), Some(Refusal::NotOpen { opens_at_ms }));
        assert_eq!(refuse("accepted", 9_000), None, "a retry must reach Redis");
        assert_eq!(refuse("new", 9_900), None);
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
