//! The journal: what the scripts did, in the order they did it.

use uuid::Uuid;

use super::{
    id::{Fingerprint, JournalId, OperationId, OrderId, RoundId},
    order::{Order, Status},
    round::{Amendment, Counters, Intent},
};

/// What one script call did. One call makes one entry, or none when it changed nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its place. The numbers of a partition have no gaps.
    pub id: JournalId,
    /// When, milliseconds since the Unix epoch by Redis' clock.
    pub at_ms: i64,
    /// The counters of every round that it touched, after it.
    pub rounds: Vec<(RoundId, Counters)>,
    /// Orders that it accepted, in order of seq within their round.
    pub orders: Vec<Order>,
    /// Everything else that it did.
    pub events: Vec<Event>,
}

/// An acceptance, or anything else.
#[derive(Clone, Copy, Debug)]
pub enum Step<'a> {
    /// An acceptance.
    Order(&'a Order),
    /// Anything else.
    Event(&'a Event),
}

/// What a step adds to where a round's units are; what it takes is negative.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delta {
    /// Units given to the round.
    pub allocated: i64,
    /// Units of held orders.
    pub held: i64,
    /// Units of sold orders.
    pub sold: i64,
}

impl std::ops::Add for Delta {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            allocated: self.allocated + other.allocated,
            held: self.held + other.held,
            sold: self.sold + other.sold,
        }
    }
}

impl Step<'_> {
    /// To which round; `None` when it is to the partition.
    pub fn round(&self) -> Option<RoundId> {
        match self {
            Self::Order(order) => Some(order.round),
            Self::Event(event) => event.round,
        }
    }

    /// Its place among the events of its round; 0 where it takes none.
    pub fn seq(&self) -> u64 {
        match self {
            Self::Order(order) => order.seq,
            Self::Event(event) => event.seq,
        }
    }

    /// What it adds to where the units are.
    pub fn delta(&self) -> Delta {
        let mut delta = Delta::default();
        match self {
            Self::Order(order) if order.accepted_as == Status::Held => {
                delta.held = order.quantity.cast_signed();
            }
            Self::Order(order) => delta.sold = order.quantity.cast_signed(),
            Self::Event(event) => {
                let units = event.units.cast_signed();
                match event.kind {
                    EventKind::Cancel
                    | EventKind::Withdraw
                    | EventKind::Expire
                    | EventKind::Return => {
                        let place = if event.from_held {
                            &mut delta.held
                        } else {
                            &mut delta.sold
                        };
                        *place = -units;
                    }
                    EventKind::Confirm => (delta.held, delta.sold) = (-units, units),
                    EventKind::Restock | EventKind::Provision => delta.allocated = units,
                    EventKind::Reduce => delta.allocated = -units,
                    _ => {}
                }
            }
        }
        delta
    }
}

impl Entry {
    /// What happened, in order of seq within each round.
    pub fn steps(&self) -> Vec<Step<'_>> {
        let mut steps: Vec<_> = self.orders.iter().map(Step::Order).collect();
        steps.extend(self.events.iter().map(Step::Event));
        // One kind alone is in order as it stands, which is almost always so.
        if !self.orders.is_empty() && !self.events.is_empty() {
            steps.sort_by_key(Step::seq);
        }
        steps
    }
}

/// A change that is not an acceptance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// To which round; `None` when it is to the partition.
    pub round: Option<RoundId>,
    /// Its place among the events of its round; 0 where it takes none.
    pub seq: u64,
    /// What happened.
    pub kind: EventKind,
    /// To which order, if to one.
    pub order: Option<OrderId>,
    /// Units that it moved; of [`EventKind::Extend`] the milliseconds.
    pub units: u64,
    /// What was asked for, where a retry must ask for the same.
    pub fingerprint: Option<Fingerprint>,
    /// Whether the units were held before it.
    pub from_held: bool,
    /// What [`EventKind::Amend`] changes.
    pub amendment: Option<Amendment>,
    /// Who asked for it: a user's id.
    pub actor: Option<Uuid>,
    /// The operation that it carried out, if it has a key.
    pub operation: Option<OperationId>,
}

/// What can happen besides acceptance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// A new timeline of the partition began. Takes no seq.
    Epoch,
    /// A round was created. Takes no seq: its first order has seq 1.
    Provision,
    /// An order was given back; its units are for sale again.
    Cancel,
    /// Units were added.
    Restock,
    /// Selling stopped.
    Pause,
    /// Selling goes on.
    Resume,
    /// Selling ended for good.
    Close,
    /// Its orders became final.
    Settle,
    /// It left Redis.
    Archive,
    /// A held order was paid.
    Confirm,
    /// A held order was not paid in time; its units are for sale again.
    Expire,
    /// A held order got more time.
    Extend,
    /// An order of a cart that was not accepted as a whole went back.
    Withdraw,
    /// The money of a confirmed order went back; its units stay sold.
    Refund,
    /// The money of a confirmed order went back; its units are for sale again.
    Return,
    /// Units that remained were taken out.
    Reduce,
    /// Its rules were changed.
    Amend,
    /// A buyer waits in line.
    Join,
    /// A buyer waits no more: gone, or offered what the next order says.
    Leave,
}

impl Event {
    /// An event of a round that changes no unit and names nobody.
    pub fn new(round: RoundId, seq: u64, kind: EventKind) -> Self {
        Self {
            round: Some(round),
            seq,
            kind,
            order: None,
            units: 0,
            fingerprint: None,
            from_held: false,
            amendment: None,
            actor: None,
            operation: None,
        }
    }

    /// Moves the round's units as the event says; `None` when they are not there.
    pub fn shift(&self, counters: &mut Counters) -> Option<()> {
        let Counters {
            allocation,
            remaining,
            held,
            sold,
            ..
        } = counters;
        let units = self.units;
        match self.kind {
            EventKind::Cancel | EventKind::Withdraw | EventKind::Expire | EventKind::Return => {
                let place = if self.from_held { held } else { sold };
                *place = place.checked_sub(units)?;
                *remaining = remaining.checked_add(units)?;
            }
            EventKind::Confirm => {
                *held = held.checked_sub(units)?;
                *sold = sold.checked_add(units)?;
            }
            EventKind::Restock => {
                *allocation = allocation.checked_add(units)?;
                *remaining = remaining.checked_add(units)?;
            }
            EventKind::Reduce => {
                *allocation = allocation.checked_sub(units)?;
                *remaining = remaining.checked_sub(units)?;
            }
            EventKind::Provision => {
                (*counters == Counters::fresh(units)).then_some(())?;
            }
            EventKind::Epoch
            | EventKind::Pause
            | EventKind::Resume
            | EventKind::Close
            | EventKind::Settle
            | EventKind::Archive
            | EventKind::Extend
            | EventKind::Refund
            | EventKind::Amend
            | EventKind::Join
            | EventKind::Leave => {}
        }
        Some(())
    }

    /// Changes the order that it names as it says; `None` when that cannot be.
    pub fn change(&self, order: &mut Order) -> Option<()> {
        let open = if self.from_held {
            Status::Held
        } else {
            Status::Confirmed
        };
        if order.status != open {
            return None;
        }
        let ended = match self.kind {
            EventKind::Confirm => {
                order.status = Status::Confirmed;
                return Some(());
            }
            EventKind::Extend => {
                order.extended_ms = self.units;
                return Some(());
            }
            EventKind::Cancel => Status::Cancelled,
            EventKind::Withdraw => Status::Withdrawn,
            EventKind::Expire => Status::Expired,
            EventKind::Return | EventKind::Refund => Status::Refunded,
            _ => return None,
        };
        if self.units > order.left() {
            return None;
        }
        match self.kind {
            EventKind::Refund => order.refunded += self.units,
            _ => order.returned += self.units,
        }
        if order.left() == 0 {
            order.status = ended;
        }
        Some(())
    }
}

impl Order {
    /// Takes its units as its acceptance says; `None` when they are not there.
    pub fn take(&self, counters: &mut Counters) -> Option<()> {
        let place = match self.accepted_as {
            Status::Confirmed => &mut counters.sold,
            Status::Held => &mut counters.held,
            _ => return None,
        };
        counters.remaining = counters.remaining.checked_sub(self.quantity)?;
        *place = place.checked_add(self.quantity)?;
        Some(())
    }
}

impl EventKind {
    /// All of them; the place is the number that the journal uses.
    pub const ALL: [Self; 19] = [
        Self::Epoch,
        Self::Provision,
        Self::Cancel,
        Self::Restock,
        Self::Pause,
        Self::Resume,
        Self::Close,
        Self::Settle,
        Self::Archive,
        Self::Confirm,
        Self::Expire,
        Self::Extend,
        Self::Withdraw,
        Self::Refund,
        Self::Return,
        Self::Reduce,
        Self::Amend,
        Self::Join,
        Self::Leave,
    ];

    /// Whether it changes an order, and so names one that was accepted before it.
    pub fn changes_order(self) -> bool {
        matches!(
            self,
            Self::Cancel
                | Self::Confirm
                | Self::Expire
                | Self::Extend
                | Self::Withdraw
                | Self::Refund
                | Self::Return
        )
    }

    /// What the operator wants after it, if it says so.
    pub fn intent(self) -> Option<Intent> {
        match self {
            Self::Pause => Some(Intent::Paused),
            Self::Resume => Some(Intent::Live),
            Self::Close => Some(Intent::Closed),
            Self::Settle => Some(Intent::Settled),
            Self::Archive => Some(Intent::Archived),
            _ => None,
        }
    }

    /// The word that PostgreSQL and the event feeds use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Epoch => "epoch",
            Self::Provision => "provision",
            Self::Cancel => "cancel",
            Self::Restock => "restock",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Close => "close",
            Self::Settle => "settle",
            Self::Archive => "archive",
            Self::Confirm => "confirm",
            Self::Expire => "expire",
            Self::Extend => "extend",
            Self::Withdraw => "withdraw",
            Self::Refund => "refund",
            Self::Return => "return",
            Self::Reduce => "reduce",
            Self::Amend => "amend",
            Self::Join => "join",
            Self::Leave => "leave",
        }
    }
}
