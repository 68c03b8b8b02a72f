//! Dead letters once more, after somebody has mended what PostgreSQL refused them for.

use std::collections::HashSet;

use super::Halt;
use crate::{
    domain::{
        id::OrderId,
        journal::{Delta, Event, EventKind},
        order::Order,
    },
    engine::read_payload,
    faults,
    store::{
        journal::{BatchTransaction, EventRow, Fate, Ledger, OrderRow, RoundRow, Rows, WriteError},
        rebuild::StoredLetter,
    },
};

/// What became of a dead letter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Redriven {
    /// Its rows are stored, and it is resolved.
    Stored,
    /// It stays a dead letter.
    Kept(String),
}

/// Stores `letters`, which must be in order of the journal, as far as PostgreSQL takes them now.
/// Each in a transaction of its own, one after the other with the writer. What follows a letter of
/// the same order that stays, stays too. Doing it again is safe.
///
/// # Errors
/// [`Halt`] when PostgreSQL does not answer; the letters before are stored.
pub async fn redrive(
    ledger: &mut Ledger,
    letters: &[StoredLetter],
) -> Result<Vec<(i64, Redriven)>, Halt> {
    let mut kept: HashSet<OrderId> = HashSet::new();
    let mut outcomes = Vec::with_capacity(letters.len());
    for letter in letters {
        let waits = letter.order.is_some_and(|order| kept.contains(&order));
        let outcome = if waits {
            Redriven::Kept("an earlier event of the same order is a dead letter".to_owned())
        } else {
            one(ledger, letter).await?
        };
        if outcome != Redriven::Stored {
            kept.extend(letter.order);
        }
        outcomes.push((letter.id, outcome));
    }
    Ok(outcomes)
}

async fn one(ledger: &mut Ledger, letter: &StoredLetter) -> Result<Redriven, Halt> {
    let Some((orders, events)) = read_payload(letter.round, &letter.payload) else {
        return Ok(Redriven::Kept("it cannot be read".to_owned()));
    };
    let own = |seq: u64| (letter.seq_from..=letter.seq_to).contains(&seq);
    let orders: Vec<_> = orders
        .into_iter()
        .filter(|order| order.round == letter.round && own(order.seq))
        .filter(|order| letter.order.is_none_or(|id| id == order.id))
        .collect();
    let events: Vec<_> = events
        .into_iter()
        .filter(|event| own(event.seq) || event.kind == EventKind::Provision)
        .filter(|event| letter.order.is_none_or(|id| event.order == Some(id)))
        .collect();
    let (mut transaction, position) = ledger.begin().await?;
    let Some(position) = position else {
        transaction.rollback().await?;
        return Ok(Redriven::Kept("the partition has no position".to_owned()));
    };
    // Somebody else may have been faster.
    if !transaction.resolve(letter.id).await? {
        transaction.rollback().await?;
        return Ok(Redriven::Stored);
    }
    match write(&mut transaction, letter, &orders, &events).await {
        Ok(()) => {
            transaction.commit(position.stored).await?;
            Ok(Redriven::Stored)
        }
        Err(WriteError::Store(error)) => Err(error.into()),
        Err(refused) => {
            transaction.rollback().await?;
            Ok(Redriven::Kept(refused.to_string()))
        }
    }
}

async fn write(
    transaction: &mut BatchTransaction<'_>,
    letter: &StoredLetter,
    orders: &[Order],
    events: &[Event],
) -> Result<(), WriteError> {
    let rows: Vec<_> = orders
        .iter()
        .map(|order| OrderRow {
            order: order.as_accepted(),
            last_seq: order.seq,
            updated_at_ms: order.accepted_at_ms,
        })
        .collect();
    transaction.insert(Rows::Orders(&rows)).await?;
    let at_ms = letter.at_ms;
    for event in events {
        if faults::bug("redrive_forgets_events") {
            break;
        }
        let row = EventRow {
            round: letter.round,
            id: letter.entry,
            at_ms,
            event: *event,
        };
        transaction.insert(Rows::Events(&[row])).await?;
        if let Some(id) = event.order.filter(|_| event.kind.changes_order()) {
            let fates = transaction.fates(&[(id, letter.round)]).await?;
            let Some(Fate::Stored(mut row)) = fates.get(&id).copied() else {
                continue;
            };
            if row.last_seq < event.seq && event.change(&mut row.order).is_some() {
                (row.last_seq, row.updated_at_ms) = (event.seq, at_ms);
                transaction.update_orders(&[row]).await?;
            }
        }
    }
    // The counters of a round have its dead letters in them, unless PostgreSQL did not have it.
    let states = transaction.rounds(&[letter.round]).await?;
    let state = states.get(&letter.round);
    if let Some(state) = state.filter(|state| state.pseq < letter.entry.pseq) {
        let mut counters = state.counters;
        // A round begins with what it is provisioned with.
        let provisions = |event: &Event| event.kind == EventKind::Provision;
        let allocated = if events.iter().any(provisions) {
            0
        } else {
            letter.delta.allocated
        };
        let Delta { held, sold, .. } = letter.delta;
        counters.allocation = counters.allocation.saturating_add_signed(allocated);
        counters.remaining = counters
            .remaining
            .saturating_add_signed(allocated - held - sold);
        counters.held = counters.held.saturating_add_signed(held);
        counters.sold = counters.sold.saturating_add_signed(sold);
        counters.seq = counters.seq.max(letter.seq_to);
        let row = RoundRow {
            round: letter.round,
            counters,
            id: letter.entry,
            intent: None,
            amendment: None,
        };
        transaction.update_rounds(&[row]).await?;
    }
    Ok(())
}
