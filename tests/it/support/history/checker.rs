//! The rules. Pure; sorting is the most expensive step.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    time::Duration,
};

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Value, json};
use stockade::domain::limits::MEMORY_MS;
use uuid::Uuid;

use super::{Attempt, Event, History, Kind, Order, Outcome, Sale, course::Course};

/// How long a node may refuse from memory what another one has changed.
const MEMORY: Duration = Duration::from_millis(MEMORY_MS.unsigned_abs());

/// What must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Rule {
    /// Live and stored counters are what the events lead to, and every unit is in one place.
    Conservation,
    /// At no event is more sold than there is.
    Oversell,
    /// What a client was told is stored, and as it was told.
    Lost,
    /// What is stored was asked for, and not refused for good.
    Phantom,
    /// One key, one effect; one place, one event.
    Once,
    /// The events are numbered 1, 2, 3 …, across epochs.
    Dense,
    /// No buyer ever has more than the limit, nor too many acceptances.
    Limit,
    /// The same key gets the same bytes, and once without the header.
    Replay,
    /// The leaderboard is the confirmed orders in their order.
    Board,
    /// Accepted is only what comes while the sale is open; its clock does not go back.
    Window,
    /// Who has an answer before another one asks comes first.
    RealTime,
    /// Sold out is said only when nothing is left, and `insufficient` only of what is left.
    SoldOut,
    /// A hold is paid before its deadline, or expires behind it, or is given back: one of them, once.
    /// Units go back once, and an order is what its events make of it.
    Lifecycle,
    /// What comes back goes to whoever waits longest, and to nobody else as long as anybody waits.
    Line,
}

/// A broken promise, and the events around the first place where it shows.
#[derive(Clone, Debug)]
pub(crate) struct Violation {
    pub(crate) rule: Rule,
    what: String,
    events: Vec<String>,
    /// Further places.
    more: usize,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.rule, self.what)?;
        if self.more > 0 {
            write!(f, " (and {} more)", self.more)?;
        }
        for event in &self.events {
            write!(f, "\n    {event}")?;
        }
        Ok(())
    }
}

/// The first violation of each rule that is broken; none when all promises were kept.
pub(crate) fn judge(history: &History, sale: &Sale) -> Vec<Violation> {
    let facts = Facts::new(history, sale);
    let mut found = Found::default();
    facts.numbers(&mut found);
    facts.units(&mut found);
    facts.window(&mut found);
    facts.board(&mut found);
    facts.keys(&mut found);
    facts.operations(&mut found);
    facts.order_in_time(&mut found);
    found.0.into_values().collect()
}

#[derive(Default)]
struct Found(BTreeMap<Rule, Violation>);

impl Found {
    fn add(&mut self, rule: Rule, what: String, events: impl FnOnce() -> Vec<String>) {
        if let Some(known) = self.0.get_mut(&rule) {
            known.more += 1;
        } else {
            let violation = Violation {
                rule,
                what,
                events: events(),
                more: 0,
            };
            self.0.insert(rule, violation);
        }
    }
}

/// An event of the round, whatever its table.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step<'a> {
    Order(&'a Order),
    Event(&'a Event),
}

impl Step<'_> {
    pub(super) fn place(&self) -> (i32, i64) {
        match self {
            Step::Order(order) => (order.epoch, order.seq),
            Step::Event(event) => (event.epoch, event.seq),
        }
    }

    fn at(&self) -> DateTime<Utc> {
        match self {
            Step::Order(order) => order.accepted_at,
            Step::Event(event) => event.at,
        }
    }
}

impl fmt::Display for Step<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (epoch, seq) = self.place();
        write!(f, "{epoch}/{seq} at {}: ", self.at().format("%T%.3f"))?;
        match self {
            Step::Order(order) => write!(
                f,
                "order {} of {} units by {}, {}",
                order.id, order.quantity, order.buyer, order.status
            ),
            Step::Event(event) => write!(
                f,
                "{} of {} units by {:?}, order {:?}",
                event.kind, event.units, event.actor, event.order
            ),
        }
    }
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} by {} with key {:?}, sent {:?}, known {:?}: ",
            self.kind, self.who, self.key, self.sent, self.received
        )?;
        match &self.outcome {
            Outcome::Ok { body, replayed } => write!(f, "ok, replayed {replayed}: {body}"),
            Outcome::Refused {
                code, from_memory, ..
            } => write!(f, "refused {code}, perhaps from memory: {from_memory}"),
            Outcome::Unknown(why) => write!(f, "unknown: {why}"),
        }
    }
}

/// Something that happened once, and between which instants its clients allow.
#[derive(Clone, Copy, Debug)]
struct Effect {
    /// Its step.
    step: usize,
    /// The first attempt that may have been it was sent.
    sent: Duration,
    /// The first answer that confirmed it was received.
    confirmed: Option<Duration>,
}

/// What happened, and to which order or by whom.
type Place<'a> = (&'a str, Uuid);

struct Facts<'a> {
    sale: &'a Sale,
    settled: Duration,
    /// Orders and events, by place.
    steps: Vec<Step<'a>>,
    /// Orders by id, with their step.
    orders: HashMap<Uuid, usize>,
    /// Attempts of purchases, by the id of the order that they make, in the order of sending.
    purchases: BTreeMap<Uuid, Vec<&'a Attempt>>,
    /// All other attempts, in the order of sending.
    others: Vec<&'a Attempt>,
    course: Course,
}

impl<'a> Facts<'a> {
    fn new(history: &'a History, sale: &'a Sale) -> Self {
        let orders = sale.orders.iter().map(Step::Order);
        let mut steps: Vec<_> = orders.chain(sale.events.iter().map(Step::Event)).collect();
        steps.sort_by_key(Step::place);
        let mut orders = HashMap::new();
        for (step, event) in steps.iter().enumerate() {
            if let Step::Order(order) = event {
                orders.entry(order.id).or_insert(step);
            }
        }
        let mut attempts: Vec<_> = history
            .attempts
            .iter()
            .filter(|attempt| attempt.sale == sale.id)
            .collect();
        attempts.sort_by_key(|attempt| attempt.sent);
        let mut purchases: BTreeMap<_, Vec<_>> = BTreeMap::new();
        let mut others = Vec::new();
        for attempt in attempts {
            if let Kind::Purchase { .. } = attempt.kind {
                let id = sale.order_id(attempt.who, &attempt.key);
                purchases.entry(id).or_default().push(attempt);
            } else {
                others.push(attempt);
            }
        }
        let course = Course::new(sale, &steps);
        Self {
            sale,
            settled: history.settled,
            steps,
            orders,
            purchases,
            others,
            course,
        }
    }

    /// The order that an event changes.
    fn changed(&self, event: &Event) -> Option<&'a Order> {
        let step = *self.orders.get(&event.order?)?;
        match self.steps[step] {
            Step::Order(order) => Some(order),
            Step::Event(_) => None,
        }
    }

    /// What an attempt is about: an order, or who asks.
    fn about(&self, attempt: &Attempt) -> Uuid {
        match attempt.kind {
            Kind::Cancel { order } | Kind::Pay { order } | Kind::Extend { order } => order,
            Kind::Join { .. } => self.sale.wish_id(attempt.who, &attempt.key),
            _ => attempt.who,
        }
    }

    /// The steps around one.
    fn around(&self, step: usize) -> Vec<String> {
        let to = (step + 3).min(self.steps.len());
        let steps = &self.steps[step.saturating_sub(2)..to];
        steps.iter().map(ToString::to_string).collect()
    }

    /// `Dense`, `Once` for places and ids.
    fn numbers(&self, found: &mut Found) {
        let mut expected = 1;
        let mut last = (0, 0);
        for (step, event) in self.steps.iter().enumerate() {
            let place = event.place();
            if place == last {
                let what = format!("two events at {place:?}");
                found.add(Rule::Once, what, || self.around(step));
            } else {
                if place.1 != expected {
                    let what = format!("{expected} is missing before {place:?}");
                    found.add(Rule::Dense, what, || self.around(step));
                }
                expected = place.1 + 1;
            }
            last = place;
            if let Step::Order(order) = event
                && self.orders[&order.id] != step
            {
                let what = format!("order {} is there twice", order.id);
                found.add(Rule::Once, what, || {
                    [self.around(self.orders[&order.id]), self.around(step)].concat()
                });
            }
        }
    }

    /// `Oversell`, `Limit`, `Lifecycle`, `Line`, `Conservation`.
    fn units(&self, found: &mut Found) {
        for (rule, step, what) in &self.course.broken {
            found.add(*rule, what.clone(), || match self.steps.get(*step) {
                Some(Step::Order(order)) if *rule == Rule::Limit => self.history_of(order.buyer),
                _ => self.around(*step),
            });
        }
        let expected = self.course.counters;
        for (whose, counters) in [("PostgreSQL", self.sale.stored), ("Redis", self.sale.live)] {
            if counters != expected {
                let what = format!("{whose} has {counters:?}, its events lead to {expected:?}");
                found.add(Rule::Conservation, what, || {
                    self.around(self.steps.len().saturating_sub(1))
                });
            }
        }
    }

    fn history_of(&self, buyer: Uuid) -> Vec<String> {
        let own = |step: &&Step| match step {
            Step::Order(order) => order.buyer == buyer,
            Step::Event(event) => self.changed(event).is_some_and(|o| o.buyer == buyer),
        };
        let steps = self.steps.iter().filter(own);
        steps.map(ToString::to_string).collect()
    }

    /// `Window`.
    fn window(&self, found: &mut Found) {
        let mut last = DateTime::<Utc>::MIN_UTC;
        let mut intent = "resume";
        for (step, event) in self.steps.iter().enumerate() {
            let at = event.at();
            if at < last {
                let what = format!("the clock goes back from {last}");
                found.add(Rule::Window, what, || self.around(step));
            }
            last = last.max(at);
            match event {
                Step::Order(_) => {
                    let open = intent == "resume"
                        && at >= self.sale.opens_at
                        && self.sale.closes_at.is_none_or(|end| at < end);
                    if !open {
                        let what = format!(
                            "accepted at {at} after `{intent}`; the window is {} to {:?}",
                            self.sale.opens_at, self.sale.closes_at
                        );
                        found.add(Rule::Window, what, || self.around(step));
                    }
                }
                Step::Event(event) => {
                    if ["pause", "resume", "close"].contains(&event.kind.as_str()) {
                        intent = &event.kind;
                    }
                }
            }
        }
        // Nobody is told `not_open` after somebody has bought, nor buys after `closed`.
        let attempts = || self.purchases.values().flatten();
        let refusals = |word: &'static str| {
            attempts().filter(move |attempt| {
                matches!(&attempt.outcome, Outcome::Refused { code, .. } if code == word)
            })
        };
        let first = self.effects_of_purchases();
        let first = first.iter().filter_map(|effect| effect.confirmed).min();
        if let Some(late) = refusals("not_open").find(|a| first.is_some_and(|at| at < a.sent)) {
            let what = "not open any more".to_owned();
            found.add(Rule::Window, what, || vec![late.to_string()]);
        }
        for early in refusals("not_open") {
            let Outcome::Refused { problem, .. } = &early.outcome else {
                continue;
            };
            let opens_at = problem["opens_at"].as_str().and_then(|at| at.parse().ok());
            let due = problem["starts_in_ms"].as_u64().is_some_and(|ms| ms > 0);
            if opens_at != Some(self.sale.opens_at) || !due {
                let what = format!("not open, but {problem}");
                found.add(Rule::Window, what, || vec![early.to_string()]);
            }
        }
        let closed = refusals("closed").min_by_key(|attempt| attempt.received);
        if let Some(closed) = closed {
            for effect in self.effects_of_purchases() {
                if effect.sent > closed.received {
                    let what = "accepted after somebody was told that it is closed".to_owned();
                    found.add(Rule::Window, what, || {
                        [vec![closed.to_string()], self.around(effect.step)].concat()
                    });
                }
            }
        }
    }

    /// `Board`.
    fn board(&self, found: &mut Found) {
        let confirmed = self.steps.iter().filter_map(|step| match step {
            Step::Order(order) if order.status == "confirmed" => Some(order),
            _ => None,
        });
        let expected: Vec<_> = confirmed
            .zip(1..)
            .map(|(order, rank)| (rank, order.seq, order.quantity))
            .collect();
        let number = |place: &Value, member: &str| place[member].as_i64().unwrap_or(-1);
        let shown: Vec<_> = self
            .sale
            .board
            .iter()
            .map(|place| {
                (
                    number(place, "rank"),
                    number(place, "seq"),
                    number(place, "quantity"),
                )
            })
            .collect();
        if shown != expected {
            let differ = shown.iter().zip(&expected).position(|(a, b)| a != b);
            let at = differ.unwrap_or(shown.len().min(expected.len()));
            let what = format!(
                "place {}: {:?} instead of {:?} (rank, seq, quantity)",
                at + 1,
                shown.get(at),
                expected.get(at)
            );
            found.add(Rule::Board, what, Vec::new);
        }
    }

    /// `Lost`, `Phantom`, `Replay`, of purchases.
    fn keys(&self, found: &mut Found) {
        for (id, attempts) in &self.purchases {
            let shown = || attempts.iter().map(ToString::to_string).collect();
            let row = self.orders.get(id).map(|step| self.steps[*step]);
            let mut first: Option<(&str, Duration)> = None;
            let (mut fresh, mut oks, mut unknown) = (0, 0, 0);
            for attempt in attempts {
                match &attempt.outcome {
                    Outcome::Ok { body, replayed } => {
                        oks += 1;
                        fresh += usize::from(!replayed);
                        if first.is_some_and(|(first, _)| first != body) {
                            found.add(Rule::Replay, format!("{id}: other bytes"), shown);
                        }
                        first.get_or_insert((body, attempt.received));
                        if !self.answers(attempt, *id, body) {
                            let what = format!("{id}: the answer to another request");
                            found.add(Rule::Replay, what, shown);
                        }
                        if !row.is_some_and(|row| told_as_stored(body, &row)) {
                            let what = format!("{id}: accepted, and stored is {row:?}");
                            found.add(Rule::Lost, what, shown);
                        }
                    }
                    Outcome::Unknown(_) => unknown += 1,
                    Outcome::Refused { .. } => {}
                }
            }
            if fresh > 1 || (oks > 0 && unknown == 0 && fresh == 0) {
                let what = format!("{id}: {fresh} of {oks} answers without the header");
                found.add(Rule::Replay, what, shown);
            }
            let confirmed = attempts
                .iter()
                .filter(|attempt| matches!(attempt.outcome, Outcome::Ok { .. }))
                .map(|attempt| attempt.received)
                .min();
            if let Some(confirmed) = confirmed
                && attempts.iter().any(|a| denies(a, confirmed))
            {
                let what = format!("{id}: accepted, then refused");
                found.add(Rule::Replay, what, shown);
            }
            if let Some(Step::Order(order)) = row {
                let asked = attempts.iter().any(|attempt| {
                    may_have_run(attempt)
                        && matches!(attempt.kind, Kind::Purchase { quantity }
                            if i64::try_from(quantity) == Ok(order.quantity))
                });
                let refused = attempts.iter().any(|attempt| {
                    attempt.sent >= self.settled && oks == 0 && is_final(&attempt.outcome)
                });
                if !asked || refused {
                    let what = format!("{id} is stored, but was refused");
                    found.add(Rule::Phantom, what, shown);
                }
            }
        }
        for (id, step) in &self.orders {
            if !self.purchases.contains_key(id) && !self.waited_for(*step) {
                let what = format!("{id} is stored, and nobody asked for it");
                found.add(Rule::Phantom, what, || self.around(*step));
            }
        }
    }

    /// Whether somebody waited in line for this order.
    fn waited_for(&self, step: usize) -> bool {
        let Step::Order(order) = self.steps[step] else {
            return false;
        };
        self.others.iter().any(|attempt| {
            matches!(attempt.kind, Kind::Join { quantity }
                if i64::try_from(quantity).is_ok_and(|most| order.quantity <= most))
                && may_have_run(attempt)
                && self.about(attempt) == order.id
        })
    }

    /// Whether a 201 is about what was asked for.
    fn answers(&self, attempt: &Attempt, id: Uuid, body: &str) -> bool {
        let Kind::Purchase { quantity } = attempt.kind else {
            return false;
        };
        let body: Value = serde_json::from_str(body).unwrap_or_default();
        body["id"] == json!(id)
            && body["sale_id"] == json!(self.sale.id)
            && body["buyer_id"] == json!(attempt.who)
            && body["quantity"] == json!(quantity)
    }

    /// `Lost`, `Phantom`, `Once`, of what is not a purchase.
    fn operations(&self, found: &mut Found) {
        let happened = self.happened();
        for attempt in &self.others {
            // Either it was paid in time, or its buyer hears that it was not.
            if let (Kind::Pay { order }, Outcome::Refused { code, .. }) =
                (attempt.kind, &attempt.outcome)
                && code == "hold_expired"
                && happened.contains_key(&("confirm", order))
            {
                let what = format!("{order} is paid, and its buyer was told that it expired");
                found.add(Rule::Lifecycle, what, || vec![attempt.to_string()]);
            }
        }
        let mut moves: BTreeMap<Place<'_>, BTreeMap<&str, (bool, usize)>> = BTreeMap::new();
        for attempt in self.others.iter().filter(|attempt| may_have_run(attempt)) {
            let ok = match &attempt.outcome {
                Outcome::Ok { replayed, .. } => Some(*replayed),
                _ => None,
            };
            match attempt.kind {
                Kind::Cancel { order } => {
                    let step = self.orders.get(&order).map(|step| &self.steps[*step]);
                    let cancelled =
                        matches!(step, Some(Step::Order(order)) if order.status == "cancelled");
                    if ok.is_some() && !cancelled {
                        let what = format!("{order} was cancelled, and is not");
                        found.add(Rule::Lost, what, || vec![attempt.to_string()]);
                    }
                }
                Kind::Pay { .. } | Kind::Extend { .. } => {
                    let place = (word(attempt.kind), self.about(attempt));
                    if ok.is_some() && !happened.contains_key(&place) {
                        let what = format!("{place:?} was told, and is not stored");
                        found.add(Rule::Lost, what, || vec![attempt.to_string()]);
                    }
                }
                Kind::Join { quantity } => {
                    if let Outcome::Ok { body, .. } = &attempt.outcome
                        && !self.in_line_or_served(attempt, quantity, body)
                    {
                        let what = "neither in line nor served, as it was told".to_owned();
                        found.add(Rule::Lost, what, || vec![attempt.to_string()]);
                    }
                }
                Kind::Restock { .. } | Kind::Reduce { .. } => {
                    let place = (word(attempt.kind), attempt.who);
                    let keys = moves.entry(place).or_default();
                    let (told, fresh) = keys.entry(&attempt.key).or_default();
                    *told |= ok.is_some();
                    *fresh += usize::from(ok == Some(false));
                    if *fresh > 1 {
                        let what = format!("{place:?} twice without the header");
                        found.add(Rule::Replay, what, || vec![attempt.to_string()]);
                    }
                }
                Kind::Purchase { .. } | Kind::Leave | Kind::Pause | Kind::Resume | Kind::Close => {}
            }
        }
        for (place, keys) in &moves {
            let done = happened.get(place).map_or(0, Vec::len);
            let told = keys.values().filter(|(told, _)| *told).count();
            if done < told {
                let what = format!("{told} of {place:?}, stored are {done}");
                found.add(Rule::Lost, what, || self.attempts_of(place.1));
            }
            if done > keys.len() {
                let what = format!("{} of {place:?}, stored are {done}", keys.len());
                found.add(Rule::Once, what, || self.attempts_of(place.1));
            }
        }
        let ran = self.others.iter().filter(|attempt| may_have_run(attempt));
        let asked: HashSet<_> = ran
            .map(|attempt| (word(attempt.kind), self.about(attempt)))
            .collect();
        for (place, steps) in &happened {
            for step in steps {
                // Time asks, and the line does.
                let by_itself = place.0 == "expire" || self.course.satisfied.contains(step);
                if !by_itself && !asked.contains(place) {
                    let what = format!("nobody asked for a {} of {}", place.0, place.1);
                    found.add(Rule::Phantom, what, || self.around(*step));
                }
            }
        }
    }

    /// The steps of events, by what happened and to what; without those that served the line.
    fn happened(&self) -> BTreeMap<Place<'a>, Vec<usize>> {
        let mut happened: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for (step, event) in self.steps.iter().enumerate() {
            let Step::Event(event) = event else { continue };
            let about = match event.kind.as_str() {
                "leave" if event.units > 0 => continue,
                "leave" => event.actor,
                _ => event.order.or(event.actor),
            };
            let place = (event.kind.as_str(), about.unwrap_or_default());
            happened.entry(place).or_default().push(step);
        }
        happened
    }

    /// Whether a buyer who was told of a place in line has had one, and who was told of the order
    /// that it became has that.
    fn in_line_or_served(&self, attempt: &Attempt, quantity: u64, body: &str) -> bool {
        let told: Value = serde_json::from_str(body).unwrap_or_default();
        if told["position"].is_number() {
            let mut joins = self.sale.events.iter().filter(|event| event.kind == "join");
            return joins.any(|event| event.actor == Some(attempt.who));
        }
        let id = self.about(attempt);
        let row = self.orders.get(&id).map(|step| &self.steps[*step]);
        row.is_some_and(|row| told_as_stored(body, row))
            && told["quantity"]
                .as_u64()
                .is_some_and(|units| units <= quantity)
    }

    fn attempts_of(&self, who: Uuid) -> Vec<String> {
        let own = self.others.iter().filter(|attempt| attempt.who == who);
        own.map(ToString::to_string).collect()
    }

    fn effects_of_purchases(&self) -> Vec<Effect> {
        let effects = self.purchases.iter().filter_map(|(id, attempts)| {
            let step = *self.orders.get(id)?;
            effect(step, attempts.iter().copied())
        });
        effects.collect()
    }

    /// Purchases, what was done to orders, and what an operator did who did nothing else.
    fn effects(&self) -> Vec<Effect> {
        let mut effects = self.effects_of_purchases();
        let mut asked: HashMap<Place<'_>, Vec<&Attempt>> = HashMap::new();
        for attempt in &self.others {
            let place = (word(attempt.kind), self.about(attempt));
            asked.entry(place).or_default().push(attempt);
        }
        for (place, steps) in self.happened() {
            let attempts = asked.get(&place).into_iter().flatten().copied();
            let certain = match place.0 {
                "cancel" | "confirm" | "extend" | "restock" | "reduce" => true,
                // Its answer may be about a place that the buyer had by another key, or had left.
                "join" | "leave" => false,
                // To pause may have been done before, by somebody else: then its answer says nothing
                // about its own event.
                _ => attempts.clone().count() == 1,
            };
            if let [step] = steps[..]
                && certain
            {
                effects.extend(effect(step, attempts));
            }
        }
        effects
    }

    /// `RealTime`, `SoldOut`.
    fn order_in_time(&self, found: &mut Found) {
        let effects = self.effects();
        let mut sent = effects.clone();
        sent.sort_by_key(|effect| effect.sent);
        let mut confirmed: Vec<_> = effects.iter().filter(|e| e.confirmed.is_some()).collect();
        confirmed.sort_by_key(|effect| effect.confirmed);
        // The latest step among those confirmed up to each one.
        let latest: Vec<usize> = running(confirmed.iter().map(|e| e.step), usize::max);
        // The earliest step among those sent from each one on.
        let mut earliest = running(sent.iter().rev().map(|e| e.step), usize::min);
        earliest.reverse();
        // How many steps were certainly done by an instant; which one had certainly not begun.
        let done_by = |instant: Duration| {
            let known = confirmed.partition_point(|e| e.confirmed.is_some_and(|at| at < instant));
            known.checked_sub(1).map(|last| latest[last])
        };
        let begun_after = |instant: Duration| {
            let known = sent.partition_point(|effect| effect.sent <= instant);
            earliest.get(known).copied()
        };
        for effect in &sent {
            if let Some(before) = done_by(effect.sent)
                && before > effect.step
            {
                let what = format!(
                    "confirmed before the other was sent: {}",
                    self.steps[before]
                );
                found.add(Rule::RealTime, what, || self.around(effect.step));
            }
        }
        // At which steps so many units remained; only those that somebody was told are asked for.
        let mut at: HashMap<i64, Vec<usize>> = HashMap::new();
        for (step, remaining) in self.course.remaining.iter().enumerate() {
            at.entry(*remaining).or_default().push(step);
            // What is there is for the line alone.
            if *remaining > 0 && self.course.waiting[step] > 0 {
                at.entry(0).or_default().push(step);
            }
        }
        for attempt in self.purchases.values().flatten() {
            let Outcome::Refused {
                code,
                from_memory,
                problem,
            } = &attempt.outcome
            else {
                continue;
            };
            let told = match code.as_str() {
                "sold_out" => 0,
                "insufficient" => problem["remaining"].as_i64().unwrap_or(-1),
                _ => continue,
            };
            let memory = if *from_memory { MEMORY } else { Duration::ZERO };
            // Steps counted from the front: so many were done, and no more than so many.
            let from = done_by(attempt.sent.saturating_sub(memory)).map_or(0, |step| step + 1);
            let to = begun_after(attempt.received).unwrap_or(self.steps.len());
            let steps = at.get(&told).map_or(&[][..], Vec::as_slice);
            let first = steps.partition_point(|step| *step < from);
            if steps.get(first).is_none_or(|step| *step > to) {
                let what = format!("{told} remaining, while {from} to {to} events had happened");
                found.add(Rule::SoldOut, what, || {
                    [vec![attempt.to_string()], self.around(from)].concat()
                });
            }
        }
    }
}

fn running(values: impl Iterator<Item = usize>, best: fn(usize, usize) -> usize) -> Vec<usize> {
    let mut so_far = None;
    values
        .map(|value| *so_far.insert(so_far.map_or(value, |known| best(known, value))))
        .collect()
}

/// When a step can have happened, judging by the attempts that may have done it.
fn effect<'a>(step: usize, attempts: impl Iterator<Item = &'a Attempt> + Clone) -> Option<Effect> {
    let sent = attempts.clone().filter(|attempt| may_have_run(attempt));
    let ok = attempts.filter(|attempt| matches!(attempt.outcome, Outcome::Ok { .. }));
    Some(Effect {
        step,
        sent: sent.map(|attempt| attempt.sent).min()?,
        confirmed: ok.map(|attempt| attempt.received).min(),
    })
}

fn may_have_run(attempt: &Attempt) -> bool {
    !matches!(attempt.outcome, Outcome::Refused { .. })
}

/// Whether a refusal speaks of the order, not of the moment.
fn is_final(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Refused { code, .. }
        if !["unavailable", "idempotency_key_mismatch"].contains(&code.as_str()))
}

/// Whether an attempt was told that there is no order, when there certainly was one.
fn denies(attempt: &Attempt, confirmed: Duration) -> bool {
    let from_memory = matches!(
        attempt.outcome,
        Outcome::Refused {
            from_memory: true,
            ..
        }
    );
    let memory = if from_memory { MEMORY } else { Duration::ZERO };
    is_final(&attempt.outcome) && attempt.sent > confirmed + memory
}

fn told_as_stored(body: &str, step: &Step) -> bool {
    let Step::Order(order) = step else {
        return false;
    };
    let body: Value = serde_json::from_str(body).unwrap_or_default();
    let instant = |member: &str| body[member].as_str().and_then(|at| at.parse().ok());
    let (at, until): (Option<DateTime<Utc>>, Option<DateTime<Utc>>) =
        (instant("accepted_at"), instant("held_until"));
    let held = order.accepted_as == "held";
    body["id"] == json!(order.id)
        && body["seq"] == json!(order.seq)
        && body["buyer_id"] == json!(order.buyer)
        && body["quantity"] == json!(order.quantity)
        && body["unit_price"]["amount"] == json!(order.unit_price)
        && body["status"] == json!(order.accepted_as)
        && at == Some(order.accepted_at)
        && until == held.then(|| order.accepted_at + TimeDelta::milliseconds(order.hold_ms))
}

/// As `round_events` calls it.
fn word(kind: Kind) -> &'static str {
    match kind {
        Kind::Purchase { .. } => "purchase",
        Kind::Cancel { .. } => "cancel",
        Kind::Pay { .. } => "confirm",
        Kind::Extend { .. } => "extend",
        Kind::Join { .. } => "join",
        Kind::Leave => "leave",
        Kind::Restock { .. } => "restock",
        Kind::Reduce { .. } => "reduce",
        Kind::Pause => "pause",
        Kind::Resume => "resume",
        Kind::Close => "close",
    }
}
