//! Acceptances that this node has got from Redis and that PostgreSQL does not have yet: what only
//! this node can tell of, should Redis lose them.
//!
//! Bounded by what the writer has stored: whatever is stored is forgotten, so this is as long as
//! the writer is behind, about a hundred bytes for each.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::domain::{
    id::JournalId,
    order::{Acceptance, Order},
};

/// The acceptances, by the entry that carries them.
#[derive(Debug, Default)]
pub(super) struct Unstored(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    stored: JournalId,
    entries: BTreeMap<JournalId, Vec<Acceptance>>,
}

impl Unstored {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers acceptances that a reply carried, before anybody is told of them.
    pub(super) fn note<'a>(&self, orders: impl Iterator<Item = &'a Order>) {
        let mut kept = self.kept();
        for order in orders {
            let acceptance = Acceptance::from(order);
            let at = acceptance.at;
            // Numbers say something within one epoch only: of an older one nothing is certain here.
            if at.epoch == kept.stored.epoch && at.pseq <= kept.stored.pseq {
                continue;
            }
            let entry = kept.entries.entry(at).or_default();
            if !entry.iter().any(|known| known.order == acceptance.order) {
                entry.push(acceptance);
            }
        }
    }

    /// Everything that is remembered, in order.
    pub(super) fn all(&self) -> Vec<Acceptance> {
        self.kept().entries.values().flatten().copied().collect()
    }

    /// Forgets the entries that `settled` names: they are stored, or reported as lost. PostgreSQL
    /// has the journal up to `stored`.
    pub(super) fn forget(&self, stored: JournalId, settled: impl Fn(JournalId) -> bool) {
        let mut kept = self.kept();
        kept.stored = stored;
        kept.entries.retain(|at, _| !settled(*at));
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::domain::{
        id::{BuyerId, Epoch, Fingerprint, OrderId, RoundId, SaleNumber},
        money::{Currency, Money},
        order::{Durability, Status},
    };

    fn order(epoch: u32, pseq: u64, buyer: u128) -> Order {
        let (sale, buyer) = (SaleNumber(1), BuyerId(Uuid::from_u128(buyer)));
        Order {
            id: OrderId::derive(sale, buyer, "k"),
            round: RoundId { sale, round: 1 },
            buyer,
            quantity: 1,
            unit_price: Money::new(1, Currency::parse("EUR").unwrap()).unwrap(),
            status: Status::Confirmed,
            accepted_as: Status::Confirmed,
            durability: Durability::Fsync,
            receipt_key: 1,
            epoch: Epoch(epoch),
            seq: pseq,
            pseq,
            hold_ms: 0,
            extended_ms: 0,
            returned: 0,
            refunded: 0,
            accepted_at_ms: 0,
            fingerprint: Fingerprint([0; 8]),
        }
    }

    #[test]
    fn what_is_stored_is_forgotten_and_nothing_else() {
        let unstored = Unstored::default();
        let orders = [order(2, 5, 1), order(2, 5, 2), order(2, 7, 3)];
        unstored.note(orders.iter());
        // A retry says nothing new.
        unstored.note(orders.iter().take(1));
        assert_eq!(unstored.all().len(), 3);
        let stored = orders[0].entry();
        unstored.forget(stored, |at| at <= stored);
        assert_eq!(unstored.all(), [Acceptance::from(&orders[2])]);
        unstored.note(orders.iter());
        assert_eq!(unstored.all().len(), 1, "it was stored already");
        // A lower number in another epoch is another entry.
        unstored.note([order(1, 3, 4), order(3, 4, 5)].iter());
        assert_eq!(unstored.all().len(), 3);
    }
}
