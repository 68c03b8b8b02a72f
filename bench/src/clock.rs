//! The one place of the harness that reads the wall clock.
#![expect(
    clippy::disallowed_methods,
    reason = "this module is the one reader that the ban points to"
)]

use chrono::{DateTime, Utc};

/// The wall clock now. The server runs on this machine, so its clock is the same one.
pub(crate) fn now() -> DateTime<Utc> {
    Utc::now()
}
