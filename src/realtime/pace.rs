//! How often frames of a sale follow each other.

use std::time::Duration;

use crate::domain::limits::CALL_ITEMS_MAX;

/// The shortest time between two frames of a sale.
pub(super) const FRAME_INTERVAL_MIN: Duration = Duration::from_millis(100);

/// The longest: a page that changes less than once a second looks broken.
const FRAME_INTERVAL_MAX: Duration = Duration::from_secs(1);

/// Frames that a node plans for in a second. It sends fewer, because rows are told one after the
/// other: 0.7 of it with 19,000 subscribers of one sale, at 10 µs each.
const FRAMES_PER_SECOND_MAX: usize = 120_000;

/// The time between two frames of a sale, and between two samples, when a partition has so many
/// watched rounds and the node so many frames to send each time.
///
/// One call reads [`CALL_ITEMS_MAX`] rounds: with more watched, it stays at one call per 100 ms.
pub(super) fn interval(rounds: usize, frames: usize) -> Duration {
    let tenths = |count: usize, per_tenth: usize| {
        let micros = count.saturating_mul(100_000) / per_tenth;
        Duration::from_micros(micros.try_into().unwrap_or(u64::MAX))
    };
    tenths(rounds, CALL_ITEMS_MAX)
        .max(tenths(frames, FRAMES_PER_SECOND_MAX / 10))
        .clamp(FRAME_INTERVAL_MIN, FRAME_INTERVAL_MAX)
}

/// How long sending a frame to so many may take: then the next ones are told.
pub(super) fn spread(subscribers: usize) -> Duration {
    let micros = subscribers.saturating_mul(1_000_000) / FRAMES_PER_SECOND_MAX;
    Duration::from_micros(micros.try_into().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_slows_down_when_very_many_watch_or_are_watched() {
        for (rounds, frames, ms) in [
            (0, 0, 100),
            (1, 1, 100),
            (128, 12_000, 100),
            (1, 24_000, 200),
            (256, 1, 200),
            (1, 1_000_000, 1_000),
            (usize::MAX, usize::MAX, 1_000),
        ] {
            assert_eq!(interval(rounds, frames), Duration::from_millis(ms));
        }
    }
}
