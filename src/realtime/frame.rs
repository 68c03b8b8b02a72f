//! A frame: what subscribers of a sale are told at once, encoded once for all of them.

use std::{fmt, time::Instant};

use bytes::Bytes;
use chrono::{DateTime, SecondsFormat};
use serde::Serialize;
use utoipa::ToSchema;

use crate::{
    domain::{
        id::{Epoch, SaleId},
        round::{State, Window},
    },
    engine::Standing,
};

/// Where a frame stands among all frames of its sale, across rounds and epochs.
///
/// Written as text, ids compare as they do here: letter by letter, or number by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FrameId {
    epoch: Epoch,
    round: u32,
    seq: u64,
    /// The passing of time takes no seq: 0 before the window, 1 inside it, 2 after it.
    phase: u8,
}

impl FrameId {
    /// The id of what `standing` says.
    pub fn of(standing: &Standing) -> Self {
        Self {
            epoch: standing.epoch,
            round: standing.round.round,
            seq: standing.counters.seq,
            phase: match standing.state {
                State::Scheduled => 0,
                State::Open | State::Paused => 1,
                State::Closed => 2,
            },
        }
    }

    /// Reads what a client sends back as `Last-Event-ID`; `None` when it is no id of ours.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('-');
        let id = Self {
            epoch: Epoch(parts.next()?.parse().ok()?),
            round: parts.next()?.parse().ok()?,
            seq: parts.next()?.parse().ok()?,
            phase: parts.next()?.parse().ok()?,
        };
        // Only the one way of writing it is an id: `+1` and `01` are none.
        (id.to_string() == text).then_some(id)
    }
}

impl fmt::Display for FrameId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            epoch,
            round,
            seq,
            phase,
        } = self;
        write!(f, "{:010}-{round:010}-{seq:015}-{phase}", epoch.0)
    }
}

/// The live stock of a sale at an instant: the `data` of each event.
#[derive(Serialize, ToSchema)]
pub struct Stock {
    /// Which sale.
    #[schema(value_type = uuid::Uuid)]
    sale_id: SaleId,
    /// Which running of it: 1, 2, 3 ….
    round: u32,
    /// `scheduled`, `open`, `paused` or `closed`.
    #[schema(example = "open")]
    state: &'static str,
    /// Whether nothing is left.
    sold_out: bool,
    /// Units given to the round so far.
    allocation: u64,
    /// Units to be had.
    remaining: u64,
    /// Units of orders that wait for their payment.
    held: u64,
    /// Units of confirmed orders.
    sold: u64,
    /// The number of the round's last event.
    seq: u64,
    /// When the round opens.
    #[schema(value_type = String, format = DateTime, example = "2026-11-27T09:00:00.000Z")]
    opens_at: String,
    /// When it closes, if it does by itself.
    #[schema(value_type = Option<String>, format = DateTime)]
    closes_at: Option<String>,
    /// When that was so: milliseconds since the Unix epoch by the clock that decides.
    server_time_ms: i64,
}

/// What an event is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// The first that a subscriber gets of a sale.
    Snapshot,
    /// State, round, `sold_out` or window changed since the last one.
    State,
    /// Only numbers changed.
    Stock,
}

/// What makes an event a `state`: round, state, sold out, window.
pub(super) type Look = (u32, State, bool, Window);

/// A piece of a stream, framed as a chunk of HTTP/1.1, so that it is framed once for everybody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    chunk: Bytes,
    /// The length of the chunk's head.
    head: usize,
}

/// What ends a chunk.
const CHUNK_END: &str = "\r\n";

impl Piece {
    /// A piece of its own.
    pub(super) fn of(text: &str) -> Self {
        let (chunk, head) = chunk(text);
        Self {
            chunk: chunk.into(),
            head,
        }
    }

    /// A chunk that is framed already, behind a head of this length.
    pub(super) const fn framed(chunk: &'static [u8], head: usize) -> Self {
        Self {
            chunk: Bytes::from_static(chunk),
            head,
        }
    }

    /// As it is sent with `Transfer-Encoding: chunked`.
    pub fn chunk(&self) -> &Bytes {
        &self.chunk
    }

    /// Without framing; shared, not copied.
    pub fn text(&self) -> Bytes {
        let end = self.chunk.len() - CHUNK_END.len();
        self.chunk.slice(self.head..end)
    }
}

/// A text as a chunk, and the length of the chunk's head.
fn chunk(text: &str) -> (String, usize) {
    let head = format!("{:x}\r\n", text.len());
    (format!("{head}{text}{CHUNK_END}"), head.len())
}

/// As the API writes instants.
pub(super) fn instant(ms: i64) -> String {
    let at = DateTime::from_timestamp_millis(ms).unwrap_or_default();
    at.to_rfc3339_opts(SecondsFormat::Millis, true)
}

/// What subscribers of a sale are told, in every form.
#[derive(Clone, Debug)]
pub(super) struct Frame {
    /// Of which sale.
    pub(super) sale: SaleId,
    /// Its place.
    pub(super) id: FrameId,
    /// What makes an event a `state`.
    pub(super) look: Look,
    /// When it was made.
    pub(super) made_at: Instant,
    /// All forms, one behind the other.
    text: Bytes,
    /// Where each form ends in it, and the length of its chunk's head.
    forms: [(usize, usize); 3],
}

impl Frame {
    /// Encodes `standing`.
    pub(super) fn encode(sale: SaleId, standing: &Standing, made_at: Instant) -> Self {
        let (id, counters) = (FrameId::of(standing), standing.counters);
        let sold_out = standing.sold_out();
        let look = (
            standing.round.round,
            standing.state,
            sold_out,
            standing.window,
        );
        let stock = Stock {
            sale_id: sale,
            round: standing.round.round,
            state: standing.state.as_str(),
            sold_out,
            allocation: counters.allocation,
            remaining: counters.remaining,
            held: counters.held,
            sold: counters.sold,
            seq: counters.seq,
            opens_at: instant(standing.window.opens_at_ms),
            closes_at: standing.window.closes_at_ms.map(instant),
            server_time_ms: standing.now_ms,
        };
        // Numbers, words and an id always have a JSON form.
        let data = serde_json::to_string(&stock).unwrap_or_default();
        let rest = format!("id: {id}\ndata: {data}\n\n");
        let mut text = String::new();
        let forms = ["snapshot", "state", "stock"].map(|name| {
            let (chunk, head) = chunk(&format!("event: {name}\n{rest}"));
            text.push_str(&chunk);
            (text.len(), head)
        });
        Self {
            sale,
            id,
            look,
            made_at,
            text: text.into(),
            forms,
        }
    }

    /// The event in this form; shared, not copied.
    pub(super) fn form(&self, form: Form) -> Piece {
        let [snapshot, state, stock] = self.forms;
        let (begin, (end, head)) = match form {
            Form::Snapshot => (0, snapshot),
            Form::State => (snapshot.0, state),
            Form::Stock => (state.0, stock),
        };
        Piece {
            chunk: self.text.slice(begin..end),
            head,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeSet;

    use uuid::Uuid;

    use super::*;
    use crate::domain::{
        id::{RoundId, SaleNumber},
        round::{Counters, Intent},
    };

    pub(in crate::realtime) const SALE: SaleId = SaleId(Uuid::from_u128(0xa));

    /// A standing of an open round of 10 units after `seq` acceptances of one.
    pub(in crate::realtime) fn standing(epoch: u32, round: u32, seq: u64) -> Standing {
        Standing {
            round: RoundId {
                sale: SaleNumber(7),
                round,
            },
            epoch: Epoch(epoch),
            counters: Counters {
                allocation: 10,
                remaining: 10 - seq,
                held: 0,
                sold: seq,
                seq,
            },
            intent: Intent::Live,
            state: State::Open,
            window: Window {
                opens_at_ms: 1_000,
                closes_at_ms: None,
            },
            per_order_limit: 1,
            orders: seq,
            archived_rounds: 0,
            waiting: 0,
            now_ms: 2_000 + seq.cast_signed(),
        }
    }

    #[test]
    fn ids_order_frames_across_rounds_and_epochs_also_as_text() {
        let at = |state, standing| Standing { state, ..standing };
        let frames = [
            at(State::Scheduled, standing(1, 1, 0)),
            at(State::Open, standing(1, 1, 0)),
            at(State::Open, standing(1, 1, 1)),
            at(State::Paused, standing(1, 1, 2)),
            at(State::Open, standing(1, 1, 10)),
            at(State::Closed, standing(1, 1, 10)),
            at(State::Scheduled, standing(1, 2, 0)),
            at(State::Open, standing(1, 10, 0)),
            at(State::Open, standing(2, 10, 0)),
            at(State::Open, standing(16, 1, 3)),
        ];
        let ids: Vec<_> = frames.iter().map(FrameId::of).collect();
        let texts: Vec<_> = ids.iter().map(ToString::to_string).collect();
        assert!(ids.is_sorted_by(|a, b| a < b), "{ids:?}");
        assert!(texts.is_sorted_by(|a, b| a < b), "{texts:?}");
        assert_eq!(texts[4], "0000000001-0000000001-000000000000010-1");
        for (id, text) in ids.iter().zip(&texts) {
            assert_eq!(FrameId::parse(text), Some(*id));
        }
        for bad in [
            "",
            "1-1-1-1",
            "x",
            "0000000001-0000000001-000000000000010-1-",
            "0000000001-0000000001-000000000000010-x",
        ] {
            assert_eq!(FrameId::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_frame_is_one_line_of_json_in_three_forms() {
        let frame = Frame::encode(SALE, &standing(3, 2, 10), Instant::now());
        let mut datas = BTreeSet::new();
        for (form, name) in [
            (Form::Snapshot, "snapshot"),
            (Form::State, "state"),
            (Form::Stock, "stock"),
        ] {
            let piece = frame.form(form);
            let text = String::from_utf8(piece.text().to_vec()).unwrap();
            assert_eq!(piece, Piece::of(&text));
            let chunk = format!("{:x}\r\n{text}\r\n", text.len());
            assert_eq!(piece.chunk(), chunk.as_bytes());
            let head =
                format!("event: {name}\nid: 0000000003-0000000002-000000000000010-1\ndata: ");
            let data = text.strip_prefix(&head).expect(&text);
            datas.insert(data.strip_suffix("\n\n").expect(data).to_owned());
        }
        let data = datas.pop_first().unwrap();
        assert!(datas.is_empty() && !data.contains('\n'));
        let data: serde_json::Value = serde_json::from_str(&data).unwrap();
        let expected = serde_json::json!({
            "sale_id": SALE, "round": 2, "state": "open", "sold_out": true, "allocation": 10,
            "remaining": 0, "held": 0, "sold": 10, "seq": 10,
            "opens_at": "1970-01-01T00:00:01.000Z", "closes_at": null, "server_time_ms": 2_010
        });
        assert_eq!(data, expected);
    }
}
