//! From journal entries to rows: pure, and suspicious of every step.

use std::collections::{HashMap, HashSet};

use crate::{
    domain::{
        id::{Epoch, JournalId, OrderId, RoundId},
        journal::{Delta, Entry, Event, EventKind, Step},
        order::Order,
        round::Counters,
    },
    engine::{EntryError, RawEntry},
    faults,
    store::journal::{DataError, EventRow, Fate, Letter, OrderRow, RoundRow, RoundState},
};

use super::Halt;

/// Dead letters in a row that are no accident any more.
pub(super) const DEAD_IN_A_ROW_MAX: u32 = 100;

/// What PostgreSQL has, as far as it matters for some entries.
#[derive(Clone, Debug, Default)]
pub(super) struct Ground {
    /// Every round that they touch.
    pub rounds: HashMap<RoundId, RoundState>,
    /// Every order that they change and do not accept.
    pub fates: HashMap<OrderId, Fate>,
}

/// Rows that PostgreSQL was found to refuse.
#[derive(Clone, Debug, Default)]
pub(super) struct Refused {
    /// Orders.
    pub orders: HashMap<OrderId, DataError>,
    /// Events, by round and seq.
    pub events: HashMap<(RoundId, u64), DataError>,
}

/// What one transaction stores.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Batch {
    /// The position that it starts from.
    pub from: JournalId,
    /// The position that it leads to.
    pub to: JournalId,
    /// New orders.
    pub orders: Vec<OrderRow>,
    /// Stored orders that changed.
    pub statuses: Vec<OrderRow>,
    /// New events.
    pub events: Vec<EventRow>,
    /// Rounds that moved on.
    pub rounds: Vec<RoundRow>,
    /// What no table takes.
    pub letters: Vec<Letter>,
    /// Whether some of it was stored before: the position was set back.
    pub known: bool,
    /// Dead letters in a row at its end.
    pub dead_in_a_row: u32,
}

/// The rounds that entries touch, each once.
pub(super) fn rounds(entries: &[RawEntry]) -> Vec<RoundId> {
    let ids = entries
        .iter()
        .filter_map(|raw| raw.rounds.as_ref())
        .flatten()
        .map(|(id, _)| *id);
    let mut seen = HashSet::new();
    ids.filter(|id| seen.insert(*id)).collect()
}

/// The orders that entries change and do not accept, each once.
pub(super) fn strangers(entries: &[RawEntry]) -> Vec<(OrderId, RoundId)> {
    let mut seen = HashSet::new();
    let mut strangers = Vec::new();
    for entry in entries.iter().filter_map(|raw| raw.entry.as_ref().ok()) {
        // Without a change nothing has to be looked up, which is almost always so.
        seen.extend(entry.orders.iter().map(|order| order.id));
        for event in &entry.events {
            if let (Some(order), Some(round)) = (event.order, event.round)
                && event.kind.changes_order()
                && seen.insert(order)
            {
                strangers.push((order, round));
            }
        }
    }
    strangers
}

/// Folds entries into the rows of one transaction.
///
/// `dead_in_a_row` says how many dead letters the last batch ended with.
///
/// # Errors
/// [`Halt`] when an entry does not follow from what came before it. Nothing of the batch may be
/// stored then.
pub(super) fn fold(
    from: JournalId,
    entries: &[RawEntry],
    ground: &Ground,
    refused: &Refused,
    dead_in_a_row: u32,
) -> Result<Batch, Halt> {
    let batch = Batch {
        from,
        to: from,
        dead_in_a_row,
        ..Batch::default()
    };
    let mut folding = Folding {
        ground,
        refused,
        running: ground.rounds.clone(),
        orders: HashMap::new(),
        statuses: HashMap::new(),
        rounds: HashMap::new(),
        dead: HashSet::new(),
        batch,
    };
    for raw in entries {
        folding.entry(raw)?;
    }
    Ok(folding.batch)
}

struct Folding<'a> {
    ground: &'a Ground,
    refused: &'a Refused,
    /// Rounds as of the entry before.
    running: HashMap<RoundId, RoundState>,
    /// Where in the batch the row of an order is.
    orders: HashMap<OrderId, usize>,
    statuses: HashMap<OrderId, usize>,
    rounds: HashMap<RoundId, usize>,
    /// Orders with a dead letter in this batch.
    dead: HashSet<OrderId>,
    batch: Batch,
}

impl Folding<'_> {
    fn entry(&mut self, raw: &RawEntry) -> Result<(), Halt> {
        let mut before = self.batch.to;
        // Somebody who sets a position back may leave a later epoch beside its number: the number
        // says what comes next, and what is stored is compared.
        if before == self.batch.from
            && raw.id.epoch <= before.epoch
            && !faults::bug("epoch_of_position_believed")
        {
            let first = raw.entry.as_ref().is_ok_and(starts_with_epoch);
            before.epoch = Epoch(raw.id.epoch.0.saturating_sub(u32::from(first)));
        }
        if raw.id.pseq != before.pseq + 1 || raw.id.epoch < before.epoch {
            return Err(Halt::Gap {
                position: before,
                found: raw.id,
            });
        }
        let begins_epoch = raw.id.epoch > before.epoch;
        match &raw.entry {
            Ok(entry) => {
                if begins_epoch != starts_with_epoch(entry) {
                    return Err(Halt::Gap {
                        position: before,
                        found: raw.id,
                    });
                }
                if entry
                    .rounds
                    .iter()
                    .all(|(round, _)| self.ground.rounds.contains_key(round))
                {
                    self.readable(raw.id, entry)?;
                } else {
                    let rest = self.without_strangers(raw.id, entry);
                    self.readable(raw.id, &rest)?;
                }
            }
            Err(EntryError::UnknownVersion(_)) if faults::bug("unknown_version_skipped") => {}
            Err(EntryError::UnknownVersion(version)) => {
                return Err(Halt::UnknownVersion {
                    entry: raw.id,
                    version: *version,
                });
            }
            Err(EntryError::Malformed(reason)) => {
                let rounds = raw.rounds.as_deref().filter(|rounds| !rounds.is_empty());
                match rounds {
                    Some(rounds) if !begins_epoch => self.malformed(raw.id, rounds, reason)?,
                    _ => {
                        return Err(Halt::Unreadable {
                            entry: raw.id,
                            reason: reason.clone(),
                        });
                    }
                }
            }
        }
        self.batch.to = raw.id;
        Ok(())
    }

    /// Whether the entry is stored already: every round that it touched is at it or past it.
    fn stored_before(&self, id: JournalId, rounds: &[(RoundId, Counters)]) -> Result<bool, Halt> {
        let mut known = None;
        for (round, _) in rounds {
            let state = self.ground.rounds.get(round).ok_or(Halt::UnknownRound {
                entry: id,
                round: *round,
            })?;
            let this = state.pseq >= id.pseq;
            if *known.get_or_insert(this) != this {
                let detail = "stored for one of its rounds and not for another".to_owned();
                return Err(Halt::Step {
                    entry: id,
                    round: *round,
                    detail,
                });
            }
        }
        Ok(known.unwrap_or(false))
    }

    /// Keeps what an entry says about rounds that PostgreSQL does not have: it may have lost them in
    /// a failover, and others must not wait for that. Gives the entry without them.
    fn without_strangers(&mut self, id: JournalId, entry: &Entry) -> Entry {
        let known = |round: &RoundId| self.ground.rounds.contains_key(round);
        let mut rest = entry.clone();
        rest.rounds.retain(|(round, _)| known(round));
        rest.orders.retain(|order| known(&order.round));
        rest.events
            .retain(|event| event.round.as_ref().is_none_or(known));
        for (round, after) in entry.rounds.iter().filter(|(round, _)| !known(round)) {
            let steps = entry.steps().into_iter();
            let own = steps.filter(|step| step.round() == Some(*round));
            let (mut delta, mut numbered) = (Delta::default(), 0);
            for step in own {
                delta = delta + step.delta();
                numbered += u64::from(step.seq() > 0);
            }
            self.batch.letters.push(Letter {
                id,
                round: *round,
                seq_from: after.seq + 1 - numbered.min(after.seq),
                seq_to: after.seq,
                delta,
                order: None,
                error: DataError {
                    sqlstate: None,
                    reason: "PostgreSQL does not have the round".to_owned(),
                },
            });
        }
        rest
    }

    fn readable(&mut self, id: JournalId, entry: &Entry) -> Result<(), Halt> {
        if self.stored_before(id, &entry.rounds)? {
            self.batch.known = true;
        } else {
            self.step(id, entry)?;
        }
        for order in &entry.orders {
            self.order(id, order)?;
        }
        for event in &entry.events {
            if let Some(round) = event.round {
                self.event(id, entry.at_ms, round, event)?;
            }
        }
        Ok(())
    }

    /// Checks that the counters moved exactly as the orders and events say.
    fn step(&mut self, id: JournalId, entry: &Entry) -> Result<(), Halt> {
        let mut expected: HashMap<RoundId, Counters> = HashMap::new();
        let mut seqs: HashMap<RoundId, Vec<u64>> = HashMap::new();
        let halt = |round: RoundId, detail: &str| Halt::Step {
            entry: id,
            round,
            detail: detail.to_owned(),
        };
        for (round, _) in &entry.rounds {
            let state = self.running.get(round).ok_or(Halt::UnknownRound {
                entry: id,
                round: *round,
            })?;
            if expected.insert(*round, state.counters).is_some() {
                return Err(halt(*round, "listed twice"));
            }
            let provisions = entry
                .events
                .iter()
                .any(|event| event.kind == EventKind::Provision && event.round == Some(*round));
            if provisions != (state.pseq == 0) {
                return Err(halt(
                    *round,
                    "its first entry, and only that, provisions it",
                ));
            }
        }
        for step in entry.steps() {
            let Some(round) = step.round() else { continue };
            let seq = step.seq();
            let counters = expected
                .get_mut(&round)
                .ok_or_else(|| halt(round, "has no counters"))?;
            let moved = match step {
                Step::Order(order) if (order.epoch, order.pseq) != (id.epoch, id.pseq) => {
                    return Err(halt(round, "an order names another entry"));
                }
                Step::Order(order) => order.take(counters),
                Step::Event(event) => event.shift(counters),
            };
            moved.ok_or_else(|| halt(round, "units move that are not there"))?;
            if seq > 0 {
                seqs.entry(round).or_default().push(seq);
            }
        }
        for (round, after) in &entry.rounds {
            let before = self
                .running
                .get(round)
                .map_or(0, |state| state.counters.seq);
            let mut seqs = seqs.remove(round).unwrap_or_default();
            seqs.sort_unstable();
            if !seqs
                .iter()
                .copied()
                .eq(before + 1..before + 1 + seqs.len() as u64)
            {
                return Err(halt(
                    *round,
                    &format!("seq {before} is followed by {seqs:?}"),
                ));
            }
            let mut counters = expected.get(round).copied().unwrap_or_default();
            counters.seq = before + seqs.len() as u64;
            if (counters != *after || !after.balanced()) && !faults::bug("counters_believed") {
                let detail = format!("the counters should be {counters:?} and are {after:?}");
                return Err(halt(*round, &detail));
            }
            self.moved(id, *round, *after);
        }
        Ok(())
    }

    fn moved(&mut self, id: JournalId, round: RoundId, counters: Counters) {
        self.running.insert(
            round,
            RoundState {
                counters,
                pseq: id.pseq,
            },
        );
        let rows = &mut self.batch.rounds;
        let at = *self.rounds.entry(round).or_insert_with(|| {
            rows.push(RoundRow {
                round,
                counters,
                id,
                intent: None,
                amendment: None,
            });
            rows.len() - 1
        });
        if let Some(row) = rows.get_mut(at) {
            (row.counters, row.id) = (counters, id);
        }
    }

    fn order(&mut self, id: JournalId, order: &Order) -> Result<(), Halt> {
        if let Some(error) = self.refused.orders.get(&order.id) {
            self.dead.insert(order.id);
            return self.letter(Letter {
                id,
                round: order.round,
                seq_from: order.seq,
                seq_to: order.seq,
                delta: if faults::bug("dead_units_not_counted") {
                    Delta::default()
                } else {
                    Step::Order(order).delta()
                },
                order: Some(order.id),
                error: error.clone(),
            });
        }
        let row = OrderRow {
            order: order.as_accepted(),
            last_seq: order.seq,
            updated_at_ms: order.accepted_at_ms,
        };
        if self
            .orders
            .insert(order.id, self.batch.orders.len())
            .is_some()
        {
            let detail = format!("order {} was accepted before", order.id);
            return Err(Halt::Conflict(detail));
        }
        self.batch.orders.push(row);
        self.batch.dead_in_a_row = 0;
        Ok(())
    }

    fn event(
        &mut self,
        id: JournalId,
        at_ms: i64,
        round: RoundId,
        event: &Event,
    ) -> Result<(), Halt> {
        let refusal = self
            .refused
            .events
            .get(&(round, event.seq))
            .cloned()
            .or_else(|| {
                let order = event.order.filter(|_| event.kind.changes_order())?;
                let dead = self.dead.contains(&order)
                    || self.ground.fates.get(&order) == Some(&Fate::Dead);
                dead.then(|| DataError {
                    sqlstate: None,
                    reason: "an earlier event of the same order is a dead letter".to_owned(),
                })
            });
        let refusal = match refusal {
            None if event.kind.changes_order() => self.change(id, at_ms, event)?,
            refusal => refusal,
        };
        if let Some(error) = refusal {
            self.dead.extend(event.order);
            return self.letter(Letter {
                id,
                round,
                seq_from: event.seq,
                seq_to: event.seq,
                delta: Step::Event(event).delta(),
                order: event.order,
                error,
            });
        }
        let intent = event.kind.intent();
        // A round that is past this entry knows its intent already, and has no row in the batch.
        if (intent.is_some() || event.amendment.is_some())
            && let Some(row) = self
                .rounds
                .get(&round)
                .and_then(|at| self.batch.rounds.get_mut(*at))
            && row.id == id
        {
            row.intent = intent.or(row.intent);
            row.amendment = event.amendment.or(row.amendment);
        }
        self.batch.events.push(EventRow {
            round,
            id,
            at_ms,
            event: *event,
        });
        self.batch.dead_in_a_row = 0;
        Ok(())
    }

    /// Several events of one order become the last of them. Gives the reason why it does not fit what
    /// is stored, if it does not: an entry between the two may have been unreadable.
    fn change(
        &mut self,
        id: JournalId,
        at_ms: i64,
        event: &Event,
    ) -> Result<Option<DataError>, Halt> {
        let misfit = || DataError {
            sqlstate: None,
            reason: format!("{} does not fit the order", event.kind.as_str()),
        };
        let Some(order) = event.order else {
            return Ok(Some(misfit()));
        };
        if let Some(new) = self
            .orders
            .get(&order)
            .and_then(|at| self.batch.orders.get_mut(*at))
        {
            if event.change(&mut new.order).is_none() {
                return Ok(Some(misfit()));
            }
            new.last_seq = event.seq;
            new.updated_at_ms = at_ms;
            return Ok(None);
        }
        let rows = &mut self.batch.statuses;
        let at = self.statuses.get(&order).copied();
        let Some(Fate::Stored(stored)) = self.ground.fates.get(&order) else {
            return Err(Halt::UnknownOrder { entry: id, order });
        };
        let mut row = *at.and_then(|at| rows.get(at)).unwrap_or(stored);
        // Stored before: the position was set back.
        if row.last_seq >= event.seq {
            return Ok(None);
        }
        if event.change(&mut row.order).is_none() {
            return Ok(Some(misfit()));
        }
        row.last_seq = event.seq;
        row.updated_at_ms = at_ms;
        let at = at.unwrap_or(rows.len());
        self.statuses.insert(order, at);
        match rows.get_mut(at) {
            Some(known) => *known = row,
            None => rows.push(row),
        }
        Ok(None)
    }

    /// An entry that nobody can read, but whose counters say how much it was about.
    fn malformed(
        &mut self,
        id: JournalId,
        rounds: &[(RoundId, Counters)],
        reason: &str,
    ) -> Result<(), Halt> {
        let known = self.stored_before(id, rounds)?;
        self.batch.known |= known;
        for (round, after) in rounds {
            // What a stored entry did is in its letter; the step cannot be seen any more.
            let before = if known {
                *after
            } else {
                self.running
                    .get(round)
                    .map(|state| state.counters)
                    .unwrap_or_default()
            };
            if !after.balanced() || after.seq < before.seq {
                let detail = format!("{before:?} is followed by {after:?}");
                return Err(Halt::Step {
                    entry: id,
                    round: *round,
                    detail,
                });
            }
            let more =
                |of: fn(&Counters) -> u64| of(after).cast_signed() - of(&before).cast_signed();
            self.letter(Letter {
                id,
                round: *round,
                seq_from: before.seq + 1,
                seq_to: after.seq,
                delta: Delta {
                    allocated: more(|counters| counters.allocation),
                    held: more(|counters| counters.held),
                    sold: more(|counters| counters.sold),
                },
                order: None,
                error: DataError {
                    sqlstate: None,
                    reason: reason.to_owned(),
                },
            })?;
            if !known {
                self.moved(id, *round, *after);
            }
        }
        Ok(())
    }

    fn letter(&mut self, letter: Letter) -> Result<(), Halt> {
        self.batch.dead_in_a_row += 1;
        if self.batch.dead_in_a_row >= DEAD_IN_A_ROW_MAX {
            return Err(Halt::TooManyDead {
                last: letter.error.reason,
            });
        }
        self.batch.letters.push(letter);
        Ok(())
    }
}

fn starts_with_epoch(entry: &Entry) -> bool {
    entry
        .events
        .iter()
        .any(|event| event.kind == EventKind::Epoch)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::domain::{
        id::{BuyerId, Epoch, Fingerprint, OperationId, SaleNumber},
        model::{Command, Model, Operation, Release, Wish},
        money::{Currency, Money},
        order::{Durability, Purchase, Status},
        round::{Amendment, Ends, Intent, LimitScope, Policy, Terms, Window},
    };

    const ALLOCATION: u64 = 40;

    /// The first sale sells at once, the second has holds of some milliseconds and a line.
    fn terms(sale: u32) -> Terms {
        let second = Policy {
            hold_ms: Some(12),
            waitlist: true,
            ends: Ends::Time,
            limit_scope: LimitScope::Round,
        };
        Terms {
            window: Window {
                opens_at_ms: 0,
                closes_at_ms: None,
            },
            per_buyer_limit: 6,
            per_order_limit: 3,
            unit_price: Money::new(1_999, Currency::parse("EUR").unwrap()).unwrap(),
            allocation: ALLOCATION,
            policy: if sale == 2 { second } else { Policy::default() },
        }
    }

    fn round(sale: u32) -> RoundId {
        RoundId {
            sale: SaleNumber(sale),
            round: 1,
        }
    }

    fn item((sale, buyer, key, quantity): (u32, u8, u8, u64)) -> Purchase {
        let buyer = BuyerId(Uuid::from_u128(buyer.into()));
        Purchase {
            round: round(sale),
            order: OrderId::derive(SaleNumber(sale), buyer, &key.to_string()),
            buyer,
            quantity,
            fingerprint: Fingerprint::of(&[&quantity.to_be_bytes()]),
            durability: Durability::Fsync,
            redeem: false,
            archive: 0,
        }
    }

    fn any_purchase() -> impl Strategy<Value = (u32, u8, u8, u64)> {
        (1..=2u32, 0..4u8, 0..4u8, 1..=3u64)
    }

    fn operation(word: &str, key: u8, units: u64) -> Operation {
        Operation {
            id: OperationId::derive(word, Uuid::from_u128(7), &key.to_string()),
            fingerprint: Fingerprint::units(word, units),
        }
    }

    fn any_command() -> impl Strategy<Value = Command> {
        let actor = Uuid::from_u128(7);
        prop_oneof![
            6 => prop::collection::vec(any_purchase(), 1..6).prop_map(|items| Command::Purchase {
                receipt_key: 1,
                items: items.into_iter().map(item).collect(),
                together: false,
            }),
            4 => (any_purchase(), 0..4usize, prop::option::of(1..3u64), any::<u8>()).prop_map(
                move |(purchase, release, units, key)| Command::Release {
                    round: round(purchase.0),
                    order: item(purchase).order,
                    release: Release::ALL[release],
                    units,
                    operation: units.map(|units| operation("release", key, units)),
                    durability: Some(Durability::Fsync),
                    actor,
                },
            ),
            4 => any_purchase().prop_map(move |purchase| Command::Confirm {
                round: round(purchase.0),
                order: item(purchase).order,
                actor,
            }),
            1 => any_purchase().prop_map(move |purchase| Command::Extend {
                round: round(purchase.0),
                order: item(purchase).order,
                actor,
            }),
            2 => (1..=2u32).prop_map(|sale| Command::Sweep {
                round: round(sale),
                holds: 3,
                offers: 3,
                durability: Some(Durability::Fsync),
            }),
            2 => any_purchase().prop_map(|purchase| {
                let Purchase { round, buyer, quantity, .. } = item(purchase);
                let key = format!("line {}", purchase.2);
                let wish = Wish {
                    buyer,
                    order: OrderId::derive(round.sale, buyer, &key),
                    fingerprint: Fingerprint::units("waitlist", quantity),
                    units: quantity,
                };
                let archive = 0;
                Command::Join { round, wish, archive }
            }),
            1 => any_purchase().prop_map(|purchase| {
                let Purchase { round, buyer, .. } = item(purchase);
                Command::Leave { round, buyer }
            }),
            1 => (1..=2u32, any::<bool>(), 1..5u64, any::<u8>()).prop_map(
                move |(sale, reduce, units, key)| Command::Allocate {
                    round: round(sale),
                    reduce,
                    units,
                    operation: operation("allocate", key, units),
                    durability: Some(Durability::Fsync),
                    actor,
                },
            ),
            1 => (1..=2u32, 200..300i64).prop_map(move |(sale, closes_at_ms)| {
                let mut amendment = Amendment::from(&terms(sale));
                amendment.window.closes_at_ms = Some(closes_at_ms);
                Command::Amend { round: round(sale), amendment, actor }
            }),
            1 => (1..=2u32, prop::bool::weighted(0.7)).prop_map(move |(sale, live)| {
                let intent = if live { Intent::Live } else { Intent::Paused };
                Command::Control { round: round(sale), intent, actor }
            }),
            1 => (1..=2u32, 0..8u8).prop_map(move |(sale, end)| match (round(sale), end) {
                (round, 0) => Command::Control { round, intent: Intent::Closed, actor },
                // Without orders: those are only in PostgreSQL then, which is no business of a batch.
                (round, 1..=2) => Command::Archive { round, orders: vec![] },
                (round, _) => Command::Settle { round },
            }),
        ]
    }

    fn run(commands: &[Command]) -> Model {
        let mut model = Model::default();
        for sale in 1..=2 {
            model.apply(
                1,
                &Command::Provision {
                    round: round(sale),
                    terms: terms(sale),
                },
            );
        }
        for (at, command) in commands.iter().enumerate() {
            model.apply(2 + i64::try_from(at).unwrap(), command);
        }
        model
    }

    fn raw(entry: &Entry) -> RawEntry {
        RawEntry {
            id: entry.id,
            at_ms: Some(entry.at_ms),
            rounds: Some(entry.rounds.clone()),
            entry: Ok(entry.clone()),
            payload: vec![],
        }
    }

    fn journal(model: &Model) -> Vec<RawEntry> {
        model.journal.iter().map(raw).collect()
    }

    /// What PostgreSQL would have: the tables, as plainly as possible.
    #[derive(Clone)]
    struct Tables {
        position: JournalId,
        rounds: HashMap<RoundId, (RoundState, Intent)>,
        orders: HashMap<OrderId, OrderRow>,
        events: HashMap<(RoundId, u64), EventRow>,
        letters: Vec<Letter>,
    }

    impl Tables {
        fn new() -> Self {
            let fresh = RoundState {
                counters: Counters::fresh(ALLOCATION),
                pseq: 0,
            };
            let rounds = (1..=2)
                .map(|sale| (round(sale), (fresh, Intent::Live)))
                .collect();
            Self {
                position: JournalId::default(),
                rounds,
                orders: HashMap::new(),
                events: HashMap::new(),
                letters: vec![],
            }
        }

        fn ground(&self, entries: &[RawEntry]) -> Ground {
            let fate = |order: &OrderId| {
                if self
                    .letters
                    .iter()
                    .any(|letter| letter.order == Some(*order))
                {
                    Fate::Dead
                } else if let Some(row) = self.orders.get(order) {
                    Fate::Stored(*row)
                } else {
                    Fate::Missing
                }
            };
            Ground {
                rounds: rounds(entries)
                    .into_iter()
                    .map(|id| (id, self.rounds[&id].0))
                    .collect(),
                fates: strangers(entries)
                    .into_iter()
                    .map(|(id, _)| (id, fate(&id)))
                    .collect(),
            }
        }

        fn store(&mut self, entries: &[RawEntry], refused: &Refused) -> Result<(), Halt> {
            let batch = fold(self.position, entries, &self.ground(entries), refused, 0)?;
            for row in batch.orders {
                assert!(self.orders.insert(row.order.id, row).is_none());
            }
            for row in batch.events {
                assert!(
                    self.events
                        .insert((row.round, row.event.seq), row)
                        .is_none()
                );
            }
            for row in batch.statuses {
                let order = self.orders.get_mut(&row.order.id).unwrap();
                assert!(order.last_seq < row.last_seq);
                *order = row;
            }
            for row in batch.rounds {
                let round = self.rounds.get_mut(&row.round).unwrap();
                round.0 = RoundState {
                    counters: row.counters,
                    pseq: row.id.pseq,
                };
                round.1 = row.intent.unwrap_or(round.1);
            }
            self.letters.extend(batch.letters);
            self.position = batch.to;
            Ok(())
        }

        /// What the auditor sums up for a round: held and sold units, and every seq.
        fn sums(&self, round: RoundId) -> ((i64, i64), Vec<u64>) {
            let of_round = self.orders.values().filter(|row| row.order.round == round);
            let letters = || self.letters.iter().filter(|letter| letter.round == round);
            let units = |held: bool| -> i64 {
                let orders = of_round.clone();
                let orders = orders.filter(|row| (row.order.status == Status::Held) == held);
                orders.map(|row| row.order.taken().cast_signed()).sum()
            };
            let dead = letters().fold(Delta::default(), |sum, letter| sum + letter.delta);
            let taken = (units(true) + dead.held, units(false) + dead.sold);
            let mut seqs: Vec<u64> = of_round
                .map(|row| row.order.seq)
                .chain(
                    self.events
                        .keys()
                        .filter(|(of, _)| *of == round)
                        .map(|(_, seq)| *seq),
                )
                .chain(letters().flat_map(|letter| letter.seq_from..=letter.seq_to))
                .filter(|seq| *seq > 0)
                .collect();
            seqs.sort_unstable();
            (taken, seqs)
        }
    }

    /// Cuts a journal into batches, as chance wants it.
    fn batches<'a>(
        entries: &'a [RawEntry],
        sizes: &'a [usize],
    ) -> impl Iterator<Item = &'a [RawEntry]> {
        let mut rest = entries;
        sizes.iter().cycle().map_while(move |size| {
            let (batch, tail) = rest.split_at((*size).min(rest.len()));
            rest = tail;
            (!batch.is_empty()).then_some(batch)
        })
    }

    proptest! {
        #[test]
        fn a_replayed_journal_makes_what_redis_must_have(
            commands in prop::collection::vec(any_command(), 0..60),
        ) {
            let mut model = run(&commands);
            let terms = [1, 2].map(|sale| (round(sale), terms(sale))).into();
            let mut replayed = Model::default();
            for entry in std::mem::take(&mut model.journal) {
                prop_assert!(replayed.replay(&entry, &terms).is_some());
            }
            // Orders of an archived round leave one after the other: what is made anew has none.
            for (id, _) in model.rounds.iter().filter(|(_, it)| it.intent == Intent::Archived) {
                let sale = model.sales.get_mut(&id.sale).unwrap();
                let before = sale.orders.len();
                sale.orders.retain(|_, order| order.round != *id);
                sale.archived_orders += (before - sale.orders.len()) as u64;
            }
            prop_assert_eq!(replayed, model);
        }

        #[test]
        fn any_cut_of_a_journal_leads_to_what_the_model_has(
            commands in prop::collection::vec(any_command(), 0..60),
            sizes in prop::collection::vec(1..9usize, 1..5),
        ) {
            let model = run(&commands);
            let mut tables = Tables::new();
            for batch in batches(&journal(&model), &sizes) {
                tables.store(batch, &Refused::default()).unwrap();
            }
            prop_assert_eq!(tables.position.pseq, model.pseq);
            for (id, round) in &model.rounds {
                let (state, intent) = tables.rounds[id];
                prop_assert_eq!(state.counters, round.counters);
                prop_assert_eq!(intent, round.intent);
                let (taken, seqs) = tables.sums(*id);
                prop_assert_eq!(taken, taken_by(&round.counters));
                prop_assert!(seqs.into_iter().eq(1..=round.counters.seq));
            }
            let orders: HashMap<_, _> =
                model.sales.values().flat_map(|sale| sale.orders.clone()).collect();
            let stored: HashMap<_, _> =
                tables.orders.iter().map(|(id, row)| (*id, row.order)).collect();
            prop_assert_eq!(stored, orders);
        }

        #[test]
        fn a_refused_order_takes_its_units_and_seqs_along(
            commands in prop::collection::vec(any_command(), 1..60),
            sizes in prop::collection::vec(1..9usize, 1..5),
            poison in any_purchase(),
        ) {
            let model = run(&commands);
            let poison = item(poison).order;
            let error = DataError { sqlstate: Some("23514".to_owned()), reason: String::new() };
            let refused = Refused { orders: [(poison, error)].into(), ..Refused::default() };
            let mut tables = Tables::new();
            for batch in batches(&journal(&model), &sizes) {
                tables.store(batch, &refused).unwrap();
            }
            prop_assert!(!tables.orders.contains_key(&poison));
            for (id, round) in &model.rounds {
                let (taken, seqs) = tables.sums(*id);
                prop_assert_eq!(taken, taken_by(&round.counters));
                prop_assert!(seqs.into_iter().eq(1..=round.counters.seq));
                prop_assert_eq!(tables.rounds[id].0.counters, round.counters);
            }
        }

        #[test]
        fn an_unreadable_entry_takes_the_step_of_its_counters_along(
            commands in prop::collection::vec(any_command(), 1..60),
            sizes in prop::collection::vec(1..9usize, 1..5),
            which in any::<prop::sample::Index>(),
        ) {
            let model = run(&commands);
            let mut journal = journal(&model);
            let at = which.index(journal.len());
            journal[at].entry = Err(EntryError::Malformed("broken".to_owned()));
            let mut tables = Tables::new();
            for batch in batches(&journal, &sizes) {
                // What only an unreadable entry accepted is dead with it: a real database says so.
                let mut refused = Refused::default();
                if let Ok(entry) = &raw(&model.journal[at]).entry {
                    for order in &entry.orders {
                        let reason = "lost".to_owned();
                        refused.orders.insert(order.id, DataError { sqlstate: None, reason });
                    }
                    for event in batch
                        .iter()
                        .filter_map(|raw| raw.entry.as_ref().ok())
                        .flat_map(|entry| &entry.events)
                        .filter(|event| {
                            event.order.is_some_and(|id| refused.orders.contains_key(&id))
                        })
                        .copied()
                        .collect::<Vec<_>>()
                    {
                        let reason = "lost".to_owned();
                        let place = (event.round.unwrap(), event.seq);
                        refused.events.insert(place, DataError { sqlstate: None, reason });
                    }
                }
                tables.store(batch, &refused).unwrap();
            }
            for (id, round) in &model.rounds {
                let (taken, seqs) = tables.sums(*id);
                // A cancellation that nobody could read leaves its order confirmed.
                prop_assert_eq!(taken, taken_by(&round.counters));
                prop_assert!(seqs.into_iter().eq(1..=round.counters.seq));
                prop_assert_eq!(tables.rounds[id].0.counters, round.counters);
            }
        }
    }

    fn taken_by(counters: &Counters) -> (i64, i64) {
        (counters.held.cast_signed(), counters.sold.cast_signed())
    }

    fn sold_out() -> Vec<RawEntry> {
        let items = |keys: std::ops::Range<u8>| Command::Purchase {
            receipt_key: 1,
            items: keys.map(|key| item((1, key, 0, 2))).collect(),
            together: false,
        };
        let cancel = Command::Release {
            round: round(1),
            order: item((1, 3, 0, 2)).order,
            release: Release::Cancel,
            units: None,
            operation: None,
            durability: None,
            actor: Uuid::nil(),
        };
        journal(&run(&[items(0..8), cancel, items(8..12)]))
    }

    fn store(entries: &[RawEntry]) -> Result<Tables, Halt> {
        let mut tables = Tables::new();
        tables.store(entries, &Refused::default())?;
        Ok(tables)
    }

    #[test]
    fn accept_and_cancel_in_one_batch_is_one_row() {
        let tables = store(&sold_out()).unwrap();
        let cancelled = tables.orders[&item((1, 3, 0, 2)).order];
        assert_eq!(cancelled.order.status, Status::Cancelled);
        assert_eq!(cancelled.order.accepted_as, Status::Confirmed);
        assert_eq!(cancelled.last_seq, 9);
    }

    #[test]
    fn a_gap_a_repetition_and_a_silent_epoch_stop_the_partition() {
        let good = sold_out();
        let mut gap = good.clone();
        gap.remove(2);
        let mut twice = good.clone();
        twice.insert(2, good[1].clone());
        let mut epoch = good.clone();
        for raw in &mut epoch {
            raw.id.epoch = Epoch(1);
        }
        for bad in [gap, twice, epoch] {
            assert!(matches!(store(&bad), Err(Halt::Gap { .. })));
        }
    }

    #[test]
    fn an_epoch_entry_begins_an_epoch_with_the_next_number() {
        let mut entries = sold_out();
        let id = JournalId {
            epoch: Epoch(3),
            pseq: entries.len() as u64 + 1,
        };
        let event = Event {
            round: None,
            ..Event::new(round(1), 0, EventKind::Epoch)
        };
        let entry = Entry {
            id,
            at_ms: 9,
            rounds: vec![],
            orders: vec![],
            events: vec![event],
        };
        entries.push(raw(&entry));
        assert_eq!(store(&entries).unwrap().position, id);
    }

    #[test]
    fn counters_that_do_not_follow_stop_the_partition() {
        type Change = fn(&mut Entry);
        let changes: [Change; 8] = [
            |entry| entry.rounds[0].1.remaining += 1,
            |entry| entry.rounds[0].1.sold -= 1,
            |entry| {
                entry.rounds[0].1.sold -= 1;
                entry.rounds[0].1.held += 1;
            },
            |entry| entry.rounds[0].1.seq += 1,
            |entry| entry.orders[1].seq = entry.orders[0].seq,
            |entry| entry.orders[1].quantity += 1,
            |entry| entry.orders.truncate(1),
            |entry| entry.orders[0].pseq += 1,
        ];
        for (at, change) in changes.into_iter().enumerate() {
            let mut entries = sold_out();
            change(entries[2].entry.as_mut().unwrap());
            assert!(
                matches!(store(&entries), Err(Halt::Step { .. })),
                "change {at}"
            );
        }
    }

    #[test]
    fn an_unknown_version_and_an_entry_without_counters_stop_the_partition() {
        let mut entries = sold_out();
        entries[2].entry = Err(EntryError::UnknownVersion(9));
        assert!(matches!(
            store(&entries),
            Err(Halt::UnknownVersion { version: 9, .. })
        ));
        entries[2].entry = Err(EntryError::Malformed(String::new()));
        entries[2].rounds = None;
        assert!(matches!(store(&entries), Err(Halt::Unreadable { .. })));
    }

    #[test]
    fn an_event_of_an_order_that_nobody_knows_stops_the_partition() {
        let entries = sold_out();
        let mut tables = store(&entries[..3]).unwrap();
        tables.orders.clear();
        let halt = tables.store(&entries[3..], &Refused::default());
        assert!(matches!(halt, Err(Halt::UnknownOrder { .. })));
    }

    #[test]
    fn a_hundred_dead_letters_in_a_row_stop_the_partition() {
        let entries = sold_out();
        let error = || DataError {
            sqlstate: None,
            reason: String::new(),
        };
        let orders = (0..12).map(|key| (item((1, key, 0, 2)).order, error()));
        let refused = Refused {
            orders: orders.collect(),
            ..Refused::default()
        };
        let tables = Tables::new();
        let ground = tables.ground(&entries);
        let before = DEAD_IN_A_ROW_MAX - 14;
        let fold = |dead| fold(tables.position, &entries, &ground, &refused, dead);
        // The provisioning of two rounds is no dead letter, so the row begins anew behind it.
        assert_eq!(fold(before).unwrap().dead_in_a_row, 13);
        let behind = &entries[2..];
        let mut tables = store(&entries[..2]).unwrap();
        tables.position = entries[1].id;
        let ground = tables.ground(behind);
        let fold = |dead| super::fold(tables.position, behind, &ground, &refused, dead);
        assert_eq!(fold(before).unwrap().dead_in_a_row, DEAD_IN_A_ROW_MAX - 1);
        assert!(matches!(fold(before + 1), Err(Halt::TooManyDead { .. })));
    }

    #[test]
    fn a_position_set_back_is_recognised() {
        let entries = sold_out();
        let mut tables = store(&entries).unwrap();
        tables.position = JournalId::default();
        let ground = tables.ground(&entries);
        let batch = fold(tables.position, &entries, &ground, &Refused::default(), 0).unwrap();
        assert!(batch.known);
        assert!(batch.rounds.is_empty());
    }
}
