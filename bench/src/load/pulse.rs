//! Latencies while the crowd is at it: counts that every thread adds to and anybody may read,
//! exact to an eighth.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Counts for each doubling of a duration.
const STEPS: u32 = 8;

/// Counts up to 2³² µs, which is over an hour.
const COUNTS: usize = 30 * STEPS as usize;

/// How many purchases took how long so far.
#[derive(Debug)]
pub(crate) struct Pulse([AtomicU64; COUNTS]);

/// The counts of a pulse at an instant, or between two.
#[derive(Clone, Debug)]
pub(crate) struct Beat(Vec<u64>);

impl Default for Pulse {
    fn default() -> Self {
        Self([const { AtomicU64::new(0) }; COUNTS])
    }
}

impl Pulse {
    /// One more purchase took so long.
    pub(crate) fn record(&self, took: Duration) {
        let us = u32::try_from(took.as_micros()).unwrap_or(u32::MAX);
        self.0[index(us)].fetch_add(1, Ordering::Relaxed);
    }

    /// The counts now.
    pub(crate) fn beat(&self) -> Beat {
        Beat(
            self.0
                .iter()
                .map(|count| count.load(Ordering::Relaxed))
                .collect(),
        )
    }
}

impl Beat {
    /// What came after an earlier one.
    pub(crate) fn since(&self, earlier: &Self) -> Self {
        let counts = self.0.iter().zip(&earlier.0);
        Self(
            counts
                .map(|(now, then)| now.saturating_sub(*then))
                .collect(),
        )
    }

    /// A duration that so large a share did not exceed; nothing if there was none.
    pub(crate) fn quantile(&self, share: f64) -> Option<Duration> {
        let all: u64 = self.0.iter().sum();
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
        let wanted = all as f64 * share;
        let mut seen = 0;
        for (n, count) in self.0.iter().enumerate() {
            seen += count;
            #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
            if all > 0 && seen as f64 >= wanted {
                return Some(Duration::from_micros(end(n)));
            }
        }
        None
    }
}

/// Which count a duration belongs to: up to 8 µs one each, then eight for each doubling.
fn index(us: u32) -> usize {
    if us < STEPS {
        return us as usize;
    }
    let doublings = us.ilog2() - STEPS.ilog2();
    ((doublings + 1) * STEPS + (us >> doublings) % STEPS) as usize
}

/// The durations of a count are below this, in µs.
fn end(index: usize) -> u64 {
    let (index, steps) = (index as u64 + 1, u64::from(STEPS));
    if index <= steps {
        return index;
    }
    let doublings = index / steps - 1;
    (steps + index % steps) << doublings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_duration_lies_below_the_end_of_its_count_and_above_the_one_before() {
        let mut us = 0_u32;
        loop {
            let index = index(us);
            assert!(u64::from(us) < end(index), "{us} µs in count {index}");
            assert!(
                index == 0 || u64::from(us) >= end(index - 1),
                "{us} µs in count {index}"
            );
            us = match us.checked_add(us / 97 + 1) {
                Some(next) => next,
                None => break,
            };
        }
        assert_eq!(index(u32::MAX), COUNTS - 1);
    }

    #[test]
    fn quantiles_are_those_of_what_came_between() {
        let pulse = Pulse::default();
        pulse.record(Duration::from_secs(10));
        let before = pulse.beat();
        for ms in 1..=100 {
            pulse.record(Duration::from_millis(ms));
        }
        let between = pulse.beat().since(&before);
        for (share, ms) in [(0.5, 50.0), (0.99, 99.0)] {
            let found = between.quantile(share).unwrap().as_secs_f64() * 1e3;
            assert!((found / ms - 1.0).abs() < 0.13, "{found} for {ms}");
        }
        assert_eq!(before.since(&before).quantile(0.5), None);
    }
}
