//! The journal: what the scripts did, in the order they did it.

use uuid::Uuid;

use super::{
    id::{JournalId, OperationId, OrderId, RoundId},
    order::Order,
    round::Counters,
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
    /// Units that it moved.
    pub units: u64,
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
}

impl EventKind {
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
        }
    }
}
