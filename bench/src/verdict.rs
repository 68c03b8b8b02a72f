//! The checker: says from the history of a run alone whether the shop kept its promises.
//!
//! Pure, and fast enough for every run: sorting is the most expensive step. Each check holds both
//! numbers, and when it fails the first few events that prove it.

pub(crate) mod holds;

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::operator::{Audit, Place, Sale};
use crate::sse::{Frame, Stock};
use crate::witness::Row;

/// Events that a counter-example shows.
const EXAMPLES: usize = 3;

/// An order as its 201 describes it.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Order {
    pub(crate) id: Uuid,
    pub(crate) sale_id: Uuid,
    pub(crate) buyer_id: Uuid,
    pub(crate) quantity: u64,
    pub(crate) seq: u64,
    pub(crate) accepted_at: DateTime<Utc>,
}

/// How a purchase ended for its buyer.
#[derive(Clone, Debug)]
pub(crate) enum Ending {
    /// With the order, or why its body cannot be read.
    Accepted(Result<Order, String>),
    /// For good, with this code.
    Refused(String),
    /// Given up, certainly without an order.
    Failed(String),
    /// Given up, perhaps with an order.
    Unknown(String),
}

/// One purchase from its buyer's point of view. Instants count from the opening.
#[derive(Clone, Debug)]
pub(crate) struct Purchase {
    pub(crate) buyer: Uuid,
    pub(crate) first_sent: Option<Duration>,
    pub(crate) finished: Duration,
    pub(crate) ending: Ending,
}

/// An accepted purchase that was sent again later.
#[derive(Clone, Debug)]
pub(crate) struct Replay {
    pub(crate) purchase: usize,
    /// `after the crowd`, `after the end`.
    pub(crate) when: &'static str,
    pub(crate) first: Bytes,
    /// The body of the new 201 with `Idempotency-Replayed`, or what came instead.
    pub(crate) again: Result<Bytes, String>,
}

/// Everything that was seen of a run.
#[derive(Clone, Debug)]
pub(crate) struct History {
    pub(crate) sale: Uuid,
    pub(crate) opens_at: DateTime<Utc>,
    pub(crate) allocation: u64,
    pub(crate) per_buyer_limit: u64,
    /// Units per purchase.
    pub(crate) quantity: u64,
    /// Orders that the crowd's demand makes necessary at least, and possible at most.
    pub(crate) orders_expected: (u64, u64),
    pub(crate) purchases: Vec<Purchase>,
    /// PostgreSQL's rows.
    pub(crate) rows: Result<Vec<Row>, String>,
    pub(crate) leaderboard: Result<Vec<Place>, String>,
    /// The sale after the crowd.
    pub(crate) after: Result<Sale, String>,
    /// Its state once it was closed.
    pub(crate) closed: Result<String, String>,
    pub(crate) audit: Result<Audit, String>,
    /// The subscriber's frames, if one was attached.
    pub(crate) frames: Option<Vec<Frame>>,
    pub(crate) replays: Vec<Replay>,
}

/// What a check found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Status {
    /// Kept.
    Pass,
    /// Broken, or not seen.
    Fail,
    /// Switched off for this run.
    Skipped,
}

/// One promise, looked at.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Check {
    pub(crate) name: Cow<'static, str>,
    pub(crate) status: Status,
    pub(crate) expected: String,
    pub(crate) actual: String,
    /// The first few events that break the promise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) counter_example: Vec<String>,
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "numbers and texts are both passed as they come"
)]
impl Check {
    /// Kept, unless there is something that breaks it.
    pub(crate) fn of(
        name: &'static str,
        expected: impl ToString,
        actual: impl ToString,
        broken: Vec<String>,
    ) -> Self {
        let status = if broken.is_empty() {
            Status::Pass
        } else {
            Status::Fail
        };
        Self {
            name: name.into(),
            status,
            expected: expected.to_string(),
            actual: actual.to_string(),
            counter_example: broken,
        }
    }

    fn unseen(name: &'static str, expected: impl ToString, why: &str) -> Self {
        Self::of(name, expected, "not seen", vec![why.to_owned()])
    }
}

/// Collects the first few proofs and counts the rest.
#[derive(Default)]
struct Broken {
    shown: Vec<String>,
    count: usize,
}

impl Broken {
    fn add(&mut self, proof: impl FnOnce() -> String) {
        self.count += 1;
        if self.count <= EXAMPLES {
            self.shown.push(proof());
        }
    }

    fn into_lines(mut self) -> Vec<String> {
        if self.count > EXAMPLES {
            self.shown
                .push(format!("… and {} more", self.count - EXAMPLES));
        }
        self.shown
    }
}

/// An order that exists: its buyer was told so, or PostgreSQL has it.
struct Existing {
    id: Uuid,
    buyer: Uuid,
    quantity: u64,
    seq: u64,
    accepted_at: Option<DateTime<Utc>>,
}

/// The history with what every check needs, computed once.
struct Facts<'a> {
    history: &'a History,
    /// Readable acceptances by seq, with their position among the purchases.
    accepted: Vec<(usize, &'a Order)>,
    /// Acceptances and rows together, by seq.
    existing: Vec<Existing>,
    /// Purchases that may have an order nobody was told of, per buyer.
    unknown: HashMap<Uuid, usize>,
}

impl<'a> Facts<'a> {
    fn new(history: &'a History) -> Self {
        let mut accepted = Vec::new();
        let mut unknown: HashMap<Uuid, usize> = HashMap::new();
        for (n, purchase) in history.purchases.iter().enumerate() {
            match &purchase.ending {
                Ending::Accepted(Ok(order)) => accepted.push((n, order)),
                Ending::Unknown(_) => *unknown.entry(purchase.buyer).or_default() += 1,
                _ => {}
            }
        }
        accepted.sort_by_key(|(_, order)| order.seq);
        let told: HashSet<Uuid> = accepted.iter().map(|(_, order)| order.id).collect();
        let untold = history.rows.iter().flatten();
        let mut existing: Vec<Existing> = accepted
            .iter()
            .map(|(_, order)| Existing {
                id: order.id,
                buyer: order.buyer_id,
                quantity: order.quantity,
                seq: order.seq,
                accepted_at: Some(order.accepted_at),
            })
            .chain(
                untold
                    .filter(|row| !told.contains(&row.id))
                    .map(|row| Existing {
                        id: row.id,
                        buyer: row.buyer_id,
                        quantity: unsigned(row.quantity),
                        seq: unsigned(row.seq),
                        accepted_at: None,
                    }),
            )
            .collect();
        existing.sort_by_key(|order| order.seq);
        Self {
            history,
            accepted,
            existing,
            unknown,
        }
    }

    fn units(&self) -> u64 {
        let quantities = self.existing.iter().map(|order| order.quantity);
        quantities.fold(0, u64::saturating_add)
    }

    fn show(&self, n: usize) -> String {
        let purchase = &self.history.purchases[n];
        let ending = match &purchase.ending {
            Ending::Accepted(Ok(order)) => format!("accepted as {} seq {}", order.id, order.seq),
            Ending::Accepted(Err(error)) => format!("accepted, but {error}"),
            Ending::Refused(code) => format!("refused: {code}"),
            Ending::Failed(reason) => format!("failed: {reason}"),
            Ending::Unknown(reason) => format!("unknown: {reason}"),
        };
        format!(
            "purchase {n} of buyer {} ({} to {} after the opening) {ending}",
            purchase.buyer,
            purchase
                .first_sent
                .map_or("never sent".to_owned(), show_instant),
            show_instant(purchase.finished),
        )
    }

    /// Every 201 describes the purchase that it answers.
    fn answers(&self) -> Check {
        let mut broken = Broken::default();
        let mut count = 0_usize;
        for (n, purchase) in self.history.purchases.iter().enumerate() {
            let Ending::Accepted(order) = &purchase.ending else {
                continue;
            };
            count += 1;
            let own = order.as_ref().is_ok_and(|order| {
                order.sale_id == self.history.sale
                    && order.buyer_id == purchase.buyer
                    && order.quantity == self.history.quantity
            });
            if !own {
                broken.add(|| format!("{}; its body: {order:?}", self.show(n)));
            }
        }
        let own = count - broken.count;
        Check::of(
            "answers name their purchase",
            count,
            own,
            broken.into_lines(),
        )
    }

    /// As many orders as stock and demand allow: not one more, and not one less.
    fn exact_stock(&self) -> Check {
        let (least, most) = self.history.orders_expected;
        let (orders, units) = (self.existing.len() as u64, self.units());
        // Purchases that ended without an answer to count on may be missing, nothing else.
        let (least, most) = (least * self.history.quantity, most * self.history.quantity);
        let expected = if least == most {
            format!("{most} units")
        } else {
            format!("{least} to {most} units")
        };
        let mut broken = Broken::default();
        if units > most || units > self.history.allocation {
            broken.add(|| format!("oversold: {orders} orders for {units} units exist"));
            if let Some(last) = self.existing.last() {
                broken.add(|| format!("the last of them is {} seq {}", last.id, last.seq));
            }
        }
        if units < least {
            broken.add(|| format!("only {units} units were sold to a crowd that wanted {least}"));
            let refused = self.history.purchases.iter().position(
                |purchase| matches!(&purchase.ending, Ending::Refused(code) if code == "sold_out"),
            );
            if let Some(n) = refused {
                broken.add(|| format!("while {}", self.show(n)));
            }
        }
        Check::of(
            "exactly the stock",
            expected,
            format!("{units} units"),
            broken.into_lines(),
        )
    }

    /// No order answers two purchases.
    fn distinct(&self) -> Check {
        let mut broken = Broken::default();
        let mut first: HashMap<Uuid, usize> = HashMap::with_capacity(self.accepted.len());
        for (n, order) in &self.accepted {
            if let Some(other) = first.insert(order.id, *n) {
                broken.add(|| format!("{} and {}", self.show(other), self.show(*n)));
            }
        }
        Check::of(
            "an order for each 201",
            self.accepted.len(),
            first.len(),
            broken.into_lines(),
        )
    }

    /// The seqs of the orders are 1, 2, 3 … without gap or double.
    fn dense(&self) -> Check {
        let mut broken = Broken::default();
        // Without the rows, an order nobody was told of leaves a hole that proves nothing.
        let mut holes_allowed = match self.history.rows {
            Ok(_) => 0,
            Err(_) => self.unknown.values().sum::<usize>() as u64,
        };
        let mut wanted = 1;
        for order in &self.existing {
            if order.seq > wanted && order.seq - wanted <= holes_allowed {
                holes_allowed -= order.seq - wanted;
            } else if order.seq != wanted {
                broken.add(|| format!("order {} has seq {}, not {wanted}", order.id, order.seq));
            }
            wanted = order.seq + 1;
        }
        let last = self.existing.last().map_or(0, |order| order.seq);
        let expected = format!("1 to {}", self.existing.len());
        Check::of(
            "seq without gaps",
            expected,
            format!("… to {last}"),
            broken.into_lines(),
        )
    }

    /// What was answered before another was sent comes before it.
    fn real_time(&self) -> Check {
        let mut sent: Vec<(Duration, usize, u64)> = Vec::with_capacity(self.accepted.len());
        let mut answered: Vec<(Duration, usize, u64)> = Vec::with_capacity(self.accepted.len());
        for (n, order) in &self.accepted {
            let purchase = &self.history.purchases[*n];
            answered.push((purchase.finished, *n, order.seq));
            sent.push((purchase.first_sent.unwrap_or_default(), *n, order.seq));
        }
        sent.sort_unstable();
        answered.sort_unstable();
        let mut broken = Broken::default();
        let mut before = answered.into_iter().peekable();
        let mut highest: Option<(u64, usize)> = None;
        for (instant, n, seq) in sent {
            while let Some((_, other, seq)) = before.next_if(|(answered, ..)| *answered < instant) {
                highest = highest.max(Some((seq, other)));
            }
            if let Some((_, other)) = highest.filter(|(other, _)| *other > seq) {
                broken.add(|| format!("{}, before {}", self.show(other), self.show(n)));
            }
        }
        let kept = self.accepted.len() - broken.count.min(self.accepted.len());
        Check::of(
            "first come, first served",
            self.accepted.len(),
            kept,
            broken.into_lines(),
        )
    }

    /// Nothing is accepted before the opening.
    fn window(&self) -> Check {
        let mut broken = Broken::default();
        for (n, order) in &self.accepted {
            if order.accepted_at < self.history.opens_at {
                let opens = self.history.opens_at;
                broken
                    .add(|| format!("{} at {}, before {opens}", self.show(*n), order.accepted_at));
            }
        }
        Check::of(
            "nobody before the start",
            0,
            broken.count,
            broken.into_lines(),
        )
    }

    /// Once it is sold out it stays so: nothing ever comes back in a run.
    fn sold_out_stays(&self) -> Check {
        let sold_out = |purchase: &&Purchase| matches!(&purchase.ending, Ending::Refused(code) if code == "sold_out");
        let first = self
            .history
            .purchases
            .iter()
            .filter(sold_out)
            .map(|purchase| purchase.finished)
            .min();
        let mut broken = Broken::default();
        if let Some(first) = first {
            for (n, _) in &self.accepted {
                if self.history.purchases[*n]
                    .first_sent
                    .is_some_and(|sent| sent > first)
                {
                    broken.add(|| {
                        format!(
                            "somebody was told sold_out at {}, then {}",
                            show_instant(first),
                            self.show(*n)
                        )
                    });
                }
            }
        }
        Check::of("sold out is final", 0, broken.count, broken.into_lines())
    }

    /// Nobody has more than the limit, and nobody was turned away below it.
    fn buyer_limit(&self) -> Check {
        let limit = self.history.per_buyer_limit;
        let mut broken = Broken::default();
        let mut units: HashMap<Uuid, u64> = HashMap::new();
        for order in &self.existing {
            let units = units.entry(order.buyer).or_default();
            let before = *units;
            *units = before.saturating_add(order.quantity);
            if before <= limit && *units > limit {
                broken.add(|| {
                    format!(
                        "buyer {} has {units} units with order {}",
                        order.buyer, order.id
                    )
                });
            }
        }
        for (n, purchase) in self.history.purchases.iter().enumerate() {
            let has = units.get(&purchase.buyer).copied().unwrap_or(0);
            if matches!(&purchase.ending, Ending::Refused(code) if code == "buyer_limit")
                && has + self.history.quantity <= limit
            {
                broken.add(|| format!("{} with {has} units", self.show(n)));
            }
        }
        let most = units.values().max().copied().unwrap_or(0);
        Check::of(
            "limit per buyer",
            format!("≤ {limit}"),
            most,
            broken.into_lines(),
        )
    }

    /// PostgreSQL has every acceptance, and nothing that its buyer was refused.
    fn stored(&self) -> Check {
        const NAME: &str = "orders in PostgreSQL";
        let rows = match &self.history.rows {
            Ok(rows) => rows,
            Err(error) => return Check::unseen(NAME, self.accepted.len(), error),
        };
        let mut broken = Broken::default();
        let mut by_id: HashMap<Uuid, &Row> = HashMap::with_capacity(rows.len());
        for row in rows {
            if by_id.insert(row.id, row).is_some() {
                broken.add(|| format!("{} is stored twice", row.id));
            }
            if row.status != "confirmed" {
                broken.add(|| format!("{} is stored as {}", row.id, row.status));
            }
        }
        for (n, order) in &self.accepted {
            match by_id.remove(&order.id) {
                None => broken.add(|| format!("not stored: {}", self.show(*n))),
                Some(row) => {
                    let same = row.buyer_id == order.buyer_id
                        && unsigned(row.quantity) == order.quantity
                        && unsigned(row.seq) == order.seq;
                    if !same {
                        broken.add(|| format!("stored as {row:?}: {}", self.show(*n)));
                    }
                }
            }
        }
        // What is left was told to nobody: allowed for purchases whose end is unknown.
        let mut unknown = self.unknown.clone();
        let mut left: Vec<&Row> = by_id.into_values().collect();
        left.sort_by_key(|row| row.seq);
        for row in left {
            if let Some(count) = unknown.get_mut(&row.buyer_id).filter(|count| **count > 0) {
                *count -= 1;
                continue;
            }
            let theirs = |purchase: &Purchase| purchase.buyer == row.buyer_id;
            let purchase = self.history.purchases.iter().position(theirs);
            broken.add(|| match purchase {
                Some(n) => format!("stored as {} seq {}: {}", row.id, row.seq, self.show(n)),
                None => format!("nobody of the crowd asked for {row:?}"),
            });
        }
        let expected = format!("{} accepted", self.accepted.len());
        Check::of(
            NAME,
            expected,
            format!("{} rows", rows.len()),
            broken.into_lines(),
        )
    }

    /// The leaderboard lists exactly the orders, by seq, under one pseudonym per buyer.
    fn leaderboard(&self) -> Check {
        const NAME: &str = "leaderboard by seq";
        let places = match &self.history.leaderboard {
            Ok(places) => places,
            Err(error) => return Check::unseen(NAME, self.existing.len(), error),
        };
        let mut broken = Broken::default();
        let mut pseudonyms: HashMap<&str, Uuid> = HashMap::new();
        let mut buyers: HashMap<Uuid, &str> = HashMap::new();
        for (n, (place, order)) in places.iter().zip(&self.existing).enumerate() {
            let same = place.rank == n as u64 + 1
                && place.seq == order.seq
                && place.quantity == order.quantity
                && order
                    .accepted_at
                    .is_none_or(|instant| instant == place.accepted_at);
            if !same {
                broken.add(|| {
                    format!(
                        "place {} is {place:?}, not order {} seq {}",
                        n + 1,
                        order.id,
                        order.seq
                    )
                });
            }
            let one_name = *buyers.entry(order.buyer).or_insert(&place.buyer) == place.buyer
                && *pseudonyms.entry(&place.buyer).or_insert(order.buyer) == order.buyer;
            if !one_name || place.buyer.contains(&order.buyer.to_string()) {
                broken.add(|| format!("buyer {} is called {:?}", order.buyer, place.buyer));
            }
        }
        if places.len() != self.existing.len() {
            broken.add(|| format!("{} places for {} orders", places.len(), self.existing.len()));
        }
        Check::of(NAME, self.existing.len(), places.len(), broken.into_lines())
    }

    /// The stock after the last acceptance.
    fn stock_after(&self) -> Stock {
        let units = self.units();
        Stock {
            allocation: self.history.allocation,
            remaining: self.history.allocation.saturating_sub(units),
            held: 0,
            sold: units,
        }
    }

    /// The sale's counters tell the same story.
    fn counters(&self) -> Check {
        const NAME: &str = "counters of the sale";
        let wanted = self.stock_after();
        let expected = format!(
            "{} + 0 + {} = {}",
            wanted.remaining, wanted.sold, wanted.allocation
        );
        let sale = match &self.history.after {
            Ok(sale) => sale,
            Err(error) => return Check::unseen(NAME, expected, error),
        };
        let actual = format!(
            "{} + {} + {} = {}",
            sale.remaining, sale.held, sale.sold, sale.allocation
        );
        let mut broken = Broken::default();
        if actual != expected {
            broken.add(|| "remaining + held + sold = allocation, after the crowd".to_owned());
        }
        Check::of(NAME, expected, actual, broken.into_lines())
    }

    /// The live stream began with the whole stock, only ever went down, and ended on the truth.
    fn live_stock(&self) -> Check {
        const NAME: &str = "live stock";
        let wanted = self.stock_after();
        let expected = format!("{} → {}", wanted.allocation, wanted.remaining);
        let Some(frames) = &self.history.frames else {
            let mut check = Check::of(NAME, expected, "no subscriber", Vec::new());
            check.status = Status::Skipped;
            return check;
        };
        let mut broken = Broken::default();
        let mut seen: Vec<&Stock> = Vec::with_capacity(frames.len());
        let mut before: Option<(&Frame, Vec<u128>)> = None;
        for frame in frames {
            match &frame.stock {
                Ok(stock) => {
                    if !stock.adds_up() {
                        broken.add(|| format!("units do not add up in {frame:?}"));
                    }
                    if seen
                        .last()
                        .is_some_and(|last| last.remaining < stock.remaining)
                    {
                        broken.add(|| format!("the stock grew in {frame:?}"));
                    }
                    seen.push(stock);
                }
                Err(error) => broken.add(|| format!("{error} in {frame:?}")),
            }
            let Some(id) = order_of(&frame.id) else {
                broken.add(|| format!("no order in the id of {frame:?}"));
                continue;
            };
            if let Some((last, _)) = before.as_ref().filter(|(_, last)| *last > id) {
                broken.add(|| format!("{frame:?} came after {last:?}"));
            }
            before = Some((frame, id));
        }
        let (Some(first), Some(last)) = (seen.first(), seen.last()) else {
            return Check::unseen(NAME, expected, "not one readable frame came");
        };
        if first.remaining != wanted.allocation {
            broken.add(|| format!("the first frame shows {first:?}"));
        }
        if **last != wanted {
            broken.add(|| format!("the last frame shows {last:?}, not {wanted:?}"));
        }
        let actual = format!("{} → {}", first.remaining, last.remaining);
        Check::of(NAME, expected, actual, broken.into_lines())
    }

    /// It ends when it is closed.
    fn closed(&self) -> Check {
        let (name, wanted) = ("the sale ends", "closed");
        match &self.history.closed {
            Ok(state) => {
                let broken = if state == wanted {
                    Vec::new()
                } else {
                    vec!["after closing it".to_owned()]
                };
                Check::of(name, wanted, state, broken)
            }
            Err(error) => Check::unseen(name, wanted, error),
        }
    }

    /// A key of an accepted purchase gets the same 201 for ever.
    fn replays(&self) -> Check {
        let mut broken = Broken::default();
        for replay in &self.history.replays {
            let why = match &replay.again {
                Ok(again) if *again == replay.first => continue,
                Ok(again) => format!(
                    "got another body: {} instead of {}",
                    String::from_utf8_lossy(again),
                    String::from_utf8_lossy(&replay.first)
                ),
                Err(other) => format!("got {other}"),
            };
            broken.add(|| {
                format!(
                    "sent again {}, {why}: {}",
                    replay.when,
                    self.show(replay.purchase)
                )
            });
        }
        let count = self.history.replays.len();
        Check::of(
            "same 201 for a retry",
            count,
            count - broken.count,
            broken.into_lines(),
        )
    }
}

/// Looks at every promise.
pub(crate) fn check(history: &History) -> Vec<Check> {
    let facts = Facts::new(history);
    vec![
        facts.exact_stock(),
        facts.answers(),
        facts.distinct(),
        facts.dense(),
        facts.real_time(),
        facts.window(),
        facts.sold_out_stays(),
        facts.buyer_limit(),
        facts.stored(),
        facts.leaderboard(),
        facts.counters(),
        facts.live_stock(),
        facts.closed(),
        facts.replays(),
        audit(&history.audit),
    ]
}

/// The verdict over several sales: a promise is kept if it is kept in each of them.
pub(crate) fn of_all(mut sales: Vec<Vec<Check>>) -> Vec<Check> {
    if sales.len() <= 1 {
        return sales.pop().unwrap_or_default();
    }
    let count = sales.len();
    let names = sales[0].len();
    let mut checks = Vec::with_capacity(names);
    for n in 0..names {
        let same: Vec<&Check> = sales.iter().map(|sale| &sale[n]).collect();
        let kept = same.iter().filter(|check| check.status == Status::Pass);
        let kept = kept.count();
        let broken = same.iter().find(|check| check.status == Status::Fail);
        checks.push(match broken {
            Some(broken) => (*broken).clone(),
            None => Check {
                name: same[0].name.clone(),
                status: if kept > 0 {
                    Status::Pass
                } else {
                    Status::Skipped
                },
                expected: format!("in {count} sales"),
                actual: format!("in {kept}"),
                counter_example: Vec::new(),
            },
        });
    }
    checks
}

/// The numbers in a frame's id, which order all frames of a sale.
fn order_of(id: &str) -> Option<Vec<u128>> {
    id.split(|char: char| !char.is_ascii_digit())
        .map(|number| number.parse().ok())
        .collect()
}

/// The server's own audit agrees.
fn audit(audit: &Result<Audit, String>) -> Check {
    const NAME: &str = "the server's audit";
    let audit = match audit {
        Ok(audit) => audit,
        Err(error) => return Check::unseen(NAME, "pass", error),
    };
    let mut broken = Broken::default();
    if audit.verdict != "pass" {
        broken.add(|| format!("its verdict is {}", audit.verdict));
        for check in audit.checks.iter().filter(|check| check.status != "pass") {
            broken.add(|| {
                format!(
                    "{}: {}, expected {}, actual {}",
                    check.name, check.status, check.expected, check.actual
                )
            });
        }
    }
    Check::of(NAME, "pass", &audit.verdict, broken.into_lines())
}

/// A number that PostgreSQL stores with a sign; below zero no promise can hold.
fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

fn show_instant(instant: Duration) -> String {
    format!("{:.3} ms", instant.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests;
