//! When a sale's next frame goes out: the pure part of live stock.

use std::time::{Duration, Instant};

use super::frame::{Frame, FrameId};
use crate::{domain::id::SaleId, engine::Standing, faults};

/// The latest that is known of a sale, and what of it has been told.
///
/// At most one frame per interval: a change is due at once if the last frame is older than that,
/// otherwise it waits, and whatever comes meanwhile takes its place. So the last value always goes
/// out, and the cost does not grow with the rate of changes.
#[derive(Debug)]
pub(super) struct Latest {
    sale: SaleId,
    /// The last frame: its id and when it was due.
    told: Option<(FrameId, Instant)>,
    /// When a frame was last encoded.
    encoded_at: Option<Instant>,
    waiting: Option<Standing>,
}

impl Latest {
    pub(super) fn new(sale: SaleId) -> Self {
        Self {
            sale,
            told: None,
            encoded_at: None,
            waiting: None,
        }
    }

    /// Takes what a reply said, in any order of replies. A change waits until it is flushed. What
    /// is returned is to be shown now and tells nobody anything new: the first frame of all, or
    /// the last one with a fresher clock, for those who connect later.
    pub(super) fn offer(
        &mut self,
        standing: &Standing,
        now: Instant,
        interval: Duration,
    ) -> Option<Frame> {
        let id = FrameId::of(standing);
        match self.told {
            None => Some(self.tell(standing, now)),
            Some((told, _)) if id < told => None,
            Some((told, _)) if id == told => {
                let aged = self.encoded_at.is_none_or(|at| now >= at + interval / 2);
                aged.then(|| self.encode(standing, now))
            }
            Some(_) => {
                let newer = |waiting: &Standing| FrameId::of(waiting) <= id;
                if self.waiting.as_ref().is_none_or(newer) {
                    self.waiting = Some(*standing);
                }
                None
            }
        }
    }

    /// When what waits may go out; `None` when nothing waits.
    pub(super) fn due(&self, interval: Duration) -> Option<Instant> {
        self.waiting.as_ref()?;
        self.told.map(|(_, told_at)| told_at + interval)
    }

    /// The frame of what waits, if it may go out now.
    pub(super) fn flush(&mut self, now: Instant, interval: Duration) -> Option<Frame> {
        if self.due(interval)? > now || faults::bug("last_frame_lost") {
            return None;
        }
        let standing = self.waiting.take()?;
        Some(self.tell(&standing, now))
    }

    fn tell(&mut self, standing: &Standing, now: Instant) -> Frame {
        self.told = Some((FrameId::of(standing), now));
        self.encode(standing, now)
    }

    fn encode(&mut self, standing: &Standing, now: Instant) -> Frame {
        self.encoded_at = Some(now);
        Frame::encode(self.sale, standing, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        domain::round::State,
        realtime::{
            frame::tests::{SALE, standing},
            pace::FRAME_INTERVAL_MIN as INTERVAL,
        },
    };

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// What is shown after a reply, if anything.
    fn offer(
        latest: &mut Latest,
        standing: &Standing,
        now: Instant,
        interval: Duration,
    ) -> Option<Frame> {
        let frame = latest.offer(standing, now, interval);
        frame.or_else(|| latest.flush(now, interval))
    }

    #[test]
    fn the_first_change_goes_out_at_once_and_the_next_ones_wait_for_their_interval() {
        let start = Instant::now();
        let mut latest = Latest::new(SALE);
        let seq = |seq| standing(1, 1, seq);
        assert!(offer(&mut latest, &seq(0), start, INTERVAL).is_some());
        for (at, seq) in [(10, 2), (20, 1), (30, 3)] {
            let offered = offer(&mut latest, &standing(1, 1, seq), start + ms(at), INTERVAL);
            assert!(offered.is_none());
        }
        assert_eq!(latest.due(INTERVAL), Some(start + ms(100)));
        assert!(latest.flush(start + ms(99), INTERVAL).is_none());
        let frame = latest.flush(start + ms(100), INTERVAL).unwrap();
        assert_eq!(frame.id, FrameId::of(&seq(3)), "the last value");
        assert_eq!(latest.due(INTERVAL), None);
        assert!(latest.flush(start + ms(500), INTERVAL).is_none());
        assert!(offer(&mut latest, &seq(4), start + ms(500), INTERVAL).is_some());
    }

    #[test]
    fn a_million_changes_in_a_second_are_ten_frames_and_the_last_one_is_told() {
        let start = Instant::now();
        let mut latest = Latest::new(SALE);
        let mut frames = Vec::new();
        let changing = |micros: u64| Standing {
            counters: crate::domain::round::Counters {
                seq: micros,
                ..standing(1, 1, 0).counters
            },
            ..standing(1, 1, 0)
        };
        for micros in (0..1_000_000).step_by(100) {
            let now = start + Duration::from_micros(micros);
            frames.extend(latest.flush(now, INTERVAL));
            frames.extend(offer(&mut latest, &changing(micros), now, INTERVAL));
        }
        assert_eq!(frames.len(), 10);
        frames.extend(latest.flush(start + ms(1_000), INTERVAL));
        let last = frames.last().unwrap();
        assert_eq!(last.id, FrameId::of(&changing(999_900)));
        assert!(frames.is_sorted_by(|a, b| a.id < b.id && b.made_at - a.made_at >= INTERVAL));
    }

    #[test]
    fn what_is_late_or_from_an_older_epoch_is_never_told() {
        let start = Instant::now();
        let mut latest = Latest::new(SALE);
        assert!(offer(&mut latest, &standing(2, 1, 5), start, INTERVAL).is_some());
        for late in [standing(2, 1, 4), standing(1, 1, 9), standing(1, 2, 9)] {
            assert!(offer(&mut latest, &late, start + ms(500), INTERVAL).is_none());
        }
        assert_eq!(latest.due(INTERVAL), None);
        // Nor does it take the place of what waits.
        assert!(offer(&mut latest, &standing(2, 1, 6), start, INTERVAL).is_none());
        let newer = offer(&mut latest, &standing(2, 1, 8), start, INTERVAL);
        let older = offer(&mut latest, &standing(2, 1, 7), start + ms(200), INTERVAL);
        assert!(newer.is_none());
        assert_eq!(older.unwrap().id, FrameId::of(&standing(2, 1, 8)));
    }

    #[test]
    fn the_passing_of_time_is_a_change_and_standing_still_is_only_a_fresher_clock() {
        let start = Instant::now();
        let mut latest = Latest::new(SALE);
        let scheduled = Standing {
            state: State::Scheduled,
            ..standing(1, 1, 0)
        };
        let first = offer(&mut latest, &scheduled, start, INTERVAL).unwrap();
        let same = Standing {
            now_ms: scheduled.now_ms + 100,
            ..scheduled
        };
        assert!(offer(&mut latest, &same, start + ms(1), INTERVAL).is_none());
        let again = offer(&mut latest, &same, start + ms(100), INTERVAL).unwrap();
        assert_eq!(again.id, first.id);
        // It was no change, so the opening need not wait for it.
        let open = standing(1, 1, 0);
        let opened = offer(&mut latest, &open, start + ms(101), INTERVAL).unwrap();
        assert!(opened.id > first.id);
    }
}
