//! What one buyer is shown: the pure part of personal streams.

use std::collections::{BTreeMap, HashMap};

use super::news::{self, Change, Ending, OwnOrder, Place};
use crate::{
    domain::{
        id::{OrderId, SaleId},
        journal::Event,
        order::{Order, Status},
    },
    realtime::{frame::Piece, page::HEARTBEAT},
};

/// Orders that are shown at most: the newest.
pub(super) const ORDERS_MAX: usize = 50;

/// What is told as one: whoever is slow gets the last of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Subject {
    Order(OrderId),
    Place(SaleId),
}

/// A buyer's orders as they are, and the last news of each.
///
/// Every piece of news gets a turn: 1, 2, 3 …, as on a page of live stock: a stream only keeps up to
/// which it has seen.
#[derive(Debug, Default)]
pub(super) struct Desk {
    turn: u64,
    heartbeats: u64,
    /// The turn of the last snapshot that everybody must see; `None` before there is one.
    filled: Option<u64>,
    /// When all of this was last known to be so, by the clock that decides.
    as_of_ms: i64,
    orders: HashMap<OrderId, (Order, SaleId)>,
    news: BTreeMap<u64, (Subject, Piece)>,
    turns: HashMap<Subject, u64>,
    /// Streams that are over, by their number.
    ended: HashMap<u64, Ending>,
}

/// What a stream has seen of a desk.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cursor {
    /// All news up to this turn.
    at: u64,
    /// Everything up to this turn, as a snapshot; `None` before the first.
    whole: Option<u64>,
    heartbeats: u64,
}

/// What a stream says next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Said {
    Piece(Piece),
    /// The last of it.
    End(Piece),
    Nothing,
}

impl Desk {
    /// Shows these orders and no others. Gives those that are not shown any more.
    pub(super) fn fill(&mut self, mut orders: Vec<(Order, SaleId)>, now_ms: i64) -> Vec<OrderId> {
        orders.sort_unstable_by_key(|(order, _)| (order.accepted_at_ms, order.id.0));
        let new = orders.split_off(orders.len().saturating_sub(ORDERS_MAX));
        let new = new
            .into_iter()
            .map(|(order, sale)| (order.id, (order, sale)));
        let old = std::mem::replace(&mut self.orders, new.collect());
        // The snapshot has it all but for the places.
        self.news
            .retain(|_, (subject, _)| matches!(subject, Subject::Place(_)));
        self.turns
            .retain(|subject, _| matches!(subject, Subject::Place(_)));
        self.turn += 1;
        self.filled = Some(self.turn);
        self.as_of_ms = now_ms;
        let gone = old.into_keys().filter(|id| !self.orders.contains_key(id));
        gone.collect()
    }

    /// Whether there is a snapshot to show.
    pub(super) fn is_filled(&self) -> bool {
        self.filled.is_some()
    }

    /// The orders that are shown.
    pub(super) fn orders(&self) -> impl Iterator<Item = &Order> {
        self.orders.values().map(|(order, _)| order)
    }

    /// An order that was just accepted. Gives the one that had to go for it.
    pub(super) fn accept(&mut self, order: Order, sale: SaleId, at_ms: i64) -> Option<OrderId> {
        self.orders.insert(order.id, (order, sale));
        self.tell(
            Subject::Order(order.id),
            news::order(Change::Accepted, &order, sale, at_ms),
            at_ms,
        );
        // Twice as many: the next snapshot has the newest only.
        if self.orders.len() <= 2 * ORDERS_MAX {
            return None;
        }
        let oldest = self
            .orders()
            .min_by_key(|order| (order.status == Status::Held, order.accepted_at_ms));
        let oldest = oldest?.id;
        self.orders.remove(&oldest);
        Some(oldest)
    }

    /// What happened to an order that is shown; `None` when that cannot be.
    pub(super) fn change(&mut self, event: &Event, at_ms: i64) -> Option<Order> {
        let (id, change) = (event.order?, Change::of(event.kind)?);
        let (order, sale) = self.orders.get_mut(&id)?;
        event.change(order)?;
        let (order, sale) = (*order, *sale);
        self.tell(
            Subject::Order(id),
            news::order(change, &order, sale, at_ms),
            at_ms,
        );
        Some(order)
    }

    /// The time of a held order is nearly over.
    pub(super) fn warn(&mut self, id: OrderId, now_ms: i64) {
        if let Some((order, sale)) = self.orders.get(&id).copied()
            && order.status == Status::Held
        {
            self.tell(
                Subject::Order(id),
                news::order(Change::Expiring, &order, sale, now_ms),
                now_ms,
            );
        }
    }

    /// What happened to a place in line.
    pub(super) fn place(&mut self, place: Place, at_ms: i64) {
        let piece = news::place(place, at_ms);
        self.tell(Subject::Place(place.sale), piece, at_ms);
    }

    /// Tells every stream that its connection is alive.
    pub(super) fn beat(&mut self) {
        self.heartbeats += 1;
    }

    /// Ends a stream.
    pub(super) fn end(&mut self, stream: u64, why: Ending) {
        self.ended.entry(stream).or_insert(why);
    }

    /// Whether a stream is over.
    pub(super) fn has_ended(&self, stream: u64) -> bool {
        self.ended.contains_key(&stream)
    }

    /// A stream is gone.
    pub(super) fn forget(&mut self, stream: u64) {
        self.ended.remove(&stream);
    }

    fn tell(&mut self, subject: Subject, piece: Piece, at_ms: i64) {
        self.turn += 1;
        self.as_of_ms = self.as_of_ms.max(at_ms);
        if let Some(before) = self.turns.insert(subject, self.turn) {
            self.news.remove(&before);
        }
        self.news.insert(self.turn, (subject, piece));
        if self.news.len() > 2 * ORDERS_MAX
            && let Some((turn, (subject, _))) = self.news.pop_first()
        {
            self.turns.remove(&subject);
            // Whoever has not seen it sees everything anew.
            self.filled = self.filled.map(|filled| filled.max(turn));
        }
    }

    /// Where a stream begins: with a snapshot, as soon as there is one.
    pub(super) fn start(&self) -> Cursor {
        Cursor {
            at: self.turn,
            whole: None,
            heartbeats: self.heartbeats,
        }
    }

    /// What this stream says next, at this instant.
    pub(super) fn next(&self, cursor: &mut Cursor, stream: u64, now_ms: Option<i64>) -> Said {
        if let Some(why) = self.ended.get(&stream) {
            return Said::End(news::end(*why));
        }
        if let Some(filled) = self.filled
            && cursor
                .whole
                .is_none_or(|whole| whole.max(cursor.at) < filled)
        {
            cursor.whole = Some(self.turn);
            let mut orders: Vec<_> = self.orders.values().collect();
            orders.sort_unstable_by_key(|(order, _)| {
                std::cmp::Reverse((order.accepted_at_ms, order.id.0))
            });
            let orders = orders
                .into_iter()
                .map(|(order, sale)| OwnOrder::new(order, *sale));
            let now_ms = self.as_of_ms.max(now_ms.unwrap_or_default());
            return Said::Piece(news::snapshot(orders.collect(), now_ms));
        }
        for (turn, (subject, piece)) in self.news.range(cursor.at + 1..) {
            cursor.at = *turn;
            let seen = matches!(subject, Subject::Order(_)) && Some(*turn) <= cursor.whole;
            if !seen {
                return Said::Piece(piece.clone());
            }
        }
        cursor.at = self.turn;
        let beaten = std::mem::replace(&mut cursor.heartbeats, self.heartbeats);
        if beaten == self.heartbeats {
            Said::Nothing
        } else {
            Said::Piece(HEARTBEAT)
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::Value;
    use uuid::Uuid;

    use super::{super::news::Move, *};
    use crate::domain::{
        id::{BuyerId, Epoch, Fingerprint, RoundId, SaleNumber},
        journal::EventKind,
        money::{Currency, Money},
        order::Durability,
    };

    const SALE: SaleId = SaleId(Uuid::from_u128(0xa));
    const ROUND: RoundId = RoundId {
        sale: SaleNumber(7),
        round: 1,
    };

    /// A held order with this number, of a buyer with that one.
    pub(in crate::realtime::own) fn held(number: u64, buyer: u128) -> Order {
        Order {
            id: OrderId(Uuid::from_u128(number.into())),
            round: ROUND,
            buyer: BuyerId(Uuid::from_u128(buyer)),
            quantity: 2,
            unit_price: Money::new(100, Currency::parse("EUR").unwrap()).unwrap(),
            status: Status::Held,
            accepted_as: Status::Held,
            durability: Durability::Fsync,
            receipt_key: 1,
            epoch: Epoch(1),
            seq: number,
            pseq: number,
            accepted_at_ms: i64::try_from(number).unwrap(),
            fingerprint: Fingerprint::default(),
            hold_ms: 1_000,
            extended_ms: 0,
            returned: 0,
            refunded: 0,
        }
    }

    /// What happens to it, to all of its units.
    pub(in crate::realtime::own) fn event(kind: EventKind, number: u64) -> Event {
        Event {
            order: Some(held(number, 1).id),
            units: 2,
            from_held: true,
            ..Event::new(ROUND, 100, kind)
        }
    }

    /// All that a stream says now: names, and the numbers and words of what is in it.
    fn drain(desk: &Desk, cursor: &mut Cursor) -> Vec<String> {
        let mut all = Vec::new();
        loop {
            let (piece, over) = match desk.next(cursor, 1, None) {
                Said::Piece(piece) => (piece, false),
                Said::End(piece) => (piece, true),
                Said::Nothing => return all,
            };
            let text = String::from_utf8(piece.text().to_vec()).unwrap();
            let Some((name, data)) = text.trim_end().split_once("\ndata: ") else {
                all.push(text.trim_end().to_owned());
                continue;
            };
            let data: Value = serde_json::from_str(data).unwrap();
            let order = |order: &Value| {
                let id: Uuid = order["id"].as_str().unwrap().parse().unwrap();
                format!("{} {}", id.as_u128(), order["status"].as_str().unwrap())
            };
            let said = match name {
                "event: snapshot" => {
                    let orders = data["orders"].as_array().unwrap();
                    let orders: Vec<_> = orders.iter().map(order).collect();
                    format!("[{}]", orders.join(", "))
                }
                "event: order" => {
                    format!(
                        "{}: {}",
                        data["change"].as_str().unwrap(),
                        order(&data["order"])
                    )
                }
                "event: waitlist" => data["change"].as_str().unwrap().to_owned(),
                "event: end" => data["reason"].as_str().unwrap().to_owned(),
                other => panic!("{other}"),
            };
            all.push(said);
            if over {
                return all;
            }
        }
    }

    #[test]
    fn whoever_looks_sees_what_there_is_and_then_each_change() {
        let mut desk = Desk::default();
        let mut early = desk.start();
        assert_eq!(drain(&desk, &mut early), [""; 0], "nobody knows yet");
        desk.accept(held(2, 1), SALE, 10);
        assert_eq!(drain(&desk, &mut early), ["accepted: 2 held"]);
        desk.fill(vec![(held(1, 1), SALE), (held(2, 1), SALE)], 20);
        assert_eq!(drain(&desk, &mut early), ["[2 held, 1 held]"]);
        desk.change(&event(EventKind::Confirm, 1), 30).unwrap();
        let mut late = desk.start();
        assert_eq!(drain(&desk, &mut late), ["[2 held, 1 confirmed]"]);
        assert_eq!(drain(&desk, &mut early), ["confirmed: 1 confirmed"]);
        desk.warn(held(1, 1).id, 40);
        desk.warn(held(2, 1).id, 40);
        desk.beat();
        for stream in [&mut early, &mut late] {
            assert_eq!(drain(&desk, stream), ["expiring: 2 held", ":"]);
        }
        // What cannot be is not told.
        assert!(desk.change(&event(EventKind::Confirm, 1), 50).is_none());
        assert!(desk.change(&event(EventKind::Cancel, 9), 50).is_none());
        assert_eq!(drain(&desk, &mut early), [""; 0]);
        desk.end(1, Ending::LoggedOut);
        desk.end(1, Ending::Expired);
        desk.change(&event(EventKind::Expire, 2), 60).unwrap();
        assert_eq!(drain(&desk, &mut early), ["logged_out"]);
        desk.forget(1);
        assert_eq!(drain(&desk, &mut late), ["expired: 2 expired"]);
    }

    #[test]
    fn whoever_is_slow_gets_the_last_of_each_order_and_of_each_line() {
        let mut desk = Desk::default();
        desk.fill(Vec::new(), 0);
        let mut slow = desk.start();
        assert_eq!(drain(&desk, &mut slow), ["[]"]);
        desk.accept(held(1, 1), SALE, 1);
        for change in [Move::Joined, Move::Offered] {
            let place = Place {
                change,
                sale: SALE,
                round: 1,
                order: None,
            };
            desk.place(place, 2);
        }
        desk.accept(held(2, 1), SALE, 3);
        desk.change(&event(EventKind::Cancel, 1), 4).unwrap();
        assert_eq!(
            drain(&desk, &mut slow),
            ["offered", "accepted: 2 held", "cancelled: 1 cancelled"]
        );
        // A new snapshot takes the place of what is told of orders, not of lines.
        desk.accept(held(3, 1), SALE, 5);
        let place = Place {
            change: Move::Left,
            sale: SALE,
            round: 1,
            order: None,
        };
        desk.place(place, 6);
        let gone = desk.fill(vec![(held(4, 1), SALE)], 7);
        assert_eq!(gone.len(), 3);
        assert_eq!(drain(&desk, &mut slow), ["[4 held]", "left"]);
        assert_eq!(drain(&desk, &mut desk.start()), ["[4 held]"]);
    }

    #[test]
    fn a_desk_stays_small_and_whoever_missed_something_sees_everything_anew() {
        let mut desk = Desk::default();
        desk.fill(Vec::new(), 0);
        let (mut quick, mut slow) = (desk.start(), desk.start());
        drain(&desk, &mut slow);
        let mut gone = 0;
        for number in 1..=500 {
            gone += u64::from(desk.accept(held(number, 1), SALE, 1).is_some());
            assert!(drain(&desk, &mut quick).len() == 1);
        }
        assert_eq!(desk.orders().count() as u64, 500 - gone);
        assert!(desk.orders().count() <= 2 * ORDERS_MAX && desk.news.len() <= 2 * ORDERS_MAX);
        assert_eq!(desk.turns.len(), desk.news.len());
        let said = drain(&desk, &mut slow);
        assert_eq!(said.len(), 1, "{said:?}");
        assert!(said[0].starts_with("[500 held, 499 held, "), "{said:?}");
        let all = (1..=500).map(|number| (held(number, 1), SALE)).collect();
        desk.fill(all, 2);
        assert_eq!(desk.orders().count(), ORDERS_MAX);
        assert!(desk.orders().all(|order| order.seq > 450));
    }
}
