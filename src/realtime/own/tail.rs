//! Reads the journal of a partition while somebody looks, and hands each buyer what is its own.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use tokio::time::{sleep, sleep_until};

use super::{
    Desks, Part, State,
    news::{Move, Place},
    recent::Recent,
};
use crate::{
    domain::{
        id::{BuyerId, JournalId, SaleId, SaleNumber},
        journal::{Entry, Event, EventKind, Step},
        order::{Order, Status},
    },
    engine::{Engine, JournalError, JournalReader},
};

/// Entries that one script call reads, as the writer does.
const ENTRIES_MAX: usize = 128;

/// The time between two looks at a journal that had no more: so old is what a buyer is told, at
/// most, and so seldom is Redis asked, whatever is sold.
const PAUSE: Duration = Duration::from_millis(100);

/// The pause after something went wrong.
const RETRY: Duration = Duration::from_millis(250);

/// How long before its end a hold is called expiring, in milliseconds; half of its time if that is
/// less.
const WARNING_MS: i64 = 60_000;

/// The sales that these entries touch, as others know them.
type Names = HashMap<SaleNumber, SaleId>;

impl Desks {
    /// Follows the journal of a partition for ever, but only while somebody looks.
    pub(super) async fn tail(&self, engine: &Engine) {
        let index = usize::from(engine.partition().0);
        loop {
            self.occupied().await;
            self.follow(engine, index).await;
            if let Some(part) = self.state().parts.get_mut(index) {
                *part = Part::default();
            }
            sleep(RETRY).await;
        }
    }

    /// Follows it until nobody looks any more, or it does not go on where it was.
    async fn follow(&self, engine: &Engine, index: usize) {
        engine.verified().await;
        // What was before is in the snapshots.
        let (reader, mut at) = match begin(engine).await {
            Ok(begun) => begun,
            Err(error) => {
                tracing::debug!(%error, "personal streams: no journal");
                return;
            }
        };
        {
            let mut state = self.state();
            if let Some(part) = state.parts.get_mut(index) {
                part.recent = Some(Recent::new(at));
            }
            // Whatever happened meanwhile: everybody gets to see everything.
            let State { desks, wanted, .. } = &mut *state;
            let now = Instant::now();
            wanted.extend(desks.keys().map(|buyer| (*buyer, now)));
        }
        let mut next = Instant::now();
        while !self.state().desks.is_empty() {
            sleep_until(next.into()).await;
            let asked_at = Instant::now();
            next = asked_at + PAUSE;
            self.0.metrics.own_reads.inc();
            match reader.read(at.epoch, at, ENTRIES_MAX).await {
                Ok(page) => {
                    let is_all = page.entries.len() < ENTRIES_MAX;
                    at = page.entries.last().map_or(at, |entry| entry.id);
                    let entries = page.entries.into_iter().map(|raw| raw.entry);
                    let Ok(entries) = entries.collect::<Result<Vec<_>, _>>() else {
                        // The writer says what is wrong with it.
                        return;
                    };
                    self.hand_out(index, entries).await;
                    if is_all {
                        self.has_read_all(index, asked_at);
                    } else {
                        next = asked_at;
                    }
                }
                Err(JournalError::Unavailable(_)) => next = Instant::now() + RETRY,
                Err(JournalError::Fenced(_) | JournalError::Missing { .. }) => return,
            }
            self.warn(engine, index);
        }
    }

    /// Tells everybody what is theirs.
    async fn hand_out(&self, index: usize, entries: Vec<Entry>) {
        let numbers = self.state().touched(&entries);
        let names = self.names(numbers).await;
        let mut state = self.state();
        for entry in entries {
            for step in entry.steps() {
                match step {
                    Step::Order(order) => state.accepted(index, order, &names, entry.at_ms),
                    Step::Event(event) => state.happened(index, event, &names, entry.at_ms),
                }
            }
            if let Some(recent) = state
                .parts
                .get_mut(index)
                .and_then(|part| part.recent.as_mut())
            {
                recent.push(entry);
            }
        }
    }

    /// All is read that there was when it was asked for.
    fn has_read_all(&self, index: usize, asked_at: Instant) {
        let mut state = self.state();
        if let Some(part) = state.parts.get_mut(index) {
            part.read_at = Some(asked_at);
        }
        let is_wanted = !state.wanted.is_empty();
        drop(state);
        self.0.read.send_replace(());
        if is_wanted {
            self.0.wanted.notify_one();
        }
    }

    /// What these sales are called, as far as it can be told.
    pub(super) async fn names(&self, numbers: Vec<SaleNumber>) -> Names {
        let asked = numbers.into_iter().map(async |number| {
            let facts = self.0.directory.by_number(number).await.ok()??;
            Some((number, facts.id))
        });
        let named = futures::future::join_all(asked).await;
        named.into_iter().flatten().collect()
    }

    /// Tells those whose holds end soon.
    fn warn(&self, engine: &Engine, index: usize) {
        let Some(now_ms) = engine.redis_ms() else {
            return;
        };
        let mut state = self.state();
        let State {
            parts,
            owners,
            desks,
            ..
        } = &mut *state;
        let Some(part) = parts.get_mut(index) else {
            return;
        };
        while let Some((at_ms, id)) = part.holds.first().copied()
            && at_ms <= now_ms
        {
            part.holds.pop_first();
            if let Some(open) = owners.get(&id).and_then(|buyer| desks.get(buyer)) {
                open.desk.send_modify(|desk| {
                    // It may have been extended.
                    let order = desk.orders().find(|order| order.id == id).copied();
                    if order.and_then(|order| warn_at(&order)) == Some(at_ms) {
                        desk.warn(id, now_ms);
                    }
                });
            }
        }
    }
}

/// A reader of the journal, and the end of it.
async fn begin(engine: &Engine) -> Result<(JournalReader, JournalId), JournalError> {
    let reader = engine.journal_reader().await?;
    let end = reader.end(engine.floor().epoch).await?;
    Ok((reader, end))
}

/// When a hold is called expiring.
pub(super) fn warn_at(order: &Order) -> Option<i64> {
    let until_ms = order.hold_until_ms()?;
    let half = (until_ms - order.accepted_at_ms) / 2;
    (order.status == Status::Held).then(|| until_ms - half.min(WARNING_MS))
}

impl State {
    /// The sales in which these entries accept something from, or change the line for, somebody who
    /// looks.
    fn touched(&self, entries: &[Entry]) -> Vec<SaleNumber> {
        let orders = entries.iter().flat_map(|entry| &entry.orders);
        let orders = orders.map(|order| (order.buyer, order.round.sale));
        let events = entries.iter().flat_map(|entry| &entry.events);
        let places = events.filter_map(|event| Some((waiting(event)?, event.round?.sale)));
        let mut numbers: Vec<_> = orders
            .chain(places)
            .filter(|(buyer, _)| self.desks.contains_key(buyer))
            .map(|(_, number)| number)
            .collect();
        numbers.sort_unstable_by_key(|number| number.0);
        numbers.dedup();
        numbers
    }

    fn accepted(&mut self, index: usize, order: &Order, names: &Names, at_ms: i64) {
        let Some(open) = self.desks.get(&order.buyer) else {
            return;
        };
        let Some(sale) = names.get(&order.round.sale) else {
            self.wanted.insert(order.buyer, Instant::now());
            return;
        };
        let mut gone = None;
        open.desk
            .send_modify(|desk| gone = desk.accept(*order, *sale, at_ms));
        self.owners.insert(order.id, order.buyer);
        if let Some(gone) = gone {
            self.owners.remove(&gone);
        }
        self.hold(index, order);
    }

    fn happened(&mut self, index: usize, event: &Event, names: &Names, at_ms: i64) {
        if let Some(buyer) = waiting(event) {
            self.moved(buyer, event, names, at_ms);
            return;
        }
        let owner = event.order.filter(|_| event.kind.changes_order());
        let Some(buyer) = owner.and_then(|id| self.owners.get(&id)).copied() else {
            return;
        };
        let Some(open) = self.desks.get(&buyer) else {
            return;
        };
        let mut changed = None;
        open.desk
            .send_modify(|desk| changed = desk.change(event, at_ms));
        match changed {
            Some(order) => self.hold(index, &order),
            // Something has been missed.
            None => {
                self.wanted.insert(buyer, Instant::now());
            }
        }
    }

    fn moved(&mut self, buyer: BuyerId, event: &Event, names: &Names, at_ms: i64) {
        let place = event.round.and_then(|round| {
            let change = match event.kind {
                EventKind::Join => Move::Joined,
                _ if event.units > 0 => Move::Offered,
                _ => Move::Left,
            };
            Some(Place {
                change,
                sale: *names.get(&round.sale)?,
                round: round.round,
                order: event.order.filter(|_| change == Move::Offered),
            })
        });
        if let (Some(place), Some(open)) = (place, self.desks.get(&buyer)) {
            open.desk.send_modify(|desk| desk.place(place, at_ms));
        }
    }

    /// Remembers when the time of a held order is nearly over.
    pub(super) fn hold(&mut self, index: usize, order: &Order) {
        if let (Some(at_ms), Some(part)) = (warn_at(order), self.parts.get_mut(index)) {
            part.holds.insert((at_ms, order.id));
        }
    }
}

/// Who joins a line or leaves it with this event.
fn waiting(event: &Event) -> Option<BuyerId> {
    matches!(event.kind, EventKind::Join | EventKind::Leave)
        .then_some(event.actor)
        .flatten()
        .map(BuyerId)
}
