//! Each rule finds what breaks it, and only that; what broke nothing is let pass.

use std::{collections::BTreeSet, time::Duration};

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{Attempt, Counters, Event, History, Kind, Order, Outcome, Sale, checker::Rule, judge};

const SALE: Uuid = Uuid::from_u128(1);

/// A run, written one attempt after the other; what the shop did is as if it had done right.
#[derive(Clone)]
struct Play {
    history: History,
    sale: Sale,
    now: Duration,
    /// How long what is bought waits for its payment.
    hold_ms: i64,
}

fn who(name: char) -> Uuid {
    Uuid::from_u128(u128::from(name))
}

fn opens_at() -> DateTime<Utc> {
    DateTime::from_timestamp(1_800_000_000, 0).unwrap()
}

impl Play {
    fn new(allocation: i64) -> Self {
        let counters = Counters {
            allocation,
            remaining: allocation,
            held: 0,
            sold: 0,
            seq: 0,
        };
        Self {
            history: History {
                attempts: Vec::new(),
                settled: Duration::MAX,
            },
            sale: Sale {
                id: SALE,
                number: 7,
                initial_allocation: allocation,
                per_buyer_limit: 3,
                opens_at: opens_at(),
                closes_at: None,
                stored: counters,
                live: counters,
                orders: Vec::new(),
                events: Vec::new(),
                board: Vec::new(),
            },
            now: Duration::ZERO,
            hold_ms: 0,
        }
    }

    fn at(&self) -> DateTime<Utc> {
        self.sale.opens_at + TimeDelta::from_std(self.now).unwrap()
    }

    /// One more attempt, after all others.
    fn attempt(&mut self, kind: Kind, name: char, key: &str, outcome: Outcome) -> &mut Attempt {
        let sent = self.now + Duration::from_secs(1);
        self.now = sent + Duration::from_secs(1);
        self.history.attempts.push(Attempt {
            sale: SALE,
            kind,
            who: who(name),
            key: key.to_owned(),
            sent,
            received: self.now,
            outcome,
        });
        self.history.attempts.last_mut().unwrap()
    }

    fn moved(&mut self, allocation: i64, remaining: i64, held: i64) -> i64 {
        let counters = &mut self.sale.stored;
        counters.allocation += allocation;
        counters.remaining += remaining;
        counters.held += held;
        counters.sold = counters.allocation - counters.remaining - counters.held;
        counters.seq += 1;
        self.sale.live = *counters;
        counters.seq
    }

    /// The store accepts; gives the body.
    fn accept(&mut self, name: char, key: &str, quantity: u64) -> String {
        let id = self.sale.order_id(who(name), key);
        self.accept_as(id, name, quantity)
    }

    fn accept_as(&mut self, id: Uuid, name: char, quantity: u64) -> String {
        let units = i64::try_from(quantity).unwrap();
        let held = self.hold_ms > 0;
        let status = if held { "held" } else { "confirmed" };
        let order = Order {
            epoch: 1,
            seq: self.moved(0, -units, if held { units } else { 0 }),
            id,
            buyer: who(name),
            quantity: units,
            unit_price: 1999,
            accepted_at: self.at(),
            status: status.to_owned(),
            accepted_as: status.to_owned(),
            hold_ms: self.hold_ms,
            extended_ms: 0,
            returned: 0,
            refunded: 0,
        };
        let mut body = json!({
            "id": order.id, "sale_id": SALE, "buyer_id": order.buyer, "quantity": quantity,
            "seq": order.seq, "unit_price": { "amount": 1999 }, "accepted_at": order.accepted_at,
            "status": status,
        });
        if held {
            body["held_until"] = json!(order.accepted_at + TimeDelta::milliseconds(self.hold_ms));
        }
        self.sale.orders.push(order);
        body.to_string()
    }

    fn event(&mut self, kind: &str, name: char, allocation: i64, units: i64, order: Option<Uuid>) {
        let seq = self.moved(allocation, units, 0);
        self.note(seq, kind, Some(who(name)), units, order);
    }

    fn note(&mut self, seq: i64, kind: &str, actor: Option<Uuid>, units: i64, order: Option<Uuid>) {
        let known = self.sale.orders.iter().find(|o| Some(o.id) == order);
        let event = Event {
            epoch: 1,
            seq,
            kind: kind.to_owned(),
            units,
            order,
            actor,
            at: self.at(),
            from_held: known.is_some_and(|order| order.status == "held"),
        };
        self.sale.events.push(event);
    }

    fn order(&mut self, id: Uuid) -> &mut Order {
        let mut orders = self.sale.orders.iter_mut();
        orders.find(|order| order.id == id).unwrap()
    }

    /// A held order is paid.
    fn pays(&mut self, name: char, order: Uuid) {
        let units = self.order(order).quantity;
        let seq = self.moved(0, 0, -units);
        self.note(seq, "confirm", Some(who(name)), units, Some(order));
        self.order(order).status = "confirmed".to_owned();
        self.done(Kind::Pay { order }, name);
    }

    fn extends(&mut self, name: char, order: Uuid) {
        let ms = self.at() - self.order(order).accepted_at;
        let ms = ms.num_milliseconds();
        let seq = self.moved(0, 0, 0);
        self.note(seq, "extend", Some(who(name)), ms, Some(order));
        self.order(order).extended_ms = ms;
        self.done(Kind::Extend { order }, name);
    }

    /// A held order expires or is cancelled: all of its units go back.
    fn ends(&mut self, kind: &str, status: &str, actor: Option<char>, order: Uuid) {
        let units = self.order(order).quantity;
        let seq = self.moved(0, units, -units);
        self.note(seq, kind, actor.map(who), units, Some(order));
        let row = self.order(order);
        (row.status, row.returned) = (status.to_owned(), units);
    }

    /// Joins the line, and hears so.
    fn joins(&mut self, name: char, quantity: u64) {
        let id = self.sale.wish_id(who(name), "w");
        let seq = self.moved(0, 0, 0);
        let units = i64::try_from(quantity).unwrap();
        self.note(seq, "join", Some(who(name)), units, Some(id));
        let body = json!({ "position": 1 }).to_string();
        self.in_line(name, quantity, &body);
    }

    fn in_line(&mut self, name: char, quantity: u64, body: &str) {
        let outcome = Outcome::Ok {
            body: body.to_owned(),
            replayed: false,
        };
        self.attempt(Kind::Join { quantity }, name, "w", outcome);
    }

    fn leaves(&mut self, name: char) {
        let id = self.sale.wish_id(who(name), "w");
        let seq = self.moved(0, 0, 0);
        self.note(seq, "leave", Some(who(name)), 0, Some(id));
        self.done(Kind::Leave, name);
    }

    /// Who is next gets units; gives the order and its body.
    fn serves(&mut self, name: char, units: u64) -> (Uuid, String) {
        let id = self.sale.wish_id(who(name), "w");
        let seq = self.moved(0, 0, 0);
        let given = i64::try_from(units).unwrap();
        self.note(seq, "leave", Some(who(name)), given, Some(id));
        (id, self.accept_as(id, name, units))
    }

    fn buys(&mut self, name: char, key: &str, quantity: u64) -> String {
        self.now += Duration::from_secs(1);
        let body = self.accept(name, key, quantity);
        self.now -= Duration::from_secs(1);
        self.told(name, key, quantity, &body, false);
        body
    }

    fn told(&mut self, name: char, key: &str, quantity: u64, body: &str, replayed: bool) {
        let body = body.to_owned();
        let kind = Kind::Purchase { quantity };
        self.attempt(kind, name, key, Outcome::Ok { body, replayed });
    }

    fn refused(&mut self, name: char, key: &str, quantity: u64, problem: Value) -> &mut Attempt {
        let code = problem["code"].as_str().unwrap().to_owned();
        let outcome = Outcome::Refused {
            code,
            from_memory: problem["retry"] == "same_key",
            problem,
        };
        self.attempt(Kind::Purchase { quantity }, name, key, outcome)
    }

    fn hears_nothing(&mut self, name: char, key: &str, quantity: u64) {
        let outcome = Outcome::Unknown("connection broken".to_owned());
        self.attempt(Kind::Purchase { quantity }, name, key, outcome);
    }

    fn done(&mut self, kind: Kind, name: char) {
        let body = "{}".to_owned();
        let outcome = Outcome::Ok {
            body,
            replayed: false,
        };
        self.attempt(kind, name, "r", outcome);
    }

    fn cancels(&mut self, name: char, key: &str) {
        let id = self.sale.order_id(who(name), key);
        let order = self.sale.orders.iter_mut().find(|order| order.id == id);
        let order = order.unwrap();
        let units = order.quantity;
        (order.status, order.returned) = ("cancelled".to_owned(), units);
        self.event("cancel", name, 0, units, Some(id));
        self.done(Kind::Cancel { order: id }, name);
    }

    fn restocks(&mut self, name: char, units: i64) {
        self.event("restock", name, units, units, None);
        let units = units.try_into().unwrap();
        self.done(Kind::Restock { units }, name);
    }

    fn reduces(&mut self, name: char, units: i64) {
        let seq = self.moved(-units, -units, 0);
        self.note(seq, "reduce", Some(who(name)), units, None);
        let units = units.try_into().unwrap();
        self.done(Kind::Reduce { units }, name);
    }

    /// The leaderboard, as it must be.
    fn rank(mut self) -> Self {
        let confirmed = |order: &&Order| order.status == "confirmed";
        self.sale.orders.sort_by_key(|order| order.seq);
        let orders = self.sale.orders.iter().filter(confirmed).zip(1..);
        self.sale.board = orders
            .map(
                |(order, rank)| json!({"rank": rank, "seq": order.seq, "quantity": order.quantity}),
            )
            .collect();
        self
    }

    fn broken(&self) -> Vec<Rule> {
        let found = judge(&self.history, &self.sale);
        found.iter().map(|violation| violation.rule).collect()
    }
}

/// A bit of everything that may happen.
fn clean() -> Play {
    let mut play = Play::new(5);
    let not_open = json!({"code": "not_open", "opens_at": opens_at(), "starts_in_ms": 5});
    play.refused('a', "1", 2, not_open);
    let first = play.buys('a', "1", 2);
    play.told('a', "1", 2, &first, true);
    // An answer that got lost.
    let lost = play.accept('b', "1", 1);
    play.hears_nothing('b', "1", 1);
    play.told('b', "1", 1, &lost, true);
    play.refused('c', "1", 3, json!({"code": "insufficient", "remaining": 2}));
    play.buys('c', "1", 2);
    play.refused('d', "1", 1, json!({"code": "sold_out"}));
    play.refused('a', "1", 1, json!({"code": "idempotency_key_mismatch"}));
    play.cancels('b', "1");
    // From a memory that is not older than it may be.
    let soon = play.now + Duration::from_millis(50);
    let refusal = json!({"code": "sold_out", "retry": "same_key"});
    play.refused('d', "2", 1, refusal).sent = soon;
    // Nobody ever hears of this one.
    play.accept('d', "3", 1);
    play.hears_nothing('d', "3", 1);
    play.restocks('x', 3);
    play.reduces('x', 1);
    play.event("pause", 'y', 0, 0, None);
    play.done(Kind::Pause, 'y');
    play.refused('e', "1", 1, json!({"code": "paused"}));
    play.event("resume", 'z', 0, 0, None);
    play.done(Kind::Resume, 'z');
    play.buys('e', "1", 1);
    play.sale.orders.last_mut().unwrap().epoch = 2;
    play.hears_nothing('f', "1", 2);
    play.history.settled = play.now;
    play.refused('f', "1", 2, json!({"code": "insufficient", "remaining": 1}));
    play.event("close", 'y', 0, 0, None);
    play.sale.events.last_mut().unwrap().epoch = 2;
    play.done(Kind::Close, 'y');
    play.refused('g', "1", 1, json!({"code": "closed"}));
    play.rank()
}

/// Holds and a line, with all that may become of them. `keeps` says whether the public waits, too.
fn line(keeps: bool) -> Play {
    let mut play = Play::new(3);
    play.hold_ms = 60_000;
    let first = play.buys('a', "1", 2);
    play.buys('b', "1", 1);
    let [a, b] = ['a', 'b'].map(|name| play.sale.order_id(who(name), "1"));
    play.refused('c', "1", 1, json!({"code": "sold_out"}));
    play.joins('c', 1);
    play.joins('d', 2);
    play.joins('e', 1);
    if keeps {
        play.leaves('e');
    }
    play.pays('b', b);
    play.now += Duration::from_mins(1);
    play.ends("expire", "expired", None, a);
    let (c, served) = play.serves('c', 1);
    // Fewer than hoped for.
    let (d, _) = play.serves('d', 1);
    let expired = json!({"code": "hold_expired"});
    play.refused('a', "pay", 1, expired).kind = Kind::Pay { order: a };
    play.told('a', "1", 2, &first, true);
    play.in_line('c', 1, &served);
    play.extends('c', c);
    play.now += Duration::from_secs(55);
    play.pays('c', c);
    play.ends("cancel", "cancelled", Some('d'), d);
    play.done(Kind::Cancel { order: d }, 'd');
    if keeps {
        play.buys('f', "1", 1);
        play.joins('g', 1);
        // What comes back is not for the public, also before the line has it.
        play.restocks('x', 2);
        play.refused('h', "1", 1, json!({"code": "sold_out"}));
        play.serves('g', 1);
    }
    play.buys('i', "1", 1);
    play.rank()
}

#[test]
fn a_clean_history_passes() {
    for clean in [clean(), line(true)] {
        let found = judge(&clean.history, &clean.sale);
        assert!(found.is_empty(), "{found:#?}");
    }
}

/// Another time for the hold of a buyer, as everybody was told.
fn hold(play: &mut Play, name: char, ms: i64) {
    let id = play.sale.order_id(who(name), "1");
    let order = play.order(id);
    order.hold_ms = ms;
    let until = json!(order.accepted_at + TimeDelta::milliseconds(ms));
    for attempt in &mut play.history.attempts {
        if let Outcome::Ok { body, .. } = &mut attempt.outcome
            && body.contains(&id.to_string())
        {
            let mut told: Value = serde_json::from_str(body).unwrap();
            told["held_until"] = until.clone();
            *body = told.to_string();
        }
    }
}

#[test]
fn each_rule_finds_what_breaks_it_and_only_that() {
    type Corruption = fn(&mut Play);
    let of_holds: &[(Rule, &str, Corruption)] = &[
        (Rule::Lifecycle, "paid after its deadline", |play| {
            hold(play, 'b', 1);
        }),
        (Rule::Lifecycle, "expired before its deadline", |play| {
            hold(play, 'a', 3_600_000);
        }),
        (
            Rule::Lifecycle,
            "paid although it was extended once",
            |play| {
                let c = play.sale.wish_id(who('c'), "w");
                play.order(c).extended_ms = 0;
                let extend = play.sale.events.iter_mut().find(|e| e.kind == "extend");
                extend.unwrap().units = 0;
            },
        ),
        (Rule::Lifecycle, "expired and paid", |play| {
            let a = play.sale.order_id(who('a'), "1");
            play.now += Duration::from_mins(5);
            let seq = play.moved(0, 0, 0);
            play.note(seq, "expire", None, 2, Some(a));
        }),
        (Rule::Lifecycle, "paid, and told that it was late", |play| {
            let b = play.sale.order_id(who('b'), "1");
            let expired = json!({"code": "hold_expired"});
            play.refused('b', "pay", 1, expired).kind = Kind::Pay { order: b };
        }),
        (Rule::Lifecycle, "its row says something else", |play| {
            let b = play.sale.order_id(who('b'), "1");
            play.order(b).returned = 1;
        }),
        (Rule::Conservation, "a unit stays held", |play| {
            play.sale.live.held += 1;
            play.sale.live.sold -= 1;
        }),
        (Rule::Lost, "a payment that was told", |play| {
            let order = play.sale.order_id(who('f'), "1");
            play.done(Kind::Pay { order }, 'f');
        }),
        (Rule::Lost, "more time that was told", |play| {
            let order = play.sale.order_id(who('f'), "1");
            play.done(Kind::Extend { order }, 'f');
        }),
        (Rule::Lost, "a place in line that was told", |play| {
            play.in_line('z', 1, &json!({ "position": 1 }).to_string());
        }),
        (Rule::Lost, "a place told as another order", |play| {
            let id = play.sale.order_id(who('f'), "1");
            play.in_line('f', 1, &json!({ "id": id, "quantity": 1 }).to_string());
        }),
        (Rule::Phantom, "nobody paid", |play| {
            let b = play.sale.order_id(who('b'), "1");
            let pays = |attempt: &Attempt| attempt.kind == Kind::Pay { order: b };
            play.history.attempts.retain(|attempt| !pays(attempt));
        }),
        (Rule::Phantom, "nobody waited", |play| {
            let joins = |attempt: &Attempt| {
                attempt.who == who('g') && matches!(attempt.kind, Kind::Join { .. })
            };
            play.history.attempts.retain(|attempt| !joins(attempt));
        }),
        (Rule::Phantom, "nobody left", |play| {
            let left = |attempt: &Attempt| attempt.kind == Kind::Leave;
            play.history.attempts.retain(|attempt| !left(attempt));
        }),
        (Rule::Line, "the second is served first", |play| {
            let events = &mut play.sale.events;
            let mut joins = events.iter_mut().filter(|event| event.kind == "join");
            let (c, d) = (joins.next().unwrap(), joins.next().unwrap());
            std::mem::swap(&mut c.actor, &mut d.actor);
            std::mem::swap(&mut c.order, &mut d.order);
            std::mem::swap(&mut c.units, &mut d.units);
        }),
        (Rule::Line, "more than waited for", |play| {
            let mut joins = play.sale.events.iter_mut();
            joins.find(|event| event.kind == "join").unwrap().units = 0;
        }),
        (Rule::Line, "called, and not served", |play| {
            let mut left = play.sale.events.iter_mut();
            left.find(|event| event.kind == "leave" && event.units == 1)
                .unwrap()
                .order = None;
        }),
        (Rule::Line, "the public is served", |play| {
            *play = line(false);
        }),
        (Rule::SoldOut, "while one is left", |play| {
            play.restocks('y', 1);
            play.refused('k', "1", 1, json!({"code": "sold_out"}));
        }),
    ];
    let corruptions: &[(Rule, &str, Corruption)] = &[
        (Rule::Conservation, "a unit vanished from Redis", |play| {
            play.sale.live.remaining -= 1;
        }),
        (Rule::Conservation, "PostgreSQL forgot a restock", |play| {
            play.sale.stored.allocation -= 2;
            play.sale.stored.remaining -= 2;
        }),
        (Rule::Oversell, "less was there than sold", |play| {
            // Only the refusals of one buyer said how much was left; they would not fit any more.
            play.history.attempts.retain(|attempt| {
                !matches!(&attempt.outcome, Outcome::Refused { code, .. }
                    if ["sold_out", "insufficient"].contains(&code.as_str()))
            });
            play.sale.initial_allocation -= 2;
            for counters in [&mut play.sale.stored, &mut play.sale.live] {
                counters.allocation -= 2;
                counters.remaining -= 2;
            }
        }),
        (Rule::Lost, "a 201 without a row", |play| {
            let id = play.sale.order_id(who('h'), "1");
            let body = json!({
                "id": id, "sale_id": SALE, "buyer_id": who('h'), "quantity": 1, "seq": 99,
            });
            play.told('h', "1", 1, &body.to_string(), false);
        }),
        (Rule::Lost, "a 201 with another price", |play| {
            play.sale.orders[0].unit_price = 1;
        }),
        (Rule::Lost, "a cancellation that was told", |play| {
            let order = play.sale.orders[2].id;
            play.done(Kind::Cancel { order }, 'c');
        }),
        (Rule::Lost, "a restock that was told", |play| {
            play.done(Kind::Restock { units: 1 }, 'w');
        }),
        (Rule::Lost, "a reduction that was told", |play| {
            play.done(Kind::Reduce { units: 1 }, 'x');
            let again = play.history.attempts.last_mut().unwrap();
            again.key = "another".to_owned();
        }),
        (Rule::Phantom, "nobody asked for it", |play| {
            let asked = play.sale.order_id(who('d'), "3");
            let unheard =
                |attempt: &Attempt| (attempt.who, attempt.key.as_str()) == (who('d'), "3");
            play.history.attempts.retain(|attempt| !unheard(attempt));
            assert!(play.sale.orders.iter().any(|order| order.id == asked));
        }),
        (Rule::Phantom, "refused whenever it was asked for", |play| {
            let key = play
                .history
                .attempts
                .iter_mut()
                .find(|a| a.key == "3")
                .unwrap();
            let problem = json!({"code": "paused"});
            key.outcome = Outcome::Refused {
                code: "paused".to_owned(),
                from_memory: false,
                problem,
            };
        }),
        (
            Rule::Phantom,
            "refused for good after an unknown end",
            |play| {
                play.refused('d', "3", 1, json!({"code": "closed"}));
            },
        ),
        (Rule::Phantom, "another quantity than asked for", |play| {
            let key = play
                .history
                .attempts
                .iter_mut()
                .find(|a| a.key == "3")
                .unwrap();
            key.kind = Kind::Purchase { quantity: 2 };
        }),
        (Rule::Phantom, "an event that nobody asked for", |play| {
            play.history
                .attempts
                .retain(|attempt| attempt.kind != Kind::Pause);
        }),
        (Rule::Once, "an order twice", |play| {
            let mut again = play.sale.orders[0].clone();
            let close = play.sale.events.last_mut().unwrap();
            (again.epoch, again.seq, again.accepted_at) = (close.epoch, close.seq, close.at);
            again.quantity = 0;
            close.seq += 1;
            play.sale.stored.seq += 1;
            play.sale.live.seq += 1;
            let place = json!({"rank": 5, "seq": again.seq, "quantity": 0});
            play.sale.board.push(place);
            play.sale.orders.push(again);
        }),
        (Rule::Once, "a restock twice", |play| {
            play.event("restock", 'x', 2, 2, None);
            let event = play.sale.events.last_mut().unwrap();
            event.epoch = 2;
            event.at += TimeDelta::hours(1);
        }),
        (Rule::Dense, "a number is missing", |play| {
            let close = play.sale.events.last_mut().unwrap();
            close.seq += 1;
            play.sale.stored.seq += 1;
            play.sale.live.seq += 1;
        }),
        (Rule::Limit, "a buyer has too much", |play| {
            play.sale.per_buyer_limit = 1;
        }),
        (Rule::Replay, "other bytes", |play| {
            let again = play.history.attempts.iter_mut();
            let again = again
                .filter(|attempt| attempt.who == who('a'))
                .nth(2)
                .unwrap();
            let Outcome::Ok { body, .. } = &mut again.outcome else {
                panic!("{again}");
            };
            body.push(' ');
        }),
        (Rule::Replay, "twice without the header", |play| {
            let again = play.history.attempts.iter_mut();
            let again = again
                .filter(|attempt| attempt.who == who('a'))
                .nth(2)
                .unwrap();
            let Outcome::Ok { replayed, .. } = &mut again.outcome else {
                panic!("{again}");
            };
            *replayed = false;
        }),
        (Rule::Replay, "never without the header", |play| {
            let first = play.history.attempts.iter_mut();
            let first = first
                .filter(|attempt| attempt.who == who('a'))
                .nth(1)
                .unwrap();
            let Outcome::Ok { replayed, .. } = &mut first.outcome else {
                panic!("{first}");
            };
            *replayed = true;
        }),
        (Rule::Replay, "the answer to another request", |play| {
            let Outcome::Ok { body, .. } = play.history.attempts[1].outcome.clone() else {
                panic!();
            };
            play.told('a', "1", 1, &body, true);
        }),
        (Rule::Replay, "refused after it was accepted", |play| {
            play.refused('a', "1", 2, json!({"code": "closed", "retry": "same_key"}));
        }),
        (Rule::Board, "two have changed places", |play| {
            play.sale.board.swap(0, 1);
        }),
        (Rule::Board, "a cancelled one is on it", |play| {
            play.sale
                .board
                .push(json!({"rank": 5, "seq": 2, "quantity": 1}));
        }),
        (Rule::Window, "before the opening", |play| {
            play.history.attempts.remove(0);
            play.sale.opens_at += TimeDelta::seconds(4);
        }),
        (Rule::Window, "at the end", |play| {
            play.sale.closes_at = play.sale.orders.last().map(|order| order.accepted_at);
        }),
        (Rule::Window, "while it is paused", |play| {
            let pause = play
                .sale
                .events
                .iter()
                .position(|event| event.kind == "pause");
            play.sale.events[pause.unwrap() + 1].kind = "pause".to_owned();
            play.sale.events[pause.unwrap() + 1].actor = Some(who('y'));
        }),
        (Rule::Window, "the clock goes back", |play| {
            play.sale.events.last_mut().unwrap().at -= TimeDelta::hours(1);
        }),
        (Rule::Window, "not open, after somebody bought", |play| {
            let not_open = json!({"code": "not_open", "opens_at": opens_at(), "starts_in_ms": 5});
            play.refused('h', "1", 1, not_open);
        }),
        (Rule::Window, "not open, but in no time", |play| {
            let Outcome::Refused { problem, .. } = &mut play.history.attempts[0].outcome else {
                panic!();
            };
            problem["starts_in_ms"] = json!(0);
        }),
        (Rule::Window, "accepted after it was closed", |play| {
            let first = play.history.attempts[0].sent;
            let late = play.history.attempts.last_mut().unwrap();
            (late.sent, late.received) = (first, first);
        }),
        (Rule::RealTime, "the later came first", |play| {
            // Two buyers, one after the other, change their times; what was refused is left out.
            let (e, c) = (who('e'), who('c'));
            let times = |play: &Play, who| {
                let mut own = play.history.attempts.iter().filter(|a| a.who == who);
                let ok = own
                    .rfind(|a| matches!(a.outcome, Outcome::Ok { .. }))
                    .unwrap();
                (ok.sent, ok.received)
            };
            let (early, late) = (times(play, c), times(play, e));
            play.history
                .attempts
                .retain(|attempt| !matches!(attempt.outcome, Outcome::Refused { .. }));
            for attempt in &mut play.history.attempts {
                let Outcome::Ok { .. } = attempt.outcome else {
                    continue;
                };
                if attempt.who == e {
                    (attempt.sent, attempt.received) = early;
                } else if attempt.who == c {
                    (attempt.sent, attempt.received) = late;
                }
            }
        }),
        (Rule::SoldOut, "while one is left", |play| {
            play.refused('h', "1", 1, json!({"code": "sold_out"}));
        }),
        (Rule::SoldOut, "from a memory that is too old", |play| {
            let own = play
                .history
                .attempts
                .iter_mut()
                .find(|a| a.key == "2")
                .unwrap();
            own.sent += Duration::from_millis(100);
        }),
        (Rule::SoldOut, "fewer are left than there were", |play| {
            let attempts = play.history.attempts.iter_mut().map(|a| &mut a.outcome);
            for outcome in attempts {
                if let Outcome::Refused { code, problem, .. } = outcome
                    && code == "insufficient"
                {
                    problem["remaining"] = json!(4);
                }
            }
        }),
        (Rule::Lifecycle, "only a part is given back", |play| {
            let cancel = play
                .sale
                .events
                .iter_mut()
                .find(|e| e.kind == "cancel")
                .unwrap();
            cancel.units += 1;
        }),
        (Rule::Lifecycle, "held for ever", |play| {
            play.sale.orders.last_mut().unwrap().status = "expired".to_owned();
            play.sale.board.pop();
        }),
    ];
    for (clean, corruptions) in [(clean(), corruptions), (line(true), of_holds)] {
        for (rule, what, corrupt) in corruptions {
            let mut play = clean.clone();
            corrupt(&mut play);
            let found = judge(&play.history, &play.sale);
            assert_eq!(play.broken(), [*rule], "{what}: {found:#?}");
        }
    }
    let all = corruptions.iter().chain(of_holds);
    let rules: BTreeSet<_> = all.map(|(rule, ..)| *rule).collect();
    assert_eq!(rules.len(), 14, "a corruption for each rule");
}
