//! Reading the journal for the writer: `journal.lua`.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use fred::types::Value;

use super::{
    Engine, Shared,
    connection::Connection,
    epoch::journal_id,
    error::EngineError,
    packed::{
        COUNTERS_BYTES, EVENT_BYTES, Unpack, VERSION, VERSION_END, VERSION_MIN, acceptance_bytes,
    },
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

    async fn page(
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

/// Reads what a dead letter has kept of an entry: its orders, or the event that it was. One call
/// makes orders or one event, never both. `None` when this build cannot read it.
pub fn read_payload(round: RoundId, payload: &[u8]) -> Option<(Vec<Order>, Option<Event>)> {
    if payload.len() == EVENT_BYTES {
        let (_, event) = Unpack(payload).event()?;
        let round = Some(round);
        return Some((Vec::new(), Some(Event { round, ..event })));
    }
    (VERSION_MIN..=VERSION).rev().find_map(|version| {
        let orders = all(payload, acceptance_bytes(version), Unpack::acceptance)?;
        let orders = orders.into_iter().map(|(_, order)| order).collect();
        Some((orders, None))
    })
}

/// Takes one entry of `XRANGE` apart; `None` when it is not even shaped like one.
pub(super) fn raw_entry(value: Value) -> Option<RawEntry> {
    let mut parts = value.into_array().into_iter();
    let id = journal_id(&parts.next()?.as_string()?)?;
    let mut fields = parts.next()?.into_array().into_iter();
    let (mut version, mut at_ms, mut rounds) = (None, None, None);
    let (mut orders, mut events) = (None, None);
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
            _ => {}
        }
    }
    let payload = [orders.as_deref(), events.as_deref()]
        .into_iter()
        .flatten()
        .flatten();
    let payload = payload.copied().collect();
    let entry = match version {
        Some(version @ VERSION_MIN..=VERSION_END) => match (at_ms, &rounds, &orders, &events) {
            (Some(at_ms), Some(rounds), Some(orders), Some(events)) => {
                entry(id, version, at_ms, rounds, orders, events)
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
    version: u8,
    at_ms: i64,
    rounds: &[(RoundId, Counters)],
    orders: &[u8],
    events: &[u8],
) -> Result<Entry, EntryError> {
    let damaged = |what: &str| EntryError::Malformed(format!("{what} damaged"));
    let round = |index: u8| rounds.get(usize::from(index)).map(|(round, _)| *round);
    let orders = all(orders, acceptance_bytes(version), Unpack::acceptance)
        .ok_or_else(|| damaged("orders"))?
        .into_iter()
        .map(|(index, order)| (round(index) == Some(order.round)).then_some(order))
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| damaged("an order's round"))?;
    let mut changes = Vec::new();
    for (index, mut event) in
        all(events, EVENT_BYTES, Unpack::event).ok_or_else(|| damaged("events"))?
    {
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
