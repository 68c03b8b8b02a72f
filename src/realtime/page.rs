//! What subscribers look at: the latest frame of a sale, or of many.

use std::collections::{BTreeMap, HashMap};

use super::frame::{Form, Frame, FrameId, Piece};
use crate::domain::{id::SaleId, round::State};

/// The comment that keeps a silent connection open.
pub(super) const HEARTBEAT: Piece = Piece::framed(b"3\r\n:\n\n\r\n", 3);

/// The latest frame of each sale, shared by all who look at it.
///
/// Every change gets a turn: 1, 2, 3 …. A subscriber only keeps up to which turn it has seen, so
/// that whoever is slow skips what has been overtaken and still ends on the last value.
#[derive(Debug, Default)]
pub(super) struct Page {
    turn: u64,
    heartbeats: u64,
    entries: BTreeMap<u64, Entry>,
    turns: HashMap<SaleId, u64>,
}

#[derive(Debug)]
struct Entry {
    frame: Frame,
    /// The turn at which the sale came onto the page.
    appeared: u64,
    /// The turn at which state, round or sold out last changed.
    looked_so: u64,
    /// Whether it is only here for those who have not seen its last change yet.
    retired: bool,
}

/// What a subscriber has seen of a page.
#[derive(Debug, Default)]
pub(super) struct Cursor {
    /// Everything up to this turn.
    base: u64,
    /// What it is at, on its way from `base` to the last turn.
    at: u64,
    heartbeats: u64,
}

impl Page {
    /// Puts a frame in the place of its sale's last one. Returns whether subscribers must be told.
    ///
    /// A frame that is older than the last one is dropped. One that says the same takes its place
    /// for those who come later, because its clock is fresher.
    pub(super) fn show(&mut self, frame: Frame) -> bool {
        let next = self.turn + 1;
        let mut entry = Entry {
            frame,
            appeared: next,
            looked_so: next,
            retired: false,
        };
        if let Some(turn) = self.turns.get(&entry.frame.sale)
            && let Some(last) = self.entries.get_mut(turn)
        {
            if entry.frame.id < last.frame.id {
                return false;
            }
            if entry.frame.id == last.frame.id {
                last.frame = entry.frame;
                return false;
            }
            entry.appeared = last.appeared;
            if entry.frame.look == last.frame.look {
                entry.looked_so = last.looked_so;
            }
            self.entries.remove(turn);
        }
        self.turn = next;
        self.turns.insert(entry.frame.sale, next);
        self.entries.insert(next, entry);
        true
    }

    /// Hides a sale from those who have not seen it yet; the others still get its last change.
    pub(super) fn retire(&mut self, sale: SaleId) {
        if let Some(turn) = self.turns.get(&sale)
            && let Some(entry) = self.entries.get_mut(turn)
        {
            entry.retired = true;
        }
    }

    /// Takes a sale off.
    pub(super) fn remove(&mut self, sale: SaleId) {
        if let Some(turn) = self.turns.remove(&sale) {
            self.entries.remove(&turn);
        }
    }

    /// Takes everything off. Turns go on, so that no subscriber takes a new one for a seen one.
    pub(super) fn clear(&mut self) {
        self.entries.clear();
        self.turns.clear();
    }

    /// Tells all subscribers that the connection is alive.
    pub(super) fn beat(&mut self) {
        self.heartbeats += 1;
    }

    /// The frame that changed last.
    pub(super) fn newest(&self) -> Option<&Frame> {
        let (_, entry) = self.entries.last_key_value()?;
        Some(&entry.frame)
    }

    /// The id of the frame that changed last.
    pub(super) fn newest_id(&self) -> Option<FrameId> {
        self.newest().map(|frame| frame.id)
    }

    /// Whether the sale is on the page.
    pub(super) fn has(&self, sale: SaleId) -> bool {
        self.turns.contains_key(&sale)
    }

    /// Where somebody starts who looks for the first time: no heartbeat is due yet.
    pub(super) fn start(&self) -> Cursor {
        Cursor {
            heartbeats: self.heartbeats,
            ..Cursor::default()
        }
    }

    /// The next event for a subscriber; `None` when it has seen everything.
    pub(super) fn next(&self, cursor: &mut Cursor) -> Option<Piece> {
        for (turn, entry) in self.entries.range(cursor.at + 1..) {
            cursor.at = *turn;
            let form = if entry.appeared > cursor.base {
                if entry.retired {
                    continue;
                }
                Form::Snapshot
            } else if entry.looked_so > cursor.base {
                Form::State
            } else {
                Form::Stock
            };
            return Some(entry.frame.form(form));
        }
        (cursor.base, cursor.at) = (self.turn, self.turn);
        let beaten = std::mem::replace(&mut cursor.heartbeats, self.heartbeats);
        (beaten != self.heartbeats).then_some(HEARTBEAT)
    }
}

impl Frame {
    /// Whether the round will not sell again.
    pub(super) fn is_closed(&self) -> bool {
        self.look.1 == State::Closed
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use uuid::Uuid;

    use super::*;
    use crate::{
        engine::Standing,
        realtime::frame::tests::{SALE, standing},
    };

    const OTHER: SaleId = SaleId(Uuid::from_u128(0xb));

    fn frame(sale: SaleId, standing: Standing) -> Frame {
        Frame::encode(sale, &standing, Instant::now())
    }

    /// What a subscriber gets until it has seen everything: names and remaining units.
    fn drain(page: &Page, cursor: &mut Cursor) -> Vec<String> {
        std::iter::from_fn(|| page.next(cursor))
            .map(|event| {
                let text = String::from_utf8(event.text().to_vec()).unwrap();
                let Some((head, data)) = text.split_once("data: ") else {
                    return text;
                };
                let name = head.lines().next().unwrap().replace("event: ", "");
                let data: serde_json::Value = serde_json::from_str(data).unwrap();
                let sale = data["sale_id"].as_str().unwrap().chars().last().unwrap();
                format!("{name} {sale} {}", data["remaining"])
            })
            .collect()
    }

    #[test]
    fn a_subscriber_gets_a_snapshot_then_changes_named_after_what_changed() {
        let mut page = Page::default();
        assert!(page.show(frame(SALE, standing(1, 1, 0))));
        let mut cursor = page.start();
        assert_eq!(drain(&page, &mut cursor), ["snapshot a 10"]);
        assert!(page.show(frame(SALE, standing(1, 1, 1))));
        assert_eq!(drain(&page, &mut cursor), ["stock a 9"]);
        let paused = Standing {
            state: State::Paused,
            ..standing(1, 1, 2)
        };
        assert!(page.show(frame(SALE, paused)));
        assert_eq!(drain(&page, &mut cursor), ["state a 8"]);
        assert!(page.show(frame(SALE, standing(1, 1, 9))));
        assert_eq!(drain(&page, &mut cursor), ["state a 1"]);
        assert!(page.show(frame(SALE, standing(1, 1, 10))));
        assert_eq!(drain(&page, &mut cursor), ["state a 0"], "sold out");
        assert!(page.show(frame(SALE, standing(1, 2, 0))));
        assert_eq!(drain(&page, &mut cursor), ["state a 10"], "a new round");
        assert_eq!(drain(&page, &mut cursor), Vec::<String>::new());
    }

    #[test]
    fn whoever_is_slow_skips_to_the_last_value_and_learns_of_the_state_on_the_way() {
        let mut page = Page::default();
        page.show(frame(SALE, standing(1, 1, 0)));
        let mut cursor = page.start();
        drain(&page, &mut cursor);
        for seq in 1..=10 {
            page.show(frame(SALE, standing(1, 1, seq)));
        }
        assert_eq!(drain(&page, &mut cursor), ["state a 0"]);
    }

    #[test]
    fn older_frames_are_dropped_and_equal_ones_tell_nobody() {
        let mut page = Page::default();
        page.show(frame(SALE, standing(2, 1, 3)));
        let mut cursor = page.start();
        drain(&page, &mut cursor);
        assert!(!page.show(frame(SALE, standing(2, 1, 2))), "late news");
        assert!(!page.show(frame(SALE, standing(1, 1, 9))), "an older epoch");
        let later = Standing {
            now_ms: 9_999,
            ..standing(2, 1, 3)
        };
        assert!(!page.show(frame(SALE, later)));
        assert_eq!(drain(&page, &mut cursor), Vec::<String>::new());
        let event = page.next(&mut page.start()).unwrap();
        let event = String::from_utf8(event.text().to_vec()).unwrap();
        assert!(event.contains("\"server_time_ms\":9999"), "{event}");
    }

    #[test]
    fn many_sales_come_and_go_and_nobody_misses_the_last_change_of_one() {
        let mut page = Page::default();
        page.show(frame(SALE, standing(1, 1, 0)));
        let (mut quick, mut slow) = (page.start(), page.start());
        assert_eq!(drain(&page, &mut quick), ["snapshot a 10"]);
        assert_eq!(drain(&page, &mut slow), ["snapshot a 10"]);
        page.show(frame(OTHER, standing(1, 1, 1)));
        assert_eq!(drain(&page, &mut quick), ["snapshot b 9"]);
        let closed = Standing {
            state: State::Closed,
            ..standing(1, 1, 2)
        };
        page.show(frame(SALE, closed));
        page.retire(SALE);
        page.show(frame(OTHER, standing(1, 1, 2)));
        assert_eq!(drain(&page, &mut quick), ["state a 8", "stock b 8"]);
        assert_eq!(drain(&page, &mut slow), ["state a 8", "snapshot b 8"]);
        let mut newcomer = page.start();
        assert_eq!(drain(&page, &mut newcomer), ["snapshot b 8"]);
        page.remove(SALE);
        assert!(!page.has(SALE) && page.has(OTHER));
        page.clear();
        page.show(frame(OTHER, standing(1, 1, 3)));
        assert_eq!(drain(&page, &mut newcomer), ["snapshot b 7"]);
    }

    #[test]
    fn a_change_in_the_middle_of_catching_up_keeps_the_names_right() {
        let mut page = Page::default();
        page.show(frame(SALE, standing(1, 1, 0)));
        page.show(frame(OTHER, standing(1, 1, 0)));
        let mut cursor = page.start();
        let first = page.next(&mut cursor).unwrap();
        assert!(first.text().starts_with(b"event: snapshot"));
        // The one that it has seen changes, and so does the one that it has not.
        page.show(frame(OTHER, standing(1, 1, 1)));
        page.show(frame(SALE, standing(1, 1, 1)));
        let rest = drain(&page, &mut cursor);
        assert_eq!(rest, ["snapshot b 9", "snapshot a 9"]);
    }

    #[test]
    fn heartbeats_reach_those_who_were_there() {
        let mut page = Page::default();
        let mut early = page.start();
        page.beat();
        let mut late = page.start();
        assert_eq!(drain(&page, &mut early), [":\n\n"]);
        assert_eq!(drain(&page, &mut late), Vec::<String>::new());
        assert_eq!(drain(&page, &mut early), Vec::<String>::new());
    }
}
