//! The end of a journal: what PostgreSQL may not have yet.

use std::collections::{BTreeMap, HashMap, VecDeque};

use crate::domain::{
    id::{BuyerId, Epoch, JournalId, OrderId},
    journal::{Entry, Step},
    order::Order,
};

/// Orders and events that are kept at most: about 30 MB.
const STEPS_MAX: usize = 200_000;

/// Everything that a journal has behind a place.
#[derive(Debug)]
pub(super) struct Recent {
    epoch: Epoch,
    /// The number of the last entry that is not here.
    before: u64,
    entries: VecDeque<Entry>,
    steps: usize,
}

impl Recent {
    /// Nothing yet, of what comes after `at`.
    pub(super) fn new(at: JournalId) -> Self {
        Self {
            epoch: at.epoch,
            before: at.pseq,
            entries: VecDeque::new(),
            steps: 0,
        }
    }

    /// What comes next in the journal.
    pub(super) fn push(&mut self, entry: Entry) {
        self.steps += steps(&entry);
        self.entries.push_back(entry);
        while self.steps > STEPS_MAX {
            self.drop_first();
        }
    }

    fn drop_first(&mut self) {
        if let Some(entry) = self.entries.pop_front() {
            self.steps -= steps(&entry);
            self.before = entry.id.pseq;
        }
    }

    /// Lets go what PostgreSQL has, too.
    pub(super) fn forget(&mut self, stored: JournalId) {
        while stored.epoch == self.epoch
            && self
                .entries
                .front()
                .is_some_and(|entry| entry.id.pseq <= stored.pseq)
        {
            self.drop_first();
        }
    }

    /// Whether everything behind this place is here.
    pub(super) fn goes_back_to(&self, at: JournalId) -> bool {
        at.epoch == self.epoch && at.pseq >= self.before
    }

    /// Brings the orders of some buyers from where they are as of `pseq` to where they are now.
    pub(super) fn catch_up(
        &self,
        pseq: u64,
        buyers: &mut HashMap<BuyerId, BTreeMap<OrderId, Order>>,
        owners: &mut HashMap<OrderId, BuyerId>,
    ) {
        let begin = self.entries.partition_point(|entry| entry.id.pseq <= pseq);
        for step in self.entries.range(begin..).flat_map(Entry::steps) {
            match step {
                Step::Order(order) => {
                    if let Some(orders) = buyers.get_mut(&order.buyer) {
                        orders.insert(order.id, *order);
                        owners.insert(order.id, order.buyer);
                    }
                }
                Step::Event(event) => {
                    let orders = event
                        .order
                        .filter(|_| event.kind.changes_order())
                        .and_then(|id| Some((id, buyers.get_mut(owners.get(&id)?)?)));
                    if let Some((id, orders)) = orders
                        && let Some(order) = orders.get_mut(&id)
                    {
                        // One that cannot be is the auditor's business.
                        let _ = event.change(order);
                    }
                }
            }
        }
    }
}

fn steps(entry: &Entry) -> usize {
    // An entry of nothing takes its place, too.
    1 + entry.orders.len() + entry.events.len()
}

#[cfg(test)]
mod tests {
    use super::{
        super::desk::tests::{event, held},
        *,
    };
    use crate::domain::{journal::EventKind, order::Status};

    fn at(epoch: u32, pseq: u64) -> JournalId {
        JournalId {
            epoch: Epoch(epoch),
            pseq,
        }
    }

    fn entry(pseq: u64, orders: Vec<Order>, events: Vec<crate::domain::journal::Event>) -> Entry {
        Entry {
            id: at(2, pseq),
            at_ms: 0,
            rounds: Vec::new(),
            orders,
            events,
        }
    }

    #[test]
    fn what_postgresql_has_and_what_comes_after_it_is_what_there_is() {
        let mut recent = Recent::new(at(2, 10));
        recent.push(entry(11, vec![held(1, 1), held(2, 2)], Vec::new()));
        recent.push(entry(12, Vec::new(), vec![event(EventKind::Confirm, 1)]));
        recent.push(entry(
            13,
            vec![held(3, 1)],
            vec![event(EventKind::Expire, 9)],
        ));
        recent.push(entry(14, Vec::new(), vec![event(EventKind::Cancel, 3)]));
        assert!(recent.goes_back_to(at(2, 10)) && recent.goes_back_to(at(2, 14)));
        assert!(!recent.goes_back_to(at(2, 9)) && !recent.goes_back_to(at(1, 12)));

        // As PostgreSQL has it after each entry: the end is the same.
        let buyer = held(1, 1).buyer;
        let mut confirmed = held(1, 1);
        confirmed.status = Status::Confirmed;
        let old = held(9, 1);
        for (stored, orders) in [
            (10, vec![old]),
            (11, vec![old, held(1, 1)]),
            (12, vec![old, confirmed]),
        ] {
            let mut owners: HashMap<_, _> = orders.iter().map(|order| (order.id, buyer)).collect();
            let orders = orders.into_iter().map(|order| (order.id, order));
            let mut buyers = HashMap::from([(buyer, orders.collect::<BTreeMap<_, _>>())]);
            recent.catch_up(stored, &mut buyers, &mut owners);
            let now: Vec<_> = buyers[&buyer].values().map(|o| (o.seq, o.status)).collect();
            let expected = [
                (1, Status::Confirmed),
                (3, Status::Cancelled),
                (9, Status::Expired),
            ];
            assert_eq!(now, expected, "{stored}");
            assert_eq!(buyers.len(), 1, "others are nobody's business");
        }

        recent.forget(at(1, 13));
        assert!(recent.goes_back_to(at(2, 10)), "of another timeline");
        recent.forget(at(2, 12));
        assert!(recent.goes_back_to(at(2, 12)) && !recent.goes_back_to(at(2, 11)));
        assert_eq!(recent.entries.len(), 2);
    }

    #[test]
    fn it_keeps_the_newest_when_postgresql_is_far_behind() {
        let mut recent = Recent::new(at(2, 0));
        let many = vec![held(1, 1); 10_000];
        for pseq in 1..=30 {
            recent.push(entry(pseq, many.clone(), Vec::new()));
            assert!(recent.steps <= STEPS_MAX);
        }
        assert!(!recent.goes_back_to(at(2, 10)) && recent.goes_back_to(at(2, 11)));
    }
}
