//! The executable specification of everything that the scripts in `lua/` own.
//!
//! [`Model::apply`] is a pure function of state, clock and command. It is written for reading,
//! not for speed; the scripts must do exactly the same.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::{
    id::{BuyerId, Epoch, Fingerprint, JournalId, OperationId, OrderId, RoundId, SaleNumber},
    journal::{Entry, Event, EventKind, Step},
    limits::{ALLOCATION_MAX, LINE_MAX, OFFERS_MAX, SPARE_ACCEPTANCES},
    order::{Decision, Durability, Order, Purchase, Refusal, Status},
    round::{self, Amendment, Counters, Ends, Intent, LimitScope, State, Terms},
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
    /// What a limit over all rounds knows of each buyer: units, and acceptances ever.
    pub buyers: BTreeMap<BuyerId, (u64, u64)>,
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
    /// Units each buyer has, and how many acceptances they ever got; empty where the limit counts
    /// over all rounds of the sale.
    pub buyers: BTreeMap<BuyerId, (u64, u64)>,
    /// The leaderboard: confirmed orders by the seq of their acceptance.
    pub board: BTreeMap<u64, OrderId>,
    /// Held orders, each with the first instant at which it is held no more.
    pub holds: BTreeMap<OrderId, i64>,
    /// Buyers that wait for units to come back, by the seq with which they joined.
    pub line: BTreeMap<u64, Wish>,
    /// Until when only receipts are redeemed, because acceptances were lost: milliseconds since the
    /// Unix epoch by Redis' clock, 0 for a round that lost none.
    pub grace_until_ms: i64,
}

/// What a buyer in the line waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wish {
    /// Who.
    pub buyer: BuyerId,
    /// The id that the order will have.
    pub order: OrderId,
    /// What the request asked for.
    pub fingerprint: Fingerprint,
    /// Units, at most.
    pub units: u64,
}

/// What giving an order back means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// Its units are for sale again.
    Cancel,
    /// The same, for the line of a cart that was not accepted as a whole.
    Withdraw,
    /// Its money goes back, its units are for sale again.
    Return,
    /// Its money goes back, its units stay sold.
    Refund,
}

impl Release {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Cancel, Self::Withdraw, Self::Return, Self::Refund];

    /// The event that says so.
    pub fn event(self) -> EventKind {
        match self {
            Self::Cancel => EventKind::Cancel,
            Self::Withdraw => EventKind::Withdraw,
            Self::Return => EventKind::Return,
            Self::Refund => EventKind::Refund,
        }
    }

    fn is_money(self) -> bool {
        matches!(self, Self::Return | Self::Refund)
    }
}

/// An operation of a user: it has one effect, however often it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// Its name.
    pub id: OperationId,
    /// What was asked for.
    pub fingerprint: Fingerprint,
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
        /// Whether all of them are accepted, or none.
        together: bool,
    },
    /// Give an order, or some units of it, back.
    Release {
        /// Of which round it is.
        round: RoundId,
        /// Which.
        order: OrderId,
        /// What that means.
        release: Release,
        /// How many units; `None` for all that are left.
        units: Option<u64>,
        /// The operation, if it has a key.
        operation: Option<Operation>,
        /// What acceptances of those in line survive; `None`: nothing is offered.
        durability: Option<Durability>,
        /// Who asks.
        actor: Uuid,
    },
    /// A held order is paid.
    Confirm {
        /// Of which round it is.
        round: RoundId,
        /// Which.
        order: OrderId,
        /// Who pays.
        actor: Uuid,
    },
    /// Give a held order its time once more.
    Extend {
        /// Of which round it is.
        round: RoundId,
        /// Which.
        order: OrderId,
        /// Who asks.
        actor: Uuid,
    },
    /// End holds whose time is over, and offer their units to those in line.
    Sweep {
        /// Which round.
        round: RoundId,
        /// Holds at most.
        holds: u64,
        /// Buyers in line at most.
        offers: u64,
        /// What the acceptances survive; `None`: nothing is offered.
        durability: Option<Durability>,
    },
    /// Wait in line.
    Join {
        /// For units of which round.
        round: RoundId,
        /// Who, for what.
        wish: Wish,
        /// Archived rounds of the sale in which PostgreSQL does not have the order.
        archive: u32,
    },
    /// Wait no more.
    Leave {
        /// In the line of which round.
        round: RoundId,
        /// Who.
        buyer: BuyerId,
    },
    /// Change the rules.
    Amend {
        /// Of which round.
        round: RoundId,
        /// Its new rules.
        amendment: Amendment,
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
    /// Add units, or take some that remain.
    Allocate {
        /// Of which round.
        round: RoundId,
        /// Whether to take units away.
        reduce: bool,
        /// How many, at least one.
        units: u64,
        /// The operation.
        operation: Operation,
        /// What acceptances of those in line survive; `None`: nothing is offered.
        durability: Option<Durability>,
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
    /// To [`Command::Release`].
    Released(Released),
    /// To [`Command::Confirm`].
    Confirmed(Confirmed),
    /// To [`Command::Extend`].
    Extended(Extended),
    /// To [`Command::Sweep`].
    Swept(Swept),
    /// To [`Command::Join`].
    Joined(Joined),
    /// To [`Command::Leave`]: whether the buyer was in it.
    Left(bool),
    /// To [`Command::Amend`].
    Amended(Amended),
    /// To [`Command::Control`].
    Controlled(Controlled),
    /// To [`Command::Allocate`].
    Allocated(Allocated),
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

/// What became of giving an order back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Released {
    /// It is so now.
    Done(Order),
    /// The operation was carried out before.
    Replayed(Order),
    /// The operation was asked for with another request.
    Mismatch,
    /// Nothing of it was left.
    Already(Order),
    /// It is not paid, so there is no money to give back.
    Held(Order),
    /// It has fewer units left.
    TooMany(Order),
    /// There is no such order.
    Unknown,
    /// The round is settled: no unit of it goes back any more.
    Settled,
}

/// What became of a payment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confirmed {
    /// It is confirmed now.
    Done(Order),
    /// It is held no more: its status says what it is.
    Already(Order),
    /// Its deadline has passed.
    Late(Order),
    /// There is no such order.
    Unknown,
}

/// What became of extending a hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extended {
    /// It has more time now.
    Done(Order),
    /// It was extended before.
    Before(Order),
    /// It is held no more: its status says what it is.
    Already(Order),
    /// Its deadline has passed.
    Late(Order),
    /// There is no such order.
    Unknown,
}

/// What a sweep did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Swept {
    /// Holds that ended.
    pub expired: u64,
    /// Orders that those in line got.
    pub offered: u64,
    /// The earliest deadline that is left, milliseconds since the Unix epoch.
    pub next_ms: Option<i64>,
}

/// What became of joining the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Joined {
    /// In it now, so many are at or before this place.
    Done(u64),
    /// Was in it before, at this place.
    Already(u64),
    /// Has the order that this wish became.
    Replayed(Order),
    /// The round has no line.
    NoLine,
    /// There is nothing to wait for, for another reason.
    Refused(Refusal),
    /// Units are for sale.
    Available,
    /// As many wait as may.
    Full,
}

/// What became of changing the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Amended {
    /// They are so now.
    Done,
    /// They were so before.
    Already,
    /// The round is closed.
    Closed,
    /// It is open, and something else than its end would change.
    Open,
    /// The end would lie in the past.
    Past,
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

/// What became of adding units, or taking some.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocated {
    /// It is so now.
    Done,
    /// An earlier attempt did it.
    Replayed,
    /// The key belongs to another request.
    Mismatch,
    /// The round is closed.
    Closed,
    /// The allocation would leave its bounds, or fewer units remain.
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

    /// Nothing is left but what says that it was there.
    fn leave(&mut self) {
        self.intent = Intent::Archived;
        self.buyers.clear();
        self.board.clear();
        self.line.clear();
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
            Command::Purchase {
                receipt_key,
                items,
                together,
            } => self
                .purchase(now_ms, *receipt_key, items, *together)
                .map(Reply::Decided),
            Command::Release {
                round,
                order,
                release,
                units,
                operation,
                durability,
                actor,
            } => self
                .open(now_ms, *round)?
                .release(*order, *release, *units, *operation, *durability, *actor)
                .map(Reply::Released),
            Command::Confirm {
                round,
                order,
                actor,
            } => self
                .open(now_ms, *round)?
                .confirm(*order, *actor)
                .map(Reply::Confirmed),
            Command::Extend {
                round,
                order,
                actor,
            } => self
                .open(now_ms, *round)?
                .extend(*order, *actor)
                .map(Reply::Extended),
            Command::Sweep {
                round,
                holds,
                offers,
                durability,
            } => self
                .open(now_ms, *round)?
                .sweep(*holds, *offers, *durability)
                .map(Reply::Swept),
            Command::Join {
                round,
                wish,
                archive,
            } => self
                .open(now_ms, *round)?
                .join(*wish, *archive)
                .map(Reply::Joined),
            Command::Leave { round, buyer } => {
                self.open(now_ms, *round)?.leave(*buyer).map(Reply::Left)
            }
            Command::Amend {
                round,
                amendment,
                actor,
            } => self
                .open(now_ms, *round)?
                .amend(*amendment, *actor)
                .map(Reply::Amended),
            Command::Control {
                round,
                intent,
                actor,
            } => self
                .control(now_ms, *round, *intent, *actor)
                .map(Reply::Controlled),
            Command::Allocate {
                round,
                reduce,
                units,
                operation,
                durability,
                actor,
            } => self
                .open(now_ms, *round)?
                .allocate(*reduce, *units, *operation, *durability, *actor)
                .map(Reply::Allocated),
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
            units: terms.allocation,
            ..Event::new(id, 0, EventKind::Provision)
        };
        self.append(now_ms, &[id], vec![], vec![event]);
        Provisioned::Created
    }

    fn purchase(
        &mut self,
        now_ms: i64,
        receipt_key: u8,
        items: &[Purchase],
        together: bool,
    ) -> Option<Vec<Decision>> {
        if !items
            .iter()
            .all(|item| self.rounds.contains_key(&item.round))
        {
            return None;
        }
        let before = together.then(|| self.clone());
        let mut accepted = Vec::new();
        let mut decisions = items
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
        let refused = |decision: &Decision| matches!(decision, Decision::Refused(_));
        if let Some(before) = before.filter(|_| decisions.iter().any(refused)) {
            *self = before;
            for decision in &mut decisions {
                if matches!(decision, Decision::Accepted(_)) {
                    *decision = Decision::Refused(Refusal::LeftOut);
                }
            }
            return Some(decisions);
        }
        let mut touched = Vec::new();
        let mut events = Vec::new();
        for item in items {
            let has_order = accepted.iter().any(|order| order.round == item.round);
            if has_order && !touched.contains(&item.round) {
                touched.push(item.round);
                events.extend(self.close_if_sold_out(item.round)?);
            }
        }
        if !touched.is_empty() {
            self.append(now_ms, &touched, accepted, events);
        }
        Some(decisions)
    }

    /// A round that ends with its last unit closes once it has sold it: the events of that.
    fn close_if_sold_out(&mut self, id: RoundId) -> Option<Vec<Event>> {
        let round = self.rounds.get(&id)?;
        let Counters {
            remaining,
            held,
            seq,
            ..
        } = round.counters;
        let ends = round.terms.policy.ends == Ends::SoldOut && remaining == 0 && held == 0;
        if !ends || round.intent.is_over() {
            return Some(vec![]);
        }
        let event = Event::new(id, seq + 1, EventKind::Close);
        self.happened(&event)?;
        Some(vec![event])
    }

    /// What the limit knows of a buyer: units, and acceptances ever.
    fn member(&self, id: RoundId, buyer: BuyerId) -> Option<(u64, u64)> {
        let round = self.rounds.get(&id)?;
        match round.terms.policy.limit_scope {
            LimitScope::Round => round.buyers.get(&buyer).copied(),
            LimitScope::Sale => self.sales.get(&id.sale)?.buyers.get(&buyer).copied(),
        }
    }

    fn member_mut(&mut self, id: RoundId, buyer: BuyerId) -> Option<&mut (u64, u64)> {
        let round = self.rounds.get_mut(&id)?;
        let buyers = match round.terms.policy.limit_scope {
            LimitScope::Round => &mut round.buyers,
            LimitScope::Sale => &mut self.sales.get_mut(&id.sale)?.buyers,
        };
        Some(buyers.entry(buyer).or_default())
    }

    /// The precedence of refusals, from first to last.
    fn decide(&self, now_ms: i64, receipt_key: u8, item: &Purchase) -> Option<Decision> {
        let round = self.rounds.get(&item.round)?;
        let sale = self.sales.get(&item.round.sale)?;
        let Terms {
            unit_price, policy, ..
        } = round.terms;
        let (held, acceptances) = self.member(item.round, item.buyer).unwrap_or_default();
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
        let barred = barred(&round.terms, state, item.quantity, held, acceptances);
        let refusal = barred.or_else(|| {
            // What comes back is for those who wait in line.
            let for_the_line = !round.line.is_empty() && !item.redeem;
            if remaining == 0 || for_the_line {
                Some(Refusal::SoldOut)
            } else if remaining < item.quantity {
                Some(Refusal::Insufficient { remaining })
            } else {
                None
            }
        });
        Some(refusal.map_or_else(
            || {
                let status = match policy.hold_ms {
                    Some(_) => Status::Held,
                    None => Status::Confirmed,
                };
                Decision::Accepted(Order {
                    id: item.order,
                    round: item.round,
                    buyer: item.buyer,
                    quantity: item.quantity,
                    unit_price,
                    status,
                    accepted_as: status,
                    durability: item.durability,
                    receipt_key,
                    epoch: self.epoch,
                    seq: round.counters.seq + 1,
                    pseq: self.pseq + 1,
                    accepted_at_ms: now_ms,
                    fingerprint: item.fingerprint,
                    hold_ms: policy.hold_ms.unwrap_or(0),
                    extended_ms: 0,
                    returned: 0,
                    refunded: 0,
                })
            },
            Decision::Refused,
        ))
    }

    fn accept(&mut self, order: &Order) -> Option<()> {
        let round = self.rounds.get_mut(&order.round)?;
        round.counters.seq = order.seq;
        order.take(&mut round.counters)?;
        match order.hold_until_ms() {
            Some(until) => round.holds.insert(order.id, until).map(|_| ()),
            None => round.board.insert(order.seq, order.id).map(|_| ()),
        };
        self.sales
            .get_mut(&order.round.sale)?
            .orders
            .insert(order.id, *order);
        let member = self.member_mut(order.round, order.buyer)?;
        member.0 += order.quantity;
        member.1 += 1;
        Some(())
    }

    /// What an event makes of the round that it is of; `None` when it does not follow.
    fn happened(&mut self, event: &Event) -> Option<()> {
        let id = event.round?;
        let round = self.rounds.get_mut(&id)?;
        round.counters.seq += 1;
        if event.seq != round.counters.seq {
            return None;
        }
        event.shift(&mut round.counters)?;
        if let Some(intent) = event.kind.intent() {
            round.intent = intent;
        }
        let sale = self.sales.get_mut(&id.sale)?;
        if let (Some(operation), Some(asked)) = (event.operation, event.fingerprint) {
            sale.operations.insert(operation, (asked, event.seq));
        }
        match event.kind {
            EventKind::Epoch | EventKind::Provision => return None,
            EventKind::Archive => {
                round.leave();
                sale.archived_rounds += 1;
            }
            EventKind::Amend => round.terms = round.terms.amended(&event.amendment?),
            EventKind::Join => {
                let wish = Wish {
                    buyer: BuyerId(event.actor?),
                    order: event.order?,
                    fingerprint: event.fingerprint?,
                    units: event.units,
                };
                round.line.insert(event.seq, wish);
            }
            EventKind::Leave => {
                let order = event.order?;
                round.line.retain(|_, wish| wish.order != order);
            }
            kind if kind.changes_order() => {
                let order = sale.orders.get_mut(&event.order?)?;
                let before = *order;
                event.change(order)?;
                let order = *order;
                round.holds.remove(&order.id);
                round.board.remove(&order.seq);
                match (order.status, order.hold_until_ms()) {
                    (Status::Held, Some(until)) => round.holds.insert(order.id, until).map(|_| ()),
                    (Status::Confirmed, _) => round.board.insert(order.seq, order.id).map(|_| ()),
                    _ => None,
                };
                let units = &mut self.member_mut(id, order.buyer)?.0;
                *units = units.checked_sub(order.returned - before.returned)?;
            }
            _ => {}
        }
        Some(())
    }

    /// Begins a command on one round.
    fn open(&mut self, now_ms: i64, id: RoundId) -> Option<Change<'_>> {
        self.rounds.contains_key(&id).then(|| Change {
            model: self,
            now_ms,
            id,
            orders: vec![],
            events: vec![],
        })
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
            actor,
            ..Event::new(id, round.counters.seq, kind)
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

    /// Takes over what a journal entry says, whoever decided it. `terms` are those of the rounds
    /// that it may provision. Of a round that it archives nothing is left here.
    ///
    /// `None` when the entry does not follow from what is here; the model is then of no use.
    pub fn replay(&mut self, entry: &Entry, terms: &BTreeMap<RoundId, Terms>) -> Option<()> {
        for step in entry.steps() {
            match step {
                Step::Order(order) => {
                    let round = self.rounds.get(&order.round)?;
                    if order.seq != round.counters.seq + 1 {
                        return None;
                    }
                    self.accept(order)?;
                }
                Step::Event(event) => match (event.round, event.kind) {
                    (None, _) => {}
                    (Some(id), EventKind::Provision) => self.insert(id, *terms.get(&id)?),
                    (Some(id), EventKind::Archive) => {
                        self.happened(event)?;
                        let sale = self.sales.get_mut(&id.sale)?;
                        let before = sale.orders.len();
                        sale.orders.retain(|_, order| order.round != id);
                        sale.archived_orders += (before - sale.orders.len()) as u64;
                    }
                    (Some(_), _) => self.happened(event)?,
                },
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
            let buyers = match terms.policy.limit_scope {
                LimitScope::Round => &mut round.buyers,
                LimitScope::Sale => &mut sale.buyers,
            };
            let (units, acceptances) = buyers.entry(order.buyer).or_default();
            *acceptances += 1;
            *units += order.taken();
            match (order.status, order.hold_until_ms()) {
                (Status::Held, Some(until)) => round.holds.insert(order.id, until).map(|_| ()),
                (Status::Confirmed, _) => round.board.insert(order.seq, order.id).map(|_| ()),
                _ => None,
            };
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
                holds: BTreeMap::new(),
                line: BTreeMap::new(),
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

/// A command on one round, and what it has done so far.
struct Change<'a> {
    model: &'a mut Model,
    now_ms: i64,
    id: RoundId,
    orders: Vec<Order>,
    events: Vec<Event>,
}

impl Change<'_> {
    fn round(&self) -> Option<&Round> {
        self.model.rounds.get(&self.id)
    }

    fn order(&self, order: OrderId) -> Option<Order> {
        let sale = self.model.sales.get(&self.id.sale)?;
        sale.orders.get(&order).copied()
    }

    /// The event that comes next in the round, without what is special about it.
    fn next(&self, kind: EventKind) -> Option<Event> {
        let seq = self.round()?.counters.seq + 1;
        Some(Event::new(self.id, seq, kind))
    }

    fn note(&mut self, event: Event) -> Option<()> {
        self.model.happened(&event)?;
        self.events.push(event);
        Some(())
    }

    /// Writes the entry.
    fn commit(mut self) -> Option<()> {
        let closes = self.model.close_if_sold_out(self.id)?;
        self.events.extend(closes);
        if !self.events.is_empty() {
            self.model
                .append(self.now_ms, &[self.id], self.orders, self.events);
        }
        Some(())
    }

    /// Units that are back go to whoever waits longest, before the public sees them.
    fn offer(&mut self, most: u64, durability: Option<Durability>) -> Option<u64> {
        let mut offered = 0;
        let line: Vec<Wish> = self.round()?.line.values().copied().collect();
        let Some(durability) = durability.filter(|_| {
            let round = self.round();
            round.is_some_and(|round| round.state(self.now_ms) == State::Open)
        }) else {
            return Some(0);
        };
        for wish in line.into_iter().take(usize::try_from(most).ok()?) {
            let round = self.round()?;
            let (limit, remaining) = (round.terms.per_buyer_limit, round.counters.remaining);
            if remaining == 0 {
                break;
            }
            let member = self.model.member(self.id, wish.buyer);
            let (has, acceptances) = member.unwrap_or_default();
            let may = if acceptances >= limit + SPARE_ACCEPTANCES {
                0
            } else {
                limit.saturating_sub(has)
            };
            let units = wish.units.min(remaining).min(may);
            self.note(Event {
                order: Some(wish.order),
                units,
                actor: Some(wish.buyer.0),
                ..self.next(EventKind::Leave)?
            })?;
            if units == 0 {
                continue;
            }
            let round = self.round()?;
            let order = Order {
                id: wish.order,
                round: self.id,
                buyer: wish.buyer,
                quantity: units,
                unit_price: round.terms.unit_price,
                status: Status::Held,
                accepted_as: Status::Held,
                durability,
                // Nobody gets a 201 for it, so it has no receipt.
                receipt_key: 0,
                epoch: self.model.epoch,
                seq: round.counters.seq + 1,
                pseq: self.model.pseq + 1,
                accepted_at_ms: self.now_ms,
                fingerprint: wish.fingerprint,
                hold_ms: round.terms.policy.hold_ms?,
                extended_ms: 0,
                returned: 0,
                refunded: 0,
            };
            self.model.accept(&order)?;
            self.orders.push(order);
            offered += 1;
        }
        Some(offered)
    }

    fn release(
        mut self,
        id: OrderId,
        release: Release,
        units: Option<u64>,
        operation: Option<Operation>,
        durability: Option<Durability>,
        actor: Uuid,
    ) -> Option<Released> {
        let order = self.order(id);
        let sale = self.model.sales.get(&self.id.sale)?;
        if let Some((known, operation)) =
            operation.and_then(|operation| Some((sale.operations.get(&operation.id)?, operation)))
        {
            return Some(match order {
                _ if known.0 != operation.fingerprint => Released::Mismatch,
                Some(order) => Released::Replayed(order),
                // It has left since.
                None => Released::Settled,
            });
        }
        let settled = self.round()?.intent.is_final();
        let Some(order) = order else {
            return Some(if settled {
                Released::Settled
            } else {
                Released::Unknown
            });
        };
        if !matches!(order.status, Status::Held | Status::Confirmed) {
            return Some(Released::Already(order));
        }
        if settled {
            return Some(Released::Settled);
        }
        let from_held = order.status == Status::Held;
        if from_held && release.is_money() {
            return Some(Released::Held(order));
        }
        let units = units.unwrap_or(order.left());
        if units > order.left() {
            return Some(Released::TooMany(order));
        }
        self.note(Event {
            order: Some(id),
            units,
            from_held,
            actor: Some(actor),
            operation: operation.map(|operation| operation.id),
            fingerprint: operation.map(|operation| operation.fingerprint),
            ..self.next(release.event())?
        })?;
        let order = self.order(id)?;
        self.offer(OFFERS_MAX, durability)?;
        self.commit()?;
        Some(Released::Done(order))
    }

    /// Whether a held order can still become something else.
    #[expect(clippy::result_large_err, reason = "the answer is all there is")]
    fn held(&self, id: OrderId) -> Result<Order, Confirmed> {
        match self.order(id) {
            None => Err(Confirmed::Unknown),
            Some(order) if order.status != Status::Held => Err(Confirmed::Already(order)),
            Some(order) if order.hold_until_ms().is_none_or(|end| self.now_ms >= end) => {
                Err(Confirmed::Late(order))
            }
            Some(order) => Ok(order),
        }
    }

    fn confirm(mut self, id: OrderId, actor: Uuid) -> Option<Confirmed> {
        let order = match self.held(id) {
            Ok(order) => order,
            Err(answer) => return Some(answer),
        };
        self.note(Event {
            order: Some(id),
            units: order.taken(),
            from_held: true,
            actor: Some(actor),
            ..self.next(EventKind::Confirm)?
        })?;
        let order = self.order(id)?;
        self.commit()?;
        Some(Confirmed::Done(order))
    }

    fn extend(mut self, id: OrderId, actor: Uuid) -> Option<Extended> {
        let order = match self.held(id) {
            Ok(order) if order.extended_ms > 0 => return Some(Extended::Before(order)),
            Ok(order) => order,
            Err(Confirmed::Done(order) | Confirmed::Already(order)) => {
                return Some(Extended::Already(order));
            }
            Err(Confirmed::Late(order)) => return Some(Extended::Late(order)),
            Err(Confirmed::Unknown) => return Some(Extended::Unknown),
        };
        let ms = (self.now_ms - order.accepted_at_ms).max(1);
        self.note(Event {
            order: Some(id),
            units: ms.cast_unsigned(),
            from_held: true,
            actor: Some(actor),
            ..self.next(EventKind::Extend)?
        })?;
        let order = self.order(id)?;
        self.commit()?;
        Some(Extended::Done(order))
    }

    fn sweep(mut self, holds: u64, offers: u64, durability: Option<Durability>) -> Option<Swept> {
        let mut due: Vec<(i64, OrderId)> = self
            .round()?
            .holds
            .iter()
            .map(|(id, until)| (*until, *id))
            .filter(|(until, _)| *until <= self.now_ms)
            .collect();
        due.sort_unstable_by_key(|(until, id)| (*until, *id.0.as_bytes()));
        due.truncate(usize::try_from(holds).ok()?);
        for (_, id) in &due {
            let order = self.order(*id)?;
            self.note(Event {
                order: Some(*id),
                units: order.taken(),
                from_held: true,
                ..self.next(EventKind::Expire)?
            })?;
        }
        let offered = self.offer(offers, durability)?;
        let next_ms = self.round()?.holds.values().min().copied();
        self.commit()?;
        Some(Swept {
            expired: due.len() as u64,
            offered,
            next_ms,
        })
    }

    fn allocate(
        mut self,
        reduce: bool,
        units: u64,
        operation: Operation,
        durability: Option<Durability>,
        actor: Uuid,
    ) -> Option<Allocated> {
        let sale = self.model.sales.get(&self.id.sale)?;
        if let Some((known, _)) = sale.operations.get(&operation.id) {
            return Some(if *known == operation.fingerprint {
                Allocated::Replayed
            } else {
                Allocated::Mismatch
            });
        }
        let round = self.round()?;
        let Counters {
            allocation,
            remaining,
            ..
        } = round.counters;
        if round.state(self.now_ms) == State::Closed {
            return Some(Allocated::Closed);
        }
        let too_many = if reduce {
            units > remaining
        } else {
            allocation + units > ALLOCATION_MAX
        };
        if too_many {
            return Some(Allocated::TooMany);
        }
        let kind = if reduce {
            EventKind::Reduce
        } else {
            EventKind::Restock
        };
        self.note(Event {
            units,
            actor: Some(actor),
            operation: Some(operation.id),
            fingerprint: Some(operation.fingerprint),
            ..self.next(kind)?
        })?;
        self.offer(OFFERS_MAX, durability)?;
        self.commit()?;
        Some(Allocated::Done)
    }

    /// The place of a buyer in the line, from 1 on.
    fn place(&self, buyer: BuyerId) -> Option<u64> {
        let mut line = self.round()?.line.values();
        line.position(|wish| wish.buyer == buyer)
            .map(|place| place as u64 + 1)
    }

    fn join(mut self, wish: Wish, archive: u32) -> Option<Joined> {
        if let Some(order) = self.order(wish.order) {
            return Some(Joined::Replayed(order));
        }
        if let Some(place) = self.place(wish.buyer) {
            return Some(Joined::Already(place));
        }
        let rounds = self.model.sales.get(&self.id.sale)?.archived_rounds;
        if archive < rounds {
            return Some(Joined::Refused(Refusal::Archived { rounds }));
        }
        let round = self.round()?;
        if !round.terms.policy.waitlist {
            return Some(Joined::NoLine);
        }
        let (held, acceptances) = self.model.member(self.id, wish.buyer).unwrap_or_default();
        let state = round.state(self.now_ms);
        let refusal = barred(&round.terms, state, wish.units, held, acceptances);
        if let Some(refusal) = refusal {
            return Some(Joined::Refused(refusal));
        }
        if round.counters.remaining > 0 && round.line.is_empty() {
            return Some(Joined::Available);
        }
        if round.line.len() as u64 >= LINE_MAX {
            return Some(Joined::Full);
        }
        self.note(Event {
            order: Some(wish.order),
            units: wish.units,
            fingerprint: Some(wish.fingerprint),
            actor: Some(wish.buyer.0),
            ..self.next(EventKind::Join)?
        })?;
        let place = self.place(wish.buyer)?;
        self.commit()?;
        Some(Joined::Done(place))
    }

    fn leave(mut self, buyer: BuyerId) -> Option<bool> {
        let mut line = self.round()?.line.values();
        let Some(wish) = line.find(|wish| wish.buyer == buyer).copied() else {
            return Some(false);
        };
        self.note(Event {
            order: Some(wish.order),
            actor: Some(buyer.0),
            ..self.next(EventKind::Leave)?
        })?;
        self.commit()?;
        Some(true)
    }

    fn amend(mut self, amendment: Amendment, actor: Uuid) -> Option<Amended> {
        let round = self.round()?;
        let before = Amendment::from(&round.terms);
        let state = round.state(self.now_ms);
        let end = amendment.window.closes_at_ms;
        let end_only = {
            let mut same = amendment;
            same.window.closes_at_ms = before.window.closes_at_ms;
            same == before
        };
        if state == State::Closed {
            return Some(Amended::Closed);
        }
        if amendment == before {
            return Some(Amended::Already);
        }
        if state != State::Scheduled && !end_only {
            return Some(Amended::Open);
        }
        if end.is_some_and(|end| end <= self.now_ms) {
            return Some(Amended::Past);
        }
        self.note(Event {
            actor: Some(actor),
            amendment: Some(amendment),
            ..self.next(EventKind::Amend)?
        })?;
        self.commit()?;
        Some(Amended::Done)
    }
}

/// Why a buyer with so many units and acceptances may not have `units` more, whatever remains: the
/// precedence of refusals, from first to last.
fn barred(terms: &Terms, state: State, units: u64, held: u64, acceptances: u64) -> Option<Refusal> {
    match state {
        State::Scheduled => Some(Refusal::NotOpen {
            opens_at_ms: terms.window.opens_at_ms,
        }),
        State::Paused => Some(Refusal::Paused),
        State::Closed => Some(Refusal::Closed),
        State::Open if units > terms.per_order_limit => Some(Refusal::OrderLimit {
            limit: terms.per_order_limit,
            held,
        }),
        State::Open
            if held + units > terms.per_buyer_limit
                || acceptances >= terms.per_buyer_limit + SPARE_ACCEPTANCES =>
        {
            Some(Refusal::BuyerLimit {
                limit: terms.per_buyer_limit,
                held,
            })
        }
        State::Open => None,
    }
}
