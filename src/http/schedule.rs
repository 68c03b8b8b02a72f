//! Schedules as clients write and read them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    body::Object,
    check::{Check, Timestamp, present},
};
use crate::domain::{
    round::Window,
    schedule::{Bound, Recurring, RecurringForm, Schedule, ScheduleError},
};

/// When the rounds of a sale open: either `cron`, `time_zone` and `duration_seconds`, or `windows`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(from = "Object<ScheduleMembers>")]
#[schema(as = Schedule)]
pub(super) struct ScheduleBody {
    /// Minute, hour, day of the month, month, day of the week; six fields begin with the second.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String, required = false, example = "0 18 * * FRI", max_length = 200)]
    cron: Option<String>,
    /// Whose wall clock `cron` means. An opening in the hour that is skipped in spring happens when
    /// it is over; one in the hour that is repeated in autumn happens the first time only.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String, required = false, example = "Europe/Berlin")]
    time_zone: Option<String>,
    /// How long each round is open: time that passes, whatever clocks show.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = i64, required = false, example = 600, minimum = 1, maximum = 2_678_400)]
    duration_seconds: Option<i64>,
    /// No opening before this day (in the time zone) or instant.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String, required = false, example = "2026-11-27")]
    starts_on: Option<Bound>,
    /// No opening after this day (in the time zone), or from this instant on.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String, required = false, example = "2026-12-24")]
    until: Option<Bound>,
    /// So many openings at most, missed ones included.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = i64, required = false, minimum = 1, maximum = 2_147_483_647_i64)]
    rounds: Option<i64>,
    /// Windows one after the other; none may begin before the one before it is over.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Vec<WindowBody>, required = false, min_items = 1, max_items = 1_000)]
    windows: Option<Vec<WindowBody>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ScheduleMembers {
    #[serde(default, deserialize_with = "present")]
    cron: Option<String>,
    #[serde(default, deserialize_with = "present")]
    time_zone: Option<String>,
    #[serde(default, deserialize_with = "present")]
    duration_seconds: Option<i64>,
    #[serde(default, deserialize_with = "present")]
    starts_on: Option<Bound>,
    #[serde(default, deserialize_with = "present")]
    until: Option<Bound>,
    #[serde(default, deserialize_with = "present")]
    rounds: Option<i64>,
    #[serde(default, deserialize_with = "present")]
    windows: Option<Vec<WindowBody>>,
}

impl From<Object<ScheduleMembers>> for ScheduleBody {
    fn from(Object(members): Object<ScheduleMembers>) -> Self {
        let ScheduleMembers {
            cron,
            time_zone,
            duration_seconds,
            starts_on,
            until,
            rounds,
            windows,
        } = members;
        Self {
            cron,
            time_zone,
            duration_seconds,
            starts_on,
            until,
            rounds,
            windows,
        }
    }
}

/// When a round opens and closes.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(from = "Object<WindowMembers>")]
#[schema(as = Window)]
pub(super) struct WindowBody {
    opens_at: Timestamp,
    closes_at: Timestamp,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WindowMembers {
    opens_at: Timestamp,
    closes_at: Timestamp,
}

impl From<Object<WindowMembers>> for WindowBody {
    fn from(
        Object(WindowMembers {
            opens_at,
            closes_at,
        }): Object<WindowMembers>,
    ) -> Self {
        Self {
            opens_at,
            closes_at,
        }
    }
}

impl ScheduleBody {
    /// The schedule that it means; nothing when there is none.
    pub(super) fn check(&self, check: &mut Check, now_ms: i64) -> Option<Schedule> {
        match (&self.windows, &self.cron) {
            (Some(windows), None) => self.listed(check, windows),
            (None, Some(cron)) => self.recurring(check, cron, now_ms).map(Schedule::from),
            (Some(_), Some(_)) | (None, None) => {
                check.refuse(
                    "#/schedule",
                    "must have either windows, or cron with time_zone and duration_seconds",
                );
                None
            }
        }
    }

    fn listed(&self, check: &mut Check, windows: &[WindowBody]) -> Option<Schedule> {
        let others = [
            ("time_zone", self.time_zone.is_some()),
            ("duration_seconds", self.duration_seconds.is_some()),
            ("starts_on", self.starts_on.is_some()),
            ("until", self.until.is_some()),
            ("rounds", self.rounds.is_some()),
        ];
        for (member, _) in others.iter().filter(|(_, given)| *given) {
            let pointer = format!("#/schedule/{member}");
            check.refuse(&pointer, "goes with cron: windows say it all");
        }
        let windows = windows.iter().enumerate().map(|(index, window)| {
            let mut instant = |member: &str, at| {
                check.instant(&format!("#/schedule/windows/{index}/{member}"), at)
            };
            Window {
                opens_at_ms: instant("opens_at", window.opens_at),
                closes_at_ms: Some(instant("closes_at", window.closes_at)),
            }
        });
        let windows = windows.collect();
        Schedule::windows(windows)
            .map_err(|error| refuse(check, &error))
            .ok()
    }

    fn recurring(&self, check: &mut Check, cron: &str, now_ms: i64) -> Option<Recurring> {
        let needed = "is needed beside cron";
        if self.time_zone.is_none() {
            check.refuse("#/schedule/time_zone", needed);
        }
        if self.duration_seconds.is_none() {
            check.refuse("#/schedule/duration_seconds", needed);
        }
        // What is no number of units at all is as wrong as none.
        let form = RecurringForm {
            cron: cron.to_owned(),
            time_zone: self.time_zone.clone()?,
            duration_seconds: u64::try_from(self.duration_seconds?).unwrap_or(0),
            starts_on: self.starts_on,
            until: self.until,
            rounds: self
                .rounds
                // What is not in range is refused like 0.
                .map(|rounds| i32::try_from(rounds).unwrap_or(0).max(0).cast_unsigned()),
        };
        let checked = Recurring::new(form).and_then(|recurring| {
            recurring.check(now_ms)?;
            Ok(recurring)
        });
        checked.map_err(|error| refuse(check, &error)).ok()
    }
}

/// Says what is wrong where it is.
fn refuse(check: &mut Check, error: &ScheduleError) {
    let window;
    let member = match error {
        ScheduleError::Cron(_) | ScheduleError::Never => "cron",
        ScheduleError::Zone => "time_zone",
        ScheduleError::Duration | ScheduleError::Overlap(_) => "duration_seconds",
        ScheduleError::Rounds => "rounds",
        ScheduleError::Until => "until",
        ScheduleError::Count => "windows",
        ScheduleError::Empty(index) => {
            window = format!("windows/{index}/closes_at");
            &window
        }
        ScheduleError::Order(index) => {
            window = format!("windows/{index}/opens_at");
            &window
        }
    };
    check.refuse(&format!("#/schedule/{member}"), error.to_string());
}

impl From<&Schedule> for ScheduleBody {
    fn from(schedule: &Schedule) -> Self {
        match schedule {
            Schedule::Recurring(recurring) => {
                let form = recurring.form();
                Self {
                    cron: Some(form.cron.clone()),
                    time_zone: Some(form.time_zone.clone()),
                    duration_seconds: i64::try_from(form.duration_seconds).ok(),
                    starts_on: form.starts_on,
                    until: form.until,
                    rounds: form.rounds.map(i64::from),
                    windows: None,
                }
            }
            Schedule::Windows(windows) => Self {
                windows: Some(
                    windows
                        .iter()
                        .map(|window| WindowBody {
                            opens_at: Timestamp::from_ms(window.opens_at_ms),
                            closes_at: Timestamp::from_ms(
                                window.closes_at_ms.unwrap_or(window.opens_at_ms),
                            ),
                        })
                        .collect(),
                ),
                ..Self::default()
            },
        }
    }
}
