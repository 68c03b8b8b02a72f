//! Dead letters once more, after somebody has mended what PostgreSQL refused them for.

use std::collections::HashSet;

use super::Halt;
use crate::{
    domain::{
        id::OrderId,
        journal::{Event, EventKind},
        order::{Order, Status},
    },
    engine::read_payload,
    faults,
    store::{
        journal::{
            BatchTransaction, EventRow, Ledger, OrderRow, RoundRow, Rows, StatusRow, WriteError,
        },
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
    let Some((orders, event)) = read_payload(letter.round, &letter.payload) else {
        return Ok(Redriven::Kept("it cannot be read".to_owned()));
    };
    let own = |seq: u64| (letter.seq_from..=letter.seq_to).contains(&seq);
    let orders: Vec<_> = orders
        .into_iter()
        .filter(|order| order.round == letter.round && own(order.seq))
        .filter(|order| letter.order.is_none_or(|id| id == order.id))
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
    match write(&mut transaction, letter, &orders, event).await {
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
    event: Option<Event>,
) -> Result<(), WriteError> {
    let rows: Vec<_> = orders
        .iter()
        .map(|order| OrderRow {
            order: Order {
                status: order.accepted_as,
                ..*order
            },
            last_seq: order.seq,
            updated_at_ms: order.accepted_at_ms,
        })
        .collect();
    transaction.insert(Rows::Orders(&rows)).await?;
    let at_ms = letter.at_ms;
    if let Some(event) = event
        && !faults::bug("redrive_forgets_events")
    {
        let row = EventRow {
            round: letter.round,
            id: letter.entry,
            at_ms,
            event,
        };
        transaction.insert(Rows::Events(&[row])).await?;
        if let (EventKind::Cancel, Some(order)) = (event.kind, event.order) {
            let row = StatusRow {
                order,
                status: Status::Cancelled,
                last_seq: event.seq,
                updated_at_ms: at_ms,
            };
            transaction.update_statuses(&[row]).await?;
        }
    }
    // The counters of a round have its dead letters in them, unless PostgreSQL did not have it.
    let states = transaction.rounds(&[letter.round]).await?;
    let state = states.get(&letter.round);
    if let Some(state) = state.filter(|state| state.pseq < letter.entry.pseq) {
        let mut counters = state.counters;
        // A round begins with what it is provisioned with.
        let allocated = match event.map(|event| event.kind) {
            Some(EventKind::Provision) => 0,
            _ => letter.allocated,
        };
        counters.allocation = counters.allocation.saturating_add_signed(allocated);
        counters.remaining = counters
            .remaining
            .saturating_add_signed(allocated - letter.units);
        counters.sold = counters.sold.saturating_add_signed(letter.units);
        counters.seq = counters.seq.max(letter.seq_to);
        let row = RoundRow {
            round: letter.round,
            counters,
            id: letter.entry,
            intent: None,
        };
        transaction.update_rounds(&[row]).await?;
    }
    Ok(())
}
