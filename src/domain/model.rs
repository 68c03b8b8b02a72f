//! The executable specification of everything that the scripts in `lua/` own.
//!
//! [`Model::apply`] is a pure function of state, clock and command. It is written for reading,
//! not for speed; the scripts must do exactly the same.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::{
    id::{BuyerId, Epoch, Fingerprint, JournalId, OperationId, OrderId, RoundId, SaleNumber},
    journal::{Entry, Event, EventKind},
    limits::{ALLOCATION_MAX, SPARE_ACCEPTANCES},
    order::{Decision, Order, Purchase, Refusal, Status},
    round::{self, Counters, Intent, State, Terms},
};

/// The state of one partition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    /// The timeline.
    pub epoch: Epoch,
    /// The number of the last journal entry.
    pub pseq: u64,
    /// The highest instant that an effect was stamped with.
    pub last_ms: i64,
    /// Every sale that has a round here.
    pub sales: BTreeMap<SaleNumber, Sale>,
    /// Every round.
    pub rounds: BTreeMap<RoundId, Round>,
    /// What happened, oldest first.
    pub journal: Vec<Entry>,
}

/// What all rounds of a sale share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sale {
    /// The last round that was provisioned.
    pub round: u32,
    /// Idempotency record and order book in one.
    pub orders: BTreeMap<OrderId, Order>,
    /// Operations with a key that were carried out: what was asked, and the seq it took.
    pub operations: BTreeMap<OperationId, (Fingerprint, u64)>,
    /// Rounds that have left.
    pub archived_rounds: u32,
    /// Orders that have left with them.
    pub archived_orders: u64,
}

/// One running of a sale.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Round {
    /// Its rules.
    pub terms: Terms,
    /// What the operator wants.
    pub intent: Intent,
    /// Where its units are.
    pub counters: Counters,
    /// Units each buyer has, and how many acceptances they ever got.
    pub buyers: BTreeMap<BuyerId, (u64, u64)>,
    /// The leaderboard: confirmed orders by the seq of their acceptance.
    pub board: BTreeMap<u64, OrderId>,
    /// Until when only receipts are redeemed, because acceptances were lost: milliseconds since the
    /// Unix epoch by Redis' clock, 0 for a round that lost none.
    pub grace_until_ms: i64,
}

/// What can be asked of a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Create a round.
    Provision {
        /// Which.
        round: RoundId,
        /// With which rules.
        terms: Terms,
    },
    /// Decide on purchases, one after the other.
    Purchase {
        /// The key that signs receipts; 0 for none.
        receipt_key: u8,
        /// The purchases.
        items: Vec<Purchase>,
    },
    /// Give an order back.
    Cancel {
        /// Of which round it is.
        round: RoundId,
        /// Which.
        order: OrderId,
        /// Who asks.
        actor: Uuid,
    },
    /// Pause, resume or close.
    Control {
        /// Which round.
        round: RoundId,
        /// What the operator wants from now on.
        intent: Intent,
        /// Who asks.
        actor: Uuid,
    },
    /// Add units.
    Restock {
        /// To which round.
        round: RoundId,
        /// How many, at least one.
        units: u64,
        /// The operation; it has one effect however often it is asked for.
        operation: OperationId,
        /// What the request asked for.
        fingerprint: Fingerprint,
        /// Who asks.
        actor: Uuid,
    },
    /// Make the orders of a round that is over final.
    Settle {
        /// Which round.
        round: RoundId,
    },
    /// Take a settled round and some of its orders out.
    Archive {
        /// Which round.
        round: RoundId,
        /// Orders of it.
        orders: Vec<OrderId>,
    },
    /// Take old entries out of the journal, some at a time.
    Trim {
        /// Up to where they are stored.
        position: u64,
        /// Only those before this instant.
        before_ms: i64,
    },
}

/// What a partition answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// To [`Command::Provision`].
    Provisioned(Provisioned),
    /// To [`Command::Purchase`], one decision for each item.
    Decided(Vec<Decision>),
    /// To [`Command::Cancel`].
    Cancelled(Cancelled),
    /// To [`Command::Control`].
    Controlled(Controlled),
    /// To [`Command::Restock`].
    Restocked(Restocked),
    /// To [`Command::Settle`].
    Settled(Settled),
    /// To [`Command::Archive`].
    Archived(Archived),
    /// To [`Command::Trim`]: so many entries are gone.
    Trimmed(u64),
}

/// What became of a provisioning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provisioned {
    /// The round is there now.
    Created,
    /// The round was there already, with the same rules.
    Exists,
    /// A round with other rules is there.
    Conflict,
}

/// What became of a cancellation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancelled {
    /// The units went back.
    Done(Order),
    /// They had gone back before.
    Already(Order),
    /// There is no such order.
    Unknown,
    /// The round is settled: no unit of it goes back any more.
    Settled,
}

/// What became of settling a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// It is settled now.
    Done,
    /// It was settled before.
    Already,
    /// It is not over.
    Open,
    /// Orders of it wait for their payment.
    Held,
}

/// What became of archiving a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Archived {
    /// It is archived, and so many of the orders left with this call.
    Done(u64),
    /// It is not settled.
    Unsettled,
}

/// What became of a pause, a resume or a close.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Controlled {
    /// It is so now.
    Done,
    /// It was so before.
    Already,
    /// The round is closed, and stays so.
    Closed,
}

/// What became of a restock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restocked {
    /// The units are there.
    Done,
    /// They came with an earlier attempt.
    Replayed,
    /// The key belongs to another request.
    Mismatch,
    /// The round is closed.
    Closed,
    /// The allocation would leave its bounds.
    TooMany,
}

impl Round {
    /// What it is at `now_ms`.
    pub fn state(&self, now_ms: i64) -> State {
        match round::state(self.intent, self.terms.window, now_ms) {
            State::Open if now_ms < self.grace_until_ms => State::Paused,
            state => state,
        }
    }

    /// The units of an order are for sale again.
    fn give_back(&mut self, order: &Order) -> Option<()> {
        self.counters.remaining += order.quantity;
        self.counters.sold = self.counters.sold.checked_sub(order.quantity)?;
        let units = &mut self.buyers.get_mut(&order.buyer)?.0;
        *units = units.checked_sub(order.quantity)?;
        self.board.remove(&order.seq).map(|_| ())
    }

    /// Nothing is left but what says that it was there.
    fn leave(&mut self) {
        self.intent = Intent::Archived;
        self.buyers.clear();
        self.board.clear();
    }
}

impl Model {
    /// Carries out one command at `wall_ms` by Redis' clock.
    ///
    /// `None` when the command names a round that is not there: the scripts fence it.
    pub fn apply(&mut self, wall_ms: i64, command: &Command) -> Option<Reply> {
        // A clock that goes back does not take time back.
        let now_ms = wall_ms.max(self.last_ms);
        match command {
            Command::Provision { round, terms } => {
                Some(Reply::Provisioned(self.provision(now_ms, *round, *terms)))
            }
            Command::Purchase { receipt_key, items } => self
                .purchase(now_ms, *receipt_key, items)
                .map(Reply::Decided),
            Command::Cancel {
                round,
                order,
                actor,
            } => self
                .cancel(now_ms, *round, *order, *actor)
                .map(Reply::Cancelled),
            Command::Control {
                round,
                intent,
                actor,
            } => self
                .control(now_ms, *round, *intent, *actor)
                .map(Reply::Controlled),
            Command::Restock {
                round,
                units,
                operation,
                fingerprint,
                actor,
            } => self
                .restock(now_ms, *round, *units, *operation, *fingerprint, *actor)
                .map(Reply::Restocked),
            Command::Settle { round } => self.settle(now_ms, *round).map(Reply::Settled),
            Command::Archive { round, orders } => {
                self.archive(now_ms, *round, orders).map(Reply::Archived)
            }
            Command::Trim {
                position,
                before_ms,
            } => Some(Reply::Trimmed(self.trim(*position, *before_ms))),
        }
    }

    fn provision(&mut self, now_ms: i64, id: RoundId, terms: Terms) -> Provisioned {
        if let Some(round) = self.rounds.get(&id) {
            return if round.terms == terms {
                Provisioned::Exists
            } else {
                Provisioned::Conflict
            };
        }
        self.insert(id, terms);
        // The last one that was provisioned, whatever its number.
        self.sales.entry(id.sale).or_default().round = id.round;
        let event = Event {
            round: Some(id),
            seq: 0,
            kind: EventKind::Provision,
            order: None,
            units: terms.allocation,
            actor: None,
            operation: None,
        };
        self.append(now_ms, &[id], vec![], vec![event]);
        Provisioned::Created
    }

    fn purchase(
        &mut self,
        now_ms: i64,
        receipt_key: u8,
        items: &[Purchase],
    ) -> Option<Vec<Decision>> {
        if !items
            .iter()
            .all(|item| self.rounds.contains_key(&item.round))
        {
            return None;
        }
        let mut accepted = Vec::new();
        let decisions = items
            .iter()
            .map(|item| {
                let decision = self.decide(now_ms, receipt_key, item)?;
                if let Decision::Accepted(order) = decision {
                    self.accept(&order)?;
                    accepted.push(order);
                }
                Some(decision)
            })
            .collect::<Option<Vec<_>>>()?;
        let mut touched = Vec::new();
        for item in items {
            let has_order = accepted.iter().any(|order| order.round == item.round);
            if has_order && !touched.contains(&item.round) {
                touched.push(item.round);
            }
        }
        if !touched.is_empty() {
            self.append(now_ms, &touched, accepted, vec![]);
        }
        Some(decisions)
    }

    /// The precedence of refusals, from first to last.
    fn decide(&self, now_ms: i64, receipt_key: u8, item: &Purchase) -> Option<Decision> {
        let round = self.rounds.get(&item.round)?;
        let sale = self.sales.get(&item.round.sale)?;
        let Terms {
            window,
            per_buyer_limit,
            per_order_limit,
            unit_price,
            ..
        } = round.terms;
        let (held, acceptances) = round.buyers.get(&item.buyer).copied().unwrap_or_default();
        let remaining = round.counters.remaining;

        if let Some(order) = sale.orders.get(&item.order) {
            let same = order.buyer == item.buyer && order.fingerprint == item.fingerprint;
            return Some(if same {
                Decision::Replayed(*order)
            } else {
                Decision::Refused(Refusal::Mismatch)
            });
        }
        if item.archive < sale.archived_rounds {
            let rounds = sale.archived_rounds;
            return Some(Decision::Refused(Refusal::Archived { rounds }));
        }
        let redeems = item.redeem && !round.intent.is_final();
        let state = match round.state(now_ms) {
            State::Paused | State::Closed if redeems => State::Open,
            state => state,
        };
        let refusal = match state {
            State::Scheduled => Some(Refusal::NotOpen {
                opens_at_ms: window.opens_at_ms,
            }),
            State::Paused => Some(Refusal::Paused),
            State::Closed => Some(Refusal::Closed),
            State::Open if item.quantity > per_order_limit => Some(Refusal::OrderLimit {
                limit: per_order_limit,
                held,
            }),
            State::Open
                if held + item.quantity > per_buyer_limit
                    || acceptances >= per_buyer_limit + SPARE_ACCEPTANCES =>
            {
                Some(Refusal::BuyerLimit {
                    limit: per_buyer_limit,
                    held,
                })
            }
            State::Open if remaining == 0 => Some(Refusal::SoldOut),
            State::Open if remaining < item.quantity => Some(Refusal::Insufficient { remaining }),
            State::Open => None,
        };
        Some(refusal.map_or_else(
            || {
                Decision::Accepted(Order {
                    id: item.order,
                    round: item.round,
                    buyer: item.buyer,
                    quantity: item.quantity,
                    unit_price,
                    status: Status::Confirmed,
                    accepted_as: Status::Confirmed,
                    durability: item.durability,
                    receipt_key,
                    epoch: self.epoch,
                    seq: round.counters.seq + 1,
                    pseq: self.pseq + 1,
                    accepted_at_ms: now_ms,
                    fingerprint: item.fingerprint,
                })
            },
            Decision::Refused,
        ))
    }

    fn accept(&mut self, order: &Order) -> Option<()> {
        let round = self.rounds.get_mut(&order.round)?;
        round.counters.seq = order.seq;
        round.counters.remaining -= order.quantity;
        round.counters.sold += order.quantity;
        let buyer = round.buyers.entry(order.buyer).or_default();
        buyer.0 += order.quantity;
        buyer.1 += 1;
        round.board.insert(order.seq, order.id);
        self.sales
            .get_mut(&order.round.sale)?
            .orders
            .insert(order.id, *order);
        Some(())
    }

    fn cancel(
        &mut self,
        now_ms: i64,
        id: RoundId,
        order: OrderId,
        actor: Uuid,
    ) -> Option<Cancelled> {
        let round = self.rounds.get_mut(&id)?;
        let settled = round.intent.is_final();
        let Some(order) = self.sales.get_mut(&id.sale)?.orders.get_mut(&order) else {
            return Some(if settled {
                Cancelled::Settled
            } else {
                Cancelled::Unknown
            });
        };
        if order.status != Status::Confirmed {
            return Some(Cancelled::Already(*order));
        }
        if settled {
            return Some(Cancelled::Settled);
        }
        order.status = Status::Cancelled;
        let order = *order;
        round.counters.seq += 1;
        round.give_back(&order)?;
        let event = Event {
            round: Some(id),
            seq: round.counters.seq,
            kind: EventKind::Cancel,
            order: Some(order.id),
            units: order.quantity,
            actor: Some(actor),
            operation: None,
        };
        self.append(now_ms, &[id], vec![], vec![event]);
        Some(Cancelled::Done(order))
    }

    fn control(
        &mut self,
        now_ms: i64,
        id: RoundId,
        intent: Intent,
        actor: Uuid,
    ) -> Option<Controlled> {
        let round = self.rounds.get_mut(&id)?;
        if round.state(now_ms) == State::Closed {
            return Some(match intent {
                Intent::Closed => Controlled::Already,
                _ => Controlled::Closed,
            });
        }
        if round.intent == intent {
            return Some(Controlled::Already);
        }
        let kind = match intent {
            Intent::Live => EventKind::Resume,
            Intent::Paused => EventKind::Pause,
            Intent::Closed => EventKind::Close,
            // Those have commands of their own.
            Intent::Settled | Intent::Archived => return None,
        };
        self.turn(now_ms, id, intent, kind, Some(actor))?;
        Some(Controlled::Done)
    }

    /// Gives a round another intent, with the event that says so.
    fn turn(
        &mut self,
        now_ms: i64,
        id: RoundId,
        intent: Intent,
        kind: EventKind,
        actor: Option<Uuid>,
    ) -> Option<()> {
        let round = self.rounds.get_mut(&id)?;
        round.intent = intent;
        round.counters.seq += 1;
        let event = Event {
            round: Some(id),
            seq: round.counters.seq,
            kind,
            order: None,
            units: 0,
            actor,
            operation: None,
        };
        self.append(now_ms, &[id], vec![], vec![event]);
        Some(())
    }

    fn settle(&mut self, now_ms: i64, id: RoundId) -> Option<Settled> {
        let round = self.rounds.get(&id)?;
        if round.intent.is_final() {
            return Some(Settled::Already);
        }
        if round::state(round.intent, round.terms.window, now_ms) != State::Closed {
            return Some(Settled::Open);
        }
        if round.counters.held > 0 {
            return Some(Settled::Held);
        }
        self.turn(now_ms, id, Intent::Settled, EventKind::Settle, None)?;
        Some(Settled::Done)
    }

    fn archive(&mut self, now_ms: i64, id: RoundId, orders: &[OrderId]) -> Option<Archived> {
        match self.rounds.get(&id)?.intent {
            Intent::Settled => {
                self.turn(now_ms, id, Intent::Archived, EventKind::Archive, None)?;
                self.rounds.get_mut(&id)?.leave();
                self.sales.get_mut(&id.sale)?.archived_rounds += 1;
            }
            Intent::Archived => {}
            Intent::Live | Intent::Paused | Intent::Closed => return Some(Archived::Unsettled),
        }
        let sale = self.sales.get_mut(&id.sale)?;
        let before = sale.orders.len();
        sale.orders
            .retain(|order, record| record.round != id || !orders.contains(order));
        let gone = (before - sale.orders.len()) as u64;
        sale.archived_orders += gone;
        Some(Archived::Done(gone))
    }

    /// At most a thousand entries; the one at the position stays.
    fn trim(&mut self, position: u64, before_ms: i64) -> u64 {
        let mut step = 1_000;
        while step > 0 {
            let stays = self.journal.get(step);
            if stays.is_some_and(|entry| entry.id.pseq <= position && entry.at_ms < before_ms) {
                self.journal.drain(..step);
                return step as u64;
            }
            step /= 2;
        }
        0
    }

    fn restock(
        &mut self,
        now_ms: i64,
        id: RoundId,
        units: u64,
        operation: OperationId,
        fingerprint: Fingerprint,
        actor: Uuid,
    ) -> Option<Restocked> {
        let round = self.rounds.get_mut(&id)?;
        let sale = self.sales.get_mut(&id.sale)?;
        if let Some((known, _)) = sale.operations.get(&operation) {
            return Some(if *known == fingerprint {
                Restocked::Replayed
            } else {
                Restocked::Mismatch
            });
        }
        if round.state(now_ms) == State::Closed {
            return Some(Restocked::Closed);
        }
        if round.counters.allocation + units > ALLOCATION_MAX {
            return Some(Restocked::TooMany);
        }
        round.counters.seq += 1;
        round.counters.allocation += units;
        round.counters.remaining += units;
        sale.operations
            .insert(operation, (fingerprint, round.counters.seq));
        let event = Event {
            round: Some(id),
            seq: round.counters.seq,
            kind: EventKind::Restock,
            order: None,
            units,
            actor: Some(actor),
            operation: Some(operation),
        };
        self.append(now_ms, &[id], vec![], vec![event]);
        Some(Restocked::Done)
    }

    /// Takes over what a journal entry says, whoever decided it. `terms` are those of the rounds
    /// that it may provision. Of a round that it archives nothing is left here.
    ///
    /// `None` when the entry does not follow from what is here; the model is then of no use.
    pub fn replay(&mut self, entry: &Entry, terms: &BTreeMap<RoundId, Terms>) -> Option<()> {
        for order in &entry.orders {
            let round = self.rounds.get(&order.round)?;
            if order.seq != round.counters.seq + 1 || order.quantity > round.counters.remaining {
                return None;
            }
            self.accept(order)?;
        }
        for event in &entry.events {
            let Some(id) = event.round else { continue };
            if event.kind == EventKind::Provision {
                self.insert(id, *terms.get(&id)?);
                continue;
            }
            let round = self.rounds.get_mut(&id)?;
            let sale = self.sales.get_mut(&id.sale)?;
            round.counters.seq += 1;
            match event.kind {
                EventKind::Epoch | EventKind::Provision => return None,
                EventKind::Cancel => {
                    let order = sale.orders.get_mut(&event.order?)?;
                    order.status = Status::Cancelled;
                    round.give_back(order)?;
                }
                EventKind::Restock => {
                    round.counters.allocation += event.units;
                    round.counters.remaining += event.units;
                    if let Some(operation) = event.operation {
                        let asked = Fingerprint::restock(event.units);
                        sale.operations.insert(operation, (asked, event.seq));
                    }
                }
                EventKind::Pause => round.intent = Intent::Paused,
                EventKind::Resume => round.intent = Intent::Live,
                EventKind::Close => round.intent = Intent::Closed,
                EventKind::Settle => round.intent = Intent::Settled,
                EventKind::Archive => {
                    round.leave();
                    sale.archived_rounds += 1;
                    let before = sale.orders.len();
                    sale.orders.retain(|_, order| order.round != id);
                    sale.archived_orders += (before - sale.orders.len()) as u64;
                }
            }
        }
        for (id, counters) in &entry.rounds {
            if self.rounds.get(id)?.counters != *counters {
                return None;
            }
        }
        self.epoch = entry.id.epoch;
        self.pseq = entry.id.pseq;
        self.last_ms = self.last_ms.max(entry.at_ms);
        Some(())
    }

    /// Puts a round back as it is remembered, with all its orders.
    pub fn restore(
        &mut self,
        id: RoundId,
        terms: Terms,
        intent: Intent,
        counters: Counters,
        orders: Vec<Order>,
    ) {
        self.insert(id, terms);
        let sale = self.sales.entry(id.sale).or_default();
        let Some(round) = self.rounds.get_mut(&id) else {
            return;
        };
        (round.intent, round.counters) = (intent, counters);
        for order in orders {
            let (units, acceptances) = round.buyers.entry(order.buyer).or_default();
            *acceptances += 1;
            if matches!(order.status, Status::Held | Status::Confirmed) {
                *units += order.quantity;
            }
            if order.status == Status::Confirmed {
                round.board.insert(order.seq, order.id);
            }
            sale.orders.insert(order.id, order);
        }
    }

    /// Puts an archived round back, of which so many orders have left.
    pub fn restore_archived(&mut self, id: RoundId, terms: Terms, counters: Counters, orders: u64) {
        self.restore(id, terms, Intent::Archived, counters, Vec::new());
        let sale = self.sales.entry(id.sale).or_default();
        sale.archived_rounds += 1;
        sale.archived_orders += orders;
    }

    fn insert(&mut self, id: RoundId, terms: Terms) {
        self.rounds.insert(
            id,
            Round {
                terms,
                intent: Intent::Live,
                counters: Counters::fresh(terms.allocation),
                buyers: BTreeMap::new(),
                board: BTreeMap::new(),
                grace_until_ms: 0,
            },
        );
        let sale = self.sales.entry(id.sale).or_default();
        sale.round = sale.round.max(id.round);
    }

    fn append(&mut self, at_ms: i64, rounds: &[RoundId], orders: Vec<Order>, events: Vec<Event>) {
        self.pseq += 1;
        self.last_ms = at_ms;
        let rounds = rounds
            .iter()
            .filter_map(|id| self.rounds.get(id).map(|round| (*id, round.counters)))
            .collect();
        let id = JournalId {
            epoch: self.epoch,
            pseq: self.pseq,
        };
        self.journal.push(Entry {
            id,
            at_ms,
            rounds,
            orders,
            events,
        });
    }
}
