//! The checker of orders that wait for their payment: says from the history of a run alone whether
//! each of them ended once, as its buyer was told, and whether exactly the stock was sold.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use chrono::{DateTime, TimeDelta, Utc};
use serde::Deserialize;
use uuid::Uuid;

use super::{Broken, Check, audit, unsigned};
use crate::operator::{Audit, Place, Sale};
use crate::witness::{End, Row};

/// Between the clock of the store and the reading of an answer, should the system's clock be set
/// meanwhile.
const CLOCKS: TimeDelta = TimeDelta::milliseconds(20);

/// An order as its 201 describes it.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct HeldOrder {
    pub(crate) id: Uuid,
    pub(crate) sale_id: Uuid,
    pub(crate) buyer_id: Uuid,
    pub(crate) quantity: u64,
    pub(crate) seq: u64,
    pub(crate) status: String,
    pub(crate) held_until: Option<DateTime<Utc>>,
}

/// A purchase that got a 201.
#[derive(Clone, Debug)]
pub(crate) struct Bought {
    pub(crate) buyer: Uuid,
    /// Or why the body cannot be read.
    pub(crate) order: Result<HeldOrder, String>,
}

/// What a buyer did with an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// `POST …/pay`.
    Pay,
    /// `POST …/cancel`.
    Cancel,
}

/// What the buyer was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    /// 200, with this status of the order.
    Done(String),
    /// No, for good, with this code.
    Refused(String),
    /// Nothing to count on.
    Nothing(String),
}

/// A buyer's request about an order.
#[derive(Clone, Debug)]
pub(crate) struct Act {
    pub(crate) order: Uuid,
    pub(crate) what: What,
    pub(crate) told: Told,
    pub(crate) answered_at: DateTime<Utc>,
}

/// An accepted purchase that was sent again when all was over.
#[derive(Clone, Debug)]
pub(crate) struct Again {
    pub(crate) first: Bytes,
    /// The body of the new 201 with `Idempotency-Replayed`, or what came instead.
    pub(crate) again: Result<Bytes, String>,
}

/// Everything that was seen of a run.
#[derive(Clone, Debug)]
pub(crate) struct Holds {
    pub(crate) sale: Uuid,
    pub(crate) allocation: u64,
    pub(crate) bought: Vec<Bought>,
    /// Buyers who may have an order that nobody was told of.
    pub(crate) unknown: HashSet<Uuid>,
    pub(crate) acts: Vec<Act>,
    /// PostgreSQL's rows.
    pub(crate) rows: Result<Vec<Row>, String>,
    /// How holds ended, as PostgreSQL has it.
    pub(crate) ends: Result<Vec<End>, String>,
    pub(crate) leaderboard: Result<Vec<Place>, String>,
    /// The sale after everything.
    pub(crate) after: Result<Sale, String>,
    pub(crate) agains: Vec<Again>,
    pub(crate) audit: Result<Audit, String>,
}

impl Holds {
    /// The orders that their buyers can read.
    pub(crate) fn orders(&self) -> impl Iterator<Item = &HeldOrder> {
        self.bought
            .iter()
            .filter_map(|bought| bought.order.as_ref().ok())
    }

    /// How long after their deadlines orders expired.
    pub(crate) fn lateness(&self) -> Vec<TimeDelta> {
        let deadlines = self.deadlines();
        let ends = self.ends.iter().flatten();
        ends.filter(|end| end.kind == "expire")
            .filter_map(|end| Some(end.at - *deadlines.get(&end.order_id)?))
            .collect()
    }

    fn deadlines(&self) -> HashMap<Uuid, DateTime<Utc>> {
        self.orders()
            .filter_map(|order| Some((order.id, order.held_until?)))
            .collect()
    }

    fn statuses(&self) -> HashMap<Uuid, &str> {
        let rows = self.rows.iter().flatten();
        rows.map(|row| (row.id, row.status.as_str())).collect()
    }

    /// In the end everything is sold, and nothing waits.
    fn exact_stock(&self) -> Check {
        const NAME: &str = "exactly the stock";
        let expected = format!("{} sold, none held", self.allocation);
        let (sale, rows) = match (&self.after, &self.rows) {
            (Ok(sale), Ok(rows)) => (sale, rows),
            (Err(why), _) | (_, Err(why)) => return Check::unseen(NAME, expected, why),
        };
        let confirmed = rows.iter().filter(|row| row.status == "confirmed");
        let units: u64 = confirmed.map(|row| unsigned(row.quantity)).sum();
        let mut broken = Broken::default();
        let counted = (sale.allocation, sale.remaining, sale.held, sale.sold);
        if counted != (self.allocation, 0, 0, self.allocation) {
            broken.add(|| {
                format!(
                    "the sale has {} remaining, {} held, {} sold of {}",
                    sale.remaining, sale.held, sale.sold, sale.allocation
                )
            });
        }
        if units != self.allocation {
            broken.add(|| format!("confirmed orders have {units} units"));
        }
        Check::of(
            NAME,
            expected,
            format!("{} sold, {} held", sale.sold, sale.held),
            broken.into_lines(),
        )
    }

    /// Every 201 describes the purchase that it answers: an order of its own that waits.
    fn answers(&self) -> Check {
        let mut broken = Broken::default();
        let mut seen = HashSet::with_capacity(self.bought.len());
        for Bought { buyer, order } in &self.bought {
            let own = order.as_ref().is_ok_and(|order| {
                order.sale_id == self.sale
                    && order.buyer_id == *buyer
                    && order.quantity == 1
                    && order.status == "held"
                    && order.held_until.is_some()
                    && seen.insert(order.id)
            });
            if !own {
                broken.add(|| format!("buyer {buyer} got {order:?}"));
            }
        }
        let count = self.bought.len();
        let own = count - broken.count;
        Check::of("an order for each 201", count, own, broken.into_lines())
    }

    /// Every order that was accepted, and no other, is stored and ended, by exactly one event that
    /// fits what became of it.
    fn ends_once(&self) -> Check {
        const NAME: &str = "every hold ends once";
        let (rows, ends) = match (&self.rows, &self.ends) {
            (Ok(rows), Ok(ends)) => (rows, ends),
            (Err(why), _) | (_, Err(why)) => return Check::unseen(NAME, self.bought.len(), why),
        };
        let mut kinds: HashMap<Uuid, Vec<&str>> = HashMap::with_capacity(ends.len());
        for end in ends {
            kinds.entry(end.order_id).or_default().push(&end.kind);
        }
        let mut told: HashMap<Uuid, u64> =
            self.orders().map(|order| (order.id, order.seq)).collect();
        let (mut broken, mut ended) = (Broken::default(), 0_usize);
        for row in rows {
            let end = match row.status.as_str() {
                "confirmed" => "confirm",
                "cancelled" => "cancel",
                "expired" => "expire",
                _ => "nothing",
            };
            match kinds.remove(&row.id).unwrap_or_default().as_slice() {
                [kind] if *kind == end => ended += 1,
                kinds => broken.add(|| {
                    let kinds = kinds.join(", ");
                    format!("{} is {}, after: {kinds}", row.id, row.status)
                }),
            }
            match told.remove(&row.id) {
                Some(seq) if seq == unsigned(row.seq) => {}
                None if self.unknown.contains(&row.buyer_id) => {}
                seq => broken.add(|| format!("{row:?}, and its buyer was told of seq {seq:?}")),
            }
        }
        for id in told.into_keys() {
            broken.add(|| format!("{id} was accepted and is not stored"));
        }
        for (id, kinds) in kinds {
            broken.add(|| format!("{id} is no order, and has {}", kinds.join(", ")));
        }
        Check::of(NAME, rows.len(), ended, broken.into_lines())
    }

    /// Nothing expires before its deadline, nothing is paid behind it: by the one clock that decides.
    fn deadlines_hold(&self) -> Check {
        const NAME: &str = "deadlines divide";
        let ends = match &self.ends {
            Ok(ends) => ends,
            Err(why) => return Check::unseen(NAME, self.bought.len(), why),
        };
        let (deadlines, mut broken) = (self.deadlines(), Broken::default());
        for end in ends {
            let Some(deadline) = deadlines.get(&end.order_id) else {
                continue;
            };
            let kept = match end.kind.as_str() {
                "confirm" => end.at < *deadline,
                "expire" => end.at >= *deadline,
                _ => true,
            };
            if !kept {
                broken.add(|| format!("{end:?}, and its deadline was {deadline}"));
            }
        }
        let kept = ends.len() - broken.count;
        Check::of(NAME, ends.len(), kept, broken.into_lines())
    }

    /// Whoever was told 200 has what was asked for; whoever was refused was refused for the one good
    /// reason: the hold had expired.
    fn told_the_truth(&self, what: What, name: &'static str) -> Check {
        let acts = || self.acts.iter().filter(|act| act.what == what);
        if let Err(why) = &self.rows {
            return Check::unseen(name, acts().count(), why);
        }
        let (wanted, refusal) = match what {
            What::Pay => ("confirmed", "hold_expired"),
            What::Cancel => ("cancelled", "conflict"),
        };
        let (statuses, deadlines) = (self.statuses(), self.deadlines());
        let mut broken = Broken::default();
        for act in acts() {
            let status = statuses.get(&act.order).copied().unwrap_or("not stored");
            let passed = deadlines
                .get(&act.order)
                .is_some_and(|deadline| act.answered_at + CLOCKS >= *deadline);
            let honest = match &act.told {
                Told::Done(told) => told == wanted && status == wanted,
                Told::Refused(code) => code == refusal && status == "expired" && passed,
                // Either may be; that it ended is seen elsewhere.
                Told::Nothing(_) => true,
            };
            if !honest {
                broken.add(|| format!("{act:?}, and the order is {status}"));
            }
        }
        let count = acts().count();
        Check::of(name, count, count - broken.count, broken.into_lines())
    }

    /// The leaderboard lists exactly the confirmed orders, by the seq of their acceptance.
    fn leaderboard(&self) -> Check {
        const NAME: &str = "leaderboard of the confirmed";
        let (places, rows) = match (&self.leaderboard, &self.rows) {
            (Ok(places), Ok(rows)) => (places, rows),
            (Err(why), _) | (_, Err(why)) => return Check::unseen(NAME, self.allocation, why),
        };
        let mut seqs: Vec<u64> = rows
            .iter()
            .filter(|row| row.status == "confirmed")
            .map(|row| unsigned(row.seq))
            .collect();
        seqs.sort_unstable();
        let mut broken = Broken::default();
        if places.len() != seqs.len() {
            broken.add(|| format!("{} places, {} orders", places.len(), seqs.len()));
        }
        for (n, (place, seq)) in places.iter().zip(&seqs).enumerate() {
            if place.rank != n as u64 + 1 || place.seq != *seq {
                broken.add(|| format!("place {} is {place:?}, not seq {seq}", n + 1));
            }
        }
        Check::of(NAME, seqs.len(), places.len(), broken.into_lines())
    }

    /// Whatever became of an order, its key gives its first 201.
    fn replays(&self) -> Check {
        let mut broken = Broken::default();
        for Again { first, again } in &self.agains {
            if again.as_ref() != Ok(first) {
                let first = String::from_utf8_lossy(first);
                broken.add(|| format!("sent again, got {again:?} instead of {first}"));
            }
        }
        let count = self.agains.len();
        let same = count - broken.count;
        Check::of("same 201 for a retry", count, same, broken.into_lines())
    }
}

/// Looks at every promise.
pub(crate) fn check(holds: &Holds) -> Vec<Check> {
    vec![
        holds.exact_stock(),
        holds.answers(),
        holds.ends_once(),
        holds.deadlines_hold(),
        holds.told_the_truth(What::Pay, "paid, or told hold_expired"),
        holds.told_the_truth(What::Cancel, "cancelled, or told it is over"),
        holds.leaderboard(),
        holds.replays(),
        audit(&holds.audit),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verdict::Status;

    const SALE: Uuid = Uuid::from_u128(1);

    fn at(ms: i64) -> DateTime<Utc> {
        DateTime::from_timestamp_millis(1_800_000_000_000 + ms).unwrap()
    }

    fn bought(n: u128) -> Bought {
        let buyer = Uuid::from_u128(100 + n);
        Bought {
            buyer,
            order: Ok(HeldOrder {
                id: Uuid::from_u128(n),
                sale_id: SALE,
                buyer_id: buyer,
                quantity: 1,
                seq: u64::try_from(n).unwrap(),
                status: "held".to_owned(),
                held_until: Some(at(2000)),
            }),
        }
    }

    fn row(n: u128, status: &str) -> Row {
        Row {
            id: Uuid::from_u128(n),
            buyer_id: Uuid::from_u128(100 + n),
            quantity: 1,
            seq: i64::try_from(n).unwrap(),
            status: status.to_owned(),
        }
    }

    fn end(n: u128, kind: &str, ms: i64) -> End {
        End {
            order_id: Uuid::from_u128(n),
            kind: kind.to_owned(),
            at: at(ms),
        }
    }

    fn act(n: u128, what: What, told: Told, ms: i64) -> Act {
        Act {
            order: Uuid::from_u128(n),
            what,
            told,
            answered_at: at(ms),
        }
    }

    fn done(status: &str) -> Told {
        Told::Done(status.to_owned())
    }

    fn refused(code: &str) -> Told {
        Told::Refused(code.to_owned())
    }

    /// Two units: one paid, one expired and paid late, one cancelled, and one sold in their place.
    fn honest() -> Holds {
        Holds {
            sale: SALE,
            allocation: 2,
            bought: (1..=4).map(bought).collect(),
            unknown: HashSet::new(),
            acts: vec![
                act(1, What::Pay, done("confirmed"), 500),
                act(2, What::Pay, refused("hold_expired"), 2001),
                act(3, What::Cancel, done("cancelled"), 600),
                act(4, What::Pay, done("confirmed"), 700),
            ],
            rows: Ok(vec![
                row(1, "confirmed"),
                row(2, "expired"),
                row(3, "cancelled"),
                row(4, "confirmed"),
            ]),
            ends: Ok(vec![
                end(1, "confirm", 500),
                end(2, "expire", 2003),
                end(3, "cancel", 600),
                end(4, "confirm", 1999),
            ]),
            leaderboard: Ok(vec![place(1, 1), place(2, 4)]),
            after: Ok(Sale {
                id: SALE,
                state: "open".to_owned(),
                allocation: 2,
                remaining: 0,
                held: 0,
                sold: 2,
            }),
            agains: vec![Again {
                first: Bytes::from_static(b"{}"),
                again: Ok(Bytes::from_static(b"{}")),
            }],
            audit: Ok(Audit {
                verdict: "pass".to_owned(),
                checks: Vec::new(),
            }),
        }
    }

    fn place(rank: u64, seq: u64) -> Place {
        Place {
            rank,
            buyer: String::new(),
            quantity: 1,
            accepted_at: at(0),
            seq,
        }
    }

    /// The checks that fail once the honest history is changed.
    fn broken(change: impl FnOnce(&mut Holds)) -> Vec<String> {
        let mut holds = honest();
        change(&mut holds);
        let checks = check(&holds).into_iter();
        let failed = checks.filter(|check| check.status == Status::Fail);
        failed.map(|check| check.name.into_owned()).collect()
    }

    const PAID: &str = "paid, or told hold_expired";

    #[test]
    fn an_honest_history_passes_and_says_how_late_holds_ended() {
        assert_eq!(broken(|_| {}), Vec::<String>::new());
        assert_eq!(honest().lateness(), [TimeDelta::milliseconds(3)]);
    }

    #[test]
    fn everything_is_sold_and_nothing_waits_in_the_end() {
        let held = |holds: &mut Holds| {
            let sale = holds.after.as_mut().unwrap();
            (sale.held, sale.sold) = (1, 1);
        };
        assert_eq!(broken(held), ["exactly the stock"]);
        let oversold = |holds: &mut Holds| holds.allocation = 1;
        assert_eq!(broken(oversold), ["exactly the stock"]);
        let unseen = |holds: &mut Holds| holds.after = Err("away".to_owned());
        assert_eq!(broken(unseen), ["exactly the stock"]);
    }

    #[test]
    fn a_hold_ends_once_and_as_it_is_stored() {
        let ends = ["every hold ends once"];
        let twice = |holds: &mut Holds| holds.ends.as_mut().unwrap().push(end(2, "cancel", 2100));
        assert_eq!(broken(twice), ends);
        let never = |holds: &mut Holds| drop(holds.ends.as_mut().unwrap().pop());
        assert_eq!(broken(never), ends);
        let otherwise =
            |holds: &mut Holds| holds.ends.as_mut().unwrap()[2] = end(3, "expire", 2001);
        assert_eq!(broken(otherwise), ends);
        let untold = |holds: &mut Holds| {
            holds.rows.as_mut().unwrap().push(row(5, "expired"));
            holds.ends.as_mut().unwrap().push(end(5, "expire", 2001));
        };
        assert_eq!(broken(untold), ends);
        let unknown = |holds: &mut Holds| {
            untold(holds);
            holds.unknown.insert(Uuid::from_u128(105));
        };
        assert_eq!(broken(unknown), Vec::<String>::new());
    }

    #[test]
    fn the_deadline_divides_paid_from_expired() {
        let deadline = ["deadlines divide"];
        let late = |holds: &mut Holds| holds.ends.as_mut().unwrap()[0].at = at(2000);
        assert_eq!(broken(late), deadline);
        let early = |holds: &mut Holds| holds.ends.as_mut().unwrap()[1].at = at(1999);
        assert_eq!(broken(early), deadline);
    }

    #[test]
    fn buyers_are_told_the_truth() {
        let not_confirmed = |holds: &mut Holds| holds.acts[0].told = done("held");
        assert_eq!(broken(not_confirmed), [PAID]);
        let in_vain = |holds: &mut Holds| holds.acts[1].told = done("confirmed");
        assert_eq!(broken(in_vain), [PAID]);
        let other_code = |holds: &mut Holds| holds.acts[1].told = refused("conflict");
        assert_eq!(broken(other_code), [PAID]);
        let too_early = |holds: &mut Holds| holds.acts[1].answered_at = at(1900);
        assert_eq!(broken(too_early), [PAID]);
        let confirmed_all_the_same = |holds: &mut Holds| {
            holds.acts[0] = act(1, What::Pay, refused("hold_expired"), 2100);
        };
        assert_eq!(broken(confirmed_all_the_same), [PAID]);
        let no_answer = |holds: &mut Holds| {
            holds.acts[0].told = Told::Nothing("no answer in time".to_owned());
        };
        assert_eq!(broken(no_answer), Vec::<String>::new());
        let not_cancelled = |holds: &mut Holds| holds.acts[2].told = done("held");
        assert_eq!(broken(not_cancelled), ["cancelled, or told it is over"]);
    }

    #[test]
    fn an_answer_names_its_purchase_and_its_deadline() {
        let without_deadline = |holds: &mut Holds| {
            holds.bought[0].order.as_mut().unwrap().held_until = None;
        };
        assert_eq!(broken(without_deadline), ["an order for each 201"]);
        let same_order = |holds: &mut Holds| {
            let order = holds.bought[0].order.clone();
            holds.bought.push(Bought { order, ..bought(1) });
        };
        assert_eq!(broken(same_order), ["an order for each 201"]);
    }

    #[test]
    fn the_leaderboard_retries_and_the_audit_are_looked_at() {
        let expired = |holds: &mut Holds| holds.leaderboard.as_mut().unwrap()[1].seq = 2;
        assert_eq!(broken(expired), ["leaderboard of the confirmed"]);
        let other_body = |holds: &mut Holds| holds.agains[0].again = Ok(Bytes::new());
        assert_eq!(broken(other_body), ["same 201 for a retry"]);
        let fails = |holds: &mut Holds| holds.audit.as_mut().unwrap().verdict = "fail".to_owned();
        assert_eq!(broken(fails), ["the server's audit"]);
    }
}
