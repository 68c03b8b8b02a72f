//! The one place of the baselines that reads the wall clock and mints ids.
#![expect(
    clippy::disallowed_methods,
    reason = "this module is the one that the ban points to"
)]

use chrono::Utc;
use uuid::Uuid;

/// Milliseconds since the Unix epoch.
pub(crate) fn now_ms() -> i64 {
    Utc::now().timestamp_millis()
}

/// An id that sorts by the time it was made.
pub(crate) fn new_id() -> Uuid {
    Uuid::now_v7()
}
