//! Which plots a run has: latency, throughput, outcomes, remaining units, processor time.

use std::collections::{BTreeMap, BTreeSet};

use super::document::{Arrivals, Interval, Percentiles, Phase, Run, Series, Speed};
use super::plot::{Axis, Bars, Layer, Place, Plot, Shape, tail};
use super::text::{compact, number};

/// Below this ratio of highest to lowest a linear axis shows more.
const LOG_FROM: f64 = 20.0;

/// The colours of what happened to purchases.
const ACCEPTED: usize = 2;
const FAILED: usize = 7;
const REFUSED: [usize; 5] = [5, 4, 3, 6, 1];

/// Lines of a plot: what they are called, their colours, and where their values come from.
type Lines<Of> = [(&'static str, usize, Of); 3];

/// A plot under a name that a file can have.
pub(crate) struct Chart {
    pub(crate) name: &'static str,
    pub(crate) title: String,
    pub(crate) summary: String,
    drawn: Drawn,
}

enum Drawn {
    Plot(Plot),
    Bars(Bars),
}

impl Chart {
    fn plot(name: &'static str, plot: Plot) -> Self {
        Self {
            name,
            title: plot.title.clone(),
            summary: plot.summary.clone(),
            drawn: Drawn::Plot(plot),
        }
    }

    fn bars(name: &'static str, bars: Bars) -> Self {
        Self {
            name,
            title: bars.title.clone(),
            summary: bars.summary.clone(),
            drawn: Drawn::Bars(bars),
        }
    }

    /// The same without what a pointer is told.
    pub(crate) fn plain(mut self) -> Self {
        if let Drawn::Plot(plot) = &mut self.drawn {
            plot.hints.clear();
        }
        self
    }

    /// The drawing.
    pub(crate) fn svg(&self, place: Place) -> String {
        match &self.drawn {
            Drawn::Plot(plot) => plot.svg(place),
            Drawn::Bars(bars) => bars.svg(place),
        }
    }
}

/// The plots of one phase; none if a promise was broken.
pub(crate) fn of_phase(phase: &Phase) -> Vec<Chart> {
    let Some(speed) = &phase.speed else {
        return Vec::new();
    };
    let mut charts = vec![percentiles(speed)];
    if speed.series.rows.len() > 2 {
        let time = Time::of(&speed.series);
        charts.push(latency(&speed.series, &time));
        charts.push(throughput(&speed.series, &time));
        charts.push(outcomes(&speed.series, &time));
        charts.extend(remaining(&speed.series, &time));
        charts.extend(memory(phase, &time));
    }
    charts
}

/// The plots of the run as a whole.
pub(crate) fn of_run(run: &Run) -> Vec<Chart> {
    ladder(&run.phases)
        .into_iter()
        .chain(cpu(&run.phases))
        .collect()
}

/// How instants are shown.
struct Time {
    label: &'static str,
    per_ms: f64,
    until_ms: f64,
}

impl Time {
    fn of(series: &Series) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "intervals are few")]
        let until_ms = series.rows.len() as f64 * series.interval_ms;
        let (label, per_ms) = if until_ms < 5000.0 {
            ("ms after the opening", 1.0)
        } else if until_ms < 600_000.0 {
            ("seconds after the opening", 1e-3)
        } else {
            ("minutes after the opening", 1e-3 / 60.0)
        };
        Self {
            label,
            per_ms,
            until_ms,
        }
    }

    fn axis(&self) -> Axis {
        let until = self.until_ms * self.per_ms;
        Axis::linear(self.label, until).until(until)
    }

    /// The middle of an interval.
    fn middle(&self, series: &Series, row: &Interval) -> f64 {
        (row.at_ms + series.interval_ms / 2.0) * self.per_ms
    }

    fn hints(
        &self,
        series: &Series,
        hint: impl Fn(&Interval) -> String,
    ) -> Vec<(f64, f64, String)> {
        let unit = self.label.split(' ').next().unwrap_or_default();
        let hint = |row: &Interval| {
            let from = row.at_ms * self.per_ms;
            let text = format!("{} {unit}: {}", number(from), hint(row));
            (from, (row.at_ms + series.interval_ms) * self.per_ms, text)
        };
        series.rows.iter().map(hint).collect()
    }
}

fn ended(row: &Interval) -> u64 {
    row.accepted + row.refused.values().sum::<u64>() + row.failed
}

/// A count in one interval as a rate.
fn per_second(series: &Series, count: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
    let count = count as f64;
    count * 1e3 / series.interval_ms
}

/// An axis for durations between these.
fn durations(label: &str, values: impl Iterator<Item = f64>) -> Axis {
    let (least, most) = values
        .filter(|value| *value > 0.0)
        .fold((f64::MAX, 0.0_f64), |(least, most), value| {
            (least.min(value), most.max(value))
        });
    if most > 0.0 && most / least >= LOG_FROM {
        Axis::log(label, least, most)
    } else {
        Axis::linear(label, most)
    }
}

fn percentiles(speed: &Speed) -> Chart {
    let latency = &speed.latency_ms;
    let known = [
        ("accepted", &latency.accepted, ACCEPTED),
        ("refused", &latency.refused, 5),
        ("all", &latency.all, 0),
        ("sent → answer", &latency.service, 1),
    ];
    let is_one_kind = latency.accepted.count == 0 || latency.refused.count == 0;
    let mut curves: Vec<(&str, &Percentiles, usize)> = known
        .into_iter()
        // With one kind of outcome, its curve is the curve of all.
        .filter(|(name, ..)| !is_one_kind || !matches!(*name, "accepted" | "refused"))
        .collect();
    for (n, (name, durations)) in speed.other_ms.iter().enumerate() {
        curves.push((name, durations, [3, 6, 4][n % 3]));
    }
    curves.retain(|(_, durations, _)| durations.count > 0);
    let all = &latency.all;
    // Beyond this quantile there is not one purchase.
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
    let highest = 1.0 - 1.0 / all.count.max(2) as f64;
    let points = |durations: &Percentiles| {
        let curve = durations.curve.iter();
        curve
            .filter(|(quantile, _)| *quantile <= highest)
            .map(|(quantile, ms)| (tail(*quantile), Some(*ms)))
            .collect::<Vec<_>>()
    };
    let values = curves
        .iter()
        .flat_map(|(_, durations, _)| points(durations))
        .filter_map(|(_, ms)| ms);
    Chart::plot(
        "percentiles",
        Plot {
            title: "Latency by percentile".to_owned(),
            summary: format!(
                "From the planned instant to the final answer: half of the purchases within {} \
                 ms, 99 % within {} ms, 99.9 % within {} ms, all within {} ms.",
                number(all.p50),
                number(all.p99),
                number(all.p99_9),
                number(all.max)
            ),
            x: Axis::quantiles(highest),
            y: durations("ms", values),
            layers: curves
                .iter()
                .map(|(name, durations, colour)| Layer {
                    label: (*name).to_owned(),
                    colour: *colour,
                    shape: Shape::Line(points(durations)),
                })
                .collect(),
            hints: Vec::new(),
        },
    )
}

fn latency(series: &Series, time: &Time) -> Chart {
    let of: Lines<fn(&Interval) -> Option<f64>> = [
        ("max", 5, |row| row.max_ms),
        ("p99", 1, |row| row.p99_ms),
        ("p50", 0, |row| row.p50_ms),
    ];
    let values = series
        .rows
        .iter()
        .flat_map(|row| [row.p50_ms, row.p99_ms, row.max_ms])
        .flatten();
    let worst = series
        .rows
        .iter()
        .filter_map(|row| Some((row.p99_ms?, row.at_ms)))
        .fold(
            (0.0, 0.0),
            |worst, row| if row.0 > worst.0 { row } else { worst },
        );
    let show = |ms: Option<f64>| ms.map_or("–".to_owned(), number);
    Chart::plot(
        "latency",
        Plot {
            title: "Latency over time".to_owned(),
            summary: format!(
                "Of what ended in each {} ms. The worst 99th percentile is {} ms, {} {}.",
                compact(series.interval_ms),
                number(worst.0),
                number(worst.1 * time.per_ms),
                time.label
            ),
            x: time.axis(),
            y: durations("ms", values),
            layers: of
                .into_iter()
                .map(|(label, colour, of)| Layer {
                    label: label.to_owned(),
                    colour,
                    shape: Shape::Line(
                        series
                            .rows
                            .iter()
                            .map(|row| (time.middle(series, row), of(row)))
                            .collect(),
                    ),
                })
                .collect(),
            hints: time.hints(series, |row| {
                format!(
                    "p50 {} ms, p99 {} ms, max {} ms",
                    show(row.p50_ms),
                    show(row.p99_ms),
                    show(row.max_ms)
                )
            }),
        },
    )
}

fn throughput(series: &Series, time: &Time) -> Chart {
    let of: Lines<fn(&Interval) -> u64> = [
        ("sent", 5, |row| row.sent),
        ("answered", 0, ended),
        ("accepted", ACCEPTED, |row| row.accepted),
    ];
    let most = series.rows.iter().map(|row| ended(row).max(row.sent)).max();
    let best = series.rows.iter().map(|row| row.accepted).max();
    Chart::plot(
        "throughput",
        Plot {
            title: "Throughput over time".to_owned(),
            summary: format!(
                "Purchases per second in each {} ms. At best {} were accepted per second.",
                compact(series.interval_ms),
                number(per_second(series, best.unwrap_or(0)))
            ),
            x: time.axis(),
            y: Axis::linear("per second", per_second(series, most.unwrap_or(0))),
            layers: of
                .into_iter()
                .map(|(label, colour, of)| Layer {
                    label: label.to_owned(),
                    colour,
                    shape: Shape::Line(
                        series
                            .rows
                            .iter()
                            .map(|row| {
                                let rate = per_second(series, of(row));
                                (time.middle(series, row), Some(rate))
                            })
                            .collect(),
                    ),
                })
                .collect(),
            hints: time.hints(series, |row| {
                let rate = |count| number(per_second(series, count));
                format!(
                    "{}/s sent, {}/s answered, {}/s accepted",
                    rate(row.sent),
                    rate(ended(row)),
                    rate(row.accepted)
                )
            }),
        },
    )
}

fn outcomes(series: &Series, time: &Time) -> Chart {
    let codes: BTreeSet<&str> = series
        .rows
        .iter()
        .flat_map(|row| row.refused.keys().map(String::as_str))
        .collect();
    let mut kinds: Vec<(&str, usize)> = vec![("accepted", ACCEPTED)];
    for (n, code) in codes.iter().enumerate() {
        kinds.push((*code, REFUSED[n % REFUSED.len()]));
    }
    if series.rows.iter().any(|row| row.failed > 0) {
        kinds.push(("given up", FAILED));
    }
    let count = |row: &Interval, kind: &str| match kind {
        "accepted" => row.accepted,
        "given up" => row.failed,
        code => row.refused.get(code).copied().unwrap_or(0),
    };
    let mut totals: BTreeMap<&str, u64> = BTreeMap::new();
    let mut layers: Vec<Layer> = kinds
        .iter()
        .map(|(kind, colour)| Layer {
            label: (*kind).to_owned(),
            colour: *colour,
            shape: Shape::Area(Vec::with_capacity(series.rows.len() * 2)),
        })
        .collect();
    let mut most = 0.0_f64;
    for row in &series.rows {
        let mut lower = 0.0;
        for ((kind, _), layer) in kinds.iter().zip(&mut layers) {
            let upper = lower + per_second(series, count(row, kind));
            *totals.entry(*kind).or_default() += count(row, kind);
            if let Shape::Area(edges) = &mut layer.shape {
                // Steps: an interval is as high as it is, not a slope to the next one.
                edges.push((row.at_ms * time.per_ms, lower, upper));
                edges.push(((row.at_ms + series.interval_ms) * time.per_ms, lower, upper));
            }
            lower = upper;
        }
        most = most.max(lower);
    }
    let words: Vec<String> = kinds
        .iter()
        .map(|(kind, _)| format!("{} {kind}", totals[kind]))
        .collect();
    Chart::plot(
        "outcomes",
        Plot {
            title: "How purchases ended".to_owned(),
            summary: format!("In total {}.", words.join(", ")),
            x: time.axis(),
            y: Axis::linear("per second", most),
            layers,
            hints: time.hints(series, |row| {
                let words: Vec<String> = kinds
                    .iter()
                    .map(|(kind, _)| (kind, count(row, kind)))
                    .filter(|(_, count)| *count > 0)
                    .map(|(kind, count)| format!("{count} {kind}"))
                    .collect();
                words.join(", ")
            }),
        },
    )
}

fn remaining(series: &Series, time: &Time) -> Option<Chart> {
    let first = series.rows.first()?;
    let stock = first.remaining? + first.accepted;
    let last = series.rows.last()?.remaining?;
    let left = series.rows.iter().filter_map(|row| {
        let at = (row.at_ms + series.interval_ms) * time.per_ms;
        #[expect(clippy::cast_precision_loss, reason = "stock is at most 10^7")]
        let units = row.remaining? as f64;
        Some((at, Some(units)))
    });
    #[expect(clippy::cast_precision_loss, reason = "stock is at most 10^7")]
    let most = stock as f64;
    Some(Chart::plot(
        "remaining",
        Plot {
            title: "Units left".to_owned(),
            summary: format!("Counted from the answers: {last} at the end."),
            x: time.axis(),
            y: Axis::linear("units", most),
            layers: vec![Layer {
                label: "remaining".to_owned(),
                colour: 0,
                shape: Shape::Line(left.collect()),
            }],
            hints: time.hints(series, |row| {
                let left = row.remaining;
                left.map_or(String::new(), |left| format!("then {left} left"))
            }),
        },
    ))
}

fn memory(phase: &Phase, time: &Time) -> Option<Chart> {
    #[expect(clippy::cast_precision_loss, reason = "memory is far below 2^53")]
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let sampled = phase
        .processes
        .iter()
        .filter(|process| process.samples.len() > 2);
    let layers: Vec<Layer> = sampled
        .clone()
        .enumerate()
        .map(|(n, process)| Layer {
            label: process.name.clone(),
            colour: n % 7,
            shape: Shape::Line(
                process
                    .samples
                    .iter()
                    .map(|sample| (sample.at_ms * time.per_ms, Some(mib(sample.rss_bytes))))
                    .collect(),
            ),
        })
        .collect();
    let most = sampled
        .flat_map(|process| &process.samples)
        .map(|sample| sample.rss_bytes)
        .max()?;
    Some(Chart::plot(
        "memory",
        Plot {
            title: "Memory by process".to_owned(),
            summary: format!("Resident; at most {} MiB.", number(mib(most))),
            x: time.axis(),
            y: Axis::linear("MiB", mib(most)),
            layers,
            hints: Vec::new(),
        },
    ))
}

/// Latency against the rate offered, where a run has steps.
fn ladder(phases: &[Phase]) -> Option<Chart> {
    let steps: Vec<(f64, &Speed)> = phases
        .iter()
        .filter_map(|phase| match (phase.arrivals, &phase.speed) {
            (Arrivals::Rate { per_s }, Some(speed)) => Some((per_s, speed)),
            _ => None,
        })
        .collect();
    if steps.len() < 3 {
        return None;
    }
    let mut steps = steps;
    steps.sort_by(|one, other| one.0.total_cmp(&other.0));
    let of: Lines<fn(&Percentiles) -> f64> = [
        ("p50", 0, |latency| latency.p50),
        ("p99", 1, |latency| latency.p99),
        ("p99.9", 5, |latency| latency.p99_9),
    ];
    let most = steps
        .iter()
        .fold(0.0_f64, |most, (rate, _)| most.max(*rate));
    let values = steps
        .iter()
        .flat_map(|(_, speed)| of.map(|(.., of)| of(&speed.latency_ms.all)));
    Some(Chart::plot(
        "ladder",
        Plot {
            title: "Latency by rate offered".to_owned(),
            summary: format!(
                "{} steps up to {} purchases per second.",
                steps.len(),
                number(most)
            ),
            x: Axis::linear("purchases per second", most),
            y: durations("ms", values),
            layers: of
                .into_iter()
                .map(|(label, colour, of)| Layer {
                    label: label.to_owned(),
                    colour,
                    shape: Shape::Line(
                        steps
                            .iter()
                            .map(|(rate, speed)| (*rate, Some(of(&speed.latency_ms.all))))
                            .collect(),
                    ),
                })
                .collect(),
            hints: Vec::new(),
        },
    ))
}

/// Processor time for each purchase, by process, next to each other for all phases.
fn cpu(phases: &[Phase]) -> Option<Chart> {
    let measured: Vec<&Phase> = phases
        .iter()
        .filter(|phase| !phase.processes.is_empty())
        .collect();
    let mut parts: Vec<String> = Vec::new();
    for process in measured.iter().flat_map(|phase| &phase.processes) {
        if !parts.contains(&process.name) {
            parts.push(process.name.clone());
        }
    }
    if parts.is_empty() {
        return None;
    }
    let each_accepted = measured
        .iter()
        .flat_map(|phase| &phase.processes)
        .all(|process| process.us_per_accepted.is_some());
    let rows = measured.iter().map(|phase| {
        let used = parts.iter().map(|part| {
            let process = phase.processes.iter().find(|process| process.name == *part);
            let used = process.and_then(|process| {
                if each_accepted {
                    process.us_per_accepted
                } else {
                    process.us_per_request
                }
            });
            used.unwrap_or(0.0)
        });
        (phase.name.clone(), used.collect())
    });
    let per = if each_accepted {
        "accepted order"
    } else {
        "purchase"
    };
    Some(Chart::bars(
        "cpu",
        Bars {
            title: format!("Processor time for each {per}"),
            summary: format!("By process: {}.", parts.join(", ")),
            unit: "µs".to_owned(),
            rows: rows.collect(),
            parts,
        },
    ))
}
