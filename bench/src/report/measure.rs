//! From what became of each purchase to the numbers of a document.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;
use hdrhistogram::Histogram;

use super::document::{
    Arrivals, Generator, Interval, Latency, Outcomes, Percentiles, Phase, Process, Series, Speed,
};
use crate::load::outcome::Outcome;
use crate::load::sender::Record;

/// Latencies up to an hour are told apart.
const LATENCY_MAX_US: u64 = 3_600_000_000;

/// Points of a percentile plot for each halving of what is left above.
const POINTS_PER_HALVING: u32 = 5;

/// From this share of its threads' time on, the harness itself is probably what was slow.
const BOTTLENECK_SHARE: f64 = 0.8;

/// Lengths of an interval, in milliseconds.
const INTERVALS_MS: [u32; 13] = [
    5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 30_000, 60_000,
];

/// Intervals of a phase: as many as a plot can show.
const INTERVALS_MAX: f64 = 120.0;

/// The load of a phase, as it was asked for and as it could be made.
#[derive(Clone, Debug)]
pub(crate) struct Offered {
    pub(crate) name: String,
    pub(crate) arrivals: Arrivals,
    pub(crate) connections: usize,
    pub(crate) connections_wanted: usize,
    /// Units for sale and units per purchase, where one sale has them all.
    pub(crate) stock: Option<(u64, u64)>,
}

impl Phase {
    /// From the records of its purchases. What only the server knows (when it was sold out, when
    /// it was all stored) and what the processes used is filled in by who asked.
    pub(crate) fn of(offered: Offered, records: &[Record], generator: Generator) -> Result<Self> {
        let duration = records.iter().map(|record| record.finished).max();
        Ok(Self {
            duration_ms: ms(duration.unwrap_or_default()),
            outcomes: Outcomes::of(records),
            speed: Some(Speed::of(records, offered.stock)?),
            processes: Vec::new(),
            generator,
            name: offered.name,
            arrivals: offered.arrivals,
            connections: offered.connections,
            connections_wanted: offered.connections_wanted,
        })
    }
}

impl Outcomes {
    /// Counts.
    pub(crate) fn of(records: &[Record]) -> Self {
        let mut counts = Self {
            purchases: records.len(),
            ..Self::default()
        };
        for record in records {
            counts.retries += u64::from(record.retries);
            let (kind, reason) = match &record.outcome {
                Outcome::Accepted { replayed, .. } => {
                    counts.accepted += 1;
                    counts.replayed += usize::from(*replayed);
                    continue;
                }
                Outcome::Refused { code } => (&mut counts.refused, code),
                Outcome::Failed { reason } => (&mut counts.failed, reason),
                Outcome::Unknown { reason } => (&mut counts.unknown, reason),
            };
            *kind.entry(reason.clone()).or_default() += 1;
        }
        counts
    }
}

impl Percentiles {
    /// Of all durations given.
    pub(crate) fn of(durations: impl Iterator<Item = Duration>) -> Result<Self> {
        let mut histogram = Histogram::<u64>::new_with_bounds(1, LATENCY_MAX_US, 3)?;
        let (mut sum, mut max) = (Duration::ZERO, Duration::ZERO);
        for duration in durations {
            max = max.max(duration);
            sum += duration;
            let us = u64::try_from(duration.as_micros()).unwrap_or(LATENCY_MAX_US);
            histogram.saturating_record(us);
        }
        #[expect(
            clippy::cast_precision_loss,
            reason = "an hour of microseconds is exact"
        )]
        let (in_ms, count) = (|us: u64| us as f64 / 1e3, histogram.len() as f64);
        let at = |quantile| in_ms(histogram.value_at_quantile(quantile));
        Ok(Self {
            count: histogram.len(),
            mean: rounded(ms(sum) / count.max(1.0)),
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p99_9: at(0.999),
            max: ms(max),
            curve: histogram
                .iter_quantiles(POINTS_PER_HALVING)
                .map(|point| {
                    // A ten-millionth is one purchase of the largest runs.
                    let quantile = (point.quantile() * 1e7).round() / 1e7;
                    (quantile, in_ms(point.value_iterated_to()))
                })
                .collect(),
        })
    }
}

impl Speed {
    /// From the records.
    pub(crate) fn of(records: &[Record], stock: Option<(u64, u64)>) -> Result<Self> {
        let latency = |record: &Record| record.finished.saturating_sub(record.due);
        let accepted = |record: &&Record| matches!(record.outcome, Outcome::Accepted { .. });
        let refused = |record: &&Record| matches!(record.outcome, Outcome::Refused { .. });
        let last = |of: &dyn Fn(&&Record) -> bool| {
            let ends = records.iter().filter(of).map(|record| record.finished);
            ends.max().unwrap_or_default()
        };
        Ok(Self {
            requests_per_s: per_second(records.len(), last(&|_| true)),
            accepted_per_s: per_second(records.iter().filter(accepted).count(), last(&accepted)),
            sold_out_after_ms: None,
            stored_after_ms: None,
            latency_ms: Latency {
                all: Percentiles::of(records.iter().map(latency))?,
                accepted: Percentiles::of(records.iter().filter(accepted).map(latency))?,
                refused: Percentiles::of(records.iter().filter(refused).map(latency))?,
                service: Percentiles::of(
                    records
                        .iter()
                        .map(|record| record.finished.saturating_sub(record.last_sent)),
                )?,
                send_delay: Percentiles::of(
                    records
                        .iter()
                        .filter_map(|record| Some(record.first_sent?.saturating_sub(record.due))),
                )?,
            },
            other_ms: BTreeMap::new(),
            series: Series::of(records, stock)?,
        })
    }
}

impl Series {
    /// Cuts a phase into intervals. With units for sale and units per purchase it counts down
    /// what is left.
    pub(crate) fn of(records: &[Record], stock: Option<(u64, u64)>) -> Result<Self> {
        let duration = records.iter().map(|record| record.finished).max();
        let duration = duration.unwrap_or_default();
        let interval_ms = INTERVALS_MS
            .into_iter()
            .find(|length| ms(duration) / f64::from(*length) <= INTERVALS_MAX)
            .unwrap_or(60_000);
        let interval = Duration::from_millis(u64::from(interval_ms));
        let index = |instant: Duration| {
            usize::try_from(instant.as_nanos() / interval.as_nanos()).unwrap_or(usize::MAX)
        };
        let mut rows: Vec<Interval> = (0..=index(duration))
            .map(|n| Interval {
                #[expect(clippy::cast_precision_loss, reason = "intervals are few")]
                at_ms: n as f64 * f64::from(interval_ms),
                ..Interval::default()
            })
            .collect();
        let mut ended: Vec<(Duration, Duration)> = Vec::with_capacity(records.len());
        for record in records {
            if let Some(sent) = record.first_sent
                && let Some(row) = rows.get_mut(index(sent))
            {
                row.sent += 1;
            }
            let Some(row) = rows.get_mut(index(record.finished)) else {
                continue;
            };
            match &record.outcome {
                Outcome::Accepted { .. } => row.accepted += 1,
                Outcome::Refused { code } => *row.refused.entry(code.clone()).or_default() += 1,
                Outcome::Failed { .. } | Outcome::Unknown { .. } => row.failed += 1,
            }
            let latency = record.finished.saturating_sub(record.due);
            ended.push((record.finished, latency));
        }
        ended.sort_unstable();
        for those in ended.chunk_by(|one, other| index(one.0) == index(other.0)) {
            if let Some(row) = rows.get_mut(index(those[0].0)) {
                let latency = Percentiles::of(those.iter().map(|(_, latency)| *latency))?;
                row.p50_ms = Some(latency.p50);
                row.p99_ms = Some(latency.p99);
                row.max_ms = Some(latency.max);
            }
        }
        if let Some((mut left, quantity)) = stock {
            for row in &mut rows {
                left = left.saturating_sub(row.accepted * quantity);
                row.remaining = Some(left);
            }
        }
        Ok(Self {
            interval_ms: f64::from(interval_ms),
            rows,
        })
    }
}

impl Generator {
    /// From the processor time that the harness used in a time.
    pub(crate) fn new(cpu: Duration, wall: Duration, threads: usize) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "threads are few")]
        let cpu_share = cpu.as_secs_f64() / (wall.as_secs_f64() * threads as f64).max(1e-9);
        Self {
            cpu_ms: ms(cpu),
            wall_ms: ms(wall),
            threads,
            cpu_share: rounded(cpu_share),
            bottleneck: cpu_share >= BOTTLENECK_SHARE,
            late: 0,
        }
    }
}

impl Process {
    /// What a process used while so many purchases were accepted, of so many.
    pub(crate) fn new(name: &str, cpu: Duration, rss_bytes: Option<u64>, of: &Outcomes) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
        let each = |count: usize| (count > 0).then(|| rounded(ms(cpu) * 1e3 / count as f64));
        Self {
            name: name.to_owned(),
            cpu_ms: ms(cpu),
            us_per_accepted: each(of.accepted),
            us_per_request: each(of.purchases),
            rss_bytes,
            samples: Vec::new(),
        }
    }
}

/// In milliseconds.
pub(crate) fn ms(duration: Duration) -> f64 {
    rounded(duration.as_secs_f64() * 1e3)
}

/// To three decimals: milliseconds to the microsecond, which is as exact as anything here.
fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

fn per_second(count: usize, duration: Duration) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
    let count = count as f64;
    rounded(count / duration.as_secs_f64().max(1e-6))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn percentiles_are_in_milliseconds() {
        let durations = (1..=1000).map(Duration::from_millis);
        let percentiles = Percentiles::of(durations).unwrap();
        assert_eq!(percentiles.count, 1000);
        for (value, wanted) in [
            (percentiles.mean, 500.5),
            (percentiles.p50, 500.0),
            (percentiles.p90, 900.0),
            (percentiles.p99, 990.0),
            (percentiles.p99_9, 999.0),
            (percentiles.max, 1000.0),
        ] {
            assert!((value / wanted - 1.0).abs() < 0.002, "{value} for {wanted}");
        }
        let curve = &percentiles.curve;
        assert!(curve.is_sorted(), "{curve:?}");
        assert!((curve.last().unwrap().0 - 1.0).abs() < f64::EPSILON);
    }

    fn record(due_ms: u64, took_ms: u64, outcome: Outcome) -> Record {
        let due = Duration::from_millis(due_ms);
        Record {
            purchase: 0,
            due,
            first_sent: Some(due),
            last_sent: due,
            finished: due + Duration::from_millis(took_ms),
            retries: 0,
            outcome,
        }
    }

    fn accepted() -> Outcome {
        Outcome::Accepted {
            replayed: false,
            body: Bytes::new(),
        }
    }

    #[test]
    fn a_series_counts_where_purchases_ended_and_leaves_no_gap() {
        let refused = Outcome::Refused {
            code: "sold_out".to_owned(),
        };
        // A second of silence in the middle.
        let records = [
            record(0, 3, accepted()),
            record(1, 1, accepted()),
            record(10, 1090, accepted()),
            record(1101, 1, refused),
        ];
        let series = Series::of(&records, Some((10, 2))).unwrap();
        assert!((series.interval_ms - 10.0).abs() < f64::EPSILON);
        assert_eq!(series.rows.len(), 111);
        assert_eq!((series.rows[0].accepted, series.rows[0].sent), (2, 2));
        assert_eq!(
            (series.rows[0].remaining, series.rows[1].p99_ms),
            (Some(6), None)
        );
        let last = &series.rows[110];
        assert_eq!((last.accepted, last.refused["sold_out"]), (1, 1));
        assert_eq!((last.remaining, last.max_ms), (Some(4), Some(1090.0)));
        let ended: u64 = series.rows.iter().map(|row| row.accepted).sum();
        assert_eq!(ended, 3);
    }

    #[test]
    fn nothing_sent_is_an_empty_phase() {
        let series = Series::of(&[], None).unwrap();
        assert_eq!(series.rows.len(), 1);
        assert_eq!(Percentiles::of([].into_iter()).unwrap().count, 0);
    }
}
