//! Recurring schedules as an operator writes them: whatever is accepted gives windows that end and
//! do not overlap, in bounded time.
#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};
use stockade::domain::schedule::{Progress, Recurring, RecurringForm, Schedule};

/// 2026-11-22T00:00:00Z.
const NOW_MS: i64 = 1_795_305_600_000;

fuzz_target!(|text: &[u8]| -> Corpus {
    let Ok(form) = serde_json::from_slice::<RecurringForm>(text) else {
        return Corpus::Reject;
    };
    let Ok(recurring) = Recurring::new(form) else {
        return Corpus::Keep;
    };
    if recurring.check(NOW_MS).is_err() {
        return Corpus::Keep;
    }
    let schedule = Schedule::from(recurring);
    let written = serde_json::to_vec(&schedule).unwrap();
    assert_eq!(
        serde_json::from_slice::<Schedule>(&written).unwrap(),
        schedule
    );
    let mut open_until_ms = NOW_MS;
    let progress = Progress {
        until_ms: NOW_MS,
        windows: 0,
    };
    for window in schedule.following(progress).take(10) {
        let closes_at_ms = window.closes_at_ms.unwrap();
        assert!(window.opens_at_ms >= open_until_ms && closes_at_ms > window.opens_at_ms);
        open_until_ms = closes_at_ms;
    }
    Corpus::Keep
});
