//! Stores a batch: one transaction, or none.

use std::collections::{HashMap, HashSet};

use super::{
    Halt,
    fold::{self, Batch, DEAD_IN_A_ROW_MAX, Ground, Refused, fold},
};
use crate::{
    domain::{
        id::{OrderId, RoundId},
        journal::Event,
        order::Order,
    },
    engine::RawEntry,
    faults,
    store::{
        StoreError,
        journal::{
            BatchTransaction, DataError, EventRow, Known, Ledger, Position, Rows, WriteError,
        },
    },
};

/// What became of a batch.
#[derive(Debug)]
pub(super) enum Applied {
    /// It is stored, and the position is at its end.
    Stored(Batch),
    /// The position is not where the batch starts, or the epoch is another: nothing was stored.
    Moved,
}

impl From<StoreError> for Halt {
    fn from(error: StoreError) -> Self {
        Self::Store(error.to_string())
    }
}

impl From<WriteError> for Halt {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Data(error) => Self::Refused(error.reason),
            WriteError::Duplicate(reason) => Self::Conflict(reason),
            WriteError::Store(error) => error.into(),
        }
    }
}

/// Stores `entries`, which follow `position`. Rows that PostgreSQL refuses become dead letters.
///
/// # Errors
/// [`Halt`]; nothing was stored, unless the connection broke during the commit.
pub(super) async fn apply(
    ledger: &mut Ledger,
    position: Position,
    entries: &[RawEntry],
    dead_in_a_row: u32,
) -> Result<Applied, Halt> {
    let mut refused = Refused::default();
    let mut compare = false;
    loop {
        faults::point("writer.before_begin");
        let (mut transaction, locked) = ledger.begin().await?;
        let same = |locked: Position| {
            (locked.epoch == position.epoch || faults::bug("writer_ignores_epoch"))
                && locked.stored == position.stored
        };
        if !locked.is_some_and(same) {
            transaction.rollback().await?;
            return Ok(Applied::Moved);
        }
        let batch = prepare(
            &mut transaction,
            position,
            entries,
            &mut refused,
            &mut compare,
            dead_in_a_row,
        )
        .await;
        let batch = match batch {
            Ok(batch) => batch,
            Err(halt) => {
                transaction.rollback().await?;
                return Err(halt);
            }
        };
        if faults::bug("position_before_rows") {
            transaction.commit(batch.to).await?;
            (transaction, _) = ledger.begin().await?;
        }
        match write(&mut transaction, &batch, entries).await {
            Ok(()) => {
                faults::point("writer.after_rows");
                transaction.commit(batch.to).await?;
                faults::point("writer.after_commit");
                return Ok(Applied::Stored(batch));
            }
            Err(error) => {
                transaction.rollback().await?;
                match error {
                    // A row is there that should not be: the same as ours, or an alarm.
                    WriteError::Duplicate(_) if !compare => compare = true,
                    WriteError::Data(_) => match probe(ledger, &batch).await? {
                        Probed::Refused(found) => {
                            refused.orders.extend(found.orders);
                            refused.events.extend(found.events);
                        }
                        Probed::Duplicate if !compare => compare = true,
                        Probed::Duplicate | Probed::Nothing => return Err(error.into()),
                    },
                    error => return Err(error.into()),
                }
            }
        }
    }
}

/// Folds the entries on the ground of what is stored.
async fn prepare(
    transaction: &mut BatchTransaction<'_>,
    position: Position,
    entries: &[RawEntry],
    refused: &mut Refused,
    compare: &mut bool,
    dead_in_a_row: u32,
) -> Result<Batch, Halt> {
    let mut ground = Ground {
        rounds: transaction.rounds(&fold::rounds(entries)).await?,
        fates: HashMap::new(),
    };
    let strangers = fold::strangers(entries);
    if !strangers.is_empty() {
        ground.fates = transaction.fates(&strangers).await?;
    }
    let from = position.stored;
    let mut batch = fold(from, entries, &ground, refused, dead_in_a_row)?;
    *compare |= batch.known;
    if *compare {
        let known = transaction
            .known(&batch.orders, &batch.events, batch.from, batch.to)
            .await?;
        // What follows an acceptance that is a dead letter since an earlier time follows it there.
        let dead: Vec<_> = batch
            .orders
            .iter()
            .map(|row| row.order)
            .filter(|order| covered(&known, order.pseq, order.round, order.seq))
            .collect();
        if !dead.is_empty() {
            let reason = "a dead letter since an earlier time".to_owned();
            let error = DataError {
                sqlstate: None,
                reason,
            };
            refused
                .orders
                .extend(dead.iter().map(|order| (order.id, error.clone())));
            batch = fold(from, entries, &ground, refused, dead_in_a_row)?;
        }
        reconcile(&mut batch, &known, &ground)?;
    }
    Ok(batch)
}

fn covered(known: &Known, pseq: u64, round: RoundId, seq: u64) -> bool {
    known
        .letters
        .iter()
        .any(|(entry, of, first, last, unresolved)| {
            *unresolved && *entry == pseq && *of == round && (*first..=*last).contains(&seq)
        })
}

/// Takes out of a batch what is stored already.
///
/// # Errors
/// [`Halt::Conflict`] when something else is stored in its place.
fn reconcile(batch: &mut Batch, known: &Known, ground: &Ground) -> Result<(), Halt> {
    let place = |order: &Order| (order.round, order.epoch, order.seq);
    let by_id: HashMap<OrderId, Order> = known
        .orders
        .iter()
        .map(|order| (order.id, *order))
        .collect();
    let by_place: HashMap<_, Order> = known
        .orders
        .iter()
        .map(|order| (place(order), *order))
        .collect();
    let event_place = |row: &EventRow| (row.round, row.id.epoch, row.event.seq);
    let events: HashMap<_, EventRow> = known
        .events
        .iter()
        .map(|row| (event_place(row), *row))
        .collect();

    let mut new = Vec::with_capacity(batch.orders.len());
    for row in batch.orders.drain(..) {
        let order = row.order;
        match by_id
            .get(&order.id)
            .or_else(|| by_place.get(&place(&order)))
        {
            None => new.push(row),
            Some(stored) if stored.as_accepted() == order.as_accepted() => {
                if row.last_seq > order.seq {
                    batch.statuses.push(row);
                }
            }
            Some(_) if faults::bug("conflict_ignored") => {}
            Some(stored) => {
                let detail = format!("the journal has {order:?}, PostgreSQL has {stored:?}");
                return Err(Halt::Conflict(detail));
            }
        }
    }
    batch.orders = new;

    let mut new = Vec::with_capacity(batch.events.len());
    for row in batch.events.drain(..) {
        match events.get(&event_place(&row)) {
            None if covered(known, row.id.pseq, row.round, row.event.seq) => {}
            None => new.push(row),
            Some(stored) if *stored == without_amendment(&row) => {}
            Some(stored) => {
                let detail = format!("the journal has {row:?}, PostgreSQL has {stored:?}");
                return Err(Halt::Conflict(detail));
            }
        }
    }
    batch.events = new;

    let letters: HashSet<_> = known
        .letters
        .iter()
        .map(|(pseq, round, first, ..)| (*pseq, *round, *first))
        .collect();
    let entries: HashSet<_> = known
        .letters
        .iter()
        .map(|(pseq, round, ..)| (*pseq, *round))
        .collect();
    let mut new = Vec::new();
    for letter in batch.letters.drain(..) {
        let stored_before = ground
            .rounds
            .get(&letter.round)
            .is_some_and(|state| state.pseq >= letter.id.pseq);
        if letter.order.is_none() && letter.seq_to < letter.seq_from && stored_before {
            // An unreadable entry that the round is past: how much it was about is only there.
            if !entries.contains(&(letter.id.pseq, letter.round)) {
                let detail = format!("the dead letter of the unreadable entry {}", letter.id);
                return Err(Halt::Conflict(format!("{detail} is gone")));
            }
        } else if !letters.contains(&(letter.id.pseq, letter.round, letter.seq_from)) {
            new.push(letter);
        }
    }
    batch.letters = new;
    Ok(())
}

/// An event as PostgreSQL gives it back.
fn without_amendment(row: &EventRow) -> EventRow {
    let event = Event {
        amendment: None,
        ..row.event
    };
    EventRow { event, ..*row }
}

async fn write(
    transaction: &mut BatchTransaction<'_>,
    batch: &Batch,
    entries: &[RawEntry],
) -> Result<(), WriteError> {
    transaction.insert(Rows::Orders(&batch.orders)).await?;
    transaction.insert(Rows::Events(&batch.events)).await?;
    transaction.update_orders(&batch.statuses).await?;
    transaction.update_rounds(&batch.rounds).await?;
    for letter in &batch.letters {
        if faults::bug("dead_letter_dropped") {
            continue;
        }
        let entry = entries.iter().find(|entry| entry.id == letter.id);
        let payload = entry
            .map(|entry| entry.payload.as_slice())
            .unwrap_or_default();
        let at_ms = entry.and_then(|entry| entry.at_ms);
        transaction.insert_letter(letter, payload, at_ms).await?;
    }
    Ok(())
}

enum Probed {
    /// These rows are refused.
    Refused(Refused),
    /// A row is there already.
    Duplicate,
    /// Every row by itself is taken.
    Nothing,
}

/// Finds the rows that PostgreSQL refuses, by halves, and leaves everything as it was.
async fn probe(ledger: &mut Ledger, batch: &Batch) -> Result<Probed, Halt> {
    let (mut transaction, _) = ledger.begin().await?;
    let orders = isolate(&mut transaction, Rows::Orders(&batch.orders)).await;
    let events = isolate(&mut transaction, Rows::Events(&batch.events)).await;
    transaction.rollback().await?;
    let (orders, events) = match (orders, events) {
        (Err(WriteError::Duplicate(_)), _) | (_, Err(WriteError::Duplicate(_))) => {
            return Ok(Probed::Duplicate);
        }
        (orders, events) => (orders?, events?),
    };
    if orders.is_empty() && events.is_empty() {
        return Ok(Probed::Nothing);
    }
    let mut refused = Refused::default();
    for (at, error) in orders {
        refused
            .orders
            .extend(batch.orders.get(at).map(|row| (row.order.id, error)));
    }
    for (at, error) in events {
        let row = batch.events.get(at);
        refused
            .events
            .extend(row.map(|row| ((row.round, row.event.seq), error)));
    }
    Ok(Probed::Refused(refused))
}

/// Inserts all rows but the refused ones, and says which those are and why. Gives up looking once
/// so many in a row are refused that it is no accident.
async fn isolate(
    transaction: &mut BatchTransaction<'_>,
    rows: Rows<'_>,
) -> Result<Vec<(usize, DataError)>, WriteError> {
    let mut refused = Vec::new();
    let mut in_a_row = 0;
    let mut ranges = vec![(0, rows.len())];
    while let Some((from, to)) = ranges.pop() {
        match transaction.attempt(rows.slice(from, to)).await {
            Ok(()) => in_a_row = 0,
            Err(WriteError::Data(_)) if to - from > 1 => {
                let middle = from.midpoint(to);
                ranges.push((middle, to));
                ranges.push((from, middle));
            }
            Err(WriteError::Data(error)) => {
                refused.push((from, error));
                in_a_row += 1;
                if in_a_row == DEAD_IN_A_ROW_MAX {
                    break;
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(refused)
}
