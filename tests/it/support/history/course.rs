//! What the events of a round lead to, one after the other: where its units are, what became of each
//! order, and who waits in line.

use std::collections::{HashMap, HashSet, VecDeque};

use chrono::{DateTime, TimeDelta, Utc};
use stockade::domain::limits::SPARE_ACCEPTANCES;
use uuid::Uuid;

use super::{
    Counters, Event, Order, Sale,
    checker::{Rule, Step},
};

/// The course of a round.
pub(super) struct Course {
    /// Units remaining before each step and after the last.
    pub(super) remaining: Vec<i64>,
    /// Buyers in line, in the same way.
    pub(super) waiting: Vec<usize>,
    /// Where the units are in the end.
    pub(super) counters: Counters,
    /// Steps that took out of the line whoever may not buy more.
    pub(super) satisfied: HashSet<usize>,
    /// What is wrong, at which step.
    pub(super) broken: Vec<(Rule, usize, String)>,
}

/// An order so far.
struct Life<'a> {
    order: &'a Order,
    step: usize,
    status: &'static str,
    left: i64,
    extended_ms: i64,
    returned: i64,
    refunded: i64,
}

impl Life<'_> {
    /// Until when it may be paid.
    fn until(&self) -> DateTime<Utc> {
        self.order.accepted_at + TimeDelta::milliseconds(self.order.hold_ms + self.extended_ms)
    }
}

/// Somebody in line.
struct Place {
    buyer: Uuid,
    /// The id that the order will have.
    order: Uuid,
    units: i64,
}

struct Walk<'a> {
    course: Course,
    lives: HashMap<Uuid, Life<'a>>,
    line: VecDeque<Place>,
    /// Whose order must come next, and of how many units.
    served: Option<(Uuid, i64)>,
    /// Units and acceptances of each buyer.
    buyers: HashMap<Uuid, (i64, i64)>,
    limit: i64,
}

impl Course {
    pub(super) fn new(sale: &Sale, steps: &[Step<'_>]) -> Self {
        let mut walk = Walk {
            course: Self {
                remaining: vec![sale.initial_allocation],
                waiting: vec![0],
                counters: Counters {
                    allocation: sale.initial_allocation,
                    remaining: sale.initial_allocation,
                    held: 0,
                    sold: 0,
                    seq: steps.last().map_or(0, |step| step.place().1),
                },
                satisfied: HashSet::new(),
                broken: Vec::new(),
            },
            lives: HashMap::new(),
            line: VecDeque::new(),
            served: None,
            buyers: HashMap::new(),
            limit: sale.per_buyer_limit,
        };
        for (at, step) in steps.iter().enumerate() {
            match step {
                Step::Order(order) => walk.accept(at, order),
                Step::Event(event) => walk.event(at, event),
            }
            let remaining = walk.course.counters.remaining;
            if remaining < 0 {
                walk.wrong(Rule::Oversell, at, format!("{} too many", -remaining));
            }
            walk.course.remaining.push(remaining);
            walk.course.waiting.push(walk.line.len());
        }
        walk.end(steps.len())
    }
}

impl<'a> Walk<'a> {
    fn wrong(&mut self, rule: Rule, at: usize, what: String) {
        self.course.broken.push((rule, at, what));
    }

    fn may_not_buy(&self, buyer: Uuid) -> bool {
        let (units, acceptances) = self.buyers.get(&buyer).copied().unwrap_or_default();
        units >= self.limit || acceptances >= self.acceptances_max()
    }

    fn acceptances_max(&self) -> i64 {
        self.limit + i64::try_from(SPARE_ACCEPTANCES).unwrap()
    }

    fn accept(&mut self, at: usize, order: &'a Order) {
        match self.served.take() {
            Some(served) if served != (order.id, order.quantity) => {
                self.wrong(Rule::Line, at, format!("{served:?} was to come"));
            }
            None if !self.line.is_empty() => {
                let what = format!("bought while {} wait in line", self.line.len());
                self.wrong(Rule::Line, at, what);
            }
            Some(_) | None => {}
        }
        let (units, acceptances) = self.buyers.entry(order.buyer).or_default();
        *units += order.quantity;
        *acceptances += 1;
        let (units, acceptances) = (*units, *acceptances);
        if units > self.limit || acceptances > self.acceptances_max() {
            let what = format!("{units} units, {acceptances} acceptances");
            self.wrong(Rule::Limit, at, what);
        }
        let held = order.accepted_as == "held";
        let counters = &mut self.course.counters;
        counters.remaining -= order.quantity;
        if held {
            counters.held += order.quantity;
        } else {
            counters.sold += order.quantity;
        }
        self.lives.entry(order.id).or_insert(Life {
            order,
            step: at,
            status: if held { "held" } else { "confirmed" },
            left: order.quantity,
            extended_ms: 0,
            returned: 0,
            refunded: 0,
        });
    }

    fn event(&mut self, at: usize, event: &Event) {
        if let Some(served) = self.served.take() {
            self.wrong(Rule::Line, at, format!("{served:?} was to come"));
        }
        let counters = &mut self.course.counters;
        match event.kind.as_str() {
            "restock" => {
                counters.allocation += event.units;
                counters.remaining += event.units;
            }
            "reduce" => {
                counters.allocation -= event.units;
                counters.remaining -= event.units;
            }
            "join" => self.join(at, event),
            "leave" => self.leave(at, event),
            "confirm" | "extend" | "expire" | "cancel" | "withdraw" | "return" | "refund" => {
                if let Err(what) = self.change(event) {
                    self.wrong(Rule::Lifecycle, at, what);
                }
            }
            _ => {}
        }
    }

    fn join(&mut self, at: usize, event: &Event) {
        let buyer = event.actor.unwrap_or_default();
        if self.line.iter().any(|place| place.buyer == buyer) {
            self.wrong(Rule::Line, at, "in line already".to_owned());
        } else if self.line.is_empty() && self.course.counters.remaining > 0 {
            self.wrong(Rule::Line, at, "waits for what is on sale".to_owned());
        }
        self.line.push_back(Place {
            buyer,
            order: event.order.unwrap_or_default(),
            units: event.units,
        });
    }

    fn leave(&mut self, at: usize, event: &Event) {
        let buyer = event.actor.unwrap_or_default();
        let Some(index) = self.line.iter().position(|place| place.buyer == buyer) else {
            self.wrong(Rule::Line, at, "leaves, and is not in line".to_owned());
            return;
        };
        let place = self.line.remove(index).unwrap();
        if event.units > 0 {
            let first = index == 0 && event.order == Some(place.order);
            if !first || event.units > place.units {
                let what = format!("number {} of the line is served", index + 1);
                self.wrong(Rule::Line, at, what);
            }
            self.served = Some((event.order.unwrap_or_default(), event.units));
        } else if self.may_not_buy(buyer) {
            self.course.satisfied.insert(at);
        }
    }

    /// What an event makes of its order; units that are not there do not move.
    fn change(&mut self, event: &Event) -> Result<(), String> {
        let kind = event.kind.as_str();
        let life = event.order.and_then(|id| self.lives.get_mut(&id));
        let life = life.ok_or_else(|| format!("a {kind} of nothing"))?;
        let open = if event.from_held { "held" } else { "confirmed" };
        if life.status != open {
            return Err(format!(
                "a {kind} of what was {open}, and is {}",
                life.status
            ));
        }
        let (late, whole) = (event.at >= life.until(), event.units == life.left);
        let counters = &mut self.course.counters;
        let (ended, wrong) = match kind {
            "confirm" => {
                life.status = "confirmed";
                counters.held -= life.left;
                counters.sold += life.left;
                let wrong = late || !whole || !event.from_held;
                return if wrong {
                    Err("paid too late, or in part".to_owned())
                } else {
                    Ok(())
                };
            }
            "extend" => {
                let wrong = late || life.extended_ms > 0 || !event.from_held;
                life.extended_ms = event.units;
                return if wrong {
                    Err("extended too late, or again".to_owned())
                } else {
                    Ok(())
                };
            }
            "expire" => ("expired", !late || !whole || !event.from_held),
            "cancel" => ("cancelled", false),
            "withdraw" => ("withdrawn", !whole),
            _ => ("refunded", event.from_held),
        };
        let units = event.units.min(life.left);
        let wrong = wrong || event.units > life.left || units < 1;
        life.left -= units;
        if kind == "refund" {
            life.refunded += units;
        } else {
            life.returned += units;
            counters.remaining += units;
            if event.from_held {
                counters.held -= units;
            } else {
                counters.sold -= units;
            }
            self.buyers.entry(life.order.buyer).or_default().0 -= units;
        }
        if life.left == 0 {
            life.status = ended;
        }
        if wrong {
            return Err(format!("{ended} too early, in part, or more than there is"));
        }
        Ok(())
    }

    /// Compares what became of each order with its row.
    fn end(mut self, steps: usize) -> Course {
        if let Some(served) = self.served.take() {
            self.wrong(Rule::Line, steps, format!("{served:?} was to come"));
        }
        for life in self.lives.values() {
            let order = life.order;
            let lived = (life.status, life.returned, life.refunded, life.extended_ms);
            let row = (
                order.status.as_str(),
                order.returned,
                order.refunded,
                order.extended_ms,
            );
            if lived != row {
                let what = format!("{} must be {lived:?}, and is {row:?}", order.id);
                self.course.broken.push((Rule::Lifecycle, life.step, what));
            }
        }
        self.course
    }
}
