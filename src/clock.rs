//! The one place that reads the wall clock and mints random ids.
//!
//! Everything else takes time and ids as arguments, so that it can be tested with any.
//! None of this decides a sale: only Redis' clock does, inside the scripts.
#![expect(
    clippy::disallowed_methods,
    reason = "this module is the one reader that the ban points to"
)]

use chrono::{DateTime, Utc};
use uuid::Uuid;

/// The wall clock now.
pub fn now() -> DateTime<Utc> {
    Utc::now()
}

/// Milliseconds since the Unix epoch by the wall clock.
pub fn now_ms() -> i64 {
    Utc::now().timestamp_millis()
}

/// A fresh time-ordered id (UUID v7).
pub fn new_id() -> Uuid {
    Uuid::now_v7()
}
