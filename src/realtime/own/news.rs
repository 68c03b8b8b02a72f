//! What a buyer is told of its own orders and places in line, as text.

use serde::Serialize;
use utoipa::{
    ToSchema,
    openapi::{Ref, RefOr, Schema},
};

use crate::{
    domain::{
        id::{OrderId, SaleId},
        journal::EventKind,
        money::Money,
        order::{Order, Status},
    },
    realtime::frame::{Piece, instant},
};

/// What happened to an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = OrderChange)]
pub(crate) enum Change {
    /// It was accepted, or offered to whoever waited in line.
    Accepted,
    /// It waits for its payment, and most of its time is gone.
    Expiring,
    /// It has more time for its payment.
    Extended,
    /// It was paid.
    Confirmed,
    /// It was not paid in time.
    Expired,
    /// It was given back, all of it or some units.
    Cancelled,
    /// The rest of its cart was not to be had.
    Withdrawn,
    /// Its money went back, all of it or that of some units.
    Refunded,
}

impl Change {
    /// What an event of the journal is to the order that it changes.
    pub(super) fn of(kind: EventKind) -> Option<Self> {
        match kind {
            EventKind::Cancel => Some(Self::Cancelled),
            EventKind::Confirm => Some(Self::Confirmed),
            EventKind::Expire => Some(Self::Expired),
            EventKind::Extend => Some(Self::Extended),
            EventKind::Withdraw => Some(Self::Withdrawn),
            EventKind::Refund | EventKind::Return => Some(Self::Refunded),
            _ => None,
        }
    }
}

/// What happened to a place in line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = PlaceChange)]
pub(crate) enum Move {
    /// The buyer waits.
    Joined,
    /// It was the buyer's turn: `order_id` is held for it.
    Offered,
    /// The buyer waits no more.
    Left,
}

/// Why a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = StreamEnd)]
pub(crate) enum Ending {
    /// The session has ended, or its user may not come in any more.
    LoggedOut,
    /// It has lasted long enough: come again with a new ticket.
    Expired,
    /// This node stops: come again with a new ticket.
    Restart,
}

/// An order of the buyer who looks.
#[derive(Serialize, ToSchema)]
pub(crate) struct OwnOrder {
    #[schema(value_type = uuid::Uuid)]
    id: OrderId,
    #[schema(value_type = uuid::Uuid)]
    sale_id: SaleId,
    /// Which running of the sale it took its units from.
    round: u32,
    quantity: u64,
    #[schema(schema_with = price)]
    unit_price: Money,
    #[schema(schema_with = price)]
    total: Money,
    status: Status,
    /// Its place among the events of its round.
    seq: u64,
    #[schema(value_type = String, format = DateTime)]
    accepted_at: String,
    /// Until when it waits for its payment, if it does.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    held_until: Option<String>,
    /// Units that went back on sale, if any did.
    #[serde(skip_serializing_if = "Option::is_none")]
    returned: Option<u64>,
    /// Units that were refunded and stay sold, if any were.
    #[serde(skip_serializing_if = "Option::is_none")]
    refunded: Option<u64>,
}

fn price() -> RefOr<Schema> {
    Ref::from_schema_name("Price").into()
}

impl OwnOrder {
    pub(super) fn new(order: &Order, sale: SaleId) -> Self {
        let some = |units: u64| Some(units).filter(|units| *units > 0);
        let held = order.status == Status::Held;
        Self {
            id: order.id,
            sale_id: sale,
            round: order.round.round,
            quantity: order.quantity,
            unit_price: order.unit_price,
            total: order.total(),
            status: order.status,
            seq: order.seq,
            accepted_at: instant(order.accepted_at_ms),
            held_until: held.then(|| order.hold_until_ms().map(instant)).flatten(),
            returned: some(order.returned),
            refunded: some(order.refunded),
        }
    }
}

/// The `data` of a `snapshot`: it takes the place of everything that was told before.
#[derive(Serialize, ToSchema)]
pub struct OwnSnapshot {
    /// The newest orders, the newest first.
    orders: Vec<OwnOrder>,
    /// When that was so: milliseconds since the Unix epoch by the clock that decides.
    server_time_ms: i64,
}

/// The `data` of an `order`.
#[derive(Serialize, ToSchema)]
pub struct OrderNews {
    #[schema(inline)]
    change: Change,
    /// The order after it.
    order: OwnOrder,
    /// When it happened: milliseconds since the Unix epoch by the clock that decides.
    server_time_ms: i64,
}

/// The `data` of a `waitlist`.
#[derive(Serialize, ToSchema)]
pub struct PlaceNews {
    #[schema(inline)]
    change: Move,
    #[schema(value_type = uuid::Uuid)]
    sale_id: SaleId,
    /// Which running of the sale the line is of.
    round: u32,
    /// The order that is held for the buyer, if it was the buyer's turn.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<uuid::Uuid>)]
    order_id: Option<OrderId>,
    /// When it happened: milliseconds since the Unix epoch by the clock that decides.
    server_time_ms: i64,
}

/// The `data` of an `end`.
#[derive(Serialize, ToSchema)]
pub struct EndNews {
    #[schema(inline)]
    reason: Ending,
}

/// The `data` of the events of a buyer's own stream; the event's name says which.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub enum OwnNews {
    /// Of a `snapshot`.
    Snapshot(OwnSnapshot),
    /// Of an `order`.
    Order(OrderNews),
    /// Of a `waitlist`.
    Waitlist(PlaceNews),
    /// Of an `end`.
    End(EndNews),
}

pub(super) fn snapshot(orders: Vec<OwnOrder>, now_ms: i64) -> Piece {
    let news = OwnSnapshot {
        orders,
        server_time_ms: now_ms,
    };
    event("snapshot", &news)
}

pub(super) fn order(change: Change, order: &Order, sale: SaleId, at_ms: i64) -> Piece {
    let news = OrderNews {
        change,
        order: OwnOrder::new(order, sale),
        server_time_ms: at_ms,
    };
    event("order", &news)
}

/// What is told of a place in line.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) change: Move,
    pub(super) sale: SaleId,
    pub(super) round: u32,
    pub(super) order: Option<OrderId>,
}

pub(super) fn place(place: Place, at_ms: i64) -> Piece {
    let Place {
        change,
        sale,
        round,
        order,
    } = place;
    let news = PlaceNews {
        change,
        sale_id: sale,
        round,
        order_id: order,
        server_time_ms: at_ms,
    };
    event("waitlist", &news)
}

pub(super) fn end(reason: Ending) -> Piece {
    event("end", &EndNews { reason })
}

fn event(name: &str, data: &impl Serialize) -> Piece {
    // Numbers, words and ids always have a JSON form.
    let data = serde_json::to_string(data).unwrap_or_default();
    Piece::of(&format!("event: {name}\ndata: {data}\n\n"))
}
