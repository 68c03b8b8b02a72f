//! Reading the journal for the writer: `journal.lua`.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use fred::types::Value;

use super::{
    Engine, Shared,
    connection::Connection,
    epoch::journal_id,
    error::EngineError,
    packed::{AMENDMENT_BYTES, COUNTERS_BYTES, Unpack, VERSION_LIFE, VERSION_MIN, event_bytes},
    reply::Reply,
};
use crate::domain::{
    id::{Epoch, JournalId, RoundId},
    journal::{Entry, Event, EventKind},
    order::Order,
    round::Counters,
};

/// How long one wait for a new entry lasts.
const WAIT: Duration = Duration::from_secs(1);

/// Reads one partition's journal over a connection of its own, because waiting stalls it.
#[derive(Debug)]
pub struct JournalReader {
    shared: Arc<Shared>,
    connection: Arc<Connection>,
}

/// Some entries, in order.
#[derive(Clone, Debug)]
pub struct JournalPage {
    /// The entries.
    pub entries: Vec<RawEntry>,
    /// The number of the last entry that there is, here or beyond.
    pub last_pseq: u64,
}

/// A journal entry as far as it could be read.
#[derive(Clone, Debug)]
pub struct RawEntry {
    /// Its place.
    pub id: JournalId,
    /// When, milliseconds since the Unix epoch by Redis' clock.
    pub at_ms: Option<i64>,
    /// The counters of every round that it touched, after it.
    pub rounds: Option<Vec<(RoundId, Counters)>>,
    /// The whole entry.
    pub entry: Result<Entry, EntryError>,
    /// Its orders and events as they stand in the journal.
    pub payload: Vec<u8>,
}

/// Why an entry cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    /// A newer Stockade wrote it.
    #[error("journal entry of unknown version {0}")]
    UnknownVersion(u8),
    /// It is damaged.
    #[error("malformed journal entry: {0}")]
    Malformed(String),
}

/// Why the journal cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    /// Redis is in another epoch, or is not the server that the epoch began on: nothing that it
    /// says may be stored.
    #[error("fenced: {0}")]
    Fenced(String),
    /// Entries after the position are gone.
    #[error("the journal begins at {oldest}: entries after the position are gone")]
    Missing {
        /// The oldest entry there is.
        oldest: u64,
    },
    /// No answer; nothing is lost by asking again.
    #[error("{0}")]
    Unavailable(String),
}

impl From<EngineError> for JournalError {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Fenced(reason) => Self::Fenced(reason),
            other => Self::Unavailable(other.to_string()),
        }
    }
}

impl Engine {
    /// A reader of this partition's journal.
    ///
    /// # Errors
    /// [`EngineError`] when Redis is not there.
    pub async fn journal_reader(&self) -> Result<JournalReader, EngineError> {
        let connection = Connection::open(&self.url, 5 * WAIT).await?;
        Ok(JournalReader {
            shared: Arc::clone(&self.shared),
            connection,
        })
    }
}

impl JournalReader {
    /// The entries after `after`, at most `entries_max`. Read in one script that also checks that
    /// Redis is in `epoch`, and is the server that the epoch began on. Entries go by their number:
    /// they are found also if `after` has a later epoch than they have.
    ///
    /// # Errors
    /// [`JournalError`].
    pub async fn read(
        &self,
        epoch: Epoch,
        after: JournalId,
        entries_max: usize,
    ) -> Result<JournalPage, JournalError> {
        let page = self.page(epoch, after, entries_max).await;
        if let Err(JournalError::Missing { .. }) = page {
            for older in (0..after.epoch.0).rev().map(Epoch) {
                let after = JournalId {
                    epoch: older,
                    ..after
                };
                match self.page(epoch, after, entries_max).await {
                    Err(JournalError::Missing { .. }) => {}
                    found => return found,
                }
            }
        }
        page
    }

    /// The place of the last entry there is in `epoch`.
    ///
    /// # Errors
    /// [`JournalError`].
    pub async fn end(&self, epoch: Epoch) -> Result<JournalId, JournalError> {
        let beginning = JournalId { epoch, pseq: 0 };
        let page = self.ask(epoch, beginning, 1).await?;
        Ok(JournalId {
            epoch,
            pseq: page.last_pseq,
        })
    }

    async fn page(
        &self,
        epoch: Epoch,
        after: JournalId,
        entries_max: usize,
    ) -> Result<JournalPage, JournalError> {
        let JournalPage { entries, last_pseq } = self.ask(epoch, after, entries_max).await?;
        match entries.first() {
            Some(first) if first.id.pseq != after.pseq + 1 => Err(JournalError::Missing {
                oldest: first.id.pseq,
            }),
            None if last_pseq > after.pseq => Err(JournalError::Missing {
                oldest: last_pseq + 1,
            }),
            _ => Ok(JournalPage { entries, last_pseq }),
        }
    }

    /// What there is behind `after`, whatever is missing.
    async fn ask(
        &self,
        epoch: Epoch,
        after: JournalId,
        entries_max: usize,
    ) -> Result<JournalPage, JournalError> {
        let Shared { keys, scripts, .. } = &*self.shared;
        let arguments = vec![
            Bytes::from(epoch.0.to_string()),
            Bytes::from(after.pseq.to_string()),
            Bytes::from(entries_max.to_string()),
            Bytes::from(after.to_string()),
        ];
        let names = vec![keys.meta(), keys.journal()];
        let reply = self
            .connection
            .call(&scripts.journal, names, arguments)
            .await?;
        let mut reply = Reply::new("journal", reply);
        match reply.text()?.as_str() {
            "ok" => {}
            "fenced" => return Err(JournalError::Fenced(reply.text()?)),
            word => return Err(reply.unexpected(word).into()),
        }
        let last_pseq = reply.number()?;
        let mut entries = Vec::new();
        for value in reply.value()?.into_array() {
            entries.push(raw_entry(value).ok_or_else(|| reply.unexpected("entry"))?);
        }
        Ok(JournalPage { entries, last_pseq })
    }

    /// Returns when there is an entry after `after`, or after about a second; whether there is one.
    ///
    /// # Errors
    /// [`JournalError`].
    pub async fn wait(&self, after: JournalId) -> Result<bool, JournalError> {
        let arguments = vec![
            Bytes::from_static(b"BLOCK"),
            Bytes::from(WAIT.as_millis().to_string()),
            Bytes::from_static(b"COUNT"),
            Bytes::from_static(b"1"),
            Bytes::from_static(b"STREAMS"),
            Bytes::from(self.shared.keys.journal()),
            Bytes::from(after.to_string()),
        ];
        let found = self.connection.blocking_command("XREAD", arguments).await?;
        Ok(!found.is_null())
    }
}

/// How the payload of a dead letter begins that says where its parts end. Before there were holds it
/// was orders or one event, and began with the index of a round.
const PAYLOAD: u8 = 255;

/// What a dead letter keeps of an entry.
fn payload(version: Option<u8>, [orders, events, terms]: [&[u8]; 3]) -> Vec<u8> {
    let mut payload = vec![PAYLOAD, version.unwrap_or_default()];
    for part in [orders, events] {
        payload.extend(u32::try_from(part.len()).unwrap_or(u32::MAX).to_be_bytes());
    }
    payload.extend([orders, events, terms].concat());
    payload
}

/// Reads what a dead letter has kept of an entry: the orders and events of this round. `None` when
/// this build cannot read it.
pub fn read_payload(round: RoundId, payload: &[u8]) -> Option<(Vec<Order>, Vec<Event>)> {
    let (version, orders, events, terms) = if let [PAYLOAD, version, parts @ ..] = payload {
        let (orders, parts) = parts.split_first_chunk::<4>()?;
        let (events, parts) = parts.split_first_chunk::<4>()?;
        let length = |bytes: &[u8; 4]| usize::try_from(u32::from_be_bytes(*bytes)).ok();
        let (orders, parts) = parts.split_at_checked(length(orders)?)?;
        let (events, terms) = parts.split_at_checked(length(events)?)?;
        (*version, orders, events, terms)
    } else if payload.len() == event_bytes(VERSION_MIN) {
        (VERSION_MIN, &[][..], payload, &[][..])
    } else {
        (VERSION_MIN, payload, &[][..], &[][..])
    };
    let orders = acceptances(orders)?.into_iter().map(|(_, order)| order);
    let orders = orders.filter(|order| order.round == round).collect();
    let events = changes(version, events, terms)?.into_iter();
    let events = events.map(|(_, event)| Event {
        round: Some(round),
        ..event
    });
    Some((orders, events.collect()))
}

/// The acceptances of an entry, each with the index of its round.
fn acceptances(bytes: &[u8]) -> Option<Vec<(u8, Order)>> {
    let mut bytes = Unpack(bytes);
    let mut orders = Vec::new();
    while !bytes.is_empty() {
        orders.push(bytes.acceptance()?);
    }
    Some(orders)
}

/// The other events of an entry, each with the index of its round.
fn changes(version: u8, events: &[u8], terms: &[u8]) -> Option<Vec<(u8, Event)>> {
    let mut events = all(events, event_bytes(version), |bytes| bytes.event(version))?;
    for (index, seq, amendment) in all(terms, AMENDMENT_BYTES, Unpack::amendment)? {
        let amended = |(at, event): &&mut (u8, Event)| (*at, event.seq) == (index, seq);
        events.iter_mut().find(amended)?.1.amendment = Some(amendment);
    }
    let whole =
        |(_, event): &(u8, Event)| (event.kind == EventKind::Amend) == event.amendment.is_some();
    events.iter().all(whole).then_some(events)
}

/// Takes one entry of `XRANGE` apart; `None` when it is not even shaped like one.
pub(super) fn raw_entry(value: Value) -> Option<RawEntry> {
    let mut parts = value.into_array().into_iter();
    let id = journal_id(&parts.next()?.as_string()?)?;
    let mut fields = parts.next()?.into_array().into_iter();
    let (mut version, mut at_ms, mut rounds) = (None, None, None);
    let (mut orders, mut events, mut terms) = (None, None, Bytes::new());
    while let (Some(name), Some(value)) = (fields.next(), fields.next()) {
        let value = value.into_bytes()?;
        match name.into_bytes()?.as_ref() {
            b"v" => {
                version = str::from_utf8(&value)
                    .ok()
                    .and_then(|v| v.parse::<u8>().ok());
            }
            b"t" => {
                at_ms = str::from_utf8(&value)
                    .ok()
                    .and_then(|t| t.parse::<i64>().ok());
            }
            b"r" => rounds = all(&value, COUNTERS_BYTES, Unpack::counters),
            b"o" => orders = Some(value),
            b"e" => events = Some(value),
            b"a" => terms = value,
            _ => {}
        }
    }
    let parts = [orders.as_deref(), events.as_deref(), Some(&*terms)];
    let payload = payload(version, parts.map(Option::unwrap_or_default));
    let entry = match version {
        Some(version @ VERSION_MIN..=VERSION_LIFE) => match (at_ms, &rounds, &orders, &events) {
            (Some(at_ms), Some(rounds), Some(orders), Some(events)) => {
                let changes = changes(version, events, &terms);
                entry(id, at_ms, rounds, acceptances(orders), changes)
            }
            _ => Err(EntryError::Malformed(
                "a field is missing or damaged".to_owned(),
            )),
        },
        Some(version) => Err(EntryError::UnknownVersion(version)),
        None => Err(EntryError::Malformed("no version".to_owned())),
    };
    Some(RawEntry {
        id,
        at_ms,
        rounds,
        entry,
        payload,
    })
}

fn entry(
    id: JournalId,
    at_ms: i64,
    rounds: &[(RoundId, Counters)],
    orders: Option<Vec<(u8, Order)>>,
    events: Option<Vec<(u8, Event)>>,
) -> Result<Entry, EntryError> {
    let damaged = |what: &str| EntryError::Malformed(format!("{what} damaged"));
    let round = |index: u8| rounds.get(usize::from(index)).map(|(round, _)| *round);
    let orders = orders
        .ok_or_else(|| damaged("orders"))?
        .into_iter()
        .map(|(index, order)| (round(index) == Some(order.round)).then_some(order))
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| damaged("an order's round"))?;
    let mut changes = Vec::new();
    for (index, mut event) in events.ok_or_else(|| damaged("events"))? {
        event.round = round(index);
        if event.round.is_none() && event.kind != EventKind::Epoch {
            return Err(damaged("an event's round"));
        }
        changes.push(event);
    }
    Ok(Entry {
        id,
        at_ms,
        rounds: rounds.to_vec(),
        orders,
        events: changes,
    })
}

/// Unpacks values of a fixed size until the bytes are used up.
fn all<'a, T>(
    bytes: &'a [u8],
    size: usize,
    unpack: impl Fn(&mut Unpack<'a>) -> Option<T>,
) -> Option<Vec<T>> {
    bytes
        .chunks(size)
        .map(|chunk| unpack(&mut Unpack(chunk)))
        .collect()
}
