//! What a run found, for people and for machines.
//!
//! The JSON document is [`Report`] as it stands; `bench/README.md` describes it. A run that broke
//! a promise has no speed: how fast a shop is wrong is of no interest.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter, Write};
use std::time::Duration;

use anyhow::Result;
use hdrhistogram::Histogram;
use serde::Serialize;
use uuid::Uuid;

use crate::load::outcome::Outcome;
use crate::load::sender::Record;
use crate::operator::Audit;
use crate::scenarios::outage::Effect;
use crate::verdict::{Check, Status};

/// Names the shape of the document.
pub(crate) const SCHEMA: &str = "stockade-bench/drop/1";

/// Latencies up to an hour are told apart.
const LATENCY_MAX_US: u64 = 3_600_000_000;

/// From this share of its threads' time on, the harness itself is probably what was slow.
const BOTTLENECK_SHARE: f64 = 0.8;

/// The whole result of one drop.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) schema: &'static str,
    /// `pass` or `fail`.
    pub(crate) verdict: &'static str,
    pub(crate) setup: Setup,
    pub(crate) outcomes: Outcomes,
    /// Absent when a promise was broken.
    pub(crate) speed: Option<Speed>,
    /// Absent without an outage, and when a promise was broken.
    pub(crate) outage: Option<Effect>,
    pub(crate) live: Option<Live>,
    pub(crate) generator: Generator,
    pub(crate) checks: Vec<Check>,
    /// The server's own audit.
    pub(crate) audit: Option<Audit>,
}

/// What was asked for.
#[derive(Debug, Serialize)]
pub(crate) struct Setup {
    pub(crate) server: String,
    pub(crate) sale_id: Uuid,
    pub(crate) opens_at: String,
    pub(crate) buyers: usize,
    pub(crate) tries: usize,
    pub(crate) stock: u64,
    pub(crate) quantity: u64,
    pub(crate) limit: u64,
    /// Absent: all at once.
    pub(crate) rate_per_s: Option<f64>,
    pub(crate) connections: usize,
    /// More than `connections` if the limit of open files or the server allowed no more.
    pub(crate) connections_wanted: usize,
    pub(crate) seed: u64,
}

/// How the purchases ended.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Outcomes {
    pub(crate) purchases: usize,
    pub(crate) accepted: usize,
    /// Of the accepted: those whose first 201 was lost and came as a replay.
    pub(crate) replayed: usize,
    /// By code.
    pub(crate) refused: BTreeMap<String, usize>,
    /// By reason: certainly no order.
    pub(crate) failed: BTreeMap<String, usize>,
    /// By reason: perhaps an order.
    pub(crate) unknown: BTreeMap<String, usize>,
    /// Requests beyond the first of each purchase.
    pub(crate) retries: u64,
}

/// Percentiles of some durations, in milliseconds.
#[derive(Debug, Serialize)]
pub(crate) struct Percentiles {
    pub(crate) count: u64,
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
    pub(crate) p99_9: f64,
    pub(crate) max: f64,
}

/// How fast it was.
#[derive(Debug, Serialize)]
pub(crate) struct Speed {
    /// From the planned instant to the final answer.
    pub(crate) latency_ms: ByOutcome,
    /// From sending the last try to its answer: hides what waited in the harness.
    pub(crate) service_ms: Percentiles,
    /// From the planned instant to sending the first try: a free connection had to be waited for.
    pub(crate) send_delay_ms: Percentiles,
    pub(crate) duration_ms: f64,
    pub(crate) requests_per_s: f64,
    /// Until the last acceptance.
    pub(crate) accepted_per_s: f64,
    /// From the opening to the acceptance of the last unit, by the server's clock.
    pub(crate) sold_out_after_ms: Option<f64>,
    /// From the opening until the audit was seen not to be pending; at most this.
    pub(crate) stored_after_ms: Option<f64>,
}

/// Percentiles of latency by outcome.
#[derive(Debug, Serialize)]
pub(crate) struct ByOutcome {
    pub(crate) all: Percentiles,
    pub(crate) accepted: Percentiles,
    pub(crate) refused: Percentiles,
}

/// What the subscriber of the live stock saw.
#[derive(Debug, Serialize)]
pub(crate) struct Live {
    pub(crate) frames: usize,
    pub(crate) first_remaining: Option<u64>,
    pub(crate) last_remaining: Option<u64>,
}

/// What the harness itself used while the crowd was at it.
#[derive(Debug, Serialize)]
pub(crate) struct Generator {
    /// User and system time.
    pub(crate) cpu_ms: f64,
    pub(crate) wall_ms: f64,
    pub(crate) threads: usize,
    /// Of the time that its threads had, 0 to 1.
    pub(crate) cpu_share: f64,
    /// It was so busy that it was probably what was slow.
    pub(crate) bottleneck: bool,
}

/// A JSON value as a person reads it: text without its quotes.
fn plain(value: &serde_json::Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

impl Generator {
    pub(crate) fn new(cpu: Duration, wall: Duration, threads: usize) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "threads are few")]
        let cpu_share = cpu.as_secs_f64() / (wall.as_secs_f64() * threads as f64).max(1e-9);
        Self {
            cpu_ms: ms(cpu),
            wall_ms: ms(wall),
            threads,
            cpu_share,
            bottleneck: cpu_share >= BOTTLENECK_SHARE,
        }
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
        let mut max = Duration::ZERO;
        for duration in durations {
            max = max.max(duration);
            let us = u64::try_from(duration.as_micros()).unwrap_or(LATENCY_MAX_US);
            histogram.saturating_record(us);
        }
        #[expect(
            clippy::cast_precision_loss,
            reason = "an hour of microseconds is exact"
        )]
        let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e3;
        Ok(Self {
            count: histogram.len(),
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p99_9: at(0.999),
            max: ms(max),
        })
    }
}

impl Speed {
    /// From the records, and the two instants that only the server knows.
    pub(crate) fn of(
        records: &[Record],
        sold_out_after: Option<Duration>,
        stored_after: Option<Duration>,
    ) -> Result<Self> {
        let latency = |record: &Record| record.finished.saturating_sub(record.due);
        let accepted = |record: &&Record| matches!(record.outcome, Outcome::Accepted { .. });
        let refused = |record: &&Record| matches!(record.outcome, Outcome::Refused { .. });
        let last = |of: &dyn Fn(&&Record) -> bool| {
            let ends = records.iter().filter(of).map(|record| record.finished);
            ends.max().unwrap_or_default()
        };
        let duration = last(&|_| true);
        Ok(Self {
            latency_ms: ByOutcome {
                all: Percentiles::of(records.iter().map(latency))?,
                accepted: Percentiles::of(records.iter().filter(accepted).map(latency))?,
                refused: Percentiles::of(records.iter().filter(refused).map(latency))?,
            },
            service_ms: Percentiles::of(
                records
                    .iter()
                    .map(|record| record.finished.saturating_sub(record.last_sent)),
            )?,
            send_delay_ms: Percentiles::of(
                records
                    .iter()
                    .filter_map(|record| Some(record.first_sent?.saturating_sub(record.due))),
            )?,
            duration_ms: ms(duration),
            requests_per_s: per_second(records.len(), duration),
            accepted_per_s: per_second(records.iter().filter(accepted).count(), last(&accepted)),
            sold_out_after_ms: sold_out_after.map(ms),
            stored_after_ms: stored_after.map(ms),
        })
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn per_second(count: usize, duration: Duration) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
    let count = count as f64;
    count / duration.as_secs_f64().max(1e-6)
}

/// A count with a comma between thousands.
fn grouped(number: impl Display) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Setup {
            buyers,
            stock,
            seed,
            connections,
            ..
        } = &self.setup;
        let arrivals = match self.setup.rate_per_s {
            Some(rate) => format!("at {}/s", grouped(rate)),
            None => "all at once".to_owned(),
        };
        writeln!(
            f,
            "{} buyers for {} units, {arrivals}, over {} connections (seed {seed})\n",
            grouped(buyers),
            grouped(stock),
            grouped(connections),
        )?;
        if *connections < self.setup.connections_wanted {
            writeln!(
                f,
                "  Only {connections} of {} connections: the limit of open files, or the server, \
                 allowed no more.\n",
                self.setup.connections_wanted
            )?;
        }
        self.outcomes.fmt(f)?;
        if let Some(speed) = &self.speed {
            speed.fmt(f)?;
        }
        if let Some(outage) = &self.outage {
            outage.fmt(f)?;
        }
        if let Some(live) = &self.live {
            let show = |units: Option<u64>| units.map_or("?".to_owned(), grouped);
            writeln!(
                f,
                "  {:<26}{} → {} in {} frames",
                "live stock",
                show(live.first_remaining),
                show(live.last_remaining),
                grouped(live.frames),
            )?;
        }
        writeln!(
            f,
            "  {:<26}{:.0} % of {} thread{}",
            "harness used",
            self.generator.cpu_share * 100.0,
            self.generator.threads,
            if self.generator.threads == 1 { "" } else { "s" },
        )?;
        if self.generator.bottleneck {
            writeln!(
                f,
                "  The harness itself was probably the bottleneck: the server can do more."
            )?;
        }
        writeln!(f, "\n    {:<30}{:<22}actual", "check", "expected")?;
        for check in &self.checks {
            let mark = match check.status {
                Status::Pass => "✓",
                Status::Fail => "✗",
                Status::Skipped => "–",
            };
            writeln!(
                f,
                "  {mark} {:<30}{:<22}{}",
                check.name, check.expected, check.actual
            )?;
            for line in &check.counter_example {
                writeln!(f, "      {line}")?;
            }
        }
        if let Some(audit) = &self.audit {
            for check in &audit.checks {
                let mark = if check.status == "pass" { "✓" } else { "✗" };
                let (expected, actual) = (plain(&check.expected), plain(&check.actual));
                if expected == actual {
                    writeln!(f, "    {mark} {:<28}{actual}", check.name)?;
                } else {
                    writeln!(f, "    {mark} {:<28}{expected} → {actual}", check.name)?;
                }
            }
        }
        match self.verdict {
            "pass" => writeln!(f, "\n  PASS: every promise was kept."),
            _ => writeln!(
                f,
                "\n  FAIL: a promise was broken, or could not be checked (sale {}, seed {seed}).",
                self.setup.sale_id
            ),
        }
    }
}

impl Display for Outcomes {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut line = |name: &str, count: String| writeln!(f, "  {name:<22}{count:>10}");
        line("accepted", grouped(self.accepted))?;
        if self.replayed > 0 {
            line("  by replay", grouped(self.replayed))?;
        }
        for (kind, reasons) in [
            ("refused", &self.refused),
            ("failed", &self.failed),
            ("unknown", &self.unknown),
        ] {
            line(kind, grouped(reasons.values().sum::<usize>()))?;
            for (reason, count) in reasons {
                line(&format!("  {reason}"), grouped(count))?;
            }
        }
        if self.retries > 0 {
            line("tried again", grouped(self.retries))?;
        }
        writeln!(f)
    }
}

impl Display for Speed {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "  {:<22}{:>10}{:>10}{:>10}{:>10}{:>10}",
            "latency in ms", "p50", "p90", "p99", "p99.9", "max"
        )?;
        for (name, percentiles) in [
            ("planned → answer", &self.latency_ms.all),
            ("  accepted", &self.latency_ms.accepted),
            ("  refused", &self.latency_ms.refused),
            ("planned → sent", &self.send_delay_ms),
            ("sent → answer", &self.service_ms),
        ] {
            let Percentiles {
                p50,
                p90,
                p99,
                p99_9,
                max,
                count,
            } = percentiles;
            if *count > 0 {
                writeln!(
                    f,
                    "  {name:<22}{p50:>10.1}{p90:>10.1}{p99:>10.1}{p99_9:>10.1}{max:>10.1}"
                )?;
            }
        }
        writeln!(f)?;
        let mut line = |name: &str, value: String| writeln!(f, "  {name:<26}{value}");
        line("requests/s", grouped(self.requests_per_s.round()))?;
        line("accepted/s", grouped(self.accepted_per_s.round()))?;
        let after = |ms: f64| format!("{ms:.0} ms after the opening");
        line(
            "sold out",
            self.sold_out_after_ms.map_or("no".to_owned(), after),
        )?;
        line(
            "last order stored",
            self.stored_after_ms.map_or("unknown".to_owned(), after),
        )
    }
}

impl Display for Effect {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\n  {:<22}{:>10}{:>10}{:>10}{:>10}",
            "PostgreSQL away", "purchases", "p50", "p99", "max"
        )?;
        for (name, part) in [
            ("before", &self.before_ms),
            ("during", &self.during_ms),
            ("while it catches up", &self.draining_ms),
            ("after", &self.after_ms),
        ] {
            let Percentiles {
                count,
                p50,
                p99,
                max,
                ..
            } = part;
            let count = grouped(count);
            writeln!(
                f,
                "  {name:<22}{count:>10}{p50:>10.1}{p99:>10.1}{max:>10.1}"
            )?;
        }
        writeln!(
            f,
            "\n  away for {:.1} s; {} orders were not stored then, and were {:.1} s later; \
             p99 during it is {:.2} of that before\n",
            self.outage_ms / 1e3,
            grouped(self.backlog),
            self.drained_ms / 1e3,
            self.p99_ratio,
        )
    }
}

/// The document, for a file.
pub(crate) fn json(report: &Report) -> Result<String> {
    let mut text = serde_json::to_string_pretty(report)?;
    text.write_char('\n')?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_grouped_by_thousands() {
        assert_eq!(
            ["0", "999", "1,000", "1,234,567"],
            [0, 999, 1000, 1_234_567].map(grouped)
        );
    }

    #[test]
    fn percentiles_are_in_milliseconds() {
        let durations = (1..=1000).map(Duration::from_millis);
        let percentiles = Percentiles::of(durations).unwrap();
        assert_eq!(percentiles.count, 1000);
        for (value, wanted) in [
            (percentiles.p50, 500.0),
            (percentiles.p90, 900.0),
            (percentiles.p99, 990.0),
            (percentiles.p99_9, 999.0),
            (percentiles.max, 1000.0),
        ] {
            assert!((value / wanted - 1.0).abs() < 0.002, "{value} for {wanted}");
        }
    }
}
