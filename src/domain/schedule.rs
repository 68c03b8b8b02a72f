//! When the rounds of a sale open: again and again by a cron expression, or in listed windows.
//!
//! An opening is a time of the wall clock in the schedule's zone, and each happens once: one that
//! falls into the hour that is skipped in spring happens when that hour is over, and one in the
//! hour that is repeated in autumn happens the first time. Durations are time that passes. A window
//! ends when the next one opens, at the latest.

use std::str::FromStr;

use chrono::{DateTime, MappedLocalTime, NaiveDate, NaiveDateTime, SecondsFormat, TimeZone, Utc};
use chrono_tz::{GapInfo, Tz};
use croner::{
    Cron,
    errors::CronError,
    parser::{CronParser, Year},
};
use serde::{Deserialize, Serialize};

use super::{
    limits::{ROUNDS_AHEAD_MAX, ROUNDS_AHEAD_MS, SCHEDULE_SECONDS_MAX, SCHEDULE_WINDOWS_MAX},
    round::Window,
};

/// Openings that are looked at when a schedule is checked for windows that overlap: at least a
/// year of daily ones.
const CHECKED_OPENINGS: usize = 1_000;

/// Missed windows that one turn takes on: it is one transaction.
const MISSED_MAX: usize = 1_000;

/// The longest cron expression, in characters.
const CRON_CHARACTERS_MAX: usize = 200;

/// Why a schedule is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// It is no cron expression.
    #[error("is no cron expression like 0 18 * * FRI: {0}")]
    Cron(String),
    /// No time matches.
    #[error("never happens: no date matches")]
    Never,
    /// There is no such time zone.
    #[error("must be a time zone like Europe/Berlin or UTC")]
    Zone,
    /// Out of bounds.
    #[error("must be 1 to {SCHEDULE_SECONDS_MAX} seconds")]
    Duration,
    /// Out of bounds.
    #[error("must be 1 to 2147483647")]
    Rounds,
    /// It ends before it starts.
    #[error("must be later than starts_on")]
    Until,
    /// It opens again before it has closed.
    #[error("opens again after {0} seconds: a window must be over before the next one opens")]
    Overlap(i64),
    /// A window without any time in it.
    #[error("must be later than opens_at")]
    Empty(usize),
    /// A window that begins before the one before it is over.
    #[error("must not be earlier than closes_at of the window before it")]
    Order(usize),
    /// No window or too many.
    #[error("must be 1 to {SCHEDULE_WINDOWS_MAX} windows")]
    Count,
}

/// The first or the last day of a schedule, in its zone, or the instant itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Bound {
    /// A day.
    Day(NaiveDate),
    /// An instant.
    At(DateTime<Utc>),
}

impl TryFrom<String> for Bound {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        if let Ok(day) = NaiveDate::parse_from_str(&text, "%Y-%m-%d") {
            return Ok(Self::Day(day));
        }
        let instant = DateTime::parse_from_rfc3339(&text);
        instant
            .map(|instant| Self::At(instant.to_utc()))
            .map_err(|_| "must be a day like 2026-11-27 or a timestamp like 2026-11-27T09:00:00Z")
    }
}

impl From<Bound> for String {
    fn from(bound: Bound) -> Self {
        match bound {
            Bound::Day(day) => day.to_string(),
            Bound::At(at) => at.to_rfc3339_opts(SecondsFormat::Millis, true),
        }
    }
}

/// When the rounds of a sale open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Form", into = "Form")]
pub enum Schedule {
    /// Again and again.
    Recurring(Box<Recurring>),
    /// In these windows, in order.
    Windows(Vec<Window>),
}

/// A window that opens whenever a cron expression matches.
#[derive(Clone, Debug)]
pub struct Recurring {
    form: RecurringForm,
    cron: Cron,
    zone: Tz,
    /// Openings are not before this instant, if there is one.
    from_ms: Option<i64>,
    /// And before this one.
    before_ms: Option<i64>,
}

impl PartialEq for Recurring {
    fn eq(&self, other: &Self) -> bool {
        self.form == other.form
    }
}

impl Eq for Recurring {}

/// A recurring schedule as it is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecurringForm {
    /// Five fields, or six with seconds first.
    pub cron: String,
    /// Whose wall clock: a name of the IANA database.
    pub time_zone: String,
    /// How long each window is open.
    pub duration_seconds: u64,
    /// No opening before it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub starts_on: Option<Bound>,
    /// No opening after this day, or from this instant on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until: Option<Bound>,
    /// So many openings at most, missed ones included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rounds: Option<u32>,
}

/// A schedule as it is stored.
#[derive(Clone, Serialize, Deserialize)]
#[serde(untagged)]
enum Form {
    Recurring(RecurringForm),
    /// Pairs of instants, milliseconds since the Unix epoch.
    Windows {
        windows: Vec<(i64, i64)>,
    },
}

impl TryFrom<Form> for Schedule {
    type Error = ScheduleError;

    fn try_from(form: Form) -> Result<Self, ScheduleError> {
        match form {
            Form::Recurring(form) => Recurring::new(form).map(Self::from),
            Form::Windows { windows } => {
                let windows = windows
                    .into_iter()
                    .map(|(opens_at_ms, closes_at_ms)| Window {
                        opens_at_ms,
                        closes_at_ms: Some(closes_at_ms),
                    });
                Self::windows(windows.collect())
            }
        }
    }
}

impl From<Recurring> for Schedule {
    fn from(recurring: Recurring) -> Self {
        Self::Recurring(Box::new(recurring))
    }
}

impl From<Schedule> for Form {
    fn from(schedule: Schedule) -> Self {
        match schedule {
            Schedule::Recurring(recurring) => Self::Recurring(recurring.form),
            Schedule::Windows(windows) => Self::Windows {
                windows: windows
                    .into_iter()
                    .map(|window| (window.opens_at_ms, end_of(window)))
                    .collect(),
            },
        }
    }
}

/// How far a schedule has been carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Windows that open up to this instant have been dealt with, milliseconds since the Unix epoch.
    pub until_ms: i64,
    /// So many of them.
    pub windows: u32,
}

impl Schedule {
    /// A list of windows, each of which has an end.
    ///
    /// # Errors
    /// [`ScheduleError`]; it says which window.
    pub fn windows(windows: Vec<Window>) -> Result<Self, ScheduleError> {
        if !(1..=SCHEDULE_WINDOWS_MAX).contains(&windows.len()) {
            return Err(ScheduleError::Count);
        }
        let mut open_until_ms = i64::MIN;
        for (index, window) in windows.iter().enumerate() {
            if end_of(*window) <= window.opens_at_ms {
                return Err(ScheduleError::Empty(index));
            }
            if window.opens_at_ms < open_until_ms {
                return Err(ScheduleError::Order(index));
            }
            open_until_ms = end_of(*window);
        }
        Ok(Self::Windows(windows))
    }

    /// The first window after what has been dealt with; `None` when there is none any more. It
    /// always has an end, and the one after it does not open before that.
    pub fn next(&self, progress: Progress) -> Option<Window> {
        match self {
            Self::Windows(windows) => {
                let next = windows.partition_point(|w| w.opens_at_ms <= progress.until_ms);
                windows.get(next).copied()
            }
            Self::Recurring(recurring) => {
                let limit = recurring.form.rounds.unwrap_or(u32::MAX);
                (progress.windows < limit)
                    .then(|| recurring.next(progress.until_ms))
                    .flatten()
            }
        }
    }

    /// The windows after what has been dealt with, in order.
    pub fn following(&self, progress: Progress) -> impl Iterator<Item = Window> {
        let mut progress = progress;
        std::iter::from_fn(move || {
            let window = self.next(progress)?;
            progress.until_ms = window.opens_at_ms;
            progress.windows += 1;
            Some(window)
        })
    }

    /// Whether nothing of it lies before this window: of listed windows the first one.
    pub fn begins_with(&self, window: Window) -> bool {
        match self {
            Self::Windows(windows) => windows.first() == Some(&window),
            Self::Recurring(_) => true,
        }
    }

    /// Where a sale that is made now begins: recurring windows are those that open from now on, of
    /// listed ones also the one that is open now. `None` when no window is left.
    pub fn first(&self, now_ms: i64) -> Option<Window> {
        let until_ms = match self {
            Self::Recurring(_) => now_ms - 1,
            Self::Windows(windows) => {
                let over = windows.iter().rfind(|window| end_of(**window) <= now_ms);
                over.map_or(i64::MIN, |window| window.opens_at_ms)
            }
        };
        self.next(Progress {
            until_ms,
            windows: 0,
        })
    }
}

/// What is to be done for a sale with a schedule at an instant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Windows that are over without a round.
    pub missed: Vec<Window>,
    /// Windows that get their round now, in order.
    pub made: Vec<Window>,
    /// How far the schedule has been carried out then.
    pub progress: Progress,
    /// When something is to be done next; `None` when the schedule is over.
    pub again_at_ms: Option<i64>,
}

impl Turn {
    /// Decides what is to be done at `now_ms`: rounds are made for windows that are open, for the
    /// next one, and for those that open soon. `rounds` are the windows of the rounds that there
    /// are and that may not be over.
    pub fn at(schedule: &Schedule, progress: Progress, rounds: &[Window], now_ms: i64) -> Self {
        let mut turn = Self {
            missed: Vec::new(),
            made: Vec::new(),
            progress,
            again_at_ms: None,
        };
        let to_come = |window: &&Window| window.opens_at_ms > now_ms;
        let mut ahead = rounds.iter().filter(to_come).count();
        for window in schedule.following(progress) {
            let soon = window.opens_at_ms - ROUNDS_AHEAD_MS;
            if end_of(window) <= now_ms {
                if turn.missed.len() == MISSED_MAX {
                    turn.again_at_ms = Some(now_ms);
                    return turn;
                }
                turn.missed.push(window);
            } else if window.opens_at_ms <= now_ms
                || ahead == 0
                || (ahead < ROUNDS_AHEAD_MAX && soon <= now_ms)
            {
                turn.made.push(window);
            } else {
                turn.again_at_ms = (ahead < ROUNDS_AHEAD_MAX).then_some(soon);
                break;
            }
            ahead += usize::from(window.opens_at_ms > now_ms);
            turn.progress.until_ms = window.opens_at_ms;
            turn.progress.windows += 1;
        }
        // Each opening and each end moves the sale on.
        let instants = rounds.iter().chain(&turn.made);
        let instants = instants.flat_map(|window| [window.opens_at_ms, end_of(*window)]);
        let moves = instants.filter(|at| *at > now_ms).min();
        turn.again_at_ms = [turn.again_at_ms, moves].into_iter().flatten().min();
        turn
    }
}

impl Recurring {
    /// A recurring schedule, checked.
    ///
    /// # Errors
    /// [`ScheduleError`].
    pub fn new(form: RecurringForm) -> Result<Self, ScheduleError> {
        if form.cron.chars().count() > CRON_CHARACTERS_MAX {
            return Err(ScheduleError::Cron("it is too long".to_owned()));
        }
        let parser = CronParser::builder().year(Year::Disallowed).build();
        let cron = parser.parse(&form.cron).map_err(|error| {
            ScheduleError::Cron(match error {
                CronError::InvalidPattern(reason)
                | CronError::IllegalCharacters(reason)
                | CronError::ComponentError(reason) => reason,
                error => error.to_string(),
            })
        })?;
        let zone = Tz::from_str(&form.time_zone).map_err(|_| ScheduleError::Zone)?;
        if !(1..=SCHEDULE_SECONDS_MAX).contains(&form.duration_seconds) {
            return Err(ScheduleError::Duration);
        }
        if form.rounds == Some(0) {
            return Err(ScheduleError::Rounds);
        }
        let midnight = |day: NaiveDate| instant(zone, day.and_time(chrono::NaiveTime::MIN));
        let from_ms = form.starts_on.and_then(|bound| match bound {
            Bound::Day(day) => midnight(day),
            Bound::At(at) => Some(at.timestamp_millis()),
        });
        let before_ms = form.until.and_then(|bound| match bound {
            Bound::Day(day) => midnight(day.succ_opt()?),
            Bound::At(at) => Some(at.timestamp_millis()),
        });
        if from_ms
            .zip(before_ms)
            .is_some_and(|(from, before)| before <= from)
        {
            return Err(ScheduleError::Until);
        }
        Ok(Self {
            form,
            cron,
            zone,
            from_ms,
            before_ms,
        })
    }

    /// How it is written.
    pub fn form(&self) -> &RecurringForm {
        &self.form
    }

    fn duration_ms(&self) -> i64 {
        // Checked when it was made.
        i64::try_from(self.form.duration_seconds).unwrap_or(0) * 1_000
    }

    /// Checks what parsing cannot see: that it opens at all, and is closed before it opens again.
    /// Where the clock is set forward in between a window may be cut short, which is no mistake.
    ///
    /// # Errors
    /// [`ScheduleError::Never`] or [`ScheduleError::Overlap`].
    pub fn check(&self, now_ms: i64) -> Result<(), ScheduleError> {
        let begin = self.from_ms.unwrap_or(now_ms).max(now_ms) - 1;
        let mut opening = self.opening_after(begin).ok_or(ScheduleError::Never)?;
        for _ in 0..CHECKED_OPENINGS {
            let Some(next) = self.opening_after(opening) else {
                break;
            };
            let gap = next - opening;
            if gap < self.duration_ms() && self.offset(opening) == self.offset(next) {
                return Err(ScheduleError::Overlap(gap / 1_000));
            }
            opening = next;
        }
        Ok(())
    }

    fn next(&self, after_ms: i64) -> Option<Window> {
        let after_ms = self.from_ms.map_or(after_ms, |from| after_ms.max(from - 1));
        let opens_at_ms = self.opening_after(after_ms)?;
        if self.before_ms.is_some_and(|before| opens_at_ms >= before) {
            return None;
        }
        let ends = opens_at_ms + self.duration_ms();
        let closes_at_ms = self
            .opening_after(opens_at_ms)
            .map_or(ends, |next| ends.min(next));
        Some(Window {
            opens_at_ms,
            closes_at_ms: Some(closes_at_ms),
        })
    }

    /// The first opening after an instant; `None` when no time matches any more.
    fn opening_after(&self, after_ms: i64) -> Option<i64> {
        let after = DateTime::from_timestamp_millis(after_ms)?;
        // Times of the wall clock as if no clock were ever set: what is at or before the wall
        // clock's time now has happened, so nothing is missed.
        let mut wall = after.with_timezone(&self.zone).naive_local().and_utc();
        loop {
            wall = self.cron.find_next_occurrence(&wall, false).ok()?;
            let opening = instant(self.zone, wall.naive_utc())?;
            // The hour that is repeated has been, and those that were skipped are one instant.
            if opening > after_ms {
                return Some(opening);
            }
        }
    }

    fn offset(&self, at_ms: i64) -> Option<i32> {
        use chrono::Offset;
        let at = self.zone.timestamp_millis_opt(at_ms).single()?;
        Some(at.offset().fix().local_minus_utc())
    }
}

/// The end of a window of a schedule, which always has one.
fn end_of(window: Window) -> i64 {
    window.closes_at_ms.unwrap_or(i64::MAX)
}

/// When the wall clock of `zone` shows `wall` for the first time, milliseconds since the Unix epoch;
/// if it never does, when it has skipped it.
fn instant(zone: Tz, wall: NaiveDateTime) -> Option<i64> {
    let at = match zone.from_local_datetime(&wall) {
        MappedLocalTime::Single(at) | MappedLocalTime::Ambiguous(at, _) => at,
        MappedLocalTime::None => GapInfo::new(&wall, &zone)?.end?,
    };
    Some(at.timestamp_millis())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn form(cron: &str, zone: &str, seconds: u64) -> RecurringForm {
        RecurringForm {
            cron: cron.to_owned(),
            time_zone: zone.to_owned(),
            duration_seconds: seconds,
            starts_on: None,
            until: None,
            rounds: None,
        }
    }

    fn ms(text: &str) -> i64 {
        let at = DateTime::parse_from_rfc3339(text).unwrap();
        at.timestamp_millis()
    }

    fn text(ms: i64) -> String {
        let at = DateTime::from_timestamp_millis(ms).unwrap();
        at.to_rfc3339_opts(SecondsFormat::Secs, true)
    }

    fn day(text: &str) -> Bound {
        Bound::try_from(text.to_owned()).unwrap()
    }

    /// `opens/seconds` of the first windows from an instant on.
    fn windows(form: RecurringForm, from: &str, count: usize) -> Vec<String> {
        let schedule = Schedule::from(Recurring::new(form).unwrap());
        let progress = Progress {
            until_ms: ms(from) - 1,
            windows: 0,
        };
        let windows = schedule.following(progress).take(count);
        windows
            .map(|window| {
                let seconds = (end_of(window) - window.opens_at_ms) / 1_000;
                format!("{}/{seconds}", text(window.opens_at_ms))
            })
            .collect()
    }

    #[test]
    fn days_on_which_clocks_are_set() {
        let (berlin, new_york) = ("Europe/Berlin", "America/New_York");
        for (cron, zone, seconds, from, expected) in [
            // Six in the evening stays six in the evening.
            (
                "0 18 * * FRI",
                berlin,
                600,
                "2026-10-20T00:00:00Z",
                ["2026-10-23T16:00:00Z/600", "2026-10-30T17:00:00Z/600"],
            ),
            // Half past two does not exist on 28 March 2027: it opens at three.
            (
                "30 2 * * *",
                berlin,
                60,
                "2027-03-28T00:00:00Z",
                ["2027-03-28T01:00:00Z/60", "2027-03-29T00:30:00Z/60"],
            ),
            // Half past two is twice on 31 October 2027: it opens the first time.
            (
                "30 2 * * *",
                berlin,
                60,
                "2027-10-31T00:00:00Z",
                ["2027-10-31T00:30:00Z/60", "2027-11-01T01:30:00Z/60"],
            ),
            // Both were skipped, and are one opening.
            (
                "0,30 2 * * *",
                berlin,
                60,
                "2027-03-28T00:00:00Z",
                ["2027-03-28T01:00:00Z/60", "2027-03-29T00:00:00Z/60"],
            ),
            // Two in the morning was skipped, and three is the same instant.
            (
                "0 2,3 * * *",
                berlin,
                60,
                "2027-03-28T00:00:00Z",
                ["2027-03-28T01:00:00Z/60", "2027-03-29T00:00:00Z/60"],
            ),
            // A whole day is cut short where the day is.
            (
                "0 0 * * *",
                new_york,
                86_400,
                "2027-03-14T05:00:00Z",
                ["2027-03-14T05:00:00Z/82800", "2027-03-15T04:00:00Z/86400"],
            ),
            // And leaves an hour where the day has one more.
            (
                "0 0 * * *",
                new_york,
                86_400,
                "2027-11-07T04:00:00Z",
                ["2027-11-07T04:00:00Z/86400", "2027-11-08T05:00:00Z/86400"],
            ),
            // Ten minutes from ten to three pass before it is two again.
            (
                "50 2 * * *",
                berlin,
                1_200,
                "2027-10-30T22:00:00Z",
                ["2027-10-31T00:50:00Z/1200", "2027-11-01T01:50:00Z/1200"],
            ),
            // Every half hour of the wall clock: those that are repeated have been.
            (
                "*/30 * * * *",
                berlin,
                60,
                "2027-10-31T00:30:00Z",
                ["2027-10-31T00:30:00Z/60", "2027-10-31T02:00:00Z/60"],
            ),
            // Half an hour is set on Lord Howe.
            (
                "15 2 * * *",
                "Australia/Lord_Howe",
                60,
                "2027-10-02T15:00:00Z",
                ["2027-10-02T15:30:00Z/60", "2027-10-03T15:15:00Z/60"],
            ),
            // With seconds.
            (
                "*/2 * * * * *",
                "UTC",
                2,
                "2027-01-01T00:00:01Z",
                ["2027-01-01T00:00:02Z/2", "2027-01-01T00:00:04Z/2"],
            ),
        ] {
            let found = windows(form(cron, zone, seconds), from, 2);
            assert_eq!(found, expected, "{cron} {zone}");
        }
    }

    #[test]
    fn from_a_day_to_a_day_and_so_often_at_most() {
        let every_day = || form("0 12 * * *", "Asia/Tokyo", 60);
        let bounded = RecurringForm {
            starts_on: Some(day("2027-01-02")),
            until: Some(day("2027-01-03")),
            ..every_day()
        };
        let expected = ["2027-01-02T03:00:00Z/60", "2027-01-03T03:00:00Z/60"];
        assert_eq!(windows(bounded, "2026-01-01T00:00:00Z", 9), expected);
        let instants = RecurringForm {
            starts_on: Some(day("2027-01-02T03:00:00Z")),
            until: Some(day("2027-01-03T03:00:00Z")),
            ..every_day()
        };
        let only = &expected[..1];
        assert_eq!(windows(instants, "2026-01-01T00:00:00Z", 9), only);
        let counted = RecurringForm {
            starts_on: Some(day("2027-01-02")),
            rounds: Some(2),
            ..every_day()
        };
        assert_eq!(windows(counted, "2026-01-01T00:00:00Z", 9), expected);
        let over = RecurringForm {
            until: Some(day("2026-12-31")),
            ..every_day()
        };
        let over = Schedule::from(Recurring::new(over).unwrap());
        assert_eq!(over.first(ms("2027-01-01T00:00:00Z")), None);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let now = ms("2026-11-21T00:00:00Z");
        let refused = |form: RecurringForm| {
            let checked = Recurring::new(form).and_then(|recurring| recurring.check(now));
            checked.err()
        };
        for bad in [
            "",
            "x",
            "* * * *",
            "60 * * * *",
            "0 24 * * *",
            "* * * * * * *",
            "@reboot",
        ] {
            let error = refused(form(bad, "UTC", 60));
            assert!(
                matches!(error, Some(ScheduleError::Cron(_))),
                "{bad}: {error:?}"
            );
        }
        let long = "0,".repeat(200) + "0 * * * *";
        assert!(matches!(
            refused(form(&long, "UTC", 1)),
            Some(ScheduleError::Cron(_))
        ));
        for (form, error) in [
            (form("0 0 30 2 *", "UTC", 60), Some(ScheduleError::Never)),
            (form("0 0 29 2 *", "UTC", 60), None),
            (form("* * * * *", "UTC", 60), None),
            (
                form("* * * * *", "UTC", 61),
                Some(ScheduleError::Overlap(60)),
            ),
            (
                form("0 18,19 * * FRI", "UTC", 3_601),
                Some(ScheduleError::Overlap(3_600)),
            ),
            (form("0 0 * * *", "Europe/Berlin", 86_400), None),
            (
                form("0 0 * * *", "Europe/Berlin", 86_401),
                Some(ScheduleError::Overlap(86_400)),
            ),
            (
                form("0 0 * * *", "Mars/Olympus", 60),
                Some(ScheduleError::Zone),
            ),
            (form("0 0 * * *", "+01:00", 60), Some(ScheduleError::Zone)),
            (form("0 0 * * *", "UTC", 0), Some(ScheduleError::Duration)),
            (
                form("0 0 * * *", "UTC", SCHEDULE_SECONDS_MAX + 1),
                Some(ScheduleError::Duration),
            ),
            (
                RecurringForm {
                    rounds: Some(0),
                    ..form("0 0 * * *", "UTC", 60)
                },
                Some(ScheduleError::Rounds),
            ),
            (
                RecurringForm {
                    starts_on: Some(day("2027-01-02")),
                    until: Some(day("2027-01-01")),
                    ..form("0 0 * * *", "UTC", 60)
                },
                Some(ScheduleError::Until),
            ),
        ] {
            let cron = form.cron.clone();
            assert_eq!(refused(form), error, "{cron}");
        }
        for bad in ["", "2026", "2026-02-30", "tomorrow", "2026-01-01T00:00:00"] {
            assert!(Bound::try_from(bad.to_owned()).is_err(), "{bad}");
        }
    }

    #[test]
    fn listed_windows_follow_each_other() {
        let window = |opens_at_ms, closes_at_ms| Window {
            opens_at_ms,
            closes_at_ms: Some(closes_at_ms),
        };
        let (a, b, c) = (window(10, 20), window(20, 30), window(40, 50));
        let schedule = Schedule::windows(vec![a, b, c]).unwrap();
        for (now, first) in [
            (0, Some(a)),
            (19, Some(a)),
            (20, Some(b)),
            (39, Some(c)),
            (50, None),
        ] {
            assert_eq!(schedule.first(now), first, "{now}");
        }
        let after = |until_ms| Progress {
            until_ms,
            windows: 1,
        };
        assert_eq!(schedule.following(after(10)).collect::<Vec<_>>(), [b, c]);
        assert_eq!(schedule.next(after(40)), None);
        for (windows, error) in [
            (vec![], ScheduleError::Count),
            (vec![a; SCHEDULE_WINDOWS_MAX + 1], ScheduleError::Count),
            (vec![a, window(30, 30)], ScheduleError::Empty(1)),
            (vec![a, window(19, 30)], ScheduleError::Order(1)),
            (vec![c, a], ScheduleError::Order(1)),
        ] {
            assert_eq!(Schedule::windows(windows), Err(error));
        }
        let stored = serde_json::to_string(&schedule).unwrap();
        assert_eq!(stored, r#"{"windows":[[10,20],[20,30],[40,50]]}"#);
        assert_eq!(serde_json::from_str::<Schedule>(&stored).unwrap(), schedule);
        let recurring = RecurringForm {
            until: Some(day("2027-01-01")),
            ..form("0 18 * * FRI", "Europe/Berlin", 600)
        };
        let recurring = Schedule::from(Recurring::new(recurring).unwrap());
        let stored = serde_json::to_string(&recurring).unwrap();
        assert_eq!(
            serde_json::from_str::<Schedule>(&stored).unwrap(),
            recurring
        );
    }

    #[test]
    fn the_next_round_is_always_there_and_what_was_missed_is_not_made() {
        let minute = 60_000;
        let at = |n: i64| Window {
            opens_at_ms: n * minute,
            closes_at_ms: Some((n + 1) * minute),
        };
        let every_minute = Recurring::new(form("* * * * *", "UTC", 60)).unwrap();
        let every_minute = Schedule::from(every_minute);
        let dealt_with = |until: i64, windows| Progress {
            until_ms: until * minute,
            windows,
        };
        let ahead = i64::try_from(ROUNDS_AHEAD_MAX).unwrap();
        // Half a minute into the first window.
        let turn = Turn::at(&every_minute, dealt_with(1, 1), &[at(1)], minute + 30_000);
        let rounds: Vec<_> = (2..2 + ahead).map(at).collect();
        assert_eq!(turn.made, rounds);
        assert_eq!(
            turn.progress,
            dealt_with(1 + ahead, 1 + u32::try_from(ROUNDS_AHEAD_MAX).unwrap())
        );
        assert_eq!((turn.missed.len(), turn.again_at_ms), (0, Some(2 * minute)));
        // Nothing more to do until the next one opens.
        let idle = Turn::at(&every_minute, turn.progress, &rounds, 2 * minute - 1);
        assert_eq!((idle.made.len(), idle.again_at_ms), (0, Some(2 * minute)));
        // An hour later: what is over was missed, what is open runs for the rest of its time.
        let late = Turn::at(&every_minute, dealt_with(1, 1), &[], 61 * minute + 30_000);
        assert_eq!(late.missed, (2..61).map(at).collect::<Vec<_>>());
        assert_eq!(late.made, (61..=61 + ahead).map(at).collect::<Vec<_>>());
        // A long time later, in steps.
        let years = Turn::at(&every_minute, dealt_with(1, 1), &[], 1_000_000 * minute);
        assert_eq!((years.missed.len(), years.made.len()), (MISSED_MAX, 0));
        assert_eq!(years.again_at_ms, Some(1_000_000 * minute));
        assert_eq!(years.progress.until_ms, 1_001 * minute);

        // Far away: the next one is there, and the one after it when that opens.
        let monthly = Recurring::new(form("0 0 1 * *", "UTC", 60)).unwrap();
        let monthly = Schedule::from(monthly);
        let first = monthly.first(0).unwrap();
        let none = Progress {
            until_ms: first.opens_at_ms,
            windows: 1,
        };
        let turn = Turn::at(&monthly, none, &[first], first.opens_at_ms - 1);
        assert_eq!(
            (turn.made.len(), turn.again_at_ms),
            (0, Some(first.opens_at_ms))
        );
        let turn = Turn::at(&monthly, none, &[first], first.opens_at_ms);
        assert_eq!(turn.made.len(), 1);
        assert_eq!(turn.again_at_ms, first.closes_at_ms);

        // The last one.
        let two = Schedule::windows(vec![at(1), at(3)]).unwrap();
        let turn = Turn::at(&two, dealt_with(1, 1), &[at(1)], minute);
        assert_eq!(
            (&turn.made[..], turn.again_at_ms),
            (&[at(3)][..], Some(2 * minute))
        );
        let turn = Turn::at(&two, dealt_with(3, 2), &[at(3)], 4 * minute);
        assert_eq!((turn.made.len(), turn.again_at_ms), (0, None));
    }

    proptest! {
        /// Wherever one begins: windows are in order and never overlap, and none is left out.
        #[test]
        fn windows_never_overlap_and_none_is_left_out(
            zone in prop::sample::select(vec![
                "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Africa/Casablanca",
                "America/Santiago", "Asia/Kathmandu", "Pacific/Apia",
            ]),
            cron in prop::sample::select(vec![
                "*/20 * * * *", "0 */3 * * *", "30 2 * * *", "0 0 * * *", "15 1,2,3 * * SUN",
            ]),
            start in 0_i64..20 * 365 * 24 * 60,
            skip in 0_usize..20,
            seconds in 1_u64..100_000,
        ) {
            let begin = ms("2010-01-01T00:00:00Z") + start * 60_000;
            let schedule = Schedule::from(Recurring::new(form(cron, zone, seconds)).unwrap());
            let from = |until_ms| Progress { until_ms, windows: 0 };
            let all: Vec<_> = schedule.following(from(begin)).take(60).collect();
            let overlap = all.windows(2).find(|pair| end_of(pair[0]) > pair[1].opens_at_ms);
            prop_assert_eq!(overlap, None);
            prop_assert!(all.iter().all(|w| w.opens_at_ms < end_of(*w)));
            prop_assert!(all[0].opens_at_ms > begin);
            // Who goes on from any instant finds the same windows.
            let at = all[skip].opens_at_ms + 1;
            let rest: Vec<_> = schedule.following(from(at)).take(30).collect();
            prop_assert_eq!(&rest[..], &all[skip + 1..skip + 31]);
        }
    }
}
